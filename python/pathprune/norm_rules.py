"""What norms mean for paths, also where a model writes them out in elementwise operators.

A norm without running statistics divides by the RMS of the flow that enters, held fixed; centring is dropped. What it
multiplies a sample with, ``1 / sigma``, can be recorded: then that is a gate, as an activation's is, and signed flow is
centred. Global response normalisation multiplies channels with their size over the mean of their sizes: held fixed,
and recorded, as well.

Written out, ``x * rsqrt(mean(x^2) + eps)`` is read through its :class:`Moment`: the statistic of a flow that the
operators in between make.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from .nodes import Expression, Gate, Norm, Recorder, Scale, Shift, Tensors
from .rules import IDENTITIES, Marker, RuleError, along, rule, scaled

if TYPE_CHECKING:
    from .tracer import Tracer


# ------------------------------------------------------------------------------------------------------- norms


@rule("batch_norm")
def _batch_norm(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    if a.get("training") or a["running_mean"] is None or a["running_var"] is None:
        return _norm(t, node, a, dims=_all_but_channel(t, node), weight_dim=1, by_sample=False)
    mean, variance, eps = t.constant(a["running_mean"]), t.constant(a["running_var"]), a["eps"]
    gamma = t.constant(a["weight"]) if a["weight"] is not None else None
    beta = t.constant(a["bias"]) if a["bias"] is not None else None

    def factor(tensors: Tensors) -> Tensor:
        inverse = torch.rsqrt(variance(tensors).double() + eps)
        return inverse if gamma is None else gamma(tensors).double() * inverse

    def shift(tensors: Tensors) -> Tensor:
        moved = -mean(tensors).double() * factor(tensors)
        return moved if beta is None else beta(tensors).double() + moved

    dims = len(t.shape(node))
    scale = Scale((t.flow(a["input"]),), t.shape(node), factor=along(factor, dims, 1), kind="batch_norm")
    index = t.add(scale, node)
    return t.add(Shift((index,), t.shape(node), value=along(shift, dims, 1), kind="batch_norm"), node)


def _all_but_channel(t: Tracer, node: fx.Node) -> tuple[int, ...]:
    return tuple(range(2, len(t.shape(node))))


def _norm(
    t: Tracer,
    node: fx.Node,
    a: dict[str, Any],
    dims: tuple[int, ...],
    weight_dim: int | None,
    groups: int = 0,
    centres: bool = True,
    by_sample: bool = True,
) -> int:
    """Divide by the RMS of the entering flow over ``dims``, then the affine part (along one axis, or the last ones)."""
    index, shape = t.flow(a["input"]), t.shape(node)
    if centres:
        index = t.add(Gate((index,), shape, name="centre", dims=dims, groups=groups), node)
    recorded = _inverse_deviation(dims, groups, centres) if by_sample else None
    index = t.add(Norm((index,), shape, dims=dims, groups=groups, recorded=recorded), node)
    n = len(shape)
    for kind, value in (("scale", a.get("weight")), ("shift", a.get("bias"))):
        if value is None:
            continue
        expression = t.constant(value)
        if weight_dim is not None:
            expression = along(expression, n, weight_dim)
        if kind == "scale":
            index = t.add(Scale((index,), t.shape(node), factor=expression), node)
        else:
            index = t.add(Shift((index,), t.shape(node), value=expression), node)
    return index


def _inverse_deviation(dims: tuple[int, ...], groups: int, centres: bool) -> Recorder:
    """``1 / sqrt(variance + eps)``, or of the mean square, as the operator makes it of its input."""

    def recorded(a: Mapping[str, Any], tensors: Tensors) -> Tensor:
        x, eps = a["input"], a["eps"]
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        x = x if x.dtype == torch.float64 else x.float()
        parts = x.unflatten(1, (groups, -1)) if groups else x
        over = tuple(range(2, parts.dim())) if groups else dims
        size = parts.var(over, correction=0, keepdim=True) if centres else parts.square().mean(over, keepdim=True)
        inverse = torch.rsqrt(size + eps)
        return inverse.expand(*parts.shape[:3], *size.shape[3:]).flatten(1, 2) if groups else inverse

    return recorded


@rule("layer_norm", "rms_norm")
def _layer_norm(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    n, centres = len(t.shape(node)), t.operator(node) == "layer_norm"
    return _norm(t, node, a, dims=tuple(range(n - len(a["normalized_shape"]), n)), weight_dim=None, centres=centres)


@rule("group_norm")
def _group_norm(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    return _norm(t, node, a, dims=tuple(range(1, len(t.shape(node)))), weight_dim=1, groups=a["num_groups"])


@rule("instance_norm")
def _instance_norm(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    if not a["use_input_stats"]:
        return _batch_norm(t, node, a)
    return _norm(t, node, a, dims=_all_but_channel(t, node), weight_dim=1)


# ------------------------------------------------------------------------------------------- norms written out


@dataclass(frozen=True)
class Moment(Marker):
    """``(mean or sum of x^2 over dims)^(power / 2)``, times constants: the size of a flow, not a flow itself.

    Attributes:
        flow: x.
        square: the operator that squared it, in case the squares are used for themselves.
        dims: what is reduced; None before the reduction.
        factors: constants and the powers they are raised to.
    """

    flow: int
    square: fx.Node
    dims: tuple[int, ...] | None = None
    is_mean: bool = True
    power: float = 2.0
    factors: tuple[tuple[Expression, float], ...] = ()

    def as_flow(self, t: Tracer) -> int:
        """Squares that no norm is made of: an activation."""
        if self.dims is not None:
            raise RuleError("the size of a flow is used other than to divide that flow")
        return t.gate(Gate((self.flow,), t.shape(self.square), name="square"), self.square)

    def through(self, t: Tracer, node: fx.Node, a: dict[str, Any]) -> Marker | int | None:
        return _through_moment(t, node, a)

    def raised(self, exponent: float) -> Moment:
        factors = tuple((value, power * exponent) for value, power in self.factors)
        return replace(self, power=self.power * exponent, factors=factors)

    def times(self, value: Expression, exponent: float) -> Moment:
        return replace(self, factors=(*self.factors, (value, exponent)))


@dataclass(frozen=True)
class Others(Marker):
    """The mean of a flow's sizes along further axes, plus constants; or a size over that mean.

    Attributes:
        moment: the size, as a root.
        among: what the mean is over.
        is_ratio: whether a size was divided by it: then the flow may be multiplied with it (ConvNeXt V2).
    """

    moment: Moment
    among: tuple[int, ...]
    is_ratio: bool = False
    wanted: ClassVar[str] = "the mean size of flows, other than to multiply a flow with its own over it"

    def through(self, t: Tracer, node: fx.Node, a: dict[str, Any]) -> Others | int | None:
        name = t.operator(node)
        others = [x for x in node.all_input_nodes if t.is_flow(x) and t.marker(x) is not self]
        if not others and (name in _SAME or (name == "add" and not self.is_ratio)):
            return self
        if name in ("mul", "multiply") and self.is_ratio and len(others) == 1 and t.marker(others[0]) is None:
            size = "other" if others[0] is a["self"] else "self"
            flow = t.flow(others[0])
            if flow == self.moment.flow:
                assert self.moment.dims is not None
                shape = t.net.nodes[flow].shape
                recorded: Recorder = lambda found, tensors: found[size]  # noqa: E731
                return t.add(Norm((flow,), shape, dims=self.moment.dims, among=self.among, recorded=recorded), node)
        raise RuleError(self.wanted)


@rule("square")
def _square(t: Tracer, node: fx.Node, a: dict[str, Any]) -> Moment:
    return Moment(t.flow(a["self"]), node)


@rule("pow")
def _pow(t: Tracer, node: fx.Node, a: dict[str, Any]) -> Moment | int:
    if not t.is_flow(a["self"]) or isinstance(a["exponent"], fx.Node):
        raise RuleError("a power that the model computes")
    if a["exponent"] == 2:
        return _square(t, node, a)
    return t.gate(Gate((t.flow(a["self"]),), t.shape(node), name="pow"), node)


@rule("linalg_vector_norm", "norm")
def _vector_norm(t: Tracer, node: fx.Node, a: dict[str, Any]) -> Moment:
    order = a.get("ord", a.get("p"))
    if order not in (None, 2):
        raise RuleError(f"a norm of order {order}")
    dims = _dims(t, a["self"], a.get("dim"))
    return Moment(t.flow(a["self"]), node, dims, is_mean=False, power=1.0)


@rule("var", "std")
def _variance(t: Tracer, node: fx.Node, a: dict[str, Any]) -> Moment:
    """Centring is dropped, so the variance is the mean square."""
    power = 2.0 if t.operator(node) == "var" else 1.0
    return Moment(t.flow(a["self"]), node, _dims(t, a["self"], a.get("dim")), power=power)


def _dims(t: Tracer, value: Any, dims: Any) -> tuple[int, ...]:
    n = len(t.shape(value))
    chosen = range(n) if dims in (None, []) else (dims,) if isinstance(dims, int) else dims
    return tuple(sorted(d % n for d in chosen))


_SAME = {*IDENTITIES, "expand", "unsqueeze", "squeeze", "clamp", "clamp_min", "maximum", "view", "reshape"}
_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}


def _moment(t: Tracer, value: Any) -> Moment | None:
    found = t.marker(value)
    return found if isinstance(found, Moment) else None


def _through_moment(t: Tracer, node: fx.Node, a: dict[str, Any]) -> Marker | int | None:
    """What an operator makes of a moment; None where it reads the squares as a flow."""
    name = t.operator(node)
    moment = next(m for m in (_moment(t, x) for x in node.all_input_nodes) if m is not None)
    if moment.dims is None:
        if name in ("mean", "sum"):
            return replace(moment, dims=_dims(t, a["self"], a.get("dim")), is_mean=name == "mean")
        return moment if name in IDENTITIES else None
    if name == "mean" and moment.power == 1 and not moment.factors:
        return Others(moment, _dims(t, a["self"], a.get("dim")))
    other = t.marker(a.get("other"))
    if name.startswith("div") and isinstance(other, Others) and not other.is_ratio and other.moment == moment:
        return replace(other, is_ratio=True)
    if isinstance(other, Others):
        raise RuleError(Others.wanted)
    if name in ("mul", "multiply", "div", "divide", "true_divide"):
        return _scaled_or_divided(t, node, a, 1.0 if name.startswith("mul") else -1.0)
    others = [x for x in node.all_input_nodes if t.is_flow(x) and _moment(t, x) is None]
    is_combined = len(node.all_input_nodes) > 1 and all(_moment(t, x) is not None for x in node.all_input_nodes)
    if is_combined:
        raise RuleError("the sizes of two flows are combined")
    if name == "expand_as" or ((name in _SAME or name == "add") and not others):
        return moment
    if name in _POWERS or (name == "pow" and not isinstance(a["exponent"], fx.Node)):
        return moment.raised(_POWERS[name] if name in _POWERS else a["exponent"])
    raise RuleError("the size of a flow is used other than to divide that flow")


@rule(*_POWERS)
def _root(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    raise RuleError("a root or reciprocal of other than the size of a flow")


def _scaled_or_divided(t: Tracer, node: fx.Node, a: dict[str, Any], sign: float) -> Moment | int:
    left, right = a["self"], a["other"]
    moment = _moment(t, left)
    if moment is not None and not t.is_flow(right):
        return moment.times(t.constant(right), sign)
    if moment is not None:
        if sign < 0:
            raise RuleError("a division by a flow")
        left, right = right, left
    moment = _moment(t, right)
    assert moment is not None
    if not t.is_flow(left):
        value = t.constant(left)
        return (moment.raised(-1.0) if sign < 0 else moment).times(value, 1.0)
    moment = moment.raised(sign)
    if _moment(t, left) is not None or _uncentred(t, t.flow(left)) != _uncentred(t, moment.flow) or moment.power != -1:
        raise RuleError("a flow is multiplied by the size of a flow, not divided by its own")
    entering = t.net.nodes[moment.flow].shape
    assert moment.dims is not None
    count = math.prod(entering[d] for d in moment.dims)
    factors = moment.factors

    def factor(tensors: Tensors) -> Tensor:
        value = torch.tensor(1.0 if moment.is_mean else count**-0.5, dtype=torch.float64)
        for expression, power in factors:
            value = value * expression(tensors).double().abs() ** power
        return value

    size = "other" if right is a["other"] else "self"

    def recorded(found: Mapping[str, Any], tensors: Tensors) -> Tensor:
        """What the model multiplies with, over the factor of the scale behind, which has no sign."""
        whole, own = found[size], factor(tensors).to(found[size])
        whole = whole.reciprocal() if sign < 0 else whole
        return torch.where(own == 0, 0, whole / own)

    index = t.add(Norm((t.flow(left),), entering, dims=moment.dims, recorded=recorded), node)
    return index if moment.is_mean and not factors else scaled(t, node, index, factor)


def _uncentred(t: Tracer, index: int) -> int:
    """The flow, before it was centred: its size is what norms divide by."""
    node = t.net.nodes[index]
    return node.inputs[0] if isinstance(node, Gate) and not node.bends else index
