"""``pathprune bench``: what it finds, what it refuses, what it writes, and how it compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pathprune import _library, bench, cli
from pathprune.models import mlp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import comparing
import harness
import large
import memory
import roofline
import run
import scaling
import scoring
import selection
import synthetic_checkpoint

needs_binary = pytest.mark.skipif(not _library.cpu_loaded, reason="the compiled ops are not loaded")
SMALL = scoring.Setting("MLP 64-256-256-10", lambda: mlp((64, 256, 256, 10)), (1, 64), differing=1e-3)


def result(case: str, bytes_moved: float | None = None, **milliseconds: list[float]) -> harness.Result:
    """Times as if they had been measured."""
    seconds = {
        name: {clock: [value / 1e3 for value in values] for clock in harness.CLOCKS}
        for name, values in milliseconds.items()
    }
    return harness.Result(case, "nothing", seconds, dict.fromkeys(seconds, bytes_moved), bandwidth=10.0)


# ---- the command ------------------------------------------------------------------------------------------


def test_the_command_passes_its_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    typer_testing = pytest.importorskip("typer.testing")
    given: list[Any] = []
    monkeypatch.setattr(
        bench.subprocess, "run", lambda *a, **k: given.append((a, k)) or type("Done", (), {"returncode": 3})
    )
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    outcome = typer_testing.CliRunner().invoke(cli.app, ["bench", "--suite", "walks", "--help"])
    assert outcome.exit_code == 3
    (command,), options = given[0]
    assert command[1:] == [str(bench.find_benchmarks() / "run.py"), "--suite", "walks", "--help"]
    assert options["env"]["THP_MEM_ALLOC_ENABLE"] == "1"  # as all figures are taken
    assert options["env"]["OMP_NUM_THREADS"] == "2"  # but what the user set stays


def test_without_the_source_it_says_where_benchmarks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typer_testing = pytest.importorskip("typer.testing")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "pathprune" / "bench.py"))
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "run.py").touch()  # of another project
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    monkeypatch.chdir(tmp_path)
    outcome = typer_testing.CliRunner().invoke(cli.app, ["bench"])
    assert outcome.exit_code == 1
    assert "run this inside a checkout" in outcome.stderr
    assert str(tmp_path) in outcome.stderr


def test_a_checkout_around_the_working_folder_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "elsewhere" / "pathprune" / "bench.py"))
    root = Path(run.__file__).resolve().parents[1]
    monkeypatch.chdir(root / "benchmarks" / "results")
    assert bench.find_benchmarks() == root / "benchmarks"


# ---- a run --------------------------------------------------------------------------------------------------


def started(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        run.main()
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites of a single small case."""
    small = [("select 1", lambda bandwidth: selection.kth_of(1, 2, bandwidth))]
    monkeypatch.setattr(run, "SUITES", {"selection": lambda quick, device: small, "walks": lambda quick: []})
    monkeypatch.setattr(run, "copy_bandwidth", lambda device: 10.0)
    monkeypatch.delenv("PATHPRUNE_RESULTS", raising=False)


