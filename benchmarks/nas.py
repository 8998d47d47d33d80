"""SynFlow over NAS-Bench-201's 15,625 cells, per architecture: one flow for many, the published loop, plain PyTorch.

The published loop, one network after the other: make it, copy it, move the original to the CPU, take absolute values in
place, go to double precision, run one image of ones forward and backward, add up ``|w grad|`` layer by layer, put the
signs back. The best plain PyTorch makes no module: the shared weights' absolute values once, one architecture's forward
and backward pass in float32 by ``torch.nn.functional``, flows divided by their maximum between blocks (some sums are
beyond float32). Ours scores the whole space; the others a sample of it, and every figure is seconds per architecture.

Verified first: scores of all three agree, and float32 ranks the sample as float64 does.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from harness import CLOCKS, Result, clocked, peak_memory
from pathprune.cell_space import EDGES, Architecture, CellNet, CellSpace, name_of

SPACE = CellSpace()


def published(architecture: Architecture, tensors: Mapping[str, Tensor] | None = None) -> float:
    """log2 of the published sum for one network; with ``tensors``, for these weights."""
    original = CellNet(SPACE, architecture)
    if tensors is not None:
        original.load_state_dict({k: tensors.get(k, v) for k, v in original.state_dict().items()})
    original = original.cpu()
    net = copy.deepcopy(original).eval()
    signs = {}
    for name, tensor in net.state_dict().items():
        signs[name] = torch.sign(tensor)
        tensor.abs_()
    net.zero_grad()
    net.double()
    x = torch.ones((1, SPACE.inputs, SPACE.image, SPACE.image), dtype=torch.float64)
    net(x).sum().backward()
    total = 0.0
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            gradient = module.weight.grad
            scores = torch.zeros_like(module.weight) if gradient is None else torch.abs(module.weight * gradient)
            total += float(scores.detach().sum())
    for name, tensor in net.state_dict().items():
        tensor.mul_(signs[name])
    return math.log2(total) if total > 0 else -math.inf


class Plain:
    """The same from functions, on weights whose absolute values are made once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights = {
            name: tensor.abs().contiguous(memory_format=torch.channels_last).requires_grad_()
            for name, tensor in tensors.items()
            if tensor.dim() == 4
        }
        self.weights["head.weight"] = tensors["head.weight"].abs().requires_grad_()
        scale = 1 / math.sqrt(1 + 1e-5)  # of a fresh batch norm
        self.scale = scale
        self.log2 = 0.0
        self.used: list[Tensor] = []

    def _conv(self, x: Tensor, name: str, scale: float, **geometry: int) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        self.used.append(weight)
        return F.conv2d(x, weight, **geometry) * scale

    def _rescaled(self, x: Tensor) -> Tensor:
        """Every path crosses here, so dividing by one number changes all scores alike."""
        peak = float(x.detach().amax())
        self.log2 += math.log2(peak) if peak > 0 else -math.inf
        return x / peak if peak > 0 else x

    def _cell(self, x: Tensor, name: str, architecture: Architecture) -> Tensor:
        nodes: list[Tensor | None] = [x, None, None, None]
        for (source, target), operation in zip(EDGES, architecture, strict=True):
            entering = nodes[source]
            if operation == "none" or entering is None:
                continue
            path = f"{name}.e{source}{target}.{operation}.conv"
            if operation == "skip_connect":
                made = entering
            elif operation == "avg_pool_3x3":
                made = F.avg_pool2d(entering, 3, 1, 1, count_include_pad=False)
            else:
                made = self._conv(entering, path, self.scale, padding=1 if operation.endswith("3x3") else 0)
            nodes[target] = made if nodes[target] is None else nodes[target] + made
        return x * 0 if nodes[3] is None else nodes[3]

    def score(self, architecture: Architecture) -> float:
        self.log2, self.used = 0.0, []
        x = torch.ones((1, SPACE.inputs, SPACE.image, SPACE.image)).contiguous(memory_format=torch.channels_last)
        x = self._conv(x, "stem", self.scale, padding=1)
        for k, (kind, _, _) in enumerate(SPACE.blocks()):
            name = f"blocks.{k}"
            if kind == "cell":
                x = self._cell(x, name, architecture)
            else:
                long = self._conv(x, f"{name}.first.conv", self.scale, stride=2, padding=1)
                long = self._conv(long, f"{name}.second.conv", self.scale, padding=1)
                x = long + self._conv(F.avg_pool2d(x, 2), f"{name}.shortcut", 1.0)
            x = self._rescaled(x)
            if self.log2 == -math.inf:
                return -math.inf
        head = self.weights["head.weight"]
        out = F.linear((x * self.scale).mean((2, 3)), head)
        used = [*self.used, head]
        gradients = torch.autograd.grad(out.sum(), used, allow_unused=True)
        total = sum(float((w * g).detach().sum()) for w, g in zip(used, gradients, strict=True) if g is not None)
        return math.log2(total) + self.log2


