"""The examples run, and do what they say."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pathprune as pp
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
