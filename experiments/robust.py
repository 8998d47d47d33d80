"""Robust Pruning at Initialization: deep networks on and off the edge of chaos, rescaled or not; Stable ResNet.

Read off, besides accuracy after training: the slope of log2 E[(W dL/dW)^2] over the layers (0: all layers are alike to
sensitivity-based pruning, SBP), layers that SBP emptied, and by how much the variance of the signal changes per layer.
Rescaling restores the edge where the kept weights do not depend on the signals; SBP's do, they prefer inputs that are
active, which matters to ReLU more than to tanh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pathprune as pp
from pathprune.data import Split
from pathprune.demo import train

from .experiment import Case, Experiment, Finding, Row, bars, distinct, mean, pairs, shown, where
from .training import CLASSES, masks_of, scoring_data, split_of

WIDTH = 64
DEPTHS = (50, 100)
DENSITY = 0.2
OFF_EDGE = {"scale": 0.8, "bias": 0.3}  # the ordered phase: of the edge's deviation of weights; deviation of biases
TREATMENTS = ("dense", "SBP", "SBP, rescaled")


def cases(quick: bool, seeds: int, task: Case) -> list[Case]:
    depths = {"tanh MLP": DEPTHS, "relu MLP": DEPTHS[:1], "ResNet": DEPTHS[1:], "Stable ResNet": DEPTHS[1:]}
    if quick:
        depths = dict.fromkeys(depths, (8,))
    about = {"task": "digits", "density": DENSITY, "epochs": 1 if quick else 10, "rate": 0.01}
    plain = [
        {"net": f"{activation} MLP", "depth": depth, "start": start, "treatment": treatment, "seed": seed, **about}
        | (OFF_EDGE if start == "ordered" else {})
        for activation in (("tanh",) if quick else ("tanh", "relu"))
        for depth in depths[f"{activation} MLP"]
        for start in (("edge",) if quick else ("edge", "ordered"))
        for treatment in TREATMENTS
        for seed in range(1 if quick else seeds)
    ]
    residual = [
        {"net": net, "depth": depth, "start": "edge", "treatment": treatment, "seed": seed, **about}
        for net in (("Stable ResNet",) if quick else ("ResNet", "Stable ResNet"))
        for depth in depths[net]
        for treatment in TREATMENTS[:2]
        for seed in range(1 if quick else seeds)
    ]
    return plain + residual


class Block(nn.Module):
    """``x + W relu(x)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def deep_network(net: str, depth: int, seed: int, scale: float = 1.0, bias: float = 0.0) -> nn.Sequential:
    """``depth`` linear layers of ``WIDTH`` without norms: an MLP, or ``depth - 2`` residual blocks between two layers.

    Weights have ``scale`` times the standard deviation of the activation's edge of chaos (where biases are 0), biases
    the deviation ``bias``. Biases matter: without them signals of a small scale meet the activation where it is
    homogeneous (tanh is linear there), what a layer loses forward it gains backward, and W dL/dW stays level.
    """
    inner: list[nn.Module] = []
    activation = "tanh" if net == "tanh MLP" else "relu"
    for _ in range(depth - 2):
        if net.endswith("MLP"):
            inner += [nn.Tanh() if activation == "tanh" else nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
        else:
            inner.append(Block(WIDTH))
    last = nn.Tanh() if activation == "tanh" else nn.ReLU()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), *inner, last, nn.Linear(WIDTH, CLASSES))
    made = torch.Generator().manual_seed(seed)
    pp.edge_of_chaos_init_(model, activation, generator=made)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(scale)
                if bias:
                    module.bias.copy_(bias * torch.randn(module.bias.shape, generator=made))
    return model


def standardised(data: Split) -> Split:
    """Each pixel centred, all divided by one deviation: images that are nearly parallel stay so through a deep net."""
    centre, scale = data.train_images.mean(0, keepdim=True), data.train_images.std()
    train_images, test_images = ((images - centre) / scale for images in (data.train_images, data.test_images))
    return Split(train_images, data.train_labels, test_images, data.test_labels)


