"""``prune``: a model, a pruner and a density in, masks out; the model is not changed."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from .belonging import base_hash
from .checks import seed_of
from .distributed import Group, is_distributed, ranks_of
from .layers import layer_network
from .liveness import Reach, reach
from .masks import Masks
from .network import PathNetwork, as_network
from .pruners.base import PathPruner, Pruner, Round, Scope, Selection, require_pruner
from .savepoints import Savepoints
from .schedules import layer_densities, rounds_of
from .sharded_masks import Placement, ShardedMasks
from .spatial import merge_equal_positions
from .surroundings import undisturbed
from .version import __version__
from .weights import Weight, weights_of

_LARGEST = 4  # weights left whole that findings name


@undisturbed
def prune(
    model: nn.Module | PathNetwork,
    pruner: Pruner,
    *,
    density: float | Sequence[float] | None = None,
    sparsity: float | Sequence[float] | None = None,
    example_input: Any = None,
    scope: str | None = None,
    allocation: str | Mapping[str, float] = "uniform",
    schedule: str = "exponential",
    seed: int = 0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    count: str = "exact",
    allow_regrowth: bool | None = None,
    compact: bool | float = True,
    process_group: Any = None,
    savepoints: Savepoints | None = None,
    progress: bool | None = None,
) -> Masks | list[Masks]:
    """Masks that keep the best weights of ``model`` at a density. The model, its mode, gradients and RNG stay as is.

    A model of DTensors (FSDP2's ``fully_shard``) is pruned by the same call on every rank, and its masks are DTensors
    placed like its weights. Magnitude, chance, path scores and walks leave the weights where they are; other methods
    gather them on every rank for as long as they score.

    Args:
        model: any module ``torch.export`` accepts, or its :class:`PathNetwork`.
        pruner: ``SynFlow()``, ``Magnitude()``, ... : configuration only.
        density: fraction of prunable weights kept, in (0, 1]; or a descending list: one schedule passes through all.
        sparsity: fraction removed, in [0, 1); exactly one of the two is given (neither for n:m, which fixes it).
        example_input: tensor, tuple or kwargs the model accepts; not needed for a ``PathNetwork``, nor by methods that
            look at each layer alone (``Magnitude``, ``Random``, ``Wanda``): without it they prune every linear layer
            and convolution of any model, and the report knows nothing of paths.
        scope: what competes: ``global``, ``layer``, ``row`` (each output unit), or ``n:m`` such as ``2:4``; None: the
            method's own, ``row`` for ``Wanda``, ``global`` for others.
        allocation: for ``scope="layer"`` or ``"row"``: ``uniform``, ``erdos_renyi_kernel``, ``smart_ratio``, or
            densities by name, as :func:`allocate` gives them: those at the end, whatever ``density`` says.
        schedule: ``exponential``, ``linear`` or ``one-shot``.
        seed: of pruners that draw, an int in [-2^63, 2^63); the only source of chance.
        include, exclude: name patterns of the weights that may be pruned; the others stay whole and are not counted.
        count: ``exact``: exactly the right number stays, ties kept in order; ``published``: the published loop's int
            arithmetic, all ties at the threshold removed.
        allow_regrowth: whether a pruned weight may return in a later round; None: in ``FORCE`` alone.
        compact: pack weights once fewer than this fraction is left (True: 1/4); memory for speed.
        process_group: the ranks whose data count as one: each has its share of the batches, sums run over all. None:
            the ranks of a model of DTensors, else this process alone.
        savepoints: where rounds are kept while they are done, and taken up if they have been done before (of methods
            whose rounds depend on masks and weights alone; walks and methods with a memory begin anew).
        progress: a progress bar on stderr; None: when it is a terminal.

    Returns:
        :class:`Masks`, or a list of them for a list of densities. ``masks.metadata["findings"]`` has what happened.

    Raises:
        ValueError: bad arguments, NaN or infinite weights or scores, no prunable weight; over ranks: other arguments
            on another rank, a weight that is not cut along its rows, no initialised process group.
        RuntimeError: over ranks: another rank has failed; names it, and its error.
        UnsupportedModelError: the model cannot be read; names module and operator.

    Determinism: the same weights, arguments and seed give the same masks, on any number of threads; over ranks, those
    of one process for magnitude, chance and walks, and on the CPU for path scores of convolutions and of linear layers
    at up to 8 distinct positions; for other scores up to the rounding of sums over ranks.
    """
    began = time.perf_counter()
    ranks = ranks_of(model, process_group)
    with ranks.together("prune"):
        require_pruner(pruner, "prune: pruner")
        scope = pruner.scope if scope is None else scope
        area, densities = asked_for(density, sparsity, scope)
        density, sparsity = _numbers("density", density), _numbers("sparsity", sparsity)
        seed = seed_of(seed, "prune")
        _check_options(count, compact, allow_regrowth, savepoints)
        if allocation != "uniform" and area.kind not in ("layer", "row"):
            raise ValueError(f"prune: allocation: wanted scope='layer' or 'row' with it, got scope={scope!r}")
        if savepoints is not None and (len(densities) > 1 or ranks.size > 1):
            raise ValueError("prune: savepoints: wanted one density on one process, got several")
    if ranks.size > 1:
        progress = progress if ranks.rank == 0 else False
        arguments: dict[str, Any] = {"density": densities, "scope": scope, "allocation": allocation}
        arguments |= {"schedule": schedule, "seed": seed, "include": include, "exclude": exclude, "count": count}
        arguments |= {"allow_regrowth": allow_regrowth, "pruner": _described(pruner), "model": _shapes_of(model)}
        ranks.agree("prune", arguments)
    network = _network_for(model, pruner, example_input, ranks)
    names = network.select(include, exclude)
    hashed = None
    if network.model is not None:
        hashed = base_hash(network.tensors if ranks.size == 1 else network.model, names, network.used)
    ranks.agree("prune", {"weights": hashed})
    quick = merge_equal_positions(network, pruner.merged_under) if pruner.merged_under else network
    share = (0.25 if compact else 0.0) if isinstance(compact, bool) else float(compact)
    regrow = pruner.regrows if allow_regrowth is None else allow_regrowth
    weights = weights_of(quick, names, pruner.maps, compact=0.0 if regrow else share)
    selection = Selection(weights, names, area, count, regrow, network.shards)
    one_shot = schedule == "one-shot" and len(densities) == 1
    plan = rounds_of(schedule, densities, 1 if one_shot else pruner.rounds_for(densities))
    shapes = {name: network.tensors[name].shape for name in names}

    snapshots: list[dict[str, tuple[Tensor, torch.Size]]] = []
    structures: list[Reach | None] = []
    reachable = merge_equal_positions(network, "paths") if network.connected else None

    def snapshot(which: int) -> None:
        more = which < len(densities) - 1  # rounds to come, which write to the masks
        snapshots.append({name: weights[name].packed_bits(copy=more) for name in names})
        structures.append(None if reachable is None else reach(reachable, weights))

    finished: list[int] = []
    rounds: list[Round] = []
    if savepoints is not None and pruner.resumes:
        rounds = savepoints.take_up({name: weights[name] for name in names})
        selection.before_cut = lambda: _keep(savepoints, rounds, selection.weights)
    plan = plan[len(rounds) :]

    def layer_plan(at: float) -> dict[str, float]:
        return layer_densities(allocation, shapes, at, densities[-1])

    steps = pruner.steps(quick, selection, plan, layer_plan, snapshot, seed)
    for done in _with_progress(steps, len(plan), pruner.name, progress):
        rounds.append(done)
        if len(snapshots) > len(finished):
            finished.append(len(rounds))
    asked: dict[str, Any] = {"density": density, "sparsity": sparsity, "scope": scope, "schedule": schedule}
    asked |= {"count": count, "allow_regrowth": allow_regrowth}
    asked |= {"include": _as_list(include), "exclude": _as_list(exclude)}
    if allocation != "uniform":
        by_name = {} if isinstance(allocation, str) else {name: float(share) for name, share in allocation.items()}
        asked["allocation"] = by_name or allocation
    about = {
        "method": pruner.name,
        "config": {**pruner.config(), **{k: v for k, v in asked.items() if v is not None}},
        "seed": seed,
        "version": __version__,
        "base_hash": hashed,
    }
    results = []
    for bits, structure, stop in zip(snapshots, structures, finished, strict=True):
        findings = _findings(rounds[:stop], network, time.perf_counter() - began) | _left_whole(network, names)
        if structure is not None:
            findings["structure"] = structure.as_dict()
        results.append(_masks_of(bits, {**about, "findings": findings}, network, model))
    return results if isinstance(density if density is not None else sparsity, list) else results[0]


def _as_list(patterns: str | Sequence[str] | None) -> list[str] | None:
    """Name patterns as they are written beside masks; None for none."""
    return [patterns] if isinstance(patterns, str) else list(patterns or ()) or None


def _keep(savepoints: Savepoints, rounds: Sequence[Round], weights: Sequence[Weight]) -> None:
    """Keeps what the rounds so far have left, if it is time."""
    if savepoints.is_due(len(rounds)):
        savepoints.keep(rounds, {weight.name: weight.packed_bits(copy=False) for weight in weights})


def _network_for(model: nn.Module | PathNetwork, pruner: Pruner, example_input: Any, ranks: Group) -> PathNetwork:
    """The network that the pruner works on: with layers alone where it asks for no paths, with the ranks it is on."""
    alone = ranks.size == 1
    if isinstance(model, nn.Module) and example_input is None and not pruner.needs_paths and alone:
        return layer_network(model)
    network = as_network(model, example_input, sharded=not alone and pruner.scores_shards)
    if not alone:
        network = copy.copy(network)
        network.replicas = ranks
    return network


def _masks_of(
    bits: Mapping[str, tuple[Tensor, torch.Size]],
    metadata: Mapping[str, Any],
    network: PathNetwork,
    model: nn.Module | PathNetwork,
) -> Masks:
    """Masks that lie as the model's own weights do."""
    own = dict(model.named_parameters()) if isinstance(model, nn.Module) else network.tensors
    if not any(is_distributed(own[name]) for name in bits):
        return Masks.from_packed(bits, metadata)
    if network.shards.size > 1:
        return ShardedMasks.of_parts(bits, {name: Placement.of(own[name]) for name in bits}, metadata)
    return ShardedMasks.like(Masks.from_packed(bits, metadata), own)


def _described(pruner: Pruner) -> str:
    """What a pruner's results depend on, its data apart."""
    source = pruner.source() if isinstance(pruner, PathPruner) else None
    data = b"" if source is None else source.detach().cpu().contiguous().double().numpy().tobytes()
    return f"{pruner.name} {pruner.config()} {hashlib.blake2b(data, digest_size=8).hexdigest() if data else ''}"


def _shapes_of(model: nn.Module | PathNetwork) -> str:
    tensors = dict(model.named_parameters()) if isinstance(model, nn.Module) else model.tensors
    return ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())


