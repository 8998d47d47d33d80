"""Sparse layers: the same function as the masked dense ones, in training too, and the way there and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from pathprune.sparse import SparsifyReport


def masks_of(model: nn.Module, density: float, seed: int = 0) -> pp.Masks:
    generator = torch.Generator().manual_seed(seed)
    return pp.Masks(
        {
            name: torch.rand(weight.shape, generator=generator) < density
            for name, weight in model.named_parameters()
            if weight.dim() > 1
        }
    )


def mlp(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "groups": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "bias": False},
    {"kernel_size": 3, "padding": "same", "groups": 4, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("handicap", [0.0, 1e9], ids=["sparse", "dense"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions(options: dict[str, Any], handicap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are those of the masked convolution, whichever way they are computed."""
    monkeypatch.setattr("pathprune.sparse.POINTWISE_HANDICAP", handicap)
    monkeypatch.setattr("pathprune.sparse.PATCH_HANDICAP", handicap)
    monkeypatch.setattr("pathprune.sparse.PATCH_BYTES", 20_000)
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 12, dtype=torch.float64, **options)
    mask = torch.rand(dense.weight.shape) < 0.3
    dense.weight.data *= mask
    sparse = pp.SparseConv2d(copy.deepcopy(dense), mask)
    for size in ((3, 8, 9, 7), (8, 6, 6)):
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)
        y, wanted = sparse(x), dense(x)
        torch.testing.assert_close(y, wanted)
        grads = torch.autograd.grad(y.square().sum(), (x, sparse.weight))
        exact = torch.autograd.grad(wanted.square().sum(), (x, dense.weight))
        torch.testing.assert_close(grads[0], exact[0])
        torch.testing.assert_close(sparse.mask.scatter(grads[1]).reshape(mask.shape), exact[1] * mask)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    loss = F.mse_loss(model(x), x[:, :5])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_training_is_that_of_the_masked_model(kind: str) -> None:
    """Swapped in the middle and back, with the optimizer's state, training goes on as it did."""
    dense, x = mlp().double(), torch.randn(32, 20, dtype=torch.float64)
    masks = masks_of(dense, 0.3)
    masks.apply_(dense)
    sparse = copy.deepcopy(dense)
    options: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
    ours, theirs = (getattr(torch.optim, kind)(m.parameters(), lr=0.01, **options) for m in (sparse, dense))
    losses: list[list[float]] = [[], []]
    with masks.maintain(dense, theirs):
        for part in range(3):
            if part == 1:
                with masks.maintain(sparse, ours):
                    pass  # what maintaining leaves behind in the state is no obstacle
                pp.sparsify(sparse, masks, optimizer=ours, min_speedup=0)
                assert isinstance(sparse[2], pp.SparseLinear)
                assert sparse[2].weight.dim() == 1
            if part == 2:
                pp.densify(sparse, optimizer=ours)
                assert type(sparse[2]) is nn.Linear
            for _ in range(4):
                for k, (model, optimizer) in enumerate(((sparse, ours), (dense, theirs))):
                    if part != 1 and k == 0:
                        with masks.maintain(model, optimizer):
                            losses[k].append(step(model, optimizer, x))
                    else:
                        losses[k].append(step(model, optimizer, x))
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))
    for (name, a), (_, b) in zip(sparse.named_parameters(), dense.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_there_and_back_is_the_identity() -> None:
    model = mlp()
    masks = masks_of(model, 0.2)
    masks.apply_(model)
    modules, parameters = list(model.modules()), list(model.parameters())
    state = copy.deepcopy(model.state_dict())
    assert pp.sparsify(model, masks, min_speedup=0) is model
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert pp.densify(model) is model
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "sparsify_report")


def test_a_copy_comes_back_with_its_own_parameters() -> None:
    model = pp.sparsify(mlp(), masks_of(mlp(), 0.2), min_speedup=0)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    x = torch.randn(3, 20)
    wanted = copied(x)
    pp.densify(copied)
    torch.testing.assert_close(copied(x), wanted)
    assert not torch.equal(model(x), wanted)


