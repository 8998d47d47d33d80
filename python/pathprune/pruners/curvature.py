"""Products of the Hessian of the mean loss with vectors: by a second backward pass, or by two gradients.

The Hessian is that of the weights that are left: vectors are 0 where the mask is. On networks of ReLUs the second
backward pass gives the Hessian within the present piece, as published codes do. Differences see the kinks as well: the
smaller the step the fewer it crosses, but the more each counts, so they do not converge to the former.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .objective import Accumulator, Objective, Point, masked


def differentiable_twice() -> AbstractContextManager[None]:
    """Where a model is run whose gradient is differentiated: fused attention has no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def gradient_graph(loss: Tensor, leaves: Mapping[str, Tensor]) -> Point:
    """The gradient with its graph; leaves along which it is constant or zero are left out."""
    slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
    pairs = zip(leaves, slopes, strict=True)
    return {name: slope for name, slope in pairs if slope is not None and slope.requires_grad}


def backward_along(slopes: Point, vector: Point, inputs: list[Tensor], retain_graph: bool = False) -> None:
    """Sends the vector back through the gradient: Hessian times vector arrives at the inputs."""
    if slopes:
        along = [vector[name].to(slope.dtype) for name, slope in slopes.items()]
        torch.autograd.backward(list(slopes.values()), along, retain_graph=retain_graph, inputs=inputs)


def hessian_product(objective: Objective, point: Point, vector: Point) -> Point:
    """H v of the mean loss at ``point``, exactly; each batch keeps the graph of its gradient."""
    leaves, ranks = objective.leaves(point), objective.network.replicas
    with objective.undisturbed(), differentiable_twice(), Accumulator(leaves, ranks=ranks) as total:
        for position, batch in objective.batches():
            total.begin(batch.size)
            backward_along(
                gradient_graph(objective.loss(point, batch, position), leaves),
                vector,
                total.inputs,
            )
    return total.mean()


def hessian_product_by_differences(objective: Objective, point: Point, vector: Point, step: float | None) -> Point:
    """H v from the gradients at ``w + e v`` and ``w - e v``; no second backward pass, and its rounding.

    Args:
        step: ``e |v| / |w|``; None: the cube root of the type's precision, where the errors of truncation (e^2) and
            rounding (1/e) are of a size.
    """
    leaves = {name: leaf.detach() for name, leaf in objective.leaves(point).items()}
    length = _norm(vector)
    if length == 0:
        return {name: torch.zeros_like(part) for name, part in vector.items()}
    if step is None:
        step = max(torch.finfo(leaf.dtype).eps for leaf in leaves.values()) ** (1 / 3)
    distance = step * _norm(leaves) / length
    if distance == 0:
        distance = step / length

    def gradient(way: float) -> Point:
        moved = {name: leaf.add(vector[name].to(leaf.dtype), alpha=way) for name, leaf in leaves.items()}
        return objective.gradient({**point, **{name: leaf.requires_grad_() for name, leaf in moved.items()}})

    product = gradient(distance)
    for name, slope in gradient(-distance).items():
        product[name].sub_(slope).div_(2 * distance)
    return product


def _norm(vector: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in vector.values()))


def hessian_diagonal(objective: Objective, point: Point, probes: int, generator: torch.Generator) -> Point:
    """The mean of ``z * (H z)`` over Rademacher vectors z, ``probes`` of them for each batch: the diagonal of H."""
    leaves = objective.leaves(point)
    signs: Point = {}
    with (
        objective.undisturbed(),
        differentiable_twice(),
        Accumulator(leaves, lambda name, product: product.mul_(signs[name]), objective.network.replicas) as total,
    ):
        for position, batch in objective.batches():
            total.begin(batch.size, passes=probes)
            slopes = gradient_graph(objective.loss(point, batch, position), leaves)
            for left in reversed(range(probes)):
                for name, leaf in leaves.items():
                    drawn = torch.randint(0, 2, leaf.shape, generator=generator, dtype=torch.int8)
                    signs[name] = masked(drawn.to(leaf).mul_(2).sub_(1), objective.weights[name])
                backward_along(slopes, signs, total.inputs, retain_graph=left > 0)
            del slopes  # its graph would live through the next forward pass
    return total.mean()
