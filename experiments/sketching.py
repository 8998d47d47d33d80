"""Sketching: keep the largest scores, or draw with probabilities in proportion to them?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pathprune as pp

from .experiment import (
    Case,
    Experiment,
    Finding,
    Row,
    curves,
    distinct,
    log_densities,
    pairs,
    percents,
    shown,
    where,
)
from .training import METHODS, image_case, masks_of, scoring_data, small_vgg, split_of, trained_accuracy

BASES = ("magnitude", "SynFlow", "SynFlow-L2", "SNIP")
DATA_FREE = BASES[:3]
DENSITIES = (0.05, 0.01)


def cases(quick: bool, seeds: int, task: Case) -> list[Case]:
    return [
        image_case(quick, task, base=base, chosen=chosen, density=density, seed=seed)
        for base in (("magnitude",) if quick else BASES)
        for density in ((0.05,) if quick else DENSITIES)
        for chosen in ("largest", "drawn")
        for seed in range(1 if quick else seeds)
    ]


def run(case: Case, folder: Path | None) -> dict[str, Any]:
    data = split_of(case, folder)
    model, batches = small_vgg(case["seed"], data.classes), scoring_data(data)
    base = METHODS[case["base"]](batches)
    pruner = pp.Sketch(base) if case["chosen"] == "drawn" else base
    masks = masks_of(model, pruner, case["density"], case["seed"], batches)
    effective = pp.path_counts(model, masks, data.train_images[:1]).effective
    live = effective.kept / masks.kept
    return {"live": live, "accuracy": trained_accuracy(model, data, masks, case)}


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    densities = distinct(rows, "density")
    body = [
        [base, chosen, *(shown(where(rows, base=base, chosen=chosen, density=density)) for density in densities)]
        for base in distinct(rows, "base")
        for chosen in distinct(rows, "chosen")
    ]
    return ["scores of", "weights", *(f"accuracy at {percents(d)}, %" for d in densities)], body


def plot(rows: Sequence[Row], figure: Any) -> None:
    bases = distinct(rows, "base")
    for axes, base in zip(figure.subplots(1, len(bases), sharey=True, squeeze=False)[0], bases, strict=True):
        curves(axes, where(rows, base=base), "density", "accuracy", "chosen", 100)
        log_densities(axes, rows)
        axes.set_title(base, fontsize=10, loc="left")
    figure.axes[0].set_ylabel("test accuracy, %", fontsize=9)
    figure.axes[0].legend(frameon=False, fontsize=8)


def findings(rows: Sequence[Row]) -> list[Finding]:
    found = []
    for base in distinct(rows, "base"):
        own = where(rows, base=base)
        against = pairs(where(own, chosen="drawn"), where(own, chosen="largest"), ("density", "seed"))
        verdict = against.verdict() if base in DATA_FREE else "measured"
        found.append(Finding(verdict, f"{base}, drawn over largest: {against.text()}."))
    free = [row for row in rows if row["base"] in DATA_FREE]
    for density in distinct(rows, "density"):
        own = where(free, density=density)
        against = pairs(where(own, chosen="drawn"), where(own, chosen="largest"), ("base", "seed"))
        found.append(Finding("measured", f"all data-free bases at {percents(density)}, drawn: {against.text()}."))
    against = pairs(where(rows, chosen="drawn"), where(rows, chosen="largest"), ("base", "density", "seed"), "live")
    found.append(Finding("measured", f"kept weights that lie on a path, drawn over largest: {against.text()}."))
    return found


EXPERIMENT = Experiment(
    name="sketching",
    title="Sketching: top-k against sampling",
    claim="A mask drawn at random with probabilities given by a method's scores is better than one of its "
    "largest scores, in the data-free case (Bar and Giryes 2023, arXiv:2305.17559).",
    setting="VGG of four convolutions, six epochs on {images}. Draws are global and without "
    "replacement; methods of many rounds draw in the last one.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    findings=findings,
    size=(12, 3.6),
)
