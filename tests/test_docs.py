"""The pages: every block of code on them is run or found where it says it is, and every figure is a measured one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pathprune as pp
from image_folders import tiny_imagenet
from pathprune.models import convnet_digits

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(?P<language>[{}a-z-]*) *(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

sys.path.insert(0, str(ROOT / "scripts"))
import readme_tables  # noqa: E402


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    info: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text[: found.start()].count("\n") + 1, found["language"], found["info"], found["code"])
        for found in FENCE.finditer(text)
    ]


def surroundings() -> dict[str, Any]:
    """What pages may use without making it: a small model, an input, data, an optimizer, a training step."""
    torch.manual_seed(0)
    model = convnet_digits(width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    data = [(torch.rand(8, 1, 8, 8), torch.randint(10, (8,)))]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for images, labels in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    given = {"model": model, "x": torch.ones(1, 1, 8, 8), "data": data, "optimizer": optimizer, "train": train}
    return {"torch": torch, "nn": nn, "pp": pp, "__name__": "page", **given}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a few images in it, and a random state that is put back."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-imagenet-200").mkdir()
    tiny_imagenet(tmp_path / "tiny-imagenet-200")
    state = torch.get_rng_state()
    yield tmp_path
    torch.set_rng_state(state)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_holds(page: Path, folder: Path) -> None:
    names = surroundings()
    for block in blocks(page):
        if "title=" in block.info:
            quoted(block)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        elif block.language == "{toctree}":
            for name in re.findall(r"^[a-z_/]+$", block.code, re.MULTILINE):
                assert list(page.parent.glob(f"{name}.*")), f"{block.place}: there is no page {name}"
        elif block.language == "console":
            for line in block.code.splitlines():
                command(block, line)
        else:
            assert block.language == "text", f"{block.place}: a block of {block.language!r} is checked by nothing"


def quoted(block: Block) -> None:
    """A block with a title is a piece of that file, up to its indentation; `...` stands for what is left out."""
    path = ROOT / re.fullmatch(r'title="([^"]+)"', block.info)[1]
    stripped = [line.strip() for line in path.read_text().splitlines()]
    place = 0
    for line in (line.strip() for line in block.code.splitlines()):
        if line and line not in ("...", "// ...", "# ..."):
            assert line in stripped[place:], f"{block.place}: {path.name} has no (further) line {line!r}"
            place = stripped.index(line, place) + 1


def command(block: Block, line: str) -> None:
    """A line of a console: a `pathprune` command runs; other commands name targets, extras and files that exist."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "pathprune":
        from typer.testing import CliRunner

        from pathprune import cli

        result = CliRunner().invoke(cli.app, words[1:])
        assert result.exit_code == 0, f"{block.place}: {line}: {result.output}{result.stderr}"
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"{block.place}: the Makefile has no target {words[1]!r}"
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), f"{block.place}: there is no {words[1]}"
    else:
        assert words[0] in ("pip", "git", "cd"), f"{block.place}: {line!r} is checked by nothing"
        extras = re.findall(r"\[([a-z,]+)\]", line)
        known = re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert all(extra in known for group in extras for extra in group.split(",")), f"{block.place}: {line}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", FENCE.sub("", page.read_text())):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: no {target}"


def test_every_page_is_in_the_navigation() -> None:
    docs = ROOT / "docs"
    trees = [block for block in blocks(docs / "index.md") if block.language == "{toctree}"]
    listed = [name for tree in trees for name in re.findall(r"^[a-z_/]+$", tree.code, re.MULTILINE)]
    pages = [path.relative_to(docs).with_suffix("") for path in docs.rglob("*.*") if path.suffix in (".md", ".rst")]
    assert sorted(listed) == sorted(str(page) for page in pages if page.name != "index")


def test_every_public_name_has_its_page() -> None:
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.rst")]
    shown = {name for page in pages for name in re.findall(r"^\.\. auto[a-z]+:: pathprune\.(\w+)$", page, re.MULTILINE)}
    assert sorted(set(pp.__all__) - shown - {"__version__"}) == []


# ---- figures ----------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme_tables.main(["--check"]) == 0, capsys.readouterr().out


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The pages and results in a folder of their own, for `readme_tables` to look at."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path / "benchmarks" / "results")
    readme_tables.suite.cache_clear()
    yield tmp_path
    readme_tables.suite.cache_clear()


def test_a_figure_that_drifts_is_told_and_mended(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "benchmarks" / "results" / "selection.intel-xeon-processor-2-cores.json"
    content = json.loads(path.read_text())
    for clocks in content["results"][0]["seconds"].values():
        clocks["wall"] = [7 * value for value in clocks["wall"]]
    path.write_text(json.dumps(content))
    assert readme_tables.main(["--check"]) == 1
    told = capsys.readouterr()
    assert "115 ms" in told.out
    assert "make tables" in told.err
    assert readme_tables.main(["--write"]) == 0
    assert readme_tables.main(["--check"]) == 0
    assert "115 ms" in (copy / "README.md").read_text() + (copy / "docs" / "benchmarks.md").read_text()


def test_a_machine_is_named_once() -> None:
    about = {
        "benchmark": "kernel",
        "machine": "one",
        "cpu": "C",
        "cpu_capability": "AVX2",
        "threads": 1,
        "torch": "2.13",
    }
    runs = [(True, "2026-01-02T00"), (True, "2026-01-01T00"), (False, "2026-01-01T00")]
    suites = [readme_tables.Suite({**about, "huge_pages": pages, "date": date, "results": []}) for pages, date in runs]
    machine = "\n\none: C, AVX2, 1 thread, torch 2.13, "
    assert readme_tables.caption(*suites[:2]) == machine + "large pages, 2026-01-01 and 2026-01-02."
    assert readme_tables.caption(*suites[1:]) == machine + "large pages (2026-01-01), no large pages (2026-01-01)."


def test_a_mark_that_names_no_table_is_refused(copy: Path) -> None:
    (copy / "README.md").write_text("<!-- nothing -->\n<!-- /nothing -->\n")
    with pytest.raises(KeyError, match=r"README.md: <!-- nothing -->: wanted one of scoring"):
        readme_tables.main(["--check"])


def test_a_table_says_which_case_it_misses() -> None:
    with pytest.raises(KeyError, match="selection: wanted one case with '99 Mi' in its name, got"):
        readme_tables.suite("selection", "intel-xeon-processor-2-cores").ratio("99 Mi", "kthvalue")
