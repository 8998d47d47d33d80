"""What all tests share: devices."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Small tensors on two busy cores spend their time in barriers; tests that are about threads set their own number.
torch.set_num_threads(1)

REQUIRE_CUDA = os.environ.get("PATHPRUNE_REQUIRE_CUDA") == "1"
PRETEND_CUDA = os.environ.get("PATHPRUNE_PRETEND_CUDA") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `cuda` skips where there is no GPU; PATHPRUNE_REQUIRE_CUDA=1 makes that a failure."""
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available() or PRETEND_CUDA:
        return
    if REQUIRE_CUDA:
        pytest.fail("PATHPRUNE_REQUIRE_CUDA=1, but torch sees no GPU", pytrace=False)
    pytest.skip("no GPU")


@pytest.fixture(autouse=PRETEND_CUDA)
def pretended(request: pytest.FixtureRequest) -> Iterator[None]:
    """PATHPRUNE_PRETEND_CUDA=1: a test marked `cuda` runs on a GPU that is pretended (pretended_cuda.py)."""
    if request.node.get_closest_marker("cuda") is None:
        yield
        return
    from pretended_cuda import pretended_cuda

    with pretended_cuda():
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device in turn."""
    return torch.device(request.param)
