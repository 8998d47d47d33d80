"""Models that accelerate has dispatched: parameters on the meta device, values in memory, raw files or a checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.utils import align_module_device
from safetensors.torch import save_file
from torch import Tensor, nn

import pathprune as pp
from pathprune.belonging import base_hash


class Network(nn.Module):
    """A stem in one store and a head in another, one matrix tied, a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.second = nn.Linear(10, 10)
        self.third = nn.Linear(10, 10, bias=False)
        self.third.weight = self.second.weight
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(torch.relu(self.third(x)))


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    made = Network().to(dtype).eval()
    with torch.no_grad():
        made.norm.running_var.uniform_(0.5, 2)
        made.norm.weight.uniform_(-1, 1)
    return made


def untied(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype).eval()


def in_memory(made: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(made, torch.device("cpu"))


def on_disk(made: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(made, str(folder), torch.device("cpu"))


def half_on_disk(made: nn.Module, folder: Path) -> nn.Module:
    places = {name: "disk" if k // 2 % 2 else "cpu" for k, (name, _) in enumerate(made.named_children())}
    return accelerate.dispatch_model(made, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def in_a_checkpoint(made: nn.Module, folder: Path) -> nn.Module:
    file = str(folder / "model.safetensors")
    save_file({name: t.contiguous() for name, t in made.state_dict().items()}, file)
    index = {name: {"safetensors_file": file, "weight_name": name} for name in made.state_dict()}
    (folder / "index.json").write_text(json.dumps(index))
    return accelerate.disk_offload(made, str(folder), torch.device("cpu"))


def values(made: nn.Module) -> dict[str, Tensor]:
    """What accelerate itself reads."""
    found = {}
    for path, module in made.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        with align_module_device(module):
            found |= {f"{path}.{key}": p.detach().clone() for key, p in module.named_parameters(recurse=False)}
    return found


PLACES = [in_memory, on_disk, half_on_disk, in_a_checkpoint]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_those_of_the_model_in_memory(
    place: Callable[[nn.Module, Path], nn.Module], dtype: torch.dtype, tmp_path: Path
) -> None:
    whole, x = untied(dtype), torch.ones(1, 6, dtype=dtype)
    away = place(copy.deepcopy(whole), tmp_path)
    before = values(away)
    data = [(torch.randn(5, 6).to(dtype), torch.randint(0, 3, (5,)))]
    for pruner in (pp.SynFlow(rounds=3), pp.PHEW(), pp.Magnitude(), pp.SNIP(data)):
        found = pp.prune(away, pruner, density=0.3, example_input=x)
        wanted = pp.prune(whole, pruner, density=0.3, example_input=x)
        assert found == wanted and found.metadata["base_hash"] == wanted.metadata["base_hash"]
    assert base_hash(away, found) == base_hash(whole, found)
    assert any(p.is_meta for p in away.parameters()) and values(away).keys() == before.keys()
    assert all(torch.equal(values(away)[name], before[name]) for name in before)
    torch.testing.assert_close(away(x), whole(x))  # its hooks are where they were


@pytest.mark.parametrize("place", PLACES[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_written_where_the_values_are(
    place: Callable[[nn.Module, Path], nn.Module], dtype: torch.dtype, tmp_path: Path
) -> None:
    whole, x = untied(dtype), torch.randn(2, 6).to(dtype)
    away = place(copy.deepcopy(whole), tmp_path)
    masks = pp.prune(away, pp.SynFlow(rounds=3), density=0.3, example_input=x)
    assert masks.apply_(away, base="raise") is away
    masks.apply_(whole)
    written = values(away)
    assert all(torch.equal(written[name], p) for name, p in whole.named_parameters())
    torch.testing.assert_close(away(x), whole(x))
    with pytest.warns(UserWarning, match="masks made on other weights"):
        masks.apply_(away)  # the recorded hash is compared with what the store has now


def all_on_disk(made: nn.Module, folder: Path) -> nn.Module:
    """With a file for each name of a tied weight."""
    made.extra = nn.Identity()
    places = {name: "cpu" if name == "extra" else "disk" for name, _ in made.named_children()}
    accelerate.utils.offload_state_dict(str(folder), made.state_dict())
    return accelerate.dispatch_model(made, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("place", [in_memory, all_on_disk])
def test_a_tied_weight_stays_one(place: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    whole, x = model(), torch.ones(1, 6)
    away = place(copy.deepcopy(whole), tmp_path)
    for pruner in (pp.SynFlow(rounds=3), pp.Magnitude()):
        found = pp.prune(away, pruner, density=0.3, example_input=x)
        assert found == pp.prune(whole, pruner, density=0.3, example_input=x) and "third.weight" not in found
    found.apply_(away)
    found.apply_(whole)
    written = values(away)
    assert torch.equal(written["third.weight"], whole.second.weight) and not bool(found["second.weight"].all())
    torch.testing.assert_close(away(x), whole(x))


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    away = in_a_checkpoint(untied(), tmp_path)
    masks = pp.prune(away, pp.Magnitude(), density=0.3, example_input=torch.ones(1, 6))
    file = tmp_path / "model.safetensors"
    bytes_before = file.read_bytes()
    with pytest.raises(
        ValueError, match=r"0.weight cannot be written: .*from the checkpoint .*which is not written to"
    ):
        masks.apply_(away)
    assert file.read_bytes() == bytes_before
    kept = in_memory(untied(), tmp_path)
    before = values(kept)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    with pytest.raises(ValueError, match=r"accelerate has offloaded it: train a model that is not offloaded"):
        masks.maintain(kept, optimizer)
    with pytest.raises(ValueError, match=r"accelerate has offloaded it"):
        masks.to_torch_prune(kept)
    assert all(torch.equal(values(kept)[name], before[name]) for name in before)
    lost = untied().to("meta")
    with pytest.raises(ValueError, match=r"meta device and has no values \(load the weights first\)"):
        masks.apply_(lost)
    with pytest.raises(ValueError, match=r"wanted materialised weights, got meta tensors: 0.weight"):
        pp.prune(lost, pp.Magnitude(), density=0.3, example_input=torch.ones(1, 6))


def test_values_in_place_of_a_model_s_own() -> None:
    whole, x = model(), torch.ones(1, 6)
    empty = copy.deepcopy(whole).to("meta")
    given = dict(whole.state_dict())
    network = pp.PathNetwork.from_module(empty, x, given)
    for pruner in (pp.SynFlow(rounds=3), pp.PHEW(), pp.SNIP([(torch.randn(5, 6), torch.randint(0, 4, (5,)))])):
        found = pp.prune(network, pruner, density=0.3)
        assert found == pp.prune(whole, pruner, density=0.3, example_input=x)
    assert network.tensors["first.weight"].data_ptr() == whole.first.weight.data_ptr()  # no value is copied
    assert all(t.is_meta for t in empty.parameters())
    del given["head.weight"]
    with pytest.raises(ValueError, match=r"got meta tensors: head.weight"):
        pp.PathNetwork.from_module(empty, x, given)
