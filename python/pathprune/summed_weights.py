"""Weights that R_2 knows by the sum of their squares alone, and what that says of the path kernel's spectrum.

Inputs of ones feed the first layer alike, and all outputs count alike: R_2 depends on the head's column j by
``sum_i u_ij`` only. For such a set S, with d the common derivative, every x on S with ``sum_S w_i x_i = 0`` is an
eigenvector of G with eigenvalue d: multiplicity ``|S| - 1``, in closed form. What is left of S is the one direction
``w_S / |w_S|``. Krylov methods find one copy of a multiple eigenvalue, so these are taken out before they begin.

Found from the flows that pass no weight before the first, or after the last, synapse: exactly equal rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import PathFlow
from .network import PathNetwork
from .nodes import Synapse
from .ops import WeightMap
from .policy import Policy
from .weights import weights_of


def summed_weights(network: PathNetwork, policy: Policy) -> dict[str, Tensor]:
    """For weights next to inputs or outputs: the set that each entry belongs to, int64 of the weight's shape."""
    synapses = network.synapses()
    uses = [network.nodes[k].weight for k in synapses]  # type: ignore[attr-defined]
    above, below = _touched(network)
    edge = [k for k in synapses if not (above[k] and below[k]) and uses.count(network.nodes[k].weight) == 1]  # type: ignore[attr-defined]
    if not edge:
        return {}
    weights = weights_of(network, (), (WeightMap.SQUARE, WeightMap.SQUARE))
    flow = PathFlow(network, weights, f=WeightMap.SQUARE, policy=policy)
    flow.keep_flows = True
    flow.forward()
    flow.backward()
    found = {}
    for k in edge:
        node = network.nodes[k]
        assert isinstance(node, Synapse)
        if node.weight not in network.prunable:
            continue
        shape = network.tensors[node.weight].shape
        entering = leaving = None
        if not above[k]:
            entering = _classes(flow.values[node.inputs[0]].tensor, node)
        if not below[k] and k in flow.backward_flows:
            leaving = _classes(flow.backward_flows[k].tensor, node)
        found[node.weight] = _sets(shape, node, entering, leaving)
    return found


def _touched(network: PathNetwork) -> tuple[dict[int, bool], dict[int, bool]]:
    """For each node: whether a synapse lies before it, and whether one lies behind it."""
    before: dict[int, bool] = {}
    behind = dict.fromkeys(network.alive, False)
    for k in sorted(network.alive):
        inputs = network.nodes[k].inputs
        before[k] = any(before[i] or isinstance(network.nodes[i], Synapse) for i in inputs)
    for k in sorted(network.alive, reverse=True):
        for i in network.nodes[k].inputs:
            behind[i] = behind[i] or behind[k] or isinstance(network.nodes[k], Synapse)
    return before, behind


def _classes(flow: Tensor, node: Synapse) -> Tensor:
    """Which units of a flow are equal at all positions: for each unit its class; for ``rows`` [groups, units]. On the
    CPU, as what they are put together with."""
    if node.form == "rows":  # [1, groups, positions, units]
        units = flow[0].movedim(1, 2)
        return torch.unique(units.flatten(0, 1), dim=0, return_inverse=True)[1].reshape(units.shape[:2]).cpu()
    axis = 1 if node.form.startswith("conv") else flow.dim() - 1
    return torch.unique(flow.movedim(axis, 0).flatten(1), dim=0, return_inverse=True)[1].cpu()


def _sets(shape: torch.Size, node: Synapse, entering: Tensor | None, leaving: Tensor | None) -> Tensor:
    """Entries whose entering and leaving classes (or units, where those are their own) agree are one set."""
    groups = node.groups if node.form in ("conv", "rows", "conv_transpose") else 1
    turned = node.form in ("linear_t", "conv_transpose")
    if node.form == "rows":
        rows, columns = shape[0] // groups, shape[1:].numel()
        by_row = (leaving if leaving is not None else torch.arange(shape[0])).reshape(groups, rows, 1)
        by_column = (entering if entering is not None else torch.arange(groups * columns)).reshape(groups, 1, columns)
        entry = torch.zeros(1, dtype=torch.int64)
    else:
        first, second = (entering, leaving) if turned else (leaving, entering)
        rows = shape[0] // groups
        by_row = (first if first is not None else torch.arange(shape[0])).reshape(groups, rows, 1, 1)
        count = shape[1]
        # the second axis counts within a group
        by_column = (second if second is not None else torch.arange(groups * count)).reshape(groups, 1, count, 1)
        entry = torch.arange(shape[2:].numel()).reshape(1, 1, 1, -1)
    part = torch.arange(groups).reshape(groups, *[1] * (by_row.dim() - 1))
    key = torch.stack(
        [
            t.expand(torch.broadcast_shapes(by_row.shape, by_column.shape, entry.shape)).flatten()
            for t in (part.to(by_row), by_row, by_column, entry)
        ],
        1,
    )
    return torch.unique(key, dim=0, return_inverse=True)[1].reshape(shape)


@dataclass
class _Sets:
    """The sets of one tensor's live weights."""

    of: Tensor  # [live] int64: the set of each
    directions: Tensor  # [live]: its share of its set's direction w_S / |w_S|
    sizes: Tensor  # [sets]
    slope: Tensor  # [sets] float64: dR_2/du of the members
    empty: Tensor  # [sets] bool: all members 0, so no direction of its own


