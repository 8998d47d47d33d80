"""How the time of a SynFlow round grows: with weights, depth, density, rounds, threads, and networks at once.

python benchmarks/scaling.py [--only depth] [--without threads] [--out benchmarks/results]
python benchmarks/scaling.py --redraw benchmarks/results/scaling.amd-epyc-2-cores.json

A point is verified, then timed beside the published loop and the best plain PyTorch (`baselines`) as everywhere here;
minutes in all. Perceptrons have 784 inputs and 10 outputs; the batch is of ResNet-20s with other weights, scored in
one call or one by one, read from their modules before either.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import pathprune as pp
from baselines import BestPyTorchSynFlow, PublishedSynFlow, exponential_densities
from harness import Case, Result, copy_bandwidth, result_path, save
from pathprune import models
from pathprune.network import PathNetwork
from scoring import NUMPY, OURS, PUBLISHED, SETTINGS, OurRounds, Setting, agree, made

ONE_BY_ONE = "pathprune, one by one"
WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
DEPTHS = (2, 4, 8, 16, 32)
DENSITIES = (0.8, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01)
ROUNDS = (1, 3, 10, 30, 100)
THREADS = (1, 2)
BATCHES = (2, 4, 8, 16, 32)
AXES = {
    "weights": "weights",
    "depth": "layers of 1024 x 1024",
    "density": "density of the mask (20 M weights)",
    "rounds": "rounds to 1 % (20 M weights)",
    "threads": "threads",
    "batch": "ResNet-20s in a call",
}


def _plain(model: Any, x: torch.Tensor, setting: Setting) -> BestPyTorchSynFlow:
    return BestPyTorchSynFlow(model, x, select="bracket_numpy", **setting.plain)


def _stepping(method: Any, first: float) -> Callable[[], object]:
    """Rounds of a slow schedule that begins at a density."""
    method.round(first)
    densities = iter(first * 0.99**k for k in range(1, 1000))
    return lambda: method.round(next(densities))


def one_round(axis: str, at: float, setting: Setting, bandwidth: float, first: float, published: bool) -> Result:
    """A round of each method once the mask has a density."""
    model, x = made(setting)
    case = Case(f"{axis} {at:g}: SynFlow round, {setting.name}", lambda: agree(setting))
    ours = OurRounds(model, x)
    case.add(OURS, _stepping(ours, first))
    if published:
        case.add(PUBLISHED, _stepping(PublishedSynFlow(model, x, **setting.published), first))
    case.add(NUMPY, _stepping(_plain(model, x, setting), first))
    return case.measure(5, warmup=3, bandwidth=bandwidth, axis=axis, at=at, weights=ours.numel)


def _perceptron(*widths: int) -> Setting:
    sizes = (784, *widths, 10)
    name = "MLP " + "-".join(map(str, sizes)) if len(sizes) < 8 else f"MLP of {len(sizes) - 1} layers"
    # A layer multiplies the sum of paths by 36 here: float32 ends before 32 layers, for all but ours.
    wide = {"dtype": torch.float64} if len(widths) > 20 else {}
    return Setting(name, lambda: models.mlp(sizes), (1, 784), published=wide, plain=wide, differing=1e-5)


def by_weights(bandwidth: float) -> list[Result]:
    results = []
    for width in WIDTHS:
        results.append(one_round("weights", width, _perceptron(width, width), bandwidth, 0.9, published=width < 8192))
        results[-1].notes["at"] = results[-1].notes["weights"]
    return results


def by_depth(bandwidth: float) -> list[Result]:
    return [
        one_round("depth", depth, _perceptron(*([1024] * (depth + 1))), bandwidth, 0.9, published=True)
        for depth in DEPTHS
    ]


def by_density(bandwidth: float) -> list[Result]:
    setting = SETTINGS["mlp-20m"]
    return [one_round("density", density, setting, bandwidth, density, published=False) for density in DENSITIES]


def by_rounds(bandwidth: float) -> list[Result]:
    setting = SETTINGS["mlp-20m"]
    model, x = made(setting)
    results = []
    for rounds in ROUNDS:

        def whole(make: Callable[[], Any], rounds: int = rounds) -> Callable[[], None]:
            def work() -> None:
                method = make()
                for density in exponential_densities(0.01, rounds):
                    method.round(density)
                method.masks()

            return work

        case = Case(f"rounds {rounds}: SynFlow to 1 %, {setting.name}", lambda: agree(setting))
        case.add(OURS, whole(lambda: OurRounds(model, x)))
        if rounds <= 30:
            case.add(NUMPY, whole(lambda: _plain(model, x, setting)))
        results.append(case.measure(1, warmup=0, bandwidth=bandwidth, axis="rounds", at=rounds))
    return results


def by_threads(bandwidth: float) -> list[Result]:
    results, before = [], torch.get_num_threads()
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            for key in ("mlp-20m", "vgg16"):
                results.append(one_round("threads", threads, SETTINGS[key], bandwidth, 0.9, published=False))
                results[-1].notes["series"] = key
    finally:
        torch.set_num_threads(before)
    return results


def by_batch(bandwidth: float) -> list[Result]:
    x = torch.ones(1, 3, 32, 32)
    method = pp.SynFlow()
    results = []
    nets = []
    for seed in range(max(BATCHES)):
        torch.manual_seed(seed)
        nets.append(models.resnet20().eval())
    read = [PathNetwork.from_module(net, x) for net in nets]
    for batch in BATCHES:
        networks, sets = read[:batch], [net.state_dict() for net in nets[:batch]]

        def together(networks: Any = networks, sets: Any = sets) -> list[pp.NetworkScores]:
            return pp.scores(sets, method, architecture=networks[0])

        def one_by_one(networks: Any = networks) -> list[pp.NetworkScores]:
            return pp.scores(networks, method)

        def verify(together: Any = together, one_by_one: Any = one_by_one) -> str:
            pairs = list(zip(together(), one_by_one(), strict=True))
            for ours, alone in pairs:
                for name in alone.tensors:
                    torch.testing.assert_close(ours.double(name), alone.double(name), rtol=1e-4, atol=0.0)
            return f"all scores of {len(pairs)} networks agree to 1e-4"

        case = Case(f"batch {batch}: SynFlow scores, ResNet-20 for 32x32", verify)
        case.add(OURS, together).add(ONE_BY_ONE, one_by_one)
        results.append(case.measure(5, bandwidth=bandwidth, axis="batch", at=batch))
    return results


MEASURES = {
    "weights": by_weights,
    "depth": by_depth,
    "density": by_density,
    "rounds": by_rounds,
    "threads": by_threads,
    "batch": by_batch,
}
TITLES = {"batch": "ms a network", "rounds": "ms a schedule", "threads": "ms a round (wall)"}
COLORS = {OURS: "#1f4e79", NUMPY: "#e0873c", PUBLISHED: "#8f8f8f", ONE_BY_ONE: "#e0873c"}


def clock_of(axis: str) -> str:
    """One thread's own processor time, which neighbours on the machine disturb least; where threads count, the wall."""
    return "wall" if axis == "threads" else "thread"


