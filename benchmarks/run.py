"""Runs the benchmarks: verify, time side by side in one process, print Markdown. `pathprune bench` starts this.

python benchmarks/run.py [--suite scoring,memory,...] [--only text] [--quick] [--device cpu|cuda] [--threads 2]
                         [--json results.json] [--plot roofline.png] [--out benchmarks/results]
python benchmarks/run.py --compare before.json after.json
python benchmarks/run.py --list

`--json` writes all that ran into one file, `--out` a file per suite, named by the machine. Without them nothing is
written. On a GPU those suites run whose baselines do.
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import comparing
import cuda_products
import masked_matmul
import memory
import nas
import path_exclusion
import path_kernel
import roofline
import scoring
import selection
import sensitivity
import sparse_convolution
import transformers_scoring
import walks
from harness import Result, copy_bandwidth, markdown, release, result_path, save
from pathprune import _library

Work = Callable[[float], Result]


def scoring_suite(quick: bool, device: str = "cpu") -> list[tuple[str, Work]]:
    big = [] if quick else [("mlp-140m", 9)]
    cases: list[tuple[str, Work]] = [
        (f"round {key}", lambda b, key=key, n=n: scoring.one_round(key, n, b, device=device))
        for key, n in (("mlp-20m", 7), *big, ("vgg16", 7), ("resnet50", 3))
    ]
    if not quick:
        schedules: list[tuple[str, Work]] = [
            (f"schedule {key}", lambda b, key=key, d=d: scoring.whole_schedule(key, 100, d, b, device=device))
            for key, d in (("mlp-20m", 0.01), ("vgg16", 0.05), ("resnet50", 0.05), ("mlp-140m", 0.01))
        ]
        cases += schedules
    return cases


def memory_suite(quick: bool, device: str = "cpu") -> list[tuple[str, Work]]:
    keys = ("mlp-20m",) if quick else ("mlp-20m", "mlp-140m", "vgg16", "resnet50")
    return [(f"memory {key}", lambda b, key=key: memory.peaks(key, b, device=device)) for key in keys]


def selection_suite(quick: bool, device: str = "cpu") -> list[tuple[str, Work]]:
    sizes = ((16, 0.0),) if quick else ((16, 0.0), (67, 0.0), (67, 0.5))
    return [
        (f"select {n} {z}", lambda b, n=n, z=z: selection.kth_of(n, 5, b, z, slow=n < 32, device=device))
        for n, z in sizes
    ]


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


def convolution_suite(quick: bool) -> list[tuple[str, Work]]:
    layers = sparse_convolution.LAYERS[1:2] if quick else sparse_convolution.LAYERS
    return [
        (f"{kind} {layer} {d}", lambda b, k=kind, n=layer, d=d: sparse_convolution.measure(k, n, d, b))
        for layer in layers
        for kind in sparse_convolution.KINDS
        for d in sparse_convolution.DENSITIES
    ]


def cuda_products_suite(quick: bool, device: str = "cuda") -> list[tuple[str, Work]]:
    return [
        (f"{k} {t} {n} {d} {b}", lambda bw, a=(k, t, n, d, b): cuda_products.measure(*a, bw))
        for n in ((4096,) if quick else (4096, 1024))
        for t in cuda_products.DTYPES
        for k in cuda_products.KINDS
        for d in cuda_products.DENSITIES
        for b in ((1, 32) if quick else cuda_products.BATCHES)
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


def transformers_suite(quick: bool) -> list[tuple[str, Work]]:
    layers = 2 if quick else 22
    cases: list[tuple[str, Work]] = [
        (f"llama {threads} threads", lambda b, t=threads: transformers_scoring.llama_round(layers, t, 9, b))
        for threads in (1, 2)
    ]
    if not quick:
        cases += [(f"vit {p}", lambda b, p=p: transformers_scoring.vit_round(p, 5, b)) for p in ("paths", "published")]
    return cases


SUITES: dict[str, Callable[..., list[tuple[str, Work]]]] = {
    "scoring": scoring_suite,
    "memory": memory_suite,
    "selection": selection_suite,
    "walks": walks_suite,
    "sensitivity": sensitivity_suite,
    "kernel": kernel_suite,
    "px": px_suite,
    "masked_matmul": masked_matmul_suite,
    "sparse_convolution": convolution_suite,
    "cuda_products": cuda_products_suite,
    "nas": nas_suite,
    "transformers": transformers_suite,
}
# Their cases take the device to run on; the others are of the CPU. The first are of a GPU alone.
ON_CUDA = ("cuda_products",)
ON_DEVICE = (*ON_CUDA, "scoring", "selection", "memory")
CLOCK = {"masked_matmul": "process", "nas": "thread"}


def cases_of(suite: str, quick: bool, device: str) -> list[tuple[str, Work]]:
    return SUITES[suite](quick, device) if suite in ON_DEVICE else SUITES[suite](quick)


def measure(suite: str, options: argparse.Namespace) -> list[Result]:
    """Runs the chosen cases of a suite; prints each as it is done, and writes those done so far."""
    bandwidth = copy_bandwidth(options.device)
    print(f"# {suite}: {options.threads} threads, copy bandwidth {bandwidth:.3g} GB/s\n", flush=True)
    results: list[Result] = []
    for name, work in cases_of(suite, options.quick, options.device):
        if options.only not in name:
            continue
        try:
            results.append(work(bandwidth))
        except Exception as error:  # too little memory, say: the other cases are measured all the same
            traceback.print_exc()
            options.failed.append(f"{suite} {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        finally:
            release(options.device)
        print(markdown(results[-1:], next(iter(results[-1].seconds)), CLOCK.get(suite, "wall")), flush=True)
        if options.out is not None:  # after each case, so that an interrupted run keeps what it has
            facts = {"threads": options.threads, "copy_gb_per_second": bandwidth}
            save(suite, results, options.out, device=options.device, **facts)
    if results and suite == "masked_matmul":
        print(masked_matmul.overview(results))
    if results and options.out is not None and suite in ("masked_matmul", "walks"):
        draw = masked_matmul.plot if suite == "masked_matmul" else walks.plot
        draw(results, result_path(suite, options.out).with_suffix(".png"))
    return results


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, refused in a line where something is wrong with them."""
    options = parser.parse_args()
    if not (_library.cpu_loaded or options.compare or options.list):
        parser.error(f"the compiled ops are not loaded, so there is nothing to measure: {_library.cpu_error}")
    options.suites = options.suite.split(",") if options.suite else list(SUITES)
    unknown = [suite for suite in options.suites if suite not in SUITES]
    if unknown:
        parser.error(f"--suite: wanted some of {', '.join(SUITES)}, got {', '.join(unknown)}")
    if options.threads < 1:
        parser.error(f"--threads: wanted at least 1, got {options.threads}")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device: torch sees no GPU here; use --device cpu")
        on_cpu = [suite for suite in options.suites if suite not in ON_DEVICE]
        if on_cpu and options.suite:
            parser.error(f"--device: {', '.join(on_cpu)} have baselines for the CPU alone; on a GPU: {ON_DEVICE}")
        options.suites = options.suites if options.suite else list(ON_DEVICE)
    elif options.suite and not options.list and set(options.suites) & set(ON_CUDA):
        parser.error(f"--suite: {', '.join(ON_CUDA)} are of a GPU alone; add --device cuda")
    elif not options.suite:
        options.suites = [suite for suite in options.suites if suite not in ON_CUDA]
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"wanted a file in a folder that exists, got {path}")
    return options


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=os.environ.get("PATHPRUNE_BENCH_NAME"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", default="", help=f"comma-separated, of {', '.join(SUITES)}; default: all")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="list the cases and run none")
    parser.add_argument("--quick", action="store_true", help="small cases only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--plot", type=Path, help="draw bytes and bandwidth to this file")
    parser.add_argument("--out", type=Path, default=os.environ.get("PATHPRUNE_RESULTS"), help="a file per suite here")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="of two JSON files")
    options = checked(parser)
    if options.compare:
        try:
            print(comparing.compare(*options.compare))
        except ValueError as error:
            parser.error(str(error))
        return
    if options.list:
        for suite in options.suites:
            print(*(f"{suite:<14} {name}" for name, _ in cases_of(suite, options.quick, options.device)), sep="\n")
        return
    torch.set_num_threads(options.threads)
    options.failed = []
    results: list[Result] = []
    for suite in options.suites:
        results += measure(suite, options)
        if options.json is not None and results:
            where = (options.json.parent, options.json.name, options.device)
            save(",".join(options.suites), results, *where, threads=options.threads)
    if options.failed:
        parser.exit(1, "\n".join(["Not measured:", *options.failed, ""]))
    if not results:
        parser.error(f"--only: no case of {', '.join(options.suites)} has {options.only!r} in its name; see --list")
    if options.plot is not None and roofline.plot(results, options.plot) == 0:
        print(f"no case states the bytes it moves, so {options.plot} was not drawn")


if __name__ == "__main__":
    main()
