"""What is checked on every rank of a process group. The oracle is the same call in one process, on a copy."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import pathprune as pp
from pathprune import _library
from pathprune.distributed import Group
from pathprune.flow import PathFlow
from pathprune.ops import WeightMap
from pathprune.policy import policy_of
from pathprune.weights import weights_of
from rank_models import SHAPES, Branches, pair, perceptron, perceptron_again, same_state, state, whole

# ---------------------------------------------------------------------------------------------------- pruning


def compare_with_one_process(methods: Sequence[tuple[pp.Pruner, dict[str, Any]]]) -> None:
    for make in SHAPES:
        one, spread, x = pair(make)
        network, before = pp.PathNetwork.from_module(one, x), state(spread)
        for pruner, options in methods:
            wanted = pp.prune(network, pruner, density=0.3, **options)
            found = pp.prune(spread, pruner, density=0.3, example_input=x, **options)
            where = f"{make.__name__} {pruner} {options}"
            assert found.counts() == wanted.counts(), where
            assert found == wanted, where
            for fact in {"structure", "kept", "unreached", "walks", "quantised_to_zero"} & {
                *wanted.metadata["findings"]
            }:
                assert found.metadata["findings"][fact] == wanted.metadata["findings"][fact], where
            assert found.metadata["base_hash"] == wanted.metadata["base_hash"]
            level = wanted.metadata["findings"]["log2_R_first"]
            if level is not None:
                assert found.metadata["findings"]["log2_R_first"] == pytest.approx(level, abs=1e-5)
        assert same_state(spread, before)


def the_masks_are_those_of_one_process(folder: Path) -> None:
    compare_with_one_process([(pp.Magnitude(), {}), (pp.PHEW(), {"seed": 1}), (pp.SynFlow(rounds=4), {})])


def so_they_are_by_every_method(folder: Path) -> None:
    compare_with_one_process(
        [
            (pp.Magnitude(), {"scope": "layer", "allocation": "erdos_renyi_kernel"}),
            (pp.Magnitude(), {"scope": "row"}),
            (pp.Random(), {"seed": 3}),
            (pp.PHEW(branches="mass", keep_kernels=True, trim=True), {}),
            (pp.PHEW(bias="flow"), {}),
            (pp.SynFlow(rounds=4, policy="paths"), {"count": "published"}),
            (pp.SynFlowL2(rounds=3), {"allow_regrowth": True}),
            (pp.SynFlowL2(rounds=3, variant="author"), {"compact": 0.9}),
            (pp.TraceSaliency(rounds=2), {}),
            (pp.Sketch(pp.SynFlow(rounds=2)), {"seed": 2}),
        ]
    )


def a_list_of_densities_and_patterns(folder: Path) -> None:
    one, spread, x = pair(perceptron)
    arguments: dict[str, Any] = {"density": [0.5, 0.2], "example_input": x, "exclude": "4.*"}
    for pruner in (pp.PHEW(), pp.SynFlow(rounds=3)):
        for found, wanted in zip(
            pp.prune(spread, pruner, **arguments), pp.prune(one, pruner, **arguments), strict=True
        ):
            assert found == wanted and list(found) == ["0.weight", "2.weight"]
    found = pp.prune(spread, pp.Magnitude(), example_input=x, scope="2:4", exclude="2.*")
    assert found == pp.prune(one, pp.Magnitude(), example_input=x, scope="2:4", exclude="2.*")


def linear_weights_are_scored_where_they_are(folder: Path) -> None:
    """What a round sends is flows and counts: no weight is gathered."""
    _, spread, x = pair(perceptron)
    network = pp.PathNetwork.from_module(spread, x, sharded=True)
    weights = weights_of(network, network.select(), (WeightMap.ABS, WeightMap.ABS))
    flow = PathFlow(network, weights, f=WeightMap.ABS, policy=policy_of("published"))
    sent: list[int] = []

    class Counted(Group):
        def to_next(self, tensor: Tensor) -> Any:
            sent.append(tensor.numel())
            return super().to_next(tensor)

        def each(self, tensor: Tensor) -> Tensor:
            sent.append(tensor.numel())
            return super().each(tensor)

        def sum_(self, tensor: Tensor) -> Tensor:
            sent.append(tensor.numel())
            return super().sum_(tensor)

    counted = Counted(dist.group.WORLD)
    for weight in weights.values():
        weight.group = counted
        assert weight.rows.numel() == network.tensors[weight.name].to_local().numel()
    flow.forward()
    flow.backward()
    widest = max(part for weight in weights.values() for part in weight.shape)
    # Forward and backward, in three layers; and of a block of rows that goes on at the next rank what it sums to.
    assert 2 * 3 <= len(sent) <= 3 * 3 and max(sent) <= widest, sent


def ties_stay_in_the_order_of_one_process(folder: Path) -> None:
    one, spread, x = pair(perceptron)
    for model in (one, spread):
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).data.fill_(-0.5)
    total = sum(p.numel() for p in one.parameters() if p.ndim > 1)
    for keep in (1, 5 * 8, 13 * 8 + 7, 13 * 8 + 200, total - 1):  # in each tensor, on each rank
        found = pp.prune(spread, pp.Magnitude(), density=keep / total, example_input=x)
        assert found.kept == keep
        assert found == pp.prune(one, pp.Magnitude(), density=keep / total, example_input=x)


def weights_too_small_to_walk_are_found_anywhere(folder: Path) -> None:
    """The largest weight of a layer on the first rank, the smallest on the last: neither sees the other's."""
    one, spread, x = pair(perceptron)
    for model in (one, spread):
        held = model[2].weight.detach()
        here = held.to_local() if isinstance(held, DTensor) else held
        if model is one or dist.get_rank() == 0:
            here[0, 0] = 2.0**40
        if model is one or dist.get_rank() == dist.get_world_size() - 1:
            here[-1, 1], here[-1, 0] = 2.0**-30, 2.0**-30
    for pruner in (pp.PHEW(), pp.PHEW(power=-1)):
        wanted = pp.prune(one, pruner, density=0.2, example_input=x).metadata["findings"]["quantised_to_zero"]
        found = pp.prune(spread, pruner, density=0.2, example_input=x).metadata["findings"]["quantised_to_zero"]
        assert found == wanted > 0


