"""Arithmetic of numbers that never overflow: tensors times a power of two, one integer exponent per ensemble member."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .weights import Scaled, power_of_two

NOTHING = -(2**40)  # the exponent of a flow of zeros, below that of any other


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

    def _shifted(self, flow: Scaled, exponent: Tensor) -> Tensor:
        """The flow's tensor at another (not smaller) exponent."""
        if flow.exponent is exponent:
            return flow.tensor
        return flow.tensor * self._by(power_of_two(flow.exponent - exponent, self.dtype), flow.tensor)

    def _aligned(self, flows: Sequence[Scaled]) -> tuple[list[Tensor], Tensor]:
        if len(flows) == 1:
            return [flows[0].tensor], flows[0].exponent
        top = torch.stack([flow.exponent for flow in flows]).amax(0)
        return [self._shifted(flow, top) for flow in flows], top

    def _normalised(self, tensor: Tensor, exponent: Tensor) -> Scaled:
        """The same numbers with a maximum in [1/2, 1); a flow of zeros never sets the exponent of a sum."""
        if tensor.numel() == 0:
            return Scaled(tensor, exponent)
        peak = self._peak(tensor.reshape(self.members, -1))
        shift = torch.frexp(peak).exponent.to(torch.int64)
        scaled = tensor * self._by(power_of_two(-shift, self.dtype), tensor)
        return Scaled(scaled, torch.where(peak > 0, exponent + shift, NOTHING))

    @staticmethod
    def _peak(rows: Tensor) -> Tensor:
        """The largest magnitude of each row: path flow is never negative."""
        return rows.amax(1)
