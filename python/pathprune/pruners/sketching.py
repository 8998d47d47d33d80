"""Pruning at Initialization - A Sketching Perspective (Bar & Giryes 2023): draw the mask at random, with probabilities
given by the scores of a method, instead of keeping the largest.

Finding a mask at initialization is sampling the coordinates of a sketch for a matrix-vector product. Without
replacement this is Gumbel top-k: keep the largest of ``temperature^-1 * log(score) + Gumbel``. Only the title, abstract
and standard sketching theory could be read; what they leave open is an option here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..network import PathNetwork
from ..ops import WeightMap
from ..select import Bracket
from ..weights import Weight
from .base import Pruner, Scorer


@dataclass(frozen=True)
class Sketch(Pruner):
    """Samples the mask with probabilities in proportion to ``score^(1/temperature)``, without replacement.

    Args:
        base: the pruner whose scores are sampled; its rounds are the rounds.
        temperature: 1 samples in proportion to the score; towards 0 it becomes top-k.
        every_round: sample in every round; default: top-k until the last, which samples.

    Zero scores are drawn only when nothing else is left. ``sample_with_replacement`` has the estimator of the theory.
    """

    base: Pruner
    temperature: float = 1.0
    every_round: bool = False
    rounds: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not self.temperature > 0 or math.isinf(self.temperature):
            raise ValueError(f"Sketch: temperature: wanted a positive number, got {self.temperature}")
        object.__setattr__(self, "rounds", self.base.rounds)

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        return self.base.maps

    @property
    def regrows(self) -> bool:
        return self.base.regrows

    def config(self) -> dict[str, Any]:
        return {**super().config(), "base": {"method": self.base.name, **self.base.config()}}

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        base = self.base.scorer(network, weights, seed)
        done = 0

        def score(guess: Bracket | None) -> float | None:
            nonlocal done
            done += 1
            if not self.every_round and done < self.rounds:
                return base(guess)
            total = base(None)
            first = (done - 1) * sum(weight.shape.numel() for weight in weights.values())
            for weight in weights.values():
                if weight.scored:
                    weight.replace_scores(self._keys(weight, seed, first))
                first += weight.shape.numel()
            return total

        return score

    def _keys(self, weight: Weight, seed: int, first: int) -> Tensor:
        """Sampling keys of one tensor; a score of zero sorts below every other."""
        made = weight.written_scores()
        scores = ops.through_flow(made.weight, made.mask, None, None, made.s, columns=made.columns)
        if bool((scores < 0).any()):
            raise ValueError(
                f"Sketch: base: wanted scores >= 0, got negative ones of '{weight.name}' ({self.base.name})"
            )
        keys = ops.gumbel_keys(scores, made.exponent, 1.0 / self.temperature, seed, first)
        return torch.nan_to_num(keys, neginf=torch.finfo(torch.float64).min)


def sample_with_replacement(scores: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Coordinates drawn independently with probability p in proportion to the score: the sketch of the theory.

    Args:
        scores: any shape, >= 0, not all zero.
        draws: s, at least 1.
        seed: the draws depend on nothing else.

    Returns:
        counts (int64) and factors ``count / (s p)`` (float64, 0 where not drawn), shaped like ``scores``.
        For weights w, ``sum(factors * w * x)`` is an unbiased estimate of ``sum(w * x)``, with variance
        ``((sum |w x|^2 / p) - (sum w x)^2) / s``.

    Raises:
        ValueError: negative, non-finite or all-zero scores, or no draws.
    """
    if draws < 1:
        raise ValueError(f"sample_with_replacement: draws: wanted at least 1, got {draws}")
    flat = scores.detach().double().flatten()
    total = flat.sum()
    if not bool(torch.isfinite(flat).all()) or bool((flat < 0).any()) or not float(total) > 0:
        raise ValueError("sample_with_replacement: scores: wanted finite values >= 0, not all zero")
    edges = flat.cumsum(0) / total
    gumbel = ops.gumbel_keys(torch.ones(draws, dtype=torch.float64, device=flat.device), 0, 1.0, seed, 0)
    points = torch.exp(-torch.exp(-gumbel))  # the uniforms they were made from
    drawn = torch.searchsorted(edges, points, right=True).clamp_(max=int(flat.nonzero()[-1]))
    counts = torch.bincount(drawn, minlength=flat.numel())
    factors = torch.where(counts > 0, counts * total / (draws * flat.clamp(min=5e-324)), 0.0)
    return counts.reshape(scores.shape), factors.reshape(scores.shape)
