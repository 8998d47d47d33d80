"""Norms, attention and products as recorded gates: every path of a block by hand, the model itself, bad models."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from pathprune.batches import Batch
from pathprune.gates import GatedFlow
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from pathprune.policy import policy_of
from pathprune.recording import record
from pathprune.weights import weights_of
from test_attention import ACTIVATIONS, WRITTEN


def through_gates(model: nn.Module, x: Any, f: WeightMap, policy: str = "recorded", masks: Any = None) -> list[Tensor]:
    """The flow at every output, float64 [N, *shape]: f ONE of squared inputs, IDENTITY of inputs."""
    batch = Batch((), x, None) if isinstance(x, dict) else Batch(x if isinstance(x, tuple) else (x,), {}, None)
    network = PathNetwork.from_module(model, x)
    recording = record(network, batch, {}, "test")
    source = recording.inputs if f is WeightMap.IDENTITY else [a.square() for a in recording.inputs]
    weights = weights_of(network, (), (f, f), masks=masks)
    flow = GatedFlow(network, weights, recording, policy_of(policy, norm="recorded"), source=source, f=f)
    flow.forward()
    found = [flow.values[k] for k in network.outputs]
    return [torch.ldexp(a.tensor[0].double(), a.exponent).squeeze(1) for a in found]


def is_the_model(model: nn.Module, x: Any, within: float = 1e-12) -> None:
    """The gates are right if the flow that passes them, with the real weights, is the model."""
    model = model.double().eval()
    (found,) = through_gates(model, x, WeightMap.IDENTITY, "published")
    with torch.no_grad():
        wanted = model(*x) if isinstance(x, tuple) else model(x)
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=0, atol=within * float(wanted.abs().max()))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Block(nn.Module):
    """One head over normed tokens beside a skip, ReLUs, a head."""

    def __init__(self, width: int = 3, norm: str = "rms") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(width, eps=1e-3) if norm == "rms" else nn.LayerNorm(width, eps=1e-3)
        self.norm.weight.data.uniform_(-2, 2)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.head = nn.Linear(width, 2, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True))
        return self.head(torch.relu(x))


def paths_by_hand(model: Block, x: Tensor) -> list[tuple[int, int, float, float, float, list[tuple[str, int, int]]]]:
    """Every path of a sample: token and unit of its end, x_p, a_p, v_p, the weights on it."""
    matrix = {name: p.detach() for name, p in model.named_parameters()}
    w = {name: p.tolist() for name, p in matrix.items()}
    tokens, units = range(x.shape[0]), range(3)
    found = []
    scale = [1 / (sum(v * v for v in row) / 3 + 1e-3) ** 0.5 for row in x.tolist()]
    normed = [
        [v * s * g for v, g in zip(row, w["norm.weight"], strict=True)]
        for row, s in zip(x.tolist(), scale, strict=True)
    ]
    q, k, v = (torch.tensor(normed, dtype=torch.float64) @ matrix[f"{n}.weight"].T for n in "qkv")
    similar = (q @ k.T) / 3**0.5
    attends = similar.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf).softmax(-1)
    hidden = x + (attends @ v) @ matrix["o.weight"].T
    is_open = (hidden > 0).double().tolist()
    for i, e, c in itertools.product(tokens, units, range(2)):
        last = ("head.weight", c, e)
        found.append((i, c, float(x[i, e]), is_open[i][e], w["head.weight"][c][e], [last]))
        for j, a, d in itertools.product(tokens, units, units):
            value = w["norm.weight"][a] * w["v.weight"][d][a] * w["o.weight"][e][d] * w["head.weight"][c][e]
            gate = scale[j] * float(attends[i, j]) * is_open[i][e]
            found.append((i, c, float(x[j, a]), gate, value, [("v.weight", d, a), ("o.weight", e, d), last]))
    return found


def test_every_path_of_a_block_of_one_head_and_two_tokens() -> None:
    """``f = sum x_p a_p v_p`` is the model, and ``g = sum x_p^2 a_p^2`` what bounds it: ``f^2 <= g sum v_p^2``."""
    model, x = Block(), drawn(3, 2, 3, seed=1)
    signed, data = (through_gates(model, x, f)[0] for f in (WeightMap.IDENTITY, WeightMap.ONE))
    torch.testing.assert_close(signed, model(x).detach(), rtol=1e-12, atol=1e-14)
    for n, sample in enumerate(x):
        f, g, h = (torch.zeros(2, 2, dtype=torch.float64) for _ in range(3))
        for i, c, begin, gate, value, _ in paths_by_hand(model, sample):
            f[i, c] += begin * gate * value
            g[i, c] += begin**2 * gate**2
            h[i, c] += value**2
        torch.testing.assert_close(signed[n], f, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(data[n], g, rtol=1e-11, atol=0)
        assert bool((f.square() <= g * h).all())


def test_pruned_paths_and_pairs_of_samples() -> None:
    """Masked weights close their paths; of two samples' gates the product counts."""
    model, x = Block(), drawn(3, 2, 3, seed=2)
    masks = {"v.weight": torch.ones(3, 3, dtype=torch.bool), "head.weight": torch.ones(2, 3, dtype=torch.bool)}
    masks["v.weight"][0, 1] = masks["head.weight"][1, 2] = False
    masked = Block()
    masked.load_state_dict({n: p * masks.get(n, torch.tensor(True)) for n, p in model.state_dict().items()})
    every = [paths_by_hand(masked, sample) for sample in x]
    expected = torch.zeros(3, 3, 2, 2, dtype=torch.float64)
    for (n, first), (m, second) in itertools.product(enumerate(every), enumerate(every)):
        for (i, c, a, s, _, weights), (_, _, b, t, _, _) in zip(first, second, strict=True):
            if all(masks[name][r, k] for name, r, k in weights if name in masks):
                expected[n, m, i, c] += a * b * s * t
    found = pp.path_activations(model, x, masks, full=True)
    torch.testing.assert_close(found, expected.flatten(2), rtol=1e-10, atol=1e-12)
    diagonal = pp.path_activations(model, x, masks).exp2()
    torch.testing.assert_close(diagonal, torch.einsum("nnk->nk", found), rtol=1e-10, atol=0)


