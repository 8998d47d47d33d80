"""Ops on convolutions by weights that are mostly zeros: schemas, fake kernels, autograd and typed wrappers.

The kernels are the CPU's, for float32 and float64, kernels of two axes and one group; `sparse_reference.py`, which is
torch's own, serves everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import mask_unpack
from .sparse_ops import Derivative, _call, _register, linear

__all__ = ["thin_convolution", "thin_sample"]

SCHEMAS: dict[str, str] = {
    "thin_convolution": "(Tensor x, Tensor w, Tensor? bias, int stride_y, int stride_x, int padding_y,"
    " int padding_x, int dilation_y, int dilation_x, bool counting,"
    " Tensor? mask) -> Tensor",
    "thin_sample": "(Tensor x, Tensor g, Tensor mask, int kernel_y, int kernel_x, int stride_y, int stride_x,"
    " int padding_y, int padding_x, int dilation_y, int dilation_x) -> Tensor",
}

_FAKES: dict[str, Callable[..., Any]] = {
    "thin_convolution": lambda x, w, bias, sy, sx, py, px, dy, dx, counting, mask: torch.convolution(
        x, w, bias, (sy, sx), (py, px), (dy, dx), False, (0, 0), 1
    ).contiguous(),
    "thin_sample": lambda x, g, mask, height, width, *geometry: x.new_empty((g.shape[1], x.shape[1], height, width)),
}


# ---- autograd: each backward is built of the same ops and torch's own -------------------------------


def _save_thin(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _, *ctx.geometry, _, mask = inputs
    ctx.save_for_backward(x, w, mask)


def _torch_geometry(geometry: Sequence[int]) -> tuple[Any, ...]:
    """Stride, padding, dilation and what follows, as aten has them."""
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x = geometry
    return (stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x), False, (0, 0), 1


def _by_images(grad: Tensor, x: Tensor, w: Tensor, geometry: Sequence[int]) -> Tensor:
    """Of a convolution by x: one with the kernels turned round, as thin, where the stride is 1; else torch's own."""
    *stride, padding_y, padding_x, dilation_y, dilation_x = geometry
    around = dilation_y * (w.shape[2] - 1) - padding_y, dilation_x * (w.shape[3] - 1) - padding_x
    if min(around) >= 0 and stride == [1, 1]:
        turned = w.flip(2, 3).transpose(0, 1)
        y: Tensor = _call("thin_convolution", grad, turned, None, 1, 1, *around, dilation_y, dilation_x, False, None)
        return y
    wanted = [True, False, False]
    made: Tensor = torch.ops.aten.convolution_backward(grad, x, w, None, *_torch_geometry(geometry), wanted)[0]
    return made


def _by_weight(grad: Tensor, x: Tensor, w: Tensor, geometry: Sequence[int], mask: Tensor | None) -> Tensor:
    """Of a convolution by w, where the mask has ones, or everywhere."""
    made: Tensor
    if mask is not None:
        made = _call("thin_sample", x, grad, mask, *w.shape[2:], *geometry)
    else:
        wanted = [False, True, False]
        made = torch.ops.aten.convolution_backward(grad, x, w, None, *_torch_geometry(geometry), wanted)[1]
    return made


def _thin_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w, mask = ctx.saved_tensors
    by_images, by_weight, by_bias = ctx.needs_input_grad[:3]
    grad_x = _by_images(grad, x, w, ctx.geometry) if by_images else None
    grad_w = _by_weight(grad, x, w, ctx.geometry, mask) if by_weight else None
    return grad_x, grad_w, grad.sum((0, 2, 3)) if by_bias else None, *[None] * 8


def _save_thin_sample(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, g, mask, _, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, g, mask)


def _thin_sample_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By either, the convolution whose weight is what the mask keeps of the gradient."""
    x, g, mask = ctx.saved_tensors
    w = torch.where(mask_unpack(mask, grad[0].numel()).reshape(grad.shape), grad, 0)
    grad_x = _by_images(g, x, w, ctx.geometry) if ctx.needs_input_grad[0] else None
    grad_g = None
    if ctx.needs_input_grad[1]:
        grad_g = _call("thin_convolution", x, w, None, *ctx.geometry, False, mask)
    return grad_x, grad_g, *[None] * 9


def _thin_along(values: list[Any], place: int, tangent: Tensor) -> Tensor:
    x, w, _, *geometry, _, mask = values
    if place == 2:
        return tangent[None, :, None, None].expand(_FAKES["thin_convolution"](*values).shape)
    images, weight = (tangent, w) if place == 0 else (x, tangent)
    moved: Tensor = _call("thin_convolution", images, weight, None, *geometry, False, mask)
    return moved


_BACKWARDS = {
    "thin_convolution": Derivative(_thin_backward, _save_thin, _thin_along),
    "thin_sample": Derivative(_thin_sample_backward, _save_thin_sample, linear("thin_sample")),
}
_register(SCHEMAS, _FAKES, _BACKWARDS)


# ---- wrappers ------------------------------------------------------------------------------------


def thin_convolution(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    counting: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """A convolution whose time goes with the weights that are not zero; so does its gradient by x if stride is 1.

    Args:
        x: [N, C, H, W] float32 or float64; w: [O, C, kh, kw] and bias: [O] or None, of its type.
        stride, padding, dilation: of height and width.
        counting: w is 0 or 1. A row of w that has more ones than zeros is taken from the sum over the whole kernel and
            all channels, which is one for all rows, by what it lacks: for x that are not negative.
        mask: [1, O, ceil(C * kh * kw / 16)] int16, of which w is zero where it is. The gradient by w is computed where
            it is one, by `thin_sample`, and zero elsewhere. None: torch's own, everywhere.

    Returns:
        [N, O, H', W'], contiguous. Differentiable in x, w and bias. The same bits for any number of threads.

    A product with a weight that is zero may be left out or made: infinite or NaN x may give NaN or not.
    """
    return _call("thin_convolution", x, w, bias, *stride, *padding, *dilation, counting, mask)


def thin_sample(
    x: Tensor,
    g: Tensor,
    mask: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """The gradient of a convolution by its weight where a mask has ones; its time goes with these. Differentiable.

    Args:
        x: [N, C, H, W] float32 or float64; g: [N, O, H', W'], of its type: the gradient by the outputs.
        mask: [1, O, ceil(C * kh * kw / 16)] int16, as `mask_pack` makes it of [1, O, C * kh * kw].
        kernel, stride, padding, dilation: of height and width.

    Returns:
        [O, C, kh, kw] with zeros off the mask. The same bits for any number of threads.

    Infinite or NaN x or g may give NaN where torch's own has none.
    """
    return _call("thin_sample", x, g, mask, *kernel, *stride, *padding, *dilation)
