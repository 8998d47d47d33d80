"""Routers and experts: every way to give rows to experts, against experts written out in float64, and by data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from pathprune.network import PathNetwork, UnsupportedModelError
from pathprune.ops import WeightMap
from pathprune.pruners import SynFlow
from test_attention import entering, scored
from test_recording import through_gates

EXPERTS, WIDTH, OUT = 4, 3, 5


def by_hand(model: nn.Module, forward: Callable[..., Tensor], f: WeightMap, *inputs: Tensor) -> None:
    """Scores and R of the network are those of float64 autograd through ``forward(leaves, *inputs)``."""
    network = PathNetwork.from_module(model, inputs)
    log2_total, scores, flow = scored(network, [x[0].abs() for x in inputs], f=f)
    raised = torch.abs if f is WeightMap.ABS else torch.square
    leaves = {name: raised(p.detach().double()).requires_grad_() for name, p in model.named_parameters()}
    total = forward(leaves, *(x.double().abs() for x in inputs)).sum()
    total.backward()
    assert 2**log2_total == pytest.approx(total.item(), rel=1e-12)
    assert entering(network, flow) == pytest.approx(total.item(), rel=1e-12)
    for name, score in scores.items():
        torch.testing.assert_close(score, (leaves[name] * leaves[name].grad).detach(), rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------- experts


class Experts(nn.Module):
    """All experts' weights as one parameter, multiplied with in one call."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], out_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(WIDTH, WIDTH, bias=False)
        shape = (OUT, WIDTH) if out_first else (WIDTH, OUT)
        self.weight = nn.Parameter(torch.randn(EXPERTS, *shape))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.before(x), self.weight)


def to_each(x: Tensor) -> Tensor:
    return x.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH)


GIVEN = {  # how rows [T, in] are multiplied with all experts' matrices -> and whether these are [out, in]
    "bmm": (lambda x, w: torch.bmm(to_each(x), w), False),
    "bmm, weights first": (lambda x, w: torch.bmm(w, to_each(x).mT), True),
    "bmm, transposed": (lambda x, w: torch.bmm(to_each(x), w.transpose(1, 2)), True),
    "bmm, weights first, transposed": (lambda x, w: torch.bmm(w.mT, to_each(x).mT), False),
    "bmm, permuted": (lambda x, w: torch.bmm(to_each(x), w.permute(0, 2, 1)), True),
    "matmul": (lambda x, w: to_each(x) @ w, False),
    "matmul, one for all": (lambda x, w: x[None] @ w, False),
    "matmul, of matrices": (lambda x, w: x @ w, False),
    "matmul, a batch": (lambda x, w: to_each(x)[None].expand(2, -1, -1, -1) @ w, False),
    "in another type": (lambda x, w: torch.bmm(to_each(x), w.to(torch.float64).contiguous()), False),
}


@pytest.mark.parametrize("f", [WeightMap.ABS, WeightMap.SQUARE])
@pytest.mark.parametrize("case", GIVEN)
def test_every_way_to_multiply_with_all_experts(case: str, f: WeightMap) -> None:
    product, out_first = GIVEN[case]
    model, x = Experts(product, out_first).double(), torch.rand(1, 6, WIDTH, dtype=torch.float64)
    model.forward = lambda x: model.product(model.before(x)[0], model.weight)  # type: ignore[method-assign]

    def forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
        h, times = x[0] @ w["before.weight"].T, 2 if case == "matmul, a batch" else 1
        return torch.stack([h @ (e.T if out_first else e) for e in w["weight"]]) * times

    by_hand(model, forward, f, x)
    samples = torch.randn(2, 6, WIDTH).double()
    (found,) = through_gates(model, samples, WeightMap.IDENTITY, "published")
    wanted = torch.stack([model(sample[None]) for sample in samples]).detach()
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- routers