def test_swaps_only_where_it_pays() -> None:
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(8, 8), nn.Linear(2048, 2048, bias=False), nn.PReLU(3))
    model.append(model[0])
    masks = {
        "0.weight": torch.rand(2048, 2048) < 0.05,
        "1.weight": torch.rand(8, 8) < 0.05,
        "2.weight": torch.rand(2048, 2048) < 1.1,
    }
    pp.sparsify(model, masks)
    report = model.sparsify_report
    assert isinstance(report, SparsifyReport)
    assert [swap.swapped for swap in report] == [True, False, False]
    assert model[0] is model[4]
    assert set(report[0].speedup) == {1, 32, 256}
    assert report[0].packed_bytes < 0.1 * report[0].dense_bytes
    assert "sparse" in str(report)
    assert "not faster" in str(report)
    pp.densify(model)
    pp.sparsify(model, masks, batch=64, prefer="smaller")
    assert [swap.swapped for swap in model.sparsify_report] == [True, True, False]
    assert set(model.sparsify_report[0].speedup) == {64}


def test_leaves_alone_what_it_cannot_swap() -> None:
    model = nn.Sequential(nn.Embedding(30, 20), nn.Linear(20, 30, bias=False), nn.Conv1d(4, 4, 3))
    model[1].weight = model[0].weight
    masks = {"1.weight": torch.rand(30, 20) < 0.1, "2.weight": torch.rand(4, 4, 3) < 0.1}
    pp.sparsify(model, masks, min_speedup=0)
    assert [swap.reason for swap in model.sparsify_report] == ["its weight is shared", "Conv1d: no sparse layer"]


def test_files(tmp_path: Path) -> None:
    """A file has the packed size, and a dense model becomes sparse by reading it."""
    model = nn.Sequential(nn.Linear(512, 512), nn.Flatten(1), nn.Unflatten(1, (2, 16, 16)), nn.Conv2d(2, 4, 3))
    masks = masks_of(model, 0.05)
    pp.sparsify(model, masks, min_speedup=0)
    path = tmp_path / "sparse.safetensors"
    pp.save_sparse(model, path)
    assert path.stat().st_size < 0.12 * 4 * 512 * 512
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(512, 512), nn.Flatten(1), nn.Unflatten(1, (2, 16, 16)), nn.Conv2d(2, 4, 3))
    pp.sparsify(other, {"0.weight": torch.rand(512, 512) < 0.5}, min_speedup=0)  # of another mask, even
    assert pp.load_sparse(other, path) is other
    assert isinstance(other[3], pp.SparseConv2d)
    x = torch.randn(3, 512)
    assert torch.equal(other(x), model(x))
    for again in (model, other):  # with the mask it has, which the layer has packed and used
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), model(x))
    dense = nn.Sequential(nn.Linear(512, 512), nn.Flatten(1), nn.Unflatten(1, (2, 16, 16)), nn.Conv2d(2, 4, 3))
    assert torch.equal(pp.load_sparse(dense, path)(x), model(x))
    wrong = nn.Sequential(nn.Embedding(512, 512))
    with pytest.raises(ValueError, match="load_sparse: 0: wanted a Linear"):
        pp.load_sparse(wrong, path)


def test_compile_and_dtypes() -> None:
    model = pp.sparsify(mlp(), masks_of(mlp(), 0.2), min_speedup=0)
    x = torch.randn(3, 20)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert model[0].layout.dtype == torch.int16


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"sparsify: masks: wanted names of parameters, got 9\.weight"):
        pp.sparsify(mlp(), {"9.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"sparsify: masks\['0\.weight'\]: wanted a bool tensor of shape \[64, 20\]"):
        pp.sparsify(mlp(), {"0.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="SparseLinear: mask: wanted bool"):
        pp.SparseLinear(nn.Linear(3, 4), torch.ones(2, 2, dtype=torch.bool))


def test_layers_change_while_a_loss_of_earlier_is_held() -> None:
    """A training loop still has its last loss when it makes its layers sparse, and dense again."""
    net, x = mlp(), torch.randn(8, 20)
    masks = masks_of(net, 0.2)
    masks.apply_(net)
    held = [net(x).square().mean()]
    pp.sparsify(net, masks, prefer="smaller")
    assert any(swap.swapped for swap in net.sparsify_report)
    held.append(net(x).square().mean())
    held[-1].backward()
    sparse = {
        name: layer.mask.scatter(layer.weight.grad) for name, layer in net.named_modules() if hasattr(layer, "mask")
    }
    pp.densify(net)
    assert all(parameter.grad is None for name, parameter in net.named_parameters() if name.endswith("weight"))
    net(x).square().mean().backward()
    for name, gradient in sparse.items():
        bits = masks[f"{name}.weight"]
        torch.testing.assert_close(gradient.reshape(bits.shape), net.get_submodule(name).weight.grad * bits)
