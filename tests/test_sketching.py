"""Sampling selection: exact inclusion probabilities on few items, the estimator's mean and variance."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import pathprune as pp
from pathprune.pruners import sample_with_replacement


def inclusion(p, size):
    """Probability that each item is among the first ``size`` drawn one after another without replacement."""
    chance = [0.0] * len(p)
    for order in itertools.permutations(range(len(p)), size):
        left, probability = 1.0, 1.0
        for item in order:
            probability *= p[item] / left
            left -= p[item]
        for item in order:
            chance[item] += probability
    return torch.tensor(chance)


def layer(values):
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def frequencies(pruner, values, keep, draws):
    model, x = layer(values), torch.ones(1, len(values))
    network = pp.PathNetwork.from_module(model, x)
    found = torch.zeros(len(values))
    for seed in range(draws):
        found += pp.prune(network, pruner, density=keep / len(values), seed=seed, progress=False)["weight"][0]
    return found / draws


@pytest.mark.parametrize("keep", [1, 3])
def test_inclusion_frequencies_are_those_of_successive_sampling(keep):
    values = [0.05, 0.1, 0.5, 1.0, 2.0, 0.35]
    draws = 500
    wanted = inclusion([v / sum(values) for v in values], keep)
    found = frequencies(pp.Sketch(pp.Magnitude()), values, keep, draws)
    deviation = (wanted * (1 - wanted) / draws).sqrt()
    assert bool(((found - wanted).abs() < 4.5 * deviation + 1e-3).all()), (found, wanted)


def test_low_temperature_is_top_k_and_zero_scores_come_last():
    values = [0.3, 0.0, 0.5, 0.31, 0.0, 0.1]
    cold = pp.prune(
        layer(values),
        pp.Sketch(pp.Magnitude(), temperature=1e-4),
        density=0.5,
        example_input=torch.ones(1, 6),
    )
    assert cold["weight"][0].tolist() == [True, False, True, True, False, False]
    for seed in range(30):
        masks = pp.prune(
            layer(values), pp.Sketch(pp.Magnitude()), density=4 / 6, seed=seed, example_input=torch.ones(1, 6)
        )
        assert masks["weight"][0].tolist() == [True, False, True, True, False, True]
    assert pp.prune(layer(values), pp.Sketch(pp.Magnitude()), density=5 / 6, example_input=torch.ones(1, 6)).kept == 5


def test_sampling_in_every_round_or_the_last():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), torch.ones(1, 20)
    top = pp.prune(model, pp.SynFlow(rounds=5), density=[0.5, 0.1], example_input=x)
    last = pp.prune(model, pp.Sketch(pp.SynFlow(rounds=5)), density=[0.5, 0.1], example_input=x)
    every = pp.prune(model, pp.Sketch(pp.SynFlow(rounds=5), every_round=True), density=[0.5, 0.1], example_input=x)
    assert last[0] == top[0] and last[1] != top[1] and every[0] != top[0]
    assert last[1].kept == top[1].kept == every[1].kept


def test_with_replacement_estimates_without_bias():
    torch.manual_seed(0)
    w, x = torch.randn(12).double(), torch.randn(12).double()
    p = (w * x).abs() + 0.05
    draws, trials = 7, 2000
    estimates = torch.stack([(sample_with_replacement(p, draws, seed)[1] * w * x).sum() for seed in range(trials)])
    truth = (w * x).sum()
    variance = (((w * x) ** 2 / (p / p.sum())).sum() - truth**2) / draws
    assert abs(float(estimates.mean() - truth)) < 4.5 * float((variance / trials).sqrt())
    assert float(estimates.var()) == pytest.approx(float(variance), rel=0.15)
    counts, factors = sample_with_replacement(p, draws, 3)
    assert int(counts.sum()) == draws and torch.equal(counts > 0, factors > 0)


def test_with_replacement_bad_arguments():
    for scores, draws in (
        (torch.ones(3), 0),
        (torch.zeros(3), 1),
        (-torch.ones(3), 1),
        (torch.tensor([1.0, torch.nan]), 1),
    ):
        with pytest.raises(ValueError, match="sample_with_replacement"):
            sample_with_replacement(scores, draws, 0)
