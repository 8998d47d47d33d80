"""Exact selection over any number of score tensors, without concatenating, sorting or even writing the scores.

The k-th largest score is found by bracketing: a guess [lo, hi], one pass that counts the scores above it and collects
those inside, and an exact k-th among the few collected. Counts prove the guess right or wrong, so the result is exact
whatever the guess was: the last round's threshold, a histogram of every n-th word, or a histogram of all.

A score is a real number ``value * 2^exponent`` with one exponent per tensor. Ties at the threshold are kept in the
order of the tensors, then of the flat index, so that exactly ``keep`` weights stay.

Where the rows of tensors are spread over ranks, each pass ends in one sum of its counts over the ranks, and what was
collected is gathered: every rank finds the same threshold, that of one process.

Bytes: one read of what the scores are made of per pass; two or three passes cold, one when the guess holds.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from . import ops
from .distributed import ALONE, Group
from .ops import WeightMap
from .real import Real, bin_bounds
from .score_sources import KEEP_ALL, Bracket, Collected, NonFiniteScoreError, Scores, Threshold

_SAMPLE_STRIDE = 64  # words between two of a sampled histogram
_GATHERED = 2**22  # collected scores of all ranks that one rank may be sent


def select(
    sources: Sequence[Scores],
    keep: int,
    guess: Bracket | None = None,
    collected: Sequence[Collected] | None = None,
    group: Group = ALONE,
) -> Threshold:
    """The threshold that keeps exactly ``keep`` of the live weights with the largest scores.

    Args:
        sources: the scores, tensor by tensor.
        keep: how many stay, 0 <= keep <= live weights.
        guess: a bracket that probably holds the threshold.
        collected: what a pass with ``guess`` already found, one per source (None: the pass is made here).
        group: the ranks over which each tensor's rows are spread; all call with the same arguments but the scores.

    Raises:
        NonFiniteScoreError: NaN or inf among the scores.
        ValueError: ``keep`` is out of range.
    """
    if not sources:
        raise ValueError("select: sources: wanted at least one tensor of scores, got none")
    if keep < 0:
        raise ValueError(f"select: keep: wanted >= 0, got {keep}")
    brackets = _brackets(sources, keep, guess, group)
    bracket = next(brackets)
    while True:
        if bracket is not guess or collected is None:
            collected = [source.collect(bracket, source.capacity) for source in sources]
        tally = _tallied(collected, sources, group)
        threshold = _resolve(sources, keep, tally, group)
        if threshold is not None:
            return threshold
        bracket = brackets.send(tally)


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
    if not isinstance(keep, int):
        raise TypeError(f"select_threshold: keep: wanted an int, got {keep!r}")
    return select(_written_out(scores, exponents, masks), keep)


def keep_masks(
    threshold: Threshold,
    scores: Sequence[Tensor],
    exponents: Sequence[int] | None = None,
    masks: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Bool tensors of what a threshold keeps, shaped like the scores and on their device.

    Args:
        threshold: from :func:`select_threshold`.
        scores, exponents, masks: as they were given there, in the same order.

    Raises:
        TypeError: no threshold, or scores that are no list of tensors.
        ValueError: other arguments that do not fit; a score that is on the meta device.

    Example:
        >>> keep = pp.keep_masks(pp.select_threshold(scores, 100), scores)
    """
    if not isinstance(threshold, Threshold):
        raise TypeError(f"keep_masks: threshold: wanted a Threshold, got {type(threshold).__name__}")
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
    if isinstance(scores, Tensor) or not all(isinstance(tensor, Tensor) for tensor in scores):
        raise TypeError(f"select_threshold: scores: wanted a list of tensors, got {type(scores).__name__}")
    for name, given in (("exponents", exponents), ("masks", masks)):
        if given is not None and len(given) != len(scores):
            raise ValueError(f"select_threshold: {name}: wanted {len(scores)} (one per tensor), got {len(given)}")
    sources = []
    for k, tensor in enumerate(scores):
        if not tensor.is_floating_point():
            raise ValueError(f"select_threshold: scores[{k}]: wanted a floating-point tensor, got {tensor.dtype}")
        if tensor.is_meta:
            raise ValueError(f"select_threshold: scores[{k}]: wanted a tensor with values, got one on the meta device")
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


@dataclass(frozen=True)
class _Tally:
    """What a pass found, on all ranks."""

    counts: list[list[int]]  # per source: above, inside, not finite, live
    least: list[Real]  # of what is inside; inf where nothing is
    largest: list[Real]
    values: list[Tensor] | None  # per source: what is inside; None: too much

    def total(self, column: int) -> int:
        return sum(count[column] for count in self.counts)


