"""The walk ops: C++ against the plain-torch definition, the definition against literal draws; errors; threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pathprune import walk_ops, walk_reference
from pathprune._library import core

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 37, 53, 1), (2, 5, 7, 9), (3, 1, 4, 3), (1, 64, 1, 1), (1, 1, 1, 1), (1, 300, 200, 1), (1, 16, 8, 25)]


def sample(shape: tuple[int, ...], dtype: torch.dtype, kind: str, to_rows: bool, n: int = 400) -> dict:
    made = torch.Generator().manual_seed(sum(shape) + len(kind))
    weight = torch.randn(shape, generator=made).to(dtype)
    groups, rows, columns, entries = shape
    sources, targets = (columns, rows) if to_rows else (rows, columns)
    gain = valid = None
    if kind == "zeros":
        weight[torch.rand(shape, generator=made) < 0.5] = 0
        weight[:, :, 0] = 0
        weight[:, 0] = 0
    if kind == "gains":
        gain = torch.rand(groups * targets, generator=made, dtype=torch.float64)
        gain[torch.rand(groups * targets, generator=made) < 0.3] = 0
        valid = torch.rand(entries, generator=made) < 0.7
    if kind == "spread":
        weight = (weight.double() * torch.exp2(torch.randint(-60, 60, shape, generator=made).double())).to(dtype)
        weight = weight.nan_to_num(1.0, 1.0, -1.0)
    units = torch.randint(0, groups * sources, (n,), generator=made)
    walks = torch.randint(0, 2**40, (n,), generator=made)
    return {"weight": weight, "units": units, "walks": walks, "gain": gain, "valid": valid}


def both(made: dict, power: int, to_rows: bool, seed: int = 5, step: int = 3) -> None:
    got = walk_ops.walk_step(**made, power=power, to_rows=to_rows, seed=seed, step=step)
    wanted = walk_reference.walk_step(
        made["weight"], made["units"], made["walks"], None, made["gain"], made["valid"], power, to_rows, seed, step
    )
    mass = walk_ops.walk_mass(made["weight"], made["valid"], power)
    assert torch.equal(mass, walk_reference.walk_mass(made["weight"], made["valid"], power))
    given = walk_ops.walk_step(**made, mass=mass, power=power, to_rows=to_rows, seed=seed, step=step)
    for result in (got, given):
        for a, b in zip(result, wanted, strict=True):
            assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "zeros", "gains", "spread"])
def test_a_step_is_that_of_the_definition(dtype, shape, kind, device):
    for power in (1, 2, 0, -1):
        for to_rows in (True, False):
            made = sample(shape, dtype, kind, to_rows)
            both({k: v if v is None else v.to(device) for k, v in made.items()}, power, to_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [5, 33, 130])
def test_rows_with_halves_and_tiny_weights(dtype, columns):
    """Beside a weight of 1 the others scale to k + 1/2, to the number below that, and to nothing."""
    bits = 62 - (columns - 1).bit_length()
    half = 2.0 ** -(bits + 1)
    below = float(torch.nextafter(torch.tensor(half, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    smallest = float(torch.tensor(2.0 ** (-149 if dtype == torch.float32 else -1074), dtype=dtype))
    row = torch.tensor([half, below, 3 * half, 5 * half, smallest], dtype=dtype).repeat(columns // 5 + 1)[:columns]
    row[columns // 2] = 1.0
    assert not torch.equal(walk_reference.fixed_rows(row[None].double()), torch.zeros(1, columns, dtype=torch.int64))
    for scale in (1.0, 2.0**-100, 2.0**60):
        made = {"weight": (row * scale)[None, None, :, None], "units": torch.zeros(2000, dtype=torch.int64)}
        made |= {"walks": torch.arange(2000), "gain": None, "valid": None}
        both(made, 1, False)
        both({**made, "weight": made["weight"].transpose(1, 2).contiguous()}, 1, True)


@pytest.mark.parametrize("entries", [1, 9])
@pytest.mark.parametrize("off", [0.0, 2.0**-52, -(2.0**-52), 2.0**-21, -(2.0**-21), 2.0**-19])
def test_sums_beside_a_power_of_two(off, entries):
    """Where the sum of a row, or of a kernel, leaves its scale open."""
    for columns in (4, 64, 700):
        row = torch.full((columns, entries), 1.0 / (columns * entries), dtype=torch.float64)
        row[0] += off / entries
        for dtype in (torch.float64, torch.float32):
            for scale in (1.0, 2.0**-990, 2.0**-120, 2.0**120):
                weight = (row * scale).to(dtype)[None, None]
                if not bool((weight > 0).any()):
                    continue
                made = {"weight": weight, "units": torch.zeros(500, dtype=torch.int64), "walks": torch.arange(500)}
                both(made | {"gain": None, "valid": None}, 1, False)


def test_the_definition_is_the_smallest_index_whose_cdf_exceeds_the_word():
    weight = torch.randn(1, 9, 6, 1, dtype=torch.float64)
    units, walks = torch.arange(6).repeat(50), torch.arange(300)
    _, edges = walk_reference.walk_step(weight, units, walks, None, None, None, 2, True, 11, 4)
    words = core.philox(11, walks.numpy().astype(np.uint64), 4)[:, 0].astype(np.uint64) << np.uint64(32)
    for unit, word, edge in zip(units.tolist(), words, edges.tolist(), strict=True):
        cdf, _, _ = core.fixed_cdf((weight[0, :, unit, 0] ** 2).numpy())
        assert int(core.fixed_cdf_draw(cdf, word[None])[0]) * 6 + unit == edge


def test_non_contiguous_weights():
    weight = torch.randn(1, 40, 30, 1).transpose(1, 2)
    units, walks = torch.randint(0, 40, (100,)), torch.arange(100)
    for a, b in zip(
        walk_ops.walk_step(weight, units, walks, to_rows=True, seed=1, step=1),
        walk_ops.walk_step(weight.contiguous(), units, walks, to_rows=True, seed=1, step=1),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_steps_do_not_depend_on_threads_or_batches():
    made = sample((1, 300, 200, 1), torch.float32, "plain", True, n=3000)
    options = {"to_rows": True, "seed": 9, "step": 2}
    whole = walk_ops.walk_step(**made, **options)
    before = torch.get_num_threads()
    for threads in (2, 7):
        torch.set_num_threads(threads)
        again = walk_ops.walk_step(**made, **options)
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for batch in (1, 64):
        cut = slice(0, batch)
        part = {**made, "units": made["units"][cut], "walks": made["walks"][cut]}
        again = walk_ops.walk_step(**part, **options)
        assert all(torch.equal(a[cut], b) for a, b in zip(whole, again, strict=True))


def test_zero_weights_are_never_drawn_unless_all_are():
    weight = torch.zeros(1, 4, 3, 1)
    weight[0, 1, 0] = -2.0
    units, walks = torch.tensor([0, 1]).repeat(400), torch.arange(800)
    for power in (1, 2, 0, -1):
        reached, _ = walk_ops.walk_step(weight, units, walks, to_rows=True, seed=0, step=0, power=power)
        assert set(reached[units == 0].tolist()) == {1}
        assert set(reached[units == 1].tolist()) == {0, 1, 2, 3}


def test_without_a_gain_there_is_no_way_on():
    weight, gain = torch.randn(1, 4, 3, 1), torch.zeros(4, dtype=torch.float64)
    reached, edges = walk_ops.walk_step(
        weight, torch.arange(3), torch.arange(3), to_rows=True, seed=0, step=0, gain=gain
    )
    assert reached.tolist() == edges.tolist() == [-1, -1, -1]


def test_no_walkers_and_no_candidates(device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for shape in ((1, 4, 3, 1), (1, 0, 3, 1), (0, 4, 3, 1)):
        reached, edges = walk_ops.walk_step(torch.randn(shape, device=device), none, none, to_rows=True, seed=0, step=0)
        assert reached.numel() == edges.numel() == 0
    units = torch.zeros(2, dtype=torch.int64, device=device)
    reached, _ = walk_ops.walk_step(torch.randn(1, 0, 3, 1, device=device), units, units, to_rows=True, seed=0, step=0)
    assert reached.tolist() == [-1, -1]


def test_choices_are_those_of_the_definition(device):
    start = torch.tensor([0, 3, 3, 7], device=device)
    cdf = torch.tensor([5, 6, 2**62, -8, -7, -6, -5], device=device)  # the last row's sums are near 2^64
    rows, walks = torch.arange(3000, device=device) % 3, torch.arange(3000, device=device)
    for word in range(4):
        got = walk_ops.walk_choose(cdf, start, rows, walks, seed=1, step=2, word=word)
        wanted = walk_reference.walk_choose(cdf, start, rows, walks, 1, 2, word)
        assert torch.equal(got, wanted)
        assert set(got[rows == 1].tolist()) == {-1}


def literal_marks(bits: set[int], edges: Tensor, target: int) -> tuple[int, int]:
    new = used = 0
    for walk in edges.tolist():
        if new >= target:
            break
        for place in walk:
            if place >= 0 and place not in bits:
                bits.add(place)
                new += 1
        used += 1
    return used, new


@pytest.mark.parametrize("twin", ["binary", "reference"])
def test_marks_stop_with_the_walk_that_reaches_the_target(twin, device):
    made = torch.Generator().manual_seed(0)
    mark = walk_ops.walk_mark_ if twin == "binary" else walk_reference.walk_mark_
    for _ in range(20):
        edges = torch.randint(-1, 640, (4, 50), generator=made).t().to(device)
        bits, seen = torch.zeros(10, dtype=torch.int64, device=device), set()
        for target in (0, 1, 30, 500, 5):
            assert tuple(mark(bits, edges, target).tolist()) == literal_marks(seen, edges, target)
            marked = {64 * k + b for k, word in enumerate(bits.tolist()) for b in range(64) if word >> b & 1}
            assert marked == seen


BAD_STEPS = {
    "weight": ({"weight": torch.randn(3, 4, 1)}, r"\[G, R, C, E\]"),
    "type": ({"weight": torch.ones(1, 3, 4, 1, dtype=torch.int32)}, r"float32, float64"),
    "units": ({"units": torch.zeros(2)}, "int64, 1 dimension"),
    "range": ({"units": torch.tensor([0, 4])}, "0 to 3, got 4"),
    "negative": ({"units": torch.tensor([0, -1])}, "0 to 3, got -1"),
    "walks": ({"walks": torch.zeros(3, dtype=torch.int64)}, r"int64 \[2\]"),
    "power": ({"power": 3}, "-1, 0, 1 or 2"),
    "step": ({"step": -1}, "a number >= 0"),
    "gain": ({"gain": torch.ones(4, dtype=torch.float64)}, r"float64 \[3\]"),
    "valid": ({"valid": torch.ones(2, dtype=torch.bool)}, r"bool \[1\]"),
}


def test_marks_are_the_same_however_far_the_target(device):
    """Walks are marked step by step where they cannot reach the target, and one by one where they can."""
    made = torch.Generator().manual_seed(0)
    edges = torch.randint(-1, 50_000, (12_000, 3), generator=made)
    seen: set[int] = set()
    taken = []  # how many weights the first walks take
    for walk in edges.tolist():
        seen.update(place for place in walk if place >= 0)
        taken.append(len(seen))
    for target in (1, 100, 191, 192, 193, 5_000, 12_288, 20_000, taken[-1], taken[-1] + 1):
        walks = next((n + 1 for n, count in enumerate(taken) if count >= target), len(taken))
        bits = torch.zeros(50_000 // 64 + 1, dtype=torch.int64, device=device)
        used, marked = walk_ops.walk_mark_(bits, edges.to(device), target).tolist()
        assert (used, marked) == (walks, taken[walks - 1])
        wanted = torch.zeros_like(bits)
        walk_ops.walk_mark_(wanted, edges[:walks].to(device), 10**9)
        assert torch.equal(bits, wanted)


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps_are_refused(name):
    changed, message = BAD_STEPS[name]
    zeros = torch.zeros(2, dtype=torch.int64)
    good = {"weight": torch.randn(1, 3, 4, 1), "units": zeros, "walks": zeros, "to_rows": True, "seed": 0, "step": 0}
    with pytest.raises(ValueError, match=rf"walk_step: .*wanted .*{message}"):
        walk_ops.walk_step(**{**good, **changed})


def test_bad_choices_and_marks_are_refused():
    zeros = torch.zeros(2, dtype=torch.int64)
    start, cdf = torch.tensor([0, 2]), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="walk_choose: word: wanted 0 to 3, got 4"):
        walk_ops.walk_choose(cdf, start, zeros, zeros, seed=0, step=0, word=4)
    with pytest.raises(ValueError, match=r"walk_choose: row_start: wanted 1 dimension of at least 1"):
        walk_ops.walk_choose(cdf, start[:0], zeros, zeros, seed=0, step=0, word=0)
    with pytest.raises(ValueError, match=r"walk_choose: walks: wanted int64 \[2\]"):
        walk_ops.walk_choose(cdf, start, zeros, zeros[:1], seed=0, step=0, word=0)
    with pytest.raises(ValueError, match="walk_choose: rows: wanted 0 to 0, got 1"):
        walk_ops.walk_choose(cdf, start, zeros + 1, zeros, seed=0, step=0, word=0)
    bits = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="walk_mark_: edges: wanted places below 64, got 64"):
        walk_ops.walk_mark_(bits, torch.tensor([[64]]), 1)
    with pytest.raises(ValueError, match="walk_mark_: target: wanted a number >= 0, got -1"):
        walk_ops.walk_mark_(bits, torch.tensor([[3]]), -1)
    with pytest.raises(ValueError, match="walk_mark_: edges: wanted int64"):
        walk_ops.walk_mark_(bits, torch.tensor([3]), 1)
    assert int(bits) == 0


def test_opcheck():
    made = sample((2, 5, 7, 9), torch.float32, "gains", True, n=6)
    tests = ("test_schema", "test_faketensor")
    call = (made["weight"], made["units"], made["walks"], None, made["gain"], made["valid"], 1, True, 0, 1)
    torch.library.opcheck(torch.ops.pathprune.walk_step.default, call, test_utils=tests)
    zeros = torch.zeros(2, dtype=torch.int64)
    call = (torch.tensor([1, 2]), torch.tensor([0, 2]), zeros, zeros, 0, 0, 2)
    torch.library.opcheck(torch.ops.pathprune.walk_choose.default, call, test_utils=tests)
    call = (torch.zeros(3, dtype=torch.int64), torch.tensor([[1, 2], [3, -1]]), 2)
    torch.library.opcheck(torch.ops.pathprune.walk_mark_.default, call, test_utils=tests)