def kernel_by_hand(model: Block, x: Tensor, names: tuple[str, ...]) -> Tensor:
    """The derivative of every path's value, at its gates: [n, outputs, weights]."""
    rows = []
    for sample in x:
        slopes = {name: torch.zeros(2, 2, *model.get_parameter(name).shape).double() for name in names}
        for i, c, begin, gate, value, weights in paths_by_hand(model, sample):
            for name, r, k in weights:
                slopes[name][i, c, r, k] += begin * gate * value / float(model.get_parameter(name).detach()[r, k])
        rows.append(torch.cat([slopes[name].flatten(2) for name in names], 2).flatten(0, 1))
    return torch.stack(rows)


def test_kernel_with_gates_held_and_its_bound() -> None:
    model, x = Block(), drawn(3, 2, 3, seed=3)
    network = PathNetwork.from_module(model, x)
    assert set(network.prunable) == {f"{n}.weight" for n in ("q", "k", "v", "o", "head")}
    jacobian = kernel_by_hand(model, x, network.prunable)  # nothing by queries and keys
    theta = torch.einsum("nki,mli->nkml", jacobian, jacobian)
    torch.testing.assert_close(pp.ntk(model, x, hold_gates=True), theta, rtol=1e-10, atol=1e-12)
    trace = pp.ntk_trace(model, [x[:2], x[2:]], hold_gates=True)
    assert trace == pytest.approx(float(jacobian.square().sum()), rel=1e-11)
    total = 0.0
    for sample in x:
        data, kernel = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
        for i, c, begin, gate, value, weights in paths_by_hand(model, sample):
            data[i, c] += begin**2 * gate**2
            for name, r, k in weights:
                kernel[i, c] += value**2 / float(model.get_parameter(name).detach()[r, k]) ** 2
        total += float((data * kernel).sum())
    allowed = 2.0 ** pp.ntk_trace_bound(model, [x[:2], x[2:]], hold_gates=True)
    assert trace <= allowed
    assert total <= allowed * (1 + 1e-9)  # which takes keys ahead for open: their paths have gates of zero