def weights_that_are_whole_on_every_rank(folder: Path) -> None:
    """FSDP2 leaves what it is told to ignore as it is; a replicated DTensor is whole everywhere too."""
    torch.manual_seed(0)
    one = perceptron()
    spread = copy.deepcopy(one)
    fully_shard(spread, ignored_params={spread[2].weight})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    spread[4].weight = nn.Parameter(distribute_tensor(one[4].weight.detach(), mesh))
    for pruner in (pp.Magnitude(), pp.PHEW(), pp.SynFlow(rounds=3)):
        found = pp.prune(spread, pruner, density=0.3, example_input=torch.ones(1, 8))
        assert found == pp.prune(one, pruner, density=0.3, example_input=torch.ones(1, 8))
    assert not isinstance(found["2.weight"], DTensor) and found["4.weight"].placements == spread[4].weight.placements
    assert torch.equal(found["2.weight"], found.whole()["2.weight"])


# ------------------------------------------------------------------------------------------------------ masks


def masks_lie_as_the_weights_do(folder: Path) -> None:
    one, spread, x = pair(Branches)
    found = pp.prune(spread, pp.SynFlow(rounds=2), density=0.4, example_input=x)
    alone = pp.prune(one, pp.SynFlow(rounds=2), density=0.4, example_input=x)
    assert isinstance(found, pp.ShardedMasks) and list(found) == list(alone)
    parameters = dict(spread.named_parameters())
    for name, weight in parameters.items():
        if name in found:
            mask = found[name]
            assert isinstance(mask, DTensor) and mask.dtype == torch.bool and mask.shape == weight.shape
            assert mask.placements == weight.placements and mask.to_local().shape == weight.to_local().shape
            assert torch.equal(found.get(name, device="cpu"), alone[name])
    assert (found.kept, found.total, found.density, found.widths()) == (
        alone.kept,
        alone.total,
        alone.density,
        alone.widths(),
    )
    other, other_alone = (pp.prune(model, pp.Random(), density=0.5, example_input=x, seed=5) for model in (spread, one))
    assert (found & other) == (alone & other_alone) and (found & other).counts() == (alone & other_alone).counts()
    assert (found | other) == (alone | other_alone) and (found ^ other) == (alone ^ other_alone)
    assert ~found == ~alone and (~found).kept == found.total - found.kept
    assert found != other and pp.Masks.soup([found, other], 2) == (alone & other_alone)
    assert found.shuffle(7) == alone.shuffle(7)
    assert found.with_biases(spread) == alone.with_biases(one)
    assert str(found.report()).splitlines()[0] == str(alone.report()).splitlines()[0]
    with pytest.raises(ValueError, match=r"lie on the devices of their mesh.*whole"):
        found.to("cpu")
    with pytest.raises(pp.MaskMismatchError, match=r"placed as .*use masks.whole\(\)"):
        found.apply_(one)


