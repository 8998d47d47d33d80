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


def test_one_round_schedule_samples():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), torch.ones(1, 20)
    options = {"density": 0.2, "schedule": "one-shot", "example_input": x}
    sampled = [pp.prune(model, pp.Sketch(pp.SynFlow(rounds=9)), seed=seed, **options) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2] and sampled[0] != pp.prune(model, pp.SynFlow(rounds=9), **options)


@pytest.mark.parametrize("replacement", [False, True])
def test_layer_scope_draws_a_quota_of_each_layer(replacement):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), torch.ones(1, 20)
    with torch.no_grad():
        model[2].weight *= 1e-3  # in a global draw next to nothing would be left of it
    pruner = pp.Sketch(pp.Magnitude(), replacement=replacement)
    apart = pp.prune(model, pruner, density=0.2, scope="layer", example_input=x)
    together = pp.prune(model, pruner, density=0.2, example_input=x)
    assert together.counts()["2.weight"].kept < 5
    if not replacement:
        assert {name: count.kept for name, count in apart.counts().items()} == {"0.weight": 120, "2.weight": 60}
        return
    findings = apart.metadata["findings"]
    assert findings["draws"] == 180 and findings["distinct"] == apart.kept == findings["kept"][-1]
    assert 30 < apart.counts()["2.weight"].kept < 60 and 60 < apart.counts()["0.weight"].kept < 120


def test_frequencies_with_replacement_are_those_of_independent_draws():
    values, keep, draws = [0.05, 0.1, 0.5, 1.0, 2.0, 0.0], 3, 500
    p = torch.tensor(values) / sum(values)
    wanted = 1 - (1 - p) ** keep
    found = frequencies(pp.Sketch(pp.Magnitude(), replacement=True), values, keep, draws)
    deviation = (wanted * (1 - wanted) / draws).sqrt()
    assert bool(((found - wanted).abs() < 4.5 * deviation + 1e-3).all()), (found, wanted)


def test_replacement_across_layers_follows_the_scores_at_any_scale():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 30, bias=False), nn.Linear(30, 1, bias=False)), torch.ones(1, 4)
    mass = [float(layer.weight.detach().abs().sum()) for layer in model]
    network = pp.PathNetwork.from_module(model, x)
    only = pp.Sketch(pp.Magnitude(), replacement=True)
    trials = 600
    hits = sum(pp.prune(network, only, density=1 / 150, seed=seed).counts()["0.weight"].kept for seed in range(trials))
    wanted = mass[0] / sum(mass)
    assert abs(hits / trials - wanted) < 4.5 * (wanted * (1 - wanted) / trials) ** 0.5
    with torch.no_grad():
        model[0].weight *= 1e30
    cold = pp.prune(network, pp.Sketch(pp.Magnitude(), temperature=1e-6, replacement=True), density=0.5)
    top = pp.prune(network, pp.Magnitude(), density=1 / 150)
    assert cold == top  # every draw takes the largest


def test_error_of_the_estimate_is_the_law_and_the_optimum():
    """E|estimate - y|^2 = ((sum |w| |X|)^2 - |y|^2) / s at p ~ |w| |X|, and more at p ~ |w| and at uniform p."""
    torch.manual_seed(1)
    w, X = torch.randn(10).double(), torch.randn(10, 4).double() * torch.logspace(-1, 1, 10).double()[:, None]
    y, norms, s, trials = X.T @ w, X.norm(dim=1), 5, 3000

    def error(p):
        p = p / p.sum()
        found = [sample_with_replacement(p, s, seed)[1] * w @ X - y for seed in range(trials)]
        squares = torch.stack([e.square().sum() for e in found])
        law = float(((w * norms).square() / p).sum() - y.square().sum()) / s
        assert abs(float(squares.mean()) - law) < 4.5 * float(squares.std()) / trials**0.5
        return law

    best = error(w.abs() * norms)
    assert best == pytest.approx(float((w.abs() * norms).sum() ** 2 - y.square().sum()) / s)
    assert best < error(w.abs()) and best < error(torch.ones(10).double())


def test_bad_sketches():
    x = torch.ones(1, 4)
    with pytest.raises(TypeError, match=r"Sketch: base: .* got PHEW"):
        pp.Sketch(pp.PHEW())
    with pytest.raises(TypeError, match=r"Sketch: base: .* got str"):
        pp.Sketch("magnitude")
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="Sketch: temperature"):
            pp.Sketch(pp.Magnitude(), temperature=temperature)
    with pytest.raises(ValueError, match=r"Sketch: replacement: .* 'row'"):
        pp.prune(
            nn.Linear(4, 4), pp.Sketch(pp.Magnitude(), replacement=True), density=0.5, scope="row", example_input=x
        )
    with pytest.raises(ValueError, match="Sketch: base: wanted scores above 0"):
        pp.prune(layer([0.0] * 4), pp.Sketch(pp.Magnitude(), replacement=True), density=0.5, example_input=x)
