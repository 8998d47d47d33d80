"""Scoring thousands of networks: a stream of architectures or weight sets in, a stream of scores out.

One network is held at a time (or ``batch`` weight sets of one architecture, scored by one call each layer); nothing is
copied, moved, cast or left changed. With a results file, each network is one line of it as soon as it is scored, and a
run that was stopped goes on where it was: what the file has is not scored again, nor built if it comes as a function.

A module is read by ``torch.export``, which takes longer than a data-free score of it. Where thousands share a form,
give weight sets of one ``architecture``, or ``PathNetwork``s built by hand (as ``cell_networks`` does): neither is
exported.

Oracle: each network alone, in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Data
from .measures import Measure, WeightSet, log2_paths, measures_of
from .network import PathNetwork, as_network
from .ops import WeightMap
from .pruners import cross_entropy
from .pruners.base import Pruner
from .pruners.objective import Loss, NonFiniteLossError
from .score_table import NetworkScore, ScoreFile
from .scoring import check_weight_set
from .surroundings import undisturbed

Network = nn.Module | PathNetwork
Entry = Network | WeightSet | Callable[[], "Network | WeightSet"]


def score_many(
    networks: Iterable[Entry | tuple[str, Entry]],
    method: str | Pruner | Sequence[str | Pruner] = "synflow",
    *,
    example_input: Any = None,
    architecture: Network | None = None,
    data: Data | None = None,
    loss: Loss = cross_entropy,
    batch: int = 16,
    seed: int = 0,
    results: str | os.PathLike[str] | None = None,
) -> Iterator[NetworkScore]:
    """Scores networks as they come, in their order.

    Args:
        networks: modules, ``PathNetwork``s, or (with ``architecture``) weight sets: name -> tensor, or modules of that
            architecture; each alone or as ``(name, network)``, and each of them may be a function without arguments
            that makes it. Without a name, a network's position is its name.
        method: ``synflow``, ``log2_R``, ``path_count``, ``path_kernel_trace``, ``snip``, ``grasp``, ``zico``,
            ``ntk_sap`` (see ``measures``), a pruner, or several of them.
        example_input: what modules accept.
        architecture: the network all weight sets belong to; it is read once, and ``batch`` sets go through it at once.
        data: batches ``(x, y)``, for methods that need them.
        loss: of such methods.
        batch: weight sets held at a time.
        seed: of methods that draw; each network sees the same draws.
        results: a JSON-lines file that rows are appended to. If it is there, it is gone on with: networks whose name
            it has are not scored again, their row is given as it is.

    Returns:
        One :class:`NetworkScore` for each network, lazily: a network is scored when its row is asked for.

    Raises:
        ValueError: an unknown method, data or architecture missing, a results file of another run, two networks of one
            name, a weight set of another architecture, a network that cannot be read; names the network.
        TypeError: something that is no network.

    A network whose weights, loss or scores are NaN or infinite has a row that says so (``flags``).

    Determinism: a network's scores depend on it, the method, the data and the seed; not on what came before it.

    Example:
        >>> nets = ((str(width), partial(mlp, (784, width, 10))) for width in range(8, 512, 8))
        >>> table = list(pp.score_many(nets, ["synflow", "path_count"], example_input=x, results="scores.jsonl"))
        >>> max(table, key=lambda row: row.scores["synflow"]).name
    """
    if isinstance(networks, (nn.Module, PathNetwork, Mapping, str)) or not isinstance(networks, Iterable):
        raise TypeError(f"score_many: networks: wanted an iterable of networks, got {type(networks).__name__}")
    if batch < 1:
        raise ValueError(f"score_many: batch: wanted at least 1, got {batch}")
    measures = measures_of(method, data, loss)
    whole = None if architecture is None else as_network(architecture, example_input)
    if whole is not None:
        for measure in measures:
            if measure.of_members is None:
                wanted = "a path method for weight sets of one architecture"
                raise ValueError(f"score_many: method: wanted {wanted}, got {measure.name}")
    scorer = _Scorer(measures, whole, example_input, seed)
    file = None
    if results is not None:
        settings = {"seed": seed, **{measure.name: dict(measure.settings) for measure in measures}}
        file = ScoreFile(results, scorer.columns, settings)
    return _rows(networks, scorer, file, batch if whole is not None else 1)


def _rows(networks: Iterable[Any], scorer: _Scorer, file: ScoreFile | None, batch: int) -> Iterator[NetworkScore]:
    waiting: list[tuple[str, Entry]] = []
    seen: set[str] = set()

    def scored() -> Iterator[NetworkScore]:
        for row in scorer.rows(waiting):
            if file is not None:
                file.append(row)
            yield row
        waiting.clear()

    try:
        for position, given in enumerate(networks):
            name, entry = _named(position, given)
            if name in seen:
                raise ValueError(f"score_many: networks: wanted a name of its own for each, got '{name}' twice")
            seen.add(name)
            if file is not None and name in file.rows:
                yield from scored()
                yield file.rows[name]
                continue
            waiting.append((name, entry))
            if len(waiting) == batch:
                yield from scored()
        yield from scored()
    finally:
        if file is not None:
            file.close()


def _named(position: int, given: Any) -> tuple[str, Entry]:
    if isinstance(given, tuple):
        if len(given) != 2 or not isinstance(given[0], str):
            raise TypeError(f"score_many: network {position}: wanted (name, network), got a tuple of {len(given)}")
        return given
    return str(position), given


class _Scorer:
    """Makes the rows of a few networks."""

    def __init__(
        self, measures: tuple[Measure, ...], architecture: PathNetwork | None, example_input: Any, seed: int
    ) -> None:
        self.measures, self.architecture = measures, architecture
        self.example_input, self.seed = example_input, seed
        self.columns = {measure.name: measure.log2 for measure in measures}

    @undisturbed
    def rows(self, waiting: Sequence[tuple[str, Entry]]) -> list[NetworkScore]:
        """One for each, in order."""
        if self.architecture is None:
            return [_explained(name, partial(self._one, name, entry)) for name, entry in waiting]
        sets = {name: _explained(name, partial(self._weight_set, entry)) for name, entry in waiting}
        whole = [name for name in sets if _finite(self._read(sets[name]))]
        members = [sets[name] for name in whole]
        made: dict[str, NetworkScore] = {}
        if members:
            found = {m.name: m.of_members(self.architecture, members).tolist() for m in self.measures}  # type: ignore[misc]
            totals = log2_paths(self.architecture, WeightMap.ABS, members).tolist()
            for k, name in enumerate(whole):
                scores = {method: values[k] for method, values in found.items()}
                made[name] = NetworkScore.of(name, scores, self.columns, totals[k] == -torch.inf)
        return [made.get(name) or NetworkScore.broken(name, self.columns) for name in sets]

    def _one(self, name: str, entry: Entry) -> NetworkScore:
        made = _built(entry)
        if isinstance(made, Mapping):
            raise ValueError("architecture: wanted the network a weight set belongs to, got None")
        if not isinstance(made, (nn.Module, PathNetwork)):
            raise TypeError(f"wanted a module or PathNetwork, got {type(made).__name__}")
        network = as_network(made, self.example_input)
        if not _finite(network.tensors):
            return NetworkScore.broken(name, self.columns)
        try:
            scores = {measure.name: measure.of_one(network, self.seed) for measure in self.measures}
        except NonFiniteLossError:
            return NetworkScore.broken(name, self.columns)
        total = scores["log2_R"] if "log2_R" in scores else float(log2_paths(network, WeightMap.ABS)[0])
        return NetworkScore.of(name, scores, self.columns, total == -torch.inf)

    def _weight_set(self, entry: Entry) -> WeightSet:
        made = _built(entry)
        if isinstance(made, nn.Module):
            made = {**dict(made.named_parameters()), **dict(made.named_buffers())}
        if not isinstance(made, Mapping):
            raise TypeError(f"wanted a weight set or a module, got {type(made).__name__}")
        assert self.architecture is not None
        check_weight_set(self.architecture, made, "weight set")
        return made

    def _read(self, own: WeightSet) -> WeightSet:
        """Those of a weight set that the architecture reads."""
        assert self.architecture is not None
        return {name: own[name] for name in self.architecture.tensors if name in own}


def _explained(name: str, work: Callable[[], Any]) -> Any:
    """What ``work`` gives; its errors name the network."""
    try:
        return work()
    except (ValueError, TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"score_many: network '{name}': {error}") from error


def _built(entry: Any) -> Any:
    return entry() if callable(entry) and not isinstance(entry, (nn.Module, PathNetwork, Mapping)) else entry


def _finite(tensors: Mapping[str, Tensor]) -> bool:
    floating = (tensor for tensor in tensors.values() if tensor.is_floating_point())
    return all(bool(torch.isfinite(tensor).all()) for tensor in floating)
