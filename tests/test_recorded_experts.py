"""Experts that data choose, as recorded gates: every path by hand, the model itself, PX and kernels of autograd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from pathprune.batches import Batch
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from pathprune.recording import record
from test_expert_rules import EXPERTS, OUT, ROUTERS, WIDTH, Mixture
from test_recording import drawn, through_gates
from test_scan_rules import Decaying
from test_transformers import half


def is_each(model: nn.Module, x: Tensor, within: float = 1e-12) -> None:
    """Signed flow of every sample is the model on it."""
    (found,) = through_gates(model, x, WeightMap.IDENTITY, "published")
    with torch.no_grad():
        wanted = torch.stack([model(sample[None]) for sample in x])
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=0, atol=within * float(wanted.abs().max()))


def every_one(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits.softmax(-1).topk(EXPERTS)


def scaled_by_expert(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert has a factor of its own."""
    weights, chosen = logits.softmax(-1).topk(2)
    return weights * (torch.arange(EXPERTS).to(weights) - 1.5)[chosen], chosen


def doubled(router: Callable[..., Any]) -> Mixture:
    """A mixture in float64 whose router is in float32."""
    model = Mixture(router).double()
    model.gate.float()
    return model


RECORDED = {name: router for name, (router, _) in ROUTERS.items()} | {"all": every_one, "scaled": scaled_by_expert}


@pytest.mark.parametrize("router", RECORDED)
def test_signed_flow_is_the_model(router: str) -> None:
    is_each(doubled(RECORDED[router]), 3 * drawn(4, 6, WIDTH))


