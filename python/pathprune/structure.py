"""A model's modules around other tensors: what is exported, and run, where a model's own parameters cannot be.

Parameters that are DTensors, lie on the meta device, or are offloaded to a store are replaced, in new module objects
that share everything else with the model's. Hooks that ``torch.distributed`` and ``accelerate`` put there to fetch
parameters are left out; any other hook stays. The model is not touched, and no value is copied.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def require_module(model: object, who: str) -> None:
    """Raises TypeError for what is no module: a name, a path, a class that was not called."""
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{who}: model: wanted a torch.nn.Module, got {got}")


def require_shapes(tensors: Mapping[str, Tensor], who: str) -> None:
    """Raises ValueError where a lazy module has not made its weights yet."""
    lazy = [name for name, tensor in tensors.items() if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise ValueError(f"{who}: model: wanted weights with a shape (run a batch first), got lazy ones: {lazy[0]}")


def rebuilt(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model's structure around ``tensors``.

    Args:
        tensors: by any of a parameter's (or buffer's) names; those without an entry stay the model's own.

    A parameter (or tensor) that has several names is one in the result too; nothing there requires gradients.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    instead = {id(own): tensors[name] for name, own in reversed(named) if name in tensors}
    return _Builder(instead).module(model)


class _Builder:
    def __init__(self, instead: Mapping[int, Tensor]) -> None:
        self.instead = instead  # id of the model's own tensor -> what takes its place
        self.parameters: dict[int, nn.Parameter] = {}
        self.modules: dict[int, nn.Module] = {}

    def module(self, old: nn.Module) -> nn.Module:
        if id(old) in self.modules:
            return self.modules[id(old)]
        kind = _own_class(old)
        new = self.modules[id(old)] = kind.__new__(kind)
        state = dict(old.__dict__)
        if "_hf_hook" in state:
            _without_accelerate(old, new, state)
        for name in _HOOKS:
            kept = [(key, hook) for key, hook in state[name].items() if not _fetches(hook)]
            state[name] = type(state[name])(kept)
        state["_parameters"] = {key: self.parameter(own) for key, own in old._parameters.items()}
        state["_buffers"] = {key: None if own is None else self.tensor(own) for key, own in old._buffers.items()}
        new.__dict__.update(state)
        new.__dict__["_modules"] = {
            key: None if child is None else self.module(child) for key, child in old._modules.items()
        }
        return new

    def tensor(self, own: Tensor) -> Tensor:
        return self.instead.get(id(own), own)

    def parameter(self, own: nn.Parameter | None) -> nn.Parameter | None:
        if own is None:
            return None
        value = self.tensor(own)
        if id(value) not in self.parameters:
            self.parameters[id(value)] = nn.Parameter(value.detach(), requires_grad=False)
        return self.parameters[id(value)]


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the subclass that ``fully_shard`` makes of it."""
    wrappers = tuple(kind for kind in type(module).__mro__ if kind.__name__ == "FSDPModule")
    own = (kind for kind in type(module).__mro__ if issubclass(kind, nn.Module) and not issubclass(kind, wrappers))
    return next(own)


def _fetches(hook: object) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")


def _without_accelerate(old: nn.Module, new: nn.Module, state: dict[str, object]) -> None:
    """Puts back the forward that accelerate's hook has wrapped."""
    forward = state.pop("_old_forward", None)
    del state["_hf_hook"]
    state.pop("forward", None)
    function = getattr(forward, "__func__", None)
    if function is not None and function is not type(old).forward:
        state["forward"] = types.MethodType(function, new)


def without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes, types and devices that take no memory; a tensor of several names stays one."""
    made: dict[int, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for tensor in tensors.values():
            if id(tensor) not in made:
                made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return {name: made[id(tensor)] for name, tensor in tensors.items()}
