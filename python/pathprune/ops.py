"""The native ops of pathprune: schemas, fake kernels, autograd and typed wrappers.

Letters: G groups or ensemble members, O rows, K columns, T positions or sources, W = ceil(K / 16) mask words,
A = float64 for float64 weights, float32 for all others. Arguments that mean the same everywhere:

* `weight`: [G, O, K] float32, float64, bfloat16 or float16. Or packed: `weight` 1-D holds the stored values,
  row by row, and padding; `layout` [G, O, W] int16 says which they are, `row_start` [G * O + 1] int64 where
  each row begins, and `columns` is K (see `compact_weight`). Dense weights need none of the three.
* `mask`: [G, O, W] int16; bit b of word c is column 16 * c + b, bits past K are 0. None: all are live. A
  packed weight needs one, a subset of its layout. A pruned weight counts for exactly 0.
* `x`: [G, T, K] in A, the flow entering the columns. `g`: [G, T, O] in A, the backward flow at the rows.
* `f`, `s`: the `WeightMap` of the flow and of the score.

A weight (or layout) without G makes G = 1 for all that is beside it, and results lose their G.

The score of a live weight w in row r and column c, rounded after every operation: (s(w) * x_c) * g_r for
T = 1; s(w) * sum_t x_tc * g_tr, t ascending, for any other T; s(w) where x and g are None. Its flat index is
(group * O + row) * K + column.

Every op raises ValueError "op: argument: wanted ..., got ..." for a wrong dtype, shape, device or range, and
accepts G, O, K or T = 0. Nothing depends on the number of threads but the order of collected scores, and
scores are equal to the bit on every device. `reference.py` serves wherever the binary has no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import (
    _library,  # noqa: F401  (loads the binary where there is one)
    reference,
)
from .checks import accumulate_dtype, check_arguments, words
from .reference import PADDING, WeightMap, histogram_bits, map_slope

__all__ = [
    "WeightMap",
    "compact_weight",
    "fingerprint",
    "gumbel_keys",
    "kth_largest",
    "mask_count",
    "mask_pack",
    "mask_unpack",
    "masked_weight",
    "path_flow_linear",
    "path_flow_linear_collect",
    "path_flow_linear_prune_",
    "through_flow",
    "through_flow_collect",
    "through_flow_histogram",
    "through_flow_nth",
    "through_flow_prune_",
]

_PACKED = "Tensor? layout, Tensor? row_start, int columns"
_SCORED = "Tensor weight, Tensor? mask, Tensor? x, Tensor? g, int s"

SCHEMAS: dict[str, str] = {
    "path_flow_linear": f"(Tensor weight, Tensor? mask, Tensor x, int f, bool transposed, {_PACKED}) -> Tensor",
    "through_flow": f"({_SCORED}, {_PACKED}) -> Tensor",
    "through_flow_collect": f"({_SCORED}, float lo, float hi, int capacity, {_PACKED})"
    " -> (Tensor values, Tensor counts, Tensor extremes)",
    "through_flow_histogram": f"({_SCORED}, int stride, {_PACKED}) -> (Tensor histogram, Tensor counts)",
    "through_flow_prune_": "(Tensor weight, Tensor(a!) mask, Tensor? x, Tensor? g, int s,"
    f" float at_least, float above, int cut, {_PACKED}) -> ()",
    "path_flow_linear_collect": "(Tensor weight, Tensor? mask, Tensor x, Tensor g, int f, int s,"
    f" float lo, float hi, int capacity, {_PACKED})"
    " -> (Tensor gx, Tensor values, Tensor counts, Tensor extremes)",
    "path_flow_linear_prune_": "(Tensor weight, Tensor(a!) mask, Tensor x_old, Tensor g_old, int s,"
    f" float at_least, float above, int cut, Tensor x, int f, {_PACKED}) -> Tensor",
    "through_flow_nth": f"({_SCORED}, float at_least, float above, int n, {_PACKED}) -> Tensor",
    "masked_weight": "(Tensor weight, Tensor? mask, int f) -> Tensor",
    "mask_pack": "(Tensor bits) -> Tensor",
    "mask_unpack": "(Tensor mask, int columns) -> Tensor",
    "mask_count": "(Tensor mask) -> Tensor",
    "fingerprint": "(Tensor tensor) -> Tensor",
    "compact_weight": f"(Tensor weight, Tensor mask, {_PACKED}) -> (Tensor values, Tensor starts)",
    "kth_largest": "(Tensor values, int k) -> Tensor",
    "gumbel_keys": "(Tensor scores, int exponent, float temperature_inverse, int seed, int offset) -> Tensor",
}

_LIBRARY = torch.library.Library("pathprune", "DEF")


def define(name: str, schema: str, twin: Callable[..., Any], fake: Callable[[Any], Any]) -> Any:
    """Defines an op whose results are constants to autograd; returns its overload.

    Args:
        twin: the plain-torch definition, which serves where the binary has no kernel.
        fake: from the arguments by name to results of the right shapes and dtypes.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    # A kernel of the binary is registered for its device, which goes before this.
    _LIBRARY.impl(name, torch.no_grad()(twin), "CompositeExplicitAutograd")
    op = getattr(torch.ops.pathprune, name).default
    names = tuple(argument.name for argument in op._schema.arguments)

    def kernel(*values: Any, **named: Any) -> Any:
        return fake(SimpleNamespace(**dict(zip(names, values, strict=False)), **named))

    torch.library.register_fake(f"pathprune::{name}", kernel, lib=_LIBRARY)
    if name != "path_flow_linear":
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return op


