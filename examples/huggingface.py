"""Prunes a Hugging Face model in ten lines; what is saved loads as an ordinary checkpoint.

python examples/huggingface.py [--density 0.05] [--rounds 100] [--small]

The weights are random (pruning at initialization needs no download); a folder of yours is loaded by
``ResNetForImageClassification.from_pretrained(folder)`` in place of the first line.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import pathprune as pp


def pruned_checkpoint(config: ResNetConfig, size: int, density: float, rounds: int, folder: Path) -> pp.Masks:
    """Writes a pruned checkpoint and its masks into a folder."""
    model = ResNetForImageClassification(config)
    example = {"pixel_values": torch.ones(1, 3, size, size)}
    masks = pp.prune(model, pp.SynFlow(rounds=rounds), density=density, example_input=example)
    print(masks.report())
    masks.save(folder / "masks.safetensors")
    masks.apply_(model).save_pretrained(folder)
    again = ResNetForImageClassification.from_pretrained(folder)
    assert pp.Masks.from_model(again, masks) == pp.Masks.load(folder / "masks.safetensors")
    return masks


def main(arguments: list[str] | None = None) -> pp.Masks:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--small", action="store_true", help="a small ResNet at 32x32 in place of ResNet-50 at 224x224")
    parser.add_argument("--out", type=Path, help="folder for checkpoint and masks; default: a temporary one")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    small = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    config = ResNetConfig(**(small if options.small else {}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        return pruned_checkpoint(config, 32 if options.small else 224, options.density, options.rounds, folder)


if __name__ == "__main__":
    main()