def verify(sample: Sequence[Architecture], tensors: Mapping[str, Tensor]) -> str:
    """All three agree, and float32 ranks as float64 does."""
    exact = [published(architecture, tensors) for architecture in sample]
    plain = Plain(tensors)
    rows = {row.name: row.scores["synflow"] for row in pp.score_space(SPACE, architectures=sample, weights=tensors)}
    mine = [rows[name_of(architecture)] for architecture in sample]
    worst = 0.0
    for wanted, got, other in zip(exact, mine, map(plain.score, sample), strict=True):
        for value in (got, other):
            if (value == -math.inf) != (wanted == -math.inf):
                raise AssertionError(f"nas: {value} where the published loop finds {wanted}")
            worst = max(worst, abs(value - wanted) if wanted > -math.inf else 0.0)
    if worst > 1e-4:
        raise AssertionError(f"nas: log2 of a score differs by {worst}")
    places = sorted(range(len(sample)), key=mine.__getitem__)
    order = [exact[k] for k in places]
    swapped = sum(b < a - 1e-9 for a, b in pairwise(order))
    if swapped:
        raise AssertionError(f"nas: {swapped} of {len(sample)} neighbours are ranked another way in float64")
    return (
        f"{len(sample)} architectures: log2 of the sum within {worst:.1g} of the published loop in float64 (plain "
        f"PyTorch too), same ranks"
    )


def space(bandwidth: float, quick: bool, repeats: int = 1) -> Result:
    """Seconds per architecture; every repeat is a mean over many of them."""
    tensors, drawn = SPACE.draw(0), random.Random(0)
    everything = list(SPACE)
    sample = drawn.sample(everything, 24 if quick else 64)
    ours = drawn.sample(everything, 1500) if quick else everything
    fresh = drawn.sample(everything, 24 if quick else 200)
    verified = verify(sample, tensors)
    plain = Plain(tensors)

    def scored(cells: Sequence[Architecture], method: str = "synflow", weights: object = tensors) -> None:
        for _ in pp.score_space(SPACE, method, architectures=cells, weights=weights):  # type: ignore[arg-type]
            pass

    work = {
        "pathprune": (lambda: scored(ours), len(ours)),
        "pathprune, log2 R alone": (lambda: scored(ours, "log2_R"), len(ours)),
        "pathprune, fresh weights": (lambda: scored(fresh, weights="fresh"), len(fresh)),
        "published loop": (lambda: [published(architecture) for architecture in sample], len(sample)),
        "best PyTorch": (lambda: [plain.score(architecture) for architecture in sample], len(sample)),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in CLOCKS} for name in work}
    for _ in range(repeats):
        for name, (run, count) in work.items():
            for clock, value in clocked(run, torch.device("cpu")).items():
                seconds[name][clock].append(value / count)
    with peak_memory() as peak:
        scored(drawn.sample(everything, 1500))
    whole = len(everything) * statistics.median(seconds["pathprune"]["thread"])
    return Result(
        "SynFlow's sum, NAS-Bench-201's space, per architecture",
        verified,
        seconds,
        bandwidth=bandwidth,
        peak_bytes={"pathprune": peak.bytes},
        notes={
            "architectures": {name: count for name, (_, count) in work.items()},
            "whole space": f"{whole:.0f} s of one thread",
        },
    )
