"""What a network holds: tied, unreached and odd weights; reports of support; large models; builders."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.pytorch_utils import Conv1D

import pathprune as pp
from path_scores import assert_scores_close, path_scores, randomised
from pathprune.network import PathNetwork
from pathprune.nodes import Norm, Pool, Reduce, Synapse
from pathprune.ops import WeightMap
from positive import Plus, Times, positive_scores
from test_network import IMAGE, Calls, casts, convnet


@pytest.fixture(autouse=True)
def _one_thread():
    """Nets this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------- tied, unreached and odd weights


class Tied(nn.Module):
    """One weight used by two layers of its own: as one module, one parameter or one memory."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(4, n, dtype=torch.float64) for n in (4, 4, 2))
        if how == "module":
            self.second = self.first
        elif how == "parameter":
            self.second.weight = self.first.weight
        elif how == "memory":
            self.second.weight = nn.Parameter(self.first.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.mark.parametrize("how", ["module", "parameter", "memory"])
@pytest.mark.parametrize("f", [WeightMap.ABS, WeightMap.SQUARE])
def test_tied_weights_are_one_parameter(how, f):
    model = randomised(Tied(how))
    network = PathNetwork.from_module(model, torch.ones(1, 4).double())
    assert network.prunable == ("first.weight", "head.weight")
    assert network.unreached == ()
    power = {WeightMap.ABS: 1, WeightMap.SQUARE: 2}[f]
    u, head = (w.detach().abs().pow(power).requires_grad_() for w in (model.first.weight, model.head.weight))
    biases = [layer.bias.detach().abs().pow(power) for layer in (model.first, model.second, model.head)]
    h = torch.ones(4).double()
    for weight, bias in zip((u, u, head), biases, strict=True):
        h = weight @ h + bias
    gradients = torch.autograd.grad(h.sum(), (u, head))
    total, got = path_scores(network, f)
    assert float(total) == pytest.approx(math.log2(h.sum().item()), abs=1e-12)
    wanted = {"first.weight": u * gradients[0], "head.weight": head * gradients[1]}
    assert_scores_close(got, {name: score.detach() for name, score in wanted.items()})


class Shared(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, turned; convolutions likewise."""

    def __init__(self, convolutional: bool) -> None:
        super().__init__()
        self.convolutional = convolutional
        self.inner = nn.Conv2d(2, 3, 3, bias=False) if convolutional else nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.inner(x))
        if self.convolutional:
            return F.conv_transpose2d(hidden, self.inner.weight)
        return F.linear(hidden, self.inner.weight.t())


@pytest.mark.parametrize("convolutional", [False, True])
def test_a_weight_used_forwards_and_turned(convolutional):
    model = randomised(Shared(convolutional))
    x = torch.ones(1, 2, 6, 5).double() if convolutional else torch.ones(1, 5).double()
    twin = copy.deepcopy(model)
    twin.inner.weight.data.abs_()
    total_wanted = twin(x).sum()
    (gradient,) = torch.autograd.grad(total_wanted, twin.inner.weight)
    total, got = path_scores(PathNetwork.from_module(model, x))
    assert float(total) == pytest.approx(math.log2(total_wanted.item()), abs=1e-12)
    assert_scores_close(got, {"inner.weight": (gradient * twin.inner.weight).detach()})


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embedding(tokens)))


def test_a_head_tied_to_an_embedding_carries_flow_but_is_not_prunable():
    model = randomised(Language())
    network = PathNetwork.from_module(model, torch.tensor([[1, 2, 3]]))
    assert network.prunable == ("hidden.weight",)
    assert network.unreached == ()
    plain = nn.Sequential(model.hidden, model.head)
    wanted_total, wanted = positive_scores(plain, [torch.ones(1, 3, 4)], 1.0, "published")
    total, got = path_scores(network)
    assert float(total) == pytest.approx(math.log2(wanted_total), abs=1e-12)
    assert_scores_close(got, {"hidden.weight": wanted["0.weight"]})


def test_a_weight_that_is_a_buffer_carries_flow_but_is_not_prunable():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3, bias=False)
            self.register_buffer("kernel", torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.a(x), self.kernel)

    model = randomised(Fixed())
    network = PathNetwork.from_module(model, torch.ones(1, 4).double())
    assert network.prunable == ("a.weight",)
    _, got = path_scores(network)
    wanted = model.a.weight.detach().abs() * model.kernel.abs().sum(0)[:, None]
    assert_scores_close(got, {"a.weight": wanted})


