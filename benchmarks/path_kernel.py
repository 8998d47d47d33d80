"""The path kernel: its trace against autograd of the squared network, its spectrum against Lanczos on torch.func.

The baselines run the module on squared weights (constants squared, max-pools as sums, ReLUs open). float64 is the usual
way to keep ResNet-50 from overflowing; in float32 its squared network just fits, so that is timed as well. The
Hessian-vector product of torch.func is forward over reverse; both spectra come from the same ARPACK call, tolerance
and start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

import pathprune as pp
from harness import Case, Result
from pathprune import models


class Squared(nn.Module):
    """A model on squared weights: what one would write to get R_2 from autograd.

    Batch norms become fixed squared scales, average pools square their constants, max-pools sum, ReLUs are left out.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        import copy

        self.net = copy.deepcopy(model).to(dtype).eval()
        self._swap(self.net)
        self.u = {n: p.detach().square() for n, p in self.net.named_parameters() if n.endswith("weight")}

    def _swap(self, parent: nn.Module) -> None:
        for name, child in parent.named_children():
            self._swap(child)
            made: nn.Module | None = None
            if isinstance(child, nn.BatchNorm2d):
                made = _Scaled(child)
            elif isinstance(child, nn.ReLU):
                made = nn.Identity()
            elif isinstance(child, nn.MaxPool2d):
                kernel, stride, padding = child.kernel_size, child.stride, child.padding
                made = nn.AvgPool2d(kernel, stride, padding, divisor_override=1)
            elif isinstance(child, nn.AdaptiveAvgPool2d):
                made = _SquaredMean()
            if isinstance(child, (nn.Linear, nn.Conv2d)):
                child.bias = None
            if made is not None:
                setattr(parent, name, made)

    def total(self, u: dict[str, Tensor], x: Tensor) -> Tensor:
        out = functional_call(self.net, u, (x,))
        return (out if isinstance(out, Tensor) else out.logits).sum()


class _Scaled(nn.Module):
    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().square()
        self.register_buffer("scale", scale.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _SquaredMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3]) ** 2


def trace(key: str, repeats: int, bandwidth: float) -> Result:
    """The trace of ResNet-50 at 224 x 224, or of VGG-16 at 32 x 32."""
    from scoring import SETTINGS

    setting = SETTINGS[key]
    torch.manual_seed(0)
    model, x = setting.make().eval(), torch.ones(setting.shape)
    network = pp.PathNetwork.from_module(model, x)

    def autograd(dtype: torch.dtype) -> Any:
        squared = Squared(model, dtype)

        def work() -> float:
            u = {n: p.to(dtype).requires_grad_() for n, p in squared.u.items()}
            slopes = torch.autograd.grad(squared.total(u, x.to(dtype)), list(u.values()))
            return float(sum(s.double().sum() for s in slopes))

        return work

    ours = lambda: pp.PathKernel(network).trace()  # noqa: E731

    def verify() -> str:
        mine, wanted = ours(), autograd(torch.float64)()
        if abs(mine / wanted - 1) > 1e-5:
            raise AssertionError(f"trace: {mine} and {wanted}")
        return f"trace {mine:.6g}, float64 autograd {wanted:.6g}"

    weights = sum(network.tensors[n].numel() for n in network.prunable)
    case = Case(f"path-kernel trace, {setting.name}", verify)
    case.add("pathprune", ours, bytes_moved=8.0 * weights)
    case.add("float64 autograd", autograd(torch.float64)).add("float32 autograd", autograd(torch.float32))
    return case.measure(repeats, warmup=1, bandwidth=bandwidth)


def eigenvalues(k: int, bandwidth: float, tolerance: float = 1e-3) -> Result:
    """The k largest eigenvalues for VGG-16-BN at 32 x 32."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    torch.manual_seed(0)
    model, x = models.vgg16_bn().eval(), torch.ones(1, 3, 32, 32)
    network = pp.PathNetwork.from_module(model, x)
    squared = Squared(model, torch.float32)
    theta = {n: network.tensors[n].detach() for n in network.prunable}
    slope = grad(squared.total)(squared.u, x)
    sizes = [theta[n].numel() for n in theta]
    counted = {"pathprune": 0, "torch.func": 0}

    def product(flat: Any) -> Any:
        counted["torch.func"] += 1
        parts = torch.as_tensor(flat, dtype=torch.float32).reshape(-1).split(sizes)
        v = {n: part.reshape(theta[n].shape) for n, part in zip(theta, parts, strict=True)}
        along = {n: theta[n] * v[n] for n in theta}
        _, second = jvp(lambda u: grad(squared.total)(u, x), (squared.u,), (along,))
        return torch.cat([(slope[n] * v[n] + theta[n] * second[n]).flatten() for n in theta]).numpy()

    start = torch.cat([theta[n].sign().flatten() for n in theta]).numpy()
    operator = LinearOperator((len(start), len(start)), matvec=product, dtype=start.dtype)
    found: dict[str, Tensor] = {}

    def plain() -> None:
        values = eigsh(operator, k=k, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
        found["torch.func"] = torch.as_tensor(values.copy()).double().sort(descending=True).values

    def ours() -> None:
        found["pathprune"] = pp.PathKernel(network).top_eigenvalues(k, tolerance=tolerance, progress=False)

    def verify() -> str:
        kernel = pp.PathKernel(network)
        v = torch.randn(len(start), generator=torch.Generator().manual_seed(0))
        mine, other = kernel.matvec(v), torch.as_tensor(product(v.numpy())).double()
        error = float((mine - other).norm() / other.norm())
        if error > 1e-4:
            raise AssertionError(f"matvec: relative difference {error}")
        return f"a product agrees to {error:.1e}"

    case = Case(f"path kernel, {k} largest eigenvalues, VGG-16-BN for 32x32", verify)
    case.add("pathprune", ours).add("Lanczos on torch.func", plain)
    result = case.measure(1, warmup=0, bandwidth=bandwidth)
    result.notes.update({name: [round(v, 6) for v in values.tolist()] for name, values in found.items()})
    return result


def products(repeats: int, bandwidth: float) -> Result:
    """One product with the kernel, VGG-16-BN at 32 x 32: what the eigenvalues are made of."""
    torch.manual_seed(0)
    model, x = models.vgg16_bn().eval(), torch.ones(1, 3, 32, 32)
    kernel = pp.PathKernel(pp.PathNetwork.from_module(model, x))
    squared = Squared(model, torch.float32)
    theta = {n: p.detach() for n, p in model.named_parameters() if n in squared.u and p.dim() > 1}
    u = {n: squared.u[n] for n in theta}
    v = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) for n, t in theta.items()}

    def plain() -> dict[str, Tensor]:
        along = {n: theta[n] * v[n] for n in theta}
        slope, second = jvp(lambda u: grad(squared.total)(u, x), (u,), (along,))
        return {n: slope[n] * v[n] + theta[n] * second[n] for n in theta}

    def verify() -> str:
        mine, other = kernel.matvec(v), plain()
        error = max(float((mine[n] - other[n]).norm() / other[n].norm()) for n in theta)
        if error > 1e-4:
            raise AssertionError(f"matvec: relative difference {error}")
        return f"products agree to {error:.1e} in every layer"

    case = Case("path kernel, one product, VGG-16-BN for 32x32", verify)
    case.add("pathprune", lambda: kernel.matvec(v)).add("torch.func", plain)
    return case.measure(repeats, warmup=1, bandwidth=bandwidth)