# ------------------------------------------------------------------------------------- signed flow is the model


class Between(nn.Module):
    """Something between two linear layers with biases."""

    def __init__(self, inner: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.last, self.inner = nn.Linear(5, width), nn.Linear(width, 2), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


NORMS = {
    "layer": (nn.LayerNorm(6), (4, 5)),
    "layer over two axes": (nn.LayerNorm((4, 6), bias=False), (4, 5)),
    "rms": (nn.RMSNorm(6), (4, 5)),
    "rms without scale": (nn.RMSNorm((4, 6), elementwise_affine=False), (4, 5)),
    "group": (nn.GroupNorm(2, 4), (4, 3, 5)),
    "instance": (nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "twice": (nn.Sequential(nn.LayerNorm(6), nn.ReLU(), nn.GroupNorm(2, 4)), (4, 5)),
}


@pytest.mark.parametrize("name", NORMS)
def test_fused_norms(name: str) -> None:
    norm, shape = NORMS[name]
    for p in norm.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    is_the_model(Between(norm), drawn(3, *shape))


@pytest.mark.parametrize("form", WRITTEN)
def test_norms_written_out(form: str) -> None:
    is_the_model(Between(WRITTEN[form]), drawn(3, 4, 5), 1e-6 if "float32" in form else 1e-12)


def test_the_factors_of_a_norm_count_once() -> None:
    """What is recorded is less than what the scale behind multiplies with, of either sign; in g scales are 1."""
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda x: x * (torch.rsqrt(x.square().sum(-1, keepdim=True)) * -3.0),
        lambda x: x / (0.25 * x.norm(dim=-1, keepdim=True)),
        lambda x: x * (torch.rsqrt(x.square().mean(-1, keepdim=True)) * torch.tensor([1.0, 0, -2, 1, 3, 0.5])),
    ]
    for form in forms:
        is_the_model(Between(form), drawn(3, 5))
    model, x = Between(forms[1]).double(), drawn(3, 5)
    h = model.first(x)
    opened = x.square().sum(1, keepdim=True) * 6 * h.square().mean(1, keepdim=True).reciprocal()
    torch.testing.assert_close(through_gates(model, x, WeightMap.ONE)[0], opened.detach().expand(3, 2))


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_activations_written_out(form: str) -> None:
    is_the_model(Between(ACTIVATIONS[form]), drawn(3, 4, 5))


def test_activations_written_out_in_any_order() -> None:
    is_the_model(Between(lambda x: torch.sigmoid(x) * (2 * x)), drawn(3, 5))
    is_the_model(Between(lambda x: torch.relu(x).square() + F.gelu(x.square())), drawn(3, 5))
    is_the_model(Between(lambda x: F.silu(x.relu_())), drawn(3, 5))


class Pair(Between):
    """A product of what two linear layers give."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(nn.Identity())
        self.other, self.product = nn.Linear(5, 6), product

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.product(self.first(x), self.other(x)))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bilinear": torch.mul,
    "in place": lambda a, b: a.mul_(b),
    "gated by SiLU": lambda a, b: F.silu(a) * b,
    "gated by ReLU": lambda a, b: b * torch.relu(a),
    "gated by a sigmoid": lambda a, b: a * b.sigmoid(),
    "gated by a shifted sigmoid": lambda a, b: (2 * b.sigmoid() - 0.3) * a,
    "gated by halves": lambda a, b: F.glu(torch.cat([a, b], -1)),
    "gated by a softmax": lambda a, b: torch.softmax(a, -1) * b,
    "squeezed": lambda a, b: a * F.softplus(b.mean(1, keepdim=True)),
    "gated by normed": lambda a, b: F.layer_norm(a, (6,)) * b,
    "linear attention": lambda a, b: torch.relu(a) @ (torch.relu(b).mT @ b),
    "einsum": lambda a, b: torch.einsum("nid,nie->nde", a, b),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_two_flows(name: str) -> None:
    is_the_model(Pair(PRODUCTS[name]), drawn(3, 4, 5))


def test_a_product_counts_half_of_each_factor_squared() -> None:
    model, x = Pair(torch.mul).double(), drawn(3, 5)
    halves = (model.first(x).square() + model.other(x).square()).sum(1, keepdim=True) / 4
    expected = (x.square().sum(1, keepdim=True) * halves).detach().expand(3, 2)
    torch.testing.assert_close(through_gates(model, x, WeightMap.ONE)[0], expected)


def test_a_sigmoid_counts_squared_and_what_enters_it_nothing() -> None:
    model, x = Pair(PRODUCTS["gated by halves"]).double(), drawn(3, 5)
    gates = torch.sigmoid(model.other(x)).square().sum(1, keepdim=True)
    expected = (x.square().sum(1, keepdim=True) * gates).detach().expand(3, 2)
    torch.testing.assert_close(through_gates(model, x, WeightMap.ONE)[0], expected)
    passed = pp.ntk(model, x, hold_gates=True)
    gate = torch.sigmoid(model.other(x)).detach()
    leaves = [model.first.weight, model.last.weight]  # nothing by the gate's own
    outs = model.last(model.first(x) * gate)
    jacobian = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, leaves, retain_graph=True)]) for out in outs.flatten()
    ]
    rows = torch.stack(jacobian).unflatten(0, (3, 2))
    torch.testing.assert_close(passed, torch.einsum("nki,mli->nkml", rows, rows), rtol=1e-10, atol=1e-12)


def test_bicubic_entries_keep_their_signs() -> None:
    """Of which paths have the absolute values, and their squares."""
    model = Between(lambda x: F.interpolate(x.unflatten(-1, (3, 2)), size=(4, 3), mode="bicubic").flatten(2), width=6)
    model.last = nn.Linear(12, 2)
    is_the_model(model, drawn(3, 4, 5))


class Attention(nn.Module):
    """Four query heads over six tokens, attention in several forms."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor], key_heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.form, self.key_heads = form, key_heads
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)
        self.k, self.v = nn.Linear(8, 2 * key_heads), nn.Linear(8, 2 * key_heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(self.form(q, k, v).transpose(1, 2).flatten(2))


SOFT = drawn(6, 6, seed=8)
BARRED = SOFT < 1
BARRED[2] = False  # a token that may attend to none
PLACES, NEAR = drawn(4, 3, 2, seed=9), torch.tensor([[min(max(j - i, -1), 1) + 1 for j in range(6)] for i in range(6)])
fused = F.scaled_dot_product_attention


def placed(q: Tensor, k: Tensor) -> Tensor:
    """What tokens have in common with each other, and with how far they are apart, by both."""
    near = NEAR.expand(len(q), 4, 6, 6)
    ahead = torch.gather(q @ PLACES.mT, -1, near)
    return q @ k.mT + ahead + torch.gather(k @ PLACES.mT, -1, near).mT / 2


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(-1, 4, 6, 6).softmax(-1)
    return torch.bmm(weights.view(-1, 6, 6), v.flatten(0, 1)).view(-1, 4, 6, 2)


ATTENTIONS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "fused": (fused, 4),
    "causal": (lambda q, k, v: fused(q, k, v, is_causal=True), 4),
    "soft mask": (lambda q, k, v: fused(q, k, v, attn_mask=SOFT), 4),
    "mask": (lambda q, k, v: fused(q, k, v, attn_mask=BARRED), 4),
    "scaled": (lambda q, k, v: fused(q, k, v, scale=3.0), 4),
    "grouped": (lambda q, k, v: fused(q, k, v, enable_gqa=True), 2),
    "one key head": (lambda q, k, v: fused(q, k, v, is_causal=True, enable_gqa=True), 1),
    "written": (lambda q, k, v: (q @ k.mT / 2 + SOFT).softmax(-1) @ v, 4),
    "written, masked": (lambda q, k, v: (q @ k.mT).masked_fill(SOFT > 1, -torch.inf).softmax(-1) @ v, 4),
    "einsum": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
        4,
    ),
    "turned": (lambda q, k, v: (v.mT @ (k @ q.mT).softmax(-2)).mT, 4),
    "batched": (batched, 4),
    "with positions": (lambda q, k, v: placed(q, k).softmax(-1) @ v, 4),
    "rolled out": (lambda q, k, v: (q @ k.mT).softmax(-1) @ (k @ q.mT).softmax(-1) @ v, 4),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str) -> None:
    is_the_model(Attention(*ATTENTIONS[name]), drawn(3, 6, 8))