def softmax_first(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = logits.softmax(-1).topk(2)
    return weights / weights.sum(-1, keepdim=True), chosen


def softmax_last(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = torch.topk(logits, 2, dim=-1)
    return weights.softmax(-1), chosen


def in_groups(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The best two groups by their best two; sigmoids, normalised, times a factor."""
    scores = logits.sigmoid()
    biased = scores + torch.arange(EXPERTS) * 0.1
    groups = biased.view(-1, 2, EXPERTS // 2)
    best = groups.topk(2)[0].sum(-1).topk(1)[1]
    mask = torch.zeros_like(groups[:, :, 0]).scatter_(1, best, 1)
    allowed = mask.unsqueeze(-1).expand(groups.shape).reshape(-1, EXPERTS)
    chosen = biased.masked_fill(~allowed.bool(), -torch.inf).topk(2)[1]
    weights = scores.gather(1, chosen)
    return weights / weights.sum(-1, keepdim=True) * 2.5, chosen


def best_of_groups(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Groups by their largest, softmax, not normalised."""
    scores = logits.softmax(-1)
    best = scores.view(-1, 2, EXPERTS // 2).max(-1).values.topk(1)[1]
    mask = torch.zeros(len(scores), 2, dtype=scores.dtype).scatter_(1, best, 1)
    return scores.masked_fill(mask.repeat_interleave(EXPERTS // 2, 1) == 0, 0.0).topk(2)


ROUTERS = {  # a router -> what each of four experts weighs when all are equals
    "softmax first": (softmax_first, 1 / 4),
    "softmax last": (softmax_last, 1 / 4),
    "sigmoids in groups": (in_groups, 2.5 / 4),
    "best of groups": (best_of_groups, 1 / 4),
}


class Mixture(nn.Module):
    """Experts of gate and up, of which a router chooses, each row with matrices of its own."""

    def __init__(self, router: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * OUT, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, OUT))
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        rows = x[0]
        weights, chosen = self.router(self.gate(rows.float()).to(rows.dtype))
        each = rows.repeat_interleave(chosen.shape[1], 0)
        which = chosen.reshape(-1)
        gate, up = torch.bmm(self.gate_up[which], each.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        made = torch.bmm(self.down[which], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (made * weights.reshape(-1, 1)).view(len(rows), -1, WIDTH).sum(1) + rows


@pytest.mark.parametrize("f", [WeightMap.ABS, WeightMap.SQUARE])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_expert_has_the_weight_of_equals(router: str, f: WeightMap) -> None:
    route, weight = ROUTERS[router]
    model = Mixture(route).double()
    model.gate.float()
    power = 1 if f is WeightMap.ABS else 2

    def forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
        total = x[0]
        for gate_up, down in zip(w["gate_up"], w["down"], strict=True):
            gate, up = (x[0] @ gate_up.T).chunk(2, -1)
            both = (gate * up.detach() + gate.detach() * up) / 2
            total = total + both @ down.T * weight**power
        return total

    x = torch.rand(1, 6, WIDTH, dtype=torch.float64)
    network = PathNetwork.from_module(model, x)
    assert network.prunable == ("gate_up", "down")
    assert PathNetwork.support_report(model, x)
    assert model.gate.weight.dtype == torch.float32
    model.gate.weight.data.zero_()  # is not read
    by_hand(model, forward, f, x)


def test_rows_that_are_weighted_before_the_experts() -> None:
    """All rows to all experts, those that are not chosen times the sigmoid of minus infinity."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
            self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, OUT))

        def forward(self, x: Tensor) -> Tensor:
            rows = x[0]
            logits = self.router(rows)
            values, chosen = torch.topk(logits, 1, dim=1)
            weights = torch.full_like(logits, -torch.inf).scatter_(1, chosen, values).sigmoid()
            given = rows.repeat(EXPERTS, 1) * weights.T.reshape(-1, 1)
            made = torch.bmm(given.view(EXPERTS, -1, WIDTH), self.up).view(-1, OUT)
            return made.reshape(EXPERTS, -1, OUT).sum(0)

    model = Sorted().double()
    x = torch.rand(1, 6, WIDTH, dtype=torch.float64)
    log2_total, scores, _ = scored(PathNetwork.from_module(model, x), x[0])
    assert set(scores) == {"up"}
    wanted = x[0].sum(0)[:, None] * model.up.detach().abs() / 2
    torch.testing.assert_close(scores["up"], wanted, rtol=1e-12, atol=0)
    assert 2**log2_total == pytest.approx(float(wanted.sum()), rel=1e-12)


@pytest.mark.parametrize("pruner", [SynFlow(rounds=3), pp.Magnitude(), pp.PHEW()])
def test_whole_experts_are_pruned_to_the_exact_count(pruner: Any) -> None:
    model = Mixture(in_groups)
    masks = pp.prune(model, pruner, density=0.25, example_input=torch.ones(1, 6, WIDTH))
    assert {name: mask.shape for name, mask in masks.items()} == {
        "gate_up": model.gate_up.shape,
        "down": model.down.shape,
    }
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    assert abs(kept - round(0.25 * total)) <= (4 if isinstance(pruner, pp.PHEW) else 0)  # its last walk stays whole
    masks.apply_(model)
    assert bool(model(torch.randn(1, 6, WIDTH)).isfinite().all())


# ---------------------------------------------------------------------------------------------------- refusals


class Does(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, OUT))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def by_the_largest(m: Any, x: Tensor) -> Tensor:
    weights, chosen = m.router(x).max(-1, keepdim=True)
    return torch.bmm(x[:, None], m.weight[chosen[:, 0]])[:, 0] * weights


REFUSED = {
    "choice of one": (by_the_largest, r"aten\.max in module '' \(Does\): a choice of one by data"),
    "largest as a value": (lambda m, x: m.first(x) * m.first(x).amax(-1, keepdim=True), "the largest of a flow, other"),
    "another's largest": (lambda m, x: m.first(x) - x.amax(-1, keepdim=True), "other than to take it off that flow"),
    "largest taken off": (
        lambda m, x: (y := m.first(x)) - y.amax(-1, keepdim=True),
        "other than before a softmax|lead",
    ),
    "less its largest, bent": (lambda m, x: ((y := m.first(x)) - y.amax()).relu(), "other than before a softmax"),
    "larger of two": (lambda m, x: torch.max(m.first(x), x), r"aten\.max .*the larger of two values"),
    "some of the input": (lambda m, x: m.first(x) * x.topk(2)[0].sum(), "a choice by the model's input itself"),
    "some experts": (lambda m, x: torch.bmm(x[:, None], m.weight[torch.tensor([0])]), "not all given the same"),
    "rows of an expert": (lambda m, x: torch.bmm(x[:, None], m.weight[:1]), "computed by the model"),
}


def assert_refused(model: nn.Module, x: Tensor, message: str) -> None:
    """With these words, and the model as it was."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedModelError, match=message):
        PathNetwork.from_module(model, x)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(case: str) -> None:
    function, message = REFUSED[case]
    model, x = Does(function).double(), torch.rand(1, WIDTH).double()
    assert_refused(model, x, message)
    report = PathNetwork.support_report(model, x)
    assert not report
    assert not report.missing() and "refused: " in str(report)


def test_a_report_says_all_that_is_refused_and_nothing_that_follows_from_it() -> None:
    def two(m: Any, x: Tensor) -> Tensor:
        a = (m.first(x) / x.sum()).sqrt().sin()  # of which the root and the sine are not reached
        return a + torch.cumprod(x, 1) + x.masked_fill(m.first.bias > 0, 1.0)

    report = PathNetwork.support_report(Does(two), torch.rand(1, WIDTH))
    assert report.missing() == ["cumprod", "sin"]
    assert [use.split(" in ")[0] for use in report.refused] == ["div", "masked_fill"]
    assert "a division by a flow" in report.refused[0]
