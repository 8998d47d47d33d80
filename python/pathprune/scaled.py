"""Flows that never overflow: tensors with integer exponents of their own, and the products they go through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

NOTHING = -(2**40)  # the exponent of a flow of zeros, below that of any other


@dataclass(frozen=True)
class Scaled:
    """A flow: the numbers ``tensor * 2^exponent``, the exponent an int64 tensor with one entry per ensemble member."""

    tensor: Tensor
    exponent: Tensor


_EXPONENTS = {torch.float64: (-1022, 1023), torch.float32: (-126, 127)}  # of normal numbers


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``2^exponent`` exactly, made from its bits; below the smallest normal number it is that number."""
    least, most = _EXPONENTS[dtype]
    biased = exponent.clamp(least, most) + most
    if dtype == torch.float64:
        return (biased << 52).view(torch.float64)
    return (biased.to(torch.int32) << 23).view(torch.float32)


def clamped(exponent: int, dtype: torch.dtype) -> int:
    """The exponent that :func:`power_of_two` takes for it."""
    least, most = _EXPONENTS[dtype]
    return max(least, min(exponent, most))


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """[G, M, N] = [G, M, L] @ [G, L, N]; a single group goes through the faster plain product."""
    if a.shape[0] != 1:
        return torch.bmm(a, b, out=out)
    if out is None:
        return torch.mm(a[0], b[0])[None]
    torch.mm(a[0], b[0], out=out[0])
    return out


def added(first: Scaled, second: Scaled) -> tuple[Tensor, Tensor]:
    """The sum of two score tensors [G, O, K], member by member at the larger exponent."""
    top = torch.maximum(first.exponent, second.exponent)
    total = torch.zeros_like(second.tensor)
    for part in (first, second):
        by_member = part.tensor.unflatten(0, (top.numel(), -1))
        factor = power_of_two(part.exponent - top, total.dtype).reshape(-1, 1, 1, 1)
        total += (by_member * factor).flatten(0, 1)
    return total, top


class ScaledArithmetic:
    """What is done to flows ``[E, S, *shape]`` (without the leading axes where there is one member and one source)."""

    members: int
    sources: int
    batched: bool
    device: torch.device
    dtype: torch.dtype

    def _lead(self) -> tuple[int, ...]:
        return (self.members, self.sources) if self.batched else ()

    def _zero_exponent(self) -> Tensor:
        return torch.zeros(self.members, dtype=torch.int64, device=self.device)

    def _by(self, factor: Tensor, like: Tensor) -> Tensor:
        """A per-member factor [E], to multiply a flow with."""
        return factor.reshape(-1, *[1] * (like.dim() - 1)) if self.batched else factor.reshape(())

    @property
    def _is_one(self) -> bool:
        """Whether exponents are single numbers at hand: small operators on tensors take longer than small flows do."""
        return self.members == 1 and self.device.type == "cpu"

    def _raised(self, tensor: Tensor, exponent: Tensor) -> Tensor:
        """``tensor * 2^exponent``, exactly."""
        if self._is_one:
            return tensor * math.ldexp(1.0, clamped(int(exponent), self.dtype))
        return tensor * self._by(power_of_two(exponent, self.dtype), tensor)

    def _shifted(self, flow: Scaled, exponent: Tensor) -> Tensor:
        """The flow's tensor at another (not smaller) exponent."""
        if flow.exponent is exponent or (self._is_one and int(flow.exponent) == int(exponent)):
            return flow.tensor
        return self._raised(flow.tensor, flow.exponent - exponent)

    def _aligned(self, flows: Sequence[Scaled]) -> tuple[list[Tensor], Tensor]:
        if len(flows) == 1:
            return [flows[0].tensor], flows[0].exponent
        top = reduce(torch.maximum, [flow.exponent for flow in flows])
        return [self._shifted(flow, top) for flow in flows], top

    def _added(self, flows: Sequence[Scaled]) -> Scaled:
        """Their sum, at the largest exponent."""
        if self._is_one and len(flows) == 2:  # in one pass: a product with a power of two is exact
            low, high = sorted(flows, key=lambda flow: int(flow.exponent))
            factor = math.ldexp(1.0, clamped(int(low.exponent) - int(high.exponent), self.dtype))
            return Scaled(torch.add(high.tensor, low.tensor, alpha=factor), high.exponent)
        tensors, exponent = self._aligned(flows)
        return Scaled(reduce(torch.add, tensors), exponent)

    def _normalised(self, tensor: Tensor, exponent: Tensor) -> Scaled:
        """The same numbers with a maximum in [1/2, 1); a flow of zeros never sets the exponent of a sum."""
        if tensor.numel() == 0:
            return Scaled(tensor, exponent)
        peak = self._peak(tensor.reshape(self.members, -1))
        if self._is_one:
            mantissa, shift = math.frexp(float(peak))
            scaled = tensor * math.ldexp(1.0, clamped(-shift, self.dtype))
            return Scaled(scaled, exponent + shift if mantissa > 0 else torch.full_like(exponent, NOTHING))
        shifts = torch.frexp(peak).exponent.to(torch.int64)
        return Scaled(self._raised(tensor, -shifts), torch.where(peak > 0, exponent + shifts, NOTHING))

    @staticmethod
    def _peak(rows: Tensor) -> Tensor:
        """The largest magnitude of each row: path flow is never negative."""
        return rows.amax(1)


def largest_magnitude(rows: Tensor) -> Tensor:
    """The largest magnitude of each row, of flows that have either sign."""
    low, high = torch.aminmax(rows, dim=1)
    return torch.maximum(-low, high)