def panels(count: int) -> list[tuple[int, slice]]:
    """(row, columns of six) of each panel: up to three share a row, and every row is filled."""
    rows = -(-count // 3)
    sizes = [count // rows + (row < count % rows) for row in range(rows)]
    return [(row, slice(6 // n * k, 6 // n * (k + 1))) for row, n in enumerate(sizes) for k in range(n)]


def plot(results: Sequence[Result], path: Path) -> None:
    """A panel for each axis: milliseconds (of a network, where they are many)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    shown_axes = [axis for axis in AXES if any(result.notes["axis"] == axis for result in results)]
    places = panels(len(shown_axes))
    rows = places[-1][0] + 1
    figure = Figure(figsize=(11, 3.2 * rows), dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, 6)
    for place, axis in zip(places, shown_axes, strict=True):
        ax = figure.add_subplot(grid[place])
        chosen = [result for result in results if result.notes["axis"] == axis]
        lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for result in chosen:
            for name in result.seconds:
                share = result.notes["at"] if axis == "batch" else 1
                point = (result.notes["at"], 1e3 * result.median(name, clock_of(axis)) / share)
                lines.setdefault((name, result.notes.get("series", "")), []).append(point)
        for (name, series), points in lines.items():
            style = "--" if series == "vgg16" else "-"
            shown = f"{name}, {series}" if series else name
            xs, ys = zip(*points, strict=True)
            ax.plot(xs, ys, marker="o", markersize=4, linestyle=style, color=COLORS[name], label=shown)
        ax.set_xscale("log", base=2 if axis in ("threads", "batch", "depth") else 10)
        ax.set_yscale("log")
        if axis in ("threads", "batch", "depth"):
            ticks = sorted({result.notes["at"] for result in chosen})
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
        if axis == "density":
            ax.invert_xaxis()
        ax.set_xlabel(AXES[axis], fontsize=9)
        ax.set_title(TITLES.get(axis, "ms a round"), fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(color="#dddddd", linewidth=0.6)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(MEASURES), help="one axis")
    parser.add_argument("--without", choices=tuple(MEASURES), action="append", default=[], help="leave an axis out")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), help="folder for JSON and plot")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing: the plot beside these results")
    options = parser.parse_args()
    if options.redraw is not None:
        entries = json.loads(options.redraw.read_text())["results"]
        fields = [{key: value for key, value in entry.items() if key != "summary"} for entry in entries]
        plot([Result(**entry) for entry in fields], options.redraw.with_suffix(".png"))
        return
    bandwidth = copy_bandwidth()
    results: list[Result] = []
    for axis in [options.only] if options.only else [axis for axis in MEASURES if axis not in options.without]:
        found = MEASURES[axis](bandwidth)
        results += found
        for result in found:
            print(
                result.case,
                {name: f"{1e3 * result.median(name, clock_of(axis)):.3g} ms" for name in result.seconds},
                flush=True,
            )
        if options.only is None:
            save("scaling", results, options.out, threads=torch.get_num_threads(), copy_gb_per_second=bandwidth)
    if options.only is None:
        plot(results, result_path("scaling", options.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
