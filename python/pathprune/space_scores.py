"""Scores of a whole cell space, by forward flow alone.

With shared weights (one supernet, as one-shot search has it) architectures are rows of one flow: see ``routed_flow``.
Those that differ only in edges no path runs through have one row between them (9,445 of the 15,625 cells are distinct),
and those with equally many windows in a row share feature maps as small as those windows allow. With fresh weights
each architecture is drawn and scored by itself.

What is moved: an architecture's feature maps, twice as wide for sums of scores (a flow and its derivative); weights
once for each batch of architectures. Oracle: ``cell_space.CellNet`` exported, scored alone in float64.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .cell_networks import cell_network
from .cell_space import Architecture, CellSpace, check_architecture, index_of, live_part, name_of, switches, windows_of
from .ops import WeightMap
from .policy import Policy
from .routed_flow import RoutedFlow
from .score_table import NetworkScore, ScoreFile
from .surroundings import undisturbed

SPACE_METHODS = ("synflow", "log2_R", "path_count", "path_kernel_trace")


def score_space(
    space: CellSpace | None = None,
    method: str | Sequence[str] = "synflow",
    *,
    architectures: Iterable[Architecture] | None = None,
    weights: str | Mapping[str, Tensor] = "shared",
    seed: int = 0,
    batch: int = 256,
    device: str | torch.device = "cpu",
    results: str | os.PathLike[str] | None = None,
) -> Iterator[NetworkScore]:
    """Scores architectures of a cell space.

    Args:
        space: None: NAS-Bench-201's.
        method: ``synflow``, ``log2_R``, ``path_count``, ``path_kernel_trace`` (see ``measures``), or several. Norms are
            frozen, biases begin no path; a freshly initialised network has SynFlow's scores with or without them.
        architectures: None: all of the space; otherwise different ones.
        weights: ``shared``: one supernet drawn from ``seed``, every architecture has its part of it; ``fresh``: every
            architecture has weights of its own, drawn by ``space.draw(seed * len(space) + its number)``; or the
            supernet's tensors by name.
        batch: architectures in a flow.
        results: a JSON-lines file that rows are appended to, and that an interrupted run goes on from.

    Returns:
        A row for each architecture under the name NAS-Bench-201 gives it: those the file has, then cells with few
        windows before cells with many.

    Raises:
        ValueError: an unknown method or operation, an architecture that comes twice, tensors that are missing, a
            results file of another run.

    Determinism: the same call gives the same bits; another batch size, or a run in two parts, the same but for
    rounding.

    Example:
        >>> best = max(score_space(), key=lambda row: row.scores["synflow"])
    """
    space = CellSpace() if space is None else space
    methods = (method,) if isinstance(method, str) else tuple(method)
    if not methods or len(set(methods)) < len(methods) or not set(methods) <= set(SPACE_METHODS):
        raise ValueError(f"score_space: method: wanted different ones of {SPACE_METHODS}, got {list(methods)}")
    if isinstance(weights, str) and weights not in ("shared", "fresh"):
        raise ValueError(f"score_space: weights: wanted 'shared', 'fresh' or tensors, got {weights!r}")
    if batch < 1:
        raise ValueError(f"score_space: batch: wanted at least 1, got {batch}")
    chosen = list(space if architectures is None else architectures)
    for architecture in chosen:
        check_architecture(architecture)
    names = {name_of(architecture): tuple(architecture) for architecture in chosen}
    if len(names) < len(chosen):
        raise ValueError(f"score_space: architectures: wanted different ones, got {len(chosen) - len(names)} twice")
    tensors = None
    if not isinstance(weights, str):
        space.check_tensors(weights)
        tensors = {name: weights[name].detach().to(device) for name in space.shapes()}
    file = None
    if results is not None:
        how = weights if isinstance(weights, str) else _digest(weights, sorted(space.shapes()))
        settings = {"space": asdict(space), "weights": how, "seed": seed}
        file = ScoreFile(results, dict.fromkeys(methods, True), settings)
    work = _Space(space, methods, seed, batch, torch.device(device))
    return _rows(work, names, file, weights == "fresh" if isinstance(weights, str) else False, tensors)


def _rows(
    work: _Space,
    names: Mapping[str, Architecture],
    file: ScoreFile | None,
    fresh: bool,
    tensors: Mapping[str, Tensor] | None,
) -> Iterator[NetworkScore]:
    try:
        known = {} if file is None else file.rows
        yield from [known[name] for name in names if name in known]
        left = {name: architecture for name, architecture in names.items() if name not in known}
        for row in work.fresh(left) if fresh else work.shared(left, tensors):
            if file is not None:
                file.append(row)
            yield row
    finally:
        if file is not None:
            file.close()


class _Space:
    """Makes rows, a batch of architectures at a time."""

    def __init__(self, space: CellSpace, methods: tuple[str, ...], seed: int, batch: int, device: torch.device) -> None:
        self.space, self.methods, self.seed, self.batch, self.device = space, methods, seed, batch, device
        self.columns = dict.fromkeys(methods, True)

    @undisturbed
    def shared(self, names: Mapping[str, Architecture], tensors: Mapping[str, Tensor] | None) -> Iterator[NetworkScore]:
        """All architectures in one supernet."""
        if tensors is None:
            tensors = {name: tensor.to(self.device) for name, tensor in self.space.draw(self.seed).items()}
        alike: dict[Architecture, list[str]] = {}
        for name, architecture in names.items():
            alike.setdefault(live_part(architecture), []).append(name)
        by_windows: dict[int, list[Architecture]] = {}
        for architecture in sorted(alike, key=index_of):  # neighbours share most of their first cell
            by_windows.setdefault(windows_of(architecture), []).append(architecture)
        for windows, several in sorted(by_windows.items()):
            flows = self._flows(tensors, windows)
            for begin in range(0, len(several), self.batch):
                part = several[begin : begin + self.batch]
                for architecture, scores in zip(part, self._scores(flows, [switches(a) for a in part]), strict=True):
                    for name in alike[architecture]:
                        yield self._row(name, scores)

    @undisturbed
    def fresh(self, names: Mapping[str, Architecture]) -> Iterator[NetworkScore]:
        """Every architecture with weights of its own."""
        flows: dict[int, dict[WeightMap, RoutedFlow]] = {}
        for name, architecture in names.items():
            seed = self.seed * len(self.space) + index_of(architecture)
            drawn = self.space.draw(seed, self.space.shapes(architecture))
            tensors = {key: tensor.to(self.device) for key, tensor in drawn.items()}
            windows = windows_of(architecture)
            if windows not in flows:  # fresh norms are all alike
                supernet = {key: tensor.to(self.device) for key, tensor in self.space.draw(self.seed).items()}
                flows[windows] = self._flows(supernet, windows)
            for flow in flows[windows].values():
                flow.use(tensors)
            yield self._row(name, self._scores(flows[windows], [switches(architecture)])[0])

    def _flows(self, tensors: Mapping[str, Tensor], windows: int) -> dict[WeightMap, RoutedFlow]:
        """The flows that the methods need."""
        network = cell_network(self.space, tensors, windows=windows)
        policy = Policy(biases="drop")
        wanted: dict[WeightMap, str] = {}
        if {"synflow", "log2_R"} & set(self.methods):
            wanted[WeightMap.ABS] = "weights" if "synflow" in self.methods else "none"
        if "path_count" in self.methods:
            wanted[WeightMap.ONE] = "none"
        if "path_kernel_trace" in self.methods:
            wanted[WeightMap.SQUARE] = "squares"
        return {f: RoutedFlow(network, f, policy, derivative) for f, derivative in wanted.items()}

    def _scores(self, flows: Mapping[WeightMap, RoutedFlow], opened: Sequence[set[str]]) -> list[dict[str, float]]:
        """One for each architecture; under ``""`` whether a path is left."""
        made: dict[str, Any] = {}
        for f, flow in flows.items():
            totals = flow.run(opened)
            made[""] = totals.log2_R > -torch.inf
            total = "path_count" if f == WeightMap.ONE else "log2_R"
            slope = "synflow" if f == WeightMap.ABS else "path_kernel_trace"
            if f != WeightMap.SQUARE:
                made[total] = totals.log2_R
            if totals.log2_slope is not None:
                made[slope] = totals.log2_slope
        columns = {name: values.tolist() for name, values in made.items()}
        return [{name: values[k] for name, values in columns.items()} for k in range(len(opened))]

    def _row(self, name: str, scores: Mapping[str, float]) -> NetworkScore:
        mine = {method: scores[method] for method in self.methods}
        return NetworkScore.of(name, mine, self.columns, disconnected=not scores[""])


def _digest(tensors: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """What tells one supernet from another."""
    made = hashlib.blake2b(digest_size=16)
    for name in names:
        made.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"blake2b:{made.hexdigest()}"
