"""A GPU that is pretended: tensors that say they lie on `cuda:0` and are computed on the CPU.

For the Python above the kernels, where there is no GPU. As on a GPU, an operator refuses tensors of two devices, a
generator of the CPU, and numpy; a result lies where its arguments do. What a number on its own may do there it may do
here: a 0-dim tensor of the CPU goes into elementwise operators. `torch.cuda` says that there is a GPU.

`PATHPRUNE_PRETEND_CUDA=1 pytest -m cuda` runs the tests for a GPU on it, the ops by the CPU library. It shows wrong
devices. It shows nothing of the kernels, nor of streams and time: tests/emulated_cuda and a GPU do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything of torch.cuda is replaced: it looks for each function by name
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# What takes tensors of two devices on a GPU too.
_BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Of several tensors none of which may be a number of the CPU.
_STRICT = {
    "cat",
    "stack",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "scatter",
    "scatter_add",
    "index_add",
    "gather",
    "searchsorted",
}


class Pretended(torch.Tensor):
    """A tensor on the pretended GPU; `inner` is the one on the CPU. To torch's own C++ it is one of `meta`."""

    inner: Tensor
    device = GPU
    is_cuda, is_cpu, is_meta = True, False, False

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made: Pretended = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
        )
        made.inner = inner
        return made

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, tensor: Pretended) -> None:
        torch.Tensor.data.__set__(self, tensor)  # type: ignore[attr-defined]
        self.inner = tensor.inner

    def __deepcopy__(self, known: dict[int, Any]) -> Any:
        if id(self) not in known:
            copied = Pretended(self.inner.detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            known[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return known[id(self)]

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.detach().inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{torch.Tensor.__repr__(self.inner)} on {GPU}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _Mode():
            return func(*args, **(kwargs or {}))


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _has_meta(tensors: list[Tensor]) -> bool:
    return any(t.is_meta for t in tensors)


def _refuse(func: Any, tensors: list[Tensor]) -> None:
    """As a GPU does, where tensors lie on two devices."""
    here = [t for t in tensors if not isinstance(t, Pretended) and t.device.type == "cpu"]
    name = func._schema.name.split("::")[1].rstrip("_")
    strict = func.namespace != "aten" or name in _STRICT
    if func in _BETWEEN_DEVICES or (func in _INDEXING and isinstance(tensors[0], Pretended)):
        return
    if any(strict or t.dim() > 0 for t in here):
        shapes = [(tuple(t.shape), str(t.device)) for t in tensors]
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, got {shapes}")


class _Mode(TorchDispatchMode):
    """Makes tensors on the pretended GPU, and computes with them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given, form = tree_flatten((args, kwargs))
        tensors = [value for value in given if isinstance(value, Tensor)]
        pretended = any(isinstance(t, Pretended) for t in tensors)
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == "meta" and not (_Calls.wants_meta or _has_meta(tensors)):
            asked = GPU  # the device that C++ sees pretended tensors on
        if not pretended and not _is_gpu(asked):
            return func(*args, **kwargs)
        if pretended and _has_meta(tensors):
            raise RuntimeError(f"{func}: a meta tensor among those of a GPU")
        if pretended:
            _refuse(func, tensors)
        on_gpu = _is_gpu(asked) if asked is not None else pretended
        if on_gpu and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({func})")
        inner = [value.inner if isinstance(value, Pretended) else value for value in given]
        inner_args, inner_kwargs = tree_unflatten(inner, form)
        if asked is not None:
            inner_kwargs["device"] = torch.device("cpu")
            inner_kwargs.pop("pin_memory", None)
        if func is aten._to_copy.default and asked is not None and _is_gpu(asked) != pretended:
            inner_args = (inner_args[0].clone(),)  # another device is another tensor
        made = func(*inner_args, **inner_kwargs)
        if not on_gpu and func is not aten.copy_.default:
            return made
        same = {id(value.inner): value for value in given if isinstance(value, Pretended)}

        def outside(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, Pretended):
                return value
            return same[id(value)] if id(value) in same else Pretended(value)

        if func is aten.copy_.default:
            return args[0]
        out = tree_map(outside, made)
        return return_and_correct_aliasing(func, args, kwargs, out) if pretended else out


class _Calls(TorchFunctionMode):
    """What torch does with a device below all dispatch, which a build without CUDA cannot."""

    wants_meta = False  # the call is for tensors that are of the device `meta`

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0].to(GPU)
        if func is Tensor.numpy and isinstance(args[0], Pretended):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in (Tensor.__setitem__, Tensor.__getitem__) and isinstance(args[0], Pretended):
            if isinstance(args[1], list):
                args = (args[0], torch.tensor(args[1]), *args[2:])
            if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
                args = (*args[:2], Pretended(torch.tensor(args[2], dtype=args[0].dtype)))
        if func is Tensor.to:
            args = tuple(GPU if isinstance(v, (str, torch.device)) and _is_gpu(v) else v for v in args)
        if func is Tensor.new_tensor and isinstance(args[0], Pretended):
            kwargs = {"device": args[0].device, "dtype": args[0].dtype, **kwargs}
            return torch.tensor(*args[1:], **kwargs)
        device = kwargs.get("device")
        if device is not None and _is_gpu(device):
            if func in (torch.tensor, torch.as_tensor):  # brought to a GPU below all modes
                wants_grad = kwargs.pop("requires_grad", False)
                tensor = func(*args, **{**kwargs, "device": None}).to(GPU)
                return tensor.requires_grad_() if wants_grad else tensor
            kwargs["device"] = GPU
        asked = device if device is not None else args[1] if func is Tensor.to and len(args) > 1 else None
        # Inside of vmap all tensors are torch's own, and say as it does where the pretended ones lie.
        in_vmap = torch._C._functorch.peek_interpreter_stack() is not None
        if isinstance(asked, (str, torch.device)) and torch.device(asked).type == "meta" and not in_vmap:
            with mock.patch.object(_Calls, "wants_meta", True):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class _Event:
    def __init__(self, **_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 1.0


def _export_on_the_cpu(export: Callable[..., Any]) -> Callable[..., Any]:
    """torch.export knows no tensors of ours: it sees the model on the CPU, and its program is brought back."""

    def inner_of(value: Any) -> Any:
        return value.inner if isinstance(value, Pretended) else value

    def exported(model: torch.nn.Module, args: Any, kwargs: Any = None, **options: Any) -> Any:
        tensors = [*model.parameters(), *model.buffers(), *tree_flatten((args, kwargs))[0]]
        if not any(isinstance(t, Pretended) for t in tensors):
            return export(model, args, kwargs, **options)
        if not all(isinstance(t, Pretended) for t in tensors if isinstance(t, Tensor)):
            raise RuntimeError("torch.export: Unhandled FakeTensor Device Propagation: tensors of two devices")
        held = [
            (place, name, tensor)
            for module in model.modules()
            for place in (module._parameters, module._buffers)
            for name, tensor in place.items()
            if isinstance(tensor, Pretended)
        ]
        try:
            for place, name, tensor in held:
                plain = tensor.inner.detach()
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                place[name] = torch.nn.Parameter(plain, tensor.requires_grad) if is_parameter else plain
            with torch.utils._python_dispatch._disable_current_modes():
                program = export(model, tree_map(inner_of, args), tree_map(inner_of, kwargs), **options)
        finally:
            for place, name, tensor in held:
                place[name] = tensor
        ours = dict([*model.named_parameters(), *model.named_buffers()])
        for kept in (program._state_dict, program._constants):
            for name, tensor in kept.items():
                kept[name] = ours.get(name, Pretended(tensor.detach()) if isinstance(tensor, Tensor) else tensor)
        for graph in (m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
            for node in graph.nodes:
                node.args, node.kwargs = tree_map(_brought, (node.args, node.kwargs))
                for value in tree_flatten(node.meta.get("val"))[0]:
                    if isinstance(value, FakeTensor):
                        value.fake_device = GPU
        program.graph_module.recompile()
        return program

    return exported


def _brought(value: Any) -> Any:
    """A device of an exported program, as it would be had the model lain on the GPU."""
    return GPU if isinstance(value, torch.device) and value.type == "cpu" else value


@contextlib.contextmanager
def pretended_cuda() -> Any:
    """As if there were a GPU."""
    nothing: Any = lambda *_, **__: None  # noqa: E731
    state = torch.zeros(16, dtype=torch.uint8)
    given: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "a pretended GPU",
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: state,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "Event": _Event,
        "device": lambda *_: contextlib.nullcontext(),
        **dict.fromkeys(
            ("_lazy_init", "synchronize", "manual_seed", "manual_seed_all", "set_rng_state", "empty_cache"), nothing
        ),
        "reset_peak_memory_stats": nothing,
    }
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with contextlib.ExitStack() as stack:
            for name, value in given.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(mock.patch("torch.export.export", _export_on_the_cpu(torch.export.export)))
            stack.enter_context(_Calls())
            stack.enter_context(_Mode())
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.__future__.set_overwrite_module_params_on_conversion(before)
