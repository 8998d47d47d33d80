"""Layer collapse against compression, up to the largest one (SynFlow's first figure).

An MLP of six layers with batch norm, every method at compressions 10^a up to N / L, one weight a layer. Read off: the
fewest weights in a layer, whether any path is left, and the accuracy after training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pathprune as pp

from .experiment import Case, Experiment, Finding, Row, curves, distinct, mean, percents, shown, where
from .training import CLASSES, METHODS, masks_of, normed_mlp, scoring_data, split_of, trained_accuracy

SIZES = (64, 100, 100, 100, 100, 100, 10)
WEIGHTS = sum(a * b for a, b in pairwise(SIZES))
LAYERS = len(SIZES) - 1
LARGEST = math.floor(100 * math.log10(WEIGHTS / LAYERS)) / 100  # one weight for each layer
LEVELS = (1.0, 2.0, 2.5, 3.0, 3.5, LARGEST)


def cases(quick: bool, seeds: int, task: Case) -> list[Case]:
    methods = ("PHEW", "magnitude") if quick else tuple(METHODS)
    levels = (1.0, 3.0) if quick else LEVELS
    epochs = 1 if quick else 10
    return [
        {"task": "digits", "method": method, "level": level, "seed": seed, "epochs": epochs}
        for method in methods
        for level in levels
        for seed in range(1 if quick else seeds)
    ]


def run(case: Case, folder: Path | None) -> dict[str, Any]:
    data = split_of(case, folder)
    model = normed_mlp(SIZES, case["seed"])
    masks = masks_of(model, case["method"], 10 ** -case["level"], case["seed"], scoring_data(data))
    counts = [count.kept for count in masks.counts().values()]
    effective = pp.path_counts(model, masks, data.train_images[:1]).effective
    accuracy = trained_accuracy(model, data, masks, case)
    return {"fewest": min(counts), "kept": masks.kept, "live": effective.kept, "accuracy": accuracy}


def first_collapse(rows: Sequence[Row]) -> float:
    """The mean over seeds of the first level at which a layer is empty; inf if none is for some seed."""
    firsts = [
        min((r["level"] for r in where(rows, seed=seed) if r["fewest"] == 0), default=math.inf)
        for seed in distinct(rows, "seed")
    ]
    return sum(firsts) / len(firsts)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    levels = distinct(rows, "level")
    head = ["fewest weights in a layer / accuracy", *(f"10^{level:g}" for level in levels)]
    body = []
    for method in distinct(rows, "method"):
        cells = []
        for level in levels:
            own = where(rows, method=method, level=level)
            cells.append(f"{mean(own, 'fewest'):.3g} / {100 * mean(own, 'accuracy'):.0f} %" if own else "-")
        body.append([method, *cells])
    return head, body


def plot(rows: Sequence[Row], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    curves(left, rows, "level", "fewest", "method")
    left.set_yscale("symlog", linthresh=1)
    left.set_ylim(bottom=-0.2)
    left.set_ylabel("fewest weights in a layer", fontsize=9)
    curves(right, rows, "level", "accuracy", "method", scale=100)
    right.set_ylabel("test accuracy after training, %", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("log10 compression", fontsize=9)
    right.legend(frameon=False, fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")


def findings(rows: Sequence[Row]) -> list[Finding]:
    found = []
    methods = distinct(rows, "method")
    collapse = {method: first_collapse(where(rows, method=method)) for method in methods}
    never = [method for method in methods if collapse[method] == math.inf]
    if "SynFlow" in methods:
        safe = collapse["SynFlow"] == math.inf
        text = (
            "SynFlow keeps a weight in every layer at every compression and seed"
            if safe
            else (f"SynFlow empties a layer, first at 10^{collapse['SynFlow']:.2f} in the mean")
        )
        found.append(Finding("agrees" if safe else "contradicts", text + f", up to 10^{LARGEST:g} (N / L)."))
    for method in ("random", "magnitude", "SNIP", "GraSP"):
        if method in methods:
            below = collapse[method] < math.inf
            when = (
                f"collapses first at 10^{collapse[method]:.2f} in the mean"
                if below
                else "empties no layer in some seed"
            )
            found.append(Finding("agrees" if below else "contradicts", f"{method} {when}."))
    others = [m for m in never if m not in ("SynFlow", "random", "magnitude", "SNIP", "GraSP")]
    late = [f"{m} (10^{collapse[m]:.2f})" for m in methods if collapse[m] < math.inf]
    found.append(
        Finding(
            "measured",
            f"of the others, empty no layer for at least one seed: {', '.join(others) or 'none'}; first collapse of "
            f"those that do: {', '.join(late) or 'none'}.",
        )
    )
    at = max(distinct(rows, "level"))
    alive = [m for m in methods if all(r["live"] for r in where(rows, method=m, level=at))]
    found.append(Finding("measured", f"at 10^{at:g} a path is left for every seed by: {', '.join(alive) or 'none'}."))
    shares = {m: mean([{"s": r["live"] / r["kept"]} for r in where(rows, method=m) if r["kept"]], "s") for m in methods}
    dead = [f"{m} {percents(round(1 - share, 3))}" for m, share in shares.items() if share < 0.99]
    found.append(
        Finding("measured", f"kept weights that lie on no path, mean over compressions: {', '.join(dead) or 'none'}.")
    )
    for level in distinct(rows, "level"):
        best = sorted(methods, key=lambda m: -mean(where(rows, method=m, level=level), "accuracy"))[:3]
        ranked = [(method, where(rows, method=method, level=level)) for method in best]
        if mean(ranked[0][1], "accuracy") < 2 / CLASSES:
            found.append(Finding("measured", f"at 10^{level:g} no method reaches twice the accuracy of chance."))
            continue
        text = ", ".join(f"{method} {shown(own)} %" for method, own in ranked)
        found.append(Finding("measured", f"most accurate at 10^{level:g}: {text}."))
    return found


EXPERIMENT = Experiment(
    name="collapse",
    title="Layer collapse against compression",
    claim="SynFlow reaches the largest possible compression without emptying a layer; random, magnitude, SNIP "
    "and GraSP empty one far earlier (Tanaka et al. 2020, arXiv:2006.05467).",
    setting=f"MLP {'-'.join(map(str, SIZES))} with batch norm, {WEIGHTS:,} weights, on digits; all methods with "
    "their own rounds; ten epochs after pruning.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    findings=findings,
    size=(12, 4.2),
)
