"""From file to file: a Hugging Face folder in, the same folder out with zeros in place, in bounded memory.

Weights are scored where they lie on the disk (:mod:`checkpoint_model`) by the same code that prunes in memory, so the
masks are the same bit for bit. In memory at one time: one weight or the budget of :mod:`residency`, the flows, the
masks at one bit a weight, and pieces of a few MB.

Parameters that loading makes of several file tensors are laid out beside the result while they are scored
(:mod:`assembly`); rounds are kept as they are done (:mod:`savepoints`).

Bytes: each sweep of the method reads the weights once; then each shard is read and written once, and the masks'
``base_hash`` reads the pruned weights once more. What is laid out is read and written once before.
Oracle: the same pruning in memory.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ._mask_io import flat_pieces
from .assembly import Assembly, Part, file_bits, laid_out, size_of
from .checkpoint import MASKS, Checkpoint, some, verify
from .checkpoint_model import CheckpointModel, open_model
from .loading import example_input as ones_of_shape
from .masks import Masks
from .network import PathNetwork
from .pruners import PHEW, Magnitude, PathPruner, Wanda
from .pruners.base import Pruner
from .pruning import asked_for, prune
from .residency import DEFAULT_BUDGET
from .restartable import RestartableFolder
from .savepoints import Savepoints
from .shards import CheckpointError, Shard
from .surroundings import undisturbed
from .version import __version__

ASSEMBLED = ".assembled"  # in a folder in the making alone; no shard and no file that goes along has such a name


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What :func:`prune_checkpoint` made.

    Attributes:
        folder: complete, with the shards, the masks and the other files.
        masks: by the model's parameter names.
        unpruned: names of tensors in the files that the model does not have, or converts in a way that has no way back
            (quantised, interleaved): they were copied.
        left_out: other copies of the weights (pickled, ONNX, ...), which were not copied: they are not pruned.
    """

    folder: Path
    masks: Masks
    unpruned: tuple[str, ...]
    left_out: tuple[str, ...]

    def notes(self) -> list[str]:
        """What a reader should know, in sentences."""
        lines = []
        if self.unpruned:
            lines.append(f"copied as they are, the model has no such parameter or converts them: {some(self.unpruned)}")
        if self.left_out:
            lines.append(f"left out, other copies of the weights: {some(self.left_out)}")
        return lines


