"""Pruning on several ranks: FSDP2 and DTensors on CPU processes over gloo. Cases are in ``rank_cases`` and
``rank_flow_cases``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import rank_cases
import rank_flow_cases
from pathprune import _library
from ranks import outcomes

# Plain torch, in place of the compiled ops, adds rows in its own order.
QUICK = [*(rank_flow_cases.QUICK if _library.cpu_loaded else []), *rank_cases.QUICK]
SLOW = [*(rank_flow_cases.SLOW if _library.cpu_loaded else []), *rank_cases.SLOW]
MODULES = ["rank_flow_cases", "rank_cases"]
NAMES = [case.__name__ for case in QUICK]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One start of the processes for all cases: it takes longer than most of them."""
    return outcomes(2, MODULES, NAMES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", NAMES)
def test_on_two_ranks(case: str, two_ranks: dict[str, str]) -> None:
    assert not two_ranks[case], two_ranks[case]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (3, QUICK),
        (2, SLOW),
        (3, SLOW),
        (4, [rank_cases.shards_that_are_replicated]),
        (3, [rank_cases.millions_of_weights]),
    ],
)
def test_on_more(world: int, cases: list[Callable[[Path], None]], tmp_path: Path) -> None:
    found = outcomes(world, MODULES, [case.__name__ for case in cases], tmp_path)
    assert not any(found.values()), "\n".join(found.values())
