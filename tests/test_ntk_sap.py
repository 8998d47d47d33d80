"""NTK-SAP against a literal loop over the same draws."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pathprune as pp


class Net(nn.Module):
    """A grouped convolution, batch norm, a transposed convolution, a linear head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2, bias=False)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.head(torch.relu(self.up(torch.relu(self.norm(self.stem(x))))).flatten(1))


FAN_IN = {"stem.weight": 2 * 9, "up.weight": 3 * 4, "head.weight": 144}
X = torch.ones(1, 4, 3, 3, dtype=torch.float64)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double().eval()


def literal(model, rounds, density, seed, batches, size, epsilon, fresh=True, shapes=None):
    """One network after the other, mask parameters, batch norms put through training mode; masks of the last round."""
    generator = torch.Generator().manual_seed(seed)
    present = {name: model.get_parameter(name).detach() for name in FAN_IN}
    masks = {name: torch.ones_like(w) for name, w in present.items()}
    total = sum(w.numel() for w in present.values())

    def randn(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for r in range(1, rounds + 1):
        factors = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
        for k in range(batches):
            theta, moved = {}, {}
            for name, w in present.items():
                theta[name] = randn(w.shape) * math.sqrt(2 / FAN_IN[name]) if fresh else w
                moved[name] = theta[name] + epsilon * randn(w.shape)
            x = randn((size, 4, 3, 3) if shapes is None else shapes[k])
            copied = copy.deepcopy(model)
            copied.norm.momentum = 1.0
            copied.train()
            with torch.no_grad():
                torch.func.functional_call(copied, {n: theta[n] * masks[n] for n in theta}, (x,))
            copied.eval()
            first, second = (
                torch.func.functional_call(copied, {n: values[n] * factors[n] for n in values}, (x,))
                for values in (theta, moved)
            )
            (first - second).square().sum().backward()
        flat = torch.cat([factors[name].grad.abs().flatten() for name in FAN_IN])
        scores = {name: factors[name].grad.abs() for name in FAN_IN}
        flat = flat.masked_fill(torch.cat([mask.flatten() for mask in masks.values()]) == 0, -1)
        kept = torch.zeros(total)
        kept[flat.argsort(descending=True)[: round(total * density ** (r / rounds))]] = 1
        parts = kept.split([w.numel() for w in present.values()])
        masks = {n: part.reshape(present[n].shape).double() for n, part in zip(FAN_IN, parts, strict=True)}
    return {name: mask.bool() for name, mask in masks.items()}, scores


def assert_same(masks, wanted):
    for name in wanted:
        assert torch.equal(masks[name], wanted[name]), f"{name}: {int((masks[name] != wanted[name]).sum())} bits differ"


@pytest.mark.parametrize("initialisation", ["he", "present"])
def test_masks_and_scores_are_those_of_the_literal_loop(initialisation):
    model, fresh = net(), initialisation == "he"
    pruner = pp.NTKSAP(rounds=4, batches=3, batch_size=5, epsilon=0.02, initialisation=initialisation)
    wanted, _ = literal(model, 4, 0.2, 7, 3, 5, 0.02, fresh)
    assert_same(pp.prune(model, pruner, density=0.2, example_input=X, seed=7), wanted)
    _, scores = literal(model, 1, 0.2, 7, 3, 5, 0.02, fresh)
    found = pp.scores(model, pruner, example_input=X, seed=7)
    for name, score in scores.items():
        torch.testing.assert_close(found.tensors[name], score / 15, rtol=1e-9, atol=1e-12)


def test_noise_takes_the_shapes_of_the_data():
    model, shapes = net(), [(5, 4, 3, 3), (2, 4, 3, 3)]
    wanted, _ = literal(model, 2, 0.3, 3, 2, None, 0.01, shapes=shapes)
    data = [(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0])) for shape in shapes]
    assert_same(pp.prune(model, pp.NTKSAP(data, rounds=2), density=0.3, example_input=X, seed=3), wanted)


def test_same_seed_same_masks_and_nothing_else_is_drawn():
    model = net().train()
    pruner = pp.NTKSAP(rounds=2, batch_size=4)
    before, buffers = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
    first = pp.prune(model, pruner, density=0.3, example_input=X, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert all(module.training for module in model.modules()) and model.norm.momentum == 0.1
    torch.manual_seed(99)
    assert first == pp.prune(model, pruner, density=0.3, example_input=X, seed=1)
    assert first != pp.prune(model, pruner, density=0.3, example_input=X, seed=2)


def test_fresh_weights_make_the_models_own_irrelevant():
    first, second = net(0), net(1)
    with torch.no_grad():  # what is not drawn anew
        second.stem.bias.copy_(first.stem.bias)
        second.head.bias.copy_(first.head.bias)
    run = {"density": 0.3, "example_input": X}
    fresh, present = (
        pp.NTKSAP(rounds=2, batch_size=4, initialisation=initialisation) for initialisation in ("he", "present")
    )
    assert_same(pp.prune(first, fresh, **run), pp.prune(second, fresh, **run))
    assert pp.prune(first, present, **run) != pp.prune(second, present, **run)


def test_score_is_the_trace_of_the_kernel_felt_by_a_linear_layer():
    """For one linear layer f(x; w) - f(x; w + d) = -m d x, so the score of w_j is 2 d_j (d x)_j x_j, whatever w."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Linear(3, 2, bias=False).double()
    torch.randn(2, 3, generator=generator, dtype=torch.float64)
    d = 0.01 * torch.randn(2, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    wanted = (2 * d * ((x @ d.T).T @ x) / 6).abs()
    pruner = pp.NTKSAP(batches=1, batch_size=6)
    found = pp.scores(model, pruner, example_input=x[:1], seed=5).tensors["weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


class Scaled(nn.Module):
    """A second input that is no noise; returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, scale):
        return {"logits": self.head(F.relu(self.layer(x))) * scale}


def test_what_is_no_noise_is_passed_on():
    torch.manual_seed(0)
    model = Scaled()

    def found(scale):
        data = [{"x": torch.zeros(6, 4), "scale": torch.tensor(scale)}]
        example = {"x": torch.ones(1, 4), "scale": torch.tensor(scale)}
        return pp.scores(model, pp.NTKSAP(data), example_input=example).tensors

    once, twice = found(1), found(2)
    for name in once:
        torch.testing.assert_close(twice[name], 4 * once[name])


@pytest.mark.parametrize("options", [
    {"epsilon": 0.0}, {"epsilon": math.inf}, {"initialisation": "xavier"}, {"batches": 0}, {"batch_size": 0},
    {"rounds": 0},
])  # fmt: skip
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"NTKSAP: {next(iter(options))}: wanted"):
        pp.NTKSAP(**options)
    with pytest.raises(TypeError, match=r"NTKSAP: data: .*read only once"):
        pp.NTKSAP(iter([X]))
    with pytest.raises(ValueError, match="NTKSAP: data: wanted at least one batch"):
        pp.prune(net(), pp.NTKSAP([]), density=0.5, example_input=X)


def test_an_output_that_is_no_tensor():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x), self.layer(x)

    with pytest.raises(ValueError, match=r"NTKSAP: model: wanted a tensor or \.logits as output, got tuple"):
        pp.prune(Pair(), pp.NTKSAP(), density=0.5, example_input=torch.ones(1, 4))
