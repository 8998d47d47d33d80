"""Sample arguments for every op: weights, masks and flows, and a row per op that makes calls of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pathprune import reference
from pathprune.checks import accumulate_dtype
from pathprune.reference import WeightMap

Arguments = tuple[Any, ...]  # in the order of the op's schema


@dataclass(frozen=True)
class Case:
    """What the arguments of a call are made from.

    `positions` None: scores without flows. `density` None: no mask. `packed`: half of what is stored is live.
    `values`: how weights and flows are drawn.
    """

    name: str
    groups: int = 1
    rows: int = 5
    columns: int = 37
    positions: int | None = 1
    dtype: torch.dtype = torch.float32
    density: float | None = 0.5
    packed: bool = False
    values: str = "normal"
    device: str = "cpu"


CASES = [
    Case("plain", columns=48, density=None),
    Case("ragged"),
    Case("groups", groups=3, rows=4, columns=33, positions=2, dtype=torch.float64),
    Case("positions", groups=2, columns=40, positions=3),
    Case("many_positions", rows=3, columns=21, positions=19),
    Case("no_flows", positions=None),
    Case("no_flows_float64", positions=None, dtype=torch.float64, density=None),
    Case("bfloat16", dtype=torch.bfloat16, columns=70),
    Case("float16", dtype=torch.float16, columns=16, positions=3),
    Case("float64", dtype=torch.float64, columns=130),
    Case("packed", groups=2, columns=80, packed=True),
    Case("packed_ragged", rows=9, positions=3, dtype=torch.float64, packed=True),
    Case("packed_bfloat16", rows=9, dtype=torch.bfloat16, packed=True),
    Case("packed_no_flows", positions=None, packed=True),
    Case("packed_sparse", rows=40, columns=100, density=0.02, packed=True),
    Case("all_live", density=1.0),
    Case("all_masked", density=0.0),
    Case("packed_all_masked", density=0.0, packed=True),
    Case("ties", rows=20, values="ties"),
    Case("packed_ties", rows=20, values="ties", packed=True),
    Case("zeros", values="zeros"),
    Case("nonfinite", rows=12, columns=50, values="nonfinite"),
    Case("nonfinite_positions", rows=12, positions=3, dtype=torch.float64, values="nonfinite"),
    Case("tiny_flows", values="tiny"),
    Case("one_weight", rows=1, columns=1, density=None),
    Case("one_row", rows=1, columns=1000),
    Case("one_column", rows=1000, columns=1),
    Case("no_groups", groups=0),
    Case("no_rows", rows=0),
    Case("no_columns", columns=0),
    Case("no_columns_no_mask", columns=0, density=None),
    Case("no_positions", positions=0),
    Case("packed_no_rows", rows=0, packed=True),
    Case("packed_no_columns", columns=0, packed=True),
]
# Work enough for several threads.
LARGE = [
    Case("large", rows=300, columns=400),
    Case("large_positions", groups=2, rows=100, columns=523, positions=3, density=None),
    Case("large_packed", rows=300, columns=400, density=0.1, packed=True),
    Case("large_bfloat16", rows=100, columns=1030, dtype=torch.bfloat16, density=0.3),
    Case("large_row", rows=1, columns=100_000),
]
SMALL = [case for case in CASES if case.name in ("ragged", "groups", "no_flows", "packed", "no_rows")]


@dataclass(frozen=True)
class Drawn:
    """The tensors of a case, and thresholds that lie on its scores."""

    case: Case
    dense: Tensor  # [G, O, K]
    mask: Tensor | None  # [G, O, W] int16
    x: Tensor | None  # [G, T, K]
    g: Tensor | None  # [G, T, O]
    weight: Tensor  # dense, or the packed values [stored + 16]
    layout: Tensor | None  # [G, O, W] int16
    row_start: Tensor | None  # [G * O + 1]
    columns: int
    lo: float = field(default=0.0)
    hi: float = field(default=0.0)
    inside: int = field(default=0)
    next_above: float = field(default=0.0)  # the next number above lo

    @property
    def packed(self) -> tuple[Tensor | None, Tensor | None, int]:
        return self.layout, self.row_start, self.columns

    @property
    def scored(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.weight, self.mask, self.x, self.g

    def written(self) -> Tensor:
        """A mask for an op to write to."""
        if self.mask is not None:
            return self.mask.clone()
        return reference.mask_pack(torch.ones_like(self.dense, dtype=torch.bool))

    def flow(self, units: int, positions: int = 2) -> Tensor:
        """[G, T, units] in A: another flow."""
        generator = torch.Generator().manual_seed(7)
        flow = torch.rand(self.case.groups, positions, units, generator=generator, dtype=torch.float64)
        return flow.to(self.case.device, accumulate_dtype(self.dense.dtype))


def _values(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float64 of the shape, on the CPU."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.values == "ties":
        return (values * 2).round() / 2
    if case.values == "zeros":
        return values.sign() * 0
    if case.values == "nonfinite":
        kind = torch.randint(0, 12, shape, generator=generator)
        for k, special in enumerate((math.nan, math.inf, -math.inf)):
            values = torch.where(kind == k, special, values)
    return values


def draw(case: Case) -> Drawn:
    """The tensors of a case, the same ones for every call."""
    generator = torch.Generator().manual_seed(20)
    shape = (case.groups, case.rows, case.columns)
    dense = _values(case, shape, generator).to(case.device, case.dtype)
    layout = row_start = mask = x = g = None
    weight = dense
    share = torch.rand(shape, generator=generator).to(case.device)
    if case.packed:
        assert case.density is not None
        layout = reference.mask_pack(share < 2 * case.density)
        weight, row_start = reference.compact_weight(dense, layout, None, None, case.columns)
    if case.density is not None:
        mask = reference.mask_pack(share < case.density)
    if case.positions is not None:
        scale = 1e-30 if case.values == "tiny" else 1.0
        flow_case = replace(case, values="normal" if case.values == "nonfinite" else case.values)
        kind = {"device": case.device, "dtype": accumulate_dtype(case.dtype)}
        x = scale * _values(flow_case, (case.groups, case.positions, case.columns), generator).to(**kind)
        g = _values(flow_case, (case.groups, case.positions, case.rows), generator).abs().to(**kind)
    drawn = Drawn(case, dense, mask, x, g, weight, layout, row_start, case.columns)
    return replace(drawn, **_thresholds(drawn))


def _thresholds(drawn: Drawn) -> dict[str, Any]:
    """A bracket with its ends on scores (by |w|), or around 0 where there is no score."""
    scores = reference.through_flow(*drawn.scored, WeightMap.ABS, *drawn.packed)
    live = torch.ones_like(scores).bool() if drawn.mask is None else reference.mask_unpack(drawn.mask, drawn.columns)
    ordered = scores[live & scores.isfinite()].sort().values
    if ordered.numel() == 0:
        return {"lo": -0.5, "hi": 0.5, "next_above": 0.5}
    lo, hi = ordered[ordered.numel() // 3], ordered[2 * ordered.numel() // 3]
    above = torch.nextafter(lo, lo.new_tensor(math.inf))
    inside = ((scores >= lo) & (scores <= hi) & live).sum()
    return {"lo": float(lo), "hi": float(hi), "next_above": float(above), "inside": int(inside)}


def _linear(d: Drawn) -> Iterator[Arguments]:
    for f in WeightMap:
        yield d.weight, d.mask, d.flow(d.columns), int(f), False, *d.packed
        yield d.weight, d.mask, d.flow(d.case.rows), int(f), True, *d.packed
    if d.x is not None and d.g is not None:
        yield d.weight, d.mask, d.x, int(WeightMap.ABS), False, *d.packed
        yield d.weight, d.mask, d.g, int(WeightMap.IDENTITY), True, *d.packed


def _through_flow(d: Drawn) -> Iterator[Arguments]:
    for s in WeightMap:
        yield *d.scored, int(s), *d.packed


def _collect(d: Drawn) -> Iterator[Arguments]:
    everything = d.dense.numel()
    yield *d.scored, int(WeightMap.ABS), d.lo, d.hi, d.inside, *d.packed
    yield *d.scored, int(WeightMap.ABS), d.lo, d.lo, everything, *d.packed
    yield *d.scored, int(WeightMap.ABS), d.lo, d.hi, d.inside // 2, *d.packed
    yield *d.scored, int(WeightMap.IDENTITY), -math.inf, math.inf, everything, *d.packed
    yield *d.scored, int(WeightMap.SQUARE), d.hi, d.lo, 0, *d.packed


def _histogram(d: Drawn) -> Iterator[Arguments]:
    for s, stride in (
        (WeightMap.ABS, 1),
        (WeightMap.IDENTITY, 3),
        (WeightMap.SQUARE, 10_000),
        (WeightMap.ONE, 2),
    ):
        yield *d.scored, int(s), stride, *d.packed


def _thresholded(d: Drawn) -> Iterator[tuple[int, float, float, int]]:
    """(s, at_least, above, cut)"""
    half = d.dense.numel() // 2
    yield WeightMap.ABS, d.lo, d.next_above, half
    yield WeightMap.ABS, d.lo, d.hi, half
    yield WeightMap.IDENTITY, 0.0, math.inf, half
    yield WeightMap.SQUARE, math.inf, math.inf, 0
    yield WeightMap.ONE, -math.inf, -math.inf, 0


def _prune(d: Drawn) -> Iterator[Arguments]:
    for s, at_least, above, cut in _thresholded(d):
        yield d.weight, d.written(), d.x, d.g, int(s), at_least, above, cut, *d.packed


def _nth(d: Drawn) -> Iterator[Arguments]:
    for n in (0, 1, 7, d.dense.numel()):
        yield *d.scored, int(WeightMap.ABS), d.lo, d.next_above, n, *d.packed
        yield *d.scored, int(WeightMap.IDENTITY), -math.inf, d.hi, n, *d.packed


def _linear_collect(d: Drawn) -> Iterator[Arguments]:
    if d.x is not None and d.g is not None:
        scored, everything = (d.weight, d.mask, d.x, d.g), d.dense.numel()
        yield *scored, int(WeightMap.ABS), int(WeightMap.ABS), d.lo, d.hi, d.inside, *d.packed
        yield *scored, int(WeightMap.ONE), int(WeightMap.SQUARE), d.lo, math.inf, everything, *d.packed
        yield *scored, int(WeightMap.SQUARE), int(WeightMap.ABS), d.lo, d.hi, d.inside // 2, *d.packed


def _linear_prune(d: Drawn) -> Iterator[Arguments]:
    if d.x is not None and d.g is not None:
        for s, *bounds in _thresholded(d):
            x = d.flow(d.columns, positions=1 if s == WeightMap.ABS else 4)
            yield d.weight, d.written(), d.x, d.g, int(s), *bounds, x, int(WeightMap.ABS), *d.packed


def _masked_weight(d: Drawn) -> Iterator[Arguments]:
    for f in WeightMap:
        yield d.dense, d.mask, int(f)


def _fingerprint(d: Drawn) -> Iterator[Arguments]:
    yield (d.weight,)
    yield (d.written(),)
    yield (d.written().flatten()[1:],)
    yield (d.weight[..., ::2],)
    yield (d.written() > 0,)


def _kth(d: Drawn) -> Iterator[Arguments]:
    scores = reference.through_flow(*d.scored, WeightMap.IDENTITY, *d.packed).flatten()
    scores = scores[scores.isfinite()]
    for k in sorted({1, scores.numel() // 3, scores.numel()}):
        if 1 <= k <= scores.numel():
            yield scores, k


def _gumbel(d: Drawn) -> Iterator[Arguments]:
    scores = reference.through_flow(*d.scored, WeightMap.ABS, *d.packed).nan_to_num(posinf=2.0).abs()
    yield scores, 0, 1.0, 1, 0
    yield scores.flatten(), -3000, 0.5, -(2**40) - 3, 2**32 - 5
    yield scores, 5000, 0.0, 2**62 + 1, 2**40


ROWS: dict[str, Callable[[Drawn], Iterator[Arguments]]] = {
    "path_flow_linear": _linear,
    "through_flow": _through_flow,
    "through_flow_collect": _collect,
    "through_flow_histogram": _histogram,
    "through_flow_prune_": _prune,
    "path_flow_linear_collect": _linear_collect,
    "path_flow_linear_prune_": _linear_prune,
    "through_flow_nth": _nth,
    "masked_weight": _masked_weight,
    "mask_pack": lambda d: iter([(reference.mask_unpack(d.written(), d.columns),)]),
    "mask_unpack": lambda d: iter([(d.written(), d.columns)]),
    "mask_count": lambda d: iter([(d.written(),)]),
    "fingerprint": _fingerprint,
    "compact_weight": lambda d: iter([(d.weight, d.written(), *d.packed)]),
    "kth_largest": _kth,
    "gumbel_keys": _gumbel,
}


def samples(op: str, case: Case, device: str = "cpu") -> list[Arguments]:
    """The calls of an op on a case."""
    return list(ROWS[op](draw(replace(case, device=device))))
