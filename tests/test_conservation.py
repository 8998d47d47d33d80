"""Theorems of path sums: every cut carries R, R is affine in each weight, rescaled units change nothing."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import pathprune as pp
from path_scores import POWER, path_scores
from pathprune import models
from pathprune.flow import PathFlow
from pathprune.network import PathNetwork
from pathprune.nodes import Constant, Gate, Input, Shift, Softmax, Synapse
from pathprune.ops import WeightMap
from pathprune.policy import policy_of
from pathprune.spatial import merge_equal_positions
from pathprune.weights import weights_of
from test_flow import Mixed
from test_rules_wires import SqueezeExcite, WithConstantPart, Words
from test_transformers import MODELS, tiny


@pytest.fixture(autouse=True)
def _one_thread():
    """Nets this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hugging_face_resnet(kind: str) -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [1, 2, 1], "num_labels": 4}
    return ResNetForImageClassification(ResNetConfig(layer_type=kind, **sizes))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (models.resnet20, (1, 3, 16, 16)),
    "resnet, padded shortcut": (lambda: models.resnet20(shortcut="A"), (1, 3, 16, 16)),
    "pre-activation resnet": (lambda: models.wide_resnet(10, 1), (1, 3, 16, 16)),
    "vgg": (lambda: models.vgg_bn(11), (1, 3, 32, 32)),
    "mobilenet": (models.mobilenet_tiny, (1, 3, 32, 32)),
    "densenet": (models.densenet_tiny, (1, 3, 16, 16)),
    "unet": (models.unet_tiny, (1, 1, 8, 8)),
    "hugging face resnet": (lambda: hugging_face_resnet("basic"), (1, 3, 33, 30)),
    "hugging face bottleneck resnet": (lambda: hugging_face_resnet("bottleneck"), (1, 3, 33, 30)),
    "squeeze and excite": (lambda: SqueezeExcite(False), (1, 2, 6, 5)),
    "norms and product": (Mixed, (1, 2, 4, 4)),
    "class token": (WithConstantPart, (1, 6, 5)),
    "words": (Words, (1, 3)),
}


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64; biases, norms and running statistics drawn around where training takes them; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and (tensor.dim() == 1 or name == "token"):
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            is_scale = name.endswith(("weight", "running_var"))
            tensor.data.copy_(drawn.abs() + 0.5 if is_scale else 0.3 * drawn)
    return model


@functools.cache
def read(net: str) -> PathNetwork:
    torch.manual_seed(0)
    build, shape = NETS[net]
    example = torch.ones(shape, dtype=torch.int64) if net == "words" else torch.ones(shape).double()
    return PathNetwork.from_module(lively(build()), example)


@functools.cache
def read_transformer(name: str) -> PathNetwork:
    model, inputs = tiny(name)
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    return PathNetwork.from_module(lively(copy.deepcopy(model)), inputs)


# -------------------------------------------------------------------------------------- every cut carries R


def with_taps(network: PathNetwork) -> tuple[PathNetwork, list[tuple[int, int, float]]]:
    """The network with an identity on every edge; its index, where the edge begins, and where it ends."""
    tapped = copy.copy(network)
    tapped.nodes = []
    moved: dict[int, int] = {}
    taps = []

    def tap(k: int, end: float) -> int:
        if isinstance(network.nodes[k], Softmax):  # is told from other factors by standing before the product
            taps.append((moved[k], k, end))
        else:
            taps.append((tapped.add(Gate((moved[k],), network.nodes[k].shape, name="tap")), k, end))
        return taps[-1][0]

    for k, node in enumerate(network.nodes):
        if k in network.alive:
            inputs = tuple(tap(i, k) for i in node.inputs)
            moved[k] = tapped.add(replace(node, inputs=inputs))
    return tapped.set_outputs(*(tap(k, math.inf) for k in network.outputs)), taps


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("policy", "attention"), [("paths", "budget"), ("published", "half")])
def test_every_cut_of_a_transformer_carries_the_sum_over_all_paths(name, policy, attention):
    assert_every_cut_carries_all(read_transformer(name), policy, WeightMap.ABS, attention=attention)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("policy", ["paths", "published"])
@pytest.mark.parametrize("f", [WeightMap.ABS, WeightMap.SQUARE])
def test_every_cut_carries_the_sum_over_all_paths(net, policy, f):
    assert_every_cut_carries_all(read(net), policy, f)


