"""Masks on a model: zeros written over removed weights, and kept there while an optimizer trains the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._mask_io import flat_pieces, unpack_bits, unpack_mask
from .distributed import local

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


def write_zeros(weight: Tensor, packed: Tensor) -> None:
    """Zero, in place, wherever the bit is not set."""
    for start, piece in flat_pieces(weight.detach()):
        kept = unpack_bits(packed, start, start + piece.numel(), piece.device)
        # As integers: many times as fast as masked_fill_, and what is removed is zero also where it was NaN.
        integers = piece.view(_INTEGERS[piece.element_size()])
        integers.mul_(kept.to(integers.dtype).view(piece.shape))


class Maintenance:
    """Keeps removed weights at exact zero while an optimizer trains: a context manager, or call `remove()`.

    Gradients are masked as they are accumulated, so that clipping by norm sees kept weights only. That alone
    is not enough: momentum from before pruning would still move removed weights. So after each step the
    parameters, and every floating-point state tensor of a parameter's shape (momentum, exp_avg, ...), are
    masked too. Costs one byte per trained weight, on its device. Nothing is stored in the model, which can be
    copied, pickled and saved meanwhile.

    Args:
        masked: parameter -> bits uint8 [ceil(n / 8)] of its mask, of a DTensor those of its local part; may join the
            optimizer later.
        optimizer: any torch optimizer; a wrapper that keeps the real one in `.optimizer` is seen through.

    Raises:
        TypeError: no optimizer.
        ValueError: the optimizer holds none of the parameters. Nothing was written.
    """

    def __init__(self, masked: Mapping[nn.Parameter, Tensor], optimizer: torch.optim.Optimizer) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"maintain: optimizer: wanted a torch optimizer, got {type(optimizer).__name__}")
        self._bits = dict(masked)
        self._removed: dict[tuple[nn.Parameter, torch.device], Tensor] = {}
        self._handles: list[Any] = []
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if self._bits and held.isdisjoint(self._bits):
            raise ValueError("maintain: optimizer: wanted one of this model, got one of no masked parameter")
        for parameter, packed in self._bits.items():
            write_zeros(local(parameter), packed)
            self._mask_gradient(parameter)
        self._mask_optimized(optimizer)
        for parameter in self._bits:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._mask_gradient))
        self._handles.append(optimizer.register_step_post_hook(self._mask_optimized))

    def remove(self) -> None:
        """Ends the maintenance; the weights stay as they are. May be called again."""
        while self._handles:
            self._handles.pop().remove()
        self._bits.clear()
        self._removed.clear()

    def __enter__(self) -> Maintenance:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _mask(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        here = local(tensor)
        key = (parameter, here.device)
        if key not in self._removed:
            self._removed[key] = ~unpack_mask(self._bits[parameter], local(parameter).shape, here.device)
        here.masked_fill_(self._removed[key], 0)

    def _mask_gradient(self, parameter: nn.Parameter) -> None:
        if parameter.grad is not None and parameter.grad.layout is torch.strided:
            self._mask(parameter, parameter.grad)

    @torch.no_grad()
    def _mask_optimized(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in self._bits:
                    continue
                self._mask(parameter, parameter)
                for state in optimizer.state.get(parameter, {}).values():
                    if not isinstance(state, Tensor) or state.shape != parameter.shape:
                        continue
                    if state.is_floating_point():  # integers are codes, in which 0 need not mean zero
                        self._mask(parameter, state)
