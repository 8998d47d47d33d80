"""Makes a Hugging Face folder of Llama's or Mixtral's shape, its random weights with statistics of a trained model.

Weights of a layer are Gaussian times a log-normal scale for each output and each input (a few inputs ten times larger),
about 1 / sqrt(fan in) in all. Shards are streamed: memory stays at a few tens of MB whatever the size.

    python benchmarks/synthetic_checkpoint.py /tmp/llama-1b --shape 1.1b
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pathprune._mask_io import write_atomically

ROWS_AT_ONCE = 1 << 22  # weights in one piece


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; with experts, of a Mixtral, each of them of its own in the files."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    experts: int = 0


SHAPES = {
    "tiny": Shape(64, 176, 2, 4, 2, 256),
    "0.3b": Shape(1024, 2816, 20, 16, 4, 32000),
    "1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "tiny-experts": Shape(64, 176, 2, 4, 2, 256, 4),
    "1b-experts": Shape(1024, 2816, 13, 16, 4, 32000, 8),
}


def tensors_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> sizes, as files of ``LlamaForCausalLM`` or ``MixtralForCausalLM`` have them."""
    head = shape.hidden // shape.heads
    matrices = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (head * shape.kv_heads, shape.hidden),
        "self_attn.v_proj": (head * shape.kv_heads, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "input_layernorm": (shape.hidden,),
        "post_attention_layernorm": (shape.hidden,),
    }
    inward, outward = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    if shape.experts:
        matrices["block_sparse_moe.gate"] = (shape.experts, shape.hidden)
        for k in range(shape.experts):
            matrices |= {f"block_sparse_moe.experts.{k}.{name}": inward for name in ("w1", "w3")}
            matrices[f"block_sparse_moe.experts.{k}.w2"] = outward
    else:
        matrices |= {"mlp.gate_proj": inward, "mlp.up_proj": inward, "mlp.down_proj": outward}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        found |= {f"model.layers.{layer}.{name}.weight": sizes for name, sizes in matrices.items()}
    return found | {
        "model.norm.weight": (shape.hidden,),
        "lm_head.weight": (shape.vocabulary, shape.hidden),
    }


def values(sizes: tuple[int, ...], generator: torch.Generator) -> Iterator[Tensor]:
    """The values of a tensor in bfloat16, some rows at a time."""
    if len(sizes) == 1:
        yield torch.empty(sizes).normal_(0.6, 0.15, generator=generator).bfloat16()
        return
    rows, columns = sizes
    across = torch.empty(columns).normal_(0, 0.3, generator=generator).exp()
    across[torch.randperm(columns, generator=generator)[: max(columns // 500, 1)]] *= 10
    step = max(1, ROWS_AT_ONCE // columns)
    for first in range(0, rows, step):
        piece = torch.empty(min(step, rows - first), columns).normal_(generator=generator)
        along = torch.empty(len(piece), 1).normal_(0, 0.4, generator=generator).exp()
        yield piece.mul_(across).mul_(along).div_(math.sqrt(columns)).bfloat16()


def write(folder: Path, shape: Shape, shard_bytes: int = 500_000_000, seed: int = 0) -> int:
    """Writes the folder; returns the bytes of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, sizes in tensors_of(shape).items():
        if shards[-1] and _bytes(shards[-1]) + 2 * math.prod(sizes) > shard_bytes:
            shards.append({})
        shards[-1][name] = sizes
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for k, tensors in enumerate(shards, 1):
        file = f"model-{k:05}-of-{len(shards):05}.safetensors"
        write_atomically(folder / file, _file(tensors, generator))
        weight_map |= dict.fromkeys(tensors, file)
    total = sum(_bytes(tensors) for tensors in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = {
        "architectures": ["MixtralForCausalLM" if shape.experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if shape.experts else "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    if shape.experts:
        config["num_local_experts"] = shape.experts
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return total


def _bytes(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * math.prod(sizes) for sizes in tensors.values())


def _file(tensors: dict[str, tuple[int, ...]], generator: torch.Generator) -> Iterator[bytes]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, sizes in tensors.items():
        end = offset + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    yield len(head).to_bytes(8, "little") + head
    for sizes in tensors.values():
        for piece in values(sizes, generator):
            yield piece.view(torch.uint8).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--shard-bytes", type=int, default=500_000_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    total = write(given.folder, SHAPES[given.shape], given.shard_bytes, given.seed)
    print(f"{given.folder}: {total / 1e9:.2f} GB of bfloat16 weights")


if __name__ == "__main__":
    main()
