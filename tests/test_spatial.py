"""Equal positions computed once: the same R and scores as the network as it was, on fewer positions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from path_scores import MAPS, SHAPES, assert_scores_close, path_scores, randomised
from pathprune import models, spatial
from pathprune.network import PathNetwork
from pathprune.nodes import Node, Pool, Synapse
from pathprune.ops import WeightMap
from pathprune.spatial import merge_equal_positions
from positive import Map, Plus, Times
from test_conservation import NETS, read


@pytest.fixture(autouse=True)
def _one_thread():
    """Nets this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def positions(network: PathNetwork, *kinds: type[Node]) -> int:
    """Units of the live nodes of some kinds."""
    return sum(network.nodes[k].shape.numel() for k in network.alive if isinstance(network.nodes[k], kinds))


def rows(network: PathNetwork) -> int:
    """Convolutions that became matrix products."""
    return sum(network.nodes[k].form == "rows" for k in network.synapses())


def assert_equal(network: PathNetwork, f: WeightMap, policy: str, rtol: float = 1e-11) -> PathNetwork:
    merged = merge_equal_positions(network)
    assert merged.tensors is network.tensors
    assert merged.prunable == network.prunable
    wanted_total, wanted = path_scores(network, f, policy)
    total, got = path_scores(merged, f, policy)
    assert float(total) == pytest.approx(float(wanted_total), abs=1e-12 * max(1.0, abs(float(wanted_total))))
    assert_scores_close(got, wanted, rtol)
    return merged


# What is merged, at least: convolutions turned into rows, and the share of their units that is left at most.
MERGES = {
    "resnet": (5, 0.7),
    "resnet, padded shortcut": (5, 0.7),
    "pre-activation resnet": (5, 0.4),
    "vgg": (3, 0.35),
    "mobilenet": (8, 0.3),
    "densenet": (5, 0.3),
    "unet": (2, 0.85),
    "hugging face resnet": (1, 0.65),
    "hugging face bottleneck resnet": (2, 0.6),
    "squeeze and excite": (1, 0.5),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("policy", ["published", "paths"])
def test_merged_networks_give_the_same_scores(net, policy):
    network = read(net)
    for f in (WeightMap.ABS, WeightMap.SQUARE):
        merged = assert_equal(network, f, policy)
    if net in MERGES:
        count, share = MERGES[net]
        assert rows(merged) >= count
        assert positions(merged, Synapse) <= share * positions(network, Synapse)


def test_a_constant_image_needs_few_positions():
    """A 3x3 convolution of a constant image has one interior and two edges an axis, whatever its size."""
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()]
    model = randomised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))
    network = PathNetwork.from_module(model, torch.ones(1, 2, 40, 50).double())
    merged = assert_equal(network, WeightMap.ABS, "published")
    shapes = [tuple(merged.nodes[k].shape) for k in merged.synapses()]
    assert shapes == [(1, 1, 9, 3), (1, 1, 25, 3), (1, 2)]


@pytest.mark.parametrize(("few", "form"), [(100, "rows"), (0, "conv")])
def test_a_convolution_whose_positions_all_differ(monkeypatch, few, form):
    """With few positions it is a product of its patches, else it stays a convolution."""
    monkeypatch.setattr(spatial, "_FEW_POSITIONS", {True: few, False: few})
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)))
    network = PathNetwork.from_module(model, torch.ones(1, 2, 4, 4).double())
    merged = assert_equal(network, WeightMap.ABS, "published")
    assert [merged.nodes[k].form for k in merged.synapses()] == [form, form]


