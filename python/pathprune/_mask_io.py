"""What passes between masks and the world: their bits, their file, and the parameters they are written to.

A mask of n weights is a uint8 tensor [ceil(n / 8)] on the CPU: bit i of byte j is flat index 8 j + i, and the
bits beyond n are zero. Everything here walks over a tensor in pieces, so that no temporary grows with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PIECE = 1 << 20  # weights handled at once: a multiple of 8, and small enough for no temporary to matter
FORMAT = "pathprune.masks"
FORMAT_VERSION = "1"

Layers = dict[str, tuple[Tensor, torch.Size]]  # name -> (bits uint8 [ceil(n / 8)], shape of the weight)

_ONES_IN_BYTE = torch.tensor([byte.bit_count() for byte in range(256)])


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


def base_hash(
    model: nn.Module | Mapping[str, Tensor], names: Iterable[str], used: Callable[[str], None] = lambda name: None
) -> str:
    """Fingerprint of dense weights: blake2b over name, shape, dtype and values of each, in order of name.

    Neither the device nor the strides of a weight matter; its dtype and each of its bits do.

    Args:
        model: holds a parameter of each name; or those tensors, by name.
        names: fully-qualified parameter names, in any order.
        used: called with each name when its weight has been read.

    Returns:
        "blake2b:" and 32 hexadecimal digits.

    Raises:
        KeyError: the model has no parameter of that name.
        ValueError: a parameter is on the meta device: it has no values.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else model
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(names):
        weight = parameters[name].detach()
        if weight.is_meta:
            raise ValueError(f"base_hash: {name}: wanted a weight with values, got one on the meta device")
        digest.update(json.dumps([name, list(weight.shape), str(weight.dtype)]).encode())
        for _, piece in flat_pieces(weight):
            values = piece.reshape(-1).cpu().contiguous().view(torch.uint8)
            digest.update(values.numpy().data)
        used(name)
    return f"blake2b:{digest.hexdigest()}"


