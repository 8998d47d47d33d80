"""From file to file: the same masks and weights as in memory, bit for bit, in a folder that transformers loads."""

from __future__ import annotations

import json
import logging
import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_folders import contents, convnext, dinov2, gpt2, llama, resnet, rewrite, save, tensors
from file_pages import mapped_at_reads
from pathprune import (
    PHEW,
    SNIP,
    CheckpointError,
    Magnitude,
    Masks,
    SynFlow,
    SynFlowL2,
    Wanda,
    allocate,
    layer_network,
    prune,
    prune_checkpoint,
)
from pathprune.checkpoint import verify

pytest.importorskip("transformers")

IMAGE = torch.ones(1, 3, 32, 32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(llama(), tmp_path_factory.mktemp("checkpoint") / "llama")


def assert_same_as_in_memory(model, folder, made, masks: Masks) -> None:
    """Masks, their base, and every tensor of the files are those of ``masks`` applied in memory."""
    assert made.masks == masks
    assert made.masks.metadata["base_hash"] == masks.metadata["base_hash"]
    loaded = type(model).from_pretrained(folder)
    masks.apply_(loaded, base="raise")
    pruned = type(model).from_pretrained(made.folder)
    assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert tensors(made.folder).keys() == tensors(folder).keys()


PATHS = {
    "synflow": (resnet, SynFlow(rounds=4)),
    "synflow-l2": (resnet, SynFlowL2(rounds=4)),
    "phew": (resnet, PHEW()),
    "magnitude": (resnet, Magnitude()),
    "convnext": (convnext, SynFlow(rounds=3)),
}


@pytest.mark.parametrize("case", PATHS)
def test_methods_on_an_image_model(tmp_path, case):
    make, pruner = PATHS[case]
    model = make()
    folder = save(model, tmp_path / "model")
    before = contents(folder)
    made = prune_checkpoint(folder, pruner, tmp_path / "out", density=0.2, input_shape="1,3,32,32", seed=3, budget=4096)
    loaded = type(model).from_pretrained(folder)
    masks = prune(loaded, pruner, density=0.2, example_input=IMAGE, seed=3, compact=False)
    assert_same_as_in_memory(model, folder, made, masks)
    assert contents(folder) == before


def test_tensors_that_are_split_on_loading(tmp_path):
    model = dinov2()
    folder = save(model, tmp_path / "model")
    made = prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.3)
    masks = prune(layer_network(type(model).from_pretrained(folder)), Magnitude(), density=0.3)
    assert_same_as_in_memory(model, folder, made, masks)
    assert not made.unpruned
    whole, halves = [name for name in tensors(folder) if name.endswith("weights_in.weight")], ("gate_proj", "up_proj")
    assert len(whole) == 2 and sum(name.endswith(f"mlp.{half}.weight") for name in masks for half in halves) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_magnitude_on_language_models(tmp_path, make, dtype):
    model = make().to(dtype)
    folder = save(model, tmp_path / "model")
    made = prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.3, budget=0)
    masks = prune(layer_network(type(model).from_pretrained(folder)), Magnitude(), density=0.3)
    assert_same_as_in_memory(model, folder, made, masks)
    assert made.masks.kept == round(0.3 * made.masks.total)


WORDS = [{"input_ids": torch.arange(9)[None]}, {"input_ids": torch.arange(4)[None]}]
TEXT = {
    "synflow": (llama, SynFlow(rounds=3)),
    "synflow-l2": (gpt2, SynFlowL2(rounds=3)),
    "wanda": (
        llama,
        Wanda([{"input_ids": torch.arange(9)[None]}, {"input_ids": torch.arange(4)[None]}], by_blocks=True),
    ),
    "wanda, Conv1D": (gpt2, Wanda([{"input_ids": torch.arange(9)[None]}], by_blocks=True)),
}


@pytest.mark.parametrize("case", TEXT)
def test_methods_on_language_models(tmp_path, case):
    make, pruner = TEXT[case]
    model = make()
    folder = save(model, tmp_path / "model")
    made = prune_checkpoint(folder, pruner, tmp_path / "out", density=0.3, budget=0)
    loaded = type(model).from_pretrained(folder)
    given = {"example_input": {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}} if pruner.needs_paths else {}
    assert_same_as_in_memory(model, folder, made, prune(loaded, pruner, density=0.3, compact=False, **given))


def test_wanda_on_mixed_dtypes(tmp_path):
    """As of the model that transformers makes of them: one dtype, that of most weights."""
    folder = save(llama().bfloat16(), tmp_path / "model")
    values = tensors(folder)
    rewrite(folder, {name: value.float() if "norm" in name else value for name, value in values.items()})
    made = prune_checkpoint(folder, Wanda(WORDS, by_blocks=True), tmp_path / "out", density=0.3)
    assert made.masks == prune(llama().bfloat16(), Wanda(WORDS), density=0.3)


