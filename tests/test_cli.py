"""The ``pathprune`` command: what it writes, what it says, and what it leaves behind when it is stopped."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pathprune as pp
from pathprune import models

pytest.importorskip("typer")

from typer.testing import CliRunner

from pathprune import cli, report

SMALL = "pathprune.models:lenet_300_100"
FILES = ["masks.safetensors", "report.json", "report.png"]

MODELS = """
import signal, time, torch
from pathlib import Path
from torch import nn

def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def endless():
    Path("started").touch()
    return perceptron()

class Interrupting:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def deaf():
    Interrupting()
    while True:
        time.sleep(0.01)

class Sorting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)

    def forward(self, x):
        return torch.cumprod(self.first(x), 1)

def broken():
    raise KeyError("no such thing")

number = 3
three = lambda: 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with the module ``nets_of_mine``."""
    (tmp_path / "nets_of_mine.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets_of_mine", raising=False)
    yield tmp_path
    sys.modules.pop("nets_of_mine", None)


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(*arguments: object, code: int = 1) -> str:
    """The message of a command that fails: one line, no traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("pathprune: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


PRUNE = (
    "prune",
    "--model",
    "nets_of_mine:perceptron",
    "--input-shape",
    "1,6",
    "--rounds",
    "3",
    "--out",
    "out",
)


def test_info_prints_the_installation() -> None:
    result = run("info")
    assert result.exit_code == 0
    assert "CPU ops" in result.output


@pytest.mark.parametrize("method", list(cli.Method))
def test_prune_writes_masks_report_and_picture(here: Path, method: cli.Method) -> None:
    pytest.importorskip("matplotlib")
    result = run(*PRUNE, "--density", "0.5", "--method", method.value, "--seed", "4")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (here / "out").iterdir()) == FILES
    assert sorted(path.name for path in here.iterdir() if path.name.startswith(".")) == []
    masks = pp.Masks.load(here / "out/masks.safetensors")
    assert masks.kept == 36
    assert masks.metadata["seed"] == 4
    assert masks.metadata["model"] == "nets_of_mine:perceptron"
    assert json.loads((here / "out/report.json").read_text())["kept"] == 36
    assert "density 50 %" in result.output

    torch.manual_seed(4)
    model = __import__("nets_of_mine").perceptron()
    again = pp.prune(model, method.pruner(3), density=0.5, example_input=torch.ones(1, 6), seed=4)
    assert masks == again
    assert masks.difference(model).base is None


def test_options_reach_prune(here: Path) -> None:
    options = ("--sparsity", "0.75", "--exclude", "0.*", "--scope", "layer", "--schedule", "linear")
    assert run(*PRUNE, *options).exit_code == 0
    masks = pp.Masks.load(here / "out/masks.safetensors")
    assert dict(masks.counts()) == {"2.weight": (6, 24)}
    assert masks.metadata["config"]["schedule"] == "linear"


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_what_looks_at_no_paths_needs_no_input_shape(here: Path, method: str) -> None:
    model = ("prune", "--model", "nets_of_mine:perceptron", "--density", "0.5", "--out", "out")
    result = run(*model, "--method", method)
    assert result.exit_code == 0, result.output
    assert pp.Masks.load(here / "out/masks.safetensors").kept == 36
    assert "--input-shape: wanted one" in refused(*model, "--overwrite")


def test_a_state_dict_is_loaded(here: Path) -> None:
    state = {"0.weight": torch.zeros(8, 6), "0.bias": torch.zeros(8), "2.weight": torch.ones(3, 8)}
    state["0.weight"][:, 2] = 1
    save_file({**state, "2.bias": torch.zeros(3)}, here / "trained.safetensors")
    result = run(*PRUNE, "--method", "magnitude", "--density", "0.444", "--state-dict", "trained.safetensors")
    assert result.exit_code == 0, result.output
    masks = pp.Masks.load(here / "out/masks.safetensors")
    assert masks["0.weight"].nonzero()[:, 1].tolist() == [2] * 8
    save_file(state, here / "partial.safetensors")
    message = refused(*PRUNE, "--density", "0.5", "--overwrite", "--state-dict", "partial.safetensors")
    assert "2.bias" in message


