"""Makes the tables and figures of README.md and docs/ from the committed results of the benchmarks.

    python scripts/readme_tables.py --check     # exit code 1 and a diff where a page says something else
    python scripts/readme_tables.py --write

A page has ``<!-- name -->`` ... ``<!-- /name -->``, on lines of their own or within a sentence; what lies between is
what the function of that name below makes of ``benchmarks/results``. Ratios are medians of ratios within one process;
the machine and the date are those of the file. A figure that is extrapolated is said to be.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
MARK = re.compile(r"<!-- (?P<name>[a-z_0-9]+) -->(?P<body>.*?)<!-- /(?P=name) -->", re.DOTALL)
CLOCK = {"masked_matmul": "process", "nas": "thread"}  # of the suites that are not timed by the wall
OURS = "pathprune"

# Machines, as the tables call them.
SHORT = {"intel-xeon-processor-2-cores": "Xeon", "amd-epyc-2-cores": "EPYC"}


class Suite:
    """The results of one file."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.about = content
        self.clock = CLOCK.get(content["benchmark"], "wall")
        self.cases = {result["case"]: result for result in content["results"]}

    @property
    def machine(self) -> str:
        return SHORT.get(self.about["machine"], self.about["machine"])

    def case(self, part: str) -> dict[str, Any]:
        """The case of that name, or the one whose name contains it.

        Raises:
            KeyError: none has, or several do; a table must say which it means.
        """
        found = [part] if part in self.cases else [name for name in self.cases if part in name]
        if len(found) != 1:
            raise KeyError(f"{self.about['benchmark']}: wanted one case with {part!r} in its name, got {found}")
        return self.cases[found[0]]

    def seconds(self, part: str, name: str = OURS) -> float:
        return statistics.median(self.case(part)["seconds"][name][self.clock])

    def ratio(self, part: str, baseline: str, subject: str = OURS) -> float:
        """Time of the baseline over time of the subject, pair by pair."""
        seconds = self.case(part)["seconds"]
        pairs = zip(seconds[baseline][self.clock], seconds[subject][self.clock], strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)

    def note(self, part: str, name: str) -> Any:
        return self.case(part)["notes"][name]

    def peak(self, part: str, name: str = OURS) -> float:
        return self.case(part)["peak_bytes"][name]


@cache
def suite(name: str, machine: str = "amd-epyc-2-cores") -> Suite:
    return Suite(json.loads((RESULTS / f"{name}.{machine}.json").read_text()))