def test_similarities_with_positions_have_no_path() -> None:
    """They are zero where queries and keys are: uniform attention, of which these have their share."""
    found = [
        pp.scores(Attention(form).double(), pp.SynFlow(policy="paths"), example_input=torch.ones(1, 6, 8).double())
        for form in (ATTENTIONS["with positions"][0], fused)
    ]
    assert found[0].log2_R == pytest.approx(found[1].log2_R, abs=1e-12)
    for name in ("q.weight", "k.weight", "v.weight", "o.weight"):
        first, second = (each.double(name) for each in found)
        assert float(first.min()) > 0
        torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_attention_weights_count_squared_and_queries_nothing() -> None:
    """With ones for weights, g of a token is the sum over those it attends to of P^2 times their inputs' squares."""
    model, x = Attention(fused).double(), drawn(2, 6, 8)
    q, k = (part(x).unflatten(-1, (4, 2)).transpose(1, 2) for part in (model.q, model.k))
    attends = (q @ k.mT * 2**-0.5).softmax(-1).detach().square()  # [2, 4, 6, 6]
    expected = 2 * torch.einsum("nhij,nj->ni", attends, x.square().sum(2))
    (found,) = through_gates(model, x, WeightMap.ONE)
    torch.testing.assert_close(found, expected[..., None].expand(2, 6, 8))


