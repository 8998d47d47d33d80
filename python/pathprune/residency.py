"""How much of the mapped weights is in memory: those used last, up to a budget, and the next ones on their way.

Weights that are windows on files (:mod:`pathprune.shards`) come into memory when they are read. After each use the
ones used longest ago are let go until the rest fits the budget. Sweeps repeat themselves, so what followed a use last
time is asked for ahead of its use.

Bytes: at most the budget, or the weight in use where that is larger; what is let go stays in the system's file cache
as long as it has room, so a small budget costs page faults, not reads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

DEFAULT_BUDGET = 64 << 20


@dataclass(frozen=True)
class Window:
    """One mapped tensor: its size in bytes, how to let it go and how to ask for it."""

    size: int
    drop: Callable[[], None]
    prefetch: Callable[[], None]


class Residency:
    """Bounds the memory behind windows; call it with a name when that weight has been read.

    Args:
        windows: name -> window; other names are ignored.
        budget: bytes that may stay.

    Raises:
        ValueError: a negative budget.

    Example:
        >>> used = Residency(windows, budget=64 << 20)
        >>> used("layers.0.weight")
    """

    def __init__(self, windows: Mapping[str, Window], budget: int = DEFAULT_BUDGET) -> None:
        if budget < 0:
            raise ValueError(f"Residency: budget: wanted at least 0 bytes, got {budget}")
        self._windows, self.budget = dict(windows), budget
        self._resident: OrderedDict[str, int] = OrderedDict()  # the one used longest ago first
        self.held = 0  # bytes
        self._followed: dict[tuple[str, str], str] = {}  # the last two uses -> the next one, last time
        self._last: tuple[str, str] = ("", "")

    def __call__(self, name: str) -> None:
        """``name`` has been read; what no longer fits is let go, the probable next one is asked for."""
        if name not in self._windows:
            return
        self.held += self._windows[name].size - self._resident.pop(name, 0)
        self._resident[name] = self._windows[name].size
        while self.held > self.budget and self._resident:
            oldest, size = self._resident.popitem(last=False)
            self._windows[oldest].drop()
            self.held -= size
        self._ask_ahead(name)

    def watch(self, name: str, window: Window) -> None:
        """One window more, under the same budget."""
        self._windows[name] = window

    def _ask_ahead(self, name: str) -> None:
        if name == self._last[1]:
            return
        self._followed[self._last] = name
        self._last = (self._last[1], name)
        following = self._followed.get(self._last)
        if following is not None and following not in self._resident:
            self._windows[following].prefetch()

    def release(self) -> None:
        """Lets go of everything."""
        for window in self._windows.values():
            window.drop()
        self._resident.clear()
        self.held = 0
