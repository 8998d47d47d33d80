"""``python -m pathprune.demo``: prunes a ResNet-50, then trains pruned networks on handwritten digits.

Everything is seeded; results go to ``demo-output``. Needs transformers, scikit-learn and matplotlib
(``pip install 'pathprune[cli,plot,examples]'``), no network.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._mask_io import write_atomically
from .data import Split, digits
from .masks import Masks
from .models import convnet_digits
from .plots import plot_accuracy
from .pruners import Magnitude, Pruner, Random, SynFlow
from .pruning import prune
from .report import Report
from .tables import percent, table

NEEDED = ("transformers", "sklearn", "matplotlib")
METHODS = (SynFlow(), Magnitude(), Random())
DENSITIES = (0.1, 0.02)


# -------------------------------------------------------------------------------- 1. a real network


def hugging_face_resnet(seed: int = 0, **config: Any) -> nn.Module:
    """A ResNet of transformers with random weights; without ``config`` ResNet-50 (v1.5) for 1000 classes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    return ResNetForImageClassification(ResNetConfig(**{"num_labels": 1000, **config})).eval()


def published_scores(model: nn.Module, shape: Sequence[int]) -> tuple[float, int, int]:
    """SynFlow as published, in the model's own precision: absolute weights, ones, autograd.

    Returns:
        R; scores that are NaN or infinite; scores in all.
    """
    positive = copy.deepcopy(model).eval()
    for tensor in positive.state_dict().values():
        tensor.abs_()
    out = positive(torch.ones(tuple(shape)))
    total = getattr(out, "logits", out).sum()
    total.backward()
    scores = [p * p.grad for p in positive.parameters() if p.grad is not None and p.dim() > 1]
    bad = sum(int((~score.isfinite()).sum()) for score in scores)
    return float(total.detach()), bad, sum(score.numel() for score in scores)


def prune_classifier(model: nn.Module, size: int, rounds: int, density: float, out: Path) -> Report:
    """Prunes an image classifier by SynFlow, prints and writes what was left."""
    shape = (1, 3, size, size)
    masks = prune(model, SynFlow(rounds=rounds), density=density, example_input=torch.ones(shape))
    assert isinstance(masks, Masks)
    report = Report.of(masks)
    print(f"\n{report}\n")
    total, bad, of = published_scores(model, shape)
    how = "The published way (absolute weights, autograd, float32)"
    if bad:
        print(f"{how} fails here:")
        print(f"R = {total}, and {bad:,} of its {of:,} scores are infinite or NaN.")
    else:
        print(f"{how} finds R = {total:.4g}; all scores are finite.")
    masks.save(out / "resnet50-masks.safetensors")
    report.to_json(out / "resnet50.json")
    report.plot(out / "resnet50.png")
    return report


# -------------------------------------------------------------------------------- 2. real training


@dataclass
class Run:
    """One training run: test accuracy after every epoch."""

    method: str
    density: float
    effective_density: float
    kept: int
    seed: int
    accuracy: list[float]
    prune_seconds: float
    train_seconds: float


