"""Small models, each in one process and under FSDP2, and what of them scoring may not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Branches(nn.Module):
    """Convolutions of all kinds, a batch norm, a skip, and a head of one row: the other ranks have none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 5, 2, stride=2)
        self.head = nn.Linear(5, 1)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(-2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(self.up(x + torch.relu(self.grouped(x))).mean((2, 3)))


class Tied(nn.Module):
    """One matrix in two layers, another read in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(7, 7) for _ in range(3))
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return nn.functional.linear(x, self.b.weight.t())


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 13), nn.ReLU(), nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 2))


def perceptron_again() -> nn.Module:
    torch.manual_seed(0)
    return perceptron()


SHAPES: dict[Callable[[], nn.Module], tuple[int, ...]] = {perceptron: (1, 8), Branches: (1, 3, 6, 6), Tied: (1, 7)}


def pair(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Tensor]:
    """(a model in one process, the same under FSDP2, an input)."""
    torch.manual_seed(0)
    one = make().to(dtype)
    spread = copy.deepcopy(one)
    if make is not Tied:
        fully_shard(next(spread.children()))
    fully_shard(spread)
    return one, spread, torch.ones(SHAPES[make], dtype=dtype)


def state(model: nn.Module) -> list[Any]:
    """All that scoring may not change."""
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in model.state_dict().values()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return [
        [t.clone() for t in tensors],
        [type(m) for m in model.modules()],
        [m.training for m in model.modules()],
        hooks,
    ]


def same_state(model: nn.Module, before: list[Any]) -> bool:
    after = state(model)
    return all(map(torch.equal, after[0], before[0])) and after[1:] == before[1:]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
