"""Exact selection over any number of score tensors, without concatenating, sorting or even writing the scores.

The k-th largest score is found by bracketing: a guess [lo, hi], one pass that counts the scores above it and collects
those inside, and an exact k-th among the few collected. Counts prove the guess right or wrong, so the result is exact
whatever the guess was: the last round's threshold, a histogram of every n-th word, or a histogram of all.

A score is a real number ``value * 2^exponent`` with one exponent per tensor. Ties at the threshold are kept in the
order of the tensors, then of the flat index, so that exactly ``keep`` weights stay.

Bytes: one read of what the scores are made of per pass; two or three passes cold, one when the guess holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from . import ops
from .checks import WORD
from .ops import WeightMap
from .reals import Real

_SAMPLE_STRIDE = 64  # words between two of a sampled histogram
_EVERYTHING = 2**62


@dataclass(frozen=True)
class Scores:
    """The scores of one tensor: what they are made of (:mod:`pathprune.ops`), or the scores themselves.

    Attributes:
        name: for messages.
        weight: [G, O, K] or packed values; scores written out when ``x`` is None and ``s`` is IDENTITY.
        mask: int16 row words of the weights that take part; None means all.
        x, g: flows [G, T, K] and [G, T, O] or None.
        s: the score's weight map.
        exponent: a score is its value times 2^exponent.
        used: called when the weight has been read through.
    """

    name: str
    weight: Tensor
    columns: int
    mask: Tensor | None = None
    x: Tensor | None = None
    g: Tensor | None = None
    s: ops.WeightMap = ops.WeightMap.IDENTITY
    exponent: int = 0
    layout: Tensor | None = None
    row_start: Tensor | None = None
    used: Callable[[], None] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def numel(self) -> int:
        """Weights that may take part, masked ones included."""
        if self.layout is None:
            return self.weight.numel()
        return self.layout.shape[0] * self.layout.shape[1] * self.columns

    @property
    def capacity(self) -> int:
        """How many scores a pass may collect: all of a small tensor, a sixty-fourth of a large one."""
        return min(self.numel, max(self.numel // 64, 2**18))

    def packing(self) -> dict[str, object]:
        return {"layout": self.layout, "row_start": self.row_start, "columns": self.columns}

    def collect(self, bracket: Bracket, capacity: int) -> Collected:
        found = ops.through_flow_collect(*self._made, *bracket.local(self), capacity, **self.packing())  # type: ignore[arg-type]
        self._read()
        return Collected(*found)

    def histogram(self, stride: int) -> tuple[Tensor, Tensor]:
        found = ops.through_flow_histogram(*self._made, stride, **self.packing())  # type: ignore[arg-type]
        self._read()
        return found

    def nth(self, threshold: Real, n: int) -> int:
        bounds = (threshold.at_least(self.exponent, self.dtype), threshold.above(self.exponent, self.dtype))
        found = int(ops.through_flow_nth(*self._made, *bounds, n, **self.packing()))  # type: ignore[arg-type]
        self._read()
        return found

    def prune_(self, threshold: Threshold, position: int) -> None:
        """Clears the bits of ``mask`` that the threshold does not keep."""
        if self.mask is None:
            raise ValueError(f"Scores.prune_: {self.name}: wanted a mask to write to, got None")
        ops.through_flow_prune_(*self._made, *threshold.local(self, position), **self.packing())  # type: ignore[arg-type]
        self._read()

    def written(self) -> Tensor:
        """The scores as a tensor [G, O, K], 0 where the mask is."""
        found = ops.through_flow(*self._made, **self.packing())  # type: ignore[arg-type]
        self._read()
        return found

    def rows(self, first: int, last: int) -> Scores:
        """The scores of some rows of every group; of dense weights only."""
        weight = self.weight[:, first:last].contiguous()
        mask = None if self.mask is None else self.mask[:, first:last].contiguous()
        g = None if self.g is None else self.g[..., first:last].contiguous()
        return replace(self, weight=weight, mask=mask, g=g, used=None)

    def block(self, first: int, last: int) -> Scores:
        """The scores of some columns, from a multiple of a mask word on; of dense weights only."""
        weight = self.weight[..., first:last].contiguous()
        mask = None if self.mask is None else self.mask[..., first // WORD : ops.words(last)].contiguous()
        x = None if self.x is None else self.x[..., first:last].contiguous()
        return replace(self, weight=weight, columns=weight.shape[-1], mask=mask, x=x, used=None)

    @property
    def _made(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, WeightMap]:
        return self.weight, self.mask, self.x, self.g, self.s

    def _read(self) -> None:
        if self.used is not None:
            self.used()


@dataclass(frozen=True)
class Bracket:
    """An interval guessed to hold the threshold."""

    lo: Real
    hi: Real

    def local(self, scores: Scores) -> tuple[float, float]:
        """The interval in the units of one tensor, as values of its type."""
        lo = self.lo.at_least(scores.exponent, scores.dtype)
        above = self.hi.above(scores.exponent, scores.dtype)
        kind = np.float64 if scores.dtype == torch.float64 else np.float32
        with np.errstate(over="ignore"):
            return lo, float(np.nextafter(kind(above), kind(-np.inf)))  # v <= hi exactly when v < above


@dataclass(frozen=True)
class Collected:
    """What one pass found in one tensor: see ``ops.through_flow_collect``."""

    values: Tensor  # [capacity]
    counts: Tensor  # int64 [4]: above, inside, not finite, live
    extremes: Tensor  # float64 [2]: smallest and largest inside


@dataclass(frozen=True)
class Threshold:
    """The rule ``keep iff score > value, or score == value and it comes before (tie_tensor, tie_index)``.

    Attributes:
        value: the smallest score kept.
        tie_tensor, tie_index: position of the first tie that goes: tensor in the given order, then flat index.
    """

    value: Real
    tie_tensor: int = _EVERYTHING
    tie_index: int = 0

    def local(self, scores: Scores, position: int) -> tuple[float, float, int]:
        """(at_least, above, cut) for the tensor at ``position`` of the selection."""
        cut = _EVERYTHING if position < self.tie_tensor else self.tie_index if position == self.tie_tensor else 0
        return (
            self.value.at_least(scores.exponent, scores.dtype),
            self.value.above(scores.exponent, scores.dtype),
            cut,
        )


KEEP_ALL = Threshold(Real(-math.inf, 0))


class NonFiniteScoreError(ValueError):
    """A score is NaN or infinite; the message names the tensor."""


def select(
    sources: Sequence[Scores],
    keep: int,
    guess: Bracket | None = None,
    collected: Sequence[Collected] | None = None,
) -> Threshold:
    """The threshold that keeps exactly ``keep`` of the live weights with the largest scores.

    Args:
        sources: the scores, tensor by tensor.
        keep: how many stay, 0 <= keep <= live weights.
        guess: a bracket that probably holds the threshold.
        collected: what a pass with ``guess`` already found, one per source (None: the pass is made here).

    Raises:
        NonFiniteScoreError: NaN or inf among the scores.
        ValueError: ``keep`` is out of range.
    """
    if keep < 0:
        raise ValueError(f"select: keep: wanted >= 0, got {keep}")
    if not sources:
        raise ValueError("select: sources: wanted at least one tensor of scores, got none")
    for bracket in _brackets(sources, keep, guess):
        if bracket is not guess or collected is None:
            collected = [source.collect(bracket, source.capacity) for source in sources]
        threshold = _resolve(sources, keep, bracket, collected)
        if threshold is not None:
            return threshold
    raise AssertionError("bisection ended without a threshold")


def select_threshold(
    scores: Sequence[Tensor],
    keep: int,
    exponents: Sequence[int] | None = None,
    masks: Sequence[Tensor] | None = None,
) -> Threshold:
    """The exact k-th largest over score tensors of any shapes, none of them copied.

    Args:
        scores: floating-point tensors, any sign; a score's real value is ``scores[i] * 2^exponents[i]``.
        keep: how many to keep, 1 <= keep <= number of scores that take part.
        exponents: one integer per tensor (default 0).
        masks: bool tensors of the same shapes; only True entries take part (default: all).

    Returns:
        A :class:`Threshold`; ``keep_masks(threshold, scores, ...)`` writes it out. Ties stay in tensor order, then flat
        order. The same on any number of threads and on any device.

    Raises:
        NonFiniteScoreError: a NaN or infinite score.
        ValueError: wrong arguments.
    """
    return select(_written_out(scores, exponents, masks), keep)


def keep_masks(
    threshold: Threshold,
    scores: Sequence[Tensor],
    exponents: Sequence[int] | None = None,
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Bool tensors of what a threshold of :func:`select_threshold` keeps; arguments as there."""
    kept = []
    for position, source in enumerate(_written_out(scores, exponents, masks)):
        live = torch.ones_like(source.weight, dtype=torch.bool)
        mask = ops.mask_pack(live) if source.mask is None else source.mask.clone()
        replace(source, mask=mask).prune_(threshold, position)
        kept.append(ops.mask_unpack(mask, source.columns).reshape(scores[position].shape))
    return kept


