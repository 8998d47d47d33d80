"""What surrounds a call: torch's modes that would change what ordinary operators do, put aside for its time.

Flows, walks and kernels need tensors that autograd knows, in the precision that is written, on the CPU unless said
otherwise. ``torch.inference_mode``, ``torch.no_grad``, ``torch.autocast`` and a default device (``torch.device`` as a
context, ``torch.set_default_device``) take these away; whether a caller happens to be in one must not change a score.
The modes belong to the thread, and come back with the return, also by an exception.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

_DEFAULT_DEVICE: ContextVar[torch.device | None] = ContextVar("default device of the caller", default=None)

Undisturbed = TypeVar("Undisturbed", bound=Callable[..., Any])


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """No inference mode, no autocast, the CPU as the default device."""
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        default = torch.get_default_device()
        if default.type != "cpu":
            token = _DEFAULT_DEVICE.set(default)
            modes.callback(_DEFAULT_DEVICE.reset, token)
            modes.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def device_of_caller() -> Iterator[None]:
    """For the caller's own code, a model's forward: the default device that it was written for."""
    default = _DEFAULT_DEVICE.get()
    with torch.device(default) if default is not None else contextlib.nullcontext():
        yield


def undisturbed(function: Undisturbed) -> Undisturbed:
    """The function (or generator function, or a class with its public methods), run under :func:`plain`."""
    if inspect.isclass(function):
        for name, member in list(vars(function).items()):
            if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_")):
                setattr(function, name, undisturbed(member))
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with plain():
            return function(*args, **kwargs)

    @functools.wraps(function)
    def run_stepwise(*args: Any, **kwargs: Any) -> Iterator[Any]:
        steps = function(*args, **kwargs)
        while True:
            with plain():  # a mode may not stay on while the caller has its turn
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step

    return run_stepwise if inspect.isgeneratorfunction(function) else run  # type: ignore[return-value]
