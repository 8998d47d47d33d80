"""Densities of layers: from masks, from shapes, from outliers; against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pathprune import Magnitude, Masks, Random, SynFlow, Wanda, allocate, prune
from pathprune.allocation import block_of


class Blocks(nn.Module):
    """Three blocks of two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 12)) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Blocks()
    with torch.no_grad():
        for k, block in enumerate(made.blocks):  # more and more outliers
            block[0].weight[torch.rand(30, 12) < 0.02 * k] *= 20
    return made


@pytest.fixture
def data():
    torch.manual_seed(1)
    return [torch.randn(6, 12) * torch.rand(12), torch.randn(3, 12)]


def total(model, densities) -> float:
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(densities[name] * sizes[name] for name in densities) / sum(sizes[name] for name in densities)


def test_a_pruners_masks_say_the_densities(model):
    x = torch.ones(1, 12)
    densities = allocate(model, 0.3, by=SynFlow(rounds=5), example_input=x)
    masks = prune(model, SynFlow(rounds=5), density=0.3, example_input=x)
    assert densities == {name: count.kept / count.total for name, count in masks.counts().items()}
    assert total(model, densities) == pytest.approx(0.3, abs=1e-3)
    assert len(set(densities.values())) > 2


def test_densities_go_to_a_method_that_chooses_within_rows(model, data):
    densities = allocate(model, 0.4, by=SynFlow(rounds=5), example_input=torch.ones(1, 12))
    masks = prune(model, Wanda(data), density=0.4, allocation=densities)
    for name, density in densities.items():
        assert (masks[name].sum(1) == max(round(density * masks[name].shape[1]), 1)).all()


def test_shapes(model):
    densities = allocate(model, 0.3, by="erk")
    sizes = {name: p.shape for name, p in model.named_parameters() if p.dim() == 2}
    relative = {name: densities[name] / (sum(shape) / shape.numel()) for name, shape in sizes.items()}
    free = [value for name, value in relative.items() if densities[name] < 1]
    assert free == pytest.approx([free[0]] * len(free))
    assert total(model, densities) == pytest.approx(0.3)
    assert set(allocate(model, 0.3, by="uniform").values()) == {0.3}


@pytest.mark.parametrize("density", [0.05, 0.5, 0.97])
def test_outliers(model, data, density):
    densities = allocate(model, density, by="owl", data=data, outlier=3.0, spread=0.1)
    assert total(model, densities) == pytest.approx(density, abs=1e-9)
    assert all(0 <= value <= 1 for value in densities.values())
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, a, n=name: inputs.setdefault(f"{n}.weight", []).append(a[0]))
    with torch.no_grad():
        for batch in data:
            model(batch)
    above, sizes = {}, {}
    blocks = block_of(model, list(densities))
    for name, block in blocks.items():
        metric = dict(model.named_parameters())[name].detach().double().abs()
        metric = metric * torch.cat(inputs[name]).double().norm(dim=0)
        above[block] = above.get(block, 0) + int((metric > 3.0 * metric.mean()).sum())
        sizes[block] = sizes.get(block, 0) + metric.numel()
    share = {block: above[block] / sizes[block] for block in above}
    found = {blocks[name]: value for name, value in densities.items()}
    most, least = max(share, key=share.get), min(share, key=share.get)
    assert most == "blocks.2"
    if density == 0.5:
        assert found[most] - found[least] == pytest.approx(0.2)
        slopes = [(found[b] - found[least]) / (share[b] - share[least]) for b in share if share[b] > share[least]]
        assert slopes == pytest.approx([slopes[0]] * len(slopes))


def test_equal_layers_are_alike():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    assert allocate(model, 0.4, by="owl", data=[torch.ones(1, 4)]) == {"0.weight": pytest.approx(0.4)}


def test_blocks_are_elements_of_lists(model):
    names = ["blocks.0.0.weight", "blocks.0.2.weight", "blocks.2.0.weight", "head.weight"]
    assert list(block_of(model, names).values()) == ["blocks.0", "blocks.0", "blocks.2", "head.weight"]


def test_mistakes(model, data):
    with pytest.raises(ValueError, match=r"allocate: density: wanted a fraction in \(0, 1\], got 0"):
        allocate(model, 0, by="erk")
    with pytest.raises(ValueError, match=r"allocate: by: wanted a pruner, 'owl' or one of .*, got 'lamp'"):
        allocate(model, 0.5, by="lamp")
    with pytest.raises(ValueError, match="allocate: data: wanted batches for 'owl', got None"):
        allocate(model, 0.5, by="owl")
    with pytest.raises(ValueError, match="wanted outlier > 0 and spread >= 0, got 0 and"):
        allocate(model, 0.5, by="owl", data=data, outlier=0)
    with pytest.raises(ValueError, match="allocation: wanted a density for every layer, got none for"):
        prune(model, Magnitude(), density=0.5, scope="row", allocation={})


def test_masks_say_what_was_asked_for(model, tmp_path):
    densities = {name: torch.tensor(0.25) for name, p in model.named_parameters() if p.dim() == 2}
    options = {"scope": "layer", "exclude": "head.*", "allocation": densities, "allow_regrowth": False}
    masks = prune(model, Magnitude(), density=0.25, **options)
    masks.save(tmp_path / "masks.safetensors")
    config = Masks.load(tmp_path / "masks.safetensors").metadata["config"]
    assert config["allocation"] == dict.fromkeys(densities, 0.25)
    assert (config["exclude"], config["allow_regrowth"]) == (["head.*"], False)
    plain = prune(model, Magnitude(), density=0.25, include=["*.0.weight"]).metadata["config"]
    assert plain["include"] == ["*.0.weight"]
    assert not {"allocation", "exclude", "allow_regrowth"} & set(plain)


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_densities_by_name_are_where_the_schedule_ends(model, scope):
    names = [name for name, p in model.named_parameters() if p.dim() == 2]
    densities = {name: 0.5 if name == "head.weight" else 0.05 for name in names}
    options = {"example_input": torch.ones(1, 12), "scope": scope, "allocation": densities, "progress": False}
    masks = prune(model, SynFlow(rounds=5), density=0.1, **options)
    once = prune(model, SynFlow(rounds=1), density=0.1, **options)
    assert masks.counts() == once.counts()
    assert masks.counts()["head.weight"].kept == 30
    kept = masks.metadata["findings"]["kept"]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 5
    assert (kept[-1], once.metadata["findings"]["kept"]) == (masks.kept, [masks.kept])
    for pruner in (SynFlow(rounds=5), Random()):
        earlier, later = prune(model, pruner, density=[0.4, 0.1], **options)
        assert later.kept < earlier.kept == earlier.metadata["findings"]["kept"][-1]
        assert later.counts() == masks.counts()
        assert all(bool((later[name] <= earlier[name]).all()) for name in names)