def test_other_data_do_not_go_on(whole, tmp_path):
    data = [{"input_ids": torch.arange(9)[None]}]
    prune_checkpoint(whole, Wanda(data), tmp_path / "out", density=0.5)
    prune_checkpoint(whole, Wanda([{"input_ids": torch.arange(9)[None]}]), tmp_path / "out", density=0.5)
    with pytest.raises(CheckpointError, match="holds a checkpoint pruned otherwise: data was"):
        prune_checkpoint(whole, Wanda([{"input_ids": torch.arange(8)[None]}]), tmp_path / "out", density=0.5)


def test_methods_that_hold_gradients_are_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="wanted Magnitude, Wanda, PHEW or a path method, got SNIP"):
        prune_checkpoint(whole, SNIP([torch.ones(1)]), tmp_path / "out", density=0.5)


def test_layer_densities(whole, tmp_path):
    """Path scores say how much a layer keeps, magnitude which weights of a row."""
    loaded = type(llama()).from_pretrained(whole)
    densities = allocate(loaded, 0.4, by=SynFlow(rounds=2), example_input={"input_ids": torch.zeros(1, 1).long()})
    options = {"density": 0.4, "scope": "row", "allocation": densities}
    made = prune_checkpoint(whole, Magnitude(), tmp_path / "out", **options)
    assert_same_as_in_memory(loaded, whole, made, prune(loaded, Magnitude(), **options))
    assert len({round(count.kept / count.total, 2) for count in made.masks.counts().values()}) > 2


@pytest.mark.parametrize("method", ["magnitude", "magnitude by rows", "synflow", "wanda"])
def test_mapped_memory_is_bounded(tmp_path, monkeypatch, method):
    """Whenever a weight has been read, no more file pages are mapped than the budget and that weight."""
    torch.manual_seed(0)
    config = llama().config
    config.hidden_size, config.intermediate_size, config.head_dim = 512, 2048, 128
    folder = save(type(llama())(config), tmp_path / "model", shard="8MB")  # 32 MB of weights, the largest 4 MB
    pruner, scope = {
        "magnitude": (Magnitude(), "global"),
        "magnitude by rows": (Magnitude(), "row"),
        "synflow": (SynFlow(rounds=3), "global"),
        "wanda": (Wanda(WORDS, by_blocks=True), "row"),
    }[method]
    prune_checkpoint(folder, pruner, tmp_path / "warm", density=0.5, scope=scope)  # loads what code it needs
    options = {"density": 0.5, "scope": scope, "budget": 4 << 20}
    seen = mapped_at_reads(monkeypatch, lambda: prune_checkpoint(folder, pruner, tmp_path / "out", **options))
    assert len(seen) > 50
    assert max(seen) < 12 << 20


@pytest.mark.parametrize("options", [{"scope": "row"}, {"scope": "2:4"}, {"scope": "layer"}, {"exclude": "*.mlp.*"}])
def test_scopes_and_exclusions(whole, tmp_path, options):
    density = {} if options.get("scope") == "2:4" else {"density": 0.5}
    made = prune_checkpoint(whole, Magnitude(), tmp_path / "out", **density, **options)
    loaded = type(llama()).from_pretrained(whole)
    assert_same_as_in_memory(loaded, whole, made, prune(layer_network(loaded), Magnitude(), **density, **options))


def test_it_loads_without_a_warning_and_generates(whole, tmp_path, caplog):
    out = prune_checkpoint(whole, Magnitude(), tmp_path / "out", density=0.5).folder
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        pruned = AutoModelForCausalLM.from_pretrained(out)
    assert not caplog.records
    zeros = sum(int((value == 0).sum()) for value in tensors(out).values())
    assert zeros >= Masks.load(out / "masks.safetensors").total // 2
    with torch.no_grad():
        assert pruned.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_a_tied_head_stays_whole(tmp_path):
    folder = save(llama(tied=True), tmp_path / "tied")
    made = prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.1)
    name = "model.embed_tokens.weight"
    assert name not in made.masks
    assert torch.equal(tensors(made.folder)[name], tensors(folder)[name])


def test_what_the_model_does_not_have_is_copied_and_said(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "llama")
    rewrite(folder, {**tensors(whole), "extra.weight": torch.ones(4, 4)})
    made = prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.5)
    assert made.unpruned == ("extra.weight",)
    assert bool(tensors(made.folder)["extra.weight"].all())
    assert "the model has no such parameter" in made.notes()[0]


def test_other_files_go_along_and_other_weights_do_not(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "llama")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "code").mkdir()
    (folder / "code" / "notes.md").write_text("notes")
    (folder / "pytorch_model.bin").write_bytes(b"dense")
    (folder / "consolidated.safetensors").write_bytes(b"dense")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "etag").write_text("x")
    (folder / "linked.txt").symlink_to(folder / "tokenizer.json")
    made = prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.5)
    found = contents(made.folder)
    assert found["tokenizer.json"] == found["linked.txt"] == b"{}"
    assert found["code/notes.md"] == b"notes"
    assert not {"pytorch_model.bin", "consolidated.safetensors", ".cache/etag"} & found.keys()
    assert made.left_out == ("consolidated.safetensors", "pytorch_model.bin")
    assert "left out" in made.notes()[-1]
    verify(made.folder)


