"""What pooling, and operators that only move, repeat or mix values by fixed numbers, mean for paths.

Each is a fixed linear map: its entries are raised to the power, and zeros and ones stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .nodes import Constant, Pool, Reduce, Scale, Softmax, Sum, Tensors, Wire
from .rules import RuleError, axes_tuple, rule

if TYPE_CHECKING:
    from .tracer import Tracer


# ----------------------------------------------------------------------------------------------------- pooling


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def _pool(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    operator = t.operator(node).removesuffix("_with_indices")
    n = int(operator[-2])
    kernel = axes_tuple(a["kernel_size"], n)
    pool = Pool(
        (t.flow(next(iter(a.values()))),),
        t.shapes(node)[0],
        kind=operator[:3],
        kernel=kernel,
        stride=axes_tuple(a["stride"], n) if a["stride"] not in (None, []) else kernel,
        padding=axes_tuple(a["padding"], n),
        dilation=axes_tuple(a.get("dilation", 1), n),
        ceil_mode=a["ceil_mode"],
        count_include_pad=a.get("count_include_pad", True),
        divisor=a.get("divisor_override"),
    )
    return t.add(pool, node)


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive_avg_pool(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    flow = t.flow(next(iter(a.values())))
    n = int(t.operator(node)[-2])
    entering, leaving = t.net.nodes[flow].shape[-n:], t.shape(node)[-n:]
    if all(size == 1 for size in leaving):
        dims = tuple(range(len(t.shape(node)) - n, len(t.shape(node))))
        return t.add(Reduce((flow,), t.shape(node), kind="mean", dims=dims, keepdim=True), node)
    if all(i % o == 0 for i, o in zip(entering, leaving, strict=True)):
        kernel = tuple(i // o for i, o in zip(entering, leaving, strict=True))
        none, one = (0,) * n, (1,) * n
        pool = Pool((flow,), t.shape(node), kind="avg", kernel=kernel, stride=kernel, padding=none, dilation=one)
        return t.add(pool, node)
    return _separable(t, node, flow, n)


@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_max_pool(t: Tracer, node: fx.Node, a: dict[str, Any]) -> tuple[int, None]:
    flow = t.flow(next(iter(a.values())))
    n = int(t.operator(node)[-2])
    shape = t.shapes(node)[0]
    entering, leaving = t.net.nodes[flow].shape[-n:], shape[-n:]
    if any(i % o for i, o in zip(entering, leaving, strict=True)):
        raise RuleError(f"windows of unequal size ({tuple(entering)} to {tuple(leaving)})")
    kernel = tuple(i // o for i, o in zip(entering, leaving, strict=True))
    none, one = (0,) * n, (1,) * n
    pool = Pool((flow,), shape, kind="max", kernel=kernel, stride=kernel, padding=none, dilation=one)
    return t.add(pool, node), None


@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def _pool_with_indices(t: Tracer, node: fx.Node, a: dict[str, Any]) -> tuple[int, None]:
    return _pool(t, node, a), None


@rule("mean", "sum")
def _reduce(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    flow = t.flow(a["self"])
    n = len(t.net.nodes[flow].shape)
    dims = a.get("dim") or tuple(range(n))
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    dims = tuple(sorted(d % n for d in dims))
    reduce = Reduce((flow,), t.shape(node), kind=t.operator(node), dims=dims, keepdim=a.get("keepdim", False))
    return t.add(reduce, node)


# ------------------------------------------------------------------------------------------------------- wires


@rule("flatten", "reshape", "view", "_unsafe_view", "unflatten")
def _reshape(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    shape = t.shape(node)
    wire = Wire((t.flow(a["self"]),), shape, apply=lambda xs, p: xs[0].reshape(shape), reshapes=True)
    keeps_last = t.net.nodes[wire.inputs[0]].shape[-1:] == shape[-1:]
    return moved(t, node, wire) if keeps_last else t.add(wire, node)


def moved(t: Tracer, node: fx.Node, wire: Wire) -> int:
    """The wire; attention weights over the last axis stay so: what is moved is their similarities."""
    held = t.net.nodes[wire.inputs[0]]
    if not isinstance(held, Softmax) or held.dim != len(held.shape) - 1:
        return t.add(wire, node)
    similar, weights, before = t.add(replace(wire, inputs=held.inputs), node), held.weights, held.shape

    def some(tensors: Tensors) -> Tensor:
        return wire.apply([weights(tensors).expand(before)], 1.0)

    return t.add(Softmax((similar,), wire.shape, weights=some, dim=len(wire.shape) - 1), node)


@rule(
    *("permute", "transpose", "t", "mT"),
    *("numpy_T", "movedim", "swapaxes", "squeeze", "unsqueeze", "slice", "select", "narrow", "index"),
    *("index_select", "gather", "expand", "repeat", "repeat_interleave", "roll", "flip", "unfold", "cumsum"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
)
def _replay(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    """A map of zeros and ones: the operator itself."""
    wire = Wire((t.flow(next(iter(a.values()))),), t.shape(node), apply=t.replay(node))
    return moved(t, node, wire) if t.operator(node) == "slice" else t.add(wire, node)


@rule("copy")
def _copy(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    shape = t.shape(node)
    return t.add(Wire((t.flow(a["src"]),), shape, apply=lambda xs, p: xs[0].expand(shape)), node)


@rule("view_as", "expand_as")
def _like(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    shape, name = t.shape(node), t.operator(node).removesuffix("_as")
    return t.add(Wire((t.flow(a["self"]),), shape, apply=lambda xs, p: getattr(xs[0], name)(shape)), node)


@rule("split", "split_with_sizes", "chunk", "unbind", "tensor_split")
def _split(t: Tracer, node: fx.Node, a: dict[str, Any]) -> list[int]:
    flow = t.flow(a["self"])
    replay = t.replay(node)

    def part(k: int) -> Callable[[Sequence[Tensor], float], Tensor]:
        return lambda xs, p: replay(xs, p)[k]

    return [t.add(Wire((flow,), shape, apply=part(k)), node) for k, shape in enumerate(t.shapes(node))]


@rule("cat", "concat", "stack")
def _cat(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    flows = tuple(t.flow(part) if t.is_flow(part) else constant_flow(t, node, part) for part in a["tensors"])
    join = torch.stack if t.operator(node) == "stack" else torch.cat
    dim = a["dim"]
    concat_dim = dim % len(t.shape(node)) if join is torch.cat else None
    return t.add(Wire(flows, t.shape(node), apply=lambda xs, p: join(list(xs), dim), concat_dim=concat_dim), node)


def constant_flow(t: Tracer, node: fx.Node, part: fx.Node) -> int:
    """A constant of the model, at which paths begin where biases flow."""
    return t.add(Constant((), t.shape(part), value=t.constant(part)), node)


@rule("slice_scatter", "select_scatter", "masked_scatter")
def _overwritten(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    """One flow in some places of another; which, the example's integers choose where a mask says so."""
    parts = [a["self"], a["src"] if "src" in a else a["source"]]
    flows = tuple(t.flow(part) if t.is_flow(part) else constant_flow(t, node, part) for part in parts)
    return t.add(Wire(flows, t.shape(node), apply=t.replay(node, parts)), node)


