"""Paths through attention: against every path of a block counted by hand, and float64 autograd of the rules."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from path_scores import scores_through
from pathprune import nodes as kinds
from pathprune.distributed import ALONE
from pathprune.flow import PathFlow
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from pathprune.policy import SHARES, policy_of
from pathprune.sharded_weight import ShardedWeight
from pathprune.weights import weights_of


def scored(
    network: PathNetwork, source: Tensor | None = None, f: WeightMap = WeightMap.ABS, policy: str = "paths", **choices
) -> tuple[float, dict[str, Tensor], PathFlow]:
    """log2 R, the scores ``f(w) dR/df(w)`` in float64, and the flow."""
    weights = weights_of(network, network.prunable, (f, f))
    flow = PathFlow(network, weights, f=f, policy=policy_of(policy, **choices), source=source)
    flow.keep_flows = True
    log2_total, scores = scores_through(flow)
    return float(log2_total), scores, flow


def entering(network: PathNetwork, flow: PathFlow) -> float:
    """The flow that enters at the inputs and constants."""
    total = 0.0
    for k, node in enumerate(network.nodes):
        if k in flow.backward_flows and isinstance(node, (kinds.Input, kinds.Constant)):
            a, g = flow.values[k], flow.backward_flows[k]
            total += float((a.tensor.double() * g.tensor.double()).sum() * 2.0 ** float(a.exponent + g.exponent))
    return total


class Block(nn.Module):
    """One attention block, its similarities fused or written out."""

    def __init__(self, width: int = 3, heads: int = 1, form: str = "fused", causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.heads, self.form, self.causal = heads, form, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if self.form == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        elif self.form == "masked":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=~ahead if self.causal else None)
        else:
            similar = q @ k.mT if self.form == "matmul" else torch.einsum("bhid,bhjd->bhij", q, k)
            similar = similar / 3.0
            if self.causal:
                similar = similar.masked_fill(ahead, float("-inf"))
            weights = torch.dropout(similar.softmax(-1), 0.1, self.training)
            y = weights @ v if self.form == "matmul" else torch.einsum("bhij,bhjd->bhid", weights, v)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("attention", ["half", "budget", "values"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_path_of_a_block_of_one_head_and_two_tokens(attention: str, causal: bool) -> None:
    """A path through v carries its part of the value; one through q or k its part of the similarity, of the rest."""
    torch.manual_seed(0)
    model = Block(causal=causal).double()
    source = torch.rand(2, 3, dtype=torch.float64)
    _, scores, flow = scored(PathNetwork.from_module(model, torch.ones(1, 2, 3).double()), source, attention=attention)

    wq, wk, wv, wo = (layer.weight.detach().abs().tolist() for layer in (model.q, model.k, model.v, model.o))
    x = source.tolist()
    tokens, units = range(2), range(3)
    attends = [[1.0, 0.0] if causal and i == 0 else [0.5, 0.5] for i in tokens]
    to_pairs = SHARES[attention]
    expected = {name: torch.zeros(3, 3, dtype=torch.float64) for name in "qkvo"}
    total = 0.0
    for i, j in itertools.product(tokens, tokens):
        pairs = {  # every product of a path to q_i and one to k_j, in the same unit
            (d, a, b): x[i][a] * wq[d][a] * x[j][b] * wk[d][b] for d, a, b in itertools.product(units, units, units)
        }
        similar = sum(pairs.values())
        for a, d, o in itertools.product(units, units, units):  # x_j[a] -> v_j[d] -> y_i[d] -> out_i[o]
            value = x[j][a] * wv[d][a] * attends[i][j] * wo[o][d]
            total += value
            expected["o"][o, d] += value
            expected["v"][d, a] += value * (1 - to_pairs)
            for (unit, from_q, from_k), pair in pairs.items():
                expected["q"][unit, from_q] += value * to_pairs / 2 * pair / similar
                expected["k"][unit, from_k] += value * to_pairs / 2 * pair / similar
    for name in "qkvo":
        torch.testing.assert_close(scores[f"{name}.weight"], expected[name], rtol=1e-12, atol=0)
    assert entering_matches(total, flow)
    parts = {name: float(expected[name].sum()) / total for name in "qkv"}
    wanted = {"half": (0.25, 0.25, 0.5), "budget": (1 / 3, 1 / 3, 1 / 3), "values": (0, 0, 1)}[attention]
    assert tuple(parts.values()) == pytest.approx(wanted)


def entering_matches(total: float, flow: PathFlow) -> bool:
    return entering(flow.network, flow) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("form", ["masked", "matmul", "einsum"])
@pytest.mark.parametrize("causal", [False, True])
def test_written_out_attention_is_the_fused_one(form: str, causal: bool) -> None:
    torch.manual_seed(1)
    fused, other = Block(8, 2, "fused", causal).double(), Block(8, 2, form, causal).double()
    other.load_state_dict(fused.state_dict())
    x = torch.ones(1, 5, 8, dtype=torch.float64)
    source = torch.rand(5, 8, dtype=torch.float64)
    first = scored(PathNetwork.from_module(fused, x), source)
    second = scored(PathNetwork.from_module(other, x), source)
    assert first[0] == pytest.approx(second[0], abs=1e-12)
    for name, score in first[1].items():
        torch.testing.assert_close(second[1][name], score, rtol=1e-12, atol=0)


def test_position_biases_and_soft_masks_shape_what_is_attended() -> None:
    """Data-free weights are the softmax of all that is added to the similarities."""

    class Biased(Block):
        def __init__(self) -> None:
            super().__init__(4)
            self.table = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            barred = torch.zeros(3, 3).index_fill(1, torch.tensor([2]), -100.0)
            similar = (self.q(x) @ self.k(x).mT + self.table).view(1, 3, 3) + barred
            return similar.view(-1, 3, 3).softmax(-1) @ self.v(x)

    torch.manual_seed(2)
    model = Biased()
    network = PathNetwork.from_module(model, torch.ones(1, 3, 4))
    weights = next(k for k, node in enumerate(network.nodes) if isinstance(node, kinds.Softmax))
    _, _, flow = scored(network)
    added = model.table + torch.tensor([0.0, 0.0, -100.0])
    torch.testing.assert_close(flow.values[weights].tensor[0], added.softmax(-1).detach())
    assert bool((flow.values[weights].tensor[0, :, 2] == 0).all())
    squared = scored(network, f=WeightMap.SQUARE)[2]
    torch.testing.assert_close(squared.values[weights].tensor[0], added.softmax(-1).detach().square())
    counted = scored(network, f=WeightMap.ONE)[2]
    assert counted.values[weights].tensor[0].tolist() == [[1, 1, 0]] * 3


def test_a_row_that_may_attend_to_nothing_carries_nothing() -> None:
    class Masked(Block):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.tensor([[True, True], [False, False]])
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=mask)

    network = PathNetwork.from_module(Masked(), torch.ones(1, 2, 3))
    log2_total, scores, flow = scored(network)
    assert torch.tensor([log2_total]).isfinite().all()
    assert bool((flow.values[network.outputs[0]].tensor[0, 1] == 0).all())
    assert all(bool(score.isfinite().all()) for score in scores.values())


def test_dead_queries_leave_their_share_to_the_values() -> None:
    torch.manual_seed(3)
    model = Block(4).double()
    with torch.no_grad():
        model.q.weight.zero_()
    network = PathNetwork.from_module(model, torch.ones(1, 3, 4).double())
    log2_total, scores, flow = scored(network)
    assert float(scores["q.weight"].sum()) == float(scores["k.weight"].sum()) == 0
    assert float(scores["v.weight"].sum()) == pytest.approx(2**log2_total)
    assert entering_matches(2**log2_total, flow)


def test_products_of_flows_by_a_matrix_product_share_equally() -> None:
    class Similarity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x, y = F.normalize(self.left(x), dim=-1), self.right(y)
            return 7.0 * x @ (y / y.norm(dim=-1, keepdim=True)).T

    torch.manual_seed(4)
    model = Similarity().double()
    x, y = torch.rand(1, 3).double(), torch.rand(1, 3).double()
    log2_total, scores, _ = scored(PathNetwork.from_module(model, (x, y)), [x[0], y[0]])
    a, b = x @ model.left.weight.abs().T, y @ model.right.weight.abs().T
    total = 7 * float((a / a.norm()) @ (b / b.norm()).T)
    assert 2**log2_total == pytest.approx(total, rel=1e-12)
    assert [float(s.sum()) for s in scores.values()] == pytest.approx([total / 2] * 2)


# ---------------------------------------------------------------------------------------------- norms written out


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


WRITTEN = {
    "rsqrt of a mean": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "root of a mean": lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
    "variance, centred": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6) ** 0.5,
    "standard deviation": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6),
    "in float32": lambda x: x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True)).to(x.dtype),
    "norm over root of n": lambda x: x / (x.norm(dim=-1, keepdim=True) * 6**-0.5).clamp(min=1e-6),
    "reciprocal": lambda x: x * x.pow(2).mean(-1, keepdim=True).sqrt().reciprocal(),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_norms_written_out_divide_by_the_rms_of_the_flow(form: str) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6, bias=False), nn.Linear(6, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(WRITTEN[form](self.first(x)))

    torch.manual_seed(5)
    model = Normed()
    log2_total, scores, _ = scored(PathNetwork.from_module(model, torch.ones(1, 5)))
    first, last = (w.detach().double().abs().requires_grad_() for w in (model.first.weight, model.last.weight))
    hidden = torch.ones(1, 5).double() @ first.T
    total = (hidden / rms(hidden).detach() @ last.T).sum()
    total.backward()
    assert 2**log2_total == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(scores["first.weight"], (first * first.grad).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(scores["last.weight"], (last * last.grad).detach(), rtol=1e-5, atol=0)


ACTIVATIONS = {
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0)))),
    "squared relu": lambda x: torch.relu(x).pow(2),
    "swish": lambda x: x * x.sigmoid(),
}


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_activations_written_out_pass_the_flow_as_it_is(form: str) -> None:
    class Activated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6, bias=False), nn.Linear(6, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(ACTIVATIONS[form](self.first(x)))

    model = Activated()
    log2_total, _, _ = scored(PathNetwork.from_module(model, torch.ones(1, 5)))
    total = (model.first.weight.abs().sum(1) @ model.last.weight.abs().T).sum()
    assert 2**log2_total == pytest.approx(float(total), rel=1e-5)


def test_a_gate_made_of_other_weights_is_a_product_of_flows() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.value(x) * self.gate(x).sigmoid()

    _, scores, _ = scored(PathNetwork.from_module(Gated(), torch.ones(1, 4)))
    assert float(scores["value.weight"].sum()) == pytest.approx(float(scores["gate.weight"].sum()))


# ------------------------------------------------------------------------------------------------- prune, report


@pytest.mark.parametrize("pruner", [pp.SynFlow(rounds=5), pp.SynFlowL2(rounds=5), pp.Magnitude()])
def test_a_torch_encoder_is_pruned_and_reported(pruner: pp.Pruner) -> None:
    torch.manual_seed(6)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)).eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    masks = pp.prune(model, pruner, density=0.3, example_input=torch.ones(1, 4, 8))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.3 * total)
    assert "0.self_attn" in str(masks.report()) or "in_proj" in str(masks.report())


class Routed(nn.Module):
    """Two experts, of which data chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(3, 2), nn.Parameter(torch.rand(2, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).topk(1)
        rows = x.repeat_interleave(chosen.shape[1], 0)
        made = torch.bmm(self.experts[chosen.reshape(-1)], rows.unsqueeze(-1)).squeeze(-1) * share.reshape(-1, 1)
        return made.view(len(x), -1, 4).sum(1)


def test_every_expert_is_scored_with_equal_weight_and_the_router_is_not() -> None:
    model = Routed().double()
    network = PathNetwork.from_module(model, torch.ones(1, 3).double())
    assert network.prunable == ("experts",)
    log2_total, scores, _ = scored(network)
    torch.testing.assert_close(scores["experts"], model.experts.detach() / 2)
    assert 2**log2_total == pytest.approx(float(model.experts.sum()) / 2)


def test_experts_on_several_ranks_are_refused() -> None:
    synapse = kinds.Synapse((0,), torch.Size((1, 2, 1, 4)), weight="experts", form="experts", groups=2)
    with pytest.raises(ValueError, match="'experts': wanted experts' weights whole, got rows on several ranks"):
        ShardedWeight(ALONE, "experts", torch.rand(2, 4, 3), synapse, f=WeightMap.ABS, s=WeightMap.ABS)
