"""Mixtures of experts: every expert's matrix is a layer, in memory and from files that keep experts apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint_folders import contents, gpt_oss, mixtral, qwen_moe, rewrite, save, tensors
from file_pages import mapped_at_reads
from pathprune import (
    PHEW,
    Checkpoint,
    CheckpointError,
    Magnitude,
    SynFlow,
    SynFlowL2,
    Wanda,
    checkpoint_model,
    checkpoint_pruning,
    layer_network,
    prune,
    prune_checkpoint,
)
from pathprune.checkpoint_model import open_model
from pathprune.expert_inputs import ExpertInputs

pytest.importorskip("transformers")

WORDS = [{"input_ids": torch.arange(9)[None]}, {"input_ids": torch.arange(40, 44)[None]}]
ONE = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}


def words() -> Wanda:
    return Wanda(WORDS, by_blocks=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(mixtral(), tmp_path_factory.mktemp("experts") / "mixtral")


METHODS = {
    "magnitude": (Magnitude, {}),
    "magnitude by rows": (Magnitude, {"scope": "row"}),
    "magnitude by layers": (Magnitude, {"scope": "layer"}),
    "magnitude 2:4": (Magnitude, {"scope": "2:4", "density": None}),
    "synflow": (lambda: SynFlow(rounds=3), {}),
    "synflow-l2": (lambda: SynFlowL2(rounds=3), {}),
    "phew": (PHEW, {"seed": 3}),
    "wanda": (words, {}),
    "wanda 2:4": (words, {"scope": "2:4", "density": None}),
}


QUICK = {(mixtral, "magnitude"), (mixtral, "wanda"), (qwen_moe, "synflow"), (qwen_moe, "wanda")}


@pytest.mark.parametrize(
    ("make", "method"),
    [
        pytest.param(make, method, marks=() if (make, method) in QUICK else pytest.mark.slow)
        for make in (mixtral, qwen_moe)
        for method in METHODS
    ],
)
def test_from_file_to_file_as_in_memory(tmp_path, make, method):
    kind, options = METHODS[method]
    pruner, options = kind(), {"density": 0.3, **options}
    model = make()
    folder = save(model, tmp_path / "model")
    before = contents(folder)
    made = prune_checkpoint(folder, pruner, tmp_path / "out", budget=0, **options)
    loaded = type(model).from_pretrained(folder)
    given = {"example_input": ONE} if pruner.needs_paths else {}
    masks = prune(loaded, pruner, compact=False, **given, **options)
    assert made.masks == masks
    assert made.masks.metadata["base_hash"] == masks.metadata["base_hash"]
    assert sum(count.total for name, count in masks.counts().items() if ".experts." in name) > masks.total // 3
    masks.apply_(loaded, base="raise")
    pruned = type(model).from_pretrained(made.folder)
    assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in loaded.state_dict().items())
    found, dense = tensors(made.folder), tensors(folder)
    assert found.keys() == dense.keys() and not made.unpruned
    assert all(torch.equal(found[name], dense[name]) for name in dense if ".gate.weight" in name)  # the routers
    assert {path.name for path in made.folder.iterdir()} == {*before, "masks.safetensors", "pathprune.json"}
    assert contents(folder) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    folder = save(mixtral().to(dtype), tmp_path / "model")
    made = prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.3)
    loaded = type(mixtral()).from_pretrained(folder)
    assert made.masks == prune(loaded, Magnitude(), density=0.3)
    made.masks.apply_(loaded, base="raise")
    pruned = type(loaded).from_pretrained(made.folder)
    assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("make", [mixtral, qwen_moe])
def test_the_model_is_the_one_transformers_loads(tmp_path, make):
    folder = save(make(), tmp_path / "model")
    work = checkpoint_pruning.RestartableFolder(tmp_path / "out", {})
    checkpoint = Checkpoint(folder, budget=0)
    with work:
        opened = open_model(checkpoint, lambda made: checkpoint_pruning._laid_out(checkpoint, work, made))
        assert not opened.absent and not opened.unclaimed
        loaded = type(make()).from_pretrained(folder)
        own = dict(opened.model.named_parameters())
        for name, value in loaded.named_parameters():
            assert torch.equal(own[name], value), name
            assert torch.equal(opened.tensors[name], value), name
        with torch.no_grad():
            assert torch.equal(opened.model(**WORDS[0]).logits, loaded(**WORDS[0]).logits)


ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "DeepseekV3": {**ROUTED, **LATENT, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "Glm4Moe": {**ROUTED, "head_dim": 8, "num_experts_per_tok": 2},
    "Phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "pad_token_id": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("pruner", [Magnitude(), words()], ids=["magnitude", "wanda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_mixtures(tmp_path, family, pruner):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{family}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **heads, **FAMILIES[family]})
    folder = save(getattr(transformers, f"{family}ForCausalLM")(config).eval(), tmp_path / "model")
    made = prune_checkpoint(folder, pruner, tmp_path / "out", density=0.3, budget=0)
    kind = getattr(transformers, f"{family}ForCausalLM")
    loaded = kind.from_pretrained(folder)
    masks = prune(loaded, pruner, density=0.3)
    assert made.masks == masks and not made.unpruned
    assert any("experts" in name for name in masks)
    masks.apply_(loaded)
    pruned = kind.from_pretrained(made.folder)
    assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert tensors(made.folder).keys() == tensors(folder).keys()


# ----------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize("make", [mixtral, qwen_moe, gpt_oss])
def test_experts_are_layers(make):
    """Magnitude finds the same weights alone and among the paths, routers in neither; rows are output units."""
    model = make()
    names = layer_network(model).prunable
    assert sum(".experts." in name for name in names) == 2 * sum(".experts.down_proj" in name for name in names) > 0
    assert not any(name.endswith((".gate.weight", ".router.weight", "bias")) for name in names)
    alone = prune(model, Magnitude(), density=0.3, scope="row")
    own = dict(model.named_parameters())
    for name in names:
        weight, mask = own[name], alone[name]
        if make is gpt_oss and ".experts." in name:
            weight, mask = weight.mT, mask.mT
        keep = round(0.3 * weight.shape[-1])
        best = weight.abs().argsort(dim=-1, descending=True, stable=True)[..., :keep]
        assert torch.equal(mask, torch.zeros_like(mask).scatter(-1, best, True)), name
    if make is not gpt_oss:
        assert prune(model, Magnitude(), density=0.3, example_input=ONE) == prune(model, Magnitude(), density=0.3)


def entering(model: nn.Module, batches: list) -> dict[str, torch.Tensor]:
    """||x_j|| of every expert, [experts, in], by the definition: from the routing and the rows it was given."""
    sums: dict[str, torch.Tensor] = {}

    def observe(module, inputs, output):
        rows, chosen, _ = inputs
        turned = module.is_transposed
        for expert in range(module.num_experts):
            x = rows[(chosen == expert).any(1)]
            up, down = module.gate_up_proj[expert], module.down_proj[expert]
            made = x @ up + module.gate_up_proj_bias[expert] if turned else F.linear(x, up)
            within = module._apply_gate(made)
            for own, seen, width in (("gate_up_proj", x, len(up)), ("down_proj", within, len(down))):
                name = f"{paths[module]}.{own}"
                total = sums.setdefault(name, torch.zeros(module.num_experts, seen.shape[1], dtype=torch.float64))
                total[expert] += seen.double().square().sum(0)
                assert turned is (width == seen.shape[1]) or len(up[0]) == len(up)

    paths = {module: path for path, module in model.named_modules() if path.endswith(".experts")}
    handles = [module.register_forward_hook(observe) for module in paths]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}


@pytest.mark.parametrize("make", [mixtral, qwen_moe, gpt_oss])
def test_wanda_by_what_is_routed_to_each_expert(make):
    model = make()
    settings = model.config._experts_implementation
    masks = prune(model, Wanda(WORDS), density=0.4)
    assert model.config._experts_implementation == settings
    norms = entering(model, WORDS)
    assert norms and all(name in masks for name in norms)
    for name, norm in norms.items():
        weight, mask = dict(model.named_parameters())[name].double(), masks[name]
        if make is gpt_oss:
            weight, mask = weight.mT, mask.mT
        for expert in range(len(weight)):
            scale = norm[expert] if bool(norm[expert].any()) else torch.ones_like(norm[expert])
            scores = weight[expert].abs() * scale
            kept, gone = mask[expert], ~mask[expert]
            assert kept.sum(1).tolist() == [round(0.4 * weight.shape[2])] * weight.shape[1]
            least = scores.masked_fill(gone, torch.inf).amin(1)
            assert bool((least * (1 + 1e-5) >= scores.masked_fill(kept, -1).amax(1)).all()), (name, expert)


def test_an_expert_without_tokens_is_scored_by_its_weights():
    model = qwen_moe()
    one = [{"input_ids": torch.zeros(1, 1, dtype=torch.int64)}]  # a token goes to two of four experts
    norms = entering(model, one)
    masks = prune(model, Wanda(one), density=0.5)
    magnitudes = prune(model, Magnitude(), density=0.5, scope="row")
    for name, norm in norms.items():
        unseen = ~norm.any(1)
        assert int(unseen.sum()) == 2
        same = (masks[name] == magnitudes[name]).flatten(1).all(1)
        assert torch.equal(same, unseen), name


def test_experts_used_otherwise_are_refused():
    """A product with half of an expert's matrix: what enters is not what its columns see in one product."""
    model = mixtral()
    experts = model.model.layers[0].mlp.experts

    def by_halves(rows, chosen, shares):
        half = experts.intermediate_dim
        gate, up = (F.linear(rows, part) for part in experts.gate_up_proj[0].split(half))
        return F.linear(experts.act_fn(gate) * up, experts.down_proj[0])

    experts.forward = by_halves
    with pytest.raises(ValueError, match=r"Wanda: '.*gate_up_proj': wanted experts' matrices \[96, 32\] used whole"):
        prune(model, Wanda(WORDS), density=0.5)
    experts.forward = lambda rows, chosen, shares: rows
    with pytest.raises(ValueError, match=r"Wanda: data: '.*experts.gate_up_proj' was not run by any batch"):
        prune(model, Wanda(WORDS), density=0.5)


