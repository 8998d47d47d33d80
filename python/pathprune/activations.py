"""How large the inputs of a model's layers are on data: ``||x_j||_2`` for every input of every layer and expert.

Sums of squares are taken some tokens at a time in the accumulate type and added up in float64, so that neither the
length of a sample nor their number is ever held. Only what enters a layer is looked at, never its weights.

Bytes: one forward pass of the model for each batch.
Oracle: the definition, from activations that are all kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batch, runs_on
from .checks import accumulate_dtype
from .expert_inputs import ExpertInputs, one_by_one
from .exporting import in_mode
from .layers import expert_matrices, is_transposed, modules_of
from .surroundings import device_of_caller

_TOKENS = 4096  # rows squared at once


class InputSquares:
    """Sums of squares of what enters each column of the named weights.

    Args:
        model: it is run by others, while :meth:`watching`.
        names: weight names, as ``named_parameters`` has them.
        who: for messages.
        used: called with a name when a layer that uses the weight has been run.

    Raises:
        ValueError: a weight of a layer whose inputs are not its weight's columns (a transposed convolution).
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], who: str, used: Callable[[str], None] = lambda name: None
    ) -> None:
        self.who, self._used = who, used
        known, self._modules = modules_of(model), {}
        for name in names:
            if name not in known:
                raise ValueError(f"{who}: '{name}': wanted a weight of a linear layer or convolution; exclude it")
            self._modules[name] = known[name]
            module = known[name][0]
            convolution = isinstance(module, nn.modules.conv._ConvNd)
            if convolution and (module.transposed or module.padding_mode != "zeros"):
                kind = "transposed" if module.transposed else f"padded by '{module.padding_mode}'"
                raise ValueError(f"{who}: '{name}': wanted a linear layer or a convolution, got one {kind}; exclude it")
        self.paused = False
        self.sums: dict[str, Tensor] = {}  # name -> float64 [K]; of a convolution [groups, K], of experts [experts, K]
        self._reached: dict[str, Tensor] = {}  # name -> bool [experts]: those that were given tokens

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While within, the model's runs are counted."""
        handles = []
        experts = {name: modules for name, modules in self._modules.items() if expert_matrices(modules[0])}
        matrices = {name: _weight(modules[0], name) for name, modules in experts.items()}
        try:
            for name, modules in self._modules.items():
                for module in modules:
                    observer = self._run_through(name) if name in experts else self._observer(name)
                    handles.append(module.register_forward_hook(observer))
            with one_by_one(chain(*experts.values())), ExpertInputs(matrices, self._add_rows, self.who):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """While within, runs do not count, unless ``paused`` is set to False on the way."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def _observer(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def observe(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not self.paused:
                x = inputs[0].detach()
                is_convolution = isinstance(module, nn.modules.conv._ConvNd)
                found = _of_patches(x, output, module) if is_convolution else _of_rows(x.reshape(-1, x.shape[-1]))
                self.sums[name] = found + self.sums[name] if name in self.sums else found
            self._used(name)

        return observe

    def _run_through(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, inputs, output: self._used(name)

    def _add_rows(self, name: str, expert: int, rows: Tensor) -> None:
        if self.paused:
            return
        found = _of_rows(rows)
        if not bool(found.any()):  # no token, or rows of zeros, as all experts at once are given for those of others
            return
        if name not in self.sums:
            count = len(_weight(self._modules[name][0], name))
            self.sums[name] = torch.zeros(count, rows.shape[1], dtype=torch.float64, device=rows.device)
            self._reached[name] = torch.zeros(count, dtype=torch.bool)
        self.sums[name][expert] += found
        self._reached[name][expert] = True

    def norms(self) -> dict[str, Tensor]:
        """name -> ``||x_j||_2`` in float64, [K], [groups, K] or [experts, K].

        An expert that no token reached has the same number for every column: the root mean square of the others'.

        Raises:
            ValueError: a layer that no batch has run, or whose inputs were NaN or infinite.
        """
        for name in self._modules:
            if name not in self.sums:
                raise ValueError(f"{self.who}: data: '{name}' was not run by any batch; exclude it")
            if not bool(self.sums[name].isfinite().all()):
                raise ValueError(f"{self.who}: data: the inputs of '{name}' are NaN or infinite")
        for name, reached in self._reached.items():
            self.sums[name][~reached] = self.sums[name][reached].mean()
        return {name: total.sqrt() for name, total in self.sums.items()}


def _weight(module: nn.Module, name: str) -> Tensor:
    found = getattr(module, name.rpartition(".")[2])
    assert isinstance(found, Tensor)
    return found


def _of_rows(x: Tensor) -> Tensor:
    """[tokens, K] -> float64 [K]."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for some in x.split(_TOKENS):
        total += some.to(accumulate_dtype(x.dtype)).square().sum(0).double()
    return total


def _of_patches(x: Tensor, output: Tensor, module: Any) -> Tensor:
    """Inputs of a convolution -> float64 [groups, K]: each entry of a kernel sees the positions it is laid on.

    It is the gradient of the sum of outputs, with squares for inputs, by a kernel of each group.
    """
    sizes = (module.groups, *module.weight.shape[1:])
    total = torch.zeros(module.groups, module.weight[0].numel(), dtype=torch.float64, device=x.device)
    for sample, made in zip(x.split(1), output.split(1), strict=True):
        squares = F.pad(sample.to(accumulate_dtype(x.dtype)).square(), module._reversed_padding_repeated_twice)
        ones = torch.ones(1, module.groups, *made.shape[2:], dtype=squares.dtype, device=x.device)
        found = torch.ops.aten.convolution_backward(
            ones,
            squares,
            squares.new_zeros(sizes),
            None,
            module.stride,
            [0] * len(module.stride),
            module.dilation,
            False,
            [0] * len(module.stride),
            module.groups,
            [False, True, False],
        )[1]
        total += found.reshape(module.groups, -1).double()
    return total


def run(model: nn.Module, batches: Iterable[Batch], who: str, example: Sequence[Any] = ()) -> None:
    """Runs the model on each batch, as it runs on the inputs ``example``.

    Raises:
        ValueError: the model does not take a batch.
    """
    with evaluating(model), device_of_caller():
        for batch in batches:
            with runs_on(batch, who, example):
                model(*batch.args, **dict(batch.kwargs))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no cache of keys and values; modes, random state and settings are put back."""
    config = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    try:
        if caches:
            config.use_cache = False  # type: ignore[union-attr]
        with in_mode(model), torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        if caches:
            config.use_cache = caches  # type: ignore[union-attr]


def as_columns(norms: Mapping[str, Tensor], module: nn.Module, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of a weight's columns [G, 1, K] and rows [G, 1, O] that make a score ``|w_ij| ||x_j||``."""
    own = norms[name].to(dtype)
    weight = _weight(module, name)
    groups = own.shape[0] if own.dim() == 2 else 1
    if is_transposed(module, name):
        return own.new_ones(groups, 1, weight.shape[-1]), own.reshape(groups, 1, -1)
    outputs = weight.shape[-2] if expert_matrices(module) else weight.shape[0] // groups
    return own.reshape(groups, 1, -1), own.new_ones(groups, 1, outputs)
