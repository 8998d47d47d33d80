"""masked_matmul and the ops on sparse weights: against float64, their gradients, and at their edges."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pathprune as pp
from pathprune import _library, ops, sparse_ops, sparse_reference
from pathprune.masked import expected_speedup
from pathprune.ops import WeightMap
from pathprune.sparse_ops import KERNELS, Pattern

# groups, rows, columns, density
SHAPES = [
    (1, 1, 1, 1.0),
    (1, 1, 1000, 0.5),
    (1, 1000, 1, 0.5),
    (1, 37, 61, 0.3),
    (2, 33, 130, 0.1),
    (3, 64, 64, 0.0),
    (1, 64, 48, 1.0),
    (1, 300, 517, 0.02),
    (1, 7, 70_001, 0.1),  # columns do not fit the 16 bits of the index
    (1, 0, 5, 0.5),
    (1, 5, 0, 0.5),
    (0, 5, 5, 0.5),
]
POSITIONS = (0, 1, 2, 7, 8, 9, 17, 49, 200)


def weight_of(shape: tuple[int, int, int, float], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight [G, O, K] with its zeros, mask bool); the second half of the rows of a mask may be empty."""
    generator = torch.Generator().manual_seed(seed)
    *size, density = shape
    bits = torch.rand(size, generator=generator) < density
    if size[1] > 8 and density < 1:
        bits[:, size[1] // 2 : size[1] // 2 + 3] = False
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) * bits, bits


def pattern_of(bits: Tensor) -> Pattern:
    return pp.pack_mask(bits).pattern