def test_hugging_face_folders(here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    config = transformers.ResNetConfig(**sizes, num_labels=3)
    torch.manual_seed(1)
    model = transformers.ResNetForImageClassification(config)
    config.save_pretrained(here / "fresh")
    model.save_pretrained(here / "trained")
    options = ("--rounds", "2", "--density", "0.3", "--input-shape", "1,3,32,32")
    for folder in ("fresh", "trained"):
        result = run("prune", "--model", folder, *options, "--out", f"{folder}-out", "--seed", 9)
        assert result.exit_code == 0, result.output
    fresh, trained = (pp.Masks.load(here / f"{name}-out/masks.safetensors") for name in ("fresh", "trained"))
    assert list(fresh) == list(trained)
    assert "classifier.1.weight" in trained
    assert trained.difference(model).base is None  # the weights of the folder
    assert fresh.difference(model).base is not None  # weights drawn by --seed


def test_report_reads_masks_back(here: Path) -> None:
    assert run(*PRUNE, "--density", "0.5").exit_code == 0
    plain = run("report", "out/masks.safetensors", "--json", "again.json")
    assert plain.exit_code == 0
    assert (here / "again.json").read_text() == (here / "out/report.json").read_text()
    on_model = run("report", "out/masks.safetensors", "--model", "nets_of_mine:perceptron", "--input-shape", "1x6")
    assert on_model.exit_code == 0
    assert "paths)" in on_model.output
    message = refused("report", "out/masks.safetensors", "--model", SMALL, "--input-shape", "1,784")
    assert "masks of another model" in message
    (here / "out/masks.safetensors").write_bytes(b"nothing")
    assert "masks.safetensors" in refused("report", "out/masks.safetensors")


def test_support_tells_missing_rules_by_its_exit_code(here: Path) -> None:
    fine = run("support", "--model", "nets_of_mine:perceptron", "--input-shape", "1,6")
    assert (fine.exit_code, "linear" in fine.output) == (0, True)
    lacking = run("support", "--model", "nets_of_mine:Sorting", "--input-shape", "1,6")
    assert (lacking.exit_code, "cumprod" in lacking.output) == (1, True)
    assert "cumprod" in refused(*PRUNE, "--density", "0.5", "--model", "nets_of_mine:Sorting")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("--density", "0"), "density"),
        (("--density", "1.5"), "density"),
        ((), "exactly one of density"),
        (("--density", "0.5", "--sparsity", "0.5"), "exactly one of density"),
        (("--density", "0.5", "--scope", "world"), "scope"),
        (("--density", "0.5", "--schedule", "never"), "schedule"),
        (("--density", "0.5", "--exclude", "nothing*"), "nothing*"),
        (("--density", "0.5", "--rounds", "0"), "rounds"),
        (("--density", "0.5", "--input-shape", "1;6"), "--input-shape"),
        (("--density", "0.5", "--input-shape", "1,7"), "example_input"),
        (("--density", "0.5", "--model", "perceptron"), "--model"),
        (("--density", "0.5", "--model", "nets_of_mine:nothing"), "nothing"),
        (("--density", "0.5", "--model", "no_such_module:x"), "no_such_module"),
        (("--density", "0.5", "--model", "nets_of_mine:broken"), "no such thing"),
        (("--density", "0.5", "--model", "nets_of_mine:three"), "got int"),
        (("--density", "0.5", "--model", "."), "config.json"),
        (("--density", "0.5", "--state-dict", "none.safetensors"), "none.safetensors"),
        (("--density", "0.5", "--out", "nets_of_mine.py"), "got the file"),
    ],
)
def test_mistakes_are_told_in_a_line(here: Path, changes: tuple[str, ...], says: str) -> None:
    assert says in refused(*PRUNE, *changes)
    assert not (here / "out").exists()


def test_the_version_is_an_option() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"pathprune {pp.__version__}\n")


def test_wrong_usage_has_its_own_exit_code(here: Path) -> None:
    assert run("prune", "--density", "0.5").exit_code == 2
    assert run(*PRUNE, "--density", "0.5", "--method", "guess").exit_code == 2


