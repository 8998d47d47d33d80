"""Path flow through a supernet for many architectures at once: each is a choice of switches that are open.

A supernet is a ``PathNetwork`` whose ``Scale`` nodes of kind ``switch`` let the flow of some architectures pass and end
that of the others. All architectures share its weights, so they are the rows of one product: a weight is read once for
all of them. Nothing is computed for an architecture that a node does not matter to (no path leads to it, or none on
from it), and nothing twice: at every node, architectures that agree on all that lies before share a row. Which rows
those are is decided before any flow, from the switches alone.

Forward flow is all a network's total needs. With R the sum over paths of their values, the sum of all weights' scores
is the derivative of R along the weights: each path counted once for every weight on it. It travels beside the flow:

    a' = W a,    b' = W (a + b)           for the sum of scores: sum_ij f(w_ij) dR/df(w_ij)
    a' = U a,    b' = U b + 1 a           for the path kernel's trace: sum_ij dR_2/du_ij, u = w^2

so a layer costs two flows an architecture and no backward pass. Fixed linear maps serve both alike. For the sum of
scores c = a + b travels in place of b: then ``c' = W c + a'``, one product and an addition to what it wrote.

Numbers never overflow: each row has its exponent, weights are scaled by a power of two to row sums below 1 (so a layer
makes nothing larger, nor much smaller), sums bring their inputs to the largest exponent, and every few layers a row is
brought back to a maximum near 1. Biases and shifts begin no path. Gates are open.

Bytes: every feature map is written once and read once by each consumer, in the layout convolutions read fastest
(channels last); weights are read once a call. Rows are rounded up to a multiple of eight, because a convolution is
prepared anew for every size of batch it has not seen, which takes as long as some small ones.

Oracle: the same architectures one by one, by ``PathFlow`` in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import nodes as kinds
from .flow import POWERS, PathFlow
from .network import PathNetwork
from .ops import WeightMap
from .policy import Policy
from .pooling import pooled
from .reference import map_weight
from .scaled import NOTHING
from .weights import weights_of

DERIVATIVES = ("none", "weights", "squares")
_DRIFT = 6  # layers and sums after which rows are brought back to a maximum near 1
_MULTIPLE = 8  # rows are rounded up to so many, where there are several times more architectures


@dataclass(frozen=True)
class Totals:
    """One entry per architecture, float64 on the CPU.

    Attributes:
        log2_R: log2 of the sum over all paths; -inf where none is left.
        log2_slope: log2 of its derivative; -inf where no path has a weight. None where it was not asked for.
    """

    log2_R: Tensor
    log2_slope: Tensor | None


@dataclass
class _Rows:
    """A node's values for the architectures that need it: ``tensor * 2^exponent``."""

    tensor: Tensor  # [rows, ...]: ``count`` times 1 or 2 flows, then rows that do not count; feature maps channels last
    exponent: np.ndarray  # int64 [count]
    drift: int = 0  # layers and sums since the largest number of each row was near 1
    owned: bool = False  # read by one node only, which may write to it

    @property
    def count(self) -> int:
        return len(self.exponent)


@dataclass(frozen=True)
class _Plan:
    """Which row of a node each architecture reads, and of what the rows are made.

    Attributes:
        row: int64 [E]; -1: none.
        made_of: int64 [rows, inputs], the row of each input; -1: none.
    """

    row: np.ndarray
    made_of: np.ndarray

    @property
    def count(self) -> int:
        return len(self.made_of)


