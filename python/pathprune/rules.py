"""What each ATen operator means for paths: one table, operator name -> rule.

A rule reads one node of the exported graph and adds nodes to the path network. Operators are named without overload
and without the trailing underscore of in-place forms. To support a new operator, write a rule here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .nodes import (
    Constant,
    Expression,
    Gate,
    Input,
    Pool,
    Product,
    Recorder,
    Reduce,
    Scale,
    Shift,
    Sum,
    Synapse,
    Wire,
)

if TYPE_CHECKING:
    from .tracer import Tracer

Rule = Callable[["Tracer", fx.Node, dict[str, Any]], Any]
RULES: dict[str, Rule] = {}


class RuleError(ValueError):
    """An operator, or this use of it, has no meaning for paths."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Enters a rule into the table under the names of the operators it explains."""

    def enter(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return enter


# ---------------------------------------------------------------------------------------------------- synapses


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * n if len(values) == 1 else values


def weighted(t: Tracer, node: fx.Node, flow: int, weight: str, bias: Any, channel_dim: int, **options: Any) -> int:
    """A synapse, and its bias as a shift along ``channel_dim``."""
    shape = t.net.tensors[weight].shape
    if options["form"].startswith("linear") and len(shape) != 2:
        raise RuleError(f"wanted a matrix as the weight, got shape {tuple(shape)}")
    index = t.add(Synapse((flow,), t.shape(node), weight=weight, **options), node)
    return shifted(t, node, index, bias, channel_dim)


def along(expression: Expression, dims: int, channel_dim: int) -> Expression:
    """The expression, its single axis laid along ``channel_dim`` of a tensor with ``dims`` axes."""
    shape = [1] * dims
    shape[channel_dim] = -1
    return lambda tensors: expression(tensors).reshape(shape)


def shifted(t: Tracer, node: fx.Node, index: int, bias: Any, channel_dim: int, kind: str = "bias") -> int:
    """The flow with a bias added along ``channel_dim``, where there is one."""
    if bias is None:
        return index
    value = along(t.constant(bias), len(t.shape(node)), channel_dim)
    return t.add(Shift((index,), t.shape(node), value=value, kind=kind), node)


@rule("linear")
def _linear(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    name, transposed = t.weight_or_transpose(a["weight"])
    form = "linear_t" if transposed else "linear"
    return weighted(t, node, t.flow(a["input"]), name, a["bias"], -1, form=form)


@rule("addmm")
def _addmm(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    if a["beta"] != 1 or a["alpha"] != 1:
        raise RuleError("beta and alpha other than 1")
    return _matrix_product(t, node, a["mat1"], a["mat2"], a["self"])


@rule("mm", "matmul")
def _matmul(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    left, right = a["self"], a["mat2"] if "mat2" in a else a["other"]
    if t.is_flow(left) and t.is_flow(right):
        own = factors("self", "mat2" if "mat2" in a else "other")
        return t.add(Product((t.flow(left), t.flow(right)), t.shape(node), apply=torch.matmul, recorded=own), node)
    return _matrix_product(t, node, left, right, None)


def factors(left: str, right: str) -> Recorder:
    """The two factors of a product, by the names of the operator's arguments."""
    return lambda a, tensors: (a[left], a[right])


def _matrix_product(t: Tracer, node: fx.Node, left: Any, right: Any, bias: Any) -> int:
    if not t.is_flow(left):
        raise RuleError("a constant matrix times a flow")
    name, transposed = t.weight_or_transpose(right)
    return weighted(t, node, t.flow(left), name, bias, -1, form="linear" if transposed else "linear_t")


@rule("conv1d", "conv2d", "conv3d")
def _conv(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    weight = t.weight(a["weight"])
    n = len(t.net.tensors[weight].shape) - 2
    dilation = _tuple(a["dilation"], n)
    flow = t.flow(a["input"])
    kernel = t.net.tensors[weight].shape[2:]
    padding = a["padding"]
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(amount % 2 for amount in total):  # torch pads the far side more
            flow = _padded(t, node, flow, [amount % 2 for amount in total])
        padding = [amount // 2 for amount in total]
    options = {"stride": _tuple(a["stride"], n), "padding": _tuple(padding, n), "dilation": dilation}
    return weighted(t, node, flow, weight, a["bias"], -1 - n, form="conv", groups=a["groups"], **options)


def _padded(t: Tracer, node: fx.Node, flow: int, far: Sequence[int]) -> int:
    widths = [width for amount in reversed(far) for width in (0, amount)]
    shape = list(t.net.nodes[flow].shape)
    for axis, amount in enumerate(far):
        shape[len(shape) - len(far) + axis] += amount
    wire = Wire((flow,), torch.Size(shape), apply=lambda xs, p: torch.nn.functional.pad(xs[0], widths))
    return t.add(wire, node)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    weight = t.weight(a["weight"])
    n = len(t.net.tensors[weight].shape) - 2
    options = {key: _tuple(a[key], n) for key in ("stride", "padding", "dilation", "output_padding")}
    options["groups"] = a["groups"]
    return weighted(t, node, t.flow(a["input"]), weight, a["bias"], -1 - n, form="conv_transpose", **options)


@rule("embedding")
def _embedding(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int | None:
    """A source of flow, where the model's input chooses the rows; rows chosen by position are constants."""
    t.weight(a["weight"], prunable=False)
    if not t.reads_input(a["indices"]):
        return None
    return t.add(Input((), t.shape(node), name=node.name), node)


# ------------------------------------------------------------------------------------------------------- gates


@rule(
    *("relu", "relu6", "leaky_relu", "prelu", "gelu", "silu", "mish", "elu", "celu", "selu", "softplus"),
    *("hardswish", "hardtanh", "hardsigmoid", "sigmoid", "tanh", "clamp", "clamp_min", "clamp_max"),
    *("threshold", "hardshrink", "softshrink", "log_sigmoid", "rrelu"),
)
def _gate(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    return t.gate(Gate((t.flow(next(iter(a.values()))),), t.shape(node), name=t.operator(node)), node)


IDENTITIES = (
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "contiguous", "clone", "alias"),
    *("detach", "to", "_to_copy", "type_as", "lift_fresh_copy", "neg", "positive"),
)


@rule(*IDENTITIES)
def _identity(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    return t.flow(next(iter(a.values())))


# ----------------------------------------------------------------------------------------------------- pooling


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def _pool(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    operator = t.operator(node).removesuffix("_with_indices")
    n = int(operator[-2])
    kernel = _tuple(a["kernel_size"], n)
    pool = Pool(
        (t.flow(next(iter(a.values()))),),
        t.shapes(node)[0],
        kind=operator[:3],
        kernel=kernel,
        stride=_tuple(a["stride"], n) if a["stride"] not in (None, []) else kernel,
        padding=_tuple(a["padding"], n),
        dilation=_tuple(a.get("dilation", 1), n),
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
    return t.add(wire, node)


@rule(
    *("permute", "transpose", "t", "mT"),
    *("numpy_T", "movedim", "swapaxes", "squeeze", "unsqueeze", "slice", "select", "narrow", "index"),
    *("index_select", "expand", "repeat", "repeat_interleave", "roll", "flip", "unfold"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
)
def _replay(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    """A map of zeros and ones: the operator itself."""
    return t.add(Wire((t.flow(next(iter(a.values()))),), t.shape(node), apply=t.replay(node)), node)


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

    def apply(xs: Sequence[Tensor], power: float) -> Tensor:
        x = xs[0]
        for axis, matrix in enumerate(matrices):
            entries = matrix.abs().to(x) if power == 1 else _power(matrix, power).to(x)
            x = (x.movedim(2 + axis, -1) @ entries.T).movedim(-1, 2 + axis)
        return x

    return t.add(Wire((flow,), t.shape(node), apply=apply), node)


def _power(entries: Tensor, power: float) -> Tensor:
    """``|entries|^power`` with absent entries (zeros) staying absent at power 0."""
    return torch.where(entries == 0, 0.0, entries.abs() ** power)


# -------------------------------------------------------------------------------------------------- arithmetic


def scaled(t: Tracer, node: fx.Node, flow: int, factor: Expression) -> int:
    """The flow times fixed numbers."""
    return t.add(Scale((flow,), t.shape(node), factor=factor), node)


@rule("add", "sub", "rsub")
def _add(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    if t.operator(node) == "sub" and _is_mean_of(t, a["other"], a["self"]):
        mean = t.net.nodes[t.flow(a["other"])]
        return t.add(Gate((t.flow(a["self"]),), t.shape(node), name="centre", dims=mean.dims), node)  # type: ignore[attr-defined]
    factors = (1, a["alpha"]) if t.operator(node) != "rsub" else (a["alpha"], 1)
    flows, value = [], None
    for term, factor in zip((a["self"], a["other"]), factors, strict=True):
        if not t.is_flow(term):
            value = _times(t.constant(term), factor)
        elif factor == 1:
            flows.append(t.flow(term))
        else:
            scale = Scale((t.flow(term),), t.shape(term), factor=t.constant(factor))
            flows.append(t.add(scale, node))
    if value is None:
        return t.add(Sum(tuple(flows), t.shape(node)), node)
    return t.add(Shift(tuple(flows), t.shape(node), value=value), node)


def _is_mean_of(t: Tracer, mean: Any, value: Any) -> bool:
    if not (t.is_flow(mean) and t.is_flow(value)):
        return False
    node = t.net.nodes[t.flow(mean)]
    return isinstance(node, Reduce) and node.kind == "mean" and node.keepdim and node.inputs == (t.flow(value),)


def _times(expression: Expression, factor: float) -> Expression:
    return expression if factor == 1 else lambda tensors: expression(tensors) * factor


@rule("mul", "multiply")
def _mul(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    left, right = a["self"], a["other"]
    if t.is_flow(left) and t.is_flow(right):
        flows = (t.flow(left), t.flow(right))
        (first, gated), (second, gated_too) = (_origin(t, flow) for flow in flows)
        if first == second and (gated or gated_too):  # x times a function of x: an activation, written out
            return t.gate(Gate((first,), t.shape(node), name="self_gate"), node)
        return t.add(Product(flows, t.shape(node), recorded=factors("self", "other")), node)
    if not t.is_flow(left):
        left, right = right, left
    return scaled(t, node, t.flow(left), t.constant(right))


def _origin(t: Tracer, index: int) -> tuple[int, bool]:
    """The flow that a value is an elementwise function of, and whether an activation lies between."""
    gated = False
    while True:
        node = t.net.nodes[index]
        if isinstance(node, Sum):
            found = [_origin(t, i) for i in node.inputs]
            if any(origin != found[0][0] for origin, _ in found):
                return index, gated
            index, gated = found[0][0], gated or any(g for _, g in found)
        elif isinstance(node, Gate) or (isinstance(node, (Scale, Shift)) and _is_one_number(t, node)):
            index, gated = node.inputs[0], gated or (isinstance(node, Gate) and node.bends)
        else:
            return index, gated


def _is_one_number(t: Tracer, node: Scale | Shift) -> bool:
    value = (node.factor if isinstance(node, Scale) else node.value)(t.net.tensors)
    return value.numel() == 1 and node.shape == t.net.nodes[node.inputs[0]].shape


@rule("glu")
def _glu(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    flow, shape, dim = t.flow(a["self"]), t.shape(node), a["dim"]

    def half(k: int) -> int:
        return t.add(Wire((flow,), shape, apply=lambda xs, p: xs[0].chunk(2, dim)[k]), node)

    return t.add(Product((half(0), half(1)), shape), node)


@rule("div", "divide", "true_divide")
def _div(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    if not t.is_flow(a["self"]) or t.is_flow(a["other"]):
        raise RuleError("a division by a flow")
    divisor = t.constant(a["other"])
    return scaled(t, node, t.flow(a["self"]), lambda tensors: 1.0 / divisor(tensors))
