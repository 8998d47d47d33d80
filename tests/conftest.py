"""What all tests share: devices."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

# Small tensors on two busy cores spend their time in barriers; tests that are about threads set their own number.
torch.set_num_threads(1)

REQUIRE_CUDA = os.environ.get("PATHPRUNE_REQUIRE_CUDA") == "1"
_LOST: dict[str, Exception] = {}  # by test: how it lost the GPU
PRETEND_CUDA = os.environ.get("PATHPRUNE_PRETEND_CUDA") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked `cuda` skips where there is no GPU; PATHPRUNE_REQUIRE_CUDA=1 makes that a failure."""
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available() or PRETEND_CUDA:
        return
    if REQUIRE_CUDA:
        pytest.fail("PATHPRUNE_REQUIRE_CUDA=1, but torch sees no GPU", pytrace=False)
    pytest.skip("no GPU")


def _lost_gpu() -> Exception | None:
    """What a kernel did that its launch could not say; after it nothing of CUDA works in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return error
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A kernel's fault belongs to the test that launched it."""
    try:
        return (yield)
    finally:
        if item.get_closest_marker("cuda") is not None and not PRETEND_CUDA:
            error = _lost_gpu()
            if error is not None:
                _LOST[item.nodeid] = error
                raise error


def pytest_runtest_logfinish(nodeid: str) -> None:
    """A process whose GPU is lost ends: pytest-xdist goes on with another, and else no later test could pass."""
    if nodeid in _LOST:
        print(f"the GPU is lost to this process after {nodeid}: {_LOST[nodeid]}", file=sys.stderr, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit("a kernel's fault has taken the GPU from this process", returncode=1)


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
