"""The ops of biased random walks: one step of many walkers, a choice from a stored table, marks and the exact stop.

A draw is defined once: the smallest index whose fixed-point CDF exceeds a 32-bit word of ``philox(seed, walk, step)``
(walk: 64-bit counter, low half; step: high half). Word 0 draws the next unit, 1 the kernel entry, 2 a branch, 3 a
unit behind a flattening. All sums are sums of integers, so the same walks come out on every device, for any number of
threads and however walks are split into batches.

Bytes: a step of many walkers reads each weight once (walkers are grouped by unit), and 40 bytes a walker.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import walk_reference
from .checks import WEIGHT_DTYPES, refuse
from .ops import define

__all__ = ["walk_choose", "walk_field_step", "walk_mark_", "walk_mass", "walk_step"]

UNIT, ENTRY, BRANCH, FLATTEN = range(4)

_STEP = define(
    "walk_step",
    "(Tensor weight, Tensor units, Tensor walks, Tensor? mass, Tensor? gain, Tensor? valid, int power,"
    " bool to_rows, int seed, int step) -> (Tensor, Tensor)",
    walk_reference.walk_step,
    lambda a: (torch.empty_like(a.units), torch.empty_like(a.units)),
)
_MASS = define(
    "walk_mass",
    "(Tensor weight, Tensor? valid, int power) -> Tensor",
    walk_reference.walk_mass,
    lambda a: a.weight.new_empty(a.weight.shape[:3], dtype=torch.float64),
)
_FIELD_STEP = define(
    "walk_field_step",
    "(Tensor weight, Tensor units, Tensor positions, Tensor walks, Tensor flow, Tensor leads_to, int power,"
    " bool to_rows, int seed, int step) -> (Tensor, Tensor, Tensor)",
    walk_reference.walk_field_step,
    lambda a: tuple(torch.empty_like(a.units) for _ in range(3)),
)
_CHOOSE = define(
    "walk_choose",
    "(Tensor cdf, Tensor row_start, Tensor rows, Tensor walks, int seed, int step, int word) -> Tensor",
    walk_reference.walk_choose,
    lambda a: torch.empty_like(a.rows),
)
_MARK = define(
    "walk_mark_",
    "(Tensor(a!) bits, Tensor edges, int target) -> Tensor",
    walk_reference.walk_mark_,
    lambda a: a.bits.new_empty(2),
)


def walk_step(
    weight: Tensor,
    units: Tensor,
    walks: Tensor,
    *,
    to_rows: bool,
    seed: int,
    step: int,
    power: int = 1,
    mass: Tensor | None = None,
    gain: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Moves walkers through a weight: from column c to row r of its group with probability in proportion to
    ``gain_r * sum_e |w_rce|^power``, or from rows to columns; then draws the kernel entry e among ``|w_rce|^power``.

    A zero weight is never drawn, at any power, unless all of a unit's (or of a kernel's) are zero: then those with a
    gain (or a valid entry) are equally likely.

    Args:
        weight: [G, R, C, E] float32, float64, bfloat16 or float16, finite.
        units: [n] int64, ``g * C + c`` (to rows) or ``g * R + r``.
        walks: [n] int64, the number of each walk.
        to_rows: from columns to rows; otherwise from rows to columns.
        seed, step: of the random words.
        power: 1 (PHEW), 2, 0 (uniform) or -1 (inverse).
        mass: what :func:`walk_mass` makes of the weight, to be made once for many steps; None: made on the way.
        gain: [G * R] (to rows) or [G * C] float64, finite and >= 0; None: 1.
        valid: [E] bool, the kernel entries that may be drawn; None: all.

    Returns:
        (units reached, flat indices of the weights taken), both [n] int64; -1 where no candidate has a gain.
    """
    _check_step(weight, units, walks, power, to_rows, step, gain, valid)
    if mass is not None and (mass.dtype, mass.shape, mass.device) != (torch.float64, weight.shape[:3], weight.device):
        refuse("walk_step", "mass", f"float64 {list(weight.shape[:3])} on {weight.device}", mass)
    return _STEP(weight, units, walks, mass, gain, valid, power, to_rows, seed, step)


def walk_mass(weight: Tensor, valid: Tensor | None = None, power: int = 1) -> Tensor:
    """``sum_e |w_rce|^power`` over the valid entries of each kernel, in their order: float64 [G, R, C]."""
    if weight.dtype not in WEIGHT_DTYPES or weight.dim() != 4:
        refuse("walk_mass", "weight", "float32, float64, bfloat16 or float16 [G, R, C, E]", weight)
    return _MASS(weight, valid, power)


