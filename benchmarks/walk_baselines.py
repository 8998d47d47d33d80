"""PHEW's walks in PyTorch and numpy: the published sampler stage by stage, and the best plain torch we could write.

Both walk chains of linear or convolution layers over units (channels), as PHEW does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class PublishedWalks:
    """The published loop: Python lists of probabilities, ``np.random.choice`` a step, every mask summed twice a walk:
    by the stopping test, and by the progress line that its experiment script switches on.

    Its tables, which it makes in O(n^3), are made here in O(n^2); :meth:`setup_seconds` says what making them as
    published takes, from measured rows.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = [w.detach() for w in weights]
        kernels = [w.abs().reshape(*w.shape[:2], -1) for w in self.weights]
        mass = [k.sum(2).double() for k in kernels]
        self.forward = [(a / a.sum(0)).t().tolist() for a in mass]  # [in][out]
        self.backward = [(a / a.sum(1, keepdim=True)).tolist() for a in mass]  # [out][in]
        self.entries = [(k.double() / k.double().sum(2, keepdim=True)).numpy() for k in kernels]
        self.masks = [torch.zeros(w.shape) for w in weights]
        self.bias_masks = [torch.zeros(len(w)) for w in weights]
        self.inputs, self.outputs = weights[0].shape[1], weights[-1].shape[0]
        self.first = [0, 0]

    def setup_seconds(self) -> float:
        """What the published tables take: for each layer one row of either direction as published, and some kernels,
        timed and multiplied by how many there are."""
        total, of_row = 0.0, {}
        for w in self.weights:
            kernels = w.abs().numpy().reshape(*w.shape[:2], -1)
            out, inn, _ = kernels.shape
            for length, rows in ((inn, out), (out, inn)):
                if length not in of_row:
                    of_row[length] = self._row_seconds(np.abs(np.random.randn(length)))  # noqa: NPY002
                total += rows * of_row[length]
            total += out * inn * self._kernel_seconds(kernels.reshape(out * inn, -1)[:200].copy())
        return total

    @staticmethod
    def _row_seconds(row: np.ndarray) -> float:
        """One row of probabilities: the sum is taken anew for every entry."""
        taken = []
        for _ in range(3):
            began = time.process_time()
            _ = [float(float(value) / float(sum(row))) for value in row]
            taken.append(time.process_time() - began)
        return min(taken)

    @staticmethod
    def _kernel_seconds(kernels: np.ndarray) -> float:
        """One kernel: its norm, and its own probabilities."""
        norms = np.zeros(len(kernels))
        began = time.process_time()
        for i, kernel in enumerate(kernels):
            norms[i] = np.sum(np.absolute(kernel))
        for i in range(len(kernels)):
            kernels[i] = kernels[i] / float(np.sum(np.absolute(kernels[i])))
        return (time.process_time() - began) / len(kernels)

    def _sum(self) -> Tensor:
        total = torch.zeros(())
        for mask in self.masks:
            total = total + torch.sum(mask)
        return total

    def walk(self, number: int) -> None:
        """The stopping test, one walk, and the progress line."""
        bool(self._sum() < 1e18)
        ahead = number % 2 == 0
        unit = self.first[number % 2]
        self.first[number % 2] = (unit + 1) % (self.inputs if ahead else self.outputs)
        layers = range(len(self.masks)) if ahead else reversed(range(len(self.masks)))
        for k in layers:
            row = self.forward[k][unit] if ahead else self.backward[k][unit]
            following = int(np.random.choice(list(range(len(row))), 1, p=row)[0])  # noqa: NPY002
            o, i = (following, unit) if ahead else (unit, following)
            if self.entries[k].shape[2] > 1:
                entry = self.entries[k][o, i]
                e = int(np.random.choice(list(range(len(entry))), 1, p=entry)[0])  # noqa: NPY002
                self.masks[k].view(*self.masks[k].shape[:2], -1)[o, i, e] = 1
            else:
                self.masks[k][o, i] = 1
            self.bias_masks[k][o] = 1
            unit = following
        f"{self._sum()}"


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
