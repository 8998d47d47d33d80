"""Data as pruners take it: a re-iterable of batches ``(x, y)`` or ``x``, streamed one batch at a time.

``x`` is a tensor, a tuple of positional or a dict of keyword arguments of the model; batches may differ in size.
Nothing here copies, concatenates or shuffles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Data = Iterable[Any]


@dataclass(frozen=True)
class Batch:
    """One batch: what the model is called with, and what the loss compares its output to."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any

    @property
    def size(self) -> int:
        """Samples in the batch: the length of its first tensor."""
        tensors = [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor) and a.dim()]
        return tensors[0].shape[0] if tensors else 0

    def part(self, begin: int, end: int) -> Batch:
        """Some of the samples: tensors whose first axis is the batch are cut, all else stays."""
        size = self.size

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[begin:end] if value.dim() and value.shape[0] == size else value
            if isinstance(value, Mapping):
                return {key: cut(item) for key, item in value.items()}
            return type(value)(cut(item) for item in value) if isinstance(value, (tuple, list)) else value

        return Batch(cut(self.args), cut(self.kwargs), cut(self.target))


def require_reiterable(data: Data, who: str) -> None:
    """Raises TypeError for what is no iterable, or can be read only once (a generator, an iterator)."""
    wanted = f"{who}: data: wanted a re-iterable of batches (a list, a DataLoader)"
    if isinstance(data, Tensor):
        raise TypeError(f"{wanted}, got a tensor; put it into a list: [x]")
    if isinstance(data, Iterator):  # not asked for one: a DataLoader would draw, and start its workers
        raise TypeError(f"{wanted}, got {type(data).__name__}, which can be read only once; use list(...)")
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(f"{wanted}, got {type(data).__name__}")


def stream(data: Data, who: str, device: torch.device | str = "cpu", needs_target: bool = False) -> Iterator[Batch]:
    """The batches of one pass over ``data``, tensors moved to ``device``.

    Raises:
        ValueError: no batches, an empty batch, NaN or infinite inputs, or no targets where they are needed.
    """
    empty = True
    for position, raw in enumerate(data):
        batch = _batch(raw, who, device)
        if batch.size == 0:
            raise ValueError(f"{who}: data: wanted at least one sample in batch {position}, got none")
        if needs_target and batch.target is None:
            raise ValueError(f"{who}: data: wanted batches (x, y), got x alone in batch {position}")
        for a in (*batch.args, *batch.kwargs.values()):
            if isinstance(a, Tensor) and a.is_floating_point() and not bool(torch.isfinite(a).all()):
                raise ValueError(f"{who}: data: wanted finite inputs, got NaN or infinite ones in batch {position}")
        empty = False
        yield batch
    if empty:
        raise ValueError(f"{who}: data: wanted at least one batch, got none")


def _batch(raw: Any, who: str, device: torch.device | str) -> Batch:
    x, target = raw, None
    if isinstance(raw, (tuple, list)):
        if len(raw) not in (1, 2):
            raise ValueError(f"{who}: data: wanted batches x or (x, y), got a {type(raw).__name__} of {len(raw)}")
        x, target = raw[0], raw[1] if len(raw) == 2 else None
    x, target = _moved(x, device), _moved(target, device)
    if isinstance(x, Mapping):
        return Batch((), x, target)
    if isinstance(x, (tuple, list)):
        return Batch(tuple(x), {}, target)
    if isinstance(x, Tensor):
        return Batch((x,), {}, target)
    raise TypeError(f"{who}: data: wanted tensors, tuples or dicts of them, got {type(x).__name__}")


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value


@contextmanager
def runs_on(batch: Batch, who: str, example: Sequence[Any] = ()) -> Iterator[None]:
    """Where a model runs on a batch, as it does on the inputs ``example``: what it raises is told as a mistake in data.

    Raises:
        ValueError: for any error but one of ours, and lack of memory; torch's own words are at its end.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # torch raises many types for a wrong shape, a model's own code any
        if str(error).startswith(f"{who}: "):
            raise
        wanted = "batches that the model takes"
        if example:
            wanted += f", such as example_input's {_described(example)}"
        got = _described((batch.args, dict(batch.kwargs)))
        why = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "without a message"
        raise ValueError(f"{who}: data: wanted {wanted}, got {got} ({type(error).__name__}: {why})") from error


def _described(value: Any) -> str:
    """Types and shapes of the tensors in it."""
    tensors = [a for a in tree_leaves(value) if isinstance(a, Tensor)]
    return ", ".join(f"{str(a.dtype).removeprefix('torch.')} {list(a.shape)}" for a in tensors) or "no tensor"


def class_balanced(data: Data, per_class: int, classes: int, batch: int = 128) -> list[tuple[Tensor, Tensor]]:
    """The first ``per_class`` samples of each class, in the order they come, as a list of batches.

    Args:
        data: batches ``(x, y)``, x a tensor, y int64 [n] in [0, classes); read no further than it takes.
        per_class: samples of each class.
        classes: how many there are.
        batch: samples in each batch of the result, the last apart.

    Raises:
        ValueError: labels out of range, or a class with too few samples; names it.

    Example:
        >>> masks = pp.prune(model, pp.SNIP(pp.class_balanced(loader, 10, 100)), density=0.05, example_input=x)
    """
    taken = [0] * classes
    samples: list[Tensor] = []
    labels: list[int] = []
    for piece in stream(data, "class_balanced", needs_target=True):
        for x, label in zip(piece.args[0], piece.target.tolist(), strict=True):
            if not 0 <= label < classes:
                raise ValueError(f"class_balanced: data: wanted labels in [0, {classes}), got {label}")
            if taken[label] < per_class:
                taken[label] += 1
                samples.append(x)
                labels.append(label)
        if len(samples) == per_class * classes:
            break
    if len(samples) < per_class * classes:
        short = min(range(classes), key=lambda k: taken[k])
        raise ValueError(f"class_balanced: wanted {per_class} samples of each class, got {taken[short]} of {short}")
    x, y = torch.stack(samples), torch.tensor(labels)
    return list(zip(x.split(batch), y.split(batch), strict=True))