class Dense(nn.Module):
    """All rows to all experts; the chosen ones weigh what the router says, before them or after."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, OUT))
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        rows = x[0]
        logits = self.router(rows)
        values, chosen = torch.topk(logits, 2, dim=1)
        weights = torch.full_like(logits, -torch.inf).scatter_(1, chosen, values).sigmoid().T.unsqueeze(-1)
        given = rows.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH)
        if self.before:
            return torch.bmm(given * weights, self.up).relu().sum(0)
        return (torch.bmm(given, self.up).relu() * weights).sum(0)


@pytest.mark.parametrize("before", [True, False])
def test_signed_flow_is_the_model_where_all_rows_go_to_all_experts(before: bool) -> None:
    is_each(Dense(before).double(), 3 * drawn(4, 6, WIDTH))


def test_experts_that_are_given_their_rows_make_what_each_row_makes_with_its_matrix() -> None:
    model, x = doubled(ROUTERS["softmax first"][0]), drawn(3, 6, WIDTH)
    network = PathNetwork.from_module(model, x)
    assert len(network.by_rows) == 2
    first = record(network, Batch((x,), {}, None), {}, "test")
    network.by_rows = {}
    second = record(network, Batch((x,), {}, None), {}, "test")
    assert first.gates.keys() == second.gates.keys()
    torch.testing.assert_close(first.gates, second.gates, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(first.outputs, second.outputs, rtol=1e-12, atol=1e-14)


# ----------------------------------------------------------------------------------------------- path by path


class OneOfTwo(nn.Module):
    """A linear layer, the better of two experts of one ReLU layer, weighted, beside a skip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.router = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(2, 3, 2)), nn.Parameter(torch.randn(2, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        weights, chosen = self.router(h).softmax(-1).topk(1)
        which, rows = chosen.reshape(-1), h.repeat_interleave(chosen.shape[1], 0)
        made = torch.bmm(self.up[which], rows.unsqueeze(-1)).relu()
        made = torch.bmm(self.down[which], made).squeeze(-1) * weights.reshape(-1, 1)
        return h + made.view(len(h), -1, 2).sum(1)


def test_every_path_of_a_choice_of_two() -> None:
    """``f = sum x_p a_p v_p`` and ``g = sum x_p^2 a_p^2``, a the open ReLU times the expert's weight, if chosen."""
    model, x = OneOfTwo().double(), drawn(7, 2, seed=4)
    signed, data = (through_gates(model, x, f)[0] for f in (WeightMap.IDENTITY, WeightMap.ONE))
    first, up, down = (p.tolist() for p in (model.first.weight, model.up, model.down))
    taken = []
    for n, sample in enumerate(x):
        h = model.first(sample)
        share = model.router(h).softmax(-1).tolist()
        best = int(share[1] > share[0])
        is_open = (model.up @ h > 0).double().tolist()
        taken.append(best)
        f, g = torch.zeros(2).double(), torch.zeros(2).double()
        for i, j, o in itertools.product(range(2), range(2), range(2)):
            begin = float(sample[i])
            if j == o:
                f[o] += begin * first[j][i]
                g[o] += begin**2
            for e, m in itertools.product(range(2), range(3)):
                gate = is_open[e][m] * share[e] * (e == best)
                f[o] += begin * gate * first[j][i] * up[e][m][j] * down[e][o][m]
                g[o] += begin**2 * gate**2
        torch.testing.assert_close(signed[n], f, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(data[n], g, rtol=1e-12, atol=0)
    assert set(taken) == {0, 1}


def test_a_pruned_model_chooses_by_its_own_weights() -> None:
    """Recording runs the masked model: what enters the router has changed, and so has the choice."""
    model, x = OneOfTwo().double(), drawn(50, 2, seed=5)
    network = PathNetwork.from_module(model, x)
    mask = {"first.weight": torch.tensor([[True, False], [True, True]])}
    masked = {"first.weight": model.first.weight.detach() * mask["first.weight"]}
    recording = record(network, Batch((x,), {}, None), masked, "test")
    before = model(x).detach()
    model.first.weight.data *= mask["first.weight"]
    torch.testing.assert_close(recording.outputs[0].reshape(50, 2), model(x).detach(), rtol=1e-12, atol=0)
    assert not torch.allclose(before, model(x))


# ----------------------------------------------------------------------------------------------- by autograd


def test_kernel_with_routing_held_is_that_of_detached_weights() -> None:
    model, x = doubled(ROUTERS["sigmoids in groups"][0]), 2 * drawn(2, 3, WIDTH, seed=6)
    found = pp.ntk(model, x, hold_gates=True)
    leaves = [model.gate_up, model.down]
    rows = []
    for sample in x:
        weights, chosen = (v.detach() for v in model.router(model.gate(sample.float()).double()))
        made = sample
        for slot in range(2):
            gate, up = torch.einsum("toi,ti->to", model.gate_up[chosen[:, slot]], sample).chunk(2, -1)
            opened = gate * (F.silu(gate) / gate).detach()
            both = half(opened, up, torch.mul)
            made = made + torch.einsum("toi,ti->to", model.down[chosen[:, slot]], both) * weights[:, slot, None]
        torch.testing.assert_close(made, model(sample[None]))
        each = (torch.autograd.grad(out, leaves, retain_graph=True) for out in made.flatten())
        rows.append(torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each]))
    jacobian = torch.stack(rows)
    wanted = torch.einsum("nki,mli->nkml", jacobian, jacobian)
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-10, atol=1e-10 * float(wanted.max()))
    assert pp.ntk_trace(model, [x], hold_gates=True) == pytest.approx(float(jacobian.square().sum()), rel=1e-11)
    with pytest.raises(ValueError, match="ntk: model: wanted gates that move by steps"):
        pp.ntk(model, x)


@pytest.mark.parametrize("make", [OneOfTwo, Decaying])
def test_what_data_weight_is_1_in_the_other_factor_of_the_bound(make: Callable[[], nn.Module]) -> None:
    """Routing weights and decays are below 1: counted in both factors, the bound would not be one."""
    model = make().double()
    x = drawn(3, 2) if make is OneOfTwo else drawn(3, 3, 2)
    model.requires_grad_(False)
    for p in model.parameters():
        p.data.abs_()
    trace = pp.ntk_trace(model, [x.abs()], hold_gates=True)
    bound = 2.0 ** pp.ntk_trace_bound(model, [x.abs()], hold_gates=True)
    assert 0 < trace <= bound
    one = PathNetwork.from_module(model, x)
    shares = [k for k in one.alive if getattr(one.nodes[k], "recorded", None) is not None]
    assert shares
    for k in shares:
        one.nodes[k] = replace(one.nodes[k], factor=lambda tensors: torch.tensor(1e-3).double())
    assert 2.0 ** pp.ntk_trace_bound(one, [x.abs()], hold_gates=True) == pytest.approx(bound, rel=1e-12)


