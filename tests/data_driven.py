"""What tests of data-driven pruners share: a small network in float64, batches, and comparers that raise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """A convolution, batch norm, max pool, a skip, dropout and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6 * 9, 4)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        x = x + torch.relu(self.block(x))
        return self.head(self.drop(x).flatten(1))


PRUNABLE = ("stem.weight", "block.weight", "head.weight")


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().double().eval()
    with torch.no_grad():
        model.norm.weight.uniform_(-1, 1.5)
        model.norm.bias.uniform_(-0.5, 0.5)
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 2)
    return model


def batches(*sizes: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 2, 6, 6, generator=generator).double(), torch.randint(4, (n,), generator=generator))
        for n in sizes
    ]


X = torch.ones(1, 2, 6, 6, dtype=torch.float64)
DATA = batches(5, 5, 5)


def assert_same(masks, wanted):
    for name in wanted:
        assert torch.equal(masks[name], wanted[name]), f"{name}: {int((masks[name] != wanted[name]).sum())} bits differ"


def assert_scores(found, wanted, rtol=1e-9):
    assert set(found.tensors) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(found.tensors[name], wanted[name], rtol=rtol, atol=1e-14)
