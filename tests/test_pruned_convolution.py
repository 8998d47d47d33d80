"""Products with shifts of one row, and the convolutions made of them, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pathprune import pruned_convolution as room
from pathprune import sparse, sparse_reference
from pathprune.pruned_convolution import counting_convolution, pruned_convolution, thin_convolution
from pathprune.sparse_ops import shifted_matmul


def sample(rows: int, columns: int, length: int, numbers: int, density: float, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    w = (w * (torch.rand(rows, columns, generator=generator) < density)).to(dtype)
    shift = torch.randint(0, numbers - length + 1, (columns,), generator=generator)
    return w, shift, torch.randn(numbers, generator=generator, dtype=torch.float64).to(dtype)


# A tile is 128 positions at most; 64 rows share one; what is left is done in sixteens, then one by one.
SHAPES = [
    *((1, 1, 1, 1), (3, 5, 16, 40), (65, 9, 128, 200), (7, 33, 129, 400), (2, 100, 1000, 1000)),
    *((4, 3, 255, 300), (5, 64, 15, 15), (0, 4, 8, 9), (4, 0, 8, 9), (4, 3, 0, 9)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    for density in (0.0, 0.3, 1.0):
        w, shift, x = (t.to(device) for t in sample(*shape, density, dtype))
        got = shifted_matmul(w, shift, x, shape[2])
        exact = sparse_reference.shifted_matmul(w.double(), shift, x.double(), shape[2])
        scale = sparse_reference.shifted_matmul(w.double().abs(), shift, x.double().abs(), shape[2])
        assert got.dtype == dtype and got.shape == exact.shape
        assert bool(((got - exact).abs() <= 2 * shape[1] * torch.finfo(dtype).eps * scale + 1e-300).all())


def test_zeros_are_skipped_and_threads_agree() -> None:
    """What only zeros would multiply is not read: it may be NaN. The same bits on any number of threads."""
    w, shift, x = sample(70, 20, 1000, 1200, 0.4, torch.float32)
    w[:, 3] = 0
    x[shift[3] + 5] = torch.nan
    w[:, (shift - shift[3]).abs() < 1000] = 0
    w[:, 3] = 0
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(shifted_matmul(w, shift, x, 1000))
    finally:
        torch.set_num_threads(threads)
    assert bool(torch.isfinite(results[0]).all())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_gradients_and_opcheck() -> None:
    w, shift, x = sample(3, 4, 7, 12, 0.6, torch.float64)
    leaves = (w.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda w, x: shifted_matmul(w, shift, x, 7), leaves)
    torch.library.opcheck(torch.ops.pathprune.shifted_matmul.default, (w, shift, x, 7))
    images = torch.randn(2, 3, 5, 5)
    arguments = (images, torch.randn(4, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(
        torch.ops.pathprune.pruned_convolution.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_bad_arguments() -> None:
    w, shift, x = sample(3, 4, 7, 12, 0.6, torch.float32)
    with pytest.raises(ValueError, match=r"shifted_matmul: shift: wanted 0 to 5 \(x less length\), got"):
        shifted_matmul(w, shift + 6, x, 7)
    with pytest.raises(ValueError, match="shifted_matmul: shift"):
        shifted_matmul(w, shift - 12, x, 7)
    with pytest.raises((ValueError, TypeError), match="shifted_matmul: w"):
        shifted_matmul(w.double(), shift, x, 7)
    with pytest.raises((ValueError, TypeError), match="shifted_matmul: w"):
        shifted_matmul(w[0], shift, x, 7)
    with pytest.raises((ValueError, TypeError), match="shifted_matmul: x"):
        shifted_matmul(w, shift, x[None], 7)
    with pytest.raises((ValueError, TypeError), match="shifted_matmul: shift"):
        shifted_matmul(w, shift.int(), x, 7)


GEOMETRIES = [  # images, channels, size, filters, kernel, stride, padding, dilation, groups
    *((3, 5, (9, 10), 7, (3, 3), (1, 1), (1, 1), (1, 1), 1), (2, 6, (10, 11), 4, (3, 3), (2, 2), (1, 1), (1, 1), 1)),
    *((2, 6, (11, 8), 4, (5, 5), (3, 2), (2, 0), (1, 1), 1), (2, 3, (12, 12), 4, (3, 3), (1, 1), (2, 2), (2, 2), 1)),
    *((2, 3, (12, 9), 4, (1, 1), (2, 2), (0, 0), (1, 1), 1), (1, 2, (7, 9), 3, (2, 4), (1, 3), (1, 2), (2, 1), 1)),
    *((4, 2, (3, 3), 3, (3, 3), (1, 1), (0, 0), (1, 1), 1), (2, 4, (6, 6), 6, (3, 3), (1, 1), (1, 1), (1, 1), 2)),
]


@pytest.fixture
def everything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no product were too small, and skipping zeros always worth it."""
    monkeypatch.setattr(room, "_SMALL", 0)
    monkeypatch.setattr(room, "_few", lambda x, w, stride: 2.0 if w.dim() == 4 else 0.0)


