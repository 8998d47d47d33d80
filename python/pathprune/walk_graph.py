"""Where a walk can go: the units of every tensor of a path network, and what links them.

A walk moves over units: the channels that leave a convolution, the features that leave a linear layer. Between two
synapses it passes gates, pools, reshapes and sums; each tensor there is cut into the sets of elements that come from
the same unit, so a flattened channel is the block of features that its elements became, whatever the operators were.

Found from shapes alone, by sending labels through the wires: a wire is linear, so labels, their squares and ones tell
for every element whether one unit alone reaches it, and which. Oracle: enumeration of paths over elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import nodes as kinds
from .network import PathNetwork
from .nodes import Node, Synapse
from .pooling import pooled

_MIXING_LIMIT = 1 << 28  # units times elements up to which a wire that mixes units is looked at unit by unit


@dataclass(frozen=True)
class Links:
    """For each unit on one side, the units on the other: ``targets[start[u] : start[u + 1]]``, ascending."""

    start: Tensor  # [units + 1] int64
    targets: Tensor  # [links] int64

    @staticmethod
    def of(source: Tensor, target: Tensor, units: int) -> Links:
        """From pairs (source[n], target[n]), of which some may be equal."""
        targets = int(target.max()) + 1 if target.numel() else 1
        pairs = torch.unique(source * targets + target)
        counts = torch.bincount(pairs // targets, minlength=units)
        return Links(torch.cat((counts.new_zeros(1), counts.cumsum(0))), pairs % targets)

    @staticmethod
    def identity(units: int) -> Links:
        return Links(torch.arange(units + 1), torch.arange(units))

    @property
    def counts(self) -> Tensor:
        return self.start.diff()

    @cached_property
    def is_identity(self) -> bool:
        units = torch.arange(len(self.start))
        return torch.equal(self.start, units) and torch.equal(self.targets, units[:-1])

    def reduced(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the targets of each unit."""
        if self.is_identity:
            return values[: len(self.targets)]
        source = torch.repeat_interleave(torch.arange(len(self.start) - 1), self.counts)
        return torch.zeros(len(self.start) - 1, dtype=values.dtype).index_add_(0, source, values[self.targets])

    def only(self, allowed: Tensor) -> Links:
        """The links to allowed targets."""
        if bool(allowed.all()):
            return self
        source = torch.repeat_interleave(torch.arange(len(self.start) - 1), self.counts)
        keep = allowed[self.targets]
        counts = torch.bincount(source[keep], minlength=len(self.start) - 1)
        return Links(torch.cat((counts.new_zeros(1), counts.cumsum(0))), self.targets[keep])


@dataclass(frozen=True)
class Edge:
    """From the units that leave ``source`` to those that enter ``target`` (at its ``slot``-th input)."""

    source: int
    target: int
    slot: int
    ahead: Links  # from units of the source to units of the target
    back: Links  # and the other way


@dataclass(frozen=True)
class Site:
    """A synapse as walks see it."""

    node: int
    weight: str
    shape: tuple[int, int, int, int]  # [G, R, C, E]: groups, rows, columns, kernel entries
    forward_to_rows: bool  # whether a forward walk goes from columns to rows
    valid: Tensor | None  # [E] bool: the kernel entries that meet the image anywhere; None: all

    @property
    def entering(self) -> int:
        """How many units enter."""
        return self.shape[0] * self.shape[2 if self.forward_to_rows else 1]

    @property
    def leaving(self) -> int:
        return self.shape[0] * self.shape[1 if self.forward_to_rows else 2]


@dataclass
class WalkGraph:
    """The units and links of a network.

    Attributes:
        order: live nodes in topological order, constants left out.
        units: node -> how many units leave it.
        sites: node -> its synapse.
        ahead, back: node -> its outgoing and its incoming edges.
        alive_ahead: node -> [units] bool: whether an output can be reached from the units that leave it.
        alive_back: node -> [units] bool: whether an input reaches them.
        skips: (target, slot) of the inputs of sums that are identity skips.
    """

    order: list[int] = field(default_factory=list)
    units: dict[int, int] = field(default_factory=dict)
    sites: dict[int, Site] = field(default_factory=dict)
    ahead: dict[int, list[Edge]] = field(default_factory=dict)
    back: dict[int, list[Edge]] = field(default_factory=dict)
    alive_ahead: dict[int, Tensor] = field(default_factory=dict)
    alive_back: dict[int, Tensor] = field(default_factory=dict)
    skips: set[tuple[int, int]] = field(default_factory=set)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    @cached_property
    def all_alive(self) -> bool:
        """Whether every unit is on a path, also where it enters a synapse."""
        units = [alive for side in (self.alive_ahead, self.alive_back) for alive in side.values()]
        entered = [edge.back.counts > 0 for edges in self.back.values() for edge in edges]
        return all(bool(alive.all()) for alive in units + entered)

    def enters(self, edge: Edge) -> int:
        """How many units there are at the end of an edge."""
        return self.sites[edge.target].entering if edge.target in self.sites else self.units[edge.target]


