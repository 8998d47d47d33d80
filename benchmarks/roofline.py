"""Bytes and bandwidth as a picture: how near to a plain copy each case runs.

A bar is the bandwidth that a candidate reaches, counting the bytes that the computation has to move (each module says
which); the line is what a large torch copy reaches on the same machine in the same run. What is bound by arithmetic,
as convolutions are, stays far below; what reads from caches may pass it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness import Result

COLORS = {"pathprune": "#1f4e79"}
OTHER = "#b7cbe0"


def plot(results: Sequence[Result], path: Path) -> int:
    """Draws the candidates that state their bytes; returns how many there were (none: nothing is written)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = []
    for result in results:
        for name in result.seconds:
            rate = result.rate(name, "device")
            if rate and result.bandwidth:
                rows.append((result.case, name, rate, 100 * rate / result.bandwidth, result.bytes_moved[name]))
    if not rows:
        return 0
    figure = Figure(figsize=(9.5, 1.3 + 0.34 * len(rows)), dpi=120)
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    places = range(len(rows))
    ax.barh(places, [row[3] for row in rows], color=[COLORS.get(row[1], OTHER) for row in rows], height=0.7, zorder=2)
    for place, (_, _, rate, share, moved) in enumerate(rows):
        text = f"{share:.0f} %: {moved / 1e9:.3g} GB at {rate:.3g} GB/s"
        ax.annotate(text, (share, place), (4, 0), textcoords="offset points", va="center", fontsize=8, zorder=4)
    ax.axvline(100, color="#c0392b", linewidth=1.2, zorder=3)
    ax.annotate("a plain copy", (100, -0.7), (4, 2), textcoords="offset points", color="#c0392b", fontsize=8)
    ax.set_yticks(places, [f"{case}: {name}" for case, name, *_ in rows], fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -1.3)
    ax.set_xlim(0, max(100.0, *(row[3] for row in rows)) * 1.45)
    ax.set_xlabel("bandwidth, % of a large torch copy", fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    return len(rows)
