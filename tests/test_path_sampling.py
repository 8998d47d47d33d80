"""Exact path sampling: frequencies of whole paths against enumeration, flows against shares, the estimator."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp
from enumeration import Units
from path_scores import randomised
from pathprune.path_sampling import Paths, sample_paths
from test_flow import NETS, network_of
from test_walks import chi_square_quantile


class Gaps(nn.Module):
    """Average pooling with padding, strides and kernels that differ by axis, a norm, features over positions."""

    shapes = ((2, 5, 4),)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False)
        self.b = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.avg_pool2d(self.a(x), (2, 1), (1, 1), (1, 0), count_include_pad=False)
        return self.b(torch.nn.functional.max_pool2d(x, (3, 1), (2, 1), (1, 0)))

    def spell(self, u: Units, x: dict) -> dict:
        y = {}
        for c, i, j in itertools.product(range(3), range(3), range(2)):
            y[c, i, j] = u.new()
            for d, r, s in itertools.product(range(2), range(3), range(2)):
                at = (d, 2 * i - 1 + r, j + 2 * s)
                if at in x:
                    w = self.a.weight
                    u.connect(x[at], y[c, i, j], float(w[c, d, r, s]), ("a.weight", ((c * 2 + d) * 3 + r) * 2 + s))
        pooled = {}
        for c, i, j in itertools.product(range(3), range(4), range(2)):
            rows = [r for r in (i - 1, i) if 0 <= r < 3]
            pooled[c, i, j] = u.new()
            for r in rows:
                u.connect(y[c, r, j], pooled[c, i, j], 1 / len(rows))
        z = {}
        for c, i, j in itertools.product(range(3), range(2), range(2)):
            z[c, i, j] = u.new()
            for r in range(2 * i - 1, 2 * i + 2):
                if 0 <= r < 4:
                    u.connect(pooled[c, r, j], z[c, i, j], 1.0)
        out = {}
        for c, i, o in itertools.product(range(3), range(2), range(2)):
            out[c, i, o] = u.new()
            for j in range(2):
                u.connect(z[c, i, j], out[c, i, o], float(self.b.weight[o, j]), ("b.weight", o * 2 + j))
        return out


MODELS = {name: build for name, (build, _) in NETS.items()} | {"gaps": Gaps}


def without_biases(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if getattr(module, "bias", None) is not None and not isinstance(module, nn.BatchNorm2d):
            module.bias = None
    return model


def enumerated(model: nn.Module, sources: list[Tensor], power: int) -> dict[tuple, float]:
    """The share of R of every set of weights that a path takes (paths from several elements may take the same)."""
    units = Units()
    shares: dict[tuple, float] = defaultdict(float)
    with torch.no_grad():
        outputs = model.spell(units, *(units.source(s) for s in sources))
        units.starts = {unit: abs(x) ** (1 / power) for unit, x in units.starts.items()}  # the source is not raised
        for value, weights in units.paths(outputs):
            shares[tuple(sorted(weights))] += abs(value) ** power
    total = sum(shares.values())
    return {key: value / total for key, value in shares.items()}


def keys(paths: Paths) -> list[tuple]:
    return [
        tuple(sorted((name, flat) for name, flat in zip(paths.names, row, strict=True) if flat >= 0))
        for row in paths.weights.tolist()
    ]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_paths_are_drawn_in_proportion_to_their_value(name, power):
    model = without_biases(randomised(MODELS[name]()))
    made = torch.Generator().manual_seed(3)
    sources = [torch.rand(shape, generator=made, dtype=torch.float64) for shape in model.shapes]
    shares = enumerated(model, sources, power)
    n = 40_000
    paths = sample_paths(network_of(model), n, power=power, seed=1, source=sources)
    for half in (slice(0, None, 2), slice(1, None, 2)):  # ahead, back
        seen: dict[tuple, int] = defaultdict(int)
        for key in keys(paths)[half]:
            assert key in shares
            seen[key] += 1
        statistic, degrees, rare, rare_seen = 0.0, -1, 0.0, 0
        for key, share in shares.items():
            expected = share * n / 2
            if expected < 5:
                rare, rare_seen = rare + expected, rare_seen + seen[key]
                continue
            statistic += (seen[key] - expected) ** 2 / expected
            degrees += 1
        if rare > 5:
            statistic, degrees = statistic + (rare_seen - rare) ** 2 / rare, degrees + 1
        assert statistic < chi_square_quantile(max(degrees, 1)), (statistic, degrees)


@pytest.mark.parametrize("name", ["chain", "skips", "tied", "gaps"])
def test_values_and_totals_are_those_of_the_paths(name):
    model = without_biases(randomised(MODELS[name]()))
    sources = [torch.ones(shape).double() for shape in model.shapes]
    units = Units()
    flat = {name: p.detach().flatten() for name, p in model.named_parameters()}
    values: dict[tuple, set[float]] = defaultdict(set)
    total = 0.0
    with torch.no_grad():
        for value, weights in units.paths(model.spell(units, *(units.source(s) for s in sources))):
            values[tuple(sorted(weights))].add(round(math.log2(value**2), 9) if value else -math.inf)
            total += value**2
    paths = sample_paths(network_of(model), 300, power=2)
    assert paths.log2_total == pytest.approx(math.log2(total), abs=1e-11)
    assert torch.equal(paths.log2_probability, paths.log2_value - paths.log2_total)
    for key, value, inverse in zip(keys(paths), paths.log2_value.tolist(), paths.inverse_squares.tolist(), strict=True):
        assert min(abs(value - v) for v in values[key]) < 1e-8
        assert inverse == pytest.approx(sum(float(flat[n][k]) ** -2 for n, k in key))


def test_sums_over_paths_are_estimated_with_their_error():
    """The trace of the path kernel: sum over paths of v^2 * sum 1/w^2."""
    from pathprune.path_kernel import log2_trace

    model = without_biases(randomised(MODELS["skips"]()))
    with torch.no_grad():  # no rare path with a tiny weight: its 1 / w^2 would make the error itself uncertain
        for p in model.parameters():
            p.copy_(torch.where(p < 0, -1, 1) * p.abs().clamp(min=0.2))
    network = network_of(model)
    wanted = 2.0 ** log2_trace(network)
    misses = []
    for seed in range(30):
        paths = sample_paths(network, 2000, power=2, seed=seed)
        mean, error = paths.estimate(paths.inverse_squares)
        misses.append((mean * 2**paths.log2_total - wanted) / (error * 2**paths.log2_total))
    assert max(abs(m) for m in misses) < 4.5
    assert abs(sum(misses) / len(misses)) < 4 / len(misses) ** 0.5
    with pytest.raises(ValueError, match=r"factors: wanted \[2000\], got \[3\]"):
        paths.estimate(torch.ones(3))


def test_the_same_seed_draws_the_same_paths_in_any_number():
    network = network_of(without_biases(randomised(MODELS["skips"]())))
    few, many = sample_paths(network, 10, seed=5), sample_paths(network, 100, seed=5)
    assert torch.equal(few.weights, many.weights[:10])
    assert not torch.equal(few.weights, sample_paths(network, 10, seed=6).weights)


def test_what_cannot_be_sampled_is_refused():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    network = pp.PathNetwork.from_module(Gated(), torch.ones(1, 3))
    with pytest.raises(ValueError, match="multiplies two flows"):
        sample_paths(network, 3)
    chain = network_of(MODELS["chain"]())
    with pytest.raises(ValueError, match="sample_paths: n: wanted at least 1, got 0"):
        sample_paths(chain, 0)
    with pytest.raises(ValueError, match="sample_paths: power: wanted 1 or 2, got 3"):
        sample_paths(chain, 1, power=3)
    with pytest.raises(ValueError, match="wanted biases dropped"):
        sample_paths(chain, 1, policy="published")
    for tensor in chain.tensors.values():
        tensor.data.zero_()
    with pytest.raises(ValueError, match="got none"):
        sample_paths(chain, 1)
