"""PHEW masks: whole jobs against the published sampler and the best plain PyTorch, and steps per second.

Bytes of ours: each weight read once in each direction a batch, one bit written, 40 bytes a step of a walker.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from harness import Case, Result
from pathprune import PathNetwork, models, walk_ops
from pathprune.walks import WalkRule, Walks
from walk_baselines import PublishedWalks, TorchWalks

OURS = "pathprune"


def square(size: int, layers: int = 4) -> PathNetwork:
    """Linear layers of size x size."""
    torch.manual_seed(0)
    stack = [layer for _ in range(layers) for layer in (nn.Linear(size, size, bias=False), nn.ReLU())]
    return PathNetwork.from_module(nn.Sequential(*stack), torch.ones(1, size))


def vgg16() -> PathNetwork:
    torch.manual_seed(0)
    return PathNetwork.from_module(models.vgg16_bn(), torch.ones(1, 3, 32, 32))


def whole_mask(name: str, network: PathNetwork, density: float, repeats: int, bandwidth: float) -> Result:
    """A mask at a density: tables, walks and the exact stop."""
    weights = [network.tensors[n].detach() for n in network.prunable]
    total = sum(w.numel() for w in weights)
    found = []

    def ours() -> None:
        found[:] = Walks(network, network.prunable, WalkRule(), seed=0).until([round(density * total)])

    ours()
    walks = found[0].walks
    published = PublishedWalks(weights) if name.startswith("vgg") else None
    pilot = 40

    def theirs() -> int:
        return TorchWalks(weights).walk(walks)

    def verify() -> str:
        marked = theirs()
        if abs(marked - found[0].kept) > 0.01 * found[0].kept:
            raise AssertionError(f"weights taken by {walks} walks: ours {found[0].kept}, torch's {marked}")
        return f"{walks:,} walks take {found[0].kept:,} weights; torch's as many take {marked:,}"

    steps = walks * len(weights)
    case = Case(f"PHEW mask, {name}, to {density:.1%}", verify)
    case.add(OURS, ours, bytes_moved=8.0 * total + 40.0 * steps)
    case.add("best PyTorch", theirs)
    notes: dict[str, object] = {"walks": walks, "steps": steps}
    if published is not None:
        began = time.process_time()
        for number in range(pilot):
            published.walk(number)
        each = (time.process_time() - began) / pilot
        notes["published_seconds_extrapolated"] = round(each * walks, 1)
        notes["published_walks_timed"] = pilot
    return case.measure(repeats, bandwidth=bandwidth, **notes)


def steps_per_second(size: int, walkers: int, repeats: int, bandwidth: float) -> Result:
    """One step of many walkers through size x size weights, ahead and back, against one searchsorted each."""
    torch.manual_seed(0)
    weight = torch.randn(1, size, size, 1)
    units, walks = torch.randint(0, size, (walkers,)), torch.arange(walkers)
    other = TorchWalks([weight[0, :, :, 0]])

    def ours() -> None:
        for to_rows in (True, False):
            walk_ops.walk_step(weight, units, walks, to_rows=to_rows, seed=0, step=0)

    def theirs() -> None:
        for cdf in (other.ahead[0], other.back[0]):
            place = torch.searchsorted(cdf, units + torch.rand(walkers, dtype=torch.float64), right=True)
            (place - units * size).clamp_(0, size - 1)

    def verify() -> str:
        reached, _ = walk_ops.walk_step(weight, units, walks, to_rows=True, seed=0, step=0)
        share = torch.bincount(reached, minlength=size).double() / walkers
        mass = weight[0, :, :, 0].double().abs()
        expected = ((mass / mass.sum(0)) @ (torch.bincount(units, minlength=size).double() / walkers)).flatten()
        worst = float(((share - expected) / (expected / walkers).sqrt()).abs().max())
        if worst > 6:
            raise AssertionError(f"a unit is reached {worst:.1f} standard deviations off")
        return f"units are reached as often as expected, {worst:.1f} standard deviations off at most"

    case = Case(f"{2 * walkers:,} steps, {size} x {size}, both ways", verify)
    case.add(OURS, ours, bytes_moved=2 * (4.0 * size * size + 40.0 * walkers))
    case.add("torch.searchsorted, tables given", theirs)
    result = case.measure(repeats, bandwidth=bandwidth)
    best = min(result.seconds[OURS]["process"])
    result.notes["million_steps_per_second"] = round(2 * walkers / best / 1e6, 2)
    return result
