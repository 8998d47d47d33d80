"""What a walk draws from besides weights: its start, its branch, the unit behind a flattening; and visit probabilities.

All tables are made in float64 on the CPU, on one thread and in a fixed order, and become integers: from there on the
same seed gives the same walks on every device. Oracle: transition probabilities by enumeration on small networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ._mask_io import flat_pieces
from .distributed import ALONE, Gathered, Group
from .walk_graph import Edge, Links, Site, WalkGraph
from .walk_reference import fixed_rows, powered


@dataclass(frozen=True)
class Table:
    """Rows of choices: prefix sums of integers, row by row."""

    cdf: Tensor  # [row_start[-1]] int64 as unsigned
    row_start: Tensor  # [rows + 1] int64
    choices: Tensor  # [row_start[-1]] int64: what each place stands for

    @staticmethod
    def of(weights: Tensor, row_start: Tensor, choices: Tensor) -> Table:
        """From float64 weights, row by row; rows of one length share their arithmetic."""
        cdf = torch.zeros(len(weights), dtype=torch.int64)
        counts = row_start.diff()
        for count in counts.unique().tolist():
            if count:
                places = row_start[:-1][counts == count][:, None] + torch.arange(count)
                cdf[places] = fixed_rows(weights[places]).cumsum(1)
        return Table(cdf, row_start, choices)

    def to(self, device: torch.device) -> Table:
        return Table(self.cdf.to(device), self.row_start.to(device), self.choices.to(device))


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Chances:
    """The probabilities of a walk, from the graph and the weights.

    Args:
        graph: the units and links.
        tensors: weights by name, brought to the CPU.
        power: of ``|w|``.
        branches: how a walk chooses where flows part or meet: ``uniform``; ``mass``, by the ``|w|^power`` of the
            branch's next synapse at the unit; ``flow``, by the sum over all the channel paths that lie ahead.
        identities: whether identity skips are walked.
        ranks: those that the weights' rows are spread over.
    """

    def __init__(
        self,
        graph: WalkGraph,
        tensors: Gathered,
        power: int,
        branches: str,
        identities: bool,
        ranks: Group = ALONE,
    ) -> None:
        self.graph, self.tensors, self.power, self._ranks = graph, tensors, power, ranks
        self.branches = branches
        self._skips = set() if identities else graph.skips
        self._blocked_ahead = self._blocked()
        self._masses: dict[tuple[str, bool], Tensor] = {}
        self._branches: dict[tuple[int, bool], tuple[list[Edge | None], Tensor]] = {}
        with one_thread():
            self.ahead_amounts = self._amounts(True) if branches == "flow" else {}
            self.back_amounts = self._amounts(False) if branches == "flow" else {}

    # ------------------------------------------------------------------------------------------ permitted ways

    def _blocked(self) -> set[int]:
        """Nodes from which a walk ahead can only go on through identity skips."""
        blocked: set[int] = set()
        for k in reversed(self.graph.order):
            ways = self.graph.ahead[k]
            closed = ways and k not in self.graph.outputs and all(self._is_skip(e, blocked) for e in ways)
            if closed and k not in self.graph.sites:
                blocked.add(k)
        return blocked

    def _is_skip(self, edge: Edge, blocked: set[int]) -> bool:
        return (edge.target, edge.slot) in self._skips or (
            edge.target in blocked and edge.target not in self.graph.sites
        )

    def ways_ahead(self, k: int) -> list[Edge | None]:
        """The edges a forward walk may take from a node; None: it may end there."""
        ways: list[Edge | None] = [e for e in self.graph.ahead[k] if not self._is_skip(e, self._blocked_ahead)]
        ways = ways or list(self.graph.ahead[k])
        return [*ways, None] if k in self.graph.outputs else ways

    def ways_back(self, k: int) -> list[Edge]:
        """The edges a backward walk may take from a node."""
        ways = [e for e in self.graph.back[k] if (k, e.slot) not in self._skips]
        return ways or self.graph.back[k]

    # -------------------------------------------------------------------------------------------------- weights

    def powered(self, site: Site) -> Tensor:
        """|w|^power, float64 [G, R, C, E], 0 for kernel entries that meet no position."""
        weight = powered(self.tensors[site.weight].detach().reshape(site.shape), self.power)
        return weight if site.valid is None else weight * site.valid

    def gain(self, site: Site, ahead: bool) -> Tensor | None:
        """[targets] float64: 0 for units that lead nowhere; None where all lead on."""
        if self.graph.all_alive:
            return None
        if ahead:
            alive = self.graph.alive_ahead[site.node]
        else:
            (edge,) = self.graph.back[site.node]
            alive = edge.back.reduced(self.graph.alive_back[edge.source].long()) > 0
        return None if bool(alive.all()) else alive.double()

    def step_probabilities(self, site: Site, ahead: bool) -> Tensor:
        """P(next unit, entry | unit): float64 [G, R, C, E], summing to 1 over what a step chooses from."""
        weights = self.powered(site)
        to_rows = site.forward_to_rows == ahead
        valid = torch.ones(site.shape[3]) if site.valid is None else site.valid.double()
        own = weights.sum(3)
        entry = torch.where((own > 0)[..., None], weights / own[..., None], valid / valid.sum())
        gain = self.gain(site, ahead)
        gains = torch.ones(own.shape, dtype=torch.float64)
        if gain is not None:
            gains = gains * (gain.reshape(site.shape[0], -1, 1) if to_rows else gain.reshape(site.shape[0], 1, -1))
        mass = own * gains
        dim = 1 if to_rows else 2
        total = mass.sum(dim, keepdim=True)
        allowed = (gains > 0).double() * bool(valid.any())
        uniform = allowed / allowed.sum(dim, keepdim=True)
        unit = torch.where(total > 0, mass / total, uniform).nan_to_num(0.0)
        return unit[..., None] * entry

    def quantisation(self, ahead: bool) -> dict[int, tuple[float, int]]:
        """node -> how far its integers are from its weights, over all units that a walk can be at.

        Returns:
            (the largest total-variation distance between the distribution that is drawn from and the exact one,
            how many non-zero weights became the integer 0).
        """
        found = {}
        for k, site in self.graph.sites.items():
            gain = self.gain(site, ahead)
            rows = self.powered(site).sum(3)  # [G, R, C]
            to_rows = site.forward_to_rows == ahead
            if gain is not None:
                rows = rows * (gain.reshape(len(rows), -1, 1) if to_rows else gain.reshape(len(rows), 1, -1))
            rows = (rows.transpose(1, 2) if to_rows else rows).flatten(0, 1)
            rows = rows[(rows > 0).any(1)]
            worst, lost = 0.0, 0
            for part in rows.split(max(2**22 // max(rows.shape[1], 1), 1)):
                integers = fixed_rows(part)
                lost += int(((integers == 0) & (part > 0)).sum())
                drawn = integers.double() + torch.where(integers < 0, 2.0**64, 0.0)  # they are unsigned
                apart = drawn / drawn.sum(1, keepdim=True) - part / part.sum(1, keepdim=True)
                worst = max(worst, 0.5 * float(apart.abs().sum(1).max()))
            found[k] = (worst, lost)
        return found

    def may_lose_weights(self) -> bool:
        """Whether some non-zero weight could be so small beside its row that its integer is 0."""
        sites = list(self.graph.sites.values())
        here = [self.tensors.here(site.weight) for site in sites]
        ends = torch.tensor([extremes(weight) for weight in here], dtype=torch.float64, device=here[0].device)
        least, most = self._ranks.largest_(torch.stack([-ends[:, 0], ends[:, 1]])).cpu()
        for site, magnitudes in zip(sites, torch.stack([-least, most], 1), strict=True):
            low, high = powered(magnitudes, self.power).sort().values.tolist()
            if magnitudes[1] > 0 and low < high * max(site.shape) * site.shape[3] * 2.0**-61:
                return True
        return False

    def _mass(self, site: Site, ahead: bool) -> Tensor:
        """The |w|^power that a unit finds at a synapse: [units that enter], or [units that leave] going back."""
        key = (f"{site.node}", ahead)
        if key not in self._masses:
            to_rows = site.forward_to_rows == ahead
            total = self.powered(site).sum(3).sum(1 if to_rows else 2)
            self._masses[key] = total.flatten()
        return self._masses[key]

    def _through(self, site: Site, beyond: Tensor, ahead: bool) -> Tensor:
        """The amounts beyond a synapse, brought to this side of it."""
        weights = self.powered(site).sum(3)  # [G, R, C]
        to_rows = site.forward_to_rows == ahead
        beyond = beyond.reshape(site.shape[0], -1, 1)
        return (weights.transpose(1, 2) if to_rows else weights).matmul(beyond).flatten()

    # ------------------------------------------------------------------------------------ what lies on the ways

    def _amounts(self, ahead: bool) -> dict[int, tuple[Tensor, int]]:
        """node -> the sum over the channel paths that lie ahead of (or behind) each unit, and its exponent."""
        graph = self.graph
        amounts: dict[int, tuple[Tensor, int]] = {}
        for k in reversed(graph.order) if ahead else graph.order:
            if ahead:
                ends = [(torch.ones(graph.units[k], dtype=torch.float64), 0)] if k in graph.outputs else []
                parts = [self._along(edge, amounts, True) for edge in graph.ahead[k]]
                amounts[k] = _total(ends + parts, graph.units[k])
            else:
                entered = graph.sites[k].entering if k in graph.sites else graph.units[k]
                ends = [(torch.ones(entered, dtype=torch.float64), 0)] if k in graph.inputs else []
                amount, exponent = _total(ends + [self._along(e, amounts, False) for e in graph.back[k]], entered)
                if k in graph.sites:
                    amount = self._through(graph.sites[k], amount, False)
                amounts[k] = _normal(amount, exponent)
        return amounts

    def _along(self, edge: Edge, amounts: Mapping[int, tuple[Tensor, int]], ahead: bool) -> tuple[Tensor, int]:
        """What an edge leads to, at the units it is entered from."""
        if not ahead:
            amount, exponent = amounts[edge.source]
            return edge.back.reduced(amount), exponent
        amount, exponent = amounts[edge.target]
        if edge.target in self.graph.sites:
            amount = self._through(self.graph.sites[edge.target], amount, True)
        return edge.ahead.reduced(amount), exponent

    def _share(self, edge: Edge | None, k: int, ahead: bool) -> tuple[Tensor, int]:
        """The weight of taking a way from the units of node k."""
        units = self.graph.units[k]
        if edge is None:
            return torch.ones(units, dtype=torch.float64), 0
        if self.branches == "flow":
            return self._along(edge, self.ahead_amounts if ahead else self.back_amounts, ahead)
        if self.branches == "mass":
            return self._mass_along(edge, ahead), 0
        return torch.ones(units, dtype=torch.float64), 0

    def _mass_along(self, edge: Edge, ahead: bool) -> Tensor:
        """The weights of the synapses that a way meets next; 1 where it meets the end first."""
        k = edge.target if ahead else edge.source
        links = edge.ahead if ahead else edge.back
        if k in self.graph.sites:
            return links.reduced(self._mass(self.graph.sites[k], ahead))
        ways = self.ways_ahead(k) if ahead else self.ways_back(k)
        units = self.graph.units[k]
        if not ways:
            return links.reduced(torch.ones(units, dtype=torch.float64))
        total = torch.zeros(units, dtype=torch.float64)
        for way in ways:
            total += torch.ones(units, dtype=torch.float64) if way is None else self._mass_along(way, ahead)
        return links.reduced(total)

    # --------------------------------------------------------------------------------------------------- tables

    def ways(self, k: int, ahead: bool) -> list[Edge | None]:
        """The edges a walk may take from a node; None: it may end there."""
        return self.ways_ahead(k) if ahead else [*self.ways_back(k)]

    def branch(self, k: int, ahead: bool) -> tuple[list[Edge | None], Tensor]:
        """The ways from a node and their weights, float64 [units, ways]; each row has one that is open, if any is."""
        if (k, ahead) not in self._branches:
            self._branches[k, ahead] = self._branch(k, ahead)
        return self._branches[k, ahead]

    def _branch(self, k: int, ahead: bool) -> tuple[list[Edge | None], Tensor]:
        ways = self.ways(k, ahead)
        if not ahead and k in self.graph.sites:
            raise ValueError(f"branch: node {k} is a synapse; a walk back leaves it by its one input")
        shares = [self._share(edge, k, ahead) for edge in ways]
        top = max((exponent for _, exponent in shares), default=0)
        columns = [amount * 2.0 ** max(exponent - top, -1022) for amount, exponent in shares]
        is_open = []
        for edge in ways:
            if edge is None:
                is_open.append(torch.ones(self.graph.units[k], dtype=torch.bool))
                continue
            is_open.append(self.links(edge, ahead).counts > 0)
        opened = torch.stack(is_open, 1) if ways else torch.zeros(self.graph.units[k], 0, dtype=torch.bool)
        weights = torch.stack(columns, 1) * opened if ways else torch.zeros(self.graph.units[k], 0).double()
        empty = (weights == 0).all(1, keepdim=True)
        return ways, torch.where(empty, opened.double(), weights)

    def links(self, edge: Edge, ahead: bool) -> Links:
        """The links of an edge to units that lead on."""
        links = edge.ahead if ahead else edge.back
        return links if self.graph.all_alive else links.only(self.alive(edge, ahead))

    def alive(self, edge: Edge, ahead: bool) -> Tensor:
        """Which units at the end of an edge lead on."""
        if not ahead:
            return self.graph.alive_back[edge.source]
        if edge.target not in self.graph.sites:
            return self.graph.alive_ahead[edge.target]
        site = self.graph.sites[edge.target]
        some = self.graph.alive_ahead[edge.target].reshape(site.shape[0], -1).any(1, keepdim=True)
        return some.expand(site.shape[0], site.entering // site.shape[0]).flatten()

    # ------------------------------------------------------------------------------------- visit probabilities

    def visits(self, ahead: bool) -> dict[int, Tensor]:
        """node -> P(a walk takes weight w of its synapse), float64 [G, R, C, E]. Exact: the expectation of the walk."""
        graph = self.graph
        arrived = {k: torch.zeros(self._entering(k, ahead), dtype=torch.float64) for k in graph.order}
        ends = graph.inputs if ahead else graph.outputs
        chance = self.starts(ahead).double()
        chance = chance / chance.sum()
        offset = 0
        for k in ends:
            arrived[k] = arrived[k] + chance[offset : offset + graph.units[k]]
            offset += graph.units[k]
        found: dict[int, Tensor] = {}
        for k in graph.order if ahead else reversed(graph.order):
            at = arrived[k]
            if k in graph.sites:
                site = graph.sites[k]
                to_rows = site.forward_to_rows == ahead
                entered = at.reshape(site.shape[0], 1, -1, 1) if to_rows else at.reshape(site.shape[0], -1, 1, 1)
                found[k] = entered * self.step_probabilities(site, ahead)
                at = found[k].sum(3).sum(2 if to_rows else 1).flatten()
            if not ahead and k in graph.sites:
                (entry,) = graph.back[k]
                self._pass(entry, at, arrived, False)
                continue
            ways, weights = self.branch(k, ahead)
            shares = (weights / weights.sum(1, keepdim=True)).nan_to_num(0.0)
            for column, edge in enumerate(ways):
                if edge is not None:
                    self._pass(edge, at * shares[:, column], arrived, ahead)
        return found

    def _entering(self, k: int, ahead: bool) -> int:
        return self.graph.sites[k].entering if ahead and k in self.graph.sites else self.graph.units[k]

    def _pass(self, edge: Edge, amount: Tensor, arrived: dict[int, Tensor], ahead: bool) -> None:
        """Spreads what takes an edge evenly over the units that each unit is linked to."""
        links = self.links(edge, ahead)
        source = torch.repeat_interleave(torch.arange(len(links.start) - 1), links.counts)
        each = amount / links.counts.clamp(min=1)
        end = edge.target if ahead else edge.source
        arrived[end] = arrived[end].index_add(0, links.targets, each[source])

    def starts(self, ahead: bool) -> Tensor:
        """[all input units] (or output units) bool: those that a walk may start from."""
        ends = self.graph.inputs if ahead else self.graph.outputs
        alive = self.graph.alive_ahead if ahead else self.graph.alive_back
        return torch.cat([alive[k] for k in ends]) if ends else torch.zeros(0, dtype=torch.bool)


def _normal(amount: Tensor, exponent: int) -> tuple[Tensor, int]:
    peak = float(amount.max()) if amount.numel() else 0.0
    shift = int(torch.frexp(torch.tensor(peak, dtype=torch.float64)).exponent) if peak > 0 else 0
    return amount * 2.0**-shift, exponent + shift


def _total(parts: list[tuple[Tensor, int]], units: int) -> tuple[Tensor, int]:
    """The sum of amounts at the larger exponent."""
    if not parts:
        return torch.zeros(units, dtype=torch.float64), 0
    top = max(exponent for _, exponent in parts)
    total = torch.zeros(units, dtype=torch.float64)
    for amount, exponent in parts:
        total = total + amount * 2.0 ** max(exponent - top, -1022)
    return _normal(total, top)


def extremes(weights: Tensor) -> tuple[float, float]:
    """The smallest magnitude of a weight that is not 0, and the largest; (inf, 0) where there is none."""
    least, most = torch.inf, 0.0
    for _, piece in flat_pieces(weights):
        if piece.numel():
            magnitudes = piece.abs()
            most = max(most, float(magnitudes.amax()))
            least = min(least, float(torch.where(magnitudes > 0, magnitudes, torch.inf).amin()))
    return least, most
