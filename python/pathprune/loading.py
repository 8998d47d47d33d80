"""Models named on a command line: a factory in Python, or a Hugging Face folder. Nothing is downloaded."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .shards import Shard


def load_model(spec: str, state_dict: Path | None = None, seed: int = 0) -> nn.Module:
    """The model that ``spec`` names, in eval mode.

    Args:
        spec: ``package.module:factory``, where calling ``factory()`` gives a module (the working folder is
            searched too); or a folder with a Hugging Face ``config.json`` and perhaps safetensors weights.
        state_dict: weights to load: ``.safetensors``, or a ``torch.save`` file of tensors alone.
        seed: of ``torch.manual_seed`` before the model is made, for weights it draws.

    Raises:
        ValueError: the model or its weights cannot be loaded; says why in a line.
    """
    torch.manual_seed(seed)
    if os.path.isdir(spec):
        model = _from_folder(Path(spec))
    elif ":" in spec:
        model = _from_factory(spec)
    else:
        raise ValueError(f"--model: wanted package.module:factory or a folder with config.json, got '{spec}'")
    if state_dict is not None:
        _fill(model, state_dict)
    return model.eval()


def example_input(model: nn.Module, shape: str | None) -> Tensor | dict[str, Tensor]:
    """Ones of a shape such as ``1,3,224,224``; None: the image size a Hugging Face config gives.

    For a Hugging Face language model, token numbers of a shape such as ``1,16``; None: a single token. More tokens make
    more positions to compute, and beyond eight different ones scores that are written out.

    Raises:
        ValueError: not a shape, or none given and none known.
    """
    is_text = getattr(model, "main_input_name", None) == "input_ids"
    if shape is None and is_text:
        return {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    if shape is None:
        config = getattr(model, "config", None)
        channels = getattr(config, "num_channels", None)
        if channels is None:
            raise ValueError("--input-shape: wanted one, such as 1,3,224,224, got none")
        size = getattr(config, "image_size", None) or 224
        sizes = [1, int(channels), *(size if isinstance(size, (list, tuple)) else (size, size))]
    elif not re.fullmatch(r"\d+([,x]\d+)*", shape):
        raise ValueError(f"--input-shape: wanted numbers such as 1,3,224,224, got '{shape}'")
    else:
        sizes = [int(part) for part in re.split("[,x]", shape)]
        if is_text:
            return {"input_ids": torch.zeros(sizes, dtype=torch.int64)}
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.ones(sizes, dtype=next(floats, torch.float32))


def read_tokens(path: Path) -> list[dict[str, Tensor]]:
    """Token numbers from a safetensors file: one batch of one sample for each row of each tensor.

    Raises:
        ValueError: another kind of file, or tensors that are not integers [length] or [samples, length].
    """
    shard = Shard(path)
    samples: list[dict[str, Tensor]] = []
    for name in shard.entries:
        tokens = shard.tensor(name)
        integers = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
        if not integers or tokens.dim() not in (1, 2) or not tokens.numel():
            raise ValueError(
                f"--calibration: {path}: '{name}': wanted integers [length] or [samples, length], "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
        samples += [{"input_ids": row.long()[None]} for row in tokens.reshape(-1, tokens.shape[-1])]
    if not samples:
        raise ValueError(f"--calibration: {path}: wanted at least one tensor of tokens, got none")
    return samples


def _from_factory(spec: str) -> nn.Module:
    module_name, _, path = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"--model: '{spec}': {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: '{spec}': wanted a torch.nn.Module, got {type(model).__name__}")
    return model


def _from_folder(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model: '{folder}': wanted a folder with config.json, got none in it")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig, AutoModel
        from transformers import AutoModelForImageClassification as ForImages
    except ImportError as error:
        raise ValueError(
            "--model: a Hugging Face folder needs transformers: pip install 'pathprune[examples]'"
        ) from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = ForImages if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING else AutoModel
        if any(folder.glob("*.safetensors")):
            return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        return kind.from_config(config)
    except Exception as error:  # a wrong config fails in many ways
        raise ValueError(f"--model: '{folder}': {type(error).__name__}: {error}") from error


def _fill(model: nn.Module, path: Path) -> None:
    """Loads a state dict strictly."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:  # safetensors, pickle, torch: each has its own errors
        raise ValueError(f"--state-dict: '{path}': {type(error).__name__}: {error}") from error
