"""SNIP and GraSP as published, and as the best plain PyTorch, for `sensitivity.py`.

Published: a deep copy of the model whose weights are multiplied by mask parameters, every parameter requiring grad, all
scores concatenated and divided by their sum, `kthvalue`, and `score > threshold` (Synaptic-Flow's loop; GraSP also
concatenates its gradients). Best plain PyTorch: gradients of the prunable weights alone, accumulated by autograd into
one flat buffer and made into scores in place, selection by sampling a bracket of the threshold; GraSP's Hessian product
by sending the vector back through the gradient.

Both take batches `(x, y)` of one size, use cross entropy in evaluation mode, and return `{name: bool mask}`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from baselines import prunable_weights
from selection_baselines import bracket_kth, sample_positions, split_numpy, split_torch

Batches = Sequence[tuple[Tensor, Tensor]]


class MaskParameter(nn.Module):
    """weight -> weight * mask, the mask a parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def _with_masks(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(copy, its weights, its masks)"""
    names = list(prunable_weights(model))
    copied = copy.deepcopy(model).eval().requires_grad_(True)
    weights, masks = {}, {}
    for name in names:
        layer = copied.get_submodule(name.rpartition(".")[0])
        weights[name] = layer.weight
        factor = MaskParameter(layer.weight.detach())
        parametrize.register_parametrization(layer, "weight", factor, unsafe=True)
        masks[name] = factor.mask
    return copied, weights, masks


def _published_selection(scores: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    everything = torch.cat([score.flatten() for score in scores.values()])
    threshold = everything.kthvalue(int((1 - density) * everything.numel())).values
    return {name: score > threshold for name, score in scores.items()}


def published_snip(model: nn.Module, batches: Batches, density: float) -> dict[str, Tensor]:
    copied, _, masks = _with_masks(model)
    for x, y in batches:
        F.cross_entropy(copied(x), y).backward()
    scores = {name: mask.grad.detach().clone().abs_() for name, mask in masks.items()}
    total = torch.cat([score.flatten() for score in scores.values()]).sum()
    for score in scores.values():
        score.div_(total)
    return _published_selection(scores, density)


def published_grasp(
    model: nn.Module, batches: Batches, density: float, temperature: float = 200.0
) -> dict[str, Tensor]:
    copied, weights, _ = _with_masks(model)
    parameters, stopped = list(weights.values()), torch.zeros(())
    for x, y in batches:
        gradients = torch.autograd.grad(F.cross_entropy(copied(x) / temperature, y), parameters)
        stopped = stopped + torch.cat([gradient.flatten() for gradient in gradients])
    for x, y in batches:
        loss = F.cross_entropy(copied(x) / temperature, y)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        (stopped * torch.cat([gradient.flatten() for gradient in gradients])).sum().backward()
    scores = {name: (weight.grad * weight).detach().clone() for name, weight in weights.items()}
    total = torch.cat([score.flatten() for score in scores.values()]).sum().abs() + 1e-10
    for score in scores.values():
        score.div_(total)
    return _published_selection(scores, density)


class PlainSensitivity:
    """The best plain PyTorch: one flat buffer of gradients that becomes the scores.

    Args:
        model: it is used as it is: put in evaluation mode, gradients of the prunable weights alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.weights = prunable_weights(model)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.sizes = [weight.numel() for weight in self.weights.values()]

    def _accumulate_into(self, flat: Tensor) -> None:
        for weight, part in zip(self.weights.values(), flat.split(self.sizes), strict=True):
            weight.grad = part.view_as(weight)

    def _gradient(self, batches: Batches, temperature: float) -> Tensor:
        flat = torch.zeros(sum(self.sizes))
        self._accumulate_into(flat)
        for x, y in batches:
            F.cross_entropy(self.model(x) / temperature, y).backward(inputs=list(self.weights.values()))
        return flat

    def _selected(self, flat: Tensor, density: float) -> dict[str, Tensor]:
        """The largest scores, counted exactly; ties at the threshold all stay (there are none to speak of)."""
        for weight in self.weights.values():
            weight.grad = None
        split = split_numpy if flat.device.type == "cpu" else split_torch
        threshold = bracket_kth(flat, round(density * flat.numel()), sample_positions(flat), split).value
        parts = zip(self.weights.items(), flat.split(self.sizes), strict=True)
        return {name: (part >= threshold).view_as(weight) for (name, weight), part in parts}

    def _times_weights(self, flat: Tensor) -> None:
        with torch.no_grad():
            for weight, part in zip(self.weights.values(), flat.split(self.sizes), strict=True):
                part.mul_(weight.flatten())

    def snip(self, batches: Batches, density: float) -> dict[str, Tensor]:
        flat = self._gradient(batches, 1.0)
        self._times_weights(flat)
        return self._selected(flat.abs_(), density)

    def grasp(self, batches: Batches, density: float, temperature: float = 200.0) -> dict[str, Tensor]:
        vector = self._gradient(batches, temperature)
        flat = torch.zeros_like(vector)
        self._accumulate_into(flat)
        weights = list(self.weights.values())
        along = [part.view_as(weight) for weight, part in zip(weights, vector.split(self.sizes), strict=True)]
        for x, y in batches:
            gradients = torch.autograd.grad(F.cross_entropy(self.model(x) / temperature, y), weights, create_graph=True)
            torch.autograd.backward(gradients, along, inputs=weights)
            del gradients
        self._times_weights(flat)
        return self._selected(flat, density)
