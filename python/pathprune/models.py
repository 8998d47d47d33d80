"""Plain definitions of the networks of the pruning literature: ordinary modules, no link to the library.

Each factory is callable without arguments, so `pathprune prune --model pathprune.models:vgg16_bn` works. The
weights are drawn from He's normal distribution (fan-in, gain sqrt(2); He et al. 2015, arXiv:1502.01852) with
torch's default generator: call `torch.manual_seed` before a factory for reproducible weights. Biases start at
0, batch norms as the identity. Inputs are `[batch, channels, height, width]`; outputs `[batch, classes]` (the
U-Net-like net gives one map per class).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
Conv1x1 = partial(nn.Conv2d, kernel_size=1, bias=False)


def he_init(model: Model) -> Model:
    """Draw each linear and convolution weight from N(0, 2 / fan_in) in place, zero the biases."""
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose2d):
            # [in, out / groups, kh, kw]; a stride spreads the kernel, so fewer of its values meet in a unit.
            meeting = math.prod(module.kernel_size) / math.prod(module.stride)
            fan_in = module.in_channels // module.groups * meeting
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def conv_bn(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A 3x3 convolution and its batch norm."""
    return [Conv3x3(inputs, outputs, stride=stride, groups=groups), nn.BatchNorm2d(outputs)]


# Multi-layer perceptrons


