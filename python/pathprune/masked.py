"""Products with masked weights: `masked_matmul`, and masks packed for it.

mask = pp.pack_mask(weight.abs() > 0.01)             # once per mask
values = mask.gather(weight)                         # [nnz], the parameter to train
y = pp.masked_matmul(x, values, mask, bias)          # x (W . M)^T + b, with both gradients
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import WEIGHT_DTYPES, accumulate_dtype, refuse
from .ops import mask_pack, mask_unpack
from .sparse_ops import (
    KERNELS,
    Pattern,
    Tiles,
    sparse_gather,
    sparse_index,
    sparse_matmul,
    sparse_scatter,
    tile_starts,
    tiled_matmul,
)

__all__ = ["PackedMask", "cuda_times", "expected_speedup", "masked_matmul", "pack_mask"]

_OP = "masked_matmul"

# How many times faster than F.linear on a dense weight of the same shape with its zeros written out: measured
# in float32 on one thread of an AMD EPYC (AVX-512), square weights; first the forward alone, then with both
# gradients. benchmarks/masked_matmul.py measures it anew.
_SIDES = (32, 256, 1024, 4096)  # the square root of rows * columns
_DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
_BATCHES = (1, 8, 32, 128, 256, 1024)
_Grid = tuple[tuple[tuple[float, ...], ...], ...]
_FORWARD: _Grid = (
    (
        (0.29, 0.33, 0.34, 0.42, 0.49, 0.78),
        (0.3, 0.32, 0.36, 0.43, 0.5, 0.64),
        (0.31, 0.33, 0.34, 0.44, 0.5, 0.53),
        (0.3, 0.33, 0.35, 0.41, 0.46, 0.53),
        (0.3, 0.31, 0.36, 0.4, 0.46, 0.51),
        (0.3, 0.3, 0.33, 0.37, 0.4, 0.45),
    ),
    (
        (0.33, 0.89, 1.1, 2.1, 2.9, 2.2),
        (0.33, 0.87, 1.0, 1.7, 2.1, 1.9),
        (0.31, 0.82, 0.91, 1.7, 2.0, 2.0),
        (0.29, 0.75, 0.75, 1.3, 1.6, 1.5),
        (0.28, 0.58, 0.66, 0.89, 1.0, 1.1),
        (0.28, 0.42, 0.45, 0.56, 0.68, 0.66),
    ),
    (
        (2.3, 12.0, 4.8, 5.9, 7.2, 4.8),
        (1.4, 7.6, 5.2, 4.4, 4.6, 6.0),
        (0.99, 5.2, 3.2, 3.4, 3.6, 4.4),
        (0.76, 3.3, 1.9, 2.5, 2.5, 3.0),
        (0.72, 1.4, 1.0, 1.5, 1.5, 1.5),
        (0.74, 0.72, 0.64, 0.81, 0.8, 0.83),
    ),
    (
        (23.0, 68.0, 18.0, 22.0, 19.0, 13.0),
        (8.3, 17.0, 11.0, 12.0, 9.2, 9.6),
        (3.6, 5.5, 6.6, 6.0, 5.8, 5.7),
        (2.2, 2.3, 2.8, 4.2, 3.6, 3.6),
        (1.6, 1.1, 1.5, 1.9, 1.8, 1.6),
        (0.91, 0.69, 0.72, 1.2, 0.89, 0.86),
    ),
)
_TRAINING: _Grid = (
    (
        (0.28, 0.3, 0.32, 0.41, 0.5, 0.7),
        (0.27, 0.3, 0.33, 0.41, 0.47, 0.6),
        (0.27, 0.29, 0.32, 0.42, 0.47, 0.52),
        (0.27, 0.3, 0.32, 0.41, 0.46, 0.57),
        (0.26, 0.28, 0.33, 0.4, 0.45, 0.53),
        (0.27, 0.28, 0.31, 0.36, 0.4, 0.45),
    ),
    (
        (0.44, 0.69, 1.1, 2.0, 2.4, 2.0),
        (0.43, 0.66, 0.98, 1.7, 1.9, 1.9),
        (0.42, 0.63, 0.91, 1.7, 1.8, 1.8),
        (0.4, 0.58, 0.8, 1.2, 1.4, 1.3),
        (0.37, 0.47, 0.55, 0.8, 0.83, 0.91),
        (0.36, 0.36, 0.41, 0.55, 0.56, 0.58),
    ),
    (
        (1.9, 8.3, 4.8, 5.7, 7.4, 5.5),
        (1.4, 5.7, 3.9, 4.1, 4.3, 4.4),
        (1.1, 3.6, 2.5, 3.2, 3.1, 3.5),
        (0.77, 2.8, 1.8, 2.2, 2.2, 2.4),
        (0.59, 1.2, 1.0, 1.2, 1.2, 1.2),
        (0.63, 0.54, 0.42, 0.65, 0.6, 0.67),
    ),
    (
        (33.0, 40.0, 22.0, 17.0, 14.0, 9.9),
        (12.0, 11.0, 10.0, 9.6, 7.4, 6.5),
        (5.7, 5.4, 3.6, 5.2, 4.7, 3.9),
        (2.7, 2.8, 2.0, 2.4, 2.7, 2.4),
        (1.2, 1.2, 1.5, 1.6, 1.3, 1.1),
        (0.93, 0.72, 0.55, 0.75, 0.67, 0.62),
    ),
)


# What writing a packed weight out for a dense product takes, in rows of x of that product.
WRITING_OUT = 16


class _Picoseconds(NamedTuple):
    """What one weight of a product takes on a GPU, T rows of x, density d."""

    entry: float  # by entries: d * max(entry, T); a read of x in L2 or L1 for every entry and row
    narrow: float  # in tiles, up to NARROW rows
    wide: float  # in tiles, for each WIDE rows
    crowded: float  # in tiles, for what d is above 0.2: entries that are not read ahead
    written: float  # dense: zeros written out
    read: float  # dense: the weight read, or
    row: float  # for each row of x multiplied, what takes longer

    def dense(self, batch: int) -> float:
        """On a weight that has its zeros."""
        return max(self.read, self.row * batch)


# Predicted for an H200, bytes and instructions as benchmarks/roofline.md counts them, by bytes of a number;
# not yet measured on any GPU.
_CUDA = {
    2: _Picoseconds(0.9, 0.39, 0.44, 0.64, 0.6, 0.47, 0.0033),
    4: _Picoseconds(1.4, 2.0, 3.6, 0.64, 1.1, 0.93, 0.04),
}
_NARROW, _WIDE, _TILE = 32, 64, 128


def cuda_times(rows: int, columns: int, density: float, batch: int, dtype: torch.dtype) -> dict[str, float]:
    """Picoseconds a weight of each way to multiply on CUDA, as predicted: the smallest one is chosen.

    "auto", the kernels by entries, for few rows of x or thin masks; "tiles" from there to some 130 rows (16-bit
    numbers) or 60 (float32); "dense", cuBLAS on a weight with its zeros written out, beyond. float64 has "auto" and
    "dense" alone. Launches are not counted, so for layers of less than some hundred thousand weights, where they are
    what counts, the choice means little.
    """
    cost = _CUDA[2 if dtype.itemsize == 2 else 4]
    # A tile that hangs over the edge of the weight takes as long as a whole one.
    padded = -(-rows // _TILE) * _TILE * (-(-columns // _WIDE) * _WIDE) / max(1, rows * columns)
    passes = cost.narrow if batch <= _NARROW else cost.wide * -(-batch // _WIDE)
    times = {"auto": density * max(cost.entry, batch), "dense": cost.written + cost.dense(batch)}
    if dtype != torch.float64:
        times["tiles"] = padded * (passes + cost.crowded * max(0.0, density - 0.2))
    return times


def _between(marks: tuple[float, ...], at: float) -> tuple[int, int, float]:
    """The marks beside `at`, and how far it is from the first to the second, on a logarithmic scale."""
    high = sum(mark < at for mark in marks)
    if high in (0, len(marks)):
        return (end := min(high, len(marks) - 1)), end, 0.0
    low = high - 1
    return low, high, math.log(at / marks[low]) / math.log(marks[high] / marks[low])


def expected_speedup(
    rows: int,
    columns: int,
    density: float,
    batch: int,
    *,
    training: bool = False,
    on_cuda: torch.dtype | None = None,
) -> float:
    """How many times faster the sparse kernels should be than a dense product, by the measured table.

    Args:
        rows, columns: of the weight.
        density: the share of it that is kept.
        batch: rows of x.
        training: forward and both gradients, instead of the forward alone.
        on_cuda: the dtype of a weight on CUDA, where there is no measured table: by `cuda_times`.
    """
    if on_cuda is not None:
        cost = _CUDA[2 if on_cuda.itemsize == 2 else 4]
        return cost.dense(batch) / min(cuda_times(rows, columns, density, batch, on_cuda).values())
    side, kept = math.sqrt(max(1, rows * columns)), max(density, 1e-6)
    log = 0.0
    s, d, b = _between(_SIDES, side), _between(_DENSITIES, kept), _between(_BATCHES, max(1, batch))
    table = _TRAINING if training else _FORWARD
    for i, of_side in ((s[0], 1 - s[2]), (s[1], s[2])):
        for j, of_density in ((d[0], 1 - d[2]), (d[1], d[2])):
            for k, of_batch in ((b[0], 1 - b[2]), (b[1], b[2])):
                log += of_side * of_density * of_batch * math.log(table[i][j][k])
    return math.exp(log)


class PackedMask:
    """A mask [out, in] with what the kernels need: its bits, and the order of its entries both ways.

    Attributes:
        pattern: the tensors, as `sparse_ops` describes them, with G = 1 (or the groups of a convolution).
        out_features, in_features: of one group.
        stored: entries in all.

    The tensors belong to the mask: changing them, or the bool tensor it was packed from, makes `masked_matmul`
    refuse it.
    """

    def __init__(self, pattern: Pattern, source: Tensor | None = None) -> None:
        self.pattern = pattern
        self.groups, self.out_features = int(pattern.layout.shape[0]), int(pattern.layout.shape[1])
        self.in_features, self.stored = pattern.columns, int(pattern.column_index.shape[0])
        self._kernels: dict[tuple[int, bool, torch.dtype], str] = {}
        self._tiles: Tiles | None = None
        watched = () if torch.compiler.is_compiling() else (pattern.layout, source)
        told = [t for t in watched if t is not None and not t.is_inference()]  # that it is written to
        self._watched = [(weakref.ref(tensor), tensor._version) for tensor in told]

    def __getstate__(self) -> Pattern:
        return self.pattern

    def __setstate__(self, pattern: Pattern) -> None:
        self.__init__(pattern)  # type: ignore[misc]

    @property
    def density(self) -> float:
        """The share of weights that are kept."""
        return self.stored / max(1, self.groups * self.out_features * self.in_features)

    @property
    def device(self) -> torch.device:
        return self.pattern.layout.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors. The values are apart."""
        return sum(t.numel() * t.element_size() for t in self.pattern if isinstance(t, Tensor))

    def to(self, device: torch.device | str) -> PackedMask:
        moved: list[Any] = [t.to(device) if isinstance(t, Tensor) else t for t in self.pattern]
        return PackedMask(Pattern(*moved))

    def bits(self) -> Tensor:
        """[out, in] bool; [groups, out, in] where there are groups."""
        return self._of_weight(mask_unpack(self.pattern.layout, self.in_features))

    def gather(self, weight: Tensor) -> Tensor:
        """[stored]: the weights [out, in] that are kept. Differentiable."""
        return sparse_gather(weight.reshape(self.groups, self.out_features, self.in_features), self.pattern)

    def scatter(self, values: Tensor) -> Tensor:
        """[out, in]: the values [stored] in their places, zeros elsewhere. Differentiable."""
        return self._of_weight(sparse_scatter(values, self.pattern))

    def tiles(self) -> Tiles:
        """What products in tiles of packed values take, made when first asked for."""
        if self._tiles is not None:
            return self._tiles
        pattern = self.pattern
        starts = tile_starts(pattern.layout, pattern.columns)
        made = Tiles(pattern.layout, pattern.column_index, starts, pattern.columns)
        if not torch.compiler.is_compiling():
            self._tiles = made
        return made

    def _of_weight(self, weight: Tensor) -> Tensor:
        return weight[0] if self.groups == 1 else weight

    def to_csr(self, values: Tensor) -> Tensor:
        """[out, in] as a torch.sparse CSR tensor, which keeps a copy of the values. One group only."""
        if self.groups != 1:
            refuse("to_csr", "mask", "one group", self.groups)
        columns = mask_unpack(self.pattern.layout, self.in_features)[0].nonzero()[:, 1]
        size = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.pattern.row_start, columns, values[: self.stored].clone(), size)

    @classmethod
    def from_csr(cls, csr: Tensor) -> tuple[PackedMask, Tensor]:
        """(mask, values [stored]) of a torch.sparse CSR tensor; an entry stored as zero stays an entry."""
        if csr.layout != torch.sparse_csr:
            refuse("from_csr", "csr", "a torch.sparse CSR tensor", csr.layout)
        rows = torch.repeat_interleave(csr.crow_indices().long().diff())
        bits = torch.zeros(csr.shape, dtype=torch.bool, device=csr.device)
        bits[rows, csr.col_indices().long()] = True
        mask, dense = pack_mask(bits), torch.zeros(csr.shape, dtype=csr.dtype, device=csr.device)
        dense[rows, csr.col_indices().long()] = csr.values()
        return mask, mask.gather(dense)

    def expected_speedup(self, batch: int, *, training: bool = False) -> float:
        """Over a dense product, by the measured table."""
        return expected_speedup(self.out_features, self.in_features, self.density, batch, training=training)

    def kernel(self, batch: int, *, training: bool = False, dtype: torch.dtype = torch.float32) -> str:
        """What `masked_matmul` takes for so many rows of x: "auto", the sparse kernels, "tiles", or "dense".

        On the CPU by the measured table, whatever the dtype; on CUDA by `cuda_times`, which is a prediction.
        """
        chosen = self._kernels.get((batch, training, dtype))
        if chosen is None:
            chosen = self._faster(batch, training, dtype)
            if not torch.compiler.is_compiling():
                self._kernels[batch, training, dtype] = chosen
        return chosen

    def _faster(self, batch: int, training: bool, dtype: torch.dtype) -> str:
        if self.device.type == "cuda":
            times = cuda_times(self.out_features, self.in_features, self.density, batch, dtype)
            return min(times, key=times.__getitem__)
        speedup = self.expected_speedup(batch, training=training)
        return "auto" if speedup >= batch / (batch + WRITING_OUT) else "dense"

    def check_unchanged(self, op: str = _OP) -> None:
        """Raises ValueError where a tensor has been written to since the mask was packed."""
        for tensor, version in self._watched:
            alive = tensor()
            if alive is not None and alive._version != version:
                refuse(op, "mask", "a mask that did not change after packing", "one that was written to")

    def __repr__(self) -> str:
        shape = (self.out_features, self.in_features) if self.groups == 1 else self.pattern.layout.shape[:2]
        return f"PackedMask({tuple(shape)}, {self.stored} kept, density {self.density:.4g}, {self.device})"


