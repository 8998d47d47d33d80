"""Masks side by side, and training curves predicted from kernels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

import pathprune as pp
from pathprune import models
from pathprune.network import PathNetwork


@pytest.fixture(scope="module")
def nets() -> tuple[PathNetwork, dict[str, pp.Masks], Tensor]:
    torch.manual_seed(0)
    network = PathNetwork.from_module(models.mlp((12, 24, 24, 4), bias=False), torch.ones(1, 12))
    options = {"density": 0.2, "progress": False}
    masks = {
        "SynFlow": pp.prune(network, pp.SynFlow(rounds=10), **options),
        "PHEW": pp.prune(network, pp.PHEW(), **options),
        "random": pp.prune(network, pp.Random(), **options),
    }
    return network, masks, torch.randn(6, 12)


def test_rows_are_what_each_part_says(nets, tmp_path: Path):
    network, masks, x = nets
    found = pp.compare(network, {**masks, "dense": None}, data=[x[:4], x[4:]], eigenvalues=2, probes=None)
    assert [row.name for row in found.rows] == ["SynFlow", "PHEW", "random", "dense"]
    for row in found.rows:
        own = masks.get(row.name)
        kernel = pp.PathKernel(network, masks=own)
        counts = pp.path_counts(network, own)
        assert row.log2_trace == kernel.log2_trace()
        assert row.log2_eigenvalues == pytest.approx(kernel.log2_top_eigenvalues(2).tolist(), abs=1e-4)
        assert row.log2_paths == counts.log2
        assert row.ntk_trace == pytest.approx(pp.ntk_trace(network, [x], own), rel=1e-5)
        assert math.log2(row.ntk_trace) <= row.log2_ntk_bound
        assert row.live_units == sum(layer.live_outputs for layer in counts.layers.values())
        assert row.narrowest == min(layer.live_outputs for layer in counts.layers.values())
    dense, phew, random = found.rows[3], found.rows[1], found.rows[2]
    assert dense.density == 1 and dense.live_units == 24 + 24 + 4
    assert phew.effective_density == phew.density > random.effective_density
    text = str(found)
    assert all(name in text for name in ("SynFlow", "dense", "log2 tr Pi", "tr NTK"))
    assert max(map(len, text.splitlines())) <= 110
    read = json.loads(found.to_json(tmp_path / "masks.json"))
    assert json.loads((tmp_path / "masks.json").read_text()) == read
    assert read[0]["log2_trace"] == found.rows[0].log2_trace
    found.plot(tmp_path / "masks.png")
    assert (tmp_path / "masks.png").stat().st_size > 10_000


def test_masks_without_paths_and_lists(nets, tmp_path: Path):
    network, masks, _ = nets
    closed = pp.Masks({n: torch.zeros(network.tensors[n].shape, dtype=torch.bool) for n in network.prunable})
    found = pp.compare(network, {"closed": closed})
    assert found.rows[0].log2_trace == -math.inf and found.rows[0].log2_eigenvalues == ()
    assert json.loads(found.to_json())[0]["log2_trace"] is None
    assert "none" in str(found)
    found.plot(tmp_path / "closed.png")
    listed = pp.compare(network, [masks["SynFlow"], masks["PHEW"]], eigenvalues=0)
    assert listed.rows[0].name == "SynFlow 20 %" and listed.rows[1].name.startswith("PHEW 20")
    with pytest.raises(ValueError, match="at least one"):
        pp.compare(network, {})


def net_and_task(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)).double()
    return model, torch.randn(10, 4).double(), torch.randn(10, 2).double()


@pytest.mark.parametrize("masked", [False, True])
def test_prediction_is_descent_on_the_linearised_network(masked: bool):
    model, x, y = net_and_task()
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    masks = None
    if masked:
        generator = torch.Generator().manual_seed(1)
        masks = {n: torch.rand(model.get_parameter(n).shape, generator=generator) < 0.6 for n in names}
    start = {n: model.get_parameter(n).detach() * (masks[n] if masks else 1) for n in names}
    found = pp.predict_convergence(model, x, y, steps=40, masks=masks)
    rate = 1 / float(found.eigenvalues[0])
    moved = {n: torch.zeros_like(w) for n, w in start.items()}

    def linearised(moved: dict[str, Tensor]) -> Tensor:
        out, change = jvp(lambda w: functional_call(model, w, (x,)), (start,), (moved,))
        return out + change

    for t in range(41):
        leaves = {n: w.clone().requires_grad_() for n, w in moved.items()}
        loss = (linearised(leaves) - y).square().sum() / (2 * len(x))
        assert float(loss.detach()) == pytest.approx(float(found.loss[t]), rel=1e-9)
        slopes = torch.autograd.grad(loss, list(leaves.values()))
        moved = {n: w - rate * g * (masks[n] if masks else 1) for (n, w), g in zip(moved.items(), slopes, strict=True)}
    assert bool((found.loss.diff() <= 1e-15).all())
    assert float(found.alignment.sum()) == pytest.approx(1, abs=1e-12)
    half = found.steps_to(0.5)
    assert half is not None and found.loss[half] <= 0.5 * found.loss[0] < found.loss[half - 1]


def test_prediction_follows_real_training_of_small_steps():
    """A real network trained with small steps stays near its linearisation at first."""
    model, x, y = net_and_task(3)
    found = pp.predict_convergence(model, x, y, steps=20, learning_rate=5e-3)
    weights = [p for p in model.parameters() if p.dim() > 1]
    for t in range(21):
        loss = (model(x) - y).square().sum() / (2 * len(x))
        assert float(loss.detach()) == pytest.approx(float(found.loss[t]), rel=2e-2)
        for p, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            p.data.sub_(g, alpha=5e-3)
    assert float(found.loss[20]) < 0.97 * float(found.loss[0]), "so little that anything would have followed it"


def test_bad_arguments():
    model, x, y = net_and_task()
    with pytest.raises(ValueError, match=r"y: wanted shape \(10, 2\), got \(10, 3\)"):
        pp.predict_convergence(model, x, torch.zeros(10, 3), steps=3)
    with pytest.raises(ValueError, match="steps: wanted at least 0"):
        pp.predict_convergence(model, x, y, steps=-1)
