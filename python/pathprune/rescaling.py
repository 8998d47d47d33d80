"""The rescaling trick of Robust Pruning at Initialization (Hayou, Ton, Doucet, Teh, ICLR 2021), for any masks.

Pruning takes a network off the edge of chaos: of ``fan_in E[W^2] = sigma_w^2`` only ``alpha = sum_j W_ij^2 m_ij`` is
left, so signals and gradients shrink layer by layer. Multiplying what is left by ``rho = sigma_w / sqrt(alpha)``, once,
before training, brings it back.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._mask_io import MaskMismatchError
from .masks import Masks
from .network import PathNetwork
from .nodes import Norm, Scale, Shift, Synapse, Wire
from .surroundings import undisturbed

GAIN = "weight_gain"  # the buffer that a fixed multiplier lives in, beside the weight


@dataclass
class Rescaling:
    """What :func:`rescale_` did; ``remove()`` undoes it, also at the end of a ``with``.

    Attributes:
        factors: weight name -> rho, float64 [units] on the CPU; 1 where nothing could be done.
        skipped: weight name -> indices of the units that keep no weight (or only zeros), where there are any.
        cancelled: names of weights that a norm follows directly: it divides by whatever factor they have been given.
    """

    factors: dict[str, Tensor]
    skipped: dict[str, tuple[int, ...]]
    cancelled: tuple[str, ...]
    _folded: dict[nn.Parameter, Tensor] = field(default_factory=dict, repr=False)
    _gained: list[tuple[nn.Module, Any]] = field(default_factory=list, repr=False)

    @torch.no_grad()
    def remove(self) -> None:
        """Takes the factors out again; may be called again.

        Fixed multipliers go without a trace. Folded ones are divided out of the weights as they are now, trained or
        not, which gives untrained ones back to rounding.
        """
        for weight, factor in self._folded.items():
            weight.copy_(weight.double() / factor.to(weight.device))
        for module, hook in self._gained:
            hook.remove()
            delattr(module, GAIN)
        self._folded.clear()
        self._gained.clear()

    def __enter__(self) -> Rescaling:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@undisturbed
def rescale_(
    model: nn.Module,
    masks: Masks,
    target_gain: float = math.sqrt(2),
    granularity: str = "row",
    fold: bool = True,
    *,
    example_input: Any,
) -> Rescaling:
    """Brings a pruned model back to the edge of chaos by one constant factor per unit, or per layer.

    Of the weights that ``masks`` keep, every live unit i has ``sum_j W_ij^2 m_ij = target_gain^2`` afterwards
    (``row``), or the units of a layer have that in the mean (``layer``). A unit's row is what meets in it: for a
    convolution input channels (of its group) x kernel; for a transposed one the same over the product of its strides,
    which is what meets at a position in the mean. Removed weights are scaled along but not removed: apply the masks
    before or after. Biases are kept.

    The paper writes the factor per unit; its numerator is recalled as 1 for tanh-like nets, and restoring ReLU's edge
    of chaos takes sqrt(2), the default. ``edge_of_chaos(...).sigma_w`` has it for others.

    Args:
        model: changed in place. Layers that ``masks`` do not cover stay as they are.
        masks: of any pruner.
        target_gain: sigma_w, positive.
        granularity: ``row`` or ``layer``.
        fold: True: the weights are multiplied: the function is that of the paper, the effective learning rate is not.
            False: as in the paper the factor stands beside the weight, fixed, and training sees the weight as it was.
            It is a buffer ``weight_gain`` of the weight's module, applied to what the module returns, so names, masks
            and ``masks.maintain`` are as before (a parametrization would rename the weight), ``state_dict`` has it,
            and a copy of the model keeps it. The weight's modules must be linear or convolution modules.
        example_input: what the model accepts; its graph says what a row is and where norms follow.

    Returns:
        :class:`Rescaling`, with ``remove()``. Layers followed directly by a norm are scaled as well, and a warning
        names them: in training, batch norm divides the factor out again.

    Raises:
        MaskMismatchError: the masks are of another model.
        ValueError: bad arguments, a weight read in two ways whose units differ, or with ``fold=False`` a weight whose
            module cannot carry a factor, or carries one. The model is unchanged.
        UnsupportedModelError: the model cannot be read.

    Determinism: exact; computed in float64, rounded once to the weight's dtype.

    Example:
        >>> masks = pathprune.prune(model, pathprune.Magnitude(), density=0.1, example_input=x)
        >>> masks.apply_(model)
        >>> pathprune.rescale_(model, masks, example_input=x)
    """
    if not (math.isfinite(target_gain) and target_gain > 0):
        raise ValueError(f"rescale_: target_gain: wanted a finite number > 0, got {target_gain}")
    if granularity not in ("row", "layer"):
        raise ValueError(f"rescale_: granularity: wanted 'row' or 'layer', got {granularity!r}")
    if not isinstance(masks, Masks):
        raise TypeError(f"rescale_: masks: wanted Masks, got {type(masks).__name__}")
    masks.check(model, base="ignore")
    network = PathNetwork.from_module(model, example_input)
    uses = _uses(network, masks)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = Rescaling({}, {}, tuple(name for name in uses if _norm_follows(network, name)))
    multipliers: dict[str, Tensor] = {}  # shaped to broadcast to the weight
    holders = {name: _holders(model, name, parameters[name], fold) for name in uses}
    for name, nodes in uses.items():
        kept = parameters[name].detach().double() * masks.get(name, device=parameters[name].device)
        alpha = _row_sums(kept.square(), nodes[0])  # [units]
        if not bool(torch.isfinite(alpha).all()):
            raise ValueError(f"rescale_: model: wanted finite weights, got NaN or infinite ones in '{name}'")
        dead = alpha == 0
        if granularity == "layer":
            alpha = alpha.mean().expand_as(alpha)
        factor = torch.where(alpha > 0, target_gain / alpha.sqrt(), 1.0)
        if bool(dead.any()):
            found.skipped[name] = tuple(dead.nonzero().flatten().tolist())
        found.factors[name] = factor.cpu()
        multipliers[name] = _by_row(factor, nodes[0], kept)
    with torch.no_grad():
        for name, multiplier in multipliers.items():
            if fold:
                parameters[name].copy_(parameters[name].double() * multiplier)
                found._folded[parameters[name]] = multiplier
            for module in holders[name]:
                weight = parameters[name]
                module.register_buffer(GAIN, found.factors[name].to(weight.device, weight.dtype))
                found._gained.append((module, module.register_forward_hook(_times_gain)))
    if found.cancelled:
        warnings.warn(
            f"rescale_: a norm directly follows {', '.join(found.cancelled)}: in training it divides the factor out",
            stacklevel=3,
        )
    return found


def _uses(network: PathNetwork, masks: Masks) -> dict[str, list[Synapse]]:
    """The synapses of every masked weight, whose units they all see alike."""
    uses: dict[str, list[Synapse]] = {name: [] for name in masks}
    for k in network.synapses():
        node = network.nodes[k]
        assert isinstance(node, Synapse)
        if node.weight in uses:
            uses[node.weight].append(node)
    for name, nodes in uses.items():
        if not nodes or name not in network.prunable:
            raise MaskMismatchError(
                f"rescale_: masks: wanted weights that linear maps or convolutions alone use, got '{name}'"
            )
        if len({(node.form, node.groups, node.stride) for node in nodes}) > 1:
            raise ValueError(f"rescale_: masks: wanted weights whose uses have the same units, got tied '{name}'")
    return uses


def _norm_follows(network: PathNetwork, name: str) -> bool:
    """Whether what a weight's synapse gives reaches a norm before anything but wires, biases and constant factors."""
    reached = {k for k in network.synapses() if getattr(network.nodes[k], "weight", None) == name}
    for k, node in enumerate(network.nodes):
        if k not in network.alive or not reached.intersection(node.inputs):
            continue
        if (isinstance(node, Norm) and not node.among) or (isinstance(node, Scale) and node.kind == "batch_norm"):
            return True
        if isinstance(node, (Scale, Shift, Wire)) and len(node.inputs) == 1:
            reached.add(k)
    return False


