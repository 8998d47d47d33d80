"""What complex numbers mean for paths: rotary embeddings that turn pairs of features by a product.

Two real features are read as one complex number, multiplied by ``c + i s`` and read as two real ones again. That is
the real form's linear map of the pair, ``(c x - s y, c y + s x)``, so its flow is the same, by ``|c|^p`` and ``|s|^p``.

Bytes: the pairs are read and written twice, for each of the two terms.
Oracle: the real form, written out; the model itself, of which signed flow is the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from .nodes import Scale, Sum, Tensors, Wire
from .rules import IDENTITIES, Marker, RuleError, rule

if TYPE_CHECKING:
    from .tracer import Tracer


@dataclass(frozen=True)
class Complex(Marker):
    """A complex number: it may be turned, and read as a pair of real ones.

    Attributes:
        pairs: the flow of real and imaginary parts, [*shape, 2].
    """

    pairs: int
    wanted: ClassVar[str] = "complex numbers, other than a product with constant ones read as pairs again"

    def through(self, t: Tracer, node: fx.Node, a: dict[str, Any]) -> Complex | int:
        name = t.operator(node)
        if name == "view_as_real":
            return self.pairs
        if name in IDENTITIES and node.meta["val"].is_complex():
            return self
        if name in ("mul", "multiply"):
            left, right = a["self"], a["other"]
            other = right if t.marker(left) is self else left
            if not t.is_flow(other):
                return Complex(_turned(t, node, self.pairs, other))
        raise RuleError(self.wanted)


def _turned(t: Tracer, node: fx.Node, pairs: int, by: Any) -> int:
    """Pairs times the complex constant ``by``."""
    constant, shape = t.constant(by), torch.Size((*t.shape(node), 2))

    def straight(tensors: Tensors) -> Tensor:
        return constant(tensors).real.unsqueeze(-1)

    def across(tensors: Tensors) -> Tensor:
        value = constant(tensors)
        sine = value.imag if value.is_complex() else torch.zeros_like(value)
        return torch.stack([-sine, sine], -1)

    swapped = t.add(Wire((pairs,), t.net.nodes[pairs].shape, apply=lambda xs, p: xs[0].flip(-1)), node)
    parts = ((pairs, straight), (swapped, across))
    return t.add(Sum(tuple(t.add(Scale((x,), shape, factor=f), node) for x, f in parts), shape), node)


@rule("view_as_complex")
def _view_as_complex(t: Tracer, node: fx.Node, a: dict[str, Any]) -> Complex:
    return Complex(t.flow(a["self"]))


@rule("view_as_real")
def _view_as_real(t: Tracer, node: fx.Node, a: dict[str, Any]) -> int:
    raise RuleError("complex numbers that were not pairs of real ones before")
