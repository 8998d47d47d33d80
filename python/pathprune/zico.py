"""ZiCo (Li et al., ICLR 2023): how large and how steady a network's gradients are over batches.

With g_k the gradient of the loss on batch k at the network as it is,

    ZiCo = sum over layers of log( sum over weights of  mean_k |g_k| / std_k(g_k) ),

std over the batches, not over n - 1 of them. Weights whose gradient does not vary are left out, layers in which none
varies too. The published code keeps every gradient of every batch as a numpy array; here mean and deviation are brought
forward batch by batch (Welford), in three numbers a weight, and nothing leaves the device.

Oracle: all gradients kept, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .network import PathNetwork
from .ops import WeightMap
from .pruners.objective import Accumulator, DataPruner, Objective
from .weights import weights_of


class _Welford(Accumulator):
    """Mean of the magnitude, mean and summed square deviation of each gradient over the batches."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__(leaves)
        self.batches = 0
        self.magnitude: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}
        self.deviation: dict[str, Tensor] = {}
        self._missing: set[str] = set()

    def begin(self, samples: int, passes: int = 1) -> None:
        self.finish()
        super().begin(samples, passes)
        self.batches += 1
        self._missing = set(self.leaves)

    def finish(self) -> None:
        """Closes a batch: what its loss did not reach had a gradient of 0."""
        for name in self._missing & set(self.average):
            self.add(name, torch.zeros_like(self.average[name]))

    def add(self, name: str, term: Tensor) -> None:
        if name not in self.average:  # batches before, if any, had a gradient of 0
            for sums in (self.magnitude, self.average, self.deviation):
                sums[name] = torch.zeros_like(term)
        self._missing.discard(name)
        self.magnitude[name].add_(term.abs().sub_(self.magnitude[name]), alpha=1 / self.batches)
        before = term - self.average[name]
        self.average[name].add_(before, alpha=1 / self.batches)
        self.deviation[name].addcmul_(before, term.sub_(self.average[name]))


def zico(network: PathNetwork, method: DataPruner, seed: int = 0) -> float:
    """The ZiCo score of a network that was read from a module; natural logarithm, 0 if no gradient varies.

    Args:
        method: whose data (two batches or more), loss and mode; every batch counts alike.
        seed: of what the model draws.

    Raises:
        ValueError: fewer than two batches; what the data or the loss are refused for.
    """
    weights = weights_of(network, network.prunable, (WeightMap.IDENTITY, WeightMap.IDENTITY))
    objective = Objective(method, network, weights, seed)
    point = objective.point()
    seen = _Welford(objective.leaves(point))
    with objective.undisturbed(), seen:
        for position, batch in objective.batches():
            seen.begin(batch.size)
            objective.loss(point, batch, position).backward(inputs=seen.inputs)
        seen.finish()
    if seen.batches < 2:
        raise ValueError(f"ZiCo: data: wanted at least two batches, got {seen.batches}")
    total = 0.0
    for name in seen.average:
        spread = seen.deviation[name].div_(seen.batches).sqrt_()
        varies = spread > 0
        steady = float((seen.magnitude[name][varies].double() / spread[varies].double()).sum())
        total += math.log(steady) if steady > 0 else 0.0
    return total
