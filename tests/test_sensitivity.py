"""SNIP, IterSNIP, FORCE, Fisher and Hutchinson: against autograd and literal loops in float64."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pathprune as pp
from data_driven import DATA, PRUNABLE, X, assert_same, assert_scores, batches, net


def published_gradients(model, data, masks=None, train=False):
    """dL/dm for mask parameters that multiply the weights, batches summed: a copy of the model per call, as usual."""
    copied = copy.deepcopy(model).train(train)
    weights = {name: p.detach() for name, p in copied.named_parameters()}
    factors = {name: torch.ones_like(weights[name]) if masks is None else masks[name].double() for name in PRUNABLE}
    for factor in factors.values():
        factor.requires_grad_()
    for x, y in data:
        values = {**weights, **{name: weights[name] * factors[name] for name in PRUNABLE}}
        F.cross_entropy(torch.func.functional_call(copied, values, (x,)), y).backward()
    return {name: factor.grad for name, factor in factors.items()}


def kept_by(scores, keep, live=None):
    """The largest ``keep`` of all scores, by sorting."""
    flat = torch.cat([scores[name].flatten() for name in scores])
    if live is not None:
        flat = flat.masked_fill(~torch.cat([live[name].flatten() for name in scores]), -math.inf)
    kept = torch.zeros(flat.shape, dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:keep]] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


@pytest.mark.parametrize("train", [False, True])
def test_snip_is_the_published_rule(train):
    model = net()
    model.drop.p = 0.0  # the one thing a published run draws
    wanted = {name: slope.abs() for name, slope in published_gradients(model, DATA, train=train).items()}
    found = pp.scores(model, pp.SNIP(DATA, train_mode=train), example_input=X)
    assert_scores(found, {name: score / len(DATA) for name, score in wanted.items()})
    for density in (0.5, 0.05):
        masks = pp.prune(model, pp.SNIP(DATA, train_mode=train), density=density, example_input=X)
        assert_same(masks, kept_by(wanted, round(density * masks.total)))


def test_batch_statistics_are_not_the_default():
    evaluated, trained = (pp.scores(net(), pp.SNIP(DATA, train_mode=t), example_input=X) for t in (False, True))
    assert not torch.allclose(evaluated.tensors["stem.weight"], trained.tensors["stem.weight"], rtol=0.1)
    present = pp.scores(net().train(), pp.SNIP(DATA), example_input=X)  # whatever mode the model is in
    assert torch.equal(present.tensors["stem.weight"], evaluated.tensors["stem.weight"])


def test_sbp_is_snip_under_its_own_name():
    snip, sbp = (pp.prune(net(), method(DATA), density=0.1, example_input=X) for method in (pp.SNIP, pp.SBP))
    assert_same(sbp, snip)
    assert sbp.metadata["method"] == "SBP" and sbp.metadata["config"]["loss"] == "cross_entropy"


@pytest.mark.parametrize("method", [pp.SNIP, pp.Fisher, pp.GraSP])
def test_every_sample_counts_alike_however_it_is_batched(method):
    (x, y), model = batches(12)[0], net()
    whole = pp.scores(model, method([(x, y)]), example_input=X)
    pieces = list(zip(x.split([7, 1, 4]), y.split([7, 1, 4]), strict=True))
    assert_scores(pp.scores(model, method(pieces), example_input=X), whole.tensors)


def looped(model, density, rounds, regrow):
    """The rounds of IterSNIP and FORCE, sorted; returns the masks of every round."""
    masks, history = None, []
    total = sum(model.get_parameter(name).numel() for name in PRUNABLE)
    for r in range(1, rounds + 1):
        scores = {name: slope.abs() for name, slope in published_gradients(model, DATA, masks).items()}
        masks = kept_by(scores, round(total * density ** (r / rounds)), None if regrow else masks)
        history.append(masks)
    return history


@pytest.mark.parametrize(("method", "regrow"), [(pp.IterSNIP, False), (pp.FORCE, True)])
def test_rounds_are_those_of_the_papers(method, regrow):
    model = net()
    wanted = looped(model, 0.1, 6, regrow)
    steps = itertools.pairwise(wanted)
    returned = sum(int((after[name] & ~before[name]).sum()) for before, after in steps for name in PRUNABLE)
    assert (returned > 0) == regrow
    assert_same(pp.prune(model, method(DATA, rounds=6), density=0.1, example_input=X), wanted[-1])
    stops = pp.prune(model, method(DATA, rounds=6), density=[0.1 ** (r / 6) for r in range(1, 7)], example_input=X)
    for found, expected in zip(stops, wanted, strict=True):
        assert_same(found, expected)


def test_regrowth_is_the_whole_difference_of_iterative_snip_and_force():
    run = {"density": 0.1, "example_input": X}
    snip, force = pp.IterSNIP(DATA, rounds=6), pp.FORCE(DATA, rounds=6)
    assert_same(pp.prune(net(), force, allow_regrowth=False, **run), pp.prune(net(), snip, **run))
    assert_same(pp.prune(net(), snip, allow_regrowth=True, **run), pp.prune(net(), force, **run))
    assert pp.prune(net(), snip, **run) != pp.prune(net(), force, **run)
    assert pp.Sketch(force).regrows and not pp.Sketch(snip).regrows


class _Branching(nn.Module):
    """Looks at a value, which a map over samples has none of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        out = self.layer(x)
        return out if not torch.compiler.is_exporting() and out.sum().item() > 9e9 else -out


