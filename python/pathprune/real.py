"""Real numbers beyond the range of float64: what scores of different tensors are compared as."""

from __future__ import annotations

import ctypes
import math
import struct
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

    def times_power(self, octaves: float) -> Real:
        """Itself times ``2^octaves``, rounded."""
        whole = math.floor(octaves)
        return Real.of(self.mantissa * 2.0 ** (octaves - whole), self.exponent + whole)

    def at_least(self, exponent: int, dtype: torch.dtype) -> float:
        """The smallest value v of ``dtype`` with ``v * 2^exponent >= self``."""
        return self._bound(exponent, dtype, strict=False)

    def above(self, exponent: int, dtype: torch.dtype) -> float:
        """The smallest value v of ``dtype`` with ``v * 2^exponent > self``."""
        return self._bound(exponent, dtype, strict=True)

    def _bound(self, exponent: int, dtype: torch.dtype, strict: bool) -> float:
        if math.isinf(self.mantissa):
            return self.mantissa if not strict or self.mantissa > 0 else -_LARGEST[dtype]
        try:
            near = math.ldexp(self.mantissa, self.exponent - exponent)
        except OverflowError:
            near = math.copysign(math.inf, self.mantissa)
        value = near if dtype == torch.float64 else ctypes.c_float(near).value
        if math.isinf(value):  # beyond the type: nothing reaches it from above, everything does from below
            return math.inf if value > 0 else -_LARGEST[dtype]
        mine = Real.of(value, exponent)
        return next_above(value, dtype) if mine < self or (strict and mine == self) else value


_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def next_above(value: float, dtype: torch.dtype) -> float:
    """The next larger value of a type, which ``value`` is one of."""
    if dtype == torch.float64:
        return math.nextafter(value, math.inf)
    if value == math.inf:
        return value
    (bits,) = struct.unpack("<i", struct.pack("<f", value + 0.0))  # -0 counts as +0
    return float(struct.unpack("<f", struct.pack("<i", bits + 1 if bits >= 0 else bits - 1))[0])


def next_below(value: float, dtype: torch.dtype) -> float:
    """The next smaller value of a type, which ``value`` is one of."""
    return -next_above(-value, dtype)


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