@dataclass
class _Segment:
    """One tensor's coordinates: ``[start, stop)`` of the reduced vector."""

    name: str
    shape: torch.Size
    live: Tensor | None  # flat positions of the weights that are left; None: all
    sets: _Sets | None  # None: each weight is its own
    start: int
    stop: int


class Reduced:
    """Coordinates of the live weights with each set of summed weights as one; vectors [count].

    Args:
        tensors: the weights by name.
        slopes: their dR_2/du, shaped like them.
        masks: bool, by name; None: all are left.
        sets: from :func:`summed_weights`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        slopes: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None,
        sets: Mapping[str, Tensor],
    ) -> None:
        self.segments: list[_Segment] = []
        self.count = 0
        self._result: Tensor | None = None
        self._out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            mask = None if masks is None else masks.get(name)
            live = None if mask is None else mask.flatten().nonzero()[:, 0].to(tensor.device)
            size = tensor.numel() if live is None else len(live)
            if name not in sets or size == 0:
                self._append(name, tensor.shape, live, None, size)
                continue

            def pick(tensor: Tensor, live: Tensor | None = live) -> Tensor:
                return tensor.flatten() if live is None else tensor.flatten()[live]

            own = torch.unique(pick(sets[name].to(tensor.device)), return_inverse=True)[1]
            theta, slope = pick(tensor), pick(slopes[name])
            count = int(own.max()) + 1
            sizes = torch.bincount(own, minlength=count)
            norm = torch.zeros(count, dtype=torch.float64, device=tensor.device)
            norm.index_add_(0, own, theta.double().square()).sqrt_()
            shares = torch.where((sizes == 1)[own], 1.0, theta.double() / norm.clamp(min=5e-324)[own])
            mean = torch.zeros_like(norm).index_add_(0, own, slope.double()) / sizes
            empty = (norm == 0) & (sizes > 1)
            made = _Sets(own, shares.to(tensor.dtype), sizes, mean, empty)
            self._append(name, tensor.shape, live, made, count)

    def _append(self, name: str, shape: torch.Size, live: Tensor | None, sets: _Sets | None, size: int) -> None:
        self.segments.append(_Segment(name, shape, live, sets, self.count, self.count + size))
        self.count += size

    def product(self, y: Tensor, product: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], object]) -> Tensor:
        """``product(x, out)`` of whole tensors, in these coordinates. What is returned is overwritten next time."""
        if self._result is None:
            self._result = torch.empty_like(y)
            self._out = {s.name: self._room(s, self._result) for s in self.segments}
        product(self.expanded(y), self._out)
        for s in self.segments:
            whole, mine = self._out[s.name].flatten(), self._result[s.start : s.stop]
            if s.sets is not None:
                picked = whole if s.live is None else whole[s.live]
                mine.zero_().index_add_(0, s.sets.of, picked * s.sets.directions)
            elif s.live is not None:
                torch.index_select(whole, 0, s.live, out=mine)
        return self._result

    @staticmethod
    def _room(s: _Segment, result: Tensor) -> Tensor:
        """Where a whole tensor is written: in the result itself, if that is how it lies there."""
        if s.sets is None and s.live is None:
            return result[s.start : s.stop].view(s.shape)
        return result.new_empty(s.shape)

    def reduced(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Of whole tensors."""
        first = next(iter(parts.values()))
        out = first.new_zeros(self.count)
        for s in self.segments:
            x = parts[s.name].flatten() if s.live is None else parts[s.name].flatten()[s.live]
            if s.sets is None:
                out[s.start : s.stop] = x
            else:
                out[s.start : s.stop].index_add_(0, s.sets.of, x * s.sets.directions)
        return out

    def expanded(self, y: Tensor) -> dict[str, Tensor]:
        """Whole tensors, 0 where weights are pruned."""
        parts = {}
        for s in self.segments:
            x = y[s.start : s.stop]
            if s.sets is not None:
                x = x[s.sets.of] * s.sets.directions
            if s.live is not None:
                x = x.new_zeros(s.shape.numel()).index_copy_(0, s.live, x)
            parts[s.name] = x.reshape(s.shape)
        return parts

    def closed_form(self, k: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """The k largest eigenvalues within sets, descending, each with (tensor, set, which of its directions)."""
        found: list[tuple[float, tuple[int, int, int]]] = []
        for position, s in enumerate(self.segments):
            if s.sets is None:
                continue
            multiplicity = s.sets.sizes - 1 + s.sets.empty
            values = torch.where(multiplicity > 0, s.sets.slope, -torch.inf)
            top = values.topk(min(k, len(values)))
            for value, which in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                for direction in range(min(int(multiplicity[which]), k)):
                    found.append((value, (position, which, direction)))
        found.sort(key=lambda pair: -pair[0])
        return torch.tensor([v for v, _ in found[:k]], dtype=torch.float64), [place for _, place in found[:k]]

    def direction(self, position: int, which: int, number: int) -> dict[str, Tensor]:
        """One of an orthonormal basis of the directions within a set that leave R_2 alone, as whole tensors."""
        s = self.segments[position]
        assert s.sets is not None
        members = (s.sets.of == which).nonzero()[:, 0]
        own = s.sets.directions[members].double()
        basis = torch.linalg.qr(torch.cat([own[:, None], torch.eye(len(own)).to(own)], 1))[0]
        column = basis[:, number + (0 if bool(s.sets.empty[which]) else 1)].to(s.sets.directions.dtype)
        parts = {o.name: column.new_zeros(o.shape) for o in self.segments}
        flat = members if s.live is None else s.live[members]
        parts[s.name].view(-1)[flat] = column
        return parts
