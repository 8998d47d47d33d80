"""The ops on sparse weights: schemas, fake kernels, autograd and typed wrappers.

Letters as in `ops.py`: G groups, O rows, K columns, T positions, W = ceil(K / 16) mask words, A = float64 for
float64 weights and float32 for all others. A sparse weight is its stored values and a pattern:

* `values`: [stored] or longer (a packed weight of `ops.compact_weight` has padding behind), float32, float64,
  bfloat16 or float16: row by row, columns ascending.
* `layout` [G, O, W] int16, `row_start` [G * O + 1] int64, `columns`: where they lie, as for packed weights.
* `index` [stored] int16: the column of each entry modulo 2^16, as an unsigned number.
* `layout_t` [G, K, ceil(O / 16)] int16, `row_start_t` [G * K + 1] int64, `index_t` [stored] int16: the same of
  the transpose; `order` [stored] int32: which value each of its entries has. None is allowed where nothing is
  transposed and no gradient is asked for.

`sparse_index` makes the last five of the first two, once per mask. On the CPU every sum is formed in an order
that depends on the pattern and the shapes alone: results are the same for any number of threads, but not
between instruction sets. `sparse_reference.py` serves wherever the binary has no kernel.

`tiled_matmul` and `tiled_sample` compute the same dense, tile by tile: the zeros of the mask are written where a tile
of the weight is loaded, and of the gradient of the weight only what the mask keeps is stored. The weight is packed, or
dense [G, O, K] with the mask's bits. Weight, flows and results have one dtype, with sums in float32. Kernels are on
CUDA alone, for all but float64. There every sum is formed in an order that the shapes alone decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sparse_reference
from .checks import STRETCH, check_arguments
from .ops import _LIBRARY, mask_unpack
from .reference import WeightMap, map_slope

__all__ = [
    "KERNELS",
    "Pattern",
    "Tiles",
    "sparse_gather",
    "sparse_index",
    "sparse_matmul",
    "sparse_sample",
    "sparse_scatter",
    "tile_starts",
    "tiled_matmul",
    "tiled_sample",
]

KERNELS = {"auto": 0, "lanes": 1, "gather": 2, "expand": 3}  # of sparse_matmul; the last two for T = 1

_ROWS = "Tensor layout, Tensor row_start, Tensor index"
_TILES = "Tensor layout, Tensor? index, Tensor? tile_start, int columns"
_BOTH = f"{_ROWS}, Tensor? layout_t, Tensor? row_start_t, Tensor? index_t, Tensor? order, int columns"

SCHEMAS: dict[str, str] = {
    "sparse_index": "(Tensor layout, Tensor row_start, int columns) -> (Tensor index, Tensor layout_t,"
    " Tensor row_start_t, Tensor index_t, Tensor order)",
    "sparse_matmul": f"(Tensor values, Tensor x, int f, bool transposed, int kernel, {_BOTH}) -> Tensor",
    "sparse_sample": f"(Tensor x, Tensor g, {_BOTH}) -> Tensor",
    "sparse_gather": f"(Tensor dense, {_ROWS}, int columns) -> Tensor",
    "sparse_scatter": f"(Tensor values, {_ROWS}, int columns) -> Tensor",
    "tiled_matmul": f"(Tensor weight, Tensor x, bool transposed, {_TILES}) -> Tensor",
    "tiled_sample": f"(Tensor x, Tensor g, {_TILES}) -> Tensor",
}

_OPS: dict[str, Any] = {}
_NAMES: dict[str, tuple[str, ...]] = {}  # of their arguments
_EAGER: dict[str, Any] = {}  # their derivatives
_TRANSFORMED: dict[str, Any] = {}  # the same under torch.func and in forward mode


class Derivative(NamedTuple):
    """What autograd is told of an op.

    Attributes:
        backward, save: as `torch.library.register_autograd` takes them.
        along: (values, place, tangent) -> the derivative along a tangent of the argument at that place.
    """

    backward: Callable[..., Any]
    save: Callable[..., Any]
    along: Callable[[list[Any], int, Tensor], Tensor]


def _register(
    schemas: Mapping[str, str], fakes: Mapping[str, Callable[..., Any]], derivatives: Mapping[str, Derivative]
) -> None:
    """Declares ops whose definitions have their names in `sparse_reference`."""
    for name, schema in schemas.items():
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, torch.no_grad()(getattr(sparse_reference, name)), "CompositeExplicitAutograd")
        _OPS[name] = getattr(torch.ops.pathprune, name).default
        _NAMES[name] = tuple(argument.name for argument in _OPS[name]._schema.arguments)
        torch.library.register_fake(f"pathprune::{name}", fakes[name], lib=_LIBRARY)
    for name, derivative in derivatives.items():
        backward, save = derivative.backward, derivative.save
        torch.library.register_autograd(f"pathprune::{name}", backward, setup_context=save, lib=_LIBRARY)
        _EAGER[name] = _eager(name, derivative)
        _TRANSFORMED[name] = _transformed(name, derivative)


def _function(name: str, **members: Callable[..., Any]) -> Any:
    methods = {key: staticmethod(method) for key, method in members.items()}
    return type(name, (torch.autograd.Function,), {**methods, "generate_vmap_rule": "setup_context" in members})


def _eager(name: str, derivative: Derivative) -> Any:
    """The same derivative as an autograd.Function, which takes a fraction of the time of what torch.library wraps."""

    def forward(ctx: Any, *values: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            made: Tensor = _OPS[name](*values)
        derivative.save(ctx, values, made)
        return made

    return _function(name, forward=forward, backward=derivative.backward)


def _transformed(name: str, derivative: Derivative) -> Any:
    """In the form that torch.func and forward mode can see through, which takes half as long again."""

    def forward(*values: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            made: Tensor = _OPS[name](*values)
        return made

    def save(ctx: Any, values: tuple[Any, ...], made: Tensor) -> None:
        derivative.save(ctx, values, made)
        ctx.set_materialize_grads(False)
        ctx.others = [None if isinstance(value, Tensor) else value for value in values]
        ctx.places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
        ctx.save_for_forward(*(values[place] for place in ctx.places))

    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        values = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            values[place] = tensor
        moved = [derivative.along(values, place, t) for place, t in enumerate(tangents) if t is not None]
        return sum(moved[1:], moved[0]) if moved else None

    def backward(ctx: Any, grad: Tensor | None) -> Any:
        return [None] * len(ctx.others) if grad is None else derivative.backward(ctx, grad)

    return _function(name, forward=forward, setup_context=save, backward=backward, jvp=jvp)


def linear(name: str) -> Callable[[list[Any], int, Tensor], Tensor]:
    """The derivative of an op that is linear in each of its tensors."""

    def along(values: list[Any], place: int, tangent: Tensor) -> Tensor:
        moved: Tensor = _call(name, *values[:place], tangent, *values[place + 1 :])
        return moved

    return along


class Pattern(NamedTuple):
    """Where a sparse weight has its entries: the arguments of all ops, in their order.

    `column_index` and `row_index` are `index` and `index_t`; a tuple has an `index` of its own.
    """

    layout: Tensor
    row_start: Tensor
    column_index: Tensor
    layout_t: Tensor | None
    row_start_t: Tensor | None
    row_index: Tensor | None
    order: Tensor | None
    columns: int

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """What says where the rows lie, without the transpose."""
        return self.layout, self.row_start, self.column_index, self.columns


# ---- fake kernels: the shapes and dtypes of the results ------------------------------------------


def _fake_index(layout: Tensor, row_start: Tensor, columns: int) -> tuple[Tensor, ...]:
    stored = torch.library.get_ctx().new_dynamic_size()
    groups, rows = layout.shape[:2]
    words_t = (rows + 15) // 16
    return (
        layout.new_empty(stored),
        layout.new_empty((groups, columns, words_t)),
        row_start.new_empty(groups * columns + 1),
        layout.new_empty(stored),
        layout.new_empty(stored, dtype=torch.int32),
    )


def _fake_matmul(
    values: Tensor, x: Tensor, f: int, transposed: bool, kernel: int, layout: Tensor, *rest: Any
) -> Tensor:
    columns = rest[-1]
    return x.new_empty((*x.shape[:2], columns if transposed else layout.shape[1]))


def _fake_tiled_sample(
    x: Tensor, g: Tensor, layout: Tensor, index: Tensor | None, tile_start: Tensor | None, columns: int
) -> Tensor:
    return x.new_empty((*layout.shape[:2], columns) if index is None else index.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "sparse_index": _fake_index,
    "sparse_matmul": _fake_matmul,
    "sparse_sample": lambda x, g, layout, row_start, index, *rest: x.new_empty(index.shape[0]),
    "sparse_gather": lambda dense, layout, row_start, index, columns: dense.new_empty(index.shape[0]),
    "sparse_scatter": lambda values, layout, row_start, index, columns: values.new_empty((*layout.shape[:2], columns)),
    "tiled_matmul": lambda weight, x, transposed, layout, index, tile_start, columns: x.new_empty(
        (*x.shape[:2], columns if transposed else layout.shape[1])
    ),
    "tiled_sample": _fake_tiled_sample,
}


# ---- autograd: each backward is built of the same ops, so it can be differentiated again -----------


def _keep(ctx: Any, count: int, values: tuple[Any, ...], pattern: tuple[Any, ...]) -> None:
    """Saves tensors and, behind them, the pattern."""
    *tensors, ctx.columns = pattern
    ctx.count = count
    ctx.save_for_backward(*values, *tensors)


def _kept(ctx: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    saved = ctx.saved_tensors
    return saved[: ctx.count], (*saved[ctx.count :], ctx.columns)


def _padded_to(grad: Tensor, values: Tensor) -> Tensor:
    """The gradient of the stored values, with zeros for what lies behind them."""
    missing = values.shape[0] - grad.shape[0]
    return torch.cat((grad, grad.new_zeros(missing))) if missing else grad


def _save_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, x, ctx.f, ctx.transposed, _, *pattern = inputs
    _keep(ctx, 2, (values, x), tuple(pattern))


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (values, x), pattern = _kept(ctx)
    grad_values = grad_x = None
    if ctx.needs_input_grad[0]:
        at_columns, at_rows = (grad, x) if ctx.transposed else (x, grad)  # [G, T, K], [G, T, O]
        grad_values = _padded_to(_call("sparse_sample", at_columns, at_rows, *pattern), values)
        if ctx.f != WeightMap.IDENTITY:
            grad_values = grad_values * map_slope(values, ctx.f)
        grad_values = grad_values.to(values.dtype)
    if ctx.needs_input_grad[1]:
        grad_x = _call("sparse_matmul", values, grad, ctx.f, not ctx.transposed, 0, *pattern)
    return grad_values, grad_x, *[None] * (len(_NAMES["sparse_matmul"]) - 2)


def _matmul_along(values: list[Any], place: int, tangent: Tensor) -> Tensor:
    weight, x, f, *rest = values
    if place == 1:
        moved = _call("sparse_matmul", weight, tangent, f, *rest)
    else:
        slope = tangent if f == WeightMap.IDENTITY else tangent * map_slope(weight, f)
        moved = _call("sparse_matmul", slope.to(weight.dtype), x, int(WeightMap.IDENTITY), *rest)
    return moved


def _save_sample(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, g, *pattern = inputs
    _keep(ctx, 2, (x, g), tuple(pattern))


def _sample_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, g), pattern = _kept(ctx)
    identity = (int(WeightMap.IDENTITY),)
    grad_x = grad_g = None
    if ctx.needs_input_grad[0]:
        grad_x = _call("sparse_matmul", grad, g, *identity, True, 0, *pattern)
    if ctx.needs_input_grad[1]:
        grad_g = _call("sparse_matmul", grad, x, *identity, False, 0, *pattern)
    return grad_x, grad_g, *[None] * (len(_NAMES["sparse_sample"]) - 2)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep(ctx, 0, (), inputs[1:])


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _call("sparse_scatter", grad, *_kept(ctx)[1]), None, None, None, None


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep(ctx, 1, inputs[:1], inputs[1:])


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (values,), pattern = _kept(ctx)
    return _padded_to(_call("sparse_gather", grad, *pattern), values), None, None, None, None


def _save_tiled_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, x, ctx.transposed, *tiles = inputs
    _keep(ctx, 2, (weight, x), tuple(tiles))


def _tiled_matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (weight, x), tiles = _kept(ctx)
    grad_weight = grad_x = None
    if ctx.needs_input_grad[0]:
        at_columns, at_rows = (grad, x) if ctx.transposed else (x, grad)  # [G, T, K], [G, T, O]
        grad_weight = _call("tiled_sample", at_columns, at_rows, *tiles)
    if ctx.needs_input_grad[1]:
        grad_x = _call("tiled_matmul", weight, grad, not ctx.transposed, *tiles)
    return grad_weight, grad_x, *[None] * (len(_NAMES["tiled_matmul"]) - 2)


def _save_tiled_sample(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep(ctx, 2, inputs[:2], inputs[2:])


def _tiled_sample_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, g), tiles = _kept(ctx)
    grad_x = grad_g = None
    if ctx.needs_input_grad[0]:
        grad_x = _call("tiled_matmul", grad, g, True, *tiles)
    if ctx.needs_input_grad[1]:
        grad_g = _call("tiled_matmul", grad, x, False, *tiles)
    return grad_x, grad_g, *[None] * (len(_NAMES["tiled_sample"]) - 2)


_BACKWARDS = {
    "sparse_matmul": Derivative(_matmul_backward, _save_matmul, _matmul_along),
    "sparse_sample": Derivative(_sample_backward, _save_sample, linear("sparse_sample")),
    "sparse_gather": Derivative(_gather_backward, _save_gather, linear("sparse_gather")),
    "sparse_scatter": Derivative(_scatter_backward, _save_scatter, linear("sparse_scatter")),
    "tiled_matmul": Derivative(_tiled_matmul_backward, _save_tiled_matmul, linear("tiled_matmul")),
    "tiled_sample": Derivative(_tiled_sample_backward, _save_tiled_sample, linear("tiled_sample")),
}
_register(SCHEMAS, _FAKES, _BACKWARDS)
_LIBRARY.impl("sparse_index", torch.library.fallthrough_kernel, "Autograd")


# ---- wrappers ------------------------------------------------------------------------------------


def _call(name: str, *values: Any) -> Any:
    """Calls the op, with as little of torch's autograd as may be: that takes longer than small products.

    The kernels check the arguments; what they refuse is checked again for the words of the error.
    """
    if torch.compiler.is_compiling():
        return _OPS[name](*values)
    try:
        if name in _TRANSFORMED and (torch._C._functorch.maybe_current_level() is not None or _is_forward_mode()):
            return _TRANSFORMED[name].apply(*values)
        if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values[:3]):
            return _EAGER[name].apply(*values) if _is_plain(values[:3]) else _OPS[name](*values)
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS[name](*values)
    except RuntimeError:
        check_arguments(name, dict(zip(_NAMES[name], values, strict=True)))
        raise


def _is_plain(values: tuple[Any, ...]) -> bool:
    """Whether no tensor subclass has to see the op itself."""
    return all(type(v) in (Tensor, torch.nn.Parameter) for v in values if isinstance(v, Tensor))


def _is_forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def sparse_index(layout: Tensor, row_start: Tensor, columns: int) -> Pattern:
    """The pattern of a layout and of its transpose.

    Args:
        layout: [G, O, W] int16, and row_start: [G * O + 1] int64, as `ops.compact_weight` made them.

    Raises:
        ValueError: row_start does not tell of as many entries as layout has, or of more than 2^31 - 1.
    """
    index, layout_t, row_start_t, index_t, order = _call("sparse_index", layout, row_start, columns)
    return Pattern(layout, row_start, index, layout_t, row_start_t, index_t, order, columns)


def sparse_matmul(
    values: Tensor,
    x: Tensor,
    pattern: Pattern,
    f: int = WeightMap.IDENTITY,
    transposed: bool = False,
    kernel: int = 0,
) -> Tensor:
    """y_tr = sum_c f(w_rc) x_tc over the entries. Differentiable, twice and more, in `values` and `x`.

    Args:
        x: [G, T, K] in A, any strides (positions or units may be the ones that lie side by side);
            transposed: [G, T, O].
        transposed: sum over the rows, y_tc = sum_r f(w_rc) x_tr.
        kernel: one of KERNELS; 0 chooses.

    Returns:
        [G, T, O] in A; transposed: [G, T, K].
    """
    return _call("sparse_matmul", values, x, int(f), transposed, kernel, *pattern)


def sparse_sample(x: Tensor, g: Tensor, pattern: Pattern) -> Tensor:
    """[stored] in A: sum_t g_tr x_tc at every entry (r, c), and nowhere else. Differentiable in both.

    Args:
        x: [G, T, K] in A; g: [G, T, O] in A; any strides.
    """
    return _call("sparse_sample", x, g, *pattern)


def sparse_gather(dense: Tensor, pattern: Pattern) -> Tensor:
    """[stored]: the weights [G, O, K] at the entries, in their dtype. Its gradient is `sparse_scatter`."""
    return _call("sparse_gather", dense, *pattern.rows)


def sparse_scatter(values: Tensor, pattern: Pattern) -> Tensor:
    """[G, O, K]: the values at the entries, zeros elsewhere. Its gradient is `sparse_gather`."""
    return _call("sparse_scatter", values, *pattern.rows)


class Tiles(NamedTuple):
    """Where a masked weight has its entries, for products in tiles: the last arguments of the tiled ops.

    `column_index` and `tile_start` are None for a dense weight; an `index` a tuple has of its own.
    """

    layout: Tensor
    column_index: Tensor | None
    tile_start: Tensor | None
    columns: int


def tile_starts(layout: Tensor, columns: int) -> Tensor:
    """[G * O * ceil(K / 64) + 1] int32: where the entries of each 64 columns of a row begin, and the last ones end.

    Args:
        layout: [G, O, W] int16, of at most 2^31 - 1 entries.
    """
    bits = mask_unpack(layout, columns)
    ends = F.pad(bits, (0, -columns % STRETCH)).view(-1, STRETCH).sum(-1).cumsum(0)
    return torch.cat((ends.new_zeros(1), ends)).to(torch.int32)


def tiled_matmul(weight: Tensor, x: Tensor, tiles: Tiles, transposed: bool = False) -> Tensor:
    """y_tr = sum_c w_rc x_tc over the entries. Differentiable, twice and more, in `weight` and `x`.

    Args:
        weight: packed [stored], in mask order; or dense [G, O, K], of which entries off the mask are not looked at.
        x: [G, T, K]; transposed: [G, T, O]; of the weight's dtype.
        transposed: sum over the rows, y_tc = sum_r w_rc x_tr.

    Returns:
        [G, T, O] of the weight's dtype; transposed: [G, T, K].
    """
    return _call("tiled_matmul", weight, x, transposed, *tiles)


def tiled_sample(x: Tensor, g: Tensor, tiles: Tiles) -> Tensor:
    """sum_t g_tr x_tc at every entry (r, c). Differentiable in both.

    Args:
        x: [G, T, K]; g: [G, T, O], of x's dtype.

    Returns:
        [stored] of x's dtype; where the tiles are of a dense weight, [G, O, K] with zeros off the mask.
    """
    return _call("tiled_sample", x, g, *tiles)
