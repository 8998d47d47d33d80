"""Real numbers beyond the range of float64: what scores of different tensors are compared as."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import total_ordering

import numpy as np
import torch


@total_ordering
@dataclass(frozen=True)
class Real:
    """The real number ``mantissa * 2^exponent``, beyond the range of float64; mantissa in +-[0.5, 1), 0 or inf."""

    mantissa: float
    exponent: int

    @staticmethod
    def of(value: float, exponent: int = 0) -> Real:
        mantissa, shift = math.frexp(value)
        return Real(mantissa, shift + exponent if mantissa and math.isfinite(mantissa) else 0)

    def _key(self) -> tuple[float, int, float]:
        sign = (self.mantissa > 0) - (self.mantissa < 0)
        if math.isinf(self.mantissa):
            return (2.0 * sign, 0, 0.0)
        return (float(sign), sign * self.exponent, self.mantissa)

    def __lt__(self, other: Real) -> bool:
        return self._key() < other._key()

    def log2(self) -> float:
        return math.log2(self.mantissa) + self.exponent if self.mantissa > 0 else -math.inf

    def at_least(self, exponent: int, dtype: torch.dtype) -> float:
        """The smallest value v of ``dtype`` with ``v * 2^exponent >= self``."""
        return self._bound(exponent, dtype, strict=False)

    def above(self, exponent: int, dtype: torch.dtype) -> float:
        """The smallest value v of ``dtype`` with ``v * 2^exponent > self``."""
        return self._bound(exponent, dtype, strict=True)

    def _bound(self, exponent: int, dtype: torch.dtype, strict: bool) -> float:
        kind = np.float64 if dtype == torch.float64 else np.float32
        shift = self.exponent - exponent
        if math.isinf(self.mantissa):
            return self.mantissa if not strict or self.mantissa > 0 else -float(np.finfo(kind).max)
        try:
            near = math.ldexp(self.mantissa, shift)
        except OverflowError:
            near = math.copysign(math.inf, self.mantissa)
        with np.errstate(over="ignore"):
            value = kind(near)
        if math.isinf(value):  # beyond the type: nothing reaches it from above, everything does from below
            return math.inf if value > 0 else -float(np.finfo(kind).max)
        mine = Real.of(float(value), exponent)
        if mine < self or (strict and mine == self):
            value = np.nextafter(value, kind(np.inf))
        return float(value)


def bin_bounds(
    bins: np.ndarray, dtype: torch.dtype, unit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each bin of ``ops.through_flow_histogram``, of scores times 2^unit: its place on one scale for all
    tensors, its least and greatest value, their exponent.
    """
    kind, unsigned, bits, drop = (
        (np.float64, np.uint64, 64, 44) if dtype == torch.float64 else (np.float32, np.uint32, 32, 15)
    )
    sign = unsigned(1) << unsigned(bits - 1)

    def value(key: np.ndarray) -> np.ndarray:
        floats = np.where(key & sign, key ^ sign, ~key).astype(unsigned).view(kind)
        largest = np.finfo(kind).max
        return np.clip(floats, -largest, largest).astype(np.float64)

    first = bins.astype(unsigned) << unsigned(drop)
    low, high = value(first), value(first | ((unsigned(1) << unsigned(drop)) - unsigned(1)))
    magnitude = np.log2(np.abs(np.where(high > 0, high, low)).clip(5e-324)) + unit + 1e6
    holds_zero = (low <= 0) & (high >= 0)  # zeros, mostly, whatever the exponent
    place = np.where(holds_zero, 0.0, np.where(high > 0, magnitude, -magnitude))
    return place, low, high, np.full(len(bins), unit)
