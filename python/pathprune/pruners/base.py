"""The loop every pruner shares: score, select, cut, repeat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..distributed import ALONE, Group
from ..flow import PathFlow
from ..network import PathNetwork
from ..ops import WeightMap
from ..policy import Policy, policy_of
from ..row_selection import cut_rows, row_length
from ..select import Bracket, Real, Threshold, select
from ..weights import Weight

Scorer = Callable[[Bracket | None], float | None]
"""Makes the scores of every scored weight under its present mask; returns log2 R where there is one."""


@dataclass(frozen=True)
class Pruner:
    """Configuration of a method. Pruners hold no state and no randomness: the seed is an argument of ``prune``."""

    rounds: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.rounds, int):
            raise TypeError(f"{type(self).__name__}: rounds: wanted an int, got {self.rounds!r}")
        if self.rounds < 1:
            raise ValueError(f"{type(self).__name__}: rounds: wanted at least 1, got {self.rounds}")

    def rounds_for(self, densities: Sequence[float]) -> int:
        """How many rounds reach these densities."""
        return self.rounds

    @property
    def merged_under(self) -> Policy | None:
        """The policy under which equal positions may be computed once (see ``spatial``); None: they may not."""
        return None

    @property
    def scores_shards(self) -> bool:
        """Whether weights may stay spread over ranks while they are scored; else every rank gathers them all."""
        return False

    @property
    def needs_paths(self) -> bool:
        """Whether the method looks beyond single layers, at the paths through the network."""
        return True

    @property
    def scope(self) -> str:
        """Over what scores compete unless ``prune`` is told otherwise."""
        return "global"

    @property
    def regrows(self) -> bool:
        """Whether pruned weights may return in later rounds unless ``prune`` is told otherwise."""
        return False

    @property
    def resumes(self) -> bool:
        """Whether a round depends on nothing but the masks before it, the weights and the plan, and is run by
        :func:`run`: rounds that have been done once need not be done again."""
        return False

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        """Weight maps of flow and score."""
        return WeightMap.ABS, WeightMap.ABS

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        """Binds the method to a network and the weights to be scored."""
        raise NotImplementedError(
            f"{self.name}: wanted a method scorer(network, weights, seed) that makes scores, got none"
        )

    def steps(
        self,
        network: PathNetwork,
        selection: Selection,
        plan: Sequence[tuple[float, int | None]],
        layer_plan: Callable[[float], Mapping[str, float]],
        on_snapshot: Callable[[int], None],
        seed: int,
    ) -> Iterator[Round]:
        """Prunes ``selection.weights`` round by round: by default score, select, cut. See :func:`run`."""
        scorer = self.scorer(network, selection.all_weights, seed)
        return run(scorer, selection, plan, layer_plan, on_snapshot)

    def config(self) -> dict[str, Any]:
        """What is worth writing beside a mask."""
        return {key: value for key, value in self.__dict__.items() if isinstance(value, (int, float, str, bool))}


def require_pruner(pruner: object, who: str) -> None:
    """Raises TypeError for what is no pruner: a name, or a class that was not called."""
    if isinstance(pruner, Pruner):
        return
    got = f"str {pruner!r}" if isinstance(pruner, str) else type(pruner).__name__
    if isinstance(pruner, type):
        got = f"{pruner.__name__}, the class: write {pruner.__name__}()"
    raise TypeError(f"{who}: wanted a pruner such as SynFlow(), got {got}")


def require_scores(pruner: object, who: str) -> None:
    """Raises TypeError for what is no pruner, or takes weights without scoring them."""
    require_pruner(pruner, who)
    assert isinstance(pruner, Pruner)
    if type(pruner).scorer is Pruner.scorer:
        raise TypeError(f"{who}: wanted a pruner that scores weights, got {pruner.name}, which does not")


@dataclass(frozen=True)
class Wrapper(Pruner):
    """A method that makes something else of another's scores; its rounds are the other's.

    Raises:
        TypeError: a base that takes weights without scoring them (PHEW).
    """

    base: Pruner
    rounds: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        require_scores(self.base, f"{self.name}: base")
        object.__setattr__(self, "rounds", self.base.rounds)

    def rounds_for(self, densities: Sequence[float]) -> int:
        return self.base.rounds_for(densities)

    @property
    def merged_under(self) -> Policy | None:
        return self.base.merged_under

    @property
    def needs_paths(self) -> bool:
        return self.base.needs_paths

    @property
    def scope(self) -> str:
        return self.base.scope

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        return self.base.maps

    @property
    def regrows(self) -> bool:
        return self.base.regrows

    def config(self) -> dict[str, Any]:
        return {**super().config(), "base": {"method": self.base.name, **self.base.config()}}


@dataclass(frozen=True)
class PathPruner(Pruner):
    """A method whose score is the sum over paths through a weight."""

    rounds: int = field(default=100, kw_only=True)
    policy: str | Policy = field(default="published", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        policy_of(self.policy)

    def source(self) -> Tensor | None:
        """The flow at the inputs; None for ones."""
        return None

    @property
    def merged_under(self) -> Policy | None:
        return policy_of(self.policy) if self.source() is None else None

    @property
    def scores_shards(self) -> bool:
        return True

    @property
    def resumes(self) -> bool:
        return True

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        flow = PathFlow(network, weights, f=self.maps[0], policy=policy_of(self.policy), source=self.source())

        def score(guess: Bracket | None) -> float:
            total = float(flow.forward()[0])
            for weight in weights.values():
                weight.compact_when_sparse()
            flow.backward(guess)
            return total

        return score


@dataclass(frozen=True)
class Scope:
    """Over which sets of weights the scores compete.

    ``kind``: ``global``; ``layer`` (each tensor, by ``densities``); ``row`` (each output unit); ``n:m`` (n of every m
    weights along the input axis). Of a transposed convolution a row is an input unit, as it is stored.
    """

    kind: str
    n: int = 0
    m: int = 0

    @staticmethod
    def of(text: str) -> Scope:
        if not isinstance(text, str):
            raise TypeError(f"scope: wanted 'global', 'layer', 'row' or 'n:m' such as '2:4', got {text!r}")
        if text in ("global", "layer", "row"):
            return Scope(text)
        parts = text.split(":")
        if len(parts) == 2 and all(part.isdigit() for part in parts) and 0 < int(parts[0]) < int(parts[1]):
            return Scope("n:m", int(parts[0]), int(parts[1]))
        raise ValueError(f"scope: wanted 'global', 'layer', 'row' or 'n:m' such as '2:4', got {text!r}")


@dataclass
class Round:
    """What happened in one round."""

    kept: int
    log2_total: float | None
    threshold: Real | None
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)  # what only this method knows; goes into the findings


class Selection:
    """Cuts the weights to a density, round after round, and guesses the next threshold from the last ones.

    ``group``: the ranks over which the weights' rows are spread. ``before_cut`` is called when a round has been scored
    and the masks are still those of the round before.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        names: Sequence[str],
        scope: Scope,
        count: str = "exact",
        allow_regrowth: bool = False,
        group: Group = ALONE,
    ) -> None:
        self.all_weights, self.group = weights, group
        self.weights = [weights[name] for name in names]
        self.scope, self.count, self.allow_regrowth = scope, count, allow_regrowth
        self.total = sum(weight.shape.numel() for weight in self.weights)
        self.before_cut: Callable[[], None] = lambda: None
        self._forecast = Forecast()
        self._guess: Bracket | None = None

    def guess(self, density: float) -> Bracket | None:
        """A bracket around the threshold of the round that goes to ``density``."""
        usable = self.scope.kind == "global" and not self.allow_regrowth
        self._guess = self._forecast.bracket(density) if usable else None
        return self._guess

    def sizes(self, density: float, layer_plan: Callable[[float], Mapping[str, float]]) -> tuple[int, dict[str, int]]:
        """How many weights stay at that density in all, and of each layer (or each of its rows)."""
        shares, planned = {}, layer_plan(density)
        for weight in self.weights:
            size = row_length(weight) if self.scope.kind in ("row", "n:m") else weight.shape.numel()
            shares[weight.name] = max(round(size * planned[weight.name]), 1 if size else 0)
        if self.scope.kind == "layer":
            return sum(shares.values()), shares
        if self.scope.kind == "row":
            return sum(w.shape.numel() // max(row_length(w), 1) * shares[w.name] for w in self.weights), shares
        return self.kept_at(density), shares

    def kept_at(self, density: float) -> int:
        """How many weights stay at that density in all.

        Raises:
            ValueError: of weights that compete with one another, none.
        """
        published = self.count == "published"
        keep = self.total - int((1.0 - density) * self.total) if published else round(self.total * density)
        if not keep and self.scope.kind == "global":
            raise ValueError(f"prune: density: wanted one that keeps a weight, got {density:.3g} of {self.total}")
        return keep

    def cut(self, keep: int, shares: Mapping[str, int]) -> Real | None:
        """Cuts to ``keep`` weights in all, or to ``shares`` of each layer. Returns the global threshold."""
        self.before_cut()
        if self.allow_regrowth:
            for weight in self.weights:
                weight.allow_return()
        if self.scope.kind in ("row", "n:m"):
            for weight in self.weights:
                cut_rows(weight, shares[weight.name], self.scope.n, self.scope.m)
            return None
        if self.scope.kind == "layer":
            for weight in self.weights:
                weight.cut(self._threshold([weight], shares[weight.name], None), 0)
            return None
        threshold = self._threshold(self.weights, keep, self._guess)
        for position, weight in enumerate(self.weights):
            weight.cut(threshold, position)
        self._forecast.observe(keep / self.total, threshold.value)
        return threshold.value

    def _threshold(self, weights: Sequence[Weight], keep: int, guess: Bracket | None) -> Threshold:
        sources = [weight.scores for weight in weights]
        collected = None
        if guess is not None and any(weight.collected is not None for weight in weights):
            collected = [w.collected or w.scores.collect(guess, w.scores.capacity) for w in weights]
        if self.count == "exact":
            return select(sources, keep, guess, collected, self.group)
        return self._published(weights, sources, keep, guess, collected)

    def _published(
        self, weights: Sequence[Weight], sources: Any, keep: int, guess: Bracket | None, collected: Any
    ) -> Threshold:
        """The published rule: the k-th smallest of all scores, pruned ones (0) included; all scores up to it go."""
        everything = sum(weight.shape.numel() for weight in weights)
        here = sum(source.numel if source.mask is None else int(ops.mask_count(source.mask)) for source in sources)
        live = int(self.group.sum_(torch.tensor(here, device=sources[0].weight.device)))
        if keep == everything:  # k < 1: nothing happens
            return Threshold(Real(-math.inf, 0))
        if keep + 1 > live:
            return Threshold(Real(0.0, 0), tie_tensor=-1)
        return Threshold(select(sources, keep + 1, guess, collected, self.group).value, tie_tensor=-1)


class Forecast:
    """The next threshold from the last ones.

    Its logarithm is continued by a line or a parabola, over the rounds (an exponential schedule late) or over the
    logarithm of what is gone (small scores are spread evenly, so early thresholds grow with it): whichever came
    closer lately, give or take three times the error it made.
    """

    _WAYS = ((0, 2), (0, 3), (1, 2), (1, 3))  # (coordinate, points)

    def __init__(self) -> None:
        self._points: list[tuple[tuple[float, float], float]] = []  # (coordinates, log2 threshold), newest first
        self._errors: dict[int, float] = {}

    def _place(self, density: float) -> tuple[float, float]:
        rounds = self._points[0][0][0] + 1 if self._points else 0.0
        return rounds, math.log(max(1.0 - density, 1e-12))

    def _continued(self, which: int, density: float) -> float | None:
        """Lagrange's polynomial through the last points."""
        axis, count = self._WAYS[which]
        points = [(place[axis], level) for place, level in self._points[:count]]
        x = self._place(density)[axis]
        if len(points) < count or len({at for at, _ in points}) < count:
            return None
        total = 0.0
        for k, (at, level) in enumerate(points):
            others = [other for j, (other, _) in enumerate(points) if j != k]
            total += level * math.prod((x - other) / (at - other) for other in others)
        return total

    def bracket(self, density: float) -> Bracket | None:
        """An interval that probably holds the threshold of that density; None while there is nothing to judge by."""
        ways = {which: self._continued(which, density) for which in self._errors}
        known = {which: centre for which, centre in ways.items() if centre is not None}
        if not known:
            return None
        best = min(known, key=lambda which: self._errors[which])
        width = min(max(3.0 * self._errors[best], 0.003), 0.5)
        return Bracket(_power(known[best] - width), _power(known[best] + width))

    def observe(self, density: float, threshold: Real) -> None:
        """Takes in the threshold that was found."""
        level = threshold.log2()
        if not math.isfinite(level):
            self._points.clear()
            self._errors.clear()
            return
        for which in range(len(self._WAYS)):
            expected = self._continued(which, density)
            if expected is not None:
                self._errors[which] = max(abs(level - expected), 0.8 * self._errors.get(which, 0.0))
        self._points = [(self._place(density), level), *self._points[:2]]


def _power(level: float) -> Real:
    whole = math.floor(level)
    return Real.of(2.0 ** (level - whole), whole)


def run(
    scorer: Scorer,
    selection: Selection,
    plan: Sequence[tuple[float, int | None]],
    layer_plan: Callable[[float], Mapping[str, float]],
    on_snapshot: Callable[[int], None],
    *,
    tick: Callable[[Round], None] = lambda _: None,
) -> Iterator[Round]:
    """Runs the rounds of ``plan`` (see ``schedules.rounds_of``), yielding what each did.

    ``on_snapshot(which)`` is called when the masks of the which-th density are complete.
    """
    for density, which in plan:
        began = time.perf_counter()
        total = scorer(selection.guess(density))
        keep, shares = selection.sizes(density, layer_plan)
        threshold = selection.cut(keep, shares)
        if which is not None:
            on_snapshot(which)
        done = Round(keep, total, threshold, time.perf_counter() - began)
        tick(done)
        yield done