@needs_binary
def test_a_run_writes_what_it_prints(
    one_case: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    started(
        monkeypatch, "--suite", "selection", "--threads", 1, "--json", "now.json", "--plot", "now.png", "--out", "all"
    )
    assert "### k-th of 1 Mi scores" in capsys.readouterr().out
    now = json.loads((tmp_path / "now.json").read_text())
    assert [one["case"] for one in now["results"]] == ["k-th of 1 Mi scores"]
    assert now["machine"] == harness.machine_name()
    assert now["results"][0]["bytes_moved"]["pathprune"] == 4 << 20
    kept = json.loads((tmp_path / "all" / f"selection.{harness.machine_name()}.json").read_text())
    assert kept["results"] == now["results"]
    assert (tmp_path / "now.png").read_bytes().startswith(b"\x89PNG")


@needs_binary
def test_a_case_that_fails_takes_no_other_with_it(
    one_case: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bandwidth: float) -> harness.Result:
        raise torch.OutOfMemoryError("no room")

    good = run.SUITES["selection"](True, "cpu")[0]
    monkeypatch.setattr(
        run, "SUITES", {"selection": lambda quick, device="cpu": [("bad", fails), good, ("bad", fails)]}
    )
    with pytest.raises(SystemExit) as stopped:
        started(monkeypatch, "--suite", "selection", "--threads", 1, "--out", tmp_path)
    assert stopped.value.code == 1
    assert "Not measured:\nselection bad: OutOfMemoryError: no room" in capsys.readouterr().err
    kept = json.loads((tmp_path / f"selection.{harness.machine_name()}.json").read_text())
    assert [one["case"] for one in kept["results"]] == ["k-th of 1 Mi scores"]


@needs_binary
def test_a_run_writes_nothing_unless_asked(one_case: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started(monkeypatch, "--suite", "selection")
    assert list(tmp_path.iterdir()) == []


@needs_binary
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--suite", "nothing"), "--suite: wanted some of selection, walks, got nothing"),
        (("--threads", "0"), "--threads: wanted at least 1, got 0"),
        (("--json", "no/such/folder.json"), "wanted a file in a folder that exists, got no/such/folder.json"),
        (("--only", "nothing"), "--only: no case of selection, walks has 'nothing' in its name; see --list"),
        (("--compare", "none.json", "none.json"), "compare: none.json: cannot be read: No such file"),
    ],
)
def test_mistakes_are_refused_in_a_line(
    one_case: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        started(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@needs_binary
def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        started(monkeypatch, "--device", "cuda")
    assert "--device: torch sees no GPU here; use --device cpu" in capsys.readouterr().err


@needs_binary
def test_a_suite_of_the_cpu_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        started(monkeypatch, "--device", "cuda", "--suite", "walks,scoring")
    assert "--device: walks have baselines for the CPU alone" in capsys.readouterr().err


def test_nothing_is_measured_without_the_compiled_ops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_library, "cpu_loaded", False)
    monkeypatch.setattr(_library, "cpu_error", "libpathprune_cpu.so was not built")
    with pytest.raises(SystemExit):
        started(monkeypatch)
    assert "there is nothing to measure: libpathprune_cpu.so was not built" in capsys.readouterr().err


def test_every_suite_lists_its_cases() -> None:
    for suite in run.SUITES:
        names = [name for name, _ in run.cases_of(suite, quick=True, device="cpu")]
        assert names, suite
        assert len(set(names)) == len(names), suite


# ---- two runs beside each other -------------------------------------------------------------------------------


def test_comparison_says_what_the_samples_support(tmp_path: Path) -> None:
    steady, wide = [10.0, 10.2, 10.4], [5.0, 10.0, 30.0]
    first = [result("a", pathprune=steady, plain=wide), result("gone", pathprune=steady)]
    second = [
        result("a", pathprune=[5.0, 5.2, 9.9], plain=[6.0, 11.0, 31.0]),
        result("new", pathprune=steady),
    ]
    before = harness.save("one", first, tmp_path, "before.json", threads=1)
    after = harness.save("one", second, tmp_path, "after.json", threads=2)
    told = comparing.compare(before, after)
    assert "| a | pathprune | 10.2 | 5.2 | 0.51 | quicker |" in told
    assert "| a | plain | 10 | 11 | 1.10 | within the spread |" in told
    assert "**Other threads: 1 and 2.**" in told
    assert f"Only in {before}: gone." in told
    assert f"Only in {after}: new." in told
    assert "| a | pathprune | 5.2 | 10.2 | 1.96 | slower |" in comparing.compare(after, before)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("no JSON", "wanted results as JSON"),
        ("[1, 2]", "wanted results of a benchmark suite"),
        ('{"results": [{"case": "a"}]}', "wanted results of a benchmark suite"),
        ('{"results": [], "date": "", "cpu": ""}', "have no case in common"),
    ],
)
def test_comparison_refuses_other_files(tmp_path: Path, content: str | None, says: str) -> None:
    good = harness.save("one", [result("a", pathprune=[1.0])], tmp_path, "good.json")
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    with pytest.raises(ValueError, match=says) as refused:
        comparing.compare(good, bad)
    assert "bad.json" in str(refused.value)


