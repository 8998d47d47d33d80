"""Convolutions that skip zeros against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pathprune import pruned_convolution as room
from pathprune import sparse
from pathprune.pruned_convolution import counting_convolution, pruned_convolution
from pathprune.thin_ops import thin_convolution

# images, channels, size, filters, kernel, stride, padding, dilation. Up to sixteen images or bands of rows lie side by
# side, 64 columns of them; a tile is at most 4 rows high and 8 columns wide; blocks have a few channels.
SHAPES = [
    *((1, 1, (1, 1), 1, (1, 1), (1, 1), (0, 0), (1, 1)), (3, 5, (9, 10), 7, (3, 3), (1, 1), (1, 1), (1, 1))),
    *((2, 3, (12, 12), 4, (3, 3), (1, 1), (2, 2), (2, 2)), (4, 2, (3, 3), 3, (3, 3), (1, 1), (0, 0), (1, 1))),
    *((2, 3, (7, 9), 5, (2, 4), (1, 1), (1, 2), (3, 1)), (2, 3, (4, 6), 2, (3, 3), (1, 1), (5, 6), (1, 1))),
    *((2, 3, (9, 8), 4, (3, 3), (2, 2), (1, 1), (1, 1)), (3, 2, (11, 7), 3, (5, 2), (3, 2), (2, 3), (1, 2))),
    *((2, 4, (8, 7), 3, (1, 1), (2, 3), (0, 0), (1, 1)), (1, 2, (3, 4), 2, (2, 3), (4, 3), (3, 0), (2, 1))),
    *((70, 64, (8, 8), 65, (3, 3), (1, 1), (1, 1), (1, 1)), (1, 40, (90, 70), 9, (5, 5), (1, 1), (2, 2), (1, 1))),
    *((33, 300, (2, 2), 6, (3, 3), (1, 1), (1, 1), (1, 1)), (3, 4, (1, 30), 6, (1, 7), (1, 1), (0, 3), (1, 1))),
    *((9, 30, (33, 32), 6, (3, 3), (2, 2), (1, 1), (1, 1)), (1, 40, (90, 70), 5, (3, 3), (2, 2), (0, 1), (1, 1))),
    (0, 3, (5, 5), 2, (3, 3), (1, 1), (1, 1), (1, 1)),
]


def sample(shape: tuple, density: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    images, channels, size, filters, kernel, *_ = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels, *size, generator=generator, dtype=torch.float64)
    w = torch.randn(filters, channels, *kernel, generator=generator, dtype=torch.float64)
    w *= torch.rand(w.shape, generator=generator) < density
    w[1:3] *= torch.rand(w[0].shape, generator=generator) < 0.2  # beside rows of other densities
    return x.to(dtype), w.to(dtype), torch.randn(filters, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_thin_convolutions(shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    """To the rounding of as many sums as there are products, at every density, with and without a bias."""
    geometry = shape[5:]
    for density in (0.0, 0.05, 0.4, 1.0):
        x, w, bias = (t.to(device) for t in sample(shape, density, dtype))
        for b in (None, bias):
            got = thin_convolution(x, w, b, *geometry)
            exact = torch.conv2d(x.double(), w.double(), None if b is None else b.double(), *geometry)
            scale = torch.conv2d(x.double().abs(), w.double().abs(), bias.double().abs(), *geometry)
            bound = 2 * (w[0].numel() + 1) * torch.finfo(dtype).eps * scale
            assert got.dtype == dtype and got.shape == exact.shape and got.is_contiguous()
            assert bool(((got - exact).abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counting_takes_the_fuller_rows_from_the_whole(shape: tuple, device: torch.device) -> None:
    geometry = shape[5:]
    for density in (0.0, 0.3, 0.7, 1.0):
        x, w, _ = (t.to(device) for t in sample(shape, density, torch.float64))
        x, w = x.abs(), (w != 0).double()
        got = thin_convolution(x, w, None, *geometry, counting=True)
        torch.testing.assert_close(got, torch.conv2d(x, w, None, *geometry), rtol=1e-12, atol=1e-12)


def test_threads_agree_to_the_bit() -> None:
    x, w, bias = sample(SHAPES[10], 0.4, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(thin_convolution(x, w, bias, (1, 1), (1, 1)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", SHAPES[1:10], ids=str)
def test_gradients_and_opcheck(shape: tuple) -> None:
    """Also with more padding than the kernel reaches; through strided images and kernels."""
    geometry = shape[5:]
    x, w, bias = sample(shape, 0.5, torch.float64)
    leaves = tuple(t.requires_grad_() for t in (x, w, bias))
    assert torch.autograd.gradcheck(lambda *t: thin_convolution(*t, *geometry), leaves)
    assert torch.autograd.gradgradcheck(lambda x, w: thin_convolution(x, w, None, *geometry), leaves[:2])
    only = thin_convolution(x.detach(), w.detach(), bias, *geometry)
    torch.testing.assert_close(torch.autograd.grad(only.sum(), bias)[0], torch.full_like(bias, only[:, 0].numel()))
    turned = thin_convolution(x.mT.contiguous().mT, w.flip(0).flip(0), bias, *geometry)
    torch.testing.assert_close(turned, torch.conv2d(x, w, bias, *geometry))
    op = torch.ops.pathprune.thin_convolution.default
    torch.library.opcheck(op, (x, w, bias, *(n for pair in geometry for n in pair), False, None))
    images = torch.randn(2, 3, 5, 5)
    arguments = (images, torch.randn(4, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(
        torch.ops.pathprune.pruned_convolution.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_bad_arguments() -> None:
    x, w, bias = sample(SHAPES[1], 0.5, torch.float32)
    for name, *given in (
        ("x", x[0], w, bias, (1, 1), (1, 1)),
        ("x", x.half(), w.half(), bias.half(), (1, 1), (1, 1)),
        ("w", x, w[0], bias, (1, 1), (1, 1)),
        ("w", x, w.double(), bias, (1, 1), (1, 1)),
        ("w", x, w[:, :2], bias, (1, 1), (1, 1)),
        ("w", x, w[:, :, :0], bias, (1, 1), (1, 1)),
        ("bias", x, w, bias[:2], (1, 1), (1, 1)),
        ("stride_y", x, w, bias, (0, 1), (1, 1)),
        ("padding_x", x, w, bias, (1, 1), (1, -1)),
        ("dilation_y", x, w, bias, (1, 1), (1, 1), (0, 1)),
        ("x", x[:, :, :2], w, bias, (1, 1), (0, 0)),
    ):
        with pytest.raises(ValueError, match=f"thin_convolution: {name}: wanted"):
            thin_convolution(*given)


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
    monkeypatch.setattr(room, "_few", lambda x, shape, stride: 2.0 if len(shape) == 4 else 0.0)


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


def test_gain_is_expected_only_where_the_kernel_is() -> None:
    """Half precision and other devices have none."""
    w = torch.empty(4, 4, 3, 3)
    assert room.expected_gain(w, 0.01) > room.expected_gain(w, 0.1) > 1 > room.expected_gain(w, 1.0)
    assert room.expected_gain(w.bfloat16(), 0.01) == 0
    assert room.expected_gain(w.to("meta"), 0.01) == 0
