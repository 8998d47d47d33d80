"""Two result files side by side: what became quicker, what slower, and whether the samples say so.

Times of different machines, threads or releases of torch are shown, and the difference said in bold above them.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

# What two runs must share for their times to be compared at all.
SETTING = ("machine", "cpu", "gpu", "cores", "torch", "threads", "huge_pages")


def load(path: Path) -> dict[str, Any]:
    """A file that the harness wrote.

    Raises:
        ValueError: the file cannot be read, or is of something else; names it.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"compare: {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"compare: {path}: wanted results as JSON, got {error}") from None
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, list) or not all(isinstance(r, dict) and {"case", "seconds"} <= set(r) for r in results):
        raise ValueError(f"compare: {path}: wanted results of a benchmark suite, got other JSON")
    return content


def seconds_of(content: dict[str, Any], clock: str) -> dict[tuple[str, str], list[float]]:
    """(case, candidate) -> seconds of every repeat."""
    return {
        (result["case"], name): clocks[clock]
        for result in content["results"]
        for name, clocks in result["seconds"].items()
    }


def verdict(before: list[float], after: list[float]) -> str:
    """Quicker or slower where the middle halves of the samples lie apart; else nothing can be said."""
    (low, high), (other_low, other_high) = middle_half(before), middle_half(after)
    if other_high < low:
        return "quicker"
    return "slower" if other_low > high else "within the spread"


def middle_half(values: list[float]) -> tuple[float, float]:
    """First and third quartile; of fewer than three samples all."""
    if len(values) < 3:
        return min(values), max(values)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def compare(before: Path, after: Path, clock: str = "wall") -> str:
    """Markdown: a row for each case and candidate that both files have, then what only one has.

    Raises:
        ValueError: a file is of something else, or they have no case in common.
    """
    first, second = load(before), load(after)
    one, two = seconds_of(first, clock), seconds_of(second, clock)
    shared = [key for key in one if key in two]
    if not shared:
        raise ValueError(f"compare: {before} and {after} have no case in common")
    told = (f"{path} ({content['date']}, {content['cpu']})" for path, content in ((before, first), (after, second)))
    lines = ["Before: {}. After: {}.".format(*told), ""]
    for key in SETTING:
        if first.get(key) != second.get(key):
            lines.append(f"**Other {key.replace('_', ' ')}: {first.get(key)} and {second.get(key)}.**  ")
    lines += ["", f"| case | | before, ms ({clock}) | after, ms | after / before | |", "|---|---|---|---|---|---|"]
    for case, name in shared:
        was, now = (statistics.median(samples[case, name]) for samples in (one, two))
        times = f"{1e3 * was:.3g} | {1e3 * now:.3g} | {now / was:.2f}"
        lines.append(f"| {case} | {name} | {times} | {verdict(one[case, name], two[case, name])} |")
    for path, mine, others in ((before, one, two), (after, two, one)):
        alone = sorted({case for case, name in mine if (case, name) not in others})
        lines += ["", f"Only in {path}: {'; '.join(alone)}."] if alone else []
    return "\n".join(lines)