def walk_graph(network: PathNetwork) -> WalkGraph:
    """The units and links of a network; read once for as long as the network has the same nodes.

    Raises:
        ValueError: a wire mixes too many units to tell which element comes from which.
    """
    size = len(network.nodes), tuple(network.outputs)
    read = _READ.get(network)
    if read is None or read[0] != size:
        read = _READ[network] = size, _Reader(network).run()
    return read[1]


_READ: WeakKeyDictionary[PathNetwork, tuple[Any, WalkGraph]] = WeakKeyDictionary()


class _Reader:
    def __init__(self, network: PathNetwork) -> None:
        self.network = network
        self.graph = WalkGraph()
        self.labels: dict[int, Tensor] = {}  # node -> the unit of every element of its value; -1 for none

    def run(self) -> WalkGraph:
        graph, nodes = self.graph, self.network.nodes
        reached: set[int] = set()  # nodes that an input reaches; constants and what only they feed carry no walks
        for k in sorted(self.network.alive):
            node = nodes[k]
            slots = [slot for slot, i in enumerate(node.inputs) if i in reached]
            if (not slots and not isinstance(node, kinds.Input)) or isinstance(node, kinds.Softmax):
                continue  # walks pass attention from values on, not from what is asked
            reached.add(k)
            graph.order.append(k)
            graph.ahead[k], graph.back[k] = [], []
            getattr(self, f"_{type(node).__name__.lower()}")(k, node, slots)
        graph.inputs = [k for k in graph.order if isinstance(nodes[k], kinds.Input)]
        graph.outputs = [k for k in self.network.outputs if k in reached]
        _find_alive(graph)
        graph.skips = _identity_skips(graph, nodes)
        return graph

    # -------------------------------------------------------------------------------------------------- nodes

    def _input(self, k: int, node: Node, slots: list[int]) -> None:
        axis = 1 if len(node.shape) != 3 or self._feeds_convolution(k) else 2
        self._label(k, _axis_labels(node.shape, min(axis, len(node.shape) - 1)))

    def _feeds_convolution(self, k: int) -> bool:
        """Whether the first synapse that reads this flow is a convolution."""
        seen = {k}
        for i in range(k + 1, len(self.network.nodes)):
            node = self.network.nodes[i]
            if i in self.network.alive and seen & set(node.inputs):
                if isinstance(node, Synapse):
                    return node.form.startswith("conv")
                seen.add(i)
        return False

    def _synapse(self, k: int, node: Synapse, slots: list[int]) -> None:
        before = self.network.nodes[node.inputs[0]].shape
        site = _site(k, node, before, self.network.tensors[node.weight].shape)
        self.graph.sites[k] = site
        self._link(k, 0, self.labels[node.inputs[0]], _unit_labels(before, node), site.entering)
        self._label(k, _unit_labels(node.shape, node))

    def _same(self, k: int, node: Node, slots: list[int]) -> None:
        """Elementwise nodes, sums and products: the coarsest units finer than all that enter."""
        entering = [self.labels[node.inputs[slot]].expand(node.shape) for slot in slots]
        labels = entering[0]
        if any(not torch.equal(labels, other) for other in entering[1:]):
            rows = torch.stack([e.flatten() for e in entering], 1)
            labels = torch.unique(rows, dim=0, return_inverse=True)[1].reshape(node.shape)
        self._label(k, labels)
        for slot, own in zip(slots, entering, strict=True):
            self._link(k, slot, own, labels, self.graph.units[k])

    _scale = _shift = _norm = _gate = _sum = _same

    def _product(self, k: int, node: kinds.Product, slots: list[int]) -> None:
        """Elementwise, or a matrix product: linear in each factor, the other held."""
        if node.apply is torch.mul:
            return self._same(k, node, slots)
        held = []  # what the other factor is
        for i in node.inputs:
            partner, ones = self.network.nodes[i], torch.ones((), dtype=torch.float64)
            value = partner.weights(self.network.tensors).cpu() if isinstance(partner, kinds.Softmax) else ones
            held.append(value.expand(partner.shape))

        def apply(slot: int, flow: Tensor) -> Tensor:
            return node.apply(*(flow if j == slot else other for j, other in enumerate(held)))

        return self._through(k, node, slots, apply)

    def _pool(self, k: int, node: kinds.Pool, slots: list[int]) -> None:
        self._through(k, node, slots, lambda slot, x: pooled(x, replace(node, divisor=None), 1.0, "sum"))

    def _reduce(self, k: int, node: kinds.Reduce, slots: list[int]) -> None:
        self._through(k, node, slots, lambda slot, x: x.sum(node.dims, keepdim=node.keepdim))

    def _wire(self, k: int, node: kinds.Wire, slots: list[int]) -> None:
        zeros = [torch.zeros(self.network.nodes[i].shape, dtype=torch.float64) for i in node.inputs]

        def apply(slot: int, flow: Tensor) -> Tensor:
            return node.apply([flow if j == slot else zero for j, zero in enumerate(zeros)], 1.0)

        self._through(k, node, slots, apply)

    # ------------------------------------------------------------------------------------------------- labels

    def _label(self, k: int, labels: Tensor) -> None:
        self.labels[k] = labels
        self.graph.units[k] = int(labels.max()) + 1 if labels.numel() else 0

    def _link(self, k: int, slot: int, source: Tensor, target: Tensor, entering: int) -> None:
        """Links the units of an input to those at the same elements of ``target``."""
        i = self.network.nodes[k].inputs[slot]
        source = source.expand(target.shape)
        if self.graph.units[i] == entering and torch.equal(source, target) and bool((target >= 0).all()):
            same = Links.identity(entering)
            return self._add_edge(Edge(i, k, slot, same, same))
        live = (source >= 0) & (target >= 0)
        return self._add_pairs(i, k, slot, source[live], target[live], entering)

    def _add_pairs(self, i: int, k: int, slot: int, source: Tensor, target: Tensor, entering: int) -> None:
        ahead = Links.of(source, target, self.graph.units[i])
        self._add_edge(Edge(i, k, slot, ahead, Links.of(target, source, entering)))

    def _add_edge(self, edge: Edge) -> None:
        self.graph.ahead[edge.source].append(edge)
        self.graph.back[edge.target].append(edge)

    def _through(self, k: int, node: Node, slots: list[int], apply: Callable[[int, Tensor], Tensor]) -> None:
        """A map that is linear in each input, told by what it makes of labels: ``apply(slot, flow)``."""
        shapes = [self.network.nodes[i].shape for i in node.inputs]

        def made(slot: int, flow: Tensor) -> Tensor:
            return apply(slot, flow).reshape(node.shape)

        keys = torch.full(node.shape, -1, dtype=torch.int64)
        offset = 0
        for slot in slots:
            own = self.labels[node.inputs[slot]].expand(shapes[slot])
            there = (own >= 0).double()
            label = own.double() * there
            share, total, squares = (made(slot, flow) for flow in (there, label, label * label))
            mean = torch.where(share > 0, total / share, 0.0).round()
            pure = (total - mean * share).abs() <= 1e-9 * (share + total)
            pure &= (squares - mean * mean * share).abs() <= 1e-9 * (share + squares)
            touched = share > 0
            if bool((touched & ~pure).any()) or bool((touched & (keys >= 0)).any()):
                return self._mixing(k, node, slots, made)
            keys = torch.where(touched, mean.to(torch.int64) + offset, keys)
            offset += self.graph.units[node.inputs[slot]]
        used = torch.zeros(offset + 1, dtype=torch.bool)
        used[keys.flatten()] = True  # -1 is the last place
        number = torch.where(used, used.cumsum(0) - 1, -1)
        number[offset] = -1
        found = used[:offset].nonzero().flatten()
        self._label(k, number[keys])
        self.graph.units[k] = len(found)
        offset = 0
        for slot in slots:
            units = self.graph.units[node.inputs[slot]]
            mine = ((found >= offset) & (found < offset + units)).nonzero().flatten()
            self._add_pairs(node.inputs[slot], k, slot, found[mine] - offset, mine, len(found))
            offset += units
        return None

    def _mixing(self, k: int, node: Node, slots: list[int], made: Callable[[int, Tensor], Tensor]) -> None:
        """Elements that several units reach: those that the same units reach are one unit."""
        total = sum(self.graph.units[node.inputs[slot]] for slot in slots)
        if total * math.prod(node.shape) > _MIXING_LIMIT:
            raise ValueError(
                f"walk: '{node.where}' mixes {total} units into {tuple(node.shape)}: too many to tell them apart"
            )
        reached: list[Tensor] = []
        for slot in slots:
            own = self.labels[node.inputs[slot]].expand(self.network.nodes[node.inputs[slot]].shape)
            for unit in range(self.graph.units[node.inputs[slot]]):
                reached.append(made(slot, (own == unit).double()).flatten() != 0)
        table = torch.stack(reached)  # [units, elements]
        kinds_of_element, inverse = torch.unique(table, dim=1, return_inverse=True)
        self._label(k, inverse.reshape(node.shape))
        offset = 0
        for slot in slots:
            units = self.graph.units[node.inputs[slot]]
            source, target = kinds_of_element[offset : offset + units].nonzero(as_tuple=True)
            self._add_pairs(node.inputs[slot], k, slot, source, target, kinds_of_element.shape[1])
            offset += units


