"""The model definitions: weight counts known from the literature, forward, export, initialization."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pathprune import models

# factory, input shape without the batch, output shape without the batch
SMALL = [
    (models.lenet_300_100, (1, 28, 28), (10,)),
    (models.vgg11_bn, (3, 32, 32), (10,)),
    (models.resnet20, (3, 32, 32), (10,)),
    (lambda: models.resnet20(shortcut="A"), (3, 32, 32), (10,)),
    (lambda: models.wide_resnet(10, 2), (3, 32, 32), (10,)),
    (models.convnet_digits, (1, 8, 8), (10,)),
    (models.mobilenet_tiny, (3, 32, 32), (10,)),
    (models.densenet_tiny, (3, 32, 32), (10,)),
    (models.unet_tiny, (1, 16, 16), (2, 16, 16)),
]
IDS = ["lenet", "vgg11", "resnet20", "resnet20-A", "wrn10-2", "convnet", "mobilenet", "densenet", "unet"]

# From the papers' tables: sum of inputs * outputs * kernel over the linear and convolution weights.
WEIGHTS = [
    (models.lenet_300_100, 266_200),
    (models.vgg11_bn, 9_222_848),
    (models.vgg16_bn, 14_715_584),
    (models.vgg19_bn, 20_024_000),
    (models.vgg16_bn_imagenet, 138_344_128),
    (models.resnet20, 270_896),
    (lambda: models.resnet20(shortcut="A"), 268_336),
    (models.resnet32, 464_432),
    (models.resnet56, 851_504),
    (models.convnet_digits, 97_568),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and on a busy machine their barriers cost seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def count_weights(model: nn.Module) -> int:
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, layers))


@pytest.mark.parametrize(("factory", "expected"), WEIGHTS)
def test_weight_count_is_that_of_the_literature(factory, expected):
    with torch.device("meta"):
        assert count_weights(factory()) == expected


@pytest.mark.parametrize(
    ("factory", "millions"),
    [
        (lambda: models.resnet_cifar(20, shortcut="A"), 0.27),  # arXiv:1512.03385, table 6
        (lambda: models.resnet_cifar(32, shortcut="A"), 0.46),
        (lambda: models.resnet_cifar(56, shortcut="A"), 0.85),
        (lambda: models.wide_resnet(28, 10), 36.5),  # arXiv:1605.07146, table 5
        (lambda: models.wide_resnet(40, 4), 8.9),
        (lambda: models.wide_resnet(16, 8), 11.0),
    ],
)
def test_parameter_count_rounds_to_the_published_one(factory, millions):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in factory().parameters())
    digits = 2 if millions < 1 else 1
    assert abs(parameters / 1e6 - millions) <= 0.6 * 10**-digits


@pytest.mark.parametrize(("factory", "inputs", "outputs"), SMALL, ids=IDS)
def test_forward_and_export_agree(factory, inputs, outputs):
    torch.manual_seed(0)
    model = factory().eval()
    x = torch.rand(2, *inputs)
    with torch.no_grad():
        y = model(x)
    assert y.shape == (2, *outputs)
    assert y.isfinite().all()
    exported = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), y)


def test_imagenet_head_takes_224_pixels():
    with torch.device("meta"):
        model = models.vgg16_bn_imagenet().eval()
        assert model(torch.ones(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize(("factory", "inputs", "outputs"), SMALL, ids=IDS)
def test_training_step_reaches_every_parameter(factory, inputs, outputs):
    torch.manual_seed(0)
    model = factory().train()
    model(torch.rand(4, *inputs)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_weights_are_he_normal_and_seeded():
    torch.manual_seed(3)
    first = models.mlp((400, 500, 10))
    torch.manual_seed(3)
    second = models.mlp((400, 500, 10))
    weight = first[1].weight
    assert torch.equal(weight, second[1].weight)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert not first[1].bias.any()

    up = models.unet_tiny(width=32).up2  # [128, 64, 2, 2], stride 2: one value of each of 128 kernels meets in a unit
    assert up.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.05)


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.resnet_cifar(21),
        lambda: models.resnet_cifar(20, shortcut="C"),
        lambda: models.wide_resnet(29, 2),
        lambda: models.vgg_bn(16, head="segmentation"),
    ],
)
def test_unknown_variant_is_refused(make):
    with pytest.raises(ValueError, match="wanted"):
        make()
