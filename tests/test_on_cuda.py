"""The whole library on a GPU: what it finds there is what it finds on the CPU, and the model stays where it was.

Without a GPU, `PATHPRUNE_PRETEND_CUDA=1 pytest -m cuda` runs it on one that is pretended (pretended_cuda.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp
from pathprune.network import PathNetwork
from test_pruning import Small, X, small

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda", 0)
ONE = X[:1]


def there(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(GPU)


def batches(device: torch.device | str = "cpu", count: int = 2) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    draw: list[tuple[Tensor, Tensor]] = []
    for _ in range(count):
        x = torch.randn(4, *X.shape[1:], generator=made, dtype=torch.float64)
        draw.append((x.to(device), torch.randint(0, 10, (4,), generator=made).to(device)))
    return draw


def inputs(device: torch.device | str = "cpu") -> list[Tensor]:
    return [x for x, _ in batches(device)]


PRUNERS: dict[str, Callable[[Any], pp.Pruner]] = {
    "magnitude": lambda d: pp.Magnitude(),
    "random": lambda d: pp.Random(),
    "synflow": lambda d: pp.SynFlow(rounds=4),
    "synflow_l2": lambda d: pp.SynFlowL2(rounds=3),
    "synflow_l2_phew": lambda d: pp.SynFlowL2(rounds=3, variant="phew"),
    "synflow_dist": lambda d: pp.SynFlowDist(inputs(d)),
    "synflow_l2_dist": lambda d: pp.SynFlowL2Dist(inputs(d)),
    "trace_saliency": lambda d: pp.TraceSaliency(rounds=3),
    "phew": lambda d: pp.PHEW(),
    "phew_mass": lambda d: pp.PHEW(branches="mass"),
    "phew_flow": lambda d: pp.PHEW(branches="flow"),
    "px": lambda d: pp.PX(inputs(d), rounds=3),
    "px_author": lambda d: pp.PX(inputs(d), rounds=2, variant="released"),
    "px_exact": lambda d: pp.PXExact(batches(d)),
    "snip": lambda d: pp.SNIP(batches(d)),
    "iter_snip": lambda d: pp.IterSNIP(batches(d), rounds=2),
    "force": lambda d: pp.FORCE(batches(d), rounds=2),
    "grasp": lambda d: pp.GraSP(batches(d)),
    "fisher": lambda d: pp.Fisher(batches(d)),
    "hutchinson": lambda d: pp.Hutchinson(batches(d)),
    "sbp": lambda d: pp.SBP(batches(d)),
    "wanda": lambda d: pp.Wanda(inputs(d)),
    "ntk_sap": lambda d: pp.NTKSAP(rounds=2),
    "sketch": lambda d: pp.Sketch(pp.SynFlow(rounds=2)),
}


@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_finds_the_same(name: str) -> None:
    model = small()
    gpu_model = there(model)
    before = {key: value.clone() for key, value in gpu_model.state_dict().items()}
    wanted = pp.prune(model, PRUNERS[name]("cpu"), density=0.2, example_input=ONE, progress=False)
    found = pp.prune(gpu_model, PRUNERS[name](GPU), density=0.2, example_input=ONE.to(GPU), progress=False)
    assert found == wanted
    assert all(mask.device.type == "cpu" for mask in found.values())
    for key, value in gpu_model.state_dict().items():
        assert value.device == GPU
        assert torch.equal(value, before[key])
