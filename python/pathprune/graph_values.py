"""Values of an exported graph: of which others they are views or parts, what constants are; what a network keeps."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from .exporting import operator_name
from .nodes import Expression


@dataclass(frozen=True)
class Forward:
    """The model's own computation for one sample, as it was exported in eval mode.

    Attributes:
        graph: the ATen graph.
        feeds: for each of its inputs: the name of a tensor of the network, a literal, or None for a model input.
        keywords: names of the model inputs that are given by keyword, in order.
        outputs: which of its outputs, counted as leaves, are those of the network.
        choosing: makes the graph anew in which experts are chosen as the model does: the same operators by the same
            names, of which those behind a choice have fewer rows.
    """

    graph: fx.GraphModule
    feeds: tuple[str | Tensor | None, ...]
    keywords: tuple[str, ...]
    outputs: tuple[int, ...] = ()
    choosing: Callable[[], fx.GraphModule] | None = None

    @property
    def example(self) -> list[Any]:
        """The model inputs it was exported with: tensors without values, and what else was given (None, numbers)."""
        entering = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        return [node.meta["val"] for node, feed in zip(entering, self.feeds, strict=True) if feed is None]


@dataclass(frozen=True)
class Place:
    """Where the model computes what a node records: the operator, and the value that enters an activation."""

    operator: str
    entering: str = ""


@dataclass(frozen=True)
class Choice:
    """Where the model's integer inputs choose a node's fixed numbers: the operator, its arguments as expressions."""

    operator: str
    arguments: Mapping[str, Expression]


@dataclass(frozen=True)
class ByRows:
    """A product of every row with the matrix of an expert of its own, as a product of each expert's with its rows.

    Attributes:
        flow: the operator that makes the rows.
        weight: name of the parameter.
        product: of rows, laid out as the operator has them, and the parameter.
    """

    flow: str
    weight: str
    product: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Routed:
    """A value that a router makes and a flow meets: rows are multiplied with it.

    Attributes:
        experts: name of the integers that say which expert each of its elements is for; None where it has an element
            for each expert in order.
        expression: these integers as the network has them, all experts for every row.
        axis: of them, along which experts are chosen.
    """

    experts: str | None = None
    expression: Expression | None = None
    axis: int = -1


def memory_of(node: Any) -> Any:
    """The graph node whose memory ``node`` is, or is a view of."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args:
        if node.target is python_operator.getitem:
            source, part = cast("tuple[fx.Node, int]", node.args)
            returns = getattr(getattr(source.target, "_schema", None), "returns", [])
            is_view = returns and returns[part if len(returns) > 1 else 0].alias_info is not None
        else:
            returns = getattr(getattr(node.target, "_schema", None), "returns", [])
            is_view = returns and returns[0].alias_info is not None
        if not is_view:
            break
        node = node.args[0]
    return node


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    bound: dict[str, Any] = {}
    for k, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        bound[argument.name] = given
    return bound


def exchanges_last_axes(node: fx.Node) -> bool | None:
    """Whether a value is another one with its last two axes exchanged, or with all in place; None for other values."""
    name, n = operator_name(node), len(node.meta["val"].shape)
    axes: Any = node.args[1:]
    order = list(range(n))
    if name == "mT" or (name in ("t", "numpy_T") and n == 2):
        axes = (-2, -1)
    if name == "permute":
        order = [axis % n for axis in axes[0]]
    elif name in ("transpose", "swapaxes", "mT", "t", "numpy_T") and len(axes) == 2:
        first, second = (axis % n for axis in axes)
        order[first], order[second] = order[second], order[first]
    else:
        return None
    kept = list(range(n))
    return None if order not in (kept, [*kept[:-2], n - 1, n - 2]) else order != kept


def part_of(node: fx.Node) -> tuple[Any, int, int] | None:
    """``(the value that consecutive slices are taken of, along which axis, where they begin)``."""
    if node.target is python_operator.getitem:
        source, part = cast("tuple[fx.Node, int]", node.args)
        if operator_name(source) not in ("split", "split_with_sizes", "chunk"):
            return None
        dim = arguments_of(source)["dim"] % len(node.meta["val"].shape)
        return source.args[0], dim, sum(value.shape[dim] for value in source.meta["val"][:part])
    if operator_name(node) != "slice" or arguments_of(node)["step"] != 1:
        return None
    bound, source = arguments_of(node), cast("fx.Node", node.args[0])
    start = bound["start"] or 0
    begin = max(start + source.meta["val"].shape[bound["dim"]], 0) if start < 0 else start
    return source, bound["dim"] % len(node.meta["val"].shape), begin


def evaluated(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What an operator makes of values, which stay as they are."""
    changes = getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    target: Any = _out_of_place(node.target) if changes else node.target

    def resolve(a: Any) -> Any:
        if not isinstance(a, fx.Node):
            return a
        return values[a].clone() if target is node.target and changes and isinstance(values[a], Tensor) else values[a]

    return target(*fx.node.map_aggregate(node.args, resolve), **fx.node.map_aggregate(node.kwargs, resolve))


def _out_of_place(target: Any) -> Any:
    """The same operator without a change of its arguments, where there is one."""
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").rstrip("_"), None)
    return getattr(packet, target._overloadname, target)


def always(value: Tensor) -> Expression:
    """The expression of a constant."""
    return lambda tensors: value


def tensor_of(name: str) -> Expression:
    """The expression of one of the model's tensors."""
    return lambda tensors: tensors[name]


def zeros_like_value(node: fx.Node) -> Tensor:
    """Zeros in the place of a value."""
    value = node.meta["val"]
    return torch.zeros(value.shape, dtype=value.dtype, device="cpu" if value.device.type == "meta" else value.device)
