"""The data-free baselines: weight magnitude, and chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .. import ops
from ..network import PathNetwork
from ..ops import WeightMap
from ..select import Bracket
from ..weights import Weight
from .base import Pruner, Scorer


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Keeps the largest ``|w|``. Rounds change nothing."""

    @property
    def needs_paths(self) -> bool:
        return False

    @property
    def scores_shards(self) -> bool:
        return True

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
class Random(Pruner):
    """Keeps weights at random, each set of the right size equally likely. The same seed gives the same masks."""

    @property
    def needs_paths(self) -> bool:
        return False

    @property
    def scores_shards(self) -> bool:
        return True

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
