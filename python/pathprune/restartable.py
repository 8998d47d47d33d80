"""A folder that is made file by file, may be interrupted at any moment, and is there only when it is whole.

Files go into a hidden folder beside the one wanted, ``.NAME.partial``. A journal in it lists what is finished, with
checksums; a file counts when it has been written, synced, renamed and entered there, in this order. When all are
there the journal becomes the marker of a complete folder, and the hidden folder is renamed. Whoever is killed on the
way finds the finished files again, verified, by asking for the same folder with the same arguments.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ._mask_io import write_atomically
from .checkpoint import MARKER, file_facts
from .shards import PIECE_BYTES, CheckpointError


class RestartableFolder:
    """A folder in the making; a context manager that holds it against other processes.

    Args:
        out: the folder wanted; absent, empty, or finished with the same arguments.
        arguments: all that decides its contents, JSON-able.

    Attributes:
        finished: whether ``out`` was complete already.
        partial: where files are until all are there.

    Raises:
        CheckpointError: ``out`` holds something else; an unfinished run had other arguments; another process is at it.
        OSError: the disk is full, not writable, ...; what was finished stays for the next attempt.

    Example:
        >>> with RestartableFolder("out", {"density": 0.5}) as folder:
        ...     folder.write("config.json", [b"{}"])
        ...     folder.complete({"kept": 7})
    """

    def __init__(self, out: str | os.PathLike[str], arguments: Mapping[str, Any]) -> None:
        self.out = Path(os.path.abspath(out))
        self.partial = self.out.with_name(f".{self.out.name}.partial")
        self.arguments = json.loads(json.dumps(arguments))
        self.finished = self._is_finished()
        self._files: dict[str, dict[str, Any]] = {}
        self._held: int | None = None

    def _is_finished(self) -> bool:
        if not self.out.exists():
            return False
        if not self.out.is_dir():
            raise CheckpointError(f"out: wanted a folder, got the file {self.out}")
        if not any(self.out.iterdir()):
            return False
        marker = _read(self.out / MARKER)
        if marker is None or not marker.get("complete"):
            raise CheckpointError(f"out: {self.out} is not empty, and not a pruned checkpoint")
        if marker.get("arguments") != self.arguments:
            raise CheckpointError(f"out: {self.out} holds a checkpoint pruned otherwise: {self._others(marker)}")
        return True

    def _others(self, marker: Mapping[str, Any]) -> str:
        before = marker.get("arguments")
        before = before if isinstance(before, dict) else {}
        names = [name for name in {**before, **self.arguments} if before.get(name) != self.arguments.get(name)]
        return ", ".join(f"{name} was {before.get(name)!r}, now {self.arguments.get(name)!r}" for name in names)

    def __enter__(self) -> RestartableFolder:
        if self.finished:
            return self
        self.partial.mkdir(parents=True, exist_ok=True)
        self._held = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._take_up()
        except BaseException as error:
            os.close(self._held)
            self._held = None
            if isinstance(error, BlockingIOError):
                raise CheckpointError(f"out: another process is writing {self.out}") from None
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._held is None:
            return
        if not self.finished and not self._files:  # nothing that the next attempt could use
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._held)  # and with it the lock
        self._held = None

    def _take_up(self) -> None:
        """Finds what an earlier attempt has finished, and clears away what it has not."""
        journal = _read(self.partial / MARKER)
        files = journal.get("files") if journal is not None else {}
        if journal is not None and files and journal.get("arguments") != self.arguments:
            raise CheckpointError(
                f"out: {self.partial} is left of a run with other arguments ({self._others(journal)}); "
                "repeat that run, or remove the folder"
            )
        self._files = dict(files) if isinstance(files, dict) else {}
        known = {MARKER, *self._files}
        for parent, _, names in os.walk(self.partial):
            for name in names:
                path = Path(parent) / name
                if str(path.relative_to(self.partial)) not in known:
                    path.unlink()
        self._note()

    def finished_files(self) -> list[str]:
        """Names of the files that are finished, or were once."""
        return sorted(self._files)

    def has(self, name: str) -> bool:
        """Whether a file is finished; reads it to compare its checksum."""
        path = self.partial / name
        return name in self._files and path.is_file() and file_facts(path) == self._files[name]

    def write(self, name: str, chunks: Iterable[Any]) -> None:
        """Makes a file of chunks, objects with the buffer interface, and enters it in the journal."""
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {}
        write_atomically(path, _hashed(chunks, facts))
        self._files[name] = facts
        self._note()

    def discard(self, *names: str) -> None:
        """Removes finished files that are not to be in the folder."""
        known = [name for name in names if self._files.pop(name, None) is not None]
        if known:
            self._note()
        for name in known:
            (self.partial / name).unlink(missing_ok=True)

    def copy(self, name: str, source: Path) -> None:
        """Makes a file that is a copy of another."""
        with open(source, "rb", buffering=0) as file:
            self.write(name, iter(lambda: file.read(PIECE_BYTES), b""))

    def adopt(self, name: str) -> None:
        """Enters a file that is already in ``partial``, written and synced by its own means."""
        self._files[name] = file_facts(self.partial / name)
        self._note()

    def _note(self, **more: Any) -> None:
        journal = {"format": "pathprune.checkpoint", "arguments": self.arguments, "files": self._files, **more}
        write_atomically(self.partial / MARKER, [json.dumps(journal, indent=1, sort_keys=True).encode()])

    def complete(self, findings: Mapping[str, Any]) -> None:
        """Marks the folder complete and puts it in its place, all at once."""
        self._note(complete=True, findings=findings)
        os.replace(self.partial, self.out)
        self.finished = True
        with contextlib.suppress(OSError):
            descriptor = os.open(self.out.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _hashed(chunks: Iterable[Any], facts: dict[str, Any]) -> Iterator[Any]:
    """The chunks; when they are through, ``facts`` are those of the file they make."""
    digest = hashlib.sha256()
    size = 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        yield chunk
    facts.update(bytes=size, sha256=digest.hexdigest())


def _read(path: Path) -> dict[str, Any] | None:
    """A journal or marker; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