def train(model: nn.Module, data: Split, masks: Masks | None, seed: int, epochs: int, rate: float = 0.1) -> list[float]:
    """SGD with momentum and a one-cycle schedule up to ``rate``; pruned weights stay zero.

    Returns:
        Test accuracy after each epoch.
    """
    batch = 64
    samples = len(data.train_images)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * -(-samples // batch))
    order = torch.Generator().manual_seed(seed)
    keeping = masks.maintain(model, optimizer) if masks is not None else None
    accuracy = []
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(samples, generator=order).split(batch):
            loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
        accuracy.append(accuracy_of(model, data.test_images, data.test_labels))
    if keeping is not None:
        keeping.remove()
    return accuracy


def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of images put in their class; a thousand at a time, so that large test sets fit."""
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000), strict=True)]
    return int(sum(right)) / len(labels)


def network_of(seed: int) -> nn.Module:
    """The small convolutional network, its weights drawn by the seed."""
    torch.manual_seed(seed)
    return convnet_digits()


def one_run(method: Pruner | None, density: float, seed: int, data: Split, epochs: int) -> Run:
    """Prunes at initialization (None: does not) and trains."""
    model, began = network_of(seed), time.perf_counter()
    masks, effective, kept, name = (
        None,
        1.0,
        sum(p.numel() for p in model.parameters() if p.dim() > 1),
        "dense",
    )
    if method is not None:
        example = data.train_images[:1]
        made = prune(model, method, density=density, example_input=example, seed=seed, progress=False)
        assert isinstance(made, Masks)
        masks, kept, name = made, made.kept, method.name
        effective = Report.of(made).effective_density or 0.0
    pruned = time.perf_counter()
    accuracy = train(model, data, masks, seed, epochs)
    times = (round(pruned - began, 3), round(time.perf_counter() - pruned, 3))
    return Run(name, density, effective, kept, seed, accuracy, *times)


def train_on_digits(
    out: Path,
    *,
    methods: Sequence[Pruner] = METHODS,
    densities: Sequence[float] = DENSITIES,
    seeds: Sequence[int] = (0, 1),
    epochs: int = 8,
) -> list[Run]:
    """Trains the dense network and every pruned one from the same initial weights; prints, writes, plots."""
    data = digits()
    cases = [(None, 1.0), *((method, density) for density in densities for method in methods)]
    runs = []
    for number, (method, density) in enumerate(cases, 1):
        for seed in seeds:
            runs.append(one_run(method, density, seed, data, epochs))
        if sys.stderr.isatty():
            print(f"\rtrained {number} of {len(cases)} networks", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(accuracy_table(runs))
    text = json.dumps([asdict(run) for run in runs], indent=2) + "\n"
    write_atomically(out / "digits.json", [text.encode()])
    plot_accuracy(curves(runs), out / "digits.png")
    return runs


def curves(runs: Sequence[Run]) -> dict[tuple[str, float], list[float]]:
    """(method, density) -> test accuracy after each epoch, the mean over seeds."""
    grouped: dict[tuple[str, float], list[list[float]]] = {}
    for run in runs:
        grouped.setdefault((run.method, run.density), []).append(run.accuracy)
    return {key: torch.tensor(many).mean(0).tolist() for key, many in grouped.items()}


def accuracy_table(runs: Sequence[Run]) -> str:
    """A row for each method and density."""
    grouped: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.method, run.density), []).append(run)
    rows = []
    for (method, density), same in grouped.items():
        effective = sum(run.effective_density for run in same) / len(same)
        scores = [run.accuracy[-1] for run in same]
        by_seed = ", ".join(f"{100 * score:.1f}" for score in scores)
        mean = f"{100 * sum(scores) / len(scores):.1f} %"
        rows.append([method, percent(density), percent(effective), f"{same[0].kept:,}", mean, by_seed])
    return table(["pruned by", "density", "effective", "weights", "test accuracy", "of each seed"], rows)


# -------------------------------------------------------------------------------- all


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both parts."""
    parser = argparse.ArgumentParser(prog="python -m pathprune.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for results")
    parser.add_argument("--rounds", type=int, default=100, help="rounds of SynFlow on the ResNet-50")
    parser.add_argument("--epochs", type=int, default=8, help="epochs on the digits")
    given = parser.parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"needs {', '.join(missing)}: pip install 'pathprune[cli,plot,examples]'")
    given.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    print("1. An unmodified Hugging Face ResNet-50, random weights, 224 x 224 images:", flush=True)
    print(f"   {given.rounds} rounds of SynFlow to 5 % in float32.", flush=True)
    prune_classifier(hugging_face_resnet(), 224, given.rounds, 0.05, given.out)
    print("\n2. A small convolutional network on scikit-learn's handwritten digits (8 x 8): pruned, then")
    print(f"   trained for {given.epochs} epochs with the pruned weights held at zero.\n", flush=True)
    train_on_digits(given.out, epochs=given.epochs)
    files = ", ".join(sorted(path.name for path in given.out.iterdir()))
    print(f"\n{time.perf_counter() - began:.0f} s in all. Written to {given.out}: {files}")


if __name__ == "__main__":
    main()
