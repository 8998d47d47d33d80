"""The gradient of convolutions by the weights that a mask keeps, against torch's own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp
from pathprune import _library, thin_ops
from pathprune.pruned_convolution import is_sampled
from pathprune.reference import mask_pack
from pathprune.thin_ops import thin_convolution, thin_sample

# images, channels, size, filters, kernel, stride, padding, dilation. Lanes hold 2 to 16 images, or bands of their rows;
# up to 64 positions in a row are laid out at a time and as many summed over; channels go block by block.
SHAPES = [
    *((1, 1, (1, 1), 1, (1, 1), (1, 1), (0, 0), (1, 1)), (3, 5, (9, 10), 7, (3, 3), (1, 1), (1, 1), (1, 1))),
    *((17, 3, (6, 5), 4, (3, 3), (1, 1), (1, 1), (1, 1)), (2, 3, (12, 12), 4, (3, 3), (1, 1), (2, 2), (2, 2))),
    *((16, 4, (4, 4), 3, (3, 3), (1, 1), (0, 0), (1, 1)), (2, 3, (7, 9), 5, (2, 4), (1, 1), (1, 2), (3, 1))),
    *((2, 3, (4, 6), 2, (3, 3), (1, 1), (5, 6), (1, 1)), (2, 3, (9, 8), 4, (3, 3), (2, 2), (1, 1), (1, 1))),
    *((19, 2, (11, 7), 3, (5, 2), (3, 2), (2, 3), (1, 2)), (2, 4, (8, 7), 3, (1, 1), (2, 3), (0, 0), (1, 1))),
    *((1, 2, (3, 4), 2, (2, 3), (4, 3), (3, 0), (2, 1)), (1, 3, (40, 150), 2, (3, 5), (1, 1), (1, 2), (1, 1))),
    *((35, 40, (8, 8), 33, (3, 3), (1, 1), (1, 1), (1, 1)), (2, 20, (20, 14), 260, (3, 3), (2, 1), (1, 1), (1, 1))),
    *((33, 150, (2, 2), 6, (3, 3), (1, 1), (1, 1), (1, 1)), (3, 4, (1, 30), 6, (1, 7), (1, 1), (0, 3), (1, 1))),
]
SMALL = SHAPES[1:12]
KINDS = ("none", "thin", "half", "all", "one row", "one channel")


def sample(shape: tuple, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Images, gradients by the outputs and a bool mask."""
    images, channels, size, filters, kernel, *geometry = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, *size, generator=generator, dtype=torch.float64)
    y = torch.conv2d(x, x.new_zeros(filters, channels, *kernel), None, *geometry)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    density = {"none": 0.0, "thin": 0.05, "half": 0.5}.get(kind, 1.0)
    bits = torch.rand(filters, channels, *kernel, generator=generator) < density
    if kind == "one row":
        bits[1:] = False
    if kind == "one channel":
        bits[:, 1:] = False
    return x.to(dtype), g.to(dtype), bits


def by_torch(x: Tensor, g: Tensor, bits: Tensor, geometry: tuple) -> Tensor:
    made = torch.nn.grad.conv2d_weight(x, bits.shape, g, *geometry)
    return torch.where(bits, made, 0)


