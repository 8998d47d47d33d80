"""The examples run, and do what they say."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pathprune as pp
from image_folders import tiny_imagenet
from pathprune.models import resnet20

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_hugging_face_checkpoint_keeps_its_zeros(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "checkpoint"
    arguments = ["--small", "--rounds", "5", "--density", "0.2", "--out", str(folder)]
    masks = example("huggingface").main(arguments)
    assert masks == pp.Masks.load(folder / "masks.safetensors")
    assert masks.kept == round(0.2 * masks.total)
    assert {"model.safetensors", "config.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["synflow", "phew"])
def test_the_training_loop_learns_and_revives_nothing(method: str) -> None:
    pytest.importorskip("sklearn")
    accuracy, revived = example("training_loop").main(["--epochs", "1", "--density", "0.1", "--method", method])
    assert revived == 0
    assert accuracy > 0.5  # chance is 0.1


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    pytest.importorskip("sklearn")
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)  # another precision in one process
    accuracy, revived = example("accelerate_training").main(["--epochs", "1", "--mixed-precision", precision])
    assert revived == 0
    assert accuracy > 0.5


def test_migration_changes_no_mask() -> None:
    assert example("migration").main(resnet20) == (0, 0)


def test_sparse_training_takes_the_dense_steps() -> None:
    pytest.importorskip("sklearn")
    module = example("sparse_training")
    data = module.flat(module.digits())
    data = module.Split(data.train_images[:256], data.train_labels[:256], data.test_images, data.test_labels)
    model, masks = module.pruned("magnitude", 256, 0.05, data)
    wide = module.Split(data.train_images.double(), data.train_labels, data.test_images.double(), data.test_labels)
    runs = [
        module.train(copy.deepcopy(model).double(), masks, wide, epochs=1, batch=64, sparse=sparse)
        for sparse in (True, False)
    ]
    torch.testing.assert_close(torch.tensor(runs[0].losses), torch.tensor(runs[1].losses), rtol=1e-6, atol=0.0)
    assert len(runs[0].losses) == 4


def test_sparse_training_takes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its classes and size, also in the processes that measure memory; no more images than asked for."""
    pytest.importorskip("PIL")
    arguments = ["--data", str(tiny_imagenet(tmp_path)), "--images", "9", "--size", "20", "--epochs", "1"]
    module = example("sparse_training")
    module.main([*arguments, "--width", "32", "--method", "magnitude", "--density", "0.3"])
    printed = capsys.readouterr().out
    kept = round(0.3 * (3 * 20 * 20 * 32 + 32 * 32 + 32 * 3))
    assert f"magnitude: {kept:,} of " in printed and "in all 1\n" in printed  # nine images are one step
    assert re.search(r"sparse: .* ms a step, \d.* MB, accuracy ", printed)
