"""Finds and loads the compiled libraries.

Importing this never fails: what could not be loaded, and why, is kept.

Attributes:
    core: The extension module `_C` (build facts, the torch-free core for numpy), or None.
    cpu_loaded, cuda_loaded: Whether the ops have their compiled implementation on that device.
    cpu_error, cuda_error: Why not, in a line; None where it is loaded.

Environment:
    PATHPRUNE_DISABLE_BINARY=1: Load nothing, so that the plain-torch reference serves.
    PATHPRUNE_LIBRARY_DIR: Load from this folder and from nowhere else (a build with sanitizers, say).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

DISABLED = os.environ.get("PATHPRUNE_DISABLE_BINARY", "") not in ("", "0")


def _folders() -> list[Path]:
    """Where the libraries may lie: an editable install has the package in two places."""
    override = os.environ.get("PATHPRUNE_LIBRARY_DIR")
    if override:
        return [Path(override)]
    package = sys.modules[__package__ or "pathprune"]
    return [Path(entry) for entry in package.__path__]


def _find(*names: str) -> Path | None:
    candidates = (folder / name for folder in _folders() for name in names)
    return next((path for path in candidates if path.is_file()), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _load_core() -> ModuleType | None:
    path = None if DISABLED else _find(*("_C" + suffix for suffix in EXTENSION_SUFFIXES))
    if path is None:
        return None
    name = f"{__package__}._C"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    sys.modules[name] = module
    vars(sys.modules[__package__ or "pathprune"])["_C"] = module  # as an import statement would
    return module


def _load_ops(name: str) -> str | None:
    """Loads lib`name`.so; returns why it could not, or None."""
    if DISABLED:
        return "switched off by PATHPRUNE_DISABLE_BINARY"
    path = _find(f"lib{name}.so")
    if path is None:
        return f"lib{name}.so was not built"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return _first_line(error)
    return None


def _load_cuda_ops() -> str | None:
    if not DISABLED and torch.version.cuda is None:
        return "this torch is built without CUDA"
    if cpu_error is not None and not DISABLED:
        return f"the CPU library is not loaded: {cpu_error}"
    return _load_ops("pathprune_cuda")


core: ModuleType | None = _load_core()
cpu_error: str | None = _load_ops("pathprune_cpu")
cuda_error: str | None = _load_cuda_ops()
cpu_loaded: bool = cpu_error is None
cuda_loaded: bool = cuda_error is None

if cpu_error is not None and not DISABLED:
    warnings.warn(f"pathprune: {cpu_error}: plain torch serves in place of the compiled ops, slowly", stacklevel=1)
