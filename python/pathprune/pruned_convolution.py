"""Convolutions with weights that pruning has thinned, over many images at once.

Three exact ways, chosen by what is left: torch's own; torch's own on the channels that are not all zero; and, where few
weights are left, a product that skips zeros (``shifted_matmul``): the images are laid flat with their padding, channel
after channel, so that what a kernel entry reads is what the output reads, a fixed way further on. A stride s cuts the
images into s^2 of every s-th row and column first.

Bytes: the images once for their flat copy; that copy from the cache for every weight that is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import _LIBRARY
from .sparse_ops import shifted_matmul

_CHANNELS = 0.8  # share of channel pairs left below which it pays to leave the dead ones out
_ENTRIES = 0.45  # share of weights left below which to skip zeros, over how much larger padding makes images, squared
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
    kernel = w.shape[2:].numel()
    counts = torch.mv(w.sign().abs_().reshape(-1, kernel), w.new_ones(kernel)).reshape(w.shape[:2])
    pairs = counts > 0
    rows, columns = pairs.any(1).nonzero()[:, 0], pairs.any(0).nonzero()[:, 0]
    if rows.numel() == 0:
        like = torch.convolution(x.to("meta"), w.to("meta"), None, *geometry)
        y = x.new_zeros(like.shape)
        return y if bias is None else y + bias.reshape(-1, *[1] * (y.dim() - 2))
    fewer = rows.numel() * columns.numel() < _CHANNELS * pairs.numel()
    if fewer:
        x, w = x.index_select(1, columns), w[rows][:, columns]
    if float(counts.sum(dtype=torch.float64)) < _few(x, w, stride) * w.numel():
        y = _shifted(x, w, stride, padding, dilation)
    elif fewer:
        y = torch.convolution(x, w, None, *geometry)
    else:
        return torch.convolution(x, w, bias, *geometry)
    if fewer and len(rows) < len(pairs):
        y = y.new_zeros((y.shape[0], len(pairs), *y.shape[2:])).index_copy_(1, rows, y)
    return y if bias is None else y + bias.reshape(-1, *[1] * (y.dim() - 2))


def counting_convolution(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int = 1
) -> Tensor:
    """The same for weights that are 0 or 1, of flows that are not negative.

    Of rows where few zeros are, those are taken from the sum over all channels and the whole kernel, which is one for
    all rows. (Where many are, little would be left of a difference.)
    """
    geometry = (stride, padding, dilation, groups)
    if groups != 1 or x.numel() * w.numel() < _SMALL:
        return pruned_convolution(x, w, None, *geometry)
    nearly = w.flatten(1).mean(1) > 1 - _few(x, w, stride)
    full, others = nearly.nonzero()[:, 0], (~nearly).nonzero()[:, 0]
    if full.numel() == 0:
        return pruned_convolution(x, w, None, *geometry)
    whole = _box(x.sum(1, keepdim=True), w.shape[2:], stride, padding, dilation)
    missing = pruned_convolution(x, 1 - w[full], None, *geometry)
    part = torch.sub(whole, missing, out=missing)
    if others.numel() == 0:
        return part
    y = part.new_empty((part.shape[0], w.shape[0], *part.shape[2:])).index_copy_(1, full, part)
    return y.index_copy_(1, others, pruned_convolution(x, w[others], None, *geometry))


def _few(x: Tensor, w: Tensor, stride: Sequence[int]) -> float:
    """The share of weights below which ``shifted_matmul`` pays: it computes padding too, and gains less by caches.

    Cutting images by a stride costs more than it can gain.
    """
    if w.dim() != 4 or any(s != 1 for s in stride):
        return 0.0
    padded = math.prod(n + k - 1 for n, k in zip(x.shape[2:], w.shape[2:], strict=True))
    return _ENTRIES * (x.shape[2:].numel() / padded) ** 2


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


def _box(
    x: Tensor, kernel: torch.Size, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """A convolution of one channel with ones."""
    even = all(d == 1 and 2 * p <= k for d, p, k in zip(dilation, padding, kernel, strict=True))
    if even and len(kernel) == 2:
        return F.avg_pool2d(x, kernel, tuple(stride), tuple(padding), divisor_override=1)
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    return torch.convolution(x, ones, None, stride, padding, dilation, False, [0] * len(kernel), 1)


def expected_gain(density: float) -> float:
    """How many times faster than dense :func:`thin_convolution` was measured to be, forward, from 8 x 8 images on."""
    return min(4.0, 0.22 / max(density, 1e-9))


def pays_to_shift(x: Tensor, kernel: torch.Size, density: float) -> bool:
    """Whether :func:`thin_convolution` should be faster than a dense one on these images."""
    is_plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and kernel.numel() > 1
    return is_plain and density < _few(x, x.new_empty((1, 1, *kernel), device="meta"), (1, 1))


def thin_convolution(x: Tensor, w: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """A convolution with stride 1 that skips the zeros of w, and so does its gradient by x. Differentiable once.

    Args:
        x: [N, C, H, W] float32 or float64; w: [O, C, kh, kw] of its type.
    """
    return _Thin.apply(x, w, tuple(padding), tuple(dilation))


class _Thin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = padding, dilation
        return _shifted(x, w, (1, 1), padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x, w), (padding, dilation) = ctx.saved_tensors, ctx.geometry
        around = [d * (k - 1) - p for d, k, p in zip(dilation, w.shape[2:], padding, strict=True)]
        shifts = ctx.needs_input_grad[0] and min(around) >= 0
        dx = _shifted(dy, w.flip(2, 3).transpose(0, 1), (1, 1), around, dilation) if shifts else None
        mask = [ctx.needs_input_grad[0] and not shifts, ctx.needs_input_grad[1], False]
        geometry = ([1, 1], padding, dilation, False, [0, 0], 1)
        plain = torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, mask)
        return dx if shifts else plain[0], plain[1], None, None


def _shifted(x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """By ``shifted_matmul``: [N, O, H', W'], its memory laid channel first."""
    count, channels, height, width = x.shape
    kernel = w.shape[2:]
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip((height, width), padding, dilation, kernel, stride, strict=True)
    ]
    # each phase is as large as the outputs and the reach of the kernel beyond them
    reach = [d * (k - 1) // s for d, k, s in zip(dilation, kernel, stride, strict=True)]
    tall, wide = (n + r for n, r in zip(sizes, reach, strict=True))
    (sy, sx), (py, px) = stride, padding
    channel = count * tall * wide
    flat = x.new_zeros(sy * sx * channels * channel + reach[0] * wide + reach[1])
    phases = flat[: sy * sx * channels * channel].view(sy, sx, channels, count, tall, wide)
    turned = x.transpose(0, 1)
    for a in range(sy):
        for b in range(sx):
            top, left = (a - py) % sy, (b - px) % sx  # the first row and column of the image in this phase
            part = turned[:, :, top::sy, left::sx]
            at_y, at_x = (top + py) // sy, (left + px) // sx
            room = phases[a, b, :, :, at_y:, at_x:]
            h, v = min(part.shape[2], room.shape[2]), min(part.shape[3], room.shape[3])
            room[:, :, :h, :v].copy_(part[:, :, :h, :v])
    rows = torch.arange(kernel[0], device=x.device) * dilation[0]
    columns = torch.arange(kernel[1], device=x.device) * dilation[1]
    phase = (rows % sy)[:, None] * sx + (columns % sx)[None]
    within = (rows // sy)[:, None] * wide + (columns // sx)[None]
    shift = torch.arange(channels, device=x.device)[:, None] * channel + (phase * channels * channel + within).flatten()
    y = shifted_matmul(w.flatten(1), shift.flatten(), flat, channel)
    return y.view(-1, count, tall, wide)[:, :, : sizes[0], : sizes[1]].transpose(0, 1)
