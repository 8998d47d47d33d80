"""Parameters that are made of several tensors of the files, and the way back.

Libraries fuse on loading what files keep apart: the weights of each expert become one parameter [experts, out, in],
gate and up projections one matrix. As long as values are only moved, such a parameter is a set of boxes, each of them
a strided view of one file tensor. The same boxes serve both ways: values go from the files into the parameter, the
bits of its mask from the parameter to the tensors of the files.

Bytes: laying parameters out reads and writes their values once, a few MB at a time; the way back is one bit a weight.
Oracle: the conversion that ``transformers`` itself makes on loading.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._mask_io import PIECE, pack_bits, unpack_bits
from .checkpoint import Checkpoint
from .shards import PIECE_BYTES, kind_of

Index = tuple[int, ...]


class NoWayBackError(ValueError):
    """A conversion that is not known to move values only."""


@dataclass(frozen=True)
class Part:
    """A box of a parameter.

    Attributes:
        key: the file tensor that it comes from.
        view: which of its elements, in the shape of the box: a view on the meta device of a contiguous tensor.
        begin: where the box begins in the parameter.
    """

    key: str
    view: Tensor
    begin: Index

    def of(self, tensor: Tensor) -> Tensor:
        """The part's elements of the contiguous file tensor."""
        return tensor.as_strided(self.view.shape, self.view.stride(), tensor.storage_offset() + self._first)

    @property
    def _first(self) -> int:
        return int(self.view.storage_offset())

    @property
    def end(self) -> Index:
        return tuple(begin + size for begin, size in zip(self.begin, self.view.shape, strict=True))

    def is_all_of(self, shape: torch.Size) -> bool:
        """Whether it is the whole tensor of that shape, in its own order."""
        return self.view.numel() == shape.numel() and self.view.is_contiguous() and self._first == 0


@dataclass(frozen=True)
class Assembly:
    """A parameter as the boxes that make it up: they cover it, each element once."""

    shape: torch.Size
    parts: tuple[Part, ...]

    @staticmethod
    def of(key: str, shape: Sequence[int]) -> Assembly:
        """A file tensor as it is."""
        whole = torch.empty(tuple(shape), dtype=torch.uint8, device="meta")
        return Assembly(whole.shape, (Part(key, whole, (0,) * whole.dim()),))

    def turned(self, a: int, b: int) -> Assembly:
        """With two axes exchanged."""
        order = list(range(len(self.shape)))
        order[a], order[b] = order[b], order[a]
        parts = (Part(p.key, p.view.permute(order), tuple(p.begin[k] for k in order)) for p in self.parts)
        return Assembly(torch.Size(self.shape[k] for k in order), tuple(parts))

    def narrowed(self, axis: int, begin: int, size: int) -> Assembly:
        """The slice ``begin .. begin + size - 1`` of an axis."""
        axis %= len(self.shape)
        parts = []
        for part in self.parts:
            first, last = max(begin, part.begin[axis]), min(begin + size, part.end[axis])
            if first < last:
                view = part.view.narrow(axis, first - part.begin[axis], last - first)
                parts.append(Part(part.key, view, _set(part.begin, axis, first - begin)))
        return Assembly(torch.Size(_set(tuple(self.shape), axis, size)), tuple(parts))

    def pieces(
        self, read: Callable[[str], Tensor], dtype: torch.dtype, used: Callable[[str], None] = lambda key: None
    ) -> Iterator[Tensor]:
        """The values in flat order, as tensors of at most :data:`PIECE_BYTES`.

        Args:
            read: gives a file tensor.
            used: told that a tensor has been read from, after every piece.
        """
        parts = sorted(self.parts, key=lambda part: part.begin)
        starts = [part.begin[0] for part in parts]
        longest = max((part.view.shape[0] for part in parts), default=0)
        for begin, size in _blocks(self.shape, PIECE_BYTES // dtype.itemsize):
            block, end = torch.empty(size, dtype=dtype), tuple(map(sum, zip(begin, size, strict=True)))
            near = slice(bisect.bisect_right(starts, begin[0] - longest), bisect.bisect_left(starts, end[0]))
            for part in parts[near]:
                first, last = tuple(map(max, begin, part.begin)), tuple(map(min, end, part.end))
                if all(map(int.__lt__, first, last)):
                    values = part.of(read(part.key))[_slices(first, last, part.begin)]
                    block[_slices(first, last, begin)].copy_(values)
                    used(part.key)
            yield block


def _set(index: Index, axis: int, value: int) -> Index:
    return (*index[:axis], value, *index[axis + 1 :])


def _slices(first: Index, last: Index, origin: Index) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(first, last, origin, strict=True))