@cache
def plain(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


# How figures are written.


def span(seconds: float) -> str:
    """Three digits and a unit."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} us"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def times(ratio: float) -> str:
    """Two digits, three below ten, whole thousands."""
    if ratio >= 1000:
        return f"{round(ratio, -2):,.0f}x"
    return f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def caption(*suites: Suite) -> str:
    """Machines, settings and dates of what a table shows; a machine is named once."""
    runs: dict[str, dict[str, set[str]]] = {}  # machine -> pages -> dates
    for one in suites:
        a = one.about
        threads = f"{a['threads']} thread{'s' if a['threads'] > 1 else ''}"
        machine = f"{one.machine}: {a['cpu']}, {a['cpu_capability']}, {threads}, torch {a['torch']}"
        pages = "large pages" if a["huge_pages"] else "no large pages"
        runs.setdefault(machine, {}).setdefault(pages, set()).add(a["date"][:10])
    told = []
    for machine, settings in runs.items():
        made = [(pages, " and ".join(sorted(dates))) for pages, dates in settings.items()]
        one_setting = len(made) == 1
        told.append(", ".join([machine, *(f"{p}, {d}" if one_setting else f"{p} ({d})" for p, d in made)]))
    return "\n\n" + "; ".join(told) + "."


# What the pages show.


def scoring() -> str:
    """Rounds and schedules of SynFlow."""
    one = suite("scoring")
    rows = []
    for part, label in (
        ("round, MLP 784-4096", "a round, MLP of 20 M weights"),
        ("round, MLP 784-8192", "a round, MLP of 140 M weights"),
        ("round, VGG-16", "a round, VGG-16-BN, 32x32"),
        ("round, ResNet-50", "a round, ResNet-50, 224x224"),
    ):
        ratios = [times(one.ratio(part, f"{name}")) for name in ("published loop", "best PyTorch")]
        best = times(one.ratio(part, "best PyTorch + numpy select"))
        rows.append([label, span(one.seconds(part)), *ratios, best])
    for part, label in (
        ("rounds to 1%, MLP 784-4096", "100 rounds to 1 %, MLP of 20 M weights"),
        ("rounds to 5%, VGG-16", "100 rounds to 5 %, VGG-16-BN"),
        ("rounds to 5%, ResNet-50", "100 rounds to 5 %, ResNet-50"),
    ):
        net = part.split(", ")[1]
        published = 100 * one.seconds(f"round, {net}", "published loop") / one.seconds(part)
        ratios = [times(one.ratio(part, name)) for name in ("best PyTorch", "best PyTorch + numpy select")]
        rows.append([label, span(one.seconds(part)), f"{times(published)} *", *ratios])
    head = ["SynFlow", "pathprune", "published loop", "best PyTorch", "with numpy"]
    return table(head, rows) + caption(one) + " \\* extrapolated from its round."


def memory() -> str:
    """Peaks beyond the model."""
    one = suite("memory")
    rows = []
    for name in one.cases:
        peaks = [one.peak(name, who) for who in (OURS, "published loop", "best PyTorch")]
        label = name.rpartition("%, ")[2]
        rows.append([label, megabytes(peaks[0]), *(f"{megabytes(p)} ({times(p / peaks[0])})" for p in peaks[1:])])
    head = ["peak memory beyond the model, 4 rounds to 20 %", "pathprune", "published loop", "best PyTorch"]
    return table(head, rows) + caption(one)


def selection() -> str:
    """The exact k-th largest."""
    one = suite("selection", "intel-xeon-processor-2-cores")
    rows = []
    for name in one.cases:
        ratios = [times(one.ratio(name, who)) for who in ("kthvalue", "bracket", "partition")]
        rows.append([name.replace("k-th of ", "of "), span(one.seconds(name)), *ratios])
    head = ["exact k-th largest", "pathprune", "torch.kthvalue", "best PyTorch bracket", "numpy.partition"]
    return table(head, rows) + caption(one)


def phew() -> str:
    """Walks and masks of PHEW."""
    one = suite("walks")
    rows = []
    for density in ("1.8%", "10.0%"):
        part = f"PHEW mask, vgg16, to {density}"
        label = f"PHEW mask, VGG-16-BN, to {float(density[:-1]):g} %"
        for kind, subject, note in (
            ("from the module", OURS, "published_over_ours_whole_job_from_module"),
            (
                "from a network that was read",
                "pathprune, from the network",
                "published_over_ours_whole_job_from_network",
            ),
            ("its walks alone", "pathprune, walks only", "published_over_ours_walks_only"),
        ):
            best = times(one.ratio(part, "best PyTorch", subject)) if "alone" not in kind else ""
            rows.append(
                [f"{label}, {kind}", span(one.seconds(part, subject)), f"{times(one.note(part, note))} *", best]
            )
    for size in ("1024", "4096"):
        part = f"PHEW mask, 4 layers of {size}"
        label = f"PHEW mask, 4 layers of {size} x {size}, to 10 %"
        rows.append([label, span(one.seconds(part)), "", times(one.ratio(part, "best PyTorch"))])
    for part, label in (("2,097,152 steps", "1024 x 1024"), ("3,600,000 steps", "4096 x 4096")):
        rate = one.note(part, "million_steps_per_second")
        best = times(one.ratio(part, "torch.searchsorted, tables given"))
        rows.append([f"million walk steps a second, {label}", f"{rate:.3g}", "", best])
    tail = " \\* extrapolated from 40 of its walks and from measured rows of its tables, which it makes in O(n^3)."
    return table(["walks", "pathprune", "published", "best PyTorch"], rows) + caption(one) + tail


def masked_matmul() -> str:
    """The few cells that say what to expect; the whole grid is ``masked_matmul_grid``."""
    one = suite("masked_matmul")
    batches = (1, 32, 256)
    rows = []
    for kind, zeros, baseline in (
        ("forward", "90%", "F.linear(x, W*M)"),
        ("forward", "90%", "F.linear(x, W)"),
        ("forward", "50%", "F.linear(x, W)"),
        ("gradients", "90%", "F.linear(x, W*M)"),
        ("gradients", "90%", "torch.sparse CSR"),
    ):
        cells = [times(_matmul_ratio(one, kind, 4096, zeros, batch, baseline)) for batch in batches]
        what = "forward" if kind == "forward" else "forward and both gradients"
        rows.append([f"{what}, {zeros[:-1]} % zeros, over `{baseline}`", *cells])
    head = ["masked matmul, 4096 x 4096, float32", *(f"batch {batch}" for batch in batches)]
    return table(head, rows) + caption(one)


def _matmul_ratio(one: Suite, kind: str, n: int, zeros: str, batch: int, baseline: str) -> float:
    return one.ratio(f"{kind}, n = {n}, {zeros} zeros, batch {batch}", baseline)


def masked_matmul_grid() -> str:
    """Every cell: time of each baseline over ours."""
    one = suite("masked_matmul")
    points = [
        (r["notes"]["kind"], r["notes"]["n"], r["notes"]["density"], r["notes"]["batch"]) for r in one.cases.values()
    ]
    batches = sorted({point[3] for point in points})
    parts = []
    for kind, n in dict.fromkeys(point[:2] for point in points):
        for baseline in ("F.linear(x, W*M)", "F.linear(x, W)", "torch.sparse CSR"):
            rows = []
            for density in sorted({point[2] for point in points}, reverse=True):
                zeros = f"{1 - density:.0%}"
                cells = [f"{_matmul_ratio(one, kind, n, zeros, batch, baseline):.2f}" for batch in batches]
                rows.append([zeros, *cells])
            title = f"**{kind}, {n} x {n}, over `{baseline}`**"
            parts.append(title + "\n\n" + table(["zeros", *(f"batch {batch}" for batch in batches)], rows))
    return "\n\n".join(parts) + caption(one)


def sparse_convolution() -> str:
    """Every layer and density: time of both baselines over ours."""
    one = suite("sparse_convolution")
    notes = [result["notes"] for result in one.cases.values()]
    densities = sorted({note["density"] for note in notes}, reverse=True)
    rows = []
    for kind, layer in dict.fromkeys((note["kind"], note["layer"]) for note in notes):
        what = "forward" if kind == "forward" else "forward and both gradients"
        parts = [f"{kind}, {layer}, {1 - density:.0%} zeros" for density in densities]
        cells = [", ".join(f"{one.ratio(p, b):.2f}" for b in ("conv2d(x, W*M)", "conv2d(x, W)")) for p in parts]
        rows.append([f"{layer}, {what}", *cells])
    head = ["3x3 convolution, over `conv2d(x, W*M)`, `conv2d(x, W)`", *(f"{1 - d:.0%}" for d in densities)]
    return table(head, rows) + caption(one)


def kernel() -> str:
    """Path kernel and data-driven methods."""
    one, px, data = suite("kernel"), suite("px"), suite("sensitivity")
    rows = [
        ["trace, ResNet-50, 224x224", span(one.seconds("trace, ResNet-50")), "float64, float32 autograd",
         ", ".join(times(one.ratio("trace, ResNet-50", f"{kind} autograd")) for kind in ("float64", "float32"))],
        ["product with the kernel, VGG-16-BN", span(one.seconds("one product")), "torch.func",
         times(one.ratio("one product", "torch.func"))],
        ["10 largest eigenvalues, VGG-16-BN", span(one.seconds("10 largest")), "ARPACK on torch.func",
         times(one.ratio("10 largest", "Lanczos on torch.func"))],
    ]  # fmt: skip
    for net in ("VGG-16-BN", "ResNet-20"):
        part = f"100 of 100, {net}"
        ratios = [times(px.ratio(part, baseline)) for baseline in ("published loop", "best PyTorch")]
        rows.append(
            [
                f"PX round, 100 images, {net}",
                span(px.seconds(part) / 5),
                "published loop, best PyTorch",
                ", ".join(ratios),
            ]
        )
    for method in ("SNIP", "GraSP"):
        timed = next(name for name in data.cases if name.startswith(method) and name.endswith("100 images"))
        ratios = [times(data.ratio(timed, baseline)) for baseline in ("published way", "best PyTorch")]
        what = f"{method}, 100 images, VGG-16-BN"
        rows.append([what, span(data.seconds(timed)), "published way, best PyTorch", ", ".join(ratios)])
        peaked = next(name for name in data.cases if name.startswith(method) and "mapped" in name)
        peaks = [data.peak(peaked, who) for who in (OURS, "published way", "best PyTorch")]
        over = ", ".join(times(peak / peaks[0]) for peak in peaks[1:])
        rows.append([f"{what}: peak memory", megabytes(peaks[0]), "published way, best PyTorch", over])
    return table(["path kernel and data", "pathprune", "over", ""], rows) + caption(one, px, data)


def transformers() -> str:
    """Rounds of SynFlow on transformers."""
    one = suite("transformers")
    plain_torch, read = "best PyTorch, path mode", "reading every weight once"
    rows = [
        [f"a round, ViT-B/16, policy `{policy}`", span(one.seconds(f"policy {policy}")),
         times(one.ratio(f"policy {policy}", plain_torch)), ""]
        for policy in ("paths", "published")
    ]  # fmt: skip
    for llama in (name for name in one.cases if "Llama" in name):
        shown = llama.removeprefix("SynFlow round, ").replace(" 1 threads", " 1 thread")
        rows.append([f"a round, {shown}", span(one.seconds(llama)), "", f"{1 / one.ratio(llama, read):.1f} reads"])
    head = ["SynFlow on transformers", "pathprune", "best PyTorch", "over reading the weights once"]
    return table(head, rows) + caption(one)


def checkpoints() -> str:
    """Peak memory and time of pruning from file to file."""
    found = json.loads((RESULTS / "large.amd-epyc-2-cores.json").read_text())
    rows = []
    for row in sorted(found["results"], key=lambda row: (row["shape"], row["method"], row["scope"])):
        scope = "" if row["scope"] == "global" else f", {row['scope']}"
        model = {"1.1b": "Llama of 1.1 B", "1b-experts": "Mixtral of 1 B"}[row["shape"]]
        beyond = row["peak"] - row["start"]
        rows.append(
            [f"{model}, {row['method']}{scope}", megabytes(row["peak"]), megabytes(beyond),
             megabytes(row["beyond_shard"]), span(row["seconds"]), times(row["over_copying_once"])]
        )  # fmt: skip
    head = ["from file to file", "peak", "beyond Python and torch", "beyond the largest shard", "time"]
    dates = sorted({row.get("date", found["machine"]["date"]) for row in found["results"]})
    abouts = [Suite({**found["machine"], "benchmark": "large", "results": [], "date": date}) for date in dates]
    return table([*head, "over copying the shards"], rows) + caption(*abouts)


def nas() -> str:
    """The cell space, a line for each way."""
    one = suite("nas")
    case = next(iter(one.cases))
    names = {
        OURS: "pathprune, SynFlow's sum",
        f"{OURS}, log2 R alone": "pathprune, log2 R",
        f"{OURS}, fresh weights": "pathprune, weights drawn for every cell",
        "best PyTorch": "best PyTorch, shared weights",
        "published loop": "published loop",
    }
    rows = []
    for name, shown in names.items():
        each = one.seconds(case, name)
        rows.append([shown, span(each), times(one.seconds(case, "published loop") / each)])
    return table(["one thread", "per architecture", "published loop takes"], rows) + caption(one)


def losses() -> str:
    """Every measured case in which a baseline is quicker, worst first; of the grid of products a line a layer."""
    rows, grid = [], {}
    for path in sorted(RESULTS.glob("*.*.json")):
        content = json.loads(path.read_text())
        if "benchmark" not in content:  # peaks of commands, not times side by side
            continue
        one = Suite(content)
        if one.about["benchmark"] == "memory" or path.stem.split(".", 1)[1] not in SHORT:
            continue
        for name, result in one.cases.items():
            for baseline in result["seconds"]:
                if baseline.startswith((OURS, "reading")) or baseline == "stored tables, given" or "mapped" in name:
                    continue
                ratio = one.ratio(name, baseline)
                if one.about["benchmark"] == "masked_matmul":
                    key = (result["notes"]["kind"], result["notes"]["n"], baseline)
                    grid.setdefault(key, []).append((ratio, name))
                elif ratio < 0.995:
                    rows.append((ratio, name, baseline, one.machine))
    lines = [[_label(name), baseline, f"{ratio:.2f}x", machine] for ratio, name, baseline, machine in sorted(rows)]
    for (kind, n, baseline), cells in grid.items():
        lost = sorted(cell for cell in cells if cell[0] < 0.995)
        if lost:
            where = lost[0][1].split(", ", 2)[2]
            what = f"masked matmul, {kind}, {n} x {n}: {len(lost)} of {len(cells)} points, worst at {where}"
            lines.append([what, baseline, f"{lost[0][0]:.2f}x", suite("masked_matmul").machine])
    return table(["where it loses", "to", "time of that / ours", "on"], lines)


def _label(case: str) -> str:
    """A case as a reader who does not know the suites would call it."""
    case = re.sub(r"^[a-z]+ [0-9.]+: ", "", case)  # where on which axis it lies
    return case.replace("forms, ", "walk steps, ").replace(" 1 walkers a unit", " 1 walker a unit")


def px_agreement() -> str:
    """How much of PX's mask other scores keep."""
    found = plain("px_agreement")
    rows = [
        [name, *(f"{100 * share:.1f} %" for share in shares.values())]
        for name, shares in found["in common with PX"].items()
    ]
    densities = next(iter(found["in common with PX"].values()))
    head = [f"in common with PX ({found['network']}, {found['images']} digits)"]
    return table([*head, *(f"at {100 * float(density):g} %" for density in densities)], rows)


MADE: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        scoring, memory, selection, phew, masked_matmul, masked_matmul_grid, sparse_convolution, kernel, losses,
        px_agreement, transformers, checkpoints, nas,
    )
}  # fmt: skip


def renewed(text: str, page: str) -> str:
    """The page with everything between its marks made anew.

    Raises:
        KeyError: a mark names no table, or a table misses its case.
    """

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in MADE:
            raise KeyError(f"{page}: <!-- {name} -->: wanted one of {', '.join(MADE)}")
        return f"<!-- {name} -->\n{MADE[name]()}\n<!-- /{name} -->"

    return MARK.sub(made, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true")
    what.add_argument("--write", action="store_true")
    write = parser.parse_args(arguments).write
    drifted = False
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        new = renewed(text, page)
        if new != text and write:
            path.write_text(new)
            print(f"{page} written")
        elif new != text:
            drifted = True
            print(
                "\n".join(
                    difflib.unified_diff(
                        text.splitlines(), new.splitlines(), page, f"{page}, as measured", "", "", 0, ""
                    )
                )
            )
    if drifted:
        print("The pages say something else than benchmarks/results. `make tables` writes them anew.", file=sys.stderr)
    return int(drifted)


if __name__ == "__main__":
    sys.exit(main())
