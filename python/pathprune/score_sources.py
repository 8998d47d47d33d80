"""What selection works on: scores that need not be written out, and the thresholds that cut them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops
from .checks import WORD
from .ops import WeightMap
from .real import Real, next_below
from .reference import PADDING

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
        first: flat index, in the whole tensor, of the first weight here (other ranks may hold the others).
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
    first: int = 0
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
        """The scores of some rows of every group; of packed weights, which have one group, these rows."""
        mask = None if self.mask is None else self.mask[:, first:last].contiguous()
        g = None if self.g is None else self.g[..., first:last].contiguous()
        made = replace(self, mask=mask, g=g, used=None)
        if self.layout is None or self.row_start is None:
            return replace(made, weight=self.weight[:, first:last].contiguous())
        starts = self.row_start[first : last + 1]
        begin, end = starts[[0, -1]].tolist()
        values, layout = self.weight[begin : end + PADDING], self.layout[:, first:last].contiguous()
        return replace(made, weight=values, layout=layout, row_start=starts - begin)

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
        return lo, next_below(above, scores.dtype)  # v <= hi exactly when v < above

    def beside(self, above: bool) -> Bracket | None:
        """The interval next to it, four times as wide in octaves; None where that has no meaning."""
        octaves = 4 * (self.hi.log2() - self.lo.log2())
        if not 0 < octaves < math.inf:
            return None
        far = (self.hi if above else self.lo).times_power(octaves if above else -octaves)
        return Bracket(self.hi, far) if above else Bracket(far, self.lo)


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
        at = max(self.tie_index - scores.first, 0)
        cut = _EVERYTHING if position < self.tie_tensor else at if position == self.tie_tensor else 0
        return (
            self.value.at_least(scores.exponent, scores.dtype),
            self.value.above(scores.exponent, scores.dtype),
            cut,
        )


KEEP_ALL = Threshold(Real(-math.inf, 0))


class NonFiniteScoreError(ValueError):
    """A score is NaN or infinite; the message names the tensor."""
