"""The sanity checks: does accuracy need the weights' places within a layer, their values, order of scores, labels?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pathprune as pp
from pathprune.models import he_init

from .experiment import Case, Experiment, Finding, Row, bars, distinct, pairs, shown, where
from .training import METHODS, image_case, masks_of, scoring_data, small_vgg, split_of, trained_accuracy

CHECKED = ("SynFlow", "PHEW", "SNIP", "GraSP", "magnitude")
WITH_LABELS = ("SNIP", "GraSP")
UNCHANGED = "as it is"
CHECKS = (UNCHANGED, "shuffled in layers", "re-initialised", "random labels", "inverted")


def checks_of(method: str) -> list[str]:
    """PHEW has no scores to invert; labels matter to methods that read them."""
    without = {"random labels"} if method not in WITH_LABELS else set()
    return [check for check in CHECKS if check not in without and (method, check) != ("PHEW", "inverted")]


def cases(quick: bool, seeds: int, task: Case) -> list[Case]:
    return [
        image_case(quick, task, method=method, check=check, density=0.05, seed=seed)
        for method in (("SNIP",) if quick else CHECKED)
        for check in checks_of(method)
        for seed in range(1 if quick else seeds)
    ]


def run(case: Case, folder: Path | None) -> dict[str, Any]:
    data, check = split_of(case, folder), case["check"]
    model, batches = small_vgg(case["seed"], data.classes), scoring_data(data)
    scored = list(pp.random_labels(batches, data.classes, case["seed"])) if check == "random labels" else batches
    pruner = METHODS[case["method"]](scored)
    masks = masks_of(
        model, pp.Inverted(pruner) if check == "inverted" else pruner, case["density"], case["seed"], batches
    )
    if check == "shuffled in layers":
        masks = masks.shuffle(case["seed"])
    if check == "re-initialised":
        model = pp.reinit(model, case["seed"] + 1000, he_init)
    effective = pp.path_counts(model, masks, data.train_images[:1]).effective
    return {"live": effective.kept / masks.kept, "accuracy": trained_accuracy(model, data, masks, case)}


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    checks = distinct(rows, "check")
    body = [
        [method, *(shown(where(rows, method=method, check=check)) for check in checks)]
        for method in distinct(rows, "method")
    ]
    return ["accuracy, %", *checks], body


def plot(rows: Sequence[Row], figure: Any) -> None:
    methods = distinct(rows, "method")
    for axes, method in zip(figure.subplots(1, len(methods), sharex=True, squeeze=False)[0], methods, strict=True):
        own = where(rows, method=method)
        bars(axes, [(check, where(own, check=check)) for check in distinct(own, "check")])
        axes.set_title(method, fontsize=10, loc="left")
        axes.set_xlabel("test accuracy, %", fontsize=8)


def findings(rows: Sequence[Row]) -> list[Finding]:
    found = []
    claims = {"shuffled in layers": 0, "re-initialised": 0, "random labels": 0, "inverted": -1}
    for check, claimed in claims.items():
        for method in distinct(where(rows, check=check), "method"):
            own = where(rows, method=method)
            against = pairs(where(own, check=check), where(own, check=UNCHANGED), ("density", "seed"))
            verdict = "measured" if method == "PHEW" and check != "inverted" else against.verdict(claimed)
            found.append(Finding(verdict, f"{method}, {check}, over the method as it is: {against.text()}."))
        together = pairs(where(rows, check=check), where(rows, check=UNCHANGED), ("method", "seed"))
        if together.differences:
            found.append(Finding(together.verdict(claimed), f"all methods together, {check}: {together.text()}."))
    return found


EXPERIMENT = Experiment(
    name="sanity",
    title="Sanity checks",
    claim="Masks of SNIP, GraSP, SynFlow and magnitude made at initialization lose nothing when they are "
    "shuffled within layers, when the weights are drawn anew, or when scores are made with random labels; "
    "inverted scores do worse (Frankle et al. 2021, arXiv:2009.08576; Su et al. 2020, arXiv:2009.11094). "
    "PHEW was not among them.",
    setting="VGG of four convolutions, density 5 %, six epochs on {images}. With so few seeds *agrees* "
    "with 'loses nothing' says that no clear loss was seen, not that there is none.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    findings=findings,
    size=(15, 3.2),
)
