"""Installs a wheel into clean environments, one for each release of torch, and tries it there.

    python scripts/wheel_check.py dist/pathprune-*.whl [--torch 2.10.0 2.13.0 newest] [--room 15]

Each environment is made in a folder that is removed again. The registry's torch brings several GB of CUDA packages;
where less than ``--room`` GB are free, or torch cannot be installed, a release is listed as untried. What is tried: the
import, which compiled libraries load, masks of SynFlow, PHEW and magnitude against the plain-torch reference, mask
files, a sparse product, the command line. A CUDA build of torch loads the CUDA library too, also without a GPU.

Exit code 1 if a release was tried and failed, or none could be tried.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RELEASES = ("2.10.0", "2.13.0", "newest")

SMOKE = """
import os, sys, tempfile, torch, pathprune as pp
from pathlib import Path
from pathprune import _library, info, models
place = Path(pp.__file__).resolve()
assert Path(sys.prefix).resolve() in place.parents, f"{place} is not of this environment"
binary = not _library.DISABLED
assert _library.cpu_loaded == binary, _library.cpu_error
if binary and torch.version.cuda is not None and info.build_info()["nvcc_version"] is not None:
    assert _library.cuda_loaded, _library.cuda_error
torch.manual_seed(0)
model, x = models.resnet20(), torch.ones(1, 3, 32, 32)
digest = []
for pruner in (pp.SynFlow(rounds=5), pp.PHEW(), pp.Magnitude(), pp.PX([torch.randn(4, 3, 32, 32)], rounds=2)):
    masks = pp.prune(model, pruner, density=0.1, example_input=x, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        masks.save(Path(folder) / "masks.safetensors")
        assert pp.Masks.load(Path(folder) / "masks.safetensors") == masks
    digest.append((pruner.name, masks.kept, float(sum(m.double().flatten() @ torch.arange(m.numel()).double()
                                                      for m in masks.values()))))
weight, rows = torch.randn(64, 96), torch.randn(7, 96)
mask = torch.rand(64, 96) < 0.1
torch.testing.assert_close(pp.masked_matmul(rows, weight, mask), rows @ (weight * mask).T)
loaded = " + ".join(kind for kind, there in (("CPU", _library.cpu_loaded), ("CUDA", _library.cuda_loaded)) if there)
print(torch.__version__, loaded or "no", "libraries", digest, sep="|")
"""


@dataclass(frozen=True)
class Outcome:
    """How a release of torch went: ``state`` is passed, failed or untried."""

    release: str
    state: str
    detail: str


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder of its own, where nothing of a checkout is imported by chance."""
    clean = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1", **environment}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=folder, env=clean, capture_output=True, text=True, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def check(wheel: Path, release: str, room: float, scratch: Path) -> Outcome:
    """Tries the wheel with a release of torch in an environment that is removed again."""
    free = shutil.disk_usage(scratch).free / 1e9
    if free < room:
        return Outcome(release, "untried", f"{free:.0f} GB are free, {room:.0f} GB wanted")
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        made = run([sys.executable, "-m", "venv", folder / "env"], folder)
        if made.returncode:
            return Outcome(release, "failed", last_line(made))
        python = folder / "env" / "bin" / "python"
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir"]
        torch = "torch" if release == "newest" else f"torch=={release}"
        installed = run([*pip, torch, *(["--upgrade"] if release == "newest" else [])], folder)
        if installed.returncode:
            return Outcome(release, "untried", last_line(installed))
        installed = run([*pip, f"{wheel}[cli]"], folder)
        if installed.returncode:
            return Outcome(release, "failed", last_line(installed))
        return _try(python, release, folder)


def _try(python: Path, release: str, folder: Path) -> Outcome:
    tried = [run([python, "-c", SMOKE], folder), run([python, "-c", SMOKE], folder, PATHPRUNE_DISABLE_BINARY="1")]
    for done in tried:
        if done.returncode:
            return Outcome(release, "failed", last_line(done))
    compiled, plain = (done.stdout.strip().split("|") for done in tried)
    if compiled[2] != plain[2]:
        return Outcome(release, "failed", f"masks {compiled[2]}, of the reference {plain[2]}")
    options = ["--model", "pathprune.models:lenet_300_100", "--input-shape", "1,784", "--density", "0.1"]
    command = [python.parent / "pathprune", "prune", *options, "--rounds", "2", "--out", "out"]
    done = run(command, folder)
    if done.returncode or not (folder / "out" / "masks.safetensors").is_file():
        return Outcome(release, "failed", last_line(done))
    return Outcome(release, "passed", f"torch {compiled[0]}, {compiled[1]} loaded; masks as by the reference")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", default=RELEASES, help="releases; `newest` is what the registry has")
    parser.add_argument("--room", type=float, default=15, help="GB that must be free")
    parser.add_argument("--scratch", type=Path, default=Path("build/wheel-check"), help="where environments are made")
    options = parser.parse_args(arguments)
    if not options.wheel.is_file():
        parser.error(f"wheel: wanted a file, got {options.wheel}")
    options.scratch.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for release in options.torch:
        outcomes.append(check(options.wheel.resolve(), release, options.room, options.scratch.resolve()))
        print(f"{outcomes[-1].release:>8}  {outcomes[-1].state:<8}{outcomes[-1].detail}", flush=True)
    states = [outcome.state for outcome in outcomes]
    return int("failed" in states or "passed" not in states)


if __name__ == "__main__":
    sys.exit(main())
