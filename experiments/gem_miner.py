"""Gem-Miner: a mask that is trained (Sreenivasan et al. 2022, arXiv:2202.12002), derived anew from its description.

Every weight w_i stays as it was drawn and gets a score p_i in [0, 1]. The network runs with ``w_i round(p_i)``;
rounding passes gradients straight through, so ``dL/dp_i = w_i dL/d(w_i round(p_i))``. A penalty
``(lambda / 2) sum p_i^2`` pulls scores down. At the end of period k of n all but the ``round(N density^(k/n))`` largest
scores are set to 0 and frozen there: one threshold for all layers, ties by position, so the last period leaves exactly
the density asked for.

The masks keep what is not frozen. (The paper rounds once more at the end, which may leave fewer.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from pathprune.data import Split


def gem_miner(
    model: nn.Module,
    data: Split,
    density: float,
    seed: int,
    *,
    epochs: int,
    periods: int,
    rate: float = 0.03,
    decay: float = 1e-4,
    batch: int = 64,
) -> pp.Masks:
    """Masks of what training the scores leaves of a model whose weights stay as they are.

    Args:
        model: its weights of two dimensions or more are covered; other parameters are not trained. Batch norm
            statistics are updated on the way and put back afterwards, and so is the mode.
        density: of the weights kept, in (0, 1].
        seed: of the scores, U(1/2, 1) to begin with, and of the order of the images.
        epochs, periods: ``periods`` divides ``epochs``.
        rate: of Adam on the scores; 0.01 to 0.1 came out within a point of each other (one seed, density 5 %). SGD at
            0.1 moves scores too little in a few hundred steps.
        decay: lambda.

    Raises:
        ValueError: a density out of range, or epochs that periods do not divide.
    """
    if not 0 < density <= 1:
        raise ValueError(f"gem_miner: density: wanted a fraction in (0, 1], got {density}")
    if periods < 1 or epochs < 1 or epochs % periods:
        raise ValueError(f"gem_miner: periods: wanted at least 1, dividing the epochs, got {periods} of {epochs}")
    made = torch.Generator().manual_seed(seed)
    names = list(pp.Masks.ones(model))
    weights = {name: model.get_parameter(name).detach() for name in names}
    scores = {name: (1 - torch.rand(w.shape, generator=made) / 2).requires_grad_() for name, w in weights.items()}
    alive = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    total, samples = sum(w.numel() for w in weights.values()), len(data.train_images)
    optimizer = torch.optim.Adam(scores.values(), lr=rate, weight_decay=decay)
    was_training, statistics = model.training, {name: b.clone() for name, b in model.named_buffers()}
    model.train()
    try:
        for epoch in range(1, epochs + 1):
            for chosen in torch.randperm(samples, generator=made).split(batch):
                effective = {name: w * rounded(scores[name]) for name, w in weights.items()}
                output = torch.func.functional_call(model, effective, (data.train_images[chosen],))
                loss = F.cross_entropy(output, data.train_labels[chosen])
                slopes = torch.autograd.grad(loss, list(scores.values()))
                for score, slope in zip(scores.values(), slopes, strict=True):
                    score.grad = slope
                optimizer.step()
                project(scores, alive)
            if epoch % (epochs // periods) == 0:
                share = density ** (epoch // (epochs // periods) / periods)
                alive = largest(scores, alive, round(total * share))
                project(scores, alive)
    finally:
        model.train(was_training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(statistics[name])
    return pp.Masks(alive, {"method": "Gem-Miner", "seed": seed})


def rounded(score: Tensor) -> Tensor:
    """0 or 1, with the gradient of the identity."""
    return score + ((score >= 0.5).to(score.dtype) - score).detach()


@torch.no_grad()
def project(scores: dict[str, Tensor], alive: dict[str, Tensor]) -> None:
    """Scores back into [0, 1], frozen ones to 0."""
    for name, score in scores.items():
        score.clamp_(0, 1).mul_(alive[name])


def largest(scores: dict[str, Tensor], alive: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    """What stays: the ``keep`` largest of those that are not frozen."""
    values, live = [score.detach() for score in scores.values()], list(alive.values())
    threshold = pp.select_threshold(values, keep, masks=live)
    return dict(zip(scores, pp.keep_masks(threshold, values, masks=live), strict=True))