def assert_every_cut_carries_all(network, policy, f, **choices):
    tapped, taps = with_taps(network)
    weights = weights_of(tapped, tapped.prunable, (f, f))
    flow = PathFlow(tapped, weights, f=f, policy=policy_of(policy, **choices))
    flow.keep_flows = True
    total = float(flow.forward()[0])
    assert math.isfinite(total)
    flow.backward()

    def share(k: int, forward: Tensor | None = None) -> float:
        """What flows through a node, as a share of R."""
        a, g = flow.values[k], flow.backward_flows[k]
        exponent = float(a.exponent + g.exponent) if forward is None else float(g.exponent)
        amount = float(((a.tensor if forward is None else forward) * g.tensor).sum())
        return amount * 2 ** (exponent - total) if amount else 0.0

    edges = [(begin, end, share(k)) for k, begin, end in taps]
    begun: dict[int, float] = {}  # where paths begin -> their share
    moved = {new: old for old, new in zip(sorted(network.alive), _untapped(tapped), strict=True)}
    for new, k in moved.items():
        node = network.nodes[k]
        if isinstance(node, Input):
            begun[k] = share(new)
        elif isinstance(node, (Shift, Constant)) and policy == "published":
            value = node.value(network.tensors).detach().abs() ** POWER[f]
            begun[k] = share(new, value.expand(node.shape))
    assert sum(begun.values()) == pytest.approx(1.0, abs=1e-9)
    if policy == "paths":
        assert all(isinstance(network.nodes[k], Input) for k in begun)
    for cut in sorted(network.alive):
        crossing = sum(amount for begin, end, amount in edges if begin <= cut < end)
        later = sum(amount for k, amount in begun.items() if k > cut)
        assert crossing + later == pytest.approx(1.0, abs=1e-9), f"after {network.nodes[cut]}"
    used: dict[str, float] = {}  # what enters all uses of a weight
    for new, k in moved.items():
        node = network.nodes[k]
        if isinstance(node, Synapse) and node.weight in network.prunable:
            (entering,) = (amount for _, end, amount in edges if end == k)
            assert share(new) == pytest.approx(entering, rel=1e-9)
            used[node.weight] = used.get(node.weight, 0.0) + entering
    for name, entering in used.items():  # is what its scores sum to
        made = weights[name].written_scores()
        assert float(made.weight.sum()) * 2 ** (made.exponent - total) == pytest.approx(entering, rel=1e-9)


def _untapped(tapped: PathNetwork) -> Iterator[int]:
    return (k for k, node in enumerate(tapped.nodes) if not (isinstance(node, Gate) and node.name == "tap"))


# ---------------------------------------------------------------------------------- affine in every weight


@pytest.mark.parametrize("net", ["resnet", "mobilenet", "densenet", "unet", "hugging face bottleneck resnet"])
@pytest.mark.parametrize("f", [WeightMap.ABS, WeightMap.SQUARE])
def test_a_score_is_what_the_sum_loses_without_its_weight(net, f):
    network = merge_equal_positions(read(net))
    total, scores = path_scores(network, f, "paths")
    generator = torch.Generator().manual_seed(0)
    for name in network.prunable[:: max(1, len(network.prunable) // 3)]:
        tensor = network.tensors[name].detach()
        live = (scores[name].flatten() > 1e-9 * 2 ** float(total)).nonzero().flatten()
        which = live[torch.randint(len(live), (1,), generator=generator)]
        found = []
        for factor in (0.0, 1.0, 3.0):  # of u = f(w)
            other = copy.copy(network)
            changed = tensor.clone()
            changed.view(-1)[which] *= factor ** (1 / POWER[f])
            other.tensors = {**network.tensors, name: changed}
            found.append(float(path_scores(other, f, "paths")[0] - total))
        without, same, tripled = (2**value for value in found)
        share = float(scores[name].view(-1)[which]) / 2 ** float(total)
        assert same == 1.0
        assert 1.0 - without == pytest.approx(share, rel=1e-6, abs=1e-12)
        assert tripled - without == pytest.approx(3 * (1.0 - without), rel=1e-6, abs=1e-12)
        mask = torch.ones(tensor.shape, dtype=torch.bool)
        mask.view(-1)[which] = False
        masked = float(path_scores(network, f, "paths", masks={name: mask})[0] - total)
        assert masked == pytest.approx(found[0], abs=1e-12)


# ----------------------------------------------------------------------------------------- scale invariance


def plain_convnet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 5, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(20, 6, bias=False), nn.ReLU()),
        nn.Linear(6, 3, bias=False),
    )


