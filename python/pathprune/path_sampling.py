"""Whole paths drawn in exact proportion to their value.

A walk that starts at element i in proportion to ``x_i h_i`` and takes each step in proportion to ``|w|^p h_next``, h
the backward flow, draws path v with probability ``|v|^p / R``: the products of h cancel (power 1: SynFlow's own
measure, power 2: the squared network's). A backward walk does the same with forward flows. The state is an element of
a tensor, a channel and a position: unlike the channel walks of PHEW these are paths of the network, position by
position. Identity skips are walked, in proportion to what they carry.

Flows are made once, in float64 on the CPU; every draw is made from integers. Bytes: a step reads one unit's weights.
Oracle: enumeration of all paths.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import nodes as kinds
from . import walk_ops
from .checks import seed_of
from .flow import PathFlow
from .network import PathNetwork
from .nodes import Node, Synapse
from .ops import WeightMap
from .path_links import by_unit, element_of, leads_to, links_of, unit_and_position, weight_shape
from .policy import Policy, policy_of
from .scratch import Scratch
from .surroundings import undisturbed
from .walk_masks import WalkMasks
from .walk_tables import Table, one_thread
from .weights import Scaled, Weight

_MAPS = {1: WeightMap.ABS, 2: WeightMap.SQUARE}


@dataclass(frozen=True)
class Paths:
    """Paths drawn with probability ``|v|^power / R``.

    Attributes:
        weights: [n, synapses] int64: the flat index of the weight on each synapse, -1 where a path avoids it.
        names: the parameter of each column.
        log2_value: [n] float64: log2 of ``|v|^power``, fixed factors and source included.
        log2_probability: [n] float64: ``log2_value - log2_total``.
        log2_total: log2 R.
        inverse_squares: [n] float64: the sum of ``1 / w^2`` over a path's weights. With power 2, ``v^2`` times this is
            the path's own entry on the diagonal of the path kernel.
    """

    weights: Tensor
    names: tuple[str, ...]
    log2_value: Tensor
    log2_total: float
    inverse_squares: Tensor

    @property
    def log2_probability(self) -> Tensor:
        return self.log2_value - self.log2_total

    def estimate(self, factors: Tensor) -> tuple[float, float]:
        """An unbiased estimate of ``sum over all paths of |v|^power * factor``, and its standard error.

        Both are in units of R = ``2^log2_total``.

        Args:
            factors: [n], the factor of each drawn path.
        """
        factors = factors.double()
        if factors.shape != self.log2_value.shape or not len(factors):
            raise ValueError(f"Paths.estimate: factors: wanted [{len(self.log2_value)}], got {list(factors.shape)}")
        error = float(factors.std()) / math.sqrt(len(factors)) if len(factors) > 1 else math.inf
        return float(factors.mean()), error


@undisturbed
def sample_paths(
    network: PathNetwork,
    n: int,
    *,
    power: int = 1,
    seed: int = 0,
    source: Tensor | Sequence[Tensor] | None = None,
    policy: str | Policy = "paths",
) -> Paths:
    """Draws ``n`` paths with probability ``|v|^power / R``, alternately ahead and back. The same seed, the same paths.

    Args:
        network: read from a module, or made by hand.
        n: how many, at least 1; a path may be drawn more than once.
        power: 1 or 2.
        source: the flow at the inputs (as it is, not raised to the power); None: ones.
        policy: biases must be dropped and max-pools summed: every path begins at an input.

    Raises:
        ValueError: no path at all; products of flows (gates computed from data); another power; n below 1.
    """
    if not isinstance(network, PathNetwork):
        raise TypeError(f"sample_paths: network: wanted a PathNetwork, got {type(network).__name__}")
    if not isinstance(n, int):
        raise TypeError(f"sample_paths: n: wanted an int, got {n!r}")
    seed = seed_of(seed, "sample_paths")
    if n < 1:
        raise ValueError(f"sample_paths: n: wanted at least 1, got {n}")
    return PathSampler(network, power=power, seed=seed, source=source, policy=policy).paths(0, n)


@dataclass(frozen=True)
class _Way:
    """An input of a node, element by element: which elements it links, with which factor."""

    source: int
    target: int
    slot: int
    ahead: Table | None  # rows: elements of the source; None: a synapse
    back: Table | None
    factors: Tensor | None  # of the links of ``ahead``, log2
    back_factors: Tensor | None


@dataclass
class _Crowd:
    """Walkers at one node."""

    who: Tensor
    element: Tensor


class PathSampler:
    """Walks over elements of a network, in proportion to flow. See :func:`sample_paths`."""

    def __init__(
        self,
        network: PathNetwork,
        *,
        power: int = 1,
        seed: int = 0,
        source: Tensor | Sequence[Tensor] | None = None,
        policy: str | Policy = "paths",
    ) -> None:
        if power not in _MAPS:
            raise ValueError(f"sample_paths: power: wanted 1 or 2, got {power}")
        chosen = policy_of(policy)
        if chosen.biases != "drop" or chosen.max_pool != "sum":
            raise ValueError(f"sample_paths: policy: wanted biases dropped and max-pools summed, got {chosen}")
        self.network, self.power, self.seed = network, power, seed
        wide = copy.copy(network)
        wide.tensors = {name: _wide(tensor) for name, tensor in network.tensors.items()}
        with one_thread():
            self.flow = _flow(wide, power, chosen, source)
        self.log2_total = float(self.flow.log2_total)
        if self.log2_total == -math.inf:
            raise ValueError("sample_paths: wanted a network with a path from input to output, got none")
        self._weights = {
            name: wide.tensors[name]
            for name in {network.nodes[k].weight for k in network.synapses()}  # type: ignore[attr-defined]
        }
        self._order = [k for k in sorted(network.alive) if self._carries(k)]
        self._ways: dict[int, list[_Way]] = {k: [] for k in self._order}  # ahead
        self._inputs: dict[int, list[_Way]] = {k: [] for k in self._order}
        with one_thread():
            for k in self._order:
                self._read(k)
            self._branches = {(k, ahead): self._branch(k, ahead) for k in self._order for ahead in (True, False)}
            self._starts = {ahead: self._start_table(ahead) for ahead in (True, False)}
        self.columns = {k: column for column, k in enumerate(k for k in self._order if self._is_synapse(k))}
        self.names = tuple(network.nodes[k].weight for k in self.columns)  # type: ignore[attr-defined]

    def _carries(self, k: int) -> bool:
        return bool(self.flow.values[k].tensor.any()) or isinstance(self.network.nodes[k], kinds.Input)

    def _is_synapse(self, k: int) -> bool:
        return isinstance(self.network.nodes[k], Synapse)

    # ------------------------------------------------------------------------------------------------- tables

    def _read(self, k: int) -> None:
        node = self.network.nodes[k]
        if isinstance(node, kinds.Product):
            raise ValueError(f"sample_paths: '{node.where}' multiplies two flows: its paths have no probabilities")
        for slot, i in enumerate(node.inputs):
            if i not in self._ways:
                continue
            if self._is_synapse(k):
                way = _Way(i, k, slot, None, None, None, None)
            else:
                pairs, factors = links_of(self.network, k, slot, self.power, self._factor(k, node))
                way = self._way(k, node, slot, i, pairs, factors)
            self._ways[i].append(way)
            self._inputs[k].append(way)

    def _way(self, k: int, node: Node, slot: int, i: int, pairs: Tensor, factors: Tensor) -> _Way:
        """Tables of both directions from links (source element, target element) and their factors."""
        entering, leaving = self.network.nodes[i].shape.numel(), node.shape.numel()
        a, g = self.flow.values[i].tensor.flatten(), self.flow.backward_flows[k].tensor.flatten()
        ahead, order = _rows(pairs[:, 0], pairs[:, 1], factors * g[pairs[:, 1]], entering)
        back, back_order = _rows(pairs[:, 1], pairs[:, 0], factors * a[pairs[:, 0]], leaving)
        return _Way(i, k, slot, ahead, back, factors[order].log2(), factors[back_order].log2())

    def _factor(self, k: int, node: Node) -> Tensor | None:
        """What an elementwise node multiplies with."""
        if isinstance(node, kinds.Norm):
            before, after = self.flow.values[node.inputs[0]], self.flow.values[k]
            scale = 2.0 ** float(after.exponent - before.exponent)
            return torch.where(before.tensor > 0, after.tensor / before.tensor * scale, 0.0)
        return self.flow.constant(k) if isinstance(node, kinds.Scale) else None

    def _branch(self, k: int, ahead: bool) -> Table | None:
        """Which way a walker takes from each element of a node, in proportion to the flow along it."""
        ways = self._ways[k] if ahead else self._inputs[k]
        if len(ways) + (ahead and k in self.network.outputs) <= 1:
            return None
        if ahead:
            parts = [self.flow.input_flows[way.target, way.slot] for way in ways]
            if k in self.network.outputs:
                parts.append(Scaled(torch.ones_like(self.flow.values[k].tensor), torch.zeros(1, dtype=torch.int64)))
        else:
            parts = [self._entered(way) for way in ways]
        top = max(int(part.exponent) for part in parts)
        columns = [part.tensor.flatten() * 2.0 ** max(int(part.exponent) - top, -1022) for part in parts]
        weights = torch.stack(columns, 1)
        start = torch.arange(len(weights) + 1) * len(parts)
        return Table.of(weights.flatten(), start, torch.arange(len(parts)).repeat(len(weights)))

    def _entered(self, way: _Way) -> Scaled:
        """What enters a node along one input, at the node's elements."""
        assert way.back is not None
        assert way.back_factors is not None
        value = self.flow.values[way.source]
        amount = value.tensor.flatten()[way.back.choices] * way.back_factors.exp2()
        size = self.network.nodes[way.target].shape.numel()
        row = torch.repeat_interleave(torch.arange(size), way.back.row_start.diff())
        return Scaled(torch.zeros(size, dtype=torch.float64).index_add(0, row, amount), value.exponent)

    def _start_table(self, ahead: bool) -> tuple[Table, Tensor]:
        """All elements of the inputs (or outputs) in proportion to what passes them; and the node of each."""
        nodes = self.network.nodes
        ends = [k for k in self._order if isinstance(nodes[k], kinds.Input)]
        ends = ends if ahead else [k for k in dict.fromkeys(self.network.outputs) if k in self._ways]
        amounts = []
        for k in ends:
            a = self.flow.values[k]
            if ahead:
                g = self.flow.backward_flows.get(k)
                if g is None:
                    amounts.append(Scaled(torch.zeros_like(a.tensor).flatten(), a.exponent))
                    continue
                amounts.append(Scaled((a.tensor * g.tensor).flatten(), a.exponent + g.exponent))
            else:
                amounts.append(Scaled(a.tensor.flatten(), a.exponent))
        top = max(int(amount.exponent) for amount in amounts)
        weights = torch.cat([x.tensor * 2.0 ** max(int(x.exponent) - top, -1022) for x in amounts])
        node = torch.repeat_interleave(torch.tensor(ends), torch.tensor([len(x.tensor) for x in amounts]))
        element = torch.cat([torch.arange(len(x.tensor)) for x in amounts])
        return Table.of(weights, torch.tensor([0, len(weights)]), element), node

    # ------------------------------------------------------------------------------------------------ walking

    def paths(self, first: int, count: int) -> Paths:
        """Walks ``first``, ``first + 1``, ...: even ones ahead, odd ones back."""
        taken = torch.full((len(self.columns), count), -1, dtype=torch.int64)
        value = torch.zeros(count, dtype=torch.float64)
        squares = torch.zeros(count, dtype=torch.float64)
        walks = torch.arange(first, first + count)
        for ahead in (True, False):
            mine = (walks % 2 == (0 if ahead else 1)).nonzero().flatten()
            if len(mine):
                self._walk(walks, mine, ahead, taken, value, squares)
        return Paths(taken.t().contiguous(), self.names, value, self.log2_total, squares)

    def _walk(self, walks: Tensor, who: Tensor, ahead: bool, taken: Tensor, value: Tensor, squares: Tensor) -> None:
        arrived: dict[int, list[_Crowd]] = {}
        table, node = self._starts[ahead]
        step = len(self.network.nodes)
        place = self._choose(table, torch.zeros_like(who), walks[who], step, walk_ops.UNIT)
        for k in node.unique().tolist():
            here = (node[place] == k).nonzero().flatten()
            if len(here):
                crowd = _Crowd(who[here], table.choices[place[here]])
                arrived[k] = [crowd]
                if ahead:
                    self._pay_source(k, crowd, value)
        for k in self._order if ahead else reversed(self._order):
            if k not in arrived:
                continue
            parts = arrived.pop(k)
            crowd = _Crowd(torch.cat([p.who for p in parts]), torch.cat([p.element for p in parts]))
            if not ahead and isinstance(self.network.nodes[k], kinds.Input):
                self._pay_source(k, crowd, value)
            self._leave(k, crowd, walks, ahead, arrived, taken, value, squares)

    def _pay_source(self, k: int, crowd: _Crowd, value: Tensor) -> None:
        a = self.flow.values[k]
        value[crowd.who] += a.tensor.flatten()[crowd.element].log2() + a.exponent

    def _choose(self, table: Table, rows: Tensor, walks: Tensor, step: int, word: int) -> Tensor:
        drawn = walk_ops.walk_choose(table.cdf, table.row_start, rows, walks, seed=self.seed, step=step, word=word)
        return table.row_start[rows] + drawn

    def _leave(
        self,
        k: int,
        crowd: _Crowd,
        walks: Tensor,
        ahead: bool,
        arrived: dict[int, list[_Crowd]],
        taken: Tensor,
        value: Tensor,
        squares: Tensor,
    ) -> None:
        ways = self._ways[k] if ahead else self._inputs[k]
        branch = self._branches[k, ahead]
        choice = None
        if branch is not None:
            choice = branch.choices[self._choose(branch, crowd.element, walks[crowd.who], k, walk_ops.BRANCH)]
        for place, way in enumerate(ways):
            mine = crowd
            if choice is not None:
                here = (choice == place).nonzero().flatten()
                mine = _Crowd(crowd.who[here], crowd.element[here])
            if not len(mine.who):
                continue
            if way.ahead is None:
                onward = self._step(way, mine, walks, ahead, taken, value, squares)
            else:
                table, factors = (way.ahead, way.factors) if ahead else (way.back, way.back_factors)
                assert table is not None
                assert factors is not None
                at = self._choose(table, mine.element, walks[mine.who], way.target, walk_ops.FLATTEN)
                value[mine.who] += factors[at]
                onward = table.choices[at]
            arrived.setdefault(way.target if ahead else way.source, []).append(_Crowd(mine.who, onward))

    def _step(
        self, way: _Way, crowd: _Crowd, walks: Tensor, ahead: bool, taken: Tensor, value: Tensor, squares: Tensor
    ) -> Tensor:
        """Through a synapse; returns the element that is reached."""
        node = self.network.nodes[way.target]
        assert isinstance(node, Synapse)
        before = self.network.nodes[way.source].shape
        flow = self.flow.backward_flows[way.target] if ahead else self.flow.values[way.source]
        near, far = (before, node.shape) if ahead else (node.shape, before)
        weight = self._weights[node.weight]
        unit, at = unit_and_position(node, crowd.element, near)
        target, position, edge = walk_ops.walk_field_step(
            weight.reshape(weight_shape(node, weight.shape)),
            unit,
            at,
            walks[crowd.who],
            by_unit(node, flow.tensor, far),
            leads_to(node, before, weight.shape, ahead),
            to_rows=(node.form in ("linear", "conv")) == ahead,
            seed=self.seed,
            step=way.target,
            power=self.power,
        )
        taken[self.columns[way.target], crowd.who] = edge
        size = weight.flatten()[edge].abs()
        value[crowd.who] += self.power * size.log2()
        squares[crowd.who] += size**-2
        return element_of(node, target, position, far)


