"""What the experiments share: tasks that need no network, the networks, the methods by name, prune-and-train.

Images of the task ``shapes`` are drawn from a seed: a triangle, square, disc, star or cross, filled or as an outline
(ten classes), of random size, place, turn and colour on a darker background with a random gradient, and noise. They
have CIFAR's shape, three channels of ``size`` x ``size`` in [0, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from pathprune.data import Images, ImageTask, Split, digits, open_images
from pathprune.demo import train
from pathprune.models import conv_bn, he_init

from .experiment import Case

CLASSES = 10
DRAWN: Case = {"task": "shapes", "size": 16}  # what cases have of the drawn images
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


def task_of(folder: Path, size: int | None = None) -> Case:
    """What cases have of the images in a folder (``open_images``): kind, classes, size, and a digest of the labels."""
    found = open_images(folder, size)
    return {"task": found.kind, "classes": len(found.classes), "size": found.size, "data": found.digest()}


def split_of(case: Case, folder: Path | None = None) -> Split:
    """The task that a case names: "digits", "shapes", or images in ``folder``: a class-balanced part for its seed.

    Raises:
        ValueError: no folder, or one with other images than the case's.
    """
    if case["task"] == "digits":
        return digits(case["seed"])
    if case["task"] == "shapes":
        return shapes(case["images"], 600, case["size"], case["seed"])
    if folder is None:
        raise ValueError(f"experiments: task '{case['task']}': wanted --data FOLDER with its files, got none")
    found = opened(folder, case["size"])
    if (found.kind, found.digest()) != (case["task"], case["data"]):
        raise ValueError(f"experiments: task '{case['task']}' {case['data']}: {folder} has other images, {found.kind}")
    train = part(folder, case["size"], True, case["images"], case["seed"])
    test = part(folder, case["size"], False, case["tested"], 0)
    return Split(*train[:], *test[:])


@functools.lru_cache(maxsize=1)
def opened(folder: Path, size: int) -> ImageTask:
    return open_images(folder, size)


@functools.lru_cache(maxsize=4)
def part(folder: Path, size: int, is_train: bool, count: int, seed: int) -> Images:
    """Decoded once for all methods: the test images, and those to train on of a few seeds, as bytes."""
    task = opened(folder, size)
    return (task.train if is_train else task.test).at_most(count, seed).held()


# ---------------------------------------------------------------------------------------------------- networks


def small_vgg(seed: int, classes: int = CLASSES, width: int = 16) -> nn.Sequential:
    """Four convolutions with batch norm and a linear layer, for images of any size: 60,976 weights for ten classes."""
    torch.manual_seed(seed)
    layers = [*conv_bn(3, width), nn.ReLU(), nn.MaxPool2d(2), *conv_bn(width, 2 * width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [*conv_bn(2 * width, 4 * width), nn.ReLU(), *conv_bn(4 * width, 4 * width), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)]
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
    """Ten images of each class, as the published runs of data-driven methods take, or as many as there are."""
    fewest = int(torch.bincount(data.train_labels).min())
    return pp.class_balanced([(data.train_images, data.train_labels)], min(10, fewest), data.classes)


def masks_of(model: nn.Module, method: str | pp.Pruner, density: float, seed: int, batches: Batches) -> pp.Masks:
    """Masks by a method (by name, or a pruner) with its own number of rounds."""
    pruner = METHODS[method](batches) if isinstance(method, str) else method
    layered = {"scope": "layer", "allocation": "erdos_renyi_kernel"} if method == "random, ERK" else {}
    example = batches[0][0][:1]
    made = pp.prune(model, pruner, density=density, example_input=example, seed=seed, progress=False, **layered)
    assert isinstance(made, pp.Masks)
    return made


def trained_accuracy(model: nn.Module, data: Split, masks: pp.Masks | None, case: Case) -> float:
    """Applies the masks, trains the model in place for ``case["epochs"]`` with zeros kept; test accuracy at the end."""
    if masks is not None:
        masks.apply_(model, base="ignore")
    return train(model, data, masks, case["seed"], case["epochs"], case.get("rate", 0.1))[-1]


def image_case(quick: bool, task: Case, **given: object) -> Case:
    """A case of the small VGG on images: ``given`` (method, density, seed, ...), what the task is, and the sizes.

    Of images in a folder as many as of the drawn ones, or ten of each class (``quick``: one); up to 2,000 are tested.
    """
    sizes: Case = {"images": 200, "epochs": 1} if quick else {"images": 2000, "epochs": 6}
    if "classes" in task:
        most = sizes["images"]
        sizes |= {"images": max(most, (1 if quick else 10) * task["classes"]), "tested": max(most, task["classes"])}
    return {**task, **given, **sizes}
