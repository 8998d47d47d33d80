"""The rule of every weight, norm, activation and pool, against the positive twin (positive.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from path_scores import (
    CONVS,
    Sandwich,
    check,
    check_sandwich,
)
from positive import Gate


@pytest.fixture(autouse=True)
def _one_thread():
    """Nets this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ synapses

SYNAPSES: dict[str, Callable[[], tuple[int, Sequence[nn.Module]]]] = {
    "linear": lambda: (0, [nn.Linear(4, 3)]),
    "linear without bias": lambda: (0, [nn.Linear(4, 3, bias=False)]),
    "linear on the last of four axes": lambda: (2, [nn.Linear(5, 3)]),
    "Conv1D": lambda: (0, [Conv1D(3, 4)]),
    "Conv1D on positions": lambda: (1, [Conv1D(3, 7)]),
    "stride": lambda: (2, [nn.Conv2d(4, 3, 3, stride=2)]),
    "stride and dilation differ by axis": lambda: (
        2,
        [nn.Conv2d(4, 3, (2, 3), stride=(1, 2), dilation=(2, 1))],
    ),
    "padding wider than the kernel": lambda: (2, [nn.Conv2d(4, 3, 2, padding=3)]),
    "groups": lambda: (2, [nn.Conv2d(4, 6, 3, groups=2)]),
    "depthwise": lambda: (2, [nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)]),
    "depthwise with multiplier": lambda: (2, [nn.Conv2d(4, 8, 3, groups=4)]),
    "same": lambda: (2, [nn.Conv2d(4, 3, 3, padding="same")]),
    "same, even kernel": lambda: (2, [nn.Conv2d(4, 3, (2, 4), padding="same")]),
    "same, even kernel, dilated": lambda: (2, [nn.Conv2d(4, 3, 2, padding="same", dilation=3)]),
    "valid": lambda: (2, [nn.Conv2d(4, 3, 3, padding="valid")]),
    "conv1d": lambda: (1, [nn.Conv1d(4, 3, 3, stride=2, dilation=2, padding=1)]),
    "conv1d, groups, same": lambda: (1, [nn.Conv1d(4, 6, 4, groups=2, padding="same")]),
    "conv3d": lambda: (3, [nn.Conv3d(4, 3, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 0))]),
    "conv3d, depthwise": lambda: (3, [nn.Conv3d(4, 4, 2, groups=4, padding="same")]),
    "transposed": lambda: (2, [nn.ConvTranspose2d(4, 3, 3)]),
    "transposed, stride, output padding": lambda: (2, [nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1)]),
    "transposed, groups, dilation": lambda: (2, [nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2)]),
    "transposed 1d": lambda: (
        1,
        [nn.ConvTranspose1d(4, 3, 4, stride=3, padding=1, output_padding=2, bias=False)],
    ),
    "transposed 3d": lambda: (3, [nn.ConvTranspose3d(4, 2, 2, stride=2, groups=2)]),
}
for _dims in (1, 2, 3):
    for _mode in ("circular", "reflect", "replicate"):
        SYNAPSES[f"conv{_dims}d, {_mode}"] = lambda d=_dims, m=_mode: (
            d,
            [CONVS[d](4, 2, 3, padding=2, padding_mode=m)],
        )


@pytest.mark.parametrize("case", SYNAPSES)
def test_synapse(case):
    dims, middle = SYNAPSES[case]()
    check_sandwich(*middle, dims=dims)


