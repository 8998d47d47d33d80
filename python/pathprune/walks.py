"""Biased random walks over a path network, many at a time, and masks from them with the exact stop.

A forward walk goes from an input unit to an output unit: at a synapse it takes the next unit with probability in
proportion to ``sum_e |w_e|^power`` over the kernel, then one kernel entry in proportion to ``|w_e|^power``; a backward
walk goes the other way (PHEW: Patil & Dovrolis, ICML 2021). Walk t is forward for even t, backward for odd t. It is a
pure function of (seed, t): all walkers of a batch go through a synapse together, and neither the batch nor the number
of threads nor the device shows in the result.

The mask is that of the sequential rule "walk until the target is reached": walks are marked in order, and the last
one stays whole. Bytes: a batch reads each weight once in each direction; 1/8 byte a weight for the mask, 8 a step of
the batch. Where weights are spread over ranks, each walks its share of a batch, and each layer is gathered while it is
walked through, once for each batch and direction. Oracle: a literal walker (tests), and exact visit probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import walk_ops
from .distributed import Gathered, is_spread
from .network import PathNetwork
from .walk_graph import Edge, Links, walk_graph
from .walk_masks import WalkMasks
from .walk_reference import powered
from .walk_tables import Chances, Table

_SAMPLE = 512  # weights of a tensor that the number of walks is estimated from


@dataclass(frozen=True)
class WalkRule:
    """How walks are drawn.

    Attributes:
        power: transitions in proportion to ``|w|^power``: 1 (PHEW), 2, 0 (uniform), -1 (inverse).
        branches: at a fork ``uniform``, ``mass`` (of the next synapse) or ``flow`` (of all that lies ahead).
        identities: whether identity skips are walked.
        start: ``round_robin`` over the units (the published code) or ``uniform`` (the paper).
    """

    power: int = 1
    branches: str = "uniform"
    identities: bool = False
    start: str = "round_robin"

    def __post_init__(self) -> None:
        allowed = {"power": (1, 2, 0, -1), "branches": ("uniform", "mass", "flow"), "start": ("round_robin", "uniform")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"PHEW: {name}: wanted one of {values}, got {getattr(self, name)!r}")


@dataclass
class _Crossing:
    """What a walker does at a node, in one direction."""

    ways: list[Edge | None]
    branch: Table | None  # None: there is one way
    links: dict[int, Table | None] = field(default_factory=dict)  # by place in ways; None: units keep their number


class Walks(WalkMasks):
    """Walks over a network.

    Args:
        network: the path network.
        names: the weights that walks mark, and that count; others are walked through.
        rule: how walks are drawn.
        seed: of all draws.
        keep_kernels: whether a step marks the whole kernel between two channels, or one entry of it.
        masks: bool tensors: weights that are there at all.
        count_visits: whether to count how often each output unit is visited: 4 ns a step.
    """

    def __init__(
        self,
        network: PathNetwork,
        names: Sequence[str],
        rule: WalkRule,
        seed: int = 0,
        *,
        keep_kernels: bool = False,
        masks: Mapping[str, Tensor] | None = None,
        count_visits: bool = False,
    ) -> None:
        super().__init__(network, names, seed)
        self.rule = rule
        self.keep_kernels = keep_kernels
        self.graph = walk_graph(network)
        used = {site.weight for site in self.graph.sites.values()}
        tensors = {name: network.tensors[name].detach() for name in used}
        if masks is not None:
            tensors = {n: t * masks[n].to(t.device) if n in masks else t for n, t in tensors.items()}
        tensors = {name: tensor if is_spread(tensor) else tensor.contiguous() for name, tensor in tensors.items()}
        self._weights = Gathered(tensors)
        on_cpu = Gathered(tensors, "cpu")
        self.chances = Chances(self.graph, on_cpu, rule.power, rule.branches, rule.identities, network.shards)
        self._gains = {
            (k, ahead): _moved(self.chances.gain(site, ahead), self.device)
            for k, site in self.graph.sites.items()
            for ahead in (True, False)
        }
        self._masses = {
            k: walk_ops.walk_mass(
                self._weights[site.weight].view(site.shape), _moved(site.valid, self.device), rule.power
            )
            for k, site in self.graph.sites.items()
            if site.shape[3] > 1  # a kernel is summed once, not at every step
        }
        self._crossings = {ahead: self._plan(ahead) for ahead in (True, False)}
        self._starts = {ahead: self._start_units(ahead) for ahead in (True, False)}
        for ahead, (_, units) in self._starts.items():
            if not len(units):
                raise ValueError(f"PHEW: no walk can start: no {'input' if ahead else 'output'} unit is on any path")
        self._columns = self._slots()
        self._visits = {
            site.weight: torch.zeros(site.leaving, dtype=torch.int64, device=self.device)
            for k, site in self.graph.sites.items()
            if count_visits and k in self._columns
        }

    # ------------------------------------------------------------------------------------------------- plans

    def _plan(self, ahead: bool) -> dict[int, _Crossing]:
        plan = {}
        for k in self.graph.order:
            at_synapse = not ahead and k in self.graph.sites
            ways: list[Edge | None] = [*self.graph.back[k]] if at_synapse else self.chances.ways(k, ahead)
            several = len(ways) > 1 and not at_synapse
            crossing = _Crossing(ways, self._branch_table(self.chances.branch(k, ahead)[1]) if several else None)
            for place, edge in enumerate(crossing.ways):
                if edge is not None:
                    crossing.links[place] = self._link_table(self.chances.links(edge, ahead))
            plan[k] = crossing
        return plan

    def _branch_table(self, weights: Tensor) -> Table:
        units, ways = weights.shape
        start = torch.arange(units + 1) * ways
        return Table.of(weights.flatten(), start, torch.arange(ways).repeat(units)).to(self.device)

    def _link_table(self, links: Links) -> Table | None:
        if links.is_identity:
            return None
        return Table.of(torch.ones(len(links.targets)).double(), links.start, links.targets).to(self.device)

    def _start_units(self, ahead: bool) -> tuple[Tensor, Tensor]:
        """(node, unit) of every unit a walk may start from, in order."""
        ends = self.graph.inputs if ahead else self.graph.outputs
        counts = [self.graph.units[k] for k in ends]
        nodes = torch.repeat_interleave(torch.tensor(ends, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64))
        units = torch.cat([torch.arange(count) for count in counts]) if ends else torch.zeros(0, dtype=torch.int64)
        alive = self.chances.starts(ahead)
        return nodes[alive].to(self.device), units[alive].to(self.device)

    def _slots(self) -> dict[int, int]:
        """node -> the first column of its steps."""
        columns, width = {}, 0
        for k, site in self.graph.sites.items():
            if site.weight in self.offsets:
                columns[k] = width
                width += site.shape[3] if self.keep_kernels else 1
        self.width = max(width, 1)
        return columns

    # ------------------------------------------------------------------------------------------------- walking

    def steps(self, first: int, count: int) -> Tensor:
        """The weights that walks ``first``, ``first + 1``, ... take: places [count, width] int64, -1 for none."""
        taken = torch.full((self.width, count), -1, dtype=torch.int64, device=self.device)
        for ahead in (True, False):
            skipped = (first + (0 if ahead else 1)) % 2  # even walks go ahead, odd ones back
            walks = torch.arange(first + skipped, first + count, 2, device=self.device)
            self._walk(walks, ahead, taken[:, skipped::2])
        return taken.t()

    def _walk(self, walks: Tensor, ahead: bool, taken: Tensor) -> None:
        everyone = torch.arange(len(walks), device=self.device)
        arrived: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._start(walks, everyone, ahead, arrived)
        for k in self.graph.order if ahead else reversed(self.graph.order):
            # Asked for even where nobody is: where weights are gathered, all ranks take part.
            weight = self._weights[self.graph.sites[k].weight] if k in self.graph.sites else None
            if k not in arrived:
                continue
            parts = arrived.pop(k)
            who, units = parts[0]
            if len(parts) > 1:
                who, units = (torch.cat(part) for part in zip(*parts, strict=True))
            numbers = walks if who is everyone else walks[who]
            if weight is not None:
                units = self._cross(k, weight, numbers, units, ahead, None if who is everyone else who, taken)
            self._leave(k, numbers, who, units, ahead, arrived)

    def _start(self, walks: Tensor, who: Tensor, ahead: bool, arrived: dict[int, list[tuple[Tensor, Tensor]]]) -> None:
        nodes, units = self._starts[ahead]
        if self.rule.start == "round_robin":
            place = walks // 2 % len(units)
        else:
            cdf = torch.arange(1, len(units) + 1, device=self.device)
            whole = torch.tensor([0, len(units)], device=self.device)
            step = len(self.network.nodes)
            zero = torch.zeros_like(walks)
            place = walk_ops.walk_choose(cdf, whole, zero, walks, seed=self.seed, step=step, word=walk_ops.UNIT)
        ends = self.graph.inputs if ahead else self.graph.outputs
        for k in ends:
            here = who if len(ends) == 1 else (nodes[place] == k).nonzero().flatten()
            if here.numel():
                arrived.setdefault(k, []).append((here, units[place[here]]))

    def _cross(
        self, k: int, weight: Tensor, walks: Tensor, units: Tensor, ahead: bool, who: Tensor | None, taken: Tensor
    ) -> Tensor:
        """One step through a synapse; who None: of everyone, in order."""
        site = self.graph.sites[k]
        units, edge = walk_ops.walk_step(
            weight.view(site.shape),
            units,
            walks,
            to_rows=site.forward_to_rows == ahead,
            seed=self.seed,
            step=k,
            power=self.rule.power,
            mass=self._masses.get(k),
            gain=self._gains[k, ahead],
            valid=_moved(site.valid, self.device),
        )
        self.network.used(site.weight)
        column = self._columns.get(k)
        if column is not None:
            entries = site.shape[3] if self.keep_kernels else 1
            begin = edge // entries * entries if self.keep_kernels else edge
            for entry in range(entries):
                if who is None:
                    torch.add(begin, self.offsets[site.weight] + entry, out=taken[column + entry])
                else:
                    taken[column + entry, who] = begin + (self.offsets[site.weight] + entry)
        return units

    def _leave(
        self,
        k: int,
        walks: Tensor,
        who: Tensor,
        units: Tensor,
        ahead: bool,
        arrived: dict[int, list[tuple[Tensor, Tensor]]],
    ) -> None:
        """Takes a branch, and then the link to a unit at its end. ``walks``: the numbers of ``who``."""
        crossing = self._crossings[ahead][k]
        if crossing.branch is None:
            choice = None
        else:
            table = crossing.branch
            choice = walk_ops.walk_choose(
                table.cdf, table.row_start, units, walks, seed=self.seed, step=k, word=walk_ops.BRANCH
            )
        for place, edge in enumerate(crossing.ways):
            if edge is None:
                continue
            mine, at, numbers = who, units, walks
            if choice is not None:
                here = (choice == place).nonzero().flatten()
                if not here.numel():
                    continue
                mine, at, numbers = who[here], units[here], walks[here]
            links = crossing.links[place]
            if links is not None:
                row = walk_ops.walk_choose(
                    links.cdf, links.row_start, at, numbers, seed=self.seed, step=edge.target, word=walk_ops.FLATTEN
                )
                at = links.choices[links.row_start[at] + row]
            arrived.setdefault(edge.target if ahead else edge.source, []).append((mine, at))

    def observe(self, edges: Tensor) -> None:
        for k, column in self._columns.items() if self._visits else ():
            site, taken = self.graph.sites[k], edges[:, column]
            taken = taken[taken >= 0]  # who came this way
            _, rows, columns, entries = site.shape
            flat = taken - self.offsets[site.weight]
            if site.forward_to_rows:
                units = torch.div(flat, columns * entries, rounding_mode="trunc")
            else:
                group = torch.div(flat, rows * columns * entries, rounding_mode="trunc")
                units = group * columns + torch.div(flat, entries, rounding_mode="trunc") % columns
            self._visits[site.weight] += torch.bincount(units, minlength=site.leaving)

    def visits(self) -> dict[str, Tensor]:
        return {name: counts.cpu().clone() for name, counts in self._visits.items()}

    # ---------------------------------------------------------------------------------------- how many walks

    def _visits_per_walk(self) -> dict[int, float]:
        """node -> how often a walk takes its synapse, branches shared evenly over units."""
        rate = dict.fromkeys(self.graph.sites, 0.0)
        for ahead in (True, False):
            share = dict.fromkeys(self.graph.order, 0.0)
            starts = self._starts[ahead][0].tolist()
            for k in set(starts):
                share[k] = starts.count(k) / len(starts)
            for k in self.graph.order if ahead else reversed(self.graph.order):
                if k in rate:
                    rate[k] += share[k] / 2
                crossing = self._crossings[ahead][k]
                parts = [1.0] * len(crossing.ways)
                if crossing.branch is not None:
                    weights = self.chances.branch(k, ahead)[1]
                    parts = (weights / weights.sum(1, keepdim=True)).nan_to_num(0.0).mean(0).tolist()
                for edge, part in zip(crossing.ways, parts, strict=True):
                    if edge is not None:
                        share[edge.target if ahead else edge.source] += share[k] * part
        return rate

    def expected(self) -> Callable[[float], float]:
        """Roughly how many weights ``n`` walks take: units visited evenly, a sample of each tensor."""
        rates, sizes, samples = [], [], []
        for k, rate in self._visits_per_walk().items():
            site = self.graph.sites[k]
            if site.weight not in self.offsets or rate == 0:
                continue
            count = self.network.tensors[site.weight].numel()
            places = spread(count)
            u = powered(self._weights.at(site.weight, places, self.network.shards).cpu(), self.rule.power)
            mean = float(u.mean())
            even = self.keep_kernels or mean == 0
            samples.append(torch.ones_like(u) if even else u / mean)
            sizes.append(float(count))
            rates.append(rate / (count / (site.shape[3] if self.keep_kernels else 1)))
        if not samples:
            return lambda n: 0.0
        size, u = torch.tensor(sizes, dtype=torch.float64), torch.stack(samples)
        visits = torch.tensor(rates, dtype=torch.float64)[:, None] * u  # of each sampled weight, by one walk

        def taken(n: float) -> float:
            share = (u > 0).double() if n == math.inf else -torch.expm1(-n * visits)
            return float((size * share.mean(1)).sum())

        return taken

    def lost(self) -> int:
        """How many non-zero kernels became the integer 0, in either direction, and are never walked there."""
        if not self.chances.may_lose_weights():
            return 0
        return sum(lost for ahead in (True, False) for _, lost in self.chances.quantisation(ahead).values())

    def limit(self) -> tuple[float, list[str]]:
        """How many weights walks can ever take, and the names of the tensors with weights that they cannot."""
        found: dict[str, Tensor] = {}
        for ahead in (True, False):
            for k, chance in self.chances.visits(ahead).items():
                name = self.graph.sites[k].weight
                here = (chance > 0).any(3, keepdim=True).expand(chance.shape) if self.keep_kernels else chance > 0
                here = here.flatten()
                found[name] = here if name not in found else found[name] | here
        cannot = [f"{n} ({int((~found[n]).sum()):,})" for n in self.names if n in found and not bool(found[n].all())]
        cannot += [f"{n} (all)" for n in self.names if n not in found]
        return float(sum(int(found[n].sum()) for n in self.names if n in found)), cannot


def spread(count: int) -> Tensor:
    """Places in a tensor of ``count`` elements, evenly, the first and the last among them: int64 [_SAMPLE]."""
    return torch.arange(_SAMPLE) * (count - 1) // (_SAMPLE - 1)  # in integers: float32 has no 2^24 + 1


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