# ---- fake kernels: the shapes and dtypes of the results ------------------------------------------


def _shape(a: Any) -> tuple[int, int]:
    """(G, O)"""
    return (a.weight if a.layout is None else a.layout).shape[:2]


def _accumulated(a: Any, *shape: int) -> Tensor:
    return a.weight.new_empty(shape, dtype=accumulate_dtype(a.weight.dtype))


def _counts(a: Any, *shape: int) -> Tensor:
    return a.weight.new_empty(shape, dtype=torch.int64)


def _fake_collect(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _accumulated(a, a.capacity), _counts(a, 4), a.weight.new_empty(2, dtype=torch.float64)


def _fake_compact(a: Any) -> tuple[Tensor, Tensor]:
    stored = torch.library.get_ctx().new_dynamic_size(min=PADDING)
    groups, rows = _shape(a)
    return a.weight.new_empty(stored), _counts(a, groups * rows + 1)


_FAKES: dict[str, Callable[[Any], Any]] = {
    "path_flow_linear": lambda a: _accumulated(a, *a.x.shape[:2], a.columns if a.transposed else _shape(a)[1]),
    "through_flow": lambda a: _accumulated(a, *_shape(a), a.columns),
    "through_flow_collect": _fake_collect,
    "through_flow_histogram": lambda a: (_counts(a, 1 << histogram_bits(a.weight.dtype)), _counts(a, 2)),
    "through_flow_prune_": lambda a: None,
    "path_flow_linear_collect": lambda a: (_accumulated(a, *a.x.shape), *_fake_collect(a)),
    "path_flow_linear_prune_": lambda a: _accumulated(a, *a.x.shape[:2], _shape(a)[1]),
    "through_flow_nth": lambda a: _counts(a),
    "masked_weight": lambda a: _accumulated(a, *a.weight.shape),
    "mask_pack": lambda a: a.bits.new_empty((*a.bits.shape[:2], words(a.bits.shape[2])), dtype=torch.int16),
    "mask_unpack": lambda a: a.mask.new_empty((*a.mask.shape[:2], a.columns), dtype=torch.bool),
    "mask_count": lambda a: a.mask.new_empty((), dtype=torch.int64),
    "fingerprint": lambda a: a.tensor.new_empty((), dtype=torch.int64),
    "compact_weight": _fake_compact,
    "kth_largest": lambda a: a.values.new_empty(()),
    "gumbel_keys": lambda a: a.scores.new_empty(a.scores.shape, dtype=torch.float64),
}


_OPS = {name: define(name, schema, getattr(reference, name), _FAKES[name]) for name, schema in SCHEMAS.items()}
_NAMES = {name: tuple(argument.name for argument in op._schema.arguments) for name, op in _OPS.items()}


# ---- autograd ------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, mask, x, ctx.f, ctx.transposed, layout, row_start, ctx.columns = inputs
    ctx.save_for_backward(weight, mask, x, layout, row_start)


def _path_flow_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Built from differentiable ops, so that it can be differentiated again."""
    weight, mask, x, layout, row_start = ctx.saved_tensors
    grad_weight = grad_x = None
    if ctx.needs_input_grad[0]:
        if layout is not None:
            raise ValueError("path_flow_linear: weight: wanted a dense weight for its gradient, got a packed one")
        rows, columns = (x, grad) if ctx.transposed else (grad, x)  # [G, T, O], [G, T, K]
        slope = map_slope(weight, ctx.f)  # [G, O, K]
        if mask is not None:
            slope = torch.where(_OPS["mask_unpack"](mask, ctx.columns), slope, 0)
        grad_weight = ((rows.mT @ columns) * slope).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        grad_x = _OPS["path_flow_linear"](weight, mask, grad, ctx.f, not ctx.transposed, layout, row_start, ctx.columns)
    return grad_weight, None, grad_x, None, None, None, None, None


torch.library.register_autograd(
    "pathprune::path_flow_linear", _path_flow_linear_backward, setup_context=_save, lib=_LIBRARY
)


# ---- wrappers ------------------------------------------------------------------------------------


def _call(name: str, *values: Any) -> Any:
    """Adds the G a weight may lack, checks, calls the op, and takes the G off the results again."""
    given = dict(zip(_NAMES[name], values, strict=True))
    leading = next((given[key] for key in ("layout", "weight", "mask", "bits") if given.get(key) is not None), None)
    flat = leading is not None and leading.dim() == 2
    if flat:
        given = {k: v.unsqueeze(0) if isinstance(v, Tensor) and v.dim() == 2 else v for k, v in given.items()}
    if given.get("columns", 0) is None and given["layout"] is None:
        given["columns"] = given["weight"].shape[-1] if given["weight"].dim() else 0
    check_arguments(name, given)
    made = _OPS[name](*given.values())
    if isinstance(made, tuple):
        return tuple(_without_groups(result, flat) for result in made)
    return _without_groups(made, flat)


def _without_groups(result: Any, flat: bool) -> Any:
    return result.squeeze(0) if flat and result is not None and result.dim() == 3 else result


def path_flow_linear(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor,
    f: int = WeightMap.ABS,
    transposed: bool = False,
    layout: Tensor | None = None,
    row_start: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """The flow through a linear layer: y_tr = sum_c f(w_rc) m_rc x_tc, with f(w) m never written out.

    Differentiable, twice and more, with respect to `x` and to a dense `weight`.

    Args:
        x: [G, T, K] in A; transposed: [G, T, O].
        transposed: sum over the rows, y_tc = sum_r f(w_rc) m_rc x_tr: the backward flow.

    Returns:
        [G, T, O] in A; transposed: [G, T, K].
    """
    return _call("path_flow_linear", weight, mask, x, int(f), transposed, layout, row_start, columns)


def through_flow(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor | None = None,
    g: Tensor | None = None,
    s: int = WeightMap.ABS,
    layout: Tensor | None = None,
    row_start: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """The scores written out: what all `through_flow_*` ops compute on the fly. Not differentiable.

    Returns:
        [G, O, K] in A, 0 off the mask.
    """
    return _call("through_flow", weight, mask, x, g, int(s), layout, row_start, columns)


def through_flow_collect(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    g: Tensor | None,
    s: int,
    lo: float,
    hi: float,
    capacity: int,
    layout: Tensor | None = None,
    row_start: Tensor | None = None,
    columns: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts the live scores against a bracket and collects those inside it.

    Args:
        lo, hi: the bracket, ends included; numbers that A can represent, or infinities.
        capacity: room for the scores inside; finding more is no error.

    Returns:
        values: [capacity] in A: the scores inside in any order, as many as fit; the rest is unspecified.
        counts: [4] int64: scores > hi, scores inside, scores that are not finite, all live scores. A score
            that is not finite is compared like any other: +inf is > hi, NaN is neither above nor inside.
        extremes: [2] float64: smallest and largest score inside; (inf, -inf) if there is none.
    """
    packed = (layout, row_start, columns)
    return _call("through_flow_collect", weight, mask, x, g, int(s), lo, hi, capacity, *packed)


def through_flow_histogram(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    g: Tensor | None,
    s: int,
    stride: int = 1,
    layout: Tensor | None = None,
    row_start: Tensor | None = None,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Counts live scores by sign, exponent and the first 8 bits of the mantissa, in the order of the scores.

    Args:
        stride: only mask words whose index, row-major over [G, O, W], is a multiple of it are visited; >= 1.

    Returns:
        histogram: [2**17] int64 for float32 scores, [2**20] for float64: finite scores; -0 counts as +0.
        counts: [2] int64: live scores visited, and those of them that are not finite.
    """
    packed = (layout, row_start, columns)
    return _call("through_flow_histogram", weight, mask, x, g, int(s), stride, *packed)


def through_flow_prune_(
    weight: Tensor,
    mask: Tensor,
    x: Tensor | None,
    g: Tensor | None,
    s: int,
    at_least: float,
    above: float,
    cut: int,
    layout: Tensor | None = None,
    row_start: Tensor | None = None,
    columns: int | None = None,
) -> None:
    """Writes the new mask: a live weight stays if score >= above, or score >= at_least and flat index < cut.

    With at_least the threshold and above the next larger number, `cut` resolves ties by index. A NaN goes.

    Args:
        mask: contiguous; written to.
        at_least, above: numbers that A can represent, or infinities.
    """
    packed = (layout, row_start, columns)
    _call("through_flow_prune_", weight, mask, x, g, int(s), at_least, above, cut, *packed)


def through_flow_nth(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    g: Tensor | None,
    s: int,
    at_least: float,
    above: float,
    n: int,
    layout: Tensor | None = None,
    row_start: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """Where the n-th (from 0) live weight with at_least <= score < above is.

    Returns:
        [] int64: its flat index; G * O * K if there are fewer.
    """
    packed = (layout, row_start, columns)
    return _call("through_flow_nth", weight, mask, x, g, int(s), at_least, above, n, *packed)


def path_flow_linear_collect(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor,
    g: Tensor,
    f: int,
    s: int,
    lo: float,
    hi: float,
    capacity: int,
    layout: Tensor | None = None,
    row_start: Tensor | None = None,
    columns: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward flow of `g` and `through_flow_collect` of (x, g), in one read of the weights.

    Returns:
        gx: [G, T, K] in A, `path_flow_linear` transposed on g; then what `through_flow_collect` returns.
    """
    packed = (layout, row_start, columns)
    return _call("path_flow_linear_collect", weight, mask, x, g, int(f), int(s), lo, hi, capacity, *packed)


def path_flow_linear_prune_(
    weight: Tensor,
    mask: Tensor,
    x_old: Tensor,
    g_old: Tensor,
    s: int,
    at_least: float,
    above: float,
    cut: int,
    x: Tensor,
    f: int,
    layout: Tensor | None = None,
    row_start: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """`through_flow_prune_` by the flows (x_old, g_old), then the flow of `x`, in one read of the weights.

    Args:
        mask: contiguous; written to.
        x_old, g_old: [G, T', K] and [G, T', O] in A, the flows that scored the weights.

    Returns:
        [G, T, O] in A, `path_flow_linear` of x with the new mask.
    """
    old = (weight, mask, x_old, g_old, int(s), at_least, above, cut)
    return _call("path_flow_linear_prune_", *old, x, int(f), layout, row_start, columns)


def masked_weight(weight: Tensor, mask: Tensor | None, f: int = WeightMap.IDENTITY) -> Tensor:
    """[G, O, K] in A: f(w) where the mask is set, 0 elsewhere. Dense weights only, not differentiable."""
    return _call("masked_weight", weight, mask, int(f))


def compact_weight(
    weight: Tensor,
    mask: Tensor,
    layout: Tensor | None = None,
    row_start: Tensor | None = None,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Packs the live weights. The layout of the packed weight is a clone of `mask`.

    Returns:
        values: [live + 16] of the weight's dtype, row by row, then 16 zeros: kernels may read whole vectors.
        row_start: [G * O + 1] int64, where each row's values begin.
    """
    return _call("compact_weight", weight, mask, layout, row_start, columns)


def mask_pack(bits: Tensor) -> Tensor:
    """[G, O, K] bool -> [G, O, W] int16 mask words; [O, K] -> [O, W]."""
    return _call("mask_pack", bits)


def mask_unpack(mask: Tensor, columns: int) -> Tensor:
    """[G, O, W] int16 mask words -> [G, O, columns] bool; [O, W] -> [O, columns]."""
    return _call("mask_unpack", mask, columns)


def mask_count(mask: Tensor) -> Tensor:
    """[] int64: the number of bits set in mask words [G, O, W] int16."""
    return _call("mask_count", mask)


def fingerprint(tensor: Tensor) -> Tensor:
    """[] int64: what tells the bits of `tensor` (any shape and dtype), in row-major order, from others.

    The sum modulo 2^64 of SplitMix64 of its 64-bit words, each at its place: the same on every device and for any
    number of threads. No protection against an adversary.
    """
    return _call("fingerprint", tensor)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """[]: the k-th largest of `values` [n] (float, finite); k from 1 to n."""
    return _call("kth_largest", values, k)


def gumbel_keys(
    scores: Tensor, exponent: int = 0, temperature_inverse: float = 1.0, seed: int = 0, offset: int = 0
) -> Tensor:
    """Random keys of which the k largest are a draw of k weights without replacement (Gumbel top-k).

    key_i = temperature_inverse * ln(score_i * 2**exponent) - ln(-ln(u_i)), and -inf for a score of 0; u_i
    is made of 53 bits of Philox4x32-10 at key `seed` and counter `offset` + i. Keys depend on nothing else
    and are the same to the bit on every processor and device. Kool, van Hoof, Welling, ICML 2019.

    Args:
        scores: any shape, float, >= 0; a NaN or a negative score is an error.
        exponent: of a power of two that all scores are multiplied by; of any size.
        temperature_inverse: 0 draws uniformly among the scores > 0.
        offset: of the first score among all that are drawn from together; >= 0.

    Returns:
        float64 of the scores' shape.
    """
    return _call("gumbel_keys", scores, exponent, temperature_inverse, seed, offset)
