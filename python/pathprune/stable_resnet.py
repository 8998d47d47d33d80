"""Stable ResNet (Hayou et al. 2021; used for Robust Pruning at Initialization, ICLR 2021): residual branches scaled by
``1 / sqrt(L)``.

``y^l = y^(l-1) + F(y^(l-1)) / sqrt(L)`` with L residual blocks. Without the factor the gradients of a ReLU ResNet on
the edge of chaos grow like ``(1 + sigma_w^2 / 2)^L``; with it they stay bounded by ``exp(sigma_w^2 / 2)``.
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .liveness import forks
from .network import PathNetwork
from .nodes import Gate, Pool, Reduce, Scale, Synapse, Wire
from .surroundings import undisturbed

# Maps with f(a x) = a f(x): a factor before one of them is a factor after it.
_HOMOGENEOUS = (Scale, Wire, Pool, Reduce)


class StableResNet:
    """The factor on the residual branches of a model; ``remove()`` takes it off, also at the end of a ``with``.

    Attributes:
        factor: 1 / sqrt(L).
        branches: for each of the L residual blocks, the name of the module whose output is multiplied.
    """

    def __init__(self, model: nn.Module, factor: float, branches: tuple[str, ...]) -> None:
        self.factor, self.branches = factor, branches
        times = _Times(factor)
        modules = [model.get_submodule(name) for name in dict.fromkeys(branches)]
        self._handles: list[RemovableHandle] = [module.register_forward_hook(times) for module in modules]

    def remove(self) -> None:
        """Takes the factor off: the model computes what it did before, bit for bit. May be called again."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> StableResNet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Times:
    """A forward hook that multiplies; a class, so that models which carry it can be copied and pickled."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"stable_resnet: wanted a tensor from the {type(module).__name__} at the end of a branch, got "
                f"{type(output).__name__}"
            )
        return output * self.factor


@undisturbed
def stable_resnet(model: nn.Module, example_input: Any) -> StableResNet:
    """Multiplies what each residual branch returns by 1 / sqrt(L), L the number of residual blocks.

    Blocks are found in the graph, not by name: a sum of flows that began at a common fork, one side of which (the skip:
    the identity, a projection, a pooling) has no activation and fewer weight layers than the others. The factor is a
    forward hook on the module that ends the branch, behind its last batch norm: parameters, state_dict and code are as
    before, and pruners, which read the graph, score the stable network. Keep it on for training.
    A copy of the model keeps the factor; a saved state_dict does not carry it.

    Args:
        model: hooks are put on it, nothing else is changed.
        example_input: what the model accepts.

    Returns:
        :class:`StableResNet`, with ``remove()``.

    Raises:
        ValueError: no residual block; a model that has the factor already; or a branch that ends in no module of its
            own (its last operator is a function called by the block), or in one that is also called elsewhere. The
            model is unchanged.
        UnsupportedModelError: the model cannot be read.

    Determinism: exact.

    Example:
        >>> with pathprune.stable_resnet(model, x):  # SBP-SR
        ...     masks = pathprune.prune(model, pathprune.SNIP(data, loss), density=0.02, example_input=x)
    """
    if any(isinstance(hook, _Times) for module in model.modules() for hook in module._forward_hooks.values()):
        raise ValueError("stable_resnet: model: wanted one without the factor, got one that has it; remove() it first")
    network = PathNetwork.from_module(model, example_input)
    branches = [
        _end_of_branch(network, network.nodes[k].inputs[position], k)
        for k, sides in forks(network)
        for position in _residual(network, k, sides)
    ]
    blocks = len(branches)
    if not blocks:
        raise ValueError("stable_resnet: model: wanted residual blocks (a sum with a skip), got none")
    stable = StableResNet(model, 1 / math.sqrt(blocks), tuple(branches))
    try:
        added = len(_factors(PathNetwork.from_module(model, example_input))) - len(_factors(network))
    except BaseException:
        stable.remove()
        raise
    if added != blocks:
        stable.remove()
        raise ValueError(
            f"stable_resnet: model: wanted modules that end a branch and are called for nothing else, got {added} "
            f"calls for {blocks} residual blocks of {sorted(set(branches))}"
        )
    return stable


def _factors(network: PathNetwork) -> list[int]:
    return [k for k, node in enumerate(network.nodes) if isinstance(node, Scale) and node.kind == "constant"]


def _residual(network: PathNetwork, k: int, sides: dict[int, int]) -> list[int]:
    """The summands of sum ``k`` that are residual branches; none if it has no skip."""
    if len(sides) < 2:
        return []

    def count(side: int, kind: type) -> int:
        return sum(side >> i & 1 and isinstance(node, kind) for i, node in enumerate(network.nodes))

    bends = sum(1 << i for i, node in enumerate(network.nodes) if isinstance(node, Gate) and node.bends)
    size = {position: (count(side & bends, Gate), count(side, Synapse)) for position, side in sides.items()}
    skip = min(size, key=lambda position: size[position])
    branches = [position for position in size if position != skip]
    has_skip = size[skip][0] == 0 and all(size[position][1] > size[skip][1] for position in branches)
    return branches if has_skip else []


def _end_of_branch(network: PathNetwork, index: int, k: int) -> str:
    """The module that returns the summand at ``index``, or something it is a fixed linear map of."""
    block = network.nodes[k].where
    while True:
        node = network.nodes[index]
        module, inside = _module_of(node.where), _module_of(block)
        if module and not f"{inside}.".startswith(f"{module}."):  # a module beside the sum, not one around it
            return module
        if not isinstance(node, _HOMOGENEOUS) or len(node.inputs) != 1:
            raise ValueError(
                f"stable_resnet: model: wanted residual branches that end in a module, got {node.where} as the last "
                f"operator of the branch that {block} adds; make it a module of its own"
            )
        index = node.inputs[0]


def _module_of(where: str) -> str:
    """The module's name in ``'layer1.0.bn2' (BatchNorm2d) (batch_norm)``; '' for the model itself."""
    found = re.match(r"'([^']*)'", where)
    return re.sub(r"@\d+", "", found.group(1)) if found else ""
