"""Masks of biases: against the units that literal walks visit; on a model, in files, through training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp
import walk_oracle
from pathprune.walks import WalkRule, Walks
from test_walks import Kinds, Sequence

MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "kinds": (Kinds, Kinds.shape),
    "sequence": (Sequence, Sequence.shape),
}


def made(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, shape = MODELS[kind]
    return model(), torch.ones(1, *shape)


def visited_units(walks: Walks, count: int) -> set[tuple[str, int]]:
    """(weight, output unit) of every step of the first walks, one step at a time."""
    found = set()
    for number in range(count):
        for name, flat in walk_oracle.walk(walks, number):
            site = next(s for s in walks.graph.sites.values() if s.weight == name)
            _, rows, columns, entries = site.shape
            group, row, column = flat // (rows * columns * entries), flat // (columns * entries) % rows, 0
            column = flat // entries % columns
            found.add((name, group * rows + row if site.forward_to_rows else group * columns + column))
    return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.4])
def test_the_biases_of_visited_units_stay(kind, density):
    model, x = made(kind)
    masks = pp.prune(model, pp.PHEW(), density=density, example_input=x, seed=3)
    network = pp.PathNetwork.from_module(model, x)
    walks = Walks(network, network.prunable, WalkRule(), seed=3)
    visited = visited_units(walks, masks.metadata["findings"]["walks"])
    both = masks.with_biases(model)
    assert set(both) == set(masks) | {f"{name.removesuffix('weight')}bias" for name in masks}
    for name in masks:
        bias = both[f"{name.removesuffix('weight')}bias"]
        assert set(bias.nonzero().flatten().tolist()) == {unit for other, unit in visited if other == name}
        assert torch.equal(both[name], masks[name])


def test_grouped_and_transposed_convolutions_and_hugging_face_layers():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf = 3
            self.weight, self.bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))

    model = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 6, 2, groups=2), "hf": Conv1D()})
    up = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    up[0, 1, 0, 1] = up[3, 2, 1, 1] = True  # the first group's second unit, the second one's third
    hf = torch.tensor([[True, False, False], [False, False, True]])
    masks = pp.Masks({"up.weight": up, "hf.weight": hf}).with_biases(model)
    assert masks["up.bias"].tolist() == [False, True, False, False, False, True]
    assert masks["hf.bias"].tolist() == [True, False, True]


def test_shared_biases_and_layers_without_masks():
    a, b, c = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)
    b.bias = a.bias
    model = nn.ModuleDict({"a": a, "b": b, "c": c, "norm": nn.BatchNorm1d(3)})
    rows = torch.tensor([True, False, False])[:, None].expand(3, 2)
    masks = pp.Masks({"a.weight": rows, "b.weight": rows.flip(0)}).with_biases(model)
    assert list(masks) == ["a.weight", "b.weight", "a.bias"]
    assert masks["a.bias"].tolist() == [True, False, True]
    with pytest.raises(pp.MaskMismatchError):
        pp.Masks({"d.weight": rows}).with_biases(model)


def test_on_a_model_in_a_file_and_through_training(tmp_path):
    model, x = made("kinds")
    masks = pp.prune(model, pp.PHEW(), density=0.03, example_input=x).with_biases(model)
    gone = {name: ~masks[name] for name in masks if name.endswith("bias")}
    assert any(bool(mask.any()) for mask in gone.values())
    masks.save(tmp_path / "masks.safetensors")
    loaded = pp.Masks.load(tmp_path / "masks.safetensors", model, base="raise")
    assert loaded == masks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with loaded.maintain(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    parameters = dict(model.named_parameters())
    assert not any(bool(parameters[name][mask].any()) for name, mask in gone.items())
    assert any(bool(parameters[name][~mask].any()) for name, mask in gone.items())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(1.0)
    loaded.apply_(model, base="ignore")
    assert all(torch.equal(parameters[name] == 0, mask) for name, mask in gone.items())


def test_the_report_counts_weights_alone():
    model, x = made("kinds")
    masks = pp.prune(model, pp.PHEW(), density=0.03, example_input=x)
    both = masks.with_biases(model)
    before, after = masks.report(), both.report()
    assert [layer.name for layer in after.layers] == [layer.name for layer in before.layers]
    assert (after.kept, after.weights, after.dead_layers) == (before.kept, before.weights, [])
    kept = both.kept - masks.kept
    assert after.biases == (kept, both.total - masks.total)
    assert f"{kept} of {after.biases[1]} biases kept" in str(after)
    assert after.as_dict()["kept_biases"] == kept
    assert "kept_biases" not in before.as_dict()
    assert both.report(model, x).live == after.live


def test_sparse_layers_lose_the_biases_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    masks = pp.prune(model, pp.PHEW(), density=0.01, example_input=torch.ones(1, 64)).with_biases(model)
    assert not bool(masks["0.bias"].all())
    pp.sparsify(model, masks, prefer="smaller")
    assert len(model.sparsify_report) == 2
    assert torch.equal(model[0].bias == 0, ~masks["0.bias"])
