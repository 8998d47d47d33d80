"""masked_matmul against what torch has for it: the forward, and the forward with both gradients.

Every candidate takes x [batch, features] and gives [batch, features]; transposes that a baseline needs count.
What is prepared once per mask (packing, the weight with its zeros, a CSR tensor) does not count for anyone;
in training the CSR baseline has its values anew at each step, as the others have.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import pathprune as pp
from harness import Case, Result

KINDS = ("forward", "gradients")
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
BATCHES = (1, 8, 32, 128, 256, 1024)
CLOCK = "process"
SUBJECT, MASKED, DENSE, CSR = "pathprune", "F.linear(x, W*M)", "F.linear(x, W)", "torch.sparse CSR"
Work = Callable[[], list[Tensor]]


def _written_out(result: Tensor, mask: pp.PackedMask) -> Tensor:
    """A gradient of the weight [out, in], whatever form it has; everything else as it is."""
    if result.layout == torch.sparse_csr:
        return result.to_dense()
    return mask.scatter(result) if result.dim() == 1 else result


def _verified(works: dict[str, Work], mask: pp.PackedMask) -> str:
    """Raises where the results differ; the dense layer has gradients off the mask, which are left out."""
    ours = [_written_out(result, mask) for result in works[SUBJECT]()]
    bits = mask.bits()
    for work in works.values():
        for k, (result, wanted) in enumerate(zip(work(), ours, strict=True)):
            given = _written_out(result, mask)
            given = given * bits if k == 2 else given
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    return f"{len(ours)} results of {len(works)} ways agree to 1e-4"


def measure(kind: str, n: int, density: float, batch: int, bandwidth: float) -> Result:
    """One point of the grid: a weight [n, n] in float32."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.rand(n, n, generator=generator) < density
    weight = torch.randn(n, n, generator=generator) / n**0.5
    x, grad = (torch.randn(batch, n, generator=generator) for _ in range(2))
    mask = pp.pack_mask(bits)
    make, training = (_gradients, True) if kind == "gradients" else (_forward, False)
    works = make(x, grad, weight, bits, mask)
    case = Case(f"{kind}, n = {n}, {1 - density:.0%} zeros, batch {batch}", lambda: _verified(works, mask))
    for name, work in works.items():
        case.add(name, work)
    return case.measure(
        repeats=3 if n * batch > 1 << 19 else 9,
        bandwidth=bandwidth,
        kind=kind,
        n=n,
        density=density,
        batch=batch,
        kernel=mask.kernel(batch, training=training),
        packed_bytes=mask.nbytes + 4 * mask.stored,
        dense_bytes=4 * n * n,
    )


def _csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight.to_sparse_csr()


def _forward(x: Tensor, grad: Tensor, weight: Tensor, bits: Tensor, mask: pp.PackedMask) -> dict[str, Work]:
    masked, values = weight * bits, mask.gather(weight)
    csr = _csr(masked)
    return {
        SUBJECT: lambda: [pp.masked_matmul(x, values, mask)],
        MASKED: lambda: [F.linear(x, weight * bits)],
        DENSE: lambda: [F.linear(x, masked)],
        CSR: lambda: [(csr @ x.T).T.contiguous()],
    }


def _gradients(x: Tensor, grad: Tensor, weight: Tensor, bits: Tensor, mask: pp.PackedMask) -> dict[str, Work]:
    """Each gives [y, dX, dW]: by autograd, but for CSR, whose three products are written out."""
    masked, values = weight * bits, mask.gather(weight)
    csr, transposed = _csr(masked), _csr(masked.T.contiguous())
    zeros = csr * 0

    def through(product: Callable[[Tensor, Tensor], Tensor], parameter: Tensor) -> list[Tensor]:
        given = [tensor.detach().requires_grad_() for tensor in (x, parameter)]
        y = product(*given)
        return [y.detach(), *torch.autograd.grad(y, given, grad)]

    return {
        SUBJECT: lambda: through(lambda x, v: pp.masked_matmul(x, v, mask), values),
        MASKED: lambda: through(lambda x, w: F.linear(x, w * bits), weight),
        DENSE: lambda: through(F.linear, masked),
        CSR: lambda: [
            (csr @ x.T).T.contiguous(),
            (transposed @ grad.T).T.contiguous(),
            torch.sparse.sampled_addmm(zeros, grad.T, x),
        ],
    }


# ---- the whole grid ----------------------------------------------------------------------------------


def overview(results: Sequence[Result]) -> str:
    """How many times faster than each baseline, the losses included."""
    lines = []
    for kind in KINDS:
        for n in sorted({r.notes["n"] for r in results}):
            chosen = {(r.notes["density"], r.notes["batch"]): r for r in results if _is(r, kind, n)}
            batches = sorted({batch for _, batch in chosen})
            for baseline in (MASKED, DENSE, CSR):
                lines += [f"### {kind}, n = {n}: time of {baseline} / time of pathprune", ""]
                lines += ["| zeros | " + " | ".join(f"batch {b}" for b in batches) + " |"]
                lines += ["|---" * (len(batches) + 1) + "|"]
                for density in sorted({density for density, _ in chosen}, reverse=True):
                    row = [chosen.get((density, b)) for b in batches]
                    cells = ["-" if r is None else f"{r.ratio(baseline, SUBJECT, CLOCK):.2f}" for r in row]
                    lines.append(f"| {1 - density:.0%} | " + " | ".join(cells) + " |")
                lines.append("")
    return "\n".join(lines)


def _is(result: Result, kind: str, n: int) -> bool:
    return (result.notes["kind"], result.notes["n"]) == (kind, n)


def plot(results: Sequence[Result], path: Path) -> None:
    """Speed over the dense layer on a pre-masked weight by sparsity, a line for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({r.notes["n"] for r in results})
    figure, axes = pyplot.subplots(len(KINDS), len(sizes), figsize=(5 * len(sizes), 7), squeeze=False)
    for row, kind in zip(axes, KINDS, strict=True):
        for ax, n in zip(row, sizes, strict=True):
            for batch in sorted({r.notes["batch"] for r in results}):
                points = [r for r in results if _is(r, kind, n) and r.notes["batch"] == batch]
                points.sort(key=lambda r: r.notes["density"])
                kept = [r.notes["density"] for r in points]
                ax.plot(kept, [r.ratio(DENSE, SUBJECT, CLOCK) for r in points], marker="o", label=f"batch {batch}")
            ax.axhline(1, color="black", linewidth=0.8)
            ax.set(xscale="log", yscale="log", xlabel="density", title=f"{kind}, n = {n}")
            ax.set_ylabel("times faster than dense")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
