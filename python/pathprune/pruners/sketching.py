"""Pruning at Initialization - A Sketching Perspective (Bar & Giryes 2023): draw the mask at random, with probabilities
given by the scores of a method, instead of keeping the largest.

Finding a mask at initialization is sampling the coordinates of a sketch for a matrix-vector product. Without
replacement this is Gumbel top-k: keep the largest of ``temperature^-1 * log(score) + Gumbel``. With replacement each
draw is independent of the others, as in the theory (Drineas, Kannan, Mahoney 2006): of y = sum_k w_k X_k the estimate
``(1/s) sum_t w_kt X_kt / p_kt`` from s draws is unbiased, and its squared error is smallest, with expectation
``((sum_k |w_k| |X_k|)^2 - |y|^2) / s``, for p_k in proportion to ``|w_k| |X_k|``; without data that is magnitude. Only
the title, abstract and standard sketching theory could be read; what they leave open is an option here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..network import PathNetwork
from ..select import Bracket, NonFiniteScoreError, Real, Threshold
from ..weights import Weight
from .base import Round, Scorer, Selection, Wrapper, run


@dataclass(frozen=True)
class Sketch(Wrapper):
    """Samples the mask with probabilities in proportion to ``score^(1/temperature)``.

    Args:
        base: the pruner whose scores are sampled; its rounds are the rounds.
        temperature: 1 samples in proportion to the score; towards 0 it becomes top-k.
        every_round: sample in every round; default: top-k until the last, which samples.
        replacement: False: weights are drawn one after another, each once: exactly the density asked for. True: as many
            draws, independent of each other, and the mask keeps what was drawn at least once: so fewer weights than
            the density asks for. (Drawing on until enough different ones are found would be drawing without
            replacement.) ``findings`` has ``draws`` and ``distinct``.

    What is drawn together follows ``scope``: ``global``, all weights; ``layer``, a quota of each layer; and, without
    replacement, ``row`` and ``n:m``. Zero scores are drawn only when nothing else is left, with replacement never.
    ``sample_with_replacement`` has the rescaled, unbiased form for linear models.

    Raises:
        TypeError: a base that takes weights without scoring them (PHEW).
        ValueError: a temperature that is not positive and finite.
    """

    temperature: float = 1.0
    every_round: bool = False
    replacement: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0 or math.isinf(self.temperature):
            raise ValueError(f"Sketch: temperature: wanted a positive number, got {self.temperature}")

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        return self._scorer(network, weights, seed, self.rounds)

    def _scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int, rounds: int) -> Scorer:
        base = self.base.scorer(network, weights, seed)
        done = 0

        def score(guess: Bracket | None) -> float | None:
            nonlocal done
            done += 1
            if not self.every_round and done < rounds:
                return base(guess)
            total = base(None)
            first = (done - 1) * sum(weight.shape.numel() for weight in weights.values())
            for weight in weights.values():
                if weight.scored:
                    weight.replace_scores(self._keys(weight, seed, first))
                first += weight.shape.numel()
            return total

        return score

    def steps(
        self,
        network: PathNetwork,
        selection: Selection,
        plan: Sequence[tuple[float, int | None]],
        layer_plan: Callable[[float], Mapping[str, float]],
        on_snapshot: Callable[[int], None],
        seed: int,
    ) -> Iterator[Round]:
        if not self.replacement:
            scorer = self._scorer(network, selection.all_weights, seed, len(plan))
            return run(scorer, selection, plan, layer_plan, on_snapshot)
        if selection.scope.kind not in ("global", "layer") or selection.allow_regrowth:
            raise ValueError(
                "Sketch: replacement: True wanted scope 'global' or 'layer' and no regrowth, got scope "
                f"'{selection.scope.kind}', allow_regrowth={selection.allow_regrowth}"
            )
        return self._replacing(network, selection, plan, layer_plan, on_snapshot, seed)

    def _replacing(
        self,
        network: PathNetwork,
        selection: Selection,
        plan: Sequence[tuple[float, int | None]],
        layer_plan: Callable[[float], Mapping[str, float]],
        on_snapshot: Callable[[int], None],
        seed: int,
    ) -> Iterator[Round]:
        base, first = self.base.scorer(network, selection.all_weights, seed), 0
        for done, (density, which) in enumerate(plan, 1):
            began = time.perf_counter()
            samples = self.every_round or done == len(plan)
            total = base(None if samples else selection.guess(density))
            kept, shares = selection.sizes(density, layer_plan)
            threshold, details = None, {}
            if samples:
                by_layer = shares if selection.scope.kind == "layer" else None
                draws, first, kept = self._cut_to_drawn(selection.weights, kept, by_layer, seed, first)
                details = {"draws": draws, "distinct": kept}
            else:
                threshold = selection.cut(kept, shares)
            if which is not None:
                on_snapshot(which)
            yield Round(kept, total, threshold, time.perf_counter() - began, details)

    def _cut_to_drawn(
        self, weights: Sequence[Weight], draws: int, by_layer: Mapping[str, int] | None, seed: int, first: int
    ) -> tuple[int, int, int]:
        """Draws with replacement and cuts to what was drawn. Returns draws, the next counter, and what is left."""
        chances, masses = [], []
        for weight in weights:  # relative to the largest of the tensor, which may be beyond the range of float64
            powers = (self._scores(weight).log2() + weight.written_scores().exponent) / self.temperature
            top = float(powers.max())
            if math.isnan(top) or top == math.inf:
                raise NonFiniteScoreError(f"Sketch: scores of '{weight.name}': wanted finite ones, got NaN or infinite")
            chance = torch.exp2(powers - top) if top > -math.inf else torch.zeros_like(powers)
            chances.append(chance.flatten())
            masses.append(top + math.log2(float(chance.sum())) if top > -math.inf else -math.inf)
        if max(masses) == -math.inf:
            raise ValueError("Sketch: base: wanted scores above 0 to draw from, got none")
        if by_layer is None:
            shares = torch.tensor([2.0 ** (mass - max(masses)) for mass in masses], dtype=torch.float64)
            counts = _drawn(shares, draws, seed, first).tolist()
            first += draws
        else:
            counts = [by_layer[w.name] if mass > -math.inf else 0 for w, mass in zip(weights, masses, strict=True)]
        kept = 0
        for position, (weight, chance, count) in enumerate(zip(weights, chances, counts, strict=True)):
            times = _drawn(chance, count, seed, first) if count else torch.zeros_like(chance)
            first += count
            kept += int((times > 0).sum())
            weight.replace_scores(times.double())
            weight.cut(Threshold(Real(0.0, 0), tie_tensor=-1), position)  # all that score more than 0 stay
        return sum(counts), first, kept

    @staticmethod
    def _scores(weight: Weight) -> Tensor:
        """The scores of one tensor, >= 0, float64 [G, O, K], without their exponent."""
        made = weight.written_scores()
        scores = ops.through_flow(made.weight, made.mask, None, None, made.s, columns=made.columns)
        if bool((scores < 0).any()):
            raise ValueError(f"Sketch: base: wanted scores >= 0, got negative ones of '{weight.name}'")
        return scores.double()

    def _keys(self, weight: Weight, seed: int, first: int) -> Tensor:
        """Sampling keys of one tensor; a score of zero sorts below every other."""
        exponent = weight.written_scores().exponent
        keys = ops.gumbel_keys(self._scores(weight), exponent, 1.0 / self.temperature, seed, first)
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
    counts = _drawn(flat, draws, seed, 0)
    factors = torch.where(counts > 0, counts * total / (draws * flat.clamp(min=5e-324)), 0.0)
    return counts.reshape(scores.shape), factors.reshape(scores.shape)


def _drawn(masses: Tensor, draws: int, seed: int, first: int) -> Tensor:
    """How often each of ``masses`` [n], float64, not all zero, is drawn; the draws take counters from ``first`` on."""
    edges = masses.cumsum(0) / masses.sum()
    gumbel = ops.gumbel_keys(torch.ones(draws, dtype=torch.float64, device=masses.device), 0, 1.0, seed, first)
    points = torch.exp(-torch.exp(-gumbel))  # the uniforms they were made from
    found = torch.searchsorted(edges, points, right=True).clamp_(max=int(masses.nonzero()[-1]))
    return torch.bincount(found, minlength=masses.numel())
