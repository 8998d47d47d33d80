"""What attention means for paths.

Attention is ``y = P v`` with ``P = softmax(q k' + added)``: two products of flows with a softmax between them, read
alike from the fused operator and from a model that writes them out. Data-free, a model attends as it does where q k'
is zero: uniformly, but for masks and position biases. The path flow of y is shared among v, q and k by the policy
(``Policy.attention``), so that it is conserved and all three are scored.

What a model does to similarities before their softmax has no path of its own: scale, mask, position bias, soft cap
``c tanh(x / c)``, the largest taken off, similarities with positions that are added to those of tokens (they are zero
where q and k are, and positions begin no path). A sink, a constant among the similarities that no value belongs to,
takes its part of the attention, and no flow passes it.

Bytes: attention weights once, as the model's own. Oracle: enumeration of a small block's paths; float64 autograd.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .expert_rules import Lowered
from .nodes import Expression, Gate, Product, Scale, Shift, Softmax, Tensors, Wire
from .product_rules import BETWEEN, Compared
from .rules import PRODUCTS, RuleError, rule
from .wire_rules import constant_flow

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


@rule("softmax", "_softmax", "_safe_softmax")
def _softmax(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    """Attention weights, where it normalises a product of two flows; elsewhere an activation."""
    shape, dim = t.shape(node), a["dim"] % len(t.shape(node))
    found = _similarities(t, node.args[0])
    if found is None:
        lowered = t.marker(node.args[0])
        flow = lowered.flow if isinstance(lowered, Lowered) else t.flow(node.args[0])
        return t.gate(Gate((flow,), shape, name="softmax"), node)
    source, product, others, passed = found
    at_zero = [source, *others]
    if t.operator(source) == "baddbmm":  # what is added lies in the same operator
        at_zero = list(source.all_input_nodes[1:])
        passed.add(source)
    added = t.constant(node.args[0], zero=at_zero, through=passed)
    if t.shape(source).numel() == shape.numel():
        if t.shape(source) != shape:  # the batch laid out anew
            product = t.add(Wire((product,), shape, apply=lambda xs, p: xs[0].reshape(shape), reshapes=True), node)
    else:
        product = _beside_sinks(t, node, product, passed, dim)
    return t.add(Softmax((product,), shape, weights=_attended(added, dim), dim=dim), node)


def _similarities(t: Tracer, value: Any) -> tuple[fx.Node, int, list[fx.Node], set[fx.Node]] | None:
    """``(the product of flows that a softmax normalises, its path node, those with constants, the values between)``.

    None where there is no product, or not one of them alone is of two flows.
    """
    passed: set[fx.Node] = set()
    found: dict[fx.Node, int] = {}
    asked = [value]
    while asked:
        n = asked.pop()
        if n in passed or n in found:
            continue
        product = _contraction(t, n)
        if product is not None:
            found[n] = product
            continue
        flows = [x for x in n.all_input_nodes if t.is_flow(x)] if isinstance(n, fx.Node) else []
        if not flows or n.op != "call_function" or t.operator(n) not in BETWEEN:
            return None
        passed.add(n)
        asked += flows
    own = [n for n in found if t.marker(n) is None] if len(found) > 1 else list(found)
    if len(own) != 1:
        return None
    return own[0], found[own[0]], [n for n in found if n is not own[0]], passed


def _contraction(t: Tracer, value: Any) -> int | None:
    """The matrix product that a value is, but for what the same operator adds; of flows, or constant queries."""
    marker = t.marker(value)
    if isinstance(marker, Compared):
        return marker.product if t.operator(value) in PRODUCTS else None
    if not t.is_flow(value) or marker is not None or not isinstance(value.meta["val"], Tensor):
        return None
    index = t.flow(value)
    while t.operator(value) == "baddbmm" and isinstance(t.net.nodes[index], (Shift, Scale)):
        index = t.net.nodes[index].inputs[0]
    node = t.net.nodes[index]
    is_product = isinstance(node, Product) and node.apply is not torch.mul and t.shape(value) == node.shape
    return index if is_product else None


def _beside_sinks(t: Tracer, node: fx.Node, product: int, passed: set[fx.Node], dim: int) -> int:
    """Similarities among which constants stand that have no flow."""
    joins = [n for n in passed if t.operator(n) == "cat"]
    shape, own = t.shape(node), t.net.nodes[product].shape
    if len(joins) != 1 or len(shape) != len(own):
        raise RuleError("a softmax over similarities that are laid out anew")
    parts: Any = joins[0].args[0]
    (place,) = (k for k, part in enumerate(parts) if t.is_flow(part))
    ahead = sum(t.shape(part)[dim] for part in parts[:place])
    widths = [0] * (2 * (len(shape) - dim))
    widths[-2:] = ahead, shape[dim] - ahead - own[dim]
    return t.add(Wire((product,), shape, apply=lambda xs, p: torch.nn.functional.pad(xs[0], widths)), node)


def _attended(added: Expression, dim: int) -> Expression:
    """The softmax of what is added; nothing below what float32 can tell from zero, nor in a row that may not attend."""

    def expression(tensors: Tensors) -> Tensor:
        weights = added(tensors).double().softmax(dim).nan_to_num(0.0)
        return torch.where(weights > 2.0**-126, weights, 0.0)

    return expression


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