@undisturbed
def prune_checkpoint(
    folder: str | Path,
    pruner: Pruner,
    out: str | Path,
    *,
    density: float | None = None,
    sparsity: float | None = None,
    example_input: Any = None,
    input_shape: str | None = None,
    scope: str | None = None,
    allocation: str | Mapping[str, float] = "uniform",
    schedule: str = "exponential",
    seed: int = 0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    budget: int = DEFAULT_BUDGET,
    progress: bool | None = None,
) -> PrunedCheckpoint:
    """Prunes a checkpoint that need not fit into memory. The input folder stays as it is.

    Shards of the same names, the masks (``masks.safetensors``), the other files of the folder and a marker with the
    checksums of all (``pathprune.json``) appear in ``out`` at once, when everything is written. Killed on the way, the
    same call goes on and gives the same bytes: shards that are written stay, and masks once found; scoring goes on with
    the round that was kept last (walks begin again). The input must not change meanwhile: that is checked, but a shard
    cut short while it is mapped ends the process.

    Args:
        folder: ``config.json`` and safetensors weights; see :class:`Checkpoint`.
        pruner: ``Magnitude()``, ``Wanda(data, by_blocks=True)``, ``PHEW()`` or a path method such as ``SynFlow()``.
            Methods that look at paths need a model that ``torch.export`` and the path rules can read; their memory is
            bounded for linear layers of few positions (``streamed`` in :mod:`weights`), others are written out.
        out: a folder that does not exist, is empty, or is the result of the same call.
        density, sparsity, scope, allocation, schedule, seed, include, exclude: as in ``prune``; one density.
        example_input: of methods that look at paths; None: ones of ``input_shape``.
        input_shape: such as ``1,3,224,224``; None: the size of an image that the configuration gives.
        budget: bytes of weights that may stay in memory between two uses.
        progress: bars on stderr; None: when it is a terminal.

    Returns:
        :class:`PrunedCheckpoint`.

    Raises:
        CheckpointError: a folder that is not whole or not of safetensors, an ``out`` that holds something else.
        ValueError: what ``prune`` refuses.
        OSError: the disk is full, ...; nothing appears in ``out``, the next attempt goes on.

    Determinism: the same folder and arguments give the same bytes.

    Example:
        >>> pp.prune_checkpoint("llama", pp.Magnitude(), "llama-half", density=0.5)
    """
    source, target = Path(folder).resolve(), Path(out).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise CheckpointError(f"out: wanted a folder apart from {source}, got {target}")
    if not isinstance(pruner, (Magnitude, Wanda, PHEW, PathPruner)):
        raise ValueError(
            f"prune_checkpoint: pruner: wanted Magnitude, Wanda, PHEW or a path method, got {pruner.name}, "
            "which holds more than one bit a weight in memory"
        )
    asked_for(density, sparsity, pruner.scope if scope is None else scope)
    checkpoint = Checkpoint(folder, budget)
    checkpoint.verify()
    arguments: dict[str, Any] = {
        "source": checkpoint.fingerprint(),
        "version": __version__,
        "method": {"name": pruner.name, **pruner.config()},
        "density": density,
        "sparsity": sparsity,
        "scope": pruner.scope if scope is None else scope,
        "allocation": allocation if isinstance(allocation, str) else dict(allocation),
        "schedule": schedule,
        "seed": seed,
        "input": _shapes(example_input) or input_shape,
        "data": _digest(getattr(pruner, "data", None)),
        "include": [include] if isinstance(include, str) else include and list(include),
        "exclude": [exclude] if isinstance(exclude, str) else list(exclude),
    }
    with RestartableFolder(target, arguments) as work:
        if work.finished:
            return _result(target, Masks.load(target / MASKS), verify(target)["findings"])
        opened = open_model(checkpoint)
        _check_space(opened, work)
        savepoints = Savepoints(work)
        if work.has(MASKS):
            masks = Masks.load(work.partial / MASKS)
        else:
            options: dict[str, Any] = {"density": density, "sparsity": sparsity, "scope": scope}
            options |= {"allocation": allocation, "schedule": schedule, "seed": seed, "progress": progress}
            options |= {"include": include, "exclude": exclude, "savepoints": savepoints}
            given = partial(_network, pruner=pruner, given=example_input, shape=input_shape)
            masks = _scored(Checkpoint(folder, budget), work, pruner, given, options)
            gc.collect()  # what was laid out takes room on the disk as long as a window on it is left
            masks.save(work.partial / MASKS)
            work.adopt(MASKS)
        savepoints.discard()
        work.discard(ASSEMBLED)
        _write_shards(opened, masks, work, progress)
        along, left_out = checkpoint.companions()
        for path in along:
            if not work.has(str(path)):
                work.copy(str(path), checkpoint.folder / path)
        notes = {"unpruned": opened.unclaimed, "left_out": [str(path) for path in left_out]}
        work.complete(notes)
    return _result(target, masks, notes)


def _scored(
    checkpoint: Checkpoint,
    work: RestartableFolder,
    pruner: Pruner,
    network: Callable[[CheckpointModel], PathNetwork],
    options: Mapping[str, Any],
) -> Masks:
    """The masks, of weights read where they lie; nothing that maps a file outlives it."""
    try:
        opened = open_model(checkpoint, partial(_laid_out, checkpoint, work))
        found = prune(network(opened), pruner, compact=False, **options)
        checkpoint.check_unchanged()
    except (TypeError, ValueError):  # the next attempt would fail as well, or is another one
        work.discard(*work.finished_files())
        raise
    assert isinstance(found, Masks)
    return _repeatable(found)


def _laid_out(checkpoint: Checkpoint, work: RestartableFolder, assemblies: Mapping[str, Assembly]) -> Shard:
    """A file beside the result with the parameters that are made of several tensors, as long as they are scored."""
    if not work.has(ASSEMBLED):
        work.write(ASSEMBLED, laid_out(checkpoint, assemblies))
    return Shard(work.partial / ASSEMBLED)