def _written_out(
    scores: Sequence[Tensor], exponents: Sequence[int] | None, masks: Sequence[Tensor] | None
) -> list[Scores]:
    for name, given in (("exponents", exponents), ("masks", masks)):
        if given is not None and len(given) != len(scores):
            raise ValueError(f"select_threshold: {name}: wanted {len(scores)} (one per tensor), got {len(given)}")
    sources = []
    for k, tensor in enumerate(scores):
        if not tensor.is_floating_point():
            raise ValueError(f"select_threshold: scores[{k}]: wanted a floating-point tensor, got {tensor.dtype}")
        if masks is not None and masks[k].shape != tensor.shape:
            wanted, got = tuple(tensor.shape), tuple(masks[k].shape)
            raise ValueError(f"select_threshold: masks[{k}]: wanted shape {wanted}, got {got}")
        rows = as_rows(tensor.detach().contiguous())
        mask = ops.mask_pack(as_rows(masks[k].contiguous())) if masks is not None else None
        exponent = exponents[k] if exponents is not None else 0
        sources.append(Scores(f"scores[{k}]", rows, rows.shape[-1], mask=mask, exponent=exponent))
    return sources


def as_rows(tensor: Tensor) -> Tensor:
    """[1, O, K]: the first axis as rows, the rest as columns."""
    if tensor.dim() < 2:
        return tensor.reshape(1, 1, -1)
    return tensor.reshape(1, tensor.shape[0], -1) if tensor.numel() else tensor.new_empty(1, 1, 0)


