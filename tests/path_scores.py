"""What the library says of a network: log2 R and the score of every weight, in float64; and checks of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pathprune.flow import PathFlow
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from pathprune.policy import policy_of
from pathprune.weights import weights_of
from positive import positive_scores

MAPS = (WeightMap.ABS, WeightMap.SQUARE, WeightMap.ONE)
SHAPES = {0: (1, 5), 1: (1, 2, 7), 2: (1, 2, 6, 5), 3: (1, 2, 4, 5, 4)}  # by number of spatial axes
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POWER = {WeightMap.ONE: 0.0, WeightMap.ABS: 1.0, WeightMap.SQUARE: 2.0}


def path_scores(
    network: PathNetwork,
    f: WeightMap = WeightMap.ABS,
    policy: str = "published",
    *,
    s: WeightMap | None = None,
    masks: Mapping[str, Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    source: Tensor | Sequence[Tensor] | None = None,
    log2: bool = False,
    **overrides: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """log2 R [E] and name -> scores [*shape], or [E, *shape] for an ensemble; with ``log2``, their log2."""
    weights = weights_of(network, network.prunable, (f, f if s is None else s), masks=masks, tensors=tensors)
    flow = PathFlow(network, weights, f=f, policy=policy_of(policy, **overrides), source=source)
    return scores_through(flow, log2)


def scores_through(flow: PathFlow, log2: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of a flow: forward, backward, and the scores that made."""
    total = flow.forward()
    flow.backward()
    scores = {}
    for name in flow.network.prunable:
        weight = flow.weights[name]
        written = weight.written_scores()
        exponent = weight.exponents if weight.members > 1 else torch.tensor([written.exponent])
        values = written.weight.double().reshape(weight.members, -1)
        exponent = exponent.double()[:, None]
        made = values.log2() + exponent if log2 else values * exponent.exp2()
        scores[name] = made.reshape(weight.shape)
    return total, scores


def assert_scores_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], rtol: float = 1e-10) -> None:
    """Equal to ``rtol``, measured against the largest score of each tensor where scores are tiny."""
    assert list(got) == list(wanted)
    for name, expected in wanted.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            got[name],
            expected,
            rtol=rtol,
            atol=rtol * 1e-3 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """float64, every parameter and running statistic drawn, signs mixed; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or name.endswith("constant"):
            continue
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return model


class Sandwich(nn.Module):
    """An operator between two synapses, so that both its forward and its backward flow make scores."""

    def __init__(self, *middle: nn.Module, dims: int = 2, channels: int = 4, shape: Sequence[int] = ()) -> None:
        super().__init__()
        shape = tuple(shape) or SHAPES[dims]
        self.example = torch.ones(shape, dtype=torch.float64)
        self.before = CONVS[dims](shape[1], channels, 3, padding=1) if dims else nn.Linear(shape[-1], channels)
        self.middle = nn.Sequential(*middle)
        self.double().eval()
        self.after = nn.Linear(self.middle(self.before(self.example)).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.middle(self.before(x)).flatten(1))


def check(model: nn.Module, *examples: Tensor, seed: int = 0, **overrides: str) -> None:
    """log2 R and every score, for both policies and every weight map."""
    model = randomised(model, seed)
    ones = [torch.ones_like(x) if x.is_floating_point() else x for x in examples]
    network = PathNetwork.from_module(model, tuple(examples))
    for policy in ("published", "paths"):
        for f in MAPS:
            wanted_total, wanted = positive_scores(model, ones, POWER[f], policy, **overrides)
            total, got = path_scores(network, f, policy, **overrides)
            assert math.isclose(float(total), math.log2(wanted_total), rel_tol=0, abs_tol=1e-11), (policy, f)
            assert_scores_close(got, wanted)


def check_sandwich(*middle: nn.Module, **options: object) -> None:
    model = Sandwich(*middle, **options)
    check(model, model.example)
