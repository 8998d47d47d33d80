"""Where the values of a model's parameters lie: in the parameters, or in the store that accelerate offloads them to.

``accelerate.dispatch_model`` (``device_map``, ``cpu_offload``, ``disk_offload``) leaves parameters on the meta device
and keeps their values in CPU memory, in one raw file each, or in the safetensors files the model was loaded from.
Memory and raw files are read and written in place (files through a memory map: a weight is in memory only while it is
used); a checkpoint's own files are read and never written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    read: dict[tuple[int, str], Tensor] = {}  # what one store knows by one name is one
    tied: list[Tensor] = []
    for name, tensor in named.items():
        if tensor.is_meta:
            place = stored[name]
            if place.identity not in read:
                value = place.read()
                known = next((one for one in tied if _same(one, value)), value) if place.is_tied else value
                if known is value and place.is_tied:
                    tied.append(value)
                read[place.identity] = known
            named[name] = read[place.identity]
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
        place = None if in_place else dict(_offloaded(model)).get(name)
        if place is not None and place.checkpoint is None:
            return place.read(write=True)
        holder = model.get_submodule(name.rpartition(".")[0])
        if place is not None:
            hint = f"accelerate reads it from the checkpoint {place.checkpoint}, which is not written to"
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


def require_apart(weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError where two weights share some of their elements: each would undo the other's zeros.

    Weights between one another's elements (columns of one tensor) are apart.
    """
    reached: dict[int, list[tuple[int, str]]] = {}  # storage -> ends and names of what reaches on in it
    for name, weight in sorted(weights.items(), key=lambda item: item[1].data_ptr()):
        if not weight.numel():
            continue
        begin, before = weight.data_ptr(), reached.setdefault(weight.untyped_storage().data_ptr(), [])
        before[:] = [(end, other) for end, other in before if end > begin]
        for _, other in before:
            if _meet(weights[other], weight):
                raise ValueError(f"masks: {name} cannot be written: it shares some of its elements with {other}")
        span = 1 + sum((size - 1) * step for size, step in zip(weight.shape, weight.stride(), strict=True))
        before.append((begin + span * weight.element_size(), name))


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two views of a storage have an element in common."""
    if a.dtype != b.dtype:
        return True
    taken = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool)
    taken.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def copies(model: nn.Module, name: str, weight: Tensor) -> list[Tensor]:
    """The memory of what else a store keeps of a tied parameter, under its other names."""
    stored = dict(_offloaded(model)) if weight.is_meta else {}
    if name not in stored or not stored[name].is_tied:
        return []
    mine = stored[name].read()
    others = [place for other, place in stored.items() if other != name and place.is_tied and place.checkpoint is None]
    return [place.read(write=True) for place in others if _same(place.read(), mine)]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------- accelerate


@dataclass(frozen=True)
class _Place:
    """Where accelerate keeps a tensor.

    Attributes:
        store: its mapping from names within a module to values.
        key: the name there.
        is_tied: whether it was one with another tensor before each went to a place of its own.
    """

    store: Any
    key: str
    is_tied: bool

    @property
    def _loader(self) -> Any:
        return getattr(self.store, "dataset", self.store)  # a module sees the part of a store with its prefix

    @property
    def _full_key(self) -> str:
        return f"{getattr(self.store, 'prefix', '')}{self.key}"

    @property
    def identity(self) -> tuple[int, str]:
        return id(self._loader), self._full_key

    @property
    def _on_disk(self) -> dict[str, Any] | None:
        """accelerate's description of a tensor on disk; None for one in memory."""
        in_memory = self._full_key in (getattr(self._loader, "state_dict", None) or {})
        return None if in_memory or not hasattr(self._loader, "index") else self._loader.index[self._full_key]

    @property
    def checkpoint(self) -> str | None:
        """The safetensors file it is read from, if it is."""
        return (self._on_disk or {}).get("safetensors_file")

    def read(self, write: bool = False) -> Tensor:
        """The values: in memory, or a map of their file, for writing if asked."""
        described = self._on_disk
        if described is None or "safetensors_file" in described:
            return self.store[self.key]
        wanted = described["dtype"]
        as_stored = {"bfloat16": "int16"}.get(wanted, "int8" if wanted.startswith("float8") else wanted)
        shape = tuple(described["shape"])
        file = os.path.join(self._loader.save_folder, f"{self._full_key}.dat")
        # A private map of what is only read: torch has no tensors that cannot be written to.
        array = np.memmap(file, dtype=as_stored, shape=shape or (1,), mode="r+" if write else "c")
        tensor = torch.from_numpy(array).reshape(shape)
        return tensor if as_stored == wanted else tensor.view(getattr(torch, wanted))


def _offloaded(model: nn.Module) -> Iterator[tuple[str, _Place]]:
    """What hooks of accelerate keep elsewhere, by name."""
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
                    yield (f"{path}.{key}" if path else key), _Place(store, key, key in one.tied_params_names)