def files_and_application(folder: Path) -> None:
    one, spread, x = pair(perceptron)
    found = pp.prune(spread, pp.SynFlow(rounds=2), density=0.4, example_input=x)
    alone = pp.prune(one, pp.SynFlow(rounds=2), density=0.4, example_input=x)
    found.save(folder / "masks.safetensors")
    dist.barrier()
    loaded = pp.Masks.load(folder / "masks.safetensors", spread, base="raise")
    assert type(loaded) is pp.Masks and loaded == alone and found == loaded
    wrong = OSError if dist.get_rank() == 0 else RuntimeError
    with pytest.raises(wrong):
        found.save(folder / "nowhere" / "masks.safetensors")

    wanted = alone.apply_(copy.deepcopy(one)).state_dict()
    spread(torch.randn(2, 8))  # FSDP2 leaves the root's parameters gathered after a forward pass
    assert found.apply_(spread) is spread
    assert all(torch.equal(whole(t), wanted[name]) for name, t in spread.state_dict().items())
    again = pair(perceptron)[1]
    loaded.apply_(again)  # masks of one process, on shards
    assert all(torch.equal(whole(t), wanted[name]) for name, t in again.state_dict().items())
    assert pp.Masks.from_model(again) == pp.Masks.from_model(alone.apply_(copy.deepcopy(one)))
    columns = pair(perceptron)[0]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns[2].weight = nn.Parameter(distribute_tensor(columns[2].weight.detach(), mesh, [Shard(1)]))
    loaded.apply_(columns)
    assert torch.equal(columns[2].weight.full_tensor(), wanted["2.weight"])
    shifted = pp.Masks({name: torch.ones(3, 3, dtype=torch.bool) for name in found})
    before = state(spread)
    with pytest.raises(pp.MaskMismatchError, match="other shapes"):
        shifted.apply_(spread)
    assert same_state(spread, before)


def zeros_survive_training(folder: Path) -> None:
    for optimizer, options in (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    ):
        one, spread, x = pair(perceptron, torch.float64)
        torch.manual_seed(1)
        inputs = torch.randn(3, 4, 8, dtype=torch.float64)
        trained = []
        for model in (one, spread):
            steps = optimizer(model.parameters(), **options)
            model(inputs[0]).square().sum().backward()
            steps.step()  # so that there is momentum before the masks
            steps.zero_grad()
            masks = pp.prune(model, pp.Magnitude(), density=0.3, example_input=x, scope="layer")
            with masks.maintain(model, steps):
                for batch in inputs:
                    model(batch).square().sum().backward()
                    for name, weight in model.named_parameters():
                        if name in masks:
                            assert not bool((whole(weight.grad) * ~whole(masks[name])).any())
                    steps.step()
                    steps.zero_grad()
                    for name in masks:
                        weight = whole(dict(model.named_parameters())[name].detach())
                        assert not bool(weight[~whole(masks[name])].any()) and bool(weight.any())
            trained.append({name: whole(t) for name, t in model.state_dict().items()})
        for name, values in trained[0].items():
            torch.testing.assert_close(trained[1][name], values)


def checkpoints(folder: Path) -> None:
    _, spread, x = pair(Branches)
    masks = pp.prune(spread, pp.Magnitude(), density=0.2, example_input=x)
    masks.apply_(spread)
    dcp.save({"model": spread.state_dict(), "masks": dict(masks)}, checkpoint_id=folder / "checkpoint")
    torch.manual_seed(9)
    fresh = Branches()
    fully_shard(fresh)
    ones = pp.prune(fresh, pp.Random(), density=1.0, example_input=x)
    read = {"model": fresh.state_dict(), "masks": dict(ones)}
    dcp.load(read, checkpoint_id=folder / "checkpoint")
    fresh.load_state_dict(read["model"])
    for name, weight in spread.state_dict().items():
        assert torch.equal(whole(weight), whole(fresh.state_dict()[name]))
    for name, mask in masks.items():
        assert torch.equal(whole(mask), whole(read["masks"][name]))
        assert not bool(whole(fresh.state_dict()[name])[~whole(mask)].any())


# ------------------------------------------------------------------------------------------------------- data


def batches(dtype: torch.dtype, count: int = 6) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(2)
    sizes = [3 + k % 2 for k in range(count)]
    return [
        (torch.randn(n, 8, generator=drawn, dtype=dtype), torch.randint(0, 2, (n,), generator=drawn)) for n in sizes
    ]


