"""A model run block by block over all samples, so that the weights of each block are read once, not once a sample.

A decoder is a chain: what comes before the blocks, the blocks one after the other, what comes after them. The hidden
states of all samples are kept between two blocks, each sample at its own length; everything else is one sample's.

Whether the model is such a chain is not guessed: the first sample goes through the whole model as it is, and each block
must have been called with what the block before it gave, and otherwise like the first block.

Bytes: the weights twice (the first sample, then all), the hidden states once in and once out for each block.
Oracle: the model run as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .activations import InputSquares, evaluating
from .batches import Batch, runs_on

_HIDDEN = "hidden_states"  # the keyword of a block's input, where it is not its first argument


@dataclass
class _Call:
    """How the first block is called for one sample; ``hidden`` moves on from block to block."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        if args:
            return _Call(args[0], args[1:], dict(kwargs))
        others = {key: value for key, value in kwargs.items() if key != _HIDDEN}
        return _Call(kwargs[_HIDDEN], (), others)

    def through(self, block: nn.Module) -> None:
        self.hidden = _first(block(self.hidden, *self.args, **self.kwargs))


class _Reached(Exception):  # noqa: N818 (not an error: the first block has been reached)
    """Ends a run where the blocks begin."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call


class _StandIn(nn.Module):
    """Stands for all blocks; to whoever asks for its attributes it is the first of them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class _Entrance(_StandIn):
    """Takes down how the first block is called, and ends the run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(_Call.of(args, kwargs))


class _Exit(_StandIn):
    """Gives what the last block gave; from there on ``squares`` counts."""

    def __init__(self, block: nn.Module, result: Any, squares: InputSquares) -> None:
        super().__init__(block)
        self.__dict__.update(result=result, squares=squares)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.squares.paused = False
        return self.result


def run_by_blocks(model: nn.Module, batches: Sequence[Batch], squares: InputSquares) -> None:
    """Runs the model on all batches, block by block, while ``squares`` watches its layers.

    Args:
        model: a chain of blocks in one ``ModuleList``, such as the decoders of ``transformers``.
        batches: each is one sample, or samples of one length.

    Raises:
        ValueError: the model is not such a chain; says what was found.
    """
    blocks, name = chain(model)
    with evaluating(model), squares.watching():
        with squares.pause():
            as_tuple = _check_chain(model, blocks, name, batches[0])
        calls = []
        for batch in batches:
            try:
                with _replaced(blocks, _Entrance(blocks[0])):
                    model(*batch.args, **dict(batch.kwargs))
            except _Reached as reached:
                calls.append(reached.call)
        for block in blocks:
            for call in calls:
                call.through(block)
        for batch, call in zip(batches, calls, strict=True):
            result = (call.hidden,) if as_tuple else call.hidden
            with squares.pause(), _replaced(blocks, _Exit(blocks[0], result, squares)):  # what comes before was seen
                model(*batch.args, **dict(batch.kwargs))


def chain(model: nn.Module) -> tuple[nn.ModuleList, str]:
    """The model's blocks: of the ``ModuleList``s of modules of one kind, the one with most parameters.

    Raises:
        ValueError: there is none.
    """
    found: list[tuple[int, nn.ModuleList, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1:
            found.append((sum(p.numel() for p in module.parameters()), module, name))
    if not found:
        raise ValueError(f"blocks: wanted a chain of blocks in a ModuleList, {type(model).__name__} has none")
    _, blocks, name = max(found, key=lambda one: one[0])
    return blocks, name


def _check_chain(model: nn.Module, blocks: nn.ModuleList, name: str, batch: Batch) -> bool:
    """Runs the model as it is and compares each block's call with the one before it; whether blocks give tuples."""
    seen = 0  # blocks that have been called
    first: _Call | None = None
    given: Any = None  # by the block before

    def refuse(why: str) -> ValueError:
        return ValueError(f"blocks: {type(model).__name__}: wanted '{name}' to be a chain of blocks: {why}")

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen, first
        call = _Call.of(args, kwargs)
        if seen >= len(blocks) or block is not blocks[seen]:
            raise refuse("they are not run one after the other, once each")
        if first is None:
            first = call
        elif not _same(call.hidden, _first(given)):
            raise refuse(f"block {seen} does not take what block {seen - 1} gives")
        elif not _alike((call.args, call.kwargs), (first.args, first.kwargs)):
            raise refuse(f"block {seen} is called with other arguments than block 0")
        seen += 1

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal given
        given = output

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        with runs_on(batch, "blocks"):
            model(*batch.args, **dict(batch.kwargs))
    finally:
        for handle in handles:
            handle.remove()
    if seen < len(blocks):
        raise refuse(f"only {seen} of {len(blocks)} are run")
    return isinstance(given, tuple)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return a is b or bool(a == b)


def _alike(a: Any, b: Any) -> bool:
    (first, shape), (second, other) = tree_flatten(a), tree_flatten(b)
    return shape == other and all(_same(x, y) for x, y in zip(first, second, strict=True))


@contextmanager
def _replaced(blocks: nn.ModuleList, stand: nn.Module) -> Iterator[None]:
    """One module in place of all blocks."""
    own = blocks._modules
    blocks._modules = {"0": stand}
    try:
        yield
    finally:
        blocks._modules = own
