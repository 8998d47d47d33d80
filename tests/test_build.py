"""The build and the installation: facts, loading, messages when something is missing, the layout of csrc."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pathprune import _library, info

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

needs_binary = pytest.mark.skipif(_library.core is None, reason="the compiled module is not built")
needs_cmake = pytest.mark.skipif(
    shutil.which("cmake", path=f"{Path(sys.executable).parent}") is None, reason="no cmake"
)


def run(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=False)


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; it must not fail, nor say a word on stderr."""
    done = run([sys.executable, "-c", code], **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# ---- facts ----------------------------------------------------------------------------------------


@needs_binary
def test_build_facts() -> None:
    facts = info.build_info()
    assert facts["version"] == metadata.version("pathprune")
    assert re.fullmatch("[0-9a-f]{40}|unknown", facts["git_revision"])
    assert facts["torch_target_version"] == 0x020A000000000000
    assert facts["isa"] in facts["isas"]
    x86 = platform.machine() in ("x86_64", "AMD64")
    assert facts["isas"] == (["baseline", "avx2", "avx512"] if x86 else ["baseline"])
    assert (facts["nvcc_version"] is None) == (facts["cuda_architectures"] == [])


@needs_binary
def test_the_instruction_set_can_be_lowered() -> None:
    assert _library.core is not None
    code = (
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('_C', {_library.core.__file__!r})\n"
        "module = u.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "print(module.build_info()['isa'])"
    )
    assert python(code, PATHPRUNE_ISA="baseline") == "baseline"
    best = python(code, PATHPRUNE_ISA="")
    assert python(code, PATHPRUNE_ISA="nonsense") == best
    assert python(code, PATHPRUNE_ISA="avx512") == best  # never above what the processor has


def test_info_is_short_and_complete() -> None:
    done = run([sys.executable, "-W", "error", "-m", "pathprune.info"])
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    labels = ["pathprune", "torch", "driver", "GPUs", "CPU ops", "CUDA ops", "threads"]
    assert all(re.search(f"^{label} ", done.stdout, re.MULTILINE) for label in labels)
    assert len(done.stdout.splitlines()) < 20


# ---- loading ----------------------------------------------------------------------------------------

STATE = """
import pathprune
from pathprune import _library as l
print(l.core is None, l.cpu_loaded, l.cuda_loaded, l.cpu_error, l.cuda_error, sep='|')
"""


@needs_binary
def test_the_binaries_are_loaded() -> None:
    assert _library.cpu_loaded, _library.cpu_error
    if torch.version.cuda is None:
        assert _library.cuda_error == "this torch is built without CUDA"
    elif info.build_info()["nvcc_version"] is not None:
        assert _library.cuda_loaded, _library.cuda_error


def test_import_without_the_binaries() -> None:
    reason = "switched off by PATHPRUNE_DISABLE_BINARY"
    assert python(STATE, PATHPRUNE_DISABLE_BINARY="1") == f"True|False|False|{reason}|{reason}"


def test_import_where_nothing_was_built(tmp_path: Path) -> None:
    state = python(STATE, PATHPRUNE_LIBRARY_DIR=str(tmp_path), PYTHONWARNINGS="ignore").split("|")
    assert state[:4] == ["True", "False", "False", "libpathprune_cpu.so was not built"]


def test_import_says_that_plain_torch_serves(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", "import pathprune"], PATHPRUNE_LIBRARY_DIR=str(tmp_path))
    assert "libpathprune_cpu.so was not built: plain torch serves in place of the compiled ops" in done.stderr
    python("import pathprune", PATHPRUNE_LIBRARY_DIR=str(tmp_path), PATHPRUNE_DISABLE_BINARY="1")  # asked for


def test_import_with_broken_binaries(tmp_path: Path) -> None:
    for name in ("libpathprune_cpu.so", "libpathprune_cuda.so", "_C.abi3.so"):
        (tmp_path / name).write_bytes(b"no library")
    state = python(STATE, PATHPRUNE_LIBRARY_DIR=str(tmp_path), PYTHONWARNINGS="ignore").split("|")
    assert state[:3] == ["True", "False", "False"]
    assert "libpathprune_cpu.so" in state[3]


# ---- what is said when something is missing ---------------------------------------------------------


def cmake(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run([Path(sys.executable).parent / "cmake", "-S", ROOT, "-B", tmp_path / "build", *options])


@needs_cmake
def test_configuring_without_torch_says_what_to_do(tmp_path: Path) -> None:
    assert run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"]).returncode == 0
    done = cmake(tmp_path, f"-DPython_EXECUTABLE={tmp_path}/venv/bin/python")
    said = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "pathprune: torch is not installed for" in said
    assert "pip install --no-build-isolation ." in said


@needs_cmake
def test_configuring_without_nvcc(tmp_path: Path) -> None:
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CUDA_COMPILER=NOTFOUND"]
    done = cmake(tmp_path, *options, "-DPATHPRUNE_CUDA=ON")
    assert done.returncode != 0
    assert "no CUDA compiler (nvcc) was found" in " ".join(done.stderr.split())
    done = cmake(tmp_path, *options, "-DPATHPRUNE_CUDA=AUTO")
    assert done.returncode == 0, done.stderr
    assert "nvcc: not found, so the CUDA library is not built" in done.stdout


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    check = ROOT / "scripts" / "check_tools.sh"
    done = run([tmp_path / "bash", check, sys.executable], PATH=str(tmp_path), CXX="")
    assert done.returncode == 1
    assert "a C++20 compiler" in done.stderr
    assert "Python" not in done.stderr
    done = run([tmp_path / "bash", check, "no-such-python"], PATH=str(tmp_path), CXX="")
    assert done.returncode == 1
    assert "'no-such-python' was not found" in done.stderr


# ---- the layout of csrc ---------------------------------------------------------------------------------


def test_computations_know_nothing_of_torch() -> None:
    files = [*CSRC.glob("core/*"), *CSRC.glob("ops/*.h"), *CSRC.glob("ops/*.inc"), *CSRC.glob("ops/*.cu")]
    assert len(files) > 5
    pattern = re.compile(r'#include [<"](torch|ATen|c10|glue)/')
    guilty = [str(file.relative_to(ROOT)) for file in files if pattern.search(file.read_text())]
    assert guilty == []


def test_core_stands_alone() -> None:
    pattern = re.compile(r'#include "(?!core/)')
    assert [file.name for file in CSRC.glob("core/*") if pattern.search(file.read_text())] == []


def isa_objects() -> list[Path]:
    return sorted((ROOT / "build" / "editable" / "CMakeFiles").glob("pathprune_cpu_avx*.dir/**/*.o"))


@pytest.mark.skipif(not isa_objects() or shutil.which("nm") is None, reason="no objects of one instruction set")
def test_no_function_of_one_instruction_set_serves_another() -> None:
    """What several objects define is linked from any of them: it must be in the namespace of its set."""
    for file in isa_objects():
        isa = "avx512" if "avx512" in str(file) else "avx2"
        lines = run(["nm", "--demangle", "--defined-only", file]).stdout.splitlines()
        shared = [line.split(" ", 2)[2] for line in lines if re.match(r"\w+ [WVu] ", line)]
        data = ("DW.ref.",)  # where exceptions are handled: the same everywhere
        assert [name for name in shared if f"::{isa}::" not in name and not name.startswith(data)] == [], file.name


# ---- scripts ------------------------------------------------------------------------------------------

PTXAS_LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9pathprune5sweepIfEEvPKT_' for 'sm_90'
ptxas info    : Function properties for _ZN9pathprune5sweepIfEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 27 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 12.345 ms
ptxas info    : Compiling entry function '_Z5spillv' for 'sm_90'
ptxas info    : Function properties for _Z5spillv
    48 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 48 bytes cumulative stack size
"""


def test_kernel_report() -> None:
    check = load_script("check_kernels")
    good, bad = check.parse(PTXAS_LOG)
    assert (good.registers, good.shared, good.stack, good.spills) == (27, 1024, 0, False)
    assert (bad.registers, bad.stores, bad.loads, bad.stack, bad.spills) == (255, 16, 24, 48, True)
    assert "16/24" in check.table([good, bad]).splitlines()[2]
    name = "void pathprune::(anonymous namespace)::sweep<float, (int)2>(float const*, int)"
    assert check.shorten(name) == "sweep<float, (int)2>"
    target = "--generate-code=arch=compute_90,code=[sm_90]"
    command = ["nvcc", "-O3", target, "-MD", "-MT", "a.o", "-MF", "a.d", "-c", "a.cu", "-o", "a.o"]
    assert check.without_architecture(command) == ["nvcc", "-O3", "-c", "a.cu"]


@pytest.mark.slow
def test_installing_from_a_copy_of_the_tree(tmp_path: Path) -> None:
    unwanted = shutil.ignore_patterns(".git", ".venv*", "build", "*_cache", "__pycache__", "results")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-q"]
    done = run([*pip, "--target", tmp_path / "site", tmp_path / "copy"], CMAKE_CUDA_ARCHITECTURES="90")
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        f"import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__]\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n" + STATE + "print(pathprune.__path__[0])"
    )
    state, where = python(code).splitlines()
    assert where == str(tmp_path / "site" / "pathprune")
    assert state.split("|")[:2] == ["False", "True"]
