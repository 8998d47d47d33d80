"""How many weights stay after each round: one-shot, linear, exponential; and how they are shared among layers.

Pinned: after round r of n, ``round(N * density**(r/n))`` weights stay (exponential), N counting all prunable weights;
the last round keeps ``round(N * density)`` exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

SCHEDULES = ("exponential", "linear", "one-shot")
ALLOCATIONS = ("uniform", "erdos_renyi_kernel", "smart_ratio")


def kept_fraction(schedule: str, density: float, progress: float) -> float:
    """The fraction of weights left when ``progress`` of the rounds (0 to 1) are done."""
    if schedule == "exponential":
        return density**progress
    if schedule == "linear":
        return 1.0 - (1.0 - density) * progress
    if schedule == "one-shot":
        return density
    raise ValueError(f"schedule: wanted one of {SCHEDULES}, got {schedule!r}")


def rounds_of(schedule: str, densities: Sequence[float], rounds: int) -> list[tuple[float, int | None]]:
    """The density after each round, and which of ``densities`` (descending) it completes, if any.

    With one density this is the schedule itself. With several, one schedule runs to the smallest and passes through
    the others on its way, each reached exactly at the end of a round.
    """
    kept_fraction(schedule, densities[-1], 1.0)  # refuses an unknown schedule
    if schedule == "one-shot":
        rounds = len(densities)
    if rounds < len(densities):
        count = len(densities)
        raise ValueError(
            f"rounds: wanted at least {count}, one for each density, got {rounds}: give the method rounds={count}"
        )
    stops = _stops(schedule, densities, rounds)
    plan: list[tuple[float, int | None]] = []
    before, start = 1.0, 0
    for which, (density, stop) in enumerate(zip(densities, stops, strict=True)):
        for r in range(start + 1, stop + 1):
            within = before * kept_fraction(schedule, density / before, (r - start) / (stop - start))
            plan.append((density if r == stop else within, which if r == stop else None))
        before, start = density, stop
    return plan


def _stops(schedule: str, densities: Sequence[float], rounds: int) -> list[int]:
    """The round that ends at each density: as the schedule to the smallest would have it, all different."""

    def share(density: float) -> float:
        if schedule == "linear":
            return (1 - density) / (1 - densities[-1]) if densities[-1] < 1 else 1.0
        return math.log(density) / math.log(densities[-1]) if densities[-1] < 1 else 1.0

    stops: list[int] = []
    for k, density in enumerate(densities):
        later = len(densities) - 1 - k
        stops.append(min(max(round(rounds * share(density)), k + 1, stops[-1] + 1 if stops else 1), rounds - later))
    return stops


def layer_densities(
    allocation: str | Mapping[str, float], shapes: Mapping[str, torch.Size], density: float, end: float | None = None
) -> dict[str, float]:
    """The density of each layer so that all together keep ``density``.

    Args:
        allocation: ``uniform``; ``erdos_renyi_kernel`` (density of a layer in proportion to the sum over the product of
            its sizes, Evci et al. 2020); ``smart_ratio`` (Su et al. 2020: kept weights fall as k^2 + k towards the
            output, linear layers keep 0.3 or the density if that is more); or densities by name, those at the end: on
            the way a layer of density a has ``a^t`` where all together have ``end^t``.
        shapes: weight shapes in network order.
        density: over all layers, in (0, 1].
        end: the density that a schedule on its way through ``density`` goes to; None: it is there.
    """
    if isinstance(allocation, Mapping):
        missing = [name for name in shapes if name not in allocation]
        if missing:
            raise ValueError(f"allocation: wanted a density for every layer, got none for {missing}")
        for name in shapes:
            if not 0 <= allocation[name] <= 1:
                raise ValueError(f"allocation: {name!r}: wanted a density in [0, 1], got {allocation[name]}")
        t = 1.0 if end is None or end >= 1 else math.log(density) / math.log(end)
        return {name: float(allocation[name]) ** t for name in shapes}
    if allocation == "uniform":
        return dict.fromkeys(shapes, density)
    total = density * sum(shape.numel() for shape in shapes.values())
    if allocation == "erdos_renyi_kernel":
        weights = {name: sum(shape) / max(shape.numel(), 1) for name, shape in shapes.items()}
        return _filled(weights, shapes, total)
    if allocation == "smart_ratio":
        return _smart_ratio(shapes, density, total)
    raise ValueError(f"allocation: wanted one of {ALLOCATIONS} or a mapping, got {allocation!r}")


def _filled(weights: Mapping[str, float], shapes: Mapping[str, torch.Size], total: float) -> dict[str, float]:
    """Densities in proportion to ``weights``, none above 1, that keep ``total`` weights."""
    full: set[str] = set()
    while True:
        room = total - sum(shapes[name].numel() for name in full)
        open_ = [name for name in shapes if name not in full]
        mass = sum(weights[name] * shapes[name].numel() for name in open_)
        scale = room / mass if mass else 0.0
        over = {name for name in open_ if scale * weights[name] > 1.0}
        if not over:
            return {name: 1.0 if name in full else max(scale * weights[name], 0.0) for name in shapes}
        full |= over


def _smart_ratio(shapes: Mapping[str, torch.Size], density: float, total: float) -> dict[str, float]:
    linear = [name for name, shape in shapes.items() if len(shape) == 2]
    convolutions = {name: shape for name, shape in shapes.items() if len(shape) > 2}
    if not convolutions:
        linear, convolutions = [], dict(shapes)
    fixed = {name: max(0.3, density) for name in linear}
    room = total - sum(fixed[name] * shapes[name].numel() for name in linear)
    if room <= 0:  # linear layers alone would exceed the budget
        fixed = dict.fromkeys(linear, density)
        room = total - sum(fixed[name] * shapes[name].numel() for name in linear)
    depth = len(convolutions)
    weights = {name: float((depth - k) ** 2 + (depth - k)) for k, name in enumerate(convolutions)}
    return {**_filled(weights, convolutions, room), **fixed}
