"""Unmodified transformers with data: signed flow is the model, PX is its formula, kernels those of detached gates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

import pathprune as pp
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from test_recording import through_gates
from test_transformers import MODELS, half, tiny, transformers

IN_FLOAT32 = {"Llama": 1e-6, "Mistral": 1e-6, "Qwen2": 1e-6, "Qwen3": 1e-6}  # models that norm in float32


def drawn(name: str, n: int, seed: int = 3) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of float64 with weights far from their initial symmetry, and samples."""
    model, inputs = tiny(name)
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    made = {}
    for key, x in inputs.items():
        size = (n, *x.shape[1:])
        words = torch.randint(3, 49, size, generator=generator)
        images = torch.randn(size, generator=generator, dtype=torch.float64)
        made[key] = images if x.is_floating_point() else words
    return model, made


def drawn_alike(name: str, n: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """As above; texts end at the same place, which is where they are pooled."""
    model, made = drawn(name, n)
    if name == "CLIP":
        made["input_ids"][:, 3] = 49
    return model, made


LIKE_OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("DeiT", "Mistral", "Qwen2")]


@pytest.mark.parametrize("name", ["ViT", "Swin", "ConvNeXt", "BERT", "GPT-2", "Llama", "Qwen3", *LIKE_OTHERS])
def test_signed_flow_is_the_model(name: str) -> None:
    model, inputs = drawn(name, 3)
    (found,) = through_gates(model, inputs, WeightMap.IDENTITY, "published")
    with torch.no_grad():
        wanted = model(**inputs).logits
    allowed = IN_FLOAT32.get(name, 1e-10) * float(wanted.abs().max())
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=0, atol=allowed)


def test_signed_flow_is_a_model_of_two_inputs_and_outputs() -> None:
    model, inputs = drawn("CLIP", 3)
    with pytest.raises(ValueError, match=r"test: data: wanted integers that choose what example_input's do, .*index"):
        through_gates(model, inputs, WeightMap.IDENTITY, "published")
    model, inputs = drawn_alike("CLIP", 3)
    images, words = through_gates(model, inputs, WeightMap.IDENTITY, "published")
    with torch.no_grad():
        each = [model(**{key: x[n : n + 1] for key, x in inputs.items()}) for n in range(3)]
    for found, key in ((images, "logits_per_image"), (words, "logits_per_text")):
        wanted = torch.cat([out[key] for out in each])
        torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-10, atol=0)


