"""The torch-free core (csrc/core) through `_C`, against Python's integers, fractions and numpy."""

from __future__ import annotations

import decimal
import math
import sys
from fractions import Fraction
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pathprune import _library

if _library.core is None:
    pytest.skip("the compiled module is not built", allow_module_level=True)
core: ModuleType = _library.core

WORD = 2**32
KINDS = [np.float32, np.float64]
MANTISSAS = st.floats(allow_nan=False, allow_infinity=False)


# ---- philox -----------------------------------------------------------------------------------


def philox_oracle(seed: int, counter: int) -> list[int]:
    """Salmon et al. 2011, section 3.3, in Python's integers."""
    words = [counter >> 32 * i & WORD - 1 for i in range(4)]
    keys = [seed & WORD - 1, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            second >> 32 ^ words[1] ^ keys[0],
            second % WORD,
            first >> 32 ^ words[3] ^ keys[1],
            first % WORD,
        ]
        keys = [(keys[0] + 0x9E3779B9) % WORD, (keys[1] + 0xBB67AE85) % WORD]
    return words


def philox(seed: int, counter: int) -> list[int]:
    low = np.array([counter % 2**64], dtype=np.uint64)
    return core.philox(seed, low, counter >> 64)[0].tolist()


# Known answers of the Random123 distribution: counter words, key words, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD - 1] * 4, [WORD - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    joined = sum(word << 32 * i for i, word in enumerate(counter))
    assert philox(key[0] | key[1] << 32, joined) == words
    assert philox_oracle(key[0] | key[1] << 32, joined) == words


@given(seed=st.integers(0, 2**64 - 1), counter=st.integers(0, 2**128 - 1))
def test_philox_is_its_definition(seed: int, counter: int) -> None:
    assert philox(seed, counter) == philox_oracle(seed, counter)


def test_philox_shapes() -> None:
    counters = np.arange(5, dtype=np.uint64)
    blocks = core.philox(7, counters)
    assert blocks.shape == (5, 4)
    assert blocks.dtype == np.uint32
    assert len({tuple(block) for block in blocks.tolist()}) == 5
    assert core.philox(7, counters[:0]).shape == (0, 4)
    np.testing.assert_array_equal(core.philox(7, counters[::2].copy()), blocks[::2])


def test_uniform53_is_its_definition_and_even() -> None:
    counters = np.arange(100_000, dtype=np.uint64)
    uniform = core.uniform53(3, counters)
    words = core.philox(3, counters).astype(np.float64)
    parts = np.floor(words[:, 0] / 32) * 2.0**26 + np.floor(words[:, 1] / 64)
    np.testing.assert_array_equal(uniform, (parts + 0.5) * 2.0**-53)
    counts, _ = np.histogram(uniform, bins=100, range=(0, 1))
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert 53 < chi_square < 161  # 99 degrees of freedom: both ends have probability below 1e-4


@pytest.mark.parametrize(
    ("word0", "word1", "value"),
    [(0, 0, 2.0**-54), (31, 63, 2.0**-54), (WORD - 1, WORD - 1, 1 - 2.0**-53), (2**31, 0, 0.5)],
)
def test_uniform53_ends(word0: int, word1: int, value: float) -> None:
    assert core.uniform53_of_words(word0, word1) == value
    assert 0 < value < 1


def test_natural_log_is_right_to_one_unit_in_the_last_place():
    rng = np.random.default_rng(0)
    near_one = 1 + rng.standard_normal(2000) * 2.0 ** rng.integers(-52, -1, 2000)
    ends = [5e-324, sys.float_info.min, sys.float_info.max, 0.5**53, 1 - 0.5**53, 1.0, 1 + 0.5**52, 2**0.5, 0.5**0.5]
    anywhere = np.ldexp(rng.uniform(1, 2, 3000), rng.integers(-1074, 1023, 3000))
    numbers = np.concatenate([near_one[near_one > 0], ends, anywhere])
    with decimal.localcontext(prec=40):
        exact = [decimal.Decimal(float(number)).ln() for number in numbers]
        for found, wanted in zip(core.natural_log(numbers).tolist(), exact, strict=True):
            assert abs(decimal.Decimal(found) - wanted) <= decimal.Decimal(math.ulp(float(wanted)))
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="natural_log: numbers"):
            core.natural_log(np.array([wrong]))


# ---- fixed-point distributions ------------------------------------------------------------------


def integer_weights(cdf: np.ndarray) -> list[int]:
    sums = [0, *(int(c) for c in cdf)]
    return [after - before for before, after in pairwise(sums)]