def test_embeddings_are_where_paths_begin() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(6)
            self.words, self.places = nn.Embedding(7, 4), nn.Embedding(3, 4)
            self.layer = nn.Linear(4, 2)

        def forward(self, words: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.words(words) * 2 + self.places(torch.arange(3))))

    model, words = Words(), torch.tensor([[1, 2, 6], [0, 0, 5]])
    is_the_model(model, words)
    h = 2 * model.words(words) + model.places.weight
    gates = torch.tanh(h) / h
    expected = (model.words(words) * gates).square().sum(-1, keepdim=True).expand(2, 3, 2)
    torch.testing.assert_close(through_gates(model, words, WeightMap.ONE)[0], expected.detach())
    assert pp.ntk(model, words, hold_gates=True).shape == (2, 6, 2, 6)


def test_centring_is_no_activation_and_no_part_of_path_flow() -> None:
    torch.manual_seed(7)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)), torch.ones(1, 5)
    pp.edge_of_chaos_init_(model, example_input=x)  # which finds one activation
    found = pp.scores(model, pp.SynFlow(policy="paths"), example_input=x)
    h = model[0].weight.detach().double().abs().sum(1)
    total = (h / h.square().mean().sqrt() @ model[3].weight.detach().double().abs().T).sum()
    assert 2**found.log2_R == pytest.approx(float(total), rel=1e-5)
    model, x = model.double(), drawn(3, 5)
    h = model[0](x)
    gates = (
        h.var(1, correction=0, keepdim=True).add(1e-5).reciprocal() * (torch.tanh(model[1](h)) / model[1](h)).square()
    )
    expected = (x.square().sum(1, keepdim=True) * gates.sum(1, keepdim=True)).detach().expand(3, 2)
    torch.testing.assert_close(through_gates(model, x, WeightMap.ONE)[0], expected)


# -------------------------------------------------------------------------------------------------- bad models