def write_masks(path: str | os.PathLike[str], layers: Layers, metadata: dict[str, Any]) -> None:
    """Writes a safetensors file, or nothing at all; metadata must be JSON-able.

    The format's few bytes of framing are written here so that the bits stream from where they are, that a
    full disk is an OSError, and that the file is synced before it takes the place of the old one.
    """
    text = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "shapes": json.dumps({name: list(shape) for name, (_, shape) in layers.items()}),
        "metadata": json.dumps(metadata),
    }
    bits = {name: packed for name, (packed, _) in layers.items()}
    if "__metadata__" in bits:
        raise ValueError("write_masks: '__metadata__' is safetensors' own and cannot name a weight")
    header: dict[str, Any] = {"__metadata__": text | {"checksum": _checksum(text, bits)}}
    offset = 0
    for name, packed in bits.items():
        end = offset + packed.numel()
        header[name] = {"dtype": "U8", "shape": [packed.numel()], "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    frame = [len(head).to_bytes(8, "little"), head]
    write_atomically(path, [*frame, *(packed.numpy().data for packed in bits.values())])


def read_masks(path: str | os.PathLike[str]) -> tuple[Layers, dict[str, Any]]:
    """Reads what `write_masks` wrote; nothing is unpickled.

    Raises:
        MaskFileError: truncated, altered, another kind of safetensors file, or written by a newer version.
        OSError: the file cannot be opened.
    """
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


@dataclass(frozen=True)
class Difference:
    """What sets masks and a model apart; `str()` says it in words."""

    absent: tuple[str, ...] = ()  # masks whose weight the model does not have
    unmasked: tuple[str, ...] = ()  # weights of the model without a mask: no fault, they stay dense
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()  # (name, mask's, model's)
    base: tuple[str, str] | None = None  # base_hash (of the metadata, of the model) where they differ
    hint: str = ""

    def __str__(self) -> str:
        shapes = [f"{name} (mask {list(mask)}, model {list(model)})" for name, mask, model in self.shapes]
        lines = [
            listed("the model has no", self.absent),
            listed("other shapes:", shapes),
            listed("weights of the model without a mask:", self.unmasked),
            f"base weights: masks made on {self.base[0]}, model has {self.base[1]}" if self.base else "",
            self.hint,
        ]
        return "; ".join(line for line in lines if line) or "no difference"


def naming_hint(absent: Sequence[str], present: Mapping[str, object]) -> str:
    """Why the model may know the first absent name by another one."""
    for name in absent[:1]:
        if f"{name}_orig" in present:
            return "the model is under torch.nn.utils.prune, which renames weights: remove that first"
        for other in present:
            if other.endswith(f".{name}"):
                return f"its names begin with {other.removesuffix(name)!r}: pass the wrapped model"
            if name.endswith(f".{other}"):
                return f"the masks' names begin with {name.removesuffix(other)!r}: they are of a wrapped model"
    return ""


def dense_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of two or more dimensions, tied ones once, except those that only embeddings hold."""
    used = {
        weight
        for module in model.modules()
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for weight in module._parameters.values()
    }
    return {name: weight for name, weight in model.named_parameters() if weight.ndim >= 2 and weight in used}


def refuse_unwritable(model: nn.Module, name: str, weight: Tensor) -> None:
    """Raises ValueError for a parameter in which zeros written in place would fail or be lost."""
    if weight.is_meta:
        holder = model.get_submodule(name.rpartition(".")[0])
        offloaded = "accelerate has offloaded it: apply the masks before the model is dispatched"
        hint = offloaded if hasattr(holder, "_hf_hook") else "load the weights first"
        reason = f"it is on the meta device and has no values ({hint})"
    elif weight.layout is not torch.strided:
        reason = f"its layout is {weight.layout}, not dense"
    elif hasattr(weight, "to_local"):
        reason = "it is distributed: apply the masks before the model is sharded"
    elif weight.is_inference():
        reason = "it was made under torch.inference_mode()"
    elif any(step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)):
        reason = "several of its elements share memory"
    else:
        return
    raise ValueError(f"masks: {name} cannot be written: {reason}")


def compare(model: nn.Module, shapes: Mapping[str, Sequence[int]], recorded: str | None) -> Difference:
    """What sets masks and a model apart.

    Args:
        shapes: of the masks.
        recorded: hash of the weights they were made on; None: not compared, and neither where names or shapes
            differ or a weight is on the meta device.
    """
    present = dict(model.named_parameters(remove_duplicate=False))
    absent = [name for name in shapes if name not in present]
    other = [
        (name, tuple(shape), tuple(present[name].shape))
        for name, shape in shapes.items()
        if name in present and tuple(present[name].shape) != tuple(shape)
    ]
    covered = {present[name] for name in shapes if name in present}
    unmasked = [name for name, weight in dense_weights(model).items() if weight not in covered]
    base = None
    if recorded and not absent and not other and not any(weight.is_meta for weight in covered):
        found = base_hash(model, shapes)
        base = (recorded, found) if found != recorded else None
    return Difference(tuple(absent), tuple(unmasked), tuple(other), base, naming_hint(absent, present))


def provenance(operation: str, operands: Sequence[Any], **facts: Any) -> dict[str, Any]:
    """Metadata of derived masks: how they came about; findings of the operands no longer hold."""
    own = [{key: value for key, value in masks.metadata.items() if key != "findings"} for masks in operands]
    bases = {facts.get("base_hash") for facts in own}
    base = {"base_hash": bases.pop()} if len(bases) == 1 and None not in bases else {}
    return {"operation": operation, "operands": own, **facts, **base}


def write_zeros(weight: Tensor, packed: Tensor) -> None:
    """Zero, in place, wherever the bit is not set."""
    for start, piece in flat_pieces(weight.detach()):
        kept = unpack_bits(packed, start, start + piece.numel(), piece.device)
        piece.masked_fill_(~kept.view(piece.shape), 0)


class Maintenance:
    """Keeps removed weights at exact zero while an optimizer trains: a context manager, or call `remove()`.

    Gradients are masked as they are accumulated, so that clipping by norm sees kept weights only. That alone
    is not enough: momentum from before pruning would still move removed weights. So after each step the
    parameters, and every floating-point state tensor of a parameter's shape (momentum, exp_avg, ...), are
    masked too. Costs one byte per trained weight, on its device. Nothing is stored in the model, which can be
    copied, pickled and saved meanwhile.

    Args:
        masked: parameter -> bits uint8 [ceil(n / 8)] of its mask; may join the optimizer later.
        optimizer: any torch optimizer; a wrapper that keeps the real one in `.optimizer` is seen through.

    Raises:
        ValueError: the optimizer holds none of the parameters. Nothing was written.
    """

    def __init__(self, masked: Mapping[nn.Parameter, Tensor], optimizer: torch.optim.Optimizer) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._bits = dict(masked)
        self._removed: dict[tuple[nn.Parameter, torch.device], Tensor] = {}
        self._handles: list[Any] = []
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if self._bits and held.isdisjoint(self._bits):
            raise ValueError("maintain: optimizer: wanted one of this model, got one of no masked parameter")
        for parameter, packed in self._bits.items():
            write_zeros(parameter, packed)
            self._mask_gradient(parameter)
        self._mask_optimized(optimizer)
        for parameter in self._bits:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._mask_gradient))
        self._handles.append(optimizer.register_step_post_hook(self._mask_optimized))

    def remove(self) -> None:
        """Ends the maintenance; the weights stay as they are. May be called again."""
        while self._handles:
            self._handles.pop().remove()
        self._bits.clear()
        self._removed.clear()

    def __enter__(self) -> Maintenance:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _mask(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        key = (parameter, tensor.device)
        if key not in self._removed:
            self._removed[key] = ~unpack_mask(self._bits[parameter], parameter.shape, tensor.device)
        tensor.masked_fill_(self._removed[key], 0)

    def _mask_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None and parameter.grad.layout is torch.strided:
            self._mask(parameter, parameter.grad)

    @torch.no_grad()
    def _mask_optimized(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in self._bits:
                    continue
                self._mask(parameter, parameter)
                for state in optimizer.state.get(parameter, {}).values():
                    if not isinstance(state, Tensor) or state.shape != parameter.shape:
                        continue
                    if state.is_floating_point():  # integers are codes, in which 0 need not mean zero
                        self._mask(parameter, state)
