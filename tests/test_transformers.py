"""Unmodified Hugging Face models: every architecture at a tiny width, against float64 autograd of the rules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from pathprune.spatial import merge_equal_positions
from test_attention import entering, scored

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

IDS = torch.ones(1, 6, dtype=torch.long)
IMAGE = torch.ones(1, 3, 32, 32)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = {"vocab_size": 50, "max_position_embeddings": 16}
SEEN = {"image_size": 32, "patch_size": 8}
DECODER = SMALL | WORDS | {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
STAGES = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> model class, config class, config
    "ViT": ("ViTForImageClassification", "ViTConfig", SMALL | SEEN),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", SMALL | SEEN),
    "Swin": ("SwinForImageClassification", "SwinConfig", STAGES),
    "ConvNeXt": ("ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [2, 2]}),
    "BERT": ("BertForSequenceClassification", "BertConfig", SMALL | WORDS),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "Mistral": ("MistralForCausalLM", "MistralConfig", DECODER),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 4}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | {"num_local_experts": 4}),
    "CLIP": ("CLIPModel", "CLIPConfig", {"projection_dim": 8}),
}
_made: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}


def tiny(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random weights, and an input by keyword."""
    if name not in _made:
        model_class, config_class, options = MODELS[name]
        if name == "CLIP":
            parts = {"text_config": SMALL | WORDS | {"eos_token_id": 2}, "vision_config": SMALL | SEEN}
            options = options | parts
        if name == "ConvNeXt":
            options = options | {"num_stages": 2, "image_size": 32}
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).eval()
        images, words = {"pixel_values": IMAGE}, {"input_ids": IDS}
        is_visual = name in ("ViT", "DeiT", "Swin", "ConvNeXt")
        _made[name] = (model, images if is_visual else words | images if name == "CLIP" else words)
    return _made[name]


def state(model: nn.Module) -> tuple[dict[str, Tensor], list[str], bool]:
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return values, [str(m.config) for m in model.modules() if hasattr(m, "config")][:1], model.training


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_read_scored_and_conserved(name: str) -> None:
    model, inputs = tiny(name)
    before = state(model)
    assert PathNetwork.support_report(model, inputs)
    network = PathNetwork.from_module(model, inputs)
    after = state(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])

    sums: dict[str, float] = {}
    for f in (WeightMap.ABS, WeightMap.SQUARE):
        log2_total, scores, flow = scored(network, f=f)
        assert entering(network, flow) == pytest.approx(2**log2_total, rel=1e-5)
        for key, score in scores.items():
            assert bool(score.isfinite().all()) and bool((score >= 0).all())
            sums[key] = float(score.sum()) / 2**log2_total
            assert 0 < sums[key] < 1 + 1e-5
            assert float((score == 0).float().mean()) < 0.01
    heads = [key for key in sums if "classifier" in key or "lm_head" in key]
    assert [sums[key] for key in heads] == pytest.approx([1] * len(heads), rel=1e-5)


@pytest.mark.parametrize("name", ["ViT", "Swin", "BERT", "Llama", "Mixtral"])
def test_bfloat16_scores_are_finite_and_rank_as_float64(name: str) -> None:
    model, inputs = tiny(name)
    low_model, high_model = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).bfloat16().double()
    inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
    low = scored(PathNetwork.from_module(low_model, inputs))
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    high = scored(PathNetwork.from_module(high_model, inputs))
    assert low[0] == pytest.approx(high[0], abs=1e-3)
    for key, score in high[1].items():
        torch.testing.assert_close(low[1][key], score, rtol=2e-2, atol=float(score.max()) * 1e-4)


@pytest.mark.parametrize("name", ["ViT", "GPT-2", "Llama", "Mixtral", "CLIP"])
def test_masks_have_the_exact_density_and_apply(name: str) -> None:
    model, inputs = tiny(name)
    masks = pp.prune(model, pp.SynFlow(rounds=4), density=0.2, example_input=inputs)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.2 * total)
    assert "layer" in str(masks.report())
    embeddings = {key for key in masks if "embed" in key or "wte" in key}
    assert all("patch" in key for key in embeddings)  # a convolution on patches is no table
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    masks.apply_(model)
    with torch.no_grad():
        out = model(**inputs)
    model.load_state_dict(weights)
    assert bool(out[0].isfinite().all())


