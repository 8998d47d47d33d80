"""Eigenvalues of a symmetric matrix that is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
_SMALL = 64  # matrices up to here are written out


@dataclass(frozen=True)
class Eigenpairs:
    """Attributes:
    values: float64 [k], descending.
    vectors: [n, k], orthonormal; None where they were not asked for.
    residuals: float64 [k]: ``|A x - value x| / |value|``; None likewise.
    """

    values: Tensor
    vectors: Tensor | None = None
    residuals: Tensor | None = None


def leading_eigenpairs(
    product: Product,
    start: Tensor,
    k: int,
    tolerance: float,
    progress: bool | None = None,
    wants_vectors: bool = True,
) -> Eigenpairs:
    """The k largest eigenpairs by implicitly restarted Lanczos (ARPACK, through SciPy); small matrices by LAPACK.

    Args:
        product: x [n] -> A x [n], in the type and on the device of ``start``, maybe in the same memory each time.
        start: [n], not orthogonal to what is looked for.
        tolerance: relative accuracy of the values.
    """
    n = len(start)
    if n <= max(_SMALL, 2 * k + 1):
        matrix = torch.stack([product(column).clone() for column in torch.eye(n).to(start)], 1).double()
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k].to(start.dtype)
    else:
        values, found = _arpack(product, start, k, tolerance, progress, wants_vectors)
        if found is None:
            return Eigenpairs(values)
        vectors = found
    residuals = torch.empty(k, dtype=torch.float64)
    for j in range(k):
        x = vectors[:, j].to(start)
        residuals[j] = (product(x).double() - values[j].to(start.device) * x.double()).norm()
    return Eigenpairs(values.cpu(), vectors.cpu(), residuals / values.abs().cpu().clamp(min=5e-324))


def _arpack(
    product: Product, start: Tensor, k: int, tolerance: float, progress: bool | None, wants_vectors: bool
) -> tuple[Tensor, Tensor | None]:
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        wanted = "pip install 'pathprune[kernel]'"
        raise ImportError(f"top_eigenpairs: SciPy does the Lanczos iteration: {wanted}") from error
    try:
        from tqdm import tqdm

        bar = tqdm(desc="eigenvalues", unit="product", disable=None if progress is None else not progress)
    except ImportError:
        bar = None
    kind = start.cpu().numpy().dtype

    def matvec(x: object) -> object:
        if bar is not None:
            bar.update()
        return product(torch.as_tensor(x, dtype=start.dtype).reshape(-1).to(start.device)).cpu().numpy()

    operator = LinearOperator((len(start), len(start)), matvec=matvec, dtype=kind)
    try:
        first = start.cpu().numpy()
        made = eigsh(operator, k=k, which="LA", v0=first, tol=tolerance, return_eigenvectors=wants_vectors)
    finally:
        if bar is not None:
            bar.close()
    values = torch.as_tensor(made[0] if wants_vectors else made)
    order = values.argsort(descending=True)
    return values[order].double(), torch.as_tensor(made[1])[:, order] if wants_vectors else None


@dataclass(frozen=True)
class SpectralDensity:
    """A distribution of eigenvalues as weighted points.

    Attributes:
        log2_values: float64 [points], ascending; -inf for values of 0 (and those that rounding made negative).
        weights: float64 [points], summing to 1.
        size: how many eigenvalues there are.
        spread: standard deviation, over the probes, of the mean eigenvalue, relative to it.
    """

    log2_values: Tensor
    weights: Tensor
    size: int
    spread: float

    def count_above(self, log2_value: float) -> float:
        """About how many eigenvalues are larger."""
        return float(self.weights[self.log2_values > log2_value].sum()) * self.size


def lanczos_density(product: Product, starts: Iterable[Tensor], steps: int, size: int, scale: int) -> SpectralDensity:
    """Stochastic Lanczos quadrature: each start gives the nodes and weights of a Gauss rule of its own measure.

    Args:
        product: x -> ``2^-scale A x``.
        starts: vectors of independent signs (0 where the matrix is 0).
        steps: products for each start. Three vectors are held: what orthogonality is lost repeats nodes, and shares
            their weight among them.
    """
    nodes, weights, means = [], [], []
    for start in starts:
        alpha, beta = _tridiagonal(product, start, steps)
        matrix = torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
        values, vectors = torch.linalg.eigh(matrix)
        nodes.append(values)
        weights.append(vectors[0].square())
        means.append(float((values * weights[-1]).sum()))
    found, share = torch.cat(nodes), torch.cat(weights) / len(nodes)
    order = found.argsort()
    values = found[order].clamp(min=0).log2() + scale
    mean = torch.tensor(means, dtype=torch.float64)
    spread = float(mean.std() / mean.mean()) if len(means) > 1 and float(mean.mean()) > 0 else 0.0
    return SpectralDensity(values, share[order], size, spread)


def _tridiagonal(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    alpha, beta = [], []
    x = start / start.double().norm().to(start)
    before, coupling = torch.zeros_like(x), 0.0
    for _ in range(steps):
        y = product(x) - coupling * before
        alpha.append(float(x.double() @ y.double()))
        y = y - alpha[-1] * x
        coupling = float(y.double().norm())
        if coupling <= 1e-7 * abs(alpha[0]):  # an invariant subspace
            break
        beta.append(coupling)
        before, x = x, y / coupling
    kept = len(alpha)
    return torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta[: kept - 1], dtype=torch.float64)