def exact_integers(weights: np.ndarray) -> list[int]:
    """The weights times 2**1200: integers, for every double."""
    ratios = (float(weight).as_integer_ratio() for weight in weights)
    return [numerator * (2**1200 // denominator) for numerator, denominator in ratios]


def check_probabilities(weights: np.ndarray) -> None:
    cdf, scale, lost = core.fixed_cdf(weights)
    integers, exact = integer_weights(cdf), exact_integers(weights)
    total, exact_total = sum(integers), sum(exact)
    if exact_total == 0:
        assert scale is None
        assert integers == [1] * len(weights)
        assert lost == 0
        return
    shift = 1200 - scale  # round half up: floor((2 w 2^scale + 1) / 2)
    assert integers == [((w << 1) + (1 << shift)) >> (shift + 1) for w in exact]
    assert 2**61 < total < 2**64
    assert lost == sum(i == 0 and w > 0 for i, w in zip(integers, exact, strict=True))
    bound = total * exact_total >> 31
    assert all(abs(i * exact_total - w * total) <= bound for i, w in zip(integers, exact, strict=True))
    assert all(w > 0 or i == 0 for i, w in zip(integers, exact, strict=True))


WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(0, 1e300), st.floats(0, 1, allow_subnormal=True), st.just(5e-324)),
    min_size=1,
    max_size=40,
)


@given(weights=WEIGHTS)
@example(weights=[5e-324])
@example(weights=[1.7976931348623157e308] * 33)
@example(weights=[1.7976931348623157e308, 5e-324])
@example(weights=[1.0, 2.0**-61, 2.0**-62, 2.0**-63, 2.0**-64, 2.0**-70])
@example(weights=[0.0, 0.0, 0.0])
def test_cdf_is_its_definition(weights: list[float]) -> None:
    check_probabilities(np.array(weights))


@pytest.mark.parametrize("count", [1, 2, 3, 65_536, 65_537])
@pytest.mark.parametrize("shape", ["equal", "dominated", "uneven"])
def test_cdf_of_long_rows(count: int, shape: str) -> None:
    rng = np.random.default_rng(count)
    weights = {
        "equal": np.full(count, 1 / 3),
        "dominated": np.append(1.0, rng.random(count - 1) * 2.0**-60),
        "uneven": np.exp(20 * rng.standard_normal(count)),
    }[shape]
    check_probabilities(weights)


def test_cdf_of_an_empty_row() -> None:
    cdf, scale, lost = core.fixed_cdf(np.empty(0))
    assert (cdf.size, scale, lost) == (0, None, 0)
    with pytest.raises(ValueError, match=r"fixed_cdf_draw: cdf: wanted .* at least one entry"):
        core.fixed_cdf_draw(cdf, np.zeros(1, dtype=np.uint64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, -5e-324])
def test_cdf_refuses_what_is_no_weight(bad: float) -> None:
    with pytest.raises(ValueError, match="fixed_cdf: weights: wanted finite numbers >= 0"):
        core.fixed_cdf(np.array([1.0, bad, 2.0]))


def test_cdf_takes_a_negative_zero() -> None:
    cdf, scale, _ = core.fixed_cdf(np.array([-0.0, 1.0]))
    assert scale is not None
    assert integer_weights(cdf)[0] == 0


