"""PHEW masks: whole jobs against the published sampler and the best plain PyTorch, and steps per second.

Bytes of ours: each weight read once in each direction a batch, one bit written, 40 bytes a step of a walker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harness import Case, Result
from pathprune import PathNetwork, models, walk_ops
from pathprune.walk_reference import fixed_rows
from pathprune.walk_tables import Table
from pathprune.walks import WalkRule, Walks
from walk_baselines import PublishedWalks, TorchWalks

OURS, FROM_NETWORK, WALKS_ONLY = "pathprune", "pathprune, from the network", "pathprune, walks only"
GROUPED, STORED, SEARCHSORTED = OURS, "stored tables, given", "torch.searchsorted, tables given"


def square(size: int, layers: int = 4) -> PathNetwork:
    """Linear layers of size x size."""
    torch.manual_seed(0)
    stack = [layer for _ in range(layers) for layer in (nn.Linear(size, size, bias=False), nn.ReLU())]
    return PathNetwork.from_module(nn.Sequential(*stack), torch.ones(1, size))


def vgg16() -> nn.Module:
    torch.manual_seed(0)
    return models.vgg16_bn()


def whole_mask(name: str, network: PathNetwork, density: float, repeats: int, bandwidth: float) -> Result:
    """A mask at a density, from a network that was read: tables, walks and the exact stop."""
    return _mask(name, lambda: network, density, bandwidth).measure(repeats, bandwidth=bandwidth)


def whole_job(name: str, module: nn.Module, x: Tensor, density: float, repeats: int, bandwidth: float) -> Result:
    """A mask at a density, from a module to bits; beside it the published sampler's tables and walks, extrapolated."""
    case = _mask(name, lambda: PathNetwork.from_module(module, x), density, bandwidth)
    network = PathNetwork.from_module(module, x)
    weights = [network.tensors[n].detach() for n in network.prunable]
    target = [round(density * sum(w.numel() for w in weights))]
    ready = Walks(network, network.prunable, WalkRule(), seed=0)
    case.add(FROM_NETWORK, lambda: Walks(network, network.prunable, WalkRule(), seed=0).until(target))
    case.add(WALKS_ONLY, lambda: ready.until(target))
    published, walks, pilot = PublishedWalks(weights), ready.until(target)[0].walks, 40
    tables = published.setup_seconds()
    began = time.process_time()
    for number in range(pilot):
        published.walk(number)
    walking = (time.process_time() - began) / pilot * walks
    result = case.measure(repeats, bandwidth=bandwidth)
    ours = {key: min(result.seconds[key]["process"]) for key in (OURS, FROM_NETWORK, WALKS_ONLY)}
    result.notes |= {
        "walks": walks,
        "published_walks_timed": pilot,
        "published_tables_seconds_extrapolated": round(tables, 1),
        "published_walking_seconds_extrapolated": round(walking, 1),
        "published_over_ours_whole_job_from_module": round((tables + walking) / ours[OURS]),
        "published_over_ours_whole_job_from_network": round((tables + walking) / ours[FROM_NETWORK]),
        "published_over_ours_walks_only": round(walking / ours[WALKS_ONLY]),
    }
    return result


def _mask(name: str, read: Callable[[], PathNetwork], density: float, bandwidth: float) -> Case:
    """Ours from what ``read`` gives, and the best PyTorch with its tables."""
    network = read()
    weights = [network.tensors[n].detach() for n in network.prunable]
    total = sum(w.numel() for w in weights)
    found = []

    def ours() -> None:
        network = read()
        found[:] = Walks(network, network.prunable, WalkRule(), seed=0).until([round(density * total)])

    ours()
    walks = found[0].walks

    def theirs() -> int:
        return TorchWalks(weights).walk(walks)

    def verify() -> str:
        marked = theirs()
        if abs(marked - found[0].kept) > 0.01 * found[0].kept:
            raise AssertionError(f"weights taken by {walks} walks: ours {found[0].kept}, torch's {marked}")
        return f"{walks:,} walks take {found[0].kept:,} weights; torch's as many take {marked:,}"

    case = Case(f"PHEW mask, {name}, to {density:.1%}", verify)
    case.add(OURS, ours, bytes_moved=8.0 * total + 40.0 * walks * len(weights))
    return case.add("best PyTorch", theirs)


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
    case.add(SEARCHSORTED, theirs)
    result = case.measure(repeats, bandwidth=bandwidth)
    best = min(result.seconds[OURS]["process"])
    result.notes["million_steps_per_second"] = round(2 * walkers / best / 1e6, 2)
    return result


