"""A weight whose rows lie on several ranks: its flow is one, its scores and masks stay where its rows are.

With the rows of W spread over ranks, each rank makes the outputs of its own rows, which are then put side by side, and
the backward flow ``g W`` as a sum of the ranks' parts; for weights that flow enters at the rows it is the other way
round. Flows are whole, and the same, on every rank.

With the compiled ops of the CPU scores and masks have the bits of one process, dense or packed, after any number of
rounds, wherever flow and score are made as the weights pass by (:meth:`Weight.streams`): an output is the sum of one
row, and ``row_blocks`` adds rows in the order of one process. A convolution, or a linear map in groups, is gathered for
the time of its product (on every use, so one layer's weights are whole at a time): that product has the bits of one
process, and its scores are kept for the rows that are here.

Where torch's own products serve, for many positions and for tied weights, their order is torch's, of as many rows as
are here, and sums over rows are added over the ranks by ``all_reduce``; so they are on other devices. Flows then differ
by rounding, which many rounds amplify: after 30 rounds of SynFlow on 54 million weights 5e-4 of the bits differ.

Bytes: a sweep reads a rank's own rows, sends each flow once, and of sums over rows at most 32 parts; where these are
made the scores are counted in a read of their own. Convolutions: every weight is sent, twice a round.
Oracle: the same network in one process.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import _library, ops
from ._mask_io import pack_bits
from .distributed import Group, is_spread, local
from .nodes import Synapse
from .ops import WeightMap
from .row_blocks import sum_over_rows
from .scaled import Scaled, product
from .select import Bracket
from .weights import Weight


class ShardedWeight(Weight):
    """One weight tensor of which this rank has some rows.

    Args:
        group: the ranks that share it.
        name, synapse: as for :class:`Weight`.
        tensor: a DTensor, cut along its rows; or the same tensor on every rank, of which each takes its part.
        mask: bool tensor of the whole weight's shape.
        options: the others of :class:`Weight`.

    Raises:
        ValueError: the weights of experts.
    """

    def __init__(
        self, group: Group, name: str, tensor: Tensor, synapse: Synapse, *, mask: Tensor | None = None, **options: Any
    ) -> None:
        if synapse.form.startswith("experts"):
            raise ValueError(
                f"prune: weight '{name}': wanted experts' weights whole, got rows on several ranks; "
                "prune(PathNetwork.from_module(model, example_input), ...) gathers them"
            )
        self.group = group
        self.begin, self.end = group.rows(tensor.shape[0])
        self.lengths = group.lengths(tensor.shape[0])
        self.is_spread = is_spread(tensor)
        rows = local(tensor) if self.is_spread else local(tensor)[self.begin : self.end]
        mask = None if mask is None else mask[self.begin : self.end]
        super().__init__(name, rows, replace(synapse, groups=1), mask=mask, **options)
        self.shape, self._true_groups = tensor.shape, synapse.groups
        self.first = self.begin * self.columns
        # Of the tensor as it is used, which is not how its rows lie here.
        self.groups = synapse.groups if synapse.form in ("conv", "rows") else 1
        if self._is_gathered:
            self.stay_dense()

    @property
    def _is_gathered(self) -> bool:
        """Whether its products are made of all rows, everywhere."""
        return self.form.startswith("conv") or self._true_groups > 1

    def streams(self, positions: int) -> bool:
        return not self._is_gathered and super().streams(positions)

    def _as_rows(self, tensor: Tensor) -> Tensor:
        return tensor[self.begin : self.end].reshape(1, -1, self.columns)

    # ------------------------------------------------------------------------------------------------- flow

    def forward_rows(self, x: Tensor, turned: bool = False, f: WeightMap | None = None) -> Tensor:
        if self._is_gathered:
            return product(x, self._gathered_rows().transpose(1, 2))
        if self.transposed != turned:
            if self._sums_blocks(x):
                self.settle()
                return self._sum_of_rows(self._mine(x), self.f if f is None else f)
            return self.group.sum_(super().forward_rows(self._mine(x), turned, f).contiguous())
        return self.group.joined(super().forward_rows(x, turned, f), self.lengths, dim=2)

    def _sums_blocks(self, flow: Tensor) -> bool:
        """Whether its sums over rows can be formed in the order of one process: see ``row_blocks``."""
        return self.streams(flow.shape[1]) and flow.device.type == "cpu" and _library.cpu_loaded

    def _sum_of_rows(self, flow: Tensor, f: WeightMap) -> Tensor:
        made = sum_over_rows(self.group, self._source(None, None, 0), self.shape[0], flow, f)
        self._read()
        return made

    def _mine(self, flow: Tensor) -> Tensor:
        """[G, T, rows]: the part of a flow at the rows that meets those here."""
        return flow[..., self.begin : self.end].contiguous()

    def effective(self) -> Tensor:
        """All of ``f(w) * mask``, gathered anew each time."""
        self.settle()
        assert self.dense is not None
        here = ops.masked_weight(self.dense, self.mask, self.f)
        return self.group.joined(here[0], self.lengths).reshape(self.shape)

    def _gathered_rows(self) -> Tensor:
        return self.effective().reshape(self.groups, -1, self.columns)

    def backward_rows(self, x: Scaled, g: Scaled, guess: Bracket | None, score: bool, turned: bool = False) -> Tensor:
        if self._is_gathered:
            if score and self.scored:
                gradient = product(g.tensor.transpose(1, 2), x.tensor)
                self.write_scores(gradient.reshape(self.shape), x.exponent + g.exponent)
            return product(g.tensor, self._gathered_rows())
        if self.transposed != turned:
            entered = replace(x, tensor=self._mine(x.tensor))
            return self.group.joined(super().backward_rows(entered, g, guess, score, turned), self.lengths, dim=2)
        left = replace(g, tensor=self._mine(g.tensor))
        if self._sums_blocks(x.tensor):
            if score and self.scored:
                self._scores = self._source(x.tensor, left.tensor, int(x.exponent + g.exponent))
                self._collected = None
            return self._sum_of_rows(left.tensor, self.f)
        return self.group.sum_(super().backward_rows(x, left, guess, score, turned).contiguous())

    # ------------------------------------------------------------------------------------------------ masks

    def live(self) -> int:
        """Weights that are left on all ranks."""
        self.settle()
        here = self.rows.numel() if self.mask is None else int(ops.mask_count(self.mask))
        return int(self.group.sum_(torch.tensor(here, device=self.device)))

    @property
    def device(self) -> torch.device:
        assert self.dense is not None
        return self.dense.device

    def bits(self) -> Tensor:
        """The whole mask, gathered."""
        return self.group.joined(self.mask_rows()[0].to(self.device), self.lengths).reshape(self.shape)

    def whole_words(self, words: Tensor) -> Tensor:
        whole = self.group.joined(words[0], self.lengths)
        return whole.reshape(self.groups, -1, words.shape[-1])

    def packed_bits(self, copy: bool = True) -> tuple[Tensor, torch.Size]:
        """Of the rows that are here; where the tensor itself is whole here, of all rows."""
        if not self.is_spread:
            return pack_bits(self.bits()), self.shape
        return super().packed_bits()[0], torch.Size((self.end - self.begin, *self.shape[1:]))