def flow(*size: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bound(exact_of_magnitudes: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """How far any order of summation may be from the exact sum."""
    return exact_of_magnitudes * (terms + 4) * torch.finfo(dtype).eps + torch.finfo(dtype).tiny


# ---- the ops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(sparse_ops.SCHEMAS))
def test_binary_is_complete(name: str) -> None:
    on_cpu = _library.cpu_loaded and not name.startswith("tiled_")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pathprune::{name}", "CPU") == on_cpu


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_index_and_written_out(shape: tuple[int, int, int, float], device: torch.device) -> None:
    weight, bits = (t.to(device) for t in weight_of(shape, torch.float32))
    pattern = pattern_of(bits)
    made = sparse_reference.sparse_index(pattern.layout, pattern.row_start, pattern.columns)
    for got, wanted in zip(pattern[2:7], made, strict=True):
        assert isinstance(got, Tensor)
        assert torch.equal(got, wanted)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        values = sparse_ops.sparse_gather(weight.to(dtype), pattern)
        assert torch.equal(values, weight.to(dtype)[bits])
        assert torch.equal(sparse_ops.sparse_scatter(values, pattern), weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int, float], dtype: torch.dtype, device: torch.device) -> None:
    """Both products and the sampled one, by every kernel, map and layout of x, against float64."""
    weight, bits = (t.to(device) for t in weight_of(shape, dtype))
    groups, rows, columns, _ = shape
    pattern, kind = pattern_of(bits), torch.float64 if dtype == torch.float64 else torch.float32
    values = sparse_ops.sparse_gather(weight, pattern)
    for positions in POSITIONS:
        x = flow(groups, positions, columns, dtype=kind).to(device)
        g = flow(groups, positions, rows, dtype=kind, seed=2).to(device)
        for f in WeightMap if positions in (1, 17) else (WeightMap.IDENTITY,):
            mapped = torch.where(bits, sparse_reference.map_weight(weight, f), 0).double()
            kernels = (0, 1, 2, 3) if positions == 1 else (0,)
            for kernel in kernels:
                for given_x in (x, x.mT.contiguous().mT, torch.stack((x, x), -1)[..., 0]):
                    y = sparse_ops.sparse_matmul(values, given_x, pattern, f, kernel=kernel)
                    near = bound(x.double().abs() @ mapped.abs().mT, columns, kind)
                    assert y.dtype == kind
                    assert bool(((y.double() - x.double() @ mapped.mT).abs() <= near).all())
                y = sparse_ops.sparse_matmul(values, g, pattern, f, True, kernel)
                near = bound(g.double().abs() @ mapped.abs(), rows, kind)
                assert bool(((y.double() - g.double() @ mapped).abs() <= near).all())
        made = sparse_ops.sparse_sample(x, g, pattern)
        near = bound((g.double().abs().mT @ x.double().abs())[bits], positions, kind)
        assert bool(((made.double() - (g.double().mT @ x.double())[bits]).abs() <= near).all())


def test_padded_values_are_values() -> None:
    """A packed weight of `ops.compact_weight` has padding behind its values."""
    weight, bits = weight_of((1, 9, 40, 0.4), torch.float32)
    layout = ops.mask_pack(bits)
    values, row_start = ops.compact_weight(weight, layout)
    pattern, x = sparse_ops.sparse_index(layout, row_start, 40), flow(1, 1, 40, dtype=torch.float32)
    for kernel in KERNELS.values():
        y = sparse_ops.sparse_matmul(values, x, pattern, kernel=kernel)
        torch.testing.assert_close(y, x @ weight.mT)
    values.requires_grad_()
    sparse_ops.sparse_matmul(values, x, pattern).sum().backward()
    assert values.grad is not None
    assert bool((values.grad[-16:] == 0).all())


def test_as_exact_as_torch() -> None:
    """Not more than twice the error of F.linear in float32, as a root of the mean square."""
    for density, batch in ((0.1, 64), (0.5, 1), (1.0, 33)):
        weight, bits = weight_of((1, 200, 1500, density), torch.float32)
        mask, x = pp.pack_mask(bits[0]), flow(batch, 1500, dtype=torch.float32)
        exact = x.double() @ weight[0].double().T
        ours = pp.masked_matmul(x, mask.gather(weight[0]), mask, kernel="auto").double() - exact
        torchs = F.linear(x, weight[0]).double() - exact
        assert ours.square().mean() <= 4 * torchs.square().mean()


@pytest.mark.parametrize("positions", [1, 6, 40])
def test_threads_give_the_same_bits(positions: int) -> None:
    weight, bits = weight_of((2, 700, 900, 0.15), torch.float32)
    pattern = pattern_of(bits)
    values = sparse_ops.sparse_gather(weight, pattern)
    x, g = flow(2, positions, 900, dtype=torch.float32), flow(2, positions, 700, dtype=torch.float32)
    made = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            made.append(
                (
                    sparse_ops.sparse_matmul(values, x, pattern),
                    sparse_ops.sparse_matmul(values, g, pattern, transposed=True),
                    sparse_ops.sparse_sample(x, g, pattern),
                )
            )
        finally:
            torch.set_num_threads(1)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@pytest.mark.skipif(not _library.cpu_loaded, reason="there is one definition without the binary")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    environment = {**os.environ, "PATHPRUNE_ISA": isa, "PATHPRUNE_REQUIRE_CUDA": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    chosen = "test_products and cpu and (float32 or float64) or index_and"
    done = subprocess.run(
        [*command, "-k", chosen],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


# ---- gradients and torch's machinery ---------------------------------------------------------------


def test_gradients_of_the_ops() -> None:
    weight, bits = weight_of((2, 5, 19, 0.4), torch.float64)
    pattern = pattern_of(bits)
    values = (sparse_ops.sparse_gather(weight, pattern) + 0.1).requires_grad_()
    x = flow(2, 3, 19, dtype=torch.float64).requires_grad_()
    g = flow(2, 3, 5, dtype=torch.float64).requires_grad_()
    for f in WeightMap:
        for transposed, given_x in ((False, x), (True, g)):

            def product(values: Tensor, x: Tensor, f: int = f, transposed: bool = transposed) -> Tensor:
                return sparse_ops.sparse_matmul(values, x, pattern, f, transposed)

            assert torch.autograd.gradcheck(product, (values, given_x))
            assert torch.autograd.gradgradcheck(product, (values, given_x))
    assert torch.autograd.gradcheck(lambda x, g: sparse_ops.sparse_sample(x, g, pattern), (x, g))
    assert torch.autograd.gradgradcheck(lambda x, g: sparse_ops.sparse_sample(x, g, pattern), (x, g))
    dense = weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: sparse_ops.sparse_gather(w, pattern), (dense,))
    assert torch.autograd.gradcheck(lambda v: sparse_ops.sparse_scatter(v, pattern), (values,))


def test_opcheck() -> None:
    weight, bits = weight_of((2, 5, 19, 0.4), torch.float32)
    pattern = pattern_of(bits)
    values = sparse_ops.sparse_gather(weight, pattern)
    x, g = flow(2, 3, 19, dtype=torch.float32), flow(2, 3, 5, dtype=torch.float32)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "sparse_index": [(pattern.layout, pattern.row_start, 19)],
        "sparse_matmul": [
            (values, x, 3, False, 0, *pattern),
            (values.clone().requires_grad_(), g.clone().requires_grad_(), 2, True, 1, *pattern),
        ],
        "sparse_sample": [(x, g, *pattern), (x.clone().requires_grad_(), g.clone().requires_grad_(), *pattern)],
        "sparse_gather": [(weight.clone().requires_grad_(), *pattern.rows)],
        "sparse_scatter": [(values.clone().requires_grad_(), *pattern.rows)],
    }
    assert set(calls) == {name for name in sparse_ops.SCHEMAS if name.startswith("sparse_")}
    for name, given_calls in calls.items():
        for arguments in given_calls:
            torch.library.opcheck(getattr(torch.ops.pathprune, name).default, arguments)


@pytest.mark.parametrize("kernel", ["auto", "tiles", "dense", None])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_masked_matmul(kernel: str | None, packed: bool) -> None:
    weight, bits = weight_of((1, 7, 19, 0.4), torch.float64)
    mask: Any = pp.pack_mask(bits[0]) if packed else bits[0]
    w = (mask.gather(weight[0]) if packed else weight[0] + 1).requires_grad_()
    x, bias = flow(2, 3, 19, dtype=torch.float64).requires_grad_(), torch.randn(7).double().requires_grad_()

    def product(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return pp.masked_matmul(x, w, mask, bias, kernel=kernel)

    dense = (w if not packed else mask.scatter(w)) * bits[0]
    torch.testing.assert_close(product(x, w, bias), F.linear(x, dense, bias))
    assert torch.autograd.gradcheck(product, (x, w, bias))
    assert torch.autograd.gradgradcheck(product, (x, w, bias))
    product(x, w, bias).square().sum().backward()
    if not packed:
        assert w.grad is not None
        assert bool((w.grad[~bits[0]] == 0).all())


def test_masked_entries_may_be_anything() -> None:
    bits = torch.tensor([[True, False, True]])
    weight = torch.tensor([[1.0, float("nan"), 2.0]], requires_grad=True)
    x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    y = pp.masked_matmul(x, weight, bits, kernel="auto")
    assert y.tolist() == [[7.0]]
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 0.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    weight, bits = weight_of((1, 30, 100, 0.2), torch.float32)
    mask, x = pp.pack_mask(bits[0]), flow(6, 100, dtype=torch.float32)
    values = mask.gather(weight[0]).requires_grad_()
    exact = x.to(dtype).double() @ weight[0].to(dtype).double().T
    y = pp.masked_matmul(x.to(dtype), values.to(dtype), mask, kernel="auto")
    assert y.dtype == dtype
    assert float((y.double() - exact).detach().abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())
    with torch.autocast("cpu", dtype=dtype):
        cast = pp.masked_matmul(x, values, mask, kernel="auto")
    assert torch.equal(cast, y)
    cast.sum().backward()
    assert values.grad is not None
    assert values.grad.dtype == torch.float32


@pytest.mark.parametrize("kernel", ["auto", "tiles", "dense"])
def test_compile(kernel: str) -> None:
    weight, bits = weight_of((1, 30, 100, 0.2), torch.float32)
    mask = pp.pack_mask(bits[0])
    values = mask.gather(weight[0]).requires_grad_()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def product(x: Tensor, values: Tensor) -> Tensor:
        return pp.masked_matmul(x, values, mask, kernel=kernel).relu()

    for batch in (4, 9):
        x = flow(batch, 100, dtype=torch.float32)
        y = product(x, values)
        torch.testing.assert_close(y, F.linear(x, weight[0]).relu())
        y.sum().backward()
    assert values.grad is not None


def test_any_strides_and_no_batch() -> None:
    weight, bits = weight_of((1, 30, 100, 0.2), torch.float32)
    mask = pp.pack_mask(bits[0])
    values, x = mask.gather(weight[0]), flow(100, 4, 3, dtype=torch.float32)
    y = pp.masked_matmul(x.permute(2, 1, 0), values, mask, kernel="auto")
    torch.testing.assert_close(y, x.permute(2, 1, 0) @ weight[0].T)
    assert pp.masked_matmul(torch.ones(0, 100), values, mask).shape == (0, 30)
    assert pp.masked_matmul(torch.ones(100), values, mask).shape == (30,)
    torch.testing.assert_close(pp.masked_matmul(x[:, 0, 0], values, mask), weight[0] @ x[:, 0, 0])


# ---- masks -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.floats(0, 1), st.integers(0, 20), st.integers(0, 2**31))
def test_any_mask(rows: int, columns: int, density: float, batch: int, seed: int) -> None:
    weight, bits = weight_of((1, rows, columns, density), torch.float64, seed)
    mask = pp.pack_mask(bits[0])
    values, x = mask.gather(weight[0]), flow(batch, columns, dtype=torch.float64, seed=seed)
    assert torch.equal(mask.scatter(values), weight[0])
    assert torch.equal(mask.bits(), bits[0])
    for kernel in ("auto", "lanes", "tiles", "dense"):
        torch.testing.assert_close(pp.masked_matmul(x, values, mask, kernel=kernel), x @ weight[0].T)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_csr_and_back() -> None:
    weight, bits = weight_of((1, 30, 100, 0.2), torch.float32)
    mask = pp.pack_mask(bits[0])
    values = mask.gather(weight[0])
    csr = mask.to_csr(values)
    assert torch.equal(csr.to_dense(), weight[0])
    again, same = pp.PackedMask.from_csr(csr)
    assert torch.equal(same, values)
    assert torch.equal(again.bits(), bits[0])


def test_packed_bytes() -> None:
    """At 95 % zeros values and everything beside them take 0.35 of the dense weight at most."""
    _, bits = weight_of((1, 512, 1024, 0.05), torch.float32)
    mask = pp.pack_mask(bits[0])
    assert mask.nbytes + 4 * mask.stored <= 0.3 * 4 * bits.numel()


def test_the_table() -> None:
    assert expected_speedup(4096, 4096, 0.01, 32) > expected_speedup(4096, 4096, 0.5, 32)
    assert expected_speedup(4096, 4096, 0.1, 10**6) == expected_speedup(4096, 4096, 0.1, 1024)
    sparse, full = (pp.pack_mask(torch.rand(1500, 1500) < density) for density in (0.05, 1.1))
    assert (sparse.kernel(32), full.kernel(32)) == ("auto", "dense")
    assert "density 1" in repr(full)


def refusals() -> list[Any]:
    bits = torch.rand(3, 20) < 0.5
    mask, x = pp.pack_mask(bits), torch.ones(2, 20)
    values, weight = mask.gather(torch.ones(3, 20)), torch.ones(3, 20)
    return [
        pytest.param(lambda: pp.masked_matmul(x.int(), values, mask), "masked_matmul: x: wanted a float", id="x"),
        pytest.param(lambda: pp.masked_matmul(x[:, 1:], values, mask), r"x: wanted .*20\]", id="columns"),
        pytest.param(lambda: pp.masked_matmul(x, values.double(), mask), "weight: wanted float32", id="dtype"),
        pytest.param(lambda: pp.masked_matmul(x, values[1:], mask), r"weight: wanted \[3, 20\] or", id="values"),
        pytest.param(lambda: pp.masked_matmul(x, weight, bits[:2]), r"weight: wanted \[2, 20\] or", id="mask"),
        pytest.param(lambda: pp.masked_matmul(x, weight, bits.int()), "pack_mask: mask: wanted bool", id="bool"),
        pytest.param(lambda: pp.pack_mask("a"), "pack_mask: mask: wanted bool", id="no mask"),
        pytest.param(lambda: pp.masked_matmul(x, None, mask), "x and weight: wanted tensors, got", id="no weight"),
        pytest.param(lambda: pp.masked_matmul(x, values, mask, x[0]), r"bias: wanted \[3\]", id="bias"),
        pytest.param(lambda: pp.masked_matmul(x, values, mask, kernel="?"), "kernel: wanted one of", id="kernel"),
        pytest.param(lambda: pp.masked_matmul(x, values, mask, kernel="gather"), "kernel: wanted 0 or 1", id="T"),
        pytest.param(
            lambda: sparse_ops.sparse_matmul(values, x, mask.pattern), "x: wanted 3 dimensions", id="dimensions"
        ),
        pytest.param(
            lambda: sparse_ops.sparse_matmul(values, x[None], mask.pattern._replace(order=None), transposed=True),
            "to transpose with",
            id="transpose",
        ),
        pytest.param(
            lambda: sparse_ops.sparse_index(mask.pattern.layout, mask.pattern.row_start + 1, 20),
            "row_start: wanted",
            id="row_start",
        ),
        pytest.param(lambda: sparse_ops.sparse_sample(x[None], torch.ones(1, 3, 3), mask.pattern), "g: wanted", id="g"),
    ]


@pytest.mark.parametrize(("call", "message"), refusals())
def test_refuses(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not _library.cpu_loaded, reason="the reference would index the entries before it counts them")
def test_refuses_more_entries_than_an_order_can_number() -> None:
    rows, columns = 2**15 + 1, 2**16
    layout = torch.tensor([-1], dtype=torch.int16).expand(1, rows, columns // 16)
    with pytest.raises(ValueError, match=rf"wanted at most 2\^31 - 1 entries, got {rows * columns}"):
        sparse_ops.sparse_index(layout, torch.arange(rows + 1) * columns, columns)


def test_copies_of_a_mask_and_masks_that_nothing_watches() -> None:
    """A pickled mask is the mask; one made in inference mode has no count of what is written to it."""
    mask = pp.pack_mask(torch.rand(7, 33) < 0.3)
    for copied in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert torch.equal(copied.bits(), mask.bits()) and copied.kernel(8) == mask.kernel(8)
    with torch.inference_mode():
        bits = torch.rand(7, 33) < 0.3
        x, w = torch.randn(5, 33), torch.randn(7, 33)
        torch.testing.assert_close(pp.masked_matmul(x, w, bits), x @ (w * bits).T)


def test_refuses_a_mask_that_changed() -> None:
    bits = torch.rand(3, 20) < 0.5
    mask, x = pp.pack_mask(bits), torch.ones(2, 20)
    values = mask.gather(torch.ones(3, 20))
    bits[0, 0] = ~bits[0, 0]
    with pytest.raises(ValueError, match="mask: wanted a mask that did not change"):
        pp.masked_matmul(x, values, mask)


@pytest.mark.skipif(not _library.cpu_loaded, reason="this run is the one without the binary")
@pytest.mark.slow
def test_without_the_binary() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "PATHPRUNE_DISABLE_BINARY": "1", "PATHPRUNE_REQUIRE_CUDA": "0"}
    done = subprocess.run(
        [*command, "-k", "not 70001 and not threads"],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