class FlowWalks(WalkMasks):
    """Masks from whole paths drawn in proportion to their value."""

    def __init__(
        self, network: PathNetwork, names: Sequence[str], power: int, seed: int, policy: str | Policy = "paths"
    ) -> None:
        super().__init__(network, names, seed)
        self._sampler = PathSampler(network, power=power, seed=seed, policy=policy)
        counted = [column for column, name in enumerate(self._sampler.names) if name in self.offsets]
        self._counted = torch.tensor(counted, dtype=torch.int64)
        first = [self.offsets[self._sampler.names[column]] for column in counted]
        self._first = torch.tensor(first, dtype=torch.int64)
        self.width = max(len(counted), 1)

    def steps(self, first: int, count: int) -> Tensor:
        weights = self._sampler.paths(first, count).weights[:, self._counted]
        return torch.where(weights >= 0, weights + self._first, -1).to(self.device)

    def _chances(self) -> dict[str, Tensor]:
        """P(a path takes a weight): its score over R."""
        flow, total = self._sampler.flow, self._sampler.log2_total
        made = {name: flow.weights[name].written_scores() for name in self.names if name in flow.weights}
        return {name: (scores.weight * 2.0 ** (scores.exponent - total)).flatten() for name, scores in made.items()}

    def expected(self) -> Callable[[float], float]:
        chances = list(self._chances().values())

        def taken(n: float) -> float:
            if n == math.inf:
                return float(sum(int((q > 0).sum()) for q in chances))
            return sum(float(-torch.expm1(-n * q).sum()) for q in chances)

        return taken

    def limit(self) -> tuple[float, list[str]]:
        chances = self._chances()
        cannot = {name: int((chances[name] == 0).sum()) if name in chances else -1 for name in self.names}
        names = [f"{name} ({count:,})" if count > 0 else f"{name} (all)" for name, count in cannot.items() if count]
        return float(sum(int((q > 0).sum()) for q in chances.values())), names


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


class _KeptFlow(PathFlow):
    """Forward and backward flow with everything kept."""

    log2_total: Tensor


def _flow(network: PathNetwork, power: int, policy: Policy, source: Any) -> _KeptFlow:
    synapses = [node for k in network.synapses() if isinstance(node := network.nodes[k], Synapse)]
    scratch = Scratch()
    f = _MAPS[power]
    weights = {
        node.weight: Weight(
            node.weight,
            network.tensors[node.weight],
            node,
            f=f,
            s=f,
            uses=sum(other.weight == node.weight for other in synapses),
            scored=node.weight in network.prunable,
            scratch=scratch,
        )
        for node in reversed(synapses)
    }
    flow = _KeptFlow(network, weights, f=f, policy=policy, source=source)
    flow.keep_flows = True
    flow.log2_total = flow.forward()[0]
    flow.backward()
    return flow


def _rows(row: Tensor, choice: Tensor, weights: Tensor, rows: int) -> tuple[Table, Tensor]:
    """A table from (row, choice, weight) triples in any order, and the order they were put in."""
    order = torch.argsort(row, stable=True)
    start = torch.zeros(rows + 1, dtype=torch.int64)
    start[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return Table.of(weights[order].double(), start, choice[order]), order