def stack(dims: int, *middle: nn.Module, size: tuple[int, ...] = (13, 11, 9)) -> tuple[nn.Module, Tensor]:
    """Two padded convolutions around a module, on an image large enough to merge."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    before, after = conv(2, 4, 3, padding=1), conv(4, 3, 3, padding=1, stride=2)
    return nn.Sequential(before, nn.ReLU(), *middle, after), torch.ones(1, 2, *size[:dims]).double()


LAYERS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "1d": (1, nn.Identity),
    "3d": (3, nn.Identity),
    "stride": (2, lambda: nn.Conv2d(4, 4, 3, stride=2)),
    "dilation": (2, lambda: nn.Conv2d(4, 4, 3, dilation=3, padding=2)),
    "even kernel": (2, lambda: nn.Conv2d(4, 4, (2, 4), padding="same")),
    "groups": (2, lambda: nn.Conv2d(4, 4, 3, groups=2, padding=1)),
    "depthwise 1d": (1, lambda: nn.Conv1d(4, 4, 3, groups=4, padding=1)),
    "depthwise 3d": (3, lambda: nn.Conv3d(4, 4, 2, groups=4)),
    "padding wider than the kernel": (2, lambda: nn.Conv2d(4, 4, 1, padding=2)),
    "circular": (2, lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
    "transposed": (2, lambda: nn.ConvTranspose2d(4, 4, 3, 2, 1)),
    "max": (2, lambda: nn.MaxPool2d(3, 2, 1)),
    "max, ceil": (2, lambda: nn.MaxPool2d(2, ceil_mode=True)),
    "max, dilated, ceil": (2, lambda: nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True)),
    "max 1d": (1, lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True)),
    "max 3d": (3, lambda: nn.MaxPool3d(2, 1, 1)),
    "avg": (2, lambda: nn.AvgPool2d(3, 2, 1)),
    "avg, ceil": (2, lambda: nn.AvgPool2d(4, 3, 1, ceil_mode=True)),
    "avg, padding not counted": (2, lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "avg, divisor": (2, lambda: nn.AvgPool2d(3, 2, 1, divisor_override=7)),
    "avg 1d": (1, lambda: nn.AvgPool1d(3, 1, 1)),
    "avg 3d": (3, lambda: nn.AvgPool3d(2, ceil_mode=True)),
    "adaptive avg": (2, lambda: nn.AdaptiveAvgPool2d((5, 4))),
    "adaptive max to one": (2, lambda: nn.AdaptiveMaxPool2d(1)),
    "bilinear": (2, lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "group norm": (2, lambda: nn.GroupNorm(2, 4)),
    "batch norm": (2, lambda: nn.BatchNorm2d(4)),
    "layer norm of rows": (2, lambda: nn.LayerNorm(11)),
    "linear on the last axis": (2, lambda: nn.Linear(11, 11)),
    "times channels": (2, lambda: Times(torch.rand(4, 1, 1).double())),
    "times positions": (2, lambda: Times(torch.rand(13, 11).double())),
    "times columns": (2, lambda: Times(torch.rand(11).double())),
    "times rows": (2, lambda: Times(torch.rand(13, 1).double())),
    "times channels and positions, 1d": (1, lambda: Times(torch.rand(4, 13).double())),
    "times one channel's positions, 1d": (1, lambda: Times(torch.rand(1, 13).double())),
    "times channels, 1d": (1, lambda: Times(torch.rand(4, 1).double())),
    "plus positions": (2, lambda: Plus(torch.rand(1, 13, 11).double())),
    "plus positions, 3d": (3, lambda: Plus(torch.rand(11, 9).double())),
    "broadcast": (2, lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), Times(torch.rand(4, 13, 11).double()))),
    "mean of one axis": (2, lambda: Map(lambda x: x.mean(2, keepdim=True) + x)),
    "mean of channels": (2, lambda: Map(lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1))),
    "mean of positions and channels": (2, lambda: Map(lambda x: x + x.mean((1, 2, 3), keepdim=True))),
    "sum of positions": (2, lambda: Map(lambda x: x * 2 + x.sum((2, 3), keepdim=True))),
    "slice": (2, lambda: Map(lambda x: x[:, :, 2:, :-1])),
    "pad": (2, lambda: Map(lambda x: F.pad(x, (0, 3, 1, 0)))),
    "cat of channels": (2, lambda: Map(lambda x: torch.cat([x[:, :1], x[:, 1:]], 1))),
    "cat with a shifted copy": (
        2,
        lambda: Map(lambda x: torch.cat([x[:, :2], torch.roll(x[:, 2:], 1, 2)], 1)),
    ),
    "cat of positions": (2, lambda: Map(lambda x: torch.cat([x, x[:, :, :3]], 2))),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_on_representatives(layer):
    dims, build = LAYERS[layer]
    model, x = stack(dims, build())
    network = PathNetwork.from_module(randomised(model), x)
    for policy in ("published", "paths"):
        for f in MAPS:
            merged = assert_equal(network, f, policy)
    assert rows(merged) >= 1 or dims == 3
    assert positions(merged, Synapse) < positions(network, Synapse)


class Skips(nn.Module):
    """Flows of different classes that meet: a padded and an unpadded branch, and a product of both."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.wide, self.point = nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 1, stride=1)
        self.head = nn.Conv2d(4 * (1 + (how == "cat")), 3, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        a, b = self.wide(x), self.point(x)
        if self.how == "one position":
            b = b.mean((2, 3), keepdim=True)
        joined = {"sum": torch.add, "product": torch.mul, "one position": torch.mul}
        return self.head(torch.cat([a, b], 1) if self.how == "cat" else joined[self.how](a, b))


@pytest.mark.parametrize("how", ["sum", "product", "one position", "cat"])
def test_flows_of_different_classes_meet(how):
    network = PathNetwork.from_module(randomised(Skips(how)), torch.ones(1, 2, 17, 15).double())
    for policy in ("published", "paths"):
        for f in MAPS:
            assert rows(assert_equal(network, f, policy)) >= 2


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_inputs_that_are_not_images(kind, dims):
    """Tokens with features: the last axis of the input is one class until something mixes it."""
    shape = SHAPES[dims]
    model = randomised(
        nn.Sequential(kind(shape[-1], shape[-1]) if kind is nn.Linear else kind(shape[-1]), nn.Linear(shape[-1], 3))
    )
    network = PathNetwork.from_module(model, torch.ones(shape).double())
    for f in MAPS:
        assert_equal(network, f, "published")


def test_a_tied_convolution_of_two_sizes(monkeypatch):
    """One weight, once on an image that merges and once on one that does not."""
    monkeypatch.setattr(spatial, "_FEW_POSITIONS", {True: 0, False: 0})

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.shared = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(F.max_pool2d(self.shared(self.stem(x)), 5))

    network = PathNetwork.from_module(randomised(Twice()), torch.ones(1, 2, 20, 20).double())
    merged = assert_equal(network, WeightMap.ABS, "published")
    assert {merged.nodes[k].form for k in merged.synapses()} == {"rows", "conv"}


def test_merged_masked_networks():
    network = read("resnet")
    merged = merge_equal_positions(network)
    generator = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(network.tensors[n].shape, generator=generator) < 0.3 for n in network.prunable}
    for f in (WeightMap.ABS, WeightMap.ONE):
        wanted_total, wanted = path_scores(network, f, masks=masks)
        total, got = path_scores(merged, f, masks=masks)
        assert float(total) == pytest.approx(float(wanted_total), abs=1e-10)
        assert_scores_close(got, wanted)


def test_pools_of_merged_positions_have_no_padding():
    network = PathNetwork.from_module(models.vgg11_bn(), torch.ones(1, 3, 32, 32))
    merged = merge_equal_positions(network)
    pools = [merged.nodes[k] for k in sorted(merged.alive) if isinstance(merged.nodes[k], Pool)]
    assert len(pools) == 5
    assert positions(merged, Pool) < 0.5 * positions(network, Pool)
    assert all(pool.kernel == pool.stride and not any(pool.padding) for pool in pools)
    total, wanted = path_scores(network, policy="paths", log2=True)
    got_total, got = path_scores(merged, policy="paths", log2=True)
    assert math.isclose(float(total), float(got_total), abs_tol=1e-4)  # float32
    for name, score in wanted.items():
        torch.testing.assert_close(got[name], score, rtol=0.0, atol=1e-4)
