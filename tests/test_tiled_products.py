"""Products with masked weights in tiles: against float64, their gradients, their bits, and what they refuse.

On the CPU they are their definition; `test_cuda_kernels.py` runs the same tests with the CUDA kernels on the host.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pathprune as pp
from pathprune import sparse_ops
from pathprune.masked import cuda_times, expected_speedup
from pathprune.sparse_ops import Tiles
from test_masked_matmul import bound, flow, weight_of

# groups, rows, columns, density: at the edges of tiles of 128 and stretches of 64, rows that end in any vector.
SHAPES = [
    (1, 1, 1, 1.0),
    (1, 1, 257, 0.5),
    (1, 257, 1, 0.5),
    (2, 37, 61, 0.3),
    (1, 131, 131, 0.1),
    (1, 64, 64, 0.0),
    (1, 128, 128, 1.0),
    (1, 60, 190, 0.9),
    (1, 9, 700, 0.02),
    (1, 0, 5, 0.5),
    (1, 5, 0, 0.5),
    (0, 5, 5, 0.5),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tiles_of(bits: Tensor, packed: bool) -> Tiles:
    mask = pp.pack_mask(bits)
    return mask.tiles() if packed else Tiles(mask.pattern.layout, None, None, bits.shape[2])


def near(got: Tensor, exact: Tensor, magnitudes: Tensor, terms: int) -> bool:
    """Within any order of summation in float32, and one rounding to the dtype of the result."""
    rounding = exact.abs().clamp(min=torch.finfo(got.dtype).tiny) * torch.finfo(got.dtype).eps
    return bool(((got.double() - exact).abs() <= bound(magnitudes, terms, torch.float32) + rounding).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiled_products(shape: tuple[int, int, int, float], dtype: torch.dtype, device: torch.device) -> None:
    """Both products and the sampled one, of packed and of dense weights, against float64."""
    groups, rows, columns, _ = shape
    weight, bits = (t.to(device) for t in weight_of(shape, dtype))
    off_the_mask = torch.where(bits, weight, torch.nan)
    masked, values = weight.double(), weight[bits]
    for positions in (0, 1, 7, 8, 9, 64, 65):
        x, g = (
            flow(groups, positions, units, dtype=dtype, seed=i).to(device) for i, units in enumerate((columns, rows))
        )
        for packed in (True, False):
            tiles, given = tiles_of(bits, packed), values if packed else off_the_mask
            y = sparse_ops.tiled_matmul(given, x, tiles)
            assert y.dtype == dtype
            assert near(y, x.double() @ masked.mT, x.double().abs() @ masked.abs().mT, columns)
            y = sparse_ops.tiled_matmul(given, g, tiles, transposed=True)
            assert near(y, g.double() @ masked, g.double().abs() @ masked.abs(), rows)
            sums, exact = sparse_ops.tiled_sample(x, g, tiles), g.double().mT @ x.double()
            of_magnitudes = g.double().abs().mT @ x.double().abs()
            if packed:
                exact, of_magnitudes = exact[bits], of_magnitudes[bits]
            else:
                assert bool((sums[~bits] == 0).all())
                exact, of_magnitudes = exact * bits, of_magnitudes * bits
            assert near(sums, exact, of_magnitudes, positions)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiled_many_positions(dtype: torch.dtype, device: torch.device) -> None:
    """The last narrow tile and the first wide one; several tiles; a depth of positions that is summed in parts."""
    weight, bits = (t.to(device) for t in weight_of((1, 70, 150, 0.2), dtype))
    tiles, masked = tiles_of(bits, True), weight.double()
    for positions in (32, 33, 300):
        x, g = (flow(1, positions, units, dtype=dtype, seed=units).to(device) for units in (150, 70))
        y = sparse_ops.tiled_matmul(weight[bits], x, tiles)
        assert near(y, x.double() @ masked.mT, x.double().abs() @ masked.abs().mT, 150)
        sums, exact = sparse_ops.tiled_sample(x, g, tiles), (g.double().mT @ x.double())[bits]
        assert near(sums, exact, (g.double().abs().mT @ x.double().abs())[bits], positions)


def test_tiled_columns_beyond_the_index(device: torch.device) -> None:
    """More columns than the 16 bits of an index tell apart."""
    weight, bits = (t.to(device) for t in weight_of((1, 2, 66_000, 0.05), torch.float32))
    x = flow(1, 1, 66_000, dtype=torch.float32).to(device)
    y = sparse_ops.tiled_matmul(weight[bits], x, tiles_of(bits, True))
    assert near(y, x.double() @ weight.double().mT, x.double().abs() @ weight.double().abs().mT, 66_000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiled_values_that_begin_anywhere(dtype: torch.dtype, device: torch.device) -> None:
    """Memory that does not begin at a multiple of 16 bytes, and flows of any strides."""
    weight, bits = (t.to(device) for t in weight_of((1, 40, 136, 0.3), dtype))
    x, g = flow(1, 9, 136, dtype=dtype).to(device), flow(1, 9, 40, dtype=dtype, seed=2).to(device)

    def moved(value: Tensor) -> Tensor:
        room = torch.empty(value.numel() + 1, dtype=dtype, device=device)
        room[1:] = value.flatten()
        return room[1:].view(value.shape)

    for packed in (True, False):
        tiles, given = tiles_of(bits, packed), weight[bits] if packed else weight
        y = sparse_ops.tiled_matmul(given, x, tiles)
        for other in (moved(x), x.mT.contiguous().mT, torch.stack((x, x), -1)[..., 0]):
            assert torch.equal(sparse_ops.tiled_matmul(moved(given), other, tiles), y)
        sums = sparse_ops.tiled_sample(x, g, tiles)
        assert torch.equal(sparse_ops.tiled_sample(moved(x), moved(g), tiles), sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiled_sums_have_one_order(dtype: torch.dtype, device: torch.device) -> None:
    """The same bits on every run, summed in parts too; every row of x is multiplied as it is alone."""
    weight, bits = (t.to(device) for t in weight_of((1, 60, 700, 0.3), dtype))
    x, g = flow(1, 20, 700, dtype=dtype).to(device), flow(1, 20, 60, dtype=dtype, seed=2).to(device)
    tiles, values = tiles_of(bits, True), weight[bits]

    def made() -> tuple[Tensor, ...]:
        return (
            sparse_ops.tiled_matmul(values, x, tiles),
            sparse_ops.tiled_matmul(values, g, tiles, transposed=True),
            sparse_ops.tiled_sample(x, g, tiles),
        )

    first = made()
    assert all(torch.equal(a, b) for a, b in zip(first, made(), strict=True))
    alone = sparse_ops.tiled_matmul(values, x[:, 3:4], tiles)
    assert torch.equal(alone, first[0][:, 3:4]) or device.type == "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_tiled_gradients(packed: bool, dtype: torch.dtype, device: torch.device) -> None:
    """masked_matmul and its gradients, of x, of the weight where the mask is one, and of the bias."""
    weight, bits = (t.to(device)[0] for t in weight_of((1, 33, 70, 0.4), dtype))
    mask = pp.pack_mask(bits)
    given = (weight[bits] if packed else torch.where(bits, weight, torch.nan)).requires_grad_()
    x = flow(2, 5, 70, dtype=dtype).to(device).requires_grad_()
    bias = torch.zeros(33, dtype=dtype, device=device, requires_grad=True)
    y = pp.masked_matmul(x, given, mask, bias, kernel="tiles")
    grad = flow(2, 5, 33, dtype=dtype, seed=4).to(device)
    y.backward(grad)
    assert given.grad is not None
    assert x.grad is not None
    assert bias.grad is not None
    assert y.dtype == given.grad.dtype == x.grad.dtype == dtype
    g, exact_x, w = grad.double().flatten(0, 1), x.detach().double().flatten(0, 1), weight.double()
    assert near(y.detach().flatten(0, 1), exact_x @ w.mT, exact_x.abs() @ w.abs().mT, 70)
    assert near(x.grad.flatten(0, 1), g @ w, g.abs() @ w.abs(), 33)
    of_weight, magnitudes = g.mT @ exact_x, g.abs().mT @ exact_x.abs()
    of_mask = given.grad if packed else given.grad[bits]
    assert near(of_mask, of_weight[bits], magnitudes[bits], 10)
    if not packed:
        assert bool((given.grad[~bits] == 0).all())
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)))


def test_tiled_as_exact_as_torch(device: torch.device) -> None:
    """Not more than twice the error of F.linear at the same dtype, as a root of the mean square."""
    for dtype in DTYPES:
        weight, bits = (t.to(device) for t in weight_of((1, 100, 500, 0.3), dtype))
        x = flow(1, 17, 500, dtype=dtype).to(device)
        exact = x.double() @ weight.double().mT
        ours = sparse_ops.tiled_matmul(weight[bits], x, tiles_of(bits, True)).double() - exact
        torchs = F.linear(x, weight[0]).double() - exact
        assert ours.square().mean() <= 4 * torchs.square().mean()


def test_derivatives_of_the_tiled_ops() -> None:
    weight, bits = weight_of((2, 3, 7, 0.4), torch.float64)
    x = flow(2, 2, 7, dtype=torch.float64).requires_grad_()
    g = flow(2, 2, 3, dtype=torch.float64, seed=2).requires_grad_()
    for packed in (False, True):
        tiles = tiles_of(bits, packed)
        given = (weight[bits] if packed else weight + 1).detach().requires_grad_()
        for transposed, given_x in ((False, x), (True, g)):

            def product(weight: Tensor, x: Tensor, tiles: Tiles = tiles, transposed: bool = transposed) -> Tensor:
                return sparse_ops.tiled_matmul(weight, x, tiles, transposed)

            assert torch.autograd.gradcheck(product, (given, given_x))
            assert torch.autograd.gradgradcheck(product, (given, given_x))
            torch.library.opcheck(torch.ops.pathprune.tiled_matmul.default, (given, given_x, transposed, *tiles))

        def sample(x: Tensor, g: Tensor, tiles: Tiles = tiles) -> Tensor:
            return sparse_ops.tiled_sample(x, g, tiles)

        assert torch.autograd.gradcheck(sample, (x, g))
        assert torch.autograd.gradgradcheck(sample, (x, g))
        torch.library.opcheck(torch.ops.pathprune.tiled_sample.default, (x, g, *tiles))


def refusals() -> list[Any]:
    bits = torch.rand(1, 3, 70) < 0.5
    tiles, x, g = tiles_of(bits, True), torch.ones(1, 2, 70), torch.ones(1, 2, 3)
    dense, values = tiles_of(bits, False), torch.ones(int(bits.sum()))
    matmul, sample = sparse_ops.tiled_matmul, sparse_ops.tiled_sample
    wrong = (
        ("weight", lambda: matmul(values[1:], x, tiles), rf"weight: wanted float32 \[{values.numel()}\]"),
        ("dense", lambda: matmul(values, x, dense), r"weight: wanted float32 \[1, 3, 70\]"),
        ("integers", lambda: matmul(values.int(), x.int(), tiles), "weight: wanted float32, float64, bfloat16 or"),
        ("dtype", lambda: matmul(values, x.bfloat16(), tiles), r"x: wanted float32 \[1, 2, 70\]"),
        ("units", lambda: matmul(values, g, tiles), r"x: wanted float32 \[1, 2, 70\]"),
        ("dimensions", lambda: matmul(values, x[0], tiles), r"x: wanted 3 dimensions \[G, T, units\]"),
        ("layout", lambda: matmul(values, x, tiles._replace(layout=tiles.layout[0])), "layout: wanted 3 dimensions"),
        ("words", lambda: matmul(values, x, tiles._replace(columns=90)), r"layout: wanted int16 \[1, 3, 6\]"),
        ("starts", lambda: matmul(values, x, tiles._replace(tile_start=None)), "tile_start: wanted index and"),
        (
            "stretches",
            lambda: matmul(values, x, tiles._replace(tile_start=tiles.tile_start[1:])),  # type: ignore[index]
            r"tile_start: wanted int32 \[7\]",
        ),
        ("T", lambda: sample(x, g[:, 1:], tiles), r"g: wanted (float32 \[1, 2, 3\]|T = 2)"),
        ("g", lambda: sample(x, g.double(), tiles), r"g: wanted (float32 \[1, 2, 3\]|T = 2)"),
    )
    return [pytest.param(call, message, id=name) for name, call, message in wrong]


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize(("call", "message"), refusals())
def test_tiled_refuses(call: Any, message: str, device: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- the choice on CUDA -----------------------------------------------------------------------------


def chosen(density: float, batch: int, dtype: torch.dtype, side: int = 4096) -> str:
    times = cuda_times(side, side, density, batch, dtype)
    return min(times, key=times.__getitem__)


def test_choice_on_cuda() -> None:
    """Thin masks and few rows by entries, some rows in tiles, many rows by cuBLAS; float64 never in tiles."""
    half, single = torch.bfloat16, torch.float32
    assert [chosen(0.1, batch, half) for batch in (1, 8, 32, 128, 1024)] == ["auto", *["tiles"] * 3, "dense"]
    assert [chosen(0.01, batch, single) for batch in (1, 32, 128)] == ["auto"] * 3
    assert chosen(0.1, 64, single) == "tiles"
    assert chosen(0.5, 2, half) == "tiles"
    assert chosen(0.1, 64, half, side=16) == "dense"  # a tile would be empty for the most part
    assert "tiles" not in cuda_times(64, 64, 0.5, 32, torch.float64)
    for dtype in (half, single, torch.float64):
        batches = [cuda_times(512, 512, 0.3, batch, dtype) for batch in (1, 16, 64, 512)]
        for less, more in itertools.pairwise(batches):
            assert all(less[kernel] <= more[kernel] for kernel in less)


def test_a_mask_tells_the_choice(device: torch.device) -> None:
    """By the table of the CPU there, by predicted times on CUDA; and what is chosen is right."""
    weight, bits = (t.to(device)[0] for t in weight_of((1, 256, 512, 0.1), torch.bfloat16))
    mask, x = pp.pack_mask(bits), flow(32, 512, dtype=torch.bfloat16).to(device)
    kernel = mask.kernel(32, dtype=torch.bfloat16)
    times = cuda_times(256, 512, mask.density, 32, torch.bfloat16)
    assert kernel == min(times, key=times.__getitem__) if device.type == "cuda" else kernel in ("auto", "dense")
    y, exact = pp.masked_matmul(x, mask.gather(weight), mask), x.double() @ weight.double().T
    assert near(y, exact, x.double().abs() @ weight.double().abs().T, 512)


def test_expected_speedup_on_cuda() -> None:
    thin, thick = (expected_speedup(4096, 4096, density, 8, on_cuda=torch.bfloat16) for density in (0.01, 0.9))
    assert thin > 2 > thick
    assert expected_speedup(4096, 4096, 0.5, 4096, on_cuda=torch.bfloat16) < 1
