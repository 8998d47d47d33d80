"""Data in path arithmetic: the gates a real forward pass opens, and the flow that passes them.

For an input x the network is linear along its open paths: ``f(x) = sum_p x_p a_p(x) v_p``, with ``a_p`` the product of
the gates on p. A ReLU's gate is 1 or 0; of any activation through zero it is ``phi(z) / z`` (0 at z = 0); a max-pool
lets the winner through. Gates are recorded from the model itself, run on the masked weights.

Bytes: a batch's activations once for the model, once for each flow; weights once a batch. Oracle: the model's output,
which the signed gated flow gives again; enumeration of paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .batches import Batch
from .exporting import operator_name
from .flow import PathFlow, geometry_of, largest_magnitude
from .network import PathNetwork
from .nodes import Expression, Gate, Input, Node, Norm, Pool, Product, Softmax, Synapse
from .ops import WeightMap
from .policy import Policy
from .pruned_convolution import counting_convolution, pruned_convolution
from .select import Bracket
from .weights import Scaled, Weight

_SHIFTED = ("sigmoid", "hardsigmoid", "softplus", "log_sigmoid", "clamp", "clamp_min", "clamp_max", "threshold")

_SAFE = (-30, 90)  # powers of two that the largest of a flow may be away from 1: another layer's growth fits in
_CONVOLUTIONS = tuple(getattr(torch.ops.aten, f"conv{n}d").default for n in (1, 2, 3))


@dataclass(frozen=True)
class Recording:
    """What a batch does to the gates.

    Attributes:
        inputs: the floating-point inputs, [N, 1, *sample] each.
        outputs: the model's outputs, [N, *shape] each.
        gates: node -> [N, *shape]: a ReLU's output (it is open where that is above 0); the factor of any other
            activation; of a max-pool the winners' flat positions, int64 (-1: no one's).
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    gates: Mapping[int, Tensor]


def record(network: PathNetwork, batch: Batch, weights: Mapping[str, Tensor], who: str) -> Recording:
    """Runs the model in eval mode on a batch and keeps its gates. The model is not touched.

    Args:
        weights: name -> tensors in place of the model's own (masked weights, say).

    Raises:
        ValueError: a network made by hand, an activation that has no gate, inputs of another shape, or outputs that
            are not finite.
    """
    forward = network.forward
    if forward is None:
        raise ValueError(f"{who}: model: wanted one that was read from a module, got a PathNetwork made by hand")
    for k in network.alive:
        node = network.nodes[k]
        if isinstance(node, (Softmax, Input)) and (isinstance(node, Softmax) or node.where.endswith("(embedding)")):
            raise ValueError(f"{who}: model: wanted one without attention or embeddings, got {node.where}")
    if any(n.op == "call_function" and operator_name(n) == "topk" for n in forward.graph.graph.nodes):
        raise ValueError(f"{who}: model: wanted one whose data chooses no experts, got topk in it")
    for k in network.gates:
        node = network.nodes[k]
        if isinstance(node, Gate) and node.name in _SHIFTED:
            raise ValueError(f"{who}: model: wanted activations through zero, got {node.name} in {node.where}")
    tensors = {**network.tensors, **network._source, **weights}
    given = tree_leaves((batch.args, [batch.kwargs[key] for key in forward.keywords] if batch.kwargs else []))
    wanted = sum(feed is None for feed in forward.feeds)
    if len(given) != wanted:
        raise ValueError(f"{who}: data: wanted {wanted} model inputs, got {len(given)}")
    shapes = [node.meta["val"].shape for node, feed in _placeholders(forward.graph, forward.feeds) if feed is None]
    for x, shape in zip(given, shapes, strict=True):
        if x.shape[1:] != shape[1:]:
            raise ValueError(f"{who}: data: wanted samples of shape {tuple(shape[1:])}, got {tuple(x.shape[1:])}")
    names = {name: k for k, name in network.gates.items()}

    def one(*sample: Tensor) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        inputs = iter(x.unsqueeze(0) for x in sample)
        fed = [next(inputs) if f is None else tensors[f] if isinstance(f, str) else f for f in forward.feeds]
        run = _Run(forward.graph, names, network)
        outputs = run.run(*fed)
        return tuple(a for a in tree_leaves(outputs) if isinstance(a, Tensor)), run.kept

    dtype = _dtype(network)
    given = [x.to(network.device, dtype) if x.is_floating_point() else x.to(network.device) for x in given]
    with torch.no_grad():
        outputs, gates = torch.vmap(one)(*given)
    if not all(bool(torch.isfinite(out).all()) for out in outputs if out.is_floating_point()):
        raise ValueError(f"{who}: model: wanted finite outputs, got NaN or infinite ones")
    return Recording(tuple(x.unsqueeze(1) for x in given if x.is_floating_point()), outputs, gates)


def _placeholders(graph: fx.GraphModule, feeds: Sequence[Any]) -> list[tuple[fx.Node, Any]]:
    return list(zip((n for n in graph.graph.nodes if n.op == "placeholder"), feeds, strict=True))


def _dtype(network: PathNetwork) -> torch.dtype:
    """The model's own floating-point type."""
    return next(t.dtype for name, t in network.tensors.items() if name in network.prunable)


