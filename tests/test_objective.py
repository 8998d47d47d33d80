"""Running the model for data-driven pruners: it is untouched, keeps little, and bad data or losses name the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.modeling_outputs import SequenceClassifierOutput

import pathprune as pp
from data_driven import DATA, X, assert_scores, batches, net


def state_of(model):
    """All that scoring might leave behind."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "bits": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "versions": {name: tensor._version for name, tensor in tensors.items()},
        "wants": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "random": torch.get_rng_state(),
        "enabled": torch.is_grad_enabled(),
    }


def assert_same_state(before, after):
    if isinstance(before, Mapping):
        assert set(before) == set(after)
        for key in before:
            assert_same_state(before[key], after[key])
    elif isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


def mixed_model():
    """Some modules train and some do not; a frozen parameter; gradients waiting."""
    model = net().train()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    model.stem.weight.grad = torch.randn_like(model.stem.weight)
    return model


METHODS = [
    lambda data, loss: pp.SNIP(data, loss, train_mode=True),
    lambda data, loss: pp.FORCE(data, loss, rounds=3),
    lambda data, loss: pp.Fisher(data, loss),
    lambda data, loss: pp.Fisher(data, loss, chunk=1),
    lambda data, loss: pp.Hutchinson(data, loss, probes=2, train_mode=True),
    lambda data, loss: pp.GraSP(data, loss, train_mode=True),
    lambda data, loss: pp.GraSP(data, loss, method="finite_difference"),
]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_untouched_also_after_an_exception(method):
    model = mixed_model()
    loader = DataLoader(TensorDataset(torch.cat([x for x, _ in DATA]), torch.cat([y for _, y in DATA])), 4, True)
    calls = 0

    def failing(output, target):
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("broken loss")
        return F.cross_entropy(output, target)

    network = pp.PathNetwork.from_module(model, X)
    before = state_of(model)
    with torch.no_grad():
        pp.prune(network, method(loader, F.cross_entropy), density=0.2)
    assert_same_state(before, state_of(model))
    with pytest.raises(RuntimeError, match="broken loss"):
        pp.prune(network, method(loader, failing), density=0.2)
    assert_same_state(before, state_of(model))


def test_draws_of_model_and_loader_come_from_the_seed():
    model = net()
    loader = DataLoader(TensorDataset(*batches(16)[0]), 4, shuffle=True)

    def found(seed):
        torch.manual_seed(torch.seed())  # whatever the global state is
        return pp.prune(model, pp.SNIP(loader, train_mode=True), density=0.3, example_input=X, seed=seed)

    first = found(1)
    assert first == found(1)
    assert first != found(2)


