"""How sensitivity is spread over the layers: m^l = E[(W^l dL/dW^l)^2], and at which sparsity it empties a layer.

The diagnostic of Robust Pruning at Initialization (Hayou, Ton, Doucet, Teh, ICLR 2021): sensitivity-based pruning
(SBP, SNIP) keeps the largest ``|W dL/dW|`` of all layers together. On the edge of chaos m^l is alike in all layers; off
it m^l changes exponentially with depth, so one common threshold empties the layers on one end. Not so in ReLU nets
without biases: there the sum of W dL/dW is the same in every layer at any scale (homogeneity), and m^l stays level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Data, require_reiterable, runs_on, stream
from .belonging import dense_weights
from .masks import Masks
from .surroundings import device_of_caller, undisturbed


@dataclass(frozen=True)
class GradientMoments:
    """What :func:`gradient_moments` found. Layers are in the order of the model's parameters.

    Attributes:
        moments: weight name -> m^l, the mean of ``(W dL/dW)^2`` over the weights that are left; 0 if none is.
        critical_sparsity: *measured*, exact for these scores: the largest fraction of the weights left that one-shot
            SBP (the largest ``|W dL/dW|`` stay) can remove before some layer is empty.
        weakest: the name of the layer that is emptied first.
        predicted_critical_sparsity: the same *from the moments alone*: the scores of layer l are taken as
            ``sqrt(m^l) |X Y|`` with X, Y independent standard normals (Gaussian weights, Gaussian gradients, as the
            mean-field theory has them at large width), and a layer counts as empty where less than one of its weights
            is expected above the threshold. Ours, derived from the paper's argument, not a formula of the paper;
            gradients that a whole row or column has in common make real tails heavier. For the paper's bound from chi
            see ``critical_sparsity_bound``.
    """

    moments: dict[str, float]
    critical_sparsity: float
    weakest: str
    predicted_critical_sparsity: float

    @property
    def log2_slope(self) -> float:
        """Least-squares slope of log2 m^l over the layers, those with m^l = 0 left out; NaN for fewer than two.

        0 on the edge of chaos.
        """
        points = [(layer, math.log2(m)) for layer, m in enumerate(self.moments.values()) if m > 0]
        if len(points) < 2:
            return math.nan
        x, y = torch.tensor(points, dtype=torch.float64).T
        x = x - x.mean()
        return float(x @ y / x.square().sum())


@undisturbed
def gradient_moments(
    model: nn.Module, data: Data, loss: Callable[[Any, Any], Tensor], masks: Masks | None = None
) -> GradientMoments:
    """The second moment of W dL/dW in each layer, and the sparsity at which a layer is emptied.

    L is the mean loss over the data. The model is run in the mode it is in, on copies of its buffers; its weights,
    gradients, statistics and the global RNG stay as they are.

    Args:
        model: any module.
        data: a re-iterable of batches ``(x, y)``; read once, streamed.
        loss: ``loss(output, y)``, a mean over the batch, as a tensor of one element.
        masks: what is left of the model; None: everything, of all weights that ``Masks.ones(model)`` covers.

    Raises:
        MaskMismatchError: the masks are of another model.
        TypeError, ValueError: data that cannot be read again, is empty or has no targets; a loss that is not a scalar,
            not finite, or does not depend on a weight.

    Determinism: as deterministic as the model's forward and backward are.

    Example:
        >>> found = pathprune.gradient_moments(model, loader, torch.nn.functional.cross_entropy)
        >>> found.log2_slope, found.critical_sparsity
    """
    require_reiterable(data, "gradient_moments")
    if not callable(loss):
        raise TypeError(f"gradient_moments: loss: wanted a function of (output, y), got {loss!r}")
    if masks is not None:
        masks.check(model, base="ignore")
    parameters = dict(model.named_parameters())
    names = list(dense_weights(model)) if masks is None else [name for name in parameters if name in masks]
    if not names:
        raise ValueError("gradient_moments: model: wanted weights of two dimensions or more, got none")
    kept = {name: None if masks is None else masks.get(name, device=parameters[name].device) for name in names}
    gradients = _mean_gradients(model, data, loss, names, kept)
    products = {}
    for name in names:
        mask, weight = kept[name], parameters[name].detach().double()
        product = (weight * gradients[name].double()).abs()
        products[name] = product.flatten() if mask is None else product[mask]
    moments = {name: float(p.square().mean()) if p.numel() else 0.0 for name, p in products.items()}
    measured, weakest = _measured(products)
    sizes = {name: p.numel() for name, p in products.items()}
    return GradientMoments(moments, measured, weakest, _predicted(moments, sizes))


def _mean_gradients(
    model: nn.Module, data: Data, loss: Callable[[Any, Any], Tensor], names: list[str], kept: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The gradient of the mean loss with respect to each weight, of the model with removed weights at zero."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    effective = {}
    for name, parameter in model.named_parameters():
        mask, value = kept.get(name), parameter.detach()
        effective[name] = (value if mask is None else value * mask).requires_grad_(name in kept)
    device = effective[names[0]].device
    totals = {name: torch.zeros_like(effective[name], requires_grad=False) for name in names}
    seen = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        for batch in stream(data, "gradient_moments", device, needs_target=True):
            with runs_on(batch, "gradient_moments"), device_of_caller():
                output = torch.func.functional_call(model, {**effective, **buffers}, batch.args, dict(batch.kwargs))
            value = loss(output, batch.target)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"gradient_moments: loss: wanted a tensor of one element, got {got}")
            if not bool(torch.isfinite(value)):
                raise ValueError(f"gradient_moments: loss: wanted a finite value, got {float(value.detach())}")
            try:
                found = torch.autograd.grad(value.sum(), [effective[name] for name in names])
            except RuntimeError as error:
                raise ValueError(f"gradient_moments: loss: wanted one that depends on every weight: {error}") from error
            for name, gradient in zip(names, found, strict=True):
                totals[name].add_(gradient, alpha=batch.size)
            seen += batch.size
    return {name: total.div_(seen) for name, total in totals.items()}


def _measured(products: Mapping[str, Tensor]) -> tuple[float, str]:
    """The share of scores below the best one of the weakest layer, and that layer."""
    best = {name: float(p.max()) if p.numel() else 0.0 for name, p in products.items()}
    weakest = min(best, key=lambda name: best[name])
    total = sum(p.numel() for p in products.values())
    below = sum(int((p < best[weakest]).sum()) for p in products.values())
    return (below / total if total else 0.0), weakest


def _predicted(moments: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """The share of ``sqrt(m) |X Y|`` below the threshold that leaves the weakest layer one expected weight."""
    total = sum(sizes.values())
    if not total or min(moments.values()) == 0:
        return 0.0
    t = torch.logspace(-12, 3, 4001, dtype=torch.float64)  # of |X Y|
    z = torch.linspace(0, 12, 4801, dtype=torch.float64)[1:]
    density = torch.exp(-z.square() / 2) * math.sqrt(2 / math.pi) * (z[1] - z[0])
    above = torch.stack([(density * torch.erfc(at / (z * math.sqrt(2)))).sum() for at in t])  # P(|X Y| > t), falling

    def tail(at: float) -> float:
        return float(above[min(int(torch.searchsorted(t, at)), len(t) - 1)])

    last = {n: float(t[int((above * sizes[n] >= 1).sum()) - 1]) * math.sqrt(m) for n, m in moments.items()}
    threshold = min(last.values())
    left = sum(sizes[n] * tail(threshold / math.sqrt(m)) for n, m in moments.items())
    return min(1.0, max(0.0, 1 - left / total))
