"""Tiny models of today's architectures, with random weights, by the classes of ``transformers``."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = SMALL | TOKENS | {"vocab_size": 50, "max_position_embeddings": 16}
DECODER = TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2}
NARROW = DECODER | {"head_dim": 4}
GPT = TOKENS | {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 16}
SEEN = SMALL | {"image_size": 32, "patch_size": 8}
STAGES = {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1]}
HEARD = {"conv_dim": [8, 8], "conv_kernel": [5, 3], "conv_stride": [3, 2], "num_feat_extract_layers": 2}
HEARD |= SMALL | TOKENS | {"vocab_size": 50, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ROUTED |= {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
DEEPSEEK = NARROW | LATENT | ROUTED | {"num_key_value_heads": 4}
BOTH_WAYS = {
    f"{side}_{key}": n
    for side in ("encoder", "decoder")
    for key, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
} | {"d_model": 16}
T5 = TOKENS | {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50}

WORDS = {"input_ids": torch.ones(1, 6, dtype=torch.long)}
PAIRS = WORDS | {"decoder_input_ids": torch.ones(1, 6, dtype=torch.long)}
IMAGE = {"pixel_values": torch.ones(1, 3, 32, 32)}
IMAGE_AND_WORDS = IMAGE | {"input_ids": torch.tensor([[1, *[3] * 16, 1]])}
SOUND = {"input_values": torch.ones(1, 60)}
SPECTRUM = {"input_features": torch.ones(1, 8, 20), "decoder_input_ids": torch.ones(1, 6, dtype=torch.long)}


@dataclass(frozen=True)
class Architecture:
    """A model of ``transformers``.

    Attributes:
        model: its class.
        config: the class of its configuration.
        options: of the configuration.
        inputs: by keyword.
        routes: whether data choose experts.
    """

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=lambda: WORDS)
    routes: bool = False


READ: dict[str, Architecture] = {
    "DeepSeek-V2": Architecture(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        DEEPSEEK | {"topk_method": "group_limited_greedy"},
        routes=True,
    ),
    "DeepSeek-V3": Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK, routes=True),
    "Llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        NARROW | {"num_local_experts": 4, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 2},
        routes=True,
    ),
    "GPT-OSS": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        NARROW | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
        routes=True,
    ),
    "Phi": Architecture("PhiForCausalLM", "PhiConfig", DECODER),
    "Phi-3": Architecture("Phi3ForCausalLM", "Phi3Config", DECODER),
    "Gemma": Architecture("GemmaForCausalLM", "GemmaConfig", NARROW),
    "Gemma 2": Architecture("Gemma2ForCausalLM", "Gemma2Config", NARROW | {"sliding_window": 4}),
    "Gemma 3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", NARROW | {"sliding_window": 4}),
    "Qwen2-MoE": Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        DECODER | EXPERTS | {"shared_expert_intermediate_size": 16},
        routes=True,
    ),
    "Qwen3-MoE": Architecture("Qwen3MoeForCausalLM", "Qwen3MoeConfig", NARROW | EXPERTS, routes=True),
    "OLMo": Architecture("OlmoForCausalLM", "OlmoConfig", DECODER | {"clip_qkv": 8.0}),
    "OLMo 2": Architecture("Olmo2ForCausalLM", "Olmo2Config", DECODER),
    "OLMoE": Architecture(
        "OlmoeForCausalLM", "OlmoeConfig", DECODER | {"num_experts": 4, "num_experts_per_tok": 2}, routes=True
    ),
    "Granite": Architecture("GraniteForCausalLM", "GraniteConfig", DECODER),
    "Granite-MoE": Architecture(
        "GraniteMoeForCausalLM", "GraniteMoeConfig", DECODER | {"num_local_experts": 4}, routes=True
    ),
    "StableLM": Architecture("StableLmForCausalLM", "StableLmConfig", DECODER),
    "Falcon": Architecture("FalconForCausalLM", "FalconConfig", TEXT),
    "Falcon, alibi": Architecture("FalconForCausalLM", "FalconConfig", TEXT | {"alibi": True}),
    "Bloom": Architecture("BloomForCausalLM", "BloomConfig", GPT | {"hidden_size": 16}),
    "OPT": Architecture("OPTForCausalLM", "OPTConfig", TEXT | {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "GPT-J": Architecture("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "GPT-Neo": Architecture(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        TEXT | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "GPT-BigCode": Architecture("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT),
    "MPT": Architecture(
        "MptForCausalLM",
        "MptConfig",
        TOKENS | {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 50, "max_seq_len": 16},
    ),
    "Cohere": Architecture("CohereForCausalLM", "CohereConfig", DECODER),
    "Cohere 2": Architecture("Cohere2ForCausalLM", "Cohere2Config", NARROW | {"sliding_window": 4}),
    "StarCoder 2": Architecture("Starcoder2ForCausalLM", "Starcoder2Config", DECODER),
    "GLM-4": Architecture("Glm4ForCausalLM", "Glm4Config", NARROW),
    "GLM-4-MoE": Architecture("Glm4MoeForCausalLM", "Glm4MoeConfig", NARROW | ROUTED, routes=True),
    "SmolLM 3": Architecture("SmolLM3ForCausalLM", "SmolLM3Config", DECODER),
    "EXAONE 4": Architecture("Exaone4ForCausalLM", "Exaone4Config", DECODER | {"sliding_window": 4}),
    "Nemotron": Architecture("NemotronForCausalLM", "NemotronConfig", DECODER),
    "Ernie 4.5": Architecture("Ernie4_5ForCausalLM", "Ernie4_5Config", NARROW),
    "Hunyuan": Architecture("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", NARROW),
    "LFM2": Architecture("Lfm2ForCausalLM", "Lfm2Config", DECODER | {"layer_types": ["conv", "full_attention"]}),
    "Mamba": Architecture("MambaForCausalLM", "MambaConfig", SMALL | TOKENS | {"state_size": 4, "vocab_size": 50}),
    "Mamba 2": Architecture(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        SMALL
        | TOKENS
        | {"state_size": 4, "vocab_size": 50, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    ),
    "RecurrentGemma": Architecture(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        NARROW | {"lru_width": 16, "block_types": ["recurrent", "attention"], "attention_window_size": 4},
    ),
    "T5": Architecture("T5ForConditionalGeneration", "T5Config", T5, PAIRS),
    "T5, gated": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        PAIRS,
    ),
    "BART": Architecture("BartForConditionalGeneration", "BartConfig", TEXT | BOTH_WAYS, PAIRS),
    "RoBERTa": Architecture("RobertaForSequenceClassification", "RobertaConfig", TEXT),
    "ELECTRA": Architecture("ElectraForSequenceClassification", "ElectraConfig", TEXT | {"embedding_size": 8}),
    "DistilBERT": Architecture(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        TEXT | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    "ALBERT": Architecture("AlbertForSequenceClassification", "AlbertConfig", TEXT | {"embedding_size": 8}),
    "MPNet": Architecture("MPNetForSequenceClassification", "MPNetConfig", TEXT),
    "DeBERTa": Architecture(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "ModernBERT": Architecture(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        TEXT | {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "DINOv2": Architecture("Dinov2ForImageClassification", "Dinov2Config", SEEN, IMAGE),
    "DINOv2, SwiGLU": Architecture(
        "Dinov2ForImageClassification", "Dinov2Config", SEEN | {"use_swiglu_ffn": True}, IMAGE
    ),
    "DINOv3": Architecture("DINOv3ViTModel", "DINOv3ViTConfig", SEEN, IMAGE),
    "SigLIP": Architecture("SiglipModel", "SiglipConfig", {"text_config": TEXT, "vision_config": SEEN}, WORDS | IMAGE),
    "BEiT": Architecture(
        "BeitForImageClassification", "BeitConfig", SEEN | {"use_relative_position_bias": True}, IMAGE
    ),
    "SegFormer": Architecture(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        STAGES
        | {"num_encoder_blocks": 2, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
        | {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
        IMAGE,
    ),
    "Swin v2": Architecture(
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        IMAGE,
    ),
    "MobileViT": Architecture(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8] * 6 + [16], "num_attention_heads": 2, "image_size": 64},
        {"pixel_values": torch.ones(1, 3, 64, 64)},
    ),
    "ResNet": Architecture("ResNetForImageClassification", "ResNetConfig", STAGES | {"embedding_size": 8}, IMAGE),
    "RegNet": Architecture(
        "RegNetForImageClassification", "RegNetConfig", STAGES | {"embedding_size": 8, "groups_width": 4}, IMAGE
    ),
    "EfficientNet": Architecture(
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
        IMAGE,
    ),
    "ConvNeXt V2": Architecture(
        "ConvNextV2ForImageClassification", "ConvNextV2Config", STAGES | {"num_stages": 2}, IMAGE
    ),
    "MobileNetV1": Architecture(
        "MobileNetV1ForImageClassification", "MobileNetV1Config", {"image_size": 32, "depth_multiplier": 0.25}, IMAGE
    ),
    "MobileNetV2": Architecture(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", {"image_size": 32, "depth_multiplier": 0.25}, IMAGE
    ),
    "PoolFormer": Architecture(
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        IMAGE,
    ),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        TEXT
        | BOTH_WAYS
        | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16, "decoder_start_token_id": 1},
        SPECTRUM,
    ),
    "Wav2Vec2": Architecture("Wav2Vec2ForCTC", "Wav2Vec2Config", HEARD, SOUND),
    "HuBERT": Architecture("HubertForCTC", "HubertConfig", HEARD, SOUND),
    "LLaVA": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": DECODER | {"model_type": "llama", "max_position_embeddings": 32},
            "vision_config": SEEN | {"model_type": "clip_vision_model", "projection_dim": 8},
            "image_token_index": 3,
        },
        IMAGE_AND_WORDS,
    ),
}

REFUSED: dict[str, tuple[Architecture, str, str]] = {  # name -> model, the operator that is refused, and its module
    "Phi-MoE": (
        Architecture("PhimoeForCausalLM", "PhimoeConfig", DECODER | {"num_local_experts": 4}),
        "max",
        "PhimoeTopKRouter",
    ),
    "Gemma 3n": (
        Architecture(
            "Gemma3nForCausalLM",
            "Gemma3nTextConfig",
            NARROW
            | {"sliding_window": 4, "intermediate_size": [32, 32], "num_kv_shared_layers": 0, "laurel_rank": 4}
            | {"vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2}
            | {"layer_types": ["sliding_attention", "full_attention"]},
        ),
        "mul",
        "Gemma3nTextModel",
    ),
    "MiniMax": (
        Architecture("MiniMaxForCausalLM", "MiniMaxConfig", NARROW | {"num_local_experts": 4}),
        "matmul",
        "MiniMaxLightningAttention",
    ),
    "Qwen3-Next": (
        Architecture(
            "Qwen3NextForCausalLM",
            "Qwen3NextConfig",
            NARROW
            | EXPERTS
            | {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 8}
            | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
            | {"linear_key_head_dim": 4, "linear_value_head_dim": 4},
        ),
        "rsqrt",
        "Qwen3NextGatedDeltaNet",
    ),
    "RWKV": (Architecture("RwkvForCausalLM", "RwkvConfig", SMALL | TOKENS | {"vocab_size": 50}), "maximum", "RwkvSelf"),
}


@functools.cache
def _made(architecture_id: str) -> nn.Module:
    architecture = READ[architecture_id] if architecture_id in READ else REFUSED[architecture_id][0]
    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(**architecture.options)
    return getattr(transformers, architecture.model)(config).eval()


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of its own, and an input by keyword."""
    architecture = READ[name] if name in READ else REFUSED[name][0]
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in architecture.inputs.items()}
    return copy.deepcopy(_made(name)).to(dtype), inputs