def test_fisher_says_how_to_run_what_cannot_be_mapped_over_samples():
    model, x = _Branching(), torch.randn(5, 4)
    data = [(x, torch.arange(5) % 3)]
    with pytest.raises(
        ValueError, match=r"^Fisher: chunk: wanted 1 for a model that torch.func.vmap cannot run \(vmap"
    ):
        pp.prune(model, pp.Fisher(data), density=0.5, example_input=x)
    assert pp.prune(model, pp.Fisher(data, chunk=1), density=0.5, example_input=x).kept == 6


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_fisher_is_the_literal_loop_over_samples(chunk):
    model = net()
    wanted = {name: torch.zeros_like(model.get_parameter(name)) for name in PRUNABLE}
    for x, y in DATA:
        for k in range(len(x)):
            for name, slope in published_gradients(model, [(x[k : k + 1], y[k : k + 1])]).items():
                wanted[name] += slope**2 / 15  # (w dL/dw)^2
    assert_scores(pp.scores(model, pp.Fisher(DATA, chunk=chunk), example_input=X), wanted)
    assert not torch.allclose(wanted["head.weight"], published_gradients(model, DATA)["head.weight"] ** 2 / 9)


def quadratic():
    """A linear layer and a loss that is w H w / 2 of its weights, with H known."""
    torch.manual_seed(3)
    model, half = nn.Linear(5, 2, bias=False).double(), torch.randn(10, 10).double()
    hessian = half + half.T
    data = [(torch.eye(5).double(), torch.zeros(5))] * 2  # the output is the weight, transposed

    def loss(output, _):
        flat = output.T.reshape(-1)
        return flat @ hessian @ flat / 2

    return model, hessian, data, loss


def test_hutchinson_is_unbiased_with_the_variance_it_states():
    model, hessian, data, loss = quadratic()
    network = pp.PathNetwork.from_module(model, torch.ones(1, 5).double())
    pruner, draws = pp.Hutchinson(data, loss, probes=3), 400
    w = model.weight.detach()
    samples = torch.stack([pp.scores(network, pruner, seed=s).tensors["weight"] for s in range(draws)])
    diagonals = (2 * samples / w**2).flatten(1)
    off = hessian.square().sum(1) - hessian.diagonal() ** 2
    variance = off / (3 * len(data))
    assert bool(((diagonals.mean(0) - hessian.diagonal()).abs() < 4.5 * (variance / draws).sqrt()).all())
    torch.testing.assert_close(diagonals.var(0), variance, rtol=0.4, atol=0)
    assert bool((hessian.diagonal() < 0).any())  # signed scores


def test_hutchinson_of_a_diagonal_hessian_is_exact():
    model, x = nn.Linear(4, 3, bias=False).double(), torch.eye(4).double() * torch.tensor([1.0, 2.0, 0.5, 3.0])
    pruner = pp.Hutchinson([(x, torch.zeros(4, 3).double())], nn.MSELoss(), probes=1)
    found = pp.scores(model, pruner, example_input=x[:1])
    wanted = model.weight.detach() ** 2 * x.diagonal() ** 2 / 12  # MSE: H = 2 x^2 / 12, halved by OBD
    assert_scores(found, {"weight": wanted})


def test_hessian_is_that_of_the_weights_that_are_left():
    """With one weight left of a quadratic, z (H z) has no noise from the others."""
    model, hessian, data, loss = quadratic()
    only = torch.zeros(2, 5, dtype=torch.bool)
    only[1, 2] = True
    masks = pp.Masks({"weight": only})
    found = pp.scores(model, pp.Hutchinson(data, loss, probes=1), example_input=torch.ones(1, 5).double(), masks=masks)
    score = 0.5 * hessian[7, 7] * model.weight.detach()[1, 2] ** 2
    torch.testing.assert_close(found.tensors["weight"], torch.where(only, score, 0.0))


class Tied(nn.Module):
    """One weight used twice, once by a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def test_uses_of_a_tied_weight_add_up():
    torch.manual_seed(0)
    model, x, y = Tied(), torch.randn(8, 6), torch.randint(3, (8,))
    F.cross_entropy(model(x), y).backward()
    wanted = {name: (p * p.grad).abs().detach() for name, p in model.named_parameters() if name.endswith("weight")}
    assert set(wanted) == {"first.weight", "head.weight"}
    model.zero_grad()
    found = pp.scores(model, pp.SNIP([(x, y)]), example_input=x[:1])
    assert_scores(found, wanted, rtol=1e-5)


def test_low_precision_sums_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()
    x, y = torch.randn(600, 8).bfloat16(), torch.randint(4, (600,))
    one_by_one = list(zip(x.split(1), y.split(1), strict=True))
    found = pp.scores(model, pp.SNIP(one_by_one), example_input=x[:1]).tensors["0.weight"]
    wanted = pp.scores(model.float(), pp.SNIP([(x.float(), y)]), example_input=x[:1].float()).tensors["0.weight"]
    assert found.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_a_weight_the_loss_does_not_see_scores_zero():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return torch.cat([self.left(x), self.right(x)], 1)

    def loss(output, target):
        return F.cross_entropy(output[:, :2], target)

    x = torch.randn(5, 4)
    for method in (pp.SNIP, pp.Fisher, pp.GraSP, pp.Hutchinson):
        found = pp.scores(Split(), method([(x, torch.tensor([0, 1, 1, 0, 1]))], loss), example_input=x)
        assert bool((found.tensors["right.weight"] == 0).all()) and bool((found.tensors["left.weight"] != 0).any())


def test_excluded_weights_are_whole_and_get_no_gradient():
    model, seen = net(), []

    def loss(output, target):
        seen.append(output)
        return F.cross_entropy(output, target)

    pp.prune(model, pp.IterSNIP(DATA, loss, rounds=2), density=0.1, example_input=X, include="head.weight")
    head = seen[-1].grad_fn
    assert "Addmm" in type(head).__name__
    assert [f[0] is not None for f in head.next_functions] == [False, False, True]  # bias, input, weight