class DeadEnds(nn.Module):
    """Layers that no output sees: computed and dropped, never called, of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dropped, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(1, 1, 1)
        self.foreign, self.head = Conv1D(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.used(x)
        self.foreign(torch.relu(self.dropped(h)))
        return self.head(h)


def test_unreached_weights_are_found():
    network = PathNetwork.from_module(DeadEnds(), torch.ones(1, 4))
    assert network.prunable == ("used.weight", "head.weight")
    assert network.unreached == ("dropped.weight", "never.weight", "foreign.weight")
    masks = pp.prune(network, pp.SynFlow(rounds=2), density=0.5)
    assert masks.metadata["findings"]["unreached"] == ["dropped.weight", "never.weight", "foreign.weight"]
    assert list(masks) == ["used.weight", "head.weight"]


@pytest.mark.parametrize("layout", ["transposed view", "slice of a larger tensor", "channels last"])
def test_weights_of_any_memory_layout(layout):
    model = randomised(convnet())
    x = IMAGE.double()
    total, wanted = path_scores(PathNetwork.from_module(model, x))
    other = copy.deepcopy(model)
    if layout == "channels last":
        other = other.to(memory_format=torch.channels_last)
        assert not other[0].weight.is_contiguous()
    elif layout == "transposed view":
        other[6].weight = nn.Parameter(other[6].weight.detach().t().contiguous().t())
    else:
        room = torch.zeros(7, 40).double()
        room[1:6, 2:38] = other[6].weight.detach()
        other[6].weight = nn.Parameter(room[1:6, 2:38])
    got_total, got = path_scores(PathNetwork.from_module(other, x))
    assert float(got_total - total) == pytest.approx(0.0, abs=1e-12)
    assert_scores_close(got, wanted)


# -------------------------------------------------------------------------- reports, large models, builders


def test_support_report_lists_operators_rules_and_modules():
    report = PathNetwork.support_report(convnet(), IMAGE)
    assert bool(report)
    assert report.missing() == []
    rules = {name: rule for name, (rule, _) in report.rows.items()}
    wanted = {
        "conv2d": "conv",
        "batch_norm": "batch_norm",
        "relu": "gate",
        "dropout": "identity",
        "flatten": "reshape",
    }
    assert rules == {**wanted, "max_pool2d": "pool", "linear": "linear"}
    assert report.rows["conv2d"][1] == ["'0' (Conv2d)"]
    assert (
        len({line.index(" x  '") for line in str(report).splitlines()[1:]}) == 1
    )  # columns, whatever a rule is called


def test_support_report_flags_all_that_is_missing_at_once():
    model = nn.Sequential(
        *(nn.Linear(4, 4), Calls(lambda m, x: torch.sin(x)), nn.Softmax(1), nn.ReLU()),
        *(Calls(lambda m, x: torch.cumprod(x, 1)), Calls(casts)),
    )
    report = PathNetwork.support_report(model, torch.ones(1, 4))
    assert not report
    assert report.missing() == ["cumprod", "sin", "wrap_with_autocast"]
    text = str(report)
    assert "3 without a rule" in text.splitlines()[0]
    assert "'1' (Calls)" in text
    assert text.splitlines()[1].split()[1] == "none"  # what is missing comes first


def test_an_unmodified_hugging_face_resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck", num_labels=3)
    model = randomised(ResNetForImageClassification(config))
    network = PathNetwork.from_module(model, {"pixel_values": torch.ones(1, 3, 32, 32).double()})
    weights = [name for name, p in model.named_parameters() if p.dim() > 1]
    assert list(network.prunable) == weights
    assert network.unreached == ()
    assert sum(isinstance(node, Pool) for node in network.nodes) == 1
    assert sum(isinstance(node, Reduce) for node in network.nodes) == 1
    for policy in ("published", "paths"):

        class Logits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> Tensor:
                return self.model(x).logits

        twin = _without_activations(Logits())
        wanted_total, wanted = positive_scores(twin, [torch.ones(1, 3, 32, 32)], 1.0, policy)
        total, got = path_scores(network, WeightMap.ABS, policy)
        assert float(total) == pytest.approx(math.log2(wanted_total), abs=1e-11)
        assert_scores_close(got, {name.removeprefix("model."): score for name, score in wanted.items()})


def _without_activations(model: nn.Module) -> nn.Module:
    """The same modules, activations of classes of its own library replaced by the identity."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, child in module.named_children():
            if type(child).__module__.startswith("transformers.activations"):
                setattr(module, name, nn.Identity())
    return twin


