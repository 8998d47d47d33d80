"""The plain-torch ops against loops over single weights, on tiny cases."""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pathprune import _library, ops, reference
from pathprune.reference import WeightMap

SETTINGS = settings(max_examples=60, deadline=None)
FLOAT = {torch.float32: np.float32, torch.float64: np.float64}
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, -0.3, 0.7, 3.0, -2.5, 1e-30, math.inf, -math.inf, math.nan])
FLOWS = st.sampled_from([0.0, 0.1, 0.3, 1.0, 1.7, -0.7, 1e20])


@st.composite
def layers(draw: Any) -> dict[str, Any]:
    """weight [G, O, K], live [G, O, K] bool, x [G, T, K], g [G, T, O] or no flows."""
    groups, rows, columns = draw(st.integers(0, 2)), draw(st.integers(0, 3)), draw(st.integers(0, 20))
    positions = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))

    def tensor(elements: st.SearchStrategy[Any], *shape: int, kind: torch.dtype = dtype) -> Tensor:
        count = math.prod(shape)
        return torch.tensor(draw(st.lists(elements, min_size=count, max_size=count)), dtype=kind).reshape(shape)

    flows = draw(st.booleans())
    return {
        "weight": tensor(NUMBERS, groups, rows, columns),
        "live": tensor(st.booleans(), groups, rows, columns, kind=torch.bool),
        "x": tensor(FLOWS, groups, positions, columns) if flows else None,
        "g": tensor(FLOWS, groups, positions, rows) if flows else None,
    }


def mapped(code: int, w: np.floating[Any]) -> np.floating[Any]:
    return [type(w)(1), abs(w), w * w, w][code]


def indices(live: Tensor) -> list[tuple[int, int, int]]:
    groups, rows, columns = live.shape
    return [(i, r, c) for i in range(groups) for r in range(rows) for c in range(columns)]


def score(layer: dict[str, Any], s: int, at: tuple[int, int, int]) -> np.floating[Any]:
    """The score of one live weight; numpy scalars round after every operation."""
    (i, r, c), weight, x, g = at, layer["weight"], layer["x"], layer["g"]
    number = FLOAT[weight.dtype]
    value = mapped(s, number(weight[at].item()))
    if x is None:
        return value
    if x.shape[1] == 1:
        return (value * number(g[i, 0, r].item())) * number(x[i, 0, c].item())
    total = number(0)
    for t in range(x.shape[1]):
        total = total + number(x[i, t, c].item()) * number(g[i, t, r].item())
    return value * total


def live_scores(layer: dict[str, Any], s: int) -> list[tuple[int, np.floating[Any]]]:
    """(flat index, score) of the live weights."""
    with np.errstate(all="ignore"):
        return [(n, score(layer, s, at)) for n, at in enumerate(indices(layer["live"])) if layer["live"][at]]


def arguments(layer: dict[str, Any], packed: bool = False) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What begins and what ends the arguments of an op that scores."""
    mask, columns = reference.mask_pack(layer["live"]), layer["live"].shape[2]
    if not packed:
        return (layer["weight"], mask, layer["x"], layer["g"]), (None, None, columns)
    layout = reference.mask_pack(layer["live"] | (layer["weight"] > 0))
    values, row_start = reference.compact_weight(layer["weight"], layout, None, None, columns)
    return (values, mask, layer["x"], layer["g"]), (layout, row_start, columns)


@SETTINGS
@given(layers(), st.sampled_from(list(WeightMap)), st.booleans())
def test_through_flow(layer: dict[str, Any], s: int, packed: bool) -> None:
    first, last = arguments(layer, packed)
    expected = torch.zeros_like(layer["weight"]).flatten()
    for n, value in live_scores(layer, s):
        expected[n] = float(value)
    got = reference.through_flow(*first, s, *last)
    torch.testing.assert_close(got.flatten(), expected, rtol=0, atol=0, equal_nan=True)


@SETTINGS
@given(layers(), st.sampled_from(list(WeightMap)), st.booleans(), NUMBERS, NUMBERS, st.integers(0, 9))
def test_collect(layer: dict[str, Any], s: int, packed: bool, lo: float, hi: float, capacity: int) -> None:
    number = FLOAT[layer["weight"].dtype]
    lo, hi = (0.0 if math.isnan(bound) else float(number(bound)) for bound in (lo, hi))
    first, last = arguments(layer, packed)
    values, counts, extremes = reference.through_flow_collect(*first, s, lo, hi, capacity, *last)
    scores = [value for _, value in live_scores(layer, s)]
    inside = [float(v) for v in scores if v >= lo and v <= hi]
    nonfinite = sum(not np.isfinite(v) for v in scores)
    assert counts.tolist() == [sum(v > hi for v in scores), len(inside), nonfinite, len(scores)]
    assert extremes.tolist() == [min(inside, default=math.inf), max(inside, default=-math.inf)]
    assert values.shape == (capacity,)
    assert values[: len(inside)].tolist() == inside[:capacity]


def bin_of(value: np.floating[Any]) -> int:
    """The bin by its definition: the top bits of the number's bits, made to order as the numbers do."""
    kind, bits, kept = ("<d", 64, 20) if isinstance(value, np.float64) else ("<f", 32, 17)
    (raw,) = struct.unpack(kind.replace("d", "Q").replace("f", "I"), struct.pack(kind, float(value) + 0.0))
    key = raw ^ ((1 << bits) - 1) if raw >> (bits - 1) else raw | 1 << (bits - 1)
    return key >> (bits - kept)


