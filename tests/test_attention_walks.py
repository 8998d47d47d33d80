"""Walks through attention and experts: by the values, never by what is asked; every expert by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pathprune as pp
from pathprune.liveness import reach
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from pathprune.walk_graph import walk_graph
from pathprune.weights import weights_of
from test_attention import Block
from test_transformers import MODELS, tiny


def test_walks_take_values_and_outputs_and_the_rest_is_drawn() -> None:
    torch.manual_seed(0)
    model = Block(32, 4)
    x = torch.ones(1, 3, 32)
    large, small = pp.prune(model, pp.PHEW(), density=[0.4, 0.1], example_input=x, seed=3)
    again = pp.prune(model, pp.PHEW(), density=0.1, example_input=x, seed=3)
    for masks, density in ((large, 0.4), (small, 0.1)):
        assert sum(int(mask.sum()) for mask in masks.values()) == round(density * 4096)
        assert abs(int(masks["q.weight"].sum()) - density * 1024) <= 32  # what the last walk is over the target
        assert int(masks["q.weight"].sum()) - int(masks["k.weight"].sum()) in (0, 1, -1)
        network = PathNetwork.from_module(model, x)
        weights = weights_of(network, (), (WeightMap.ONE, WeightMap.ONE), masks=dict(masks))
        walked = reach(network, weights, attention="values")
        for name in ("v.weight", "o.weight"):
            assert walked.layers[name].live == int(masks[name].sum())  # every walked weight lies on a path
        assert walked.layers["q.weight"].live == walked.layers["k.weight"].live == 0
    for name, mask in small.items():
        assert torch.equal(mask, again[name])
        assert bool((mask <= large[name]).all())
    asked = model.q.weight.detach().abs()
    assert float(asked[small["q.weight"]].mean()) > 1.15 * float(asked[~small["q.weight"]].mean())


def test_queries_are_drawn_in_proportion_to_their_magnitude() -> None:
    """Of one weight kept of two, the one three times as large is kept three times out of four."""
    model = Block(1, 1)
    model.q.weight = torch.nn.Parameter(torch.tensor([[3.0], [1.0]]).reshape(2, 1))
    for name in "kv":
        setattr(model, name, torch.nn.Linear(1, 2, bias=False))
    model.o = torch.nn.Linear(2, 1, bias=False)
    network = PathNetwork.from_module(model, torch.ones(1, 2, 1))
    first = 0
    for seed in range(80):
        masks = pp.prune(network, pp.PHEW(trim=True), density=0.5, example_input=torch.ones(1, 2, 1), seed=seed)
        assert int(masks["q.weight"].sum()) == 1
        first += int(masks["q.weight"][0])
    assert 48 <= first <= 72  # 60 +- 3 standard deviations


def ahead(network: PathNetwork, source: str, target: str) -> list[set[int]]:
    """The entering units of ``target`` that each leaving unit of ``source`` reaches past no other synapse."""
    graph = walk_graph(network)
    start = next(k for k, site in graph.sites.items() if site.weight == source)
    end = next(k for k, site in graph.sites.items() if site.weight == target)

    def follow(k: int, units: set[int]) -> set[int]:
        found: set[int] = set()
        for edge in graph.ahead[k]:
            there = {int(t) for u in units for t in edge.ahead.targets[edge.ahead.start[u] : edge.ahead.start[u + 1]]}
            if edge.target == end:
                found |= there
            elif edge.target not in graph.sites:
                found |= follow(edge.target, there)
        return found

    return [follow(start, {unit}) for unit in range(graph.units[start])]


def test_a_value_head_feeds_the_query_heads_that_share_it() -> None:
    network = PathNetwork.from_module(*tiny("Llama"))
    found = ahead(network, "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight")
    assert found == [{16 * 0 + 8 * (u // 4) + u % 4, 8 * (u // 4) + 4 + u % 4} for u in range(8)]


def test_experts_are_walked_each_by_itself() -> None:
    network = PathNetwork.from_module(*tiny("Mixtral"))
    gates, down = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    found = ahead(network, gates, down)  # 4 experts of 64 units, gate and up, for 32 that enter
    assert found == [{32 * (u // 64) + u % 32} for u in range(256)]


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_walked(name: str) -> None:
    model, inputs = tiny(name)
    masks = pp.prune(model, pp.PHEW(), density=0.2, example_input=inputs, seed=1)
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert 0 <= kept - round(0.2 * total) <= 40  # at most one path over
    assert all(bool(mask.any()) for mask in masks.values())
    report = masks.report()
    assert report.effective_density > 0.18


def test_paths_drawn_as_a_whole_refuse_products_of_flows() -> None:
    with pytest.raises(ValueError, match="multiplies two flows: its paths have no probabilities"):
        pp.prune(Block(), pp.PHEW(bias="flow"), density=0.5, example_input=torch.ones(1, 2, 3))


def test_negative_inputs_do_not_matter() -> None:
    """Data-free: whatever the example holds."""
    model = Block(8, 2)
    masks: list[dict[str, Tensor]] = [
        dict(pp.prune(model, pp.PHEW(), density=0.2, example_input=x, seed=1))
        for x in (torch.ones(1, 3, 8), -torch.rand(1, 3, 8))
    ]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
