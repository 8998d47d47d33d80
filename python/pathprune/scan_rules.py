"""What state-space scans mean for paths: states that decay by what data say, as in Mamba.

``h_t = a_t h_(t-1) + d_t b_t u_t`` and ``y_t = c_t h_t``, with ``a_t = exp(A d_t)``, ``d_t = softplus(.)``, and d, b, c
linear in what enters. Given a, y is a sum of products of flows, so paths run from u (and from b, c and d) to every
later y:

* the decay a is no flow but what one is multiplied with. Data-free it is what the model has where the products with
  weights that it is computed from are zero, ``exp(A softplus(bias))``, as attention weights and routers are taken
  there; its p-th power counts, as any constant's. With data it is a gate, ``a_t`` of the sample;
* c h, b u and d b are products of two flows: each sees the other held fixed and gets half, in the order in which the
  model multiplies. So every projection is scored, and the flow is conserved. With data d, a softplus, is a gate itself.

So is any exponential of a flow that multiplies another one. Used otherwise (added, say) it is no gate, and refused.

A scan that the export writes out step by step has some six operators a token: read a language model on few tokens.

Bytes: the decays once, [tokens, channels, states]. Oracle: enumeration of the paths of a small scan; float64 autograd
with the decays held fixed; the model's output, which signed flow through the gates gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .nodes import Reduce, Scale, Tensors, Wire
from .rules import PRODUCTS, RuleError, rule

if TYPE_CHECKING:
    from .tracer import Tracer


@rule("exp")
def _exp(t: Tracer, node: fx.Node, a: dict[str, Any]) -> None:
    """A decay: a constant from here on, which stands for what data decide."""
    zero: set[fx.Node] = set()  # products, or what enters those that have a bias
    between, asked = {node}, [x for x in node.all_input_nodes if t.is_flow(x)]
    while asked:
        n = asked.pop()
        if n in between or n in zero:
            continue
        before = [x for x in n.all_input_nodes if t.is_flow(x)]
        if not before:
            raise RuleError("an exponential of the model's input itself")
        is_product = t.operator(n) in PRODUCTS
        if is_product and (t.operator(n) != "linear" or len(n.args) < 3):
            zero.add(n)
            continue
        between.add(n)
        if is_product:
            zero.update(before)
        else:
            asked += before
    t.hold(node, t.constant(node, zero=zero, through=between))


def contracted(t: Tracer, node: fx.Node, equation: str, operands: Sequence[Any]) -> int:
    """``einsum`` of a flow and what it decays by: their product along all their axes, and sums."""
    place = 0 if t.is_flow(operands[1]) else 1  # of the decay
    flow, decay = operands[1 - place], operands[place]
    entering, leaving = equation.replace(" ", "").split("->")
    own, other = entering.split(",")[1 - place], entering.split(",")[place]
    axes = [*leaving, *(axis for axis in dict.fromkeys(own + other) if axis not in leaving)]
    if "." in equation or any(len(set(names)) < len(names) for names in (own, other, leaving)):
        raise RuleError("an einsum with an ellipsis, or an axis twice in one term")
    sizes = dict(zip(own, t.shape(flow), strict=True)) | dict(zip(other, t.shape(decay), strict=True))

    def laid(x: Tensor, names: str) -> Tensor:
        """Its axes in the order of ``axes``, of size 1 where it has none."""
        x = x.permute([names.index(axis) for axis in axes if axis in names])
        return x.reshape([sizes[axis] if axis in names else 1 for axis in axes])

    shape = torch.Size(sizes[axis] if axis in own else 1 for axis in axes)
    value = t.constant(decay)

    def recorded(found: Mapping[str, Any], tensors: Tensors) -> Tensor:
        return laid(found["tensors"][place], other)

    index = t.add(Wire((t.flow(flow),), shape, apply=lambda xs, p: laid(xs[0], own)), node)
    every = torch.Size(sizes[axis] for axis in axes)
    factor = Scale((index,), every, factor=lambda tensors: laid(value(tensors), other), recorded=recorded)
    index = t.add(factor, node)
    dims = tuple(range(len(leaving), len(axes)))
    return t.add(Reduce((index,), t.shape(node), kind="sum", dims=dims, keepdim=False), node) if dims else index