@rule("pad", "constant_pad_nd")
def _pad(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    value = a.get("value") or 0
    if value not in (0, float("-inf")):  # -inf before a max pool is no flow, as zero is
        raise RuleError(f"padding with {value}")
    widths, mode = list(a["pad"]), a.get("mode", "constant")
    flow = t.flow(a["self"])
    wire = Wire((flow,), t.shape(node), apply=lambda xs, p: torch.nn.functional.pad(xs[0], widths, mode=mode))
    return t.add(wire, node)


@rule(
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
def _upsample(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    flow = t.flow(a["input"] if "input" in a else a["self"])
    return _separable(t, node, flow, len(t.shape(node)) - 2)


def _separable(t: Tracer, node: fx.Node, flow: int, n: int) -> int:
    """A map that acts on each of the last n axes by a matrix of its own; its entries are raised to the power."""
    entering = t.net.nodes[flow].shape
    replay = t.replay(node)
    matrices = []
    for axis in range(n):  # the matrix of one axis: the operator on unit vectors along it, constant along the others
        size = entering[2 + axis]
        shape = [size, 1] + [entering[2 + k] if k != axis else 1 for k in range(n)]
        units = torch.eye(size, dtype=torch.float64).reshape([size, 1] + [size if k == axis else 1 for k in range(n)])
        out = replay([units.expand([s if k != 2 + axis else size for k, s in enumerate(shape)])], 1.0)
        matrices.append(out.movedim(2 + axis, -1).reshape(size, -1, out.shape[2 + axis])[:, 0].T)  # [out, in]
    if all(bool((matrix >= 0).all()) for matrix in matrices):
        return _along(t, node, flow, dict(enumerate(matrices)))
    for axis, matrix in enumerate(matrices):  # entries below zero (bicubic) keep their sign where the flow has one
        below = _along(t, node, flow, {axis: (-matrix).clamp(min=0)})
        turned = Scale((below,), t.net.nodes[below].shape, factor=t.constant(-1))
        parts = (_along(t, node, flow, {axis: matrix.clamp(min=0)}), t.add(turned, node))
        flow = t.add(Sum(parts, turned.shape), node)
    return flow


def _along(t: Tracer, node: fx.Node, flow: int, matrices: dict[int, Tensor]) -> int:
    """Maps of entries of at least zero along axes behind the first two."""
    shape = list(t.net.nodes[flow].shape)
    for axis, matrix in matrices.items():
        shape[2 + axis] = len(matrix)

    def apply(xs: Sequence[Tensor], power: float) -> Tensor:
        x = xs[0]
        for axis, matrix in matrices.items():
            entries = matrix.to(x) if power == 1 else _power(matrix, power).to(x)
            x = (x.movedim(2 + axis, -1) @ entries.T).movedim(-1, 2 + axis)
        return x

    return t.add(Wire((flow,), torch.Size(shape), apply=apply), node)


def _power(entries: Tensor, power: float) -> Tensor:
    """``|entries|^power`` with absent entries (zeros) staying absent at power 0."""
    return torch.where(entries == 0, 0.0, entries.abs() ** power)