class Functional(nn.Module):
    """A weight used by name, in the ways torch spells a matrix product."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor], transposed: bool) -> None:
        super().__init__()
        self.inner = Conv1D(5, 5) if transposed else nn.Linear(5, 5)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.inner.weight, self.inner.bias)


@pytest.mark.parametrize(
    ("product", "transposed"),
    [
        (lambda x, w, b: x @ w + b, True),
        (lambda x, w, b: x @ w.T + b, False),
        (lambda x, w, b: torch.addmm(b, x, w), True),
        (lambda x, w, b: torch.addmm(b, x, w.t()), False),
        (lambda x, w, b: torch.mm(x, w.transpose(0, 1)) + b, False),
        (lambda x, w, b: torch.matmul(x, w.permute(1, 0)) + b, False),
        (lambda x, w, b: torch.matmul(x, w.permute(0, 1)) + b, True),
        (lambda x, w, b: F.linear(x, w.t(), b), True),
        (lambda x, w, b: F.linear(x, w, b), False),
    ],
)
def test_matrix_product_as_a_synapse(product, transposed):
    check(Functional(product, transposed), torch.ones(1, 5).double())


# ------------------------------------------------------------------------------------ norms, gates, pooling

NORMS: dict[str, Callable[[], tuple[int, Sequence[nn.Module]]]] = {
    "batch norm": lambda: (2, [nn.BatchNorm2d(4)]),
    "batch norm 1d on features": lambda: (0, [nn.BatchNorm1d(4)]),
    "batch norm 1d": lambda: (1, [nn.BatchNorm1d(4)]),
    "batch norm 3d": lambda: (3, [nn.BatchNorm3d(4)]),
    "batch norm, not affine": lambda: (2, [nn.BatchNorm2d(4, affine=False)]),
    "batch norm, no statistics": lambda: (2, [nn.BatchNorm2d(4, track_running_stats=False)]),
    "group norm": lambda: (2, [nn.GroupNorm(2, 4)]),
    "group norm 1d, not affine": lambda: (1, [nn.GroupNorm(4, 4, affine=False)]),
    "group norm of features": lambda: (0, [nn.GroupNorm(2, 4)]),
    "instance norm": lambda: (2, [nn.InstanceNorm2d(4)]),
    "instance norm, affine": lambda: (1, [nn.InstanceNorm1d(4, affine=True)]),
    "instance norm, statistics": lambda: (2, [nn.InstanceNorm2d(4, affine=True, track_running_stats=True)]),
    "layer norm": lambda: (0, [nn.LayerNorm(4)]),
    "layer norm of two axes": lambda: (2, [nn.LayerNorm((6, 5))]),
    "layer norm without bias": lambda: (1, [nn.LayerNorm(7, bias=False)]),
    "layer norm, not affine": lambda: (1, [nn.LayerNorm(7, elementwise_affine=False)]),
    "rms norm": lambda: (0, [nn.RMSNorm(4)]),
    "rms norm of two axes": lambda: (1, [nn.RMSNorm((4, 7))]),
    "rms norm, not affine": lambda: (1, [nn.RMSNorm(7, elementwise_affine=False)]),
}


@pytest.mark.parametrize("case", NORMS)
def test_norm(case):
    dims, middle = NORMS[case]()
    check_sandwich(*middle, dims=dims)


@pytest.mark.parametrize("case", ["batch norm", "group norm", "layer norm of two axes"])
def test_norm_policies_override(case):
    dims, middle = NORMS[case]()
    model = Sandwich(*middle, dims=dims)
    check(model, model.example, norm="unit", batch_norm="identity")
    check(model, model.example, biases="drop", max_pool="winner")
    check(model, model.example, biases="flow", max_pool="sum")


GATES = (
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.PReLU(4), nn.GELU()),
    *(
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.SiLU(inplace=True),
        nn.Mish(),
        nn.ELU(),
        nn.CELU(),
        nn.SELU(),
        nn.Softplus(),
    ),
    *(nn.Hardswish(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.Threshold(0.1, 0.0)),
    *(nn.Hardshrink(), nn.Softshrink(), nn.LogSigmoid(), nn.RReLU()),
    *(nn.Dropout(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()),
    Gate(torch.relu),
    Gate(lambda x: x.clamp(min=0)),
    Gate(lambda x: x.clamp(0, 6)),
    Gate(torch.Tensor.relu_),
    Gate(lambda x: F.dropout(x, 0.5, training=False).contiguous().clone().detach()),
    Gate(lambda x: -x.to(torch.float64).double()),
    Gate(lambda x: x.float().double()),
)


@pytest.mark.parametrize("gate", GATES, ids=repr)
def test_gate(gate):
    check_sandwich(gate)


def test_dropout_of_a_sequence():
    check_sandwich(nn.Dropout1d(), dims=1)


class ValuesOnly(nn.MaxPool2d):
    """A max pool whose indices are not looked at."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


