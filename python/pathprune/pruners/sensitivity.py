"""Connection sensitivity: how much a loss on data feels a weight, to first and to second order.

With the mean loss L over the data, w the weights under the present mask and theta the dense ones:

* SNIP (Lee, Ajanthan, Torr 2019): ``|dL/dm| = |w dL/dw|``, once, at the dense network. SBP is its name in Robust
  Pruning at Initialization (Hayou et al. 2021).
* IterSNIP, FORCE (de Jorge et al. 2021): the same at the pruned network, ``|theta dL/dw|`` with the gradient at w, many
  times. Pruned weights have such a score too: in FORCE they may return, in IterSNIP they may not. That is the whole
  difference.
* Fisher: ``w^2 F`` with F the diagonal of the empirical Fisher information (Theis et al. 2018, without the 1/2).
* Hutchinson: Optimal Brain Damage (LeCun et al. 1990), ``w^2 diag(H) / 2``, its diagonal estimated without bias.

Oracle: autograd and literal loops in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..batches import Batch
from ..network import PathNetwork
from ..select import Bracket
from ..weights import Weight
from .base import Scorer
from .curvature import hessian_diagonal
from .objective import Accumulator, DataPruner, Objective, Point, score_dtype

_CHUNK_VALUES = 2**25  # per-sample gradients held at a time, in numbers


@dataclass(frozen=True)
class SNIP(DataPruner):
    """Keeps the weights with the largest ``|w dL/dw|``, the gradient summed over all data before the absolute value.

    Published runs score about ten samples of each class (``batches.class_balanced``). More rounds than the paper's one
    make it :class:`IterSNIP`.

    Args:
        data, loss, train_mode: see :class:`DataPruner`.

    Determinism: the same data, weights and seed give the same masks; sums follow the order of the batches.

    Example:
        >>> masks = pathprune.prune(model, pathprune.SNIP(batches), density=0.05, example_input=x)
    """

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        objective = Objective(self, network, weights, seed)

        def score(guess: Bracket | None) -> None:
            gradient = objective.gradient(objective.point())
            for name, slope in gradient.items():
                weights[name].replace_scores(slope.mul_(network.tensors[name].detach()).abs_())

        return score


@dataclass(frozen=True)
class SBP(SNIP):
    """Sensitivity-based pruning: :class:`SNIP` under the name Robust Pruning at Initialization gives it."""


@dataclass(frozen=True)
class IterSNIP(SNIP):
    """Iterative SNIP: sensitivities of the pruned network, round after round; what is pruned stays pruned.

    Args:
        rounds: of the schedule (exponential, as in the paper, unless ``prune`` is told otherwise).
        data, loss, train_mode: see :class:`DataPruner`. Every round reads the data once.
    """

    rounds: int = field(default=60, kw_only=True)


@dataclass(frozen=True)
class FORCE(IterSNIP):
    """Foresight connection sensitivity: as :class:`IterSNIP`, but pruned weights return if they would now be felt.

    ``prune`` lets them return because this method says so (``regrows``); with ``allow_regrowth=False`` it is IterSNIP.
    The published code restarts its loader for each batch; here a round is one pass over ``data``.
    """

    @property
    def regrows(self) -> bool:
        return True


@dataclass(frozen=True)
class Fisher(DataPruner):
    """Keeps the weights with the largest ``w^2 F``, F the diagonal empirical Fisher information, sample by sample:
    ``F = mean over samples s of (dL_s/dw)^2`` with the true labels. (The square of a batch's mean gradient, which some
    codes call Fisher, is another number.)

    Args:
        data, loss: see :class:`DataPruner`; the loss of one sample is ``loss`` of a batch of one.
        chunk: samples whose gradients are made together by ``torch.func.vmap``; memory is ``chunk`` gradients. None: as
            many as fit 2^25 numbers. 1: one by one with plain autograd, which runs models vmap cannot.

    Raises:
        ValueError: ``train_mode``: a sample alone has no batch statistics; chunk < 1; a model that vmap cannot run.

    Determinism: the same data and weights give the same masks; sums follow the order of the samples.

    Example:
        >>> masks = pp.prune(model, pp.Fisher(loader), density=0.05, example_input=x)
    """

    chunk: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_mode:
            raise ValueError(f"{self.name}: train_mode: wanted False (samples are taken one by one), got True")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"{self.name}: chunk: wanted at least 1, got {self.chunk}")

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        objective = Objective(self, network, weights, seed)
        size = sum(weight.shape.numel() for weight in weights.values() if weight.scored)
        chunk = self.chunk or max(1, _CHUNK_VALUES // size)

        def score(guess: Bracket | None) -> None:
            point = objective.point()
            for name, information in mean_squared_gradient(objective, point, chunk).items():
                w = point[name].detach()
                weights[name].replace_scores(information.mul_(w).mul_(w))

        return score


@dataclass(frozen=True)
class Hutchinson(DataPruner):
    """Keeps the weights with the largest ``w^2 h / 2``: what deleting a weight costs to second order (OBD).

    h is the diagonal of the Hessian of L, estimated by ``mean of z * (H z)`` over Rademacher vectors z: unbiased, each
    with variance ``sum over j != i of H_ij^2``. Scores are signed: where the loss is concave along a
    weight, deleting it promises a gain, and it goes first.

    Args:
        probes: vectors a batch, each an extra backward pass. Every batch has its own, from ``prune``'s seed.
        data, loss, train_mode: see :class:`DataPruner`.

    Raises:
        ValueError: probes < 1; what :class:`SNIP` refuses.

    Determinism: the same data, weights and seed give the same masks.

    Example:
        >>> masks = pp.prune(model, pp.Hutchinson(loader, probes=16), density=0.05, example_input=x)
    """

    probes: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 1:
            raise ValueError(f"Hutchinson: probes: wanted at least 1, got {self.probes}")

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        objective = Objective(self, network, weights, seed)
        generator = torch.Generator().manual_seed(seed)

        def score(guess: Bracket | None) -> None:
            point = objective.point()
            for name, diagonal in hessian_diagonal(objective, point, self.probes, generator).items():
                w = point[name].detach()
                weights[name].replace_scores(diagonal.mul_(w).mul_(w).mul_(0.5))

        return score


def mean_squared_gradient(objective: Objective, point: Point, chunk: int) -> Point:
    """``mean over samples of (dL_s/dw)^2`` for each scored weight, ``chunk`` samples at a time."""
    leaves, ranks = objective.leaves(point), objective.network.replicas
    with objective.undisturbed(), Accumulator(leaves, lambda _, gradient: gradient.square_(), ranks) as total:
        for position, batch in objective.batches():
            with torch.no_grad():
                objective.loss(point, batch, position)  # for what it refuses: inside vmap no value can be looked at
            for indices in torch.arange(batch.size, device=objective.network.device).split(chunk):
                if chunk == 1:
                    total.begin(1)
                    objective.raw_loss(point, _samples(batch, indices), position).backward(inputs=total.inputs)
                    continue
                total.begin(len(indices), passes=len(indices))
                for name, gradients in _gradients_of_each(objective, point, batch, indices, position).items():
                    total.add(name, gradients.square_().sum(0))
    return total.mean()


def _gradients_of_each(objective: Objective, point: Point, batch: Batch, indices: Tensor, position: int) -> Point:
    """``[samples, *shape]`` for each scored weight."""
    fixed = {name: value.detach() for name, value in point.items()}
    scored = {name: fixed[name] for name in objective.leaves(point)}

    def loss(values: Point, index: Tensor) -> Tensor:
        return objective.raw_loss({**fixed, **values}, _samples(batch, index.reshape(1)), position)

    try:
        made = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(scored, indices)
    except (ValueError, RuntimeError) as error:  # not for the batch: its loss has been looked at
        if isinstance(error, torch.OutOfMemoryError):
            raise
        why = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"{objective.who}: chunk: wanted 1 for a model that torch.func.vmap cannot run ({why})"
        ) from error
    return {name: gradients.to(score_dtype(gradients)) for name, gradients in made.items()}


def _samples(batch: Batch, indices: Tensor) -> Batch:
    """Those samples of a batch; what has no batch axis is passed on."""

    def taken(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.index_select(0, indices) if value.dim() else value
        if isinstance(value, Mapping):
            return {key: taken(item) for key, item in value.items()}
        return type(value)(map(taken, value)) if isinstance(value, (tuple, list)) else value

    return replace(batch, args=taken(batch.args), kwargs=taken(batch.kwargs), target=taken(batch.target))