def pack_mask(mask: Tensor) -> PackedMask:
    """Packs a mask for `masked_matmul`, once for all products with it.

    Args:
        mask: [out, in] bool, True keeps the weight; or [groups, out, in].

    Raises:
        ValueError: another dtype or number of dimensions, or more than 2^31 - 1 entries.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 3):
        refuse("pack_mask", "mask", "bool [out, in]", mask)
    bits = mask if mask.dim() == 3 else mask[None]
    layout = mask_pack(bits)
    return PackedMask(_pattern(layout, bits.sum(-1).flatten(), bits.shape[2]), mask)


def unpack_layout(layout: Tensor, columns: int) -> PackedMask:
    """The mask whose bits are `layout` [groups, out, ceil(columns / 16)] int16."""
    return PackedMask(_pattern(layout, mask_unpack(layout, columns).sum(-1).flatten(), columns))


def _pattern(layout: Tensor, counts: Tensor, columns: int) -> Pattern:
    ends = counts.cumsum(0)
    return sparse_index(layout, torch.cat((ends.new_zeros(1), ends)), columns)


def masked_matmul(
    x: Tensor, weight: Tensor, mask: Tensor | PackedMask, bias: Tensor | None = None, *, kernel: str | None = None
) -> Tensor:
    """x (W . M)^T + b, computed where the mask is one, as are its gradients.

    dX = dY (W . M); dW = (dY^T X) . M, and exactly 0 off the mask. Differentiable twice and more, backward and
    forward, and under torch.func. Under autocast x and the weight are cast as for `F.linear`. On the CPU the result
    is the same for any number of threads.

    Args:
        x: [..., in] float32, bfloat16, float16 (sums in float32) or float64; any strides, batch 0.
        weight: dense [out, in], its gradient dense; or packed [stored] (`mask.gather`), its gradient too.
        mask: [out, in] bool, packed for this call; or what `pack_mask` made of it.
        bias: [out].
        kernel: None chooses, as `PackedMask.kernel` tells; "lanes", "gather", "expand" (the last two for one row of
            x), "auto" (any of these), "tiles" (dense products in tiles that the mask is applied to as they are loaded;
            on CUDA, and without a kernel of its own on the CPU) or "dense" forces one.

    Returns:
        [..., out] of x's dtype.

    Raises:
        ValueError: a wrong dtype, shape or device, or a mask that was written to after packing.

    Example:
        mask = pp.pack_mask(torch.rand(64, 128) < 0.1)
        y = pp.masked_matmul(torch.rand(32, 128), torch.rand(64, 128), mask)
    """
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        refuse(_OP, "x and weight", "tensors", f"{type(x).__name__} and {type(weight).__name__}")
    packed = mask if isinstance(mask, PackedMask) else pack_mask(mask)
    if not torch.compiler.is_compiling():
        packed.check_unchanged()
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, packed, bias)
    batch = math.prod(x.shape[:-1])
    if kernel is None:
        training = torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad)
        kernel = packed.kernel(batch, training=training, dtype=x.dtype)
    if kernel == "tiles":
        return _in_tiles(x, weight, packed, bias, batch)
    values = weight if weight.dim() == 1 else packed.gather(weight)
    if kernel == "dense":
        return F.linear(x, packed.scatter(values), bias)
    if kernel not in KERNELS:
        refuse(_OP, "kernel", f"one of {[*KERNELS, 'tiles', 'dense']}", kernel)
    flow = x.to(accumulate_dtype(values.dtype)).reshape(1, batch, packed.in_features)
    y = sparse_matmul(values, flow, packed.pattern, kernel=KERNELS[kernel])
    y = y.to(x.dtype).view(*x.shape[:-1], packed.out_features)
    return y if bias is None else y + bias


def _in_tiles(x: Tensor, weight: Tensor, mask: PackedMask, bias: Tensor | None, batch: int) -> Tensor:
    flow = x.reshape(1, batch, mask.in_features)
    if weight.dim() == 1:
        y = tiled_matmul(weight, flow, mask.tiles())
    else:
        y = tiled_matmul(weight[None], flow, Tiles(mask.pattern.layout, None, None, mask.in_features))
    y = y.view(*x.shape[:-1], mask.out_features)
    return y if bias is None else y + bias


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check(x: Tensor, weight: Tensor, mask: PackedMask, bias: Tensor | None) -> None:
    out, inward = mask.out_features, mask.in_features
    if mask.groups != 1:
        refuse(_OP, "mask", "[out, in]", f"{mask.groups} groups")
    if x.dtype not in WEIGHT_DTYPES or x.dim() == 0 or x.shape[-1] != inward or x.device != mask.device:
        refuse(_OP, "x", f"a float tensor [..., {inward}] on {mask.device}", x)
    if weight.dtype != x.dtype or weight.device != x.device:
        refuse(_OP, "weight", f"{str(x.dtype).removeprefix('torch.')} on {x.device}, as x", weight)
    if tuple(weight.shape) not in ((out, inward), (mask.stored,)):
        refuse(_OP, "weight", f"[{out}, {inward}] or packed [{mask.stored}]", weight)
    if bias is not None and (tuple(bias.shape) != (out,) or bias.dtype != x.dtype or bias.device != x.device):
        refuse(_OP, "bias", f"[{out}] of x's dtype on {x.device}", bias)
