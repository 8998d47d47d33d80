"""The weights of a network while they are scored and pruned: dense or packed values, 1-bit masks, cuts to come.

Two ways through a weight tensor:

* **streamed** (linear maps with few positions): flow and score are made from the weights as they pass by, so a round
  reads them twice and writes one bit each. The cut of the last round is applied in the next forward read, by making
  the last round's scores again from the flows it kept.
* **written out** (convolutions, many positions): torch's own products on ``f(w) * mask``, and one score tensor that
  lives from scoring until its cut. Once the mask has thinned, matrix products go over the weights that are left alone
  (``sparse_ops``), packed anew after every cut, and so do the scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from . import ops
from ._mask_io import pack_bits
from .distributed import check_finite
from .network import PathNetwork
from .nodes import Synapse
from .ops import WeightMap
from .reference import map_weight
from .scaled import Scaled, added, product
from .scaled import power_of_two as power_of_two
from .scratch import Scratch
from .select import Bracket, Collected, Scores, Threshold
from .sparse_ops import Pattern, sparse_index, sparse_matmul, sparse_sample

# Nanoseconds a weight: f(w) * mask and three products of T positions; and, a weight that is left, packing, its index
# and three sparse products. Only their ratio counts: below which density sparse products pay.
_DENSE_COST, _DENSE_POSITION, _SPARSE_COST, _SPARSE_POSITION = 1.0, 0.06, 10.0, 0.12
STREAMED_POSITIONS = 8  # positions up to which making products on the fly beats writing f(w) out


class Weight:
    """One weight tensor, read as rows ``[G, O, K]``, through rounds of scoring and cutting.

    Args:
        name: its parameter name.
        tensor: the parameter, or ``[E, *shape]`` for an ensemble of E members.
        synapse: how the network uses it (the first use, when tied).
        uses: how many synapses share it.
        f, s: weight maps of flow and score.
        scored: whether it is to be pruned.
        mask: bool tensor of the weights that are left; None means all.
        ensemble: whether ``tensor`` has a leading ensemble axis.
        compact: density below which the values that are left are packed (0: never).
        scratch: memory shared with the other weights of the network.
        used: called with the name when the tensor has been read through.
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        synapse: Synapse,
        *,
        f: WeightMap,
        s: WeightMap,
        uses: int = 1,
        scored: bool = True,
        mask: Tensor | None = None,
        ensemble: bool = False,
        compact: float = 0.0,
        scratch: Scratch | None = None,
        used: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.name, self.shape, self.f, self.s = name, tensor.shape, f, s
        self.uses, self.scored, self.form = uses, scored, synapse.form
        self._pack_below = compact * tensor.numel()
        self.members = tensor.shape[0] if ensemble else 1
        is_grouped = synapse.form in ("conv", "rows", "experts", "experts_t")
        self.groups = self.members * (synapse.groups if is_grouped else 1)
        per_expert = synapse.form.startswith("experts")
        rows = tensor.shape[-2] if per_expert else tensor.shape[1 if ensemble else 0] * self.members // self.groups
        self.columns = tensor.shape[-1] if per_expert else tensor.shape[2 if ensemble else 1 :].numel()
        self.dense: Tensor | None = tensor.detach().contiguous().reshape(self.groups, rows, self.columns)
        self.first = 0  # flat index, in the whole tensor, of the first weight here
        self.mask = None if mask is None else ops.mask_pack(mask.to(tensor.device).reshape(self.dense.shape))
        self.packed: tuple[Tensor, Tensor, Tensor] | None = None  # values, layout, row_start
        self.exponents = torch.zeros(self.members, dtype=torch.int64)  # of the written scores, one per member
        self._scratch = scratch or Scratch()
        self._read = partial(used, name)
        self._effective: Tensor | None = None
        self._pattern: Pattern | None = None  # of the packed values, as long as they are exactly those left
        self._scores: Scores | None = None
        self._collected: Collected | None = None
        self._cut: tuple[Threshold, int] | None = None

    @property
    def rows(self) -> torch.Size:
        """[G, O, K]: the weights that are here, removed ones included."""
        assert self.dense is not None
        return self.dense.shape

    @property
    def transposed(self) -> bool:
        """Whether the flow enters at the rows of the stored tensor."""
        return self.form in ("linear_t", "conv_transpose", "experts_t")

    def _source(self, x: Tensor | None, g: Tensor | None, exponent: int) -> Scores:
        """The streamed scores made of flows at the columns (x) and at the rows (g)."""
        weight, layout, row_start = self.dense, None, None
        if self.packed is not None:
            weight, layout, row_start = self.packed
        assert weight is not None
        made_of = (weight, self.columns, self.mask, x, g, self.s, exponent, layout, row_start)
        return Scores(self.name, *made_of, first=self.first, used=self._read)

    def _as_rows(self, tensor: Tensor) -> Tensor:
        """[G, O, K]: of a tensor of the weight's shape, the rows that are here."""
        return tensor.reshape(self.groups, -1, self.columns)

    def _packing(self) -> dict[str, object]:
        return self._source(None, None, 0).packing()

    def _stored(self) -> Tensor:
        return self._source(None, None, 0).weight

    # ------------------------------------------------------------------------------------------ forward flow

    def streams(self, positions: int) -> bool:
        """Whether flow and score are made on the fly for this many positions."""
        return (
            self.uses == 1
            and self.members == 1
            and positions <= STREAMED_POSITIONS
            and not self.form.startswith("conv")
        )

    def forward_rows(self, x: Tensor, turned: bool = False, f: WeightMap | None = None) -> Tensor:
        """[G, T, in] -> [G, T, out]; applies a waiting cut on the way, in the same read where it can.

        ``turned``: this use of a tied weight reads it the other way round than the first. ``f``: of a weight that
        streams, another map than its own.
        """
        if not self.streams(x.shape[1]):
            pattern = self._sparse(x)
            if pattern is not None:
                return sparse_matmul(self._stored(), x, pattern, self.f, self.transposed)
            effective = self._effective_rows()
            return product(x, effective if self.transposed != turned else effective.transpose(1, 2))
        waiting, kept = self._cut, self._scores
        if waiting is None or kept is None or kept.x is None or self.transposed:
            self.settle()
            made = (self._stored(), self.mask, x, self.f if f is None else f, self.transposed)
            onward = ops.path_flow_linear(*made, **self._packing())  # type: ignore[arg-type]
        else:
            bounds = waiting[0].local(kept, waiting[1])
            self._cut = self._scores = None
            made_of = (kept.weight, self.mask, kept.x, kept.g, self.s)
            onward = ops.path_flow_linear_prune_(*made_of, *bounds, x, self.f, **kept.packing())  # type: ignore[arg-type]
        self._read()
        return onward

    def effective(self) -> Tensor:
        """``f(w) * mask`` in the tensor's own shape and the accumulate type, kept until the backward flow."""
        return self._effective_rows().reshape(self.shape)

    def _effective_rows(self) -> Tensor:
        self.settle()
        if self._effective is None:
            assert self.dense is not None
            self._effective = ops.masked_weight(self.dense, self.mask, self.f)
            self._read()
        return self._effective

    # ----------------------------------------------------------------------------------------- backward flow

    def backward_rows(self, x: Scaled, g: Scaled, guess: Bracket | None, score: bool, turned: bool = False) -> Tensor:
        """[G, T, out] -> [G, T, in]; with ``score``, makes the scores, counting against ``guess`` on the way."""
        if self._pattern is not None:
            return self._sparse_backward(x, g, self._pattern, score)
        if not self.streams(x.tensor.shape[1]):
            effective, transposed = self._effective_rows(), self.transposed != turned
            inward = product(g.tensor, effective.transpose(1, 2) if transposed else effective)
            if score and self.scored:
                left, right = (x.tensor, g.tensor) if transposed else (g.tensor, x.tensor)
                gradient = self._scratch.like(effective, effective.dtype)
                product(left.transpose(1, 2), right, out=gradient)
                self._write_rows(gradient, x.exponent + g.exponent)
            return inward
        at_columns, at_rows = (g.tensor, x.tensor) if self.transposed else (x.tensor, g.tensor)
        source = self._source(at_columns, at_rows, 0)
        if score and self.scored:
            source = replace(source, exponent=int(x.exponent + g.exponent))
            self._scores, self._collected = source, None
        if score and self.scored and guess is not None and not self.transposed:
            made = (
                source.weight,
                self.mask,
                source.x,
                source.g,
                self.f,
                self.s,
                *guess.local(source),
                source.capacity,
            )
            inward, *found = ops.path_flow_linear_collect(*made, **source.packing())  # type: ignore[arg-type]
            self._collected = Collected(*found)
        else:
            onward = (source.weight, self.mask, g.tensor, self.f, not self.transposed)
            inward = ops.path_flow_linear(*onward, **source.packing())  # type: ignore[arg-type]
        self._read()
        return inward

    def _sparse(self, x: Tensor) -> Pattern | None:
        """Where the weights that are left lie, if products over them alone pay; packs them after a cut."""
        self.settle()
        if self._pattern is not None or self.mask is None or self._pack_below == 0 or self.mask.device.type != "cpu":
            return self._pattern
        if self.uses > 1 or self.members > 1:
            return None
        if self.packed is None:
            positions = x.shape[1]
            pays = (_DENSE_COST + _DENSE_POSITION * positions) / (_SPARSE_COST + _SPARSE_POSITION * positions)
            if int(ops.mask_count(self.mask)) >= min(self._pack_below, pays * self.rows.numel()):
                return None
        values, row_start = ops.compact_weight(self._stored(), self.mask, **self._packing())  # type: ignore[arg-type]
        layout = self.mask.clone()
        self.packed = (values, layout, row_start)
        self._pattern = sparse_index(layout, row_start, self.columns)
        return self._pattern

    def _sparse_backward(self, x: Scaled, g: Scaled, pattern: Pattern, score: bool) -> Tensor:
        values = self._stored()
        inward = sparse_matmul(values, g.tensor, pattern, self.f, not self.transposed)
        if score and self.scored:
            at_columns, at_rows = (g, x) if self.transposed else (x, g)
            sums = sparse_sample(at_columns.tensor, at_rows.tensor, pattern)
            scores = map_weight(values.to(sums.dtype), self.s)  # with the padding of a packed weight
            scores[: len(sums)] *= sums
            self.exponents = x.exponent + g.exponent
            made = Scores(self.name, scores, self.columns, self.mask, exponent=int(self.exponents), first=self.first)
            self._scores = replace(made, layout=pattern.layout, row_start=pattern.row_start)
            self._collected = None
        return inward

    def write_scores(self, gradient: Tensor, exponent: Tensor) -> None:
        """Scores from the gradient of R with respect to f(w), ``[E, *shape]``; uses of a tied weight add up."""
        self._write_rows(self._as_rows(gradient), exponent)

    def _write_rows(self, gradient: Tensor, exponent: Tensor) -> None:
        assert self.dense is not None
        if self.f == self.s and self._effective is not None and self.uses == 1:
            factor, self._effective = self._effective, None  # its last use: it is written to
        else:
            factor = ops.masked_weight(self.dense, self.mask, self.s)
            self._read()
        self._take_rows(factor.mul_(gradient), exponent)

    def take_scores(self, scores: Tensor, exponent: Tensor) -> None:
        """Scores as they are, ``[E, *shape]`` times 2^exponent; uses of a tied weight add up."""
        self._take_rows(self._as_rows(scores), exponent)

    def _take_rows(self, scores: Tensor, exponent: Tensor) -> None:
        if self._scores is not None:
            scores, exponent = added(Scaled(self._scores.weight, self.exponents), Scaled(scores, exponent))
        self.exponents = exponent
        unit = int(exponent) if self.members == 1 else 0
        self._scores = Scores(self.name, scores, self.columns, self.mask, exponent=unit, first=self.first)
        self._collected = None

    def replace_scores(self, scores: Tensor) -> None:
        """Other scores in place of those made: ``[*shape]``, as they are."""
        self.replace_rows(self._as_rows(scores))

    def replace_rows(self, scores: Tensor) -> None:
        """The same, of the rows that are here: [G, O, K]."""
        self._scores = None
        self._take_rows(scores, torch.zeros(self.members, dtype=torch.int64))

    def score_by_itself(self, x: Tensor | None = None, g: Tensor | None = None) -> None:
        """Scores s(w), or s(w) x_j g_i: made of the weight, and factors [G, 1, K] of columns and [G, 1, O] of rows."""
        self.settle()
        self._scores, self._collected = self._source(x, g, 0), None

    def room(self, like: Tensor) -> Tensor:
        """Memory for one tensor of rows [G, O, K], shared with the network's other weights."""
        return self._scratch.like(like.reshape(self.groups, -1, self.columns), like.dtype)

    def drop_effective(self) -> None:
        """Frees ``f(w) * mask`` once the backward flow is through."""
        self._effective = None

    # ------------------------------------------------------------------------------------ selection and cuts

    @property
    def scores(self) -> Scores:
        """The scores of the last backward flow."""
        if self._scores is None:
            raise RuntimeError(f"Weight.scores: '{self.name}' has not been scored since the last cut")
        return self._scores

    @property
    def collected(self) -> Collected | None:
        """What the backward flow already found in its guess."""
        return self._collected

    def written_scores(self) -> Scores:
        """The scores as a tensor [G, O, K]."""
        made = self.scores
        if made.x is None and made.s == WeightMap.IDENTITY and made.layout is None:
            return made
        written = made.written()
        return Scores(self.name, written, self.columns, self.mask, exponent=made.exponent, first=made.first)

    def cut(self, threshold: Threshold, position: int) -> None:
        """Makes a cut wait for the next forward flow, or for :meth:`settle`."""
        if self.mask is None:
            assert self.dense is not None
            self.mask = _full_mask(self.dense)
            self._scores = replace(self.scores, mask=self.mask)
        self._cut = (threshold, position)

    def settle(self) -> None:
        """Applies a waiting cut now."""
        if self._cut is not None:
            threshold, position = self._cut
            self._cut = self._pattern = None
            self.scores.prune_(threshold, position)
            self._scores = None

    def forget(self) -> None:
        """Drops the scores; with no cut waiting they are of no further use."""
        if self._cut is None:
            self._scores = self._collected = None

    def set_mask(self, mask: Tensor) -> None:
        """Replaces the mask by a bool tensor of the weight's shape."""
        self.set_mask_rows(self._as_rows(mask))

    def set_mask_rows(self, mask: Tensor) -> None:
        """The same, of the rows that are here: bool [G, O, K]."""
        self.set_words(ops.mask_pack(mask.contiguous()))

    def set_words(self, words: Tensor) -> None:
        """The same, as row words int16 [G, O, W], which become the weight's own."""
        self._cut = self._scores = self._effective = self._pattern = None
        self.mask = words
        if self.packed is not None and self.dense is None:
            raise RuntimeError("Weight.set_mask: the dense weights are gone")

    def follow(self, other: Weight) -> None:
        """Takes the mask of the same tensor in another network, its waiting cut applied."""
        other.settle()
        self.mask, self._effective, self._pattern = other.mask, None, None

    def live(self) -> int:
        """Weights that are left, a waiting cut applied."""
        self.settle()
        if self.mask is None:
            return self.shape.numel()
        return int(ops.mask_count(self.mask))

    def bits(self) -> Tensor:
        """The mask as a bool tensor of the weight's shape."""
        return self.mask_rows().reshape(self.shape)

    def mask_rows(self) -> Tensor:
        """The mask of the rows that are here, bool [G, O, K]."""
        self.settle()
        if self.mask is None:
            return torch.ones(self.rows, dtype=torch.bool)
        return ops.mask_unpack(self.mask, self.columns)

    def whole_words(self, words: Tensor) -> Tensor:
        """Mask words [G, O, W] of all rows, from those of the rows that are here."""
        return words

    def packed_bits(self, copy: bool = True) -> tuple[Tensor, torch.Size]:
        """The mask as ``Masks`` stores it: flat little-endian bits, uint8 [ceil(n / 8)] on the CPU, and their shape."""
        self.settle()
        if self.mask is not None and self.columns % 16 == 0:
            flat = self.mask.cpu().view(torch.uint8).flatten()
            return flat.clone() if copy else flat, self.shape
        return pack_bits(self.mask_rows().cpu()), self.shape

    def allow_return(self) -> None:
        """Lets pruned weights compete again: every weight takes part in the next cut with the score it has."""
        made = self.written_scores()
        self.mask = None
        self._scores = replace(made, mask=None)
        self._collected = None

    def stay_dense(self) -> None:
        """Makes products over all weights from now on, however few are left."""
        self._pack_below, self._pattern = 0, None

    def compact_when_sparse(self) -> None:
        """Packs the values that are left once they are few, and again when a quarter of the packed ones is gone."""
        if self._pack_below == 0 or self.mask is None or self._cut is not None or self._effective is not None:
            return
        if self._pattern is not None:
            return  # packed anew already
        live = int(ops.mask_count(self.mask))
        if live >= self._pack_below:
            return
        values, row_start = ops.compact_weight(self._stored(), self.mask, **self._packing())  # type: ignore[arg-type]
        self.packed = (values, self.mask.clone(), row_start)
        self._pack_below = live * 3 // 4


