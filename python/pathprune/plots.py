"""Reports as pictures (needs matplotlib)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .tables import percent, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .comparison import MaskFacts
    from .report import Report

KEPT, LIVE, WIDTH, GONE = "#b7cbe0", "#1f4e79", "#3f8570", "#c0392b"
METHOD_COLORS = ("#1f4e79", "#e0873c", "#8f8f8f", "#3f8570", "#8e5ea2")
_NAME = 46  # characters of a layer's name
_ROW, _LETTER = 0.21, 0.064  # inches


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot: no window, no global state, nothing to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    return figure


def plot_layers(report: Report, path: str | os.PathLike[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draws ``Report.plot``: a row per layer; left density, right the share of units that lie on a path."""
    names = [shortened(layer.name.removesuffix(".weight"), _NAME) for layer in report.layers]
    if ax is None:
        left = 0.3 + _LETTER * max(map(len, names), default=0)
        width, height = left + 6.2, 1.5 + _ROW * max(len(names), 3)
        figure = new_figure(width, height)
        ax = figure.add_subplot()
        figure.subplots_adjust(left / width, 0.6 / height, 1 - 0.35 / width, 1 - 0.65 / height)
    _densities(report, ax, names)
    if report.live is not None:
        _widths(report, ax)
    if path is not None:
        ax.figure.savefig(path)  # type: ignore[union-attr]
    return ax


def _densities(report: Report, ax: Axes, names: list[str]) -> None:
    rows = range(len(names))
    floor = _floor(report)
    ax.barh(rows, [layer.density for layer in report.layers], color=KEPT, height=0.72, label="kept", zorder=2)
    if report.live is not None:
        live = [layer.effective_density or None for layer in report.layers]
        reached = [(row, value) for row, value in zip(rows, live, strict=True) if value]
        dots = ([value for _, value in reached], [row for row, _ in reached])
        ax.scatter(*dots, color=LIVE, s=16, label="on a path (effective)", zorder=3, clip_on=False)
    ax.set_xscale("log")
    ax.set_xlim(floor, 1)
    decades = [10.0**-k for k in range(round(-math.log10(floor)), -1, -1)]
    marks = (1, 2, 5) if len(decades) == 2 else (1,)
    places = [decade * mark for decade in decades for mark in marks if decade * mark <= 1]
    ax.set_xticks(places, [f"{100 * place:g} %" for place in places], fontsize=8)
    ax.xaxis.set_minor_formatter("")  # within a decade matplotlib would write numbers at these too
    ax.get_xticklabels()[-1].set_horizontalalignment("right")
    ax.set_yticks(rows, names, fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.axvline(report.density, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)), zorder=4, label="all layers")
    for row, layer in enumerate(report.layers):
        if layer.collapsed or (layer.reach is not None and not layer.reach.live):
            note = "no weight left" if layer.collapsed else "no path left"
            ax.annotate(note, (floor, row), (4, 0), textcoords="offset points", color=GONE, fontsize=8, va="center")
            ax.get_yticklabels()[row].set_color(GONE)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    ax.set_xlabel("density (log scale)", fontsize=9)
    ax.set_title(_title(report), fontsize=10, loc="left", pad=24)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False, borderaxespad=0.2)
    _bare(ax)


def _title(report: Report) -> str:
    method = report.metadata.get("method") or "Masks"
    effective = "" if report.live is None else f", effective {percent(report.effective_density)}"
    return f"{method}: density {percent(report.density)}{effective}"


def _floor(report: Report) -> float:
    """Where the logarithmic axis begins: a decade below all there is to show."""
    values = [value for layer in report.layers for value in (layer.density, layer.effective_density) if value]
    lowest, floor = min(values, default=1.0), 0.1
    while floor > lowest * 0.7:
        floor /= 10
    return floor


def _widths(report: Report, ax: Axes) -> None:
    from mpl_toolkits.axes_grid1 import make_axes_locatable

    beside = make_axes_locatable(ax).append_axes("right", size="42%", pad=0.18, sharey=ax)
    reached = [layer.reach for layer in report.layers if layer.reach]
    shares = [r.live_outputs / r.outputs if r.outputs else 0.0 for r in reached]
    beside.barh(range(len(shares)), shares, color=WIDTH, height=0.72, zorder=2)
    for row, r in enumerate(reached):
        inside = shares[row] > 0.55
        side, offset = ("right", (-3, 0)) if inside else ("left", (3, 0))
        beside.annotate(
            f"{r.live_outputs}/{r.outputs}",
            (shares[row], row),
            textcoords="offset points",
            va="center_baseline",
            fontsize=7,
            color="white" if inside else "#333333",
            zorder=4,
            ha=side,
            xytext=offset,
        )
    beside.set_xlim(0, 1)
    beside.set_xticks([0, 0.5, 1], ["", "50 %", "100 %"], fontsize=8)
    beside.get_xticklabels()[-1].set_horizontalalignment("right")
    beside.set_xlabel("output units on a path", fontsize=9)
    beside.tick_params(axis="y", length=0, labelleft=False)
    beside.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    _bare(beside)


