"""Whole models of today, GPT-OSS and DeepSeek, against float64 autograd of the path rules, written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from architectures import made
from pathprune.network import PathNetwork
from test_attention import scored
from test_transformers import half, over_rms

TOKENS = 6


def attended(q: Tensor, k: Tensor, v: Tensor, carries: Tensor) -> Tensor:
    """[heads, T, d]: half of the flow by the values, half by the similarities, which share what attention carries."""
    similar = half(q, k, lambda a, b: a @ b.mT)
    share = carries * similar / similar.detach()
    return (share @ v.detach() + carries @ v) / 2


def heads(x: Tensor, size: int) -> Tensor:
    """[T, heads * size] -> [heads, T, size]"""
    return x.unflatten(-1, (-1, size)).transpose(0, 1)


def gpt_oss(w: dict[str, Tensor], x: Tensor, model: nn.Module) -> Tensor:
    """Two layers of four query and two key heads; the first sees four tokens; four experts, gate and up interleaved."""
    cos, sin = (part[0].double().abs() for part in model.model.rotary_emb(x, torch.arange(TOKENS)[None]))

    def turned(h: Tensor) -> Tensor:
        low, high = h.chunk(2, -1)
        return torch.cat([low * cos + high * sin, high * cos + low * sin], -1)

    for layer in range(2):
        own = {key.removeprefix(f"model.layers.{layer}."): value for key, value in w.items()}
        h = over_rms(x) * own["input_layernorm.weight"]
        q, k, v = (heads(h @ own[f"self_attn.{part}_proj.weight"].T, 4) for part in "qkv")
        allowed = torch.ones(TOKENS, TOKENS).double().tril()
        allowed = allowed.triu(-3) if layer == 0 else allowed
        sinks = dict(model.named_parameters())[f"model.layers.{layer}.self_attn.sinks"].detach().double().exp()
        carries = allowed / (allowed.sum(1, keepdim=True) + sinks[:, None, None])
        k, v = turned(k).repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        y = attended(turned(q), k, v, carries).transpose(0, 1).flatten(1)
        x = x + y @ own["self_attn.o_proj.weight"].T
        h, moved = over_rms(x) * own["post_attention_layernorm.weight"], torch.zeros_like(x)
        for expert in range(4):
            gate_up = h @ own["mlp.experts.gate_up_proj"][expert]
            moved = moved + half(gate_up[:, ::2], gate_up[:, 1::2], torch.mul) @ own["mlp.experts.down_proj"][expert]
        x = x + moved / 4
    return over_rms(x) * w["model.norm.weight"] @ w["lm_head.weight"].T


def gated(h: Tensor, own: dict[str, Tensor], path: str) -> Tensor:
    gate, up = (h @ own[f"{path}.{part}_proj.weight"].T for part in ("gate", "up"))
    return half(gate, up, torch.mul) @ own[f"{path}.down_proj.weight"].T


def deepseek(w: dict[str, Tensor], x: Tensor, model: nn.Module) -> Tensor:
    """Four heads of compressed queries, keys and values; a dense layer, and one of four experts beside a shared one."""
    turns = model.model.rotary_emb(x[None], torch.arange(TOKENS)[None])[0]  # complex [T, pairs]
    cos, sin = turns.real.double().abs(), turns.imag.double().abs()

    def turned(h: Tensor) -> Tensor:
        even, odd = h[..., ::2], h[..., 1::2]
        return torch.stack([even * cos + odd * sin, odd * cos + even * sin], -1).flatten(-2)

    for layer in range(2):
        own = {key.removeprefix(f"model.layers.{layer}."): value for key, value in w.items()}
        h = over_rms(x) * own["input_layernorm.weight"]
        q = over_rms(h @ own["self_attn.q_a_proj.weight"].T) * own["self_attn.q_a_layernorm.weight"]
        q, q_turned = heads(q @ own["self_attn.q_b_proj.weight"].T, 8).split(4, -1)
        latent, k_turned = (h @ own["self_attn.kv_a_proj_with_mqa.weight"].T).split([8, 4], -1)
        latent = over_rms(latent) * own["self_attn.kv_a_layernorm.weight"]
        k, v = heads(latent @ own["self_attn.kv_b_proj.weight"].T, 8).split(4, -1)
        k_turned = turned(k_turned).expand(4, TOKENS, 4)
        allowed = torch.ones(TOKENS, TOKENS).double().tril()
        carries = allowed / allowed.sum(1, keepdim=True)
        q, k = torch.cat([q, turned(q_turned)], -1), torch.cat([k, k_turned], -1)
        x = x + attended(q, k, v, carries).transpose(0, 1).flatten(1) @ own["self_attn.o_proj.weight"].T
        h = over_rms(x) * own["post_attention_layernorm.weight"]
        if layer == 0:
            x = x + gated(h, own, "mlp")
            continue
        moved = gated(h, own, "mlp.shared_experts")
        for expert in range(4):
            gate, up = (h @ own["mlp.experts.gate_up_proj"][expert].T).chunk(2, -1)
            made = half(gate, up, torch.mul) @ own["mlp.experts.down_proj"][expert].T
            moved = moved + made * model.config.routed_scaling_factor / 4
        x = x + moved
    return over_rms(x) * w["model.norm.weight"] @ w["lm_head.weight"].T


@pytest.mark.parametrize(("name", "rules"), [("GPT-OSS", gpt_oss), ("DeepSeek-V2", deepseek)])
def test_scores_are_those_of_autograd_through_the_rules(name: str, rules: Callable[..., Tensor]) -> None:
    model, inputs = made(name, torch.float64)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    model.config.routed_scaling_factor = 2.5
    for module in model.modules():
        if hasattr(module, "routed_scaling_factor"):
            module.routed_scaling_factor = 2.5
    source = torch.rand(TOKENS, 16, generator=generator, dtype=torch.float64)
    log2_total, scores, _ = scored(PathNetwork.from_module(model, inputs), source)
    leaves = {key: value.detach().abs().requires_grad_() for key, value in model.named_parameters()}
    total = rules(leaves, source, model).sum()
    total.backward()
    assert 2**log2_total == pytest.approx(total.item(), rel=1e-6)  # models turn queries in float32
    assert not any("router" in key or "mlp.gate.weight" in key for key in scores)
    for key, score in scores.items():
        expected = (leaves[key] * leaves[key].grad).detach()
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=float(expected.max()) * 1e-7)
