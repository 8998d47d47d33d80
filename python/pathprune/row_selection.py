"""Exact selection within rows: the best ``n`` of every row, or of every ``m`` neighbours in a row.

Of equal scores the one that comes first stays. Rows are taken some at a time: the scores of a tensor are never all
written out, unless they are already.

Bytes: one read of what the scores are made of, and one bit a weight; temporaries of a few million scores.
Oracle: a stable descending sort.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from . import ops
from .checks import WORD
from .select import NonFiniteScoreError, Scores
from .weights import Weight

_AT_ONCE = 1 << 20  # scores in one piece
_TURNED = ("linear_t", "experts_t")  # forms whose output units are the columns of what is stored
_BY_PAIRS = 8  # group size up to which comparing all pairs beats a selection


def best(scores: Tensor, n: int) -> Tensor:
    """Which of the last axis are among its ``n`` largest, the first ones where scores are equal.

    Args:
        scores: floats [..., K]; -inf is allowed, NaN is not.
        n: 0 <= n <= K.

    Returns:
        bool [..., K] with ``n`` True in each row.
    """
    if n == 0 or scores.numel() == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if scores.shape[-1] <= _BY_PAIRS:
        return _best_by_pairs(scores, n)
    last = _nth_largest(scores, n)
    kept, ties = scores > last, scores == last
    room = n - kept.sum(-1, keepdim=True)
    if bool((ties.sum(-1, keepdim=True) > room).any()):
        ties &= ties.cumsum(-1) <= room
    return kept | ties


def _best_by_pairs(scores: Tensor, n: int) -> Tensor:
    """The same for a short axis: those that fewer than ``n`` others beat."""
    beaten = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for i in range(scores.shape[-1]):
        for j in range(i + 1, scores.shape[-1]):
            later_wins = scores[..., j] > scores[..., i]
            beaten[..., i] += later_wins
            beaten[..., j] += ~later_wins
    return beaten < n


def _nth_largest(scores: Tensor, n: int) -> Tensor:
    """The ``n``-th largest of every row, [..., 1]."""
    if scores.device.type != "cpu":
        return scores.topk(n, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    place = scores.shape[-1] - n
    return torch.from_numpy(np.partition(scores.numpy(), place, axis=-1)[..., place : place + 1])


def row_length(weight: Weight) -> int:
    """How many weights of an output unit compete."""
    return weight.shape[-2] if weight.form in _TURNED else weight.columns


def cut_rows(weight: Weight, keep: int, n: int = 0, m: int = 0) -> None:
    """Keeps the best ``keep`` weights of each output unit, or with ``m`` the best ``n`` of every ``m`` neighbours.

    Args:
        weight: it has been scored; its mask is replaced.
        keep: of the weights of an output unit.

    Raises:
        NonFiniteScoreError: NaN or inf among the scores.
        ValueError: rows that are no multiple of ``m``.
    """
    inputs = row_length(weight)
    if m and inputs % m:
        raise ValueError(
            f"scope: '{weight.name}': wanted {inputs} inputs to be a multiple of {m} for {n}:{m}; exclude it"
        )
    made = weight.scores if weight.scores.layout is None else weight.written_scores()
    turned = weight.form in _TURNED
    groups, rows, columns = made.weight.shape
    if turned and rows != weight.shape[-2]:
        raise ValueError(f"scope: '{weight.name}': wanted its output units whole, got its inputs spread over ranks")
    words = torch.empty((groups, rows, ops.words(columns)), dtype=torch.int16, device=made.weight.device)
    for some, place in _pieces(made, words, turned):
        scores = some.written()
        low, high = torch.aminmax(scores)  # NaN is both
        if not (math.isfinite(float(low)) and math.isfinite(float(high))):
            raise NonFiniteScoreError(f"select: scores of '{weight.name}' are NaN or infinite")
        if some.mask is not None:
            scores = scores.masked_fill(~ops.mask_unpack(some.mask, some.columns), -math.inf)
        scores = scores.mT.contiguous() if turned else scores
        kept = best(scores.unflatten(-1, (-1, m)), n).flatten(-2) if m else best(scores, keep)
        place.copy_(ops.mask_pack(kept.mT.contiguous() if turned else kept))
    if made.used is not None:
        made.used()
    weight.set_words(words)


def _pieces(made: Scores, words: Tensor, turned: bool) -> Iterator[tuple[Scores, Tensor]]:
    """Some output units at a time: their scores, and where the words of their mask go."""
    groups, rows, columns = made.weight.shape
    if turned:
        step = WORD * max(1, _AT_ONCE // max(groups * rows * WORD, 1))
        for first in range(0, columns, step):
            yield made.block(first, first + step), words[..., first // WORD : (first + step) // WORD]
        return
    step = max(1, _AT_ONCE // max(groups * columns, 1))
    for first in range(0, rows, step):
        yield made.rows(first, first + step), words[:, first : first + step]