def _brackets(sources: Sequence[Scores], keep: int, guess: Bracket | None):
    """Guesses, each likelier than the last; then what the histogram's best bin was, halved until it is small."""
    if guess is not None:
        yield guess
    if keep == 0:
        yield Bracket(Real(math.inf, 0), Real(math.inf, 0))
        return
    if sum(source.numel for source in sources) > 2**20:
        sampled = _histogram_bracket(sources, keep, _SAMPLE_STRIDE)
        if sampled is not None:
            yield sampled
    exact = _histogram_bracket(sources, keep, 1)
    if exact is None:
        raise ValueError("select: keep: wanted at most the number of live weights, got more: " + str(keep))
    yield exact
    yield from _bisected(sources, keep, exact)


def _bisected(sources: Sequence[Scores], keep: int, bracket: Bracket):
    """Halves a bracket that holds too many scores to collect (large groups of ties) by counting alone.

    It begins with all scores where the bracket does not hold the threshold: bins of the tiniest scores of tensors with
    other exponents overlap, so that a histogram can be wrong about the order of its bins.
    """
    lo, hi = bracket.lo, bracket.hi
    held = [source.collect(bracket, 0) for source in sources]
    above = sum(int(c.counts[0]) for c in held)
    if not above < keep <= above + sum(int(c.counts[1]) for c in held):
        ends = [(s, s.collect(Bracket(Real(-math.inf, 0), Real(math.inf, 0)), 0).extremes) for s in sources]
        lo = min(Real.of(float(least), s.exponent) for s, (least, _) in ends)
        hi = max(Real.of(float(largest), s.exponent) for s, (_, largest) in ends)
        yield Bracket(lo, hi)
    while True:
        middle = _between(lo, hi)
        upper = [source.collect(Bracket(middle, hi), 0) for source in sources]
        reached = sum(int(c.counts[0] + c.counts[1]) for c in upper)
        if reached >= keep:
            lo = max(
                middle,
                min(Real.of(float(c.extremes[0]), s.exponent) for c, s in zip(upper, sources, strict=True)),
            )
        elif middle == hi:  # nothing lies between
            hi = lo
        else:
            lower = [source.collect(Bracket(lo, middle), 0) for source in sources]
            hi = max(Real.of(float(c.extremes[1]), s.exponent) for c, s in zip(lower, sources, strict=True))
        yield Bracket(lo, hi)