def _check_options(count: Any, compact: Any, allow_regrowth: Any, savepoints: Any) -> None:
    """Raises ValueError or TypeError for those that mean nothing."""
    if count not in ("exact", "published"):
        raise ValueError(f"prune: count: wanted 'exact' or 'published', got {count!r}")
    if not (isinstance(compact, (bool, int, float)) and 0 <= compact <= 1):
        raise ValueError(f"prune: compact: wanted True, False or a fraction in [0, 1], got {compact!r}")
    if allow_regrowth not in (None, True, False):
        raise TypeError(f"prune: allow_regrowth: wanted True, False or None, got {allow_regrowth!r}")
    if not isinstance(savepoints, (Savepoints, NoneType)):
        raise TypeError(f"prune: savepoints: wanted Savepoints, got {type(savepoints).__name__}")


def _numbers(name: str, given: Any) -> float | list[float] | None:
    """A number, or a list of them, whatever library it is of; text and truth values are none."""
    if given is None:
        return None
    several = isinstance(given, (list, tuple))
    try:
        if any(isinstance(value, (str, bytes, bool)) for value in (given if several else [given])):
            raise TypeError
        return [float(value) for value in given] if several else float(given)
    except (TypeError, ValueError, RuntimeError):
        hint = "; densities by name are an allocation, with scope='layer'" if isinstance(given, Mapping) else ""
        raise TypeError(f"prune: {name}: wanted a number or a list of numbers, got {given!r}{hint}") from None


