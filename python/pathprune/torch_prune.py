"""To and from ``torch.nn.utils.prune``, which keeps masks as buffers and weights under another name."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.utils import prune

from ._mask_io import Layers, pack_bits


def layers_of(model: nn.Module) -> Layers:
    """The packed mask of every tensor that is pruned there, by the names the dense model has.

    A parameter tied between modules that are pruned alike is there once.

    Raises:
        ValueError: nothing in the model is pruned that way.
    """
    layers: Layers = {}
    seen: dict[tuple[int, bytes], str] = {}
    for prefix, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if not isinstance(hook, prune.BasePruningMethod):
                continue
            attribute = hook._tensor_name
            mask = getattr(module, f"{attribute}_mask")
            packed = pack_bits(mask)
            origin = id(getattr(module, f"{attribute}_orig"))
            name = f"{prefix}.{attribute}" if prefix else attribute
            if seen.setdefault((origin, packed.numpy().tobytes()), name) == name:
                layers[name] = (packed, mask.shape)
    if not layers:
        raise ValueError("Masks.from_torch_prune: no tensor of the model is under torch.nn.utils.prune")
    return layers


def hand_over(model: nn.Module, masks: Iterable[tuple[nn.Parameter, Tensor]]) -> nn.Module:
    """Prunes every module that holds one of the parameters by its bool mask. Returns the model."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, weight in module._parameters.items():
            holders.setdefault(id(weight), []).append((module, attribute))
    for weight, mask in masks:
        for module, attribute in holders[id(weight)]:
            prune.custom_from_mask(module, attribute, mask)
    return model
