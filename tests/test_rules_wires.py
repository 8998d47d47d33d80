"""The rule of every fixed linear map, sum, product and constant, against the positive twin (positive.py)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from path_scores import (
    CONVS,
    MAPS,
    POWER,
    SHAPES,
    assert_scores_close,
    check,
    check_sandwich,
    path_scores,
    randomised,
)
from pathprune.network import PathNetwork
from pathprune.nodes import Wire, keeps_order
from positive import Gated, Map, Plus, Times, positive_scores


@pytest.fixture(autouse=True)
def _one_thread():
    """Nets this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Joined(nn.Module):
    """Two branches joined by a function of both."""

    def __init__(self, join: nn.Module, dims: int = 2, left: nn.Module | None = None, right: nn.Module | None = None):
        super().__init__()
        self.left = left or (CONVS[dims](2, 4, 3, padding=1) if dims else nn.Linear(5, 4))
        self.right = right or (CONVS[dims](2, 4, 1, bias=False) if dims else nn.Linear(5, 4))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x), self.right(x))


# ---------------------------------------------------------------------------------------------------- wires

WIRES: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "flatten": (2, lambda x: x.flatten(2)),
    "reshape": (2, lambda x: x.reshape(1, 2, 10, 6)),
    "view": (2, lambda x: x.view(1, -1)),
    "unflatten": (2, lambda x: x.unflatten(1, (2, 2))),
    "permute": (2, lambda x: x.permute(0, 2, 3, 1)),
    "transpose": (2, lambda x: x.transpose(1, 3)),
    "mT": (2, lambda x: x.mT),
    "t": (0, lambda x: x.t().t()),
    "movedim": (2, lambda x: x.movedim(1, -1)),
    "slice": (2, lambda x: x[:, 1:, ::2, 1:-1]),
    "select": (2, lambda x: x[:, :, 2]),
    "narrow": (2, lambda x: x.narrow(2, 1, 3)),
    "index": (2, lambda x: x[:, [2, 0, 2]]),
    "index_select": (2, lambda x: x.index_select(1, torch.tensor([3, 0, 0]))),
    "squeeze": (2, lambda x: x[:, :, :1].squeeze(2)),
    "unsqueeze": (2, lambda x: x.unsqueeze(1)),
    "expand": (2, lambda x: x[:, :, :1].expand(-1, -1, 3, -1)),
    "expand_as": (2, lambda x: x[:, :1].expand_as(x)),
    "repeat": (2, lambda x: x.repeat(1, 2, 1, 3)),
    "repeat_interleave": (2, lambda x: x.repeat_interleave(2, 2)),
    "roll": (2, lambda x: torch.roll(x, 2, 3)),
    "flip": (2, lambda x: x.flip(2)),
    "pad": (2, lambda x: F.pad(x, (1, 2, 0, 1, 2, 0))),
    "pad, negative": (2, lambda x: F.pad(x, (-1, 1, 1, -2))),
    "pad, circular": (2, lambda x: F.pad(x, (1, 2, 2, 0), mode="circular")),
    "pad, reflect": (2, lambda x: F.pad(x, (1, 2, 2, 0), mode="reflect")),
    "pad, replicate": (1, lambda x: F.pad(x, (3, 1), mode="replicate")),
    "split": (2, lambda x: torch.cat(x.split(3, 1)[::-1], 1)),
    "split_with_sizes": (2, lambda x: x.split([1, 3], 1)[1]),
    "chunk": (2, lambda x: x.chunk(2, 3)[0]),
    "tensor_split": (2, lambda x: x.tensor_split(3, 3)[1]),
    "unbind": (2, lambda x: torch.stack(x.unbind(2)[1:4], 0).permute(1, 2, 3, 0)),
    "cat with itself": (2, lambda x: torch.cat([x, x[:, :1]], 1)),
    "cat along a spatial axis": (2, lambda x: torch.cat([x, x[:, :, :2]], 2)),
    "stack": (2, lambda x: torch.stack([x, x], 2)),
    "mean": (2, lambda x: x.mean((2, 3))),
    "mean of everything": (2, lambda x: x.mean().reshape(1, 1)),
    "mean of one axis, kept": (2, lambda x: x.mean(-1, keepdim=True)),
    "sum": (2, lambda x: x.sum((1, 3))),
    "sum of everything": (2, lambda x: x.sum().reshape(1, 1)),
    "sum of one axis, kept": (2, lambda x: x.sum(1, keepdim=True)),
    "pixel_shuffle": (2, lambda x: F.pixel_shuffle(x, 2)),
    "pixel_unshuffle": (2, lambda x: F.pixel_unshuffle(x[..., :4], 2)),
    "channel_shuffle": (2, lambda x: F.channel_shuffle(x, 2)),
    "unfold": (2, lambda x: x.unfold(2, 3, 2)),
    "nearest by factor": (2, lambda x: F.interpolate(x, scale_factor=2)),
    "nearest to size": (2, lambda x: F.interpolate(x, size=(4, 11))),
    "nearest-exact": (2, lambda x: F.interpolate(x, size=(4, 11), mode="nearest-exact")),
    "nearest-exact 1d": (1, lambda x: F.interpolate(x, size=10, mode="nearest-exact")),
    "nearest 1d": (1, lambda x: F.interpolate(x, scale_factor=1.5)),
    "nearest 3d": (3, lambda x: F.interpolate(x, size=(3, 6, 2))),
    "linear": (1, lambda x: F.interpolate(x, size=4, mode="linear")),
    "bilinear by factor": (2, lambda x: F.interpolate(x, scale_factor=(1.5, 2), mode="bilinear")),
    "bilinear to size, corners": (
        2,
        lambda x: F.interpolate(x, size=(9, 3), mode="bilinear", align_corners=True),
    ),
    "bilinear, antialias": (2, lambda x: F.interpolate(x, size=(3, 2), mode="bilinear", antialias=True)),
    "bicubic": (2, lambda x: F.interpolate(x, size=(7, 8), mode="bicubic")),
    "trilinear": (3, lambda x: F.interpolate(x, scale_factor=2, mode="trilinear")),
    "area": (2, lambda x: F.interpolate(x, size=(4, 3), mode="area")),
}


