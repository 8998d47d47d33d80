"""Plain ways of finding the k-th largest (1-based) of a 1-D tensor of finite scores: torch and numpy alone.

Each function takes `scores` `[n]` and `k` in 1..n and returns a tensor of one value. All are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def kth_largest_kthvalue(scores: Tensor, k: int) -> Tensor:
    return scores.kthvalue(scores.numel() - k + 1).values


def kth_largest_topk(scores: Tensor, k: int) -> Tensor:
    """Asks for the smaller of the two sides."""
    rest = scores.numel() - k + 1
    if k <= rest:
        return scores.topk(k, sorted=False).values.min()
    return scores.topk(rest, largest=False, sorted=False).values.max()


def kth_largest_sort(scores: Tensor, k: int) -> Tensor:
    return scores.sort().values[scores.numel() - k]


def kth_largest_partition(scores: Tensor, k: int) -> Tensor:
    """numpy's introselect on a copy; CPU only."""
    place = scores.numel() - k
    return torch.tensor(np.partition(scores.numpy(), place)[place], dtype=scores.dtype)


SAMPLE = 1 << 16
CHUNK = 1 << 17  # elements whose flags stay in the second-level cache


def sample_positions(scores: Tensor) -> Tensor | None:
    """Random positions to sample scores at, sorted for locality; None where there are few scores."""
    size = scores.numel()
    if size < 4 * SAMPLE:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randint(size, (SAMPLE,), generator=generator).sort().values.to(scores.device)


def split_torch(scores: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many scores are above `high`, and the scores in [low, high], in one sweep of cache-sized chunks.

    Comparisons are written as floats: torch vectorises them, and not those into bool (three times slower).
    """
    chunk = CHUNK if scores.device.type == "cpu" else max(1, scores.numel())
    reach, above = scores.new_empty(chunk), scores.new_empty(chunk)
    more, inside = 0, []
    for part in scores.split(chunk):
        size = part.numel()
        torch.ge(part, low, out=reach[:size])
        torch.gt(part, high, out=above[:size])
        more += int(above[:size].sum(dtype=torch.float64))
        inside.append(part[reach[:size].sub_(above[:size]).bool()])
    return more, torch.cat(inside)


def split_numpy(scores: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """`split_torch` by numpy on the same memory: it vectorises comparisons into bool. CPU, one thread."""
    more, inside = 0, []
    for part in np.array_split(scores.numpy(), max(1, scores.numel() // CHUNK)):
        reach, above = part >= low, part > high
        more += int(np.count_nonzero(above))
        reach ^= above
        inside.append(part[reach])
    return more, torch.from_numpy(np.concatenate(inside))


Split = Callable[[Tensor, float, float], tuple[int, Tensor]]


def count_reached(scores: Tensor, value: float) -> int:
    """Number of scores >= value."""
    if scores.device.type != "cpu":
        return int((scores >= value).sum())
    parts = np.array_split(scores.numpy(), max(1, scores.numel() // CHUNK))
    return sum(int(np.count_nonzero(part >= value)) for part in parts)


def positions_equal(scores: Tensor, value: float) -> Tensor:
    """Ascending positions of the scores equal to `value`, int64."""
    if scores.device.type != "cpu":
        return (scores == value).nonzero().view(-1)
    return torch.from_numpy(np.flatnonzero(scores.numpy() == value))


class Kth(NamedTuple):
    """A threshold and, where it came for free, the number of scores >= it."""

    value: float
    reached: int | None


def bracket_kth(scores: Tensor, k: int, positions: Tensor | None, split: Split) -> Kth:
    """Bracket the k-th by five standard deviations around a sample's, gather the bracket, select inside."""
    size = scores.numel()
    if positions is not None:
        sample = scores[positions]
        rank = k * SAMPLE / size
        spread = 5 * math.sqrt(rank * (1 - k / size)) + 1
        high = sample.max() if rank <= spread else kth_largest_kthvalue(sample, int(rank - spread))
        last = rank + spread >= SAMPLE
        low = sample.min() if last else kth_largest_kthvalue(sample, math.ceil(rank + spread))
        more, inside = split(scores, float(low), float(high))
        # A bracket may miss, by chance or at the ends; one full of ties saves nothing and is still right.
        if more < k <= more + inside.numel():
            value = float(kth_largest_kthvalue(inside, k - more))
            return Kth(value, more + int((inside >= value).sum()))
    return Kth(float(kth_largest_kthvalue(scores, k)), None)


def kth_largest_bracket(scores: Tensor, k: int, split: Split = split_torch) -> Tensor:
    """The k-th largest by a sampled bracket; see `bracket_kth`."""
    return scores.new_tensor(bracket_kth(scores, k, sample_positions(scores), split).value)


SELECTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "kthvalue": kth_largest_kthvalue,
    "topk": kth_largest_topk,
    "sort": kth_largest_sort,
    "partition": kth_largest_partition,
    "bracket": kth_largest_bracket,
    "bracket_numpy": lambda scores, k: kth_largest_bracket(scores, k, split_numpy),
}
