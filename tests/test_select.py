"""Exact selection: against a stable sort of everything, with exponents as exact fractions where float64 ends."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pathprune as pp
from pathprune.ops import WeightMap
from pathprune.select import Bracket, NonFiniteScoreError, Real, Scores, keep_masks, select, select_threshold


def sorted_masks(scores, keep, exponents=None, masks=None):
    """The definition: sort all by true value, ties by tensor then flat index, keep the first."""
    exponents = exponents or [0] * len(scores)
    entries = []
    for t, (tensor, exponent) in enumerate(zip(scores, exponents, strict=True)):
        for n, value in enumerate(tensor.flatten().tolist()):
            if masks is None or bool(masks[t].flatten()[n]):
                entries.append((-Fraction(value) * Fraction(2) ** exponent, t, n))
    kept = [torch.zeros(tensor.numel(), dtype=torch.bool) for tensor in scores]
    for _, t, n in sorted(entries)[:keep]:
        kept[t][n] = True
    return [mask.reshape(tensor.shape) for mask, tensor in zip(kept, scores, strict=True)]


def assert_selects(scores, keep, exponents=None, masks=None):
    threshold = select_threshold(scores, keep, exponents, masks)
    got = keep_masks(threshold, scores, exponents, masks)
    for k, (a, b) in enumerate(zip(got, sorted_masks(scores, keep, exponents, masks), strict=True)):
        assert torch.equal(a, b), f"tensor {k}: {int((a != b).sum())} bits differ"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_keeps_exactly_what_a_stable_sort_keeps(data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4))
    values = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 1e-40, 3e38, 1e-45, -1e-42, 0.1, 0.2, 7.0])
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    scores = [
        torch.tensor(data.draw(st.lists(values, min_size=a * b, max_size=a * b)), dtype=dtype).reshape(a, b)
        for a, b in shapes
    ]
    exponents = data.draw(
        st.one_of(st.none(), st.lists(st.integers(-400, 400), min_size=len(shapes), max_size=len(shapes)))
    )
    total = sum(a * b for a, b in shapes)
    assert_selects(scores, data.draw(st.integers(0, total)), exponents)


def test_zeros_of_a_large_exponent_are_not_above_small_scores():
    """The bin of zeros reaches up to denormal numbers, which a large exponent lifts above another tensor's scores."""
    first = torch.tensor([[0.0, 0.2, 1.0, 0.2, 0.0, 1.0]])
    second = torch.tensor([[0.0, 1.0, 0.0, 0.2]])
    tiny = torch.tensor([[1e-45, 0.0, -1e-42, 1e-40]])
    for keep in range(15):
        assert_selects([first, second, tiny], keep, [-95, 170, 60])


def test_values_of_every_size_over_every_exponent():
    values = [0.0, -0.0, 1.0, 1.5, -2.0, 1e-40, 3e38, 1e-45, -1e-42, 0.1, 0.2, 7.0]
    for seed in range(150):
        rng = random.Random(seed)
        some = rng.sample(values, rng.randint(1, 4))
        dtype = rng.choice([torch.float32, torch.float64])
        sizes = [rng.randint(1, 60) for _ in range(rng.randint(1, 4))]
        scores = [torch.tensor([[rng.choice(some) for _ in range(n)]], dtype=dtype) for n in sizes]
        assert_selects(scores, rng.randint(0, sum(sizes)), [rng.randint(-400, 400) for _ in sizes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.97])
def test_random_scores_over_several_tensors(dtype, share):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((300, 70), (64, 3, 3, 3), (1000,))]
    total = sum(t.numel() for t in scores)
    assert_selects(scores, max(1, round(share * total)), [3, -5, 0])


def test_only_masked_entries_take_part():
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(50, 33, generator=generator), torch.rand(20, 20, generator=generator)]
    masks = [torch.rand(t.shape, generator=generator) < 0.3 for t in scores]
    assert_selects(scores, 200, [0, 1], masks)


def test_ties_stay_in_order_of_tensor_then_index():
    scores = [torch.full((10, 30), 2.0), torch.full((7, 9), 2.0), torch.full((5, 5), 1.0)]
    for keep in (1, 299, 300, 301, 362, 363, 364, 388):
        assert_selects(scores, keep)


def test_half_zeros():
    generator = torch.Generator().manual_seed(2)
    scores = [torch.rand(100, 90, generator=generator) * (torch.rand(100, 90, generator=generator) < 0.5)]
    for keep in (100, int((scores[0] > 0).sum()), int((scores[0] > 0).sum()) + 5, 8_900):
        assert_selects(scores, keep)


def test_scores_clustered_in_one_exponent():
    """Thousands of distinct scores in a single histogram bin, more than may be collected at once."""
    values = torch.arange(600_000, dtype=torch.float32) * 2.0**-23 * 0.5 + 1.0
    scores = [values[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))].reshape(600, 1000)]
    threshold = select_threshold(scores, 12_345)
    kept = keep_masks(threshold, scores)[0]
    assert int(kept.sum()) == 12_345
    order = scores[0].flatten().sort(descending=True, stable=True).indices[:12_345]
    assert bool(kept.flatten()[order].all())