def refuses(model: nn.Module, x: Tensor, match: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        pp.prune(model, pp.PX([x], rounds=1), density=0.5, example_input=x[:1], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_without_gates_are_refused_by_name() -> None:
    x = torch.randn(3, 4, 5)
    refuses(Between(torch.sigmoid), x, r"PX: model: wanted activations through zero, got sigmoid in .*sigmoid")
    refuses(Pair(lambda a, b: a + b.sigmoid()), x, r"wanted activations through zero, got sigmoid in .*sigmoid")
    refuses(Between(lambda x: x.softmax(-1)), x, "activations through zero, got softmax")
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    refuses(Between(norm), x, r"PX: model: wanted norms of each sample by itself, got .*\(batch_norm\) of a batch")
    heads = nn.Linear(6, 6)
    talking = Attention(lambda q, k, v: heads((q @ k.mT).softmax(-1)) @ v)
    talking.heads = heads
    refuses(talking, torch.randn(2, 6, 8), r"attention weights that multiply values and no more, got .*linear")


def test_methods_that_see_no_data_refuse_recorded_norms() -> None:
    model, x = Between(nn.LayerNorm(6)), torch.ones(1, 5)
    for pruner in (pp.SynFlow(rounds=1, policy="recorded"), pp.TraceSaliency(policy=pp.Policy(norm="recorded"))):
        with pytest.raises(ValueError, match="norm: wanted 'flow' or 'unit' for a method that sees no data"):
            pp.prune(model, pruner, density=0.5, example_input=x, progress=False)
    with pytest.raises(ValueError, match="sees no data"):
        pp.PathKernel(model, x, policy="recorded").trace()
    with pytest.raises(ValueError, match="norm: wanted one of"):
        pp.Policy(norm="real")


def test_kernels_are_refused_where_gates_are_smooth() -> None:
    for inner, name in ((nn.GELU(), "gelu"), (nn.ReLU6(), "hardtanh"), (nn.RMSNorm(6), "rms_norm")):
        model, x = Between(inner), torch.randn(2, 5)
        for kernel in (pp.ntk, pp.ntk_trace, pp.ntk_trace_bound):
            with pytest.raises(
                ValueError, match=rf"{kernel.__name__}: .* move by steps .* got .*\({name}\); hold_gates"
            ):
                kernel(model, x if kernel is pp.ntk else [x])
    with pytest.raises(ValueError, match=r"ntk_trace_bound: model: wanted norms that do not centre, got .*layer_norm"):
        pp.ntk_trace_bound(Between(nn.LayerNorm(6)), [x], hold_gates=True)


class _Scaled(nn.Module):
    """A layer whose output a mask, if there is one, a number and a switch change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, doubled: bool = False) -> Tensor:
        out = self.layer(x).relu() * scale
        out = out if mask is None else out * mask
        return 2 * out if doubled else out


def test_inputs_that_are_no_tensors_are_those_of_the_example() -> None:
    x = torch.randn(3, 5)
    first, model = x[:1], _Scaled()
    plain = pp.prune(model, pp.PX([x], rounds=2), density=0.5, example_input=first)
    for example, data in (
        ((first, None), (x, None)),
        ({"x": first, "mask": None, "scale": 2.0}, {"x": x, "mask": None, "scale": 2.0}),
        ({"x": first, "doubled": True}, {"x": x, "doubled": True, "labels": None}),
    ):
        batch = (data, None) if isinstance(data, tuple) else data
        assert pp.prune(model, pp.PX([batch], rounds=2), density=0.5, example_input=example) == plain
    example = {"x": first, "mask": None, "scale": 2.0}
    for data, says in (
        ({"x": x, "mask": torch.ones(3, 4), "scale": 2.0}, "wanted None where example_input has it, got a Tensor"),
        ({"x": x, "mask": None, "scale": 3.0}, "wanted 2.0 where example_input has it, got 3.0"),
        ({"x": None, "mask": None, "scale": 2.0}, "wanted at least one sample in batch 0, got none"),
        ({"x": x}, r"wanted the arguments \['mask', 'scale', 'x'\], as example_input has them, got \['x'\]"),
    ):
        with pytest.raises(ValueError, match=f"PX: data: {says}"):
            pp.prune(model, pp.PX([data], rounds=1), density=0.5, example_input=example)
