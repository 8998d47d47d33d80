"""The linear layers of a model side by side, for methods that look at each of them alone.

Magnitude needs no paths, and Wanda only what enters a layer: neither needs the model to be exported. Every weight of a
linear, convolution or Hugging Face ``Conv1D`` layer becomes a network of one synapse, and so does every parameter
[experts, out, in] (or [experts, in, out]) of a mixture of experts, as ``transformers`` declares them or as the module's
own code multiplies by them; weights that an embedding uses too are left out, as they are from a path network.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .exporting import canonical_names
from .network import PathNetwork
from .structure import rebuilt, require_module, require_shapes

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
    require_module(model, "layer_network")
    require_shapes(dict(model.named_parameters()), "layer_network")
    network = PathNetwork()
    network.model, network.connected = model, False
    outputs = []
    for name, module in prunable_layers(model).items():
        weight = getattr(module, name.rpartition(".")[2]) if tensors is None else tensors.get(name)
        if weight is None:
            continue
        if not isinstance(weight, Tensor) or weight.is_meta:
            raise ValueError(f"layer_network: {name}: wanted values, got a weight on the meta device")
        outputs.append(_add_layer(network, module, name, weight.detach()))
    if not outputs:
        raise ValueError(
            f"layer_network: {type(model).__name__} has no linear or convolution weight to prune; "
            "with example_input, prune finds those that are used otherwise"
        )
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
        for own in () if isinstance(module, kinds) else expert_matrices(module):
            found.setdefault(canonical[f"{path}.{own}".lstrip(".")], []).append(module)
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def expert_matrices(module: nn.Module) -> dict[str, bool]:
    """The module's own parameters that are a matrix for each expert -> whether they are [experts, in, out].

    ``transformers`` marks modules of experts (``use_experts_implementation``) and says whether they are transposed. Of
    others it is read from their code: a parameter of three axes that rows are multiplied by, all experts at once
    (``torch.bmm``) or one after the other. What cannot be read is none.
    """
    own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
    if not own:
        return {}
    marks = [getattr(module, name, None) for name in ("is_transposed", "has_gate", "has_bias")]
    if all(isinstance(mark, bool) for mark in marks) and hasattr(module, "config"):
        return dict.fromkeys(own, bool(marks[0]))
    return _multiplied_by(module, own)


def is_transposed(module: nn.Module, name: str) -> bool:
    """Whether the weight is [in, out], as in Hugging Face's ``Conv1D``, or [experts, in, out]."""
    return expert_matrices(module).get(name.rpartition(".")[2], isinstance(module, _hugging_face_kinds()))


class _Reader(fx.Tracer):
    """Follows a module's own code without values, and without running the modules in it."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _multiplied_by(module: nn.Module, names: Collection[str]) -> dict[str, bool]:
    """Of parameters [experts, ., .], those that are the second factor of products, always the same way round."""
    try:
        # A copy of all but the tensors, and without hooks that hold them: what the code sets is not the model's.
        own = rebuilt(module, {})
        tensors: list[Tensor] = [*own.parameters(), *own.buffers()]
        with torch.random.fork_rng(devices=[]):
            graph = _Reader().trace(copy.deepcopy(own, {id(tensor): tensor for tensor in tensors}))
    except Exception:  # code that depends on values fails in many ways
        return {}
    found: dict[str, set[bool]] = {}
    for node in graph.nodes:
        is_linear = node.op == "call_function" and node.target is F.linear
        if is_linear or node.target in _PRODUCTS:
            matrix = _matrix(node.args[1] if len(node.args) > 1 else None, names)
            if matrix is not None:
                name, _, is_turned = matrix
                found.setdefault(name, set()).add(is_turned == is_linear)
    return {name: ways.pop() for name, ways in found.items() if len(ways) == 1}


_PRODUCTS = (torch.bmm, torch.matmul, operator.matmul, "bmm", "matmul")
_VIEWS = (operator.getitem, getattr, torch.transpose, "transpose", "t")


def _matrix(node: Any, names: Collection[str]) -> tuple[str, int, bool] | None:
    """What is a parameter, one expert's part of it, or either with its last two axes exchanged: name, axes, whether."""
    if not isinstance(node, fx.Node) or (node.op != "get_attr" and node.target not in _VIEWS):
        return None
    if node.op == "get_attr":
        return (str(node.target), 3, False) if node.target in names else None
    viewed, *how = node.args
    inner = _matrix(viewed, names)
    if inner is None:
        return None
    name, axes, is_turned = inner
    if node.target is operator.getitem:
        return (name, 2, is_turned) if axes == 3 and isinstance(how[0], int) else None
    last = [{axes - 2, axes - 1}, {-2, -1}]
    exchanged = (how == ["mT"] or (axes == 2 and how == ["T"])) if node.target is getattr else set(how) in last
    return (name, axes, not is_turned) if exchanged or node.target == "t" else None


def _hugging_face_kinds() -> tuple[type[nn.Module], ...]:
    loaded = sys.modules.get("transformers.pytorch_utils")  # imported, if the model has one of its layers
    return (loaded.Conv1D,) if loaded else ()


def _add_layer(network: PathNetwork, module: nn.Module, name: str, weight: Tensor) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        kernel = [1] * len(module.kernel_size) if module.transposed else list(module.kernel_size)
        form = "conv_transpose" if module.transposed else "conv"
        entering = network.add_input(1, module.in_channels, *kernel, name=name)
        return network.add_synapse(entering, weight, name, form=form, groups=module.groups)
    transposed = is_transposed(module, name)
    if weight.dim() == 3:
        count, form = weight.shape[0], "experts_t" if transposed else "experts"
        entering = network.add_input(1, count, 1, weight.shape[1 if transposed else 2], name=name)
        return network.add_synapse(entering, weight, name, form=form, groups=count)
    entering = network.add_input(1, weight.shape[0 if transposed else 1], name=name)
    return network.add_synapse(entering, weight, name, form="linear_t" if transposed else "linear")
