"""Walk ops at the edges of how the CUDA kernels cut them up. test_cuda_kernels.py runs these on the host, too."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pathprune import walk_ops, walk_reference
from test_walk_ops import both, literal_marks, sample


@dataclass(frozen=True)
class Step:
    """A sample of `test_walk_ops.sample`; its units are those of one group, side by side."""

    name: str
    shape: tuple[int, int, int, int]
    to_rows: bool
    kind: str = "plain"
    dtype: torch.dtype = torch.float32
    walkers: int = 300
    powers: tuple[int, ...] = (1,)


# A job is up to 16 columns, or a row, and up to 4096 of its walkers. Its table has 5120 sums; where that is less than
# there are candidates, a sum is of a stretch of them.
STEPS = [
    Step("float32", (1, 70, 21, 1), True, powers=(1, 2, 0, -1)),
    Step("bfloat16", (1, 33, 40, 1), True, dtype=torch.bfloat16),
    Step("float16", (1, 33, 17, 1), True, "gains", torch.float16, powers=(2,)),
    Step("float64", (1, 40, 9, 1), True, "spread", torch.float64, powers=(1, -1)),
    Step("rows", (1, 9, 70, 1), False, "gains", powers=(1, -1)),
    Step("zeros", (1, 40, 20, 1), True, "zeros", powers=(1, 0)),
    Step("zero_rows", (1, 6, 40, 1), False, "zeros", torch.float16, powers=(2, -1)),
    Step("groups", (3, 6, 10, 9), True, "gains", torch.bfloat16),
    Step("groups_of_rows", (3, 6, 10, 9), False, "zeros"),
    Step("few_entries", (2, 40, 11, 3), True, "zeros", torch.bfloat16, powers=(0,)),
    Step("one_unit", (1, 50, 1, 1), True, walkers=9000),
    Step("one_candidate", (1, 1, 4, 1), True),
    Step("far_between", (1, 20, 700, 1), True, walkers=3),
    Step("stretches", (1, 1500, 9, 1), True, "zeros"),
    Step("stretches_of_halves", (1, 1281, 17, 1), True, "gains", torch.bfloat16),
    Step("stretches_of_entries", (1, 5200, 2, 9), True, "gains"),
    Step("long_row", (1, 2, 12_001, 1), False, "gains", torch.float16),
    Step("just_fits", (1, 2, 5120, 1), False, "zeros"),
    Step("many_jobs", (1, 40, 30, 1), False, walkers=4000),
    Step("very_long_row", (1, 1, 400_000, 1), False, walkers=40),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_steps(step: Step, device: torch.device) -> None:
    made = sample(step.shape, step.dtype, step.kind, step.to_rows, step.walkers)
    given = {name: value if value is None else value.to(device) for name, value in made.items()}
    for power in step.powers:
        both(given, power, step.to_rows)


@dataclass(frozen=True)
class Field:
    """A step over units and positions; a warp takes a walker, and 32 entries of candidates at a time."""

    name: str
    shape: tuple[int, int, int, int]
    to_rows: bool
    near: int = 5  # positions
    far: int = 7
    kind: str = "plain"
    dtype: torch.dtype = torch.float32
    power: int = 1
    walkers: int = 200


FIELDS = [
    Field("float32", (1, 40, 30, 9), True, power=2),
    Field("bfloat16", (2, 6, 10, 9), False, dtype=torch.bfloat16),
    Field("float16", (1, 33, 8, 4), True, dtype=torch.float16, power=-1),
    Field("float64", (1, 21, 9, 3), False, kind="spread", dtype=torch.float64),
    Field("zeros", (1, 24, 16, 2), True, kind="zeros", power=0),
    Field("one_warp", (1, 32, 4, 1), True, near=1, far=1),
    Field("a_warp_and_one", (1, 33, 4, 1), True, near=1, far=1),
    Field("one_choice", (1, 1, 1, 1), True, near=1, far=1),
    Field("long", (1, 2, 3001, 1), False, near=1, far=1, walkers=70),
    Field("no_candidates", (1, 0, 3, 2), True, walkers=9),
    Field("no_walkers", (1, 4, 3, 2), True, walkers=0),
]


def in_field(case: Field) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(sum(case.shape))
    given = sample(case.shape, case.dtype, case.kind, case.to_rows, case.walkers)
    groups, rows, columns, entries = case.shape
    flow = torch.rand(groups * (rows if case.to_rows else columns), case.far, generator=made, dtype=torch.float64)
    flow = flow * torch.exp2(torch.randint(-30, 30, flow.shape, generator=made).double())
    flow[torch.rand(flow.shape, generator=made) < 0.2] = 0
    leads_to = torch.randint(-1, case.far, (case.near, entries), generator=made)
    leads_to[-1] = -1 if case.near > 1 else 0  # from the last position nothing leads on
    positions = torch.randint(0, case.near, (case.walkers,), generator=made)
    kept = {name: given[name] for name in ("weight", "units", "walks")}
    return {**kept, "positions": positions, "flow": flow, "leads_to": leads_to}


@pytest.mark.parametrize("case", FIELDS, ids=lambda case: case.name)
def test_steps_in_a_field(case: Field, device: torch.device) -> None:
    given = {name: value.to(device) for name, value in in_field(case).items()}
    got = walk_ops.walk_field_step(**given, to_rows=case.to_rows, seed=4, step=9, power=case.power)
    names = ("weight", "units", "positions", "walks", "flow", "leads_to")
    wanted = walk_reference.walk_field_step(*(given[name] for name in names), case.power, case.to_rows, 4, 9)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_places_outside_a_field_are_refused(device: torch.device) -> None:
    given = {name: value.to(device) for name, value in in_field(FIELDS[0]).items()}

    def refused(name: str, place: int, value: int, message: str) -> None:
        changed = given[name].clone()
        changed.view(-1)[place] = value
        values = {**given, name: changed}
        names = ("weight", "units", "positions", "walks", "flow", "leads_to")
        with pytest.raises(ValueError, match=f"walk_field_step: {message}$"):
            torch.ops.pathprune.walk_field_step(*(values[n] for n in names), 1, True, 0, 0)

    refused("units", 150, 30, "units: wanted 0 to 29, got 30")
    refused("positions", 199, -2, "positions: wanted 0 to 4, got -2")
    refused("leads_to", 44, 7, "leads_to: wanted positions below 7, got 7")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 70, 5, 9), (1, 3, 300, 1), (1, 0, 2, 3), (1, 4, 4, 25)])
def test_masses(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    for kind in ("gains", "spread", "zeros"):
        made = sample(shape, dtype, kind, True, 0) if shape[1] else {"weight": torch.ones(shape), "valid": None}
        weight, valid = made["weight"].to(device), made["valid"]
        valid = valid if valid is None else valid.to(device)
        for power in (1, 2, 0, -1):
            got = walk_ops.walk_mass(weight, valid, power)
            assert torch.equal(got, walk_reference.walk_mass(weight, valid, power))


def test_rows_of_equal_weights(device: torch.device) -> None:
    """Sums that are powers of two, where a scale changes; then all but one weight as small as can be."""
    for count in (1, 2, 3, 64, 65):
        for least in (1.0, 5e-324):
            weight = torch.full((1, count, 3, 1), least, dtype=torch.float64, device=device)
            weight[0, 0] = 1
            units = torch.arange(60, device=device) % 3
            both({"weight": weight, "units": units, "walks": units + 2**40, "gain": None, "valid": None}, 1, True)


def test_columns_of_few_weights(device: torch.device) -> None:
    """Most warps find nothing but zeros, or gains of zero."""
    weight = torch.zeros(1, 700, 20, 1, device=device)
    gain = torch.zeros(700, dtype=torch.float64, device=device)
    gain[[5, 333, 690]] = 2.0
    columns, units = torch.arange(20, device=device), torch.arange(200, device=device) % 20
    given = {"weight": weight, "units": units, "walks": units * 5, "valid": None}
    both({**given, "gain": gain}, 1, True)
    for row in (0, 37 * columns % 700, 699 - 11 * columns):
        weight[0, row, columns, 0] = 1.0 + columns
        both({**given, "gain": None}, 2, True)


def test_no_way_on(device: torch.device) -> None:
    """Without a gain, without a valid entry, without a candidate."""
    units = torch.arange(40, device=device) % 4
    weight = torch.ones(2, 3, 2, 2, device=device)
    gain = torch.zeros(6, dtype=torch.float64, device=device)
    gain[:2] = torch.tensor([1.0, -0.0])
    valid = torch.zeros(2, dtype=torch.bool, device=device)
    for options in ({"gain": gain}, {"valid": valid}, {"weight": weight[:, :0]}):
        given = {"weight": weight, "units": units, "walks": units, "gain": None, "valid": None, **options}
        if "weight" in options:
            reached, edges = walk_ops.walk_step(**given, to_rows=True, seed=1, step=2)
            assert set(reached.tolist()) == set(edges.tolist()) == {-1}
        else:
            both(given, 1, True)


def test_the_first_unit_that_is_not_there_is_refused(device: torch.device) -> None:
    units = torch.zeros(700, dtype=torch.int64, device=device)
    units[300], units[500], units[699] = -7, 9, -1
    weight = torch.ones(1, 3, 4, 1, device=device)
    for first in (-7, 9, -1):
        with pytest.raises(ValueError, match=f"walk_step: units: wanted 0 to 3, got {first}$"):
            torch.ops.pathprune.walk_step(weight, units, units, None, None, None, 1, True, 0, 0)
        units[units == first] = 1
    torch.ops.pathprune.walk_step(weight, units, units, None, None, None, 1, True, 0, 0)


def test_choices(device: torch.device) -> None:
    made = torch.Generator().manual_seed(3)
    count = torch.randint(0, 40, (60,), generator=made)
    count[0] = 3000
    start = torch.cat((torch.zeros(1, dtype=torch.int64), count.cumsum(0)))
    integers = torch.randint(0, 2**45, (int(start[-1]),), generator=made)
    integers[torch.rand(len(integers), generator=made) < 0.3] = 0
    integers[start[5] : start[6]] = 0
    cdf = torch.cat([part.cumsum(0) for part in integers.split(count.tolist())])
    rows, walks = torch.randint(0, 60, (2000,), generator=made), torch.randint(0, 2**50, (2000,), generator=made)
    given = [value.to(device) for value in (cdf, start, rows, walks)]
    for word in range(4):
        got = walk_ops.walk_choose(*given, seed=8, step=1, word=word)
        assert torch.equal(got, walk_reference.walk_choose(*given, 8, 1, word))
    none = given[2][:0]
    assert walk_ops.walk_choose(given[0], given[1], none, none, seed=8, step=1, word=0).numel() == 0
    assert walk_ops.walk_choose(none, given[1][:1], none, none, seed=8, step=1, word=0).numel() == 0


def test_bad_choices_are_refused(device: torch.device) -> None:
    cdf = torch.arange(1, 5, device=device)
    zeros = torch.zeros(300, dtype=torch.int64, device=device)

    def refused(start: list[int], rows: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=f"walk_choose: {message}$"):
            torch.ops.pathprune.walk_choose(cdf, torch.tensor(start, device=device), rows, zeros, 0, 0, 0)

    refused([0, 2, 1, 0], zeros, "row_start: wanted numbers that do not descend, got 1")
    refused([-1, 2, 3], zeros, "row_start: wanted numbers that do not descend, got 2")
    refused([0, 5], zeros, "row_start: wanted at most 4 entries, got 5")
    rows = zeros.clone()
    rows[270], rows[280] = 2, -3
    refused([0, 2, 4], rows, "rows: wanted 0 to 1, got 2")
    refused([0, 5], rows, "row_start: wanted at most 4 entries, got 5")
    rows[270] = 0
    refused([0, 2, 4], rows, "rows: wanted 0 to 1, got -3")


@pytest.mark.parametrize(("walks", "steps", "words"), [(1, 1, 1), (900, 3, 40), (37, 40, 30), (64, 5, 2), (3, 0, 1)])
def test_marks(walks: int, steps: int, words: int, device: torch.device) -> None:
    made = torch.Generator().manual_seed(walks)
    edges = torch.randint(-20, 64 * words, (walks, steps), generator=made).to(device)
    before = torch.randint(-(2**62), 2**62, (words,), generator=made).to(device)
    before[::2] = 0
    mark_all = before.clone()
    _, most = walk_ops.walk_mark_(mark_all, edges, 2**40).tolist()
    for target in sorted({0, 1, most // 3, most // 2, most - 1, most, most + 1} - {-1}):
        bits, wanted = before.clone(), before.clone()
        got = walk_ops.walk_mark_(bits, edges, target)
        assert torch.equal(got, walk_reference.walk_mark_(wanted, edges, target)), target
        assert torch.equal(bits, wanted)
        seen = {64 * k + b for k, word in enumerate(before.tolist()) for b in range(64) if word >> b & 1}
        assert tuple(got.tolist()) == literal_marks(seen, edges, target)


def test_refused_marks_leave_the_bits(device: torch.device) -> None:
    edges = torch.arange(1200, device=device).view(400, 3) % 128
    edges[100, 2], edges[300, 0] = 128, 500
    bits = torch.tensor([6, -9], device=device)
    with pytest.raises(ValueError, match=r"walk_mark_: edges: wanted places below 128, got 128$"):
        walk_ops.walk_mark_(bits, edges, 1)
    assert bits.tolist() == [6, -9]
    none = torch.zeros((0, 3), dtype=torch.int64, device=device)
    assert walk_ops.walk_mark_(bits, none, 5).tolist() == [0, 0]
    assert walk_ops.walk_mark_(bits[:0], none, 0).tolist() == [0, 0]