def signal_slope(model: nn.Module, x: Tensor) -> float:
    """log2 of the factor on the mean square of pre-activations from one layer to the next, over the square layers."""
    levels: list[float] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)][:-1]

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        levels.append(float(output.double().square().mean()))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    if not (levels[0] > 0 and levels[-1] > 0 and math.isfinite(levels[-1])):
        return -math.inf
    return math.log2(levels[-1] / levels[0]) / (len(levels) - 1)


def run(case: Case, folder: Path | None) -> dict[str, Any]:
    data = standardised(split_of(case, folder))
    x, batches = data.train_images[:1], scoring_data(data)
    model = deep_network(case["net"], case["depth"], case["seed"], case.get("scale", 1.0), case.get("bias", 0.0))
    if case["net"] == "Stable ResNet":
        pp.stable_resnet(model, x)
    found = pp.gradient_moments(model, batches, pp.cross_entropy)
    masks, empty = None, 0
    if case["treatment"] != "dense":
        masks = masks_of(model, pp.SBP(batches, pp.cross_entropy), case["density"], case["seed"], batches)
        masks.apply_(model)
        empty = sum(count.kept == 0 for count in masks.counts().values())
    if case["treatment"] == "SBP, rescaled":
        assert masks is not None
        gain = pp.edge_of_chaos(case["net"].split()[0]).sigma_w
        pp.rescale_(model, masks, gain, example_input=x)
    signal = signal_slope(model, batches[0][0])
    accuracy = train(model, data, masks, case["seed"], case["epochs"], case["rate"])
    return {
        "moment_slope": found.log2_slope if math.isfinite(found.log2_slope) else None,
        "signal_slope": signal if math.isfinite(signal) else None,
        "empty": empty,
        "accuracy": accuracy[-1],
    }


def settings(rows: Sequence[Row]) -> list[tuple[str, int, str]]:
    return list(dict.fromkeys((row["net"], row["depth"], row["start"]) for row in rows))


def slope(rows: Sequence[Row], name: str) -> str:
    known = [row for row in rows if row[name] is not None]
    return f"{mean(known, name):+.3f}" if known else "none"


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    body = []
    for net, depth, start in settings(rows):
        own = where(rows, net=net, depth=depth, start=start)
        pruned = where(own, treatment="SBP")
        cells = [shown(where(own, treatment=treatment)) for treatment in TREATMENTS]
        slopes = [slope(where(own, treatment=treatment), "signal_slope") for treatment in TREATMENTS]
        empty = f"{mean(pruned, 'empty'):.1f}" if pruned else "-"
        body.append([f"{net}, {depth}, {start}", *cells, empty, slope(own, "moment_slope"), " / ".join(slopes)])
    head = ["network, depth, weights", *(f"{treatment}: accuracy, %" for treatment in TREATMENTS)]
    return [*head, "layers SBP empties", "log2 m per layer", "log2 signal per layer: " + " / ".join(TREATMENTS)], body


def plot(rows: Sequence[Row], figure: Any) -> None:
    depths = distinct(rows, "depth")
    for axes, depth in zip(figure.subplots(1, len(depths), squeeze=False)[0], depths, strict=True):
        groups = []
        for net, _, start in [s for s in settings(rows) if s[1] == depth]:
            for treatment in TREATMENTS:
                own = where(rows, net=net, depth=depth, start=start, treatment=treatment)
                if own:
                    groups.append((f"{net}, {start}: {treatment}", own))
        bars(axes, groups)
        axes.set_title(f"depth {depth}", fontsize=10, loc="left")
        axes.set_xlim(0, 100)
        axes.set_xlabel("test accuracy, %", fontsize=9)