def test_products_by_any_name_are_seen():
    """Positional or named, by linear or matmul, of a matrix or its transpose; others are let through."""
    parameter, x, other = torch.randn(3, 4, 5), torch.randn(2, 5), torch.randn(5, 4)
    seen = []
    with ExpertInputs({"w": parameter}, lambda name, expert, rows: seen.append((name, expert, rows)), "Wanda"):
        F.linear(x, parameter[0])
        F.linear(input=x, weight=parameter[1])
        torch.matmul(x, parameter[2].T)
        torch.matmul(x, other=parameter[2].mT)
        torch.mm(x, parameter[1].T)
        x @ parameter[0].T
        x @ other
        x.matmul(other.to_sparse())
    assert [(name, expert) for name, expert, _ in seen] == [("w", k) for k in (0, 1, 2, 2, 1, 0)]
    assert all(torch.equal(rows, x) for _, _, rows in seen)
    with pytest.raises(ValueError, match=r"Wanda: 'w': wanted experts in memory, got them offloaded; exclude it"):
        ExpertInputs({"w": parameter.to("meta")}, lambda *arguments: None, "Wanda")


# ------------------------------------------------------------------------------------------------- refusals


def test_an_expert_that_is_missing(tmp_path):
    folder = save(mixtral(), tmp_path / "mixtral")
    values = tensors(folder)
    del values["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    rewrite(folder, values)
    before = contents(folder)
    message = r"down_proj: the model wants \[2, 32, 48\], the files' tensors make up \[1, 32, 48\]"
    with pytest.raises(CheckpointError, match=message):
        prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.5)
    values["model.layers.0.block_sparse_moe.experts.1.w2.weight"] = torch.ones(32, 47)
    rewrite(folder, values)
    with pytest.raises(CheckpointError, match=r"the files' tensors do not make it up: wanted tensors of one shape"):
        prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixtral"]
    assert contents(folder).keys() <= {*before, "model.safetensors"}


