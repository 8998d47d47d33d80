"""A Unified Paths Perspective for Pruning at Initialization (Gebhart, Saxena, Schrater 2021), and SynFlow (Tanaka et
al. 2020), which it generalises.

With R_q = sum over paths of ``|v_p|^q`` (ones at the inputs), the scores are

* SynFlow: ``|w| dR_1/d|w|``, the sum over the paths through w of ``|v_p|``;
* SynFlow-L2: ``u dR_2/du`` with u = w^2 (``conservative``: the only L2 form whose sum over a cut is R_2, hence the
  default), ``|w| dR_2/du`` (``phew``: what the PHEW and PX repositories call SynFlow-L2), ``w^2 dR_1/d|w|``
  (``author``: what the second author's code computes: the weights are not squared);
* the distributional variants, with the mean of the data at the inputs instead of ones;
* the exact loss of path-kernel trace when a weight is deleted.

Bytes: two reads of each streamed weight a round. Oracle: enumeration of all paths; conservation over cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..flow import PathFlow
from ..network import PathNetwork
from ..nodes import Norm, Product, Synapse
from ..ops import WeightMap
from ..policy import policy_of
from ..select import Bracket
from ..weights import Scaled, Weight
from .base import PathPruner, Scorer

_L2_MAPS = {
    "conservative": (WeightMap.SQUARE, WeightMap.SQUARE),
    "phew": (WeightMap.SQUARE, WeightMap.ABS),
    "author": (WeightMap.ABS, WeightMap.SQUARE),
}


@dataclass(frozen=True)
class SynFlow(PathPruner):
    """Iterative synaptic flow: keeps the weights that carry most path value ``|v_p|``. No data.

    Args:
        rounds: scores are made again under the new mask this many times (100 in the paper; 1 collapses layers).
        policy: ``published`` or ``paths`` (see ``Policy``), or a ``Policy``.
    """


@dataclass(frozen=True)
class SynFlowL2(PathPruner):
    """SynFlow of the squared network. Warning: on residual networks squared forms empty whole branches early.

    Args:
        variant: ``conservative`` (``u dR_2/du``), ``phew`` (``|w| dR_2/du``) or ``author`` (``w^2 dR_1/d|w|``).
    """

    variant: str = field(default="conservative", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _L2_MAPS:
            raise ValueError(f"SynFlowL2: variant: wanted one of {sorted(_L2_MAPS)}, got {self.variant!r}")

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        return _L2_MAPS[self.variant]


def mean_input(mean: Tensor | Iterable) -> Tensor:
    """The mean of the data: a tensor shaped like one input, or batches (``x`` or ``(x, y)``) averaged once.

    Raises:
        ValueError: no batches, or batches of different shapes.
    """
    if isinstance(mean, Tensor):
        return mean
    total, count = None, 0
    for batch in mean:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        summed = x.detach().double().sum(0)
        if total is not None and total.shape != summed.shape:
            raise ValueError(f"mean: wanted samples of one shape, got {tuple(total.shape)} and {tuple(summed.shape)}")
        total = summed if total is None else total + summed
        count += x.shape[0]
    if total is None:
        raise ValueError("mean: wanted at least one batch, got none")
    return total / count


@dataclass(frozen=True)
class SynFlowDist(SynFlow):
    """SynFlow with the mean training image at the input: the distributional variant.

    Args:
        mean: a tensor shaped like one input, values >= 0 (pixels in [0, 1], not standardised), or an iterable of
            batches that is averaged once.
    """

    mean: Tensor | Iterable = field(default=(), kw_only=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mean", mean_input(self.mean))

    def source(self) -> Tensor | None:
        return self.mean if isinstance(self.mean, Tensor) else None


@dataclass(frozen=True)
class SynFlowL2Dist(SynFlowL2):
    """SynFlow-L2 with the mean training image at the input (squared where the network is).

    Args:
        mean: as for :class:`SynFlowDist`.
        variant: as for :class:`SynFlowL2`; the second author's code is ``author``.
    """

    mean: Tensor | Iterable = field(default=(), kw_only=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mean", mean_input(self.mean))

    def source(self) -> Tensor | None:
        assert isinstance(self.mean, Tensor)
        return self.mean.square() if self.maps[0] == WeightMap.SQUARE else self.mean


@dataclass(frozen=True)
class TraceSaliency(PathPruner):
    """Keeps the weights whose deletion would lose most of the trace of the path kernel.

    Tr = sum_i dR_2/du_i over live weights. R_2 is multi-affine in u, so deleting weight j loses exactly
    ``dR/du_j + u_j (H m)_j`` with H the Hessian of R_2 and m the 0/1 mask: one gradient and one Hessian-vector
    product, made here as a forward and a backward flow that carry their derivative along m.
    """

    policy: str = field(default="paths", kw_only=True)

    @property
    def wants_merged_positions(self) -> bool:
        return False

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        return WeightMap.SQUARE, WeightMap.SQUARE

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        flow = TangentFlow(network, weights, policy=policy_of(self.policy))

        def score(guess: Bracket | None) -> float:
            total = float(flow.forward()[0])
            flow.backward()
            return total

        return score


class TangentFlow(PathFlow):
    """Flow of the squared network together with its derivative along the mask.

    The two travel as two sources, so every fixed linear map serves both; only synapses mix them.
    """

    def __init__(self, network: PathNetwork, weights: Mapping[str, Weight], **options: object) -> None:
        super().__init__(network, weights, f=WeightMap.SQUARE, **options)  # type: ignore[arg-type]
        for k in self._order:
            node = network.nodes[k]
            if isinstance(node, (Norm, Product)) or (self._fixed[k] is not None and type(node).__name__ == "Shift"):
                raise ValueError(f"TraceSaliency: wanted a network whose flow is multi-affine, got {node.where}")
        self.sources, self.batched = 2, True

    def _log2_total(self) -> Tensor:
        totals = self.values
        self.values = {k: Scaled(flow.tensor[:, :1], flow.exponent) for k, flow in totals.items()}
        result = super()._log2_total()
        self.values = totals
        return result

    def _forward_input(self, k: int, node: object, entering: list[Scaled]) -> Scaled:
        flow = super()._forward_input(k, node, entering)  # type: ignore[arg-type]
        tensor = flow.tensor.clone()
        tensor[:, 1] = 0
        return Scaled(tensor, flow.exponent)

    def _apply(self, x: Tensor, w: Tensor, node: Synapse) -> Tensor:
        """One source through a weight tensor, for traced shapes."""
        if node.form == "linear":
            return x @ w.T
        if node.form == "linear_t":
            return x @ w
        return self._geometry_conv(x, w, node)

    @staticmethod
    def _geometry_conv(x: Tensor, w: Tensor, node: Synapse) -> Tensor:
        padding = node.output_padding or (0,) * len(node.stride)
        transposed = node.form == "conv_transpose"
        return torch.convolution(x, w, None, node.stride, node.padding, node.dilation, transposed, padding, node.groups)

    def _forward_synapse(self, k: int, node: Synapse, entering: list[Scaled]) -> Scaled:
        weight = self.weights[node.weight]
        u, along = weight.effective(), self._mask(weight)
        a, tangent = entering[0].tensor[0]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (a, tangent, u, along)]
            first = self._apply(leaves[0], leaves[2], node)
            second = self._apply(leaves[1], leaves[2], node) + self._apply(leaves[0], leaves[3], node)
        self._saved[k] = (leaves, first, second, entering[0].exponent)
        return self._normalised(torch.stack([first.detach(), second.detach()])[None], entering[0].exponent)

    def _mask(self, weight: Weight) -> Tensor:
        return weight.bits().to(self.device, self.dtype)

    def _outgoing(self, k: int) -> Scaled:
        flow = super()._outgoing(k)
        flow.tensor[:, 1] = 0
        return flow

    def _backward_synapse(self, k: int, node: Synapse, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        weight = self.weights[node.weight]
        (a, tangent, u, along), first, second, exponent = self._saved.pop(k)
        flow, slope = g.tensor[0]
        # The adjoint of (first, second) at (slope, flow) is the derivative of the adjoint of first at flow.
        inward, inward_slope, hessian, gradient = torch.autograd.grad(
            (first, second), (tangent, a, u, along), (slope, flow)
        )
        if self.scored and weight.scored:
            loss = gradient + u.detach() * hessian
            weight.take_scores(loss * along.detach(), g.exponent + exponent)  # makes tied uses add up
        return [self._normalised(torch.stack([inward, inward_slope])[None], g.exponent)]