def drawn(geometry: tuple, density: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    images, channels, size, filters, kernel, *_, groups = geometry
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels, *size, generator=generator, dtype=torch.float64)
    w = torch.randn(filters, channels // groups, *kernel, generator=generator, dtype=torch.float64)
    w *= torch.rand(w.shape, generator=generator) < density
    return x, w, torch.randn(filters, generator=generator, dtype=torch.float64)


@pytest.mark.usefixtures("everything_pays")
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions(geometry: tuple, density: float) -> None:
    x, w, bias = drawn(geometry, density)
    shape, groups = geometry[5:8], geometry[8]
    for b in (None, bias):
        wanted = torch.conv2d(x, w, b, *shape, groups)
        torch.testing.assert_close(pruned_convolution(x, w, b, *shape, groups), wanted, rtol=1e-12, atol=1e-12)
    batch = torch.stack([x, x.flip(0), x * 2])  # [3, N, C, ...], cut along another axis
    many = torch.vmap(lambda z: pruned_convolution(z, w, bias, *shape, groups), in_dims=1)(batch.movedim(0, 1))
    wanted = torch.conv2d(batch.flatten(0, 1), w, bias, *shape, groups).unflatten(0, (3, -1))
    torch.testing.assert_close(many, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("everything_pays")
@pytest.mark.parametrize("density", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_counting_convolutions(geometry: tuple, density: float) -> None:
    x, w, _ = drawn(geometry, density)
    x, w = x.abs(), (w != 0).double()
    if w.shape[0] > 2:
        w[1] = 1  # a row of ones and one of zeros beside the others
        w[2] = 0
    shape, groups = geometry[5:8], geometry[8]
    wanted = torch.conv2d(x, w, None, *shape, groups)
    got = counting_convolution(x, w, *shape, groups)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_dead_channels_and_thin_weights_as_they_are_chosen() -> None:
    """Without the fixture, large enough for every way to be taken."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 32, 16, 16, generator=generator)
    for density, dead in ((0.9, 0), (0.9, 20), (0.05, 0), (0.05, 20), (0.0, 0)):
        w = torch.randn(48, 32, 3, 3, generator=generator) * (torch.rand(48, 32, 3, 3, generator=generator) < density)
        w[:dead] = 0
        w[:, : dead // 2] = 0
        bias = torch.randn(48, generator=generator)
        wanted = torch.conv2d(x.double(), w.double(), bias.double(), 1, 1)
        got = pruned_convolution(x, w, bias, (1, 1), (1, 1), (1, 1))
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
        ones = (w != 0).float()
        counted = counting_convolution(x.abs(), ones, (1, 1), (1, 1), (1, 1))
        exact = torch.conv2d(x.double().abs(), ones.double(), None, 1, 1)
        torch.testing.assert_close(counted.double(), exact, rtol=2e-5, atol=0)
    one = torch.randn(3, 40, 2000, generator=generator)
    w1 = torch.randn(50, 40, 3, generator=generator)
    w1[10:] = 0
    got = pruned_convolution(one, w1, None, (1,), (1,), (1,))
    torch.testing.assert_close(got, torch.conv1d(one, w1, None, 1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g[5] == (1, 1) and g[8] == 1], ids=str)
def test_gradients_of_thin_convolutions(geometry: tuple) -> None:
    x, w, _ = drawn(geometry, 0.3)
    padding, dilation = geometry[6:8]
    leaves = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: thin_convolution(x, w, padding, dilation), leaves)
    wide = (5, 6)  # more padding than the kernel reaches
    assert torch.autograd.gradcheck(lambda x, w: thin_convolution(x, w, wide, dilation), leaves)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_sparse_layers_take_it_where_it_pays(padding_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients of a layer at 5 %, and that the way is the one that was meant."""
    calls = []
    monkeypatch.setattr(sparse, "thin_convolution", lambda *a: calls.append(1) or thin_convolution(*a))
    torch.manual_seed(0)
    dense = torch.nn.Conv2d(8, 12, 3, padding=1, padding_mode=padding_mode).double()
    mask = torch.rand(dense.weight.shape) < 0.05
    weight = (dense.weight.detach() * mask).requires_grad_()
    x = torch.randn(3, 8, 16, 16, dtype=torch.float64, requires_grad=True)
    around = torch.nn.functional.pad(x, (1, 1, 1, 1), "constant" if padding_mode == "zeros" else padding_mode)
    wanted = torch.conv2d(around, weight, dense.bias)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), [x, weight])
    layer = sparse.SparseConv2d(dense, mask)
    got = layer(x)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    grads = torch.autograd.grad(got.square().sum(), [x, layer.weight])
    torch.testing.assert_close(grads[0], wanted_grads[0], rtol=1e-10, atol=1e-10)
    packed = layer.mask.gather(wanted_grads[1].reshape(12, -1))
    torch.testing.assert_close(grads[1], packed, rtol=1e-10, atol=1e-10)
    assert bool(calls) == (padding_mode == "zeros")
    with torch.no_grad():
        torch.testing.assert_close(layer(x[0]), wanted[0], rtol=1e-11, atol=1e-11)
