"""Reports as text: what happened, in words, then a table of layers and one of residual branches."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Report

COLUMNS = 110  # width of everything here
_MANY = 0.01  # share of a model's parameters that is worth a word
_NAMED = 6  # names given in a sentence before "and n more"


def report_text(report: Report) -> str:
    """The report, at most 110 columns wide."""
    paragraphs = [*_summary(report), *verdict(report)]
    text = "\n".join(_wrapped(paragraph) for paragraph in paragraphs)
    parts = [text, _layers(report), _branches(report)]
    return "\n\n".join(part for part in parts if part)


def _wrapped(paragraph: str) -> str:
    """Lines of at most ``COLUMNS``; a number keeps its unit."""
    tied = re.sub(r"(?<=[0-9]) (?=%|GB|s\b)", "\0", paragraph)
    return textwrap.fill(tied, COLUMNS, break_on_hyphens=False).replace("\0", " ")


def percent(fraction: float | None) -> str:
    """0.05 -> ``5 %``; four digits that count."""
    return "?" if fraction is None else f"{100 * fraction:.4g} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], width: int = COLUMNS) -> str:
    """Aligned columns: the first to the left and cut from its left to fit, the others to the right."""
    body = [list(row) for row in rows]
    sizes = [max(len(row[c]) for row in [list(head), *body]) for c in range(len(head))]
    sizes[0] = min(sizes[0], width - sum(sizes[1:]) - 2 * (len(head) - 1))
    lines = []
    for row in [list(head), ["-" * size for size in sizes], *body]:
        first = shortened(row[0], sizes[0]).ljust(sizes[0])
        others = (cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=True))
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def shortened(name: str, size: int) -> str:
    """A dotted name without its first parts, which say least, so that it fits."""
    if len(name) <= size:
        return name
    tail = name[len(name) - size + 1 :]
    dot = tail.find(".")
    return "…" + (tail[dot + 1 :] if 0 <= dot < len(tail) // 2 else tail)


# ---------------------------------------------------------------------------------------------------- words


def _summary(report: Report) -> list[str]:
    found, about = report.findings, report.metadata
    method = about.get("method") or (f"Masks ({about['operation']})" if "operation" in about else "Masks")
    kept = f"{report.kept:,} of {report.weights:,} weights kept"
    lines = [f"{method}: {kept}, density {percent(report.density)}, {_effective(report)}"]
    if report.biases[1]:
        lines.append(f"{report.biases[0]:,} of {report.biases[1]:,} biases kept, those of units that keep a weight")
    if found.get("left_whole", {}).get("share", 0) >= _MANY:
        lines.append(_left_whole(found["left_whole"]))
    if found.get("rounds"):
        lines.append(_schedule(report))
        lines.append(_cost(found))
    return lines


def _left_whole(found: Any) -> str:
    largest = [f"'{name}' {percent(share)}" for name, share in found["largest"].items() if share >= _MANY]
    named = f" ({', '.join(largest)})" if largest else ""
    return f"left whole: {percent(found['share'])} of the model's parameters{named}"


def _effective(report: Report) -> str:
    live = report.live
    if live is None:
        return "effective density not known (it takes the model: masks.report(model, example_input))"
    aside = "all on a path" if live == report.kept else f"{report.kept - live:,} of them on no path"
    paths = report.log2_paths
    if paths is not None and math.isfinite(paths):
        aside += f"; 2^{paths:.4g} paths"
    return f"effective density {percent(report.effective_density)} ({aside})"


def _schedule(report: Report) -> str:
    found, config = report.findings, report.metadata.get("config", {})
    rounds = found["rounds"]
    kept = found.get("kept", [])
    if "walks" in found:
        over = found.get("overshoot", 0)
        trace = found.get("log2_path_kernel_trace")
        text = f"{found['walks']:,} walks, {over} weight{'' if over == 1 else 's'} over the target"
        text += f"; trace of the path kernel {_two_to(trace)}; seed {report.metadata.get('seed', '?')}"
        return text
    text = f"{rounds} round{'s' if rounds > 1 else ''}, {config.get('schedule', '?')} schedule"
    text += f", scope {config.get('scope', '?')}, seed {report.metadata.get('seed', '?')}"
    if rounds > 1 and len(kept) == rounds:
        marks = sorted({max(round(rounds * k / 4), 1) for k in range(1, 5)})
        steps = ", ".join(f"{percent(kept[r - 1] / report.weights)} ({r})" for r in marks)
        text += f"; kept after a round: {steps}"
    return text


def _cost(found: Any) -> str:
    parts = []
    first, last = found.get("log2_R_first"), found.get("log2_R_last")
    if first is not None:
        change = "" if last == first else f" at first, {_two_to(last)} in the last round"
        parts.append(f"path sum R {_two_to(first)}{change}")
    if found.get("log2_threshold") is not None:
        parts.append(f"last threshold {_two_to(found['log2_threshold'])}")
    if "seconds" in found:
        parts.append(f"{found['seconds']:.3g} s ({found.get('seconds_per_round', 0):.3g} s a round)")
    if "peak_memory_bytes" in found:
        parts.append(f"peak memory of the process {found['peak_memory_bytes'] / 1e9:.3g} GB")
    return "; ".join(parts)


def _two_to(exponent: float | None) -> str:
    return "0" if exponent is None or exponent == -math.inf else f"2^{exponent:.4g}"


def verdict(report: Report) -> list[str]:
    """What has collapsed, one sentence each; or that nothing has."""
    lines: list[str] = []
    emptied: set[str] = set()
    if report.disconnected:
        lines.append("NO PATH LEFT: none of the pruned layers connects input and output any more.")
    elif report.collapsed_branches:
        closed = [side for side in report.branches if not side.branch.open]
        emptied = {layer.name for side in closed for layer in side.layers}
        blocks = "this residual block" if len(closed) == 1 else "these residual blocks"
        gone = f"no path runs any more through {_listed(report.collapsed_branches)}"
        lines.append(f"BRANCH COLLAPSE: {gone}: of {blocks} only the other side is left.")
    collapsed = [name for name in report.collapsed_layers if name not in emptied]
    if collapsed:
        lines.append(f"LAYER COLLAPSE: no weight is left in {_listed(collapsed)}.")
    dead = [name for name in report.dead_layers if name not in emptied]
    if dead and not report.disconnected:
        lines.append(f"DEAD LAYER: weights are left, but none on a path, in {_listed(dead)}.")
    if lines or report.live is None:
        return lines
    branches = " and every residual branch" if report.branches else ""
    return [f"Nothing collapsed: every layer{branches} still carries paths."]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_NAMED]) + more


# ---------------------------------------------------------------------------------------------------- tables


def _layers(report: Report) -> str:
    known = report.live is not None
    head = ["layer", "weights", "kept", "density", *(["effective", "live in", "live out"] if known else [])]
    visits = report.findings.get("unit_visits", {})
    head += ["visits a unit, least"] if visits else []
    rows = []
    for layer in [*report.layers]:
        row = [
            layer.name.removesuffix(".weight"),
            f"{layer.weights:,}",
            f"{layer.kept:,}",
            percent(layer.density),
        ]
        if known and layer.reach is not None:
            reached = layer.reach
            row += [percent(layer.effective_density), f"{reached.live_inputs}/{reached.inputs}"]
            row += [f"{reached.live_outputs}/{reached.outputs}"]
        if visits:
            least, mean = visits.get(layer.name, (0, 0.0))
            row.append(f"{mean:,.4g}, {least:,}")
        rows.append(row)
    total = ["all", f"{report.weights:,}", f"{report.kept:,}", percent(report.density)]
    total += [percent(report.effective_density), "", ""] if known else []
    rows.append(total + [""] * (len(head) - len(total)))
    return table(head, rows)


def _branches(report: Report) -> str:
    if not report.branches:
        return ""
    head = ["residual branch", "weights", "kept", "density", "effective", "narrowest", "live units"]
    rows = []
    for side in report.branches:
        live, units = side.units
        counts = [f"{side.weights:,}", f"{side.kept:,}", percent(side.kept / side.weights)]
        widths = [str(side.narrowest), f"{live}/{units}"]
        rows.append([side.branch.name, *counts, percent(side.live / side.weights), *widths])
    return table(head, rows)
