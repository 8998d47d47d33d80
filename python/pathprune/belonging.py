"""Whether masks belong to a model: names, shapes, and the weights they were made on."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from . import ops
from ._mask_io import listed
from .distributed import whole
from .stores import held, is_offloaded
from .structure import require_shapes

_BASE = "splitmix64"  # what base_hash takes of each weight


@dataclass(frozen=True)
class Difference:
    """What sets masks and a model apart; `str()` says it in words."""

    absent: tuple[str, ...] = ()  # masks whose weight the model does not have
    unmasked: tuple[str, ...] = ()  # weights of the model without a mask: no fault, they stay dense
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()  # (name, mask's, model's)
    base: tuple[str, str] | None = None  # base_hash (of the metadata, of the model) where they differ
    hint: str = ""

    def __str__(self) -> str:
        shapes = [f"{name} (mask {list(mask)}, model {list(model)})" for name, mask, model in self.shapes]
        lines = [
            listed("the model has no", self.absent),
            listed("other shapes:", shapes),
            listed("weights of the model without a mask:", self.unmasked),
            f"base weights: masks made on {self.base[0]}, model has {self.base[1]}" if self.base else "",
            self.hint,
        ]
        return "; ".join(line for line in lines if line) or "no difference"


def naming_hint(absent: Sequence[str], present: Mapping[str, object]) -> str:
    """Why the model may know the first absent name by another one."""
    for name in absent[:1]:
        if f"{name}_orig" in present:
            return "the model is under torch.nn.utils.prune, which renames weights: remove that first"
        for other in present:
            if other.endswith(f".{name}"):
                return f"its names begin with {other.removesuffix(name)!r}: pass the wrapped model"
            if name.endswith(f".{other}"):
                return f"the masks' names begin with {name.removesuffix(other)!r}: they are of a wrapped model"
    return ""


def dense_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of two or more dimensions, tied ones once, except those that only embeddings hold."""
    used = {
        weight
        for module in model.modules()
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for weight in module._parameters.values()
    }
    return {name: weight for name, weight in model.named_parameters() if weight.ndim >= 2 and weight in used}


def compare(model: nn.Module, shapes: Mapping[str, Sequence[int]], recorded: str | None) -> Difference:
    """What sets masks and a model apart.

    Args:
        shapes: of the masks.
        recorded: hash of the weights they were made on; None, or of another kind: not compared, and neither where
            names or shapes differ or a weight is on the meta device.
    """
    present = dict(model.named_parameters(remove_duplicate=False))
    require_shapes({name: present[name] for name in shapes if name in present}, "masks")
    absent = [name for name in shapes if name not in present]
    other = [
        (name, tuple(shape), tuple(present[name].shape))
        for name, shape in shapes.items()
        if name in present and tuple(present[name].shape) != tuple(shape)
    ]
    covered = {present[name] for name in shapes if name in present}
    unmasked = [name for name, weight in dense_weights(model).items() if weight not in covered]
    base = None
    has_values = is_offloaded(model) or not any(weight.is_meta for weight in covered)
    if recorded and recorded.startswith(f"{_BASE}:") and not absent and not other and has_values:
        found = base_hash(model, shapes)
        base = (recorded, found) if found != recorded else None
    return Difference(tuple(absent), tuple(unmasked), tuple(other), base, naming_hint(absent, present))


def base_hash(
    model: nn.Module | Mapping[str, Tensor], names: Iterable[str], used: Callable[[str], None] = lambda name: None
) -> str:
    """What tells dense weights from others: a hash of name, shape, dtype and fingerprint of each, in order of name.

    Neither the device nor the strides of a weight matter, nor over which ranks it is spread (one is gathered at a
    time); its dtype and each of its bits do.

    Args:
        model: holds a parameter of each name; or those tensors, by name.
        names: fully-qualified parameter names, in any order.
        used: called with each name when its weight has been read.

    Returns:
        "splitmix64:" (the kind of fingerprint) and 32 hexadecimal digits.

    Raises:
        KeyError: the model has no parameter of that name.
        ValueError: a parameter is on the meta device: it has no values.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else model
    wanted = sorted(names)
    if isinstance(model, nn.Module) and any(parameters[name].is_meta for name in wanted) and is_offloaded(model):
        parameters = {**parameters, **held(model)}
    digest = hashlib.blake2b(digest_size=16)
    for name in wanted:
        if parameters[name].is_meta:
            raise ValueError(f"base_hash: {name}: wanted a weight with values, got one on the meta device")
        weight = whole(parameters[name])
        digest.update(json.dumps([name, list(weight.shape), str(weight.dtype)]).encode())
        digest.update(struct.pack("<q", int(ops.fingerprint(weight.detach()))))
        used(name)
    return f"{_BASE}:{digest.hexdigest()}"
