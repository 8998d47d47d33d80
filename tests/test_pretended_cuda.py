"""The Python above the kernels, run as on a GPU (pretended_cuda.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import test_on_cuda
from pretended_cuda import GPU, pretended_cuda

TESTS = Path(__file__).parent


def test_what_a_gpu_refuses_is_refused() -> None:
    with pretended_cuda():
        here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
        assert there.device == GPU
        for mixed in (lambda: here + there, lambda: torch.stack([here, there]), lambda: there[0] * here):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_what_a_gpu_does_is_done() -> None:
    with pretended_cuda():
        there = torch.arange(3.0).cuda()
        there[1:] = 5
        assert (there * torch.tensor(2.0)).tolist() == [0, 10, 10]
        assert torch.equal(there[torch.tensor([2, 0])].cpu(), torch.tensor([5.0, 0.0]))
        model = torch.nn.Linear(3, 2).to("cuda")
        model(there).sum().backward()
        assert model.weight.grad is not None
        assert model.weight.grad.device == there.device == GPU
        assert torch.equal(model.weight.grad.cpu(), there.cpu().expand(2, 3))


@pytest.mark.parametrize("name", ["ntk_bound", "masked_convergence", "sparse"])
def test_findings(name: str) -> None:
    with pretended_cuda():
        test_on_cuda.test_it_finds_the_same(name)


@pytest.mark.parametrize("name", ["synflow", "phew_flow", "px"])
def test_pruners(name: str) -> None:
    with pretended_cuda():
        test_on_cuda.test_a_pruner_finds_the_same(name)


@pytest.mark.slow
def test_all_of_it() -> None:
    environment = {**os.environ, "PATHPRUNE_PRETEND_CUDA": "1", "PATHPRUNE_REQUIRE_CUDA": "0"}
    files = [str(TESTS / name) for name in ("test_on_cuda.py", "test_walks.py", "test_tiled_products.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
