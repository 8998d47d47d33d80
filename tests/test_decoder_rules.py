"""Forms that decoders write attention, positions, gates and parts of tensors in: against plain forms, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import pathprune as pp
from pathprune.batches import Batch
from pathprune.network import PathNetwork, UnsupportedModelError
from pathprune.nodes import Softmax
from pathprune.ops import WeightMap
from pathprune.recording import record
from test_attention import Block, entering, scored
from test_recording import is_the_model

TOKENS, WIDTH = 5, 8
POWERS = {WeightMap.ABS: 1, WeightMap.SQUARE: 2}


def same_scores(one: nn.Module, other: nn.Module, f: WeightMap, policy: str = "paths") -> None:
    """Two ways to write one model have one flow."""
    other.load_state_dict(one.state_dict())
    x, source = torch.ones(1, TOKENS, WIDTH).double(), torch.rand(TOKENS, WIDTH, dtype=torch.float64)
    first = scored(PathNetwork.from_module(one, x), source, f=f, policy=policy)
    network = PathNetwork.from_module(other, x)
    second = scored(network, source, f=f, policy=policy)
    assert first[0] == pytest.approx(second[0], abs=1e-12)
    assert entering(network, second[2]) == pytest.approx(2 ** second[0], rel=1e-12)
    for name, score in first[1].items():
        torch.testing.assert_close(second[1][name], score, rtol=1e-11, atol=0)


# -------------------------------------------------------------------------------------------- rotary embeddings


def angles() -> Tensor:
    return torch.arange(TOKENS).double()[:, None] * torch.tensor([1.0, 0.3]).double()


def turned_by_complex(x: Tensor) -> Tensor:
    by = torch.polar(torch.ones_like(angles()), angles())
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * by).flatten(-2)


def turned_by_real(x: Tensor) -> Tensor:
    even, odd, c, s = x[..., ::2], x[..., 1::2], angles().cos(), angles().sin()
    return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)


class Turned(Block):
    def __init__(self, turn: Callable[[Tensor], Tensor], values: bool = False) -> None:
        super().__init__(WIDTH, 2)
        self.turn, self.values = turn, values

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        v = self.turn(v) if self.values else v
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("f", POWERS)
@pytest.mark.parametrize("values", [False, True])
def test_turning_complex_numbers_is_turning_pairs(f: WeightMap, values: bool) -> None:
    torch.manual_seed(0)
    same_scores(Turned(turned_by_real, values).double(), Turned(turned_by_complex, values).double(), f)


def test_every_path_through_a_turned_pair() -> None:
    """A pair of features goes to each of the two by one entry of the rotation."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            by = torch.polar(torch.tensor([2.0]).double(), torch.tensor([2.5]).double())
            return self.last(torch.view_as_real(by * torch.view_as_complex(self.first(x)[:, None]))[:, 0])

    torch.manual_seed(1)
    model, x = Pair().double(), torch.rand(1, 3).double()
    angle = torch.tensor(2.5).double()
    entries = 2 * torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([angle.sin(), angle.cos()])]).abs()
    for f, power in POWERS.items():
        log2_total, scores, _ = scored(PathNetwork.from_module(model, x), x[0], f=f)
        first, last = (w.detach().abs() ** power for w in (model.first.weight, model.last.weight))
        paths = torch.einsum("oj,ji,ia,a->ojia", last, entries**power, first, x[0])  # one number for every path
        assert 2**log2_total == pytest.approx(float(paths.sum()), rel=1e-12)
        torch.testing.assert_close(scores["first.weight"], paths.sum((0, 1)), rtol=1e-12, atol=0)
        torch.testing.assert_close(scores["last.weight"], paths.sum((2, 3)), rtol=1e-12, atol=0)
    is_the_model(model, torch.randn(4, 3).double())


def test_turned_values_of_data_are_the_model() -> None:
    torch.manual_seed(2)
    is_the_model(Turned(turned_by_complex, True), torch.randn(3, TOKENS, WIDTH).double())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.view_as_complex(x[..., :2]).abs(),
        lambda x: torch.view_as_real(torch.view_as_complex(x[..., :2]) * torch.view_as_complex(x[..., 2:4])),
        lambda x: torch.view_as_complex(x[..., :2]).real,
    ],
)
def test_other_uses_of_complex_numbers_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    class Complexes(Block):
        def forward(self, x: Tensor) -> Tensor:
            return function(self.q(x))

    with pytest.raises(UnsupportedModelError, match=r"complex numbers, other than a product|no rule"):
        PathNetwork.from_module(Complexes(WIDTH), torch.ones(1, TOKENS, WIDTH))


