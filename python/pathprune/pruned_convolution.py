"""Convolutions with weights that pruning has thinned, over many images at once.

Three exact ways, chosen by what is left: torch's own; torch's own on the channels that are not all zero; and, where few
weights are left, ``thin_convolution``, which skips zeros: as many images, or bands of their rows, as a vector has lanes
are laid side by side, so that what a kernel entry reads are whole vectors, whatever its shift and the stride.

In training ``thin_sample`` sums the gradient by the weights that are left, and by no others, in the same layout.

Bytes: the images about once; some channels of a few rows of them, in the cache, for every weight that is left; the
outputs once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import _LIBRARY
from .thin_ops import thin_convolution

_CHANNELS = 0.8  # share of channel pairs left below which it pays to leave the dead ones out
_ENTRIES = 0.55, 0.9  # share of weights left below which to skip zeros; of layers with few channels
_FEW_CHANNELS = 24
_ONE_ENTRY = 0.7  # of that share, for kernels of one entry: images are laid out for few products
_PREPARED = 40  # a weight's preparation takes as long as so many of its products
_KEPT = 0.35  # share of weights left below which the gradient is computed for these alone ...
_SETUP = 256  # ... where an entry's preparation takes no longer than so many outputs
_SMALL = 1 << 22  # multiply-adds below which torch's own is quick enough

_LIBRARY.define(
    "pruned_convolution(Tensor x, Tensor w, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def pruned_convolution(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """``torch.convolution`` for weights with many zeros; equal to it up to the order of its sums. No gradients.

    Args:
        x: [N, C, *size]; w: [O, C / groups, *kernel] with zeros where it is pruned; bias: [O] or None.
    """
    return torch.ops.pathprune.pruned_convolution(x, w, bias, stride, padding, dilation, groups)


def _convolved(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = (stride, padding, dilation, False, [0] * len(stride), groups)
    if groups != 1 or x.numel() * w.numel() < _SMALL:
        return torch.convolution(x, w, bias, *geometry)
    if int(torch.count_nonzero(w)) < _few(x, w.shape, stride) * w.numel():
        return thin_convolution(x, w, bias, stride, padding, dilation)
    kernel = w.shape[2:].numel()
    pairs = torch.mv(w.sign().abs_().reshape(-1, kernel), w.new_ones(kernel)).reshape(w.shape[:2]) > 0
    rows, columns = pairs.any(1).nonzero()[:, 0], pairs.any(0).nonzero()[:, 0]
    if rows.numel() == 0:
        like = torch.convolution(x.to("meta"), w.to("meta"), None, *geometry)
        y = x.new_zeros(like.shape)
    elif rows.numel() * columns.numel() < _CHANNELS * pairs.numel():
        y = torch.convolution(x.index_select(1, columns), w[rows][:, columns], None, *geometry)
        if len(rows) < len(pairs):
            y = y.new_zeros((y.shape[0], len(pairs), *y.shape[2:])).index_copy_(1, rows, y)
    else:
        return torch.convolution(x, w, bias, *geometry)
    return y if bias is None else y + bias.reshape(-1, *[1] * (y.dim() - 2))


def counting_convolution(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int = 1
) -> Tensor:
    """The same for weights that are 0 or 1, of flows that are not negative.

    Of rows where few zeros are, those are taken from the sum over all channels and the whole kernel, which is one for
    all rows. (Where many are, little would be left of a difference.)
    """
    if groups == 1 and x.numel() * w.numel() >= _SMALL:
        ones = torch.mv(w.flatten(1), w.new_ones(w[0].numel()))
        entries = torch.minimum(ones, w[0].numel() - ones).sum() + w[0].numel()
        if float(entries) < _few(x, w.shape, stride) * w.numel():
            return thin_convolution(x, w, None, stride, padding, dilation, counting=True)
    return pruned_convolution(x, w, None, stride, padding, dilation, groups)


def _few(x: Tensor, shape: torch.Size, stride: Sequence[int]) -> float:
    """The share of weights below which ``thin_convolution`` pays; as torch's own, it does not on a GPU."""
    kernel = shape[2:]
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return 0.0
    if len(kernel) != 2 or (kernel.numel() == 1 and set(stride) == {1}):
        return 0.0
    share = _ENTRIES[min(shape[:2]) <= _FEW_CHANNELS] * (_ONE_ENTRY if kernel.numel() == 1 else 1.0)
    return share - _PREPARED / max(1, _positions(x, stride))


def _positions(x: Tensor, stride: Sequence[int]) -> int:
    """Of the outputs of all images, about."""
    return x.shape[0] * math.prod([-(-n // s) for n, s in zip(x.shape[2:], stride, strict=True)])


_LIBRARY.impl("pruned_convolution", torch.no_grad()(_convolved), "CompositeExplicitAutograd")


def _fake(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, w, bias, stride, padding, dilation, False, [0] * (w.dim() - 2), groups)


def _batched(
    info: object, dims: tuple[int | None, ...], x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any
) -> tuple[Tensor, int]:
    """Images of many samples are images."""
    if dims[1] is not None or dims[2] is not None or dims[0] is None:
        raise NotImplementedError("pruned_convolution: vmap: wanted the images alone to be batched")
    flat = x.movedim(dims[0], 0)
    y = pruned_convolution(flat.flatten(0, 1), w, bias, *geometry)
    return y.unflatten(0, flat.shape[:2]), 0


torch.library.register_fake("pathprune::pruned_convolution", _fake, lib=_LIBRARY)
torch.library.register_vmap("pathprune::pruned_convolution", _batched, lib=_LIBRARY)


def expected_gain(w: Tensor, density: float) -> float:
    """How many times faster than dense ``thin_convolution`` was measured to be, forward, from 8 x 8 images on."""
    if w.device.type != "cpu" or w.dtype not in (torch.float32, torch.float64):
        return 0.0
    return 0.72 / (density + 0.1)  # what is not in proportion: laying images out, and outputs


def is_thin(x: Tensor, shape: torch.Size, stride: Sequence[int], density: float) -> bool:
    """Whether ``thin_convolution`` should be faster than a dense one on these images."""
    return density < _few(x, shape, stride)


def is_sampled(x: Tensor, shape: torch.Size, stride: Sequence[int], density: float) -> bool:
    """Whether ``thin_sample`` should be faster than the gradient by all weights."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or len(shape) != 4:
        return False
    positions = _positions(x, stride)
    return density * (positions + _SETUP) < _KEPT * positions
