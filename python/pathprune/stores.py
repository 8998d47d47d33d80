"""Where the values of a model's parameters lie: in the parameters, or in the store that accelerate offloads them to.

``accelerate.dispatch_model`` (``device_map``, ``cpu_offload``, ``disk_offload``) leaves parameters on the meta device
and keeps their values in CPU memory, in one raw file each, or in the safetensors files the model was loaded from.
Memory and raw files are read and written in place (files through a memory map: a weight is in memory only while it is
used); a checkpoint's own files are read and never written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .distributed import local


def held(model: nn.Module, instead: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names, offloaded ones with the values of their store.

    Args:
        instead: values by name (any name of a tensor that has several) that go before the model's own.

    Raises:
        ValueError: a tensor on the meta device that no store has values for; names it.
    """
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    given = {id(named[name]): tensor for name, tensor in (instead or {}).items() if name in named}
    named = {name: given.get(id(tensor), tensor) for name, tensor in named.items()}
    if not any(tensor.is_meta for tensor in named.values()):
        return named
    stored = dict(_offloaded(model))
    meta = [name for name, tensor in named.items() if tensor.is_meta and name not in stored]
    if meta:
        raise ValueError(f"PathNetwork: model: wanted materialised weights, got meta tensors: {', '.join(meta[:5])}")
    read: dict[int, dict[str, Tensor]] = {}  # tensors that one store knows by one name are one
    for name, tensor in named.items():
        if tensor.is_meta:
            store, key = stored[name]
            by_key = read.setdefault(id(_whole_store(store)), {})
            full = _full_key(store, key)
            if full not in by_key:
                by_key[full] = _read(store, key)
            named[name] = by_key[full]
    return named


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps some of the model's parameters elsewhere."""
    return any(True for _ in _offloaded(model))


def written(model: nn.Module, name: str, weight: Tensor, *, in_place: bool = False) -> Tensor:
    """The memory in which to write a parameter's values; of a DTensor, this rank's.

    Args:
        in_place: the parameter itself is going to be trained: a store will not do.

    Raises:
        ValueError: writing would fail or be lost (meta device, a checkpoint's own file, sparse layout, shared
            elements, inference mode).
    """
    if weight.is_meta:
        stored = None if in_place else dict(_offloaded(model)).get(name)
        if stored is not None and _checkpoint_of(*stored) is None:
            return _read(*stored, write=True)
        holder = model.get_submodule(name.rpartition(".")[0])
        if stored is not None:
            hint = f"accelerate reads it from the checkpoint {_checkpoint_of(*stored)}, which is not written to"
        elif hasattr(holder, "_hf_hook"):
            hint = "accelerate has offloaded it: train a model that is not offloaded"
        else:
            hint = "load the weights first"
        reason = f"it is on the meta device and has no values ({hint})"
    elif weight.layout is not torch.strided:
        reason = f"its layout is {weight.layout}, not dense"
    elif weight.is_inference():
        reason = "it was made under torch.inference_mode()"
    elif any(step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)):
        reason = "several of its elements share memory"
    else:
        return local(weight)
    raise ValueError(f"masks: {name} cannot be written: {reason}")


# ----------------------------------------------------------------------------------------------------- accelerate


def _offloaded(model: nn.Module) -> Iterator[tuple[str, tuple[Mapping[str, Tensor], str]]]:
    """(name, (store, key there)) of what hooks of accelerate keep elsewhere."""
    for path, module in model.named_modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            store = getattr(one, "weights_map", None)
            if store is None or not one.offload:
                continue
            tensors = [
                *module.named_parameters(recurse=one.place_submodules, remove_duplicate=False),
                *module.named_buffers(recurse=one.place_submodules, remove_duplicate=False),
            ]
            for key, tensor in tensors:
                if tensor.is_meta:
                    yield (f"{path}.{key}" if path else key), (store, key)


def _whole_store(store: Mapping[str, Tensor]) -> Any:
    """accelerate shows each module the part of a store with its prefix."""
    return getattr(store, "dataset", store)


def _full_key(store: Any, key: str) -> str:
    return f"{getattr(store, 'prefix', '')}{key}"


def _entry(store: Any, key: str) -> tuple[str | None, dict[str, Any]]:
    """(folder, description) of a tensor that lies on disk; (None, {}) of one in memory."""
    loader, full = _whole_store(store), _full_key(store, key)
    if full in (getattr(loader, "state_dict", None) or {}) or not hasattr(loader, "index"):
        return None, {}
    return loader.save_folder, loader.index[full]


def _checkpoint_of(store: Any, key: str) -> str | None:
    return _entry(store, key)[1].get("safetensors_file")


def _read(store: Any, key: str, write: bool = False) -> Tensor:
    folder, described = _entry(store, key)
    if folder is None or "safetensors_file" in described:
        return store[key]
    wanted = described["dtype"]
    as_stored = {"bfloat16": "int16"}.get(wanted, "int8" if wanted.startswith("float8") else wanted)
    shape = tuple(described["shape"])
    file = os.path.join(folder, f"{_full_key(store, key)}.dat")
    # A private map of what is only read: torch has no tensors that cannot be written to.
    array = np.memmap(file, dtype=as_stored, shape=shape or (1,), mode="r+" if write else "c")
    tensor = torch.from_numpy(array).reshape(shape)
    return tensor if as_stored == wanted else tensor.view(getattr(torch, wanted))
