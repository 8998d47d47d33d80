"""Data in path arithmetic: the flow that passes recorded gates.

Flow of the signed weights is the model: forward its output, backward the derivative with all gates held as they are.
Flow of ones on squared inputs, gates squared, is the data factor of the NTK, ``g_k(x^2; a(x))``.

Bytes: a batch's activations once forward, and once backward; weights once a batch each way. Oracle: the model's output,
which the signed gated flow gives again; enumeration of paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .flow import PathFlow
from .network import PathNetwork
from .nodes import Expression, Gate, Node, Norm, Pool, Product, Scale, Sum, Synapse, geometry_of, parts_of
from .ops import WeightMap
from .policy import Policy
from .pruned_convolution import counting_convolution, pruned_convolution
from .recording import Recording, opened
from .scaled import largest_magnitude
from .select import Bracket
from .weights import Scaled, Weight

_SAFE = (-30, 90)  # powers of two that the largest of a flow may be away from 1: another layer's growth fits in


class GatedFlow(PathFlow):
    """Path flow through recorded gates: the samples of a batch are its sources.

    With weights mapped by ``ONE`` and squared inputs it is the data factor of the NTK, ``g_k(x^2; a(x))``: gates count
    squared. Fixed constants (pooling, frozen norms) belong to the value of a path, so they are 1 here. Activations and
    norms that are not in the recording are open, and 1.

    Args:
        network: with all its positions; read from a module.
        f: weight map; ``IDENTITY`` is the flow of the signed network: its output is the model's.
        policy: with ``norm="recorded"``, or signed weights, norms are gates; else as in any path flow.
        any_sign: the source, or gates, may be negative.

    Raises:
        ValueError: a product that is not in the recording, or signed weights and a norm that is not; attention weights
            that do more than to multiply values.
    """

    records = True

    def __init__(
        self,
        network: PathNetwork,
        weights: Mapping[str, Weight],
        recording: Recording,
        policy: Policy,
        *,
        source: Sequence[Tensor],
        f: WeightMap = WeightMap.ONE,
        scored: bool = False,
        any_sign: bool = False,
    ) -> None:
        self.recording, self.signed = recording, f is WeightMap.IDENTITY
        self.any_sign = self.signed or any_sign
        through = opened(network, "GatedFlow")
        super().__init__(through, weights, f=f, policy=policy, source=[x.flatten(0, 1) for x in source], scored=scored)
        self.batched = True
        for k in self._order:
            node = through.nodes[k]
            is_asked = isinstance(node, Product) or (self.signed and _is_recorded(node))
            if is_asked and k not in recording.gates:
                where = through.nodes[k].where
                raise ValueError(f"GatedFlow: wanted a network that is linear between gates, got {where}")

    # --------------------------------------------------------------------------------------------------- signs

    def _peak(self, rows: Tensor) -> Tensor:  # type: ignore[override]
        return largest_magnitude(rows) if self.any_sign else super()._peak(rows)

    def _powered(self, node: Node, expression: Expression, keeps_zeros: bool = False) -> Tensor:
        if not self.signed:
            return super()._powered(node, expression, keeps_zeros)
        with torch.no_grad():
            return expression(self.network.tensors).detach().to(self.device, self.dtype)

    def _checked_source(self, tensor: Tensor) -> None:
        if not self.any_sign:
            super()._checked_source(tensor)

    def _log2_total(self) -> Tensor:
        return torch.full((self.members,), torch.nan, dtype=torch.float64) if self.any_sign else super()._log2_total()

    # --------------------------------------------------------------------------------------------------- gates

    def _factor(self, gate: Tensor) -> Tensor:
        """What a gate multiplies flow with, over members and samples."""
        gate = gate[None].to(self.dtype)
        return gate if self.signed or self.recording.is_paired else gate.square()

    def _passed(self, k: int, node: Node, flow: Scaled, in_place: bool = False) -> Scaled:
        """What a gate lets through of a flow [1, N, *shape]."""
        assert isinstance(node, Gate)
        if not node.bends:
            return self._centred(node, flow) if self.signed else flow
        gate = self.recording.gates.get(k)
        if gate is None:
            return flow
        if node.name == "relu":
            gate = gate[None].to(flow.tensor.dtype)
            out = flow.tensor if in_place else torch.empty_like(flow.tensor)
            torch.ops.aten.threshold_backward.grad_input(flow.tensor, gate, 0, grad_input=out)
            return Scaled(out, flow.exponent)
        return Scaled(flow.tensor * self._factor(gate), flow.exponent)

    @staticmethod
    def _centred(node: Gate, flow: Scaled) -> Scaled:
        """Less its mean: a projection, so that backward flow passes as forward flow does."""
        parts, dims = parts_of(flow.tensor, node, 2)
        return Scaled((parts - parts.mean(dims, keepdim=True)).reshape(flow.tensor.shape), flow.exponent)

    def _forward_gate(self, k: int, node: Gate, entering: list[Scaled]) -> Scaled:
        return self._passed(k, node, entering[0], self._is_last_of(node.inputs[0]))

    def _is_last_of(self, maker: int) -> bool:
        """Whether no one else reads what a node made: it may be written over, as a batch is large."""
        made = self.network.nodes[maker]
        is_new = isinstance(made, Synapse) or (isinstance(made, Sum) and len(made.inputs) > 1)
        if not is_new or self.scored or self.keep_flows or maker in self.network.outputs:
            return False
        return sum(node.inputs.count(maker) for node in self.network.nodes) == 1

    def _backward_gate(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        return [self._passed(k, node, g)]

    def _divided(self, k: int, flow: Scaled) -> Scaled:
        gate = self.recording.gates.get(k)
        return flow if gate is None else self._normalised(flow.tensor * self._factor(gate), flow.exponent)

    def _forward_norm(self, k: int, node: Norm, entering: list[Scaled]) -> Scaled:
        is_gate = self.signed or self.policy.norm == "recorded"
        return self._divided(k, entering[0]) if is_gate else super()._forward_norm(k, node, entering)

    def _backward_norm(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        is_gate = self.signed or self.policy.norm == "recorded"
        return [self._divided(k, g)] if is_gate else super()._backward_norm(k, node, g, guess)

    def _forward_scale(self, k: int, node: Scale, entering: list[Scaled]) -> Scaled:
        if k not in self.recording.gates:
            return super()._forward_scale(k, node, entering)
        return Scaled(entering[0].tensor * self._weighted(k, node), entering[0].exponent)

    def _backward_scale(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        if k not in self.recording.gates:
            return super()._backward_scale(k, node, g, guess)
        return [self._to_input(k, Scaled(g.tensor * self._weighted(k, node), g.exponent))]

    def _weighted(self, k: int, node: Node) -> Tensor:
        """What data multiply a flow with, its axes laid against the node's."""
        gate = self._factor(self.recording.gates[k])
        return gate.reshape(*gate.shape[:2], *[1] * (len(node.shape) + 2 - gate.dim()), *gate.shape[2:])

    def _forward_product(self, k: int, node: Product, entering: list[Scaled]) -> Scaled:
        """Each factor that paths pass, by what the recording multiplies it with."""
        tensors, exponent = self._aligned(entering)
        partners = self.recording.gates[k]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(self.scored) for x in tensors]
            parts = []
            for leaf, (slot, partner) in zip(leaves, sorted(partners.items()), strict=True):
                other = self._factor(partner).expand(*self._lead(), *partner.shape[1:])
                parts.append(self._mapped(node.apply, [leaf, other] if slot == 0 else [other, leaf]))
            result = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if self.scored:
            self._saved[k] = (leaves, result)
        return self._normalised(result.detach(), exponent)

    def _backward_product(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        return [self._normalised(part.tensor, part.exponent) for part in self._backward_linear_map(k, node, g, guess)]

    def _convolved(self, x: Tensor, w: Tensor, node: Synapse) -> Tensor:
        flat = x.flatten(0, 2)
        geometry = (node.stride, node.padding, node.dilation, node.groups)
        if node.form == "conv" and self.power == 0 and not self.any_sign:
            y = counting_convolution(flat, w, *geometry)
        elif node.form == "conv":
            y = pruned_convolution(flat, w, None, *geometry)
        else:
            y = torch.convolution(flat, w, None, *geometry_of(node))
        return y.unflatten(0, (1, flat.shape[0], 1))

    def _normalised(self, tensor: Tensor, exponent: Tensor) -> Scaled:
        """Left as it is while its range is far from the type's: a batch is large, and one pass less."""
        peak = float(self._peak(tensor.reshape(1, -1))) if tensor.numel() else 0.0
        if 2.0 ** _SAFE[0] < peak < 2.0 ** _SAFE[1]:
            return Scaled(tensor, exponent)
        return super()._normalised(tensor, exponent)

    def _forward_pool(self, k: int, node: Pool, entering: list[Scaled]) -> Scaled:
        winners = self.recording.gates.get(k)
        if winners is None:
            return super()._forward_pool(k, node, entering)
        n = len(node.kernel)
        at = winners.flatten(-n)[None].expand(self.members, *winners.flatten(-n).shape)

        def chosen(x: Tensor) -> Tensor:
            return (x.flatten(-n).gather(-1, at.clamp(min=0)) * (at >= 0)).unflatten(-1, winners.shape[-n:])

        x, exponent = entering[0].tensor, entering[0].exponent
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(self.scored)
            result = chosen(leaf)
        if self.scored:
            self._saved[k] = ([leaf], result)
        return Scaled(result.detach(), exponent)


def _is_recorded(node: Node) -> bool:
    """Whether a factor of the model's is known by a recording alone."""
    return isinstance(node, Norm) or (isinstance(node, Scale) and node.recorded is not None)