def weights_of(
    network: PathNetwork,
    names: Sequence[str],
    maps: tuple[WeightMap, WeightMap],
    *,
    masks: Mapping[str, Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    compact: float = 0.0,
) -> dict[str, Weight]:
    """A :class:`Weight` for every tensor the network's synapses use; those in ``names`` are scored.

    Args:
        masks: bool tensors of weights that are left.
        tensors: in place of the network's own, ``[E, *shape]`` each: an ensemble.
        compact: density below which streamed weights are packed.

    Raises:
        ValueError: NaN or infinite weights, with the tensor's name.
    """
    from .sharded_weight import ShardedWeight

    scratch = Scratch()
    synapses = [network.nodes[k] for k in network.synapses()]
    uses = Counter(node.weight for node in synapses if isinstance(node, Synapse))
    used: dict[str, Synapse] = {}
    for node in synapses:
        assert isinstance(node, Synapse)
        used.setdefault(node.weight, node)
    values = {name: (tensors or network.tensors)[name].detach() for name in used}
    with network.shards.together("prune"):
        for name, tensor in values.items():
            check_finite(name, tensor)
            network.used(name)
    spread = network.shards.size > 1 and tensors is None
    kind = partial(ShardedWeight, network.shards) if spread else Weight
    return {
        name: kind(
            name,
            values[name],
            node,
            f=maps[0],
            s=maps[1],
            uses=uses[name],
            scored=name in names,
            mask=masks.get(name) if masks else None,
            ensemble=tensors is not None,
            compact=compact,
            scratch=scratch,
            used=network.used,
        )
        for name, node in used.items()
    }


def stacked(network: PathNetwork, sets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of an ensemble, ``[E, *shape]`` by name, from each member's own."""
    names = dict.fromkeys(node.weight for node in _synapses(network))
    return {name: torch.stack([own[name].detach() for own in sets]) for name in names}


def accumulate_type(network: PathNetwork) -> torch.dtype:
    """float64 for float64 weights, else float32.

    Raises:
        ValueError: float64 weights mixed with others, or integer weights.
    """
    types = {network.tensors[name].dtype for name in (node.weight for node in _synapses(network))}
    if not types <= {torch.float64} and not types <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(
            f"PathFlow: wanted float32/bfloat16/float16 weights, or all float64, got {sorted(map(str, types))}"
        )
    return torch.float64 if types == {torch.float64} else torch.float32


def _synapses(network: PathNetwork) -> list[Synapse]:
    return [node for k, node in enumerate(network.nodes) if k in network.alive and isinstance(node, Synapse)]


def _full_mask(rows: Tensor) -> Tensor:
    """Row words with every bit of [G, O, K] set."""
    columns = rows.shape[-1]
    mask = torch.full((*rows.shape[:-1], -(-columns // 16)), -1, dtype=torch.int16, device=rows.device)
    if columns % 16:
        mask[..., -1] = (1 << columns % 16) - 1
    return mask
