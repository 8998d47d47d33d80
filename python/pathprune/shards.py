"""Safetensors files as windows on the disk: read where they lie, and written anew with zeros in place.

A file is ``u64 length | JSON header | data``; the header gives each tensor's dtype, shape and byte range. Nothing in
it is executed. Everything the header claims is checked against the file before a byte of data is read.

Bytes: a window reads what is asked of it; a copy reads and writes every byte once, :data:`PIECE_BYTES` at a time.
Oracle: the safetensors library.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._mask_io import unpack_bits
from .residency import Window

PIECE_BYTES = 4 << 20
_MOST_HEADER = 100_000_000  # what the format's own library accepts

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # 0 has no bit set, as 0.0 has none


def kind_of(dtype: torch.dtype) -> str:
    """The name of a dtype in the files."""
    return _KINDS[dtype]


class CheckpointError(ValueError):
    """A checkpoint that is not whole, not what it says, or not one that can be pruned."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: its key.
        kind: the dtype's name in the file; ``dtype`` is torch's, None where it has none.
        shape: its sizes.
        begin, end: byte range in the file.
    """

    name: str
    kind: str
    dtype: torch.dtype | None
    shape: torch.Size
    begin: int
    end: int


class Shard:
    """A safetensors file, open for reading and mapped into memory.

    The mapping is private: a write through a window would stay in this process and never reach the file.

    Args:
        path: the file; a symbolic link is followed.

    Raises:
        CheckpointError: truncated, longer than it says, a header that is not one, or that lies about its tensors.
        OSError: it cannot be opened.

    Example:
        >>> shard = Shard("model.safetensors")
        >>> shard.tensor("model.embed_tokens.weight").shape
        torch.Size([32000, 2048])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(self.path, "rb") as file:
            self._state = _state_of(file.fileno())
            self.size = self._state[0]
            self.header, self.entries = _read_header(self.path, file, self.size)
            private = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
            self._map = mmap.mmap(file.fileno(), 0, flags=private, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def tensor(self, name: str) -> Tensor:
        """The tensor as a window on the file, on the CPU, not to be written to.

        A tensor that does not begin at a multiple of its own item size is read into memory instead.

        Raises:
            CheckpointError: a dtype that torch does not have.
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise CheckpointError(f"{self.path}: {name}: wanted a dtype of torch, got {entry.kind}")
        count = entry.shape.numel()
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.begin % entry.dtype.itemsize:
            raw = bytearray(self._map[entry.begin : entry.end])
            return torch.frombuffer(raw, dtype=entry.dtype, count=count).view(entry.shape)
        return torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.begin).view(entry.shape)

    def drop(self, name: str) -> None:
        """Lets go of the memory behind a tensor's window; it is read again when it is used again."""
        self._advise(name, "MADV_DONTNEED")

    def prefetch(self, name: str) -> None:
        """Asks for a tensor's bytes to be read ahead of their use; returns at once."""
        self._advise(name, "MADV_WILLNEED")

    def window(self, name: str) -> Window:
        """The tensor's window, for :class:`Residency`."""
        entry = self.entries[name]
        return Window(entry.end - entry.begin, lambda: self.drop(name), lambda: self.prefetch(name))

    def _advise(self, name: str, advice: str) -> None:
        entry, option = self.entries[name], getattr(mmap, advice, None)
        if option is None or entry.begin == entry.end:
            return
        start = entry.begin - entry.begin % mmap.PAGESIZE
        self._map.madvise(option, start, entry.end - start)

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file is no longer the one that was opened."""
        if _state_of(self.path) != self._state:
            raise CheckpointError(f"{self.path}: changed while it was being read")

    def pruned(self, masks: Mapping[str, Tensor]) -> Iterator[bytes | bytearray]:
        """The bytes of the same file with zeros in place of the weights that are removed.

        Args:
            masks: tensor name -> bits uint8 [ceil(n / 8)] of the weights that stay; other tensors are copied.

        Yields:
            Pieces of at most :data:`PIECE_BYTES`, the header first; each is valid until the next.

        Raises:
            CheckpointError: the file ends early, or has changed since it was opened.
        """
        yield self.header
        with open(self.path, "rb", buffering=0) as file:
            file.seek(len(self.header))
            for entry in sorted(self.entries.values(), key=lambda entry: (entry.begin, entry.end)):
                yield from self._pieces(file, entry, masks.get(entry.name))
        self.check_unchanged()

    def _pieces(self, file: Any, entry: Entry, kept: Tensor | None) -> Iterator[bytearray]:
        item = entry.dtype.itemsize if entry.dtype is not None else 1
        for begin in range(entry.begin, entry.end, PIECE_BYTES):
            piece = bytearray(min(PIECE_BYTES, entry.end - begin))
            if file.readinto(piece) != len(piece):
                raise CheckpointError(f"{self.path}: {entry.name}: the file ends before the tensor does")
            if kept is not None:
                words = torch.frombuffer(piece, dtype=_WORDS[item])
                first = (begin - entry.begin) // item
                words.mul_(unpack_bits(kept, first, first + len(words)))  # as integers: NaN becomes 0 too
            yield piece


def _state_of(file: int | str) -> tuple[int, int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ino


def _read_header(path: str, file: Any, size: int) -> tuple[bytes, dict[str, Entry]]:
    """The file's head as it stands, and its tensors.

    Raises:
        CheckpointError: see :class:`Shard`.
    """

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: not a whole safetensors file: {why}")

    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8:
        raise refuse(f"wanted at least 8 bytes, got {size}")
    if length > min(_MOST_HEADER, size - 8):
        raise refuse(f"its header should have {length} bytes, the file has {size}")
    text = file.read(length)
    try:
        claims = json.loads(text.decode(), object_pairs_hook=_once)
        if not isinstance(claims, dict):
            raise ValueError("it is not an object")
        claims.pop("__metadata__", None)
        entries = {name: _entry(name, claim, 8 + length) for name, claim in claims.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(f"its header cannot be read: {error}") from error
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            raise refuse(f"'{entry.name}' should begin at byte {end}, where the last tensor ends, not {entry.begin}")
        end = entry.end
    if end != size:
        raise refuse(f"its tensors end at byte {end}, the file at {size}")
    return head + text, entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _entry(name: str, claim: Mapping[str, Any], data: int) -> Entry:
    kind, shape, (begin, end) = claim["dtype"], claim["shape"], claim["data_offsets"]
    numbers = [*shape, begin, end]
    if any(type(number) is not int or number < 0 for number in numbers) or begin > end:
        raise ValueError(f"'{name}' has impossible sizes or offsets")
    dtype = _DTYPES.get(kind)
    if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"'{name}' has {end - begin} bytes, which is not {kind} {shape}")
    return Entry(name, str(kind), dtype, torch.Size(shape), data + begin, data + end)
