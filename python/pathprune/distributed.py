"""Many processes as one: sums, gathers and agreement over a process group, all of them the identity in one process.

A parameter that is a DTensor (FSDP2's ``fully_shard``, ``distribute_tensor``) is known here by its local part. Rows of
a weight (its dimension 0) lie on the ranks in rank order, as ``torch.chunk`` cuts them; the last ranks may hold fewer,
or none. Collectives are called in the same order on every rank: so whatever can fail on one rank alone is done inside
:meth:`Group.together`, which lets the others know.

Bytes: what the arguments hold, once per rank; nothing where a group has one member.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import WEIGHT_DTYPES

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Group:
    """The ranks that share one piece of work.

    Args:
        process_group: of ``torch.distributed``; None: this process alone.

    Raises:
        TypeError: not a process group.
        ValueError: ``torch.distributed`` is not initialised, or this process is not in the group.
    """

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group
        self.rank, self.size = 0, 1
        if process_group is None:
            return
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "prune: process_group: wanted an initialised torch.distributed (init_process_group), got none"
            )
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f"prune: process_group: wanted a ProcessGroup, got {type(process_group).__name__}")
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.rank < 0:
            raise ValueError("prune: process_group: wanted one that this process belongs to, got another")

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place; the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def largest_(self, tensor: Tensor) -> Tensor:
        """The largest of each entry over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.process_group)
        return tensor

    def each(self, tensor: Tensor) -> Tensor:
        """[size, *shape]: every rank's tensor; they have one shape."""
        if self.size == 1:
            return tensor[None]
        mine = tensor.contiguous().reshape(-1).view(torch.uint8)  # backends know bytes, but not every type
        every = mine.new_empty((self.size, mine.numel()))
        dist.all_gather(list(every.unbind()), mine, group=self.process_group)
        return every.view(tensor.dtype).reshape(self.size, *tensor.shape)

    def joined(self, part: Tensor, lengths: Sequence[int], dim: int = 0) -> Tensor:
        """The ranks' tensors one after the other along ``dim``, where rank r's has ``lengths[r]`` entries."""
        if self.size == 1:
            return part
        most = max(lengths)
        padded = part.new_empty((*part.shape[:dim], most, *part.shape[dim + 1 :]))
        padded.narrow(dim, 0, part.shape[dim]).copy_(part)
        every = self.each(padded).unbind()
        return torch.cat([one.narrow(dim, 0, length) for one, length in zip(every, lengths, strict=True)], dim)

    def to_next(self, tensor: Tensor) -> Any:
        """Begins to send a contiguous tensor to the next rank; the ``wait()`` of what is returned ends it."""
        return dist.isend(tensor, self._global(self.rank + 1), group=self.process_group)

    def from_previous(self, room: Tensor) -> Tensor:
        """What the rank before sends, written to ``room``, a contiguous tensor of its shape and type."""
        dist.recv(room, self._global(self.rank - 1), group=self.process_group)
        return room

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.process_group, rank)

    def rows(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """(first, one past the last) of ``count`` rows that a rank holds (None: this one), as ``torch.chunk`` cuts."""
        step = -(-count // self.size)
        first = min(step * (self.rank if rank is None else rank), count)
        return first, min(first + step, count)

    def lengths(self, count: int) -> list[int]:
        """How many of ``count`` rows each rank holds."""
        return [last - first for first, last in (self.rows(count, rank) for rank in range(self.size))]

    @contextmanager
    def together(self, who: str) -> Iterator[None]:
        """Ends on all ranks or on none: where one has failed, the others raise too, instead of waiting for it.

        Raises:
            RuntimeError: on the ranks that did not fail; names the rank that did, and its error.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
            raise
        finally:
            self._tell(who, failure)

    def _tell(self, who: str, failure: Exception | None) -> None:
        if self.size == 1:
            return
        messages: list[Any] = [None] * self.size
        mine = None if failure is None else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(messages, mine, group=self.process_group)
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed and failure is None:
            raise RuntimeError(f"{who}: rank {failed[0]} of {self.size} has failed: {messages[failed[0]]}")

    def agree(self, who: str, facts: Mapping[str, Any]) -> None:
        """Raises ValueError on every rank unless all were called with the same facts; names one that differs."""
        if self.size == 1:
            return
        texts = {name: _short(str(value)) for name, value in facts.items()}
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, texts, group=self.process_group)
        for name in texts:
            for rank, other in enumerate(every):
                if other.get(name) != every[0].get(name):
                    raise ValueError(
                        f"{who}: {name}: wanted the same on every rank, got {every[0].get(name)} on rank 0 and "
                        f"{other.get(name)} on rank {rank}"
                    )


ALONE = Group()


def _short(text: str) -> str:
    """A text that is the same for the same text, of a length fit for a message."""
    if len(text) <= 200:
        return text
    return f"{text[:60]}... ({hashlib.blake2b(text.encode(), digest_size=8).hexdigest()})"


# ------------------------------------------------------------------------------------------------------- DTensors


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; does not import what defines them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_spread(tensor: Tensor) -> bool:
    """Whether some rank holds less than all of a tensor."""
    return is_distributed(tensor) and not all(p.is_replicate() for p in tensor.placements)  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the memory it lies in: a DTensor's local part, or the tensor."""
    return tensor.detach().to_local() if is_distributed(tensor) else tensor.detach()  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its values: a DTensor's are gathered, a collective of its mesh."""
    if not is_distributed(tensor):
        return tensor.detach()
    _require_process_group()
    return tensor.detach().full_tensor()  # type: ignore[attr-defined]


def placed_like(tensor: Tensor, values: Tensor) -> Tensor:
    """Whole values, the same on every rank, as a DTensor that lies as ``tensor`` does; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return distribute_tensor(values.to(local(tensor).device), mesh, placements, src_data_rank=None)


def _require_process_group() -> None:
    if not dist.is_initialized():
        raise ValueError(
            "prune: model: its parameters are DTensors; wanted an initialised torch.distributed "
            "(init_process_group), got none"
        )


class Gathered(Mapping[str, Tensor]):
    """Tensors by name, each gathered anew whenever it is asked for: one is held at a time.

    Args:
        tensors: plain ones are given as they are.
        device: where to; None: where they are.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> None:
        self.tensors, self.device = tensors, device

    def __getitem__(self, name: str) -> Tensor:
        tensor = whole(self.tensors[name]).contiguous()
        return tensor if self.device is None else tensor.to(self.device)

    def here(self, name: str) -> Tensor:
        """The rows on this rank, where they are."""
        return local(self.tensors[name])

    def at(self, name: str, places: Tensor, ranks: Group) -> Tensor:
        """float64 values at flat places of a tensor whose rows lie on these ranks; nothing else is sent."""
        here = self.here(name).flatten()
        if not is_spread(self.tensors[name]):
            return here[places.to(here.device)].double()
        shape = self.tensors[name].shape
        inside = places.to(here.device) - ranks.rows(shape[0])[0] * shape[1:].numel()
        mine = (inside >= 0) & (inside < len(here))
        values = torch.zeros(len(places), dtype=torch.float64, device=here.device)
        values[mine] = here[inside[mine]].double()
        return ranks.sum_(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def ranks_of(model: object, process_group: Any = None) -> Group:
    """The ranks that prune a model together: those of ``process_group``, else of the mesh its DTensors lie on.

    Raises:
        TypeError, ValueError: as :class:`Group`; a mesh that is neither one-dimensional nor all processes.
    """
    if process_group is not None:
        return Group(process_group)
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    meshes = [tensor.device_mesh for tensor in parameters if is_distributed(tensor)]  # type: ignore[attr-defined]
    if not meshes:
        return ALONE
    _require_process_group()
    if any(mesh.size() == dist.get_world_size() for mesh in meshes):
        return Group(dist.group.WORLD)
    if meshes[0].ndim == 1:
        return Group(meshes[0].get_group())
    raise ValueError(
        f"prune: process_group: wanted the ranks of {meshes[0]}, got None; only a mesh of one dimension, or of all "
        "processes, says which they are"
    )


def row_group(tensors: Mapping[str, Tensor]) -> Group:
    """The ranks over which the rows of these weights are spread; plain tensors, and replicated ones, are on all.

    Raises:
        ValueError: a weight that is not cut along its rows, weights spread over different ranks, or no initialised
            process group.
    """
    found: tuple[str, Group] | None = None
    for name, tensor in tensors.items():
        if not is_distributed(tensor):
            continue
        _require_process_group()
        group = _group_of(name, tensor)  # type: ignore[arg-type]
        if group is None:
            continue
        if found is None:
            found = name, group
        elif _ranks(group) != _ranks(found[1]):
            raise ValueError(
                f"prune: weight '{name}': wanted rows on ranks {_ranks(found[1])}, as '{found[0]}', "
                f"got them on {_ranks(group)}"
            )
    return found[1] if found is not None else ALONE


def _group_of(name: str, tensor: DTensor) -> Group | None:
    """The ranks that hold the rows of one weight; None where every rank holds all."""
    cut = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if not cut:
        return None
    mesh, placement = tensor.device_mesh, tensor.placements[cut[0]]
    if len(cut) > 1 or not placement.is_shard(0) or type(placement).__name__ != "Shard":
        raise ValueError(
            f"prune: weight '{name}': wanted whole rows on each rank (Shard(0) along one mesh dimension), "
            f"got placements {tuple(tensor.placements)}; prune PathNetwork.from_module(model, example_input), which "
            "gathers them"
        )
    group = Group(mesh.get_group(cut[0]))
    first, last = group.rows(tensor.shape[0])
    held = tensor.to_local().shape[0]
    if held != last - first or mesh.get_local_rank(cut[0]) != group.rank:
        raise ValueError(
            f"prune: weight '{name}': wanted rows {first} to {last} on rank {group.rank} of {group.size}, as "
            f"torch.chunk cuts {tensor.shape[0]}, got {held} rows at mesh rank {mesh.get_local_rank(cut[0])}"
        )
    return group


def _ranks(group: Group) -> list[int]:
    return dist.get_process_group_ranks(group.process_group)


def reshard(model: nn.Module) -> None:
    """Brings FSDP2 modules whose parameters are gathered at the moment back to their shards, which are the model."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError for weights that are NaN, infinite, or of no type that is scored; of a DTensor, this rank's."""
    if tensor.dtype not in WEIGHT_DTYPES:
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"prune: weight '{name}': wanted float32, float64, bfloat16 or float16, got {got}")
    if tensor.numel() == 0:
        raise ValueError(f"prune: weight '{name}': wanted at least one element, got shape {tuple(tensor.shape)}")
    here = local(tensor)
    if here.numel() == 0:
        return
    low, high = torch.aminmax(here)
    if not (math.isfinite(float(low)) and math.isfinite(float(high))):
        raise ValueError(f"prune: weight '{name}': wanted finite values, got NaN or infinite ones")
