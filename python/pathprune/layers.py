"""The linear layers of a model side by side, for methods that look at each of them alone.

Magnitude needs no paths, and Wanda only what enters a layer: neither needs the model to be exported. Every weight of a
linear, convolution or Hugging Face ``Conv1D`` layer becomes a network of one synapse, and so does every parameter
[experts, out, in] (or [experts, in, out]) of a mixture of experts, as ``transformers`` declares them; weights that an
embedding uses too are left out, as they are from a path network.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import Tensor, nn

from .exporting import canonical_names
from .network import PathNetwork

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def layer_network(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> PathNetwork:
    """A network whose synapses are the model's prunable weights, with no paths between them.

    Args:
        model: any module; it need not be exportable.
        tensors: values by parameter name, in place of the model's; weights without one are left out.

    Returns:
        A :class:`PathNetwork` for ``prune`` with ``Magnitude()`` or ``Wanda``; its ``prunable`` are in the order of
        ``model.named_parameters()``.

    Raises:
        ValueError: no such layer, or weights without values.

    Example:
        >>> masks = pp.prune(pp.layer_network(model), pp.Magnitude(), density=0.5)
    """
    network = PathNetwork()
    network.model = model
    outputs = []
    for name, module in prunable_layers(model).items():
        weight = getattr(module, name.rpartition(".")[2]) if tensors is None else tensors.get(name)
        if weight is None:
            continue
        if not isinstance(weight, Tensor) or weight.is_meta:
            raise ValueError(f"layer_network: {name}: wanted values, got a weight on the meta device")
        outputs.append(_add_layer(network, module, name, weight.detach()))
    if not outputs:
        raise ValueError(f"layer_network: {type(model).__name__} has no linear or convolution weight to prune")
    return network.set_outputs(*outputs)


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Weight name -> the first layer or mixture of experts that uses it, in ``named_parameters``' order."""
    return {name: modules[0] for name, modules in modules_of(model).items()}


def modules_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Weight name -> the layers that use it, in the order of ``model.named_parameters()``."""
    canonical = canonical_names(model)
    kinds = (nn.Linear, nn.modules.conv._ConvNd, *_hugging_face_kinds())
    modules: dict[str, nn.Module] = {f"{path}.weight".lstrip("."): module for path, module in model.named_modules()}
    embedded = {canonical.get(name) for name, module in modules.items() if isinstance(module, EMBEDDINGS)}
    found: dict[str, list[nn.Module]] = {}
    for name, module in modules.items():
        if isinstance(module, kinds) and name in canonical and canonical[name] not in embedded:
            found.setdefault(canonical[name], []).append(module)
    for path, module in model.named_modules():
        if is_experts(module):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    found.setdefault(canonical[f"{path}.{own}".lstrip(".")], []).append(module)
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def is_experts(module: nn.Module) -> bool:
    """Whether the module's parameters of three axes are a matrix for each expert, applied to the tokens it is given.

    ``transformers`` marks such modules (``use_experts_implementation``) and says whether they are transposed.
    """
    marks = (getattr(module, name, None) for name in ("is_transposed", "has_gate", "has_bias"))
    return all(isinstance(mark, bool) for mark in marks) and hasattr(module, "config")


def is_transposed(module: nn.Module) -> bool:
    """Whether weights are [in, out], as in Hugging Face's ``Conv1D``, or [experts, in, out]."""
    return bool(module.is_transposed) if is_experts(module) else isinstance(module, _hugging_face_kinds())


def _hugging_face_kinds() -> tuple[type[nn.Module], ...]:
    loaded = sys.modules.get("transformers.pytorch_utils")  # imported, if the model has one of its layers
    return (loaded.Conv1D,) if loaded else ()


def _add_layer(network: PathNetwork, module: nn.Module, name: str, weight: Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        kernel = [1] * len(module.kernel_size) if module.transposed else list(module.kernel_size)
        form = "conv_transpose" if module.transposed else "conv"
        entering = network.add_input(1, module.in_channels, *kernel, name=name)
        return network.add_synapse(entering, weight, name, form=form, groups=module.groups)
    transposed = is_transposed(module)
    if is_experts(module):
        count, form = weight.shape[0], "experts_t" if transposed else "experts"
        entering = network.add_input(1, count, 1, weight.shape[1 if transposed else 2], name=name)
        return network.add_synapse(entering, weight, name, form=form, groups=count)
    entering = network.add_input(1, weight.shape[0 if transposed else 1], name=name)
    return network.add_synapse(entering, weight, name, form="linear_t" if transposed else "linear")
