"""Selection within rows and groups, against a stable sort."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pathprune import Magnitude, NonFiniteScoreError, SynFlow, layer_network, prune, row_selection, scores
from pathprune.ops import WeightMap
from pathprune.row_selection import best, cut_rows
from pathprune.weights import weights_of


def by_sorting(values: torch.Tensor, n: int) -> torch.Tensor:
    order = values.double().sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros(values.shape, dtype=torch.bool, device=values.device).scatter_(-1, order, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 2, 4, 8, 9, 100])
def test_best_is_what_a_stable_sort_keeps(device, columns, dtype):
    generator = torch.Generator().manual_seed(columns)
    plain = torch.randn(3, 20, columns, generator=generator, dtype=dtype)
    for values in (plain, plain.round(), torch.zeros_like(plain), plain.masked_fill(plain < 0.3, -math.inf)):
        values = values.to(device)
        for n in {0, 1, columns // 2, columns}:
            assert torch.equal(best(values, n), by_sorting(values, n))
    assert best(torch.empty(0, columns), 1).shape == (0, columns)


@pytest.mark.parametrize("scope", ["row", "2:4", "3:7", "5:14"])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_masks_do_not_depend_on_the_pieces(monkeypatch, scope, at_once):
    """Convolutions in groups, streamed layers, ties; over rounds, so that masked scores are there too."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, (2, 7), groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(84, 28), nn.Linear(28, 5)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 30).round() / 30)
    x = torch.ones(1, 4, 2, 20)
    monkeypatch.setattr(row_selection, "_AT_ONCE", at_once)
    density = {"density": 0.4} if scope == "row" else {}
    masks = prune(model, Magnitude(), example_input=x, scope=scope, **density)
    n, m = map(int, scope.split(":")) if ":" in scope else (0, 0)
    for name in masks:
        rows = dict(model.named_parameters())[name].detach().abs().reshape(masks[name].shape[0], -1)
        keep = max(round(0.4 * rows.shape[1]), 1)
        wanted = by_sorting(rows.unflatten(1, (-1, m)), n).flatten(1) if m else by_sorting(rows, keep)
        assert torch.equal(masks[name].reshape(rows.shape), wanted)


def test_rounds_of_flow_scores():
    """The last of three rounds keeps the best of what the second left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    x = torch.ones(1, 20)
    halves, third = prune(model, SynFlow(rounds=2), density=[0.5, 0.3], example_input=x, scope="row")
    made = scores(model, SynFlow(), example_input=x, masks=halves)
    for name in third:
        live = made.tensors[name].masked_fill(~halves[name], -math.inf)
        assert torch.equal(third[name], by_sorting(live, round(0.3 * live.shape[1])))


def test_scores_that_are_not_finite():
    model = nn.Sequential(nn.Linear(6, 3))
    network = layer_network(model)
    weights = weights_of(network, network.prunable, (WeightMap.ABS, WeightMap.ABS))
    for value in (math.nan, math.inf):
        weights["0.weight"].replace_scores(torch.full((3, 6), value))
        with pytest.raises(NonFiniteScoreError, match=r"scores of '0.weight' are NaN or infinite"):
            cut_rows(weights["0.weight"], 2)


def test_rows_that_are_no_multiple():
    with pytest.raises(ValueError, match=r"'0.weight': wanted 6 inputs to be a multiple of 4 for 2:4; exclude it"):
        prune(layer_network(nn.Sequential(nn.Linear(6, 3))), Magnitude(), scope="2:4")


def test_rows_with_a_density_for_each_layer():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    masks = prune(
        layer_network(model), Magnitude(), density=0.5, scope="row", allocation={"0.weight": 0.2, "2.weight": 0.9}
    )
    assert (masks["0.weight"].sum(1) == 4).all() and (masks["2.weight"].sum(1) == 27).all()