def _tallied(collected: Sequence[Collected], sources: Sequence[Scores], group: Group) -> _Tally:
    """One sum of the ranks' counts, and one gather of what they collected where that is little enough."""
    counts = torch.stack([c.counts for c in collected])  # [sources, 4]
    totals = counts.tolist()
    here = [count[1] for count in totals]
    fits = all(n <= c.values.numel() for n, c in zip(here, collected, strict=True))
    extremes = torch.stack([c.extremes for c in collected])  # [sources, 2]
    if group.size > 1:
        overflows = torch.full_like(counts[:1], 0 if fits else 1)
        counts, overflows = group.sum_(torch.cat([counts, overflows])).split([len(sources), 1])
        ends = group.largest_(torch.stack([-extremes[:, 0], extremes[:, 1]], 1))
        extremes = torch.stack([-ends[:, 0], ends[:, 1]], 1)
        totals = counts.tolist()
        fits = not bool(overflows.any()) and sum(count[1] for count in totals) <= _GATHERED
    values = [c.values[:n] for c, n in zip(collected, here, strict=True)] if fits else None
    least, largest = (
        [Real.of(end, source.exponent) for end, source in zip(column.tolist(), sources, strict=True)]
        for column in extremes.unbind(1)
    )
    return _Tally(totals, least, largest, values if values is None else _all_of(values, group))


def _all_of(values: list[Tensor], group: Group) -> list[Tensor]:
    """Of each source, what every rank has, rank after rank."""
    if group.size == 1:
        return values
    sizes = group.each(torch.tensor([v.numel() for v in values], device=values[0].device)).tolist()  # [ranks][sources]
    lengths = [sum(size) for size in sizes]
    ranks = group.joined(torch.cat(values), lengths).split(lengths)
    parts = [rank.split(size) for rank, size in zip(ranks, sizes, strict=True)]
    return [torch.cat(of_source) for of_source in zip(*parts, strict=True)]


def _brackets(
    sources: Sequence[Scores], keep: int, guess: Bracket | None, group: Group
) -> Generator[Bracket, _Tally, None]:
    """Guesses, each likelier than the last; then what the histogram's best bin was, halved until it is small.

    It is sent what was found in each.
    """
    if guess is not None:
        tally = yield guess
        is_above = keep <= tally.total(0)
        if is_above or keep > tally.total(0) + tally.total(1):  # missed, not too full
            beside = guess.beside(is_above)
            if beside is not None:
                yield beside
    if keep == 0:
        yield Bracket(Real(math.inf, 0), Real(math.inf, 0))
        return
    if _over_ranks(sum(source.numel for source in sources), sources, group) > 2**20:
        sampled = _histogram_bracket(sources, keep, _SAMPLE_STRIDE, group)
        if sampled is not None:
            yield sampled
    exact = _histogram_bracket(sources, keep, 1, group)
    if exact is None:
        live = _over_ranks(_live(sources), sources, group)
        raise ValueError(f"select: keep: wanted at most the {live} live weights, got {keep}")
    yield exact
    yield from _bisected(sources, keep, exact, group)


def _over_ranks(count: int, sources: Sequence[Scores], group: Group) -> int:
    return count if group.size == 1 else int(group.sum_(torch.tensor(count, device=sources[0].weight.device)))


def _bisected(sources: Sequence[Scores], keep: int, bracket: Bracket, group: Group) -> Generator[Bracket, _Tally, None]:
    """Halves a bracket that holds too many scores to collect (large groups of ties) by counting alone.

    It begins with all scores where the bracket does not hold the threshold: bins of the tiniest scores of tensors with
    other exponents overlap, so that a histogram can be wrong about the order of its bins.
    """

    def counted(lo: Real, hi: Real) -> _Tally:
        return _tallied([source.collect(Bracket(lo, hi), 0) for source in sources], sources, group)

    lo, hi = bracket.lo, bracket.hi
    held = counted(lo, hi)
    if not held.total(0) < keep <= held.total(0) + held.total(1):
        every = counted(Real(-math.inf, 0), Real(math.inf, 0))
        lo, hi = min(every.least), max(every.largest)
        yield Bracket(lo, hi)
    while True:
        middle = _between(lo, hi)
        upper = counted(middle, hi)
        if upper.total(0) + upper.total(1) >= keep:
            lo = max(middle, min(upper.least))
        elif middle == hi:  # nothing lies between
            hi = lo
        else:
            hi = max(counted(lo, middle).largest)
        yield Bracket(lo, hi)


