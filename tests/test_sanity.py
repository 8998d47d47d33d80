"""Stable ResNet, and the sanity checks: each must be able to fail."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.pytorch_utils import Conv1D

import pathprune as pp
from pathprune import models


class Residual(nn.Module):
    """``x + W relu(x)``, or with two layers and batch norms and a ReLU behind the sum."""

    def __init__(self, width, norm):
        super().__init__()
        layers = [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)]
        again = [nn.ReLU(), nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)]
        self.body = nn.Sequential(*layers, *again) if norm else nn.Sequential(nn.ReLU(), layers[0])
        self.after = nn.ReLU() if norm else nn.Identity()

    def forward(self, x):
        return self.after(self.body(x) + x)


def residual_net(blocks, width, norm, seed):
    torch.manual_seed(seed)
    stem, head = nn.Linear(width, width, bias=False), nn.Linear(width, 10, bias=False)
    return models.he_init(nn.Sequential(stem, *(Residual(width, norm) for _ in range(blocks)), head)).double()


def hugging_face(kind):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": kind}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))


# -------------------------------------------------------------------------------------------------- stable ResNet


@pytest.mark.parametrize(
    ("make", "blocks", "last"),
    [
        (models.resnet20, 9, "3.body.4"),
        (lambda: models.resnet20(shortcut="A"), 9, "3.body.4"),
        (lambda: models.wide_resnet(16, 1), 6, "1.body.3"),
        (models.mobilenet_tiny, 3, "3.body.7"),
        (lambda: hugging_face("basic"), 4, "resnet.encoder.stages.0.layers.0.layer.1.normalization"),
        (lambda: hugging_face("bottleneck"), 4, "resnet.encoder.stages.0.layers.0.layer.2.normalization"),
    ],
    ids=["resnet20", "resnet20-A", "wrn", "mobilenet", "hf-basic", "hf-bottleneck"],
)
def test_branches_are_scaled_and_given_back_bit_for_bit(make, blocks, last):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, 32, 32)

    def run(net):
        out = net(x)
        return (out if isinstance(out, torch.Tensor) else out.logits).detach()

    before, state = run(model), copy.deepcopy(model.state_dict())
    with pp.stable_resnet(model, x) as stable:
        assert stable.factor == 1 / math.sqrt(blocks) and len(stable.branches) == blocks
        assert stable.branches[0] == last
        scaled = run(model)
        assert not torch.equal(scaled, before)
        assert state.keys() == model.state_dict().keys()
        assert torch.equal(run(copy.deepcopy(model)), scaled)
        by_hand = copy.deepcopy(model)
    assert torch.equal(run(model), before)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    # The same by hand: the factor inside the module that ends each branch, in its affine part or its weight.
    for module in by_hand.modules():
        module._forward_hooks.clear()
    with torch.no_grad():
        for name in stable.branches:
            end = by_hand.get_submodule(name)
            for parameter in end.parameters(recurse=False):
                parameter *= stable.factor
    torch.testing.assert_close(run(by_hand), scaled, rtol=1e-4, atol=1e-5)


def test_pruners_score_the_stable_network():
    model, x = residual_net(4, 6, False, 0), torch.ones(1, 6).double()
    score = pp.SynFlow(policy="paths")
    with pp.stable_resnet(model, x):
        found = pp.scores(model, score, example_input=x)
    plain = pp.scores(model, score, example_input=x)
    with torch.no_grad():
        for block in model[1:-1]:
            block.body[1].weight /= 2
    wanted = pp.scores(model, score, example_input=x)
    assert found.log2_R == pytest.approx(wanted.log2_R) and found.log2_R < plain.log2_R - 0.5
    for name in wanted.tensors:
        torch.testing.assert_close(found.double(name), wanted.double(name))


def test_gradients_stay_bounded_with_the_factor_and_double_with_each_block_without():
    """E|gradient|^2 at the input over that at the end: (1 + sigma_w^2 / 2)^L = 2^L; with it (1 + 1 / L)^L < e."""
    for blocks in (8, 16, 32):
        growth = {}
        for stable in (False, True):
            found = []
            for seed in range(3):
                model = residual_net(blocks, 128, False, seed)
                x = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)).double()
                handle = pp.stable_resnet(model, x) if stable else None
                h = model[0](x).detach().requires_grad_()
                out = model[1:-1](h)
                g = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).double()
                out.backward(g)
                found.append(float((h.grad.square().mean() / g.square().mean()).log2()))
                if handle:
                    handle.remove()
            growth[stable] = sum(found) / len(found)
        assert growth[False] == pytest.approx(blocks, rel=0.1)
        assert 0.8 < growth[True] < math.log2(math.e) + 0.3


def emptied(model, x, y, sparsity):
    """Names of the layers that one-shot SNIP leaves nothing of: the largest |W dL/dW| over all layers stay."""
    names, weights = zip(*((n, p) for n, p in model.named_parameters() if p.dim() > 1), strict=True)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
    scores = [(w * g).abs().detach() for w, g in zip(weights, gradients, strict=True)]
    every = torch.cat([s.flatten() for s in scores])
    threshold = every.topk(round(len(every) * (1 - sparsity))).values[-1]
    return [name for name, s in zip(names, scores, strict=True) if not bool((s >= threshold).any())]


@pytest.mark.parametrize("blocks", [16, 32, pytest.param(50, marks=pytest.mark.slow)])
def test_where_sbp_empties_layers_at_98_percent_sbp_sr_does_not(blocks):
    """Residual nets with batch norm, 64 units, seeds 0 and 1.

    Not a law: without batch norm, or with 32 units, SBP-SR too empties a layer here and there, if fewer.
    """
    for seed in range(2):
        model = residual_net(blocks, 64, True, seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(100, 64, generator=generator).double()
        y = torch.randint(10, (100,), generator=generator)
        plain = emptied(model, x, y, 0.98)
        with pp.stable_resnet(model, x):
            stable = emptied(model, x, y, 0.98)
        assert len(plain) >= 5 and stable == []


class SharedEnd(nn.Module):
    """A branch that ends in the ReLU that is also called behind the sum."""

    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.relu(self.linear(x)) + x)


class FunctionalEnd(SharedEnd):
    def forward(self, x):
        return torch.relu(torch.relu(self.linear(x)) + x)


class LinearEnd(SharedEnd):
    """What follows the module is a fixed linear map: it may come before or after the factor."""

    def forward(self, x):
        return self.relu(3 * self.linear(torch.relu(x))[:, None].squeeze(1) + x)


def test_what_is_no_stable_resnet_is_refused_and_left():
    x = torch.ones(1, 4)
    for make, message in (
        (SharedEnd, r"end a branch and are called for nothing else, got 4 calls for 2 residual blocks"),
        (FunctionalEnd, r"branches that end in a module, got '0' \(FunctionalEnd\) \(relu\)"),
        (lambda: nn.Linear(4, 4), r"wanted residual blocks \(a sum with a skip\), got none"),
    ):
        model = nn.Sequential(make(), make())
        with pytest.raises(ValueError, match="stable_resnet: model: .*" + message):
            pp.stable_resnet(model, x)
        assert not any(module._forward_hooks for module in model.modules())
    model = nn.Sequential(LinearEnd(), LinearEnd())
    with pp.stable_resnet(model, x) as stable:
        assert stable.branches == ("0.linear", "1.linear")
        with pytest.raises(ValueError, match="stable_resnet: model: wanted one without the factor"):
            pp.stable_resnet(model, x)


# ------------------------------------------------------------------------------------------------------- inverted


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6)), torch.ones(1, 12)


def test_inverted_keeps_the_lowest_scores():
    model, x = net()
    for base in (pp.Magnitude(), pp.SynFlow(rounds=1)):
        best = pp.prune(model, base, density=0.3, example_input=x, progress=False)
        worst = pp.prune(model, pp.Inverted(base), density=0.3, example_input=x, progress=False)
        assert worst.kept == best.kept == round(0.3 * 360) and (best & worst).kept == 0
        made = pp.scores(model, base, example_input=x)
        values = {name: made.double(name) for name in worst}
        highest_kept = max(float(values[name][worst[name]].max()) for name in worst)
        lowest_gone = min(float(values[name][~worst[name]].min()) for name in worst)
        assert highest_kept < lowest_gone
    rest = pp.prune(model, pp.Inverted(pp.Magnitude()), density=0.7, example_input=x, progress=False)
    assert rest == best_of(model, x, 0.3).invert()
    assert rest.metadata["config"]["base"]["method"] == "Magnitude"


def best_of(model, x, density):
    return pp.prune(model, pp.Magnitude(), density=density, example_input=x, progress=False)


def test_inverted_goes_round_by_round_and_takes_zeros_first():
    model, x = net()
    many = pp.prune(model, pp.Inverted(pp.SynFlow(rounds=20)), density=0.2, example_input=x, progress=False)
    once = pp.prune(model, pp.Inverted(pp.SynFlow(rounds=1)), density=0.2, example_input=x, progress=False)
    assert many.metadata["findings"]["rounds"] == 20 and many != once and many.kept == once.kept
    with torch.no_grad():
        model[0].weight[:10] = 0
    zeros = pp.prune(model, pp.Inverted(pp.Magnitude()), density=120 / 360, example_input=x, progress=False)
    assert torch.equal(zeros["0.weight"], model[0].weight == 0) and not zeros["2.weight"].any()


def test_inverted_orders_scores_beyond_the_range_of_floats():
    torch.manual_seed(0)
    model, x = models.mlp((8,) * 60, bias=False), torch.ones(1, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e8
    base = pp.SynFlow(rounds=1)
    made = pp.scores(model, base, example_input=x)
    assert made.log2_R > 1200
    best = pp.prune(model, base, density=0.5, example_input=x, progress=False)
    worst = pp.prune(model, pp.Inverted(base), density=0.5, example_input=x, progress=False)
    assert (best & worst).kept == 0 and (best | worst).kept == best.total


def test_inverted_refuses_what_does_not_score():
    with pytest.raises(TypeError, match=r"Inverted: base: wanted a pruner that scores weights, got PHEW"):
        pp.Inverted(pp.PHEW())
    with pytest.raises(TypeError, match=r"Inverted: base: wanted a pruner such as SynFlow\(\), got SynFlow"):
        pp.Inverted(pp.SynFlow)


# --------------------------------------------------------------------------------------------------------- reinit


def test_reinit_draws_every_weight_anew_and_masks_go_on_fitting():
    torch.manual_seed(0)
    model, x = models.convnet_digits(4), torch.ones(1, 1, 8, 8)
    with torch.no_grad():
        model[1].running_mean += 3
    masks = best_of(model, x, 0.2)
    masks.apply_(model)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fresh, same, other = pp.reinit(model, 1), pp.reinit(model, 1), pp.reinit(model, 2)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), same.parameters(), strict=True))
    for name in masks:
        weight = fresh.get_parameter(name).detach()
        assert not bool((weight == model.get_parameter(name)).any()) and bool(weight.all())
        assert not torch.equal(weight, other.get_parameter(name))
    assert not fresh[1].running_mean.any()
    masks.apply_(fresh, base="ignore")
    assert all(torch.equal(fresh.get_parameter(name) != 0, masks[name]) for name in masks)


def test_reinit_by_a_function_of_ones_own():
    model, _ = net()
    fresh = pp.reinit(model, 3, lambda m: pp.edge_of_chaos_init_(m, "relu"))
    assert not fresh[0].bias.any() and not torch.equal(fresh[0].weight, model[0].weight)
    again = pp.reinit(model, 3, lambda m: pp.edge_of_chaos_init_(m, "relu"))
    assert torch.equal(fresh[0].weight, again[0].weight)


def test_reinit_refuses_parameters_that_nothing_resets():
    model, rng = nn.Sequential(Conv1D(4, 4), nn.Linear(4, 4)), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"reinit: initialize: .*\(0\.weight, 0\.bias\), got None"):
        pp.reinit(model, 0)
    assert torch.equal(rng, torch.get_rng_state())


# ----------------------------------------------------------------------------------------------------------- data


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(n, 3, 4, 5, generator=generator), torch.full((n,), 2)) for n in (40, 30)]


def test_random_labels_are_the_same_in_every_pass():
    data, rng = batches(), torch.get_rng_state()
    view = pp.random_labels(data, 10, seed=0)
    first, second = list(view), list(view)
    assert len(view) == 2 and torch.equal(rng, torch.get_rng_state())
    for (x, y), (x2, y2), (x0, y0) in zip(first, second, data, strict=True):
        assert x is x0 and x2 is x0 and torch.equal(y, y2) and y.dtype == y0.dtype and y.shape == y0.shape
        assert set(y.tolist()) <= set(range(10)) and len(set(y.tolist())) > 5
    assert not torch.equal(first[0][1][:30], first[1][1])  # batches differ
    assert not torch.equal(next(iter(pp.random_labels(data, 10, seed=1)))[1], first[0][1])
    assert all(bool((y == 2).all()) for _, y in data)
    overlapping = zip(view, view, strict=True)
    assert all(torch.equal(a[1], b[1]) for a, b in overlapping)


def test_pixels_are_shuffled_alike_in_all_images_and_channels():
    data = batches()
    view = pp.shuffled_pixels(data, seed=0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(view, view, strict=True))
    orders = []
    for (x, y), (x0, y0) in zip(view, data, strict=True):
        assert y is y0 and x.shape == x0.shape and not torch.equal(x, x0)
        assert torch.equal(x.flatten(2).sort(-1).values, x0.flatten(2).sort(-1).values)
        for image, image0 in zip(x.flatten(2), x0.flatten(2), strict=True):
            orders += [(image[c, :, None] == image0[c]).int().argmax(1) for c in range(3)]
    assert all(torch.equal(order, orders[0]) for order in orders)
    assert not torch.equal(next(iter(pp.shuffled_pixels(data, seed=1)))[0], next(iter(view))[0])
    features = next(iter(pp.shuffled_pixels([torch.arange(8.0)[None]], seed=0)))
    assert sorted(features[0].tolist()) == list(range(8))


def test_views_refuse_what_they_cannot_read():
    data = batches()
    for view in (lambda d: pp.random_labels(d, 3, 0), lambda d: pp.shuffled_pixels(d, 0)):
        with pytest.raises(TypeError, match="data: wanted a re-iterable"):
            view(iter(data))
    with pytest.raises(ValueError, match="random_labels: classes: wanted at least 2, got 1"):
        pp.random_labels(data, 1, 0)
    for y in (None, torch.rand(4)):
        with pytest.raises(ValueError, match="random_labels: data: wanted integer labels"):
            list(pp.random_labels([(torch.rand(4, 2), y)], 3, 0))
    for x in (torch.rand(4), {"x": torch.rand(4, 2)}):
        with pytest.raises(ValueError, match="shuffled_pixels: data: wanted a tensor of 2 dimensions"):
            list(pp.shuffled_pixels([x], 0))


def test_shuffled_masks_are_random_masks_with_the_same_ratios():
    model, x = net()
    masks = best_of(model, x, 0.25)
    shuffled = masks.shuffle(0)
    assert shuffled.counts() == masks.counts() and shuffled != masks and shuffled == masks.shuffle(0)
