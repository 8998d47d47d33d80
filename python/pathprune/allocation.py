"""How many weights each layer keeps: densities by name, for a method that then chooses within rows.

Per-row methods (Wanda, magnitude) say which weights of a unit matter, not how much a layer does. Layer densities come
from a method whose scores compare layers (path scores), from shapes alone (ERK), or from how many outliers a layer's
activations have (OWL: Yin et al., ICML 2024).

Bytes: those of the method; for OWL one read for the mean of a layer's scores and one to count those above.
Oracle: the definition on scores written out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import ops
from .batches import Data
from .layers import layer_network
from .masks import Masks
from .network import PathNetwork, as_network
from .ops import WeightMap
from .pruners import Wanda
from .pruners.base import Pruner
from .pruning import prune
from .real import Real
from .schedules import layer_densities
from .select import Bracket, Scores
from .surroundings import undisturbed
from .weights import weights_of

SHAPE_RULES = {"uniform": "uniform", "erk": "erdos_renyi_kernel", "smart_ratio": "smart_ratio"}


@undisturbed
def allocate(
    model: nn.Module | PathNetwork,
    density: float,
    *,
    by: Pruner | str,
    example_input: Any = None,
    data: Data | None = None,
    outlier: float = 5.0,
    spread: float = 0.08,
    seed: int = 0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> dict[str, float]:
    """Densities of the layers that together keep ``density``, to give to ``prune`` as ``allocation``.

    Args:
        model: as in ``prune``.
        density: fraction of all prunable weights kept, in (0, 1].
        by: a pruner: each layer's share of its global masks; ``erk``, ``smart_ratio`` or ``uniform``: from shapes;
            ``owl``: from the share of scores ``|w_ij| ||x_j||`` above ``outlier`` times their mean, the same for all
            layers of a block (an element of a ``ModuleList``).
        example_input: of pruners that look at paths.
        data: of ``owl``: batches, as for ``Wanda``.
        outlier: of ``owl``: how many times the mean is an outlier.
        spread: of ``owl``: the densest block has 2 ``spread`` more than the sparsest, unless a density reaches 1.
        seed, include, exclude: as in ``prune``.

    Returns:
        name -> density in [0, 1], in the order of the prunable weights.

    Raises:
        ValueError: an unknown rule, a density out of range, no data for ``owl``; what ``prune`` refuses.

    Determinism: as the method's.

    Example:
        >>> densities = pp.allocate(model, 0.5, by=pp.SynFlow(), example_input=x)
        >>> masks = pp.prune(model, pp.Wanda(data), density=0.5, allocation=densities)
    """
    if not (isinstance(density, (int, float)) and 0.0 < density <= 1.0):
        raise ValueError(f"allocate: density: wanted a fraction in (0, 1], got {density}")
    if isinstance(by, Pruner):
        options: dict[str, Any] = {"example_input": example_input, "seed": seed, "include": include}
        masks = prune(model, by, density=density, scope="global", exclude=exclude, **options)
        assert isinstance(masks, Masks)
        return {name: count.kept / count.total for name, count in masks.counts().items()}
    if by not in (*SHAPE_RULES, "owl"):
        raise ValueError(f"allocate: by: wanted a pruner, 'owl' or one of {list(SHAPE_RULES)}, got {by!r}")
    if isinstance(model, nn.Module) and example_input is None:
        network = layer_network(model)
    else:
        network = as_network(model, example_input)
    names = network.select(include, exclude)
    shapes = {name: network.tensors[name].shape for name in names}
    if by in SHAPE_RULES:
        return layer_densities(SHAPE_RULES[by], shapes, density)
    if data is None:
        raise ValueError("allocate: data: wanted batches for 'owl', got None")
    if not (outlier > 0 and 0 <= spread < math.inf):
        raise ValueError(f"allocate: wanted outlier > 0 and spread >= 0, got {outlier} and {spread}")
    return _by_outliers(network, names, density, data, outlier, spread, seed)


def _by_outliers(
    network: PathNetwork,
    names: Sequence[str],
    density: float,
    data: Data,
    outlier: float,
    spread: float,
    seed: int,
) -> dict[str, float]:
    """Densities that grow with a block's share of outliers, from one end of the spread to the other."""
    method = Wanda(data)
    weights = weights_of(network, names, method.maps)
    method.scorer(network, weights, seed)(None)
    blocks = block_of(network.model, names)
    above = dict.fromkeys(blocks.values(), 0)
    sizes = dict.fromkeys(blocks.values(), 0)
    for name in names:
        above[blocks[name]] += outliers(weights[name].scores, outlier)
        sizes[blocks[name]] += weights[name].shape.numel()
    share = torch.tensor([above[block] / sizes[block] for block in sizes], dtype=torch.float64)
    width = float(share.max() - share.min())
    offsets = (share - share.min()) * (2 * spread / width if width else 0.0)
    size = torch.tensor([float(sizes[block]) for block in sizes], dtype=torch.float64)
    found = dict(zip(sizes, _shifted(offsets, size, density).tolist(), strict=True))
    return {name: found[blocks[name]] for name in names}


def outliers(scores: Scores, times: float) -> int:
    """How many scores are larger than ``times`` their mean, without writing them out."""
    assert scores.x is not None and scores.g is not None
    rows = ops.path_flow_linear(scores.weight, scores.mask, scores.x, WeightMap.ABS)
    mean = float((rows.double() * scores.g).sum()) / scores.numel
    limit = Real.of(times * mean)
    counts = scores.collect(Bracket(limit, limit), 0).counts
    return int(counts[0])


def _shifted(offsets: torch.Tensor, sizes: torch.Tensor, density: float) -> torch.Tensor:
    """``offsets`` plus a constant, held within [0, 1], so that their mean over all weights is ``density``."""
    low, high = -float(offsets.max()), 1.0
    for _ in range(100):  # halves the interval until it is a number
        middle = (low + high) / 2
        kept = float(((offsets + middle).clamp(0, 1) * sizes).sum() / sizes.sum())
        low, high = (middle, high) if kept < density else (low, middle)
    return (offsets + high).clamp(0, 1)


def block_of(model: nn.Module | None, names: Sequence[str]) -> dict[str, str]:
    """Weight name -> the outermost element of a ``ModuleList`` it is in, or itself."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)] if model else []
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    found: Mapping[str, str] = {
        name: next((f"{p}.{name[len(p) + 1 :].split('.')[0]}" for p in outermost if name.startswith(f"{p}.")), name)
        for name in names
    }
    return dict(found)
