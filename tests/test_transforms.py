"""Sparse products under torch.func and in forward mode, against the same written out dense in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

import pathprune as pp
from pathprune import sparse_ops
from pathprune.reference import WeightMap
from pathprune.sparse_ops import Tiles
from pathprune.thin_ops import thin_convolution

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of an op without a rule of its own


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


BITS = drawn(24, 16, seed=5) > 0.6
MASK = pp.pack_mask(BITS)
X, WEIGHT = drawn(3, 16, seed=1), drawn(24, 16, seed=2)
VALUES = WEIGHT[BITS]
KERNEL = drawn(4, 2, 3, 3, seed=3) * (drawn(4, 2, 3, 3, seed=4) > 0.5)


def written(values: Tensor) -> Tensor:
    return torch.zeros(BITS.shape, dtype=values.dtype).index_put(BITS.nonzero(as_tuple=True), values)


def tiled(x: Tensor, weight: Tensor) -> Tensor:
    return sparse_ops.tiled_matmul(weight[None], x[None], Tiles(MASK.pattern.layout, None, None, 16))[0]


def squared(x: Tensor, values: Tensor) -> Tensor:
    return sparse_ops.sparse_matmul(values, x[None], MASK.pattern, WeightMap.SQUARE)[0]


Pair = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]
PAIRS: dict[str, Pair] = {
    "packed": (lambda x, v: pp.masked_matmul(x, v, MASK), lambda x, v: x @ written(v).T, (X, VALUES)),
    "dense": (lambda x, w: pp.masked_matmul(x, w, MASK), lambda x, w: x @ (w * BITS).T, (X, WEIGHT)),
    "tiled": (tiled, lambda x, w: x @ (w * BITS).T, (X, WEIGHT)),
    "squared": (squared, lambda x, v: x @ written(v).square().T, (X, VALUES)),
    "sampled": (
        lambda x, g: sparse_ops.sparse_sample(x[None], g[None], MASK.pattern),
        lambda x, g: (g.T @ x)[BITS],
        (X, drawn(3, 24, seed=6)),
    ),
    "convolution": (
        lambda x, w, b: thin_convolution(x, w, b, (1, 1), (1, 1)),
        lambda x, w, b: torch.conv2d(x, w, b, 1, 1),
        (drawn(2, 2, 5, 5, seed=7), KERNEL, drawn(4, seed=8)),
    ),
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))


@pairs
def test_along_a_tangent(pair: Pair) -> None:
    ours, dense, given = pair
    tangents = tuple(torch.randn_like(tensor) for tensor in given)
    wanted = torch.func.jvp(dense, given, tangents)
    torch.testing.assert_close(torch.func.jvp(ours, given, tangents), wanted)
    with forward_ad.dual_level():
        made = forward_ad.unpack_dual(ours(*map(forward_ad.make_dual, given, tangents)))
    torch.testing.assert_close(made.tangent, wanted[1])


@pairs
@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(pair: Pair, jacobian: Callable[..., Callable[..., tuple[Tensor, ...]]]) -> None:
    ours, dense, given = pair
    every = tuple(range(len(given)))
    for made, wanted in zip(jacobian(ours, every)(*given), jacobian(dense, every)(*given), strict=True):
        torch.testing.assert_close(made, wanted)


@pairs
def test_hessians(pair: Pair) -> None:
    ours, dense, given = pair

    def cubed(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: product(*given).pow(3).sum()

    torch.testing.assert_close(torch.func.hessian(cubed(ours), 1)(*given), torch.func.hessian(cubed(dense), 1)(*given))


def test_gradients_of_each_sample() -> None:
    def loss(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, values: product(x[None], values).square().sum()

    ours, dense, given = PAIRS["packed"]
    each = [torch.func.vmap(torch.func.grad(loss(p), 1), in_dims=(0, None))(*given) for p in (ours, dense)]
    torch.testing.assert_close(*each)


def test_a_sparse_model_is_a_function_of_its_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).double()
    masks = pp.prune(model, pp.Magnitude(), density=0.2, example_input=torch.ones(1, 32).double())
    x = drawn(5, 32)
    masks.apply_(model)
    dense = torch.autograd.grad(model(x).square().sum(), [p for p in model.parameters() if p.ndim == 1])
    pp.sparsify(model, masks, min_speedup=0)
    assert isinstance(model[0], pp.SparseLinear)
    parameters = dict(model.named_parameters())
    made = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    torch.testing.assert_close([made["0.bias"], made["2.bias"]], list(dense))
