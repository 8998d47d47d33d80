"""What each ATen operator means for paths: one table, operator name -> rule.

A rule reads one node of the exported graph and adds nodes to the path network. Operators are named without overload
and without the trailing underscore of in-place forms. To support a new operator, write a rule here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from .graph_values import arguments_of
from .nodes import (
    Expression,
    Gate,
    Input,
    Product,
    Recorder,
    Reduce,
    Scale,
    Shift,
    Sum,
    Synapse,
    Tensors,
    Wire,
)

if TYPE_CHECKING:
    from .tracer import Tracer

Rule = Callable[["Tracer", fx.Node, dict[str, Any]], Any]
RULES: dict[str, Rule] = {}


class RuleError(ValueError):
    """An operator, or this use of it, has no meaning for paths: the one being read, or ``node`` before it.

    ``remedy`` is what the user can do about it; empty: only a rule helps.
    """

    def __init__(self, why: str, node: fx.Node | None = None, remedy: str = "") -> None:
        super().__init__(why)
        self.node, self.remedy = node, remedy


def remedy_of(operator: fx.Node, name: str) -> str:
    """What a user can do about an operator without a rule; empty: write one."""
    if getattr(operator.target, "namespace", "") == "pathprune":
        return "pathprune.densify first"
    is_loss = "loss" in name or "cross_entropy" in name
    return "paths end at the model's outputs: give an example_input without labels" if is_loss else ""


class Marker:
    """A value that depends on the model's input and is no flow itself, but leads to one: a norm's size, say.

    Operators that read one ask it first.

    Attributes:
        wanted: what it is, and is refused to be otherwise.
    """

    wanted: ClassVar[str] = "a value that depends on the model's input by itself"

    def through(self, t: Tracer, node: fx.Node, a: dict[str, Any]) -> Any:
        """What an operator makes of it: a flow, a marker, or None where the operator's own rule is to tell."""
        raise NotImplementedError

    def as_flow(self, t: Tracer) -> int:
        """The flow that it is where it is read as one."""
        raise RuleError(self.wanted)


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Enters a rule into the table under the names of the operators it explains."""

    def enter(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return enter


# ---------------------------------------------------------------------------------------------------- synapses


PRODUCTS = {"linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d"}


def axes_tuple(value: Any, n: int) -> tuple[int, ...]:
    """A number for each of n axes, given as that or as one for all."""
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


def factors(left: str, right: str) -> Recorder:
    """The two factors of a product, by the names of the operator's arguments."""
    return lambda a, tensors: (a[left], a[right])


