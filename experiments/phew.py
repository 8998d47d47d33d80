"""PHEW against SynFlow and SynFlow-L2: widths of layers, trace of the path kernel, accuracy, against density."""

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
    mean,
    pairs,
    percents,
    shown,
    where,
)
from .training import image_case, masks_of, scoring_data, small_vgg, split_of, trained_accuracy

METHODS: dict[str, Any] = {
    "PHEW": "PHEW",
    "SynFlow": "SynFlow",
    "SynFlow-L2": "SynFlow-L2",
    "SynFlow-L2, phew form": pp.SynFlowL2(variant="phew"),
    "random, ERK": "random, ERK",
}
DENSITIES = (0.1, 0.02, 0.005)


def cases(quick: bool, seeds: int, task: Case) -> list[Case]:
    return [
        image_case(quick, task, method=method, density=density, seed=seed)
        for method in (("PHEW", "SynFlow-L2") if quick else METHODS)
        for density in ((0.02,) if quick else DENSITIES)
        for seed in range(1 if quick else seeds)
    ]


def run(case: Case, folder: Path | None) -> dict[str, Any]:
    data = split_of(case, folder)
    model = small_vgg(case["seed"], data.classes)
    batches = scoring_data(data)
    masks = masks_of(model, METHODS[case["method"]], case["density"], case["seed"], batches)
    network = pp.PathNetwork.from_module(model, data.train_images[:1])
    hidden = list(pp.path_counts(network, masks).layers.values())[:-1]
    trace = pp.PathKernel(network, masks=masks).log2_trace()
    return {
        "width": sum(r.live_outputs for r in hidden) / sum(r.outputs for r in hidden),
        "narrowest": min(r.live_outputs / r.outputs for r in hidden),
        "log2_trace": trace,
        "accuracy": trained_accuracy(model, data, masks, case),
    }


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    densities = distinct(rows, "density")
    head = ["accuracy, % (live units, %; log2 trace)", *(percents(density) for density in densities)]
    body = []
    for method in distinct(rows, "method"):
        cells = []
        for density in densities:
            own = where(rows, method=method, density=density)
            about = f" ({100 * mean(own, 'width'):.0f}; {mean(own, 'log2_trace'):.1f})"
            cells.append(shown(own) + about if own else "-")
        body.append([method, *cells])
    return head, body


def plot(rows: Sequence[Row], figure: Any) -> None:
    panels = (("width", "live hidden units, %", 100), ("log2_trace", "log2 trace of the path kernel", 1))
    panels += (("accuracy", "test accuracy, %", 100),)
    for axes, (name, title, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        curves(axes, rows, "density", name, "method", scale)
        log_densities(axes, rows)
        axes.set_title(title, fontsize=10, loc="left")
    figure.axes[0].legend(frameon=False, fontsize=7)


def findings(rows: Sequence[Row]) -> list[Finding]:
    found = []
    walked = where(rows, method="PHEW")
    by = ("density", "seed")
    for other in ("SynFlow", "SynFlow-L2", "SynFlow-L2, phew form"):
        theirs = where(rows, method=other)
        if not theirs:
            continue
        against = pairs(walked, theirs, by)
        found.append(Finding(against.verdict(), f"accuracy of PHEW over {other}: {against.text()}."))
        for density in distinct(rows, "density"):
            one = pairs(where(walked, density=density), where(theirs, density=density), by)
            found.append(Finding(one.verdict(), f"the same at density {percents(density)} alone: {one.text()}."))
    for other in ("SynFlow-L2", "SynFlow-L2, phew form"):
        theirs = where(rows, method=other)
        if theirs:
            width = pairs(walked, theirs, by, "width")
            found.append(Finding(width.verdict(), f"live hidden units of PHEW over {other}: {width.text()}."))
            trace = pairs(walked, theirs, by, "log2_trace", 1)
            found.append(
                Finding(trace.verdict(-1), f"log2 path-kernel trace of PHEW under {other}'s: {trace.text('', 2)}.")
            )
    theirs = where(rows, method="random, ERK")
    if theirs:
        trace = pairs(walked, theirs, by, "log2_trace", 1)
        found.append(
            Finding(trace.verdict(), f"log2 path-kernel trace of PHEW over random (ERK)'s: {trace.text('', 2)}.")
        )
    return found


EXPERIMENT = Experiment(
    name="phew",
    title="PHEW against SynFlow and SynFlow-L2",
    claim="SynFlow-L2 raises the path kernel's trace but leaves narrow layers; PHEW keeps them wide at a trace "
    "above that of random masks, and is more accurate than both at a wide range of densities (Patil and "
    "Dovrolis 2021, arXiv:2010.11354).",
    setting="VGG of four convolutions (60,976 weights for ten classes), six epochs on {images}. Two forms of "
    "SynFlow-L2 (the layer-conservative one and that of PHEW's code).",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    findings=findings,
    size=(12, 3.8),
)