def test_a_pruned_checkpoint_can_be_pruned_again(whole, tmp_path):
    first = prune_checkpoint(whole, Magnitude(), tmp_path / "first", density=0.5)
    second = prune_checkpoint(first.folder, Magnitude(), tmp_path / "second", density=0.25)
    assert (second.masks & first.masks) == second.masks
    shard = sorted(first.folder.glob("model-*"))[0]
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=f"{shard.name}: altered or damaged: the checksum is not that"):
        prune_checkpoint(first.folder, Magnitude(), tmp_path / "third", density=0.25)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(whole, tmp_path, value):
    folder = shutil.copytree(whole, tmp_path / "llama")
    values = tensors(folder)
    values["lm_head.weight"][3, 4] = value
    rewrite(folder, values)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"'lm_head.weight': wanted finite values, got NaN or infinite ones"):
        prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.5)
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


# ------------------------------------------------------------------------------------------- where it may go


def test_the_output_is_apart_from_the_input(whole):
    before = contents(whole)
    for out in (whole, whole / "inside", whole.parent):
        with pytest.raises(CheckpointError, match="out: wanted a folder apart from"):
            prune_checkpoint(whole, Magnitude(), out, density=0.5)
    assert contents(whole) == before


def test_an_output_that_is_not_ours(whole, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("do not touch")
    with pytest.raises(CheckpointError, match="is not empty, and not a pruned checkpoint"):
        prune_checkpoint(whole, Magnitude(), tmp_path / "out", density=0.5)
    with pytest.raises(CheckpointError, match="wanted a folder, got the file"):
        prune_checkpoint(whole, Magnitude(), tmp_path / "out" / "thesis.tex", density=0.5)
    assert contents(tmp_path) == {"out/thesis.tex": b"do not touch"}


def test_an_output_that_is_finished(whole, tmp_path):
    first = prune_checkpoint(whole, Magnitude(), tmp_path / "out", density=0.5)
    before = contents(first.folder)
    again = prune_checkpoint(whole, Magnitude(), tmp_path / "out", density=0.5)
    assert again == first and contents(first.folder) == before
    with pytest.raises(CheckpointError, match=r"holds a checkpoint pruned otherwise: density was 0.5, now 0.4"):
        prune_checkpoint(whole, Magnitude(), tmp_path / "out", density=0.4)
    assert contents(first.folder) == before


def test_an_empty_folder_is_filled(whole, tmp_path):
    (tmp_path / "out").mkdir()
    prune_checkpoint(whole, Magnitude(), tmp_path / "out", density=0.5)
    verify(tmp_path / "out")


def test_mistakes_leave_nothing(whole, tmp_path):
    with pytest.raises(ValueError, match="wanted exactly one of density"):
        prune_checkpoint(whole, Magnitude(), tmp_path / "out")
    with pytest.raises(ValueError, match="matches none of"):
        prune_checkpoint(whole, Magnitude(), tmp_path / "out", density=0.5, exclude="nothing")
    assert list(tmp_path.iterdir()) == []


def test_the_command(whole, tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from pathprune import cli

    def run(*arguments: object):
        return CliRunner().invoke(cli.app, ["prune-checkpoint", *map(str, arguments)])

    result = run(whole, "--density", 0.5, "--exclude", "*.mlp.*", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "self_attn.q_proj" in result.stdout and "Wrote" in result.stdout
    marker = json.loads((tmp_path / "out" / "pathprune.json").read_text())
    assert marker["arguments"]["exclude"] == ["*.mlp.*"]
    masks = prune_checkpoint(whole, Magnitude(), tmp_path / "two", density=0.5, exclude="*.mlp.*").masks
    assert Masks.load(tmp_path / "out" / "masks.safetensors") == masks
    save_file({"tokens": torch.arange(12).reshape(2, 6)}, tmp_path / "tokens.safetensors")
    words = ["--method", "wanda", "--density", 0.5, "--out", tmp_path / "wanda"]
    result = run(whole, "--calibration", tmp_path / "tokens.safetensors", *words)
    assert result.exit_code == 0, result.output
    data = [{"input_ids": torch.arange(6)[None]}, {"input_ids": torch.arange(6, 12)[None]}]
    masks = prune_checkpoint(whole, Wanda(data, by_blocks=True), tmp_path / "four", density=0.5).masks
    assert Masks.load(tmp_path / "wanda" / "masks.safetensors") == masks
    assert "--calibration: wanted a file of tokens for wanda" in run(whole, *words).stderr
    save_file({"tokens": torch.ones(3)}, tmp_path / "floats.safetensors")
    result = run(whole, "--calibration", tmp_path / "floats.safetensors", *words)
    assert "'tokens': wanted integers [length] or [samples, length], got torch.float32 [3]" in result.stderr
    result = run(whole, "--calibration", tmp_path / "floats.safetensors", "--density", 0.5, "--out", tmp_path / "five")
    assert "--calibration: wanted none, magnitude looks at no data" in result.stderr
    result = run(tmp_path / "none", "--density", 0.5, "--out", tmp_path / "three")
    assert result.exit_code == 1 and result.stderr.startswith("pathprune: checkpoint: wanted a folder")
    assert result.stderr.count("\n") == 1
