"""Does the path kernel predict how fast pruned networks learn? Predictions beside real training, with correlations.

An MLP on a few of scikit-learn's digits, pruned at initialization by several methods at several densities and trained
by full-batch gradient descent on the mean squared error, one step size for all. Three predictions are made before
training: the trace of the path kernel (architecture and weights alone), the trace of the tangent kernel, and the loss
of the linearised network by its tangent kernel. Density alone explains much: correlations are also given within each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pathprune as pp
from pathprune.models import mlp

from .experiment import COLORS, Case, Experiment, Finding, Row, distinct, percents, tidy, where
from .training import CLASSES, masks_of

METHODS = ("SynFlow", "SynFlow-L2", "PHEW", "magnitude", "random")
DENSITIES = (0.5, 0.2, 0.08)
PREDICTIONS = {
    "log2_path_kernel_trace": "log2 trace of the path kernel",
    "log2_ntk_trace": "log2 trace of the tangent kernel / n",
    "predicted": "loss of the linearised network",
}
STRONG = 0.5  # a rank correlation that counts as a prediction


def cases(quick: bool, seeds: int, task: Case) -> list[Case]:
    sizes = {"samples": 10, "steps": 3, "width": 12} if quick else {"samples": 24, "steps": 60, "width": 48}
    return [
        {"method": method, "density": density, "seed": seed, **sizes}
        for seed in range(1 if quick else seeds)
        for method in (METHODS[-2:] if quick else METHODS)
        for density in (DENSITIES[:2] if quick else DENSITIES)
    ]


def first_digits(samples: int) -> tuple[Tensor, Tensor]:
    """Centred pixels [n, 64] and centred one-hot labels [n, 10], float64."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.as_tensor(digits.data[:samples] / 16, dtype=torch.float64)
    labels = torch.as_tensor(digits.target[:samples])
    return x - x.mean(), nn.functional.one_hot(labels, CLASSES).double() - 1 / CLASSES


@functools.cache
def network_of(seed: int, width: int, samples: int) -> tuple[nn.Module, float]:
    """The dense network, and a step size that suits it: one over the largest eigenvalue of its tangent kernel / n."""
    torch.manual_seed(seed)
    model = mlp((64, width, width, CLASSES), bias=False).double()
    x, y = first_digits(samples)
    return model, 1 / float(pp.predict_convergence(model, x, y, steps=1).eigenvalues[0])


def trained(model: nn.Module, masks: pp.Masks, x: Tensor, y: Tensor, steps: int, rate: float) -> float:
    """The loss after full-batch gradient descent on what the masks leave."""
    weights = {n: model.get_parameter(n).detach() * masks[n] for n in masks}
    for step in range(steps + 1):
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        out = torch.func.functional_call(model, leaves, (x,))
        loss = (out - y).square().sum() / (2 * len(x))
        if step == steps:
            return float(loss.detach())
        slopes = torch.autograd.grad(loss, list(leaves.values()))
        weights = {n: w - rate * g * masks[n] for (n, w), g in zip(weights.items(), slopes, strict=True)}
    raise AssertionError


def run(case: Case, folder: Path | None) -> dict[str, Any]:
    x, y = first_digits(case["samples"])
    model, rate = network_of(case["seed"], case["width"], case["samples"])
    masks = masks_of(model, case["method"], case["density"], case["seed"], [(x, y.argmax(1))])
    found = pp.predict_convergence(model, x, y, steps=case["steps"], learning_rate=rate, masks=masks)
    before = float(found.loss[0])
    return {
        "log2_path_kernel_trace": found.log2_path_kernel_trace,
        "log2_ntk_trace": float(found.eigenvalues.sum().log2()),
        "predicted": float(found.loss[-1]) / before,
        "trained": trained(model, masks, x, y, case["steps"], rate) / before,
    }


def spearman(rows: Sequence[Row], name: str) -> float:
    """The rank correlation of a prediction with the loss after training; ties share their mean rank."""
    finite = [row for row in rows if math.isfinite(row[name])]
    if len(finite) < 2:
        return math.nan
    both = torch.tensor([[row[name] for row in finite], [row["trained"] for row in finite]], dtype=torch.float64)
    below = (both[:, None, :] < both[:, :, None]).sum(2) + (both[:, None, :] <= both[:, :, None]).sum(2)
    return float(torch.corrcoef(below.double())[0, 1])


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    densities = distinct(rows, "density")
    body = [
        [title, f"{spearman(rows, name):.2f}", *(f"{spearman(where(rows, density=d), name):.2f}" for d in densities)]
        for name, title in PREDICTIONS.items()
    ]
    return ["Spearman with the loss after training", "all", *(f"density {percents(d)}" for d in densities)], body


def plot(rows: Sequence[Row], figure: Any) -> None:
    for axes, (name, title) in zip(figure.subplots(1, 3, sharey=True), PREDICTIONS.items(), strict=True):
        for number, method in enumerate(distinct(rows, "method")):
            own = where(rows, method=method)
            sizes = [20 + 120 * row["density"] for row in own]
            at = ([row[name] for row in own], [row["trained"] for row in own])
            axes.scatter(*at, s=sizes, label=method, alpha=0.75, color=COLORS[number])
        axes.set_xlabel(title, fontsize=9)
        axes.set_title(f"Spearman {spearman(rows, name):.2f}", fontsize=10, loc="left")
        tidy(axes)
    figure.axes[0].set_ylabel("loss after training / before", fontsize=9)
    figure.axes[0].legend(frameon=False, fontsize=8)


def verdict_of(correlation: float, sign: int) -> str:
    if sign * correlation >= STRONG:
        return "agrees"
    return "contradicts" if sign * correlation <= 0 else "mixed"


def findings(rows: Sequence[Row]) -> list[Finding]:
    found = []
    for name, title in PREDICTIONS.items():
        sign = 1 if name == "predicted" else -1  # a larger trace should mean a smaller loss
        whole = spearman(rows, name)
        found.append(Finding(verdict_of(whole, sign), f"{title}, all networks: rank correlation {whole:.2f}."))
        for density in distinct(rows, "density"):
            within = spearman(where(rows, density=density), name)
            found.append(
                Finding(verdict_of(within, sign), f"{title}, density {percents(density)} alone: {within:.2f}.")
            )
    return found


EXPERIMENT = Experiment(
    name="convergence",
    title="The path kernel as a predictor of convergence",
    claim="the path kernel's trace predicts, without data, how fast a pruned network learns (Gebhart, Saxena "
    "and Schrater 2021, arXiv:2101.10552).",
    setting="MLP 64-48-48-10 without biases on 24 digits, 60 steps of full-batch gradient descent on the squared "
    f"error, one step size for all; a rank correlation of {STRONG} or more in the claimed direction counts "
    "as agreement, one in the other direction as contradiction.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    findings=findings,
    size=(12, 3.8),
)
