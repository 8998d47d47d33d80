"""Masks of biases: a unit that keeps a weight keeps its bias.

PHEW marks the bias of each output unit that a walk visits (Patil & Dovrolis, ICML 2021). A walk that visits a unit
takes one of its weights, and every weight that PHEW keeps was taken by a walk: the visited units are those that keep
one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from .belonging import base_hash
from .masks import Masks


def with_biases(masks: Masks, model: nn.Module) -> Masks:
    """The masks, and one for each bias beside a masked weight: True where the unit keeps at least one weight.

    A module's ``bias`` goes with its ``weight`` (``in_proj_bias`` with ``in_proj_weight``). A shared bias stays where
    any of its units keeps a weight. Batch norms have no masked weight and stay whole, and so do the biases of excluded
    layers. Weights that are kept but lie on no path count as kept: PHEW keeps none such; for other methods
    ``path_counts(model, masks, x).effective.with_biases(model)`` leaves them out.

    Args:
        masks: of the model's weights; masks of biases that they have already are replaced.
        model: is not changed.

    Returns:
        New masks. ``apply_``, ``maintain``, ``save`` and ``load`` treat those of biases as all others; ``kept``,
        ``total`` and ``density`` count them; the report counts weights alone, and names the biases apart.

    Raises:
        MaskMismatchError: the masks are of another model.

    Example:
        masks = pp.prune(model, pp.PHEW(), density=0.05, example_input=x).with_biases(model)
    """
    masks.check(model, base="ignore")
    first: dict[nn.Parameter, str] = {}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(parameter, name)
        names.setdefault(parameter, []).append(name)
    found: dict[str, Tensor] = {}
    for module in model.modules():
        for attribute, weight in module._parameters.items():
            bias = module._parameters.get(f"{attribute.removesuffix('weight')}bias")
            if weight is None or bias is None or not attribute.endswith("weight"):
                continue
            kept = next((masks[name] for name in names[weight] if name in masks), None)
            if kept is None or kept.dim() < 2:
                continue
            visited = _units_kept(module, kept)
            if visited.shape == bias.shape:
                name = first[bias]
                found[name] = visited | found[name] if name in found else visited
    packed: dict[str, Any] = {name: masks.packed(name) for name in masks}
    extra = Masks(found)
    packed |= {name: extra.packed(name) for name in extra}
    metadata = dict(masks.metadata)
    recorded = metadata.pop("base_hash", None)
    if recorded is not None and recorded == base_hash(model, masks):
        metadata["base_hash"] = base_hash(model, packed)
    return Masks.from_packed(packed, metadata)


def _units_kept(module: nn.Module, kept: Tensor) -> Tensor:
    """[output units] bool: those with a weight that is kept."""
    if isinstance(module, _ConvTransposeNd):
        return kept.reshape(module.groups, -1, kept.shape[1], kept[0, 0].numel()).any(3).any(1).flatten()
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # Hugging Face's: [in, out]
        return kept.any(0)
    return kept.reshape(len(kept), -1).any(1) if kept.numel() else torch.zeros(len(kept), dtype=torch.bool)