def test_each_sample_has_its_own_padding() -> None:
    model, inputs = drawn("BERT", 3)
    inputs["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    (found,) = through_gates(model, inputs, WeightMap.IDENTITY, "published")
    with torch.no_grad():
        wanted = model(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


def test_eager_attention_has_the_gates_of_the_fused_one() -> None:
    for name in ("BERT", "GPT-2", "Swin"):
        model, inputs = drawn(name, 2)
        (fused,) = through_gates(model, inputs, WeightMap.ONE)
        model.set_attn_implementation("eager")
        (written,) = through_gates(model, inputs, WeightMap.ONE)
        torch.testing.assert_close(written, fused, rtol=1e-6, atol=0)  # written out, it is in float32


# ------------------------------------------------------------------------------------------------ PX, by hand


def turned(x: Tensor, power: int = 1) -> Tensor:
    """Rotary embeddings of [heads, T, 4]; of squares, by squares."""
    angles = torch.arange(x.shape[-2]).double()[:, None] * 1e4 ** (-torch.arange(0, 4, 2).double() / 4)
    cos, sin = (f(torch.cat([angles, angles], 1)) for f in (torch.cos, torch.sin))
    low, high = x.chunk(2, -1)
    return x * cos**power + torch.cat([high if power == 2 else -high, low], -1) * sin**power


def heads(x: Tensor) -> Tensor:
    """[T, heads * 4] -> [heads, T, 4]"""
    return x.unflatten(-1, (-1, 4)).transpose(0, 1)


def layers(w: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    starts = [f"model.layers.{k}." for k in range(2)]
    return [{key.removeprefix(s): value for key, value in w.items() if key.startswith(s)} for s in starts]


def data_factor(w: dict[str, Tensor], m: dict[str, Tensor], words: Tensor) -> Tensor:
    """g of one sample: the real network, and beside it that of the masks with the squares of its gates."""
    x = w["model.embed_tokens.weight"][words]
    g = x.square()
    for own, kept in zip(layers(w), layers(m), strict=True):
        over = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        h, gh = x * over * own["input_layernorm.weight"], g * over.square()
        q, k, v = (heads(h @ own[f"self_attn.{part}_proj.weight"].T) for part in "qkv")
        gv = heads(gh @ kept["self_attn.v_proj.weight"].T).repeat_interleave(2, 0)
        similar = turned(q) @ turned(k.repeat_interleave(2, 0)).mT / 2
        attends = similar.masked_fill(torch.ones_like(similar, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        y = (attends @ v.repeat_interleave(2, 0)).transpose(0, 1).flatten(1)
        x = x + y @ own["self_attn.o_proj.weight"].T
        g = g + (attends.square() @ gv).transpose(0, 1).flatten(1) @ kept["self_attn.o_proj.weight"].T
        over = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        h, gh = x * over * own["post_attention_layernorm.weight"], g * over.square()
        gate, up = (h @ own[f"mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        g_gate, g_up = (gh @ kept[f"mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        passed = torch.sigmoid(gate)
        x = x + gate * passed * up @ own["mlp.down_proj.weight"].T
        joined = (up / 2).square() * passed.square() * g_gate + (gate * passed / 2).square() * g_up
        g = g + joined @ kept["mlp.down_proj.weight"].T
    return g / (x.square().mean(-1, keepdim=True) + 1e-6) @ m["lm_head.weight"].T


def path_factor(u: dict[str, Tensor]) -> Tensor:
    """h: squared weights on ones; norms are their scales alone; attention is uniform, half of it by its weights."""
    x = torch.ones(6, 16, dtype=torch.float64)
    uniform = torch.ones(6, 6, dtype=torch.float64).tril()
    uniform = (uniform / uniform.sum(1, keepdim=True)).square()
    for own in layers(u):
        h = x * own["input_layernorm.weight"]
        q, k, v = (heads(h @ own[f"self_attn.{part}_proj.weight"].T) for part in "qkv")
        k, v = turned(k, 2).repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        similar = half(turned(q, 2), k, lambda a, b: a @ b.mT)
        carried = uniform * similar / similar.detach()
        y = (carried @ v.detach() + uniform @ v) / 2
        x = x + y.transpose(0, 1).flatten(1) @ own["self_attn.o_proj.weight"].T
        h = x * own["post_attention_layernorm.weight"]
        gate, up = (h @ own[f"mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + half(gate, up, torch.mul) @ own["mlp.down_proj.weight"].T
    return x * u["model.norm.weight"] @ u["lm_head.weight"].T


@pytest.mark.parametrize("is_masked", [False, True])
def test_px_of_a_llama_is_its_formula(is_masked: bool) -> None:
    model, inputs = drawn("Llama", 5)
    network = PathNetwork.from_module(model, inputs)
    generator = torch.Generator().manual_seed(1)
    masks = {
        key: torch.rand(p.shape, generator=generator) < (0.7 if is_masked and key in network.prunable else 2)
        for key, p in model.state_dict().items()
    }
    real = {key: p * masks[key] for key, p in model.state_dict().items()}
    reach = sum(data_factor(real, {k: m.double() for k, m in masks.items()}, words) for words in inputs["input_ids"])
    u = {key: p.square().requires_grad_() for key, p in real.items()}
    total = (reach * path_factor(u)).sum()
    total.backward()
    data = [{key: x[:2] for key, x in inputs.items()}, {key: x[2:] for key, x in inputs.items()}]
    asked = {key: masks[key] for key in network.prunable} if is_masked else None
    found = pp.scores(network, pp.PX(data), masks=asked)
    assert found.log2_R == pytest.approx(math.log2(float(total.detach())), abs=1e-5)
    assert len(network.prunable) == 15
    for key in network.prunable:
        expected = (u[key] * u[key].grad).detach()
        torch.testing.assert_close(found.double(key), expected, rtol=1e-5, atol=1e-7 * float(expected.max()))


@pytest.mark.parametrize("name", ["ViT", "BERT", "Llama", "CLIP", "ConvNeXt"])
def test_px_prunes_to_the_density_and_leaves_the_model(name: str) -> None:
    model, inputs = drawn_alike(name, 4)
    model = model.float().train()
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
    example = {key: x[:1] for key, x in inputs.items()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    masks = pp.prune(model, pp.PX([inputs], rounds=3), density=0.3, example_input=example, progress=False)
    assert sum(int(m.sum()) for m in masks.values()) == round(0.3 * sum(m.numel() for m in masks.values()))
    assert math.isfinite(masks.metadata["findings"]["log2_R_last"])
    assert any(bool(mask.any()) and not bool(mask.all()) for mask in masks.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(rng, torch.random.get_rng_state()) and all(module.training for module in model.modules())
    bad = {key: torch.full_like(x, torch.nan) for key, x in inputs.items() if x.is_floating_point()}
    if len(bad) == len(inputs):
        with pytest.raises(ValueError, match="finite inputs"):
            pp.prune(model, pp.PX([bad], rounds=1), density=0.3, example_input=example, progress=False)


def test_px_in_bfloat16_has_the_scores_of_float64() -> None:
    model, inputs = drawn("ViT", 4)
    low = copy.deepcopy(model).bfloat16()
    high = copy.deepcopy(low).double()
    images = {key: x.bfloat16() for key, x in inputs.items()}
    first = pp.scores(low, pp.PX([images]), example_input=images)
    images = {key: x.double() for key, x in images.items()}
    second = pp.scores(high, pp.PX([images]), example_input=images)
    assert first.log2_R == pytest.approx(second.log2_R, abs=0.05)
    for key in second.tensors:
        score = second.double(key)
        torch.testing.assert_close(first.double(key), score, rtol=0.1, atol=1e-2 * float(score.max()))


# --------------------------------------------------------------------------------------- kernels, gates detached


class Held(TorchFunctionMode):
    """Every gate of a model is a constant to autograd."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.gelu, F.silu, torch.tanh):
            out = func(*args, **kwargs)
            return args[0] * (out / args[0]).detach()
        if func is torch.rsqrt:
            return func(*args).detach()
        if func is F.layer_norm:
            x, eps = args[0], kwargs.get("eps", 1e-5)
            weight, bias = (kwargs[key] if key in kwargs else args[k] for k, key in ((2, "weight"), (3, "bias")))
            eps = args[4] if len(args) > 4 else eps
            centred = x - x.mean(-1, keepdim=True)
            return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps).detach() * weight + bias
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            similar = query @ key.mT * query.shape[-1] ** -0.5
            if kwargs.get("is_causal"):
                similar = similar.masked_fill(torch.ones_like(similar[0, 0], dtype=torch.bool).triu(1), -torch.inf)
            if kwargs.get("attn_mask") is not None:
                similar = similar.masked_fill(~kwargs["attn_mask"], -torch.inf)
            return similar.softmax(-1).detach() @ value
        return func(*args, **kwargs)


def gated_mlp(self: nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(half(self.act_fn(self.gate_proj(x)), self.up_proj(x), torch.mul))


FEW_WORDS = {"vocab_size": 7, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("name", ["ViT", "ConvNeXt", "BERT", "Llama"])
def test_kernels_with_gates_held_are_those_of_detached_gates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = drawn(name, 2)
    if name == "Llama":
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODELS[name][2] | FEW_WORDS)).double().eval()
        inputs = {"input_ids": torch.tensor([[1, 3, 4, 2], [5, 5, 6, 3]])}
    (x,) = inputs.values()
    network = PathNetwork.from_module(model, x)
    generator = torch.Generator().manual_seed(2)
    masks = {n: torch.rand(network.tensors[n].shape, generator=generator) < 0.8 for n in network.prunable}
    theta = pp.ntk(network, x, masks, hold_gates=True)
    trace = pp.ntk_trace(network, [x], masks, hold_gates=True)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", gated_mlp)
    leaves = {n: (network.tensors[n].detach() * masks[n]).requires_grad_() for n in network.prunable}
    rows = []
    for sample in x:
        with Held():
            out = functional_call(model, leaves, (sample[None],)).logits.flatten()
        for k in range(len(out)):
            found = torch.autograd.grad(out[k], list(leaves.values()), retain_graph=True, allow_unused=True)
            pairs = zip(found, leaves.items(), strict=True)
            rows.append(
                torch.cat([(torch.zeros_like(p) if g is None else g * masks[n]).flatten() for g, (n, p) in pairs])
            )
    jacobian = torch.stack(rows)
    wanted = jacobian @ jacobian.T
    exactly = IN_FLOAT32.get(name, 1e-10)
    largest = float(wanted.abs().max())
    torch.testing.assert_close(theta.flatten(2, 3).flatten(0, 1), wanted, rtol=0, atol=10 * exactly * largest)
    assert trace == pytest.approx(float(wanted.trace()), rel=10 * exactly)
    with pytest.raises(ValueError, match="ntk: model: wanted gates that move by steps"):
        pp.ntk(network, x, masks)
