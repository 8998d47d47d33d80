"""What is shipped: the libraries' demands, wheels, the source distribution, versions and the licence."""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

from pathprune import _library

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "scripts"))
import abi_audit  # noqa: E402
import extra  # noqa: E402
import wheel_check  # noqa: E402


def installed() -> list[Path]:
    return [path for folder in _library._folders() for path in sorted(folder.glob("*.so"))]


# ---- the stable ABI -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not installed(), reason="no library is built")
@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="no binutils")
def test_libraries_use_the_stable_abi_alone() -> None:
    findings = [abi_audit.audit(path) for path in installed()]
    assert [str(finding) for finding in findings if finding.wrong] == []
    assert {finding.name.split(".")[0] for finding in findings} >= {"_C", "libpathprune_cpu"}
    assert all(len(finding.stable) > 20 for finding in findings if finding.name.startswith("lib"))


@pytest.mark.parametrize(
    ("name", "symbols", "needed", "search_path", "wrong"),
    [
        ("libpathprune_cpu.so", ["aoti_torch_get_dim", "torch_call_dispatcher"], ["libtorch.so"], "", []),
        ("libpathprune_cpu.so", ["memcpy@GLIBC_2.14", "_ZSt4cout@GLIBCXX_3.4", "__gmon_start__"], [], "", []),
        ("libpathprune_cpu.so", ["_ZN3c106detail14torchCheckFailEPKcS2_jRKSs"], [], "", ["uses _ZN3c10"]),
        ("libpathprune_cpu.so", ["_ZN2at4_ops3add4callE"], [], "", ["uses _ZN2at"]),
        ("libpathprune_cpu.so", ["_ZN9pathprune5ghostEv"], [], "", ["uses _ZN9pathprune5ghostEv"]),
        ("libpathprune_cuda.so", [], ["libcudart.so.13"], "", ["needs libcudart.so.13"]),
        ("libpathprune_cpu.so", [], [], "/home/someone/torch/lib", ["looks for libraries in /home"]),
        ("libpathprune_cpu.so", ["PyObject_Call"], [], "", ["uses PyObject_Call"]),
        ("_C.cpython-311-x86_64-linux-gnu.so", ["PyObject_Call", "_Py_NoneStruct"], [], "", []),
        (
            "_C.cpython-311-x86_64-linux-gnu.so",
            ["aoti_torch_get_dim"],
            ["libc10.so"],
            "",
            ["uses aoti", "needs libc10"],
        ),
    ],
)
def test_what_the_audit_says(
    name: str, symbols: list[str], needed: list[str], search_path: str, wrong: list[str]
) -> None:
    found = abi_audit.judge(name, symbols, needed, search_path).wrong
    assert len(found) == len(wrong)
    assert all(told.startswith(start) for told, start in zip(found, wrong, strict=True)), found


def test_the_audit_finds_the_floors() -> None:
    found = abi_audit.judge(
        "libpathprune_cpu.so", ["a@GLIBC_2.9", "b@GLIBC_2.34", "c@@GLIBCXX_3.4.29", "d@GLIBC_2.2.5"]
    )
    assert found.floors == {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29)}
    assert "GLIBC 2.34, GLIBCXX 3.4.29" in str(found)


def test_the_audit_refuses_what_is_no_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.so").write_text("no library")
    assert abi_audit.main([str(tmp_path / "text.so")]) == 1
    assert "text.so: wanted a shared library" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert abi_audit.main([str(tmp_path / "empty")]) == 1
    assert "wanted shared libraries, found none" in capsys.readouterr().err


# ---- wheels -----------------------------------------------------------------------------------------------------


def test_a_release_without_room_is_untried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "pathprune-0-py3-none-any.whl"
    wheel.touch()
    arguments = [str(wheel), "--torch", "2.10.0", "newest", "--room", "1e9", "--scratch", str(tmp_path / "scratch")]
    assert wheel_check.main(arguments) == 1  # nothing was tried
    told = capsys.readouterr().out
    assert re.search(r"2\.10\.0  untried \d+ GB are free, 1000000000 GB wanted", told)
    assert "newest  untried" in told


def test_a_wheel_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        wheel_check.main([str(tmp_path / "none.whl")])
    assert "wheel: wanted a file, got" in capsys.readouterr().err


# ---- sources ------------------------------------------------------------------------------------------------------


def test_the_source_distribution_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("scikit_build_core.build")
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["LICENSE", "README.md", "Makefile", "CMakeLists.txt", "csrc/core/philox.h", "csrc/ops/gumbel.cu"]
    wanted += [
        "python/pathprune/py.typed",
        "benchmarks/run.py",
        "docs/conf.py",
        "tests/conftest.py",
        "scripts/abi_audit.py",
    ]
    wanted += ["examples/training_loop.py", "cmake/cuda_library.cmake", "CITATION.cff", "CHANGELOG.md"]
    assert [name for name in wanted if name not in names] == []
    unwanted = re.compile(r"(^|/)(\.venv|build|dist|__pycache__|\.ci)(/|$)|\.so$")
    assert [name for name in names if unwanted.search(name)] == []


def test_one_version_and_one_licence() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert metadata.version("pathprune") == version
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## ([0-9.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    assert (ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License")
    for name in ("pyproject.toml", "CITATION.cff", "README.md"):
        assert "BSD-3-Clause" in (ROOT / name).read_text(), name


def test_extras_are_read_from_the_project() -> None:
    assert any(package.startswith("sphinx>") for package in extra.packages("docs"))
    with pytest.raises(SystemExit, match=r"wanted one of cli, .*, got 'nothing'"):
        extra.packages("nothing")
