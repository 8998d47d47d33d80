"""Wrong things a new user types, and what is said. Nothing is changed or written by any of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pathprune as pp

MODEL = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
X = torch.ones(1, 6)
MASKS = pp.Masks.ones(MODEL)


def prune(pruner: Any = None, **changes: Any) -> Any:
    given = {"density": 0.5, "example_input": X, "progress": False, **changes}
    return pp.prune(MODEL, pp.SynFlow(rounds=2) if pruner is None else pruner, **given)


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (lambda: prune(pp.SynFlow), TypeError, "prune: pruner: wanted .*, got SynFlow, the class: write SynFlow()"),
        (lambda: prune("synflow"), TypeError, "prune: pruner: wanted a pruner such as SynFlow(), got str 'synflow'"),
        (lambda: prune(density="10%"), TypeError, "prune: density: wanted a number or a list of numbers, got '10%'"),
        (lambda: prune(density=torch.ones(3)), TypeError, "prune: density: wanted a number or a list of numbers"),
        (lambda: prune(density=None, sparsity=["a"]), TypeError, "prune: sparsity: wanted a number or a list"),
        (lambda: prune(seed="a"), TypeError, "prune: seed: wanted an int, got 'a'"),
        (lambda: pp.scores(MODEL, pp.SynFlow(), example_input=X, seed=None), TypeError, "scores: seed: wanted an int"),
        (lambda: pp.gradient_moments(MODEL, [X], "mse"), TypeError, "loss: wanted a function of .*, got 'mse'"),
        (lambda: prune(scope=["layer"]), TypeError, "scope: wanted 'global', 'layer', .*, got ['layer']"),
        (lambda: prune(example_input=None), ValueError, "example_input: wanted an input the model accepts, got None"),
        (lambda: pp.PathKernel(MODEL), ValueError, "example_input: wanted an input the model accepts, got None"),
        (lambda: pp.SynFlow(rounds="100"), TypeError, "SynFlow: rounds: wanted an int, got '100'"),
        (lambda: pp.NTKSAP(rounds=2.5), TypeError, "NTKSAP: rounds: wanted an int, got 2.5"),
        (lambda: pp.Sketch("snip"), TypeError, "Sketch: base: wanted a pruner such as SynFlow(), got str 'snip'"),
        (
            lambda: pp.scores(MODEL, "snip", example_input=X),
            TypeError,
            "scores: method: wanted .*, got str 'snip'",
        ),
        (lambda: pp.sparsify(MODEL, "m.safetensors"), TypeError, "sparsify: masks: wanted Masks or .*, got str"),
        (lambda: pp.compare(MODEL, MASKS, X), TypeError, "compare: masks: wanted several, .*, got one Masks"),
    ],
)
def test_what_is_said(act: Callable[[], object], error: type[Exception], says: str) -> None:
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    pattern = ".*".join(map(_plain, says.split(".*")))
    with pytest.raises(error, match=pattern):
        act()
    assert all(map(torch.equal, before.values(), MODEL.state_dict().values()))
    assert MODEL.training


def _plain(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "()[]." else letter for letter in text)


def test_a_density_of_another_library_is_a_number() -> None:
    masks = prune(density=torch.tensor(0.5))
    assert masks.metadata["config"]["density"] == 0.5
    assert masks == prune(density=0.5)
    assert prune(density=[torch.tensor(0.5)])[0] == masks


@pytest.mark.parametrize("pruner", [pp.Random(), pp.PHEW(), pp.Hutchinson([(X, torch.tensor([1]))])])
def test_a_seed_of_another_library_is_a_number_of_64_bits(pruner: pp.Pruner) -> None:
    for seed in (7, -1, 2**63 - 1, -(2**63)):
        masks = prune(pruner, seed=seed)
        assert masks.metadata["seed"] == seed
        assert masks == prune(pruner, seed=np.int64(seed)) == prune(pruner, seed=torch.tensor(seed))
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"prune: seed: wanted an int in \[-2\^63, 2\^63\), got"):
            prune(pruner, seed=seed)


@pytest.mark.parametrize("pruner", [pp.Magnitude(), pp.Random(), pp.Inverted(pp.Magnitude())])
def test_what_scores_alike_in_every_round_goes_to_several_densities_at_once(pruner: pp.Pruner) -> None:
    densities = [0.5, 0.25, 0.1]
    assert prune(pruner, density=densities) == [prune(pruner, density=density) for density in densities]
    assert prune(pruner, density=tuple(densities), scope="layer")[-1] == prune(pruner, density=0.1, scope="layer")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such folder: '.*missing'"):
        MASKS.save(tmp_path / "missing" / "masks.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_bad_pruners() -> None:
    for make in (
        lambda: pp.SynFlow(rounds=0),
        lambda: pp.SynFlowL2(variant="other"),
        lambda: pp.SynFlow(policy="mine"),
        lambda: pp.SynFlowDist([]),
        lambda: pp.Sketch(pp.SynFlow(), temperature=0.0),
        lambda: prune(pp.SynFlowDist(-torch.ones(6))),
        lambda: prune(pp.SynFlowDist(torch.ones(5))),
        lambda: prune(pp.SynFlow(rounds=2), density=[0.5, 0.4, 0.3]),
    ):
        with pytest.raises(ValueError, match="wanted"):
            make()
    with pytest.raises(ValueError, match="example_input"):
        prune(example_input=None)