def test_what_has_no_way_back_is_copied_and_said(tmp_path, monkeypatch):
    folder = save(mixtral(), tmp_path / "mixtral")

    def none(*arguments):
        raise checkpoint_model.NoWayBackError

    monkeypatch.setattr(checkpoint_model, "converted", none)
    made = prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.5)
    assert len(made.unpruned) == 6 and all(".experts." in name for name in made.unpruned)
    before, after = tensors(folder), tensors(made.folder)
    assert all(torch.equal(before[name], after[name]) for name in made.unpruned)
    assert "the model has no such parameter or converts them" in made.notes()[0]
    assert not any("experts" in name for name in made.masks)
    for pruner in (SynFlow(), words()):
        with pytest.raises(CheckpointError, match=r"converts .* no way back, for model.layers.0.mlp.experts.*gate_up"):
            prune_checkpoint(folder, pruner, tmp_path / "other", density=0.5)
    assert not (tmp_path / ".other.partial").exists()


def test_experts_of_two_dtypes_are_copied_and_said(tmp_path):
    folder = save(mixtral(), tmp_path / "mixtral")
    values = tensors(folder)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    rewrite(folder, {**values, name: values[name].bfloat16()})
    made = prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.5)
    assert len(made.unpruned) == 2 and all(".w2." in name for name in made.unpruned)
    assert [name for name in made.masks if "experts" in name] == ["model.layers.0.mlp.experts.gate_up_proj"]