# The share of the synapses' units that is left when equal positions are computed once: paths; published.
LEFT = {"ViT": (0.2, 1), "DeiT": (0.2, 0.2), "ConvNeXt": (0.9, 0.9), "BERT": (0.2, 1)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["paths", "published"])
def test_equal_tokens_are_computed_once(name: str, policy: str) -> None:
    network = PathNetwork.from_module(*tiny(name))
    merged = merge_equal_positions(network, policy)
    for f in (WeightMap.ABS, WeightMap.SQUARE):
        wanted, got = scored(network, f=f, policy=policy), scored(merged, f=f, policy=policy)
        assert got[0] == pytest.approx(wanted[0], abs=1e-5)
        for key, score in wanted[1].items():
            torch.testing.assert_close(got[1][key], score, rtol=1e-3, atol=float(score.max()) * 1e-5)
    units = [sum(net.nodes[k].shape.numel() for k in net.synapses()) for net in (network, merged)]
    assert units[1] <= LEFT.get(name, (1, 1))[policy == "published"] * units[0]


def test_tokens_that_constants_tell_apart_stay_apart_for_ensembles() -> None:
    """DeiT's positions begin as zeros; members of an ensemble may have others."""
    model, inputs = tiny("DeiT")
    network = PathNetwork.from_module(model, inputs)
    other = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(2)
    other["deit.embeddings.position_embeddings"].normal_()
    method = pp.SynFlow(rounds=1)
    one, two = pp.scores([network.tensors, {**network.tensors, **other}], method, architecture=network)
    held = model.deit.embeddings.position_embeddings.detach().clone()
    try:
        with torch.no_grad():
            model.deit.embeddings.position_embeddings.copy_(other["deit.embeddings.position_embeddings"])
        alone = pp.scores(model, method, example_input=inputs)
    finally:
        with torch.no_grad():
            model.deit.embeddings.position_embeddings.copy_(held)
    assert two.log2_R == pytest.approx(alone.log2_R, abs=1e-4)
    assert one.log2_R != pytest.approx(two.log2_R, abs=1e-3)


def test_eager_and_fused_attention_score_alike() -> None:
    for name in ("Llama", "GPT-2"):
        model, inputs = tiny(name)
        fused = scored(PathNetwork.from_module(model, inputs))
        implementation = model.config._attn_implementation
        model.set_attn_implementation("eager")
        written = scored(PathNetwork.from_module(model, inputs))
        model.set_attn_implementation(implementation)
        assert written[0] == pytest.approx(fused[0], abs=1e-5)
        for key, score in fused[1].items():
            torch.testing.assert_close(written[1][key], score, rtol=1e-4, atol=float(score.max()) * 1e-6)


def test_settings_come_back_when_the_export_fails() -> None:
    model, _ = tiny("Mixtral")
    before = (model.config.use_cache, model.config._experts_implementation, model.training)
    assert before[0]
    with pytest.raises(ValueError, match="could not be exported"):
        PathNetwork.from_module(model, {"input_ids": IMAGE})
    assert before == (model.config.use_cache, model.config._experts_implementation, model.training)


def test_tied_heads_are_not_prunable_and_routers_carry_no_paths() -> None:
    assert not any("lm_head" in key or "wte" in key for key in PathNetwork.from_module(*tiny("GPT-2")).prunable)
    assert any("lm_head" in key for key in PathNetwork.from_module(*tiny("Llama")).prunable)
    names = PathNetwork.from_module(*tiny("Mixtral")).prunable
    assert not any("mlp.gate.weight" in key for key in names)
    assert sum("experts" in key for key in names) == 4


# ------------------------------------------------------------------------------------- the rules, written again


def half(a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A product of two flows of which each gets half."""
    return (product(a, b.detach()) + product(a.detach(), b)) / 2


def attended(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[heads, T, d]: uniform weights over what may be attended to, which carry half of the flow where q k' is not 0."""
    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=q.dtype)
    allowed = allowed.tril() if causal else allowed
    uniform = allowed / allowed.sum(1, keepdim=True)
    similar = half(q, k, lambda a, b: a @ b.mT)
    is_open = similar.detach() > 0
    carried = uniform * torch.where(is_open, similar / similar.detach().clamp(min=1e-300), 0.0)
    return (carried / 2) @ v.detach() + (uniform * (1 - is_open.double() / 2)) @ v


