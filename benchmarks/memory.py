"""Peak memory of pruning beyond the model, masks included: ours, the published loop, the best plain PyTorch.

The published loop holds float masks, gradients, signs, scores and their concatenation: seven floats a weight and what
`kthvalue` takes. Ours holds two bits a weight where weights are streamed, and one score tensor a layer where they are
written out (convolutions). Each peak is of one call in a process that has made the model and read it. Before it the C
library hands memory back that was freed, so that none is used again unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pathprune as pp
from baselines import BestPyTorchSynFlow, PublishedSynFlow, exponential_densities
from harness import Case, Result
from pathprune.network import PathNetwork
from scoring import OURS, PLAIN, PUBLISHED, SETTINGS, agree, made

ROUNDS, DENSITY = 4, 0.2


def peaks(key: str, bandwidth: float, device: str = "cpu") -> Result:
    """Four rounds of SynFlow to 20 %, masks made; time is of the same runs and says little."""
    setting = SETTINGS[key]
    model, x = made(setting, device)
    network = PathNetwork.from_module(model, x)
    name = f"peak memory, {ROUNDS} rounds to {DENSITY:.0%}, {setting.name}"
    case = Case(name, lambda: agree(setting, device), device)
    options = {"density": DENSITY, "progress": False}
    case.add(OURS, lambda: pp.prune(network, pp.SynFlow(rounds=ROUNDS), **options))

    def loop(kind: Any, **own: Any) -> Callable[[], object]:
        def work() -> object:
            method = kind(model, x, **own)
            for density in exponential_densities(DENSITY, ROUNDS):
                method.round(density)
            return method.masks()

        return work

    case.add(PUBLISHED, loop(PublishedSynFlow, **setting.published))
    case.add(PLAIN, loop(BestPyTorchSynFlow, **setting.plain))
    return case.measure(1, warmup=0, bandwidth=bandwidth, peaks=True)