def asked_for(density: Any, sparsity: Any, scope: str) -> tuple[Scope, list[float]]:
    """What competes, and the densities to go to.

    Raises:
        TypeError, ValueError: not what ``prune`` takes.
    """
    area = Scope.of(scope)
    return area, _densities(_numbers("density", density), _numbers("sparsity", sparsity), area)


def _densities(density: float | list[float] | None, sparsity: float | list[float] | None, scope: Scope) -> list[float]:
    if scope.kind == "n:m":
        if density is not None or sparsity is not None:
            raise ValueError(f"prune: density: scope '{scope.n}:{scope.m}' fixes it; give neither density nor sparsity")
        return [scope.n / scope.m]
    if (density is None) == (sparsity is None):
        got = "neither" if density is None else "both"
        raise ValueError(f"prune: wanted exactly one of density (kept) and sparsity (removed), got {got}")
    given = density if density is not None else sparsity
    assert given is not None
    values = given if isinstance(given, list) else [given]
    densities = values if density is not None else [1.0 - v for v in values]
    if not densities:
        raise ValueError("prune: density: wanted at least one value, got an empty list")
    for value, kept in zip(values, densities, strict=True):
        if not (math.isfinite(value) and 0.0 < kept <= 1.0):
            name, interval = ("density", "(0, 1]") if density is not None else ("sparsity", "[0, 1)")
            raise ValueError(f"prune: {name}: wanted a fraction in {interval}, got {value}")
    if any(b >= a for a, b in itertools.pairwise(densities)):
        raise ValueError(f"prune: density: wanted a list of densities that descend, got {densities}")
    return densities


