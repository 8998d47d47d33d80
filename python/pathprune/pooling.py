"""Pooling of path flow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .nodes import Pool


def pooled(x: Tensor, node: Pool, power: float, max_pool: str) -> Tensor:
    """Pooling of path flow: the winner, the sum over the window, or an average whose constant is raised to a power."""
    n = len(node.kernel)
    if n == 1:
        geometry = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
        shape = torch.Size((*node.shape[:-1], 1, node.shape[-1]))
        lifted_geometry: dict[str, Any] = {key: (v, *getattr(node, key)) for key, v in geometry.items()}
        lifted = replace(node, shape=shape, **lifted_geometry)
        return pooled(x.unsqueeze(-2), lifted, power, max_pool).squeeze(-2)
    if node.kind == "max" and max_pool == "winner":
        function = F.max_pool2d if n == 2 else F.max_pool3d
        return function(x, node.kernel, node.stride, node.padding, node.dilation, ceil_mode=node.ceil_mode)
    if any(d != 1 for d in node.dilation):
        return _dilated_sum(x, node)
    average: Any = F.avg_pool2d if n == 2 else F.avg_pool3d
    window = (node.kernel, node.stride, node.padding, node.ceil_mode, node.count_include_pad)
    total = average(x, *window, 1)
    if node.kind == "max" or power == 0:
        return total
    if power == 1:
        return average(x, *window, node.divisor)
    ones = torch.ones((1, 1, *x.shape[-n:]), dtype=x.dtype, device=x.device)
    entries = average(ones, *window, node.divisor) / average(ones, *window, 1)
    return total * entries**power


def _dilated_sum(x: Tensor, node: Pool) -> Tensor:
    """The sum over dilated windows: a convolution of each channel with ones."""
    channels, n = x.shape[1], len(node.kernel)
    if node.ceil_mode:  # zeros at the far side, for the last windows to end in
        reach = [(k - 1) * d + 1 for k, d in zip(node.kernel, node.dilation, strict=True)]
        ends = [
            (o - 1) * s + r - p for o, s, r, p in zip(node.shape[-n:], node.stride, reach, node.padding, strict=True)
        ]
        missing = [max(end - size - p, 0) for end, size, p in zip(ends, x.shape[-n:], node.padding, strict=True)]
        x = F.pad(x, [width for amount in reversed(missing) for width in (0, amount)])
    ones = torch.ones((channels, 1, *node.kernel), dtype=x.dtype, device=x.device)
    none = (0,) * n
    return torch.convolution(x, ones, None, node.stride, node.padding, node.dilation, False, none, channels)
