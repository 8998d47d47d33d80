"""Masks of a model that is spread over ranks: each rank holds the bits of its own part of every weight.

``masks[name]`` is a DTensor that lies as the weight does. What needs whole masks (``whole``, ``save``, ``widths``,
``==``, ``get`` with a device) gathers them, one weight at a time, and is called on every rank; counts are made when the
masks are, so that ``kept``, ``density`` and ``print`` are not. A file is the one that masks of a single process write.

Bytes: one bit for each weight here; to gather, one byte for each weight of one layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _mask_io as bits
from ._mask_io import Count, MaskMismatchError, Width
from .distributed import is_distributed, local, placed_like
from .masks import Masks

if TYPE_CHECKING:
    from .report import Report


@dataclass(frozen=True)
class Placement:
    """How a weight lies on the ranks.

    Attributes:
        shape: of the whole weight.
        mesh: a ``DeviceMesh``; None: a plain tensor, whole on every rank.
        placements: one for each dimension of the mesh.
    """

    shape: torch.Size
    mesh: Any = None
    placements: tuple[Any, ...] = ()

    @staticmethod
    def of(weight: Tensor) -> Placement:
        if not is_distributed(weight):
            return Placement(weight.shape)
        return Placement(weight.shape, weight.device_mesh, tuple(weight.placements))  # type: ignore[attr-defined]

    def tensor(self, here: Tensor) -> Tensor:
        """The tensor of which this rank holds ``here``."""
        if self.mesh is None:
            return here
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        where = self.mesh, self.placements
        return DTensor.from_local(here.to(self.mesh.device_type), *where, shape=self.shape, stride=stride)

    def summed(self, here: Tensor) -> Tensor:
        """The sum over the parts of a weight of numbers that each rank has for its part."""
        if self.mesh is None:
            return here
        from torch.distributed.tensor import DTensor, Partial, Replicate

        how = [Replicate() if placement.is_replicate() else Partial() for placement in self.placements]
        return DTensor.from_local(here.to(self.mesh.device_type), self.mesh, how).full_tensor().cpu()


class ShardedMasks(Masks):
    """Masks whose tensors are DTensors. Made by ``prune`` on a model of DTensors, or from whole masks by :meth:`like`.

    Each operation gives masks placed alike; ``apply_`` and ``maintain`` write a model that is placed alike.

    Example:
        >>> masks = pp.prune(fully_shard(model), pp.SynFlow(), density=0.05, example_input=x)   # on every rank
        >>> masks.apply_(model)
        >>> masks.save("masks.safetensors")                                                     # rank 0 writes
    """

    @classmethod
    def of_parts(
        cls,
        parts: Mapping[str, tuple[Tensor, Sequence[int]]],
        placements: Mapping[str, Placement],
        metadata: Mapping[str, Any] | None = None,
    ) -> ShardedMasks:
        """From what each rank holds; called on every rank.

        Args:
            parts: name -> (uint8 bits, shape) of the local parts, as for ``Masks.from_packed``.
            placements: of the weights, by name.
        """
        masks = cls.from_packed(parts, metadata)
        assert isinstance(masks, ShardedMasks)
        masks._place(placements)
        return masks

    @classmethod
    def like(cls, masks: Masks, tensors: Mapping[str, Tensor]) -> ShardedMasks:
        """Whole masks, the same on every rank, placed as the weights in ``tensors``; called on every rank."""
        parts: dict[str, tuple[Tensor, Sequence[int]]] = {}
        for name in masks:
            packed, shape = masks.packed(name)
            if is_distributed(tensors[name]):
                here = local(placed_like(tensors[name], bits.unpack_mask(packed, shape)))
                packed, shape = bits.pack_bits(here), here.shape
            parts[name] = (packed, shape)
        return cls.of_parts(parts, {name: Placement.of(tensors[name]) for name in masks}, masks.metadata)

    def _place(self, placements: Mapping[str, Placement]) -> None:
        self._placements = {name: placements[name] for name in self}
        here = {name: bits.count_ones(packed) for name, (packed, _) in self._layers.items()}
        alike: dict[Any, list[str]] = {}
        for name, placement in self._placements.items():
            alike.setdefault((placement.mesh, placement.placements), []).append(name)
        kept: dict[str, int] = {}
        for names in alike.values():  # one sum for all weights that lie alike
            counts = torch.tensor([here[name] for name in names])
            kept.update(zip(names, self._placements[names[0]].summed(counts).tolist(), strict=True))
        self._counts = {name: Count(kept[name], self._placements[name].shape.numel()) for name in self}

    def _like(self, layers: bits.Layers, metadata: Mapping[str, Any] | None) -> Masks:
        masks = self._of(layers, metadata)
        assert isinstance(masks, ShardedMasks)
        masks._place(self._placements)
        return masks

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: placement.shape for name, placement in self._placements.items()}

    # What needs every rank.

    def whole(self) -> Masks:
        """The same masks with all bits on every rank."""
        return Masks.from_packed({name: self._gathered(name) for name in self}, self.metadata)

    def _gathered(self, name: str) -> tuple[Tensor, torch.Size]:
        packed, _ = self._layers[name]
        shape = self._placements[name].shape
        tensor = self[name]
        return (bits.pack_bits(tensor.full_tensor()) if is_distributed(tensor) else packed), shape  # type: ignore[attr-defined]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file of the whole masks, from the first rank of their mesh; called on every rank.

        Raises:
            OSError: on the rank that writes, as ``Masks.save``; RuntimeError on the others.
        """
        mesh = next((placement.mesh for placement in self._placements.values() if placement.mesh is not None), None)
        if mesh is None:
            return super().save(path)
        writes = not any(mesh.get_coordinate())
        layers: bits.Layers = {}
        for name in self:
            gathered = self._gathered(name)
            if writes:
                layers[name] = gathered
        failure: Exception | None = None
        try:
            if writes:
                bits.write_masks(path, layers, self.metadata)
        except Exception as error:
            failure = error
        failed = bool(_anywhere(mesh, failure is not None))
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError(f"Masks.save: {path}: the first rank of the mesh could not write it")
        return None

    def widths(self) -> dict[str, Width]:
        """As ``Masks.widths``; called on every rank."""
        return self.whole().widths()

    def shuffle(self, seed: int | torch.Generator) -> Masks:
        """As ``Masks.shuffle``, the same for a seed; called on every rank with it."""
        tensors = {name: self[name] for name in self}
        return self.like(self.whole().shuffle(seed), tensors)

    def with_biases(self, model: nn.Module) -> Masks:
        """As ``Masks.with_biases``, whole; called on every rank."""
        return self.whole().with_biases(model)

    def report(self, model: Any = None, example_input: Any = None) -> Report:
        """As ``Masks.report``; with a model, called on every rank."""
        return super().report() if model is None else self.whole().report(model, example_input)

    def __eq__(self, other: object) -> bool:
        """Whether all bits agree, also with masks of one process; called on every rank."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.whole() == (other.whole() if isinstance(other, ShardedMasks) else other)

    # The mapping.

    def __getitem__(self, name: str) -> Tensor:
        return self._placements[name].tensor(super().__getitem__(name))

    def get(self, name: str, default: Any = None, *, device: torch.device | str | None = None) -> Any:
        """The mask of `name`; with a device, whole and there, which is called on every rank."""
        if name not in self:
            return default
        return self[name] if device is None else bits.unpack_mask(*self._gathered(name), device=device)

    def packed(self, name: str) -> tuple[Tensor, torch.Size]:
        """The bits of what this rank holds, and its shape."""
        return super().packed(name)

    def to(self, device: torch.device | str) -> Masks:
        """Refused: the tensors lie on the devices of their mesh; ``whole().to(device)`` has whole ones."""
        raise ValueError(f"Masks.to: masks over ranks lie on the devices of their mesh, got {device}; use whole()")

    def _here(self, name: str, weight: Tensor) -> Tensor:
        placement, wanted = Placement.of(weight), self._placements[name]
        if placement != wanted:
            raise MaskMismatchError(
                f"masks: {name}: wanted a weight placed as {wanted.placements} on {wanted.mesh}, got "
                f"{placement.placements} on {placement.mesh}; use masks.whole()"
            )
        return self._layers[name][0]

    def __repr__(self) -> str:
        return f"Sharded{super().__repr__()}"


def _anywhere(mesh: Any, flag: bool) -> Tensor:
    """Whether the flag is set on any rank of a mesh."""
    from torch.distributed.tensor import DTensor, Partial

    mine = torch.tensor([int(flag)], device=mesh.device_type)
    return DTensor.from_local(mine, mesh, [Partial("max")] * mesh.ndim).full_tensor()