POOLS = {
    "max": lambda: (2, nn.MaxPool2d(2)),
    "max, overlapping, padded": lambda: (2, nn.MaxPool2d(3, 2, 1)),
    "max, ceil": lambda: (2, nn.MaxPool2d(2, ceil_mode=True)),
    "max, ceil, padded": lambda: (2, nn.MaxPool2d((3, 2), (2, 2), (1, 0), ceil_mode=True)),
    "max, dilated": lambda: (2, nn.MaxPool2d(2, 1, dilation=(2, 3))),
    "max, dilated, padded, ceil": lambda: (2, nn.MaxPool2d(2, 2, 1, dilation=2, ceil_mode=True)),
    "max 1d": lambda: (1, nn.MaxPool1d(3, 2, ceil_mode=True)),
    "max 1d, dilated": lambda: (1, nn.MaxPool1d(2, 2, 1, dilation=3)),
    "max 3d": lambda: (3, nn.MaxPool3d(2, (1, 2, 2), 1, ceil_mode=True)),
    "max 3d, dilated": lambda: (3, nn.MaxPool3d(2, 1, dilation=(1, 2, 2))),
    "max, indices not used": lambda: (2, ValuesOnly(2, return_indices=True)),
    "avg": lambda: (2, nn.AvgPool2d(2)),
    "avg, padded": lambda: (2, nn.AvgPool2d(3, 2, 1)),
    "avg, padding not counted": lambda: (2, nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "avg, ceil": lambda: (2, nn.AvgPool2d(4, 3, 1, ceil_mode=True)),
    "avg, ceil, padding not counted": lambda: (2, nn.AvgPool2d((2, 3), 2, (1, 1), True, False)),
    "avg, divisor": lambda: (2, nn.AvgPool2d(3, 2, 1, divisor_override=5)),
    "avg 1d": lambda: (1, nn.AvgPool1d(3, 2, 1, ceil_mode=True)),
    "avg 1d, padding not counted": lambda: (1, nn.AvgPool1d(3, 2, 1, count_include_pad=False)),
    "avg 3d": lambda: (3, nn.AvgPool3d((1, 3, 2), 2, (0, 1, 1), divisor_override=7)),
    "adaptive avg to one": lambda: (2, nn.AdaptiveAvgPool2d(1)),
    "adaptive avg, equal windows": lambda: (2, nn.AdaptiveAvgPool2d((3, 5))),
    "adaptive avg, unequal windows": lambda: (2, nn.AdaptiveAvgPool2d((4, 3))),
    "adaptive avg, larger": lambda: (2, nn.AdaptiveAvgPool2d((9, 5))),
    "adaptive avg, one axis kept": lambda: (2, nn.AdaptiveAvgPool2d((None, 2))),
    "adaptive avg 1d": lambda: (1, nn.AdaptiveAvgPool1d(3)),
    "adaptive avg 3d": lambda: (3, nn.AdaptiveAvgPool3d((2, 2, 3))),
    "adaptive max to one": lambda: (2, nn.AdaptiveMaxPool2d(1)),
    "adaptive max": lambda: (2, nn.AdaptiveMaxPool2d((3, 1))),
    "adaptive max 1d": lambda: (1, nn.AdaptiveMaxPool1d(1)),
    "adaptive max 3d": lambda: (3, nn.AdaptiveMaxPool3d((2, 1, 2))),
}


@pytest.mark.parametrize("case", POOLS)
def test_pool(case):
    dims, pool = POOLS[case]()
    check_sandwich(pool, dims=dims)