@given(weights=WEIGHTS, words=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_draw_is_its_definition(weights: list[float], words: list[int]) -> None:
    cdf, _, _ = core.fixed_cdf(np.array(weights))
    words = [0, *words, 2**64 - 1]
    sums = [int(c) for c in cdf]
    expected = [next(j for j, c in enumerate(sums) if c > word * sums[-1] >> 64) for word in words]
    drawn = core.fixed_cdf_draw(cdf, np.array(words, dtype=np.uint64)).tolist()
    assert drawn == expected
    if any(weights):
        assert all(weights[j] > 0 for j in drawn)


def test_draws_have_the_frequencies_of_the_weights() -> None:
    weights = np.array([0, 1, 2, 3, 0, 10, 4, 0])
    cdf, _, _ = core.fixed_cdf(weights.astype(np.float64))
    blocks = core.philox(11, np.arange(200_000, dtype=np.uint64)).astype(np.uint64)
    drawn = core.fixed_cdf_draw(cdf, blocks[:, 0] | blocks[:, 1] << np.uint64(32))
    counts = np.bincount(drawn, minlength=8)
    expected = 200_000 * weights / weights.sum()
    assert (counts[weights == 0] == 0).all()
    live = weights > 0
    chi_square = float(((counts - expected)[live] ** 2 / expected[live]).sum())
    assert chi_square < 23.5  # 4 degrees of freedom: probability 1e-4


# ---- float keys -----------------------------------------------------------------------------------


def special_values(kind: type) -> np.ndarray:
    limits = np.finfo(kind)
    positive = [0.0, limits.smallest_subnormal, limits.tiny, limits.eps, 1.0, 1.5, limits.max, np.inf]
    positive += [np.nextafter(kind(limits.tiny), kind(0)), np.nextafter(kind(1), kind(2))]
    return np.array([*positive, *np.negative(positive)], dtype=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_keep_the_order(kind: type) -> None:
    values = special_values(kind)
    keys = core.float_key(values)
    assert keys.dtype == {np.float32: np.uint32, np.float64: np.uint64}[kind]
    np.testing.assert_array_equal(keys[:, None] < keys[None, :], values[:, None] < values[None, :])
    np.testing.assert_array_equal(keys[:, None] == keys[None, :], values[:, None] == values[None, :])
    back = core.float_of_key(keys)
    np.testing.assert_array_equal(back, values)
    assert not np.signbit(back[values == 0]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_nan_has_the_largest_key(kind: type) -> None:
    nans = np.array([np.nan, -np.nan], dtype=kind)
    keys = core.float_key(nans)
    assert (keys == np.iinfo(keys.dtype).max).all()
    assert np.isnan(core.float_of_key(keys)).all()
    assert keys[0] > core.float_key(np.array([np.inf], dtype=kind))[0]


@given(values=st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=50))
def test_bins_are_the_top_bits(values: list[float]) -> None:
    for kind, shift, bins in ((np.float32, 15, 2**17), (np.float64, 44, 2**20)):
        array = np.array(values, dtype=kind)
        found = core.float_bin(array)
        np.testing.assert_array_equal(found, (core.float_key(array) >> shift).astype(np.uint32))
        assert found.max() < bins


def test_keys_keep_shape_and_refuse_other_types() -> None:
    grid = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert core.float_key(grid).shape == (2, 3)
    np.testing.assert_array_equal(core.float_key(grid.T), core.float_key(grid).T)
    with pytest.raises(TypeError):
        core.float_key(np.arange(3) * 1j)


def neighbour(kind: type, value: Fraction, strict: bool) -> float:
    """The smallest number of this kind >= (or >) value, by searching among the neighbours of a guess."""
    with np.errstate(over="ignore"):
        try:
            guess = kind(float(value))
        except OverflowError:
            guess = kind(math.inf if value > 0 else -math.inf)
        candidates = [guess]
        for direction in (-math.inf, math.inf):
            step = guess
            for _ in range(3):
                step = np.nextafter(step, kind(direction))
                candidates.append(step)

    def holds(x: float) -> bool:
        exact = Fraction(float(x)) if np.isfinite(x) else None
        if exact is None:
            return bool(x > 0)
        return exact > value if strict else exact >= value

    return float(min(c for c in candidates if holds(c)))


FOUND = {
    np.float32: (core.float_at_least_float32, core.float_above_float32),
    np.float64: (core.float_at_least_float64, core.float_above_float64),
}


@pytest.mark.parametrize("kind", KINDS)
@given(mantissa=MANTISSAS, exponent=st.integers(-2300, 2300))
@example(mantissa=0.0, exponent=0)
@example(mantissa=-0.0, exponent=5)
@example(mantissa=1.0, exponent=-149)
@example(mantissa=1.0, exponent=-150)
@example(mantissa=-1.0, exponent=-150)
@example(mantissa=1.0, exponent=-1074)
@example(mantissa=-1.0, exponent=-1075)
@example(mantissa=1.0, exponent=128)
@example(mantissa=-1.0, exponent=128)
@example(mantissa=1.0, exponent=1024)
@example(mantissa=-1.0, exponent=1024)
@example(mantissa=float(np.finfo(np.float32).max), exponent=0)
@example(mantissa=-float(np.finfo(np.float32).max), exponent=0)
@example(mantissa=float(np.finfo(np.float64).max), exponent=0)
@example(mantissa=5e-324, exponent=1000)
@example(mantissa=1 + 2.0**-52, exponent=0)
@example(mantissa=-1 - 2.0**-52, exponent=0)
def test_neighbours_of_a_scaled_number(kind: type, mantissa: float, exponent: int) -> None:
    value = Fraction(mantissa) * Fraction(2) ** exponent
    for find, strict in zip(FOUND[kind], (False, True), strict=True):
        found = find(mantissa, exponent)
        assert found == neighbour(kind, value, strict)
        assert found != 0 or not math.copysign(1, found) < 0
        assert kind(found) == found or math.isinf(found)


@pytest.mark.parametrize("kind", KINDS)
@given(value=st.floats(allow_nan=False, allow_infinity=False, width=32), exponent=st.integers(-40, 40))
def test_neighbours_of_a_number_of_that_kind(kind: type, value: float, exponent: int) -> None:
    at_least, above = FOUND[kind]
    mantissa = math.ldexp(value, -exponent)
    assert at_least(mantissa, exponent) == value
    assert above(mantissa, exponent) == float(np.nextafter(kind(value), kind(math.inf)))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_at_infinity(kind: type) -> None:
    at_least, above = FOUND[kind]
    largest = float(np.finfo(kind).max)
    assert at_least(math.inf, -5) == math.inf
    assert above(math.inf, -5) == math.inf
    assert at_least(-math.inf, 5) == -math.inf
    assert above(-math.inf, 5) == -largest
    assert at_least(1.0, 2**62) == math.inf
    assert at_least(-1.0, 2**62) == -largest
    assert above(1.0, -(2**62)) == float(np.finfo(kind).smallest_subnormal)
    assert math.isnan(at_least(math.nan, 0))


# ---- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_kth_largest(kind: type, data: st.DataObject) -> None:
    floats = st.floats(allow_nan=False, width=32)
    values = np.array(data.draw(st.lists(floats, min_size=1, max_size=60)), dtype=kind)
    k = data.draw(st.integers(1, values.size))
    assert core.kth_largest(values, k) == np.sort(values)[::-1][k - 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["normal", "ties", "equal", "wide"])
def test_kth_largest_of_many(kind: type, shape: str) -> None:
    rng = np.random.default_rng(5)
    count = 100_000  # enough for the histogram
    values = {
        "normal": rng.standard_normal(count),
        "ties": rng.integers(-3, 3, count),
        "equal": np.zeros(count),
        "wide": rng.standard_normal(count) * 10.0 ** rng.integers(-44, 38, count),
    }[shape].astype(kind)
    descending = np.sort(values)[::-1]
    for k in (1, 2, 777, count // 2, count - 1, count):
        assert core.kth_largest(values, k) == descending[k - 1]


def test_kth_largest_counts_nan_as_the_largest() -> None:
    values = np.array([1.0, np.nan, 3.0])
    assert math.isnan(core.kth_largest(values, 1))
    assert core.kth_largest(values, 2) == 3.0


@pytest.mark.parametrize(("count", "k"), [(0, 1), (3, 0), (3, 4), (3, -1)])
def test_kth_largest_refuses_k_out_of_range(count: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"kth_largest: k: wanted 1 to {count}, got {k}"):
        core.kth_largest(np.zeros(count), k)


# ---- bits -------------------------------------------------------------------------------------------


@given(bits=st.lists(st.booleans(), max_size=200))
def test_flat_bits(bits: list[bool]) -> None:
    bools = np.array(bits, dtype=bool)
    packed = core.pack_bits(bools)
    np.testing.assert_array_equal(packed, np.packbits(bools, bitorder="little"))
    np.testing.assert_array_equal(core.unpack_bits(packed, bools.size), bools)
    assert core.count_bits(packed) == sum(bits)


@given(rows=st.integers(0, 5), columns=st.integers(0, 70), seed=st.integers(0, 99))
def test_row_words(rows: int, columns: int, seed: int) -> None:
    bools = np.random.default_rng(seed).random((rows, columns)) < 0.5
    words = core.pack_rows(bools)
    padded = np.zeros((rows, 16 * math.ceil(columns / 16)), dtype=bool)
    padded[:, :columns] = bools
    expected = np.packbits(padded, axis=1, bitorder="little").view("<i2")
    assert words.dtype == np.int16
    assert words.shape == (rows, math.ceil(columns / 16))
    np.testing.assert_array_equal(words, expected)
    np.testing.assert_array_equal(core.unpack_rows(words, columns), bools)
    assert core.count_bits(words) == bools.sum()


def test_bits_of_strided_arrays() -> None:
    bools = np.random.default_rng(0).random((37, 50)) < 0.5
    np.testing.assert_array_equal(core.pack_rows(bools.T), core.pack_rows(bools.T.copy()))
    np.testing.assert_array_equal(core.pack_bits(bools[:, ::3]), core.pack_bits(bools[:, ::3].copy()))
    with pytest.raises(ValueError, match="count_bits: array: wanted contiguous"):
        core.count_bits(np.zeros((4, 4), dtype=np.int16)[:, ::2])


def test_bits_refuse_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="unpack_bits: bytes"):
        core.unpack_bits(np.zeros(2, dtype=np.uint8), 17)
    with pytest.raises(ValueError, match="unpack_bits: bytes"):
        core.unpack_bits(np.zeros(2, dtype=np.uint8), -1)
    with pytest.raises(ValueError, match="pack_rows: bools: wanted two dimensions"):
        core.pack_rows(np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match="unpack_rows: words"):
        core.unpack_rows(np.zeros((2, 2), dtype=np.int16), 16)
    with pytest.raises(TypeError):
        core.pack_bits(np.zeros(3, dtype=np.uint8))
