"""How far are masks made before training from a trained one? Gem-Miner, and magnitude after training, as ceilings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pathprune.demo import train

from .experiment import (
    Case,
    Experiment,
    Finding,
    Row,
    curves,
    distinct,
    log_densities,
    mean,
    pairs,
    percents,
    shown,
    where,
)
from .gem_miner import gem_miner
from .training import image_case, masks_of, scoring_data, small_vgg, split_of, trained_accuracy

AT_INITIALIZATION = ("SynFlow", "PHEW", "SNIP", "random, ERK")
TRAINED = "Gem-Miner"
LATE = "magnitude after training"
DENSITIES = (0.05, 0.01)


def cases(quick: bool, seeds: int, task: Case) -> list[Case]:
    mining = {"mining_epochs": 2, "periods": 2} if quick else {"mining_epochs": 12, "periods": 4}
    kept = (0.05,) if quick else DENSITIES
    settings = [("dense", 1.0)]
    settings += [
        (m, d) for d in kept for m in (TRAINED, LATE, *(AT_INITIALIZATION[:1] if quick else AT_INITIALIZATION))
    ]
    return [
        image_case(quick, task, method=method, density=density, seed=seed, **(mining if method == TRAINED else {}))
        for method, density in settings
        for seed in range(1 if quick else seeds)
    ]


def run(case: Case, folder: Path | None) -> dict[str, Any]:
    data, method = split_of(case, folder), case["method"]
    model, batches = small_vgg(case["seed"], data.classes), scoring_data(data)
    density, seed = case["density"], case["seed"]
    masks = None
    if method == TRAINED:
        masks = gem_miner(model, data, density, seed, epochs=case["mining_epochs"], periods=case["periods"])
    elif method == LATE:
        train(model, data, None, seed, case["epochs"])
        masks = masks_of(model, "magnitude", density, seed, batches)
    elif method != "dense":
        masks = masks_of(model, method, density, seed, batches)
    result: dict[str, Any] = {}
    if method == TRAINED and masks is not None:  # the mask alone: shuffled within layers, from the same weights
        again = copy.deepcopy(model)
        result["shuffled"] = trained_accuracy(again, data, masks.shuffle(seed), case)
    return {**result, "accuracy": trained_accuracy(model, data, masks, case)}


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    densities = [density for density in distinct(rows, "density") if density < 1]
    body = []
    for method in distinct(rows, "method"):
        if method == "dense":
            body.append([method, *([shown(where(rows, method=method))] * len(densities))])
            continue
        own = where(rows, method=method)
        body.append([method, *(shown(where(own, density=density)) for density in densities)])
        if method == TRAINED:
            cells = [shown(where(own, density=density), "shuffled") for density in densities]
            body.append([f"{TRAINED}, shuffled in layers", *cells])
    return ["accuracy, %", *(f"density {percents(density)}" for density in densities)], body


def plot(rows: Sequence[Row], figure: Any) -> None:
    axes = figure.subplots()
    pruned = [row for row in rows if row["density"] < 1]
    curves(axes, pruned, "density", "accuracy", "method", 100)
    log_densities(axes, pruned)
    axes.axhline(100 * mean(where(rows, method="dense"), "accuracy"), color="#333333", linestyle="--", label="dense")
    axes.set_ylabel("test accuracy, %", fontsize=9)
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")


def findings(rows: Sequence[Row]) -> list[Finding]:
    found = []
    mined = where(rows, method=TRAINED)
    by = ("density", "seed")
    for method in AT_INITIALIZATION:
        theirs = where(rows, method=method)
        if theirs:
            against = pairs(mined, theirs, by)
            found.append(Finding(against.verdict(), f"{TRAINED} over {method}: {against.text()}."))
    late = pairs(mined, where(rows, method=LATE), by)
    found.append(Finding("measured", f"{TRAINED} over {LATE}: {late.text()}."))
    shuffled = pairs(mined, [{**row, "accuracy": row["shuffled"]} for row in mined], by)
    found.append(Finding("measured", f"{TRAINED} over its mask shuffled within layers: {shuffled.text()}."))
    dense = mean(where(rows, method="dense"), "accuracy")
    for density in distinct(mined, "density"):
        gap = 100 * (dense - mean(where(mined, density=density), "accuracy"))
        found.append(Finding("measured", f"{TRAINED} at {percents(density)} is {gap:.1f} points below dense."))
    return found


EXPERIMENT = Experiment(
    name="trained_mask",
    title="A trained mask as the ceiling",
    claim="a mask found by training scores of frozen weights (Gem-Miner) beats SNIP, SynFlow and other masks "
    "made at initialization (Sreenivasan et al. 2022, arXiv:2202.12002).",
    setting="VGG of four convolutions, {images}. Scores are trained for 12 epochs in four periods; all "
    "networks are then trained for six epochs from the weights as they were drawn, but magnitude after "
    "training, which goes on from six epochs of dense training.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    findings=findings,
    size=(8, 3.8),
)