def test_mistakes_leave_nothing(whole, tmp_path):
    for options in ({}, {"density": 2.0}, {"density": 0.5, "exclude": "nothing"}, {"density": 0.5, "scope": "3"}):
        with pytest.raises(ValueError, match=r"density|matches none of|scope"):
            prune_checkpoint(whole, Magnitude(), tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_what_is_laid_out(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_pruning, "size_of", lambda *arguments: 1 << 60)
    with pytest.raises(OSError, match=r"wanted 1,152,921,504,606,84\d,\d\d\d bytes of free space"):
        prune_checkpoint(whole, Magnitude(), tmp_path / "out", density=0.5)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- memory


def test_what_is_laid_out_is_gone_when_shards_are_written(whole, tmp_path, monkeypatch):
    """Neither in the folder nor mapped: its room on the disk is free."""
    maps = Path("/proc/self/maps")
    seen: list[bool] = []
    write = checkpoint_pruning._write_shards

    def watched(opened, masks, work, progress):
        seen.append((work.partial / checkpoint_pruning.ASSEMBLED).exists())
        seen.append(maps.exists() and checkpoint_pruning.ASSEMBLED in maps.read_text())
        write(opened, masks, work, progress)

    monkeypatch.setattr(checkpoint_pruning, "_write_shards", watched)
    prune_checkpoint(whole, SynFlow(rounds=2), tmp_path / "out", density=0.5)
    assert seen == [False, False]


@pytest.mark.parametrize(
    "method", ["magnitude", *(pytest.param(m, marks=pytest.mark.slow) for m in ("synflow", "wanda"))]
)
def test_mapped_memory_is_bounded(tmp_path, monkeypatch, method):
    """Whenever a weight has been read, no more file pages are mapped than the budget and that weight."""
    torch.manual_seed(0)
    config = mixtral().config
    config.hidden_size, config.intermediate_size, config.head_dim, config.num_hidden_layers = 256, 512, 64, 8
    config.num_local_experts, config.num_experts_per_tok = 4, 2
    folder = save(type(mixtral())(config), tmp_path / "model", shard="8MB")  # 60 MB, the largest parameter 4 MB
    pruner = {"magnitude": Magnitude(), "synflow": SynFlow(rounds=2), "wanda": words()}[method]
    prune_checkpoint(folder, pruner, tmp_path / "warm", density=0.5)  # loads what code it needs
    options = {"density": 0.5, "budget": 4 << 20}
    seen = mapped_at_reads(monkeypatch, lambda: prune_checkpoint(folder, pruner, tmp_path / "out", **options))
    assert len(seen) > 50
    assert max(seen) < 16 << 20
