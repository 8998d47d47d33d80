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
from pathprune.pruners.base import Scope, Selection
from pathprune.spatial import merge_equal_positions
from pathprune.weights import weights_of

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


@pytest.mark.parametrize(
    ("depths", "rounds"), [((3, 4, 6, 3), 100), ((3, 8, 36, 3), 20)], ids=["resnet50", "resnet152"]
)
def test_rounds_are_those_of_float64(depths, rounds):
    """Given float64's masks before a round, float32 makes float64's after it: at most 1e-5 of the bits differ, each
    by a weight whose score lies within 1e-4 of the threshold."""
    model = hf_resnet(depths)
    wide = copy.deepcopy(model).double()
    looked_at = sorted({1, 2, rounds // 5, rounds // 2, rounds - 1, rounds})
    densities = sorted({0.05 ** (r / rounds) for k in looked_at for r in (k - 1, k) if r}, reverse=True)
    plan = [round(math.log(d) / math.log(0.05) * rounds) for d in densities]
    double = dict(zip(plan, pp.prune(network(wide), pp.SynFlow(rounds=rounds), density=densities), strict=True))
    single, exact = network(model), network(wide)
    for r in looked_at:
        before = dict(double[r - 1]) if r > 1 else None
        after, threshold, _ = one_round(single, before, double[r].kept)
        wanted, same, scores = one_round(exact, before, double[r].kept)
        assert all(torch.equal(wanted[name], double[r][name]) for name in wanted)
        assert differing(after, wanted) <= 1e-5 * double[r].total
        assert abs(threshold - same) < math.log2(1 + 1e-4)
        for name in after:
            split = scores[name][after[name] != wanted[name]]
            assert bool(((split - same).abs() < math.log2(1 + 1e-4)).all())


def one_round(net, masks, keep):
    """The masks of one round from given ones, the threshold's log2, and the log2 of the scores."""
    quick, names = merge_equal_positions(net), net.prunable
    weights = weights_of(quick, names, pp.SynFlow().maps, masks=masks)
    selection = Selection(weights, names, Scope.of("global"))
    pp.SynFlow().scorer(quick, weights, 0)(None)
    scores = {}
    for name in names:
        made = weights[name].written_scores()
        scores[name] = (made.weight.double().log2() + made.exponent).reshape(weights[name].shape)
    threshold = selection.cut(keep, dict.fromkeys(names, 0))
    return {name: weights[name].bits() for name in names}, threshold.log2(), scores


def test_a_hundred_rounds_amplify_any_difference():
    """Rounds feed on each other: a single weight made smaller, in float64, moves as many bits as float32's rounding.

    So a whole schedule is compared with what float64 itself does to weights rounded at random in the last place of
    float32; what float32 adds is no more than that.
    """
    model = hf_resnet((3, 4, 6, 3))
    wide, one, noisy = (copy.deepcopy(model).double() for _ in range(3))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in noisy.parameters():
            p.mul_(1 + 2.0**-24 * (2 * torch.rand_like(p) - 1))
    options = {"density": 0.05**0.6}
    pruned = {
        name: pp.prune(network(net, 64), pp.SynFlow(rounds=60), **options)
        for name, net in {"single": model, "double": wide, "noisy": noisy}.items()
    }
    kept = pruned["double"]["resnet.encoder.stages.2.layers.0.layer.1.convolution.weight"]
    with torch.no_grad():
        weight = one.get_parameter("resnet.encoder.stages.2.layers.0.layer.1.convolution.weight")
        weight.view(-1)[int(kept.flatten().nonzero()[1000])] *= 1e-3
    pruned["one"] = pp.prune(network(one, 64), pp.SynFlow(rounds=60), **options)
    rounding = differing(pruned["single"], pruned["double"])
    noise = differing(pruned["noisy"], pruned["double"])
    assert differing(pruned["one"], pruned["double"]) > 1e-5 * kept.numel()
    assert rounding < 3 * noise
    assert rounding < 5e-3 * pruned["double"].total


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
    from pathprune.reference import WeightMap

    weights = weights_of(net, net.prunable, (WeightMap.ONE, WeightMap.ONE), masks=masks)
    assert all(isinstance(net.nodes[k], Synapse) for k in net.synapses())
    return math.isfinite(float(PathFlow(net, weights, f=WeightMap.ONE, policy=policy_of("paths")).forward()[0]))
