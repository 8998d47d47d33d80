"""Classes of equal positions along the axes of a flow: numbered from 0, by axis, and what windows make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import nodes as kinds
from .pooling import pooled

AxisMaps = Mapping[int, Tensor]
"""By axis, the class of every position along it: int64 [size]. Axes that are absent have distinct positions."""


def count(classes: Tensor) -> int:
    """How many classes there are."""
    return int(classes.max()) + 1 if classes.numel() else 0


def first_of_each(classes: Tensor) -> Tensor:
    """The first position of each class."""
    positions = torch.arange(len(classes))
    first = torch.full((count(classes),), len(classes), dtype=torch.int64)
    return first.scatter_reduce(0, classes, positions, "amin")


def at_positions(x: Tensor, positions: Mapping[int, Tensor]) -> Tensor:
    """x at some positions of some axes."""
    for axis, chosen in positions.items():
        x = x.index_select(axis, chosen.to(x.device))
    return x


def reduced_shape(shape: torch.Size, maps: AxisMaps) -> torch.Size:
    """The shape on representatives."""
    return torch.Size(count(maps[axis]) if axis in maps else size for axis, size in enumerate(shape))


def classes_of_slices(value: Tensor, axis: int) -> Tensor:
    """Classes of positions along an axis at which fixed numbers are equal."""
    rows = value.detach().cpu().movedim(axis, 0).flatten(1)
    if bool((rows == rows[:1]).all()):
        return torch.zeros(len(rows), dtype=torch.int64)
    return torch.unique(rows, dim=0, return_inverse=True)[1]


def axis_groups(before: torch.Size, after: torch.Size) -> list[tuple[list[int], list[int]]]:
    """How axes become axes in a reshape: the finest groups of equal size."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = ([i] if i < len(before) else []), ([j] if j < len(after) else [])
        i, j = i + len(old), j + len(new)
        while math.prod(before[a] for a in old) != math.prod(after[b] for b in new):
            if math.prod(before[a] for a in old) < math.prod(after[b] for b in new):
                old.append(i)
                i += 1
            else:
                new.append(j)
                j += 1
        groups.append((old, new))
    return groups


def joint(maps: Sequence[Tensor]) -> Tensor:
    """Positions are equal when they are in every map; classes numbered by first occurrence."""
    return _numbered(torch.stack(list(maps), 1))


def _numbered(rows: Tensor) -> Tensor:
    """[positions, n] -> [positions]: the number of each row among the distinct ones, by first occurrence."""
    seen: dict[tuple[int, ...], int] = {}
    return torch.tensor([seen.setdefault(tuple(row), len(seen)) for row in rows.tolist()], dtype=torch.int64)


def window_classes(
    classes: Tensor, out: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """One axis: class of each output position, and the input classes [distinct, kernel] each distinct window sees.

    The class one past the last stands for padding.
    """
    size, outside = len(classes), count(classes)
    starts = torch.arange(out) * stride - padding
    seen = starts[:, None] + torch.arange(kernel) * dilation
    inside = (seen >= 0) & (seen < size)
    windows = torch.where(inside, classes[seen.clamp(0, size - 1)], outside)
    numbered = _numbered(windows)
    return numbered, windows[first_of_each(numbered)]


def average_entries(node: kinds.Pool, before: torch.Size) -> Tensor:
    """What each position of an average pool multiplies its window's sum with: float64 [1, 1, *out]."""
    ones = torch.ones((1, 1, *before[2:]), dtype=torch.float64)
    return pooled(ones, node, 1.0, "sum") / pooled(ones, replace(node, divisor=1), 1.0, "sum")
