"""The neural tangent kernel through paths: against torch.func, against enumerated paths, and its bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import pathprune as pp
from pathprune.network import PathNetwork
from pathprune.path_gram import gram
from test_path_exclusion import images, small


def conv_net() -> tuple[nn.Module, Tensor]:
    return small(2), images(4, seed=9)


def mlp(bias: bool = False, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    sizes = ((3, 4), (4, 5), (5, 2))
    layers = [m for i, o in sizes for m in (nn.Linear(i, o, bias=bias), nn.ReLU())][:-1]
    return nn.Sequential(*layers).double(), torch.randn(4, 3).double()


def smooth() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    layers = (nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.LeakyReLU(0.2), nn.Linear(4, 3))
    return nn.Sequential(*layers).double(), torch.randn(3, 3).double()


def residual() -> tuple[nn.Module, Tensor]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.last(torch.relu(x + self.inner(x)))

    torch.manual_seed(2)
    return Net().double(), torch.randn(3, 3).double()


NETS = {"conv": conv_net, "mlp": mlp, "biases": lambda: mlp(True), "leaky": smooth, "residual": residual}


def by_torch(model: nn.Module, x: Tensor, names: tuple[str, ...], masks: dict[str, Tensor] | None = None) -> Tensor:
    """torch.func's Jacobian by the prunable weights, [n, outputs, weights]; by the products w * m where masked."""
    own = {n: p.detach() * (masks[n] if masks else 1) for n, p in model.named_parameters() if n in names}
    made = jacrev(lambda leaves: functional_call(model, leaves, x))(own)
    return torch.cat([made[n].detach().flatten(2) * (masks[n].flatten() if masks else 1) for n in names], 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_kernel_is_that_of_torch_func(name, masked):
    model, x = NETS[name]()
    network = PathNetwork.from_module(model, x[:1])
    generator = torch.Generator().manual_seed(0)
    masks = None
    if masked:
        masks = {n: torch.rand(network.tensors[n].shape, generator=generator) < 0.7 for n in network.prunable}
    jacobian = by_torch(model, x, network.prunable, masks)
    wanted = torch.einsum("nki,mli->nkml", jacobian, jacobian)
    found = pp.ntk(network, x, masks)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))
    trace = pp.ntk_trace(network, [x[:1], x[1:]], masks)
    assert trace == pytest.approx(float(jacobian.square().sum()), rel=1e-11)


def test_trace_by_probes_is_unbiased():
    model, x = conv_net()
    exact = pp.ntk_trace(model, [x])
    draws = torch.tensor(
        [pp.ntk_trace(model, [x[:2], x[2:]], probes=2, seed=s) for s in range(60)], dtype=torch.float64
    )
    error = float(draws.std()) / math.sqrt(60)
    assert abs(float(draws.mean()) - exact) < 4 * error
    assert error < 0.1 * exact
    assert pp.ntk_trace(model, [x], probes=3, seed=7) == pp.ntk_trace(model, [x], probes=3, seed=7)


def test_the_decomposition_over_all_paths():
    """Theta = J_f Pi J_f^T with J_f and Pi written out path by path; and the data factor by one gated flow."""
    model, x = mlp()
    whole = gram(model, x[:1])
    weights = [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]
    offsets = [0, 12, 32]
    widths = [3, 4, 5]
    gates, z = [], x
    for w in weights[:-1]:
        z = (z @ w.T).relu()
        gates.append((z > 0).double())
    opened = torch.zeros(len(x), 2, len(whole.values), dtype=torch.float64)
    for p, (a, b, c) in enumerate(whole.weights):
        (h1, i), (h2, h1b), (k, h2b) = (divmod(w - o, n) for w, o, n in zip((a, b, c), offsets, widths, strict=True))
        assert (h1, h2) == (h1b, h2b)
        opened[:, k, p] = x[:, i] * gates[0][:, h1] * gates[1][:, h2]
    flat = opened.flatten(0, 1)
    wanted = (flat @ whole.kernel @ flat.T).unflatten(1, (4, 2)).unflatten(0, (4, 2))
    torch.testing.assert_close(pp.ntk(model, x), wanted, rtol=1e-10, atol=1e-12)
    pairs = torch.einsum("nkp,mkp->nmk", opened, opened)
    torch.testing.assert_close(pp.path_activations(model, x, full=True), pairs, rtol=1e-11, atol=1e-12)
    diagonal = torch.einsum("nnk->nk", pairs)
    torch.testing.assert_close(pp.path_activations(model, x).exp2(), diagonal, rtol=1e-11, atol=1e-12)


def test_the_bound_holds_and_is_what_it_says():
    for seed in range(4):
        model, x = mlp(seed=seed)
        trace, bound = pp.ntk_trace(model, [x]), pp.ntk_trace_bound(model, [x[:1], x[1:]])
        assert math.log2(trace) <= bound + 1e-12
        reach = pp.path_activations(model, x).exp2().sum(0)
        total = 0.0
        for k in range(2):
            masks = {"4.weight": torch.zeros(2, 5, dtype=torch.bool)}
            masks["4.weight"][k] = True
            total += float(reach[k]) * pp.PathKernel(model, x[:1], masks).trace()
        assert bound == pytest.approx(math.log2(total), abs=1e-10)
    model, x = mlp()
    model[2].weight.data.zero_()
    assert pp.ntk_trace_bound(model, [x]) == -math.inf  # no gate opens behind it
    closed = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    assert pp.ntk_trace_bound(model, [x], closed) == -math.inf


def test_refusals():
    model, x = mlp()

    class Larger(nn.Module):
        """Zeros where a constant of the model is below them: what is filled in has no path."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.where(self.a.bias > 0, self.a(x), -1e4))

    with pytest.raises(ValueError, match="sum over its open paths"):
        pp.ntk(Larger().double(), x)
    with pytest.raises(ValueError, match="gates that move by steps"):
        pp.ntk(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double(), x)
    with pytest.raises(TypeError, match="only once"):
        pp.ntk_trace(model, iter([x]))
    with pytest.raises(ValueError, match="at least one batch"):
        pp.ntk_trace(model, [])
    with pytest.raises(ValueError, match="probes: wanted at least 1"):
        pp.ntk_trace(model, [x], probes=0)
