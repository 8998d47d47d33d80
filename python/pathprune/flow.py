"""Path arithmetic over a network: one forward and one backward sweep sum over all paths.

With f(w) on every weight, the forward flow a of a unit is the sum over all paths from the source to it, the backward
flow g the sum over all paths from it to an output, and ``f(w_ij) a_j g_i`` the sum over all paths through weight ij.
R is the sum over all paths; every cut of the network carries R.

Numbers never overflow: a flow is ``tensor * 2^exponent`` with an integer exponent per tensor. Linear maps keep it,
sums and concatenations align to the largest, a synapse renormalises its result to a maximum in [1/2, 1). All factors
are powers of two, so float32 ranks as float64 does.

Bytes: streamed weights are read once forward and once backward; activations are small beside them.
Oracle: enumeration of all paths on small networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import nodes as kinds
from .network import PathNetwork
from .nodes import Node, Synapse, geometry_of, keeps_order, parts_of
from .ops import WeightMap
from .policy import SHARES, Policy
from .pooling import pooled
from .scaled import ScaledArithmetic
from .select import Bracket
from .weights import Scaled, Weight, accumulate_type, power_of_two

_SMALL = 1 << 14  # numbers
GROUPED = ("rows", "experts", "experts_t")  # forms of synapses over a flow [1, groups, rows, in]
POWERS = {WeightMap.ONE: 0.0, WeightMap.ABS: 1.0, WeightMap.IDENTITY: 1.0, WeightMap.SQUARE: 2.0}


class PathFlow(ScaledArithmetic):
    """Forward and backward flow over a network, round after round.

    Args:
        network: the path network.
        weights: one :class:`Weight` for each tensor that synapses use.
        f: weight map; fixed constants are raised to its power (ONE 0, ABS 1, SQUARE 2).
        policy: see :class:`Policy`.
        source: the flow at the inputs: None for ones; a tensor shaped like one sample (or a list of them, one per
            input), or with a leading axis of several sources ``[S, *sample]``. Non-negative.
        scored: whether backward flow makes scores.
        members: for an ensemble, each member's own tensors (norms, biases); those it lacks are the network's.
    """

    records = False  # whether what data do is there: norms' factors, attention weights; rows that all differ

    def __init__(
        self,
        network: PathNetwork,
        weights: Mapping[str, Weight],
        *,
        f: WeightMap,
        policy: Policy,
        source: Tensor | Sequence[Tensor] | None = None,
        scored: bool = True,
        members: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        if policy.norm == "recorded" and not self.records:
            raise ValueError("policy: norm: wanted 'flow' or 'unit' for a method that sees no data, got 'recorded'")
        self.network, self.weights, self.policy, self.scored = network, weights, policy, scored
        self._tensors = [{**network.tensors, **own} for own in members]
        self.power = POWERS[f]
        self.members = max((weight.members for weight in weights.values()), default=1)
        dense = (weight.dense for weight in weights.values())
        self.device = next((tensor.device for tensor in dense if tensor is not None), network.device)
        self.dtype = accumulate_type(network)
        self.sources = self._sources(source)
        self.batched = self.members > 1 or self.sources > 1 or bool(members)
        self._order = [k for k in range(len(network.nodes)) if k in network.alive]
        self._fixed = {k: self._constant(network.nodes[k]) for k in self._order}
        self._last_use = {i: k for k in self._order for i in network.nodes[k].inputs}
        self._carries = self._nodes_above_weights()
        self._relays: dict[int, bool] = {}
        self._saved: dict[int, Any] = {}
        self.values: dict[int, Scaled] = {}
        self.keep_flows = False  # keep every node's forward and backward flow, to look at (conservation, reports)
        self.leaving: dict[int, Scaled] = {}  # the backward flow at an output, where it is not ones
        self.backward_flows: dict[int, Scaled] = {}
        self.input_flows: dict[tuple[int, int], Scaled] = {}  # (node, slot) -> what goes back along that input

    # ------------------------------------------------------------------------------------------- preparation

    def _sources(self, source: Tensor | Sequence[Tensor] | None) -> int:
        """Takes the sources in; returns how many there are."""
        inputs = [k for k, node in enumerate(self.network.nodes) if isinstance(node, kinds.Input)]
        shapes = [self.network.nodes[k].shape for k in inputs]
        self._source: dict[int, Tensor] = {}
        if source is None:
            return 1
        given = [source] if isinstance(source, Tensor) else list(source)
        if len(given) != len(inputs):
            raise ValueError(f"source: wanted {len(inputs)} tensors (one per input), got {len(given)}")
        count = None
        for k, shape, tensor in zip(inputs, shapes, given, strict=True):
            if tensor.shape[-len(shape) + 1 :] != shape[1:] and tensor.shape != shape[1:]:
                raise ValueError(f"source: wanted one sample of shape {tuple(shape[1:])}, got {tuple(tensor.shape)}")
            tensor = tensor.detach().to(self.device, self.dtype).reshape(-1, *shape)
            self._checked_source(tensor)
            if count not in (None, tensor.shape[0]):
                raise ValueError(f"source: wanted {count} sources for every input, got {tensor.shape[0]}")
            count = tensor.shape[0]
            self._source[k] = tensor
        return count or 1

    def _checked_source(self, tensor: Tensor) -> None:
        if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
            raise ValueError("source: wanted finite values >= 0 (an image scaled to [0, 1], say), got others")

    def _constant(self, node: Node) -> Tensor | None:
        """A node's fixed numbers, raised to the power; they do not change while weights are pruned."""
        drops_biases = self.policy.biases == "drop"
        skips_norm = self.policy.batch_norm == "identity" and getattr(node, "kind", "") == "batch_norm"
        if isinstance(node, kinds.Scale) and not skips_norm:
            factor = self._powered(node, node.factor, keeps_zeros=True)
            is_one = node.shape == self.network.nodes[node.inputs[0]].shape and bool((factor == 1).all())
            return None if is_one else factor
        if isinstance(node, kinds.Shift) and not (drops_biases or skips_norm):
            value = self._powered(node, node.value)
            return value if bool(value.any()) else None
        if isinstance(node, kinds.Softmax):
            weights = self._powered(node, node.weights, keeps_zeros=True)
            return weights if node.repeats is None else weights * node.repeats.to(weights)
        if isinstance(node, kinds.Constant):
            value = self._powered(node, node.value)
            return torch.zeros_like(value) if drops_biases else value
        return None

    def constant(self, k: int) -> Tensor | None:
        """A node's fixed numbers, raised to the power; None for none."""
        return self._fixed.get(k)

    def _powered(self, node: Node, expression: kinds.Expression, keeps_zeros: bool = False) -> Tensor:
        """``|value|^power``; for an ensemble [E, 1, *value], its axes laid against the node's."""
        with torch.no_grad():
            if self._tensors:
                each = [expression(tensors) for tensors in self._tensors]
                lead = (1,) * (1 + len(node.shape) - each[0].dim())
                value = torch.stack([one.reshape(*lead, *one.shape) for one in each])
            else:
                value = expression(self.network.tensors)
        value = value.detach().double().abs()
        value = value**self.power if self.power or not keeps_zeros else (value > 0).double()
        value = value.to(self.device, self.dtype)
        if not bool(torch.isfinite(value).all()):
            raise ValueError("PathFlow: wanted finite biases, norms and constants, got NaN or infinite ones")
        return value

    def _nodes_above_weights(self) -> set[int]:
        """Nodes whose backward flow reaches a scored synapse (or is asked for)."""
        carries: set[int] = set()
        for k in self._order:
            node = self.network.nodes[k]
            scored = isinstance(node, Synapse) and self.weights[node.weight].scored
            if scored or any(i in carries for i in node.inputs):
                carries.add(k)
        return carries

    # ----------------------------------------------------------------------------------------------- forward

    def forward(self) -> Tensor:
        """Forward flow. Returns log2 R, float64 [E] (one entry per ensemble member; -inf when no path is left)."""
        self._saved.clear()
        self.values.clear()
        for k in self._order:
            node = self.network.nodes[k]
            entering = [self.values[i] for i in node.inputs]
            self.values[k] = getattr(self, f"_forward_{type(node).__name__.lower()}")(k, node, entering)
            if not self.keep_flows:
                for i in set(node.inputs):
                    if self._last_use[i] == k and i not in self.network.outputs:
                        del self.values[i]
        return self._log2_total()

    def _log2_total(self) -> Tensor:
        total = torch.full((self.members,), -torch.inf, dtype=torch.float64)
        for k in self.network.outputs:
            out = self.values[k]
            amount = out.tensor.double().reshape(self.members, -1).sum(1).cpu()
            total = torch.logaddexp2(total, amount.log2() + out.exponent.cpu())
        return total

    def _mapped(self, function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """A function of traced shapes, over members and sources."""
        if not self.batched:
            return function(*tensors)
        lead = self._lead()
        flat = [tensor.flatten(0, 1) for tensor in tensors]
        return torch.vmap(function)(*flat).unflatten(0, lead)

    def _linear_map(self, k: int, function: Callable[..., Tensor], entering: Sequence[Scaled]) -> Scaled:
        """A fixed linear map; torch's autograd knows its adjoint."""
        tensors, exponent = self._aligned(entering)
        if k not in self._carries and not self.keep_flows:
            return Scaled(self._mapped(function, tensors), exponent)
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            result = self._mapped(function, leaves)
        self._saved[k] = (leaves, result)
        return Scaled(result.detach(), exponent)

    def _forward_input(self, k: int, node: kinds.Input, entering: list[Scaled]) -> Scaled:
        source = self._source.get(k)
        if source is None:
            source = torch.ones((1, *node.shape), dtype=self.dtype, device=self.device)
        source = source.expand(*self._lead(), *node.shape) if self.batched else source[0]
        return self._normalised(source, self._zero_exponent())

    def _forward_constant(self, k: int, node: kinds.Constant, entering: list[Scaled]) -> Scaled:
        value = self._fixed[k]
        assert value is not None
        return self._normalised(value.expand(*self._lead(), *node.shape), self._zero_exponent())

    def _forward_scale(self, k: int, node: kinds.Scale, entering: list[Scaled]) -> Scaled:
        factor = self._fixed[k]
        return entering[0] if factor is None else replace(entering[0], tensor=entering[0].tensor * factor)

    def _forward_shift(self, k: int, node: kinds.Shift, entering: list[Scaled]) -> Scaled:
        value = self._fixed[k]
        if value is None:  # what broadcasting would have repeated still is
            shape = (*self._lead(), *node.shape)
            return replace(entering[0], tensor=entering[0].tensor.expand(shape))
        top = entering[0].exponent.clamp(min=0)
        moved = self._shifted(entering[0], top)
        return Scaled(moved + value * self._by(power_of_two(-top, self.dtype), moved), top)

    def _forward_norm(self, k: int, node: kinds.Norm, entering: list[Scaled]) -> Scaled:
        if self.policy.norm == "unit":
            return entering[0]
        x = entering[0].tensor
        parts, dims = parts_of(x, node, len(self._lead()))
        rms = parts.square().mean(dims, keepdim=True).sqrt()
        if node.among:  # how much larger than the others: no scale is lost
            mean = rms.mean([len(self._lead()) + dim for dim in node.among], keepdim=True)
            relative = torch.where(mean > 0, rms / mean, 0.0)
            self._saved[k] = (relative, self._zero_exponent())
            return replace(entering[0], tensor=x * relative)
        inverse = torch.where(rms > 0, 1 / rms, 0.0)
        inverse = inverse.expand(parts.shape).reshape(x.shape) if node.groups else inverse
        self._saved[k] = (inverse, entering[0].exponent)
        return Scaled(x * inverse, self._zero_exponent())

    def _forward_gate(self, k: int, node: kinds.Gate, entering: list[Scaled]) -> Scaled:
        return entering[0]

    def _forward_pool(self, k: int, node: kinds.Pool, entering: list[Scaled]) -> Scaled:
        return self._linear_map(k, lambda x: pooled(x, node, self.power, self.policy.max_pool), entering)

    def _forward_reduce(self, k: int, node: kinds.Reduce, entering: list[Scaled]) -> Scaled:
        shape = self.network.nodes[node.inputs[0]].shape
        count = 1
        for dim in node.dims:
            count *= shape[dim]
        factor = (1.0 / max(count, 1)) ** self.power if node.kind == "mean" else 1.0
        return self._linear_map(k, lambda x: x.sum(node.dims, keepdim=node.keepdim) * factor, entering)

    def _forward_wire(self, k: int, node: kinds.Wire, entering: list[Scaled]) -> Scaled:
        if self._is_relay(k, node):
            return replace(entering[0], tensor=entering[0].tensor.reshape(node.shape))
        return self._linear_map(k, lambda *xs: node.apply(xs, self.power), entering)

    def _is_relay(self, k: int, node: kinds.Wire) -> bool:
        """Whether a wire of a small flow does no more than to give it another shape: asking autograd takes longer."""
        if self.batched or len(node.inputs) != 1 or node.shape.numel() > _SMALL:
            return False
        if k not in self._relays:
            self._relays[k] = keeps_order(node, self.network.nodes[node.inputs[0]].shape, self.power, self.device)
        return self._relays[k]

    def _forward_sum(self, k: int, node: kinds.Sum, entering: list[Scaled]) -> Scaled:
        self._saved[k] = [flow.tensor.shape for flow in entering]
        return self._added(entering)

    def _forward_product(self, k: int, node: kinds.Product, entering: list[Scaled]) -> Scaled:
        left, right = entering
        self._saved[k] = (left, right)
        return self._normalised(self._mapped(node.apply, [left.tensor, right.tensor]), left.exponent + right.exponent)

    def _forward_softmax(self, k: int, node: kinds.Softmax, entering: list[Scaled]) -> Scaled:
        weights = self._fixed[k]
        assert weights is not None
        self._saved[k] = entering[0]
        return Scaled(weights.expand(entering[0].tensor.shape), self._zero_exponent())

    def _forward_synapse(self, k: int, node: Synapse, entering: list[Scaled]) -> Scaled:
        x, weight = entering[0], self.weights[node.weight]
        saved: Any = x
        if node.form.startswith("conv"):
            result = self._convolved(x.tensor, weight.effective(), node)
        else:
            rows, merged = self._rows(x.tensor, node)
            result = self._unrowed(weight.forward_rows(rows, _turned(node, weight)), merged, x.tensor, node)
            saved = (Scaled(rows, x.exponent), merged, x.tensor.shape)
        if k in self._carries or self.keep_flows:
            self._saved[k] = saved
        return self._normalised(result, x.exponent)

    # -------------------------------------------------------------------------------------- rows and patches

    def _rows(self, x: Tensor, node: Synapse) -> tuple[Tensor, Tensor | None]:
        """The flow as [G, T, in]: positions and sources as rows; equal rows of a linear layer are merged."""
        if node.form in GROUPED:  # [1, groups, positions, in] made by the wire before
            lead = len(self._lead())
            if not lead:
                return x[0], None
            return x.squeeze(lead).movedim(1, 2).flatten(2, 3).flatten(0, 1), None
        rows = x.reshape(self.members, -1, x.shape[-1])
        if self.members == 1 and not self.records and 1 < rows.shape[1] <= 4096:
            distinct, index = torch.unique(rows[0], dim=0, return_inverse=True)
            if distinct.shape[0] < rows.shape[1]:
                return distinct[None], index
        return rows.contiguous(), None

    def _unrowed(self, y: Tensor, merged: Tensor | None, x: Tensor, node: Synapse) -> Tensor:
        """[G, T, out] back to the node's shape."""
        if node.form in GROUPED:
            if not self.batched:
                return y[None]
            y = y.unflatten(0, (self.members, node.groups)).unflatten(2, (self.sources, -1))
            return y.movedim(2, 1).unsqueeze(2)
        if merged is not None:
            y = y[:, merged]
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _convolved(self, x: Tensor, w: Tensor, node: Synapse) -> Tensor:
        def one(x: Tensor, w: Tensor) -> Tensor:
            return torch.convolution(x, w, None, *geometry_of(node))

        if not self.batched:
            return one(x, w)
        members = x.flatten(1, 2)  # sources and the traced batch of one
        if self.members == 1:
            return one(members[0], w.reshape(w.shape[-x.dim() + 2 :]))[:, None].unsqueeze(0)
        return torch.vmap(one)(members, w).unsqueeze(2)

    # ---------------------------------------------------------------------------------------------- backward

    def backward(self, guess: Bracket | None = None) -> None:
        """Backward flow from ones at the outputs; scores every scored weight on the way.

        Args:
            guess: a bracket that probably holds the next threshold; streamed weights count against it in the same
                read (see ``Weight.collected``).
        """
        for weight in self.weights.values():
            weight.forget()
        flows: dict[int, list[Scaled]] = {}
        self.backward_flows.clear()
        for k in self.network.outputs:
            flows.setdefault(k, []).append(self._outgoing(k))
        for k in reversed(self._order):
            if k not in flows or not (k in self._carries or self.keep_flows):
                continue
            tensors, exponent = self._aligned(flows.pop(k))
            g = Scaled(tensors[0] if len(tensors) == 1 else torch.stack(tensors).sum(0), exponent)
            if self.keep_flows:
                self.backward_flows[k] = g
            node = self.network.nodes[k]
            step = getattr(self, f"_backward_{type(node).__name__.lower()}")
            for slot, (i, flow) in enumerate(zip(node.inputs, step(k, node, g, guess), strict=True)):
                if self.keep_flows:
                    self.input_flows[k, slot] = flow
                if i in self._carries or self.keep_flows:
                    flows.setdefault(i, []).append(flow)
        for weight in self.weights.values():
            weight.drop_effective()
        self._saved.clear()

    def _outgoing(self, k: int) -> Scaled:
        """The backward flow at an output: ones, or what was put into ``leaving``."""
        return self.leaving.get(k) or Scaled(torch.ones_like(self.values[k].tensor), self._zero_exponent())

    def _backward_input(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        return []

    _backward_constant = _backward_input

    def _backward_gate(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        return [g]

    def _backward_shift(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        return [self._to_input(k, g)]

    def _backward_scale(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        factor = self._fixed[k]
        return [g if factor is None else self._to_input(k, replace(g, tensor=g.tensor * factor))]

    def _to_input(self, k: int, g: Scaled, which: int = 0) -> Scaled:
        """Sums what broadcasting repeated."""
        shape = (*self._lead(), *self.network.nodes[self.network.nodes[k].inputs[which]].shape)
        return g if g.tensor.shape == shape else replace(g, tensor=g.tensor.sum_to_size(shape))

    def _backward_norm(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        if self.policy.norm == "unit":
            return [g]
        inverse, exponent = self._saved.pop(k)
        return [self._normalised(g.tensor * inverse, g.exponent - exponent)]

    def _backward_linear_map(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        if k not in self._saved:
            raise RuntimeError("PathFlow.backward: forward() has not been run, or kept no flows below the weights")
        leaves, result = self._saved.pop(k)  # the leaves are aligned to the result's exponent: no factor is left
        return [Scaled(part, g.exponent) for part in torch.autograd.grad(result, leaves, g.tensor)]

    _backward_pool = _backward_reduce = _backward_linear_map

    def _backward_wire(self, k: int, node: kinds.Wire, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        if not self._is_relay(k, node):
            return self._backward_linear_map(k, node, g, guess)
        return [replace(g, tensor=g.tensor.reshape(self.network.nodes[node.inputs[0]].shape))]

    def _backward_sum(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        shapes = self._saved.pop(k)
        return [g if s == g.tensor.shape else replace(g, tensor=g.tensor.sum_to_size(s)) for s in shapes]

    def _backward_product(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        """A share to each factor; attention weights whose similarity is zero leave theirs to the values."""
        assert isinstance(node, kinds.Product)
        left, right = self._saved.pop(k)
        to_left: Tensor | float = 0.5
        if isinstance(self.network.nodes[node.inputs[0]], kinds.Softmax):
            is_open = self._saved[node.inputs[0]].tensor > 0
            to_left = SHARES[self.policy.attention] * is_open.to(self.dtype)
        inward = []
        for slot, (own, other, share) in enumerate(((left, right, to_left), (right, left, 1 - to_left))):
            held = other.tensor if slot == 0 else other.tensor * share  # shares are of the left factor's elements
            with torch.enable_grad():
                leaf = own.tensor.detach().requires_grad_()
                made = self._mapped(node.apply, [leaf, held] if slot == 0 else [held, leaf])
            (part,) = torch.autograd.grad(made, leaf, g.tensor)
            inward.append(self._normalised(part * share if slot == 0 else part, g.exponent + other.exponent))
        return inward

    def _backward_softmax(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        similar, weights = self._saved.pop(k), self._fixed[k]
        assert weights is not None
        flow = g.tensor.double() * weights.double()  # what passes each pair of positions
        ratio = torch.where(similar.tensor > 0, flow / similar.tensor.double(), 0.0)
        top = torch.frexp(ratio.reshape(self.members, -1).amax(1)).exponent.to(torch.int64)
        ratio = ratio * self._by(power_of_two(-top, torch.float64), ratio)
        return [self._normalised(ratio.to(self.dtype), g.exponent + top - similar.exponent)]

    def _backward_synapse(self, k: int, node: Synapse, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        weight = self.weights[node.weight]
        if node.form.startswith("conv"):
            return [self._backward_conv(k, node, g, weight)]
        x, merged, shape = self._saved.pop(k)
        if node.form in GROUPED:
            rows, _ = self._rows(g.tensor, node)
            inward = weight.backward_rows(x, replace(g, tensor=rows), guess, self.scored)
            return [self._normalised(self._unrowed(inward, None, inward, node), g.exponent)]
        rows = g.tensor.reshape(self.members, -1, g.tensor.shape[-1]).contiguous()
        turned = _turned(node, weight)
        if merged is None:
            inward = weight.backward_rows(x, replace(g, tensor=rows), guess, self.scored, turned)
        else:  # rows with equal x may leave by different g
            pairs, index = torch.unique(torch.cat([merged[:, None].to(rows), rows[0]], 1), dim=0, return_inverse=True)
            repeats = torch.bincount(index).to(rows)[:, None]
            entered = replace(x, tensor=x.tensor[:, pairs[:, 0].long()])
            left = replace(g, tensor=(pairs[:, 1:] * repeats)[None])
            inward = (weight.backward_rows(entered, left, guess, self.scored, turned) / repeats)[:, index]
        return [self._normalised(inward.reshape(shape), g.exponent)]

    def _backward_conv(self, k: int, node: Synapse, g: Scaled, weight: Weight) -> Scaled:
        x = self._saved.pop(k)
        wants_flow = node.inputs[0] in self._carries or self.keep_flows
        wants_scores = self.scored and weight.scored
        w = weight.effective()

        def one(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            wanted = [wants_flow, wants_scores, False]
            found = torch.ops.aten.convolution_backward(g, x, w, None, *geometry_of(node), wanted)
            return tuple(part for part in found if part is not None)

        if not self.batched:
            found = list(one(g.tensor, x.tensor, w))
        elif self.members == 1:
            plain = w.reshape(w.shape[-x.tensor.dim() + 2 :])
            found = list(one(g.tensor.flatten(1, 2)[0], x.tensor.flatten(1, 2)[0], plain))
        else:
            found = list(torch.vmap(one)(g.tensor.flatten(1, 2), x.tensor.flatten(1, 2), w))
        inward = found.pop(0).reshape(x.tensor.shape) if wants_flow else torch.zeros_like(x.tensor)
        if wants_scores:
            weight.write_scores(found.pop(0).contiguous(), x.exponent + g.exponent)
        return self._normalised(inward, g.exponent)


def _turned(node: Synapse, weight: Weight) -> bool:
    """Whether a tied matrix is used the other way round than where it was used first."""
    return node.form != weight.form and node.form in ("linear", "linear_t")
