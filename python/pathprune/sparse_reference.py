"""The ops on sparse weights in plain torch: the definition, the tests' oracle, the fallback without the binary.

The functions take exactly the arguments of the schemas in `sparse_ops.py`, which documents them for callers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import checked, refuse
from .reference import map_weight, mask_pack, mask_unpack

MOST_STORED = 2**31 - 1  # `order` is int32


@checked
def sparse_index(layout: Tensor, row_start: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(index, layout_t, row_start_t, index_t, order) of a pattern."""
    bits = mask_unpack(layout, columns)  # [G, O, K]
    stored, told = int(bits.sum()), int(row_start[-1])
    if told != stored:
        refuse("sparse_index", "row_start", f"{stored} entries, as layout", told)
    if stored > MOST_STORED:
        refuse("sparse_index", "row_start", "at most 2^31 - 1 entries", stored)
    place = torch.zeros_like(bits, dtype=torch.int32)  # [G, O, K]
    place[bits] = torch.arange(stored, dtype=torch.int32, device=bits.device)
    ends = bits.sum(1).flatten().cumsum(0)  # [G * K]
    return (
        bits.nonzero()[:, 2].to(torch.int16),
        mask_pack(bits.mT.contiguous()),
        torch.cat((ends.new_zeros(1), ends)),
        bits.mT.nonzero()[:, 2].to(torch.int16),
        place.mT[bits.mT],
    )


def _written_out(values: Tensor, layout: Tensor, columns: int) -> Tensor:
    """[G, O, K]: the values where the layout says, and zeros."""
    bits = mask_unpack(layout, columns)
    dense = values.new_zeros(bits.shape)
    dense[bits] = values[: int(bits.sum())]
    return dense


@checked
def sparse_matmul(
    values: Tensor,
    x: Tensor,
    f: int,
    transposed: bool,
    kernel: int,
    layout: Tensor,
    row_start: Tensor,
    index: Tensor,
    layout_t: Tensor | None,
    row_start_t: Tensor | None,
    index_t: Tensor | None,
    order: Tensor | None,
    columns: int,
) -> Tensor:
    """[G, T, O] for x [G, T, K]; transposed: [G, T, K] for x [G, T, O]. In float64, rounded once to A."""
    weight = _written_out(map_weight(values, f), layout, columns).double()
    return (x.double() @ (weight if transposed else weight.mT)).to(x.dtype)


@checked
def sparse_sample(
    x: Tensor,
    g: Tensor,
    layout: Tensor,
    row_start: Tensor,
    index: Tensor,
    layout_t: Tensor | None,
    row_start_t: Tensor | None,
    index_t: Tensor | None,
    order: Tensor | None,
    columns: int,
) -> Tensor:
    """[stored]: sum_t g_tr x_tc at the entries. In float64, rounded once to A."""
    return (g.double().mT @ x.double())[mask_unpack(layout, columns)].to(x.dtype)


@checked
def sparse_gather(dense: Tensor, layout: Tensor, row_start: Tensor, index: Tensor, columns: int) -> Tensor:
    """[stored]: the weights at the entries."""
    return dense[mask_unpack(layout, columns)]


@checked
def sparse_scatter(values: Tensor, layout: Tensor, row_start: Tensor, index: Tensor, columns: int) -> Tensor:
    """[G, O, K]: the values at the entries, zeros elsewhere."""
    return _written_out(values, layout, columns)


@checked
def tiled_matmul(
    weight: Tensor,
    x: Tensor,
    transposed: bool,
    layout: Tensor,
    index: Tensor | None,
    tile_start: Tensor | None,
    columns: int,
) -> Tensor:
    """[G, T, O] for x [G, T, K]; transposed: [G, T, K] for x [G, T, O]. In float64, rounded once."""
    bits = mask_unpack(layout, columns)
    dense = torch.where(bits, weight, 0) if index is None else _written_out(weight, layout, columns)
    return (x.double() @ (dense.double() if transposed else dense.double().mT)).to(x.dtype)


@checked
def tiled_sample(
    x: Tensor, g: Tensor, layout: Tensor, index: Tensor | None, tile_start: Tensor | None, columns: int
) -> Tensor:
    """[stored]: sum_t g_tr x_tc at the entries; for a dense weight [G, O, K]. In float64, rounded once."""
    bits, sums = mask_unpack(layout, columns), g.double().mT @ x.double()
    return (torch.where(bits, sums, 0) if index is None else sums[bits]).to(x.dtype)


@checked
def thin_convolution(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride_y: int,
    stride_x: int,
    padding_y: int,
    padding_x: int,
    dilation_y: int,
    dilation_x: int,
    counting: bool,
    mask: Tensor | None,
) -> Tensor:
    """[N, O, H', W']: torch's own convolution."""
    geometry = ((stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x), False, (0, 0), 1)
    return torch.convolution(x, w, bias, *geometry).contiguous()


@checked
def thin_sample(
    x: Tensor,
    g: Tensor,
    mask: Tensor,
    kernel_y: int,
    kernel_x: int,
    stride_y: int,
    stride_x: int,
    padding_y: int,
    padding_x: int,
    dilation_y: int,
    dilation_x: int,
) -> Tensor:
    """[O, C, kernel_y, kernel_x]: torch's own gradient by the weight where the mask has ones, zeros elsewhere."""
    shape = (g.shape[1], x.shape[1], kernel_y, kernel_x)
    geometry = ((stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x), False, (0, 0), 1)
    w = x.new_empty(1).expand(shape)
    made = torch.ops.aten.convolution_backward(g, x, w, None, *geometry, [False, True, False])[1]
    return torch.where(mask_unpack(mask, w[0].numel()).reshape(shape), made, 0)
