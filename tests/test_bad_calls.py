"""Calls that are wrong: the error says what was wanted and got, and model, masks and files stay as they were."""

from __future__ import annotations

import copy
import os
import pickle
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp

X = torch.ones(1, 20)
BATCH = (torch.ones(4, 20), torch.arange(4))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5))


def lazy() -> nn.Sequential:
    return nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(5))


def typed(dtype: torch.dtype) -> nn.Sequential:
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(dtype), requires_grad=False)
    return model


class _WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.layer(x), labels)


def pruned(model: nn.Module, density: float = 0.3) -> pp.Masks:
    return pp.prune(model, pp.Magnitude(), density=density)


MODEL = mlp()
MASKS = pruned(MODEL)
NETWORK = pp.PathNetwork.from_module(MODEL, X)
with torch.inference_mode():
    INFERENCE = mlp()


def by_hand(build: Callable[[pp.PathNetwork, int], Any]) -> Callable[[], Any]:
    """A network with an input of four units, and what is built wrongly upon it."""

    def call() -> Any:
        network = pp.PathNetwork()
        entered = network.add_input(4)
        try:
            return build(network, entered)
        finally:
            assert len(network.nodes) == 1
            assert not network.tensors
            assert not network.outputs

    return call


def taken_twice() -> Any:
    network = pp.PathNetwork()
    first = network.add_synapse(network.add_input(4), torch.ones(3, 4), "a")
    return network.add_synapse(first, torch.ones(2, 3), "a")