def _bare(ax: Axes) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def plot_accuracy(
    curves: Mapping[tuple[str, float], Sequence[float]], path: str | os.PathLike[str] | None = None
) -> Axes:
    """Test accuracy of pruned networks beside the dense one: at the end, and by epoch at the lowest density.

    Args:
        curves: (method, density) -> accuracy after every epoch; the method ``dense`` is the whole network.
    """
    figure = new_figure(10, 4)
    ends, way = figure.subplots(1, 2)
    methods = list(dict.fromkeys(method for method, _ in curves if method != "dense"))
    densities = sorted({density for method, density in curves if method != "dense"}, reverse=True)
    width = 0.8 / max(len(methods), 1)
    for k, method in enumerate(methods):
        color = METHOD_COLORS[k % len(METHOD_COLORS)]
        places = [d + (k - (len(methods) - 1) / 2) * width for d in range(len(densities))]
        heights = [curves[method, density][-1] for density in densities]
        bars = ends.bar(places, heights, width * 0.92, color=color, label=method, zorder=2)
        values = [f"{100 * height:.1f}" for height in heights]
        ends.bar_label(bars, values, fontsize=8, padding=-13, color="white")
        course = curves[method, densities[-1]]
        way.plot(range(1, len(course) + 1), course, color=color, marker="o", markersize=3, label=method)
    for (method, _), course in curves.items():
        if method == "dense":
            ends.axhline(course[-1], color="#333333", linestyle=(0, (4, 3)), linewidth=1, label="dense")
            way.plot(range(1, len(course) + 1), course, color="#333333", linestyle=(0, (4, 3)), label="dense")
    ends.set_xticks(range(len(densities)), [f"density {percent(density)}" for density in densities], fontsize=9)
    ends.set_title("at the end of training", fontsize=10, loc="left")
    way.set_title(f"on the way, density {percent(densities[-1])}", fontsize=10, loc="left")
    way.set_xlabel("epoch", fontsize=9)
    way.tick_params(axis="x", labelsize=8)
    for ax in (ends, way):
        ax.set_ylim(0, 1.08)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"], fontsize=8)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
        _bare(ax)
    ends.set_ylabel("test accuracy", fontsize=9)
    way.legend(loc="lower right", fontsize=8, frameon=False)
    figure.tight_layout()
    if path is not None:
        figure.savefig(path)
    return ends


def plot_comparison(rows: Sequence[MaskFacts], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws ``Comparison.plot``: a row of bars for each set of masks, a panel for each thing they are compared by."""
    panels: list[tuple[str, list[float]]] = [
        ("log2 trace of the path kernel", [row.log2_trace for row in rows]),
        ("live units", [float(row.live_units) for row in rows]),
        ("log2 paths", [row.log2_paths for row in rows]),
    ]
    if all(row.log2_eigenvalues for row in rows):
        panels.insert(1, ("log2 largest eigenvalue", [row.log2_eigenvalues[0] for row in rows]))
    if all(row.ntk_trace is not None for row in rows):
        levels = [math.log2(row.ntk_trace) if row.ntk_trace else -math.inf for row in rows]
        panels.insert(2, ("log2 trace of the tangent kernel", levels))
    figure = new_figure(1.6 + 2.3 * len(panels), 1.3 + 0.42 * len(rows))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places = range(len(rows))
    for ax, (title, values) in zip(axes, panels, strict=True):
        finite = [value for value in values if math.isfinite(value)]
        low = min([0.0, *finite]) if title == "live units" else min(finite, default=0.0) - 1
        shown = [value if math.isfinite(value) else low for value in values]
        bars = ax.barh(places, [value - low for value in shown], left=low, color=LIVE, height=0.62)
        for bar, value in zip(bars, values, strict=True):
            text = "none" if not math.isfinite(value) else f"{value:.4g}"
            inside = bar.get_width() > 0.55 * (max(shown) - low)
            ax.annotate(
                text,
                (bar.get_x() + bar.get_width(), bar.get_y() + bar.get_height() / 2),
                xytext=(-4 if inside else 4, 0),
                textcoords="offset points",
                ha="right" if inside else "left",
                va="center",
                fontsize=8,
                color="white" if inside else "black",
            )
        ax.set_title(title, fontsize=9, loc="left")
        ax.tick_params(labelsize=8)
        _bare(ax)
    axes[0].set_yticks(places, [row.name for row in rows])
    axes[0].invert_yaxis()
    figure.tight_layout()
    if path is not None:
        figure.savefig(path)
    return figure
