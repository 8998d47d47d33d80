"""Runs the benchmarks: verify, time side by side in one process, print Markdown, write JSON beside this file.

python benchmarks/run.py [--suite scoring,selection,walks,sensitivity,...] [--threads 2] [--quick]
                         [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

import masked_matmul
import nas
import path_exclusion
import path_kernel
import scoring
import selection
import sensitivity
import walks
from harness import Result, copy_bandwidth, markdown, save

Work = Callable[[float], Result]
FOLDER = Path(__file__).parent / "results"


def scoring_suite(quick: bool) -> list[tuple[str, Work]]:
    big = [] if quick else [("mlp-140m", 2)]
    cases: list[tuple[str, Work]] = [
        (f"round {key}", lambda b, key=key, n=n: scoring.one_round(key, n, b))
        for key, n in (("mlp-20m", 7), *big, ("vgg16", 7), ("resnet50", 3))
    ]
    if not quick:
        schedules: list[tuple[str, Work]] = [
            (f"schedule {key}", lambda b, key=key, d=d: scoring.whole_schedule(key, 100, d, b))
            for key, d in (("mlp-20m", 0.01), ("vgg16", 0.05), ("resnet50", 0.05), ("mlp-140m", 0.01))
        ]
        cases += [schedules[0], ("memory mlp-140m", lambda b: scoring.memory("mlp-140m", b)), *schedules[1:]]
    return cases


def selection_suite(quick: bool) -> list[tuple[str, Work]]:
    sizes = ((16, 0.0),) if quick else ((16, 0.0), (67, 0.0), (67, 0.5))
    return [(f"select {n} {z}", lambda b, n=n, z=z: selection.kth_of(n, 5, b, z, slow=n < 32)) for n, z in sizes]


def walks_suite(quick: bool) -> list[tuple[str, Work]]:
    sizes = [(1024, 1 << 20)] if quick else [(1024, 1 << 17), (1024, 1 << 20), (4096, 1 << 17), (4096, 1_800_000)]
    cases: list[tuple[str, Work]] = [
        (f"steps {n} {w}", lambda b, n=n, w=w: walks.steps_per_second(n, w, 5, b)) for n, w in sizes
    ]
    x = torch.ones(1, 3, 32, 32)
    for density in (0.018, 0.1):
        name = f"mask vgg16 {density}"
        cases.append((name, lambda b, d=density: walks.whole_job("vgg16", walks.vgg16(), x, d, 5, b)))
    for size in (1024,) if quick else (1024, 4096):
        name = f"4 layers of {size} x {size}"
        cases.append((f"mask {size}", lambda b, n=size, t=name: walks.whole_mask(t, walks.square(n), 0.1, 3, b)))
    tables = walks.Tables()
    for size, counts in ((1024, (1, 4, 16, 64, 256, 1024)), (4096, () if quick else (1, 4, 16, 32, 128, 440))):
        cases += [(f"forms {size} {w}", lambda b, n=size, w=w: walks.forms(n, w, 3, b, tables)) for w in counts]
    return cases


def masked_matmul_suite(quick: bool) -> list[tuple[str, Work]]:
    return [
        (f"{kind} {n} {d} {t}", lambda b, k=kind, n=n, d=d, t=t: masked_matmul.measure(k, n, d, t, b))
        for n in ((1024,) if quick else (1024, 4096))
        for kind in masked_matmul.KINDS
        for d in masked_matmul.DENSITIES
        for t in ((1, 32) if quick else masked_matmul.BATCHES)
    ]


def sensitivity_suite(quick: bool) -> list[tuple[str, Work]]:
    methods = ("SNIP",) if quick else ("SNIP", "GraSP")
    return [
        *((f"peak {method}", lambda b, m=method: sensitivity.memory(m, b)) for method in methods),
        *((method, lambda b, m=method: sensitivity.seconds(m, 3, b)) for method in methods),
    ]


def kernel_suite(quick: bool) -> list[tuple[str, Work]]:
    cases: list[tuple[str, Work]] = [
        (f"trace {key}", lambda b, key=key: path_kernel.trace(key, 5, b)) for key in ("resnet50", "vgg16")
    ]
    cases.append(("product vgg16", lambda b: path_kernel.products(5, b)))
    return cases if quick else [*cases, ("eigenvalues vgg16", lambda b: path_kernel.eigenvalues(10, b))]


def px_suite(quick: bool) -> list[tuple[str, Work]]:
    keys = ("resnet20",) if quick else ("resnet20", "vgg16")
    return [(f"px {key}", lambda b, key=key: path_exclusion.rounds(key, b)) for key in keys]


def nas_suite(quick: bool) -> list[tuple[str, Work]]:
    return [("space", lambda b: nas.space(b, quick))]


SUITES = {
    "scoring": scoring_suite,
    "selection": selection_suite,
    "walks": walks_suite,
    "sensitivity": sensitivity_suite,
    "kernel": kernel_suite,
    "px": px_suite,
    "masked_matmul": masked_matmul_suite,
    "nas": nas_suite,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default=",".join(SUITES), help=f"comma-separated, of {sorted(SUITES)}")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small cases only")
    parser.add_argument("--out", type=Path, default=os.environ.get("PATHPRUNE_RESULTS", FOLDER))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for suite in options.suite.split(","):
        if suite not in SUITES:
            parser.error(f"--suite: wanted some of {sorted(SUITES)}, got {suite!r}")
        bandwidth = copy_bandwidth()
        print(f"# {suite}: {options.threads} threads, copy bandwidth {bandwidth:.3g} GB/s\n", flush=True)
        results: list[Result] = []
        clock = {"masked_matmul": "process", "nas": "thread"}.get(suite, "wall")
        for name, work in SUITES[suite](options.quick):
            if options.only not in name:
                continue
            results.append(work(bandwidth))
            print(markdown(results[-1:], "pathprune" if "memory" not in name else "compact=False", clock), flush=True)
            # After each case, so that an interrupted run keeps what it has.
            path = save(suite, results, options.out, threads=options.threads, copy_gb_per_second=bandwidth)
        if results:
            print("written to", path)
        if results and suite == "masked_matmul":
            print(masked_matmul.overview(results))
            masked_matmul.plot(results, path.with_suffix(".png"))
        if results and suite == "walks":
            walks.plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
