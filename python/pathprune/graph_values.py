"""Values of an exported graph: whose memory they are, and what they are where the model's tensors alone decide."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from .nodes import Expression


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


def evaluated(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What an operator makes of values, which stay as they are."""
    changes = getattr(getattr(node.target, "_schema", None), "is_mutable", False)

    def resolve(a: Any) -> Any:
        if not isinstance(a, fx.Node):
            return a
        return values[a].clone() if changes and isinstance(values[a], Tensor) else values[a]

    return node.target(  # type: ignore[operator]
        *fx.node.map_aggregate(node.args, resolve), **fx.node.map_aggregate(node.kwargs, resolve)
    )


def always(value: Tensor) -> Expression:
    return lambda tensors: value


def tensor_of(name: str) -> Expression:
    return lambda tensors: tensors[name]


def zeros_like_value(node: fx.Node) -> Tensor:
    """Zeros in the place of a value."""
    value = node.meta["val"]
    return torch.zeros(value.shape, dtype=value.dtype, device="cpu" if value.device.type == "meta" else value.device)