@pytest.mark.parametrize("case", WIRES)
def test_wire(case):
    dims, function = WIRES[case]
    check_sandwich(Map(function), dims=dims)


# ----------------------------------------------------------------------------------------------- arithmetic


def constant(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ARITHMETIC: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "times a number": (2, lambda: Times(-2.5)),
    "number times": (2, lambda: Times(3, lambda x, c: c * x)),
    "times a buffer": (2, lambda: Times(constant(4, 1, 1))),
    "times a buffer along an axis": (2, lambda: Times(constant(5))),
    "times a buffer of each position": (2, lambda: Times(constant(6, 5))),
    "times a buffer of everything": (2, lambda: Times(constant(1, 4, 6, 5))),
    "times a parameter": (2, lambda: Times(nn.Parameter(constant(4, 1, 1)))),
    "times a scalar parameter": (2, lambda: Times(nn.Parameter(constant()))),
    "times channels and positions, 1d": (1, lambda: Times(constant(4, 7))),
    "times positions, 1d": (1, lambda: Times(constant(1, 7))),
    "broadcast by a constant": (
        2,
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), Times(constant(4, 2, 3))),
    ),
    "times in place": (2, lambda: Times(constant(4, 1, 1), lambda x, c: x.clone().mul_(c))),
    "divided by a number": (2, lambda: Times(3.0, torch.div)),
    "divided by a parameter": (2, lambda: Times(nn.Parameter(constant(4, 1, 1)), torch.true_divide)),
    "divided by an integer buffer": (
        2,
        lambda: Times(torch.tensor([1, 2, 4, 8]).reshape(4, 1, 1), torch.div),
    ),
    "times a computed constant": (2, lambda: Times(constant(4, 1, 1), lambda x, c: x * (c.exp() + 1)[:, :1])),
    "plus a number": (2, lambda: Plus(0.7)),
    "minus a buffer": (2, lambda: Plus(constant(4, 1, 1), torch.sub)),
    "plus a parameter": (2, lambda: Plus(nn.Parameter(constant(5)))),
    "constant plus": (2, lambda: Plus(constant(4, 6, 5), lambda x, c: c + x)),
    "constant minus": (2, lambda: Plus(constant(4, 1, 1), lambda x, c: c - x)),
    "number minus": (2, lambda: Plus(1.5, lambda x, c: c - x)),
    "plus twice a buffer": (2, lambda: Plus(constant(5), lambda x, c: torch.add(x, c, alpha=2))),
    "plus positions, 1d": (1, lambda: Plus(constant(4, 7))),
    "broadcast by a shift": (
        2,
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), Plus(constant(4, 2, 3))),
    ),
    "plus in place": (2, lambda: Plus(constant(5), lambda x, c: x.clone().add_(c))),
    "scaled constant, changed in place": (
        2,
        lambda: Plus(constant(5), lambda x, c: x + c.clone().mul_(2).add_(1)),
    ),
}


