"""Experts that no mark declares: found by what their module's code multiplies by, and what is left whole is said."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint_folders import contents, llama, llama4, mixtral, save, tensors
from pathprune import Magnitude, Wanda, layer_network, prune, prune_checkpoint
from pathprune.expert_inputs import ExpertInputs
from pathprune.layers import expert_matrices

WORDS = [{"input_ids": torch.arange(9)[None]}, {"input_ids": torch.arange(40, 44)[None]}]
EXPERTS, IN, OUT = 3, 5, 4


class Experts(nn.Module):
    """One parameter, multiplied by as ``way`` says."""

    def __init__(self, shape: tuple[int, int, int], way) -> None:
        super().__init__()
        self.w, self.way = nn.Parameter(torch.randn(shape)), way
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list = []

    def forward(self, x):
        self.calls.add_(1)
        self.seen.append(x)
        self.last = x
        return self.way(x, self.w)


def by_turns(function):
    """The experts one after the other, each over its own rows."""
    return lambda x, w: torch.cat([function(x[k], w[k]) for k in range(EXPERTS)])


TRANSPOSED = {  # [experts, in, out]
    "bmm": lambda x, w: torch.bmm(x.view(w.shape[0], -1, IN), w),
    "a method": lambda x, w: x.bmm(w),
    "matmul": lambda x, w: torch.matmul(x, w),
    "an operator": lambda x, w: x @ w,
    "matmul, one by one": by_turns(torch.matmul),
    "linear of a transpose": by_turns(lambda x, w: F.linear(x, w.t())),
    "linear of mT": by_turns(lambda x, w: F.linear(x, w.mT)),
}
STRAIGHT = {  # [experts, out, in]
    "bmm of a transpose": lambda x, w: torch.bmm(x, w.transpose(1, 2)),
    "bmm of a transpose from the end": lambda x, w: torch.bmm(x, torch.transpose(w, -1, -2)),
    "matmul of mT": lambda x, w: x @ w.mT,
    "linear, one by one": by_turns(F.linear),
    "matmul of T": by_turns(lambda x, w: x @ w.T),
}
NEITHER = {
    "added": lambda x, w: x + w,
    "the first factor": lambda x, w: torch.bmm(w, x.mT),
    "both ways": lambda x, w: torch.bmm(x, w) + torch.bmm(x, w.mT),
    "experts turned into inputs": lambda x, w: torch.bmm(x, w.transpose(0, 1)),
    "depends on values": lambda x, w: torch.bmm(x, w) if x.sum() > 0 else x,
    "fails": lambda x, w: x.nothing_of_that_name[0] @ {}[w],
}


def module_of(case: str) -> tuple[Experts, dict[str, bool]]:
    if case in TRANSPOSED:
        return Experts((EXPERTS, IN, OUT), TRANSPOSED[case]), {"w": True}
    if case in STRAIGHT:
        return Experts((EXPERTS, OUT, IN), STRAIGHT[case]), {"w": False}
    return Experts((EXPERTS, IN, IN), NEITHER[case]), {}


@pytest.mark.parametrize("case", [*TRANSPOSED, *STRAIGHT, *NEITHER])
def test_products_are_read_from_the_code(case):
    """On the meta device too; and nothing that the code writes reaches the module."""
    module, wanted = module_of(case)
    state, before = torch.get_rng_state(), dict(vars(module))
    assert expert_matrices(module) == wanted
    assert not module.seen and float(module.calls) == 0 and vars(module) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert expert_matrices(copy.deepcopy(module).to("meta")) == wanted


def test_weights_that_are_offloaded_are_not_copied():
    """Accelerate's hook holds all weights of the model, also those in memory."""
    accelerate = pytest.importorskip("accelerate")
    module, _ = module_of("bmm")
    model = nn.Sequential(module, nn.Linear(OUT, 2))

    class Kept(dict):
        def __deepcopy__(self, memo):
            pytest.fail("the weights were copied")

    kept = Kept({name: tensor.clone() for name, tensor in model.state_dict().items()})
    accelerate.cpu_offload(model, state_dict=kept)
    assert module.w.is_meta and expert_matrices(module) == {"w": True}


