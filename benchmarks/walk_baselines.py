"""PHEW's walks in PyTorch and numpy: the published sampler stage by stage, and the best plain torch we could write.

Both walk chains of linear or convolution layers over units (channels), as PHEW does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class PublishedWalks:
    """The published loop: Python lists of probabilities, ``np.random.choice`` a step, every mask summed before a walk.

    Its tables, which it makes in O(n^3), are made here in O(n^2) and not timed.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        kernels = [w.detach().abs().reshape(*w.shape[:2], -1) for w in weights]
        mass = [k.sum(2).double() for k in kernels]
        self.forward = [(a / a.sum(0)).t().tolist() for a in mass]  # [in][out]
        self.backward = [(a / a.sum(1, keepdim=True)).tolist() for a in mass]  # [out][in]
        self.entries = [(k.double() / k.double().sum(2, keepdim=True)).numpy() for k in kernels]
        self.masks = [torch.zeros(w.shape) for w in weights]
        self.inputs, self.outputs = weights[0].shape[1], weights[-1].shape[0]
        self.first = [0, 0]

    def walk(self, number: int) -> None:
        """The stopping test and one walk."""
        sum(int(mask.sum()) for mask in self.masks)
        ahead = number % 2 == 0
        unit = self.first[number % 2]
        self.first[number % 2] = (unit + 1) % (self.inputs if ahead else self.outputs)
        layers = range(len(self.masks)) if ahead else reversed(range(len(self.masks)))
        for k in layers:
            row = self.forward[k][unit] if ahead else self.backward[k][unit]
            if ahead and len(row) and len(self.forward[k]) != self.masks[k].shape[1]:
                raise AssertionError
            following = int(np.random.choice(list(range(len(row))), 1, p=row)[0])  # noqa: NPY002
            o, i = (following, unit) if ahead else (unit, following)
            entry = self.entries[k][o, i]
            e = int(np.random.choice(list(range(len(entry))), 1, p=entry / entry.sum())[0])  # noqa: NPY002
            self.masks[k][o, i].view(-1)[e] = 1
            unit = following


class TorchWalks:
    """Flat float64 CDFs (row + u), one ``searchsorted`` a step for all walkers; masks by index_put."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = [w.detach().reshape(*w.shape[:2], -1) for w in weights]
        self.ahead, self.back = [], []
        for w in self.weights:
            mass = w.abs().sum(2, dtype=torch.float64)
            self.ahead.append(self._flat(mass.t()))
            self.back.append(self._flat(mass))
        self.masks = [torch.zeros(w.numel(), dtype=torch.bool) for w in self.weights]

    @staticmethod
    def _flat(mass: Tensor) -> Tensor:
        cdf = mass.contiguous().cumsum(1)
        cdf /= cdf[:, -1:].clone()
        cdf += torch.arange(len(cdf), dtype=torch.float64)[:, None]
        return cdf.flatten()

    def walk(self, walks: int) -> int:
        """That many walks; returns how many weights are marked."""
        for ahead in (True, False):
            count = walks // 2
            first = self.weights[0].shape[1] if ahead else self.weights[-1].shape[0]
            unit = torch.arange(count) % first
            layers = range(len(self.weights)) if ahead else reversed(range(len(self.weights)))
            for k in layers:
                out, inn, entries = self.weights[k].shape
                row = out if ahead else inn
                cdf = self.ahead[k] if ahead else self.back[k]
                place = torch.searchsorted(cdf, unit + torch.rand(count, dtype=torch.float64), right=True)
                following = (place - unit * row).clamp_(0, row - 1)
                flat = following * inn + unit if ahead else unit * inn + following
                if entries > 1:
                    kernel = self.weights[k].reshape(-1, entries)[flat].abs()
                    flat = flat * entries + torch.multinomial(kernel, 1)[:, 0]
                self.masks[k][flat] = True
                unit = following
        return sum(int(mask.sum()) for mask in self.masks)
