"""What mixtures of experts mean for paths: routers, which choose, and the experts' weights, which are one parameter.

Data-free, a model routes as it does where the router's product with its weights is zero, as it attends where q k' is:
every choice is taken (the export asks ``topk`` for all there are) with the weight that the model gives equals. So all
experts are scored, and the router, of which no weight is a factor of a path, is not. What a model makes of the choice
(groups of experts, masks, sums to divide by, a factor on all) is then a constant, computed by its own operators.

A batch of products with a parameter [experts, in, out] or [experts, out, in] is a synapse with an axis of experts: the
rows that each is given as one, whether the model selects a matrix for every row or gives each matrix its rows.

Bytes: the parameter once a sweep, as any weight's; rows are gathered and put back.
Oracle: the experts written as one linear layer each, with the same constants; float64 autograd of the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from .graph_values import ByRows, Routed, arguments_of
from .nodes import Scale, Synapse, Wire
from .rules import IDENTITIES, Marker, RuleError, rule

if TYPE_CHECKING:
    from .tracer import Tracer


# ----------------------------------------------------------------------------------------------------- choices


@rule("topk")
def _topk(t: Tracer, node: fx.Node, a: dict[str, Any]) -> None:
    """A constant: all there are, of equals."""
    if a["k"] != t.shape(a["self"])[a["dim"]]:
        raise RuleError(f"a choice of {a['k']} that depends on data")
    t.detach(node)


_SPREAD = ("scatter", "scatter_add", "index_put", "masked_scatter", "slice_scatter", "select_scatter", "one_hot")


def note_routed(t: Tracer, node: fx.Node, made: Iterable[int]) -> None:
    """What a router makes that a flow meets: factors of rows, which data decide; no other can be followed."""
    for value in node.all_input_nodes:
        kind = value.meta["val"].dtype if isinstance(value.meta.get("val"), Tensor) else torch.int64
        if not (kind.is_floating_point or kind == torch.bool) or not t.is_varying(value):
            continue
        if any(isinstance(t.net.nodes[k], Scale) and t.net.nodes[k].recorded is not None for k in made):  # type: ignore[attr-defined]
            if t.is_routed(value):
                t.net.routed[value.name] = _routed(t, value)
        elif not t.is_routed(value):
            raise RuleError("an exponential of a flow, other than to multiply another flow with")
        else:
            t.net.mixed.update(made)


def _routed(t: Tracer, value: fx.Node) -> Routed:
    """Of which experts a value's elements are: those that a ``topk`` or ``gather`` behind it chose."""
    asked, seen = [value], set()
    while asked:
        n = asked.pop()
        if n in seen or n.op != "call_function" or t.operator(n) in _SPREAD or not t.is_routed(n):
            continue
        seen.add(n)
        chosen: Any = None
        if t.operator(n) == "topk":
            chosen = next((user for user in n.users if user.args[1] == 1), None)
        elif t.operator(n) == "gather":
            chosen = n.args[2]
        if chosen is not None:
            dim = arguments_of(n)["dim"]
            return Routed(chosen.name, t.constant(chosen), dim)
        asked += reversed(n.all_input_nodes)
    return Routed()


_LAID_OUT = {*IDENTITIES, "view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze"}


@dataclass(frozen=True)
class Largest(Marker):
    """The largest of a flow: no path, but what may be taken off it before a softmax, or lead to a topk."""

    flow: int
    wanted: ClassVar[str] = "the largest of a flow, other than to take it off that flow"

    def through(self, t: Tracer, node: fx.Node, a: dict[str, Any]) -> Largest | Lowered | None:
        name = t.operator(node)
        if name == "topk":
            return None
        if name in _LAID_OUT:
            return self
        is_other = name == "sub" and t.marker(a["other"]) is self
        if is_other and t.is_flow(a["self"]) and t.flow(a["self"]) == self.flow and a["alpha"] == 1:
            return Lowered(self.flow)
        raise RuleError(self.wanted)


@dataclass(frozen=True)
class Lowered(Marker):
    """A flow less its largest value: its softmax is that of the flow."""

    flow: int
    wanted: ClassVar[str] = "a flow less its largest value, other than before a softmax"

    def through(self, t: Tracer, node: fx.Node, a: dict[str, Any]) -> Lowered | None:
        if t.operator(node).endswith("softmax"):
            return None
        if t.operator(node) in IDENTITIES:
            return self
        raise RuleError(self.wanted)