def packed(bits: Tensor) -> Tensor:
    return mask_pack(bits.reshape(1, len(bits), -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_where_the_mask_is(shape: tuple, kind: str, device: torch.device) -> None:
    """Off the exact sums by no more than a few times what torch is, or the rounding of a sum a lane."""
    geometry = shape[5:]
    for dtype in (torch.float32, torch.float64):
        x, g, bits = (t.to(device) for t in sample(shape, kind, dtype))
        got = thin_sample(x, g, packed(bits), shape[4], *geometry)
        exact = by_torch(x.double(), g.double(), bits, geometry)
        scale = by_torch(x.double().abs(), g.double().abs(), bits, geometry)
        theirs = (by_torch(x, g, bits, geometry) - exact).abs().max()
        assert got.dtype == dtype and got.shape == bits.shape and got.is_contiguous()
        assert bool((got[~bits] == 0).all())
        assert bool(((got - exact).abs() <= 4 * theirs + 16 * torch.finfo(dtype).eps * scale).all())


@pytest.mark.skipif(not _library.cpu_loaded, reason="there is one definition without the binary")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    environment = {**os.environ, "PATHPRUNE_ISA": isa, "PATHPRUNE_REQUIRE_CUDA": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "where_the_mask_is and cpu and (half or thin or row)"],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_threads_agree_to_the_bit() -> None:
    threads = torch.get_num_threads()
    for shape in (SHAPES[2], SHAPES[11], SHAPES[12], SHAPES[13]):
        x, g, bits = sample(shape, "half", torch.float32)
        results = []
        try:
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                results.append(thin_sample(x, g, packed(bits), shape[4], *shape[5:]))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_no_images_and_strided_ones() -> None:
    x, g, bits = sample(SHAPES[1], "half")
    mask, geometry = packed(bits), ((3, 3), (1, 1), (1, 1))
    assert not thin_sample(x[:0], g[:0], mask, *geometry).any()
    wanted = thin_sample(x, g, mask, *geometry)
    for strided in (lambda t: t.mT.contiguous().mT, lambda t: t.to(memory_format=torch.channels_last)):
        assert torch.equal(thin_sample(strided(x), strided(g), mask, *geometry), wanted)
    wide = torch.stack([mask, mask], -1)[..., 0]
    assert not wide.is_contiguous() and torch.equal(thin_sample(x, g, wide, *geometry), wanted)
    expanded = g[:, :, :1, :1].expand_as(g)
    exact = by_torch(x, expanded, bits, ((1, 1), (1, 1), (1, 1)))
    torch.testing.assert_close(thin_sample(x, expanded, mask, *geometry), exact)


def test_bits_behind_the_last_weight_are_not_read() -> None:
    x, g, bits = sample(SHAPES[1], "half")
    mask = packed(bits)  # 45 of 48
    filled = mask.clone()
    filled[..., -1] |= -(1 << 13)
    geometry = ((3, 3), (1, 1), (1, 1))
    assert torch.equal(thin_sample(x, g, filled, *geometry), thin_sample(x, g, mask, *geometry))


def test_what_is_not_finite_stays_where_it_is() -> None:
    """An infinite image reaches the weights of its channel alone; finite ones have finite gradients."""
    x, g, bits = sample(SHAPES[2], "all")
    x[3, 1] = torch.inf
    got = thin_sample(x, g, packed(bits), (3, 3), (1, 1), (1, 1))
    assert bool(got[:, 0].isfinite().all()) and bool(got[:, 2].isfinite().all())
    assert not got[:, 1].isfinite().any()


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_gradients_of_gradients_and_opcheck(shape: tuple) -> None:
    geometry = shape[5:]
    x, g, bits = sample(shape, "half")
    x, g, bits = x[:2], g[:2], bits  # finite differences take their time
    mask, numbers = packed(bits), [n for pair in (shape[4], *geometry) for n in pair]
    x.requires_grad_(), g.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, g: thin_sample(x, g, mask, shape[4], *geometry), (x, g), fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda x, g: thin_sample(x, g, mask, shape[4], *geometry), (x, g), fast_mode=True
    )
    torch.library.opcheck(torch.ops.pathprune.thin_sample.default, (x, g, mask, *numbers))


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_convolutions_with_a_mask(shape: tuple) -> None:
    """The gradient by the weight is the dense one where the mask has ones, even where the weight is zero, else zero."""
    geometry = shape[5:]
    x, g, bits = sample(shape, "half")
    x, g = x[:2], g[:2]
    w = torch.randn(bits.shape, dtype=torch.float64) * bits
    w[0] = 0
    bias = torch.randn(len(w), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, bias)]
    y = thin_convolution(*leaves, *geometry, mask=packed(bits))
    got = torch.autograd.grad(y, leaves, g, create_graph=True)
    wanted = torch.autograd.grad(torch.conv2d(*leaves, *geometry), leaves, g)
    for a, b in zip(got, (wanted[0], torch.where(bits, wanted[1], 0), wanted[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    masked = lambda x, w: thin_convolution(x, w * bits, None, *geometry, mask=packed(bits))  # noqa: E731
    assert torch.autograd.gradgradcheck(masked, leaves[:2], fast_mode=True)
    op, numbers = torch.ops.pathprune.thin_convolution.default, [n for pair in geometry for n in pair]
    torch.library.opcheck(op, (*leaves, *numbers, False, packed(bits)))


def test_bad_arguments() -> None:
    x, g, bits = sample(SHAPES[1], "half", torch.float32)
    mask = packed(bits)
    for name, *given in (
        ("x", x[0], g, mask, (3, 3), (1, 1), (1, 1)),
        ("x", x.half(), g.half(), mask, (3, 3), (1, 1), (1, 1)),
        ("g", x, g[0], mask, (3, 3), (1, 1), (1, 1)),
        ("g", x, g.double(), mask, (3, 3), (1, 1), (1, 1)),
        ("g", x, g[:2], mask, (3, 3), (1, 1), (1, 1)),
        ("g", x, g, mask, (3, 3), (2, 1), (1, 1)),
        ("mask", x, g, mask.int(), (3, 3), (1, 1), (1, 1)),
        ("mask", x, g, mask[0], (3, 3), (1, 1), (1, 1)),
        ("mask", x, g, mask[..., :2], (3, 3), (1, 1), (1, 1)),
        ("mask", x, g, mask[:, :2], (3, 3), (1, 1), (1, 1)),
        ("kernel_y", x, g, mask, (0, 3), (1, 1), (1, 1)),
        ("stride_x", x, g, mask, (3, 3), (1, 0), (1, 1)),
        ("padding_y", x, g, mask, (3, 3), (1, 1), (-1, 1)),
        ("dilation_x", x, g, mask, (3, 3), (1, 1), (1, 1), (1, 0)),
        ("x", x, g, mask, (3, 13), (1, 1), (1, 1)),
    ):
        with pytest.raises(ValueError, match=f"thin_sample: {name}: wanted"):
            thin_sample(*given)
    with pytest.raises(ValueError, match="thin_convolution: mask: wanted"):
        thin_convolution(x, bits.float(), None, (1, 1), (1, 1), mask=mask[..., :2])


def test_binary_is_complete() -> None:
    for name in thin_ops.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pathprune::{name}", "CPU") == _library.cpu_loaded


def test_chosen_where_it_was_faster() -> None:
    """Few weights and many outputs; never on other devices and types."""
    shape = torch.Size((64, 64, 3, 3))
    x = torch.empty(32, 64, 56, 56, device="meta")
    assert not is_sampled(x, shape, (1, 1), 0.01)
    x = torch.empty(1).expand(32, 64, 56, 56)
    assert is_sampled(x, shape, (1, 1), 0.3) and not is_sampled(x, shape, (1, 1), 0.5)
    assert not is_sampled(x.half(), shape, (1, 1), 0.01)
    few = x[:1, :, :7, :7]
    assert is_sampled(few, shape, (1, 1), 0.05) and not is_sampled(few, shape, (1, 1), 0.2)
    assert not is_sampled(few, shape, (3, 3), 0.05) and not is_sampled(x[:0], shape, (1, 1), 0.05)


@pytest.mark.parametrize("stride", [1, 2])
def test_training_steps_are_those_of_the_masked_layer(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of a network with sparse layers, to rounding; and the gradient is the sampled one."""
    calls = []
    call = thin_ops._call
    monkeypatch.setattr(thin_ops, "_call", lambda name, *given: calls.append(name) or call(name, *given))
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(6, 12, 3, stride=stride, padding=1), nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1), nn.Flatten()
    ).double()
    masks = {f"{i}.weight": torch.rand(net[i].weight.shape) < 0.05 for i in (0, 2)}
    masks["0.weight"][0, 0, 0, 0] = True
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_parameter(name).mul_(mask)
    net[0].weight.data[0, 0, 0, 0] = 0  # kept, and zero: it has a gradient
    sparse = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9) for n in (net, sparse)]
    pp.sparsify(sparse, masks, optimizer=optimizers[1])
    assert [type(sparse[i]) for i in (0, 2)] == [pp.SparseConv2d, pp.SparseConv2d]
    x = torch.randn(9, 6, 20, 20, dtype=torch.float64)
    for _ in range(3):
        for n, optimizer in zip((net, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            n(x).square().mean().backward()
            for name, mask in masks.items() if n is net else ():
                net.get_parameter(name).grad *= mask
            optimizer.step()
    pp.densify(sparse)
    for a, b in zip(net.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert net[0].weight[0, 0, 0, 0] != 0
    assert calls.count("thin_sample") == 6  # three steps of two layers


def test_compiled_layers_have_it_too() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(16, 24, 3, padding=1)
    layer = pp.SparseConv2d(dense, torch.rand(dense.weight.shape) < 0.05)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 16, 12, 12, requires_grad=True)
    leaves = [x, layer.weight, layer.bias]
    wanted = torch.autograd.grad(layer(x).square().sum(), leaves)
    for got, exact in zip(torch.autograd.grad(compiled(x).square().sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(got, exact)