def rescaled(model: nn.Sequential) -> nn.Sequential:
    """The same function: a factor on what enters each hidden unit, divided out of what leaves it."""
    generator = torch.Generator().manual_seed(5)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for before, after in ((0, 3), (3, 6), (6, 8)):
            u, w = model[before].weight, model[after].weight
            factor = torch.exp(2 * torch.randn(u.shape[0], generator=generator, dtype=torch.float64))
            u *= factor.reshape(-1, *[1] * (u.dim() - 1))
            spread = factor.repeat_interleave(w.shape[1] // len(factor))
            w /= spread.reshape(1, -1, *[1] * (w.dim() - 2))
    return model


@pytest.mark.parametrize(
    ("pruner", "invariant"),
    [
        (pp.SynFlow(), True),
        (pp.SynFlow(policy="paths"), True),
        (pp.SynFlowL2(), True),
        (pp.SynFlowL2(policy="paths"), True),
        (pp.SynFlowL2(variant="phew"), False),
        (pp.SynFlowL2(variant="author"), False),
        (pp.Magnitude(), False),
    ],
    ids=str,
)
def test_scores_of_rescaled_units(pruner, invariant):
    torch.manual_seed(0)
    model = plain_convnet().double()
    x = torch.ones(1, 2, 8, 8).double()
    other = rescaled(model)
    torch.testing.assert_close(other(x), model(x))
    found, found_other = (pp.scores(net, pruner, example_input=x) for net in (model, other))
    same = [torch.allclose(found.double(name), found_other.double(name), rtol=1e-9, atol=0.0) for name in found.tensors]
    assert all(same) if invariant else not any(same)
    if invariant:
        assert found.log2_R == pytest.approx(found_other.log2_R, abs=1e-11)


# ------------------------------------------------------------------------------- the published code's scores


@pytest.mark.parametrize("net", ["resnet", "vgg", "densenet", "unet", "hugging face resnet"])
def test_policy_published_is_the_published_loop_at_initialisation(net):
    build, shape = NETS[net]
    torch.manual_seed(0)
    model = build().double().eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    network = PathNetwork.from_module(model, torch.ones(shape).double())
    total, got = path_scores(network, WeightMap.ABS, "published")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.abs_()
    out = twin(torch.ones(shape).double())
    reached = (out.logits if hasattr(out, "logits") else out).sum()
    reached.backward()
    assert float(total) == pytest.approx(math.log2(reached.item()), abs=1e-10)
    for name, p in twin.named_parameters():
        if name in got:
            wanted = (p * p.grad).detach()
            torch.testing.assert_close(got[name], wanted, rtol=1e-9, atol=1e-12 * float(wanted.max()))


# -------------------------------------------------------------------------------------- the range of numbers


def deep(scale: float, kind: str, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    layers: list[nn.Module] = []
    for _ in range(60):
        layers += [nn.Linear(6, 6, bias=False) if kind == "linear" else nn.Conv2d(6, 6, 3, padding=1, bias=False)]
        layers += [nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    for p in model.parameters():
        p.data = (torch.randn(p.shape, generator=generator) * scale).to(torch.float32).to(dtype)
    return model


@pytest.mark.parametrize("f", [WeightMap.ABS, WeightMap.SQUARE])
@pytest.mark.parametrize("scale", [1e7, 1e-8])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_float32_ranks_where_float64_overflows(kind, scale, f):
    shape = (1, 6) if kind == "linear" else (1, 6, 4, 4)
    found = {}
    for dtype in (torch.float32, torch.float64):
        network = PathNetwork.from_module(deep(scale, kind, dtype), torch.ones(shape, dtype=dtype))
        found[dtype] = path_scores(network, f, "published", log2=True)
    (total, scores), (wanted_total, wanted) = found[torch.float32], found[torch.float64]
    assert abs(float(wanted_total)) > 1100  # beyond float64
    assert float(total) == pytest.approx(float(wanted_total), abs=1e-4)
    both = [torch.cat([s.flatten() for s in made.values()]) for made in (scores, wanted)]
    assert both[1].isfinite().all()
    assert (both[0] - both[1]).abs().max() < 1e-4  # so any two scores further apart than 2e-4 are in order
    plain = deep(scale, kind, torch.float64)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(p.abs() ** POWER[f])
        reached = plain(torch.ones(shape, dtype=torch.float64)).sum().item()
    assert reached in (0.0, math.inf)


def test_path_counts_beyond_float64():
    network = PathNetwork()
    flow = network.add_input(1, 16)
    for k in range(400):
        flow = network.add_synapse(flow, torch.ones(16, 16), f"w{k}")
    network.set_outputs(flow)
    total, scores = path_scores(network, WeightMap.ONE, "paths", log2=True)
    assert float(total) == pytest.approx(401 * 4)
    assert all((score == 399 * 4).all() for score in scores.values())