def _between(lo: Real, hi: Real) -> Real:
    """A number in (lo, hi]: the mean of mantissas at the larger exponent, or a mean exponent when far apart."""
    if lo.mantissa > 0 and hi.exponent - lo.exponent > 2:
        return Real(0.5, (lo.exponent + hi.exponent) // 2)
    scale = max(r.exponent for r in (lo, hi) if r.mantissa or lo == hi)
    low, high = (math.ldexp(r.mantissa, max(r.exponent - scale, -1080)) for r in (lo, hi))
    middle = Real.of(low + (high - low) / 2, scale)
    return middle if lo < middle <= hi else hi


def _resolve(sources: Sequence[Scores], keep: int, tally: _Tally, group: Group) -> Threshold | None:
    """The threshold, if the bracket holds it and all that is inside was collected or is one tie; else None."""
    for source, (_, _, bad, _) in zip(sources, tally.counts, strict=True):
        if bad:
            raise NonFiniteScoreError(f"select: {bad} scores of '{source.name}' are NaN or infinite")
    live = tally.total(3)
    if keep > live:
        raise ValueError(f"select: keep: wanted at most the {live} live weights, got {keep}")
    if keep == live:
        return KEEP_ALL
    if keep == 0:
        return Threshold(Real(math.inf, 0))
    need = keep - tally.total(0)
    if not 0 < need <= tally.total(1):
        return None
    smallest, largest = min(tally.least), max(tally.largest)
    if smallest == largest:
        value, over = largest, 0
        ties = [count[1] for count in tally.counts]
    elif tally.values is not None:
        found = _kth(sources, tally.values, need, largest.exponent)
        if found is None:
            return None
        value, over, ties = found
    else:
        return None
    return _cut_ties(sources, value, need - over, ties, group)


def _kth(
    sources: Sequence[Scores], values: Sequence[Tensor], need: int, unit: int
) -> tuple[Real, int, list[int]] | None:
    """The ``need``-th largest of what was collected, how many lie above it, and its ties per tensor.

    None where the scores span so much that no one exponent shows them all exactly.
    """
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


def _cut_ties(sources: Sequence[Scores], value: Real, need: int, ties: list[int], group: Group) -> Threshold:
    """Keeps the first ``need`` of the ties."""
    if need == sum(ties):
        return Threshold(value)
    for position, count in enumerate(ties):
        if need < count:
            return Threshold(value, position, _nth(sources[position], value, need, group))
        need -= count
    return Threshold(value)


def _nth(source: Scores, value: Real, n: int, group: Group) -> int:
    """The flat index, in the whole tensor, of the n-th score (from 0) that equals ``value``; rows follow the ranks."""
    if group.size == 1:
        return source.first + source.nth(value, n)
    equal = group.each(source.collect(Bracket(value, value), 0).counts[1])
    before = int(equal[: group.rank].sum())
    found = torch.zeros_like(equal[0])
    if before <= n < before + int(equal[group.rank]):
        found += source.first + source.nth(value, n - before)
    return int(group.sum_(found))


def _histogram_bracket(sources: Sequence[Scores], keep: int, stride: int, group: Group) -> Bracket | None:
    """The bin that holds the k-th score, or with a sampled histogram the bins within five sigma of it."""
    parts = []
    visited = 0
    for source in sources:
        histogram, counts = source.histogram(stride)
        if group.size > 1:
            histogram, counts = group.sum_(torch.cat([histogram, counts])).split([len(histogram), len(counts)])
        good, bad = counts.tolist()
        visited += good
        if bad:
            raise NonFiniteScoreError(f"select: {bad} scores of '{source.name}' are NaN or infinite")
        bins = histogram.nonzero().flatten()
        parts.append((histogram[bins].cpu().numpy(), *bin_bounds(bins.cpu().numpy(), source.dtype, source.exponent)))
    tally, place, low, high, exponent = (np.concatenate(column) for column in zip(*parts, strict=True))
    if (stride == 1 and keep > visited) or visited == 0:
        return None
    order = np.argsort(-place, kind="stable")
    reached = np.cumsum(tally[order])
    live = visited if stride == 1 else _over_ranks(_live(sources), sources, group)
    rank = keep * visited / max(live, 1)
    slack = 0.0 if stride == 1 else 5.0 * math.sqrt(max(rank * (1 - min(rank / visited, 1.0)), 1.0)) + 5.0
    last = order[min(int(np.searchsorted(reached, rank + slack)), len(order) - 1)]
    first = order[min(int(np.searchsorted(reached, max(rank - slack, 1.0))), len(order) - 1)]
    return Bracket(Real.of(float(low[last]), int(exponent[last])), Real.of(float(high[first]), int(exponent[first])))


def _live(sources: Sequence[Scores]) -> int:
    return sum(source.numel if source.mask is None else int(ops.mask_count(source.mask)) for source in sources)