def prune(model: nn.Module = MODEL, x: Any = X, **options: Any) -> Any:
    return pp.prune(model, pp.SynFlow(rounds=1), density=0.3, example_input=x, **options)


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # a model, and what it is given
    "no module": (
        lambda: pp.PathNetwork.from_module("a", X),
        TypeError,
        "PathNetwork: model: wanted a torch.nn.Module",
    ),
    "a class": (lambda: pp.layer_network(nn.Linear), TypeError, "layer_network: model: .*, got the class Linear"),
    "lazy weights": (lambda: prune(lazy()), ValueError, r"wanted weights with a shape \(run a batch first\).*0.weight"),
    "lazy weights, no paths": (
        lambda: pp.prune(lazy(), pp.Magnitude(), density=0.3),
        ValueError,
        r"layer_network: model: wanted weights with a shape \(run a batch first\), got lazy ones: 0.weight",
    ),
    **{
        f"weights of {kind}": (
            lambda kind=kind: pp.prune(typed(getattr(torch, kind)), pp.Magnitude(), density=0.3),
            ValueError,
            f"prune: weight '0.weight': wanted float32, float64, bfloat16 or float16, got {kind}",
        )
        for kind in ("int8", "float8_e4m3fn", "complex64")
    },
    "no batch axis": (
        lambda: prune(x=torch.ones(20)),
        pp.UnsupportedModelError,
        r"shape\(s\) \[\(1,\)\], a sample of \[\(20,\)\] along the first axis: RuntimeError",
    ),
    "an example with labels": (
        lambda: prune(_WithLoss(), (X, torch.tensor([1]))),
        pp.UnsupportedModelError,
        "cross_entropy_loss .*no rule for this operator; paths end at the model's outputs: .* without labels",
    ),
    "density by name": (
        lambda: pp.prune(MODEL, pp.Magnitude(), density={"0.weight": 0.5}),
        TypeError,
        "prune: density: wanted a number .*; densities by name are an allocation, with scope='layer'",
    ),
    "more densities than rounds": (
        lambda: pp.prune(MODEL, pp.SNIP([BATCH]), density=[0.5, 0.2], example_input=X),
        ValueError,
        "rounds: wanted at least 2, one for each density, got 1: give the method rounds=2",
    ),
    "inference weights": (lambda: prune(INFERENCE), ValueError, "wanted ordinary tensors .*inference_mode: 0.weight"),
    "a sparse input": (
        lambda: prune(x=X.to_sparse()),
        ValueError,
        "example_input: wanted dense tensors, got .*sparse_coo",
    ),
    "no pattern": (lambda: prune(include=3), TypeError, "include: wanted a name pattern or a list of them, got 3"),
    "no patterns": (lambda: prune(exclude=[None]), TypeError, "exclude: wanted a name pattern or a list of them"),
    "allocation above 1": (
        lambda: prune(scope="layer", allocation={"0.weight": 2.0, "2.weight": 0.1}),
        ValueError,
        r"allocation: '0.weight': wanted a density in \[0, 1\], got 2.0",
    ),
    "nothing kept": (
        lambda: pp.prune(MODEL, pp.Magnitude(), density=1e-4),
        ValueError,
        "prune: density: wanted one that keeps a weight, got 0.0001 of 400",
    ),
    "no walk": (
        lambda: pp.prune(MODEL, pp.PHEW(), density=1e-4, example_input=X),
        ValueError,
        "prune: density: wanted one that keeps a weight, got 0.0001 of 400",
    ),
    "density in words": (
        lambda: pp.prune(MODEL, pp.Magnitude(), density="0.5"),
        TypeError,
        "prune: density: wanted a number or a list of numbers, got '0.5'",
    ),
    "density of truth": (
        lambda: pp.prune(MODEL, pp.Magnitude(), sparsity=[True]),
        TypeError,
        r"prune: sparsity: wanted a number or a list of numbers, got \[True\]",
    ),
    "allocation of all": (
        lambda: prune(allocation="erdos_renyi_kernel"),
        ValueError,
        "prune: allocation: wanted scope='layer' or 'row' with it, got scope='global'",
    ),
    "twice compact": (lambda: prune(compact=2.0), ValueError, r"prune: compact: .* a fraction in \[0, 1\], got 2.0"),
    "regrowth in words": (lambda: prune(allow_regrowth="no"), TypeError, "allow_regrowth: wanted True, False or None"),
    "no savepoints": (lambda: prune(savepoints="a"), TypeError, "prune: savepoints: wanted Savepoints, got str"),
    # pruners
    "a loss by name": (lambda: pp.SNIP([BATCH], loss="mse"), TypeError, "SNIP: loss: wanted a function of .*got 'mse'"),
    "no policy": (lambda: pp.SynFlow(policy=3), TypeError, "policy: wanted one of .* or a Policy, got 3"),
    "no mean": (lambda: pp.SynFlowDist("a"), TypeError, "mean: wanted a tensor or batches, got str"),
    "a mean of words": (
        lambda: pp.SynFlowDist([{"x": X}]),
        TypeError,
        r"mean: wanted batches x or \(x, y\), x a tensor \[n, \*sample\], got dict",
    ),
    "walks scored": (
        lambda: pp.scores(MODEL, pp.PHEW(), example_input=X),
        TypeError,
        "scores: method: wanted a pruner that scores weights, got PHEW",
    ),
    # masks
    "masks of a number": (lambda: pp.Masks(3), TypeError, "Masks: masks: wanted a mapping"),
    "masks by number": (lambda: pp.Masks({3: torch.ones(2).bool()}), TypeError, "Masks: masks: wanted a mapping"),
    "no soup": (lambda: pp.Masks.soup([]), ValueError, "Masks.soup: masks: wanted at least one, got none"),
    "shuffled by name": (lambda: MASKS.shuffle("a"), TypeError, "Masks.shuffle: seed: wanted an int .*got 'a'"),
    "applied to a name": (lambda: MASKS.apply_("a"), TypeError, "masks: model: wanted a torch.nn.Module, got str"),
    "applied to lazy weights": (lambda: MASKS.apply_(lazy()), ValueError, "masks: model: wanted weights with a shape"),
    "no optimizer": (lambda: MASKS.maintain(MODEL, None), TypeError, "maintain: optimizer: wanted a torch optimizer"),
    "counted by name": (lambda: pp.path_counts(MODEL, "a", X), TypeError, "path_counts: masks: wanted Masks, got str"),
    "rescaled by none": (
        lambda: pp.rescale_(MODEL, None, example_input=X),
        TypeError,
        "rescale_: masks: wanted Masks, got NoneType",
    ),
    # sparse layers
    "sparse name": (lambda: pp.sparsify("a", MASKS), TypeError, "sparsify: model: wanted a torch.nn.Module, got str"),
    "no rows": (lambda: pp.sparsify(MODEL, MASKS, batch=0), ValueError, "sparsify: batch: wanted .* rows >= 1, got 0"),
    "dense name": (lambda: pp.densify("a"), TypeError, "densify: model: wanted a torch.nn.Module, got str"),
    # selection, paths, starting weights
    "half a weight": (
        lambda: pp.select_threshold([X], 1.5),
        TypeError,
        "select_threshold: keep: wanted an int, got 1.5",
    ),
    "too many": (lambda: pp.select_threshold([X], 21), ValueError, "keep: wanted at most the 20 live weights, got 21"),
    "one tensor": (lambda: pp.select_threshold(X, 1), TypeError, "scores: wanted a list of tensors, got Tensor"),
    "no values": (lambda: pp.select_threshold([X.to("meta")], 1), ValueError, r"scores\[0\]: .*on the meta device"),
    "no threshold": (
        lambda: pp.keep_masks(0.5, [X]),
        TypeError,
        "keep_masks: threshold: wanted a Threshold, got float",
    ),
    "paths of a module": (
        lambda: pp.sample_paths(MODEL, 3),
        TypeError,
        "network: wanted a PathNetwork, got Sequential",
    ),
    "half a path": (lambda: pp.sample_paths(NETWORK, 1.5), TypeError, "sample_paths: n: wanted an int, got 1.5"),
    "a named seed": (lambda: pp.sample_paths(NETWORK, 1, seed="a"), TypeError, "seed: wanted an int, got 'a'"),
    "drawn for a name": (lambda: pp.edge_of_chaos_init_("a", "tanh"), TypeError, "model: wanted a torch.nn.Module"),
    "drawn by name": (lambda: pp.reinit(MODEL, seed="a"), TypeError, "reinit: seed: wanted an int, got 'a'"),
    # networks by hand
    "no such node": (by_hand(lambda n, k: n.set_outputs(7)), ValueError, "wanted the index of a node, 0 to 0, got 7"),
    "other columns": (
        by_hand(lambda n, k: n.add_synapse(k, torch.ones(3, 5), "a")),
        ValueError,
        r"add_synapse: weight: wanted one that a linear takes with a flow of shape \(4,\), got \(3, 5\)",
    ),
    "no such form": (
        by_hand(lambda n, k: n.add_synapse(k, torch.ones(3, 4), "a", form="lines")),
        ValueError,
        "add_synapse: form: wanted one of .*, got 'lines'",
    ),
    "sum of nothing": (by_hand(lambda n, k: n.add_sum()), ValueError, "add_sum: flows: wanted at least one, got none"),
    "no such axis": (
        by_hand(lambda n, k: n.add_cat(k, k, dim=7)),
        ValueError,
        "add_cat: dim: wanted an axis of 1, got 7",
    ),
    "a name taken": (taken_twice, ValueError, "add_synapse: name: wanted one that no other weight has, got 'a'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_says_what_was_wanted(case: str) -> None:
    call, kind, message = WRONG[case]
    before, random = copy.deepcopy(MODEL.state_dict()), torch.get_rng_state()
    with torch.random.fork_rng(), pytest.raises(kind, match=message):
        call()
    after = MODEL.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert [type(module) for module in MODEL] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(torch.get_rng_state(), random)


class _WithTrees(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 8)

    def forward(self, batch: dict[str, list[Tensor]]) -> Tensor:
        return self.layer(batch["images"][0])


def test_inputs_may_be_trees_of_tensors() -> None:
    model = _WithTrees()
    wanted = pp.prune(model.layer, pp.SynFlow(rounds=2), density=0.3, example_input=X)
    for given in ({"batch": {"images": [torch.ones(3, 20)]}}, ({"images": [torch.ones(3, 20)]},)):
        found = pp.prune(model, pp.SynFlow(rounds=2), density=0.3, example_input=given)
        assert torch.equal(found["layer.weight"], wanted["weight"])


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        print("said by the model", file=sys.stderr)
        return self.layer(x) if x.sum() > 0 else -x


def test_a_failing_export_is_not_logged_as_well(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        pp.UnsupportedModelError, match=r"same reduction dim, but got \[1, 21\] X \[20, 16\]\. The forward"
    ):
        prune(x=torch.ones(1, 21))
    assert capfd.readouterr().err == ""
    with pytest.raises(pp.UnsupportedModelError, match="must not branch on values of tensors"):
        prune(_Branching())
    assert capfd.readouterr().err == "said by the model\n"


def test_a_model_wrapped_for_ranks_is_told_to_be_unwrapped(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(mlp())
        with pytest.raises(pp.UnsupportedModelError, match=r"got DistributedDataParallel: give its \.module"):
            prune(wrapped)
        assert prune(wrapped.module).kept == 120
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------ memory that is shared


def test_weights_that_share_elements_are_not_written() -> None:
    memory = torch.rand(150)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[0].weight, model[1].weight = (nn.Parameter(memory[k : k + 100].view(10, 10)) for k in (0, 50))
    before = memory.clone()
    with pytest.raises(ValueError, match="cannot be written: it shares some of its elements with 0"):
        pruned(model).apply_(model)
    assert torch.equal(memory, before)


def test_weights_between_one_anothers_elements_are_written() -> None:
    memory = torch.rand(10, 20)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[0].weight, model[1].weight = nn.Parameter(memory[:, :10]), nn.Parameter(memory[:, 10:])
    masks = pruned(model)
    masks.apply_(model)
    assert int((memory != 0).sum()) == masks.kept == 60


# ------------------------------------------------------------------------------------------ files


def test_no_device_is_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="no ordinary file"):
        MASKS.save(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(FileExistsError, match="no ordinary file"):
        MASKS.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_is_no_file_of_masks(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="Is a folder, not a file of masks"):
        pp.Masks.load(tmp_path)


# ------------------------------------------------------------------------------------------ sparse models


def sparse() -> nn.Sequential:
    model = mlp()
    return pp.sparsify(model, pruned(model), min_speedup=0.0)


def test_a_sparse_model_is_pickled_and_copied() -> None:
    model = sparse()
    assert isinstance(model[0], pp.SparseLinear)
    y = model(X)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(X), y)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        torch.manual_seed(0)
        model = nn.ModuleDict({"embed": nn.Embedding(7, 20), "body": mlp(), "head": nn.Linear(20, 7, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    path, model, other = tmp_path / "sparse.safetensors", tied(), tied()
    pp.sparsify(model, {"body.0.weight": MASKS["0.weight"]}, min_speedup=0.0)
    with torch.no_grad():
        model["embed"].weight.add_(1)
    pp.save_sparse(model, path)
    pp.load_sparse(other, path)
    assert isinstance(other["body"][0], pp.SparseLinear)
    assert other["head"].weight is other["embed"].weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_a_refused_mask_leaves_every_layer_dense() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    wrong = {"0.weight": MASKS["0.weight"], "0.bias": torch.zeros(16).bool(), "2.weight": torch.ones(3, 3).bool()}
    with pytest.raises(ValueError, match=r"sparsify: masks\['2.weight'\]: wanted a bool tensor of shape \[5, 16\]"):
        pp.sparsify(model, wrong, min_speedup=0.0)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_sparse_already_is_told_so() -> None:
    model = sparse()
    with pytest.raises(ValueError, match=r"masks\['0.weight'\]: wanted a dense layer \(densify first\)"):
        pp.sparsify(model, MASKS)


def test_a_sparse_file_of_another_model_leaves_it_dense(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    pp.save_sparse(sparse(), path)
    other = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5, bias=False))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"load_sparse: 2.bias: wanted shape \[\], got float32 \[5\]"):
        pp.load_sparse(other, path)
    assert [type(module) for module in other] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_sparse_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sparse.safetensors"
    model = sparse()
    pp.save_sparse(model, path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        pp.save_sparse(mlp(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
