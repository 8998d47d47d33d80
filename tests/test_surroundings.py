"""What surrounds a call, torch's modes and other threads, changes no result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

import pathprune as pp
from pathprune.surroundings import device_of_caller, undisturbed
from pathprune.walks import spread

X = torch.ones(1, 1, 8, 8)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(36, 5)),
    ).eval()


MODEL = model()
BATCHES = [(torch.rand(4, 1, 8, 8), torch.arange(4))] * 2
MASKS = pp.prune(MODEL, pp.Magnitude(), density=0.4)
NETWORK = pp.PathNetwork.from_module(MODEL, X)


def masks_of(pruner: pp.Pruner) -> Callable[[], Any]:
    return lambda: pp.prune(MODEL, pruner, density=0.3, example_input=X)


CALLS: dict[str, Callable[[], Any]] = {
    "SynFlow": masks_of(pp.SynFlow(rounds=3)),
    "PHEW": masks_of(pp.PHEW()),
    "PX": masks_of(pp.PX(BATCHES, rounds=2)),
    "SNIP": masks_of(pp.SNIP(BATCHES)),
    "Fisher": masks_of(pp.Fisher(BATCHES)),
    "Wanda": masks_of(pp.Wanda(BATCHES)),
    "scores": lambda: pp.scores(MODEL, pp.SynFlow(), example_input=X).log2_R,
    "path counts": lambda: pp.path_counts(MODEL, MASKS, X).log2,
    "path kernel": lambda: (k := pp.PathKernel(MODEL, X, MASKS)) and (k.trace(), k.rank(), k.quadratic_form()),
    "tangent kernel": lambda: pp.ntk_trace(NETWORK, [BATCHES[0][0]]),
    "paths": lambda: pp.sample_paths(NETWORK, 5, seed=0).weights.tolist(),
    "many": lambda: [row.scores for row in pp.score_many([MODEL], ["synflow", "snip"], example_input=X, data=BATCHES)],
    "cells": lambda: [row.scores for row in pp.score_space(pp.CellSpace(), architectures=[pp.CellSpace()[7]])],
    "edge of chaos": lambda: pp.edge_of_chaos("tanh", 0.2),
}
WANTED = {name: call() for name, call in CALLS.items()}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_a_mode_around_a_call_changes_nothing(call: str, mode: str) -> None:
    with MODES[mode]():
        before = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        assert CALLS[call]() == WANTED[call]
        assert before == (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))


@pytest.mark.parametrize("call", CALLS)
def test_a_default_device_changes_nothing(call: str) -> None:
    with torch.device("meta"):
        assert CALLS[call]() == WANTED[call]
        assert torch.empty(()).is_meta


def test_the_callers_own_code_sees_the_callers_device() -> None:
    @undisturbed
    def run() -> tuple[bool, bool]:
        with device_of_caller():
            inner = torch.empty(()).is_meta
        return torch.empty(()).is_meta, inner

    assert run() == (False, False)
    with torch.device("meta"):
        assert run() == (False, True)


def test_steps_of_a_generator_leave_the_caller_its_mode() -> None:
    @undisturbed
    def steps() -> Any:
        for _ in range(2):
            yield torch.is_inference_mode_enabled()

    with torch.inference_mode():
        for inside in steps():
            assert not inside
            assert torch.is_inference_mode_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    calls = {name: CALLS[name] for name in ("SynFlow", "PHEW", "path kernel", "tangent kernel", "paths", "SNIP")}
    try:
        torch.set_default_dtype(dtype)
        found = {name: call() for name, call in calls.items()}
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == {name: WANTED[name] for name in calls}


@pytest.mark.parametrize("count", [1, 5, 1024, 2**24 + 4, 4096 * 11008, 2**40 + 1])
def test_places_are_spread_from_end_to_end(count: int) -> None:
    places = spread(count)
    assert (int(places[0]), int(places[-1])) == (0, count - 1)
    assert bool((places[1:] >= places[:-1]).all())


def test_threads_prune_at_once() -> None:
    """torch.export keeps its state in globals, and its own tensors in the modules that it runs."""
    found: list[Any] = []

    def work() -> None:
        for _ in range(4):
            try:
                found.append(CALLS["SynFlow"]())
            except Exception as error:  # to be shown by the assertion
                found.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [WANTED["SynFlow"]] * 16