# ---- which form when --------------------------------------------------------------------------------


def forms(size: int, walkers_per_unit: int, repeats: int, bandwidth: float, tables: Tables) -> Result:
    """A step both ways by each form: walkers grouped by unit, whose distribution is made on the way; a search in
    stored prefix sums of integers, one table for each way; torch.searchsorted in its own stored tables."""
    weight, ahead, back, other = tables.of(size)
    walkers = size * walkers_per_unit
    made = torch.Generator().manual_seed(walkers)
    units, walks = torch.randint(0, size, (walkers,), generator=made), torch.arange(walkers)

    def grouped() -> list[Tensor]:
        return [
            walk_ops.walk_step(weight, units, walks, to_rows=to_rows, seed=0, step=0)[0] for to_rows in (True, False)
        ]

    def stored() -> list[Tensor]:
        found = []
        for table, to_rows in ((ahead, True), (back, False)):
            at = walk_ops.walk_choose(table.cdf, table.row_start, units, walks, seed=0, step=0, word=walk_ops.UNIT)
            at * size + units if to_rows else units * size + at  # the weights taken, as the other forms give them
            found.append(at)
        return found

    def theirs() -> None:
        for cdf in (other.ahead[0], other.back[0]):
            place = torch.searchsorted(cdf, units + torch.rand(walkers, dtype=torch.float64), right=True)
            (place - units * size).clamp_(0, size - 1)

    def verify() -> str:
        for a, b in zip(grouped(), stored(), strict=True):
            if not torch.equal(a, b):
                raise AssertionError("grouped and stored forms draw other units")
        return f"{2 * walkers:,} draws of the grouped and the stored form are equal"

    case = Case(f"forms, {size} x {size}, {walkers_per_unit} walkers a unit", verify)
    case.add(GROUPED, grouped).add(STORED, stored).add(SEARCHSORTED, theirs)
    result = case.measure(repeats, bandwidth=bandwidth)
    rates = {name: 2 * walkers / min(result.seconds[name]["process"]) / 1e6 for name in result.seconds}
    result.notes |= {"size": size, "walkers_per_unit": walkers_per_unit, "million_steps_per_second": rates}
    result.notes["seconds_to_make_the_stored_tables"] = tables.seconds
    return result


class Tables:
    """The stored tables of one size, made when they are first asked for."""

    def __init__(self) -> None:
        self._made: tuple[int, tuple[Tensor, Table, Table, TorchWalks]] | None = None
        self.seconds = 0.0

    def of(self, size: int) -> tuple[Tensor, Table, Table, TorchWalks]:
        if self._made is None or self._made[0] != size:
            self._made = None
            torch.manual_seed(0)
            weight = torch.randn(1, size, size, 1)
            rows = weight[0, :, :, 0].double().abs()
            began = time.process_time()
            start, choices = torch.arange(size + 1) * size, torch.zeros(0, dtype=torch.int64)
            both = [
                Table(torch.cat([fixed_rows(part).cumsum(1) for part in side.split(256)]).flatten(), start, choices)
                for side in (rows.t().contiguous(), rows)
            ]
            self.seconds = time.process_time() - began
            self._made = size, (weight, both[0], both[1], TorchWalks([weight[0, :, :, 0]]))
        return self._made[1]


def plot(results: Sequence[Result], path: Path) -> bool:
    """Steps per second by walkers per unit, a line for each form; False where no forms were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [r for r in results if "walkers_per_unit" in r.notes]
    sizes = sorted({r.notes["size"] for r in measured})
    if not sizes:
        return False
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 4.2), squeeze=False, sharey=True)
    for ax, size in zip(axes[0], sizes, strict=True):
        points = sorted((r for r in measured if r.notes["size"] == size), key=lambda r: r.notes["walkers_per_unit"])
        for name, marker in ((GROUPED, "o"), (STORED, "s"), (SEARCHSORTED, "^")):
            rates = [r.notes["million_steps_per_second"][name] for r in points]
            label = "grouped by unit, nothing stored" if name == GROUPED else name
            ax.plot([r.notes["walkers_per_unit"] for r in points], rates, marker=marker, label=label)
        ax.set(xscale="log", yscale="log", xlabel="walkers a unit", title=f"{size} x {size}, one thread")
        ax.grid(which="both", color="#dddddd", linewidth=0.5)
    axes[0][0].set_ylabel("million steps a second")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
