"""Real numbers beyond the range of float64: thresholds of scores that are sums over very many paths."""

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
