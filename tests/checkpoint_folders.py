"""Tiny Hugging Face folders to prune, and ways to damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"


def llama(tied: bool = False, layers: int = 2, vocabulary: int = 64) -> nn.Module:
    """A Llama of 20,000 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    """A GPT-2: Conv1D layers, a head tied to the embedding, a base model with a prefix of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def mixtral() -> nn.Module:
    """A mixture of experts: files have a tensor for each expert, the model one for all."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=2, **sizes)).eval()


def qwen_moe() -> nn.Module:
    """Experts beside a shared expert, layers of both kinds; names of the files are the model's but for the experts."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mlp_only_layers": [1]}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=64, **sizes, **heads, **experts)).eval()


def gpt_oss() -> nn.Module:
    """Experts whose matrices are [in, out], with biases; in the files as in the model."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(vocab_size=64, pad_token_id=0, **sizes, **heads, **experts)).eval()


def llama4() -> nn.Module:
    """Experts whose matrices are [in, out], all of them at once by ``bmm``; no mark of transformers says so."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    model = Llama4ForCausalLM(Llama4TextConfig(vocab_size=64, **sizes, **heads, **experts)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.normal_(std=0.2)
    return model


def resnet() -> nn.Module:
    """A ResNet with batch norms whose statistics are not those of a fresh one."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 1, 1], num_labels=5)
    model = ResNetForImageClassification(config).eval()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_()
    return model


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 1, 1], num_labels=5)
    return ConvNextForImageClassification(config).eval()


def dinov2() -> nn.Module:
    """Gate and up projections, and their biases, that are one tensor in the files."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 16}
    config = Dinov2Config(**sizes, use_swiglu_ffn=True, num_labels=5)
    return Dinov2ForImageClassification(config).eval()


def save(model: nn.Module, folder: Path, shard: str = "20KB") -> Path:
    """The model in a folder, in shards of about that size."""
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def rewrite(folder: Path, values: Mapping[str, Tensor]) -> None:
    """One file with other tensors, in place of the shards."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(dict(values), folder / "model.safetensors", metadata={"format": "pt"})


def edit_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