@rule("max", "amax")
def _max(t: Tracer, node: fx.Node, a: dict[str, Any]) -> Any:
    if "other" in a:
        raise RuleError("the larger of two values")
    largest = Largest(t.flow(a["self"]))
    if isinstance(node.meta["val"], Tensor):
        return largest
    if any(user.args[1] == 1 and user.users for user in node.users):
        raise RuleError("a choice of one by data, of which paths cannot take every one, as they do of topk")
    return largest, None


# ----------------------------------------------------------------------------------------------------- experts


def batched_product(t: Tracer, node: fx.Node, left: Any, right: Any) -> int:
    """A product of a flow and a parameter with an axis of experts."""
    flow, weight = (right, left) if t.is_flow(right) else (left, right)
    parameter, chosen = _experts(t, weight)
    is_first = flow is right  # W x, with features along the last axis but one
    name, axis, _ = t.matrix(parameter, -2 if is_first else -1)
    experts = t.net.tensors[name].shape[0]
    entering, leaving = t.shape(flow), t.shape(node)
    if is_first:
        entering, leaving = _exchanged(entering), _exchanged(leaving)
    if chosen is None:
        given, back = _to_each(entering, leaving, experts)
    else:
        given, back = _chosen_rows(entering, chosen, experts)
    rows = math.prod(leaving[:-1]) // experts
    shape = torch.Size((1, experts, rows, entering[-1]))
    index = t.add(Wire((t.flow(flow),), shape, apply=lambda xs, p: given(xs[0].mT if is_first else xs[0])), node)
    if t.net.tensors[name].shape[axis] != leaving[-1]:
        raise RuleError("parts of the experts' weights")
    form = "experts" if axis == -2 else "experts_t"
    shape = torch.Size((1, experts, rows, leaving[-1]))
    index = t.add(Synapse((index,), shape, weight=name, form=form, groups=experts), node)

    def leave(x: Tensor) -> Tensor:
        y = back(x)
        return y.mT if is_first else y

    def product(x: Tensor, weights: Tensor) -> Tensor:
        rows, matrices = given(x.mT if is_first else x), weights.to(x.dtype)
        return leave(rows @ (matrices.mT if form == "experts" else matrices))

    if chosen is not None and t.operator(node) != "baddbmm":
        t.net.by_rows[node.name] = ByRows(flow.name, name, product)
    return t.add(Wire((index,), t.shape(node), apply=lambda xs, p: leave(xs[0])), node)


def _exchanged(shape: torch.Size) -> torch.Size:
    return torch.Size((*shape[:-2], shape[-1], shape[-2]))


Rows = Callable[[Tensor], Tensor]


def _to_each(entering: torch.Size, leaving: torch.Size, experts: int) -> tuple[Rows, Rows]:
    """``(flow [..., experts or 1, rows, in] -> [1, experts, rows, in], [1, experts, rows, out] -> leaving)``."""
    lead, rows = leaving[:-3], leaving[-2]

    def given(x: Tensor) -> Tensor:
        wide = x.expand(*lead, experts, rows, entering[-1])
        return wide.movedim(-3, 0).reshape(1, experts, -1, entering[-1])

    def back(y: Tensor) -> Tensor:
        return y[0].reshape(experts, *lead, rows, leaving[-1]).movedim(0, -3)

    return given, back


def _chosen_rows(entering: torch.Size, chosen: Tensor, experts: int) -> tuple[Rows, Rows]:
    """The same for a flow [rows, 1, in] of which row n goes to expert ``chosen[n]``."""
    if entering[1] != 1 or not bool((chosen.bincount(minlength=experts) == len(chosen) // experts).all()):
        raise RuleError("experts that are not all given the same")
    order = chosen.argsort(stable=True)  # row n of expert e, in the order of the rows
    place = order.argsort()

    def given(x: Tensor) -> Tensor:
        return x.squeeze(1)[order.to(x.device)].unflatten(0, (1, experts, -1))

    def back(y: Tensor) -> Tensor:
        return y.flatten(0, 2)[place.to(y.device)].unsqueeze(1)

    return given, back


def _experts(t: Tracer, value: Any) -> tuple[Any, Tensor | None]:
    """The parameter that holds all experts' weights, and the expert that each row takes; None for all in order."""
    if isinstance(value, fx.Node) and value.op == "call_function":
        if t.operator(value) == "index_select" and value.args[1] == 0:
            return value.args[0], t.constant(value.args[2])(t.net.tensors)
        indices: Any = value.args[1] if t.operator(value) == "index" else ()
        if len(indices) == 1 and not t.is_flow(indices[0]):
            return value.args[0], t.constant(indices[0])(t.net.tensors)
    return value, None