def _repeatable(masks: Masks) -> Masks:
    """The masks without what another run would find otherwise: seconds, memory."""
    passing = {"seconds", "seconds_per_round", "peak_memory_bytes"}
    findings = {key: value for key, value in masks.metadata["findings"].items() if key not in passing}
    return Masks.from_packed({name: masks.packed(name) for name in masks}, {**masks.metadata, "findings": findings})


def _result(folder: Path, masks: Masks, found: Mapping[str, Any]) -> PrunedCheckpoint:
    return PrunedCheckpoint(folder, masks, tuple(found["unpruned"]), tuple(found["left_out"]))


def _network(opened: CheckpointModel, *, pruner: Pruner, given: Any, shape: str | None) -> PathNetwork:
    """What the method looks at."""
    if pruner.needs_paths:
        return opened.paths(ones_of_shape(opened.model, shape) if given is None else given)
    return opened.layers(runs=isinstance(pruner, Wanda))


def _digest(data: Any) -> str | None:
    """A hash of batches, so that an unfinished run is not taken up with other data."""
    if data is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves([list(tree_leaves(batch)) for batch in data]):
        if isinstance(leaf, Tensor):
            digest.update(json.dumps([list(leaf.shape), str(leaf.dtype)]).encode())
            for _, piece in flat_pieces(leaf):
                digest.update(piece.reshape(-1).cpu().contiguous().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _shapes(given: Any) -> list[list[int]]:
    return [list(leaf.shape) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def _check_space(opened: CheckpointModel, work: RestartableFolder) -> None:
    """Refuses a disk on which the result has no room, or what is laid out for its making."""
    checkpoint = opened.checkpoint
    along, _ = checkpoint.companions()
    wanted = sum(shard.size for shard in checkpoint.shards.values())
    wanted += sum((checkpoint.folder / path).stat().st_size for path in along)
    wanted = max(wanted, size_of(checkpoint, opened.assemblies))  # removed before the shards are written
    there = sum(path.stat().st_size for path in work.partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(work.partial).free
    if wanted - there > free:
        raise OSError(f"out: {work.out}: wanted {wanted - there:,} bytes of free space, the disk has {free:,}")


def _write_shards(opened: CheckpointModel, masks: Masks, work: RestartableFolder, progress: bool | None) -> None:
    """Each shard with zeros in place of the removed weights; finished ones are kept."""
    checkpoint = opened.checkpoint
    uses: dict[str, list[tuple[Part, tuple[Tensor, torch.Size]]]] = {}  # of file tensors, by parameters
    for name in masks:
        for key in opened.keys.get(name, ()):
            uses[key] = [(Assembly.of(key, checkpoint.entry(key).shape).parts[0], masks.packed(name))]
        for part in opened.assemblies[name].parts if name in opened.assemblies else ():
            uses.setdefault(part.key, []).append((part, masks.packed(name)))
    checkpoint.used.release()
    total = sum(shard.size for shard in checkpoint.shards.values())
    with _Bar(total, progress) as advance:
        for file, shard in checkpoint.shards.items():
            if work.has(file):
                advance(shard.size)
                continue
            bits = {key: file_bits(shard.entries[key].shape, uses[key]) for key in shard.entries if key in uses}
            work.write(file, _counted(shard.pruned(bits), advance))


def _counted(chunks: Iterable[Any], advance: Any) -> Iterable[Any]:
    for chunk in chunks:
        yield chunk
        advance(len(chunk))


class _Bar:
    """A progress bar over bytes, if there is someone to see it."""

    def __init__(self, total: int, progress: bool | None) -> None:
        self._bar: Any = None
        if progress is not False:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            hidden = None if progress is None else False
            self._bar = tqdm(total=total, desc="shards", unit="B", unit_scale=True, disable=hidden)

    def __enter__(self) -> Any:
        return self._bar.update if self._bar is not None else lambda count: None

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
