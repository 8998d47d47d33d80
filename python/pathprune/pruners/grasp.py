"""Picking Winning Tickets Before Training by Preserving Gradient Flow (Wang, Zhang, Grosse 2020): GraSP.

Moving the weights by d changes the squared norm of the gradient by ``2 d . H g`` to first order, so deleting weight j
(d = -w_j) changes it by ``-2 w_j (H g)_j``. The paper's score is ``-w (H g)``, and the weights with the LARGEST score
go: those whose deletion adds to the gradient flow. Hence we keep the largest ``w (H g)``.

Published codes differ. Synaptic-Flow stores ``w (H g) / (|sum| + 1e-10)`` and removes the lowest, which is the same;
its sign was inverted until commit e329c2e, and still is in the code of A Unified Paths Perspective. ``|w (H g)|``
(Frankle et al. 2021) is another method. The GraSP repository divides logits by 200, draws linear weights anew and keeps
ties; we neither draw nor keep ties.

Oracle: a quadratic of two weights by hand; the Hessian by torch.func in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..network import PathNetwork
from ..select import Bracket
from ..weights import Weight
from .base import Scorer
from .curvature import hessian_product, hessian_product_by_differences
from .objective import DataPruner, Objective, masked

METHODS = ("double_backward", "finite_difference")


@dataclass(frozen=True)
class GraSP(DataPruner):
    """Keeps the weights with the largest ``w (H g)``; g and H are of the mean loss of ``logits / temperature``.

    Scores are signed. Pruned weights never compete, so with more rounds their 0 does not beat a negative score.

    Args:
        data, loss, train_mode: see :class:`DataPruner`. Read twice (``double_backward``) or three times; g is that of
            all batches together.
        temperature: of the logits; 200 in the paper, 1 for losses that are not of logits.
        method: ``double_backward``: exact, the published way; keeps the graph of a gradient. ``finite_difference``: two
            more gradients, in the memory of one, for SMOOTH models whose gradient has no derivative in torch. With
            ReLUs it is another method: differences also count the kinks they cross, at any step that float64 can do
            (of VGG-16's best 5 % the two share a quarter, of ResNet-20's five sixths).
        step: of the differences, as a fraction of the length of all weights; None: the type's precision to 1/3.

    Determinism: the same data, weights and seed give the same masks.

    Example:
        >>> masks = pathprune.prune(model, pathprune.GraSP(batches), density=0.05, example_input=x)
    """

    temperature: float = field(default=200.0, kw_only=True)
    method: str = field(default="double_backward", kw_only=True)
    step: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"GraSP: temperature: wanted a positive number, got {self.temperature}")
        if self.method not in METHODS:
            raise ValueError(f"GraSP: method: wanted one of {METHODS}, got {self.method!r}")
        if self.step is not None and not (self.step > 0 and math.isfinite(self.step)):
            raise ValueError(f"GraSP: step: wanted a positive number, got {self.step}")

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        objective = Objective(self, network, weights, seed, self.temperature)

        def score(guess: Bracket | None) -> None:
            point = objective.point()
            flow = {name: masked(slope, weights[name]) for name, slope in objective.gradient(point).items()}
            if self.method == "double_backward":
                product = hessian_product(objective, point, flow)
            else:
                product = hessian_product_by_differences(objective, point, flow, self.step)
            for name, along in product.items():
                weights[name].replace_scores(along.mul_(point[name].detach()))

        return score
