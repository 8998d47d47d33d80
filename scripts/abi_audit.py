"""Checks that compiled libraries use the LibTorch Stable ABI alone, and says which systems they need.

    python scripts/abi_audit.py dist/pathprune-0.1.0-*.whl      # or .so files, or a folder of them

Of torch a library may use the C functions of the stable ABI (``aoti_torch_*``, ``torch_*``); everything in C++ that
belongs to torch (``c10::``, ``at::``, ``torch::``) changes between releases and fails. The extension module ``_C`` may
use nothing of torch at all. No library may carry a search path of the machine that built it. Needs nm and readelf.

Exit code 1 if a library breaks a rule.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STABLE = re.compile(r"(aoti_torch_|torch_)[a-z0-9_]+")
# Versioned symbols are glibc's, libstdc++'s and libgcc's: their floors are reported. The bare names are weak
# references that every shared object has.
SYSTEM = re.compile(
    r".+@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+|__gmon_start__|_ITM_(de)?registerTMCloneTable|__cxa_finalize"
)
# The C++ runtime without a version: what the linker met first in a library of torch that carries a copy. The copy, or
# libstdc++ of the version the wheel's tag implies, serves at run time.
RUNTIME = re.compile(r"_ZN?K?[RO]?S[tabsiod].*|_ZT[VIS](N10__cxxabiv1|S[tabsiod]|N?St).*|__cxa_\w+|_Zn[wa].*|_Zd[la].*")
PYTHON = re.compile(r"_?Py\w*")
LIBRARIES = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "libpthread.so.0"}
LIBRARIES |= {"libdl.so.2", "librt.so.1", "ld-linux-aarch64.so.1"}
TORCH = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}


@dataclass
class Finding:
    """What a library asks of others. ``wrong`` is empty where it keeps the rules; ``floors`` name -> version."""

    name: str
    stable: list[str] = field(default_factory=list)
    floors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        floors = ", ".join(f"{name} {'.'.join(map(str, found))}" for name, found in sorted(self.floors.items()))
        lines = [f"{self.name}: {len(self.stable)} symbols of the stable ABI; needs {floors or 'nothing versioned'}"]
        return "\n".join(lines + [f"  WRONG: {what}" for what in self.wrong])


def judge(name: str, symbols: Sequence[str], needed: Sequence[str] = (), search_path: str = "") -> Finding:
    """Judges undefined symbols (as nm writes them), needed libraries and a search path by the rules."""
    found = Finding(name)
    is_module = name.startswith("_C.")
    for symbol in symbols:
        for kind, version in re.findall(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)", symbol):
            number = tuple(int(part) for part in version.split("."))
            found.floors[kind] = max(found.floors.get(kind, (0,)), number)
        if STABLE.fullmatch(symbol):
            found.stable.append(symbol)
            if is_module:
                found.wrong.append(f"uses {symbol}, but knows nothing of torch")
        elif not (SYSTEM.fullmatch(symbol) or RUNTIME.fullmatch(symbol) or (is_module and PYTHON.fullmatch(symbol))):
            found.wrong.append(f"uses {symbol}, which no stable ABI has")
    allowed = LIBRARIES if is_module else LIBRARIES | TORCH
    found.wrong += [f"needs {library}" for library in needed if library not in allowed]
    if search_path:
        found.wrong.append(f"looks for libraries in {search_path}")
    return found


def audit(library: Path) -> Finding:
    """Judges a shared library.

    Raises:
        ValueError: the file is no shared library.
    """
    undefined = _run(["nm", "-D", "--undefined-only", str(library)])
    dynamic = _run(["readelf", "--dynamic", "--wide", str(library)])
    symbols = [line.split()[-1] for line in undefined.splitlines() if line.strip()]
    needed = re.findall(r"\(NEEDED\)[^\[]*\[([^\]]+)\]", dynamic)
    path = re.search(r"\(R(?:UN)?PATH\)[^\[]*\[([^\]]*)\]", dynamic)
    return judge(library.name, symbols, needed, path[1] if path else "")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or (not done.stdout and done.stderr):
        raise ValueError(f"abi_audit: {command[-1]}: wanted a shared library: {done.stderr.strip()}")
    return done.stdout


def libraries(path: Path, scratch: Path) -> Iterator[Path]:
    """The shared libraries that a wheel, a folder or a file name stands for."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(scratch / path.stem)
        path = scratch / path.stem
    found = sorted(path.rglob("*.so")) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"abi_audit: {path}: wanted shared libraries, found none")
    yield from found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="wheels, folders or shared libraries")
    bad = False
    with tempfile.TemporaryDirectory() as scratch:
        for path in parser.parse_args(arguments).paths:
            try:
                findings = [audit(library) for library in libraries(path, Path(scratch))]
            except (ValueError, OSError, zipfile.BadZipFile) as error:
                print(error, file=sys.stderr)
                return 1
            print("\n".join(map(str, findings)))
            bad |= any(finding.wrong for finding in findings)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