def test_frozen_norms_keep_nothing_for_gradients_nobody_asks_for():
    """What autograd saves for the backward pass, against the plain way."""
    torch.manual_seed(0)
    model = nn.Sequential(*[
        layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ], nn.Flatten(), nn.Linear(8 * 64, 3)).eval()  # fmt: skip
    x, y = torch.randn(16, 8, 8, 8), torch.randint(3, (16,))

    def kept(work):
        held = {}

        def pack(tensor):
            held[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            work()
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    network = pp.PathNetwork.from_module(model, x[:1])
    plain = kept(lambda: F.cross_entropy(model(x), y).backward())
    ours = kept(lambda: pp.scores(network, pp.SNIP([(x, y)])))
    assert 0 < ours < 0.65 * plain, (ours, plain)


# ------------------------------------------------------------------------------------------------ outputs and bad input


class Wrapped(nn.Module):
    """Returns what Hugging Face models do."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.model, self.kind = net(), kind

    def forward(self, x, labels=None):
        logits = self.model(x)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return self.kind(logits=logits, **loss)


@pytest.mark.parametrize("kind", [dict, SequenceClassifierOutput])
@pytest.mark.parametrize("own_loss", [False, True])
def test_outputs_with_logits_or_a_loss_of_their_own(kind, own_loss):
    data = [{"x": x, "labels": y} for x, y in DATA] if own_loss else DATA
    found = pp.scores(Wrapped(kind), pp.SNIP(data), example_input=X)
    wanted = pp.scores(net(), pp.SNIP(DATA), example_input=X).tensors
    assert_scores(found, {f"model.{name}": score for name, score in wanted.items()})
    if own_loss:
        with pytest.raises(ValueError, match=r"temperature: wanted batches \(x, y\)"):
            pp.scores(Wrapped(kind), pp.GraSP(data), example_input=X)


UNEVEN = batches(5, 3, 5)


def spoiling(bad):
    """A cross entropy that goes wrong on the batch of three."""

    def loss(output, target):
        made = F.cross_entropy(output, target)
        return bad(made, output) if len(output) == 3 else made

    return loss


ALL = [pp.SNIP, pp.FORCE, pp.Fisher, pp.Hutchinson, pp.GraSP]


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(("data", "loss", "message"), [
    (UNEVEN, spoiling(lambda made, z: z), r"loss: wanted a scalar tensor, got shape \(3, 4\) in batch 1"),
    (UNEVEN, spoiling(lambda made, z: made[None]), r"loss: wanted a scalar tensor, got shape \(1,\) in batch 1"),
    (UNEVEN, spoiling(lambda made, z: 1.0), "loss: wanted a scalar tensor, got float in batch 1"),
    (UNEVEN, spoiling(lambda made, z: made * math.nan), "loss: wanted a finite number, got nan in batch 1"),
    (UNEVEN, spoiling(lambda made, z: made / 0), "loss: wanted a finite number, got inf in batch 1"),
    ([], None, "data: wanted at least one batch, got none"),
    ([*DATA, (X[:0], torch.empty(0))], None, "data: wanted at least one sample in batch 3"),
    ([DATA[0], (X, torch.tensor([4]))], None, r"data: wanted labels in \[0, 4\), got 4 in batch 1"),
    ([(X, torch.tensor([-1]))], None, r"data: wanted labels in \[0, 4\), got -1 in batch 0"),
    ([DATA[0], X], None, r"data: wanted batches \(x, y\), .*got x alone in batch 1"),
    ([DATA[0], X], F.cross_entropy, r"data: wanted batches \(x, y\), got x alone in batch 1"),
    ([DATA[0], (X, torch.tensor([1, 2]))], None, r"data: wanted labels, integers of shape \[1\], .*, got int64 \[2\]"),
    ([(X, torch.tensor([[0.5, 0.5]]))], None, r"data: .* or probabilities of shape \[1, 4\], got float32 \[1, 2\]"),
    ([(X, [1])], None, "data: wanted labels in a tensor, got list in batch 0"),
    ([(X * math.nan, torch.tensor([0]))], None, "data: wanted finite inputs, got NaN or infinite ones in batch 0"),
])  # fmt: skip
def test_bad_data_and_losses_name_the_batch(method, data, loss, message):
    pruner = method(data) if loss is None else method(data, loss)
    with pytest.raises(ValueError, match=f"{method.__name__}: {message}"):
        pp.prune(net(), pruner, density=0.5, example_input=X)


NARROW = X[..., :5], torch.tensor([0])
TAKING_DATA = [*ALL, pp.IterSNIP, pp.PXExact, pp.NTKSAP, pp.Wanda, partial(pp.PX, variant="released"), pp.PX]


@pytest.mark.parametrize("method", TAKING_DATA)
@pytest.mark.parametrize(("batch", "got"), [
    (NARROW, "float64 [1, 2, 6, 5] ("),
    ((X.long(), NARROW[1]), "int64 [1, 2, 6, 6] ("),
    (((X, X), NARROW[1]), "float64 [1, 2, 6, 6], float64 [1, 2, 6, 6] (TypeError"),
    (({"image": X}, NARROW[1]), "float64 [1, 2, 6, 6] (TypeError"),
])  # fmt: skip
def test_batches_that_the_model_does_not_take_are_shown(method, batch, got):
    model, pruner = mixed_model(), method([DATA[0], batch])
    before = state_of(model)
    with pytest.raises(ValueError, match=f"^{pruner.name}: data: wanted .*, got ") as told:
        pp.prune(model, pruner, density=0.5, example_input=X)
    if not isinstance(pruner, pp.PX) or pruner.variant == "released":
        assert (
            f"data: wanted batches that the model takes, such as example_input's float64 [1, 2, 6, 6], got {got}"
            in str(told.value)
        )
        assert told.value.__cause__ is not None
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("method", [pp.SNIP, pp.FORCE, pp.Hutchinson, pp.GraSP])
def test_a_loss_that_does_not_depend_on_the_weights(method):
    pruner = method(DATA, lambda output, target: output.detach().mean())
    with pytest.raises(ValueError, match="loss: wanted one that depends on the weights, got a constant in batch 0"):
        pp.prune(net(), pruner, density=0.5, example_input=X)


def test_ignored_labels_and_probabilities_are_targets_too():
    (x, y), model = DATA[0], net()
    some = torch.where(torch.arange(5) < 3, y, -100)
    ignored = pp.scores(model, pp.SNIP([(x, some)]), example_input=X)
    assert_scores(ignored, pp.scores(model, pp.SNIP([(x[:3], y[:3])]), example_input=X).tensors)
    certain = pp.scores(model, pp.SNIP([(x, F.one_hot(y, 4).double())]), example_input=X)
    assert_scores(certain, pp.scores(model, pp.SNIP([(x, y)]), example_input=X).tensors)


def test_bad_arguments():
    for method in ALL:
        with pytest.raises(TypeError, match=f"{method.__name__}: data: .*read only once"):
            method(iter(DATA))
        with pytest.raises(TypeError, match=f"{method.__name__}: data: .*got a tensor"):
            method(X)
    for make, message in (
        (lambda: pp.Fisher(DATA, train_mode=True), "Fisher: train_mode"),
        (lambda: pp.Fisher(DATA, chunk=0), "Fisher: chunk"),
        (lambda: pp.Hutchinson(DATA, probes=0), "Hutchinson: probes"),
        (lambda: pp.SNIP(DATA, rounds=0), "SNIP: rounds"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    built = pp.PathNetwork()
    flow = built.add_synapse(built.add_input(1, 4), torch.randn(3, 4), "w")
    built.set_outputs(flow)
    for pruner in (*(method(DATA) for method in ALL), pp.NTKSAP()):
        with pytest.raises(ValueError, match=f"{pruner.name}: model: wanted a module, .*built by hand"):
            pp.prune(built, pruner, density=0.5)
    for pruner in (pp.SNIP(DATA), pp.NTKSAP()):
        with pytest.raises(ValueError, match=f"{pruner.name}: model: .*got nn.DataParallel: prune .module"):
            pp.prune(nn.DataParallel(net()), pruner, density=0.5, example_input=X)
    with pytest.raises(ValueError, match=r"wanted logits \[n, classes, ...\] for cross entropy, got shape \(3,\)"):
        pp.scores(nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)), pp.SNIP([(torch.ones(3, 2), torch.ones(3))]),
                  example_input=torch.ones(1, 2))  # fmt: skip


def test_making_a_pruner_draws_nothing():
    loader = DataLoader(TensorDataset(*DATA[0]), 2, shuffle=True)
    before = torch.get_rng_state()
    pp.SNIP(loader)
    assert torch.equal(before, torch.get_rng_state())