@SETTINGS
@given(layers(), st.sampled_from(list(WeightMap)), st.booleans(), st.integers(1, 4))
def test_histogram(layer: dict[str, Any], s: int, packed: bool, stride: int) -> None:
    first, last = arguments(layer, packed)
    histogram, counts = reference.through_flow_histogram(*first, s, stride, *last)
    columns = layer["live"].shape[2]
    expected: dict[int, int] = {}
    visited = nonfinite = 0
    for n, value in live_scores(layer, s):
        word = n // columns * ((columns + 15) // 16) + n % columns // 16
        if word % stride == 0:
            visited += 1
            nonfinite += not np.isfinite(value)
            if np.isfinite(value):
                expected[bin_of(value)] = expected.get(bin_of(value), 0) + 1
    assert counts.tolist() == [visited, nonfinite]
    assert histogram.shape == (1 << (20 if layer["weight"].dtype == torch.float64 else 17),)
    assert {int(k): int(histogram[k]) for k in histogram.nonzero()[:, 0]} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bins_keep_the_order(dtype: torch.dtype) -> None:
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    numbers = torch.tensor([-huge, -3, -1, -tiny, -0.0, 0.0, tiny / 8, tiny, 1, 1.0078125, 3, huge], dtype=dtype)
    bins = reference.histogram_bin(numbers)
    assert bins[4] == bins[5]
    assert bins.tolist() == sorted(bins.tolist())
    assert bins[9] - bins[8] == 2, "eight bits of the mantissa tell 1 from 1 + 2^-7"
    assert int(bins[0]) >= 0
    assert int(bins[-1]) < 1 << reference.histogram_bits(dtype)


@SETTINGS
@given(layers(), st.sampled_from(list(WeightMap)), st.booleans(), NUMBERS, NUMBERS, st.integers(-1, 60))
def test_prune_and_nth(layer: dict[str, Any], s: int, packed: bool, low: float, high: float, n: int) -> None:
    number = FLOAT[layer["weight"].dtype]
    at_least, above = (0.0 if math.isnan(bound) else float(number(bound)) for bound in (low, high))
    (weight, mask, x, g), last = arguments(layer, packed)
    scores = live_scores(layer, s)

    within = [index for index, v in scores if v >= at_least and v < above]
    got = reference.through_flow_nth(weight, mask, x, g, s, at_least, above, max(n, 0), *last)
    expected = within[max(n, 0)] if max(n, 0) < len(within) else layer["weight"].numel()
    assert int(got) == expected

    kept = mask.clone()
    reference.through_flow_prune_(weight, kept, x, g, s, at_least, above, n, *last)
    stays = [index for index, v in scores if v >= above or (v >= at_least and index < n)]
    assert reference.mask_unpack(kept, last[2]).flatten().nonzero()[:, 0].tolist() == stays


@SETTINGS
@given(layers(), st.sampled_from(list(WeightMap)), st.booleans(), st.booleans())
def test_path_flow_linear(layer: dict[str, Any], f: int, packed: bool, transposed: bool) -> None:
    layer["weight"] = layer["weight"].nan_to_num(posinf=2.0, neginf=-2.0)
    groups, rows, columns = layer["live"].shape
    (weight, mask, _, _), last = arguments(layer, packed)
    source, target = (rows, columns) if transposed else (columns, rows)
    x = torch.linspace(-1, 2, groups * 2 * source, dtype=layer["weight"].dtype).reshape(groups, 2, source)
    expected = torch.zeros(groups, 2, target, dtype=torch.float64)
    for i, r, c in indices(layer["live"]):
        if layer["live"][i, r, c]:
            w = mapped(f, np.float64(layer["weight"][i, r, c].item()))
            entering, leaving = (r, c) if transposed else (c, r)
            expected[i, :, leaving] += float(w) * x[i, :, entering].double()
    got = reference.path_flow_linear(weight, mask, x, f, transposed, *last)
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-6, atol=1e-6)


