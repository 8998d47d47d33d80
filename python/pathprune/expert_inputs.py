"""What enters each expert of a mixture: the rows that are multiplied by its matrix.

Experts are slices of one parameter, not modules, so no hook sees their inputs. While watched, they are run one after
the other where ``transformers`` has such a way (its eager one), and every product of rows with a matrix that lies in
the parameter's memory, or with all of them, is taken down for the expert whose matrix it is: what data routes to it,
whatever the module around it looks like.

Bytes: none beyond the run.
Oracle: the definition, from the routing and the activations.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_MATRIX = {  # products of rows with a matrix -> the matrix's name among the arguments; it is the second of them
    F.linear: "weight",
    torch.matmul: "other",
    Tensor.matmul: "other",
    Tensor.__matmul__: "other",
    torch.mm: "mat2",
    Tensor.mm: "mat2",
    torch.bmm: "mat2",
    Tensor.bmm: "mat2",
}


class ExpertInputs(TorchFunctionMode):
    """While active, tells which rows are multiplied by which expert's matrix.

    Args:
        parameters: name -> [experts, out, in] or [experts, in, out].
        seen: called with name, expert and rows [tokens, in].
        who: for messages.

    Raises:
        ValueError: a product with a part of an expert's matrix; parameters on the meta device.
    """

    def __init__(self, parameters: Mapping[str, Tensor], seen: Callable[[str, int, Tensor], None], who: str) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            if parameter.is_meta:
                raise ValueError(f"{who}: '{name}': wanted experts in memory, got them offloaded; exclude it")
        self._seen, self._who = seen, who
        self._known = sorted((p.data_ptr(), name, p) for name, p in parameters.items())
        self._begins = [begin for begin, _, _ in self._known]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if function in _MATRIX:
            x = args[0] if args else named["input"]
            matrix = args[1] if len(args) > 1 else named[_MATRIX[function]]
            if isinstance(matrix, Tensor) and matrix.layout is torch.strided:
                self._look(x, matrix)
        return function(*args, **named)

    def _look(self, x: Tensor, matrix: Tensor) -> None:
        place = bisect.bisect_right(self._begins, matrix.data_ptr()) - 1
        if place < 0:
            return
        begin, name, parameter = self._known[place]
        if matrix.dim() == 3 and matrix.data_ptr() == begin and _is_all_of(matrix, parameter):
            count = torch.broadcast_shapes(x.shape[:-2], (len(parameter),))
            rows = x.detach().expand(*count, *x.shape[-2:]).movedim(-3, 0)
            for expert, own in enumerate(rows):
                self._seen(name, expert, own.reshape(-1, x.shape[-1]))
            return
        item = parameter.element_size()
        expert, rest = divmod(matrix.data_ptr() - begin, max(parameter[0].numel() * item, 1))
        if expert >= len(parameter):
            return
        if rest or not _is_all_of(matrix, parameter[0]):
            raise ValueError(
                f"{self._who}: '{name}': wanted experts' matrices {list(parameter.shape[1:])} used whole, "
                f"got a product with {list(matrix.shape)} of one; exclude it"
            )
        self._seen(name, expert, x.detach().reshape(-1, x.shape[-1]))


def _is_all_of(matrix: Tensor, parameter: Tensor) -> bool:
    """Whether it has the parameter's elements, as they are or with the last two axes exchanged."""
    ways = ((own.shape, own.stride()) for own in (parameter, parameter.mT))
    return (matrix.shape, matrix.stride()) in ways


@contextmanager
def one_by_one(experts: Iterable[nn.Module]) -> Iterator[None]:
    """While within, these modules run their experts one after the other if they can; settings are put back."""
    setting = "_experts_implementation"
    configs = {id(module.config): module.config for module in experts if hasattr(module, "config")}
    before: list[tuple[Any, Any]] = [(config, getattr(config, setting, None)) for config in configs.values()]
    try:
        for config, value in before:
            if value is not None:
                setattr(config, setting, "eager")
        yield
    finally:
        for config, value in before:
            if value is not None:
                setattr(config, setting, value)