@pytest.mark.parametrize("case", ARITHMETIC)
def test_arithmetic_with_constants(case):
    dims, build = ARITHMETIC[case]
    check_sandwich(build(), dims=dims)


class Doubled(nn.Module):
    """Each path through a counts twice, at any power."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + a + b


JOINS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "add": (2, lambda: Map(torch.add)),
    "add, weighted": (2, lambda: Map(lambda a, b: torch.add(a, b, alpha=3))),
    "sub": (2, lambda: Map(torch.sub)),
    "sub, weighted": (2, lambda: Map(lambda a, b: torch.sub(a, b, alpha=3))),
    "rsub, weighted": (2, lambda: Map(lambda a, b: torch.rsub(a, b, alpha=3))),
    "add in place": (2, lambda: Map(lambda a, b: a.clone().add_(b))),
    "add, broadcast": (2, lambda: Map(lambda a, b: a + b[:, :, :1])),
    "add, both broadcast": (2, lambda: Map(lambda a, b: a[:, :, :1] + b[..., :1])),
    "two edges from one unit": (2, Doubled),
    "cat": (2, lambda: Map(lambda a, b: torch.cat([a, b], 1))),
    "cat along the last axis": (2, lambda: Map(lambda a, b: torch.cat([b, a], -1))),
    "stack": (1, lambda: Map(lambda a, b: torch.stack([a, b, a], 1))),
    "product": (2, lambda: Gated()),
    "product of features": (0, lambda: Gated()),
}


@pytest.mark.parametrize("case", JOINS)
def test_join(case):
    dims, build = JOINS[case]
    check(Joined(build(), dims), torch.ones(SHAPES[dims], dtype=torch.float64))


class WithConstantPart(nn.Module):
    """A class token before the positions: the constant part of a concatenation, where paths may begin."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(5, 4), nn.Conv1d(4, 3, 1)
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1)
        return self.mix(x.transpose(1, 2))


@pytest.mark.parametrize("policy", ["published", "paths"])
@pytest.mark.parametrize("f", MAPS)
def test_cat_with_a_constant(f, policy):
    model = randomised(WithConstantPart())
    total, got = path_scores(PathNetwork.from_module(model, torch.ones(1, 6, 5).double()), f, policy)
    embed, mix = (m.weight.detach().abs() ** POWER[f] for m in (model.embed, model.mix))
    embed.requires_grad_()
    mix.requires_grad_()
    kept = 0.0 if policy == "paths" else 1.0
    tokens = torch.ones(6, 5).double() @ embed.T + kept * model.embed.bias.abs() ** POWER[f]
    tokens = torch.cat([kept * model.token[0].abs() ** POWER[f], tokens])
    wanted_total = (tokens @ mix[..., 0].T + kept * model.mix.bias.abs() ** POWER[f]).sum()
    gradients = torch.autograd.grad(wanted_total, [embed, mix])
    wanted = {"embed.weight": embed * gradients[0], "mix.weight": mix * gradients[1]}
    assert math.isclose(float(total), math.log2(wanted_total.item()), abs_tol=1e-11)
    assert_scores_close(got, {name: score.detach() for name, score in wanted.items()})


