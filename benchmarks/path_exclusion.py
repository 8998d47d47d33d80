"""PX: rounds along a 100-round schedule, against the published loop and the best plain PyTorch.

The published loop, as its last version was read: three copies of the model a round, ReLUs recorded and replayed by a
patched ``F.relu``, both nets in train mode with an autograd graph over the batch (the path net is fed a batch of equal
images of ones), all scores concatenated for ``kthvalue``. It computes another saliency than the paper's (see
``pathprune.PX``); the comparison is of the work a round takes. The best plain PyTorch computes the paper's: gates and
data factor without a graph, one backward row, three copies made once, flows divided by their maximum between blocks
so that float32 does (autograd would overflow).

Rounds 1, 25, 50, 75 and 100 are measured, each from the masks that the schedule has there (ours behind two others,
which are not measured: a schedule knows how its threshold moves).

python benchmarks/path_exclusion.py    how far PX agrees with what knows no data, on scikit-learn's digits
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from harness import Case, Result
from pathprune import models
from pathprune.network import PathNetwork
from pathprune.pruners.base import Scope, Selection, run
from pathprune.spatial import merge_equal_positions
from pathprune.weights import weights_of

ROUNDS = (1, 25, 50, 75, 100)
Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Setting:
    name: str
    make: Callable[[], nn.Module]


SETTINGS = {
    "resnet20": Setting("ResNet-20 for 32x32", models.resnet20),
    "vgg16": Setting("VGG-16-BN for 32x32", models.vgg16_bn),
}


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def published_round(model: nn.Module, x: Tensor, masks: Masks, density: float) -> dict[str, Tensor]:
    """One round of the published loop; returns the new masks."""
    real, data, path = (copy.deepcopy(model) for _ in range(3))
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    twin = dict(zip(model.modules(), path.modules(), strict=True))
    kept = {id(p) for m in path.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    kept |= {id(p) for p in twin[head].parameters()}
    kept_in_data = {id(q) for p, q in zip(path.parameters(), data.parameters(), strict=True) if id(p) in kept}
    for name in masks:
        for net in (real, data, path):
            net.get_parameter(name).data.mul_(masks[name])
    for p in path.parameters():
        if id(p) not in kept:
            p.data.square_()
    for name, p in data.named_parameters():
        if id(p) not in kept_in_data:
            p.data = masks[name].float() if name in masks else torch.ones_like(p)
    relu, gates = F.relu, []

    def recording(z: Tensor, inplace: bool = False) -> Tensor:
        out = relu(z)
        gates.append((out > 0).float())
        return out

    try:
        F.relu = recording
        with torch.no_grad():
            real.eval()(x)
        replay = iter(gates)
        F.relu = lambda z, inplace=False: z * next(replay)
        factor = data.train()(x.square())
        F.relu = lambda z, inplace=False: z
        flow = path.train()(torch.ones_like(x))
    finally:
        F.relu = relu
    (factor * flow).sum().backward()
    scores = {name: (path.get_parameter(name).grad.abs() * path.get_parameter(name)).detach().abs() for name in masks}
    everything = torch.cat([score.flatten() for score in scores.values()])
    threshold, _ = torch.kthvalue(everything, max(int((1 - density) * everything.numel()), 1))
    return {name: score > threshold for name, score in scores.items()}


class PlainPX:
    """The paper's saliency in plain torch, for these two networks: modules swapped once, no graph over the data."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.x, self.weights = x, {name: p.detach() for name, p in prunable(model).items()}
        self.gates: list[Tensor] = []
        self.winners: list[Tensor] = []
        self.replay = iter(())
        self.real = self._swapped(model, "real").eval()
        self.data = self._swapped(model, "data").eval()
        self.path = self._swapped(model, "path").eval()

    def _swapped(self, model: nn.Module, kind: str) -> nn.Module:
        outer = self

        class Relu(nn.Module):
            def forward(self, z: Tensor) -> Tensor:
                if kind == "real":
                    out = torch.relu(z)
                    outer.gates.append(out > 0)
                    return out
                return z * next(outer.replay) if kind == "data" else z

        class Pool(nn.Module):
            def forward(self, z: Tensor) -> Tensor:
                if kind == "real":
                    out, winners = F.max_pool2d(z, 2, return_indices=True)
                    outer.gates.append(winners)
                    return out
                if kind == "data":
                    winners = next(outer.replay)
                    return z.flatten(2).gather(2, winners.flatten(2)).reshape(winners.shape)
                return 4 * F.avg_pool2d(z, 2)

        class Norm(nn.Module):
            def __init__(self, norm: nn.BatchNorm2d) -> None:
                super().__init__()
                scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().square()
                self.scale = scale.reshape(1, -1, 1, 1)

            def forward(self, z: Tensor) -> Tensor:
                return z if kind == "data" else z * self.scale

        class Rescaled(nn.Module):
            """Every path crosses here, so dividing by one number changes no ranking."""

            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, z: Tensor) -> Tensor:
                out = self.inner(z)
                return out / out.detach().amax()

        class Block(nn.Module):
            def __init__(self, block: models.BasicBlock) -> None:
                super().__init__()
                self.body, self.shortcut, self.after = block.body, block.shortcut, Relu()

            def forward(self, z: Tensor) -> Tensor:
                return self.after(self.body(z) + self.shortcut(z))

        class Mean(nn.Module):
            def forward(self, z: Tensor) -> Tensor:
                positions = z.shape[2] * z.shape[3]
                total = z.sum((2, 3), keepdim=True)
                return total if kind == "data" else total / positions ** (2 if kind == "path" else 1)

        def swap(parent: nn.Module) -> None:
            for name, child in parent.named_children():
                swap(child)
                made: Any = None
                if isinstance(child, nn.ReLU):
                    made = Relu()
                elif isinstance(child, nn.MaxPool2d):
                    made = Pool()
                elif isinstance(child, nn.BatchNorm2d) and kind != "real":
                    made = Norm(child)
                elif isinstance(child, models.BasicBlock):
                    made = Block(child) if kind == "real" else Rescaled(Block(child))
                elif isinstance(child, nn.AdaptiveAvgPool2d):
                    made = Mean()
                elif isinstance(child, nn.Conv2d) and parent is net and kind != "real":
                    made = Rescaled(child)
                if made is not None:
                    setattr(parent, name, made)

        net = copy.deepcopy(model)
        swap(net)
        if kind != "path":
            net.requires_grad_(False)
        return net

    def round(self, masks: Masks, density: float) -> dict[str, Tensor]:
        layers = [[m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))] for net in self._nets()]
        for name, real, data, path in zip(self.weights, *layers, strict=True):
            mask = masks[name].float()
            torch.mul(self.weights[name], mask, out=real.weight.data)
            data.weight.data.copy_(mask)
            torch.mul(real.weight.data, real.weight.data, out=path.weight.data)
            path.weight.grad = None
        for net in (self.data, self.path):
            for layer in net.modules():
                if getattr(layer, "bias", None) is not None:
                    layer.bias.data.zero_()
        self.gates.clear()
        with torch.no_grad():
            self.real(self.x)
            self.replay = iter(self.gates)
            reach = self.data(self.x.square()).sum(0)
        flow = self.path(torch.ones_like(self.x[:1]))[0]
        (flow * (reach / reach.amax())).sum().backward()
        scores = [path.weight.grad.mul_(path.weight.detach()).flatten() for path in layers[2]]
        everything = torch.cat(scores)
        count = everything.numel()
        threshold, _ = torch.kthvalue(everything, count - round(density * count) + 1)
        return {n: (s >= threshold).reshape(masks[n].shape) for n, s in zip(self.weights, scores, strict=True)}

    def _nets(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.real, self.data, self.path


class OurPX:
    """Rounds as ``prune`` runs them, from given masks."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.network = PathNetwork.from_module(model, x[:1])
        self.quick = merge_equal_positions(self.network)
        self.pruner = pp.PX([x])

    def at(self, masks: Masks, plan: Sequence[float]) -> tuple[dict[str, Tensor], Callable[[], dict[str, Tensor]]]:
        """The masks before the last of the planned rounds, and that round."""
        names = self.network.select()
        weights = weights_of(self.quick, names, self.pruner.maps, masks=masks, compact=0.25)
        selection = Selection(weights, names, Scope.of("global"))
        scorer = self.pruner.scorer(self.quick, weights, 0)

        rounds = run(scorer, selection, [(d, None) for d in plan], lambda d: dict.fromkeys(names, d), lambda _: None)
        for _ in plan[1:]:
            next(rounds)
        before = {name: weights[name].bits() for name in names}

        def step() -> dict[str, Tensor]:
            next(rounds)
            return {name: weights[name].bits() for name in names}

        return before, step


def rounds(key: str, bandwidth: float, images: int = 100, density: float = 0.018, repeats: int = 2) -> Result:
    """Rounds 1, 25, 50, 75 and 100 of a schedule to ``density``."""
    setting = SETTINGS[key]
    torch.manual_seed(0)
    model, x = setting.make().eval(), torch.randn(images, 3, 32, 32)
    ours, plain = OurPX(model, x), PlainPX(model, x)
    targets = [density ** (r / 100) for r in range(101)]
    # from masks that the schedule has two rounds earlier: thresholds are guessed from the rounds before
    stops = [targets[r - 3] for r in ROUNDS if r > 1]
    found = pp.prune(ours.network, pp.PX([x[:20]], rounds=20), density=stops, progress=False)
    full = {name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(model).items()}
    begun = [full, *(dict(m) for m in found)]
    plans = [targets[1:2], *(targets[r - 2 : r + 1] for r in ROUNDS if r > 1)]
    starts = [(ours.at(m, plan)[0], plan[-1]) for m, plan in zip(begun, plans, strict=True)]

    def verify() -> str:
        differing = total = 0
        for m, plan in list(zip(begun, plans, strict=True))[::2]:
            masks, step = ours.at(m, plan)
            mine, other = step(), plain.round(masks, plan[-1])
            differing += sum(int((mine[name] != other[name]).sum()) for name in mine)
            total += sum(mask.numel() for mask in mine.values())
        if differing > 2e-5 * total + 20:
            raise AssertionError(f"PX: {differing} of {total} bits differ from plain float32")
        return f"masks after three of the rounds compared with plain PyTorch: {differing} of {total} bits differ"

    case = Case(f"PX, {images} images, rounds {', '.join(map(str, ROUNDS))} of 100, {setting.name}", verify)
    setup = lambda: [ours.at(m, plan)[1] for m, plan in zip(begun, plans, strict=True)]  # noqa: E731
    case.add("pathprune", lambda steps: [step() for step in steps], setup=setup)
    case.add("published loop", lambda: [published_round(model, x, masks, goal) for masks, goal in starts])
    case.add("best PyTorch", lambda: [plain.round(masks, goal) for masks, goal in starts])
    return case.measure(repeats, warmup=0, bandwidth=bandwidth)


def digits(count: int) -> Tensor:
    """Real images: handwritten digits, enlarged to 3 x 32 x 32 and standardised."""
    from sklearn.datasets import load_digits

    small = torch.as_tensor(load_digits().images[:count], dtype=torch.float32)[:, None]
    large = F.interpolate(small, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return (large - large.mean()) / large.std()


def agreement(path: Path, images: int = 64) -> None:
    """The share of kept weights that the masks of two methods have in common, ResNet-20, 100 rounds."""
    torch.manual_seed(0)
    model, x = models.resnet20().eval(), digits(images)
    network = PathNetwork.from_module(model, x[:1])
    labels = torch.arange(images) % 10
    methods = {
        "PX": pp.PX([x]),
        "PX, other images": pp.PX([digits(2 * images)[images:]]),
        "PX, released": pp.PX([x], "released"),
        "PXExact": pp.PXExact([(x, labels)]),
        "SNIP": pp.SNIP([(x, labels)]),
        "u dR/du, no data": pp.SynFlowL2(policy="paths"),
        "SynFlow": pp.SynFlow(),
    }
    found = {}
    for density in (0.1, 0.018):
        masks = {name: pp.prune(network, method, density=density, progress=False) for name, method in methods.items()}
        kept = sum(int(mask.sum()) for mask in masks["PX"].values())
        for name, other in masks.items():
            common = sum(int((masks["PX"][n] & other[n]).sum()) for n in other)
            found.setdefault(name, {})[str(density)] = round(common / kept, 4)
            print(f"{name:>18} at {density:.1%}: {common / kept:.1%} of PX's weights", flush=True)
    path.write_text(json.dumps({"images": images, "network": "ResNet-20", "in common with PX": found}, indent=1) + "\n")


if __name__ == "__main__":
    agreement(Path(__file__).parent / "results" / "px_agreement.json")
