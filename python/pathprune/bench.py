"""``pathprune bench``: runs the benchmarks of a checkout in a process of their own.

The benchmarks are not part of the installed package: most of their code is other people's algorithms, written out with
their costs, which nobody should import. They come with the source (a clone or the sdist). The process is a new one
because large pages and the number of OpenMP threads are decided when torch is loaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# What every figure of this project was taken under, unless the environment says otherwise.
SETTING = {"THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": "1"}


def find_benchmarks() -> Path:
    """The folder ``benchmarks`` of the source that this package runs from, else of the one around the working folder.

    Raises:
        FileNotFoundError: there is neither; says where they are.
    """
    own = Path(__file__).resolve().parents[2]
    around = [Path.cwd(), *Path.cwd().parents]
    for root in (own, *around):
        if (root / "benchmarks" / "run.py").is_file() and _is_ours(root / "pyproject.toml"):
            return root / "benchmarks"
    raise FileNotFoundError(
        "bench: the benchmarks come with the source, not with the installed package: run this inside a checkout or an "
        f"unpacked source distribution of pathprune (looked in {own} and from {Path.cwd()} upwards)"
    )


def _is_ours(project: Path) -> bool:
    return project.is_file() and re.search(r'^name = "pathprune"$', project.read_text(), re.MULTILINE) is not None


def run(arguments: Sequence[str]) -> int:
    """Runs ``benchmarks/run.py``; its output is this process's. Returns its exit code.

    Raises:
        FileNotFoundError: there are no benchmarks here.
    """
    command = [sys.executable, str(find_benchmarks() / "run.py"), *arguments]
    environment = {**SETTING, **os.environ, "PATHPRUNE_BENCH_NAME": "pathprune bench"}
    return subprocess.run(command, env=environment, check=False).returncode
