"""Scores of many networks, one line each: what a row is, and a file that an interrupted run goes on from.

The file is JSON lines. The first says how the scores were made, each other one is a network: ``{"name": ..., "synflow":
71.3, "flags": []}``. Numbers that JSON has none for are null; the flags say which. A row is one write, so a run that is
killed leaves at most one incomplete line at the end, and that is cut off when the file is opened again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing keeps two runs apart there
    fcntl = None  # type: ignore[assignment]

FORMAT = "pathprune scores 1"
Columns = Mapping[str, bool]
"""Method -> whether its score is a logarithm, of which -inf stands for 0."""
FLAGS = ("disconnected", "zero_score", "non_finite")


@dataclass(frozen=True)
class NetworkScore:
    """A network in the table.

    Attributes:
        name: what it was given as, or its position.
        scores: method -> score; of path methods log2 of a sum over paths, -inf where that is 0.
        flags: ``disconnected`` (no path of non-zero weights from an input to an output), ``zero_score`` (a score is 0),
            ``non_finite`` (a weight, a loss or a score is NaN or infinite).
    """

    name: str
    scores: Mapping[str, float]
    flags: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, scores: Mapping[str, float], columns: Columns, disconnected: bool) -> NetworkScore:
        """With the flags its scores earn."""
        zeros = {method: -math.inf if columns[method] else 0.0 for method in scores}
        zero = any(value == zeros[method] for method, value in scores.items())
        broken = any(not math.isfinite(value) and value != zeros[method] for method, value in scores.items())
        raised = (disconnected, zero, broken)
        return cls(name, dict(scores), tuple(flag for flag, up in zip(FLAGS, raised, strict=True) if up))

    @classmethod
    def broken(cls, name: str, columns: Columns) -> NetworkScore:
        """A network that has no scores because something in it is not finite."""
        return cls(name, dict.fromkeys(columns, math.nan), ("non_finite",))

    def line(self) -> str:
        """As JSON, without the line's end."""
        finite = {method: value if math.isfinite(value) else None for method, value in self.scores.items()}
        return json.dumps({"name": self.name, **finite, "flags": list(self.flags)})

    @classmethod
    def parse(cls, row: Mapping[str, Any], columns: Columns) -> NetworkScore:
        """A row of the file. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
        if set(row) != {"name", "flags", *columns} or not set(row["flags"]) <= set(FLAGS):
            raise ValueError("other fields")
        flags = tuple(row["flags"])
        zero = "zero_score" in flags

        def number(method: str) -> float:
            if row[method] is not None:
                return float(row[method])
            return -math.inf if columns[method] and zero else math.nan

        return cls(str(row["name"]), {method: number(method) for method in columns}, flags)


class ScoreFile:
    """A file of scores, open for more.

    Args:
        path: made if it is not there; its folder has to be.
        columns: methods, in order.
        settings: of JSON's types: what else the scores depend on.

    Attributes:
        rows: name -> what was there when it was opened.

    Raises:
        ValueError: the file is of other methods or settings, is no such file, or another run is writing to it. It stays
            as it was.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Columns, settings: Mapping[str, Any]) -> None:
        self.path, self.columns = Path(path), columns
        self.rows: dict[str, NetworkScore] = {}
        header = {"format": FORMAT, "methods": list(columns), "settings": dict(settings)}
        self._file: IO[bytes] = open(self.path, "a+b")  # noqa: SIM115
        try:
            self._lock()
            self._file.seek(0)
            content = self._file.read()
            whole = content.rfind(b"\n") + 1
            if whole:
                self._read(content[:whole].decode(errors="replace").splitlines(), header)
                self._file.truncate(whole)
            elif content and not (json.dumps(header) + "\n").encode().startswith(content):
                raise ValueError(f"results: {self.path}: wanted a file of scores, got another")
            else:
                self._file.truncate(0)
                self._write(json.dumps(header))
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"results: {self.path}: another run is writing to it") from None

    def _read(self, lines: list[str], header: Mapping[str, Any]) -> None:
        columns = self.columns
        try:
            found = json.loads(lines[0])
            known = found["format"] == FORMAT
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise ValueError(f"results: {self.path}: wanted a file of scores, got another")
        for key in ("methods", "settings"):
            if found.get(key) != json.loads(json.dumps(header[key])):
                raise ValueError(f"results: {self.path}: wanted {key} {header[key]}, got {found.get(key)}")
        for number, line in enumerate(lines[1:], 2):
            try:
                row = NetworkScore.parse(json.loads(line), columns)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"results: {self.path}: line {number}: wanted a network's scores") from None
            self.rows[row.name] = row

    def _write(self, line: str) -> None:
        self._file.write(f"{line}\n".encode())
        self._file.flush()

    def append(self, row: NetworkScore) -> None:
        """Adds a network. It is not kept in memory."""
        self._write(row.line())

    def close(self) -> None:
        self._file.close()
