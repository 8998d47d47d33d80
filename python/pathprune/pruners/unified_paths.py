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

from ..network import PathNetwork
from ..ops import WeightMap
from ..policy import policy_of
from ..select import Bracket
from ..tangent import TangentFlow
from ..weights import Weight
from .base import PathPruner, Scorer

_L2_MAPS = {
    "conservative": (WeightMap.SQUARE, WeightMap.SQUARE),
    "phew": (WeightMap.SQUARE, WeightMap.ABS),
    "author": (WeightMap.ABS, WeightMap.SQUARE),
}


@dataclass(frozen=True)
class SynFlow(PathPruner):
    """Iterative synaptic flow: keeps the weights that carry most path value ``|v_p|``. No data.

    The score is ``|w| dR/d|w|`` with ``R = 1' |W_L| ... |W_1| 1`` (Tanaka et al. 2020).

    Args:
        rounds: scores are made again under the new mask this many times (100 in the paper; 1 collapses layers).
        policy: ``published`` or ``paths`` (see ``Policy``), or a ``Policy``.

    Determinism: no chance; the same masks on any number of threads.

    Example:
        >>> masks = pp.prune(model, pp.SynFlow(rounds=100), density=0.05, example_input=x)
    """


@dataclass(frozen=True)
class SynFlowL2(PathPruner):
    """SynFlow of the squared network. Warning: on residual networks squared forms empty whole branches early.

    Args:
        variant: ``conservative`` (``u dR_2/du``), ``phew`` (``|w| dR_2/du``) or ``author`` (``w^2 dR_1/d|w|``).
        rounds, policy: as for :class:`SynFlow`.
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
        TypeError: neither, or batches whose inputs are no tensor.
        ValueError: no batches, or batches of different shapes.
    """
    if isinstance(mean, Tensor):
        return mean
    if isinstance(mean, str) or not isinstance(mean, Iterable):
        raise TypeError(f"mean: wanted a tensor or batches, got {type(mean).__name__}")
    total, count = None, 0
    for batch in mean:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor) or x.dim() == 0:
            got = "a tensor without axes" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"mean: wanted batches x or (x, y), x a tensor [n, *sample], got {got}")
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
        rounds, policy: as for :class:`SynFlow`.

    Example:
        >>> masks = pp.prune(model, pp.SynFlowDist(loader), density=0.05, example_input=x)
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
        rounds, policy: as for :class:`SynFlow`.
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
    product (:mod:`pathprune.tangent`).

    Args:
        rounds, policy: as for :class:`SynFlow`; the default policy is ``paths``.
    """

    policy: str = field(default="paths", kw_only=True)

    @property
    def scores_shards(self) -> bool:
        return False  # a Hessian product takes directions of the weights' size

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        return WeightMap.SQUARE, WeightMap.SQUARE

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        flow = TangentFlow(network, weights, policy_of(self.policy))

        def take(weight: Weight, gradient: Tensor | None, product: Tensor, exponent: Tensor) -> None:
            assert gradient is not None
            loss = torch.addcmul(gradient, weight.effective().reshape(gradient.shape), product)
            weight.take_scores(loss.mul_(_left(weight, loss)), exponent)  # the uses of a tied weight add up

        def score(guess: Bracket | None) -> float:
            masks = {name: _left(weight, weight.effective()) for name, weight in weights.items()}
            return flow.run(masks, take)

        return score


def _left(weight: Weight, like: Tensor) -> Tensor:
    """1 where a weight is left, 0 where it is not."""
    return weight.bits().to(like)