@SETTINGS
@given(layers())
def test_masks_and_packing(layer: dict[str, Any]) -> None:
    live, weight = layer["live"], layer["weight"]
    groups, rows, columns = live.shape
    mask = reference.mask_pack(live)
    assert mask.shape == (groups, rows, (columns + 15) // 16)
    for i in range(groups):
        for r in range(rows):
            for c in range(mask.shape[2]):
                row = live[i, r, 16 * c : 16 * c + 16].tolist()
                assert int(mask[i, r, c]) & 0xFFFF == sum(1 << b for b, bit in enumerate(row) if bit)
    assert torch.equal(reference.mask_unpack(mask, columns), live)
    assert int(reference.mask_count(mask)) == sum(live.flatten().tolist())

    values, row_start = reference.compact_weight(weight, mask, None, None, columns)
    stored = [weight[at].item() for at in indices(live) if live[at]]
    expected = torch.tensor(stored + [0.0] * reference.PADDING, dtype=weight.dtype)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    per_row = [sum(row) for row in live.flatten(0, 1).tolist()]
    assert row_start.tolist() == [sum(per_row[:r]) for r in range(groups * rows + 1)]


@SETTINGS
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30), st.data())
def test_kth_largest(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    got = reference.kth_largest(torch.tensor(values, dtype=torch.float64), k)
    assert float(got) == sorted(values, reverse=True)[k - 1]


def philox_word_by_word(counter: int, seed: int) -> list[int]:
    """Philox4x32-10 in Python's integers."""
    c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answer() -> None:
    """The published answer for counter 0 and key 0."""
    words = reference.philox(torch.zeros(1, dtype=torch.int64), 0)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@SETTINGS
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8), st.integers(-(2**63), 2**63 - 1))
def test_philox(counters: list[int], seed: int) -> None:
    words = torch.stack(reference.philox(torch.tensor(counters), seed), dim=1)
    assert words.tolist() == [philox_word_by_word(counter, seed) for counter in counters]


def test_uniform_numbers() -> None:
    u = reference.philox_uniform(torch.arange(100_000), 3)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * 100_000)
    spread = torch.histc(u, 50, 0, 1)
    assert float(((spread - 2000) ** 2 / 2000).sum()) < 100  # chi-squared, 49 degrees of freedom
    w0, w1, *_ = philox_word_by_word(17, 3)
    assert float(u[17]) == ((w0 >> 5) * 2**26 + (w1 >> 6) + 0.5) / 2**53


@pytest.mark.parametrize(("exponent", "tau"), [(0, 1.0), (-4000, 1.0), (4000, 2.0), (7, 0.0)])
def test_gumbel_keys(exponent: int, tau: float) -> None:
    scores = torch.tensor([[0.5, 0.0, 3.0], [1e-38, -0.0, 1e30]])
    keys = reference.gumbel_keys(scores, exponent, tau, 11, 2**33)
    assert keys.shape == scores.shape
    assert keys.dtype == torch.float64
    for n, (value, key) in enumerate(zip(scores.flatten().tolist(), keys.flatten().tolist(), strict=True)):
        w0, w1, *_ = philox_word_by_word(2**33 + n, 11)
        u = ((w0 >> 5) * 2**26 + (w1 >> 6) + 0.5) / 2**53
        if value == 0:
            assert key == -math.inf
        else:
            expected = tau * (math.log(value) + exponent * math.log(2)) - math.log(-math.log(u))
            assert key == pytest.approx(expected, rel=1e-13, abs=1e-13)


@pytest.mark.skipif(not _library.cpu_loaded, reason="torch has logarithms of its own")
def test_gumbel_keys_are_the_same_everywhere(device: torch.device) -> None:
    """Whatever the instruction set, the number of scores and the device: the bits of another machine."""
    scores = torch.arange(1.0, 1001.0, device=device) / 7
    keys = ops.gumbel_keys(scores, -3, 0.7, 11, 5)
    assert hashlib.sha256(keys.cpu().numpy().tobytes()).hexdigest()[:16] == "ff24dd54940384db"
    for count in (1, 63, 64, 65):
        assert torch.equal(ops.gumbel_keys(scores[:count], -3, 0.7, 11, 5), keys[:count])
    inside = ops.gumbel_keys(torch.tensor([math.inf, 0.0, 5e-324], dtype=torch.float64))
    assert inside[:2].tolist() == [math.inf, -math.inf]
    assert bool(inside[2].isfinite())


def test_gumbel_keys_draw_in_proportion_to_the_scores() -> None:
    """The largest key is drawn with probability score / sum of scores."""
    weights = torch.tensor([1.0, 2.0, 5.0, 0.0])
    draws = 20_000
    keys = reference.gumbel_keys(weights.repeat(draws), 0, 1.0, 5, 0).view(draws, 4)
    share = keys.argmax(1).bincount(minlength=4) / draws
    assert torch.allclose(share, weights / 8, atol=4 * 0.5 / math.sqrt(draws))
    assert share[3] == 0