def _unit_labels(shape: torch.Size, node: Synapse) -> Tensor:
    """The unit of every element of a flow that enters or leaves a synapse."""
    if node.form.startswith("experts"):  # [1, experts, rows, units]
        units = torch.arange(shape[1] * shape[3]).reshape(shape[1], 1, shape[3])
        return units.expand(shape)
    return _axis_labels(shape, 1 if node.form.startswith("conv") else len(shape) - 1)


def _axis_labels(shape: torch.Size, axis: int) -> Tensor:
    view = [1] * len(shape)
    view[axis] = -1
    return torch.arange(shape[axis]).reshape(view).expand(shape)


def _site(k: int, node: Synapse, before: torch.Size, weight: torch.Size) -> Site:
    """The weight as [G, R, C, E], and which kernel entries meet the image at any position."""
    if not node.form.startswith("conv"):
        return Site(k, node.weight, (*(weight[:-2] or (1,)), *weight[-2:], 1), not node.form.endswith("_t"), None)
    transposed = node.form == "conv_transpose"
    entries = math.prod(weight[2:])
    shape = (node.groups, weight[0] // node.groups, weight[1], entries)
    # Position p of the one side meets kernel entry e at p * stride - padding + e * dilation of the other.
    near, far = (before, node.shape) if transposed else (node.shape, before)
    valid = torch.ones((), dtype=torch.bool)
    for axis, size in enumerate(weight[2:]):
        starts = torch.arange(near[2 + axis]) * node.stride[axis] - node.padding[axis]
        met = starts[:, None] + torch.arange(size) * node.dilation[axis]  # [positions, kernel]
        valid = valid[..., None] & ((met >= 0) & (met < far[2 + axis])).any(0)
    flat = valid.flatten()
    return Site(k, node.weight, shape, not transposed, None if bool(flat.all()) else flat)


def _find_alive(graph: WalkGraph) -> None:
    """Which units lie on a way from an input to an output."""
    for k in reversed(graph.order):
        alive = torch.full((graph.units[k],), k in graph.outputs)
        for edge in graph.ahead[k]:
            alive |= edge.ahead.reduced(_entered_alive(graph, edge.target).long()) > 0
        graph.alive_ahead[k] = alive
    for k in graph.order:
        entered = torch.full((graph.units[k] if k not in graph.sites else graph.sites[k].entering,), k in graph.inputs)
        for edge in graph.back[k]:
            entered |= edge.back.reduced(graph.alive_back[edge.source].long()) > 0
        if k in graph.sites:
            entered = _across(graph.sites[k], entered, graph.sites[k].leaving)
        graph.alive_back[k] = entered


def _entered_alive(graph: WalkGraph, k: int) -> Tensor:
    """From which of the units that enter a node an output can be reached."""
    if k not in graph.sites:
        return graph.alive_ahead[k]
    return _across(graph.sites[k], graph.alive_ahead[k], graph.sites[k].entering)


def _across(site: Site, alive: Tensor, units: int) -> Tensor:
    """A unit of a group is alive if any on the other side of the group is, and some kernel entry is valid."""
    some = alive.reshape(site.shape[0], -1).any(1, keepdim=True)
    if site.valid is not None and not bool(site.valid.any()):
        some = torch.zeros_like(some)
    return some.expand(site.shape[0], units // max(site.shape[0], 1)).flatten()


def _identity_skips(graph: WalkGraph, nodes: Sequence[Node]) -> set[tuple[int, int]]:
    """Inputs of sums that carry, past no synapse, a flow which another input of the sum also comes from."""
    ancestors: dict[int, set[int]] = {}
    free: dict[int, set[int]] = {}  # ancestors past no synapse
    skips: set[tuple[int, int]] = set()
    for k in graph.order:
        sources = [edge.source for edge in graph.back[k]]
        ancestors[k] = {k}.union(*(ancestors[i] for i in sources))
        free[k] = {k} if k in graph.sites else {k}.union(*(free[i] for i in sources))
        if isinstance(nodes[k], kinds.Sum):
            for edge in graph.back[k]:
                others = [e.source for e in graph.back[k] if e.slot != edge.slot]
                if any(free[edge.source] & ancestors[i] for i in others):
                    skips.add((k, edge.slot))
    return skips
