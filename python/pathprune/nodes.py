"""The node kinds of a path network: the whole vocabulary of path arithmetic.

A network is a DAG of units; a path runs from an input unit to an output unit, and its value is the product of the
weights on it. Every node is linear in the flow that enters it (products and norms hold their partner fixed), so one
forward and one backward sweep over the nodes sum over all paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Expression = Callable[[Tensors], Tensor]  # a constant of the model, computed from its parameters and buffers
WireMap = Callable[[Sequence[Tensor], float], Tensor]  # (inputs, power) -> output, linear in the inputs
Recorder = Callable[[Mapping[str, Any], Tensors], Any]  # (an operator's arguments by name, the tensors) -> its gate


@dataclass(frozen=True)
class Node:
    """What all nodes have: the nodes it reads, the shape of its value for one sample, and where it comes from."""

    inputs: tuple[int, ...]
    shape: torch.Size
    where: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Input(Node):
    """A source of flow: a model input, or the output of an embedding (whose indices carry no flow)."""

    name: str = "input"


@dataclass(frozen=True)
class Constant(Node):
    """A tensor at which paths begin when biases flow: class tokens, positional embeddings. ``|value|^power``."""

    value: Expression = field(kw_only=True)


@dataclass(frozen=True)
class Synapse(Node):
    """A weight tensor that multiplies the flow.

    ``form``: ``linear`` ([out, in]), ``linear_t`` ([in, out], Hugging Face Conv1D), ``conv``, ``conv_transpose``,
    ``experts`` ([experts, out, in]) and ``experts_t`` ([experts, in, out]) over a flow [1, experts, rows, in], or
    ``rows``: a convolution's weight read as [groups, out, in * kernel], its patches gathered by the wire before it.
    """

    weight: str = field(kw_only=True)
    form: str = field(default="linear", kw_only=True)
    stride: tuple[int, ...] = field(default=(), kw_only=True)
    padding: tuple[int, ...] = field(default=(), kw_only=True)
    dilation: tuple[int, ...] = field(default=(), kw_only=True)
    output_padding: tuple[int, ...] = field(default=(), kw_only=True)
    groups: int = field(default=1, kw_only=True)


@dataclass(frozen=True)
class Scale(Node):
    """A fixed diagonal: ``x * |factor|^power`` (frozen batch norm, elementwise constants).

    ``kind`` is ``batch_norm`` where a policy may switch it off, else ``constant``. ``recorded`` gives what the model
    multiplies with where data decide it (the weight of an expert), and paths take what it is where they do not.
    """

    factor: Expression = field(kw_only=True)
    kind: str = field(default="constant", kw_only=True)
    recorded: Recorder | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Shift(Node):
    """``x + |value|^power``: a bias as paths that begin at a constant unit. The identity where biases are dropped."""

    value: Expression = field(kw_only=True)
    kind: str = field(default="bias", kw_only=True)


@dataclass(frozen=True)
class Norm(Node):
    """A norm without running statistics: divides by the RMS of the entering flow over ``dims``, held fixed.

    ``groups``: channels are split into that many groups first (group norm); 0 means none. ``among``: multiplies by the
    RMS instead, over the mean of what it is along these axes (global response normalisation). ``recorded`` gives what
    the model itself multiplies with, ``1 / sigma``, over the factors of the scales behind; None where samples share it.
    """

    dims: tuple[int, ...] = field(kw_only=True)
    groups: int = field(default=0, kw_only=True)
    among: tuple[int, ...] = field(default=(), kw_only=True)
    recorded: Recorder | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Gate(Node):
    """An activation: the identity on path flow. ``name`` is the operator, for gates recorded from data.

    ``centre`` is none, but ``x - mean(x)`` as norms have it, over ``dims`` and ``groups`` as theirs: dropped by path
    flow, and kept by the flow of signed weights.
    """

    name: str = field(kw_only=True)
    dims: tuple[int, ...] = field(default=(), kw_only=True)
    groups: int = field(default=0, kw_only=True)

    @property
    def bends(self) -> bool:
        """Whether it is an activation."""
        return self.name != "centre"


@dataclass(frozen=True)
class Pool(Node):
    """Max or average pooling over the last ``len(kernel)`` axes."""

    kind: str = field(kw_only=True)  # "max" | "avg"
    kernel: tuple[int, ...] = field(kw_only=True)
    stride: tuple[int, ...] = field(kw_only=True)
    padding: tuple[int, ...] = field(kw_only=True)
    dilation: tuple[int, ...] = field(kw_only=True)
    ceil_mode: bool = field(default=False, kw_only=True)
    count_include_pad: bool = field(default=True, kw_only=True)
    divisor: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Reduce(Node):
    """A mean (its 1/n raised to the power) or a sum over ``dims``."""

    kind: str = field(kw_only=True)  # "mean" | "sum"
    dims: tuple[int, ...] = field(kw_only=True)
    keepdim: bool = field(kw_only=True)


@dataclass(frozen=True)
class Wire(Node):
    """Any other fixed linear map: reshape, permute, slice, cat, pad, expand, interpolate.

    ``concat_dim`` marks a concatenation, ``reshapes`` an operator that lays the same elements out anew.
    """

    apply: WireMap = field(kw_only=True)
    concat_dim: int | None = field(default=None, kw_only=True)
    reshapes: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Sum(Node):
    """A sum of flows: the end of a skip connection. Its inputs broadcast."""


@dataclass(frozen=True)
class Product(Node):
    """A product of two flows, each seeing the other held fixed, half to each: ``(a [b] + [a] b) / 2``.

    So both factors are scored and the flow is conserved. ``apply`` is the bilinear map: elementwise, or a matrix
    product. Where the first factor is a :class:`Softmax` of a policy's choice, that one says who gets what.
    ``recorded`` gives the two factors in the model; None where they are more than the flows that enter.
    """

    apply: Callable[[Tensor, Tensor], Tensor] = field(default=torch.mul, kw_only=True)
    recorded: Recorder | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Softmax(Node):
    """Attention weights: similarities S become ``P = S [P0 / S]``, with P0 what the model attends with where S is zero.

    P0 (``weights``, float64) is uniform where nothing is added to S, zero where a mask forbids, as position biases
    have it elsewhere: ``|P0|^power``. ``repeats``: how many positions along ``dim`` each one stands for.
    """

    weights: Expression = field(kw_only=True)
    dim: int = field(kw_only=True)
    repeats: Tensor | None = field(default=None, kw_only=True)


def keeps_order(wire: Wire, entering: torch.Size, power: float, device: torch.device) -> bool:
    """Whether a wire of one input gives its elements on in their order, so that it only gives them another shape."""
    if entering.numel() != wire.shape.numel():
        return False
    numbers = torch.arange(1.0, entering.numel() + 1, dtype=torch.float64, device=device)
    return torch.equal(wire.apply([numbers.reshape(entering)], power).reshape(-1), numbers)


def parts_of(x: Tensor, node: Norm | Gate, lead: int) -> tuple[Tensor, tuple[int, ...]]:
    """What a norm runs over: the flow, its channels by groups where it has such, and the axes."""
    if not node.groups:
        return x, tuple(lead + d for d in node.dims)
    parts = x.unflatten(lead + 1, (node.groups, -1))
    return parts, tuple(range(lead + 2, parts.dim()))


def geometry_of(node: Synapse) -> tuple[Any, ...]:
    """What ``torch.convolution`` takes after the bias."""
    padding = node.output_padding or (0,) * len(node.stride)
    return (node.stride, node.padding, node.dilation, node.form == "conv_transpose", padding, node.groups)
