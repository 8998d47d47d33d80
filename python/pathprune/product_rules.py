"""What matrix products mean for paths: of a flow with weights, with the weights of all experts, with another flow.

A parameter makes a synapse. Of two flows each sees the other held fixed and gets half. A flow times constants that
the model computes has a meaning as the similarities of attention alone, where queries (or keys) are constants.

Bytes: a weight once a sweep; two flows are read once for the product, and once for each that is sent back.
Oracle: enumeration of paths; float64 autograd of the rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .expert_rules import batched_product
from .nodes import Product, Recorder, Scale, Shift, Sum, Synapse, Wire
from .rules import IDENTITIES, Marker, RuleError, by_matrix, factors, rule
from .scan_rules import contracted
from .wire_rules import constant_flow

if TYPE_CHECKING:
    from .tracer import Tracer

BETWEEN = {  # what models do to similarities before their softmax
    *(*IDENTITIES, "add", "sub", "mul", "div", "masked_fill", "where", "view", "reshape", "_unsafe_view"),
    *("tanh", "clamp", "cat", "max", "amax", "getitem"),
    *("gather", "transpose", "permute", "mT"),  # of similarities with positions
}


@dataclass(frozen=True)
class Compared(Marker):
    """The product of a flow with constants: it may become attention weights.

    Attributes:
        product: the path node.
        node: the operator.
        why: it is nothing else.
    """

    product: int
    node: fx.Node
    why: str

    def through(self, t: Tracer, node: fx.Node, a: dict[str, Any]) -> Compared | None:
        if t.operator(node) in BETWEEN:
            return self
        if t.operator(node).endswith("softmax"):
            return None
        raise RuleError(self.why, self.node)

    def as_flow(self, t: Tracer) -> int:
        raise RuleError(self.why, self.node)


@rule("addmm")
def _addmm(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    if a["beta"] != 1 or a["alpha"] != 1:
        raise RuleError("beta and alpha other than 1")
    return _with_matrix(t, node, a["mat1"], a["mat2"], a["self"])


@rule("mm", "matmul", "bmm")
def _matmul(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int | Compared:
    right = "other" if "other" in a else "mat2"
    return _product(t, node, a["self"], a[right], factors("self", right))


def _product(t: Tracer, node: fx.Node, left: Any, right: Any, recorded: Recorder) -> int | Compared:
    if t.is_flow(left) and t.is_flow(right):
        product = Product((t.flow(left), t.flow(right)), t.shape(node), apply=torch.matmul, recorded=recorded)
        return t.add(product, node)
    try:
        if len(t.shape(left if t.is_flow(right) else right)) == 3:
            return batched_product(t, node, left, right)
        return _with_matrix(t, node, left, right, None)
    except RuleError as error:
        if len(t.shape(left)) < 3 or len(t.shape(right)) < 3:
            raise
        both = tuple(t.flow(x) if t.is_flow(x) else constant_flow(t, node, x) for x in (left, right))
        index = t.add(Product(both, t.shape(node), apply=torch.matmul, recorded=recorded), node)
        return Compared(index, node, str(error))


def _with_matrix(t: Tracer, node: fx.Node, left: Any, right: Any, bias: Any) -> int:
    if not t.is_flow(left):
        return _matrix_first(t, node, left, right)
    return by_matrix(t, node, left, right, -1, bias)


def _matrix_first(t: Tracer, node: fx.Node, matrix: Any, value: Any) -> int:
    """``W x``, features along the last axis but one."""
    if len(t.shape(matrix)) != 2 or len(t.shape(value)) < 2:
        raise RuleError("a constant matrix times a flow")
    name, axis, first = t.matrix(matrix, -2)
    entering, leaving = t.shape(value), t.shape(node)
    if first or t.net.tensors[name].shape[axis] != leaving[-2]:
        raise RuleError("some rows of a matrix times a flow")
    shape = torch.Size((*entering[:-2], entering[-1], entering[-2]))
    index = t.add(Wire((t.flow(value),), shape, apply=lambda xs, p: xs[0].mT), node)
    shape = torch.Size((*leaving[:-2], leaving[-1], leaving[-2]))
    index = t.add(Synapse((index,), shape, weight=name, form="linear" if axis == -2 else "linear_t"), node)
    return t.add(Wire((index,), leaving, apply=lambda xs, p: xs[0].mT), node)


@rule("baddbmm")
def _baddbmm(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int | Compared:
    found, shape = _product(t, node, a["batch1"], a["batch2"], factors("batch1", "batch2")), t.shape(node)
    if isinstance(found, Compared):
        return found
    product = found
    if a["alpha"] != 1:
        product = t.add(Scale((product,), shape, factor=t.constant(a["alpha"])), node)
    if a["beta"] == 0:
        return product
    beta = t.constant(a["beta"])
    if t.is_flow(a["self"]):
        added = t.add(Scale((t.flow(a["self"]),), t.shape(a["self"]), factor=beta), node)
        return t.add(Sum((product, added), shape), node)
    value = t.constant(a["self"])
    return t.add(Shift((product,), shape, value=lambda tensors: value(tensors) * beta(tensors)), node)


@rule("einsum")
def _einsum(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    equation, operands = a["equation"], a["tensors"]
    if len(operands) == 2 and any(t.is_flow(x) for x in operands) and any(t.is_varying(x) for x in operands):
        return contracted(t, node, equation, operands)
    if len(operands) != 2 or not all(t.is_flow(x) for x in operands):
        raise RuleError("other than a product of two flows")
    flows = (t.flow(operands[0]), t.flow(operands[1]))
    product = Product(
        flows,
        t.shape(node),
        apply=lambda x, y: torch.einsum(equation, x, y),
        recorded=lambda found, tensors: tuple(found["tensors"]),
    )
    return t.add(product, node)