class RoutedFlow:
    """Totals of the architectures in a supernet.

    Args:
        network: a ``PathNetwork``; its nodes are inputs, synapses (linear, convolutions), scales, shifts, gates,
            average pools, sums, and wires that take any batch size.
        f: weight map of the flow; fixed constants are raised to its power.
        policy: of batch norms; biases are dropped whatever it says.
        derivative: ``none``; ``weights``, along f(w); ``squares``, along ones (with ``f`` = SQUARE: the path kernel's
            trace over the synapse weights).

    Raises:
        ValueError: a node of another kind; NaN weights or norms.
    """

    def __init__(self, network: PathNetwork, f: WeightMap, policy: Policy, derivative: str = "none") -> None:
        if derivative not in DERIVATIVES:
            raise ValueError(f"RoutedFlow: derivative: wanted one of {DERIVATIVES}, got {derivative!r}")
        self.network, self.derivative = network, derivative
        self.flows = 1 if derivative == "none" else 2
        self.power = POWERS[f]
        alive = [k for k in range(len(network.nodes)) if k in network.alive]
        for k in alive:
            _check_kind(network, k)
        plain = PathFlow(network, weights_of(network, (), (f, f)), f=f, policy=policy)
        self.dtype, self.device = plain.dtype, plain.device
        scales = [(k, node) for k in alive if isinstance(node := network.nodes[k], kinds.Scale)]
        self.switches = {k: node.where for k, node in scales if node.kind == "switch"}
        self._factors = {k: factor for k, _ in scales if (factor := plain.constant(k)) is not None}
        self._norms = self._norms_behind(alive)
        self._inputs, same = self._without_identities(alive)
        self._order = list(self._inputs)
        self._outputs = [same[k] for k in network.outputs]
        self._users = Counter(i for inputs in self._inputs.values() for i in inputs)
        self._users.update(self._outputs)
        pools = ((k, node) for k in self._order if isinstance(node := network.nodes[k], kinds.Pool))
        self._pools = {k: self._windows(node) for k, node in pools}
        self._map = f
        self._tensors: Mapping[str, Tensor] = network.tensors
        self._prepared: dict[int, tuple[Tensor, int]] = {}

    def _norms_behind(self, alive: Sequence[int]) -> dict[int, int]:
        """Synapse -> the scale that alone reads it, if it has one number a unit: it becomes part of the weight.

        A derivative along ones is not multiplied with f(w): there norms stay where they are.
        """
        users: dict[int, list[int]] = {}
        for k in alive:
            for i in self.network.nodes[k].inputs:
                users.setdefault(i, []).append(k)
        found = {}
        for k in alive if self.derivative != "squares" else ():
            node, user = self.network.nodes[k], users.get(k, [-1])[0]
            if not isinstance(node, kinds.Synapse) or len(users.get(k, ())) != 1 or user in self.switches:
                continue
            factor = self._factors.get(user)
            if factor is not None and factor.numel() == node.shape[_units(node)]:
                found[k] = user
        return found

    def _without_identities(self, alive: Sequence[int]) -> tuple[dict[int, tuple[int, ...]], dict[int, int]]:
        """``(the inputs of every node that does something, node -> the one whose value it has)``."""
        inputs: dict[int, tuple[int, ...]] = {}
        same: dict[int, int] = {}
        folded = set(self._norms.values())
        for k in alive:
            node = self.network.nodes[k]
            before = tuple(same[i] for i in node.inputs)
            plain_scale = isinstance(node, kinds.Scale) and (k in folded or k not in self._factors)
            if isinstance(node, (kinds.Gate, kinds.Shift)) or (plain_scale and k not in self.switches):
                same[k] = before[0]
            else:
                same[k], inputs[k] = k, before
        return inputs, same

    def use(self, tensors: Mapping[str, Tensor]) -> None:
        """Flows from now on through these weights (name -> tensor); norms stay as they are."""
        self._tensors, self._prepared = tensors, {}

    def _weight(self, k: int, node: kinds.Synapse) -> tuple[Tensor, int]:
        """f(w) times the norm behind it, times a power of two: row sums below 1. And that power's exponent."""
        if k not in self._prepared:
            w = map_weight(self._tensors[node.weight].detach().to(self.device, self.dtype), self._map)
            w = w.t() if node.form == "linear_t" else w
            if k in self._norms:
                w = w * self._factors[self._norms[k]].reshape(-1, *[1] * (w.dim() - 1))
            rows = w.flatten(1)
            largest = float(rows.sum(1).max())
            if self.derivative == "squares":  # sums of what enters are added
                largest = max(largest, rows.shape[1])
            exponent = math.frexp(largest)[1] if largest > 0 else 0
            w = w * 2.0**-exponent
            self._prepared[k] = w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w, exponent
        return self._prepared[k]

    def _windows(self, node: kinds.Node) -> tuple[Tensor, Tensor]:
        """An average pool as a convolution of each channel with ones, and what its sums are multiplied with."""
        assert isinstance(node, kinds.Pool)
        before = self.network.nodes[node.inputs[0]].shape
        ones = torch.ones((1, 1, *before[2:]), dtype=torch.float64)
        kernel = torch.ones((before[1], 1, *node.kernel), dtype=self.dtype, device=self.device)
        geometry = (node.stride, node.padding, node.dilation)
        counts = torch.conv2d(ones, torch.ones((1, 1, *node.kernel), dtype=torch.float64), None, *geometry)
        entries = pooled(ones, node, self.power, "sum") / counts
        return kernel, entries.to(self.device, self.dtype)

    # ---------------------------------------------------------------------------------------------- which rows

    def _planned(self, opened: Sequence[frozenset[str] | set[str]]) -> dict[int, _Plan]:
        """The rows of every node, and which architecture reads which."""
        count = len(opened)
        names = set(self.switches.values())
        by_name = {name: np.fromiter((name in on for on in opened), bool, count) for name in names}
        open_at = {k: by_name[name] for k, name in self.switches.items()}
        reached: dict[int, np.ndarray] = {}
        for k, inputs in self._inputs.items():
            any_of = reached[inputs[0]] if inputs else np.ones(count, bool)
            for i in inputs[1:]:
                any_of = any_of | reached[i]
            reached[k] = any_of & open_at[k] if k in open_at else any_of
        needed = {k: np.zeros(count, bool) for k in self._order}
        for k in self._outputs:
            needed[k] |= reached[k]
        for k in reversed(self._order):
            for i in self._inputs[k]:
                needed[i] |= needed[k] & reached[i]
        nobody = _Plan(np.full(count, -1), np.empty((0, 1), np.int64))
        plans: dict[int, _Plan] = {}
        for k in self._order:
            plans[k] = self._plan(self._inputs[k], needed[k], plans) if needed[k].any() else nobody
        return plans

    @staticmethod
    def _plan(inputs: tuple[int, ...], live: np.ndarray, plans: Mapping[int, _Plan]) -> _Plan:
        if not inputs:
            return _Plan(np.where(live, 0, -1), np.empty((1, 0), np.int64))
        before = plans[inputs[0]]
        if len(inputs) == 1 and np.array_equal(before.row >= 0, live):
            return before
        keys = np.stack([plans[i].row for i in inputs], 1)[live]
        if len(inputs) == 1:
            distinct, inverse = np.unique(keys[:, 0], return_inverse=True)
        else:
            distinct, inverse = np.unique(keys, axis=0, return_inverse=True)
        row = np.full(len(live), -1)
        row[live] = inverse.reshape(-1)
        return _Plan(row, distinct.reshape(-1, len(inputs)))

    # -------------------------------------------------------------------------------------------------- flow

    def run(self, opened: Sequence[frozenset[str] | set[str]]) -> Totals:
        """Forward flow of the architectures whose switches of these names are open."""
        plans = self._planned(opened)
        self._multiple = _MULTIPLE if len(opened) >= 4 * _MULTIPLE else 1
        values: dict[int, _Rows] = {}
        left = dict(self._users)
        total = torch.full((2, len(opened)), -torch.inf, dtype=torch.float64)
        with torch.no_grad():
            for k in self._order:
                plan, node = plans[k], self.network.nodes[k]
                if plan.count:
                    step = getattr(self, f"_{type(node).__name__.lower()}")
                    entering = [(values[i], plans[i]) if plans[i].count else None for i in self._inputs[k]]
                    values[k] = made = step(k, node, plan, entering)
                    made.owned = made.owned and self._users[k] == 1
                for i in self._inputs[k]:
                    left[i] -= 1
                    if not left[i]:
                        values.pop(i, None)
            for k in self._outputs:
                if plans[k].count:
                    self._add_total(total, values[k], plans[k])
        return Totals(total[0], total[1] if self.flows == 2 else None)

    def _add_total(self, total: Tensor, out: _Rows, plan: _Plan) -> None:
        amounts = self._by_row(out).double().reshape(out.count, self.flows, -1).sum(2).cpu().T  # [flows, count]
        if self.derivative == "weights":
            amounts[1] = (amounts[1] - amounts[0]).clamp(min=0)
        levels = amounts.log2() + torch.from_numpy(out.exponent)
        row = torch.from_numpy(plan.row)
        mine = torch.where(row >= 0, levels[:, row.clamp(min=0)], -torch.inf)
        total[: self.flows] = torch.logaddexp2(total[: self.flows], mine)

    def _taken(self, plan: _Plan, entering: tuple[_Rows, _Plan]) -> _Rows:
        """The rows of the one input that a node reads; the input's own where it reads them all."""
        x, before = entering
        if plan is before:
            return x
        source = plan.made_of[:, 0]
        if len(source) == before.count:  # sorted and distinct: all of them
            return x
        made = _Rows(self._like(x.tensor, len(source)), x.exponent[source], x.drift, owned=True)
        torch.index_select(self._by_row(x), 0, self._index(source), out=self._by_row(made))
        return made

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)

    def _factor(self, exponent: np.ndarray) -> Tensor:
        """``2^exponent`` [n, 1]."""
        return torch.from_numpy(np.ldexp(1.0, exponent)).to(self.device, self.dtype)[:, None]

    def _rounded(self, count: int) -> int:
        return -(-count // self._multiple) * self._multiple

    def _like(self, x: Tensor, count: int) -> Tensor:
        """Unwritten memory for ``count`` architectures, in the shape of x; rows that do not count are zeros."""
        rows, used = self._rounded(count) * self.flows, count * self.flows
        if x.dim() != 4:
            made = x.new_empty((rows, *x.shape[1:]))
            made[used:] = 0
            return made
        _, channels, height, width = x.shape
        made = x.new_empty((rows, height, width, channels))
        made[used:] = 0
        return made.permute(0, 3, 1, 2)

    def _by_row(self, x: _Rows) -> Tensor:
        """``[count, n]``, the same memory: feature maps are stored channels last."""
        flat = x.tensor.permute(0, 2, 3, 1) if x.tensor.dim() == 4 else x.tensor
        return flat[: x.count * self.flows].reshape(x.count, -1)

    def _input(self, k: int, node: kinds.Node, plan: _Plan, _: object) -> _Rows:
        shape = (self._rounded(1) * self.flows, *node.shape[1:])
        x = torch.ones(shape, dtype=self.dtype, device=self.device)
        if self.derivative == "squares":
            x[1::2] = 0
        return _Rows(_channels_last(x), np.zeros(1, np.int64))

    def _scale(self, k: int, node: kinds.Node, plan: _Plan, entering: list[tuple[_Rows, _Plan]]) -> _Rows:
        x = self._taken(plan, entering[0])
        if k in self.switches:
            return x
        return _Rows(_channels_last(x.tensor * self._factors[k]), x.exponent, x.drift + 1, owned=True)

    def _wire(self, k: int, node: kinds.Node, plan: _Plan, entering: list[tuple[_Rows, _Plan]]) -> _Rows:
        x = self._taken(plan, entering[0])
        made = node.apply([x.tensor], self.power)  # type: ignore[attr-defined]
        return _Rows(_channels_last(made), x.exponent, x.drift)

    def _pool(self, k: int, node: kinds.Node, plan: _Plan, entering: list[tuple[_Rows, _Plan]]) -> _Rows:
        assert isinstance(node, kinds.Pool)
        x, (kernel, entries) = self._taken(plan, entering[0]), self._pools[k]
        sums = torch.conv2d(x.tensor, kernel, None, node.stride, node.padding, node.dilation, x.tensor.shape[1])
        return _Rows(_channels_last(sums).mul_(entries), x.exponent, x.drift, owned=True)

    def _synapse(self, k: int, node: kinds.Node, plan: _Plan, entering: list[tuple[_Rows, _Plan]]) -> _Rows:
        assert isinstance(node, kinds.Synapse)
        (w, exponent), x = self._weight(k, node), self._taken(plan, entering[0])
        if x.drift >= _DRIFT:
            x = self._centred(x)
        y = self._product(x.tensor, w, node)
        if self.derivative == "weights":
            y[1::2] += y[::2]
        elif self.derivative == "squares":
            y[1::2] += self._summed(x.tensor[::2], w, node) * 2.0**-exponent
        return _Rows(y, x.exponent + exponent, x.drift + 1, owned=True)

    @staticmethod
    def _product(x: Tensor, w: Tensor, node: kinds.Synapse) -> Tensor:
        if w.dim() == 2:
            return x @ w.t()
        if max(w.shape[2:]) == 1 and node.groups == 1 and max(node.stride) == 1 and max(node.padding) == 0:
            return (x.permute(0, 2, 3, 1) @ w.flatten(1).t()).permute(0, 3, 1, 2)
        return _channels_last(torch.convolution(x, w, None, *kinds.geometry_of(node)))

    def _summed(self, x: Tensor, w: Tensor, node: kinds.Synapse) -> Tensor:
        """A product with ones: the same for all that leave a group."""
        if w.dim() == 2:
            return x.sum(1, keepdim=True)
        stride, padding, dilation, *_, groups = kinds.geometry_of(node)
        sums = x.unflatten(1, (groups, -1)).sum(2)
        ones = torch.ones((groups, 1, *w.shape[2:]), dtype=w.dtype, device=w.device)
        return torch.conv2d(sums, ones, None, stride, padding, dilation, groups).repeat_interleave(
            w.shape[0] // groups, 1
        )

    def _centred(self, x: _Rows) -> _Rows:
        """The same numbers, the largest of each row in [1/2, 1); zeros at an exponent that no sum goes by."""
        peak = np.frexp(self._by_row(x).amax(1).double().cpu().numpy())
        made = _Rows(self._like(x.tensor, x.count), np.where(peak[0] > 0, x.exponent + peak[1], NOTHING))
        torch.mul(self._by_row(x), self._factor(-peak[1]), out=self._by_row(made))
        return made

    def _sum(self, k: int, node: kinds.Node, plan: _Plan, entering: list[tuple[_Rows, _Plan] | None]) -> _Rows:
        parts = []  # (rows of an input, where they go, which they are)
        top = np.full(plan.count, NOTHING)
        for each, source in zip(entering, plan.made_of.T, strict=True):
            target = np.flatnonzero(source >= 0)
            if each is not None and len(target):
                parts.append((each[0], target, source[target]))
                top[target] = np.maximum(top[target], each[0].exponent[source[target]])
        made = _Rows(self._like(parts[0][0].tensor, plan.count), top, 1 + max(x.drift for x, _, _ in parts))
        rows = self._by_row(made)
        parts.sort(key=lambda part: -len(part[1]))
        if len(parts[0][1]) < plan.count:
            rows.zero_()
        for n, (x, target, source) in enumerate(parts):
            factor = self._factor(x.exponent[source] - top[target])
            mine = self._by_row(x)
            in_order = len(source) == x.count and bool((source == np.arange(x.count)).all())
            mine = mine if in_order else mine.index_select(0, self._index(source))
            if len(target) < plan.count:
                mine = mine.mul_(factor) if x.owned or not in_order else mine * factor
                rows.index_add_(0, self._index(target), mine)
            elif n == 0:
                torch.mul(mine, factor, out=rows)
            else:
                rows.addcmul_(mine, factor)
        return self._centred(made) if made.drift >= _DRIFT else made


def _units(node: kinds.Synapse) -> int:
    """The axis of a synapse's units."""
    return 1 if node.form == "conv" else -1


def _check_kind(network: PathNetwork, k: int) -> None:
    node = network.nodes[k]
    fits = isinstance(node, (kinds.Input, kinds.Synapse, kinds.Scale, kinds.Shift, kinds.Gate, kinds.Sum))
    if isinstance(node, (kinds.Scale, kinds.Shift, kinds.Sum)):
        fits = all(network.nodes[i].shape == node.shape for i in node.inputs)
    if isinstance(node, kinds.Pool):
        fits = node.kind == "avg" and len(node.kernel) == 2
    if isinstance(node, kinds.Wire):
        fits = len(node.inputs) == 1
    if isinstance(node, kinds.Synapse):
        two = node.form == "conv" and len(node.stride) == 2
        fits = two or (node.form in ("linear", "linear_t") and len(node.shape) == 2)
    if not fits:
        raise ValueError(f"RoutedFlow: network: wanted nodes it knows, got {type(node).__name__} {node.where!r}")


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()
