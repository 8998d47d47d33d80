"""Real architectures at full size: float32 against float64, and what becomes of layers and branches."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import pathprune as pp
from pathprune import models
from pathprune.network import PathNetwork
from pathprune.nodes import Synapse

pytestmark = pytest.mark.slow


def hf_resnet(depths, seed=0):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    return ResNetForImageClassification(ResNetConfig(depths=list(depths), num_labels=1000)).eval()


def network(model, size=224):
    dtype = next(model.parameters()).dtype
    return PathNetwork.from_module(model, torch.ones(1, 3, size, size, dtype=dtype))


def differing(a, b):
    return sum(int((a[name] != b[name]).sum()) for name in a)


def test_one_round_on_resnet50_is_that_of_float64():
    model = hf_resnet((3, 4, 6, 3))
    step = 0.05 ** (1 / 100)
    single = pp.prune(network(model), pp.SynFlow(rounds=1), density=step)
    double = pp.prune(network(copy.deepcopy(model).double()), pp.SynFlow(rounds=1), density=step)
    assert differing(single, double) == 0
    assert single.metadata["findings"]["log2_R_first"] == pytest.approx(
        double.metadata["findings"]["log2_R_first"], abs=1e-4
    )


@pytest.mark.parametrize("depths", [(3, 4, 6, 3), (3, 8, 36, 3)], ids=["resnet50", "resnet152"])
def test_hundred_rounds_are_those_of_float64(depths):
    """At most 1e-5 of the bits; each differing weight within 1e-4 of the threshold of some round."""
    model = hf_resnet(depths)
    options = {"density": 0.05}
    wide = copy.deepcopy(model).double()
    single = pp.prune(network(model), pp.SynFlow(rounds=100), **options)
    double = pp.prune(network(wide), pp.SynFlow(rounds=100), **options)
    assert single.kept == double.kept == round(0.05 * single.total)
    assert differing(single, double) <= 1e-5 * single.total
    a, b = (masks.metadata["findings"]["log2_thresholds"] for masks in (single, double))
    shift = [x - y for x, y in zip(a, b, strict=True)]
    assert max(abs(s) for s in shift) < math.log2(1 + 1e-4)
    near = _nearness(network(wide), double, single)
    assert near < 1e-4, near


def _nearness(net, double, single) -> float:
    """How far, at most, the scores of differing weights lie from the threshold in the round that split them."""
    from pathprune.pruners.base import Scope, Selection, run, weights_of
    from pathprune.schedules import rounds_of
    from pathprune.spatial import merge_equal_positions

    suspects = {name: (double[name] != single[name]).flatten().nonzero().flatten() for name in double}
    suspects = {name: at for name, at in suspects.items() if len(at)}
    closest = {name: torch.full((len(at),), math.inf, dtype=torch.float64) for name, at in suspects.items()}
    quick, names = merge_equal_positions(net), net.prunable
    weights = weights_of(quick, names, pp.SynFlow().maps)
    scorer, selection = pp.SynFlow().scorer(quick, weights, 0), Selection(weights, names, Scope.of("global"))
    seen: dict[str, torch.Tensor] = {}

    def look(guess):
        total = scorer(guess)
        for name in suspects:
            made = weights[name].written_scores()
            seen[name] = made.weight.double().flatten()[suspects[name]].log2() + made.exponent
        return total

    for done in run(
        look,
        selection,
        rounds_of("exponential", [0.05], 100),
        lambda _: dict.fromkeys(names, 1.0),
        lambda _: None,
    ):
        for name in suspects:
            distance = torch.exp2((seen[name] - done.threshold.log2()).abs()) - 1
            closest[name] = torch.minimum(closest[name], torch.nan_to_num(distance, nan=math.inf))
    return max((float(far.max()) for far in closest.values()), default=0.0)


def test_resnets_keep_every_cut_and_vgg_every_layer():
    x = torch.ones(1, 3, 32, 32)
    torch.manual_seed(0)
    for masks in pp.prune(models.vgg11_bn(), pp.SynFlow(), density=[1e-2, 1e-3, 1e-4], example_input=x):
        assert min(kept for kept, _ in masks.counts().values()) > 0
    resnet = models.resnet20()
    net = PathNetwork.from_module(resnet, x)
    for masks in pp.prune(net, pp.SynFlow(), density=[0.1, 0.018, 1e-3]):
        assert alive(net, masks)


def alive(net, masks) -> bool:
    """Whether some path from input to output is left: every cut keeps weights."""
    from pathprune.flow import PathFlow
    from pathprune.policy import policy_of
    from pathprune.pruners.base import weights_of
    from pathprune.reference import WeightMap

    weights = weights_of(net, net.prunable, (WeightMap.ONE, WeightMap.ONE), masks=masks)
    assert all(isinstance(net.nodes[k], Synapse) for k in net.synapses())
    return math.isfinite(float(PathFlow(net, weights, f=WeightMap.ONE, policy=policy_of("paths")).forward()[0]))