@rule("linear")
def _linear(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    return by_matrix(t, node, a["input"], a["weight"], -2, a["bias"])


def by_matrix(t: Tracer, node: fx.Node, value: Any, matrix: Any, out: int, bias: Any) -> int:
    """A flow times a parameter, or some rows of one: then all of it, and of what leaves that part."""
    flow, shape = t.flow(value), t.shape(node)
    name, axis, first = t.matrix(matrix, out)
    form = "linear" if axis == -2 else "linear_t"
    every = t.net.tensors[name].shape[axis] if t.net.tensors[name].dim() > 1 else shape[-1]
    if every == shape[-1]:
        return weighted(t, node, flow, name, bias, -1, form=form)
    index = t.add(Synapse((flow,), torch.Size((*shape[:-1], every)), weight=name, form=form), node)
    some = t.add(Wire((index,), shape, apply=lambda xs, p: xs[0].narrow(-1, first, shape[-1])), node)
    return shifted(t, node, some, bias, -1)


@rule("conv1d", "conv2d", "conv3d")
def _conv(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    n = len(t.shape(a["weight"])) - 2
    dilation = axes_tuple(a["dilation"], n)
    flow = t.flow(a["input"])
    kernel = t.shape(a["weight"])[2:]
    padding = a["padding"]
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(amount % 2 for amount in total):  # torch pads the far side more
            flow = _padded(t, node, flow, [amount % 2 for amount in total])
        padding = [amount // 2 for amount in total]
    options = {"stride": axes_tuple(a["stride"], n), "padding": axes_tuple(padding, n), "dilation": dilation}
    if _is_normed_across(t, a["weight"]):
        every = (*options.values(), False, (0,) * n, a["groups"])
        index = _fixed_convolution(t, node, flow, t.constant(a["weight"]), every)
        return shifted(t, node, index, a["bias"], -1 - n)
    weight = t.weight(a["weight"])
    return weighted(t, node, flow, weight, a["bias"], -1 - n, form="conv", groups=a["groups"], **options)


def _is_normed_across(t: Tracer, weight: Any) -> bool:
    """Weight norm over other axes than rows.

    Over rows, ``w = g v / |v|``, a row of which all is pruned would be 0 / 0: such a weight is refused as others are
    that the model computes.
    """
    is_made = isinstance(weight, fx.Node) and weight.op == "call_function"
    return is_made and t.operator(weight) == "_weight_norm" and arguments_of(weight)["dim"] != 0


def _fixed_convolution(t: Tracer, node: fx.Node, flow: int, weight: Expression, geometry: tuple[Any, ...]) -> int:
    """By a weight that is no parameter: a fixed map, its entries above zero less those below."""
    tensors = t.net.tensors

    def part(sign: int) -> int:
        def apply(xs: Sequence[Tensor], power: float) -> Tensor:
            w = (sign * weight(tensors).detach()).clamp(min=0).to(xs[0])
            return torch.convolution(xs[0], torch.where(w > 0, w**power, w), None, *geometry)

        return t.add(Wire((flow,), t.shape(node), apply=apply), node)

    below = t.add(Scale((part(-1),), t.shape(node), factor=t.constant(-1)), node)
    return t.add(Sum((part(1), below), t.shape(node)), node)


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
    options = {key: axes_tuple(a[key], n) for key in ("stride", "padding", "dilation", "output_padding")}
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
    name = t.operator(node)
    if name.startswith("clamp") or name == "hardtanh":
        name = "hardtanh" if _keeps_zero(a) else "clamp"
    return t.gate(Gate((t.flow(next(iter(a.values()))),), t.shape(node), name=name), node)


def _keeps_zero(a: dict[str, Any]) -> bool:
    """Whether bounds are numbers on either side of zero, or on one."""
    low, high = (
        [a[key] for key in keys if a.get(key) is not None] for keys in (("min", "min_val"), ("max", "max_val"))
    )
    is_known = all(isinstance(bound, (int, float)) for bound in low + high)
    return is_known and max(low, default=0) <= 0 <= min(high, default=0)


IDENTITIES = (
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "contiguous", "clone", "alias"),
    *("detach", "to", "_to_copy", "type_as", "lift_fresh_copy", "positive"),
)


@rule(*IDENTITIES)
def _identity(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    return t.flow(next(iter(a.values())))


# -------------------------------------------------------------------------------------------------- arithmetic


def scaled(t: Tracer, node: fx.Node, flow: int, factor: Expression, recorded: Recorder | None = None) -> int:
    """The flow times fixed numbers, or what stands for those that data decide."""
    return t.add(Scale((flow,), t.shape(node), factor=factor, recorded=recorded), node)


@rule("add", "sub", "rsub")
def _add(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    if t.operator(node) == "sub" and _is_mean_of(t, a["other"], a["self"]):
        mean = t.net.nodes[t.flow(a["other"])]
        return t.add(Gate((t.flow(a["self"]),), t.shape(node), name="centre", dims=mean.dims), node)  # type: ignore[attr-defined]
    alpha = a["alpha"] if t.operator(node) == "add" else -a["alpha"]
    factors = (1, alpha) if t.operator(node) != "rsub" else (alpha, 1)
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


@rule("neg")
def _neg(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    return scaled(t, node, t.flow(a["self"]), t.constant(-1))


@rule("mul", "multiply")
def _mul(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    left, right = a["self"], a["other"]
    if t.is_flow(left) and t.is_flow(right):
        flows = (t.flow(left), t.flow(right))
        (first, gated), (second, gated_too) = (_origin(t, flow) for flow in flows)
        if first == second and (gated or gated_too):  # x times a function of x: an activation, written out
            return t.gate(Gate((first,), t.shape(node), name="self_gate"), node)
        return t.add(Product(flows, t.shape(node), recorded=factors("self", "other")), node)
    name = "other"
    if not t.is_flow(left):
        left, right, name = right, left, "self"
    recorded: Recorder | None = (lambda found, tensors: found[name]) if t.is_varying(right) else None
    return scaled(t, node, t.flow(left), t.constant(right), recorded)


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

    def recorded(found: Mapping[str, Any], tensors: Tensors) -> tuple[Tensor, Tensor]:
        value, gate = found["self"].chunk(2, found["dim"])
        return value, gate.sigmoid()

    gate = t.add(Gate((half(1),), shape, name="sigmoid"), node)
    return t.add(Product((half(0), gate), shape, recorded=recorded), node)


@rule("div", "divide", "true_divide")
def _div(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    if not t.is_flow(a["self"]) or t.is_flow(a["other"]):
        raise RuleError("a division by a flow")
    divisor = t.constant(a["other"])
    return scaled(t, node, t.flow(a["self"]), lambda tensors: 1.0 / divisor(tensors))
