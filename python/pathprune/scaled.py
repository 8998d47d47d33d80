"""Flows that never overflow: tensors with integer exponents of their own, and the products they go through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaled:
    """A flow: the numbers ``tensor * 2^exponent``, the exponent an int64 tensor with one entry per ensemble member."""

    tensor: Tensor
    exponent: Tensor


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``2^exponent`` exactly, made from its bits; below the smallest normal number it is that number."""
    if dtype == torch.float64:
        return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
    return ((exponent.clamp(-126, 127) + 127).to(torch.int32) << 23).view(torch.float32)


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
