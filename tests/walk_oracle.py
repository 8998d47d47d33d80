"""A literal walker: one walk at a time, one step at a time, with Python integers and the core's CDFs.

It shares with the library the graph (units and links) and the weights of branches; every draw is made again here from
the definition, on whole rows, for one walk.
"""

from __future__ import annotations

import numpy as np
import torch

import pathprune
from pathprune.walks import Walks

core = pathprune._C


def word(seed: int, walk: int, step: int, which: int) -> int:
    """The 64-bit random number whose high half is a word of the block at (walk, step)."""
    block = core.philox(seed, np.array([walk], dtype=np.uint64), step)[0]
    return int(block[which]) << 32


def draw(weights: list[float], random: int) -> int:
    cdf, _, _ = core.fixed_cdf(np.array(weights, dtype=np.float64))
    return int(core.fixed_cdf_draw(cdf, np.array([random], dtype=np.uint64))[0])


def powered(w: float, power: int) -> float:
    m = abs(w)
    return 0.0 if m == 0 else {1: m, 2: m * m, 0: 1.0, -1: 1 / m}[power]


def walk(walks: Walks, number: int) -> list[tuple[str, int]]:
    """The (name, flat index) of every weight that walk ``number`` takes."""
    graph, rule, seed = walks.graph, walks.rule, walks.seed
    ahead = number % 2 == 0
    ends = graph.inputs if ahead else graph.outputs
    alive = graph.alive_ahead if ahead else graph.alive_back
    starts = [(k, u) for k in ends for u in range(graph.units[k]) if bool(alive[k][u])]
    if rule.start == "round_robin":
        at, unit = starts[number // 2 % len(starts)]
    else:
        at, unit = starts[draw([1.0] * len(starts), word(seed, number, len(walks.network.nodes), 0))]
    taken: list[tuple[str, int]] = []
    while True:
        if at in graph.sites:
            name, flat, unit = step(walks, at, unit, number, ahead)
            taken.append((name, flat))
        if ahead or at not in graph.sites:
            ways, weights = walks.chances.branch(at, ahead)
        else:
            ways, weights = list(graph.back[at]), torch.ones(graph.units[at], 1)
        if not ways:
            return taken
        row = weights[unit if len(ways) > 1 else 0].tolist()
        way = ways[draw(row, word(seed, number, at, 2)) if len(ways) > 1 else 0]
        if way is None:
            return taken
        links = (way.ahead if ahead else way.back).only(walks.chances.alive(way, ahead))
        targets = links.targets[links.start[unit] : links.start[unit + 1]].tolist()
        unit = targets[draw([1.0] * len(targets), word(seed, number, way.target, 3)) if len(targets) > 1 else 0]
        at = way.target if ahead else way.source


def step(walks: Walks, k: int, unit: int, number: int, ahead: bool) -> tuple[str, int, int]:
    """One draw of a unit and of a kernel entry."""
    site = walks.graph.sites[k]
    _groups, rows, columns, entries = site.shape
    weight = walks.network.tensors[site.weight].detach().double().reshape(site.shape)
    to_rows = site.forward_to_rows == ahead
    sources, targets = (columns, rows) if to_rows else (rows, columns)
    group, own = divmod(unit, sources)
    gain = walks.chances.gain(site, ahead)
    valid = [True] * entries if site.valid is None else site.valid.tolist()
    kernels = []
    for j in range(targets):
        r, c = (j, own) if to_rows else (own, j)
        kernels.append([powered(float(weight[group, r, c, e]), walks.rule.power) * valid[e] for e in range(entries)])
    gains = [1.0 if gain is None else float(gain[group * targets + j]) for j in range(targets)]
    masses = []
    for kernel, g in zip(kernels, gains, strict=True):
        total = 0.0
        for value in kernel:
            total += value
        masses.append(total * g)
    if not any(masses):
        masses = [float(g > 0 and any(valid)) for g in gains]
    j = draw(masses, word(walks.seed, number, k, 0))
    kernel = kernels[j] if any(kernels[j]) else [float(v) for v in valid]
    e = draw(kernel, word(walks.seed, number, k, 1)) if entries > 1 else 0
    r, c = (j, own) if to_rows else (own, j)
    return site.weight, ((group * rows + r) * columns + c) * entries + e, group * targets + j
