"""What an experiment is, the file its results are kept in, and the words for what it found.

A case is a flat JSON object that holds everything a result depends on: method, density, seed, sizes. A result is
another. ``results/NAME.jsonl`` has one ``{"case": ..., "result": ...}`` a line, appended as soon as it is known, so a
run that was killed goes on where it was; a case whose settings change is another case, and is run anew.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Case = dict[str, Any]
Row = dict[str, Any]  # a case and its result in one

COLORS = ("#1f4e79", "#e0873c", "#3f8570", "#8e5ea2", "#c0392b", "#8f8f8f", "#b8860b", "#5fa8d3")
COLORS += ("#7f5539", "#e377c2", "#6b8e23", "#333333", "#00897b", "#ad1457", "#9fa8da")


@dataclass(frozen=True)
class Finding:
    """``verdict``: agrees, contradicts, mixed, or measured (nothing was claimed). ``text``: with the numbers."""

    verdict: str
    text: str


@dataclass(frozen=True)
class Experiment:
    """One rerun.

    Attributes:
        name: on the command line, and of its files.
        claim: what the paper says, and which paper.
        setting: what is done here instead; "{images}" in it stands for the images.
        cases: ``cases(quick, seeds, task)``, all cases; ``task`` is what they have of the images (``training.DRAWN``).
        run: ``run(case, folder)``, the result of one case; ``folder`` has the files of a task on disk.
        table: head and rows of text. plot: draws into a figure of ``size`` inches. findings: from the numbers alone.
    """

    name: str
    title: str
    claim: str
    setting: str
    cases: Callable[[bool, int, Case], list[Case]]
    run: Callable[[Case, Path | None], dict[str, Any]]
    table: Callable[[Sequence[Row]], tuple[list[str], list[list[str]]]]
    plot: Callable[[Sequence[Row], Figure], None]
    findings: Callable[[Sequence[Row]], list[Finding]]
    size: tuple[float, float] = (10, 3.8)


def key_of(case: Mapping[str, Any]) -> str:
    """The same text for the same case."""
    return json.dumps(case, sort_keys=True)


class Results:
    """The JSON-lines file of one experiment."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """Case key -> result. A last line that was cut off in the middle counts as not there.

        Raises:
            ValueError: another line is not a result; names file and line.
        """
        found: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return found
        for number, line in enumerate(self.path.read_text().splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            try:
                entry = json.loads(line)
                found[key_of(entry["case"])] = entry["result"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: line {number}: wanted a case and its result: {error}") from error
        return found

    def append(self, case: Case, result: Mapping[str, Any]) -> None:
        """Adds one result at the end, over a line that was cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text.rfind(b"\n") + 1
        with self.path.open("r+b" if text else "wb") as file:
            file.truncate(whole)
            file.seek(whole)
            file.write((json.dumps({"case": case, "result": result}) + "\n").encode())

    def rows(self, cases: Iterable[Case]) -> list[Row]:
        """The cases that have a result, with it."""
        known = self.read()
        return [{**case, **known[key_of(case)]} for case in cases if key_of(case) in known]


# ------------------------------------------------------------------------------------------------------ numbers


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def distinct(rows: Iterable[Row], name: str) -> list[Any]:
    """The values of one field, in the order they come."""
    return list(dict.fromkeys(row[name] for row in rows if name in row))


def mean(rows: Sequence[Row], name: str) -> float:
    """NaN for no rows."""
    return statistics.fmean(row[name] for row in rows) if rows else math.nan


def deviation(rows: Sequence[Row], name: str) -> float:
    """The standard deviation over seeds; 0 for one."""
    return statistics.stdev(row[name] for row in rows) if len(rows) > 1 else 0.0


def shown(rows: Sequence[Row], name: str = "accuracy", scale: float = 100, digits: int = 1) -> str:
    """Mean and standard deviation as text."""
    if not rows:
        return "-"
    return f"{scale * mean(rows, name):.{digits}f} ± {scale * deviation(rows, name):.{digits}f}"


