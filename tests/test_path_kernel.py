"""The path kernel against the matrix of all enumerated paths, and its theorems on networks too large to enumerate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp
from enumeration import Units
from pathprune import models
from pathprune.network import PathNetwork
from pathprune.path_gram import gram


class Skip(nn.Module):
    def __init__(self, inner: nn.Module, outer: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.outer(x)


class Cat(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


def conv(i: int, o: int, k: int = 2, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, bias=False, **options)


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (1, 3)),
    "skip": (lambda: nn.Sequential(nn.Linear(2, 3), Skip(nn.Linear(3, 3)), nn.Linear(3, 2)), (1, 2)),
    "projection": (lambda: nn.Sequential(Skip(nn.Linear(3, 2), nn.Linear(3, 2)), nn.ReLU(), nn.Linear(2, 2)), (1, 3)),
    "conv": (
        lambda: nn.Sequential(
            *(conv(1, 2, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2))
        ),
        (1, 1, 2, 2),
    ),
    "grouped": (
        lambda: nn.Sequential(conv(2, 4, groups=2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 2)),
        (1, 2, 3, 3),
    ),
    "transposed": (
        lambda: nn.Sequential(
            *(
                conv(1, 2),
                nn.ConvTranspose2d(2, 1, 2, bias=False),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(1, 2),
            )
        ),
        (1, 1, 3, 3),
    ),
    "cat": (lambda: nn.Sequential(Cat(conv(1, 1), conv(1, 2)), nn.Flatten(), nn.Linear(12, 1)), (1, 1, 3, 3)),
    "constant image": (  # merges positions: patches become rows
        lambda: nn.Sequential(conv(2, 2, 3, padding=1), nn.ReLU(), conv(2, 1, 2, stride=2), nn.Flatten()),
        (1, 2, 4, 4),
    ),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    make, shape = NETS[name]
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, torch.ones(shape, dtype=torch.float64)


def random_masks(network: PathNetwork, density: float, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(network.tensors[n].shape, generator=generator) < density for n in network.prunable}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_against_all_paths(name, masked):
    model, x = made(name)
    network = PathNetwork.from_module(model, x)
    masks = random_masks(network, 0.75) if masked else None
    whole = gram(network, masks=masks)
    kernel = pp.PathKernel(network, masks=masks)
    g = whole.gram
    assert kernel.trace() == pytest.approx(float(whole.kernel.trace()), rel=1e-12)
    assert kernel.log2_trace() == pytest.approx(math.log2(float(g.trace())), abs=1e-11)
    live = torch.ones(len(g), dtype=torch.bool) if masks is None else torch.cat([masks[n].flatten() for n in masks])
    diagonal = torch.cat([kernel.diagonal()[n].flatten() for n in network.prunable])
    torch.testing.assert_close(diagonal, g.diagonal() * live, rtol=1e-12, atol=1e-14)
    shares = kernel.shares()
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    first = network.prunable[0]
    count = network.tensors[first].numel()
    assert shares[first] == pytest.approx(float(g.diagonal()[:count][live[:count]].sum() / g.trace()), rel=1e-11)
    assert kernel.quadratic_form() == pytest.approx(float(whole.kernel.sum()), rel=1e-10)
    for seed in range(3):
        x = torch.randn(len(g), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        product = kernel.matvec(x)
        torch.testing.assert_close(product, g @ (x * live), rtol=1e-11, atol=1e-12 * float(g.abs().max()))
    lost = kernel.trace_loss()
    flat = torch.cat([lost[n].flatten() for n in network.prunable])
    for j in live.nonzero()[:, 0][::3].tolist():
        sharper = {n: m.clone() for n, m in (masks or all_of(network)).items()}
        offset = j
        for n in network.prunable:
            if offset < sharper[n].numel():
                sharper[n].view(-1)[offset] = False
                break
            offset -= sharper[n].numel()
        without = pp.PathKernel(network, masks=sharper).trace()
        assert float(flat[j]) == pytest.approx(kernel.trace() - without, rel=1e-9, abs=1e-10 * kernel.trace())


def all_of(network: PathNetwork) -> dict[str, Tensor]:
    return {n: torch.ones(network.tensors[n].shape, dtype=torch.bool) for n in network.prunable}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_rank_is_weights_less_hidden_units(name, masked):
    model, x = made(name, seed=1)
    network = PathNetwork.from_module(model, x)
    masks = random_masks(network, 0.7) if masked else None
    whole = gram(network, masks=masks)
    assert pp.PathKernel(network, masks=masks).rank() == int(torch.linalg.matrix_rank(whole.jacobian, rtol=1e-10))


@pytest.mark.parametrize("name", NETS)
def test_eigenvalues(name):
    model, x = made(name)
    whole = gram(model, x)
    wanted = torch.linalg.eigvalsh(whole.gram).flip(0)
    k = min(4, len(wanted))
    values, vectors, residuals = pp.PathKernel(model, x).top_eigenpairs(k)
    torch.testing.assert_close(values, wanted[:k], rtol=1e-9, atol=1e-10 * float(wanted[0]))
    assert float(residuals[0]) < 1e-9
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k).double(), rtol=0, atol=1e-9)


def test_the_gram_matrix_itself_against_a_list_of_paths_made_elsewhere():
    """The enumerator of the library against that of the tests, which shares nothing with it."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2, bias=False)).double()
    whole = gram(model, torch.ones(1, 1, 3, 3).double())
    units = Units()
    source = units.source(torch.ones(1, 3, 3))
    flat = units.flat(units.conv(source, model[0].weight.detach(), "conv"))
    out = units.linear(flat, model[3].weight.detach(), "linear")
    wanted = sorted((value, tuple(k + 8 * (name == "linear") for name, k in ws)) for value, ws in units.paths(out))
    got = sorted(zip(whole.values.tolist(), whole.weights, strict=True))
    assert [w for _, w in got] == [w for _, w in wanted]
    torch.testing.assert_close(torch.tensor([v for v, _ in got]), torch.tensor([v for v, _ in wanted]))
    theta = torch.cat([model[0].weight.flatten(), model[3].weight.flatten()]).detach()
    for row in range(0, len(whole.values), 5):
        for i in whole.weights[row]:
            assert float(whole.jacobian[row, i]) == pytest.approx(float(whole.values[row] / theta[i]), rel=1e-12)