def test_earlier_results_are_replaced_only_when_asked(here: Path) -> None:
    assert run(*PRUNE, "--density", "0.5").exit_code == 0
    (here / "out/notes.txt").write_text("mine")
    assert "--overwrite" in refused(*PRUNE, "--density", "0.25")
    assert pp.Masks.load(here / "out/masks.safetensors").kept == 36
    assert run(*PRUNE, "--density", "0.25", "--overwrite").exit_code == 0
    assert pp.Masks.load(here / "out/masks.safetensors").kept == 18
    assert (here / "out/notes.txt").read_text() == "mine"
    assert [path.name for path in here.iterdir() if path.name.startswith(".out")] == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_while_writing_leaves_nothing(here: Path, monkeypatch, failure: BaseException) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(report.Report, "plot", fail)
    refused(*PRUNE, "--density", "0.5", code=130 if isinstance(failure, KeyboardInterrupt) else 1)
    assert {path.name for path in here.iterdir()} <= {"nets_of_mine.py", "__pycache__"}


def test_without_matplotlib_the_rest_is_written(here: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(*PRUNE, "--density", "0.5")
    assert result.exit_code == 0
    assert "pathprune[plot]" in result.stderr
    assert sorted(path.name for path in (here / "out").iterdir()) == FILES[:2]


def test_ctrl_c_stops_a_run_and_leaves_nothing(here: Path) -> None:
    endless = [argument.replace("perceptron", "endless") for argument in PRUNE]
    command = [sys.executable, "-m", "pathprune.cli", *endless, "--density", "0.5", "--rounds", "2000000"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # where the tests run in the background
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, preexec_fn=heard)
    try:
        deadline = time.monotonic() + 120
        while not (here / "started").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    # CPython ends by the signal itself where the interrupt fell inside an exec of source text, whoever
    # caught it (Py_RunMain); a shell reads both as 130.
    assert process.returncode in (130, -signal.SIGINT), err
    assert err.splitlines()[-1] == "pathprune: interrupted"
    assert "Traceback" not in err
    assert out == ""
    assert {path.name for path in here.iterdir()} <= {"nets_of_mine.py", "__pycache__", "started"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_comes_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_SECONDS_TO_NOTICE", 0.2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = run(*(argument.replace("perceptron", "deaf") for argument in PRUNE), "--density", "0.5")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (found.exit_code, found.output.splitlines()[-1]) == (130, "pathprune: interrupted")
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_without_typer_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from pathprune.cli import main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'pathprune[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_model_factories_of_the_package_work_by_name() -> None:
    network = cli.load_model("pathprune.models:resnet20", seed=3)
    torch.manual_seed(3)
    expected = models.resnet20()
    assert all(map(torch.equal, network.state_dict().values(), expected.state_dict().values()))
    assert not network.training


# ------------------------------------------------------------------------------------------------- score-space


def test_score_space_writes_a_table_and_goes_on(tmp_path):
    out = tmp_path / "scores.jsonl"
    options = ["score-space", "--out", str(out), "--sample", "5", "--seed", "3", "--top", "2"]
    options += ["--method", "log2_R", "--method", "path_count"]
    first = CliRunner().invoke(cli.app, options)
    assert first.exit_code == 0, first.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["methods"] == ["log2_R", "path_count"] and len(rows) == 6
    best = max(rows[1:], key=lambda row: -1e9 if row["log2_R"] is None else row["log2_R"])
    assert f"{best['log2_R']:.3f}" in first.output and "5 architectures in" in first.output
    written = out.read_bytes()
    again = CliRunner().invoke(cli.app, options)
    assert again.exit_code == 0 and out.read_bytes() == written


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "naswot"], "score_space: method: wanted different ones of"),
        (["--weights", "old"], "score_space: weights: wanted 'shared', 'fresh' or tensors, got 'old'"),
        (["--sample", "0"], "--sample: wanted 1 to 15625, got 0"),
    ],
)
def test_score_space_refuses_in_a_line_and_writes_nothing(tmp_path, options, said):
    found = CliRunner().invoke(cli.app, ["score-space", "--out", str(tmp_path / "s.jsonl"), *options])
    assert found.exit_code == 1 and said in found.output and len(found.output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_is_a_module_too():
    done = subprocess.run([sys.executable, "-m", "pathprune", "--help"], capture_output=True, text=True, check=True)
    shown = [line for line in done.stdout.splitlines() if line.startswith("  prune ")]
    assert len(shown) == 1
    assert "..." not in done.stdout.split("Commands:")[1]  # every command in a whole line
