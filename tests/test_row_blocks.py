"""Sums over rows on several ranks, bit for bit those of one process. Ranks are threads here; for processes see
``rank_cases``."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pathprune import _library, ops
from pathprune.distributed import Group
from pathprune.ops import WeightMap
from pathprune.row_blocks import block_rows, sum_over_rows
from pathprune.score_sources import Scores

pytestmark = pytest.mark.skipif(not _library.cpu_loaded, reason="the compiled ops are not loaded")


class Meeting:
    """What the threads that stand for ranks share."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=30)
        self.sent: list[queue.Queue[Tensor]] = [queue.Queue() for _ in range(size)]
        self.brought: list[Tensor | None] = [None] * size


class Sent:
    def wait(self) -> None:
        pass


class ThreadRank(Group):
    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__()
        self.meeting, self.rank, self.size = meeting, rank, meeting.size

    def each(self, tensor: Tensor) -> Tensor:
        self.meeting.brought[self.rank] = tensor
        self.meeting.barrier.wait()
        every = torch.stack(self.meeting.brought)
        self.meeting.barrier.wait()
        return every

    def to_next(self, tensor: Tensor) -> Sent:
        assert tensor.is_contiguous()
        self.meeting.sent[self.rank + 1].put(tensor)
        return Sent()

    def from_previous(self, room: Tensor) -> Tensor:
        return room.copy_(self.meeting.sent[self.rank].get(timeout=30))


def over_ranks(size: int, weight: Scores, count: int, flow: Tensor, f: WeightMap) -> list[Tensor]:
    """What each of ``size`` ranks finds."""
    meeting = Meeting(size)

    def one(rank: int) -> Tensor:
        group = ThreadRank(meeting, rank)
        begin, end = group.rows(count)
        return sum_over_rows(group, weight.rows(begin, end), count, flow[..., begin:end].contiguous(), f)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def sample(
    rows: int, columns: int, positions: int, dtype: torch.dtype, density: float | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(weights, a mask of that density, flows that differ by orders of magnitude)."""
    drawn = torch.Generator().manual_seed(rows * columns + positions)
    weight = torch.randn(1, rows, columns, generator=drawn, dtype=torch.float64).to(dtype)
    mask = None if density is None else ops.mask_pack(torch.rand(1, rows, columns, generator=drawn) < density)
    flow = torch.randn(1, positions, rows, generator=drawn, dtype=torch.float64).mul(3).exp()
    return weight, mask, flow.to(torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("rows", [1, 2, 5, 63, 64, 65, 300, 2048, 2049, 4100])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_bits_of_all_rows_in_one_process(rows: int, size: int) -> None:
    weight, _, flow = sample(rows, 37, 1, torch.float32, None)
    wanted = ops.path_flow_linear(weight, None, flow, WeightMap.ABS, True)
    for found in over_ranks(size, Scores("w", weight, 37), rows, flow, WeightMap.ABS):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("f", [WeightMap.ABS, WeightMap.SQUARE, WeightMap.ONE, WeightMap.IDENTITY])
@pytest.mark.parametrize(("rows", "positions"), [(200, 1), (200, 3), (2600, 1), (2600, 8)])
def test_of_every_kind(dtype: torch.dtype, f: WeightMap, rows: int, positions: int) -> None:
    """Thinned by a mask; packed once the mask had half of its weights, and thinned further."""
    weight, mask, flow = sample(rows, 24, positions, dtype, 0.3)
    wanted = ops.path_flow_linear(weight, mask, flow, f, True)
    thicker = ops.mask_pack(ops.mask_unpack(mask, 24) | (torch.arange(24) % 2 == 0))
    values, row_start = ops.compact_weight(weight, thicker)
    packed = Scores("w", values, 24, mask, layout=thicker, row_start=row_start)
    for source in (Scores("w", weight, 24, mask), packed):
        for found in over_ranks(3, source, rows, flow, f):
            assert torch.equal(found, wanted)


def test_the_order_matters() -> None:
    """Otherwise the tests above would show nothing."""
    weight, _, flow = sample(2600, 37, 1, torch.float32, None)
    wanted = ops.path_flow_linear(weight, None, flow, WeightMap.ABS, True)
    first, last = (
        ops.path_flow_linear(weight[:, rows], None, flow[..., rows].contiguous(), WeightMap.ABS, True)
        for rows in (slice(0, 1300), slice(1300, 2600))
    )
    assert not torch.equal(first + last, wanted)
    torch.testing.assert_close(first + last, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [66, 2048, 2050, 4100, 11008, 32000])
def test_blocks_are_those_of_the_kernels(rows: int) -> None:
    """2^-24 added to 1 is lost, twice too; but two of them are not where they are summed in the next block."""
    size = block_rows(rows)
    for row, total in ((size - 2, 1.0), (size, 1.0 + 2.0**-23)):
        weight = torch.zeros(1, rows, 1)
        weight[0, 0], weight[0, row : row + 2] = 1.0, 2.0**-24
        assert float(ops.path_flow_linear(weight, None, torch.ones(1, 1, rows), WeightMap.ABS, True)) == total, row
