"""Adds to a JSON file what one step of scripts/gpu.sh did: for how long, how it ended, and which tests failed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

OUTCOMES = ("passed", "failed", "errors", "error", "skipped", "deselected")
TAIL = 6000  # characters of the log that are kept


def test_counts(log: str) -> dict[str, int]:
    """The numbers of pytest's last line: `3 failed, 200 passed, 5 deselected in 12.3s`."""
    lines = [line for line in log.splitlines() if re.search(r" in \d+\.\d+s", line)]
    found = re.findall(rf"(\d+) ({'|'.join(OUTCOMES)})\b", lines[-1]) if lines else []
    return {outcome: int(number) for number, outcome in found}


def failures(log: str) -> list[str]:
    """The lines of pytest's summary: `FAILED tests/test_x.py::test_y[cuda] - RuntimeError: ...`."""
    return sorted({line for line in log.splitlines() if re.match(r"(FAILED|ERROR) tests/", line)})


def machine() -> dict[str, Any]:
    """The GPU, torch and Python of this machine."""
    import torch  # seconds, which the steps after the first need not take

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
        "tests": test_counts(log),
        "failures": failures(log),
        "log_tail": log[-TAIL:],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = json.loads(options.out.read_text()) if options.out.exists() else {**machine(), "steps": []}
    written["steps"] = [step for step in written["steps"] if step["step"] != options.step] + [summary]
    part = options.out.with_suffix(".part")
    part.write_text(json.dumps(written, indent=2) + "\n")
    os.replace(part, options.out)  # whole, wherever the run is cut off
    print(f"{options.step}: {summary['result']} after {options.seconds} s -> {options.out}")


if __name__ == "__main__":
    main()
