"""Pruning on several ranks: FSDP2 and DTensors on CPU processes over gloo. Cases are in ``rank_cases``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import rank_cases
from ranks import outcomes

NAMES = [case.__name__ for case in rank_cases.QUICK]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One start of the processes for all cases: it takes longer than most of them."""
    return outcomes(2, "rank_cases", NAMES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", NAMES)
def test_on_two_ranks(case: str, two_ranks: dict[str, str]) -> None:
    assert not two_ranks[case], two_ranks[case]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (3, rank_cases.QUICK),
        (2, rank_cases.SLOW),
        (3, rank_cases.SLOW),
        (4, [rank_cases.shards_that_are_replicated]),
        (3, [rank_cases.millions_of_weights]),
    ],
)
def test_on_more(world: int, cases: list[Callable[[Path], None]], tmp_path: Path) -> None:
    found = outcomes(world, "rank_cases", [case.__name__ for case in cases], tmp_path)
    assert not any(found.values()), "\n".join(found.values())