def mlp(sizes: Sequence[int] = (784, 300, 100, 10), bias: bool = True) -> nn.Sequential:
    """Fully connected ReLU net: flatten, then a linear layer for each neighbouring pair of `sizes`."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return he_init(nn.Sequential(*layers[:-1]))


def lenet_300_100() -> nn.Sequential:
    """LeNet-300-100 for 28x28 images: 266,200 weights (LeCun et al. 1998, section III)."""
    return mlp((784, 300, 100, 10))


# VGG

VGG_STAGES = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
VGG_WIDTHS = (64, 128, 256, 512, 512)


def vgg_bn(depth: int = 16, classes: int = 10, head: str = "cifar") -> nn.Sequential:
    """VGG with batch norm (Simonyan & Zisserman 2015, arXiv:1409.1556, configurations A, D, E).

    Args:
        depth: 11, 16 or 19.
        classes: number of outputs.
        head: "cifar", one linear layer after five poolings of a 32x32 image, as usual on CIFAR; "imagenet",
            the paper's 4096-4096-classes head after a 224x224 image.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, count in zip(VGG_WIDTHS, VGG_STAGES[depth], strict=True):
        for _ in range(count):
            layers += [*conv_bn(channels, width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    if head == "cifar":
        layers.append(nn.Linear(channels, classes))
    elif head == "imagenet":
        for inputs, outputs in ((channels * 7 * 7, 4096), (4096, 4096)):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout()]
        layers.append(nn.Linear(4096, classes))
    else:
        raise ValueError(f"vgg_bn: head: wanted 'cifar' or 'imagenet', got {head!r}")
    return he_init(nn.Sequential(*layers))


def vgg11_bn(classes: int = 10) -> nn.Sequential:
    """VGG-11-BN for 32x32 images: 9.23 M weights."""
    return vgg_bn(11, classes)


def vgg16_bn(classes: int = 10) -> nn.Sequential:
    """VGG-16-BN for 32x32 images: 14.72 M weights."""
    return vgg_bn(16, classes)


def vgg19_bn(classes: int = 10) -> nn.Sequential:
    """VGG-19-BN for 32x32 images: 20.02 M weights."""
    return vgg_bn(19, classes)


def vgg16_bn_imagenet(classes: int = 1000) -> nn.Sequential:
    """VGG-16-BN for 224x224 images: 138.3 M weights."""
    return vgg_bn(16, classes, head="imagenet")


# ResNet


class ChannelPad(nn.Module):
    """Shortcut without parameters: every second pixel, new channels filled with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(inputs, outputs, stride=stride), nn.ReLU(), *conv_bn(outputs, outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 and shortcut == "A":
            self.shortcut = ChannelPad(inputs, outputs)
        elif stride != 1:
            self.shortcut = nn.Sequential(Conv1x1(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet_cifar(depth: int = 20, classes: int = 10, shortcut: str = "B") -> nn.Sequential:
    """ResNet for 32x32 images (He et al. 2016, arXiv:1512.03385, section 4.2).

    Args:
        depth: 6 n + 2 layers: n blocks in each of three stages of 16, 32 and 64 channels.
        classes: number of outputs.
        shortcut: where the shape changes, "A" pads with zero channels (the paper's CIFAR nets), "B" projects
            by a 1x1 convolution.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1 or shortcut not in ("A", "B"):
        raise ValueError(f"resnet_cifar: wanted depth 6 n + 2 and shortcut 'A' or 'B', got {depth}, {shortcut!r}")
    layers: list[nn.Module] = [*conv_bn(3, 16), nn.ReLU()]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(blocks):
            stride = 1 if width == channels else 2
            layers.append(BasicBlock(channels, width, stride, shortcut))
            channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return he_init(nn.Sequential(*layers))


def resnet20(classes: int = 10, shortcut: str = "B") -> nn.Sequential:
    """ResNet-20 for 32x32 images: 0.27 M weights."""
    return resnet_cifar(20, classes, shortcut)


def resnet32(classes: int = 10, shortcut: str = "B") -> nn.Sequential:
    """ResNet-32 for 32x32 images: 0.47 M weights."""
    return resnet_cifar(32, classes, shortcut)


def resnet56(classes: int = 10, shortcut: str = "B") -> nn.Sequential:
    """ResNet-56 for 32x32 images: 0.85 M weights."""
    return resnet_cifar(56, classes, shortcut)


class WideBlock(nn.Module):
    """Pre-activation block: (batch norm, ReLU, 3x3 convolution) twice beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.body = nn.Sequential(*conv_bn(inputs, outputs, stride=stride), nn.ReLU(), Conv3x3(outputs, outputs))
        self.project = Conv1x1(inputs, outputs, stride=stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.activate(x)
        return self.body(y) + (x if self.project is None else self.project(y))


def wide_resnet(depth: int = 28, widen: int = 10, classes: int = 10) -> nn.Sequential:
    """Wide ResNet for 32x32 images (Zagoruyko & Komodakis 2016, arXiv:1605.07146); WRN-28-10: 36.5 M weights.

    Args:
        depth: 6 n + 4 layers.
        widen: factor on the 16, 32 and 64 channels of the three stages.
        classes: number of outputs.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"wide_resnet: depth: wanted 6 n + 4, got {depth}")
    layers: list[nn.Module] = [Conv3x3(3, 16)]
    channels = 16
    for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for block in range(blocks):
            layers.append(WideBlock(channels, width, stride=2 if stage and not block else 1))
            channels = width
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return he_init(nn.Sequential(*layers, nn.Linear(channels, classes)))


# Small nets for demonstrations and tests


def convnet_digits(width: int = 32, classes: int = 10) -> nn.Sequential:
    """Three convolutions and a linear layer for one-channel 8x8 images of digits: 97,568 weights."""
    layers = [*conv_bn(1, width), nn.ReLU(), *conv_bn(width, 2 * width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [*conv_bn(2 * width, 4 * width), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return he_init(nn.Sequential(*layers, nn.Linear(4 * width * 2 * 2, classes)))


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1 (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.skips = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *[Conv1x1(inputs, hidden), nn.BatchNorm2d(hidden), nn.ReLU6()],
            *[*conv_bn(hidden, hidden, stride=stride, groups=hidden), nn.ReLU6()],
            *[Conv1x1(hidden, outputs), nn.BatchNorm2d(outputs)],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skips else self.body(x)


def mobilenet_tiny(classes: int = 10) -> nn.Sequential:
    """MobileNetV2 in miniature for 32x32 images: depthwise convolution, ReLU6, linear bottlenecks."""
    layers: list[nn.Module] = [*conv_bn(3, 8, stride=2), nn.ReLU6()]
    for inputs, outputs, stride in ((8, 8, 1), (8, 12, 2), (12, 12, 1), (12, 16, 2), (16, 16, 1)):
        layers.append(InvertedResidual(inputs, outputs, stride, expand=3))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, classes)]
    return he_init(nn.Sequential(*layers))


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 3x3 convolution; the result is appended to the channels that came in."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), Conv3x3(inputs, growth))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], dim=1)


def densenet_tiny(growth: int = 6, blocks: int = 2, layers_per_block: int = 3, classes: int = 10) -> nn.Sequential:
    """DenseNet in miniature for 32x32 images (Huang et al. 2017, arXiv:1608.06993)."""
    channels = 2 * growth
    layers: list[nn.Module] = [Conv3x3(3, channels)]
    for block in range(blocks):
        for _ in range(layers_per_block):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if block < blocks - 1:
            layers += [Conv1x1(channels, channels // 2), nn.AvgPool2d(2)]
            channels //= 2
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return he_init(nn.Sequential(*layers))


class UNetTiny(nn.Module):
    """Two levels down by max-pooling, two up by transposed convolution, skips by concatenation."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()

        def double(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(*conv_bn(a, b), nn.ReLU(), *conv_bn(b, b), nn.ReLU())

        self.down1, self.down2 = double(inputs, width), double(width, 2 * width)
        self.bottom = double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, kernel_size=2, stride=2)
        self.merge2 = double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, kernel_size=2, stride=2)
        self.merge1 = double(2 * width, width)
        self.head = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        y = self.bottom(F.max_pool2d(coarse, 2))
        y = self.merge2(torch.cat([coarse, self.up2(y)], dim=1))
        y = self.merge1(torch.cat([fine, self.up1(y)], dim=1))
        return self.head(y)


def unet_tiny(inputs: int = 1, width: int = 8, classes: int = 2) -> nn.Module:
    """U-Net in miniature (Ronneberger et al. 2015, arXiv:1505.04597); sides divisible by 4."""
    return he_init(UNetTiny(inputs, width, classes))