# Units are the rows of [out, in], [out, in, *kernel]; the columns of [in, out]; and of a transposed convolution's
# [groups * in, out, *kernel] the columns of each group.


def _row_sums(squares: Tensor, node: Synapse) -> Tensor:
    """Sums [units] over what meets in each unit."""
    if node.form == "linear_t":
        return squares.sum(0)
    if node.form == "conv_transpose":
        by_group = squares.reshape(node.groups, -1, *squares.shape[1:])  # [groups, in, out, *kernel]
        return by_group.transpose(1, 2).flatten(2).sum(-1).flatten() / math.prod(node.stride)
    return squares.flatten(1).sum(-1)


def _by_row(factor: Tensor, node: Synapse, weight: Tensor) -> Tensor:
    """The factors [units], shaped to broadcast to the weight."""
    if node.form == "linear_t":
        return factor
    kernel = (1,) * (weight.dim() - 2)
    if node.form == "conv_transpose":
        per_group = factor.reshape(node.groups, -1)
        return per_group.repeat_interleave(weight.shape[0] // node.groups, 0).reshape(*weight.shape[:2], *kernel)
    return factor.reshape(-1, 1, *kernel)


def _holders(model: nn.Module, name: str, weight: Tensor, fold: bool) -> list[nn.Module]:
    """The modules that a fixed multiplier of this weight belongs to; none for one that is folded."""
    hugging_face = sys.modules.get("transformers.pytorch_utils")  # imported, if the model has one of its layers
    kinds = (nn.Linear, nn.modules.conv._ConvNd, *([hugging_face.Conv1D] if hugging_face else []))
    holders = []
    for module in model.modules():
        names: Mapping[str, Tensor | None] = module._parameters
        if not any(parameter is weight for parameter in names.values()):
            continue
        if GAIN in module._buffers:
            raise ValueError(f"rescale_: model: '{name}' has a fixed multiplier already; remove() it first")
        if not fold and (not isinstance(module, kinds) or names.get("weight") is not weight):
            raise ValueError(
                f"rescale_: fold: wanted True for '{name}', held by a {type(module).__name__}, got False: only linear "
                "and convolution modules carry a fixed multiplier"
            )
        holders.append(module)
    return [] if fold else holders


def _times_gain(module: Any, args: Any, output: Tensor) -> Tensor:
    """``rho (W x) + b`` from the ``W x + b`` that a module returned."""
    gain, bias = module.weight_gain, module.bias
    after = (1,) * (module.weight.dim() - 2)  # axes behind the channels
    scaled = output * gain.reshape(-1, *after)
    return scaled if bias is None else scaled + (bias * (1 - gain)).reshape(-1, *after)
