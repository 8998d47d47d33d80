"""What the experiments share: tasks that need no network, the networks, the methods by name, prune-and-train.

Images of the task ``shapes`` are drawn from a seed: a triangle, square, disc, star or cross, filled or as an outline
(ten classes), of random size, place, turn and colour on a darker background with a random gradient, and noise. They
have CIFAR's shape, three channels of ``size`` x ``size`` in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from pathprune.data import Split, cifar10, digits
from pathprune.demo import train
from pathprune.models import conv_bn, he_init

CLASSES = 10
Batches = list[tuple[Tensor, Tensor]]

# ------------------------------------------------------------------------------------------------------- tasks


def shapes(train_images: int, test_images: int, size: int, seed: int) -> Split:
    """The drawn task: the same seed gives the same images; test images are drawn after the others."""
    made = torch.Generator().manual_seed(seed)
    parts = [drawn(count, size, made) for count in (train_images, test_images)]
    return Split(*parts[0], *parts[1])


def drawn(count: int, size: int, made: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images float32 [count, 3, size, size] and labels int64 [count], all classes alike up to one image."""
    labels = torch.arange(count)[torch.randperm(count, generator=made)] % CLASSES

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=made)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x = axis[None, None, :] - uniform(-0.2, 0.2, 1, 1)  # [count, 1, size]
    y = axis[None, :, None] - uniform(-0.2, 0.2, 1, 1)  # [count, size, 1]
    turn = uniform(-0.4, 0.4, 1, 1)
    across, along = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()  # [count, size, size]
    radius, angle = (across.square() + along.square()).sqrt(), torch.atan2(along, across)

    def polygon(sides: int) -> Tensor:  # 1 on its edge, whose corners have radius 1
        sector = 2 * math.pi / sides
        return radius * ((angle % sector) - sector / 2).cos() / math.cos(sector / 2)

    star = radius / (0.7 + 0.3 * (5 * angle).cos())
    arm, reach = torch.minimum(across.abs(), along.abs()), torch.maximum(across.abs(), along.abs())
    cross = torch.maximum(reach, 3 * arm)
    edges = torch.stack([polygon(3), polygon(4), radius, star, cross])[labels // 2, torch.arange(count)]
    scaled = edges / uniform(0.6, 0.85, 1, 1)
    outline = (labels % 2 == 1)[:, None, None]
    inside = ((1 - scaled) * size / 4).sigmoid()  # edges one pixel soft
    hole = ((0.62 - scaled) * size / 4).sigmoid()
    cover = (inside - torch.where(outline, hole, torch.zeros_like(hole)))[:, None]  # [count, 1, size, size]

    slope = uniform(-0.25, 0.25, 3, 1, 1) * axis[None, None, None, :] + uniform(-0.25, 0.25, 3, 1, 1) * axis[:, None]
    ground, paint = uniform(0, 0.5, 3, 1, 1) + slope, uniform(0.5, 1, 3, 1, 1)
    noise = 0.08 * torch.randn(count, 3, size, size, generator=made)
    return (ground * (1 - cover) + paint * cover + noise).clamp(0, 1), labels


def handwritten(size: int, train_images: int, seed: int) -> Split:
    """scikit-learn's digits as images of CIFAR's kind: three equal channels, enlarged; few to learn from."""
    data = digits(seed)

    def enlarged(images: Tensor) -> Tensor:
        grown = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        return grown.expand(-1, 3, -1, -1).contiguous()

    few = slice(0, train_images)
    return Split(enlarged(data.train_images[few]), data.train_labels[few], enlarged(data.test_images), data.test_labels)


def split_of(case: dict, folder: Path | None = None) -> Split:
    """The task that a case names: "digits", "shapes" or "cifar10" (``folder`` has its files)."""
    if case["task"] == "digits":
        return digits(case["seed"])
    if case["task"] == "shapes":
        return shapes(case["images"], 600, case["size"], case["seed"])
    if case["task"] != "cifar10":
        raise ValueError(f"experiments: task: wanted 'digits', 'shapes' or 'cifar10', got {case['task']!r}")
    if folder is None:
        raise ValueError("experiments: task 'cifar10' wanted --data FOLDER with its binary files, got none")
    data = cifar10(folder)
    first = slice(0, case["images"])
    return Split(data.train_images[first], data.train_labels[first], data.test_images, data.test_labels)


# ---------------------------------------------------------------------------------------------------- networks


def small_vgg(seed: int, width: int = 16) -> nn.Sequential:
    """Four convolutions with batch norm and a linear layer: 61,232 weights at width 16."""
    torch.manual_seed(seed)
    layers = [*conv_bn(3, width), nn.ReLU(), nn.MaxPool2d(2), *conv_bn(width, 2 * width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [*conv_bn(2 * width, 4 * width), nn.ReLU(), *conv_bn(4 * width, 4 * width), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES)]
    return he_init(nn.Sequential(*layers))


def normed_mlp(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """Fully connected ReLU net with batch norm between layers, so that it learns at extreme densities too."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return he_init(nn.Sequential(*layers[:-2]))


# ----------------------------------------------------------------------------------------------------- methods


# SNIP and its kin see batch norms as in training, as in most published runs: fresh statistics make them worse.
METHODS: dict[str, Callable[[Batches], pp.Pruner]] = {
    "SynFlow": lambda data: pp.SynFlow(),
    "SynFlow-L2": lambda data: pp.SynFlowL2(),
    "SynFlow-Dist": lambda data: pp.SynFlowDist(data[0][0].mean(0, keepdim=True)),
    "trace saliency": lambda data: pp.TraceSaliency(),
    "PHEW": lambda data: pp.PHEW(),
    "PX": lambda data: pp.PX(data),
    "SNIP": lambda data: pp.SNIP(data, pp.cross_entropy, train_mode=True),
    "IterSNIP": lambda data: pp.IterSNIP(data, pp.cross_entropy, train_mode=True),
    "FORCE": lambda data: pp.FORCE(data, pp.cross_entropy, train_mode=True),
    "GraSP": lambda data: pp.GraSP(data, pp.cross_entropy, train_mode=True),
    "Fisher": lambda data: pp.Fisher(data, pp.cross_entropy),
    "NTK-SAP": lambda data: pp.NTKSAP(batch_size=64),
    "magnitude": lambda data: pp.Magnitude(),
    "random": lambda data: pp.Random(),
    "random, ERK": lambda data: pp.Random(),
}


def scoring_data(data: Split) -> Batches:
    """Ten images of each class, as the published runs of data-driven methods take."""
    return pp.class_balanced([(data.train_images, data.train_labels)], 10, CLASSES)


def masks_of(model: nn.Module, method: str | pp.Pruner, density: float, seed: int, batches: Batches) -> pp.Masks:
    """Masks by a method (by name, or a pruner) with its own number of rounds."""
    pruner = METHODS[method](batches) if isinstance(method, str) else method
    layered = {"scope": "layer", "allocation": "erdos_renyi_kernel"} if method == "random, ERK" else {}
    example = batches[0][0][:1]
    made = pp.prune(model, pruner, density=density, example_input=example, seed=seed, progress=False, **layered)
    assert isinstance(made, pp.Masks)
    return made


def trained_accuracy(model: nn.Module, data: Split, masks: pp.Masks | None, case: dict) -> float:
    """Applies the masks, trains the model in place for ``case["epochs"]`` with zeros kept; test accuracy at the end."""
    if masks is not None:
        masks.apply_(model, base="ignore")
    return train(model, data, masks, case["seed"], case["epochs"], case.get("rate", 0.1))[-1]


def image_case(quick: bool, task: str, **given: object) -> dict:
    """A case of the small VGG on images: ``given`` (method, density, seed, ...) and the sizes."""
    sizes = {"images": 200, "epochs": 1} if quick else {"images": 2000, "epochs": 6}
    return {"task": task, **given, **sizes, **({"size": 16} if task == "shapes" else {})}
