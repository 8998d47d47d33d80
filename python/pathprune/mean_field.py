"""Initialization on the edge of chaos (Hayou, Ton, Doucet, Teh: Robust Pruning at Initialization, ICLR 2021).

With W_ij ~ N(0, sigma_w^2 / fan_in) and b ~ N(0, sigma_b^2), the variance q of wide pre-activations maps from one layer
to the next as ``q -> sigma_b^2 + sigma_w^2 E[phi(sqrt(q) Z)^2]``, and gradients grow or shrink by
``chi = sigma_w^2 E[phi'(sqrt(q) Z)^2]``, Z standard normal. The edge of chaos is chi = 1 at a fixed point q. Off it the
gradients change exponentially with depth, and sensitivity-based pruning empties whole layers.

The paper's text was not at hand: the two equations are those of the mean-field literature (Poole et al. 2016,
Schoenholz et al. 2017), and what the docstrings call *recalled* was written from memory.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .network import PathNetwork
from .nodes import Gate
from .structure import require_module
from .surroundings import undisturbed

Activation = Callable[[Tensor], Tensor]

# By the name of the ATen operator. Those that take parameters (leaky_relu, prelu, elu, ...) have to be given as a
# function: a graph's gate has only its operator's name.
_ACTIVATIONS: dict[str, Activation] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "selu": F.selu,
    "hardswish": F.hardswish,
}
_WIDEST = 12.0  # standard deviations that the integrals cover: what lies beyond weighs below 1e-31
_SEARCHED = (1e-6, 1e6)  # fixed points q are looked for in here
_TINY = 1e-16  # stands for q = 0, where SELU-like activations have a kink
_STEPS = 240  # of the search, evenly on a logarithmic scale


@dataclass(frozen=True)
class EdgeOfChaos:
    """A point on the edge of chaos.

    Attributes:
        sigma_w: weights are drawn from N(0, sigma_w^2 / fan_in).
        sigma_b: biases are drawn from N(0, sigma_b^2).
        q: the variance of pre-activations at the fixed point. 0 where it shrinks towards 0, slower than exponentially
            (tanh without biases); NaN where every variance is a fixed point (ReLU and all activations with
            ``phi(a x) = a phi(x)`` for a > 0).
    """

    sigma_w: float
    sigma_b: float
    q: float


@undisturbed
def edge_of_chaos(activation: str | Activation, sigma_b: float = 0.0) -> EdgeOfChaos:
    """The weight scale that puts an activation on the edge of chaos, for a given scale of the biases.

    Solves ``chi = 1`` together with the fixed point of the variance. For ReLU (and leaky forms of it) in closed form:
    ``sigma_w^2 = 1 / E[phi'(Z)^2]`` (2 for ReLU), sigma_b = 0. Otherwise sigma_w is eliminated, and the smallest root q
    of ``sigma_b^2 + E[phi^2] / E[phi'^2] = q`` is taken at which the variance map is stable.

    Args:
        activation: ``relu``, ``tanh``, ``gelu``, ``silu``, ``mish``, ``selu``, ``sigmoid``, ``hardswish``, ``linear``;
            or a function of a tensor, elementwise and differentiable almost everywhere.
        sigma_b: at least 0.

    Raises:
        ValueError: an unknown name, a negative or non-finite sigma_b, or no point on the edge of chaos.

    Determinism: no chance; quadrature in float64.

    Example:
        >>> edge_of_chaos("tanh", sigma_b=0.2).sigma_w  # 1.298
    """
    phi = _activation("edge_of_chaos", activation)
    if not (math.isfinite(sigma_b) and sigma_b >= 0):
        raise ValueError(f"edge_of_chaos: sigma_b: wanted a finite number >= 0, got {sigma_b}")
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", type(activation).__name__)
    slope = _moments(phi, 1.0)[1]
    if _is_homogeneous(phi):
        if sigma_b > 0:
            raise ValueError(
                f"edge_of_chaos: sigma_b: wanted 0 for '{name}', whose variance has no fixed point at chi = 1 with "
                f"biases, got {sigma_b}"
            )
        if slope == 0:
            raise ValueError(f"edge_of_chaos: activation: wanted one with a slope, got '{name}'")
        return EdgeOfChaos(1 / math.sqrt(slope), 0.0, math.nan)
    at_zero = _fixed_point_at_zero(phi) if sigma_b == 0 else None
    if at_zero is not None:
        return at_zero
    low = high = _SEARCHED[0]
    ratio = (_SEARCHED[1] / _SEARCHED[0]) ** (1 / _STEPS)
    for _ in range(_STEPS):
        low, high = high, high * ratio
        if _excess(phi, low, sigma_b) * _excess(phi, high, sigma_b) < 0:
            q = _bisected(phi, low, high, sigma_b)
            point = EdgeOfChaos(1 / math.sqrt(_moments(phi, q)[1]), sigma_b, q)
            if _is_stable(phi, point):
                return point
    raise ValueError(
        f"edge_of_chaos: activation: '{name}' has no point on the edge of chaos at sigma_b = {sigma_b} with a variance "
        f"in [{_SEARCHED[0]:g}, {_SEARCHED[1]:g}]; try another sigma_b"
    )


@undisturbed
def chi(activation: str | Activation, sigma_w: float, q: float = 1.0) -> float:
    """``sigma_w^2 E[phi'(sqrt(q) Z)^2]``: by what factor the squared gradient grows from a layer to the one below.

    Args:
        activation: as in :func:`edge_of_chaos`.
        sigma_w: the scale of the weights, finite.
        q: the variance of the pre-activations, finite and >= 0.

    Returns:
        Below 1 gradients vanish with depth (the ordered phase), above 1 they explode (chaos); 1 is the edge.

    Raises:
        ValueError: an unknown name, or numbers out of range.

    Example:
        >>> chi("relu", sigma_w=2**0.5)  # 1.0
    """
    if not math.isfinite(sigma_w):
        raise ValueError(f"chi: sigma_w: wanted a finite number, got {sigma_w}")
    if not (math.isfinite(q) and q >= 0):
        raise ValueError(f"chi: q: wanted a finite number >= 0, got {q}")
    return sigma_w**2 * _moments(_activation("chi", activation), q)[1]


def critical_sparsity_bound(chi: float, depth: int, width: int) -> float:
    """The sparsity beyond which sensitivity-based pruning is expected to empty a layer, as the paper bounds it.

    ``(1 + log(kappa L N^2) / kappa) / L`` with ``kappa = |log chi| / 8``, for a fully connected net of L layers of N
    units. *Recalled*: Theorem 1 of the paper, constants included; of its form for large ``kappa^2 L N^2`` only, so it
    says little near the edge of chaos, where the bound is 1. For a prediction from a given network see
    :func:`gradient_moments`.

    Returns:
        A fraction removed, in [0, 1]; 1 at chi = 1.

    Raises:
        ValueError: chi not positive and finite, or depth or width below 1.
    """
    if not (math.isfinite(chi) and chi > 0):
        raise ValueError(f"critical_sparsity_bound: chi: wanted a finite number > 0, got {chi}")
    if depth < 1 or width < 1:
        raise ValueError(f"critical_sparsity_bound: depth, width: wanted at least 1, got {depth}, {width}")
    kappa = abs(math.log(chi)) / 8
    if kappa == 0:
        return 1.0
    return min(1.0, max(0.0, (1 + math.log(kappa * depth * width**2) / kappa) / depth))


@undisturbed
@torch.no_grad()
def edge_of_chaos_init_(
    model: nn.Module,
    activation: str | Activation | None = None,
    sigma_b: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    example_input: Any = None,
) -> EdgeOfChaos:
    """Draws every linear and convolution weight from N(0, sigma_w^2 / fan_in) and every bias from N(0, sigma_b^2).

    fan_in is what meets in one unit: inputs, times kernel for convolutions, over groups, and over the strides of a
    transposed one. Norms, embeddings and parameters that no such module holds stay as they are.

    Args:
        model: changed in place; Linear, Conv, ConvTranspose and Hugging Face Conv1D modules are drawn.
        activation: as in :func:`edge_of_chaos`; None: that of the model, read from its graph.
        sigma_b: the scale of the biases; 0 for ReLU.
        generator: None: torch's default one, as in ``torch.nn.init``. The draws follow the order of the modules.
        example_input: needed where ``activation`` is None.

    Returns:
        The point on the edge of chaos.

    Raises:
        ValueError: no activation given and none or several in the model, no point on the edge of chaos, no weights to
            draw, or a weight that is not a parameter. The model is unchanged.

    Determinism: the same generator state gives the same weights on one kind of device; they are drawn where the
    generator is.
    """
    require_module(model, "edge_of_chaos_init_")
    if activation is None:
        activation = _activation_of(model, example_input)
    point = edge_of_chaos(activation, sigma_b)
    layers = list(_layers(model))
    if not layers:
        raise ValueError("edge_of_chaos_init_: model: wanted linear or convolution modules, got none")
    drawn: set[int] = set()
    for module, fan_in in layers:
        for tensor, deviation in ((module.weight, point.sigma_w / math.sqrt(fan_in)), (module.bias, sigma_b)):
            if tensor is None or id(tensor) in drawn:
                continue
            drawn.add(id(tensor))  # tied: drawn once
            device = tensor.device if generator is None else generator.device
            normal = torch.randn(tensor.shape, generator=generator, device=device, dtype=torch.float32)
            tensor.copy_(normal.mul_(deviation))
    return point


def _layers(model: nn.Module) -> list[tuple[Any, float]]:
    """The modules to draw, each with its fan-in."""
    hugging_face = sys.modules.get("transformers.pytorch_utils")  # imported, if the model has one of its layers
    found: list[tuple[Any, float]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            meeting = math.prod(module.kernel_size) * module.in_channels / module.groups
            fan_in = meeting / (math.prod(module.stride) if module.transposed else 1)
        elif isinstance(module, nn.Linear):
            fan_in = module.in_features
        elif hugging_face and isinstance(module, hugging_face.Conv1D):
            fan_in = module.weight.shape[0]
        else:
            continue
        if not isinstance(module._parameters.get("weight"), nn.Parameter) or module.weight.is_meta:
            raise ValueError(
                f"edge_of_chaos_init_: model: wanted a parameter with values as the weight of '{name}', got one that "
                "is computed, or on the meta device"
            )
        if fan_in > 0:
            found.append((module, fan_in))
    return found


def _activation_of(model: nn.Module, example_input: Any) -> str:
    if example_input is None:
        raise ValueError("edge_of_chaos_init_: wanted activation, or example_input to find it with, got neither")
    network = PathNetwork.from_module(model, example_input)
    gates = [node for k in network.alive if isinstance(node := network.nodes[k], Gate) and node.bends]
    names = sorted({node.name for node in gates})
    if len(names) != 1 or names[0] not in _ACTIVATIONS:
        raise ValueError(
            f"edge_of_chaos_init_: activation: wanted it given for a model whose activations are {names or 'none'}: "
            f"only a single one of {sorted(_ACTIVATIONS)} is found by itself"
        )
    return names[0]


# ----------------------------------------------------------------------------------------------------- integrals


def _activation(who: str, activation: str | Activation) -> Activation:
    if isinstance(activation, str):
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"{who}: activation: wanted one of {sorted(_ACTIVATIONS)} or a function, got '{activation}'"
            )
        return _ACTIVATIONS[activation]
    if not callable(activation):
        raise TypeError(f"{who}: activation: wanted a name or a function, got {type(activation).__name__}")
    return activation


@functools.cache
def _gaussian_nodes() -> tuple[Tensor, Tensor]:
    """Nodes and weights [m], float64, of the standard normal distribution.

    Gauss-Legendre on many short panels rather than Gauss-Hermite: panels end at 0, where ReLU-like activations have
    their kink, and they get shorter towards it, so steep activations (large q) are resolved as well. For smooth ones
    both agree to rounding.
    """
    points, weights = np.polynomial.legendre.leggauss(16)
    half = np.concatenate([[0.0], np.geomspace(1e-4, _WIDEST, 80)])
    edges = np.concatenate([-half[:0:-1], half])
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    z = (middle[:, None] + width[:, None] * points).ravel()
    mass = (width[:, None] * weights).ravel() * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return torch.from_numpy(z), torch.from_numpy(mass)


def _moments(phi: Activation, q: float) -> tuple[float, float]:
    """``E[phi(sqrt(q) Z)^2]`` and ``E[phi'(sqrt(q) Z)^2]``."""
    z, mass = _gaussian_nodes()
    with torch.enable_grad():
        x = (math.sqrt(max(q, _TINY)) * z).requires_grad_()
        value = phi(x)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"edge_of_chaos: activation: wanted an elementwise function, got {got} from {tuple(x.shape)}"
            )
        (slope,) = torch.autograd.grad(value.sum(), x)
    return float(mass @ value.detach().square()), float(mass @ slope.square())


def _is_homogeneous(phi: Activation) -> bool:
    """Whether ``phi(a x) = a phi(x)`` for a > 0: ReLU, leaky ReLU, the identity."""
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64)
    return all(torch.allclose(phi(a * x), a * phi(x), rtol=1e-12, atol=0) for a in (1e-3, 7.0, 1e3))


def _variance(phi: Activation, point: EdgeOfChaos, q: float) -> float:
    """The variance one layer on."""
    return point.sigma_b**2 + point.sigma_w**2 * _moments(phi, q)[0]


def _excess(phi: Activation, q: float, sigma_b: float) -> float:
    """By how much the variance grows at q, where sigma_w is such that chi = 1."""
    value, slope = _moments(phi, q)
    return math.inf if slope == 0 else sigma_b**2 + value / slope - q


def _bisected(phi: Activation, low: float, high: float, sigma_b: float) -> float:
    """The root of ``_excess`` between two points of opposite signs."""
    rises = _excess(phi, low, sigma_b) < 0
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if (_excess(phi, middle, sigma_b) < 0) == rises:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _is_stable(phi: Activation, point: EdgeOfChaos) -> bool:
    """Whether variances near q move towards it."""
    step = 1e-3 * point.q
    return abs(_variance(phi, point, point.q + step) - _variance(phi, point, point.q - step)) < 2 * step


def _fixed_point_at_zero(phi: Activation) -> EdgeOfChaos | None:
    """The edge of chaos at q = 0: without biases, an odd-like activation whose variance shrinks ever more slowly."""
    zero = torch.zeros((), dtype=torch.float64)
    slope = _moments(phi, 0.0)[1]
    if float(phi(zero)) != 0 or slope == 0:
        return None
    point = EdgeOfChaos(1 / math.sqrt(slope), 0.0, 0.0)
    return point if all(_variance(phi, point, q) < q for q in (1e-4, 1e-2)) else None