# ------------------------------------------------------------------------------------------ similarities and sinks


class Attends(Block):
    """Attention by a function of queries, keys, values and a parameter."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__(WIDTH, 2)
        self.sinks = nn.Parameter(torch.tensor([0.5, -1.0]))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v, self.sinks).transpose(1, 2).flatten(2))


def beside_sinks(q: Tensor, k: Tensor, sinks: Tensor, first: bool = False) -> Tensor:
    ahead = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    similar = (q @ k.mT / 2).masked_fill(ahead, -torch.inf)
    column = sinks.reshape(1, -1, 1, 1).expand(len(q), -1, TOKENS, -1)
    return torch.cat([column, similar] if first else [similar, column], -1)


def cut_off(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    both = beside_sinks(q, k, sinks)
    both = both - both.max(-1, keepdim=True).values
    return F.softmax(both, -1)[..., :-1] @ v


def cut_off_first(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return F.softmax(beside_sinks(q, k, sinks, first=True), -1)[..., 1:] @ v


def for_nothing(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    both = beside_sinks(q, k, sinks)
    return F.softmax(both - both.amax(-1, keepdim=True), -1) @ torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)


SINKS = {"cut off": cut_off, "cut off in front": cut_off_first, "for nothing": for_nothing}


@pytest.mark.parametrize("form", SINKS)
@pytest.mark.parametrize("attention", ["half", "budget", "values"])
def test_sinks_take_attention_and_no_flow(form: str, attention: str) -> None:
    """P0 of token i is 1 / (tokens up to i + e^sink); the flow is that of float64 autograd through it."""
    torch.manual_seed(3)
    model = Attends(SINKS[form]).double()
    source = torch.rand(TOKENS, WIDTH, dtype=torch.float64)
    network = PathNetwork.from_module(model, torch.ones(1, TOKENS, WIDTH).double())
    log2_total, scores, flow = scored(network, source, attention=attention)
    allowed = torch.ones(TOKENS, TOKENS).double().tril()
    carries = allowed / (allowed.sum(1, keepdim=True) + model.sinks.detach().exp()[:, None, None])  # [heads, T, T]
    to_pairs = {"half": 1 / 2, "budget": 2 / 3, "values": 0.0}[attention]
    w = {name: p.detach().abs().requires_grad_() for name, p in model.named_parameters()}
    q, k, v = ((source @ w[f"{n}.weight"].T).unflatten(-1, (2, -1)).transpose(0, 1) for n in "qkv")
    similar = (q @ k.detach().mT + q.detach() @ k.mT) / 2
    share = carries * similar / similar.detach()
    y = to_pairs * (share @ v.detach()) + (1 - to_pairs) * (carries @ v)
    total = (y.transpose(0, 1).flatten(1) @ w["o.weight"].T).sum()
    total.backward()
    assert 2**log2_total == pytest.approx(total.item(), rel=1e-12)
    assert entering(network, flow) == pytest.approx(total.item(), rel=1e-12)
    for name, score in scores.items():
        torch.testing.assert_close(score, (w[name] * w[name].grad).detach(), rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("form", SINKS)
def test_sinks_of_data_are_the_model(form: str) -> None:
    torch.manual_seed(4)
    is_the_model(Attends(SINKS[form]), torch.randn(3, TOKENS, WIDTH).double())


def fused(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def capped(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / 2 / 30.0) * 30.0).clamp(-25, 25).softmax(-1) @ v


def in_one_batch(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """Heads in the batch of bmm and of baddbmm, which adds what shifts every row alike."""
    q, k, v = (x.reshape(-1, TOKENS, 4) for x in (q, k, v))
    added = sinks.repeat(len(q) // 2)[:, None, None].expand(-1, TOKENS, 1)
    similar = added.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=2.0, alpha=0.5)
    weights = similar.view(-1, 2, TOKENS, TOKENS).float().softmax(-1).to(q.dtype).view(-1, TOKENS, TOKENS)
    return torch.bmm(weights, v).view(-1, 2, TOKENS, 4)


@pytest.mark.parametrize("f", POWERS)
@pytest.mark.parametrize("form", [capped, in_one_batch])
def test_what_stands_before_the_softmax_has_no_path(form: Callable[..., Tensor], f: WeightMap) -> None:
    torch.manual_seed(5)
    other = Attends(form).double()
    if form is in_one_batch:
        network = PathNetwork.from_module(other, torch.ones(1, TOKENS, WIDTH).double())
        assert any(isinstance(network.nodes[k], Softmax) for k in network.alive)
        assert scored(network)[1]["q.weight"].min() > 0
    same_scores(Attends(fused).double(), other, f)


def test_products_with_something_added_are_the_model() -> None:
    torch.manual_seed(6)
    is_the_model(Attends(in_one_batch), torch.randn(3, TOKENS, WIDTH).double(), within=1e-6)  # its softmax is float32

    class Added(Block):
        def forward(self, x: Tensor) -> Tensor:
            return torch.baddbmm(self.o(x), self.q(x), self.k(x).mT @ self.v(x), beta=-0.5, alpha=3)

    model = Added(WIDTH)
    is_the_model(model, torch.randn(3, TOKENS, WIDTH).double())
    log2_total, _, flow = scored(PathNetwork.from_module(model, torch.ones(1, TOKENS, WIDTH).double()))
    assert entering(flow.network, flow) == pytest.approx(2**log2_total, rel=1e-12)


# -------------------------------------------------------------------------------- constant queries, parts of weights


class Probed(nn.Module):
    """A learned query attends to tokens, by torch's attention: parts of one weight, written out or fused."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=self.written)[0]