class SqueezeExcite(nn.Module):
    """Channels weighted by what a small network makes of their means."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid()
        )
        self.gated, self.flip = Gated(), flip
        self.head = nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.squeeze(x)
        return self.head(self.gated(gate, x) if self.flip else self.gated(x, gate))


@pytest.mark.parametrize("flip", [False, True])
def test_squeeze_excite_is_a_product_of_two_flows(flip):
    check(SqueezeExcite(flip), torch.ones(1, 2, 6, 5).double())


class Gatedlinear(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer, self.gated, self.function = (
            nn.Linear(5, 8),
            nn.Linear(4, 3),
            Gated(),
            function,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.function(self.inner(x)))


def test_glu_is_a_product_of_halves():
    class Spelled(Gatedlinear):
        def forward(self, x: Tensor) -> Tensor:
            left, right = self.inner(x).chunk(2, 1)
            return self.outer(self.gated(left, right))

    model = randomised(Gatedlinear(lambda x: F.glu(x, 1)))
    spelled = randomised(Spelled(lambda x: x))
    network = PathNetwork.from_module(model, torch.ones(1, 5).double())
    for f in MAPS:
        wanted_total, wanted = positive_scores(spelled, [torch.ones(1, 5)], POWER[f], "paths")
        total, got = path_scores(network, f, "paths")
        assert math.isclose(float(total), math.log2(wanted_total), abs_tol=1e-11)
        assert_scores_close(got, wanted)


class Words(nn.Module):
    """Indices to an embedding: the flow begins at its output, its rows are not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(11, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(tokens))).mean(1))


def test_embedding_is_a_source():
    model = randomised(Words())
    network = PathNetwork.from_module(model, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert network.prunable == ("hidden.weight", "head.weight")
    assert network.unreached == ()
    inner = nn.Sequential(model.hidden, nn.ReLU(), Map(lambda x: x.mean(1)), model.head)
    for f in MAPS:
        wanted_total, wanted = positive_scores(inner, [torch.ones(1, 3, 4)], POWER[f], "published")
        total, got = path_scores(network, f)
        assert math.isclose(float(total), math.log2(wanted_total), abs_tol=1e-11)
        assert_scores_close(got, {"hidden.weight": wanted["0.weight"], "head.weight": wanted["3.weight"]})


def test_wires_that_only_give_another_shape() -> None:
    """They are laid out anew without autograd; a wire that moves, repeats, drops or scales elements is not."""
    maps = {
        "view": (lambda x: x.reshape(1, 6, 4), (1, 6, 4), True),
        "transposed": (lambda x: x.transpose(1, 2), (1, 6, 4), False),
        "turned": (lambda x: x.flip(1), (1, 4, 6), False),
        "doubled": (lambda x: 2 * x, (1, 4, 6), False),
        "cut": (lambda x: x[:, :2], (1, 2, 6), False),
    }
    for name, (apply, shape, keeps) in maps.items():
        wire = Wire((0,), torch.Size(shape), apply=lambda xs, p, apply=apply: apply(xs[0]))
        assert keeps_order(wire, torch.Size((1, 4, 6)), 1.0, torch.device("cpu")) == keeps, name
    one_wide = Wire((0,), torch.Size((1, 6, 1)), apply=lambda xs, p: xs[0].transpose(1, 2))
    assert keeps_order(one_wide, torch.Size((1, 1, 6)), 1.0, torch.device("cpu"))
