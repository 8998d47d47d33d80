"""Sums over rows that lie on several ranks, with the bits of one process.

The CPU kernels form the column sums ``y_c = sum_r f(w_rc) g_r`` in blocks of B rows: within a block row after row, each
product and each sum rounded to A (float32, or float64 for float64 weights); then block after block in float64, rounded
to A once. B depends on the number of rows alone, so the same sums can be formed of rows on several ranks:

1. each rank sums its own blocks, and of its last block, if that goes on at the next rank, the rows that are here;
2. where a block goes on, its sum so far is sent to the next rank, which adds its own rows to it one after another;
3. every rank is sent the sums of all blocks, at most 32, and adds them in their order.

The ranks work side by side: they wait for one another only for the rows of a block begun elsewhere, 1/32 of all at most
(or 64; of so few rows that several ranks hold one block, these go on from one to the next). A chain of all rows, each
rank going on from the sum of the one before, would send one vector for 32, and add their times.

Bytes: the rows that are here; and 32 vectors of columns to each rank: of 4096 bfloat16 rows 1/64 of the weights. Rows
whose blocks are longer than the kernel's own blocks of them (more than 2048 rows in all), and those of a block that
was begun elsewhere, are written out as f(w), a block at a time, and read again.
Oracle: ``path_flow_linear`` of all rows, bit for bit.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from . import ops
from .distributed import Group
from .ops import WeightMap
from .score_sources import Scores

_LEAST_ROWS, _MOST_BLOCKS, _STRIP = 64, 32, 4  # column_grid in csrc/ops/sweep.h


def block_rows(count: int) -> int:
    """B, the rows of a block (the last may have fewer) where ``count`` are summed."""
    least = max(_LEAST_ROWS, -(-count // _MOST_BLOCKS))
    return -(-least // _STRIP) * _STRIP


def sum_over_rows(group: Group, weight: Scores, count: int, flow: Tensor, f: WeightMap) -> Tensor:
    """The flow through all rows of a weight, of which this rank has some; called on every rank.

    Args:
        group: the ranks, in whose order the rows lie (:meth:`Group.rows`).
        weight: the rows that are here, [1, rows, K], dense or packed, with their mask.
        count: rows on all ranks.
        flow: [1, T, rows] in A, at the rows that are here; finite.
        f: the weight map.

    Returns:
        [1, T, K] in A, the same bits on every rank: those of ``path_flow_linear`` of all rows, on the CPU.
    """
    begin, end = group.rows(count)
    size = block_rows(count)
    first = min(-(-begin // size) * size, end)  # where a block begins here; the rows before it are of another rank's
    goes_on = begin < end < count and end % size > 0
    sums = _blocks(weight, first - begin, end - begin, size, flow, f)
    sent = None
    if goes_on and first < end:
        sent = group.to_next(sums[-1].contiguous())
        sums = sums[:-1]
    if begin < first:
        so_far = group.from_previous(sums.new_empty((flow.shape[1], weight.columns)))
        total = _continued(so_far, weight, 0, first - begin, flow, f)
        if goes_on and first == end:
            sent = group.to_next(total[0])
        else:
            sums = torch.cat([total, sums])
    cuts = [*(group.rows(count, rank)[0] for rank in range(group.size)), count]
    ended = [_blocks_before(row, count, size) for row in cuts]
    every = group.joined(sums, [after - before for before, after in itertools.pairwise(ended)])
    if sent is not None:
        sent.wait()
    return _added(every)


def _blocks_before(row: int, count: int, size: int) -> int:
    """How many blocks end at a row or before it."""
    return -(-count // size) if row == count else row // size


def _blocks(weight: Scores, first: int, last: int, size: int, flow: Tensor, f: WeightMap) -> Tensor:
    """[n, T, K]: the sums of the blocks that the rows from ``first`` on are cut into; the last may be short."""
    if size > _LEAST_ROWS:  # the op would cut so many rows again
        parts = [_continued(None, weight, row, min(row + size, last), flow, f) for row in range(first, last, size)]
        return torch.cat([flow.new_empty((0, flow.shape[1], weight.columns)), *parts])
    whole = first + (last - first) // size * size
    parts = [_in_groups(weight, first, whole, size, flow, f)]
    if whole < last:
        parts.append(_in_groups(weight, whole, last, last - whole, flow, f))
    return torch.cat(parts)


def _in_groups(weight: Scores, first: int, last: int, size: int, flow: Tensor, f: WeightMap) -> Tensor:
    """[n, T, K]: the sums of every ``size`` rows, which the op makes as it makes those of groups."""
    part = weight.rows(first, last)
    count = (last - first) // size
    dense = part.weight if part.layout is not None else part.weight.reshape(count, size, part.columns)
    mask, layout = (
        None if words is None else words.reshape(count, size, words.shape[-1]) for words in (part.mask, part.layout)
    )
    x = flow[0, :, first:last].unflatten(1, (count, size)).transpose(0, 1).contiguous()  # [n, T, size]
    return ops.path_flow_linear(dense, mask, x, f, True, layout, part.row_start, part.columns)


def _continued(so_far: Tensor | None, weight: Scores, first: int, last: int, flow: Tensor, f: WeightMap) -> Tensor:
    """[1, T, K]: sums [T, K] (None: zero) to which rows are added one after another.

    ``through_flow`` adds position after position: so f(w) is its flow x, with a row for a position, and sums that are
    there already are its first positions, each of which counts for itself alone.
    """
    mapped = replace(weight.rows(first, last), s=f).written()  # [1, rows, K]
    g = flow[:, :, first:last].mT  # [1, rows, T]
    if so_far is not None:
        mapped = torch.cat([so_far[None], mapped], 1)
        g = torch.cat([torch.eye(len(so_far), dtype=g.dtype, device=g.device)[None], g], 1)
    ones = torch.ones((1, g.shape[2], weight.columns), dtype=g.dtype, device=g.device)
    return ops.through_flow(ones, None, mapped, g.contiguous(), WeightMap.ONE)


def _added(blocks: Tensor) -> Tensor:
    """[1, T, K]: the sum of [n, T, K] in float64, in their order."""
    rows = blocks.double().flatten(1)[None]  # so few are one block
    ones = rows.new_ones((1, 1, rows.shape[1]))
    total = ops.path_flow_linear(rows, None, ones, WeightMap.IDENTITY, True)
    return total.reshape(1, *blocks.shape[1:]).to(blocks.dtype)
