"""Path flow of the squared network together with its derivative along a direction of u = w^2.

With U = u on the weights, a and g the flows, and Z the direction: ``a' = U a_in' + Z a_in`` forward,
``g_in' = U^T g' + Z^T g`` backward. The gradient of R is ``g a^T`` and its Hessian times Z is ``g' a^T + g a'^T``
(R is multi-affine in u, so its diagonal is zero). Flow and derivative travel as two sources: every fixed linear map
serves both, only synapses mix them.

Bytes: U and Z are read twice each, the gradient and the product are written once. Oracle: enumeration of paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .flow import PathFlow
from .network import PathNetwork
from .nodes import Constant, Node, Norm, Product, Shift, Synapse, geometry_of
from .ops import WeightMap
from .policy import Policy
from .scaled import largest_magnitude
from .select import Bracket
from .weights import Scaled, Weight, product

Sink = Callable[[Weight, Tensor | None, Tensor, Tensor], None]
"""Takes (weight, gradient, Hessian-vector product, exponent), both of the weight's shape times 2^exponent. The product
lies in memory that is used again for the next weight."""


class TangentFlow(PathFlow):
    """Gradient and Hessian-vector products of R_2.

    Args:
        network, weights, policy: as for :class:`PathFlow`; the weights' map is ``SQUARE``.
        keep_squares: hold w^2 from run to run, while masks stay as they are.

    Raises:
        ValueError: a network whose R is not multi-affine in u (norms without statistics, products, biases that flow).
    """

    def __init__(
        self, network: PathNetwork, weights: Mapping[str, Weight], policy: Policy, *, keep_squares: bool = False
    ) -> None:
        super().__init__(network, weights, f=WeightMap.SQUARE, policy=policy)
        for k in self._order:
            node = network.nodes[k]
            fixed = self._fixed[k]
            begins = isinstance(node, (Shift, Constant)) and fixed is not None and bool(fixed.any())
            if isinstance(node, (Norm, Product)) or begins:
                raise ValueError(f"TangentFlow: wanted a network whose flow is multi-affine, got {node.where}")
        self.sources, self.batched = 2, True
        self._along: Mapping[str, Tensor] | None = None  # None: along the masks
        self._sink: Sink | None = None
        self._wants_gradient = True
        self._keeps = keep_squares
        self._squares: dict[str, Tensor] = {}

    def log2_slope(self) -> float:
        """log2 of R_2's derivative along the mask, the sum of dR_2/du over all weights that are left: forward alone.

        With nothing pruned, what the direction carries is the same for every unit that leaves: a sum over those that
        enter, which no weight is read for.
        """
        self._along = None
        self.forward()
        self._saved.clear()
        return float(self._log2_of(1)[0])

    def run(self, along: Mapping[str, Tensor], sink: Sink, gradient: bool = True) -> float:
        """One forward and one backward sweep; returns log2 R_2.

        Args:
            along: the direction of u, for every weight the synapses use, shaped like it.
            sink: called once for every use of a scored weight.
            gradient: whether the gradient is wanted too.
        """
        self._along, self._sink, self._wants_gradient = along, sink, gradient
        total = float(self.forward()[0])
        self.backward()
        self._sink = None
        return total

    _peak = staticmethod(largest_magnitude)  # a derivative has either sign

    def _log2_total(self) -> Tensor:
        return self._log2_of(0)

    def _log2_of(self, which: int) -> Tensor:
        """log2 of the sum at the outputs, of the flow (0) or of its derivative (1)."""
        both, one = self.values, slice(which, which + 1)
        self.values = {k: replace(both[k], tensor=both[k].tensor[:, one]) for k in self.network.outputs}
        result = super()._log2_total()
        self.values = both
        return result

    def _forward_input(self, k: int, node: Node, entering: list[Scaled]) -> Scaled:
        flow = super()._forward_input(k, node, entering)  # type: ignore[arg-type]
        tensor = flow.tensor.clone()
        tensor[:, 1] = 0
        return Scaled(tensor, flow.exponent)

    def _outgoing(self, k: int) -> Scaled:
        flow = super()._outgoing(k)
        flow.tensor[:, 1] = 0
        return flow

    def _square(self, weight: Weight) -> Tensor:
        if not self._keeps:
            return weight.effective()
        if weight.name not in self._squares:
            self._squares[weight.name] = weight.effective()
        return self._squares[weight.name]

    def _direction(self, weight: Weight) -> Tensor | None:
        """The direction of a weight's u; None for ones everywhere."""
        if self._along is not None:
            return self._along[weight.name].to(self.device, self.dtype)
        if not weight.scored:
            return torch.zeros(weight.shape, dtype=self.dtype, device=self.device)
        return None if weight.mask is None else weight.bits().to(self.device, self.dtype)

    # ----------------------------------------------------------------------------------------------- synapses

    def _forward_synapse(self, k: int, node: Synapse, entering: list[Scaled]) -> Scaled:
        weight, x = self.weights[node.weight], entering[0]
        if node.form.startswith("conv"):
            both = x.tensor.flatten(0, 2)  # [flow, derivative]
            y = self._both_convolved(both, weight, node)[None].unsqueeze(2)
            self._saved[k] = (both, x.exponent)
        else:
            rows = self._both_rows(x.tensor, node)
            y = self._unrowed(self._both_through(rows, weight, node), None, x.tensor, node)
            self._saved[k] = (rows, x.exponent)
        return self._normalised(y, x.exponent)

    def _both_convolved(self, both: Tensor, weight: Weight, node: Synapse) -> Tensor:
        u, z = self._square(weight), self._direction(weight)
        y = torch.convolution(both, u, None, *geometry_of(node))
        if z is None:
            y[1:] += self._summed_convolution(both[:1], u, node)
        else:
            y[1:] += torch.convolution(both[:1], z, None, *geometry_of(node))
        return y

    def _both_through(self, rows: Tensor, weight: Weight, node: Synapse) -> Tensor:
        """[G, 2 T, in] -> [G, 2 T, out]"""
        half = rows.shape[1] // 2
        streams = self._along is None and weight.scored and weight.streams(rows.shape[1]) and not self._keeps
        z = None if streams else self._direction(weight)
        if streams:  # neither squares nor ones are written
            y = weight.forward_rows(rows)
        else:
            y = product(rows, self._matrix(self._square(weight), weight, node))
        flow = rows[:, :half]
        if z is not None:
            y[:, half:] += product(flow, self._matrix(z, weight, node))
        elif weight.mask is not None and streams:
            y[:, half:] += weight.forward_rows(flow, f=WeightMap.ONE)
        else:
            y[:, half:] += flow.sum(2, keepdim=True)
        return y

    @staticmethod
    def _summed_convolution(x: Tensor, w: Tensor, node: Synapse) -> Tensor:
        """A convolution with ones: the channels of a group are summed first, and one channel of it is made."""
        stride, padding, dilation, transposed, output_padding, groups = geometry_of(node)
        sums = x.unflatten(1, (groups, -1)).sum(2)
        ones = torch.ones((groups, 1, *w.shape[2:]), dtype=w.dtype, device=w.device)
        y = torch.convolution(sums, ones, None, stride, padding, dilation, transposed, output_padding, groups)
        leaving = w.shape[1] if transposed else w.shape[0] // groups
        return y.repeat_interleave(leaving, 1)

    def _both_rows(self, x: Tensor, node: Synapse) -> Tensor:
        """[G, 2 T, in]: the rows of the flow, then those of its derivative."""
        return self._rows(x, node)[0] if node.form == "rows" else x.reshape(1, -1, x.shape[-1])

    @staticmethod
    def _matrix(values: Tensor, weight: Weight, node: Synapse) -> Tensor:
        """[G, in, out]"""
        rows = values.reshape(weight.groups, -1, weight.columns)
        return rows if node.form == "linear_t" else rows.transpose(1, 2)

    def _backward_synapse(self, k: int, node: Synapse, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        weight = self.weights[node.weight]
        u, z = self._square(weight), self._direction(weight)
        assert z is not None
        wants = self.scored and weight.scored
        wants_flow = node.inputs[0] in self._carries or self.keep_flows
        x, exponent = self._saved.pop(k)
        step = self._conv_step if node.form.startswith("conv") else self._row_step
        inward, first, second = step(node, weight, g.tensor, x, u, z, wants, wants_flow)
        if wants:
            assert self._sink is not None and second is not None
            self._sink(weight, first, second, g.exponent + exponent)
        return [self._normalised(inward, g.exponent)]

    def _conv_step(
        self,
        node: Synapse,
        weight: Weight,
        g: Tensor,
        x: Tensor,
        u: Tensor,
        z: Tensor,
        wants: bool,
        wants_flow: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        def adjoint(g: Tensor, x: Tensor, w: Tensor, flow: bool, gradient: bool) -> tuple[Tensor, ...]:
            mask = [flow, gradient, False]
            return torch.ops.aten.convolution_backward(g, x, w, None, *geometry_of(node), mask)[:2]

        both = g.flatten(0, 2)
        inward = torch.zeros_like(x)
        if wants_flow:
            inward = adjoint(both, x, u, True, False)[0]
            inward[1:] += adjoint(both[:1], x[:1], z, True, False)[0]
        first = second = None
        if wants:
            second = adjoint(both.flip(0), x, u, False, True)[1]
            if self._wants_gradient:
                first = adjoint(both[:1], x[:1], u, False, True)[1]
        return inward[None].unsqueeze(2), first, second

    def _row_step(
        self,
        node: Synapse,
        weight: Weight,
        g: Tensor,
        x: Tensor,
        u: Tensor,
        z: Tensor,
        wants: bool,
        wants_flow: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        left = self._both_rows(g, node)
        half = left.shape[1] // 2
        inward = product(left, self._matrix(u, weight, node).transpose(1, 2))
        inward[:, half:] += product(left[:, :half], self._matrix(z, weight, node).transpose(1, 2))
        first = second = None
        if wants:
            turned = torch.cat([left[:, half:], left[:, :half]], 1)
            second = self._outer(turned, x, weight, node, weight.room(u))
            if self._wants_gradient:
                first = self._outer(left[:, :half], x[:, :half], weight, node)
        like = inward if node.form == "rows" else g
        return self._unrowed(inward, None, like, node), first, second

    @staticmethod
    def _outer(g: Tensor, x: Tensor, weight: Weight, node: Synapse, out: Tensor | None = None) -> Tensor:
        """sum_t g_t x_t^T, laid as the weight is stored."""
        left, right = (x, g) if node.form == "linear_t" else (g, x)
        return product(left.transpose(1, 2), right, out).reshape(weight.shape)
