"""The whole library on a GPU: what it finds there is what it finds on the CPU, and the model stays where it was.

Without a GPU, `PATHPRUNE_PRETEND_CUDA=1 pytest -m cuda` runs it on one that is pretended (pretended_cuda.py).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp
from pathprune.network import PathNetwork
from test_pruning import X, small

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda", 0)
ONE = X[:1]


class Branch(nn.Module):
    """A convolution that ends a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 6, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


class Chain(nn.Module):
    """Convolutions and a head without biases, no pooling but the mean: what the tangent kernels take."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, stride=2, bias=False)
        self.second = Branch()
        self.head = nn.Linear(6, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + self.second(x)
        return self.head(x.mean((2, 3)))


def chain() -> Chain:
    torch.manual_seed(3)
    return Chain().double().eval()


def there(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(GPU)


def batches(device: torch.device | str = "cpu", count: int = 2) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    draw: list[tuple[Tensor, Tensor]] = []
    for _ in range(count):
        x = torch.randn(4, *X.shape[1:], generator=made, dtype=torch.float64)
        draw.append((x.to(device), torch.randint(0, 10, (4,), generator=made).to(device)))
    return draw


def inputs(device: torch.device | str = "cpu") -> list[Tensor]:
    return [x for x, _ in batches(device)]


PRUNERS: dict[str, Callable[[Any], pp.Pruner]] = {
    "magnitude": lambda d: pp.Magnitude(),
    "random": lambda d: pp.Random(),
    "synflow": lambda d: pp.SynFlow(rounds=4),
    "synflow_l2": lambda d: pp.SynFlowL2(rounds=3),
    "synflow_l2_phew": lambda d: pp.SynFlowL2(rounds=3, variant="phew"),
    "synflow_dist": lambda d: pp.SynFlowDist(inputs(d)[0][0].abs()),
    "synflow_l2_dist": lambda d: pp.SynFlowL2Dist(inputs(d)),
    "trace_saliency": lambda d: pp.TraceSaliency(rounds=3),
    "phew": lambda d: pp.PHEW(),
    "phew_mass": lambda d: pp.PHEW(branches="mass"),
    "phew_flow": lambda d: pp.PHEW(branches="flow"),
    "px": lambda d: pp.PX(inputs(d), rounds=3),
    "px_author": lambda d: pp.PX(inputs(d), rounds=2, variant="released"),
    "px_exact": lambda d: pp.PXExact(batches(d)),
    "snip": lambda d: pp.SNIP(batches(d)),
    "iter_snip": lambda d: pp.IterSNIP(batches(d), rounds=2),
    "force": lambda d: pp.FORCE(batches(d), rounds=2),
    "grasp": lambda d: pp.GraSP(batches(d)),
    "fisher": lambda d: pp.Fisher(batches(d)),
    "hutchinson": lambda d: pp.Hutchinson(batches(d)),
    "sbp": lambda d: pp.SBP(batches(d)),
    "wanda": lambda d: pp.Wanda(inputs(d)),
    "ntk_sap": lambda d: pp.NTKSAP(rounds=2),
    "sketch": lambda d: pp.Sketch(pp.SynFlow(rounds=2)),
}


@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_finds_the_same(name: str) -> None:
    model = small()
    gpu_model = there(model)
    before = {key: value.clone() for key, value in gpu_model.state_dict().items()}
    wanted = pp.prune(model, PRUNERS[name]("cpu"), density=0.2, example_input=ONE, progress=False)
    found = pp.prune(gpu_model, PRUNERS[name](GPU), density=0.2, example_input=ONE.to(GPU), progress=False)
    assert found == wanted
    assert all(mask.device.type == "cpu" for mask in found.values())
    for key, value in gpu_model.state_dict().items():
        assert value.device == GPU
        assert torch.equal(value, before[key])


def masks_of(model: nn.Module) -> pp.Masks:
    device = next(model.parameters()).device
    return pp.prune(model, pp.Random(), density=0.5, example_input=ONE.to(device), progress=False, seed=4)


def loss_after_steps(model: nn.Module, device: torch.device | str) -> Any:
    """Two steps of training under masks that are maintained."""
    masks = masks_of(model)
    masks.apply_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with masks.maintain(model, optimizer):
        for x, y in batches(device):
            optimizer.zero_grad()
            pp.cross_entropy(model(x), y).backward()
            optimizer.step()
    for name, weight in model.named_parameters():
        if name in masks:
            assert not bool(weight[~masks[name].to(weight.device)].any())
    return dict(model.state_dict())


def outputs_when_sparse(model: nn.Module, device: torch.device | str) -> Any:
    """Forward and backward by sparse layers, and the dense model again."""
    masks = masks_of(model)
    masks.apply_(model)
    pp.sparsify(model, masks, min_speedup=0.0, prefer="smaller")
    x = inputs(device)[0].requires_grad_()
    y = model(x)
    y.square().sum().backward()
    pp.densify(model)
    return y.detach(), x.grad, dict(model.state_dict()), model(x).detach()


def targets(device: Any) -> Tensor:
    return torch.eye(4, 10, dtype=torch.float64).to(device)


def kernel(model: nn.Module, device: Any, masked: bool = True) -> pp.PathKernel:
    masks = masks_of(model) if masked else None
    return pp.PathKernel(model, ONE.to(device), masks)


def drawn_paths(model: nn.Module, device: Any) -> Any:
    paths = pp.sample_paths(PathNetwork.from_module(model, ONE.to(device)), 50, seed=2)
    return [value for value in vars(paths).values() if isinstance(value, Tensor)]


def shown(report: Any) -> str:
    return re.sub(r"[\d.]+ s\b", "seconds", str(report))


# (model, where it lies) -> what is found.
FINDINGS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Any], Any]]] = {
    "trace": (chain, lambda m, d: kernel(m, d).log2_trace()),
    "diagonal": (chain, lambda m, d: kernel(m, d).diagonal()),
    "shares": (small, lambda m, d: (kernel(m, d).shares(), kernel(m, d).branch_shares())),
    "trace_loss": (chain, lambda m, d: kernel(m, d).trace_loss()),
    "quadratic_form": (chain, lambda m, d: (kernel(m, d).quadratic_form(), kernel(m, d).rank())),
    "matvec": (chain, lambda m, d: kernel(m, d).matvec({n: w.detach() for n, w in m.named_parameters()})),
    "eigenvalues": (chain, lambda m, d: kernel(m, d).top_eigenvalues(3, progress=False)),
    "frobenius": (chain, lambda m, d: kernel(m, d).frobenius(probes=4)),
    "density": (chain, lambda m, d: vars(kernel(m, d).spectral_density(probes=2, steps=5))),
    "scores": (small, lambda m, d: pp.scores(m, pp.SynFlow(), example_input=ONE.to(d)).tensors),
    "scores_masked": (
        small,
        lambda m, d: pp.scores(m, pp.SynFlowL2(), example_input=ONE.to(d), masks=masks_of(m)).tensors,
    ),
    "scores_px": (small, lambda m, d: pp.scores(m, pp.PX(inputs(d)), example_input=ONE.to(d)).tensors),
    "many": (small, lambda m, d: [r.scores for r in pp.score_many([m, m], example_input=ONE.to(d))]),
    "counts": (small, lambda m, d: shown(pp.path_counts(m, masks_of(m), ONE.to(d)))),
    "report": (small, lambda m, d: shown(masks_of(m).report(m, ONE.to(d)))),
    "paths": (chain, drawn_paths),
    "compare": (chain, lambda m, d: len(shown(pp.compare(m, {"a": masks_of(m)}, ONE.to(d), data=batches(d))))),
    "allocate": (small, lambda m, d: dict(pp.allocate(m, 0.3, by="erk", example_input=ONE.to(d)))),
    "rescale": (chain, lambda m, d: (len(shown(pp.rescale_(m, masks_of(m), example_input=ONE.to(d)))), m.state_dict())),
    "stable": (chain, lambda m, d: (len(shown(pp.stable_resnet(m, ONE.to(d)))), m(inputs(d)[0]).detach())),
    "ntk": (chain, lambda m, d: pp.ntk(m, inputs(d)[0], masks_of(m))),
    "ntk_trace": (chain, lambda m, d: pp.ntk_trace(m, inputs(d), masks_of(m))),
    "ntk_probes": (chain, lambda m, d: pp.ntk_trace(m, inputs(d), masks_of(m), probes=3)),
    "ntk_bound": (chain, lambda m, d: pp.ntk_trace_bound(m, inputs(d), masks_of(m))),
    "activations": (chain, lambda m, d: pp.path_activations(m, inputs(d)[0], masks_of(m), full=True)),
    "convergence": (chain, lambda m, d: vars(pp.predict_convergence(m, inputs(d)[0], targets(d), steps=5))),
    "masked_convergence": (
        chain,
        lambda m, d: vars(pp.predict_convergence(m, inputs(d)[0], targets(d), steps=5, masks=masks_of(m))),
    ),
    "moments": (chain, lambda m, d: shown(pp.gradient_moments(m, batches(d), pp.cross_entropy, masks_of(m)))),
    "training": (small, loss_after_steps),
    "sparse": (chain, outputs_when_sparse),
    "labels": (small, lambda m, d: list(pp.random_labels(batches(d), 10, 3))),
    "pixels": (small, lambda m, d: list(pp.shuffled_pixels(batches(d), 3))),
    "reinit": (small, lambda m, d: [v.shape for v in pp.reinit(m, 3).state_dict().values()]),
    "layers": (small, lambda m, d: pp.prune(pp.layer_network(m), pp.Magnitude(), density=0.2, example_input=None)),
    "soup": (small, lambda m, d: pp.Masks.from_model(masks_of(m).apply_(m))),
}


def here(value: Any) -> Any:
    """What was found, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, pp.Masks):
        return value.to("cpu")
    if isinstance(value, dict):
        return {key: here(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [here(v) for v in value]
    return value


@pytest.mark.parametrize("name", FINDINGS)
def test_it_finds_the_same(name: str) -> None:
    make, find = FINDINGS[name]
    wanted = find(make(), "cpu")
    found = find(there(make()), GPU)
    if isinstance(wanted, (str, pp.Masks)):
        assert here(found) == here(wanted)
    else:
        torch.testing.assert_close(here(found), here(wanted), rtol=1e-9, atol=1e-9)


def test_an_example_that_stayed_on_the_cpu_is_told() -> None:
    with pytest.raises(pp.UnsupportedModelError, match="example_input: wanted tensors on cuda:0, got cpu"):
        PathNetwork.from_module(there(chain()), ONE.double())
