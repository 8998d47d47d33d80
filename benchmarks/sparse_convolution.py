"""SparseConv2d against torch's convolution: the forward, and the forward with both gradients.

Layers of 3x3 kernels as networks have them, from many positions and few channels to the reverse. The baselines are the
masked layer, conv2d(x, W*M), and the dense one on a weight with zeros; what is prepared once per mask counts for none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from harness import Case, Result

SUBJECT, MASKED, DENSE = "pathprune", "conv2d(x, W*M)", "conv2d(x, W)"
KINDS = ("forward", "gradients")
DENSITIES = (0.2, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class Layer:
    images: int
    channels: int
    size: int

    def __str__(self) -> str:
        return f"{self.images} images of {self.channels} x {self.size} x {self.size}"


LAYERS = (Layer(32, 64, 56), Layer(128, 128, 16), Layer(128, 512, 4))


def measure(kind: str, layer: Layer, density: float, bandwidth: float) -> Result:
    """A 3x3 convolution with as many filters as channels, in float32."""
    torch.manual_seed(1)
    dense = nn.Conv2d(layer.channels, layer.channels, 3, padding=1, bias=False)
    bits = torch.rand(dense.weight.shape) < density
    weight = dense.weight.detach().clone()
    masked = weight * bits
    sparse = pp.SparseConv2d(dense, bits)
    x, grad = (torch.randn(layer.images, layer.channels, layer.size, layer.size) for _ in range(2))

    def run(product: Callable[[Tensor, Tensor], Tensor], parameter: Tensor) -> list[Tensor]:
        if kind == "forward":
            with torch.no_grad():
                return [product(x, parameter)]
        given = [x.detach().requires_grad_(), parameter.requires_grad_()]
        y = product(*given)
        return [y.detach(), *torch.autograd.grad(y, given, grad)]

    works = {
        SUBJECT: lambda: run(lambda x, w: sparse(x), sparse.weight),
        MASKED: lambda: run(lambda x, w: F.conv2d(x, w * bits, padding=1), weight),
        DENSE: lambda: run(lambda x, w: F.conv2d(x, w, padding=1), masked),
    }

    def verify() -> str:
        ours, theirs = works[SUBJECT](), works[MASKED]()
        if kind == "gradients":
            ours[2] = sparse.mask.scatter(ours[2]).reshape(weight.shape)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        return f"{len(ours)} results agree to 1e-4"

    case = Case(f"{kind}, {layer}, {1 - density:.0%} zeros", verify)
    for name, work in works.items():
        case.add(name, work)
    return case.measure(repeats=5, bandwidth=bandwidth, kind=kind, layer=str(layer), density=density)
