"""The data-free baselines: weight magnitude, and chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import ops
from ..network import PathNetwork
from ..ops import WeightMap
from ..select import Bracket
from ..weights import Weight
from .base import Pruner, Scorer


@dataclass(frozen=True)
class _Static(Pruner):
    """A method whose scores are the same in every round: rounds change nothing, and every density has its own."""

    @property
    def needs_paths(self) -> bool:
        return False

    def rounds_for(self, densities: Sequence[float]) -> int:
        return max(self.rounds, len(densities))

    @property
    def scores_shards(self) -> bool:
        return True


@dataclass(frozen=True)
class Magnitude(_Static):
    """Keeps the largest ``|w|``.

    Determinism: the same weights give the same masks; of equal ones those stay that come first.

    Example:
        >>> masks = pp.prune(model, pp.Magnitude(), sparsity=0.9)
    """

    @property
    def resumes(self) -> bool:
        return True

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        return WeightMap.ABS, WeightMap.ABS

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        def score(guess: Bracket | None) -> None:
            for weight in weights.values():
                if weight.scored:
                    weight.score_by_itself()

        return score


@dataclass(frozen=True)
class Random(_Static):
    """Keeps weights at random, each set of the right size equally likely.

    Determinism: ``prune``'s seed and the shapes of the weights give the masks, on any device.

    Example:
        >>> masks = pp.prune(model, pp.Random(), sparsity=0.9, seed=1)
    """

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        def score(guess: Bracket | None) -> None:
            first = 0
            for weight in weights.values():
                if weight.scored:
                    weight.settle()
                    equal = torch.ones(weight.rows, device=network.device)
                    weight.replace_rows(ops.gumbel_keys(equal, 0, 1.0, seed, first + weight.first))
                first += weight.shape.numel()

        return score