def test_exponents_far_beyond_float64():
    scores = [torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.75]])]
    assert_selects(scores, 2, [5000, -5000])
    assert_selects(scores, 3, [5000, -5000])
    assert select_threshold(scores, 2, [5000, -5000]).value == Real.of(0.5, 5000)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_refused_by_name(bad):
    scores = [torch.rand(10, 10), torch.rand(10, 10)]
    scores[1][3, 4] = bad
    with pytest.raises(NonFiniteScoreError, match=r"scores\[1\]"):
        select_threshold(scores, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda s: (s, -1)), "keep"),
        ((lambda s: (s, 201)), "live weights"),
        ((lambda s: ([], 1)), "sources"),
        ((lambda s: (s, 5, [1])), "exponents"),
        ((lambda s: (s, 5, None, [torch.ones(3, dtype=torch.bool)] * 2)), "shape"),
        ((lambda s: ([torch.ones(3, dtype=torch.int64)], 1)), "floating-point"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_threshold(*arguments([torch.rand(10, 10), torch.rand(10, 10)]))


def test_a_guess_that_misses_changes_nothing():
    generator = torch.Generator().manual_seed(4)
    tensor = torch.rand(1, 500, 200, generator=generator)
    source = [Scores("w", tensor, 200)]
    exact = select(source, 5000)
    for lo, hi in ((0.0, 0.1), (0.99, 1.0), (0.94, 0.96), (2.0, 3.0), (0.0, 1.0)):
        assert select(source, 5000, Bracket(Real.of(lo), Real.of(hi))) == exact


@pytest.mark.parametrize("off", [-0.01, 0.01, -0.05, 0.05, -0.2, 0.2])
def test_what_lies_beside_a_guess_is_looked_at_before_a_histogram_is_made(off, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    sources = [Scores(f"w{n}", torch.rand(1, n, 400, generator=generator), 400) for n in (300, 3)]
    wanted = select(sources, 5_000)
    centre = wanted.value.log2() + off
    lo, hi = (Real.of(1.0).times_power(centre + side) for side in (-0.008, 0.008))
    if abs(off) < 0.1:

        def histogram(self, stride):
            raise AssertionError("a histogram was made")

        monkeypatch.setattr(Scores, "histogram", histogram)
    assert select(sources, 5_000, Bracket(lo, hi)) == wanted


def test_selects_from_products_without_writing_them():
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(1, 120, 77, generator=generator)
    x, g = torch.rand(1, 1, 77, generator=generator), torch.rand(1, 1, 120, generator=generator)
    threshold = select([Scores("w", w, 77, x=x, g=g, s=WeightMap.ABS, exponent=9)], 500)
    written = (w[0].abs() * g[0].T) * x[0]
    assert threshold == select_threshold([written], 500, [9])


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-3000, 3000), st.integers(-3000, 3000))
def test_bounds_are_the_nearest_numbers(value, exponent, unit):
    real = Real.of(value, exponent)
    exact = Fraction(value) * Fraction(2) ** exponent
    for dtype, kind in ((torch.float32, np.float32), (torch.float64, np.float64)):
        scale = Fraction(2) ** unit
        at_least, above = real.at_least(unit, dtype), real.above(unit, dtype)
        if math.isfinite(at_least):
            assert Fraction(at_least) * scale >= exact
            below = float(np.nextafter(kind(at_least), kind(-np.inf)))
            assert math.isinf(below) or Fraction(below) * scale < exact
        if math.isfinite(above):
            assert Fraction(above) * scale > exact
            below = float(np.nextafter(kind(above), kind(-np.inf)))
            assert math.isinf(below) or Fraction(below) * scale <= exact


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-50, 50),
    st.floats(-1e30, 1e30),
    st.integers(-50, 50),
)
def test_reals_are_ordered(a, e, b, f):
    left, right = Fraction(a) * Fraction(2) ** e, Fraction(b) * Fraction(2) ** f
    assert (Real.of(a, e) < Real.of(b, f)) == (left < right)
    assert (Real.of(a, e) == Real.of(b, f)) == (left == right)


@pytest.mark.slow
def test_more_than_two_to_the_31_weights():
    rows = 2**15 + 1
    tensor = torch.zeros(1, rows, 2**16, dtype=torch.bfloat16)
    tensor[0, 5, 7] = 3.0
    tensor[0, -1, -1] = 2.0
    source = Scores("w", tensor, 2**16, s=WeightMap.ABS)
    assert source.numel > 2**31
    assert select([source], 2).value == Real.of(2.0)
    threshold = select([source], rows * 2**16 - 1)  # all but the last zero
    assert (threshold.tie_tensor, threshold.tie_index) == (0, rows * 2**16 - 2)
    assert pp.select_threshold is select_threshold