@pytest.mark.parametrize("case", [*TRANSPOSED, *STRAIGHT])
def test_they_are_pruned_as_linear_layers_are(case):
    """By rows and n:m, an expert's mask is that of a linear layer with its matrix."""
    module, turned = module_of(case)
    weight = module.w.detach().mT if turned["w"] else module.w.detach()  # [experts, out, in]
    layers = nn.ModuleList(nn.Linear(IN, OUT, bias=False) for _ in range(EXPERTS))
    for layer, own in zip(layers, weight, strict=True):
        layer.weight = nn.Parameter(own.contiguous())
    for options in ({"density": 0.4, "scope": "row"}, {"density": 0.3}):
        found, wanted = prune(module, Magnitude(), **options)["w"], prune(layers, Magnitude(), **options)
        together = torch.stack([wanted[f"{k}.weight"] for k in range(EXPERTS)])
        assert torch.equal(found.mT if turned["w"] else found, together)
    x = [torch.randn(EXPERTS, 7, IN), torch.randn(EXPERTS, 2, IN)]
    masks = prune(module, Wanda(x), density=0.4)["w"]
    for k, layer in enumerate(layers):
        own = prune(layer, Wanda([part[k] for part in x]), density=0.4)["weight"]
        assert torch.equal(masks[k].mT if turned["w"] else masks[k], own)


def test_one_input_for_all_experts_enters_each_of_them():
    seen: dict[int, list[Tensor]] = {}
    parameter, x = torch.randn(EXPERTS, IN, OUT), torch.randn(6, IN)
    with ExpertInputs({"w": parameter}, lambda name, k, rows: seen.setdefault(k, []).append(rows), "Wanda"):
        x @ parameter
        x.reshape(2, 1, 3, IN) @ parameter
        torch.bmm(x.expand(EXPERTS, 6, IN), mat2=parameter)
    assert sorted(seen) == [0, 1, 2]
    assert all(torch.equal(rows, x) for some in seen.values() for rows in some) and len(seen[0]) == 3
    with (
        pytest.raises(ValueError, match=r"matrices \[5, 4\] used whole, got a product with \[3, 5, 2\] of one"),
        ExpertInputs({"w": parameter}, lambda *arguments: None, "Wanda"),
    ):
        x @ parameter[..., :2]


# -------------------------------------------------------------------------------------------------- a real one


def test_llama4s_experts_are_layers():
    pytest.importorskip("transformers")
    model = llama4()
    names = [name for name in layer_network(model).prunable if ".experts." in name]
    assert len(names) == 4
    masks = prune(model, Magnitude(), density=0.3, scope="row")
    for name in names:
        weight = model.get_parameter(name).detach().mT
        best = weight.abs().argsort(dim=-1, descending=True, stable=True)[..., : round(0.3 * weight.shape[-1])]
        wanted = torch.zeros(weight.shape, dtype=torch.bool).scatter(-1, best, True)
        assert torch.equal(masks[name].mT, wanted), name


