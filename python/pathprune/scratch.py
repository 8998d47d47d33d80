"""Memory that is used again."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Memory for one gradient at a time: fresh pages would cost as much as the product that fills them."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def like(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of that shape; what was in the last one is gone."""
        if self._flat is None or self._flat.numel() < rows.numel() or self._flat.dtype != dtype:
            self._flat = torch.empty(rows.numel(), dtype=dtype, device=rows.device)
        return self._flat[: rows.numel()].view(rows.shape)