def test_lanczos_on_a_network_of_thousands_of_weights():
    """Against the matrix written out by its products, in both types, with and without masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), Skip(nn.Linear(20, 20)), nn.ReLU(), nn.Linear(20, 5)).double()
    x = torch.ones(1, 12).double()
    network = PathNetwork.from_module(model, x)
    kernel = pp.PathKernel(network)
    matrix = torch.stack([kernel.matvec(row) for row in torch.eye(740).double()])
    wanted = torch.linalg.eigvalsh(matrix).flip(0)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-10, atol=1e-12 * float(matrix.max()))
    assert float(wanted[1] - wanted[4]) < 1e-12, "four equal: the outputs enter by their sum"
    values, vectors, residuals = kernel.top_eigenpairs(8)
    torch.testing.assert_close(values, wanted[:8], rtol=1e-9, atol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(8).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=0, atol=1e-7 * float(wanted[0]))
    assert float(residuals.max()) < 1e-6
    single = pp.PathKernel(model.float(), x.float()).top_eigenvalues(6)
    torch.testing.assert_close(single, wanted[:6], rtol=2e-4, atol=0)
    model.double()
    masks = random_masks(network, 0.5)
    masked = pp.PathKernel(network, masks=masks)
    rows = torch.stack([masked.matvec(row) for row in torch.eye(740).double()])
    values, vectors, _ = masked.top_eigenpairs(3)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(rows).flip(0)[:3], rtol=1e-9, atol=0)
    pruned = ~torch.cat([masks[n].flatten() for n in network.prunable])
    assert not bool(vectors[pruned].any())


def test_the_leading_eigenvector_has_the_signs_of_the_weights():
    model, x = made("mlp")
    network = PathNetwork.from_module(model, x)
    _, vectors, _ = pp.PathKernel(network).top_eigenpairs(1)
    signs = torch.cat([network.tensors[n].sign().flatten() for n in network.prunable])
    along = vectors[:, 0] * signs
    assert bool((along >= -1e-12).all()) or bool((along <= 1e-12).all())


def test_estimates_of_norm_and_density():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    kernel = pp.PathKernel(model, torch.ones(1, 8).double())
    matrix = torch.stack([kernel.matvec(row) for row in torch.eye(448).double()])
    values = torch.linalg.eigvalsh(matrix)
    frobenius = float(matrix.norm())
    level, error = kernel.log2_frobenius(probes=64, seed=1)
    assert abs(2**level - frobenius) < 4 * error * frobenius and error < 0.2
    effective = kernel.trace() ** 2 / frobenius**2
    assert kernel.effective_rank(probes=64, seed=1) == pytest.approx(effective, rel=8 * error)
    density = kernel.spectral_density(probes=24, steps=30, seed=2)
    assert float(density.weights.sum()) == pytest.approx(1, abs=1e-12)
    mean = float((density.weights * density.log2_values.exp2()).sum()) * density.size
    assert mean == pytest.approx(kernel.trace(), rel=4 * density.spread / math.sqrt(24) + 1e-6)
    for share in (0.5, 0.9):
        level = math.log2(float(values.sort().values[int(share * len(values))]))
        assert density.count_above(level) == pytest.approx((1 - share) * len(values), abs=0.08 * len(values))
    again = kernel.spectral_density(probes=24, steps=30, seed=2)
    assert torch.equal(again.log2_values, density.log2_values)


def test_deep_networks_do_not_overflow():
    """A trace beyond float64: its log2, shares and leading eigenvalues are finite, the plain numbers inf."""
    torch.manual_seed(0)
    layers = [module for _ in range(300) for module in (nn.Linear(6, 6), nn.ReLU())]
    model = nn.Sequential(*layers)
    for p in model.parameters():
        p.data.mul_(20)
    kernel = pp.PathKernel(model, torch.ones(1, 6))
    assert kernel.log2_trace() > 1100 and kernel.trace() == math.inf
    assert sum(kernel.shares().values()) == pytest.approx(1, abs=1e-6)
    level = kernel.log2_top_eigenvalues(2)
    assert bool(torch.isfinite(level).all()) and float(level[0]) <= kernel.log2_trace() + 1e-3
    assert math.isinf(float(kernel.top_eigenvalues(1)[0]))


@pytest.mark.parametrize("make", [models.resnet20, models.vgg11_bn])
def test_merged_positions_give_the_same_products(make):
    """The products on distinct positions against autograd on all of them, in float64."""
    torch.manual_seed(0)
    model = make().double().eval()
    x = torch.ones(1, 3, 32, 32).double()
    network = PathNetwork.from_module(model, x)
    kernel = pp.PathKernel(network)
    generator = torch.Generator().manual_seed(1)
    v = {n: torch.randn(network.tensors[n].shape, generator=generator).double() for n in network.prunable}
    squares = {n: network.tensors[n].detach().square().requires_grad_() for n in network.prunable}
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Linear)) and module.bias is not None:
            module.bias.data.zero_()
    total = squared_network(model, squares, x)
    slopes = torch.autograd.grad(total, list(squares.values()), create_graph=True)
    direction = [network.tensors[n].detach() * v[n] for n in squares]
    inner = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
    products = torch.autograd.grad(inner, list(squares.values()))
    got = kernel.matvec(v)
    for n, slope, product in zip(squares, slopes, products, strict=True):
        wanted = slope.detach() * v[n] + network.tensors[n].detach() * product
        torch.testing.assert_close(got[n], wanted, rtol=1e-9, atol=1e-10 * float(wanted.abs().max()))


def squared_network(model: nn.Module, squares: dict[str, Tensor], x: Tensor) -> Tensor:
    """R_2 by running the modules on squared constants, ReLUs open and max-pools as sums."""

    def run(module: nn.Module, path: str, z: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d):
            return nn.functional.conv2d(z, squares[f"{path}.weight"], None, module.stride, module.padding)
        if isinstance(module, nn.Linear):
            return nn.functional.linear(z, squares[f"{path}.weight"])
        if isinstance(module, nn.BatchNorm2d):
            return z * (module.weight.detach().square() / (module.running_var + module.eps)).reshape(1, -1, 1, 1)
        if isinstance(module, nn.MaxPool2d):
            return 4 * nn.functional.avg_pool2d(z, 2)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return z.mean((2, 3), keepdim=True) / (z.shape[2] * z.shape[3])
        if isinstance(module, models.BasicBlock):
            return run(module.body, f"{path}.body", z) + run(module.shortcut, f"{path}.shortcut", z)
        if isinstance(module, nn.Sequential):
            for name, child in module.named_children():
                z = run(child, f"{path}.{name}".lstrip("."), z)
            return z
        return z.flatten(1) if isinstance(module, nn.Flatten) else z

    return run(model, "", x).sum()


def test_constants_begin_no_path():
    """A positional term is a source of its own only where biases flow, and then R_2 is not what G is made of."""
    torch.manual_seed(0)
    first, last = torch.randn(3, 2).double(), torch.randn(1, 3).double()

    def network(constant: bool) -> PathNetwork:
        net = PathNetwork()
        flow = net.add_synapse(net.add_input(1, 2), first, "first")
        if constant:
            flow = net.add_sum(flow, net.add_constant(torch.randn(1, 3).double()))
        return net.set_outputs(net.add_synapse(flow, last, "last"))

    with_constant, without = pp.PathKernel(network(True)), pp.PathKernel(network(False))
    assert with_constant.trace() == pytest.approx(without.trace(), rel=1e-13)
    x = torch.randn(9).double()
    torch.testing.assert_close(with_constant.matvec(x), without.matvec(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="multi-affine"):
        pp.PathKernel(network(True), policy="published").trace()


def test_branch_shares():
    torch.manual_seed(0)
    kernel = pp.PathKernel(models.resnet20().double().eval(), torch.ones(1, 3, 32, 32).double())
    shares, branches = kernel.shares(), kernel.branch_shares()
    assert len(branches) >= 9
    inside = sum(v for name, v in shares.items() if ".body." in name)
    assert sum(v for name, v in branches.items() if "shortcut" not in name) == pytest.approx(inside, rel=1e-9)


def test_bad_arguments():
    model, x = made("mlp")
    kernel = pp.PathKernel(model, x)
    with pytest.raises(ValueError, match=r"matvec: x: wanted shape \(30,\), got \(29,\)"):
        kernel.matvec(torch.ones(29))
    with pytest.raises(ValueError, match="matvec: x: wanted entries for"):
        kernel.matvec({"0.weight": torch.ones(4, 3)})
    with pytest.raises(ValueError, match=r"k: wanted 1 to 30 \(the live weights\), got 31"):
        kernel.top_eigenvalues(31)
    with pytest.raises(ValueError, match="probes: wanted at least 2"):
        kernel.frobenius(probes=1)
    with pytest.raises(ValueError, match="masks: wanted names of prunable weights, got 'other'"):
        pp.PathKernel(model, x, {"other": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"masks: '0.weight': wanted bool \(4, 3\)"):
        pp.PathKernel(model, x, {"0.weight": torch.ones(3, 4, dtype=torch.bool)})
    normed = pp.PathKernel(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double(), x)
    with pytest.raises(ValueError, match="multi-affine"):
        normed.matvec(torch.ones(20))
    wide = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30))
    with pytest.raises(ValueError, match="paths reach"):
        gram(wide, torch.ones(1, 30), limit=1000)
    closed = {n: torch.zeros(kernel.network.tensors[n].shape, dtype=torch.bool) for n in kernel.network.prunable}
    empty = pp.PathKernel(model, x, closed)
    assert empty.trace() == 0 and empty.log2_trace() == -math.inf and empty.rank() == 0
    assert set(empty.shares().values()) == {0.0}
