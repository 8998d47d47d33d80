"""``torch.export`` of an unmodified module for one sample, and the names of what it gives."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any, TextIO

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .surroundings import device_of_caller

ONE_AT_A_TIME = threading.RLock()  # torch.export keeps its state in globals, and its own tensors in the model's modules
_TOLD_BY_ERRORS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export")


class UnsupportedModelError(ValueError):
    """The model cannot be read as a path network; the message names module, operator and rule to add."""


@contextmanager
def in_mode(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Evaluation mode, or training mode, in every module; each one's own flag restored after, also on an exception."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = training
        yield
    finally:
        for module, own in flags:
            module.training = own


class _EveryChoice(TorchFunctionMode):
    """``topk`` gives all there are: where data chooses experts, paths take every choice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.topk, Tensor.topk):
            values, dim = args[0] if args else kwargs["input"], args[2] if len(args) > 2 else kwargs.get("dim", -1)
            rest = [dim, *args[3:]] if len(args) > 2 else []
            kwargs = {key: value for key, value in kwargs.items() if key not in ("input", "k")}
            return func(values, values.shape[dim], *rest, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _as_it_is_read(model: nn.Module, every_choice: bool) -> Iterator[None]:
    """For the time of the export: evaluation mode, nothing fused or cached, no control flow, maybe every expert."""
    settings = {"use_cache": False, "_experts_implementation": "batched_mm"}  # Hugging Face's
    configs = {id(c): c for c in (getattr(module, "config", None) for module in model.modules()) if c is not None}
    before = [(c, key, getattr(c, key)) for c in configs.values() for key in settings if getattr(c, key, None)]
    is_fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for config, key, _ in before:
            setattr(config, key, settings[key])
        choices = _EveryChoice() if every_choice else nullcontext()
        with in_mode(model), torch.no_grad(), device_of_caller(), choices:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
        for config, key, value in before:
            setattr(config, key, value)


def _require_same_device(model: nn.Module, given: Any) -> None:
    """Raises where the model is on a GPU and the example is not: torch's own words for it are long."""
    devices = {p.device for p in model.parameters()}
    if {device.type for device in devices} != {"cuda"}:
        return
    for a in tree_leaves(given):
        if isinstance(a, Tensor) and a.device not in devices:
            wanted = " or ".join(sorted(map(str, devices)))
            raise UnsupportedModelError(f"PathNetwork: example_input: wanted tensors on {wanted}, got {a.device}")


class _WithoutGraphs:
    """A stream without the graph that torch prints of a model that branches on values: thousands of lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._dropped = stream, False

    def write(self, text: str) -> int:
        ends_graph, self._dropped = self._dropped and text == "\n", "def forward(self, arg0_1" in text
        return len(text) if ends_graph or self._dropped else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch logs and prints of an exception to come, unless that was asked for (``TORCH_LOGS``)."""
    loggers = [logging.getLogger(name) for name in _TOLD_BY_ERRORS]
    silenced = [logger for logger in loggers if logger.level == logging.NOTSET and not logger.disabled]
    try:
        for logger in silenced:
            logger.disabled = True
        with redirect_stderr(_WithoutGraphs(sys.stderr)) if silenced and sys.stderr else nullcontext():
            yield
    finally:
        for logger in silenced:
            logger.disabled = False


def export(model: nn.Module, example_input: Any, *, every_choice: bool = True) -> torch.export.ExportedProgram:
    """``torch.export`` of the model in eval mode for one sample; mode, buffers, gradients and RNG state are untouched.

    Threads take turns.

    Args:
        every_choice: ``topk`` gives all there are, so that every expert is chosen; else what the model asks for.

    Raises:
        UnsupportedModelError: the model has data-dependent control flow, or does not accept ``example_input``.
    """
    args, kwargs = one_sample(example_input)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        got = "DistributedDataParallel: give its .module"
        raise UnsupportedModelError(f"PathNetwork: model: wanted the model itself, got {got}")
    _require_same_device(model, (args, kwargs))
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        as_read = _as_it_is_read(model, every_choice)
        with ONE_AT_A_TIME, _quietly(), torch.random.fork_rng(devices=devices), as_read:
            return _by_values(torch.export.export(model, args, kwargs, strict=False))
    except Exception as error:  # torch.export raises many types, user code any
        summary = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "without a message"
        shapes, given = (
            [tuple(a.shape) for a in tree_leaves(tree) if isinstance(a, Tensor)]
            for tree in ((args, kwargs), example_input)
        )
        sample = "" if shapes == given else f", a sample of {given} along the first axis"
        hint = "The forward must accept example_input and must not branch on values of tensors (torch.export)"
        if "need to register a pytree" in summary:
            summary = summary.split(". If this type")[0]
            hint = "torch.export.register_dataclass makes a dataclass of tensors known"
        raise UnsupportedModelError(
            f"PathNetwork: {type(model).__name__} could not be exported with an example_input of shape(s) "
            f"{shapes}{sample}: {type(error).__name__}: {summary}. {hint}"
        ) from error


def _by_values(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without writes into parts of tensors, which no value of the graph stands for."""
    aten = torch.ops.aten
    if not any(node.target is aten.copy_.default for node in program.graph.nodes):
        return program
    program = program.run_decompositions({})  # nothing is decomposed, and no operator in place
    for node in program.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):  # where the memory lay out allows it
            node.target = aten.reshape.default
        if node.target is aten.slice_scatter.default and len(node.args) > 4:  # torch.vmap wants ends that exist
            dim, _, end, *step = node.args[2:]
            node.args = (*node.args[:4], min(end, node.meta["val"].shape[dim]), *step)
    program.graph_module.recompile()
    return program


def one_sample(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_input`` (tensor, tuple, or kwargs dict) as args and kwargs, cut to batch size 1."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(example_input, Mapping):
        args, kwargs = (), dict(example_input)
    elif isinstance(example_input, Tensor):
        args, kwargs = (example_input,), {}
    elif isinstance(example_input, (tuple, list)):
        args, kwargs = tuple(example_input), {}
    else:
        raise TypeError(f"example_input: wanted a tensor, tuple or dict of kwargs, got {type(example_input).__name__}")
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    if not tensors:
        raise ValueError("example_input: wanted at least one tensor (torch.ones(1, ...) of a shape), got none")
    unread = next((a for a in tensors if a.layout != torch.strided or a.is_quantized), None)
    if unread is not None:
        raise ValueError(f"example_input: wanted dense tensors, got {unread.dtype} of layout {unread.layout}")
    batch = tensors[0].shape[0] if tensors[0].dim() else None
    if batch == 0:
        raise ValueError(f"example_input: wanted at least one sample, got shape {tuple(tensors[0].shape)}")

    def cut(a: Any) -> Any:
        is_batched = isinstance(a, Tensor) and a.dim() > 0 and a.shape[0] == batch
        return a[:1] if is_batched else a

    return tree_map(cut, args), tree_map(cut, kwargs)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every parameter and buffer name -> the name by which it is known: tied tensors are one, named first.

    Tensors are tied when they are one object, or show the same memory in the same way.
    """
    first: dict[Any, str] = {}
    names: dict[str, str] = {}
    for tensors in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in tensors:
            memory = (
                tensor.untyped_storage().data_ptr(),
                tensor.storage_offset(),
                tensor.shape,
                tensor.stride(),
            )
            names[name] = first.setdefault(memory if tensor.numel() else id(tensor), name)
    return names


def operator_name(node: fx.Node) -> str:
    """``aten.add_.Tensor`` -> ``add``."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", str(packet)).split(".")[-1]
    return name.rstrip("_") if not name.startswith("__") else name


def module_path(node: fx.Node) -> str:
    """The qualified name of the module the operator was called in, and its class."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "the model itself"
    path, kind = list(stack.values())[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"'{path}' ({kind.rsplit('.', 1)[-1]})"
