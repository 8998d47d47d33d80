"""One number for a network: what architecture search ranks networks by.

=====================  ==========================================================  ===========
name                   score                                                       data
=====================  ==========================================================  ===========
``synflow``            log2 of the sum of SynFlow's scores over all weights        -
``log2_R``             log2 of the sum over input-output paths; biases begin none  -
``path_count``         log2 of the number of input-output paths                    -
``path_kernel_trace``  log2 of the trace of the path kernel                        -
``snip``               sum of ``|w dL/dw|``                                        batches
``grasp``              sum of ``w (H g)``: high where removing weights costs flow  batches
``zico``               :func:`pathprune.zico.zico`                                 two batches
``ntk_sap``            sum of NTK-SAP's scores                                     optional
=====================  ==========================================================  ===========

Any pruner that scores weights is a measure too: the sum of its scores, in log2 if it is a path method.

Sums over paths come from float32 flows that carry exponents; no double precision, no copies, and several weight sets of
one architecture are one call. Published codes: SynFlow's sum needs float64 and overflows; GraSP's is of ``-w (H g)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batches import Data
from .flow import PathFlow
from .network import PathNetwork
from .ops import WeightMap
from .path_kernel import log2_trace
from .policy import Policy, policy_of
from .pruners import NTKSAP, SNIP, GraSP, SynFlow
from .pruners.base import PathPruner, Pruner, require_scores
from .pruners.objective import Loss
from .spatial import merge_equal_positions
from .weights import stacked, weights_of
from .zico import zico

WeightSet = Mapping[str, Tensor]
METHODS = ("synflow", "log2_R", "path_count", "path_kernel_trace", "snip", "grasp", "zico", "ntk_sap")
ON_DATA = ("snip", "grasp", "zico")


@dataclass(frozen=True)
class Measure:
    """A number for a network.

    Attributes:
        name: the column it goes to.
        of_one: the score of one network (with a seed).
        of_members: the scores of several weight sets of one architecture, float64 [E]; None: one by one.
        log2: whether scores are logarithms.
        settings: what they depend on, of JSON's types.
    """

    name: str
    of_one: Callable[[PathNetwork, int], float]
    of_members: Callable[[PathNetwork, Sequence[WeightSet]], Tensor] | None
    log2: bool
    settings: Mapping[str, Any]


def measures_of(method: str | Pruner | Sequence[str | Pruner], data: Data | None, loss: Loss) -> tuple[Measure, ...]:
    """The measures of methods given by name or as pruners.

    Raises:
        ValueError: an unknown name, the same name twice, none, or data missing.
        TypeError: a pruner that does not score weights.
    """
    several = [method] if isinstance(method, (str, Pruner)) else list(method)
    found = tuple(_by_name(one, data, loss) if isinstance(one, str) else _by_pruner(one) for one in several)
    names = [measure.name for measure in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"score_many: method: wanted one or several different ones, got {names}")
    return found


def _by_name(name: str, data: Data | None, loss: Loss) -> Measure:
    if name not in METHODS:
        raise ValueError(f"score_many: method: wanted one of {METHODS} or a pruner, got {name!r}")
    if name in ON_DATA and data is None:
        raise ValueError(f"score_many: data: wanted batches (x, y) for '{name}', got None")
    if name == "synflow":
        return _summed(name, SynFlow())
    if name == "log2_R":
        return _of_paths(name, WeightMap.ABS)
    if name == "path_count":
        return _of_paths(name, WeightMap.ONE)
    if name == "path_kernel_trace":
        maps, policy = (WeightMap.SQUARE, WeightMap.ONE), policy_of("paths")
        many = lambda network, sets: score_sums(network, maps, policy, sets)  # noqa: E731
        return Measure(name, lambda network, seed: log2_trace(network), many, True, {})
    if name == "ntk_sap":
        return _summed(name, NTKSAP() if data is None else NTKSAP(data))
    assert data is not None
    if name == "zico":
        method = SNIP(data, loss)
        return Measure(name, lambda network, seed: zico(network, method, seed), None, False, method.config())
    return _summed(name, SNIP(data, loss) if name == "snip" else GraSP(data, loss))


def _by_pruner(method: Pruner) -> Measure:
    require_scores(method, "score_many: method")
    return _summed(method.name, method)


def _of_paths(name: str, f: WeightMap) -> Measure:
    return Measure(
        name,
        lambda network, seed: float(log2_paths(network, f)[0]),
        lambda network, sets: log2_paths(network, f, sets),
        True,
        {},
    )


def _summed(name: str, method: Pruner) -> Measure:
    """The sum of a pruner's scores."""
    of_paths = isinstance(method, PathPruner)
    flows = of_paths and type(method).scorer is PathPruner.scorer  # scored by flow and weight map alone

    def of_one(network: PathNetwork, seed: int) -> float:
        if flows:
            return float(of_members(network, ())[0])
        weights = weights_of(network, network.select(), method.maps)
        method.scorer(network, weights, seed)(None)
        made = [weight.written_scores() for weight in weights.values() if weight.scored]
        total = math.fsum(math.ldexp(float(one.weight.sum(dtype=torch.float64)), one.exponent) for one in made)
        return total if not of_paths else math.log2(total) if total > 0 else -math.inf

    def of_members(network: PathNetwork, sets: Sequence[WeightSet]) -> Tensor:
        assert isinstance(method, PathPruner)
        return score_sums(network, method.maps, policy_of(method.policy), sets, method.source())

    settings = {key: value for key, value in method.config().items() if key != "rounds"}
    return Measure(name, of_one, of_members if flows else None, of_paths, settings)


