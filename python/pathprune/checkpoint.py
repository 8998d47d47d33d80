"""A Hugging Face folder: ``config.json`` and weights in one or more safetensors files. Nothing is unpickled.

What the index says is checked against the files: every name where it should be, nothing besides, the total size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .residency import DEFAULT_BUDGET, Residency
from .shards import PIECE_BYTES, CheckpointError, Entry, Shard

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MARKER = "pathprune.json"  # in a folder that pruning has completed: what was done, and the checksum of every file
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_WEIGHTS = (*PICKLED, ".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite")
_OTHER_INDICES = ("pytorch_model.bin.index.json", "tf_model.h5.index.json", "flax_model.msgpack.index.json", INDEX)


class Checkpoint:
    """The tensors of a folder, as windows on its files.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        budget: bytes of weights that may stay in memory between two uses.

    Attributes:
        shards: file name -> :class:`Shard`, in order of name.
        where: tensor name -> file name.
        used: tells that a weight has been read, by its tensor name; see :class:`Residency`.

    Raises:
        CheckpointError: no such files, pickled weights alone, an index that lies, a damaged shard.
        OSError: a file cannot be opened.

    Example:
        >>> checkpoint = Checkpoint("llama")
        >>> checkpoint.tensor("lm_head.weight").dtype
        torch.bfloat16
    """

    def __init__(self, folder: str | os.PathLike[str], budget: int = DEFAULT_BUDGET) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"checkpoint: wanted a folder, got '{self.folder}'")
        self.config = _read_json(self.folder / CONFIG)
        self.index: dict[str, Any] | None = None
        if (self.folder / SINGLE).is_file():
            names = [SINGLE]
        elif (self.folder / INDEX).is_file():
            self.index = _read_json(self.folder / INDEX)
            names = _shard_names(self.folder, self.index)
        else:
            raise CheckpointError(_none_found(self.folder))
        self.shards = {name: Shard(self.folder / name) for name in names}
        self.where: dict[str, str] = {}
        for file, shard in self.shards.items():
            for name in shard.entries:
                if name in self.where:
                    raise CheckpointError(f"{self.folder}: '{name}' is in both {self.where[name]} and {file}")
                self.where[name] = file
        if self.index is not None:
            _check_index(self.folder / INDEX, self.index, self.where, self.shards)
        self.used = Residency({name: self.shards[file].window(name) for name, file in self.where.items()}, budget)

    def entry(self, name: str) -> Entry:
        """Where a tensor lies and what it is."""
        return self.shards[self.where[name]].entries[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor as a window on its file; see :meth:`Shard.tensor`."""
        return self.shards[self.where[name]].tensor(name)

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a shard is no longer the file that was opened."""
        for shard in self.shards.values():
            shard.check_unchanged()

    def fingerprint(self) -> str:
        """A hash of the configuration, and of each shard's name, size, time of change and header."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for name, shard in self.shards.items():
            state = os.stat(shard.path)
            digest.update(json.dumps([name, state.st_size, state.st_mtime_ns]).encode())
            digest.update(shard.header)
        return digest.hexdigest()

    def companions(self) -> tuple[list[Path], list[Path]]:
        """The folder's other files: those to go along with pruned weights, and other copies of dense weights.

        Hidden files and folders, and the marks of an earlier pruning, are in neither.
        """
        along: list[Path] = []
        weights: list[Path] = []
        for parent, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = (Path(parent) / name).relative_to(self.folder)
                ours = path.parent == Path(".") and (name in self.shards or (name == INDEX and self.index is not None))
                if ours or name.startswith(".") or str(path) in (MARKER, MASKS):
                    continue
                dense = name.endswith(_OTHER_WEIGHTS) or name in _OTHER_INDICES
                (weights if dense else along).append(path)
        if self.index is not None:
            along.append(Path(INDEX))
        return along, weights

    def verify(self) -> None:
        """Checks a folder that pruning has made against the checksums in its marker; others have none to check.

        Raises:
            CheckpointError: a file is missing or altered.
        """
        if (self.folder / MARKER).is_file():
            verify(self.folder)


MASKS = "masks.safetensors"


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads every file of a folder that pruning has completed, and compares checksums.

    Returns:
        The marker: ``files`` (name -> size and sha256), ``arguments`` and ``findings``.

    Raises:
        CheckpointError: no marker, a file that is missing, or one whose contents are others.
    """
    folder = Path(folder)
    marker = _read_json(folder / MARKER)
    files = marker.get("files")
    if not isinstance(files, dict) or not marker.get("complete"):
        raise CheckpointError(f"{folder / MARKER}: wanted the checksums of a complete folder, got none")
    for name, wanted in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if file_facts(folder / name) != wanted:
            raise CheckpointError(f"{folder / name}: altered or damaged: the checksum is not that of the contents")
    return marker


def file_facts(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file: the checksum that model hubs list."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: wanted a file {path.name}, got none") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got {type(found).__name__}")
    return found


def _shard_names(folder: Path, index: Mapping[str, Any]) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: wanted a weight_map from tensor to file name, got none")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: wanted names of safetensors files in the folder, got '{name}'")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the index names the shard {name}, which is missing")
    if not names:
        raise CheckpointError(f"{folder / INDEX}: its weight_map is empty")
    return names


def _check_index(path: Path, index: Mapping[str, Any], where: Mapping[str, str], shards: Mapping[str, Shard]) -> None:
    claimed: dict[str, str] = index["weight_map"]
    for name, file in claimed.items():
        if where.get(name) != file:
            found = f"it is in {where[name]}" if name in where else "it is in none"
            raise CheckpointError(f"{path}: '{name}' should be in {file}; {found}")
    unlisted = [name for name in where if name not in claimed]
    if unlisted:
        raise CheckpointError(f"{path}: the shards have tensors that it does not list: {some(unlisted)}")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(entry.end - entry.begin for shard in shards.values() for entry in shard.entries.values())
    if total is not None and total != size:
        raise CheckpointError(f"{path}: its total_size is {total}, the tensors have {size} bytes")


def _none_found(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return f"{folder}: its weights are pickled ({some(pickled)}), which are never loaded: save them as safetensors"
    return f"{folder}: wanted {SINGLE} or {INDEX}, got neither"


def some(names: Iterable[str]) -> str:
    """The first names, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more
