"""Hugging Face folders: what is read, what is refused, and the model whose weights stay on the disk."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_folders import (
    INDEX,
    contents,
    convnext,
    edit_index,
    gpt2,
    llama,
    mixtral,
    resnet,
    rewrite,
    save,
    tensors,
)
from pathprune import Checkpoint, CheckpointError, Magnitude, PathNetwork, SynFlow, layer_network, prune
from pathprune.checkpoint import verify
from pathprune.checkpoint_model import open_model

pytest.importorskip("transformers")

IMAGE = torch.ones(1, 3, 32, 32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(llama(), tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "llama")


def refused(folder, message: str) -> None:
    """The folder is refused, in a line that says so, and nothing in it has changed."""
    before = contents(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(Checkpoint(folder))
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_every_tensor_of_every_shard(folder):
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.shards) > 3
    expected = tensors(folder)
    assert checkpoint.where.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(checkpoint.tensor(name), value)


def test_one_file(tmp_path):
    folder = save(llama(), tmp_path / "one", shard="1GB")
    assert list(Checkpoint(folder).shards) == ["model.safetensors"]


# ---------------------------------------------------------------------------------------------------- refusals


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint: wanted a folder, got"):
        Checkpoint(tmp_path / "none")


def test_pickled_weights_are_never_loaded(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/unpickled'\ntR.")
    refused(folder, r"its weights are pickled \(pytorch_model.bin\), which are never loaded")


def test_no_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()
    refused(folder, "wanted model.safetensors or model.safetensors.index.json, got neither")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "wanted a file config.json, got none")


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("[]", "wanted a JSON object, got list")])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_is_none(folder, file, content, message):
    (folder / file).write_text(content)
    refused(folder, f"{file}: {message}")


def test_a_missing_shard(folder):
    name = sorted(path.name for path in folder.glob("model-*"))[1]
    (folder / name).unlink()
    refused(folder, f"the index names the shard {name}, which is missing")


def test_a_truncated_shard(folder):
    path = sorted(folder.glob("model-*"))[1]
    path.write_bytes(path.read_bytes()[:-3])
    refused(folder, f"{path.name}: not a whole safetensors file")


def _elsewhere(index):
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = second


LIES = {
    "elsewhere": (_elsewhere, "should be in .*; it is in model-"),
    "unknown name": (
        lambda index: index["weight_map"].update(ghost=min(index["weight_map"].values())),
        "'ghost' should be in .*; it is in none",
    ),
    "unlisted": (lambda index: index["weight_map"].pop("model.norm.weight"), "that it does not list: model.norm"),
    "total": (lambda index: index["metadata"].update(total_size=1), "its total_size is 1, the tensors have"),
    "no map": (lambda index: index.pop("weight_map"), "wanted a weight_map from tensor to file name, got none"),
    "numbers": (lambda index: index.update(weight_map={"a": 1}), "wanted a weight_map from tensor to file name"),
    "empty": (lambda index: index.update(weight_map={}), "its weight_map is empty"),
    "outside": (
        lambda index: index["weight_map"].update(x="../other.safetensors"),
        "wanted names of safetensors files in the folder, got '../other.safetensors'",
    ),
    "pickle": (lambda index: index["weight_map"].update(x="a.bin"), "wanted names of safetensors files .* got 'a.bin'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies(folder, lie):
    change, message = LIES[lie]
    edit_index(folder, change)
    refused(folder, message)


def test_a_tensor_in_two_shards(folder):
    first, second = sorted(folder.glob("model-*"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    refused(folder, f"is in both {first.name} and {second.name}")


def test_quantised_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    refused(folder, "its weights are quantised")


@pytest.mark.parametrize("name", ["NoSuchModel", "torch"])
def test_an_unknown_architecture(folder, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    refused(folder, f"has no model '{name}'")


def test_a_configuration_of_other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    refused(folder, r"gate_proj.weight: the model wants \[64, 32\], the file has \[48, 32\]")


# --------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2, resnet, convnext])
def test_the_model_is_the_one_transformers_loads(tmp_path, make, dtype):
    model = make().to(dtype)
    folder = save(model, tmp_path / "model")
    state = torch.random.get_rng_state()
    opened = open_model(Checkpoint(folder))
    assert torch.equal(torch.random.get_rng_state(), state)
    loaded = type(model).from_pretrained(folder)
    assert not opened.absent and not opened.unclaimed
    own = dict(opened.model.named_parameters()) | dict(opened.model.named_buffers())
    for name, value in (*loaded.named_parameters(), *loaded.named_buffers()):
        assert torch.equal(own[name], value), name
        assert torch.equal(opened.tensors[name], value), name
    inputs = {"pixel_values": IMAGE.to(dtype)} if make in (resnet, convnext) else {"input_ids": torch.arange(6)[None]}
    with torch.no_grad():
        assert torch.equal(opened.model(**inputs).logits, loaded(**inputs).logits)


def test_a_head_tied_to_the_embedding_is_not_pruned(tmp_path):
    folder = save(llama(tied=True), tmp_path / "tied")
    assert "lm_head.weight" not in Checkpoint(folder).where
    opened = open_model(Checkpoint(folder))
    assert opened.model.lm_head.weight is opened.model.model.embed_tokens.weight
    assert not opened.absent
    names = opened.layers().prunable
    assert len(names) == 14 and not any("embed" in name or "lm_head" in name for name in names)


def test_a_tied_tensor_that_is_there_twice(tmp_path):
    folder = save(llama(tied=True), tmp_path / "tied")
    values = tensors(folder)
    rewrite(folder, {**values, "lm_head.weight": values["model.embed_tokens.weight"].clone()})
    opened = open_model(Checkpoint(folder))
    assert sorted(opened.keys["model.embed_tokens.weight"]) == ["lm_head.weight", "model.embed_tokens.weight"]
    rewrite(folder, {**values, "lm_head.weight": values["model.embed_tokens.weight"] + 1})
    refused(folder, "are one tied tensor .* but have different values")


def test_names_without_the_base_models_prefix(tmp_path):
    """Files of the base model, read as a model with a head: as ``from_pretrained`` does."""
    folder = save(gpt2().transformer, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    assert "h.0.attn.c_attn.weight" in Checkpoint(folder).where
    opened = open_model(Checkpoint(folder))
    assert opened.keys["transformer.h.0.attn.c_attn.weight"] == ["h.0.attn.c_attn.weight"]
    assert not opened.absent and not opened.unclaimed


def test_experts_are_claimed_without_values_unless_they_are_laid_out(tmp_path):
    folder = save(mixtral(), tmp_path / "mixtral")
    opened = open_model(Checkpoint(folder))
    assert not opened.unclaimed
    assert sorted(opened.assemblies) == sorted(opened.absent) and len(opened.absent) == 2
    own = dict(opened.model.named_parameters())
    assert all(own[name].untyped_storage().nbytes() == 4 for name in opened.absent)
    with pytest.raises(CheckpointError, match=r"no file has the model's weights model.layers.0.mlp.experts"):
        opened.layers()
    with pytest.raises(CheckpointError, match=r"no file has model.layers.0.mlp.experts"):
        opened.paths({"input_ids": torch.zeros(1, 4, dtype=torch.int64)})


def test_tensors_the_model_does_not_have(folder):
    rewrite(folder, {**tensors(folder), "extra.weight": torch.ones(4, 4)})
    opened = open_model(Checkpoint(folder))
    assert opened.unclaimed == ["extra.weight"]


def test_a_weight_that_no_file_has(folder):
    values = tensors(folder)
    del values["model.layers.0.mlp.up_proj.weight"], values["model.norm.weight"]
    rewrite(folder, values)
    opened = open_model(Checkpoint(folder))
    with pytest.raises(CheckpointError, match=r"no file has the model's weights model.layers.0.mlp.up_proj.weight"):
        opened.layers()


def test_a_dtype_that_cannot_be_scored(folder):
    values = tensors(folder)
    values["lm_head.weight"] = values["lm_head.weight"].to(torch.float8_e4m3fn)
    rewrite(folder, values)
    with pytest.raises(CheckpointError, match=r"lm_head.weight: wanted float32, .* got torch.float8_e4m3fn"):
        open_model(Checkpoint(folder)).layers()


def test_mixed_dtypes(tmp_path):
    """Paths through weights of two dtypes, whatever the exported structure has: as in float64 of the same values."""
    folder = save(resnet(), tmp_path / "mixed")
    values = {name: value.bfloat16() if value.dim() == 4 else value for name, value in tensors(folder).items()}
    rewrite(folder, values)
    opened = open_model(Checkpoint(folder))
    assert {parameter.dtype for parameter in opened.model.parameters()} == {torch.bfloat16}
    network = opened.paths(IMAGE.bfloat16())
    assert {network.tensors[name].dtype for name in network.prunable} == {torch.bfloat16, torch.float32}
    rounded = resnet()
    rounded.load_state_dict({name: value.to(rounded.state_dict()[name].dtype) for name, value in values.items()})
    found = prune(network, SynFlow(rounds=3), density=0.3)
    assert found == prune(rounded, SynFlow(rounds=3), density=0.3, example_input=IMAGE)


# ------------------------------------------------------------------------------------ values from elsewhere


def test_a_network_with_other_values():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    other = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    network = PathNetwork.from_module(model, torch.ones(1, 4), other)
    assert network.prunable == ("0.weight", "2.weight")
    assert all(torch.equal(network.tensors[name], other[name]) for name in network.prunable)
    masks = prune(network, Magnitude(), density=0.5)
    model.load_state_dict(other)
    assert masks == prune(model, Magnitude(), density=0.5, example_input=torch.ones(1, 4))


def test_meta_weights_stay_an_error():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with pytest.raises(ValueError, match="got a weight on the meta device"):
        layer_network(model)
    with pytest.raises(ValueError, match="got meta tensors"):
        PathNetwork.from_module(model, torch.ones(1, 4))


def test_layers_apart_are_pruned_as_in_the_network():
    """Magnitude looks at each weight alone, so the paths between layers change nothing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, groups=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(6, 4, 2, stride=2),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 64, 5),
    )
    for scope in ("global", "layer", "row"):
        apart = prune(layer_network(model), Magnitude(), density=0.4, scope=scope)
        assert apart == prune(model, Magnitude(), density=0.4, scope=scope, example_input=torch.ones(1, 4, 4, 4))
        assert "base_hash" in apart.metadata


def test_layers_of_a_model_without_any():
    with pytest.raises(ValueError, match="layer_network: LayerNorm has no linear or convolution weight to prune"):
        layer_network(torch.nn.LayerNorm(4))


def test_verify_wants_a_marker(folder):
    with pytest.raises(CheckpointError, match=r"wanted a file pathprune\.json, got none"):
        verify(folder)
    (folder / "pathprune.json").write_text('{"files": {}, "complete": false}')
    with pytest.raises(CheckpointError, match="wanted the checksums of a complete folder, got none"):
        verify(folder)
