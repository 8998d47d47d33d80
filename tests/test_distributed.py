"""Pruning on several ranks: FSDP2 and DTensors on CPU processes over gloo. Cases are in ``rank_cases``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import rank_cases
from ranks import outcomes

NAMES = [case.__name__ for case in rank_cases.QUICK]


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Rows that do not divide by three, and ranks with none."""
    return outcomes(3, "rank_cases", NAMES, tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize("case", NAMES)
def test_on_three_ranks(case: str, three_ranks: dict[str, str]) -> None:
    assert not three_ranks[case], three_ranks[case]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, rank_cases.QUICK),
        (2, rank_cases.SLOW),
        (3, rank_cases.SLOW),
        (4, [rank_cases.shards_that_are_replicated]),
        (3, [rank_cases.millions_of_weights]),
    ],
)
def test_on_more(world: int, cases: list[Callable[[Path], None]], tmp_path: Path) -> None:
    found = outcomes(world, "rank_cases", [case.__name__ for case in cases], tmp_path)
    assert not any(found.values()), "\n".join(found.values())