# ---- pictures and the suites of this command -------------------------------------------------------------------


def test_roofline_shows_what_states_its_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = [result("a", 1e9, pathprune=[200.0], plain=[400.0]), result("b", None, pathprune=[1.0])]
    assert roofline.plot(told, tmp_path / "roofline.png") == 2
    assert (tmp_path / "roofline.png").stat().st_size > 5000
    assert roofline.plot(told[1:], tmp_path / "none.png") == 0
    assert not (tmp_path / "none.png").exists()


@needs_binary
@pytest.mark.parametrize("count", range(1, 8))
def test_panels_of_scaling_leave_no_room_empty(count: int) -> None:
    filled: dict[int, list[int]] = {}
    for row, columns in scaling.panels(count):
        filled.setdefault(row, []).extend(range(6)[columns])
    assert list(filled.values()) == [list(range(6))] * -(-count // 3)


def test_scaling_measures_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [scaling.one_round("depth", at, SMALL, 10.0, 0.5, published=True) for at in (2, 4)]
    for one in results:
        assert "0 differ" in one.verified or "allowed" in one.verified
        assert all(len(samples["thread"]) == 5 for samples in one.seconds.values())
    scaling.plot(results, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 5000


@needs_binary
def test_memory_peaks_are_of_all_three(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = scoring.Setting("MLP", lambda: mlp((784, 640, 640, 10)), (1, 784), differing=1e-3)
    monkeypatch.setitem(scoring.SETTINGS, "small", setting)
    found = memory.peaks("small", 10.0)
    assert set(found.peak_bytes) == {"pathprune", "published loop", "best PyTorch"}
    floats = 4 * 784 * 640 + 4 * 640 * 640
    assert found.peak_bytes["published loop"] > 4 * floats  # masks, gradients, signs, scores
    assert found.peak_bytes["pathprune"] < found.peak_bytes["published loop"] / 2


# ---- from file to file ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_of_experts_are_measured_and_checked(tmp_path: Path) -> None:
    """The masks of experts are found in their own tensors; a weight that is not the file's own is told."""
    pytest.importorskip("transformers")
    folder = tmp_path / "mixtral"
    synthetic_checkpoint.write(folder, synthetic_checkpoint.SHAPES["tiny-experts"])
    found = large.measure(folder, "magnitude", "global", large.DEFAULT_BUDGET)
    sizes = synthetic_checkpoint.tensors_of(synthetic_checkpoint.SHAPES["tiny-experts"])
    layers = [n for n, size in sizes.items() if len(size) == 2 and "embed" not in n and ".gate." not in n]
    assert found["kept"] == round(0.5 * sum(sizes[n][0] * sizes[n][1] for n in layers))
    assert found["peak"] >= found["start"] > 0 and found["over_copying_once"] > 0
    made = large.prune_checkpoint(folder, large.METHODS["magnitude"], tmp_path / "out", density=0.5)
    large.check(folder, made.folder)
    path = next(made.folder.glob("model*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    with pytest.raises(AssertionError, match="not the weights under the mask"):
        large.check(folder, made.folder)


def test_results_of_files_keep_the_date_of_their_run(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    case = {"shape": "tiny", "method": "magnitude", "scope": "row", "budget": 1}
    may, june, july = ({"date": date, "usable_cores": cores} for date, cores in (("May", 1), ("June", 2), ("July", 4)))
    path.write_text(json.dumps({"machine": may, "results": [case, {**case, "scope": "2:4"}]}))
    large.save(path, {**case, "method": "wanda"}, june)
    large.save(path, {**case, "seconds": 3.0}, july)
    content = json.loads(path.read_text())
    assert content["machine"] == july
    assert content["results"] == [
        {**case, "scope": "2:4", **may},
        {**case, "method": "wanda", **june},
        {**case, "seconds": 3.0, **july},
    ]
    large.save(tmp_path / "new.json", case, july)
    assert json.loads((tmp_path / "new.json").read_text()) == {"machine": july, "results": [{**case, **july}]}
