"""Edge of chaos, rescaling, gradient moments: closed forms, literature, quadrature by another rule, theorems, depth."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import pathprune as pp
from pathprune import models


def hermite(function, q):
    """E[f(sqrt(q) Z)^2] by Gauss-Hermite."""
    z, mass = np.polynomial.hermite_e.hermegauss(120)
    values = function(torch.from_numpy(math.sqrt(q) * z)).detach().numpy()
    return float((values**2) @ mass / mass.sum())


def trapezoid(function, q):
    """E[f(sqrt(q) Z)^2] on a grid so fine that the large q of gelu and its like is no matter."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    mass = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    return float(mass @ function(math.sqrt(q) * z).detach().square())


def slope_of(values):
    x = torch.arange(len(values)).double() - (len(values) - 1) / 2
    return float(x @ values / x.square().sum())


# ------------------------------------------------------------------------------------------------------ the point


def test_relu_and_its_like_in_closed_form():
    relu = pp.edge_of_chaos("relu")
    assert relu.sigma_w == pytest.approx(math.sqrt(2), rel=1e-14) and relu.sigma_b == 0 and math.isnan(relu.q)
    leaky = pp.edge_of_chaos(lambda x: F.leaky_relu(x, 0.3))
    assert leaky.sigma_w == pytest.approx(math.sqrt(2 / 1.09), rel=1e-14)
    assert pp.edge_of_chaos("linear").sigma_w == pytest.approx(1, rel=1e-14)


def test_tanh_is_where_the_literature_has_it():
    # Schoenholz et al. 2017: sigma_b^2 = 0.05 is critical at sigma_w^2 = 1.76.
    assert pp.edge_of_chaos("tanh", math.sqrt(0.05)).sigma_w ** 2 == pytest.approx(1.76, abs=0.005)
    without = pp.edge_of_chaos("tanh")
    assert without.sigma_w == pytest.approx(1, rel=1e-12) and without.q == 0


@pytest.mark.parametrize(
    ("name", "sigma_b", "mean_square"),
    [("tanh", 0.05, hermite), ("tanh", 0.3, hermite), *((name, 1.0, trapezoid) for name in ("gelu", "silu", "mish"))],
)
def test_both_equations_hold_by_another_quadrature(name, sigma_b, mean_square):
    point = pp.edge_of_chaos(name, sigma_b)
    phi = getattr(F, name)
    slope = torch.func.vmap(torch.func.grad(phi))
    assert point.sigma_w**2 * mean_square(slope, point.q) == pytest.approx(1, rel=1e-9)
    assert sigma_b**2 + point.sigma_w**2 * mean_square(phi, point.q) == pytest.approx(point.q, rel=1e-9)
    assert pp.chi(name, point.sigma_w, point.q) == pytest.approx(1, rel=1e-11)


def test_chi_is_one_by_monte_carlo_on_a_wide_tanh_layer():
    """A layer at the fixed point: the variance comes out again, and a random gradient comes back as long."""
    point = pp.edge_of_chaos("tanh", 0.3)
    generator = torch.Generator().manual_seed(0)
    n = 2000
    h = math.sqrt(point.q) * torch.randn(n, n, generator=generator)
    layer = nn.Linear(n, n)
    assert pp.edge_of_chaos_init_(layer, "tanh", 0.3, generator) == point
    h.requires_grad_()
    out = layer(h.tanh())
    g = torch.randn(out.shape, generator=generator)
    out.backward(g)
    assert float(out.detach().square().mean()) == pytest.approx(point.q, rel=0.01)
    assert float(h.grad.square().mean() / g.square().mean()) == pytest.approx(1, rel=0.01)
    off = pp.chi("tanh", 0.8 * point.sigma_w, point.q)
    assert off == pytest.approx(0.64, rel=1e-9)


