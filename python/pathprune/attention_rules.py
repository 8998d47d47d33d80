"""What attention and mixtures of experts mean for paths.

Attention is ``y = P v`` with ``P = softmax(q k' + added)``: two products of flows with a softmax between them, read
alike from the fused operator and from a model that writes them out. Data-free, a model attends as it does where q k'
is zero: uniformly, but for masks and position biases. The path flow of y is shared among v, q and k by the policy
(``Policy.attention``), so that it is conserved and all three are scored.

Where data chooses experts, paths take every choice, with equal weight: all experts are scored and routers are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .nodes import Expression, Gate, Product, Softmax, Synapse, Tensors, Wire
from .rules import IDENTITIES, RuleError, constant_flow, factors, rule

if TYPE_CHECKING:
    from .tracer import Tracer


# --------------------------------------------------------------------------------------------------- attention


@rule("scaled_dot_product_attention")
def _attention(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    query, key, value = (t.flow(x) if t.is_flow(x) else constant_flow(t, node, x) for x in _arguments(a))
    shapes = [t.net.nodes[index].shape for index in (query, key, value)]
    if a.get("enable_gqa"):
        key, value = (_repeated(t, node, index, shapes[0][-3]) for index in (key, value))
    similar = torch.Size((*torch.broadcast_shapes(shapes[0][:-2], t.net.nodes[key].shape[:-2]), shapes[0][-2]))
    similar = torch.Size((*similar, shapes[1][-2]))
    product = t.add(Product((query, key), similar, apply=lambda q, k: q @ k.mT), node)
    added = _added(t, a["attn_mask"], a["is_causal"], similar)
    weights = t.add(Softmax((product,), similar, weights=_attended(added, -1), dim=-1), node)
    return t.add(Product((weights, value), t.shape(node), apply=torch.matmul, recorded=_attending), node)


def _attending(a: Mapping[str, Any], tensors: Tensors) -> tuple[Tensor, Tensor]:
    """The attention weights that the fused operator keeps to itself, and the values."""
    query, key, value, mask = (a[name] for name in ("query", "key", "value", "attn_mask"))
    accumulated = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = query.to(accumulated), key.to(accumulated)
    if a.get("enable_gqa"):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = query.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    similar = (query @ key.mT) * scale
    if mask is not None:
        similar = similar.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else similar + mask
        barred = (similar == -torch.inf).all(-1, keepdim=True)  # rows that may attend to nothing
        return similar.masked_fill(barred, 0).softmax(-1).masked_fill(barred, 0), value
    if a["is_causal"]:
        ahead = torch.ones(similar.shape[-2:], dtype=torch.bool, device=similar.device).triu(1)
        similar = similar.masked_fill(ahead, -torch.inf)
    return similar.softmax(-1), value


def _arguments(a: dict[str, Any]) -> tuple[Any, Any, Any]:
    return a["query"], a["key"], a["value"]


def _repeated(t: Tracer, node: fx.Node, index: int, heads: int) -> int:
    """Heads of keys and values, each used by several heads of queries."""
    shape = t.net.nodes[index].shape
    times = heads // shape[-3]
    if times == 1:
        return index
    wide = torch.Size((*shape[:-3], heads, *shape[-2:]))
    return t.add(Wire((index,), wide, apply=lambda xs, p: xs[0].repeat_interleave(times, -3)), node)


def _added(t: Tracer, mask: Any, is_causal: bool, shape: torch.Size) -> Expression:
    """What is added to the similarities: zeros, the mask, minus infinity ahead of the diagonal."""
    given = None if mask is None else t.constant(mask)

    def expression(tensors: Tensors) -> Tensor:
        if given is None:
            added = torch.zeros(shape, dtype=torch.float64)
        else:
            added = given(tensors)
            added = _barred(~added) if added.dtype == torch.bool else added.double()
        if is_causal:
            ahead = torch.ones(shape[-2:], dtype=torch.bool, device=added.device).triu(1)
            added = added + _barred(ahead)
        return added

    return expression


def _barred(where: Tensor) -> Tensor:
    return torch.zeros(where.shape, dtype=torch.float64, device=where.device).masked_fill(where, -torch.inf)


_BETWEEN = {*IDENTITIES, "add", "sub", "mul", "div", "masked_fill", "where", "view", "reshape", "_unsafe_view"}


@rule("softmax", "_softmax", "_safe_softmax")
def _softmax(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    """Attention weights, where it normalises a product of two flows; elsewhere an activation."""
    passed: set[fx.Node] = set()
    source: Any = node.args[0]
    while not _is_contraction(t, source):
        flows = [x for x in source.all_input_nodes if t.is_flow(x)] if isinstance(source, fx.Node) else []
        if len(flows) != 1 or source.op != "call_function" or t.operator(source) not in _BETWEEN:
            return t.gate(Gate((t.flow(a["self"]),), t.shape(node), name="softmax"), node)
        passed.add(source)
        source = flows[0]
    product, shape = t.flow(source), t.shape(node)
    added = t.constant(node.args[0], zero=source, through=passed)
    if t.shape(source) != shape:  # the batch laid out anew
        product = t.add(Wire((product,), shape, apply=lambda xs, p: xs[0].reshape(shape), reshapes=True), node)
    return t.add(Softmax((product,), shape, weights=_attended(added, a["dim"]), dim=a["dim"]), node)


def _attended(added: Expression, dim: int) -> Expression:
    """The softmax of what is added; nothing below what float32 can tell from zero, nor in a row that may not attend."""

    def expression(tensors: Tensors) -> Tensor:
        weights = added(tensors).double().softmax(dim).nan_to_num(0.0)
        return torch.where(weights > 2.0**-126, weights, 0.0)

    return expression


def _is_contraction(t: Tracer, value: Any) -> bool:
    node = t.net.nodes[t.flow(value)] if t.is_flow(value) else None
    return isinstance(node, Product) and node.apply is not torch.mul and t.shape(value) == node.shape


@rule("einsum")
def _einsum(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    equation, operands = a["equation"], a["tensors"]
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


@rule("masked_fill")
def _masked_fill(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    return _chosen(t, node, a["self"], t.constant(a["mask"]), a["value"], kept=False)


@rule("where")
def _where(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    if t.is_flow(a["condition"]) or t.is_flow(a["self"]) == t.is_flow(a["other"]):
        raise RuleError("a choice that depends on data, or between two flows")
    kept = t.is_flow(a["self"])
    flow, value = (a["self"], a["other"]) if kept else (a["other"], a["self"])
    return _chosen(t, node, flow, t.constant(a["condition"]), value, kept)


def _chosen(t: Tracer, node: fx.Node, flow: Any, condition: Expression, value: Any, kept: bool) -> int:
    """The flow where the condition is ``kept``; no flow where it is filled: with zero, or before a softmax."""
    fill = t.constant(value)(t.net.tensors)
    if not bool(((fill == 0) | (fill < -1e3)).all()):
        raise RuleError("fills with other than zero or minus infinity")
    tensors = t.net.tensors

    def apply(xs: Any, power: float) -> Tensor:
        return xs[0] * (condition(tensors) == kept)

    return t.add(Wire((t.flow(flow),), t.shape(node), apply=apply), node)


# ----------------------------------------------------------------------------------------------------- experts


@rule("topk")
def _topk(t: Tracer, node: fx.Node, a: dict[str, Any]) -> list[Tensor]:
    """Every choice, with equal weight: the export asks for as many as there are."""
    values, indices = node.meta["val"]
    dim, k = a["dim"], a["k"]
    if k != t.shape(a["self"])[dim]:
        raise RuleError(f"a choice of {k} that depends on data")
    each = [1] * values.dim()
    each[dim] = k
    order = torch.arange(k).reshape(each).expand(indices.shape)
    return [torch.full(values.shape, 1 / k, dtype=values.dtype), order.contiguous()]


@rule("bmm")
def _bmm(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    left, right = a["self"], a["mat2"]
    if t.is_flow(left) and t.is_flow(right):
        flows, own = (t.flow(left), t.flow(right)), factors("self", "mat2")
        return t.add(Product(flows, t.shape(node), apply=torch.matmul, recorded=own), node)
    flow, weight = (right, left) if t.is_flow(right) else (left, right)
    parameter, chosen = _experts(t, weight)
    axis = 1 if flow is right else 2  # of the flow's features
    shape, leaving, name = t.shape(flow), t.shape(node), t.weight(parameter)
    count = t.net.tensors[name].shape[0]
    if shape[3 - axis] != 1 or not bool((chosen.bincount(minlength=count) == len(chosen) // count).all()):
        raise RuleError("experts that are not all given the same")
    order = chosen.argsort(stable=True)  # row n of expert e, in the order of the rows
    back = order.argsort()
    each = torch.Size((1, count, len(chosen) // count))
    entering = Wire(
        (t.flow(flow),),
        torch.Size((*each, shape[axis])),
        apply=lambda xs, p: xs[0].squeeze(3 - axis)[order.to(xs[0].device)].unflatten(0, each),
    )
    index = t.add(entering, node)
    form = "experts" if flow is right else "experts_t"
    synapse = Synapse((index,), torch.Size((*each, leaving[axis])), weight=name, form=form, groups=count)
    index = t.add(synapse, node)
    rows = Wire((index,), leaving, apply=lambda xs, p: xs[0].flatten(0, 2)[back.to(xs[0].device)].unsqueeze(3 - axis))
    return t.add(rows, node)


def _experts(t: Tracer, value: Any) -> tuple[Any, Tensor]:
    """The parameter that holds all experts' weights, and the expert that each row takes."""
    if isinstance(value, fx.Node) and value.op == "call_function":
        if t.operator(value) == "index_select" and value.args[1] == 0:
            return value.args[0], t.constant(value.args[2])(t.net.tensors)
        indices: Any = value.args[1] if t.operator(value) == "index" else ()
        if len(indices) == 1 and not t.is_flow(indices[0]):
            return value.args[0], t.constant(indices[0])(t.net.tensors)
    raise RuleError("a batch of matrix products with weights that are not chosen from a parameter")