def log2_paths(network: PathNetwork, f: WeightMap, sets: Sequence[WeightSet] = ()) -> Tensor:
    """log2 of the sum over input-output paths, float64 [E]; -inf where none of non-zero weights is left.

    A path is one of weights and fixed factors that are not 0, also where each counts for 1 (``f`` = ONE).
    """
    quick = merge_equal_positions(network, "paths", fixed=not sets)
    total = _flow(quick, (WeightMap.ABS, WeightMap.ABS), policy_of("paths"), sets, scored=False).forward()
    if f == WeightMap.ABS:
        return total
    own = _flow(quick, (f, f), policy_of("paths", norm="unit"), sets, scored=False).forward()
    return torch.where(total == -torch.inf, -torch.inf, own)


def score_sums(
    network: PathNetwork,
    maps: tuple[WeightMap, WeightMap],
    policy: Policy,
    sets: Sequence[WeightSet],
    source: Tensor | None = None,
) -> Tensor:
    """log2 of the sum of all path scores of each weight set, float64 [E]: one forward and one backward flow."""
    quick = merge_equal_positions(network, policy, fixed=not sets) if source is None else network
    flow = _flow(quick, maps, policy, sets, source=source)
    flow.forward()
    flow.backward()
    scored = [weight for weight in flow.weights.values() if weight.scored]
    made = [weight.written_scores() for weight in scored]
    amounts = [one.weight.sum((1, 2), dtype=torch.float64).reshape(flow.members, -1).sum(1).cpu() for one in made]
    one_by_one = flow.members > 1
    exponents = [
        w.exponents.cpu() if one_by_one else torch.tensor([m.exponent]) for w, m in zip(scored, made, strict=True)
    ]
    return _log2_sum(torch.stack(amounts), torch.stack(exponents))


def _flow(
    network: PathNetwork,
    maps: tuple[WeightMap, WeightMap],
    policy: Policy,
    sets: Sequence[WeightSet],
    source: Tensor | None = None,
    scored: bool = True,
) -> PathFlow:
    names = network.select() if scored else ()
    if len(sets) == 1:
        network, sets = network.with_tensors(sets[0]), ()
    weights = weights_of(network, names, maps, tensors=stacked(network, sets) if sets else None)
    return PathFlow(network, weights, f=maps[0], policy=policy, source=source, scored=scored, members=sets)


def _log2_sum(amounts: Tensor, exponents: Tensor) -> Tensor:
    """log2 of ``sum over layers of amounts * 2^exponents``, [layers, E] -> [E]."""
    levels = amounts.log2() + exponents
    top = levels.amax(0)
    finite = torch.where(top > -torch.inf, top, 0.0)
    return (levels - finite).exp2().sum(0).log2() + finite
