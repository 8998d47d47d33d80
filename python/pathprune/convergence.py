"""What the kernel says of training: curves of linearised networks, predicted (Gebhart, Saxena and Schrater 2021).

Gradient descent on the mean squared error of a network linearised at its weights follows its tangent kernel exactly:
with n samples, step size eta and residual ``r_0 = f(X) - y``, ``r_t = (I - eta Theta / n)^t r_0``. ``Theta = J_f Pi
J_f^T``: of data and architecture, so eigendirection by eigendirection the loss decays as its eigenvalue says. From the
architecture alone there is the path kernel Pi, whose trace ranks networks by how fast they can learn.

Oracle: gradient descent on the linearised network, step by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch
from .network import PathNetwork, as_network
from .path_kernel import log2_trace
from .recording import record
from .surroundings import undisturbed
from .tangent_kernel import ntk


@dataclass(frozen=True)
class Convergence:
    """A predicted training curve.

    Attributes:
        loss: float64 [steps + 1]: ``|r_t|^2 / (2 n)``.
        eigenvalues: of ``Theta / n``, float64, descending.
        alignment: the share of the first residual's square in each eigendirection.
        log2_path_kernel_trace: what is known without data.
    """

    loss: Tensor
    eigenvalues: Tensor
    alignment: Tensor
    log2_path_kernel_trace: float

    def steps_to(self, fraction: float) -> int | None:
        """The first step at which the loss is at most that fraction of the first; None if it never is."""
        reached = (self.loss <= fraction * self.loss[0]).nonzero()
        return int(reached[0]) if reached.numel() else None


@undisturbed
def predict_convergence(
    model: nn.Module | PathNetwork,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    learning_rate: float | None = None,
    masks: Mapping[str, Tensor] | None = None,
    example_input: Any = None,
) -> Convergence:
    """The loss of the linearised (masked) network under full-batch gradient descent on its prunable weights.

    Args:
        x: [n, *sample]; y: [n, outputs].
        steps: of gradient descent.
        learning_rate: None: 1 over the largest eigenvalue of ``Theta / n``, which cannot diverge.

    Raises:
        ValueError: y of another shape than the outputs; what :func:`ntk` refuses.

    Example:
        >>> predict_convergence(model, x, y, steps=100, masks=masks).steps_to(0.1)
    """
    if steps < 0:
        raise ValueError(f"predict_convergence: steps: wanted at least 0, got {steps}")
    network = as_network(model, x[:1] if example_input is None else example_input)
    whole = {name: network.tensors[name].detach() for name in masks or ()}
    masked = {name: whole[name] * mask.to(whole[name].device) for name, mask in (masks or {}).items()}
    outputs = record(network, Batch((x,), {}, None), masked, "predict_convergence").outputs
    made = torch.cat([out.double().reshape(len(x), -1) for out in outputs], 1)
    if y.shape != made.shape:
        raise ValueError(f"predict_convergence: y: wanted shape {tuple(made.shape)}, got {tuple(y.shape)}")
    theta = ntk(network, x, masks).flatten(2, 3).flatten(0, 1) / len(x)
    values, vectors = torch.linalg.eigh((theta + theta.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    residual = vectors.T @ (made - y.double()).flatten()
    rate = learning_rate if learning_rate is not None else 1 / float(values[0]) if float(values[0]) > 0 else 0.0
    powers = (1 - rate * values)[None] ** (2 * torch.arange(steps + 1).to(values))[:, None]
    loss = (powers * residual.square()).sum(1) / (2 * len(x))
    total = residual.square().sum().clamp(min=5e-324)
    return Convergence(loss, values, residual.square() / total, log2_trace(network, masks))
