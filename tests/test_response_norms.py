"""Global response normalisation: float64 autograd of its rule, the model itself, what is no such norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp
from pathprune.network import PathNetwork, UnsupportedModelError
from pathprune.ops import WeightMap
from test_attention import scored
from test_conservation import assert_every_cut_carries_all
from test_expert_rules import by_hand
from test_recording import drawn, is_the_model, through_gates

WIDTH = 5


def responses(x: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(x, ord=2, dim=(1, 2), keepdim=True)
    return x * (size / (size.mean(dim=-1, keepdim=True) + 1e-6))


def squared(x: Tensor) -> Tensor:
    """The same, by other operators."""
    size = x.square().sum((1, 2), keepdim=True).sqrt()
    return size.div(size.mean(-1, keepdim=True).clamp(min=1e-9)) * x


class Block(nn.Module):
    """As ConvNeXt V2 has it: images with channels last, beside a skip."""

    def __init__(self, form: Callable[[Tensor], Tensor] = responses) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, WIDTH, bias=False), nn.Linear(WIDTH, 2, bias=False)
        self.weight, self.form = nn.Parameter(torch.randn(1, 1, 1, WIDTH)), form
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.relu(self.weight * self.form(h) + h))


@pytest.mark.parametrize("form", [responses, squared])
@pytest.mark.parametrize("f", [WeightMap.ABS, WeightMap.SQUARE])
def test_scores_are_those_of_sizes_held_fixed(form: Callable[[Tensor], Tensor], f: WeightMap) -> None:
    model, x = Block(form), torch.rand(1, 3, 4, 3).double()
    power = 1 if f is WeightMap.ABS else 2
    gamma = model.weight.detach().abs() ** power

    def forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
        h = x @ w["first.weight"].T
        size = h.detach().square().sum((1, 2), keepdim=True).sqrt()
        return (h + gamma * h * size / size.mean(-1, keepdim=True)) @ w["last.weight"].T

    by_hand(model, forward, f, x)
    network = PathNetwork.from_module(model, x)
    assert PathNetwork.support_report(model, x)
    for policy in ("paths", "published"):
        assert_every_cut_carries_all(network, policy, f)


def test_equal_positions_are_one() -> None:
    """An image of ones is scored on one position, with the scores of all."""
    model = Block()
    found = pp.scores(model, pp.SynFlow(policy="paths"), example_input=torch.ones(1, 3, 4, 3).double())
    log2_total, scores, _ = scored(PathNetwork.from_module(model, torch.ones(1, 3, 4, 3).double()))
    assert found.log2_R == pytest.approx(log2_total, abs=1e-12)
    for name, score in scores.items():
        torch.testing.assert_close(found.double(name), score, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", [responses, squared])
def test_with_data_they_are_those_of_the_sample(form: Callable[[Tensor], Tensor]) -> None:
    is_the_model(Block(form), drawn(3, 3, 4, 3))
    model, x = Block(form), drawn(2, 3, 4, 3)
    with torch.no_grad():
        h = model.first(x)
        is_open = (model.weight * form(h) + h > 0).double()
        counted = x.square().sum(-1, keepdim=True) * (1 + (form(h) / h).square()) * is_open
    (found,) = through_gates(model, x, WeightMap.ONE)
    torch.testing.assert_close(found, counted.sum(-1, keepdim=True).expand(-1, -1, -1, 2))


def test_no_size_is_lost_or_made() -> None:
    """R of weights a thousand times as large is that many times as large: no scale is divided away."""
    model, x = Block(), torch.ones(1, 3, 4, 3).double()
    before = pp.scores(model, pp.SynFlow(), example_input=x).log2_R
    model.first.weight.data *= 1024
    assert pp.scores(model, pp.SynFlow(), example_input=x).log2_R == pytest.approx(before + 10, abs=1e-9)
    model.first.weight.data.zero_()
    assert pp.scores(model, pp.SynFlow(), example_input=x).log2_R == -float("inf")


REFUSED = {
    "another's": lambda h: h.relu() * (size := h.square().sum((1, 2), keepdim=True).sqrt()) / size.mean(-1, True),
    "mean alone": lambda h: h * h.norm(dim=1, keepdim=True).mean(-1, keepdim=True),
    "added": lambda h: h + (size := h.norm(dim=1, keepdim=True)) / (size.mean(-1, keepdim=True) + 1),
    "of means": lambda h: h * (h.norm(dim=1, keepdim=True) / (h.norm(dim=2, keepdim=True).mean(-1, keepdim=True) + 1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_uses_are_refused_by_name(case: str) -> None:
    model, x = Block(REFUSED[case]), torch.rand(1, 3, 4, 3).double()
    with pytest.raises(UnsupportedModelError, match=r"Block.*(size of (a )?flows?|mean size|sizes of two flows)"):
        PathNetwork.from_module(model, x)
    assert not PathNetwork.support_report(model, x)