def data_factor(real: dict[str, Tensor], kept: dict[str, Tensor], rows: Tensor, route: Callable[..., Any]) -> Tensor:
    """g of a mixture on one sample: masks for weights, the squares of all that data decide."""
    weights, chosen = route((rows.float() @ real["gate.weight"].T).double())
    g = rows.square()
    for slot, row in itertools.product(range(chosen.shape[1]), range(len(rows))):
        e = int(chosen[row, slot])
        gate, up = (real["gate_up"][e] @ rows[row]).chunk(2)
        counted, counted_up = (kept["gate_up"][e] @ rows[row].square()).chunk(2)
        passed = torch.sigmoid(gate)
        both = (up / 2).square() * passed.square() * counted + (gate * passed / 2).square() * counted_up
        part = torch.zeros_like(g)
        part[row] = kept["down"][e] @ both * weights[row, slot].square()
        g = g + part
    return g


@pytest.mark.parametrize("is_masked", [False, True])
def test_px_of_a_mixture_is_its_formula(is_masked: bool) -> None:
    """The data factor has the experts that data choose; its partner, which knows none, all of them alike."""
    model, x = doubled(ROUTERS["softmax first"][0]), drawn(5, 6, WIDTH, seed=7)
    generator = torch.Generator().manual_seed(1)
    every = {key: torch.ones_like(p, dtype=torch.bool) for key, p in model.named_parameters()}
    for key in ("gate_up", "down"):
        every[key] = torch.rand(every[key].shape, generator=generator) < (0.6 if is_masked else 2)
    real = {key: (p * every[key]).detach() for key, p in model.named_parameters()}
    kept = {key: m.double() for key, m in every.items()}
    reach = torch.stack([data_factor(real, kept, sample, model.router) for sample in x]).sum(0)
    u = {key: real[key].square().requires_grad_() for key in ("gate_up", "down")}
    h = torch.ones(6, WIDTH).double()
    for gate_up, down in zip(u["gate_up"], u["down"], strict=True):
        gate, up = (torch.ones(6, WIDTH).double() @ gate_up.T).chunk(2, -1)
        h = h + half(gate, up, torch.mul) @ down.T / EXPERTS**2
    total = (reach * h).sum()
    total.backward()
    network = PathNetwork.from_module(model, x)
    masks = {key: every[key] for key in network.prunable} if is_masked else None
    found = pp.scores(network, pp.PX([x[:2], x[2:]]), masks=masks)
    assert found.log2_R == pytest.approx(math.log2(float(total.detach())), abs=1e-9)
    for key in network.prunable:
        torch.testing.assert_close(found.double(key), (u[key] * u[key].grad).detach(), rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------- pruned, refused


@pytest.mark.parametrize("policy", ["recorded", "paths"])
def test_px_prunes_a_mixture_to_the_density_and_leaves_it(policy: str) -> None:
    model, x = Mixture(ROUTERS["best of groups"][0]).train(), drawn(4, 6, WIDTH).float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    masks = pp.prune(model, pp.PX([x], rounds=4, policy=policy), density=0.3, example_input=x[:1], progress=False)
    assert sum(int(m.sum()) for m in masks.values()) == round(0.3 * sum(m.numel() for m in masks.values()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and model.training


def by_a_mask(logits: Tensor, each: Tensor) -> Tensor:
    chosen = logits.topk(1)[1]
    outside = torch.ones_like(logits).scatter(1, chosen, 0).bool()
    return each.masked_fill(outside.T.unsqueeze(-1), 0.0).sum(0)


def by_their_number(logits: Tensor, each: Tensor) -> Tensor:
    weights, chosen = logits.topk(1)
    weights = weights.tanh() + 1 if weights.shape[1] == 1 else weights + 1
    return (each * torch.zeros_like(logits).scatter(1, chosen, weights).T.unsqueeze(-1)).sum(0)


class Chosen(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(WIDTH, EXPERTS), nn.Parameter(torch.randn(EXPERTS, WIDTH, OUT))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.router(x), x @ self.up)


@pytest.mark.parametrize(
    ("join", "message"),
    [
        (by_a_mask, r"PX: model: wanted experts that a choice weights and no more, got .*\(masked_fill\)"),
        (by_their_number, "PX: model: wanted the same operators whatever number of experts is chosen"),
    ],
)
def test_choices_that_cannot_be_followed_are_refused(join: Callable[..., Tensor], message: str) -> None:
    model, x = Chosen(join), torch.rand(6, WIDTH)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pp.prune(model, pp.SynFlow(rounds=1), density=0.5, example_input=x[:1], progress=False)
    with pytest.raises(ValueError, match=message):
        pp.prune(model, pp.PX([x], rounds=1), density=0.5, example_input=x[:1], progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
