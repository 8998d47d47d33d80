"""The rounds of a pruning that have been done, kept on disk so that whoever is killed goes on with the next.

A round depends on the masks before it, the weights and the plan: what is kept is one bit a weight and what each round
reports. It is kept while the next round's scores are there and before they are cut, when the masks of the last round
lie in memory as they are: no weight is read for it.

Bytes: one bit a weight, written and hashed, at most once a minute and for at most a hundredth of the time.
Oracle: the same pruning without interruption.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from ._mask_io import Layers, mask_chunks, unpack_mask
from .masks import Masks
from .pruners.base import Round
from .real import Real
from .restartable import RestartableFolder
from .weights import Weight

EVERY = 60.0  # seconds between two, at least
SHARE = 0.01  # of the time that keeping may take, once it is known how long it takes
_PREFIX = ".rounds-"  # no shard and no file that goes along has such a name


class Savepoints:
    """Rounds done, as files in a folder in the making; there is always one that is whole.

    Args:
        folder: entered; it vouches for arguments and checksums.

    Example:
        >>> with RestartableFolder("out", {"density": 0.5}) as folder:
        ...     masks = pp.prune(model, pp.SynFlow(), density=0.5, example_input=x, savepoints=Savepoints(folder))
    """

    def __init__(self, folder: RestartableFolder) -> None:
        self._folder = folder
        self._next = time.monotonic() + EVERY
        self._kept = 0  # rounds

    def _names(self) -> list[str]:
        return [name for name in self._folder.finished_files() if name.startswith(_PREFIX)]

    def take_up(self, weights: Mapping[str, Weight]) -> list[Round]:
        """Puts the masks kept last in place. Returns the rounds that made them; none if nothing is kept."""
        for name in sorted(self._names(), key=lambda name: int(name.removeprefix(_PREFIX)), reverse=True):
            if self._folder.has(name):
                masks = Masks.load(self._folder.partial / name)
                if all(key in weights and masks.packed(key)[1] == weights[key].shape for key in masks):
                    for key in masks:
                        _put(weights[key], masks.packed(key)[0])
                    self._kept = len(masks.metadata["rounds"])
                    return [_round(found) for found in masks.metadata["rounds"]]
        return []

    def is_due(self, rounds: int) -> bool:
        """Whether it is time to keep what so many rounds have made, and it is not kept already."""
        return rounds > self._kept and time.monotonic() >= self._next

    def keep(self, rounds: Sequence[Round], bits: Layers) -> None:
        """Keeps the masks that these rounds have made, in place of those kept before.

        Raises:
            OSError: the disk is full, ...; what was kept before stays.
        """
        began = time.monotonic()
        before, name = self._names(), f"{_PREFIX}{len(rounds)}"
        self._folder.write(name, mask_chunks(bits, {"rounds": [_record(done) for done in rounds]}))
        self._folder.discard(*(other for other in before if other != name))
        self._kept, ended = len(rounds), time.monotonic()
        self._next = ended + max(EVERY, (ended - began) / SHARE if SHARE else 0.0)

    def discard(self) -> None:
        """Removes what is kept: the masks are finished."""
        self._folder.discard(*self._names())


def _put(weight: Weight, bits: torch.Tensor) -> None:
    assert weight.dense is not None
    device = weight.dense.device
    if weight.columns % 16 == 0:  # words of rows are the bits as they are
        weight.set_words(bits.to(device).view(torch.int16).reshape(*weight.rows[:2], -1))
    else:
        weight.set_mask(unpack_mask(bits, weight.shape, device))


def _record(done: Round) -> list[object]:
    level = done.threshold
    return [
        done.kept,
        done.log2_total,
        None if level is None else [float(level.mantissa), int(level.exponent)],
        done.seconds,
        dict(done.details),
    ]


def _round(record: Sequence[object]) -> Round:
    kept, total, level, seconds, details = record
    return Round(kept, total, None if level is None else Real(*level), seconds, details)  # type: ignore[arg-type, misc]