def compare_sums(methods: Sequence[Callable[[Any], pp.Pruner]]) -> None:
    every = batches(torch.float64)
    mine = every[dist.get_rank() :: dist.get_world_size()]
    one, spread, x = pair(perceptron, torch.float64)
    plain, network, before = copy.deepcopy(one), pp.PathNetwork.from_module(one, x), state(spread)
    for method in methods:
        wanted, share = (pp.prune(network, method(data), density=0.3) for data in (every, mine))
        level, other = (masks.metadata["findings"]["log2_R_first"] for masks in (wanted, share))
        assert share != wanted or abs(level - other) > 0.1  # a share alone is another matter
        found = pp.prune(spread, method(mine), density=0.3, example_input=x)
        assert found == wanted and found.metadata["findings"]["log2_R_first"] == pytest.approx(level, abs=1e-9)
        over = pp.prune(plain, method(mine), density=0.3, example_input=x, process_group=dist.group.WORLD)
        assert type(over) is pp.Masks and over == wanted
    assert same_state(spread, before)
    with pytest.raises(ValueError, match=r"PX: variant: wanted 'paper' where several ranks"):
        pp.prune(spread, pp.PX(mine, variant="released"), density=0.3, example_input=x)


def sums_over_ranks(folder: Path) -> None:
    compare_sums([pp.SNIP, lambda data: pp.PX(data, rounds=2)])


def sums_of_every_method(folder: Path) -> None:
    compare_sums(
        [
            lambda data: pp.FORCE(data, rounds=3),
            pp.GraSP,
            lambda data: pp.GraSP(data, method="finite_difference"),
            pp.Fisher,
            pp.PXExact,
        ]
    )


def a_rank_without_data(folder: Path) -> None:
    _, spread, x = pair(perceptron)
    mine = [] if dist.get_rank() == 1 else batches(torch.float32)
    before = state(spread)
    for pruner in (pp.SNIP(mine), pp.PX(mine, rounds=2)):
        own = dist.get_rank() == 1
        words = "wanted at least one batch, got none" if own else "rank 1 of . has failed: ValueError: .*got none"
        with pytest.raises(ValueError if own else RuntimeError, match=words):
            pp.prune(spread, pruner, density=0.3, example_input=x)
    assert same_state(spread, before)


# ----------------------------------------------------------------------------------------------------- errors


def ranks_that_differ_are_told_so(folder: Path) -> None:
    rank = dist.get_rank()
    _, spread, x = pair(perceptron)
    before = state(spread)

    def refused(words: str, pruner: pp.Pruner, model: nn.Module = spread, **options: Any) -> None:
        with pytest.raises(ValueError, match=words):
            pp.prune(model, pruner, **{"density": 0.3, "example_input": x, **options})

    refused(
        r"prune: density: wanted the same on every rank, got \[0.3\] on rank 0", pp.SynFlow(), density=0.3 + rank / 9
    )
    refused("prune: seed: wanted the same on every rank, got 0 on rank 0 and 1 on rank 1", pp.Random(), seed=rank)
    refused("prune: pruner: wanted the same on every rank, got SynFlow .*", pp.SynFlow(rounds=1 + rank))
    refused("prune: pruner: wanted", pp.SynFlowDist(torch.full((8,), 1.0 + rank)))
    refused("prune: exclude: wanted", pp.Magnitude(), exclude="0.*" if rank else ())
    world = {"process_group": dist.group.WORLD}
    torch.manual_seed(rank)
    refused("prune: weights: wanted the same on every rank, got splitmix64", pp.Magnitude(), perceptron(), **world)
    wide = nn.Sequential(nn.Linear(8, 4 + rank), nn.ReLU(), nn.Linear(4 + rank, 2))
    refused("prune: model: wanted the same on every rank, got 0.weight", pp.Magnitude(), wide, **world)
    assert same_state(spread, before)


def what_fails_on_one_rank_is_known_on_all(folder: Path) -> None:
    rank = dist.get_rank()
    _, spread, x = pair(perceptron)
    for pruner in (pp.SynFlow(), pp.PHEW()):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            pp.prune(spread, pruner, density=-1 if rank == 1 else 0.3, example_input=x)
        assert ("rank 1 of" in str(caught.value)) == (rank != 1) and "wanted a fraction in" in str(caught.value)
        held = spread[2].weight.detach().to_local()
        kept = held[:1].clone()
        if rank == 1:
            held[0, 0] = torch.nan
        with pytest.raises((ValueError, RuntimeError), match=r"weight '2.weight': wanted finite values"):
            pp.prune(spread, pruner, density=0.3, example_input=x)
        held[:1] = kept


