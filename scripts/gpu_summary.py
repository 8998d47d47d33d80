"""Writes what one step of scripts/gpu.sh did as JSON: on which machine, for how long, and how it ended."""

from __future__ import annotations

import argparse
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

OUTCOMES = ("passed", "failed", "errors", "error", "skipped", "deselected")
TAIL = 6000  # characters of the log that are kept


def test_counts(log: str) -> dict[str, int]:
    """The numbers of pytest's last line: `3 failed, 200 passed, 5 deselected in 12.3s`."""
    lines = [line for line in log.splitlines() if re.search(r" in \d+\.\d+s", line)]
    found = re.findall(rf"(\d+) ({'|'.join(OUTCOMES)})\b", lines[-1]) if lines else []
    return {outcome: int(number) for number, outcome in found}


def machine() -> dict[str, Any]:
    """The GPU, torch and Python of this machine."""
    here = torch.cuda.is_available()
    return {
        "machine": platform.node(),
        "gpu": torch.cuda.get_device_name() if here else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--step", required=True)
    parser.add_argument("--status", required=True, help="an exit status, or `skipped`")
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    options = parser.parse_args()

    log = options.log.read_text(errors="replace")
    endings = {"0": "passed", "124": "timed out", "137": "timed out", "skipped": "skipped"}
    summary = {
        "step": options.step,
        "result": endings.get(options.status, f"failed with status {options.status}"),
        "seconds": options.seconds,
        **machine(),
        "tests": test_counts(log),
        "log_tail": log[-TAIL:],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{options.step}: {summary['result']} after {options.seconds} s -> {options.out}")


if __name__ == "__main__":
    main()
