"""Spatial classes: a constant image gives a flow in which most positions are equal, so only distinct ones are computed.

With ones at the input, two rows of a feature map are equal when their windows see equal rows below (zero padding
included): that is decided once, from shapes alone, axis by axis. The network is rewritten on representatives: a
convolution becomes a gather of the distinct patches and a matrix product, a mean is weighted by how often each class
occurs. R is the same function of the weights, so scores are the same; VGG-16 at 224 does a twelfth of the work.

Exact: no value is looked at. Oracle: the network as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nodes as kinds
from .network import PathNetwork
from .nodes import Node
from .pooling import pooled

_WORTHWHILE = 0.5  # share of positions that may be left for a merged convolution to pay
_FEW_POSITIONS = {
    True: 100,
    False: 256,
}  # up to here a product of patches beats a convolution; kernels above 1, or 1

AxisMaps = tuple[Tensor, ...]
"""For each spatial axis, the class of every position: int64 [size]."""


@dataclass(frozen=True)
class _Merged:
    """A node of the new network, and the class maps of its spatial axes (None: positions as they were)."""

    index: int
    maps: AxisMaps | None


def merge_equal_positions(network: PathNetwork) -> PathNetwork:
    """The same network on distinct positions, for a source of ones. Tensors are shared, not copied."""
    return _Merger(network).run()


class _Merger:
    def __init__(self, network: PathNetwork) -> None:
        self.old = network
        self.new = copy.copy(network)
        self.new.whole = network
        self.new.nodes = []
        self.done: dict[int, _Merged] = {}

    def run(self) -> PathNetwork:
        for k, node in enumerate(self.old.nodes):
            if k in self.old.alive:
                step = getattr(self, f"_{type(node).__name__.lower()}")
                self.done[k] = step(node, [self.done[i] for i in node.inputs])
        return self.new.set_outputs(*(self._full(self.done[k], self.old.nodes[k]) for k in self.old.outputs))

    # ------------------------------------------------------------------------------------------------ helpers

    def _add(self, node: Node, maps: AxisMaps | None = None) -> _Merged:
        return _Merged(self.new.add(node), maps)

    def _shape(self, shape: torch.Size, maps: AxisMaps | None) -> torch.Size:
        """The shape on representatives."""
        if maps is None:
            return shape
        return torch.Size((*shape[:2], *(_classes(m) for m in maps)))

    def _full(self, entering: _Merged, node: Node) -> int:
        """The index of ``entering`` (which stands for ``node``) with all positions."""
        if entering.maps is None:
            return entering.index
        return self._gather(entering.index, entering.maps, node.shape, node.where)

    def _gather(self, index: int, maps: Sequence[Tensor], shape: torch.Size, where: str) -> int:
        indices = [m.to(self.old.device) for m in maps]

        def apply(xs: Sequence[Tensor], power: float) -> Tensor:
            x = xs[0]
            for axis, positions in enumerate(indices):
                x = x.index_select(2 + axis, positions)
            return x

        return self.new.add(kinds.Wire((index,), shape, apply=apply, where=where))

    def _unmerged(self, node: Node, entering: Sequence[_Merged]) -> _Merged:
        """The node as it was, on all positions."""
        inputs = tuple(self._full(e, self.old.nodes[i]) for e, i in zip(entering, node.inputs, strict=True))
        return self._add(replace(node, inputs=inputs))

    def _pointwise(self, node: Node, entering: Sequence[_Merged]) -> _Merged:
        """The same operation on representatives, the entering flows' classes refined until they agree."""
        maps = self._refined(node, entering)
        if maps is None:
            return self._unmerged(node, entering)
        inputs = []
        for e, i in zip(entering, node.inputs, strict=True):
            inputs.append(self._represented(e, maps, self.old.nodes[i]))
        shape = self._shape(node.shape, maps)
        return self._add(replace(node, inputs=tuple(inputs), shape=shape), maps)

    def _refined(self, node: Node, entering: Sequence[_Merged]) -> AxisMaps | None:
        """The coarsest classes finer than all that enter; None when some flow has none."""
        sizes = tuple(node.shape[2:])
        spatial = []
        for e, i in zip(entering, node.inputs, strict=True):
            entering_sizes = tuple(self.old.nodes[i].shape[2:])
            if len(self.old.nodes[i].shape) != len(node.shape):
                return None
            if all(size == 1 for size in entering_sizes) and sizes != entering_sizes:
                continue  # broadcasts, equal everywhere
            if e.maps is None or entering_sizes != sizes:
                return None
            spatial.append(e.maps)
        if not spatial:
            return None
        return tuple(_joint([maps[axis] for maps in spatial]) for axis in range(len(sizes)))

    def _represented(self, e: _Merged, maps: AxisMaps, node: Node) -> int:
        """A flow on the representatives of finer classes."""
        if e.maps is None or all(torch.equal(a, b) for a, b in zip(e.maps, maps, strict=True)):
            return e.index
        if all(size == 1 for size in node.shape[2:]):
            return e.index
        finer = [own[_first(m)] for own, m in zip(e.maps, maps, strict=True)]
        return self._gather(e.index, finer, self._shape(node.shape, maps), node.where)

    # -------------------------------------------------------------------------------------------------- nodes

    def _input(self, node: kinds.Input, entering: list[_Merged]) -> _Merged:
        if len(node.shape) < 3:
            return self._add(node)
        maps = tuple(torch.zeros(size, dtype=torch.int64) for size in node.shape[2:])
        return self._add(replace(node, shape=self._shape(node.shape, maps)), maps)

    def _constant(self, node: kinds.Constant, entering: list[_Merged]) -> _Merged:
        return self._add(node)

    _norm = _unmerged

    def _diagonal(self, node: Node, entering: list[_Merged], value: kinds.Expression) -> _Merged:
        axes = len(node.shape) - 2
        if axes > 0 and any(size != 1 for size in value(self.old.tensors).shape[-axes:]):
            return self._unmerged(node, entering)  # differs from position to position
        return self._pointwise(node, entering)

    def _scale(self, node: kinds.Scale, entering: list[_Merged]) -> _Merged:
        return self._diagonal(node, entering, node.factor)

    def _shift(self, node: kinds.Shift, entering: list[_Merged]) -> _Merged:
        return self._diagonal(node, entering, node.value)

    def _gate(self, node: Node, entering: list[_Merged]) -> _Merged:
        return self._pointwise(node, entering)

    _sum = _gate
    _softmax = _unmerged

    def _product(self, node: kinds.Product, entering: list[_Merged]) -> _Merged:
        return self._pointwise(node, entering) if node.apply is torch.mul else self._unmerged(node, entering)

    def _wire(self, node: kinds.Wire, entering: list[_Merged]) -> _Merged:
        return self._pointwise(node, entering) if node.concat_dim == 1 else self._unmerged(node, entering)

    def _reduce(self, node: kinds.Reduce, entering: list[_Merged]) -> _Merged:
        maps, before = entering[0].maps, self.old.nodes[node.inputs[0]].shape
        if maps is None or not set(range(2, len(before))) <= set(node.dims):
            return self._unmerged(node, entering)
        counts = torch.ones((), dtype=torch.float64)
        for m in maps:  # how many positions each class stands for
            counts = counts.unsqueeze(-1) * torch.bincount(m).double()
        size = math.prod(before[d] for d in node.dims)

        def apply(xs: Sequence[Tensor], power: float) -> Tensor:
            total = (xs[0] * counts.to(xs[0])).sum(node.dims, keepdim=node.keepdim)
            return total * (1.0 / size) ** power if node.kind == "mean" else total

        return self._add(kinds.Wire((entering[0].index,), node.shape, apply=apply, where=node.where))

    def _pool(self, node: kinds.Pool, entering: list[_Merged]) -> _Merged:
        maps = entering[0].maps
        if maps is None or len(node.kernel) != len(maps):
            return self._unmerged(node, entering)
        windows = [
            _windows(m, size, *geometry)
            for m, size, *geometry in zip(
                maps, node.shape[2:], node.kernel, node.stride, node.padding, node.dilation, strict=True
            )
        ]
        out_maps = tuple(m for m, _ in windows)
        patches = self._patches(entering[0].index, node, [w for _, w in windows], node.shape[1])
        shape = self._shape(node.shape, out_maps)
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
        entries = _average_entries(node, self.old.nodes[node.inputs[0]].shape)
        for axis, m in enumerate(out_maps):
            entries = entries.index_select(2 + axis, _first(m))
        entries = entries.to(self.old.device)
        return self._add(
            kinds.Scale((merged.index,), shape, factor=lambda tensors: entries, where=node.where), out_maps
        )

    def _synapse(self, node: kinds.Synapse, entering: list[_Merged]) -> _Merged:
        if node.form != "conv":
            return self._unmerged(node, entering)
        kernel = self.old.tensors[node.weight].shape[2:]
        few = _FEW_POSITIONS[max(kernel) > 1]
        maps = entering[0].maps
        if maps is None:
            plane = math.prod(node.shape[2:])
            if plane > few or len(kernel) != 2:
                return self._unmerged(node, entering)
            return self._matrix_product(node, self._unfolded(entering[0].index, node, kernel), node.shape, None)
        windows = [
            _windows(m, size, *geometry)
            for m, size, *geometry in zip(
                maps, node.shape[2:], kernel, node.stride, node.padding, node.dilation, strict=True
            )
        ]
        out_maps = tuple(m for m, _ in windows)
        positions = math.prod(_classes(m) for m in out_maps)
        if positions > max(few, _WORTHWHILE * math.prod(node.shape[2:])):
            return self._unmerged(node, entering)
        channels = self.old.nodes[node.inputs[0]].shape[1]
        patches = self._patches(entering[0].index, node, [w for _, w in windows], channels)
        rows = self._as_rows(patches, node, out_maps, kernel, channels)
        return self._matrix_product(node, rows, self._shape(node.shape, out_maps), out_maps)

    def _matrix_product(self, node: kinds.Synapse, rows: int, shape: torch.Size, maps: AxisMaps | None) -> _Merged:
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

    def _as_rows(self, patches: int, node: kinds.Synapse, maps: AxisMaps, kernel: Sequence[int], channels: int) -> int:
        """[1, groups, positions, channels / groups * kernel]: one patch a row, in the order of the weight's columns."""
        split = [size for m, k in zip(maps, kernel, strict=True) for size in (_classes(m), k)]
        n = len(maps)
        order = [0, *(2 + 2 * a for a in range(n)), 1, *(3 + 2 * a for a in range(n))]
        positions = math.prod(_classes(m) for m in maps)
        shape = torch.Size((1, node.groups, positions, channels // node.groups * math.prod(kernel)))

        def apply(xs: Sequence[Tensor], power: float) -> Tensor:
            x = xs[0].reshape(node.groups, channels // node.groups, *split)
            return x.permute(order).reshape(shape)

        return self.new.add(kinds.Wire((patches,), shape, apply=apply, where=node.where))


def _classes(classes: Tensor) -> int:
    return int(classes.max()) + 1 if classes.numel() else 0


def _first(classes: Tensor) -> Tensor:
    """The first position of each class."""
    positions = torch.arange(len(classes))
    first = torch.full((_classes(classes),), len(classes), dtype=torch.int64)
    return first.scatter_reduce(0, classes, positions, "amin")


def _joint(maps: Sequence[Tensor]) -> Tensor:
    """Positions are equal when they are in every map; classes numbered by first occurrence."""
    return _numbered(torch.stack(list(maps), 1))


def _numbered(rows: Tensor) -> Tensor:
    """[positions, n] -> [positions]: the number of each row among the distinct ones, by first occurrence."""
    seen: dict[tuple[int, ...], int] = {}
    return torch.tensor([seen.setdefault(tuple(row), len(seen)) for row in rows.tolist()], dtype=torch.int64)


def _windows(classes: Tensor, out: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[Tensor, Tensor]:
    """One axis: class of each output position, and the input classes [distinct, kernel] each distinct window sees.

    The class one past the last stands for padding.
    """
    size, outside = len(classes), _classes(classes)
    starts = torch.arange(out) * stride - padding
    seen = starts[:, None] + torch.arange(kernel) * dilation
    inside = (seen >= 0) & (seen < size)
    windows = torch.where(inside, classes[seen.clamp(0, size - 1)], outside)
    numbered = _numbered(windows)
    return numbered, windows[_first(numbered)]


def _average_entries(node: kinds.Pool, before: torch.Size) -> Tensor:
    """What each position of an average pool multiplies its window's sum with: float64 [1, 1, *out]."""
    ones = torch.ones((1, 1, *before[2:]), dtype=torch.float64)
    return pooled(ones, node, 1.0, "sum") / pooled(ones, replace(node, divisor=1), 1.0, "sum")
