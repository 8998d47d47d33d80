"""Does the path kernel predict how fast pruned networks learn? Predictions beside real training, with correlations.

python benchmarks/convergence.py [--seeds 3] [--out benchmarks/results/convergence]

An MLP on a few of scikit-learn's digits, pruned at initialization by several methods at several densities and trained
by full-batch gradient descent on the mean squared error, one step size for all. Three predictions are made before
training: the trace of the path kernel (architecture and weights alone), the trace of the tangent kernel, and the loss
of the linearised network by its tangent kernel. Density alone explains much: correlations are also given within each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import pathprune as pp
from pathprune import models

DENSITIES = (0.5, 0.2, 0.08)
METHODS = {
    "SynFlow": lambda: pp.SynFlow(),
    "SynFlow-L2": lambda: pp.SynFlowL2(),
    "PHEW": lambda: pp.PHEW(),
    "magnitude": lambda: pp.Magnitude(),
    "random": lambda: pp.Random(),
}


def task(samples: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.as_tensor(digits.data[:samples] / 16, dtype=torch.float64)
    labels = torch.as_tensor(digits.target[:samples])
    return x - x.mean(), nn.functional.one_hot(labels, 10).double() - 0.1


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


def correlation(a: list[float], b: list[float]) -> dict[str, float]:
    """Pearson's and Spearman's."""
    first, second = torch.tensor(a), torch.tensor(b)
    ranks = torch.stack([first.argsort().argsort().double(), second.argsort().argsort().double()])
    return {
        "pearson": float(torch.corrcoef(torch.stack([first.double(), second.double()]))[0, 1]),
        "spearman": float(torch.corrcoef(ranks)[0, 1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "convergence")
    options = parser.parse_args()
    x, y = task(options.samples)
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        model = models.mlp((64, 48, 48, 10), bias=False).double()
        dense = pp.predict_convergence(model, x, y, steps=1)
        rate = 1 / float(dense.eigenvalues[0])
        for name, make in METHODS.items():
            given = {"schedule": "one-shot"} if name in ("magnitude", "random") else {}
            for density in DENSITIES:
                masks = pp.prune(
                    model, make(), density=density, example_input=x[:1], seed=seed, progress=False, **given
                )
                found = pp.predict_convergence(model, x, y, steps=options.steps, learning_rate=rate, masks=masks)
                real = trained(model, masks, x, y, options.steps, rate)
                rows.append(
                    {
                        "seed": seed,
                        "method": name,
                        "density": density,
                        "log2_path_kernel_trace": found.log2_path_kernel_trace,
                        "log2_ntk_trace": float(found.eigenvalues.sum().log2()),
                        "predicted": float(found.loss[-1] / found.loss[0]),
                        "trained": real / float(found.loss[0]),
                    }
                )
                print(
                    *(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True
                )
    keys = ("log2_path_kernel_trace", "log2_ntk_trace", "predicted")

    def correlations(some: list[dict]) -> dict[str, dict[str, float]]:
        return {key: correlation([row[key] for row in some], [row["trained"] for row in some]) for key in keys}

    found = correlations(rows)
    within = {str(d): correlations([row for row in rows if row["density"] == d]) for d in DENSITIES}
    print(json.dumps({"all": found, "at one density": within}, indent=2))
    about = {"samples": options.samples, "steps": options.steps, "seeds": options.seeds}
    options.out.with_suffix(".json").write_text(
        json.dumps({"about": about, "correlation": found, "at one density": within, "rows": rows}, indent=1) + "\n"
    )
    plot(rows, found, options.out.with_suffix(".png"))


def plot(rows: list[dict], found: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    titles = {
        "log2_path_kernel_trace": "log2 trace of the path kernel",
        "log2_ntk_trace": "log2 trace of the tangent kernel / n",
        "predicted": "loss of the linearised network",
    }
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 3, sharey=True), titles.items(), strict=True):
        for name in METHODS:
            own = [row for row in rows if row["method"] == name]
            sizes = [20 + 120 * row["density"] for row in own]
            axes.scatter([r[key] for r in own], [r["trained"] for r in own], s=sizes, label=name, alpha=0.75)
        axes.set(xlabel=title, title=f"Spearman {found[key]['spearman']:.2f}, Pearson {found[key]['pearson']:.2f}")
        axes.grid(alpha=0.3)
    axes = figure.axes[0]
    axes.set_ylabel("loss after training / before")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