@dataclass(frozen=True)
class Pairs:
    """Two settings that differ in one thing, pair by pair: by how much the first is ahead.

    ``clear``: 1 or -1 where at least four fifths of the pairs that differ agree on who is ahead and the mean is two
    standard errors from 0; else 0.
    """

    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences) if self.differences else math.nan

    @property
    def error(self) -> float:
        count = len(self.differences)
        return statistics.stdev(self.differences) / math.sqrt(count) if count > 1 else math.inf

    @property
    def ahead(self) -> int:
        return sum(d > 0 for d in self.differences)

    @property
    def clear(self) -> int:
        unequal = sum(d != 0 for d in self.differences)
        sign = 1 if self.mean > 0 else -1
        same = sum(d * sign > 0 for d in self.differences)
        return sign if unequal and same >= 0.8 * unequal and abs(self.mean) >= 2 * self.error else 0

    def verdict(self, claimed: int = 1) -> str:
        """Against a claim that the first is ahead (1), behind (-1) or not behind (0). Fewer than three say nothing."""
        if len(self.differences) < 3:
            return "mixed"
        if claimed == 0:
            return "contradicts" if self.clear < 0 else "agrees"
        return {claimed: "agrees", -claimed: "contradicts"}.get(self.clear, "mixed")

    def text(self, unit: str = "points", digits: int = 1) -> str:
        error = f" ± {self.error:.{digits}f}" if math.isfinite(self.error) else ""
        return (
            f"ahead in {self.ahead} of {len(self.differences)} pairs, by {self.mean:+.{digits}f}{error} {unit}".rstrip()
        )


def pairs(
    first: Iterable[Row], second: Iterable[Row], by: Sequence[str], name: str = "accuracy", scale: float = 100
) -> Pairs:
    """Rows of both sides that are alike in ``by``."""
    other = {tuple(row[b] for b in by): row[name] for row in second}
    mine = [(tuple(row[b] for b in by), row[name]) for row in first]
    return Pairs(tuple(scale * (value - other[key]) for key, value in mine if key in other))


# -------------------------------------------------------------------------------------------------------- plots


def percents(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def curves(
    axes: Axes, rows: Sequence[Row], x: str, y: str, by: str, scale: float = 1.0, order: Sequence[str] = ()
) -> None:
    """A line with error bars (standard deviation over seeds) for each value of ``by``."""
    for number, label in enumerate(order or distinct(rows, by)):
        own = where(rows, **{by: label})
        at = distinct(own, x)
        groups = [where(own, **{x: value}) for value in at]
        axes.errorbar(
            at,
            [scale * mean(group, y) for group in groups],
            [scale * deviation(group, y) for group in groups],
            label=label,
            color=COLORS[number % len(COLORS)],
            marker="os^vD"[number % 5],
            markersize=4,
            linewidth=1.3,
            capsize=2,
        )
    tidy(axes)


def bars(axes: Axes, groups: Sequence[tuple[str, Sequence[Row]]], name: str = "accuracy", scale: float = 100) -> None:
    """A horizontal bar with error for each named group of rows."""
    places = range(len(groups))
    values = [scale * mean(rows, name) for _, rows in groups]
    errors = [scale * deviation(rows, name) for _, rows in groups]
    axes.barh(places, values, xerr=errors, color=COLORS[0], height=0.66, capsize=2, ecolor="#e0873c")
    axes.set_yticks(places, [label for label, _ in groups])
    axes.invert_yaxis()
    tidy(axes)


def tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def log_densities(axes: Axes, rows: Sequence[Row], name: str = "density") -> None:
    """A logarithmic axis of densities, with the densities on it."""
    at = sorted(distinct(rows, name))
    axes.set_xscale("log")
    axes.set_xticks(at, [percents(value) for value in at])
    axes.minorticks_off()
    axes.set_xlabel("density", fontsize=9)
