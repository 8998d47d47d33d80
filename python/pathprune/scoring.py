"""Scores written out: one network, many networks, or many weight sets of one architecture in a single call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import seed_of
from .flow import PathFlow
from .masks import Masks
from .network import PathNetwork, as_network
from .policy import policy_of
from .pruners.base import PathPruner, Pruner, require_scores
from .spatial import merge_equal_positions
from .surroundings import undisturbed
from .weights import stacked, weights_of

Network = nn.Module | PathNetwork
WeightSet = Mapping[str, Tensor]


@dataclass(frozen=True)
class NetworkScores:
    """The scores of one network.

    Attributes:
        tensors: name -> scores of the weight's shape; the true score is ``tensors[name] * 2**exponents[name]``.
        exponents: name -> integer.
        log2_R: log2 of the sum over all paths (NaN for methods that have none; -inf when no path is left).
    """

    tensors: dict[str, Tensor]
    exponents: dict[str, int]
    log2_R: float

    def double(self, name: str) -> Tensor:
        """The true scores in float64 (inf where even that is too small a range)."""
        return torch.ldexp(self.tensors[name].double(), torch.tensor(self.exponents[name]))


@undisturbed
def scores(
    networks: Network | Sequence[Network] | Sequence[WeightSet],
    method: Pruner,
    *,
    example_input: Any = None,
    architecture: Network | None = None,
    masks: Masks | None = None,
    seed: int = 0,
) -> NetworkScores | list[NetworkScores]:
    """One round of a method's scores, under ``masks`` if given.

    Args:
        networks: a model or ``PathNetwork``; a list of them; or a list of weight sets (name -> tensor, as from
            ``state_dict()``, norms and biases included) of one ``architecture``: an ensemble, each layer run once.
        method: a pruner, such as ``SynFlow()``.
        example_input: what the models accept (not needed for a ``PathNetwork``).
        architecture: the network that a list of weight sets belongs to.
        masks: weights that are left.
        seed: of methods that draw.

    Returns:
        :class:`NetworkScores`, or a list of them for a list.

    Raises:
        ValueError: weight sets without an architecture, or that differ from it; what ``prune`` refuses.
    """
    require_scores(method, "scores: method")
    seed = seed_of(seed, "scores")
    if isinstance(networks, (nn.Module, PathNetwork)):
        return _one(as_network(networks, example_input), method, masks, seed)
    entries = list(networks)
    if all(isinstance(entry, (nn.Module, PathNetwork)) for entry in entries):
        return [_one(as_network(entry, example_input), method, masks, seed) for entry in entries]  # type: ignore[arg-type]
    if architecture is None:
        raise ValueError("scores: architecture: wanted the network the weight sets belong to, got None")
    return _ensemble(as_network(architecture, example_input), entries, method, masks)  # type: ignore[arg-type]


def _one(network: PathNetwork, method: Pruner, masks: Masks | None, seed: int) -> NetworkScores:
    names = network.select()
    quick = merge_equal_positions(network, method.merged_under) if method.merged_under else network
    weights = weights_of(quick, names, method.maps, masks=masks)
    total = method.scorer(quick, weights, seed)(None)
    tensors, exponents = {}, {}
    for name in names:
        made = weights[name].written_scores()
        scores = made.weight if made.s == 3 else made.weight.abs()
        tensors[name], exponents[name] = scores.reshape(network.tensors[name].shape), made.exponent
    return NetworkScores(tensors, exponents, float("nan") if total is None else total)


def _ensemble(
    network: PathNetwork, sets: Sequence[WeightSet], method: Pruner, masks: Masks | None
) -> list[NetworkScores]:
    if not isinstance(method, PathPruner):
        raise ValueError(f"scores: method: wanted a path method for weight sets, got {method.name}")
    if not sets:
        return []
    for k, entry in enumerate(sets):
        check_weight_set(network, entry, f"scores: weight set {k}")
    if len(sets) == 1:
        return [_one(network.with_tensors(sets[0]), method, masks, seed=0)]
    names, policy = network.select(), policy_of(method.policy)
    if masks is not None:
        masks = {name: masks[name].expand(len(sets), *masks[name].shape) for name in masks}  # type: ignore[assignment]
    quick = merge_equal_positions(network, policy, fixed=False) if method.merged_under else network
    weights = weights_of(quick, names, method.maps, masks=masks, tensors=stacked(network, sets))
    flow = PathFlow(quick, weights, f=method.maps[0], policy=policy, source=method.source(), members=sets)
    totals = flow.forward()
    flow.backward()
    results = []
    for member, total in enumerate(totals.tolist()):
        tensors, exponents = {}, {}
        for name in names:
            made = weights[name].scores.weight.reshape(len(sets), *network.tensors[name].shape)
            tensors[name], exponents[name] = made[member], int(weights[name].exponents[member])
        results.append(NetworkScores(tensors, exponents, total))
    return results


def check_weight_set(network: PathNetwork, entry: WeightSet, who: str) -> None:
    """Raises ValueError for a weight set that lacks one of the network's weights, or has it in another shape."""
    for name in dict.fromkeys([*network.select(), *(_weight_name(network, k) for k in network.synapses())]):
        wanted = network.tensors[name].shape
        got = entry[name].shape if name in entry else None
        if got != wanted:
            raise ValueError(f"{who}: '{name}': wanted shape {tuple(wanted)}, got {got}")


def _weight_name(network: PathNetwork, index: int) -> str:
    return network.nodes[index].weight  # type: ignore[attr-defined]