def test_wanda_of_llama4_by_what_is_routed_to_each_expert():
    """All experts are given all tokens, times 0 where they are not chosen: those count for nothing."""
    pytest.importorskip("transformers")
    model = llama4()
    sums: dict[str, Tensor] = {}
    reached = set()

    def observe(path):
        def hook(module, inputs):
            x = inputs[0].view(module.num_experts, -1, module.hidden_size).double()
            gate, up = (x @ module.gate_up_proj.double()).chunk(2, -1)
            for own, entering in (("gate_up_proj", x), ("down_proj", up * F.silu(gate))):
                name = f"{path}.{own}"
                sums[name] = sums.get(name, 0) + entering.square().sum(1)
                reached.update((name, k) for k in range(module.num_experts) if bool(x[k].any()))

        return hook

    for path, module in model.named_modules():
        if path.endswith(".experts"):
            module.register_forward_pre_hook(observe(path))
    masks = prune(model, Wanda(WORDS), density=0.25)
    assert 8 <= len(reached) < 16  # some experts are chosen by no token
    for name, squares in sums.items():
        weight = model.get_parameter(name).detach().double().mT
        for k, (own, norms) in enumerate(zip(weight, squares.sqrt(), strict=True)):
            scores = own.abs() * (norms if (name, k) in reached else torch.ones_like(norms))
            kept, keep = masks[name][k].mT, round(0.25 * own.shape[1])
            assert kept.sum(1).tolist() == [keep] * len(own)
            least = scores.masked_fill(~kept, torch.inf).amin(1)
            assert bool((least * (1 + 1e-5) >= scores.masked_fill(kept, -1).amax(1)).all()), (name, k)


@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(WORDS, by_blocks=True)], ids=lambda p: p.name)
def test_llama4_from_file_to_file_as_in_memory(tmp_path, pruner):
    pytest.importorskip("transformers")
    folder = save(llama4(), tmp_path / "model")
    before = contents(folder)
    made = prune_checkpoint(folder, pruner, tmp_path / "out", density=0.3, budget=0)
    loaded = type(llama4()).from_pretrained(folder)
    assert made.masks == prune(loaded, pruner, density=0.3) and not made.unpruned
    made.masks.apply_(loaded, base="raise")
    pruned = type(loaded).from_pretrained(made.folder)
    assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert all(int((tensors(made.folder)[name] == 0).sum()) for name in tensors(folder) if ".experts." in name)
    assert contents(folder) == before


# ------------------------------------------------------------------------------------------- what is left whole


def test_what_is_left_whole_is_said_by_name_and_share():
    """Experts whose code cannot be read, beside a layer that is pruned."""
    model = nn.Sequential(nn.Linear(40, 30), Experts((4, 30, 30), NEITHER["depends on values"]))
    masks = prune(model, Magnitude(), density=0.5)
    assert list(masks) == ["0.weight"]
    total = 40 * 30 + 30 + 4 * 30 * 30
    found = masks.metadata["findings"]["left_whole"]
    assert found == {"share": 3600 / total, "largest": {"1.w": 3600 / total}}
    assert f"left whole: {100 * 3600 / total:.4g} % of the model's parameters ('1.w' " in str(masks.report())
    everything = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30))
    assert "left_whole" not in prune(everything, Magnitude(), density=0.5).metadata["findings"]


def test_the_largest_of_many_are_named():
    pytest.importorskip("transformers")
    model = llama(vocabulary=200)
    masks = prune(model, Magnitude(), density=0.5, exclude="*_proj.weight")
    assert list(masks) == ["lm_head.weight"]
    found = masks.metadata["findings"]["left_whole"]
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1 and name not in masks}
    total = sum(p.numel() for p in model.parameters())
    assert found["share"] == sum(sizes.values()) / total
    assert next(iter(found["largest"])) == "model.embed_tokens.weight" and len(found["largest"]) == 4
    assert all(share == sizes[name] / total for name, share in found["largest"].items())
    assert min(sizes[name] for name in found["largest"]) >= sorted(sizes.values())[-4]


def test_small_parts_are_not_worth_a_line():
    pytest.importorskip("transformers")
    masks = prune(mixtral(), Magnitude(), density=0.5, exclude="lm_head.weight")
    assert "left whole: " in str(masks.report()) and "embed_tokens" in str(masks.report())
    model = nn.Sequential(nn.Linear(300, 300), nn.PReLU())
    model.register_parameter("place", nn.Parameter(torch.zeros(1, 300)))
    masks = prune(model, Magnitude(), density=0.5)
    assert masks.metadata["findings"]["left_whole"]["share"] < 0.01 and "left whole" not in str(masks.report())
