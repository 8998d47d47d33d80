"""What passes between masks and the world: their bits and their file.

A mask of n weights is a uint8 tensor [ceil(n / 8)] on the CPU: bit i of byte j is flat index 8 j + i, and the
bits beyond n are zero. Everything here walks over a tensor in pieces, so that no temporary grows with it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PIECE = 1 << 20  # weights handled at once: a multiple of 8, and small enough for no temporary to matter
FORMAT = "pathprune.masks"
FORMAT_VERSION = "1"

Layers = dict[str, tuple[Tensor, torch.Size]]  # name -> (bits uint8 [ceil(n / 8)], shape of the weight)

_ONES_IN_BYTE = torch.tensor([byte.bit_count() for byte in range(256)])


class Count(NamedTuple):
    """Weights of one layer."""

    kept: int
    total: int


class Width(NamedTuple):
    """Units of one layer: rows are dimension 0, columns dimension 1; live ones keep at least one weight."""

    live_rows: int
    rows: int
    live_columns: int
    columns: int


class MaskFileError(ValueError):
    """The file is not a whole, untouched mask file."""


class MaskMismatchError(ValueError):
    """The masks do not belong to this model, or to each other."""


def flat_pieces(tensor: Tensor, size: int = PIECE) -> Iterator[tuple[int, Tensor]]:
    """Views of at most `size` elements that follow each other in flat (row-major) order, never a copy.

    Args:
        tensor: any shape, strides and dtype.

    Yields:
        (flat index of its first element, view)
    """
    if tensor.numel() <= size:
        yield 0, tensor
    elif tensor.is_contiguous():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), size):
            yield start, flat[start : start + size]
    else:
        row = tensor.numel() // len(tensor)
        rows = max(1, size // row)
        for first in range(0, len(tensor), rows):
            block = tensor[first : first + rows]
            for start, view in flat_pieces(block[0] if rows == 1 else block, size):
                yield first * row + start, view


def pack_bits(tensor: Tensor) -> Tensor:
    """One bit per element, set where the element is not zero (a NaN is not zero).

    Args:
        tensor: any shape, strides, dtype and device.

    Returns:
        uint8 [ceil(n / 8)], on the CPU.
    """
    packed = torch.zeros(-(-tensor.numel() // 8), dtype=torch.uint8)
    target = packed.numpy()
    for start, piece in flat_pieces(tensor.detach()):
        bits = (piece != 0).cpu().reshape(-1).numpy()
        lead = start % 8  # a strided tensor's pieces may begin inside a byte
        block = np.packbits(np.pad(bits, (lead, 0)) if lead else bits, bitorder="little")
        target[start // 8 : start // 8 + len(block)] |= block
    return packed


def unpack_bits(packed: Tensor, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Bits start .. stop - 1 as a bool tensor [stop - start]; another device receives bits, not bools."""
    first = start // 8
    block = packed[first : -(-stop // 8)]
    if torch.device(device).type == "cpu":
        bits = torch.from_numpy(np.unpackbits(block.numpy(), bitorder="little").view(np.bool_))
    else:
        bits = unpack_by_shifts(block.to(device))
    return bits[start - 8 * first : stop - 8 * first]


def unpack_by_shifts(packed: Tensor) -> Tensor:
    """Every bit of uint8 [bytes] as a bool tensor [8 * bytes], on the device of `packed`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> places) & 1).bool().flatten()


def unpack_mask(packed: Tensor, shape: torch.Size, device: torch.device | str = "cpu") -> Tensor:
    """The mask as a bool tensor of the weight's shape."""
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    flat = mask.view(-1)
    for start in range(0, flat.numel(), PIECE):
        stop = min(start + PIECE, flat.numel())
        flat[start:stop] = unpack_bits(packed, start, stop, device)
    return mask


def clear_padding(packed: Tensor, total: int) -> Tensor:
    """Zeroes the bits beyond `total`, in place, and returns `packed`."""
    if total % 8:
        packed[-1] &= (1 << total % 8) - 1
    return packed


def count_ones(packed: Tensor) -> int:
    """Number of set bits, exact."""
    return int(torch.bincount(packed, minlength=256) @ _ONES_IN_BYTE) if packed.numel() else 0


def live_units(packed: Tensor, shape: torch.Size) -> tuple[int, int]:
    """How many rows (dimension 0) and columns (dimension 1, or one) keep at least one weight."""
    if math.prod(shape) == 0:
        return 0, 0
    rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
    row = math.prod(shape[1:])
    live_rows = 0
    live_columns = torch.zeros(columns, dtype=torch.bool)
    step = max(1, PIECE // row)
    for first in range(0, rows, step):
        bits = unpack_bits(packed, first * row, min(first + step, rows) * row)
        block = bits.view(-1, columns, row // columns).any(dim=2)  # [rows of the block, columns]
        live_rows += int(block.any(dim=1).sum())
        live_columns |= block.any(dim=0)
    return live_rows, int(live_columns.sum())


def scattered_bits(kept: int, total: int, seed: int) -> Tensor:
    """`kept` of `total` bits set, all placements equally likely.

    The places are those of the `kept` smallest of `total` 64-bit words of numpy's Philox, a stream that numpy
    promises not to change. It is drawn three times instead of stored: memory stays at one bit per weight.

    Args:
        seed: 128-bit key of the stream.

    Returns:
        uint8 [ceil(total / 8)]. The same for a seed on every machine.
    """
    packed = torch.zeros(-(-total // 8), dtype=torch.uint8)
    if kept == total:
        return clear_padding(packed.fill_(255), total)
    if kept == 0:
        return packed

    def words() -> Iterator[tuple[int, np.ndarray]]:
        stream = np.random.Philox(key=seed)
        for start in range(0, total, PIECE):
            yield start, stream.random_raw(min(PIECE, total - start))

    histogram = np.zeros(1 << 16, dtype=np.int64)
    for _, word in words():
        histogram += np.bincount((word >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    below = np.cumsum(histogram)
    top = int(np.searchsorted(below, kept))
    rank = kept - int(below[top] - histogram[top])  # the last one to keep is the rank-th smallest of this bin
    inside = np.concatenate([word[word >> np.uint64(48) == top] for _, word in words()])
    threshold = np.partition(inside, rank - 1)[rank - 1]
    equal = rank - int((inside < threshold).sum())  # words may repeat: the first ones count
    for start, word in words():
        chosen = word < threshold
        ties = np.flatnonzero(word == threshold)[:equal]
        chosen[ties] = True
        equal -= len(ties)
        block = np.packbits(chosen, bitorder="little")
        packed.numpy()[start // 8 : start // 8 + len(block)] = block
    return packed


def write_masks(path: str | os.PathLike[str], layers: Layers, metadata: dict[str, Any]) -> None:
    """Writes a safetensors file, or nothing at all; metadata must be JSON-able.

    The format's few bytes of framing are written here so that the bits stream from where they are, that a
    full disk is an OSError, and that the file is synced before it takes the place of the old one.
    """
    write_atomically(path, mask_chunks(layers, metadata))


def mask_chunks(layers: Layers, metadata: dict[str, Any]) -> list[Any]:
    """The contents of a mask file, as objects with the buffer interface."""
    text = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "shapes": json.dumps({name: list(shape) for name, (_, shape) in layers.items()}),
        "metadata": json.dumps(metadata),
    }
    bits = {name: packed for name, (packed, _) in layers.items()}
    if "__metadata__" in bits:
        raise ValueError("masks: '__metadata__' is safetensors' own and cannot name a weight")
    header: dict[str, Any] = {"__metadata__": text | {"checksum": _checksum(text, bits)}}
    offset = 0
    for name, packed in bits.items():
        end = offset + packed.numel()
        header[name] = {"dtype": "U8", "shape": [packed.numel()], "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return [len(head).to_bytes(8, "little"), head, *(packed.numpy().data for packed in bits.values())]


def read_masks(path: str | os.PathLike[str]) -> tuple[Layers, dict[str, Any]]:
    """Reads what `write_masks` wrote; nothing is unpickled.

    Raises:
        MaskFileError: truncated, altered, another kind of safetensors file, or written by a newer version.
        OSError: the file cannot be opened.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "Is a folder, not a file of masks", os.fspath(path))
    try:
        with safe_open(path, framework="pt") as file:
            text = dict(file.metadata() or {})
            if text.get("format") != FORMAT:
                found = f"format {text['format']!r}" if "format" in text else "no such entry"
                raise MaskFileError(f"{path}: wanted metadata with format {FORMAT!r}, got {found}")
            if text.get("format_version") != FORMAT_VERSION:
                raise MaskFileError(
                    f"{path}: wanted format version {FORMAT_VERSION}, got {text.get('format_version')}: "
                    "written by another version of pathprune, or altered"
                )
            # Cloned, because the library's tensors may be windows on the file.
            bits = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MaskFileError(f"{path}: truncated or not a safetensors file: {error}") from error
    checksum = text.pop("checksum", "none")
    if any(packed.dtype != torch.uint8 for packed in bits.values()) or checksum != _checksum(text, bits):
        raise MaskFileError(f"{path}: altered or damaged: the checksum is not that of the contents")
    try:
        shapes, metadata = json.loads(text["shapes"]), json.loads(text["metadata"])
        if shapes.keys() != bits.keys():
            raise ValueError("their names differ")
        return {name: (bits[name], torch.Size(shape)) for name, shape in shapes.items()}, metadata
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MaskFileError(f"{path}: shapes or metadata cannot be read: {error}") from error


def write_atomically(path: str | os.PathLike[str], chunks: Iterable[Any]) -> None:
    """Puts a whole new file at `path`; on any failure what was there stays and nothing else is left.

    The new file is written next to the old one (behind a symbolic link: next to its target), synced, renamed.

    Args:
        chunks: objects with the buffer interface, written one after the other.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "No such folder", folder)
    if os.path.exists(target) and not os.path.isfile(target):  # a rename would take a device's place
        raise FileExistsError(errno.EEXIST, "Is there, and is no ordinary file", target)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    # The rename itself survives a power cut only once the folder is synced; not every file system can.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _checksum(text: Mapping[str, str], bits: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    sizes = {name: packed.numel() for name, packed in bits.items()}
    digest.update(json.dumps([dict(text), sizes], sort_keys=True).encode())
    for name in sorted(bits):
        digest.update(bits[name].numpy().data)
    return f"blake2b:{digest.hexdigest()}"


def listed(label: str, names: Sequence[str]) -> str:
    """ "label a, b, c and 4 more", or "" if there are no names."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{label} {', '.join(names[:5])}{more}" if names else ""


def provenance(operation: str, operands: Sequence[Any], **facts: Any) -> dict[str, Any]:
    """Metadata of derived masks: how they came about; findings of the operands no longer hold."""
    own = [{key: value for key, value in masks.metadata.items() if key != "findings"} for masks in operands]
    bases = {facts.get("base_hash") for facts in own}
    base = {"base_hash": bases.pop()} if len(bases) == 1 and None not in bases else {}
    return {"operation": operation, "operands": own, **facts, **base}
