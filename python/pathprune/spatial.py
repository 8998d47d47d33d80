"""Position classes: a constant source gives a flow in which most positions are equal, so only distinct ones are kept.

With ones at the input, two rows of a feature map are equal when their windows see equal rows below (zero padding
included), and two tokens when nothing tells them apart: that is decided once, axis by axis. The network is rewritten
on representatives: a convolution becomes a gather of the distinct patches and a matrix product, a mean is weighted by
how often each class occurs, attention by how many keys a class stands for. R is the same function of the weights, so
scores are the same; VGG-16 at 224 does a twelfth of the work, ViT-B/16 has two tokens in place of 197.

Exact: of weights no value is looked at; constants that differ between positions keep them apart. A wire's effect on
classes is found by trying it on whole numbers. Oracle: the network as it was.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nodes as kinds
from .network import PathNetwork
from .nodes import Expression, Node, Tensors
from .policy import Policy, policy_of
from .position_classes import (
    AxisMaps,
    at_positions,
    average_entries,
    axis_groups,
    classes_of_slices,
    count,
    first_of_each,
    joint,
    reduced_shape,
    window_classes,
)

_WORTHWHILE = 0.5  # share of positions that may be left for a merged convolution to pay
_FEW_POSITIONS = {
    True: 100,
    False: 256,
}  # up to here a product of patches beats a convolution; kernels above 1, or 1


@dataclass(frozen=True)
class _Merged:
    """A node of the new network, and the classes of its axes."""

    index: int
    maps: AxisMaps


def merge_equal_positions(
    network: PathNetwork, policy: str | Policy = "published", *, fixed: bool = True
) -> PathNetwork:
    """The same network on distinct positions, for a source of ones. Tensors are shared, not copied.

    Args:
        policy: what the flow will follow; where it drops biases, constants tell no positions apart.
        fixed: whether the model's constants keep their values; of an ensemble each member has its own.
    """
    return _Merger(network, policy_of(policy).biases == "drop", fixed).run()


class _Merger:
    def __init__(self, network: PathNetwork, drops_biases: bool, fixed: bool) -> None:
        self.old, self.drops_biases, self.fixed = network, drops_biases, fixed
        self.new = copy.copy(network)
        self.new.whole = network
        self.new.nodes = []
        self.done: dict[int, _Merged] = {}

    def run(self) -> PathNetwork:
        for k, node in enumerate(self.old.nodes):
            if k in self.old.alive:
                step = getattr(self, f"_{type(node).__name__.lower()}")
                self.done[k] = step(node, [self.done[i] for i in node.inputs])
        return self.new.set_outputs(*(self._expanded(self.done[k]).index for k in self.old.outputs))

    # ------------------------------------------------------------------------------------------------ helpers

    def _add(self, node: Node, maps: AxisMaps | None = None) -> _Merged:
        return _Merged(self.new.add(node), maps or {})

    def _entering(self, node: Node) -> list[torch.Size]:
        """The shapes of a node's inputs, with all their positions."""
        return [self.old.nodes[i].shape for i in node.inputs]

    def _taken(self, index: int, positions: Mapping[int, Tensor], where: str) -> int:
        """The flow at some positions of some axes."""
        if not positions:
            return index
        chosen = {axis: p.to(self.old.device) for axis, p in positions.items()}
        shape = list(self.new.nodes[index].shape)
        for axis, p in chosen.items():
            shape[axis] = len(p)

        def apply(xs: Sequence[Tensor], power: float) -> Tensor:
            return at_positions(xs[0], chosen)

        return self.new.add(kinds.Wire((index,), torch.Size(shape), apply=apply, where=where))

    def _expanded(self, e: _Merged, axes: Sequence[int] | None = None) -> _Merged:
        """All positions of some axes (None: of all)."""
        wide = {axis: m for axis, m in e.maps.items() if axes is None or axis in axes}
        index = self._taken(e.index, wide, self.new.nodes[e.index].where)
        return _Merged(index, {axis: m for axis, m in e.maps.items() if axis not in wide})

    def _unmerged(self, node: Node, entering: Sequence[_Merged]) -> _Merged:
        """The node as it was, on all positions."""
        return self._add(replace(node, inputs=tuple(self._expanded(e).index for e in entering)))

    def _represented(self, e: _Merged, maps: AxisMaps, shape: torch.Size) -> int:
        """A flow of some full shape on the representatives of finer classes; what broadcasts stays as it is."""
        positions = {}
        for axis, size in enumerate(shape):
            own, wanted = e.maps.get(axis), maps.get(axis)
            if size == 1 or (own is None and wanted is None):
                continue
            if wanted is None:
                positions[axis] = e.maps[axis]
            elif own is None:
                positions[axis] = first_of_each(wanted)
            elif not torch.equal(own, wanted):
                positions[axis] = own[first_of_each(wanted)]
        return self._taken(e.index, positions, self.new.nodes[e.index].where)

    def _joined(self, node: Node, entering: Sequence[_Merged], values: Sequence[Tensor] = ()) -> AxisMaps:
        """The coarsest classes finer than those of all that enter, and than those of fixed numbers."""
        n, shapes = len(node.shape), self._entering(node)
        maps = {}
        for axis in range(n):
            size = node.shape[axis]
            varying = [e for e, shape in zip(entering, shapes, strict=True) if shape[axis] != 1]
            if size == 1 or not all(axis in e.maps for e in varying):
                continue
            found = [e.maps[axis] for e in varying]
            for value in values:
                if value.shape[axis] != 1:
                    found.append(classes_of_slices(value, axis) if self.fixed else torch.arange(size))
            together = joint(found) if found else torch.zeros(size, dtype=torch.int64)
            if count(together) < size:
                maps[axis] = together
        return maps

    def _pointwise(self, node: Node, entering: Sequence[_Merged], values: Sequence[Tensor] = ()) -> _Merged:
        """The same operation on representatives."""
        shapes = self._entering(node)
        if any(len(shape) != len(node.shape) for shape in shapes):
            return self._unmerged(node, entering)
        maps = self._joined(node, entering, values)
        inputs = tuple(self._represented(e, maps, shape) for e, shape in zip(entering, shapes, strict=True))
        return self._add(replace(node, inputs=inputs, shape=reduced_shape(node.shape, maps)), maps)

    def _probed(self, node: Node, entering: Sequence[_Merged], apply: Callable[..., Tensor]) -> _Merged:
        """A linear map as it is, on representatives, where trying it on whole numbers shows that it may be."""
        maps = self._found_maps(node, entering, apply) if any(e.maps for e in entering) else None
        if maps is None:
            return self._unmerged(node, entering)
        inputs = tuple(e.index for e in entering)
        return self._add(replace(node, inputs=inputs, shape=reduced_shape(node.shape, maps)), maps)

    def _found_maps(self, node: Node, entering: Sequence[_Merged], apply: Callable[..., Tensor]) -> AxisMaps | None:
        generator = torch.Generator().manual_seed(0)
        few, full = [], []
        for e in entering:
            new = self.new.nodes[e.index]
            x = torch.randint(1, 1 << 20, new.shape, generator=generator).double()
            full.append(at_positions(x, e.maps).to(self.old.device))
            if isinstance(new, kinds.Softmax) and new.repeats is not None:  # sums over keys count every one
                x = x * new.repeats
            few.append(x.to(self.old.device))
        try:
            small = apply(*few)
        except (RuntimeError, IndexError, ValueError):  # sizes are part of the map
            return None
        wide = apply(*full)
        if small.dim() != wide.dim():
            return None
        known = [m for e in entering for m in e.maps.values()]
        choices = []
        for axis in range(wide.dim()):
            sizes = (wide.shape[axis], small.shape[axis])
            same: list[Tensor | None] = [None] if sizes[0] == sizes[1] else []
            choices.append(same + [m for m in known if (len(m), count(m)) == sizes])
        for choice in itertools.islice(itertools.product(*choices), 64):
            maps = {axis: m for axis, m in enumerate(choice) if m is not None}
            if torch.equal(at_positions(small, maps), wide):
                return maps
        return None

    # -------------------------------------------------------------------------------------------------- nodes

    def _input(self, node: kinds.Input, entering: list[_Merged]) -> _Merged:
        return self._constant_over(node)

    def _constant_over(self, node: Node) -> _Merged:
        """All positions of all axes are equal."""
        maps = {axis: torch.zeros(size, dtype=torch.int64) for axis, size in enumerate(node.shape) if axis and size > 1}
        return self._add(replace(node, shape=reduced_shape(node.shape, maps)), maps)

    def _constant(self, node: kinds.Constant, entering: list[_Merged]) -> _Merged:
        if not self.drops_biases:
            return self._add(node)
        shape = torch.Size([1] * len(node.shape))
        return self._constant_over(replace(node, value=lambda tensors: torch.zeros(shape)))

    def _norm(self, node: kinds.Norm, entering: list[_Merged]) -> _Merged:
        dims = range(1, len(node.shape)) if node.groups else node.dims
        return self._pointwise(node, [self._expanded(entering[0], [*dims, *node.among])])

    def _diagonal(self, node: Node, entering: list[_Merged], value: Expression) -> _Merged:
        fixed = value(self.old.tensors)
        if fixed.dim() > len(node.shape) or any(len(shape) != len(node.shape) for shape in self._entering(node)):
            return self._unmerged(node, entering)
        lead = (1,) * (len(node.shape) - fixed.dim())
        fixed = fixed.reshape(*lead, *fixed.shape)
        made = self._pointwise(node, entering, [fixed])
        positions = {axis: first_of_each(m) for axis, m in made.maps.items() if fixed.shape[axis] != 1}

        def chosen(tensors: Tensors) -> Tensor:
            there = value(tensors)
            return at_positions(there.reshape(*lead, *there.shape), positions)

        new = self.new.nodes[made.index]
        if positions and isinstance(new, kinds.Scale):
            self.new.nodes[made.index] = replace(new, factor=chosen)
        elif positions and isinstance(new, kinds.Shift):
            self.new.nodes[made.index] = replace(new, value=chosen)
        return made

    def _scale(self, node: kinds.Scale, entering: list[_Merged]) -> _Merged:
        return self._diagonal(node, entering, node.factor)

    def _shift(self, node: kinds.Shift, entering: list[_Merged]) -> _Merged:
        if self.drops_biases and self._entering(node)[0] == node.shape:
            return entering[0]
        return self._diagonal(node, entering, node.value)

    def _gate(self, node: Node, entering: list[_Merged]) -> _Merged:
        return self._pointwise(node, entering)

    _sum = _gate

    def _product(self, node: kinds.Product, entering: list[_Merged]) -> _Merged:
        return self._pointwise(node, entering) if node.apply is torch.mul else self._probed(node, entering, node.apply)

    def _softmax(self, node: kinds.Softmax, entering: list[_Merged]) -> _Merged:
        weights = node.weights(self.old.tensors).expand(node.shape)
        made = self._pointwise(node, entering, [weights])
        dim = node.dim % len(node.shape)
        repeats = None
        if dim in made.maps:
            repeats = torch.bincount(made.maps[dim]).double().reshape(-1, *[1] * (len(node.shape) - 1 - dim))
        new, positions = self.new.nodes[made.index], {axis: first_of_each(m) for axis, m in made.maps.items()}
        assert isinstance(new, kinds.Softmax)

        def chosen(tensors: Tensors) -> Tensor:
            return at_positions(node.weights(tensors).expand(node.shape), positions)

        self.new.nodes[made.index] = replace(new, weights=chosen, repeats=repeats)
        return made

    def _wire(self, node: kinds.Wire, entering: list[_Merged]) -> _Merged:
        if node.concat_dim is not None:
            return self._concatenated(node, entering, node.concat_dim)
        if node.reshapes:
            return self._reshaped(node, entering[0])
        return self._probed(node, entering, lambda *xs: node.apply(xs, 1.0))

    def _concatenated(self, node: kinds.Wire, entering: list[_Merged], dim: int) -> _Merged:
        shapes = self._entering(node)
        along, offset = [], 0
        for e, shape in zip(entering, shapes, strict=True):
            own = e.maps.get(dim, torch.arange(shape[dim]))
            along.append(own + offset)
            offset += count(own)
        others = {axis: m for axis, m in self._joined(node, entering).items() if axis != dim}
        inputs = []
        for e, shape in zip(entering, shapes, strict=True):
            maps = {**others, **({dim: e.maps[dim]} if dim in e.maps else {})}
            inputs.append(self._represented(e, maps, shape))
        maps = {**others, **({dim: torch.cat(along)} if offset < node.shape[dim] else {})}
        return self._add(replace(node, inputs=tuple(inputs), shape=reduced_shape(node.shape, maps)), maps)

    def _reshaped(self, node: kinds.Wire, entering: _Merged) -> _Merged:
        """Axes that become one have the pairs of their classes; an axis that is split is expanded."""
        before = self._entering(node)[0]
        groups = axis_groups(before, node.shape)
        split = [axis for old, new in groups if len(new) > 1 for axis in old if before[axis] > 1]
        e = self._expanded(entering, split)
        maps = {}
        for old, new in groups:
            mapped = [axis for axis in old if axis in e.maps and before[axis] > 1]
            if not mapped:
                continue
            pairs = torch.zeros(1, dtype=torch.int64)
            for axis in old:
                own = e.maps.get(axis, torch.arange(before[axis]))
                pairs = (pairs[:, None] * count(own) + own).flatten()
            maps[new[0]] = pairs
        shape = reduced_shape(node.shape, maps)
        return self._add(replace(node, inputs=(e.index,), shape=shape, apply=lambda xs, p: xs[0].reshape(shape)), maps)

    def _reduce(self, node: kinds.Reduce, entering: list[_Merged]) -> _Merged:
        before, maps = self._entering(node)[0], entering[0].maps
        counts = torch.ones((), dtype=torch.float64)
        for axis in range(len(before)):  # how many positions each class stands for
            own = torch.bincount(maps[axis]).double() if axis in maps and axis in node.dims else torch.ones(1).double()
            counts = counts.unsqueeze(-1) * own
        size = math.prod(before[d] for d in node.dims)

        def apply(xs: Sequence[Tensor], power: float) -> Tensor:
            total = (xs[0] * counts.to(xs[0])).sum(node.dims, keepdim=node.keepdim)
            return total * (1.0 / size) ** power if node.kind == "mean" else total

        left = {axis: m for axis, m in maps.items() if axis not in node.dims}
        if not node.keepdim:
            left = {axis - sum(d < axis for d in node.dims): m for axis, m in left.items()}
        shape = reduced_shape(node.shape, left)
        return self._add(kinds.Wire((entering[0].index,), shape, apply=apply, where=node.where), left)

    # ------------------------------------------------------------------------------------------------- windows

    def _planes(self, node: Node, entering: _Merged) -> tuple[_Merged, tuple[Tensor, ...] | None]:
        """All channels, and the classes of the axes behind them; None where one has none."""
        axes = range(2, len(self._entering(node)[0]))
        if len(axes) and all(axis in entering.maps or self._entering(node)[0][axis] == 1 for axis in axes):
            e = self._expanded(entering, [1])
            return e, tuple(e.maps.get(axis, torch.zeros(1, dtype=torch.int64)) for axis in axes)
        return self._expanded(entering), None

    def _pool(self, node: kinds.Pool, entering: list[_Merged]) -> _Merged:
        e, maps = self._planes(node, entering[0])
        if maps is None or len(node.kernel) != len(maps):
            return self._unmerged(node, [e])
        windows = [
            window_classes(m, size, *geometry)
            for m, size, *geometry in zip(
                maps, node.shape[2:], node.kernel, node.stride, node.padding, node.dilation, strict=True
            )
        ]
        out_maps = {2 + axis: m for axis, (m, _) in enumerate(windows)}
        patches = self._patches(e.index, node, [w for _, w in windows], node.shape[1])
        shape = reduced_shape(node.shape, out_maps)
        ones = (1,) * len(maps)
        pool = kinds.Pool(
            (patches,),
            shape,
            kind=node.kind,
            kernel=node.kernel,
            stride=node.kernel,
            padding=(0,) * len(maps),
            dilation=ones,
            divisor=1 if node.kind == "avg" else None,
            where=node.where,
        )
        merged = self._add(pool, out_maps)
        if node.kind == "max":
            return merged
        entries = at_positions(
            average_entries(node, self._entering(node)[0]), {a: first_of_each(m) for a, m in out_maps.items()}
        )
        entries = entries.to(self.old.device)
        return self._add(
            kinds.Scale((merged.index,), shape, factor=lambda tensors: entries, where=node.where), out_maps
        )

    def _synapse(self, node: kinds.Synapse, entering: list[_Merged]) -> _Merged:
        if node.form in ("linear", "linear_t"):
            e = self._expanded(entering[0], [len(node.shape) - 1])
            return self._add(replace(node, inputs=(e.index,), shape=reduced_shape(node.shape, e.maps)), e.maps)
        if node.form != "conv":
            return self._unmerged(node, entering)
        kernel = self.old.tensors[node.weight].shape[2:]
        few = _FEW_POSITIONS[max(kernel) > 1]
        e, maps = self._planes(node, entering[0])
        if maps is None:
            plane = math.prod(node.shape[2:])
            if plane > few or len(kernel) != 2:
                return self._unmerged(node, [e])
            return self._matrix_product(node, self._unfolded(e.index, node, kernel), node.shape, {})
        windows = [
            window_classes(m, size, *geometry)
            for m, size, *geometry in zip(
                maps, node.shape[2:], kernel, node.stride, node.padding, node.dilation, strict=True
            )
        ]
        out_maps = {2 + axis: m for axis, (m, _) in enumerate(windows)}
        positions = math.prod(count(m) for m in out_maps.values())
        if positions > max(few, _WORTHWHILE * math.prod(node.shape[2:])):
            return self._unmerged(node, [e])
        channels = self._entering(node)[0][1]
        patches = self._patches(e.index, node, [w for _, w in windows], channels)
        rows = self._as_rows(patches, node, list(out_maps.values()), kernel, channels)
        return self._matrix_product(node, rows, reduced_shape(node.shape, out_maps), out_maps)

    def _matrix_product(self, node: kinds.Synapse, rows: int, shape: torch.Size, maps: AxisMaps) -> _Merged:
        """The convolution as a product of its patches (rows) with its weight, back in its shape."""
        positions, out = math.prod(shape[2:]), shape[1] // node.groups
        synapse = replace(node, inputs=(rows,), shape=torch.Size((1, node.groups, positions, out)), form="rows")
        index = self.new.add(synapse)
        back = kinds.Wire((index,), shape, apply=lambda xs, p: xs[0].transpose(2, 3).reshape(shape), where=node.where)
        return self._add(back, maps)

    def _unfolded(self, index: int, node: kinds.Synapse, kernel: Sequence[int]) -> int:
        """[1, groups, positions, channels / groups * kernel]: every patch of a small plane, equal or not."""
        shape = self.new.nodes[index].shape
        columns = shape[1] // node.groups * math.prod(kernel)
        geometry = (tuple(kernel), node.dilation, node.padding, node.stride)
        pointwise = max(kernel) == 1 and max(node.stride) == 1 and max(node.padding) == 0

        def apply(xs: Sequence[Tensor], power: float) -> Tensor:
            patches = xs[0] if pointwise else F.unfold(xs[0], *geometry)
            return patches.reshape(1, node.groups, columns, -1).transpose(2, 3)

        rows = torch.Size((1, node.groups, math.prod(node.shape[2:]), columns))
        return self.new.add(kinds.Wire((index,), rows, apply=apply, where=node.where))

    def _patches(self, index: int, node: Node, windows: Sequence[Tensor], channels: int) -> int:
        """[1, C, n0 * k0, n1 * k1]: the distinct windows side by side, positions outside the image zero."""
        indices = [w.flatten().to(self.old.device) for w in windows]
        widths = [0, 1] * len(windows)  # a zero at the end of every axis stands for the padding

        def apply(xs: Sequence[Tensor], power: float) -> Tensor:
            x = F.pad(xs[0], widths)
            for axis, positions in enumerate(indices):
                x = x.index_select(2 + axis, positions)
            return x

        shape = torch.Size((1, channels, *(len(i) for i in indices)))
        return self.new.add(kinds.Wire((index,), shape, apply=apply, where=node.where))

    def _as_rows(
        self, patches: int, node: kinds.Synapse, maps: Sequence[Tensor], kernel: Sequence[int], channels: int
    ) -> int:
        """[1, groups, positions, channels / groups * kernel]: one patch a row, in the order of the weight's columns."""
        split = [size for m, k in zip(maps, kernel, strict=True) for size in (count(m), k)]
        n = len(maps)
        order = [0, *(2 + 2 * a for a in range(n)), 1, *(3 + 2 * a for a in range(n))]
        positions = math.prod(count(m) for m in maps)
        shape = torch.Size((1, node.groups, positions, channels // node.groups * math.prod(kernel)))

        def apply(xs: Sequence[Tensor], power: float) -> Tensor:
            x = xs[0].reshape(node.groups, channels // node.groups, *split)
            return x.permute(order).reshape(shape)

        return self.new.add(kinds.Wire((patches,), shape, apply=apply, where=node.where))