def test_no_solution_and_bad_arguments():
    with pytest.raises(ValueError, match=r"edge_of_chaos: sigma_b: wanted 0 for 'relu'"):
        pp.edge_of_chaos("relu", 0.1)
    with pytest.raises(ValueError, match=r"edge_of_chaos: activation: 'gelu' has no point .* sigma_b = 0\.1"):
        pp.edge_of_chaos("gelu", 0.1)
    with pytest.raises(ValueError, match=r"edge_of_chaos: activation: wanted one of .* got 'swish'"):
        pp.edge_of_chaos("swish")
    with pytest.raises(TypeError, match="edge_of_chaos: activation: wanted a name or a function, got int"):
        pp.edge_of_chaos(3)
    with pytest.raises(ValueError, match="wanted an elementwise function"):
        pp.edge_of_chaos(lambda x: x.sum())
    for sigma_b in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="edge_of_chaos: sigma_b"):
            pp.edge_of_chaos("tanh", sigma_b)
    with pytest.raises(ValueError, match="chi: q"):
        pp.chi("tanh", 1.0, -1.0)


# -------------------------------------------------------------------------------------------- the initialization


def test_weights_have_the_variance_of_their_fan_in():
    model = nn.ModuleList(
        [
            nn.Linear(200, 300),
            nn.Conv2d(40, 60, 3, groups=4),
            nn.ConvTranspose2d(60, 40, 4, stride=2, groups=2),
            Conv1D(300, 200),
        ]
    )
    pp.edge_of_chaos_init_(model, "tanh", 0.3, torch.Generator().manual_seed(0))
    sigma_w = pp.edge_of_chaos("tanh", 0.3).sigma_w
    for layer, fan_in in zip(model, (200, 10 * 9, 30 * 16 / 4, 200), strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx(sigma_w / math.sqrt(fan_in), rel=0.03)
    biases = torch.cat([layer.bias.detach() for layer in model])
    assert float(biases.std()) == pytest.approx(0.3, rel=0.1)


def test_activation_is_read_from_the_graph_and_draws_are_the_generators():
    x = torch.ones(1, 1, 8, 8)
    first, second, other = (models.convnet_digits(4) for _ in range(3))
    state = torch.get_rng_state()
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        point = pp.edge_of_chaos_init_(model, generator=torch.Generator().manual_seed(seed), example_input=x)
        assert point.sigma_w == pytest.approx(math.sqrt(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)
    assert all(not layer.bias.any() for layer in first if isinstance(layer, nn.Linear))


def test_initialization_refuses_and_leaves_the_model():
    mixed = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh())
    before = copy.deepcopy(mixed.state_dict())
    with pytest.raises(ValueError, match=r"edge_of_chaos_init_: activation: .*\['relu', 'tanh'\]"):
        pp.edge_of_chaos_init_(mixed, example_input=torch.ones(1, 3))
    with pytest.raises(ValueError, match="wanted activation, or example_input"):
        pp.edge_of_chaos_init_(mixed)
    with pytest.raises(ValueError, match="sigma_b"):
        pp.edge_of_chaos_init_(mixed, "relu", 0.5)
    with pytest.raises(ValueError, match="wanted linear or convolution modules"):
        pp.edge_of_chaos_init_(nn.ReLU(), "relu")
    assert all(torch.equal(before[key], value) for key, value in mixed.state_dict().items())


# ------------------------------------------------------------------------------------------------- the rescaling


class Forms(nn.Module):
    """Every way a weight is stored, on [n, 6] features."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.turned = Conv1D(16, 8)
        self.conv = nn.Conv2d(16, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.turned(torch.relu(self.linear(x))))
        x = torch.relu(self.grouped(torch.relu(self.conv(x[:, :, None, None].expand(-1, -1, 4, 4)))))
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


NAMES = ["linear", "turned", "conv", "grouped", "up", "head"]


def met_in_a_unit(module, mask):
    """What squared weights give on ones, in the mean over inner positions: the sum of squares that meets in a unit."""
    squared = copy.deepcopy(module).double()
    squared.bias = nn.Parameter(torch.zeros(module.weight.shape[1])) if isinstance(module, Conv1D) else None
    squared.weight = nn.Parameter((module.weight.detach().double() * mask).square())
    if squared.bias is not None:
        squared.bias = nn.Parameter(squared.bias.detach().double())
    with torch.no_grad():
        if isinstance(module, nn.modules.conv._ConvNd):
            out = squared(torch.ones(1, module.in_channels, 12, 12).double())
            return out[0, :, 4:-4, 4:-4].mean((1, 2))
        inputs = module.weight.shape[0] if isinstance(module, Conv1D) else module.in_features
        return squared(torch.ones(1, inputs).double())[0]


def forms(dtype=torch.float64):
    torch.manual_seed(0)
    model = Forms().to(dtype)
    x = torch.ones(2, 6, dtype=dtype)
    masks = pp.prune(model, pp.Random(), density=0.5, example_input=x, progress=False)
    parts = {name: masks[name] for name in masks}
    parts["linear.weight"][3] = False  # a dead unit
    parts["up.weight"][:4, 1] = False  # and one of the first group
    return model, x, pp.Masks(parts)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-14), (torch.float32, 3e-7)])
@pytest.mark.parametrize("gain", [math.sqrt(2), 1.0])
def test_rows_have_exactly_the_target(dtype, rtol, gain):
    model, x, masks = forms(dtype)
    biases = [p.clone() for name, p in model.named_parameters() if name.endswith("bias")]
    found = pp.rescale_(model, masks, gain, example_input=x)
    for name in NAMES:
        got = met_in_a_unit(getattr(model, name), masks[f"{name}.weight"])
        live = torch.ones(len(got), dtype=torch.bool)
        live[list(found.skipped.get(f"{name}.weight", ()))] = False
        torch.testing.assert_close(got[live], torch.full_like(got[live], gain**2), rtol=rtol * 10, atol=0)
        assert not got[~live].any()
    assert found.skipped["linear.weight"] == (3,) and 1 in found.skipped["up.weight"] and found.cancelled == ()
    assert all(
        torch.equal(a, b)
        for a, b in zip(biases, (p for n, p in model.named_parameters() if n.endswith("bias")), strict=True)
    )


def test_layers_have_the_target_in_the_mean():
    model, x, masks = forms()
    found = pp.rescale_(model, masks, granularity="layer", example_input=x)
    for name in NAMES:
        got = met_in_a_unit(getattr(model, name), masks[f"{name}.weight"])
        assert float(got.mean()) == pytest.approx(2, rel=1e-13) and float(got.std()) > 0.01
        assert len(found.factors[f"{name}.weight"].unique()) == 1


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_a_fixed_multiplier_is_the_folded_one(granularity):
    model, x, masks = forms()
    x = torch.randn(3, 6).double()
    masks.apply_(model)
    plain, folded, weights = model(x), copy.deepcopy(model), [p.clone() for p in model.parameters()]
    pp.rescale_(folded, masks, granularity=granularity, example_input=x)
    names = [name for name, _ in model.named_parameters()]
    handle = pp.rescale_(model, masks, granularity=granularity, fold=False, example_input=x)
    torch.testing.assert_close(model(x), folded(x), rtol=1e-12, atol=1e-14)
    assert float((model(x) - plain).detach().abs().max()) > 1e-3
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    # Pruners see the factor: the path scores are those of the folded network.
    ours, theirs = (pp.scores(m, pp.SynFlow(policy="paths"), example_input=x, masks=masks) for m in (model, folded))
    for name in masks:
        torch.testing.assert_close(ours.double(name), theirs.double(name), rtol=1e-10, atol=0)
    # Copies and state dicts carry it; a model without it refuses the keys.
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module in twin.modules():
            if "weight_gain" in module._buffers:
                module.weight_gain.fill_(7)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    with pytest.raises(RuntimeError, match="weight_gain"):
        Forms().double().load_state_dict(model.state_dict())
    handle.remove()
    handle.remove()
    assert torch.equal(model(x), plain) and "linear.weight_gain" not in model.state_dict()


def test_masks_are_maintained_beside_a_fixed_multiplier():
    model, x, masks = forms()
    rescaled = pp.rescale_(model, masks, fold=False, example_input=x)
    gains = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = model.head.weight.detach().clone()
    with masks.maintain(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 6).double()).square().mean().backward()
            optimizer.step()
    for name in masks:
        assert not model.get_parameter(name)[~masks[name]].any()
    assert not torch.equal(before, model.head.weight)
    assert gains and all(torch.equal(gains[name], buffer) for name, buffer in model.named_buffers())
    rescaled.remove()


def test_folded_factors_divide_out():
    model, x, masks = forms()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pp.rescale_(model, masks, example_input=x):
        assert float((model.head.weight - before["head.weight"]).detach().abs().max()) > 0.01
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-15, atol=0)


def test_a_norm_that_follows_is_reported():
    torch.manual_seed(0)
    model, x = models.convnet_digits(4), torch.ones(1, 1, 8, 8)
    masks = pp.prune(model, pp.Random(), density=0.5, example_input=x, progress=False)
    with pytest.warns(UserWarning, match=r"a norm directly follows 0\.weight, 3\.weight, 7\.weight"):
        found = pp.rescale_(model, masks, example_input=x)
    assert found.cancelled == ("0.weight", "3.weight", "7.weight")


def test_rescaling_refuses_and_leaves_the_model():
    model, x, masks = forms()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="rescale_: target_gain: wanted a finite number > 0, got 0"):
        pp.rescale_(model, masks, 0.0, example_input=x)
    with pytest.raises(ValueError, match="rescale_: granularity: wanted 'row' or 'layer', got 'unit'"):
        pp.rescale_(model, masks, granularity="unit", example_input=x)
    with pytest.raises(pp.MaskMismatchError, match="masks of another model"):
        pp.rescale_(model, pp.Masks({"other.weight": torch.ones(2, 2, dtype=torch.bool)}), example_input=x)
    kept = pp.rescale_(model, masks, fold=False, example_input=x)
    with pytest.raises(ValueError, match="has a fixed multiplier already"):
        pp.rescale_(model, masks, example_input=x)
    kept.remove()
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    parts = {name: torch.ones_like(masks[name]) for name in masks}
    with pytest.raises(ValueError, match=r"rescale_: model: wanted finite weights, .* 'head.weight'"):
        pp.rescale_(model, pp.Masks(parts), example_input=x)
    with torch.no_grad():
        model.head.weight[0, 0] = before["head.weight"][0, 0]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(x, self.kernel)

    with pytest.raises(ValueError, match="rescale_: fold: wanted True for 'kernel'"):
        pp.rescale_(Functional(), pp.Masks({"kernel": torch.eye(4).bool()}), fold=False, example_input=torch.ones(1, 4))


def test_tied_weights_are_scaled_once():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)), torch.randn(2, 5)
    model[2].weight = model[0].weight
    masks = pp.prune(model, pp.Random(), density=0.6, example_input=x, progress=False)
    masks.apply_(model)
    beside = copy.deepcopy(model)
    pp.rescale_(beside, masks, fold=False, example_input=x)
    pp.rescale_(model, masks, example_input=x)
    assert float(model[0].weight.detach().square().sum(1).sub(2).abs().max()) < 1e-5
    torch.testing.assert_close(beside(x), model(x))


# ----------------------------------------------------------------------------------------------------- at depth


def log2_variances(model, x):
    """log2 of the mean square of every pre-activation, and of the gradient of a random sum of outputs there."""
    seen = []

    def keep(module, args, output):
        output.retain_grad()
        seen.append(output)

    hooks = [module.register_forward_hook(keep) for module in model if isinstance(module, nn.Linear)]
    out = model(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    for hook in hooks:
        hook.remove()
    forward = torch.stack([h.detach().square().mean().log2() for h in seen])
    return forward, torch.stack([h.grad.square().mean().log2() for h in seen])


@pytest.mark.parametrize("depth", [20, 50, 110])
@pytest.mark.parametrize("pruner", [pp.Random(), pp.Magnitude()], ids=["random", "magnitude"])
def test_variances_are_flat_with_depth_after_rescaling_and_decay_without(depth, pruner):
    """log2 of both variances per layer: log2 of what is left of E[fan_in W^2] / 2 without, 0 with the factors.

    Without: at density d, log2(d) for random masks. With: the random walk of a net of this width, whose slope falls as
    1 / sqrt(depth), and which stays within a few bits where it would have been hundreds.
    """
    width, density = 200, 0.2
    generator = torch.Generator().manual_seed(depth)
    model = models.mlp((width,) * (depth + 1), bias=False).double()
    x = torch.randn(64, width, generator=generator).double()
    pp.edge_of_chaos_init_(model, "relu", generator=generator)
    masks = pp.prune(model, pruner, density=density, example_input=x, progress=False)
    masks.apply_(model)
    left = sum(float(p.square().sum()) for p in model.parameters()) / (depth * width * 2)
    forward, backward = (slope_of(v) for v in log2_variances(model, x))
    assert forward == pytest.approx(math.log2(left), abs=0.1) and backward == pytest.approx(-math.log2(left), abs=0.1)
    assert forward < -0.55
    for granularity in ("row", "layer"):
        handle = pp.rescale_(model, masks, granularity=granularity, example_input=x)
        forward, backward = log2_variances(model, x)
        assert max(abs(slope_of(forward)), abs(slope_of(backward))) < 0.7 / math.sqrt(depth) < 0.2
        for found in (forward, backward):
            assert float(found.max() - found.min()) < 8
        handle.remove()


# -------------------------------------------------------------------------------------------- gradient moments


def tanh_net(depth, width, sigma_w, sigma_b, seed):
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).double()
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear):
                draws = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(draws * sigma_w / math.sqrt(width))
                module.bias.copy_(sigma_b * torch.randn(module.bias.shape, generator=generator))
    data = [
        (torch.randn(n, width, generator=generator).double(), torch.randint(10, (n,), generator=generator))
        for n in (24, 16)
    ]
    return model, data


def test_moments_are_the_mean_square_of_weight_times_gradient():
    model, data = tanh_net(3, 12, 1.3, 0.3, 0)
    masks = pp.prune(model, pp.Random(), density=0.5, example_input=data[0][0], progress=False)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = pp.gradient_moments(model, data, F.cross_entropy, masks)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(rng, torch.get_rng_state())
    masks.apply_(model)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    F.cross_entropy(model(x), y).backward()  # batches of different sizes: the mean is over samples
    scores = {name: (p.detach() * p.grad).abs()[masks[name]] for name, p in model.named_parameters() if name in masks}
    assert list(found.moments) == list(scores)
    for name, score in scores.items():
        assert found.moments[name] == pytest.approx(float(score.square().mean()), rel=1e-10)
    # The measured critical sparsity: one step beyond it a layer is empty, at it none is.
    ordered = torch.cat(list(scores.values())).sort().values
    gone = round(found.critical_sparsity * len(ordered))
    assert all(bool((score >= ordered[gone]).any()) for score in scores.values())
    assert [name for name, score in scores.items() if not (score >= ordered[gone + 1]).any()] == [found.weakest]


def test_moments_are_flat_on_the_edge_of_chaos_and_follow_chi_off_it():
    """tanh, 30 layers: log2 m^l per layer is 0 on the edge, and -log2 chi off it (the ordered phase)."""
    depth, width, sigma_b = 30, 96, 0.3
    point = pp.edge_of_chaos("tanh", sigma_b)
    edge = pp.gradient_moments(*tanh_net(depth, width, point.sigma_w, sigma_b, 0), F.cross_entropy)
    sigma_w, q = 0.75, 1.0
    for _ in range(200):
        q = sigma_b**2 + sigma_w**2 * hermite(torch.tanh, q)
    chi = pp.chi("tanh", sigma_w, q)
    ordered = pp.gradient_moments(*tanh_net(depth, width, sigma_w, sigma_b, 0), F.cross_entropy)
    assert chi < 0.5
    assert ordered.log2_slope == pytest.approx(-math.log2(chi), rel=0.1)
    assert abs(edge.log2_slope) < 0.12 < 0.2 * ordered.log2_slope
    assert ordered.weakest in ("0.weight", "2.weight", "4.weight")
    # So the ordered net loses a layer at a sparsity where the other keeps all; and the moments alone foresee it.
    assert ordered.critical_sparsity < 0.7 < 0.9 < edge.critical_sparsity
    assert ordered.predicted_critical_sparsity == pytest.approx(ordered.critical_sparsity, abs=0.1)
    assert edge.predicted_critical_sparsity == pytest.approx(edge.critical_sparsity, abs=0.1)


def test_moments_of_relu_nets_are_balanced_by_conservation():
    """Without biases the sum of W dL/dW is the same in every layer, at any scale: only chance unbalances it."""
    for gain in (0.3, 1.0, 3.0):
        torch.manual_seed(0)
        model = models.mlp((40,) * 20, bias=False).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= gain
        data = [(torch.randn(30, 40).double(), torch.randn(30, 40).double())]
        found = pp.gradient_moments(model, data, lambda out, y: (out * y).mean())
        assert abs(found.log2_slope) < 0.1


def test_the_papers_bound():
    assert pp.critical_sparsity_bound(1.0, 50, 100) == 1
    bounds = [pp.critical_sparsity_bound(0.01, depth, 100) for depth in (20, 50, 100, 400)]
    assert bounds == sorted(bounds, reverse=True) and 0 < bounds[-1] < 0.1
    kappa = math.log(100) / 8
    assert bounds[2] == pytest.approx((1 + math.log(kappa * 100 * 100**2) / kappa) / 100)
    for arguments in ((0.0, 5, 5), (math.nan, 5, 5), (0.5, 0, 5), (0.5, 5, 0)):
        with pytest.raises(ValueError, match="critical_sparsity_bound"):
            pp.critical_sparsity_bound(*arguments)


def test_moments_refuse_bad_data_and_losses():
    model, data = tanh_net(2, 6, 1.0, 0.0, 0)
    with pytest.raises(TypeError, match="gradient_moments: data"):
        pp.gradient_moments(model, iter(data), F.cross_entropy)
    with pytest.raises(ValueError, match="gradient_moments: data: wanted at least one batch"):
        pp.gradient_moments(model, [], F.cross_entropy)
    with pytest.raises(ValueError, match=r"gradient_moments: data: wanted batches \(x, y\)"):
        pp.gradient_moments(model, [data[0][0]], F.cross_entropy)
    with pytest.raises(ValueError, match=r"gradient_moments: loss: wanted a tensor of one element, got \(24,\)"):
        pp.gradient_moments(model, data, lambda out, y: F.cross_entropy(out, y, reduction="none"))
    with pytest.raises(ValueError, match="gradient_moments: loss: wanted a finite value, got nan"):
        pp.gradient_moments(model, data, lambda out, y: out.sum() * math.nan)
    with pytest.raises(ValueError, match="gradient_moments: loss: wanted one that depends on every weight"):
        pp.gradient_moments(model, data, lambda out, y: torch.zeros((), requires_grad=True))
