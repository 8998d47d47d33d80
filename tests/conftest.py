"""What all tests share: devices."""

from __future__ import annotations

import os

import pytest
import torch

# Small tensors on two busy cores spend their time in barriers; tests that are about threads set their own number.
torch.set_num_threads(1)

REQUIRE_CUDA = os.environ.get("PATHPRUNE_REQUIRE_CUDA") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `cuda` skips where there is no GPU; PATHPRUNE_REQUIRE_CUDA=1 makes that a failure."""
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if REQUIRE_CUDA:
        pytest.fail("PATHPRUNE_REQUIRE_CUDA=1, but torch sees no GPU", pytrace=False)
    pytest.skip("no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device in turn."""
    return torch.device(request.param)