def over_rms(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt().detach().clamp(min=1e-300)


def decoder(
    w: dict[str, Tensor], x: Tensor, theta: float, mlp: Callable[[Tensor, dict[str, Tensor]], Tensor]
) -> Tensor:
    """Two layers of four query and two key heads, width 16."""
    positions = torch.arange(x.shape[0]).double()[:, None] * theta ** (-torch.arange(0, 4, 2).double() / 4)
    cos, sin = (f(torch.cat([positions, positions], 1)).abs() for f in (torch.cos, torch.sin))

    def turned(h: Tensor) -> Tensor:
        return h * cos + torch.cat([h[..., 2:], h[..., :2]], -1) * sin

    for layer in range(2):
        own = {key.removeprefix(f"model.layers.{layer}."): value for key, value in w.items()}
        h = over_rms(x) * own["input_layernorm.weight"]
        q, k, v = (
            (h @ own[f"self_attn.{part}_proj.weight"].T).unflatten(-1, (-1, 4)).transpose(0, 1) for part in "qkv"
        )
        k, v = turned(k).repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        y = attended(turned(q), k, v, causal=True).transpose(0, 1).flatten(1)
        x = x + y @ own["self_attn.o_proj.weight"].T
        x = x + mlp(over_rms(x) * own["post_attention_layernorm.weight"], own)
    return over_rms(x) * w["model.norm.weight"] @ w["lm_head.weight"].T


def llama(w: dict[str, Tensor], x: Tensor) -> Tensor:
    def mlp(h: Tensor, own: dict[str, Tensor]) -> Tensor:
        gate, up = (h @ own[f"mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        return half(gate, up, torch.mul) @ own["mlp.down_proj.weight"].T

    return decoder(w, x, 1e4, mlp)


def mixtral(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The mean of four experts."""

    def mlp(h: Tensor, own: dict[str, Tensor]) -> Tensor:
        made = []
        for expert in range(4):
            gate, up = (h @ own["mlp.experts.gate_up_proj"][expert].T).chunk(2, -1)
            made.append(half(gate, up, torch.mul) @ own["mlp.experts.down_proj"][expert].T)
        return torch.stack(made).mean(0)

    return decoder(w, x, 1e6, mlp)


def gpt2(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Two layers of two heads, width 16; biases and positions begin no path."""
    for layer in range(2):
        own = {key.removeprefix(f"transformer.h.{layer}."): value for key, value in w.items()}
        q, k, v = (over_rms(x) * own["ln_1.weight"] @ own["attn.c_attn.weight"]).split(16, -1)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(0, 1) for part in (q, k, v))
        x = x + attended(q, k, v, causal=True).transpose(0, 1).flatten(1) @ own["attn.c_proj.weight"]
        x = x + over_rms(x) * own["ln_2.weight"] @ own["mlp.c_fc.weight"] @ own["mlp.c_proj.weight"]
    return over_rms(x) * w["transformer.ln_f.weight"] @ w["transformer.wte.weight"].T


def vit(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Sixteen patches and a class token that begins no path; two layers of two heads."""
    x = F.conv2d(x[None], w["vit.embeddings.patch_embeddings.projection.weight"], stride=8).flatten(2)[0].T
    x = torch.cat([torch.zeros_like(x[:1]), x])
    for layer in range(2):
        own = {key.removeprefix(f"vit.layers.{layer}."): value for key, value in w.items()}
        h = over_rms(x) * own["layernorm_before.weight"]
        q, k, v = ((h @ own[f"attention.{p}_proj.weight"].T).unflatten(-1, (2, 8)).transpose(0, 1) for p in "qkv")
        x = x + attended(q, k, v, causal=False).transpose(0, 1).flatten(1) @ own["attention.o_proj.weight"].T
        x = x + over_rms(x) * own["layernorm_after.weight"] @ own["mlp.fc1.weight"].T @ own["mlp.fc2.weight"].T
    return (over_rms(x) * w["vit.layernorm.weight"])[:1] @ w["classifier.weight"].T


@pytest.mark.parametrize(("name", "rules"), [("Llama", llama), ("Mixtral", mixtral), ("GPT-2", gpt2)])
def test_scores_are_those_of_autograd_through_the_rules(name: str, rules: Callable[..., Tensor]) -> None:
    torch.manual_seed(1)
    matches_autograd(name, rules, torch.rand(6, 16, dtype=torch.float64))


def test_scores_of_images_are_those_of_autograd_through_the_rules() -> None:
    torch.manual_seed(1)
    matches_autograd("ViT", vit, torch.rand(3, 32, 32, dtype=torch.float64))


def matches_autograd(name: str, rules: Callable[..., Tensor], source: Tensor) -> None:
    model, inputs = tiny(name)
    model = copy.deepcopy(model).double()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    log2_total, scores, _ = scored(PathNetwork.from_module(model, inputs), source)
    leaves = {key: value.abs().requires_grad_() for key, value in model.state_dict().items()}
    total = rules(leaves, source).sum()
    total.backward()
    exactly = {"Llama": 1e-6, "Mixtral": 1e-6}.get(name, 1e-9)  # models turn queries in float32
    assert 2**log2_total == pytest.approx(total.item(), rel=exactly)
    for key, score in scores.items():
        expected = (leaves[key] * leaves[key].grad).detach()
        torch.testing.assert_close(score, expected, rtol=exactly, atol=float(expected.max()) * exactly / 10)
