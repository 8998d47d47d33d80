"""The walk ops in plain torch: what they mean, and what serves where the binary has no kernel.

A walker draws the smallest candidate whose fixed-point CDF exceeds a 32-bit word of ``philox(seed, walk, step)``. A
row of weights becomes integers ``round(w * 2^scale)``, the scale the largest that a bound on the row's sum allows, so
that their sum stays below 2^64 and every probability is within 2^-31 of the true one (csrc/core/fixed_cdf.h). int64
holds the unsigned sums here: it wraps, and comparisons flip the sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import refuse
from .reference import philox

_SIGN = -(2**63)
_LARGEST = 2.0**960  # where |w|^power is cut off, so that no sum over a kernel overflows
_CHUNK = 1 << 22  # weights whose CDFs are made at once


# ---- unsigned 64-bit arithmetic in int64 ---------------------------------------------------------


def _shifted_right(x: Tensor, places: Tensor | int) -> Tensor:
    """A logical shift; by 64 places or more it leaves 0."""
    places = torch.as_tensor(places, device=x.device)
    few = places.clamp(1, 63)
    shifted = (x >> few) & ((1 << (64 - few)) - 1)
    return torch.where(places == 0, x, torch.where(places > 63, 0, shifted))


def _bit_length(x: Tensor) -> Tensor:
    """Of unsigned numbers."""
    length = torch.zeros_like(x)
    for half in (32, 16, 8, 4, 2, 1):
        top = _shifted_right(x, half)
        length = torch.where(top != 0, length + half, length)
        x = torch.where(top != 0, top, x)
    return torch.where(x != 0, length + 1, length)


def _draws(words: Tensor, total: Tensor) -> Tensor:
    """floor(word * total / 2^32) of a 32-bit word and an unsigned total."""
    high, low = _shifted_right(total, 32), total & 0xFFFFFFFF
    return words * high + _shifted_right(words * low, 32)


# ---- rows of integers ----------------------------------------------------------------------------


def _scaled_integers(weights: Tensor, scale: Tensor, half_ulps: int) -> Tensor:
    """floor(weight * 2^scale + half_ulps / 2), exactly, for weights >= 0 and results below 2^64."""
    bits = (weights + 0.0).view(torch.int64)
    exponent, fraction = bits >> 52, bits & (2**52 - 1)
    mantissa = torch.where(exponent > 0, fraction | 2**52, fraction)
    shift = exponent.clamp(min=1) - 1075 + scale
    right = (-shift).clamp(min=1)
    half = torch.where(right <= 54, half_ulps << (right - 1).clamp(max=62), 0)
    rounded = torch.where(right <= 54, _shifted_right(mantissa + half, right), 0)
    return torch.where(shift >= 0, mantissa << shift.clamp(0, 63), rounded)


def fixed_rows(weights: Tensor) -> Tensor:
    """[rows, n] float64 >= 0 -> the rows' integers, int64 as unsigned; a row of zeros stays one."""
    count = weights.shape[1]
    if count == 0:
        return torch.zeros_like(weights, dtype=torch.int64)
    largest = weights.amax(1)
    _, exponent = torch.frexp(torch.where(largest > 0, largest, 1.0))
    rough = 63 - (count - 1).bit_length() - (exponent.to(torch.int64) - 1)
    bound = _scaled_integers(weights, rough[:, None], 0).sum(1) + (count - 1)
    scale = rough + 63 - _bit_length(bound)
    integers = _scaled_integers(weights, scale[:, None], 1)
    return torch.where((largest > 0)[:, None], integers, 0)


def _chosen(integers: Tensor, words: Tensor) -> Tensor:
    """The draw of each row [rows, n] by its word [rows]; -1 where the row is empty or 0."""
    if integers.shape[1] == 0:
        return torch.full_like(words, -1)
    cdf = integers.cumsum(1)
    draw = _draws(words, cdf[:, -1])
    passed = (cdf ^ _SIGN) <= (draw ^ _SIGN)[:, None]
    return torch.where(cdf[:, -1] != 0, passed.sum(1), -1)