def test_networks_built_by_hand_equal_the_module():
    model = randomised(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)))
    head = randomised(nn.Linear(5, 3))
    upward = randomised(nn.ConvTranspose2d(8, 2, 2, stride=2))
    factor, token = torch.rand(8, 1, 1).double(), torch.rand(1, 8, 6, 5).double()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.upward = model, head, upward
            self.times, self.plus = Times(factor), Plus(token)

        def forward(self, x: Tensor) -> Tensor:
            first = self.body[1](self.body[0](x))
            h = self.plus(self.times(torch.cat([first, first + self.body[2](first)], 1)))
            return self.upward(self.head(h))

    x = torch.ones(1, 2, 6, 5).double()
    read = PathNetwork.from_module(Model().eval(), x)
    built = PathNetwork()
    first = built.add_synapse(
        *(built.add_input(1, 2, 6, 5), model[0].weight, "body.0.weight", model[0].bias),
        form="conv",
        padding=1,
        groups=2,
    )
    first = built.add_gate(first)
    second = built.add_synapse(first, model[2].weight, "body.2.weight", model[2].bias, form="conv", padding=(1, 1))
    joined = built.add_cat(first, built.add_sum(first, second))
    joined = built.add_sum(built.add_scale(joined, factor), built.add_constant(token))
    flow = built.add_synapse(joined, head.weight, "head.weight", head.bias)
    built.set_outputs(
        built.add_synapse(flow, upward.weight, "upward.weight", upward.bias, form="conv_transpose", stride=2)
    )
    for f in (WeightMap.ABS, WeightMap.SQUARE, WeightMap.ONE):
        for policy in ("published", "paths"):
            total, wanted = path_scores(read, f, policy)
            got_total, got = path_scores(built, f, policy)
            assert float(got_total - total) == pytest.approx(0.0, abs=1e-12)
            assert_scores_close({name: got[name] for name in wanted}, wanted)
    masks = pp.prune(built, pp.SynFlow(rounds=3), density=0.25)
    assert masks == pp.prune(read, pp.SynFlow(rounds=3), density=0.25)


def test_builder_refuses_what_makes_no_sense():
    network = PathNetwork()
    flow = network.add_input(1, 4)
    with pytest.raises(ValueError, match="PathNetwork: flow: wanted the index of a node, 0 to 0, got 5"):
        network.add_sum(flow, 5)
    with pytest.raises(ValueError, match="wanted the index of a node, 0 to 0, got -1"):
        network.add_gate(-1)
    with pytest.raises(ValueError, match=r"add_synapse: options: wanted .* got \['strides'\]"):
        network.add_synapse(flow, torch.ones(2, 4), "w", strides=2)
    with pytest.raises(ValueError, match="wanted a PathNetwork with outputs"):
        pp.prune(network, pp.SynFlow(), density=0.5)


def test_wires_built_by_hand():
    network = PathNetwork()
    weight = torch.randn(3, 4).double()
    flow = network.add_wire([network.add_input(1, 2, 2)], lambda xs, power: xs[0].reshape(1, 4))
    network.set_outputs(network.add_synapse(flow, weight, "w"))
    assert network.nodes[flow].shape == (1, 4)
    total, got = path_scores(network)
    assert float(total) == pytest.approx(math.log2(float(weight.abs().sum())), abs=1e-12)
    assert_scores_close(got, {"w": weight.abs()})


def test_modules_and_nodes_say_where_they_come_from():
    network = PathNetwork.from_module(nn.Sequential(convnet(), nn.Sequential(nn.LayerNorm(5))), IMAGE)
    synapses = [node for node in network.nodes if isinstance(node, Synapse)]
    assert [node.where for node in synapses] == ["'0.0' (Conv2d) (conv2d)", "'0.6' (Linear) (linear)"]
    (norm,) = (node for node in network.nodes if isinstance(node, Norm))
    assert norm.where == "'1.0' (LayerNorm) (layer_norm)"
    assert "2 prunable tensors, 288 weights" in repr(network)