def weights_that_are_cut_otherwise(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = perceptron_again()
    model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), mesh, [Shard(1)]))
    for pruner in (pp.SynFlow(), pp.PHEW()):
        with pytest.raises(ValueError, match=r"weight '2.weight': wanted whole rows .*got placements .*Shard\(dim=1\)"):
            pp.prune(model, pruner, density=0.3, example_input=torch.ones(1, 8))
    gathered = pp.PathNetwork.from_module(model, torch.ones(1, 8))
    masks = pp.prune(gathered, pp.SynFlow(rounds=2), density=0.3)
    assert masks == pp.prune(perceptron_again(), pp.SynFlow(rounds=2), density=0.3, example_input=torch.ones(1, 8))
    masks.apply_(model)
    assert torch.equal(model[2].weight.full_tensor() != 0, masks["2.weight"])
    with pytest.raises(TypeError, match="process_group: wanted a ProcessGroup, got str"):
        pp.prune(model, pp.Magnitude(), density=0.3, example_input=torch.ones(1, 8), process_group="world")


def without_a_process_group(folder: Path) -> None:
    """Last of all: it ends the process group, and begins another for what follows."""
    _, spread, x = pair(perceptron)
    mine, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    try:
        with pytest.raises(ValueError, match=r"its parameters are DTensors; wanted an initialised torch.distributed"):
            pp.prune(spread, pp.SynFlow(), density=0.3, example_input=x)
        with pytest.raises(ValueError, match=r"its parameters are DTensors; wanted an initialised torch.distributed"):
            pp.PathNetwork.from_module(spread, x)
    finally:
        dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=mine, world_size=size)


# ----------------------------------------------------------------------------------------------- many and large


def shards_that_are_replicated(folder: Path) -> None:
    """Hybrid sharding: rows over one dimension of the mesh, copies over the other."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "rows"))
    for make in (perceptron, Branches):
        torch.manual_seed(0)
        one = make()
        spread = copy.deepcopy(one)
        fully_shard(spread, mesh=mesh)
        x = torch.ones(SHAPES[make])
        for pruner in (pp.Magnitude(), pp.PHEW(), pp.SynFlow(rounds=3), pp.TraceSaliency(rounds=2)):
            found = pp.prune(spread, pruner, density=0.3, example_input=x)
            assert found == pp.prune(one, pruner, density=0.3, example_input=x)
            assert found.kept == found.whole().kept
        found.apply_(spread)
        assert all(not bool(whole(w)[~found.whole()[n]].any()) for n, w in spread.state_dict().items() if n in found)


def wide() -> nn.Module:
    sizes = (700, 1500, 1501, 3)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


SHAPES_OF_WIDE = (1, 700)


def millions_of_weights(folder: Path) -> None:
    """So many that thresholds are bracketed by samples, and many ties over ranks."""
    torch.manual_seed(0)
    one = wide()
    with torch.no_grad():
        one[2].weight.copy_((one[2].weight * 100).round() / 100)  # a few distinct values: large groups of ties
    spread = copy.deepcopy(one)
    fully_shard(spread)
    x = torch.ones(SHAPES_OF_WIDE)
    for pruner in (pp.Magnitude(), pp.Random(), pp.PHEW(), pp.SynFlow(rounds=20), pp.SynFlowL2(rounds=5)):
        for density in (0.6, 0.07):
            wanted = pp.prune(one, pruner, density=density, example_input=x)
            found = pp.prune(spread, pruner, density=density, example_input=x)
            assert found.kept == wanted.kept
            differing = (found.whole() ^ wanted).kept
            exact = isinstance(pruner, (pp.Magnitude, pp.Random, pp.PHEW)) or _library.cpu_loaded
            assert differing <= (0 if exact else 1e-6 * wanted.total), f"{pruner} {density}: {differing}"


QUICK = [
    the_masks_are_those_of_one_process,
    a_list_of_densities_and_patterns,
    linear_weights_are_scored_where_they_are,
    ties_stay_in_the_order_of_one_process,
    weights_too_small_to_walk_are_found_anywhere,
    weights_that_are_whole_on_every_rank,
    masks_lie_as_the_weights_do,
    files_and_application,
    zeros_survive_training,
    checkpoints,
    sums_over_ranks,
    a_rank_without_data,
    ranks_that_differ_are_told_so,
    what_fails_on_one_rank_is_known_on_all,
    weights_that_are_cut_otherwise,
    without_a_process_group,
]
SLOW = [so_they_are_by_every_method, sums_of_every_method]