def _between(lo: Real, hi: Real) -> Real:
    """A number in (lo, hi]: the mean of mantissas at the larger exponent, or a mean exponent when far apart."""
    if lo.mantissa > 0 and hi.exponent - lo.exponent > 2:
        return Real(0.5, (lo.exponent + hi.exponent) // 2)
    scale = max(r.exponent for r in (lo, hi) if r.mantissa or lo == hi)
    low, high = (math.ldexp(r.mantissa, max(r.exponent - scale, -1080)) for r in (lo, hi))
    middle = Real.of(low + (high - low) / 2, scale)
    return middle if lo < middle <= hi else hi


def _resolve(
    sources: Sequence[Scores], keep: int, bracket: Bracket, collected: Sequence[Collected]
) -> Threshold | None:
    """The threshold, if the bracket holds it and all that is inside was collected or is one tie; else None."""
    counts = torch.stack([c.counts for c in collected]).tolist()
    for source, (_, _, bad, _) in zip(sources, counts, strict=True):
        if bad:
            raise NonFiniteScoreError(f"select: {bad} scores of '{source.name}' are NaN or infinite")
    live = sum(count[3] for count in counts)
    if keep > live:
        raise ValueError(f"select: keep: wanted at most the {live} live weights, got {keep}")
    if keep == live:
        return KEEP_ALL
    if keep == 0:
        return Threshold(Real(math.inf, 0))
    above, inside = sum(count[0] for count in counts), sum(count[1] for count in counts)
    need = keep - above
    if not 0 < need <= inside:
        return None
    ends = [(c.extremes.tolist(), s.exponent) for c, s, n in zip(collected, sources, counts, strict=True) if n[1]]
    smallest = min(Real.of(low, exponent) for (low, _), exponent in ends)
    largest = max(Real.of(high, exponent) for (_, high), exponent in ends)
    if smallest == largest:
        value, over = largest, 0
        ties = [count[1] for count in counts]
    elif all(count[1] <= c.values.numel() for count, c in zip(counts, collected, strict=True)):
        found = _kth(sources, counts, collected, need, largest.exponent)
        if found is None:
            return None
        value, over, ties = found
    else:
        return None
    return _cut_ties(sources, value, need - over, ties)


def _kth(
    sources: Sequence[Scores], counts: list[list[int]], collected: Sequence[Collected], need: int, unit: int
) -> tuple[Real, int, list[int]] | None:
    """The ``need``-th largest of what was collected, how many lie above it, and its ties per tensor.

    None where the scores span so much that no one exponent shows them all exactly.
    """
    values = [c.values[: count[1]] for count, c in zip(counts, collected, strict=True)]
    shifts = [source.exponent - unit for source in sources]
    parts = _rescaled(values, shifts) or _rescaled([v.double() for v in values], shifts)
    if parts is None:
        return None
    value = float(ops.kth_largest(torch.cat(parts), need))
    over, ties = 0, []
    for part in parts:
        above, equal = _counts(part, value)
        over += above
        ties.append(equal)
    return Real.of(value, unit), over, ties


def _counts(values: Tensor, value: float) -> tuple[int, int]:
    """How many of ``values`` are larger than ``value``, and how many equal it."""
    _, counts, _ = ops.through_flow_collect(values[None, None], None, None, None, WeightMap.IDENTITY, value, value, 0)
    above, equal, _, _ = counts.tolist()
    return above, equal


def _rescaled(values: Sequence[Tensor], shifts: Sequence[int]) -> list[Tensor] | None:
    """``values * 2^shift``, or None where the type does not have all of those numbers."""
    most = 1000 if values[0].dtype == torch.float64 else 100  # powers of two that the type has, with room
    parts = []
    for some, shift in zip(values, shifts, strict=True):
        if some.numel() == 0 or shift == 0:
            parts.append(some)
            continue
        if abs(shift) > most:
            return None
        made = some * 2.0**shift
        if not torch.equal(made * 2.0**-shift, some):
            return None
        parts.append(made)
    return parts


def _cut_ties(sources: Sequence[Scores], value: Real, need: int, ties: list[int]) -> Threshold:
    """Keeps the first ``need`` of the ties."""
    if need == sum(ties):
        return Threshold(value)
    for position, count in enumerate(ties):
        if need < count:
            return Threshold(value, position, sources[position].nth(value, need))
        need -= count
    return Threshold(value)


def _histogram_bracket(sources: Sequence[Scores], keep: int, stride: int) -> Bracket | None:
    """The bin that holds the k-th score, or with a sampled histogram the bins within five sigma of it."""
    parts = []
    visited = 0
    for source in sources:
        histogram, counts = source.histogram(stride)
        good, bad = counts.tolist()
        visited += good
        if bad:
            raise NonFiniteScoreError(f"select: {bad} scores of '{source.name}' are NaN or infinite")
        bins = histogram.nonzero().flatten()
        parts.append((histogram[bins].cpu().numpy(), *_bin_bounds(bins.cpu().numpy(), source)))
    tally, place, low, high, exponent = (np.concatenate(column) for column in zip(*parts, strict=True))
    if (stride == 1 and keep > visited) or visited == 0:
        return None
    order = np.argsort(-place, kind="stable")
    reached = np.cumsum(tally[order])
    live = visited if stride == 1 else _live(sources)
    rank = keep * visited / max(live, 1)
    slack = 0.0 if stride == 1 else 5.0 * math.sqrt(max(rank * (1 - min(rank / visited, 1.0)), 1.0)) + 5.0
    last = order[min(int(np.searchsorted(reached, rank + slack)), len(order) - 1)]
    first = order[min(int(np.searchsorted(reached, max(rank - slack, 1.0))), len(order) - 1)]
    return Bracket(Real.of(float(low[last]), int(exponent[last])), Real.of(float(high[first]), int(exponent[first])))


def _live(sources: Sequence[Scores]) -> int:
    return sum(source.numel if source.mask is None else int(ops.mask_count(source.mask)) for source in sources)


def _bin_bounds(bins: np.ndarray, source: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each bin: its place on one scale for all tensors, its least and greatest value, their exponent."""
    kind, unsigned, bits, drop = (
        (np.float64, np.uint64, 64, 44) if source.dtype == torch.float64 else (np.float32, np.uint32, 32, 15)
    )
    sign = unsigned(1) << unsigned(bits - 1)

    def value(key: np.ndarray) -> np.ndarray:
        floats = np.where(key & sign, key ^ sign, ~key).astype(unsigned).view(kind)
        largest = np.finfo(kind).max
        return np.clip(floats, -largest, largest).astype(np.float64)

    first = bins.astype(unsigned) << unsigned(drop)
    low, high = value(first), value(first | ((unsigned(1) << unsigned(drop)) - unsigned(1)))
    magnitude = np.log2(np.abs(np.where(high > 0, high, low)).clip(5e-324)) + source.exponent + 1e6
    holds_zero = (low <= 0) & (high >= 0)  # zeros, mostly, whatever the exponent
    place = np.where(holds_zero, 0.0, np.where(high > 0, magnitude, -magnitude))
    return place, low, high, np.full(len(bins), source.exponent)
