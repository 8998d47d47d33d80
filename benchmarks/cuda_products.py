"""masked_matmul on a GPU: each of its kernels, and the one it would choose, against torch's dense products.

What is prepared once per mask does not count for anyone. Forward products are replayed from CUDA graphs, for to launch
one from Python takes longer than many of them run; candidates take turns, so none finds its weight in L2 but where all
of them fit in it. Gradients are timed as training meets them, launches included. Results are verified in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pathprune as pp
from harness import Case, Result
from pathprune.masked import cuda_times

KINDS = ("forward", "gradients")
DENSITIES = (0.5, 0.1, 0.05, 0.01)
BATCHES = (1, 8, 32, 128, 512)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KERNELS = ("auto", "tiles", "dense")  # that can be forced
MASKED, DENSE = "F.linear(x, W*M)", "F.linear(x, W)"
Work = Callable[[], list[Tensor]]


def measure(kind: str, dtype: str, n: int, density: float, batch: int, bandwidth: float) -> Result:
    """One point of the grid: a weight [n, n]."""
    generator = torch.Generator().manual_seed(1)
    bits = (torch.rand(n, n, generator=generator) < density).cuda()
    weight = (torch.randn(n, n, generator=generator) / n**0.5).to("cuda", DTYPES[dtype])
    x, grad = (torch.randn(batch, n, generator=generator).to("cuda", DTYPES[dtype]) for _ in range(2))
    mask = pp.pack_mask(bits)
    values, masked = mask.gather(weight), weight * bits
    works: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        f"pathprune {kernel}": lambda x, v, k=kernel: pp.masked_matmul(x, v, mask, kernel=k)
        for kernel in KERNELS  # type: ignore[misc]
    }
    works |= {MASKED: lambda x, w: F.linear(x, w * bits), DENSE: F.linear}
    given = {**dict.fromkeys(works, values), MASKED: weight, DENSE: masked}

    def results(name: str) -> list[Tensor]:
        if kind == "forward":
            return [works[name](x, given[name])]
        leaves = [tensor.detach().requires_grad_() for tensor in (x, given[name])]
        y = works[name](*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    def verified() -> str:
        exact = [x.double() @ masked.double().T, grad.double() @ masked.double(), grad.double().T @ x.double()]
        for name in works:
            for k, (found, wanted) in enumerate(zip(results(name), exact, strict=False)):
                if k == 2:
                    found = mask.scatter(found) if found.dim() == 1 else found * bits
                    wanted = wanted * bits
                apart = float((found.double() - wanted).norm() / wanted.norm())
                # NaN is not below anything.
                if not apart < (1e-5 if dtype == "float32" else 1e-2):
                    raise AssertionError(f"{name}: result {k} is {apart:.1e} of its norm from that in float64")
        return f"results of {len(works)} ways are those of float64, by their norms"

    case = Case(f"{kind}, {dtype}, n = {n}, {1 - density:.0%} zeros, batch {batch}", verified, "cuda")
    for name in works:
        case.add(
            name, replayed(lambda name=name: results(name)) if kind == "forward" else lambda name=name: results(name)
        )
    times = cuda_times(n, n, density, batch, DTYPES[dtype])
    return case.measure(
        repeats=21,
        warmup=3,
        bandwidth=bandwidth,
        chosen=min(times, key=times.__getitem__),
        predicted_microseconds={kernel: time * n * n / 1e6 for kernel, time in times.items()},
        packed_bytes=mask.nbytes + values.element_size() * mask.stored,
    )


def replayed(work: Callable[[], object]) -> Callable[[], object]:
    """The work in a CUDA graph; as it is where it cannot be captured."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is done once only is not captured
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            made = work()
    except RuntimeError as error:
        print(f"not captured: {error}")
        return work
    return lambda: (graph.replay(), made)  # what it writes to lives as long as it does