@pytest.mark.parametrize("f", POWERS)
@pytest.mark.parametrize("policy", ["paths", "published"])
def test_constant_queries_written_out_are_the_fused_ones(f: WeightMap, policy: str) -> None:
    torch.manual_seed(7)
    same_scores(Probed(False).double(), Probed(True).double(), f, policy)


def test_constant_queries_of_data_are_the_model() -> None:
    torch.manual_seed(8)
    for written in (False, True):
        is_the_model(Probed(written), torch.randn(3, TOKENS, WIDTH).double())


class Crossed(nn.Module):
    """Cross-attention by slices of one weight: queries of x, keys and values of y."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, bias=False, batch_first=True)
        self.together = together

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.together:
            return self.attention(x, y, y, need_weights=False)[0]
        weight, h = self.attention.in_proj_weight, 2
        q, k, v = x @ weight[:WIDTH].T, F.linear(y, weight[WIDTH:-WIDTH]), F.linear(y, weight.chunk(3)[2])
        q, k, v = (part.unflatten(-1, (h, -1)).transpose(1, 2) for part in (q, k, v))
        return self.attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("together", [True, False])
def test_slices_of_a_weight_are_scored_in_it(together: bool) -> None:
    torch.manual_seed(9)
    model, sources = Crossed(together).double(), [torch.rand(TOKENS, WIDTH).double() for _ in range(2)]
    network = PathNetwork.from_module(model, tuple(x[None] for x in sources))
    log2_total, scores, _ = scored(network, sources)
    apart = Block(WIDTH, 2).double()
    with torch.no_grad():
        for part, rows in zip("qkv", model.attention.in_proj_weight.chunk(3), strict=True):
            getattr(apart, part).weight.copy_(rows)
        apart.o.weight.copy_(model.attention.out_proj.weight)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = apart

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, k, v = (layer(z) for layer, z in ((apart.q, x), (apart.k, y), (apart.v, y)))
            q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
            return apart.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    wanted = scored(PathNetwork.from_module(Two(), tuple(x[None] for x in sources)), sources)
    assert log2_total == pytest.approx(wanted[0], abs=1e-12)
    rows = torch.cat([wanted[1][f"block.{part}.weight"] for part in "qkv"])
    torch.testing.assert_close(scores["attention.in_proj_weight"], rows, rtol=1e-12, atol=0)


def test_a_torch_decoder_layer_is_pruned() -> None:
    torch.manual_seed(10)
    model = nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True).eval()
    inputs = (torch.ones(1, TOKENS, WIDTH), torch.ones(1, 3, WIDTH))
    assert PathNetwork.support_report(model, inputs)
    masks = pp.prune(model, pp.SynFlow(rounds=3), density=0.4, example_input=inputs)
    assert set(masks) == {name for name, p in model.named_parameters() if p.dim() == 2}
    assert sum(int(m.sum()) for m in masks.values()) == round(0.4 * sum(m.numel() for m in masks.values()))


# ------------------------------------------------------------------------------------------------ parts, signs, gates


class Does(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.other, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, x))


def written_by_parts(m: Any, x: Tensor) -> Tensor:
    whole = x.new_empty(len(x), 6)
    whole[:, :2] = m.first(x)[:, 1:3]
    whole[:, 2:].copy_(m.other(x))
    return whole[:, 1:5]


def written_over(m: Any, x: Tensor) -> Tensor:
    whole = m.first(x).clone()
    whole[:, 0] = m.other(x)[:, 3]
    whole[:, 1] = torch.zeros_like(whole[:, 1]) + 0.25
    return whole


def scattered(m: Any, x: Tensor) -> Tensor:
    there = torch.tensor([[True, False, False, True]])
    return m.first(x).masked_scatter(there, m.other(x)[:, 1:3].contiguous())


JOINED: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "written by parts": (written_by_parts, lambda m, x: torch.cat([m.first(x)[:, 2:3], m.other(x)[:, :3]], 1)),
    "written over": (
        written_over,
        lambda m, x: torch.cat([m.other(x)[:, 3:], torch.full_like(x[:, :1], 0.25), m.first(x)[:, 2:]], 1),
    ),
    "scattered": (
        scattered,
        lambda m, x: torch.cat([m.other(x)[:, 1:2], m.first(x)[:, 1:3], m.other(x)[:, 2:3]], 1),
    ),
    "as another's type": (
        lambda m, x: m.first(x) * torch.full((1, 1), 0.5).type_as(x) + torch.ones(1, 4).expand_as(x),
        lambda m, x: m.first(x) * 0.5 + 1.0,
    ),
}


@pytest.mark.parametrize("policy", ["paths", "published"])
@pytest.mark.parametrize("case", JOINED)
def test_parts_that_are_written_are_parts_that_are_joined(case: str, policy: str) -> None:
    torch.manual_seed(11)
    one, other = (Does(function).double() for function in JOINED[case])
    other.load_state_dict(one.state_dict())
    x = torch.rand(1, 4).double()
    torch.testing.assert_close(one(x), other(x))
    first, second = (scored(PathNetwork.from_module(m, x), x[0], policy=policy) for m in (one, other))
    assert first[0] == pytest.approx(second[0], abs=1e-12)
    for name, score in second[1].items():
        torch.testing.assert_close(first[1][name], score, rtol=1e-12, atol=0)
    if case != "scattered":  # whose values are in an order of their own for every sample
        is_the_model(one, torch.randn(3, 4).double())


SIGNED = {
    "difference": lambda m, x: m.first(x) - m.other(x),
    "difference of a multiple": lambda m, x: torch.sub(m.first(x), m.other(x), alpha=3),
    "from a constant": lambda m, x: 1.5 - m.first(x),
    "less a constant": lambda m, x: torch.relu(m.first(x)) - torch.arange(4),
    "negated": lambda m, x: torch.relu(-m.first(x)),
    "rsub": lambda m, x: torch.rsub(m.first(x), m.other(x), alpha=2),
    "bounded": lambda m, x: m.first(x).clamp(-0.3, 0.2) * m.other(x).clamp(max=0.5),
    "gate of bounds": lambda m, x: (m.other(x).clamp(-1, 1) + 1) * F.silu(m.first(x).clamp(max=0.7)),
}


@pytest.mark.parametrize("case", SIGNED)
def test_signs_and_bounds_are_kept_by_signed_flow_alone(case: str) -> None:
    torch.manual_seed(12)
    model = Does(SIGNED[case])
    is_the_model(model, torch.randn(5, 4).double())
    log2_total, scores, flow = scored(PathNetwork.from_module(model, torch.ones(1, 4).double()), policy="published")
    assert entering(flow.network, flow) < 2**log2_total * (1 + 1e-12)
    assert all(bool((score >= 0).all()) for score in scores.values())


def test_bounds_that_move_zero_are_no_gates_of_data() -> None:
    x = torch.rand(2, 4).double()
    for function in (lambda m, x: m.first(x).clamp(0.1, 1.0), lambda m, x: F.hardtanh(m.first(x), 0.1, 1.0)):
        network = PathNetwork.from_module(Does(function).double(), x)
        with pytest.raises(ValueError, match="wanted activations through zero, got clamp"):
            record(network, Batch((x,), {}, None), {}, "test")


def test_weights_laid_out_anew_are_the_parameter() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv1d(3, 3, 2, groups=3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x, self.inner.weight.squeeze(1).to(x.dtype).unsqueeze(1), groups=3)

    model = Depthwise().double()
    _, scores, _ = scored(PathNetwork.from_module(model, torch.ones(1, 3, 4).double()))
    torch.testing.assert_close(scores["inner.weight"], model.inner.weight.detach().abs() * 3)


def test_parametrized_weights_say_what_to_do() -> None:
    with pytest.raises(UnsupportedModelError, match=r"not a parameter; torch\.nn\.utils\.parametrize\.remove_param"):
        PathNetwork.from_module(nn.Sequential(weight_norm(nn.Linear(4, 4))), torch.ones(1, 4))