def _with_progress(steps: Any, total: int, name: str, progress: bool | None) -> Any:
    """The steps, with a bar if there is someone to see it."""
    if progress is False:
        return steps
    try:
        from tqdm import tqdm
    except ImportError:
        return steps
    return tqdm(steps, total=total, desc=name, unit="round", disable=None if progress is None else False)


def _left_whole(network: PathNetwork, names: Sequence[str]) -> dict[str, Any]:
    """Of the model's parameters, the share that are weights (two axes or more) without a mask, and of the largest."""
    parameters = {} if network.model is None else dict(network.model.named_parameters())
    masked = set(names)
    sizes = {name: p.numel() for name, p in parameters.items() if p.dim() > 1 and name not in masked}
    if not sizes:
        return {}
    total = sum(p.numel() for p in parameters.values())
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_LARGEST]
    return {
        "left_whole": {
            "share": sum(sizes.values()) / total,
            "largest": {name: sizes[name] / total for name in largest},
        }
    }


def _findings(rounds: Sequence[Round], network: PathNetwork, seconds: float) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    last = rounds[-1]
    return {
        "rounds": len(rounds),
        "kept": [r.kept for r in rounds],
        "seconds": round(seconds, 3),
        "seconds_per_round": round(sum(r.seconds for r in rounds) / len(rounds), 5),
        "peak_memory_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "log2_R_first": rounds[0].log2_total,
        "log2_R_last": last.log2_total,
        "log2_threshold": last.threshold.log2() if last.threshold and math.isfinite(last.threshold.log2()) else None,
        "log2_thresholds": [
            r.threshold.log2() if r.threshold and math.isfinite(r.threshold.log2()) else None for r in rounds
        ],
        "unreached": list(network.unreached),
        **last.details,
    }
