"""The second oracle: the positive twin of a model, a module whose float64 autograd gives R and all scores.

Every weight is replaced by ``|w|^p``, activations by the identity, frozen norms by their affine map, and every
fixed linear map by its matrix, found column by column from the map itself and raised to the power p entry by
entry. Nothing here knows of exported graphs, path nodes or exponents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
SYNAPSES = (nn.Linear, nn.modules.conv._ConvNd, Conv1D)
MAX_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
FIXED = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.Upsample)
IDENTITIES = (
    *(
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.PReLU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.ELU,
        nn.CELU,
        nn.SELU,
        nn.Softplus,
    ),
    *(nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
    *(nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Threshold, nn.Hardshrink, nn.Softshrink),
    *(nn.LogSigmoid, nn.RReLU),
)


class Gate(nn.Module):
    """A function that is the identity on path flow, such as an activation called by name."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Map(nn.Module):
    """A fixed linear map of one or several tensors."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(*xs)


class Times(nn.Module):
    """``function(x, constant)`` multiplies or divides by a constant: a number, a buffer or a parameter."""

    def __init__(self, constant: Tensor | float, function: Callable[..., Tensor] = torch.mul) -> None:
        super().__init__()
        self.function, self.constant = function, constant
        if isinstance(constant, Tensor) and not isinstance(constant, nn.Parameter):
            del self.constant
            self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.constant)

    def _like(self) -> Tensor:
        return torch.as_tensor(self.constant).double()

    def factor(self) -> Tensor:
        return self.function(torch.ones_like(self._like()), self.constant).detach()


class Plus(Times):
    """``function(x, constant)`` adds or subtracts a constant."""

    def __init__(self, constant: Tensor | float, function: Callable[..., Tensor] = torch.add) -> None:
        super().__init__(constant, function)

    def factor(self) -> Tensor:
        return self.function(torch.zeros_like(self._like()), self.constant).detach()


class Gated(nn.Module):
    """The product of two flows."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class _Halves(nn.Module):
    """A product whose gradient goes half to each factor, the other held fixed."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b.detach() + a.detach() * b) / 2


class _Affine(nn.Module):
    """``x * factor + shift``, laid along the channel axis or, ``elementwise``, as torch broadcasts."""

    def __init__(self, factor: Tensor | None, shift: Tensor | None, elementwise: bool = False) -> None:
        super().__init__()
        self.factor, self.shift, self.elementwise = factor, shift, elementwise

    def forward(self, x: Tensor) -> Tensor:
        def laid(value: Tensor) -> Tensor:
            return value if self.elementwise else value.reshape(-1, *[1] * (x.dim() - 2))

        x = x if self.factor is None else x * laid(self.factor)
        return x if self.shift is None else x + laid(self.shift)


class _DividedByRms(nn.Module):
    """Groups of values divided by their root mean square, held fixed."""

    def __init__(self, grouped: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.grouped = grouped  # x -> [number of groups, values of one group]

    def forward(self, x: Tensor) -> Tensor:
        groups = self.grouped(x)
        return (groups / groups.detach().square().mean(1, keepdim=True).sqrt()).reshape(x.shape)


class _Matrix(nn.Module):
    """A fixed linear map as the matrices of what it does to unit vectors, each entry ``|entry|^p``."""

    def __init__(self, function: Callable[..., Tensor], power: float) -> None:
        super().__init__()
        self.function, self.power = function, power

    def forward(self, *xs: Tensor) -> Tensor:
        total, shape = 0.0, None
        for which, x in enumerate(xs):
            columns = []
            for unit in torch.eye(x.numel(), dtype=torch.float64):
                arguments = [unit.reshape(x.shape) if k == which else torch.zeros_like(y) for k, y in enumerate(xs)]
                out = self.function(*arguments)
                shape = out.shape
                columns.append(out.flatten())
            matrix = torch.stack(columns, 1)
            matrix = torch.where(matrix == 0, 0.0, matrix.abs() ** self.power)
            total = total + matrix @ x.flatten()
        return total.reshape(shape)


def positive(model: nn.Module, power: float, policy: str, **overrides: str) -> nn.Module:
    """The positive twin of ``model`` at ``power`` under ``policy``, in float64."""
    choices = {"biases": "flow" if policy == "published" else "drop", "batch_norm": "affine", "norm": "flow"}
    choices["max_pool"] = "winner" if policy == "published" else "sum"
    choices.update(overrides)
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return _swapped(twin, power, choices, {})


def _swapped(module: nn.Module, power: float, choices: dict[str, str], done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        new = _twin_of(module, power, choices)
        done[id(module)] = new
        if new is module:
            for name, child in module.named_children():
                setattr(module, name, _swapped(child, power, choices, done))
    return done[id(module)]


def _twin_of(module: nn.Module, power: float, choices: dict[str, str]) -> nn.Module:
    drops = choices["biases"] == "drop"

    def raised(value: Tensor | None, absent: bool = False) -> Tensor | None:
        return None if value is None or absent else value.detach().double().abs() ** power

    if isinstance(module, (*IDENTITIES, Gate)):
        return nn.Identity()
    if isinstance(module, MAX_POOLS):
        return module if choices["max_pool"] == "winner" else _Matrix(module, 0.0)
    if isinstance(module, (*FIXED, Map)):
        return _Matrix(module, power)
    if isinstance(module, Gated):
        return _Halves()
    if isinstance(module, Plus):
        return _Affine(None, raised(module.factor()) * (0.0 if drops else 1.0), elementwise=True)  # repeats
    if isinstance(module, Times):
        return _Affine(raised(module.factor()), None, elementwise=True)
    if isinstance(module, NORMS):
        return _norm(module, raised, drops, choices)
    if isinstance(module, SYNAPSES):
        if not getattr(module.weight, "raised", False):  # a tied weight is one weight
            module.weight.copy_(raised(module.weight))
            module.weight.raised = True
        if module.bias is not None:
            module.bias.copy_(torch.zeros_like(module.bias) if drops else raised(module.bias))
    return module


def _norm(module: nn.Module, raised: Callable, drops: bool, choices: dict[str, str]) -> nn.Module:
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    if getattr(module, "running_mean", None) is not None:
        if choices["batch_norm"] == "identity":
            return nn.Identity()
        deviation = (module.running_var.double() + module.eps).sqrt()
        factor = (1.0 if weight is None else weight.double()) / deviation
        shift = (0.0 if bias is None else bias.double()) - module.running_mean.double() * factor
        return _Affine(raised(factor), raised(shift, drops))
    over_last = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    if over_last:
        size = math.prod(module.normalized_shape)
        divided = _DividedByRms(lambda x: x.reshape(-1, size))
    else:
        count = module.num_groups if isinstance(module, nn.GroupNorm) else module.num_features
        divided = _DividedByRms(lambda x: x.reshape(count, -1))
    affine = _Affine(raised(weight), raised(bias, drops), elementwise=over_last)
    return nn.Sequential(nn.Identity() if choices["norm"] == "unit" else divided, affine)


def positive_scores(
    model: nn.Module, sources: Sequence[Tensor], power: float, policy: str, **overrides: str
) -> tuple[float, dict[str, Tensor]]:
    """R and, by name, ``u dR/du`` with ``u = |w|^power``, for the weights of linear maps and convolutions."""
    twin = positive(model, power, policy, **overrides)
    outputs = twin(*(source.double() for source in sources))
    total = sum(y.sum() for y in ([outputs] if isinstance(outputs, Tensor) else outputs))
    holders = {f"{path}.weight".lstrip("."): m for path, m in twin.named_modules() if isinstance(m, SYNAPSES)}
    weights = {name: m.weight for name, m in holders.items()}
    first = {id(weight): name for name, weight in reversed(list(weights.items()))}
    weights = {name: weight for name, weight in weights.items() if first[id(weight)] == name}
    gradients = torch.autograd.grad(total, list(weights.values()))
    return total.item(), {name: (w * g).detach() for (name, w), g in zip(weights.items(), gradients, strict=True)}
