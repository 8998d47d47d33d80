"""PHEW: Paths with Higher Edge-Weights (Patil & Dovrolis, ICML 2021): the weights that biased random walks take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import ops
from .._mask_io import count_ones, pack_bits, unpack_mask
from ..distributed import ALONE, check_finite
from ..liveness import reach
from ..masks import Masks
from ..network import PathNetwork
from ..nodes import Softmax
from ..ops import WeightMap
from ..path_kernel import log2_trace
from ..path_sampling import FlowWalks
from ..walk_masks import Marked, WalkMasks
from ..walk_reference import powered
from ..walks import WalkRule, Walks
from ..weights import weights_of
from .base import Pruner, Round, Selection


@dataclass(frozen=True)
class PHEW(Pruner):
    """Keeps the weights on input-output walks that prefer large ``|w|``; walks are drawn until the density is reached.

    Every kept weight lies on a path, so effective equals direct density. The last walk stays whole: at most one path
    over the target, reported as ``overshoot``. A list of densities gives nested masks from one run of walks. The
    paper's masks of biases, those of the units visited, are ``masks.with_biases(model)``.

    Through attention walks go by the values. Queries and keys get the same density, drawn in proportion to
    ``|w|^power`` without replacement (Gumbel top-k); the number kept is then exact.

    Args:
        bias: None: steps see the next weight alone. ``flow``: whole paths are drawn with probability ``|v|^power / R``,
            position by position and identity skips included (:mod:`path_sampling`); ``branches``, ``identities``,
            ``start`` and ``keep_kernels`` have no meaning then, and power is 1 or 2.
        power: a step is drawn in proportion to ``|w|^power``: 1, 2, 0 (uniform) or -1 (inverse).
        branches: where flows part or meet: ``uniform``, ``mass`` (``|w|^power`` of the branch's next synapse) or
            ``flow`` (the sum over all channel paths of the branch).
        identities: whether identity skips are walked.
        start: ``round_robin`` over input (output) units, as the published code, or ``uniform``, as the paper.
        keep_kernels: keep whole kernels between two channels, not single entries.
        trim: keep exactly the target; what the last walk loses may leave a dead end.
        max_walks: give up after so many; None: 64 times the expected number, 4,096 at least.

    Determinism: the same seed gives the same mask on any device, for any number of threads.

    Example:
        >>> masks = pp.prune(model, pp.PHEW(), density=0.018, example_input=x, seed=0)
    """

    power: int = 1
    bias: str | None = None
    branches: str = "uniform"
    identities: bool = False
    start: str = "round_robin"
    keep_kernels: bool = False
    trim: bool = False
    max_walks: int | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rule()
        if self.bias not in (None, "flow"):
            raise ValueError(f"PHEW: bias: wanted None or 'flow', got {self.bias!r}")
        plain = (self.branches, self.identities, self.start, self.keep_kernels) == (
            "uniform",
            False,
            "round_robin",
            False,
        )
        if self.bias == "flow" and not (plain and self.power in (1, 2)):
            raise ValueError(f"PHEW: bias: 'flow' wanted power 1 or 2 and no other option of walks, got {self}")
        if self.max_walks is not None and self.max_walks < 1:
            raise ValueError(f"PHEW: max_walks: wanted at least 1, got {self.max_walks}")

    def rule(self) -> WalkRule:
        return WalkRule(self.power, self.branches, self.identities, self.start)

    @property
    def scores_shards(self) -> bool:
        return self.bias is None

    def rounds_for(self, densities: Sequence[float]) -> int:
        return len(densities)

    def steps(
        self,
        network: PathNetwork,
        selection: Selection,
        plan: Sequence[tuple[float, int | None]],
        layer_plan: Callable[[float], Mapping[str, float]],
        on_snapshot: Callable[[int], None],
        seed: int,
    ) -> Iterator[Round]:
        if selection.scope.kind != "global" or selection.count != "exact":
            raise ValueError(f"PHEW: wanted scope='global' and count='exact', got {selection.scope} {selection.count}")
        with network.shards.together("PHEW"):
            for name in {network.nodes[k].weight for k in network.synapses()}:  # type: ignore[attr-defined]
                check_finite(name, network.tensors[name].detach())
                network.used(name)
        return self._walked(network, selection, plan, on_snapshot, seed)

    def _walked(
        self,
        network: PathNetwork,
        selection: Selection,
        plan: Sequence[tuple[float, int | None]],
        on_snapshot: Callable[[int], None],
        seed: int,
    ) -> Iterator[Round]:
        began = time.perf_counter()
        names = [weight.name for weight in selection.weights]
        targets = {which: selection.kept_at(density) for density, which in plan if which is not None}
        asking = _Asking(network, names, self.power, seed)
        walks: WalkMasks
        if self.bias == "flow":
            walks = FlowWalks(network, names, self.power, seed)
        else:
            walks = Walks(network, names, self.rule(), seed, keep_kernels=self.keep_kernels, count_visits=True)
        partial = sorted(target for target in targets.values() if target < selection.total)
        to_walk = [target - round(asking.total * target / selection.total) for target in partial]
        found = dict(zip(partial, walks.until(to_walk, max_walks=self.max_walks, trim=self.trim), strict=True))
        lost = walks.lost() if partial else 0
        for _, which in plan:
            if which is None:
                continue
            target = targets[which]
            packed = {}
            for weight in selection.weights:
                if target not in found:
                    bits = pack_bits(torch.ones(weight.shape, dtype=torch.bool))
                else:
                    bits = walks.packed(found[target], weight.name)
                    if (asked := asking.drawn(weight.name, target - found[target].kept)) is not None:
                        bits |= asked
                weight.set_mask(unpack_mask(bits, weight.shape, network.device))
                packed[weight.name] = bits, weight.shape
            on_snapshot(which)
            masks = Masks.from_packed(packed)
            details = {**self._details(network, masks, found.get(target), target), "quantised_to_zero": lost}
            kept = masks.kept
            yield Round(kept, None, None, time.perf_counter() - began, details)
            began = time.perf_counter()

    def _details(self, network: PathNetwork, masks: Masks, found: Marked | None, target: int) -> dict[str, Any]:
        return {
            "walks": 0 if found is None else found.walks,
            "overshoot": masks.kept - target,
            "log2_path_kernel_trace": log2_trace(network, masks),
            **({"unit_visits": _least_and_mean(found.visits)} if found is not None and found.visits else {}),
        }


class _Asking:
    """Weights on paths through queries and keys alone, which no walk takes.

    Attributes:
        total: how many there are.
    """

    def __init__(self, network: PathNetwork, names: Sequence[str], power: int, seed: int) -> None:
        self._network, self._power, self._seed = network, power, seed
        self._bits: dict[str, tuple[torch.Tensor, int, int]] = {}  # packed, how many are set, and of those before it
        self._first: dict[str, int] = {}  # name -> the counter of its first draw
        self.total = 0
        attention = [network.nodes[k].where for k in network.alive if isinstance(network.nodes[k], Softmax)]
        if not attention:
            return
        if network.shards is not ALONE:
            raise ValueError(
                f"PHEW: model: wanted whole weights where there is attention ({attention[0]}), got rows on "
                "several ranks; prune(PathNetwork.from_module(model, example_input), ...) gathers them"
            )
        weights = weights_of(network, (), (WeightMap.ONE, WeightMap.ONE))
        every, walked = (reach(network, weights, keep_bits=True, attention=a).packed for a in ("half", "values"))
        first = 0
        for name in names:
            bits = every[name][0] & ~walked[name][0]
            count = count_ones(bits)
            if count:
                self._bits[name], self._first[name] = (bits, count, self.total), first
                self.total += count
            first += network.tensors[name].numel()

    def drawn(self, name: str, count: int) -> torch.Tensor | None:
        """Of ``count`` in all, the bits of one tensor's share; those of fewer are among those of more."""
        if name not in self._bits:
            return None
        bits, mine, before = self._bits[name]
        share = round(count * (before + mine) / self.total) - round(count * before / self.total)
        tensor = self._network.tensors[name].detach().cpu()
        mass = powered(tensor, self._power)
        keys = ops.gumbel_keys(mass, 0, 1.0, self._seed, self._first[name])
        keys = keys.masked_fill_(~unpack_mask(bits, tensor.shape), -torch.inf).flatten()
        mask = torch.zeros(keys.shape, dtype=torch.bool)
        mask[keys.topk(share).indices] = True
        return pack_bits(mask)


def _least_and_mean(visits: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, float]]:
    """weight -> (the fewest visits of an output unit, their mean)."""
    return {name: (int(counts.min()), float(counts.double().mean())) for name, counts in visits.items()}
