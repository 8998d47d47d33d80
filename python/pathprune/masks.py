"""Masks: which weights of a model are kept, at one bit per weight, outside the model.

masks = Masks.load("masks.safetensors")
masks.apply_(model)                              # zeros in place: keys, dtypes and storage stay
with masks.maintain(model, optimizer): ...       # and stay zero through training
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pathprune import _mask_io as bits
from pathprune import torch_prune
from pathprune._mask_io import Count, MaskFileError, MaskMismatchError, Width, listed
from pathprune.belonging import Difference, compare, dense_weights
from pathprune.distributed import is_spread, local, placed_like, reshard, whole
from pathprune.maintenance import Maintenance, write_zeros
from pathprune.stores import copies, require_apart, written
from pathprune.structure import require_module

if TYPE_CHECKING:
    from .report import Report

OnOtherBase = Literal["warn", "raise", "ignore"]


class Masks(Mapping[str, Tensor]):
    """A mapping from fully-qualified parameter name to a bool mask: True keeps the weight.

    Stored at one bit per weight on the CPU; each access makes a fresh bool tensor of the weight's shape, so
    writing into one changes nothing here. The masks never change: every operation returns new ones. Equality
    compares names, shapes and bits, not metadata.

    Args:
        masks: name -> bool tensor of any shape but 0-dimensional, any strides, any device.
        metadata: JSON-able facts that go with the masks (method, config, seed, version, base_hash, ...) and
            `findings`, a dict for what pruning observed (added, empty, where there is none).

    Raises:
        TypeError: a mask is not a bool tensor, or metadata is not JSON-able.
        ValueError: a mask is 0-dimensional or on the meta device.

    Example:
        masks = Masks({"head.weight": model.head.weight.abs() > 0.01})
        print(masks.density)
        masks.save("masks.safetensors")
    """

    metadata: dict[str, Any]

    def __init__(self, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        if not isinstance(masks, Mapping) or not all(isinstance(name, str) for name in masks):
            raise TypeError(f"Masks: masks: wanted a mapping of bool tensors by name, got {type(masks).__name__}")
        layers: bits.Layers = {}
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(f"Masks: {name}: wanted a bool tensor, got {getattr(mask, 'dtype', type(mask))}")
            if mask.is_meta:
                raise ValueError(f"Masks: {name}: wanted a tensor with values, got one on the meta device")
            layers[name] = (bits.pack_bits(mask), mask.shape)
        self._fill(layers, metadata)

    def _fill(self, layers: bits.Layers, metadata: Mapping[str, Any] | None) -> None:
        for name, (_, shape) in layers.items():
            if len(shape) == 0:
                raise ValueError(f"Masks: {name}: wanted at least one dimension, got a 0-dimensional tensor")
        try:
            # Through JSON, so that what is held is what a file would give back.
            self.metadata = json.loads(json.dumps({"findings": {}, **(metadata or {})}))
        except (TypeError, ValueError) as error:
            raise TypeError(f"Masks: metadata: wanted JSON-able values: {error}") from error
        self._layers = layers
        self._device = torch.device("cpu")
        self._counts: dict[str, Count] | None = None

    @classmethod
    def _of(cls, layers: bits.Layers, metadata: Mapping[str, Any] | None) -> Masks:
        masks = cls.__new__(cls)
        masks._fill(layers, metadata)
        return masks

    def _like(self, layers: bits.Layers, metadata: Mapping[str, Any] | None) -> Masks:
        """Masks of the same weights."""
        return self._of(layers, metadata)

    @classmethod
    def from_packed(
        cls, packed: Mapping[str, tuple[Tensor, Sequence[int]]], metadata: Mapping[str, Any] | None = None
    ) -> Masks:
        """Masks from packed bits; the tensors are kept, not copied, and must not change any more.

        Args:
            packed: name -> (uint8 [ceil(n / 8)], shape of the weight). Bit i of byte j is flat index 8 j + i;
                bits beyond n are zero.

        Raises:
            ValueError: another dtype or size, a set bit beyond n, or an empty shape.
        """
        layers: bits.Layers = {}
        for name, (data, sizes) in packed.items():
            shape = torch.Size(sizes)
            total = math.prod(shape)
            if data.dtype != torch.uint8 or data.shape != (-(-total // 8),):
                raise ValueError(
                    f"Masks.from_packed: {name}: wanted uint8 [{-(-total // 8)}] for shape {list(shape)}, "
                    f"got {data.dtype} {list(data.shape)}"
                )
            data = data.cpu().contiguous()
            if total % 8 and int(data[-1]) >> total % 8:
                raise ValueError(f"Masks.from_packed: {name}: wanted zeros beyond bit {total}, got a set bit")
            layers[name] = (data, shape)
        return cls._of(layers, metadata)

    @classmethod
    def ones(cls, weights: nn.Module | Mapping[str, Sequence[int]]) -> Masks:
        """Masks that keep everything.

        Args:
            weights: name -> shape; or a model, of which all parameters of two or more dimensions are covered
                but those that only embeddings hold. A tied one is covered once, under its first name.
        """
        if isinstance(weights, nn.Module):
            weights = {name: weight.shape for name, weight in dense_weights(weights).items()}
        layers: bits.Layers = {}
        for name, sizes in weights.items():
            total = math.prod(sizes)
            packed = torch.full((-(-total // 8),), 255, dtype=torch.uint8)
            layers[name] = (bits.clear_padding(packed, total), torch.Size(sizes))
        return cls._of(layers, None)

    @classmethod
    def from_model(cls, model: nn.Module, names: Iterable[str] | None = None) -> Masks:
        """Masks of the weights that are not zero now.

        Args:
            names: parameters to cover; None: those that `Masks.ones(model)` covers.

        Raises:
            KeyError: the model has no parameter of a given name.
            ValueError: a parameter is on the meta device.
        """
        reshard(model)
        weights = dense_weights(model)
        if names is not None:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            weights = {name: parameters[name] for name in names}
        layers: bits.Layers = {}
        for name, weight in weights.items():
            if weight.is_meta:
                raise ValueError(f"Masks.from_model: {name}: wanted values, got a weight on the meta device")
            layers[name] = (bits.pack_bits(whole(weight)), weight.shape)
        return cls._of(layers, None)

    @classmethod
    def from_torch_prune(cls, model: nn.Module) -> Masks:
        """The masks of every tensor under `torch.nn.utils.prune`, by the names the dense model has.

        A parameter tied between modules that are pruned alike is covered once.

        Raises:
            ValueError: nothing in the model is pruned that way.
        """
        return cls._of(torch_prune.layers_of(model), None)

    # The mapping.

    def __getitem__(self, name: str) -> Tensor:
        return bits.unpack_mask(*self._layers[name], device=self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def get(self, name: str, default: Any = None, *, device: torch.device | str | None = None) -> Any:
        """The mask of `name` on `device` (None: the masks' own), or `default` if there is none."""
        if name not in self._layers:
            return default
        return bits.unpack_mask(*self._layers[name], device=self._device if device is None else device)

    def packed(self, name: str) -> tuple[Tensor, torch.Size]:
        """The stored bits uint8 [ceil(n / 8)], not to be written to, and the shape."""
        return self._layers[name]

    def to(self, device: torch.device | str) -> Masks:
        """The same masks, whose tensors are made on `device`; the bits stay shared, on the CPU."""
        masks = self._like(self._layers, self.metadata)
        masks._device = torch.device(device)
        return masks

    # Counting.

    def counts(self) -> dict[str, Count]:
        """name -> (kept, total)."""
        if self._counts is None:
            self._counts = {
                name: Count(bits.count_ones(packed), math.prod(shape)) for name, (packed, shape) in self._layers.items()
            }
        return dict(self._counts)

    @property
    def kept(self) -> int:
        """Weights kept, over all layers."""
        return sum(count.kept for count in self.counts().values())

    @property
    def total(self) -> int:
        """Weights covered, over all layers."""
        return sum(count.total for count in self.counts().values())

    @property
    def density(self) -> float:
        """Fraction kept of all the weights covered; 1 if there are none."""
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        """Fraction removed of all the weights covered; 0 if there are none."""
        return (self.total - self.kept) / self.total if self.total else 0.0

    def widths(self) -> dict[str, Width]:
        """name -> live rows, rows, live columns, columns (one column if the weight has one dimension)."""
        widths = {}
        for name, (packed, shape) in self._layers.items():
            live_rows, live_columns = bits.live_units(packed, shape)
            widths[name] = Width(live_rows, shape[0], live_columns, shape[1] if len(shape) > 1 else 1)
        return widths

    # Algebra.

    def __and__(self, other: object) -> Masks:
        return self._combined("and", torch.bitwise_and, other) if isinstance(other, Masks) else NotImplemented

    def __or__(self, other: object) -> Masks:
        return self._combined("or", torch.bitwise_or, other) if isinstance(other, Masks) else NotImplemented

    def __xor__(self, other: object) -> Masks:
        return self._combined("xor", torch.bitwise_xor, other) if isinstance(other, Masks) else NotImplemented

    def __invert__(self) -> Masks:
        layers = {}
        for name, (packed, shape) in self._layers.items():
            layers[name] = (bits.clear_padding(~packed, math.prod(shape)), shape)
        return self._like(layers, bits.provenance("invert", [self]))

    def invert(self) -> Masks:
        """Keeps what was removed and removes what was kept: `~masks`."""
        return ~self

    def union(self, *others: Masks) -> Masks:
        """Keeps what any of the masks keeps."""
        return self._combined("or", torch.bitwise_or, *others)

    @classmethod
    def soup(cls, masks: Sequence[Masks], at_least: int = 1) -> Masks:
        """Keeps what `at_least` of the masks keep: 1 is the union, len(masks) the intersection."""
        if not masks:
            raise ValueError("Masks.soup: masks: wanted at least one, got none")
        if not 1 <= at_least <= len(masks):
            raise ValueError(f"Masks.soup: at_least: wanted 1 .. {len(masks)}, got {at_least}")
        layers: bits.Layers = {}
        masks[0]._same_layers(masks[1:])
        for name, (packed, shape) in masks[0]._layers.items():
            total = math.prod(shape)
            kept = torch.empty_like(packed)
            for start in range(0, total, bits.PIECE):
                stop = min(start + bits.PIECE, total)
                votes = torch.zeros(stop - start, dtype=torch.int32)
                for member in masks:
                    votes += bits.unpack_bits(member._layers[name][0], start, stop)
                kept[start // 8 : -(-stop // 8)] = bits.pack_bits(votes >= at_least)
            layers[name] = (kept, shape)
        return masks[0]._like(layers, bits.provenance("soup", masks, at_least=at_least))

    def shuffle(self, seed: int | torch.Generator) -> Masks:
        """Permutes each layer's mask at random: its count stays, which weights they were is forgotten.

        Args:
            seed: an int gives the same masks on every machine, each layer whatever stands beside it; a
                generator gives one such int.
        """
        if isinstance(seed, torch.Generator):
            seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
        if not isinstance(seed, int):
            raise TypeError(f"Masks.shuffle: seed: wanted an int or a torch.Generator, got {seed!r}")
        counts = self.counts()
        layers = {}
        for name, (_, shape) in self._layers.items():
            key = hashlib.blake2b(json.dumps([int(seed), name]).encode(), digest_size=16).digest()
            layers[name] = (bits.scattered_bits(*counts[name], int.from_bytes(key, "little")), shape)
        return self._like(layers, bits.provenance("shuffle", [self], seed=int(seed)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self._layers.keys() == other._layers.keys() and all(
            shape == other._layers[name][1] and torch.equal(packed, other._layers[name][0])
            for name, (packed, shape) in self._layers.items()
        )

    def _same_layers(self, others: Iterable[Masks]) -> None:
        for other in others:
            first, second = self._layers, other._layers
            shapes = [
                f"{name} ({list(first[name][1])} and {list(second[name][1])})"
                for name in first
                if name in second and first[name][1] != second[name][1]
            ]
            lines = [
                listed("only in the first:", [name for name in first if name not in second]),
                listed("only in the second:", [name for name in second if name not in first]),
                listed("other shapes:", shapes),
            ]
            if any(lines):
                raise MaskMismatchError("masks of different layers: " + "; ".join(filter(None, lines)))

    def _combined(self, operation: str, combine: Callable[[Tensor, Tensor], Tensor], *others: Masks) -> Masks:
        self._same_layers(others)
        layers = {}
        for name, (packed, shape) in self._layers.items():
            for other in others:
                packed = combine(packed, other._layers[name][0])
            layers[name] = (packed, shape)
        return self._like(layers, bits.provenance(operation, [self, *others]))

    # Files.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file with checksum. On any failure the old file, if any, is untouched.

        Raises:
            OSError: the disk is full, the folder is missing, ...
            TypeError: metadata is no longer JSON-able.
        """
        bits.write_masks(path, self._layers, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None, *, base: OnOtherBase = "warn") -> Masks:
        """Reads what `save` wrote; with a model, checks that the masks belong to it (`check`).

        Raises:
            MaskFileError: truncated, altered, or not a mask file.
            MaskMismatchError: the masks are of another model.
            OSError: the file cannot be opened.
        """
        layers, metadata = bits.read_masks(path)
        try:
            masks = cls.from_packed(layers, metadata)
        except (TypeError, ValueError) as error:
            raise MaskFileError(f"{path}: {error}") from error
        if model is not None:
            masks.check(model, base=base)
        return masks

    # On a model.

    def difference(self, model: nn.Module, *, base: bool = True) -> Difference:
        """What sets these masks and a model apart; `base`: the weights too, of which masks record a hash."""
        require_module(model, "masks")
        reshard(model)
        return compare(model, self._shapes(), self.metadata.get("base_hash") if base else None)

    def check(self, model: nn.Module, *, strict: bool = True, base: OnOtherBase = "warn") -> Difference:
        """Refuses a model that these masks do not fit; writes nothing.

        Args:
            strict: False lets masks pass whose weight the model does not have.
            base: what to do if the weights are not those whose hash was recorded. Masks are made to be reused
                on trained weights, so the default only warns; "ignore" does not read the weights.

        Returns:
            The difference that was let pass.

        Raises:
            MaskMismatchError: names, shapes or (base="raise") weights differ; a tied weight has two masks.
            ValueError: a weight cannot be written (meta device, sparse, a checkpoint's own file, ...).
        """
        if base not in ("warn", "raise", "ignore"):
            raise ValueError(f"masks: base: wanted 'warn', 'raise' or 'ignore', got {base!r}")
        difference = self.difference(model, base=base != "ignore")
        if (strict and difference.absent) or difference.shapes:
            raise MaskMismatchError(f"masks of another model: {difference}")
        self._targets(model)
        if difference.base and base == "raise":
            raise MaskMismatchError(f"masks of other weights: {difference}")
        if difference.base:
            warnings.warn(f"masks made on other weights than the model has: {difference}", stacklevel=3)
        return difference

    def _shapes(self) -> dict[str, torch.Size]:
        """Of the weights."""
        return {name: shape for name, (_, shape) in self._layers.items()}

    def _here(self, name: str, weight: Tensor) -> Tensor:
        """The bits of what this process holds of a weight."""
        packed, shape = self._layers[name]
        if not is_spread(weight):
            return packed
        return bits.pack_bits(local(placed_like(weight, bits.unpack_mask(packed, shape))))

    def _targets(self, model: nn.Module, *, in_place: bool = False) -> dict[nn.Parameter, tuple[str, Tensor]]:
        """The parameters to write, each once, the first name that the masks have for it, and its memory.

        Args:
            in_place: the parameters themselves are to be trained.
        """
        present = dict(model.named_parameters(remove_duplicate=False))
        targets: dict[nn.Parameter, tuple[str, Tensor]] = {}
        first: dict[tuple[object, ...], str] = {}
        apart: dict[str, Tensor] = {}
        for name, (packed, _) in self._layers.items():
            if name not in present:
                continue
            weight = present[name]
            here = written(model, name, weight, in_place=in_place)
            memory = (here.device, here.data_ptr() if here.numel() else id(weight), here.shape, here.stride())
            tied = first.setdefault(memory, name)
            if not torch.equal(packed, self._layers[tied][0]):
                raise MaskMismatchError(f"{tied} and {name} are one tied weight but have different masks")
            targets.setdefault(weight, (name, here))
            apart.setdefault(tied, here)
        require_apart(apart)
        return targets

    def apply_(self, model: nn.Module, *, strict: bool = True, base: OnOtherBase = "warn") -> nn.Module:
        """Writes zeros over the removed weights, in place: NaN and infinities too become exact zeros.

        Keys, dtypes, storage and requires_grad stay as they are; a tied parameter is written once; all checks
        come before the first write. Parameters that are DTensors (FSDP2) are written where they lie, so every rank
        calls this; those that accelerate has offloaded are written in its store.

        Args, Raises: as `check`.

        Returns:
            The model.
        """
        self.check(model, strict=strict, base=base)
        for weight, (name, here) in self._targets(model).items():
            for memory in (here, *copies(model, name, weight)):
                write_zeros(memory, self._here(name, weight))
        return model

    def maintain(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Maintenance:
        """Applies the masks now and keeps them applied while the optimizer trains the model.

            with masks.maintain(model, optimizer):
                train(model, optimizer)

        Zeros survive momentum and weight decay; see `Maintenance` for how, and for `remove()`. Under FSDP2 every rank
        calls this after `fully_shard`, with an optimizer of its sharded parameters.

        Raises: as `check`; ValueError if the optimizer holds none of the masked parameters, TypeError if it is none.
        """
        self.check(model, base="ignore")
        targets = self._targets(model, in_place=True)
        return Maintenance({weight: self._here(name, weight) for weight, (name, _) in targets.items()}, optimizer)

    def to_torch_prune(self, model: nn.Module) -> nn.Module:
        """Hands each mask to `torch.nn.utils.prune.custom_from_mask`, for every module that holds the weight.

        Raises: as `check`.

        Returns:
            The model. `torch.nn.utils.prune.remove` makes the zeros permanent.
        """
        self.check(model, base="ignore")
        targets = self._targets(model, in_place=True)
        masks = [(weight, self.get(name, device=weight.device)) for weight, (name, _) in targets.items()]
        return torch_prune.hand_over(model, masks)

    def with_biases(self, model: nn.Module) -> Masks:
        """With a mask of each bias beside a masked weight: it stays if its unit keeps a weight. See `bias_masks`."""
        from .bias_masks import with_biases

        return with_biases(self, model)

    def report(self, model: Any = None, example_input: Any = None) -> Report:
        """What is left, as `prune` found it; with a model, or its `PathNetwork`, found anew. See `Report`."""
        from .report import Report

        return Report.of(self, model, example_input)

    def __repr__(self) -> str:
        return f"Masks({len(self)} layers, {self.kept:,} of {self.total:,} weights kept, density {self.density:.4g})"