class _Run(fx.Interpreter):
    """Runs the exported graph, keeping gates on the way."""

    def __init__(self, graph: fx.GraphModule, names: Mapping[str, int], network: PathNetwork) -> None:
        super().__init__(graph)
        self.names, self.network = names, network
        self.kept: dict[int, Tensor] = {}
        self.folded: set[fx.Node] = set()  # batch norms that the convolution before them did

    def run_node(self, n: fx.Node) -> Any:
        k = self.names.get(n.name)
        if n in self.folded:
            return self.fetch_args_kwargs_from_env(n)[0][0]
        if n.target in _CONVOLUTIONS:
            return self._convolution(n)
        if k is None or k not in self.network.alive:
            return super().run_node(n)
        node = self.network.nodes[k]
        z = self.fetch_args_kwargs_from_env(n)[0][0]
        if isinstance(node, Pool):
            both = _pooled(z, node)
            self.kept[k] = both[1]
            return both[0] if isinstance(n.meta["val"], Tensor) else both
        if node.name == "relu":  # type: ignore[attr-defined]
            out = super().run_node(n)
            self.kept[k] = out.clone() if _overwritten(n) else out
            return out
        before = z.clone()  # an operator in place overwrites it
        out = super().run_node(n)
        self.kept[k] = torch.where(before == 0, 0, out / before)
        return out

    def _convolution(self, n: fx.Node) -> Tensor:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        schema = n.target._schema.arguments  # type: ignore[union-attr]
        given = {a.name: a.default_value for a in schema} | dict(zip((a.name for a in schema), args, strict=False))
        given |= kwargs
        x, w, bias = given["input"], given["weight"], given["bias"]
        dims = w.dim() - 2
        shape = [given[key] for key in ("stride", "padding", "dilation")]
        stride, padding, dilation = (tuple(v) * dims if len(v) == 1 else tuple(v) for v in shape)
        norm = next(iter(n.users)) if len(n.users) == 1 else None
        if norm is not None and norm.target is torch.ops.aten.batch_norm.default and norm.args[0] is n:
            rest: Any = self.map_nodes_to_values(norm.args[1:], norm)
            gamma, beta, mean, variance, training, _, eps = rest[:7]
            if not training:  # a scale and a shift, which the weights can take: a pass over the images less
                scale = (variance + eps).rsqrt() * (1 if gamma is None else gamma)
                w = w * scale.reshape(-1, *[1] * (dims + 1))
                shift = -mean if bias is None else bias - mean
                bias = shift * scale if beta is None else torch.addcmul(beta, shift, scale)
                self.folded.add(norm)
        return pruned_convolution(x, w, bias, stride, padding, dilation, given["groups"])


def _overwritten(n: fx.Node) -> bool:
    """Whether the value is changed in place by a node that follows."""
    schemas = (getattr(user.target, "_schema", None) for user in n.users)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _pooled(z: Tensor, node: Pool) -> tuple[Tensor, Tensor]:
    """The largest in each window, and their flat positions over the pooled axes."""
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(node.kernel)]
    window = (node.kernel, node.stride, node.padding, node.dilation)
    return pool(z, *window, ceil_mode=node.ceil_mode, return_indices=True)


class GatedFlow(PathFlow):
    """Path flow through recorded gates: the samples of a batch are its sources.

    With weights mapped by ``ONE`` and squared inputs it is the data factor of the NTK, ``g_k(x^2; a(x))``: gates count
    squared. Fixed constants (pooling, norms) belong to the value of a path, so they are 1 here.

    Args:
        network: with all its positions; read from a module.
        signed: flow of the signed network instead (weights mapped by ``IDENTITY``): its output is the model's.
        any_sign: the source may be negative.
    """

    def __init__(
        self,
        network: PathNetwork,
        weights: Mapping[str, Weight],
        recording: Recording,
        policy: Policy,
        *,
        source: Sequence[Tensor],
        signed: bool = False,
        scored: bool = False,
        any_sign: bool = False,
    ) -> None:
        self.recording, self.signed, self.any_sign = recording, signed, signed or any_sign
        f = WeightMap.IDENTITY if signed else WeightMap.ONE
        super().__init__(network, weights, f=f, policy=policy, source=[x.flatten(0, 1) for x in source], scored=scored)
        self.batched = True
        for k in self._order:
            if signed and isinstance(network.nodes[k], (Norm, Product)):
                raise ValueError(f"GatedFlow: wanted a network that is linear between gates, got {network.nodes[k]}")

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

    def _passed(self, k: int, node: Node, flow: Scaled) -> Scaled:
        """What a gate lets through of a flow [1, N, *shape]."""
        gate = self.recording.gates.get(k)
        if gate is None:
            return flow
        gate = gate[None].to(flow.tensor.dtype)
        if node.name == "relu":  # type: ignore[attr-defined]
            return Scaled(torch.ops.aten.threshold_backward(flow.tensor, gate, 0), flow.exponent)
        return Scaled(flow.tensor * (gate if self.signed else gate.square()), flow.exponent)

    def _forward_gate(self, k: int, node: Gate, entering: list[Scaled]) -> Scaled:
        return self._passed(k, node, entering[0])

    def _backward_gate(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        return [self._passed(k, node, g)]

    def _convolved(self, x: Tensor, w: Tensor, node: Synapse) -> Tensor:
        flat = x.flatten(0, 2)
        geometry = (node.stride, node.padding, node.dilation, node.groups)
        if node.form == "conv" and not self.any_sign:
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
