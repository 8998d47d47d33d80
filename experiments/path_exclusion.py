"""PX against its rivals, from fresh weights and from weights trained on another task."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import pathprune as pp
from pathprune.demo import train

from .experiment import (
    Case,
    Experiment,
    Finding,
    Row,
    curves,
    distinct,
    key_of,
    log_densities,
    mean,
    pairs,
    percents,
    shown,
    where,
)
from .training import handwritten, image_case, masks_of, scoring_data, small_vgg, split_of, trained_accuracy

METHODS = ("PX", "SynFlow", "SynFlow-L2", "SNIP", "GraSP", "NTK-SAP", "random, ERK")
RIVALS = ("SynFlow", "SNIP", "GraSP", "NTK-SAP")
STARTS = ("fresh", "pre-trained")
DENSITIES = (0.1, 0.02)


def cases(quick: bool, seeds: int, task: Case) -> list[Case]:
    about = image_case(quick, task)
    source = {f"source_{name}": value for name, value in about.items() if name not in ("task", "size")}
    source |= {"source": about["task"], "size": about["size"]}
    sizes = {"few": 200, "epochs": 1} if quick else {"few": 300, "epochs": 15}
    return [
        {
            "method": method,
            "start": start,
            "density": density,
            "seed": seed,
            **sizes,
            **source,
        }
        for start in STARTS
        for method in ((("PX",) if start == "fresh" else ("SNIP",)) if quick else METHODS)
        for density in ((0.02,) if quick else DENSITIES)
        for seed in range(1 if quick else seeds)
    ]


@functools.lru_cache(maxsize=4)
def pretrained(source: str, folder: Path | None) -> dict[str, Tensor]:
    """The network's state after training on the source task, a case as text; a head for other classes is left out."""
    case = json.loads(source)
    data = split_of(case, folder)
    model = small_vgg(case["seed"], data.classes)
    train(model, data, None, case["seed"], case["epochs"])
    shapes = {name: tensor.shape for name, tensor in small_vgg(case["seed"]).state_dict().items()}
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.shape == shapes[name]}


def run(case: Case, folder: Path | None) -> dict[str, Any]:
    data = handwritten(case["size"], case["few"], case["seed"])
    model, batches = small_vgg(case["seed"]), scoring_data(data)
    if case["start"] == "pre-trained":
        source = {name.removeprefix("source_"): case[name] for name in case if name.startswith("source_")}
        source |= {"task": case["source"], "size": case["size"], "seed": case["seed"]}
        model.load_state_dict(pretrained(key_of(source), folder), strict=False)
    masks = masks_of(model, case["method"], case["density"], case["seed"], batches)
    result = {}
    if case["method"] == "PX":
        other = masks_of(model, pp.SynFlowL2(policy="paths"), case["density"], case["seed"], batches)
        result["shared"] = (masks & other).kept / masks.kept
    return {**result, "accuracy": trained_accuracy(model, data, masks, case)}


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    settings = [(start, density) for start in distinct(rows, "start") for density in distinct(rows, "density")]
    body = [
        [method, *(shown(where(rows, method=method, start=start, density=density)) for start, density in settings)]
        for method in distinct(rows, "method")
    ]
    return ["accuracy, %", *(f"{start}, {percents(density)}" for start, density in settings)], body


def plot(rows: Sequence[Row], figure: Any) -> None:
    starts = distinct(rows, "start")
    for axes, start in zip(figure.subplots(1, len(starts), sharey=True, squeeze=False)[0], starts, strict=True):
        curves(axes, where(rows, start=start), "density", "accuracy", "method", 100)
        log_densities(axes, rows)
        axes.set_title(f"{start} weights", fontsize=10, loc="left")
    figure.axes[0].set_ylabel("test accuracy on digits, %", fontsize=9)
    figure.axes[-1].legend(frameon=False, fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")


def findings(rows: Sequence[Row]) -> list[Finding]:
    found = []
    for start in distinct(rows, "start"):
        own = where(rows, start=start)
        for rival in (*RIVALS, "random, ERK"):
            theirs = where(own, method=rival)
            if theirs:
                against = pairs(where(own, method="PX"), theirs, ("density", "seed"))
                verdict = against.verdict() if rival in RIVALS else "measured"
                found.append(Finding(verdict, f"{start} weights, PX over {rival}: {against.text()}."))
    sparsest = where(rows, density=min(distinct(rows, "density")))
    for rival in RIVALS:
        theirs = where(sparsest, method=rival)
        if theirs:
            against = pairs(where(sparsest, method="PX"), theirs, ("start", "seed"))
            text = f"PX over {rival} at {percents(sparsest[0]['density'])}, both starts: {against.text()}."
            found.append(Finding(against.verdict(), text))
    gain = pairs(where(rows, start="pre-trained"), where(rows, start="fresh"), ("method", "density", "seed"))
    found.append(Finding("measured", f"pre-trained over fresh weights, all methods: {gain.text()}."))
    for start in distinct(rows, "start"):
        for density in distinct(rows, "density"):
            same = [row for row in where(rows, start=start, density=density) if "shared" in row]
            text = (
                f"{start} weights, {percents(density)}: {100 * mean(same, 'shared'):.1f} % of the weights PX keeps are "
            )
            found.append(Finding("measured", text + "those of the data-free SynFlow-L2 under the same path policy."))
    return found


EXPERIMENT = Experiment(
    name="path_exclusion",
    title="PX, fresh and pre-trained",
    claim="PX keeps better subnetworks than SynFlow, SNIP, GraSP and NTK-SAP at high sparsity, of fresh and of "
    "pre-trained weights, which then transfer (Iurada, Ciccone and Tommasi 2024, arXiv:2406.01820).",
    setting="VGG of four convolutions; fresh, or trained for six epochs on {images}; pruned on, and "
    "fine-tuned for 15 epochs with, 300 handwritten digits enlarged to the same size.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    findings=findings,
    size=(11, 3.8),
)
