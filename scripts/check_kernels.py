"""Compiles every CUDA kernel and tables its registers, shared memory, spills and stack. A spill fails.

Reads the compile commands of a configured build folder, so that the flags are those of the real build.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"Compiling entry function '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
NAME_WIDTH = 90


@dataclass
class Kernel:
    """What ptxas says of one kernel; bytes, except registers."""

    name: str
    stack: int = 0
    stores: int = 0
    loads: int = 0
    registers: int = 0
    shared: int = 0

    @property
    def spills(self) -> bool:
        return self.stores > 0 or self.loads > 0


def parse(log: str) -> list[Kernel]:
    """The kernels of a log of `ptxas -v`, by their mangled names."""
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if found := FUNCTION.search(line):
            kernels.append(Kernel(found[1]))
        if not kernels:
            continue
        if found := FRAME.search(line):
            # A device function that was not inlined has a frame of its own; it counts for its kernel.
            kernels[-1].stack = max(kernels[-1].stack, int(found[1]))
            kernels[-1].stores += int(found[2])
            kernels[-1].loads += int(found[3])
        if found := REGISTERS.search(line):
            kernels[-1].registers = int(found[1])
            shared = SHARED.search(line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def without_architecture(command: list[str]) -> list[str]:
    """The command less its output file and the GPU generations it compiles for."""
    kept: list[str] = []
    skip = False
    for word in command:
        if skip:
            skip = False
        elif word in ("-o", "-MF", "-MT", "-gencode", "--generate-code", "-arch"):
            skip = True
        elif not word.startswith(("--generate-code=", "-gencode=", "-arch=", "-MD")):
            kept.append(word)
    return kept


def compile_one(entry: dict[str, str], architecture: str) -> tuple[str, list[Kernel]]:
    """Compiles one .cu file; returns its path and its kernels."""
    words = without_architecture(shlex.split(entry["command"]))
    with tempfile.TemporaryDirectory() as folder:
        words += [f"-arch={architecture}", "-Xptxas", "-v", "-o", str(Path(folder) / "kernels.o")]
        done = subprocess.run(words, cwd=entry["directory"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{entry['file']} does not compile:\n{done.stdout}{done.stderr}")
    return entry["file"], parse(done.stdout + done.stderr)


def demangle(names: list[str]) -> list[str]:
    """Readable names, without the return type, the arguments and this project's namespace."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
        readable = done.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        readable = names
    return [shorten(name) for name in readable]


def shorten(name: str) -> str:
    """`void pathprune::(anonymous namespace)::sweep<float>(float const*)` -> `sweep<float>`."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|pathprune::", "", name).removeprefix("void ")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def table(kernels: list[Kernel]) -> str:
    """One line a kernel."""
    rows = [("registers", "shared", "spill st/ld", "stack", "kernel")]
    for name, kernel in zip(demangle([kernel.name for kernel in kernels]), kernels, strict=True):
        spills = f"{kernel.stores}/{kernel.loads}" + (" !" if kernel.spills else "")
        rows.append((str(kernel.registers), str(kernel.shared), spills, str(kernel.stack), name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for *numbers, name in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths, strict=False)]
        lines.append(" | ".join([*cells, name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"]))
    return "\n".join(lines)


def cuda_entries(build: Path) -> list[dict[str, str]]:
    """The compile commands of the .cu files."""
    database = build / "compile_commands.json"
    if not database.is_file():
        sys.exit(f"{database} is missing: `make build` writes it")
    return [entry for entry in json.loads(database.read_text()) if entry["file"].endswith(".cu")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/editable"), help="a configured build folder")
    parser.add_argument("--arch", default="sm_90", help="the GPU generation to compile for")
    options = parser.parse_args()

    sources = sorted(Path("csrc").rglob("*.cu"))
    entries = cuda_entries(options.build)
    if sources and not entries:
        print("nvcc was not found when the build was configured: no CUDA kernel could be checked.")
        if os.environ.get("PATHPRUNE_ALLOW_NO_NVCC") == "1":
            return 0
        print("PATHPRUNE_ALLOW_NO_NVCC=1 lets this pass.")
        return 1

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        compiled = dict(pool.map(lambda entry: compile_one(entry, options.arch), entries))
    kernels = [kernel for file in sorted(compiled) for kernel in compiled[file]]
    print(table(kernels))
    spilling = sum(kernel.spills for kernel in kernels)
    print(f"\n{len(kernels)} kernels in {len(entries)} files for {options.arch}; {spilling} of them spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