def accuracy_finding(first: Sequence[Row], second: Sequence[Row], text: str) -> list[Finding]:
    """Whether the first is more accurate; nothing is said of networks that did not learn on either side."""
    against = pairs(first, second, ("depth", "seed"))
    if not against.differences:
        return []
    if max(mean(first, "accuracy"), mean(second, "accuracy")) < 1.5 / CLASSES:
        return [Finding("mixed", f"{text}: neither learns.")]
    return [Finding(against.verdict(), f"{text}: {against.text()}.")]


def rescaling_findings(rows: Sequence[Row], net: str) -> list[Finding]:
    found = []
    for depth in distinct(where(rows, net=net), "depth"):
        own = where(rows, net=net, start="edge", depth=depth)
        after, before = where(own, treatment="SBP, rescaled"), where(own, treatment="SBP")
        found += accuracy_finding(after, before, f"{net} on the edge, depth {depth}, accuracy rescaled over not")
        known = [[row["signal_slope"] for row in part if row["signal_slope"] is not None] for part in (after, before)]
        if not all(known):
            continue
        levels = [sum(part) / len(part) for part in known]
        verdict = "agrees" if abs(levels[0]) < abs(levels[1]) / 2 else "mixed"
        verdict = "contradicts" if abs(levels[0]) > abs(levels[1]) else verdict
        text = (
            f"{net} on the edge, depth {depth}: the log2 signal changes by {levels[1]:+.2f} a layer after SBP, and by "
        )
        found.append(Finding(verdict, f"{text}{levels[0]:+.2f} when rescaled (0 would be the edge)."))
    return found


def findings(rows: Sequence[Row]) -> list[Finding]:
    found = []
    for net in ("tanh MLP", "relu MLP"):
        edge, ordered = (where(rows, net=net, start=start) for start in ("edge", "ordered"))
        pruned = [where(part, treatment="SBP") for part in (edge, ordered)]
        if all(pruned):
            empty = [mean(part, "empty") for part in pruned]
            verdict = "agrees" if empty[1] > empty[0] else "contradicts" if empty[1] < empty[0] else "mixed"
            text = f"{net}, layers that SBP empties: {empty[0]:.1f} on the edge, {empty[1]:.1f} in the ordered phase; "
            text += f"log2 m changes by {slope(edge, 'moment_slope')} and {slope(ordered, 'moment_slope')} a layer."
            found.append(Finding(verdict, text))
            dense = [where(part, treatment="dense") for part in (edge, ordered)]
            found += accuracy_finding(*dense, f"{net}, dense, accuracy on the edge over the ordered phase")
        found += rescaling_findings(rows, net)
    for treatment in TREATMENTS[:2]:
        stable, plain = (where(rows, net=net, treatment=treatment) for net in ("Stable ResNet", "ResNet"))
        found += accuracy_finding(stable, plain, f"Stable ResNet over ResNet, {treatment}")
    pruned = [where(rows, net=net, treatment="SBP") for net in ("ResNet", "Stable ResNet")]
    if all(pruned):
        empty = [mean(part, "empty") for part in pruned]
        text = f"layers that SBP empties: {empty[0]:.1f} of the ResNet's, {empty[1]:.1f} of the stable one's."
        found.append(Finding("measured", text))
    return found


EXPERIMENT = Experiment(
    name="robust",
    title="Robust pruning of deep networks",
    claim="off the edge of chaos sensitivity-based pruning (SBP) empties layers of deep networks; on it, and "
    "rescaled after pruning, they stay trainable; residual networks want branches scaled by 1 / sqrt(L) "
    "(Hayou et al. 2021, arXiv:2002.08797).",
    setting=f"Networks without norms, {WIDTH} wide, on standardised digits, ten epochs at rate 0.01; SBP keeps "
    f"{100 * DENSITY:g} %; *ordered* weights have {OFF_EDGE['scale']:g} times the standard deviation of "
    f"the edge of chaos, and biases of deviation {OFF_EDGE['bias']:g}. m is E[(W dL/dW)^2] of a layer, "
    "signal the mean square of its pre-activations.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    findings=findings,
    size=(13, 5),
)