def _blocks(shape: Sequence[int], limit: int) -> Iterator[tuple[Index, Index]]:
    """(begin, size) of boxes of at most ``limit`` elements that follow each other in flat order."""
    axis = next((k for k in range(len(shape)) if math.prod(shape[k + 1 :]) <= limit), len(shape) - 1)
    step, rest = max(1, limit // max(math.prod(shape[axis + 1 :]), 1)), tuple(shape[axis + 1 :])
    for lead in itertools.product(*map(range, shape[:axis])):
        for first in range(0, shape[axis], step):
            yield (*lead, first, *(0 for _ in rest)), (*(1 for _ in lead), min(step, shape[axis] - first), *rest)


def stacked(members: Sequence[Assembly], axis: int) -> Assembly:
    """Members side by side along a new axis.

    Raises:
        ValueError: members of different shapes, or none.
    """
    shapes = {member.shape for member in members}
    if len(shapes) != 1:
        raise ValueError(f"wanted tensors of one shape, got {sorted(map(list, shapes))}")
    (shape,) = shapes
    axis %= len(shape) + 1
    parts = []
    for k, member in enumerate(members):
        parts += [Part(p.key, p.view.unsqueeze(axis), (*p.begin[:axis], k, *p.begin[axis:])) for p in member.parts]
    return Assembly(torch.Size((*shape[:axis], len(members), *shape[axis:])), tuple(parts))


def concatenated(members: Sequence[Assembly], axis: int) -> Assembly:
    """Members one after the other along an axis.

    Raises:
        ValueError: members that differ along another axis, or none.
    """
    shapes = [tuple(member.shape) for member in members]
    if not shapes or len({(len(shape), _set(shape, axis % len(shape), 0)) for shape in shapes}) != 1:
        raise ValueError(f"wanted tensors that differ along axis {axis} alone, got {sorted(map(list, shapes))}")
    axis %= len(shapes[0])
    parts: list[Part] = []
    at = 0
    for member in members:
        parts += [Part(p.key, p.view, _set(p.begin, axis, at + p.begin[axis])) for p in member.parts]
        at += member.shape[axis]
    return Assembly(torch.Size(_set(shapes[0], axis, at)), tuple(parts))


# -------------------------------------------------------------------------------------- conversions on loading


def converted(
    converter: Any, collected: Mapping[str, Sequence[Assembly]], wanted: Callable[[str], torch.Size]
) -> dict[str, Assembly]:
    """What a ``WeightConverter`` of transformers makes of tensors, if its operations only move values.

    Args:
        converter: with ``operations``, ``source_patterns`` and ``target_patterns``.
        collected: source pattern -> tensors, in order.
        wanted: the shape of the model's parameter for a target pattern.

    Returns:
        target pattern -> the parameter.

    Raises:
        NoWayBackError: an operation other than merging, concatenating, splitting and transposing.
        ValueError: tensors that do not fit together.
    """
    values: dict[str, list[Assembly]] = {pattern: list(tensors) for pattern, tensors in collected.items()}
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind not in _OPERATIONS or not type(operation).__module__.startswith("transformers."):
            raise NoWayBackError(repr(operation))
        values = _OPERATIONS[kind](operation, values, converter.source_patterns, converter.target_patterns, wanted)
    return {pattern: _only(tensors) for pattern, tensors in values.items()}


_Values = dict[str, list[Assembly]]
_Wanted = Callable[[str], torch.Size]


def _only(tensors: Sequence[Assembly]) -> Assembly:
    if len(tensors) != 1:
        raise ValueError(f"wanted one tensor, got {len(tensors)}")
    return tensors[0]


def _one(values: _Values) -> Assembly:
    if len(values) != 1:
        raise ValueError(f"wanted tensors of one kind, got {sorted(values)}")
    return _only(next(iter(values.values())))


def _merge(operation: Any, values: _Values, sources: list[str], targets: list[str], wanted: _Wanted) -> _Values:
    alone = len(values) == 1 and len(targets) == 1
    return {targets[0] if alone else key: [stacked(tensors, operation.dim)] for key, tensors in values.items()}


def _concatenate(operation: Any, values: _Values, sources: list[str], targets: list[str], wanted: _Wanted) -> _Values:
    members = [tensor for pattern in sources for tensor in values.get(pattern, ())]
    if len(targets) != 1 or not members:
        raise ValueError(f"wanted tensors of {sources}, got {sorted(values)}")
    return {targets[0]: [concatenated(members, operation.dim)]}


def _chunk(operation: Any, values: _Values, sources: list[str], targets: list[str], wanted: _Wanted) -> _Values:
    if getattr(operation, "num_shards_attribute", None) is not None:
        raise NoWayBackError(repr(operation))
    tensor = _one(values)
    length = tensor.shape[operation.dim]
    size = -(-length // len(targets))
    return _cut(tensor, operation.dim, [min(size, length - k * size) for k in range(len(targets))], targets)


def _split(operation: Any, values: _Values, sources: list[str], targets: list[str], wanted: _Wanted) -> _Values:
    return _cut(_one(values), operation.dim, [wanted(target)[operation.dim] for target in targets], targets)


def _cut(tensor: Assembly, axis: int, sizes: Sequence[int], targets: Sequence[str]) -> _Values:
    if min(sizes) <= 0 or sum(sizes) != tensor.shape[axis]:
        raise ValueError(f"wanted {tensor.shape[axis]} slices to be {' + '.join(map(str, sizes))}")
    begins = itertools.accumulate(sizes, initial=0)
    return {
        name: [tensor.narrowed(axis, begin, size)] for name, begin, size in zip(targets, begins, sizes, strict=False)
    }


def _transpose(operation: Any, values: _Values, sources: list[str], targets: list[str], wanted: _Wanted) -> _Values:
    tensor = _one(values)
    name = targets[0] if len(targets) == 1 else sources[0]
    fits = getattr(operation, "check_dims", False) and tensor.shape == wanted(targets[0])
    return {name: [tensor if fits else tensor.turned(operation.dim0, operation.dim1)]}


_OPERATIONS: dict[str, Callable[[Any, _Values, list[str], list[str], _Wanted], _Values]] = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
}


# ------------------------------------------------------------------------------------------- values and mask bits


def dtype_of(checkpoint: Checkpoint, assembly: Assembly) -> torch.dtype | None:
    """The dtype of all parts; None where they differ, or where torch has none."""
    kinds = {checkpoint.entry(part.key).dtype for part in assembly.parts}
    return kinds.pop() if len(kinds) == 1 else None


def laid_out(checkpoint: Checkpoint, assemblies: Mapping[str, Assembly]) -> Iterator[Any]:
    """The bytes of a safetensors file with the values of these parameters, in pieces of a few MB."""
    kinds = {name: dtype_of(checkpoint, assembly) for name, assembly in assemblies.items()}
    sized = [(name, kind) for name, kind in kinds.items() if kind is not None]
    sized.sort(key=lambda item: -item[1].itemsize)  # so that each begins at a multiple of its item size
    header: dict[str, Any] = {}
    at = 0
    for name, kind in sized:
        end = at + assemblies[name].shape.numel() * kind.itemsize
        header[name] = {"dtype": kind_of(kind), "shape": list(assemblies[name].shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for name, kind in sized:
        for piece in assemblies[name].pieces(checkpoint.tensor, kind, checkpoint.used):
            yield piece.view(-1).view(torch.uint8).numpy().data


def size_of(checkpoint: Checkpoint, assemblies: Mapping[str, Assembly]) -> int:
    """Bytes of the values of these parameters."""
    kinds = ((assembly, dtype_of(checkpoint, assembly)) for assembly in assemblies.values())
    return sum(assembly.shape.numel() * kind.itemsize for assembly, kind in kinds if kind is not None)


def file_bits(shape: torch.Size, uses: Sequence[tuple[Part, tuple[Tensor, torch.Size]]]) -> Tensor:
    """The mask of a file tensor, from the masks of the parameters that have parts of it.

    Args:
        shape: of the file tensor.
        uses: a part, and bits uint8 [ceil(n / 8)] and shape of its parameter's mask.

    Returns:
        uint8 [at least ceil(n / 8)]: bit i is flat index i of the file tensor. Elements in no part stay.
    """
    if len(uses) == 1 and uses[0][0].is_all_of(shape):
        part, (packed, own) = uses[0]
        box = torch.empty(own, dtype=torch.uint8, device="meta")[_slices(part.begin, part.end, (0,) * len(own))]
        first = int(box.storage_offset())
        if box.is_contiguous():
            last = first + box.numel()
            return packed[first // 8 : -(-last // 8)] if first % 8 == 0 else pack_bits(unpack_bits(packed, first, last))
    bits = torch.ones(shape, dtype=torch.bool)
    for part, (packed, own) in uses:
        place = part.of(bits)
        strides = torch.empty(own, dtype=torch.uint8, device="meta").stride()
        for begin, size in _blocks(place.shape, PIECE):
            first = sum(s * (o + b) for s, o, b in zip(strides, part.begin, begin, strict=True))
            last = first + sum(s * (n - 1) for s, n in zip(strides, size, strict=True)) + 1
            end = tuple(map(sum, zip(begin, size, strict=True)))
            found = unpack_bits(packed, first, last)
            found = found.as_strided(size, strides, found.storage_offset())
            place[_slices(begin, end, (0,) * len(begin))] = found
    return pack_bits(bits)
