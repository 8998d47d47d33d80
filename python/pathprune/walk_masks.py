"""Masks from walks: the sequential rule "walk until the target is reached", exactly, from batches of walks.

Walks are made many at a time and marked in order, one bit a weight; the last one stays whole. How many to make next is
estimated from how often a walk takes each weight; the estimate decides about speed, never about the mask.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import walk_ops
from ._mask_io import unpack_mask
from .network import PathNetwork

_OVERSHOOT = 1.03  # walks of a batch over the estimate, so that one batch is usually enough
_LEAST_BATCH = 64
_BATCH_BYTES = 256 << 20  # of a batch's steps, at most
_PATIENCE = 64  # times the expected number of walks, or the least batch


@dataclass(frozen=True)
class Marked:
    """The weights that walks have taken.

    Attributes:
        bits: [words] int64, one bit a weight, see :meth:`Walks.packed`.
        kept: how many weights.
        walks: how many walks it took.
        visits: weight -> how often these walks came to each of its output units; empty where that is not counted.
    """

    bits: Tensor
    kept: int
    walks: int
    visits: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [output units] int64


class WalkMasks(ABC):
    """Walks whose weights are marked until there are enough.

    Args:
        network: the path network.
        names: the weights that walks mark, and that count; others are walked through.
        seed: of all draws.

    Attributes:
        offsets: name -> the place of its first weight among all bits.
        total: how many weights count.
        width: the most weights that one walk takes.
    """

    width: int

    def __init__(self, network: PathNetwork, names: Sequence[str], seed: int) -> None:
        self.network, self.names, self.seed = network, tuple(names), seed
        self.device = network.device
        self.offsets: dict[str, int] = {}
        self.words = 0
        for name in self.names:
            self.offsets[name] = 64 * self.words
            self.words += -(-network.tensors[name].numel() // 64)
        self.total = sum(network.tensors[name].numel() for name in self.names)

    @abstractmethod
    def steps(self, first: int, count: int) -> Tensor:
        """The weights that walks ``first``, ``first + 1``, ... take: places [count, width] int64, -1 for none."""

    def _walked(self, first: int, count: int) -> Tensor:
        """:meth:`steps`; where weights are spread over ranks, each makes some of the walks."""
        ranks = self.network.shards
        begin, end = ranks.rows(count)
        return ranks.joined(self.steps(first + begin, end - begin), ranks.lengths(count))

    @abstractmethod
    def expected(self) -> Callable[[float], float]:
        """Roughly how many weights ``n`` walks take, for n up to infinity."""

    def observe(self, edges: Tensor) -> None:  # noqa: B027
        """Takes note of walks that were marked, [walks, width]."""

    def visits(self) -> dict[str, Tensor]:
        """How often the walks marked so far came to each output unit, by weight."""
        return {}

    def lost(self) -> int:
        """How many non-zero weights no walk can take because their integers are 0."""
        return 0

    @abstractmethod
    def limit(self) -> tuple[float, list[str]]:
        """How many weights walks can ever take, and the names of the tensors with weights that they cannot."""

    def until(
        self,
        targets: Sequence[int],
        *,
        max_walks: int | None = None,
        trim: bool = False,
        tick: Callable[[int, int], None] = lambda walks, kept: None,
    ) -> list[Marked]:
        """Walks until each of the ascending targets is reached; nested by construction.

        Args:
            targets: numbers of weights to take.
            max_walks: None: 64 times the expected number, 4,096 at least.
            trim: take exactly the target: the last walk loses what is over it.

        Raises:
            ValueError: a target that no number of walks reaches, or that ``max_walks`` did not.
        """
        bits = torch.zeros(self.words, dtype=torch.int64, device=self.device)
        expected = self.expected()
        walks = marked = 0
        ahead_of_time = torch.empty((0, self.width), dtype=torch.int64, device=self.device)  # walked, not marked
        results = []
        for target in targets:
            allowed = max_walks
            rate = 0.0
            if target > 0.9 * expected(math.inf):  # few weights, or none, can be left out: look closer
                self._check_reachable(target, marked, walks)
            while marked < target:
                if not len(ahead_of_time):
                    if walks and allowed is None and walks > 2 * _needed(expected, target):
                        self._check_reachable(target, marked, walks)
                        allowed = math.ceil(_PATIENCE * max(_needed(expected, target), _LEAST_BATCH))
                    if allowed is not None and walks >= allowed:
                        raise ValueError(self._out_of_patience(target, marked, walks))
                    size = self._batch(expected, target, marked, walks, rate)
                    size = size if allowed is None else min(size, allowed - walks)
                    ahead_of_time = self._walked(walks, size)
                used, new = walk_ops.walk_mark_(bits, ahead_of_time, target - marked).tolist()
                rate = new / used
                self.observe(ahead_of_time[:used])
                ahead_of_time = ahead_of_time[used:]
                walks, marked = walks + used, marked + new
                tick(walks, marked)
            results.append(Marked(bits.clone(), marked, walks, self.visits()))
            if trim and marked > target:
                results[-1] = self._trimmed(results[-1], target)
        return results

    def _batch(self, expected: Callable[[float], float], target: int, marked: int, walks: int, rate: float) -> int:
        """How many walks to make next."""
        largest = max(_BATCH_BYTES // (8 * self.width), _LEAST_BATCH)
        if rate > 0:
            missing = min(1.1 * (target - marked) / rate, walks)
        else:
            missing = max(_OVERSHOOT * _needed(expected, target) - walks, walks / 4)
        return max(min(math.ceil(missing) + _LEAST_BATCH, largest), 2)

    def _trimmed(self, found: Marked, target: int) -> Marked:
        """Without what the last walk took over the target, its last steps first."""
        last = self.steps(found.walks - 1, 1)[0]
        bits = torch.zeros_like(found.bits)
        if found.walks > 1:  # all walks but the last, again
            done = 0
            size = max(_BATCH_BYTES // (8 * self.width), 1)
            while done < found.walks - 1:
                count = min(size, found.walks - 1 - done)
                walk_ops.walk_mark_(bits, self.steps(done, count), self.total + 1)
                done += count
        kept = int(_count_bits(bits))
        walk_ops.walk_mark_(bits, last[:, None].contiguous(), target - kept)
        return Marked(bits, target, found.walks, found.visits)

    def _check_reachable(self, target: int, marked: int, walks: int) -> None:
        most, cannot = self.limit()
        if most < target:
            raise ValueError(
                f"PHEW: density: wanted {target / self.total:.6g}, but walks can take {int(most):,} of {self.total:,} "
                f"weights (density {most / self.total:.6g}); after {walks:,} walks {marked:,} are taken. "
                f"Not to be reached: {', '.join(cannot[:8])}{' ...' if len(cannot) > 8 else ''}"
            )

    def _out_of_patience(self, target: int, marked: int, walks: int) -> str:
        return (
            f"PHEW: max_walks: {walks:,} walks reached density {marked / self.total:.6g} "
            f"({marked:,} weights), short of {target / self.total:.6g}; a density nearer to 1 needs more"
        )

    def packed(self, marked: Marked, name: str) -> Tensor:
        """The mask of a weight as flat little-endian bits, uint8 on the CPU: how ``Masks`` stores it."""
        begin = self.offsets[name] // 64
        count = self.network.tensors[name].numel()
        return marked.bits[begin : begin + -(-count // 64)].cpu().view(torch.uint8)[: -(-count // 8)].clone()

    def bits(self, marked: Marked, name: str) -> Tensor:
        """The mask of a weight, bool of its shape."""
        return unpack_mask(self.packed(marked, name), self.network.tensors[name].shape)


def _needed(expected: Callable[[float], float], target: float) -> float:
    """How many walks are expected to take so many weights, to a thousandth: by regula falsi, Illinois form."""
    target = min(target, 0.999 * expected(math.inf))
    least = expected(1.0)
    if least >= target:
        return 1.0
    low, high = 1.0, target / least  # walks overlap: it takes more
    under, over = least - target, expected(high) - target
    while over < 0:
        step = 1.5 * over * (high - low) / (under - over)  # beyond where their chord leads
        low, high, under = high, min(high + max(step, 0.001 * high), 2 * high), over
        over = expected(high) - target
    while high > 1.001 * low:
        middle = min(max((low * over - high * under) / (over - under), 1.0003 * low), high / 1.0003)
        beyond = expected(middle) - target
        if beyond < 0:
            low, under, over = middle, beyond, over / 2
        else:
            high, over, under = middle, beyond, under / 2
    return high


def _count_bits(words: Tensor) -> Tensor:
    """How many bits are set in int64 words."""
    return ((words.view(torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1).sum()