def walk_field_step(
    weight: Tensor,
    units: Tensor,
    positions: Tensor,
    walks: Tensor,
    flow: Tensor,
    leads_to: Tensor,
    *,
    to_rows: bool,
    seed: int,
    step: int,
    power: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Moves walkers through a weight to a unit and a position, in proportion to ``|w_rce|^power * flow``.

    With the flow that goes on from there (the backward flow, for a walk ahead) whole paths are drawn in exact
    proportion to their value. One draw, over candidates and within them over entries.

    Args:
        weight, units, walks, to_rows, seed, step, power: as for :func:`walk_step`.
        positions: [n] int64: where each walker is.
        flow: [target units, target positions] float64, finite and >= 0.
        leads_to: [positions, E] int64: the target position of each kernel entry; negative: none.

    Returns:
        (units, positions, flat indices of the weights taken), each [n] int64; -1 where no flow lies ahead.
    """
    op = "walk_field_step"
    _check_step(weight, units, walks, power, to_rows, step, None, None, op)
    _check_list(op, "positions", positions, weight.device)
    targets = weight.shape[0] * weight.shape[1 if to_rows else 2]
    if positions.shape != units.shape:
        refuse(op, "positions", f"int64 {list(units.shape)} on {weight.device}", positions)
    if flow.dim() != 2 or flow.dtype != torch.float64 or len(flow) != targets or flow.device != weight.device:
        refuse(op, "flow", f"float64 [{targets}, positions] on {weight.device}", flow)
    entries = weight.shape[3]
    wrong = leads_to.dim() != 2 or leads_to.dtype != torch.int64 or leads_to.shape[1] != entries
    if wrong or leads_to.device != weight.device:
        refuse(op, "leads_to", f"int64 [positions, {entries}] on {weight.device}", leads_to)
    return _FIELD_STEP(weight, units, positions, walks, flow, leads_to, power, to_rows, seed, step)


def walk_choose(
    cdf: Tensor, row_start: Tensor, rows: Tensor, walks: Tensor, *, seed: int, step: int, word: int
) -> Tensor:
    """Draws an index from the row of a stored table for each walker.

    Args:
        cdf: [row_start[-1]] int64 as unsigned: inclusive prefix sums of each row's integers, row by row.
        row_start: [rows + 1] int64.
        rows, walks: [n] int64.

    Returns:
        [n] int64: the index within the row; -1 from a row that is empty or sums to 0.
    """
    for name, tensor in (("cdf", cdf), ("row_start", row_start), ("rows", rows), ("walks", walks)):
        _check_list("walk_choose", name, tensor, cdf.device)
    if row_start.numel() < 1:
        refuse("walk_choose", "row_start", "1 dimension of at least 1", row_start)
    if walks.shape != rows.shape:
        refuse("walk_choose", "walks", f"int64 {list(rows.shape)} on {cdf.device}", walks)
    if not 0 <= word <= 3:
        refuse("walk_choose", "word", "0 to 3", word)
    return _CHOOSE(cdf, row_start, rows, walks, seed, step, word)


def walk_mark_(bits: Tensor, edges: Tensor, target: int) -> Tensor:
    """Marks the edges of walks, walk after walk, until at least ``target`` new ones are marked; walks stay whole.

    Args:
        bits: [words] int64; bit b of word k is place 64 k + b. Written to.
        edges: [walks, steps] int64, of any strides: the places of each walk; negative for none.
        target: how many places are to be newly marked.

    Returns:
        int64 [2]: how many walks were used, and how many places were newly marked.
    """
    _check_list("walk_mark_", "bits", bits, bits.device)
    if edges.dim() != 2 or edges.dtype != torch.int64 or edges.device != bits.device:
        refuse("walk_mark_", "edges", f"int64 [walks, steps] on {bits.device}", edges)
    if not bits.is_contiguous():
        refuse("walk_mark_", "bits", "a contiguous tensor to write to", f"strides {bits.stride()}")
    if target < 0:
        refuse("walk_mark_", "target", "a number >= 0", target)
    return _MARK(bits, edges, target)


def _check_list(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dim() != 1 or tensor.dtype != torch.int64 or tensor.device != device:
        refuse(op, name, f"int64, 1 dimension, on {device}", tensor)


def _check_step(
    weight: Tensor,
    units: Tensor,
    walks: Tensor,
    power: int,
    to_rows: bool,
    step: int,
    gain: Tensor | None,
    valid: Tensor | None,
    op: str = "walk_step",
) -> None:
    if weight.dtype not in WEIGHT_DTYPES or weight.dim() != 4:
        refuse(op, "weight", "float32, float64, bfloat16 or float16 [G, R, C, E]", weight)
    _check_list(op, "units", units, weight.device)
    _check_list(op, "walks", walks, weight.device)
    if walks.shape != units.shape:
        refuse(op, "walks", f"int64 {list(units.shape)} on {weight.device}", walks)
    if power not in (-1, 0, 1, 2):
        refuse(op, "power", "-1, 0, 1 or 2", power)
    if step < 0:
        refuse(op, "step", "a number >= 0", step)
    targets = weight.shape[0] * weight.shape[1 if to_rows else 2]
    if gain is not None and (gain.dtype != torch.float64 or gain.shape != (targets,) or gain.device != weight.device):
        refuse(op, "gain", f"float64 [{targets}] on {weight.device}", gain)
    entries = weight.shape[3]
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (entries,) or valid.device != weight.device):
        refuse(op, "valid", f"bool [{entries}] on {weight.device}", valid)
