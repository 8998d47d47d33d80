"""The CUDA kernels: shapes at the edges of their tiles, and every kernel run on the host, without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import op_samples
from op_samples import Case, draw, samples
from pathprune import reference
from pathprune.ops import WeightMap
from test_ops import NAMES, by_name, compare, exactly, loaded, run

ROOT = Path(__file__).parent.parent
EMULATED = ROOT / "tests" / "emulated_cuda"

# A tile is a row by 512 columns; 64 rows or more make a block of sums; 1, 2, 4 or 8 warps share a row.
TILES = [
    Case("one_tile", rows=9, columns=512),
    Case("tile_and_a_column", groups=2, rows=3, columns=513, positions=5),
    Case("two_warps", rows=65, columns=2100, positions=2, dtype=torch.float64, density=0.1),
    Case("four_warps", rows=3, columns=8100, density=None),
    Case("eight_warps", groups=2, rows=2, columns=9000, dtype=torch.bfloat16),
    Case("packed_tiles", groups=2, rows=66, columns=1100, density=0.2, packed=True),
    Case("packed_warps", rows=5, columns=4600, positions=3, dtype=torch.float16, packed=True),
    Case("packed_nonfinite", rows=20, columns=600, dtype=torch.float64, packed=True, values="nonfinite"),
]


@pytest.mark.parametrize("case", TILES, ids=by_name)
@pytest.mark.parametrize("op", NAMES)
def test_tiles(op: str, case: Case, device: torch.device) -> None:
    for arguments in samples(op, case, str(device)):
        expected = run(op, getattr(reference, op), arguments)
        compare(op, arguments, run(op, loaded(op), arguments), expected)


@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize("case", [TILES[0], TILES[5]], ids=by_name)
def test_rows_that_begin_anywhere(case: Case, offset: int, device: torch.device) -> None:
    """Tensors whose memory does not begin at a multiple of 16 bytes."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        room = torch.empty(value.numel() + offset, dtype=value.dtype, device=value.device)
        room[offset:] = value.flatten()
        return room[offset:].view(value.shape)

    for op in NAMES:
        for arguments in samples(op, case, str(device)):
            expected = run(op, getattr(reference, op), arguments)
            given = [moved(value) for value in arguments]
            made = loaded(op)(*given)
            got = list(made) if isinstance(made, tuple) else [] if made is None else [made]
            compare(op, arguments, got + (given[1:2] if op.endswith("_") else []), expected)


def test_sums_depend_on_the_shape_alone(device: torch.device) -> None:
    """A flow is the same to the bit on every run, and beside other groups as alone."""
    drawn = draw(Case("", groups=3, rows=130, columns=2600, positions=3, device=str(device)))
    for transposed, x in ((False, drawn.x), (True, drawn.g)):
        assert x is not None
        assert drawn.mask is not None
        call = loaded("path_flow_linear")
        flow = call(drawn.weight, drawn.mask, x, WeightMap.SQUARE, transposed, None, None, drawn.columns)
        for group in range(3):
            one = slice(group, group + 1)
            alone = (drawn.weight[one], drawn.mask[one], x[one], WeightMap.SQUARE, transposed)
            exactly(call(*alone, None, None, drawn.columns), flow[one])


def test_nth_of_many_rows(device: torch.device) -> None:
    """So many tiles that several make a chunk of what is counted at once."""
    case = Case("", rows=20_000, columns=1, positions=None, density=None, device=str(device))
    drawn = draw(case)
    for n in (0, 4_321, drawn.inside - 1):
        arguments = (*drawn.scored, WeightMap.ABS, drawn.lo, drawn.hi, n, *drawn.packed)
        exactly(loaded("through_flow_nth")(*arguments), reference.through_flow_nth(*arguments))


# ---- on the host ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libpathprune_cpu.so that is the CUDA library, its kernels run by emulated_cuda."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("wants a C++ compiler for Linux")
    folder = tmp_path_factory.mktemp("emulation")
    torch_root = Path(torch.__file__).parent
    libraries = []
    for source in sorted((ROOT / "csrc").glob("library_cuda*.cpp")):
        registered = source.read_text()
        assert registered.count("(pathprune, CUDA, m)") == 1
        libraries.append(folder / source.name)
        libraries[-1].write_text(registered.replace("(pathprune, CUDA, m)", "(pathprune, CPU, m)"))

    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    flags += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{EMULATED}", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_root / "include")]
    names = ("arguments", "pattern", "walk_arguments")
    arguments = [ROOT / "csrc" / "glue" / f"{name}.cpp" for name in names]
    sources = [*libraries, *arguments, EMULATED / "machine.cpp"]
    sources += sorted((ROOT / "csrc" / "ops").glob("*.cu"))

    def compile_one(source: Path) -> str:
        made = folder / f"{source.name}.o"
        command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(made)]
        subprocess.run(command, check=True)
        return str(made)

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = [str(torch_root / "lib" / f"lib{name}.so") for name in ("torch", "torch_cpu", "c10")]
    command = [compiler, "-shared", "-o", str(folder / "libpathprune_cpu.so"), *objects]
    subprocess.run([*command, "-Wl,--no-as-needed", *linked, "-Wl,-z,defs"], check=True)
    return folder


@pytest.mark.slow
def test_kernels_on_the_host(emulation: Path) -> None:
    """Every kernel against the reference, without a GPU; each barrier and shuffle is checked to be whole."""
    assert set(op_samples.ROWS) == set(NAMES)
    chosen = "matches_reference or packed_is_dense or strided or tiles or anywhere or the_shape or nth_of"
    chosen += " or (test_products and not 70001) or written_out"
    files = ["test_ops.py", "test_cuda_kernels.py", "test_masked_matmul.py"]
    passes_on_the_host(emulation, files, f"not (large_row or large_packed) and ({chosen})")


@pytest.mark.slow
def test_tiled_kernels_on_the_host(emulation: Path) -> None:
    passes_on_the_host(emulation, ["test_tiled_products.py"], "tiled")


@pytest.mark.slow
def test_walk_kernels_on_the_host(emulation: Path) -> None:
    passes_on_the_host(emulation, ["test_walk_kernels.py"], "not host")


def passes_on_the_host(emulation: Path, files: list[str], chosen: str) -> None:
    tests = [str(ROOT / "tests" / name) for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, "-k", f"cpu and {chosen}"]
    environment = {**os.environ, "PATHPRUNE_LIBRARY_DIR": str(emulation), "PATHPRUNE_REQUIRE_CUDA": "0"}
    environment.pop("PATHPRUNE_DISABLE_BINARY", None)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
