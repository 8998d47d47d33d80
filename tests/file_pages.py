"""How many pages of files this process has in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pathprune.residency import Residency

STATUS = Path("/proc/self/status")


def mapped() -> int:
    """Bytes of file pages that are mapped; skips the test where the system does not tell."""
    if not STATUS.exists():
        pytest.skip("needs /proc")
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields["RssFile"].split()[0]) << 10


def mapped_at_reads(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> list[int]:
    """Bytes beyond what is mapped before the work, each time a weight has been read."""
    before, seen, call = mapped(), [], Residency.__call__

    def watched(self: Residency, name: str) -> None:
        seen.append(mapped() - before)
        call(self, name)

    monkeypatch.setattr(Residency, "__call__", watched)
    work()
    return seen
