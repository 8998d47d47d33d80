"""SynFlow: one round, and whole schedules, against the published loop and the best plain PyTorch.

Bytes of a round of ours on linear layers: two reads of every weight (forward with last round's cut, backward with
scores and selection) and three passes over one bit per weight. Convolutions are counted the same way; their products
dominate. The published loop moves about 158 bytes per weight, before kthvalue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import pathprune as pp
from baselines import BestPyTorchSynFlow, PublishedSynFlow, exponential_densities
from harness import Case, Result, assert_same_masks
from pathprune import models
from pathprune.network import PathNetwork
from pathprune.pruners.base import Scope, Selection, run
from pathprune.spatial import merge_equal_positions
from pathprune.weights import weights_of

OURS = "pathprune"
PUBLISHED = "published loop"
PLAIN = "best PyTorch"
NUMPY = "best PyTorch + numpy select"


class OurRounds:
    """SynFlow round by round, as ``prune`` runs it."""

    def __init__(self, model: nn.Module, x: Any, compact: float = 0.25, policy: str = "published") -> None:
        network, pruner = PathNetwork.from_module(model, x), pp.SynFlow(policy=policy)
        quick = merge_equal_positions(network, policy)
        self.names = network.select()
        self.weights = weights_of(quick, self.names, pruner.maps, compact=compact)
        self.selection = Selection(self.weights, self.names, Scope.of("global"))
        self.scorer = pruner.scorer(quick, self.weights, 0)
        self.tensors = [network.tensors[name] for name in self.names]
        self.numel = sum(tensor.numel() for tensor in self.tensors)

    def round(self, density: float) -> None:
        share = dict.fromkeys(self.names, density)
        list(run(self.scorer, self.selection, [(density, None)], lambda _: share, lambda _: None))

    def masks(self) -> dict[str, Tensor]:
        return {name: self.weights[name].bits() for name in self.names}


@dataclass(frozen=True)
class Setting:
    """A network to prune, and what the baselines need for it."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    published: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    differing: float = 0.0  # share of bits that rounding may change against the plain baseline in two rounds


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig())


_CUTS = ["resnet.embedder"] + [
    f"resnet.encoder.stages.{stage}.layers.{layer}"
    for stage, depth in enumerate((3, 4, 6, 3))
    for layer in range(depth)
]

_DEEP = {"published": {"dtype": torch.float64}, "plain": {"rescale": _CUTS}}  # float32 alone overflows

SETTINGS = {
    "mlp-20m": Setting(
        "MLP 784-4096-4096-10, 20 M weights", lambda: models.mlp((784, 4096, 4096, 10)), (1, 784), differing=1e-6
    ),
    "mlp-140m": Setting(
        "MLP 784-8192x3-10, 140 M weights", lambda: models.mlp((784, 8192, 8192, 8192, 10)), (1, 784), differing=1e-6
    ),
    "vgg16": Setting("VGG-16-BN for 32x32, 14.7 M weights", models.vgg16_bn, (1, 3, 32, 32), differing=1e-4),
    "resnet50": Setting("ResNet-50 at 224x224, 23.5 M weights", _resnet50, (1, 3, 224, 224), differing=1e-5, **_DEEP),
}


def made(setting: Setting, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """The network with weights drawn by seed 0, and an input."""
    torch.manual_seed(0)
    return setting.make().eval().to(device), torch.ones(setting.shape, device=device)


def agree(setting: Setting, device: str = "cpu", rounds: int = 2) -> str:
    """All candidates keep the same weights, up to float32 rounding, after a few rounds of the same schedule."""
    model, x = made(setting, device)
    ours, plain = OurRounds(model, x), BestPyTorchSynFlow(model, x, **setting.plain)
    for density in exponential_densities(0.8, rounds):
        ours.round(density)
        plain.round(density)
    allowed = int(setting.differing * ours.numel) + 2
    return assert_same_masks(ours.masks(), plain.masks(), allowed)


def one_round(key: str, repeats: int, bandwidth: float, published: bool = True, device: str = "cpu") -> Result:
    """The same rounds of a 100-round schedule to 1 %, each method on its own copy of the state."""
    setting = SETTINGS[key]
    model, x = made(setting, device)
    case = Case(f"SynFlow round, {setting.name}", lambda: agree(setting, device), device)

    def stepping(method: Any) -> Callable[[], object]:
        densities = iter(exponential_densities(0.01, 100))
        return lambda: method.round(next(densities))

    ours = OurRounds(model, x)
    case.add(OURS, stepping(ours), bytes_moved=8.375 * ours.numel)
    if published:
        loop = PublishedSynFlow(model, x, **{"count": "published", **setting.published})
        case.add(PUBLISHED, stepping(loop), bytes_moved=158.0 * ours.numel)
    case.add(PLAIN, stepping(BestPyTorchSynFlow(model, x, select="bracket", **setting.plain)))
    if device == "cpu":
        case.add(NUMPY, stepping(BestPyTorchSynFlow(model, x, select="bracket_numpy", **setting.plain)))
    return case.measure(repeats, warmup=3, bandwidth=bandwidth)


def whole_schedule(key: str, rounds: int, density: float, bandwidth: float, device: str = "cpu") -> Result:
    """A whole schedule by ``prune``, and by the plain loop; the published loop is timed round by round elsewhere."""
    setting = SETTINGS[key]
    model, x = made(setting, device)
    steps = exponential_densities(density, rounds)
    case = Case(f"SynFlow {rounds} rounds to {density:.0%}, {setting.name}", lambda: agree(setting, device), device)

    def ours() -> None:
        method = OurRounds(model, x)
        for step in steps:
            method.round(step)
        method.masks()

    def plain(select: str) -> Callable[[], None]:
        def work() -> None:
            method = BestPyTorchSynFlow(model, x, select=select, **setting.plain)
            for step in steps:
                method.round(step)
            method.masks()

        return work

    case.add(OURS, ours).add(PLAIN, plain("bracket"))
    if device == "cpu":
        case.add(NUMPY, plain("bracket_numpy"))
    return case.measure(1, warmup=0, bandwidth=bandwidth)