def powered(weights: Tensor, power: int) -> Tensor:
    """|w|^power in float64 by multiplication and division only; 0 for a weight of 0."""
    m = weights.double().abs()
    if power == 0:
        return (m > 0).double()
    value = {1: lambda: m, 2: lambda: m * m, -1: lambda: 1 / m}[power]()
    return torch.where(m > 0, value.clamp(max=_LARGEST), 0.0)


def _with_uniform(weights: Tensor, allowed: Tensor) -> Tensor:
    """A row of zeros becomes 1 for each candidate that is allowed."""
    return torch.where((weights > 0).any(1, keepdim=True), weights, allowed.double())


# ---- the ops -------------------------------------------------------------------------------------


def _in_order(entered: Tensor) -> Tensor:
    """The sum over the last axis, entry after entry."""
    total = torch.zeros(entered.shape[:-1], dtype=torch.float64, device=entered.device)
    for e in range(entered.shape[-1]):
        total = total + entered[..., e]
    return total


def walk_mass(weight: Tensor, valid: Tensor | None, power: int) -> Tensor:
    """See ``walk_ops.walk_mass``."""
    entered = powered(weight, power)
    return _in_order(entered if valid is None else entered * valid)


def walk_step(
    weight: Tensor,
    units: Tensor,
    walks: Tensor,
    mass: Tensor | None,
    gain: Tensor | None,
    valid: Tensor | None,
    power: int,
    to_rows: bool,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """See ``walk_ops.walk_step``."""
    groups, rows, columns, entries = weight.shape
    sources, targets = (columns, rows) if to_rows else (rows, columns)
    if units.numel() and not bool(((units >= 0) & (units < groups * sources)).all()):
        refuse(
            "walk_step", "units", f"0 to {groups * sources - 1}", int(units.min() if units.min() < 0 else units.max())
        )
    by_unit = weight.transpose(1, 2) if to_rows else weight  # [G, sources, targets, E]
    by_unit = by_unit.reshape(groups * sources, targets, entries)
    open_entries = torch.ones(entries, dtype=torch.bool) if valid is None else valid
    open_entries = open_entries.to(weight.device)
    gains = torch.ones(groups, targets, dtype=torch.float64, device=weight.device)
    gains = gains if gain is None else gain.reshape(groups, targets)
    next_units, edges = torch.full_like(units, -1), torch.full_like(units, -1)
    words = philox(walks, seed, step)
    chunk = max(_CHUNK // max(targets * entries, 1), 1)
    for begin in range(0, units.numel(), chunk):
        part = slice(begin, begin + chunk)
        unit = units[part]
        group = unit // max(sources, 1)
        entered = powered(by_unit[unit], power) * open_entries  # [n, targets, E]
        total = _in_order(entered)  # `mass` holds just these sums
        allowed = (gains[group] > 0) & bool(open_entries.any())
        chosen = _chosen(fixed_rows(_with_uniform(total * gains[group], allowed)), words[0][part])
        moved = chosen >= 0
        at = chosen.clamp(min=0)
        entry = torch.zeros_like(at)
        if entries > 1:
            own = (
                entered[torch.arange(len(at), device=at.device), at] if targets else entered.new_zeros(len(at), entries)
            )
            entry = _chosen(fixed_rows(_with_uniform(own, open_entries.expand_as(own))), words[1][part])
        source = unit % max(sources, 1)
        row, column = (at, source) if to_rows else (source, at)
        edge = ((group * rows + row) * columns + column) * entries + entry
        next_units[part] = torch.where(moved, group * targets + at, -1)
        edges[part] = torch.where(moved, edge, -1)
    return next_units, edges


def walk_field_step(
    weight: Tensor,
    units: Tensor,
    positions: Tensor,
    walks: Tensor,
    flow: Tensor,
    leads_to: Tensor,
    power: int,
    to_rows: bool,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``walk_ops.walk_field_step``."""
    groups, rows, columns, entries = weight.shape
    sources, targets = (columns, rows) if to_rows else (rows, columns)
    for name, given, count in (("units", units, groups * sources), ("positions", positions, len(leads_to))):
        if given.numel() and not bool(((given >= 0) & (given < count)).all()):
            refuse("walk_field_step", name, f"0 to {count - 1}", int(given.min() if given.min() < 0 else given.max()))
    by_unit = (weight.transpose(1, 2) if to_rows else weight).reshape(groups * sources, targets, entries)
    beyond = flow.reshape(groups, targets, flow.shape[1])
    results = [torch.full_like(units, -1) for _ in range(3)]
    words = philox(walks, seed, step)[0]
    chunk = max(_CHUNK // max(targets * entries, 1), 1)
    for begin in range(0, units.numel(), chunk):
        part = slice(begin, begin + chunk)
        unit = units[part]
        group = unit // max(sources, 1)
        led = leads_to[positions[part]]  # [n, E]
        there = beyond[group].gather(2, led.clamp(min=0)[:, None, :].expand(-1, targets, -1))
        weights = torch.where((led >= 0)[:, None, :], powered(by_unit[unit], power) * there, 0.0)
        chosen = _chosen(fixed_rows(weights.flatten(1)), words[part])
        at = chosen.clamp(min=0)
        candidate, entry = at // entries, at % entries
        source = unit % max(sources, 1)
        row, column = (candidate, source) if to_rows else (source, candidate)
        edge = ((group * rows + row) * columns + column) * entries + entry
        place = led.gather(1, entry[:, None])[:, 0]
        for result, value in zip(results, (group * targets + candidate, place, edge), strict=True):
            result[part] = torch.where(chosen >= 0, value, -1)
    return results[0], results[1], results[2]


def walk_choose(cdf: Tensor, row_start: Tensor, rows: Tensor, walks: Tensor, seed: int, step: int, word: int) -> Tensor:
    """See ``walk_ops.walk_choose``."""
    if rows.numel() and not bool(((rows >= 0) & (rows < row_start.numel() - 1)).all()):
        refuse("walk_choose", "rows", f"0 to {row_start.numel() - 2}", int(rows.max()))
    count = row_start[rows + 1] - row_start[rows]
    last = torch.where(count > 0, row_start[rows + 1] - 1, 0)
    total = torch.where(count > 0, cdf[last] if cdf.numel() else torch.zeros_like(rows), 0)
    draw = _draws(philox(walks, seed, step)[word], total)
    low, high = row_start[rows], last.clone()
    for _ in range(int(count.max()).bit_length() if rows.numel() else 0):
        middle = (low + high) // 2
        exceeds = (cdf[middle] ^ _SIGN) > (draw ^ _SIGN) if cdf.numel() else torch.zeros_like(rows, dtype=torch.bool)
        high, low = torch.where(exceeds, middle, high), torch.where(exceeds, low, torch.minimum(middle + 1, high))
    return torch.where(total != 0, low - row_start[rows], -1)


def walk_mark_(bits: Tensor, edges: Tensor, target: int) -> Tensor:
    """See ``walk_ops.walk_mark_``."""
    if edges.numel() and int(edges.max()) >= bits.numel() * 64:
        refuse("walk_mark_", "edges", f"places below {bits.numel() * 64}", int(edges.max()))
    walks, steps = edges.shape
    flat = edges.flatten()
    live = flat >= 0
    place = flat[live]
    fresh = (bits[place // 64] >> (place % 64)) & 1 == 0
    walk = torch.arange(walks, device=edges.device).repeat_interleave(steps)[live][fresh]
    place = place[fresh]
    order = torch.argsort(place, stable=True)  # by place, then by walk: the first of each place is new
    first = torch.ones_like(place, dtype=torch.bool)
    first[1:] = place[order][1:] != place[order][:-1]
    place, walk = place[order][first], walk[order][first]
    found = torch.bincount(walk, minlength=walks).cumsum(0)
    used = int((found < target).sum()) + 1 if target > 0 else 0
    used = min(used, walks)
    place = place[walk < used]
    added = torch.zeros_like(bits).index_add_(0, place // 64, torch.ones_like(place) << (place % 64))
    bits |= added
    return torch.tensor([used, place.numel()], dtype=torch.int64, device=bits.device)
