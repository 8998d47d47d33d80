"""Path scores on every rank of a process group, bit for bit those of one process wherever that is promised."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import pathprune as pp
from pathprune.flow import PathFlow
from pathprune.ops import WeightMap
from pathprune.policy import policy_of
from pathprune.weights import weights_of


def layers(*sizes: int) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for entering, leaving in itertools.pairwise(sizes):
        parts += [nn.Linear(entering, leaving), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def shards_of(model: nn.Module) -> nn.Module:
    """A copy under FSDP2."""
    spread = copy.deepcopy(model)
    fully_shard(spread)
    return spread


def same_masks(model: nn.Module, inputs: Any, pruner: pp.Pruner, **options: Any) -> None:
    """Of both, and the path sum to the last bit."""
    given = {"density": [0.5, 0.02], "example_input": inputs, **options}
    wanted = pp.prune(model, pruner, **given)
    found = pp.prune(shards_of(model), pruner, **given)
    for ours, theirs in zip(found, wanted, strict=True):
        differing = (ours.whole() ^ theirs).kept
        assert not differing, f"{pruner}: {differing} of {theirs.total}"
        for fact in ("log2_R_first", "log2_R_last", "log2_thresholds", "kept"):
            assert ours.metadata["findings"][fact] == theirs.metadata["findings"][fact], fact


def many_rounds_of_a_perceptron(folder: Path) -> None:
    """Rows that blocks do not divide, of more than 2048 too; packed on the way, by each rank when it has few left."""
    model = layers(40, 2301, 331, 77, 3)
    same_masks(model, torch.ones(1, 40), pp.SynFlow(rounds=40))
    same_masks(model, torch.ones(1, 40), pp.SynFlowL2(rounds=6), compact=0.6)
    same_masks(model.to(torch.bfloat16), torch.ones(1, 40, dtype=torch.bfloat16), pp.SynFlow(rounds=5))


def several_positions(folder: Path) -> None:
    """As long as their products are made as the weights pass by."""
    for positions, rounds in ((3, 8), (8, 2)):
        mean = torch.rand(positions, 40, generator=torch.Generator().manual_seed(1))
        same_masks(layers(40, 301, 77, 3), torch.ones(1, positions, 40), pp.SynFlowDist(mean, rounds=rounds))


def many_rounds_of_transformers(folder: Path) -> None:
    """Llama, and GPT-2, whose weights are stored with the units that flow enters as rows."""
    import transformers

    shared = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
    llama = {"hidden_size": 66, "intermediate_size": 150, "num_hidden_layers": 2, "num_attention_heads": 3}
    gpt2 = {"n_embd": 66, "n_layer": 2, "n_head": 3, "n_positions": 32}
    tokens = {"input_ids": torch.arange(6)[None]}
    for model_class, config in (
        (transformers.LlamaForCausalLM, transformers.LlamaConfig(**shared, **llama, num_key_value_heads=3)),
        (transformers.GPT2LMHeadModel, transformers.GPT2Config(**shared, **gpt2)),
    ):
        torch.manual_seed(0)
        same_masks(model_class(config).eval(), tokens, pp.SynFlow(rounds=30))


def torch_products_are_near(folder: Path) -> None:
    """Many positions, and tied weights, go through torch's products of the rows that are here, whose order is torch's
    own: flows agree to 1e-6, and masks but for weights at the threshold."""

    class TwiceTheSame(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(300, 300), nn.Linear(300, 300)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    mean = torch.rand(40, 300, generator=torch.Generator().manual_seed(1))
    for model, inputs, pruner in (
        (layers(300, 301, 77, 3), torch.ones(1, 40, 300), pp.SynFlowDist(mean, rounds=5)),
        (TwiceTheSame(), torch.ones(1, 300), pp.SynFlow(rounds=5)),
    ):
        wanted = pp.prune(model, pruner, density=0.2, example_input=inputs)
        found = pp.prune(shards_of(model), pruner, density=0.2, example_input=inputs)
        first, other = (masks.metadata["findings"]["log2_R_first"] for masks in (wanted, found))
        assert abs(first - other) < 1e-6 and found.kept == wanted.kept
        assert (found.whole() ^ wanted).kept <= 1e-3 * wanted.total


def backward_flow_of_rows_anywhere(folder: Path) -> None:
    """Flows themselves, of DTensors cut by hand: rows fewer than ranks, one row, a block over several ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for rows in (1, 3, 65, 2500):
        one = layers(30, rows, 5)
        spread = copy.deepcopy(one)
        for layer in (spread[0], spread[2]):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        flows = []
        for model in (one, spread):
            network = pp.PathNetwork.from_module(model, torch.ones(1, 30), sharded=model is spread)
            weights = weights_of(network, network.select(), (WeightMap.ABS, WeightMap.ABS))
            flow = PathFlow(network, weights, f=WeightMap.ABS, policy=policy_of("published"))
            flow.keep_flows = True
            flow.forward()
            flow.backward()
            flows.append([g.tensor for g in flow.backward_flows.values()])
        for found, wanted in zip(*flows, strict=True):
            assert torch.equal(found, wanted), rows


QUICK = [several_positions, backward_flow_of_rows_anywhere, many_rounds_of_a_perceptron, torch_products_are_near]
SLOW = [many_rounds_of_transformers]
