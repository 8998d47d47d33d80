"""Networks of a cell space as ``PathNetwork``s, built by hand: nothing is exported.

Without an architecture it is the supernet: every operation on every edge, each behind a *switch* (a ``Scale`` of 1 with
``kind="switch"``), which ``routed_flow`` opens or shuts for each architecture.

Constant images give flows that differ near the border only. A 3x3 window widens that border by one position, so with at
most d windows in a row a cell's feature maps are computed on ``left + 1 + right`` positions in each axis: a smaller
image, exactly. That cuts the work of the first stage to a tenth (d = 1) or a quarter (d = 2).

Oracle: ``cell_space.CellNet`` exported, in float64; tiny spaces by enumeration of all paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import nodes as kinds
from .cell_space import EDGES, KERNELS, OPERATIONS, Architecture, CellNet, CellSpace, check_architecture
from .network import PathNetwork


def cell_network(
    space: CellSpace,
    tensors: Mapping[str, Tensor],
    architecture: Architecture | None = None,
    *,
    windows: int | None = None,
) -> PathNetwork:
    """A network of the space, or the supernet with its switches.

    Args:
        tensors: by name, as ``space.draw`` gives them or as a ``CellNet`` holds them; not copied.
        architecture: None: the supernet.
        windows: the most 3x3 windows on a path through a cell, of all architectures it will be asked about
            (``windows_of``); sources other than ones are then wrong. None: images of full size, which serve any source.

    Raises:
        ValueError: an operation or an edge the space does not have; a tensor is missing or of another shape.

    Example:
        >>> network = cell_network(space, space.draw(0), space[7812])
    """
    if architecture is not None:
        check_architecture(architecture)
    space.check_tensors(tensors, architecture)
    return _Builder(space, tensors, windows).network(architecture)


def network_of(model: CellNet) -> PathNetwork:
    """A module of the space as ``PathNetwork.from_module`` reads it, in a hundredth of the time; not touched."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    network = cell_network(model.space, tensors, model.architecture)
    network.model = model
    return network


@dataclass(frozen=True)
class _Image:
    """One axis of a feature map: ``left`` positions that differ, equal ones, ``right`` that differ, ``size`` in all."""

    size: int
    left: int
    right: int

    @property
    def kept(self) -> int:
        """Positions that are computed."""
        return min(self.left + 1 + self.right, self.size)

    def equal(self) -> int:
        """How many positions the first equal one stands for."""
        return self.size - self.left - self.right if self.kept < self.size else 1

    def spread(self, kept: int) -> Tensor:
        """For each of ``kept`` positions, the computed one it equals: more of the equal ones."""
        if self.kept == self.size:
            return torch.arange(self.size)
        positions = torch.arange(kept)
        behind = positions - (kept - self.kept)
        return torch.where(positions <= self.left, positions, behind.clamp(min=self.left))

    def widened(self, windows: int) -> _Image:
        return _Image(self.size, self.left + windows, self.right + windows)

    def halved(self) -> _Image:
        """After a 3x3 window of stride 2 and padding 1: window i sees 2 i - 1 to 2 i + 1."""
        last = (self.size - 2 - self.right) // 2
        return _Image(self.size // 2, (self.left + 2) // 2, self.size // 2 - 1 - last)


class _Builder:
    """Lays a network of the space, node by node."""

    def __init__(self, space: CellSpace, tensors: Mapping[str, Tensor], windows: int | None) -> None:
        self.space, self.tensors, self.windows = space, tensors, windows
        self.made = PathNetwork()

    def network(self, architecture: Architecture | None) -> PathNetwork:
        chosen = [OPERATIONS[1:]] * len(EDGES) if architecture is None else [(op,) for op in architecture]
        full = self.windows is None
        side = self.space.image
        axis = _Image(side, side, side) if full else _Image(side, 1, 1)  # behind the stem
        x = self.made.add_input(1, self.space.inputs, axis.kept, axis.kept)
        x = self._norm(self._convolution(x, "stem", padding=1), "stem_norm")
        for k, (kind, _, _) in enumerate(self.space.blocks()):
            if kind == "cell":
                wide = axis.widened(self.windows or 0)
                x = self._cell(self._spread(x, axis, wide.kept), f"blocks.{k}", chosen, architecture is None)
                axis = wide
            else:
                small = axis.halved().widened(1)
                x = self._reduction(self._spread(x, axis, 2 * small.kept), f"blocks.{k}")
                axis = small
        x = self._mean(self._norm(x, "last"), axis)
        head, bias = self.tensors["head.weight"], self.tensors["head.bias"]
        x = self.made.add_synapse(x, head, "head.weight")
        self.made.add_tensor("head.bias", bias)
        x = self.made.add_shift(x, lambda tensors: tensors["head.bias"])
        return self.made.set_outputs(x)

    def _spread(self, x: int, axis: _Image, kept: int) -> int:
        """More of the equal positions, so that the windows to come leave one."""
        if kept <= axis.kept:
            return x
        rows, before = axis.spread(kept), axis.kept
        positions = (rows[:, None] * before + rows).flatten()

        def spread(t: Tensor, power: float) -> Tensor:  # whole pixels are moved, so channels stay last
            pixels = t.permute(0, 2, 3, 1).flatten(1, 2).index_select(1, positions.to(t.device))
            return pixels.unflatten(1, (len(rows), -1)).permute(0, 3, 1, 2)

        return self._wire(x, spread)

    def _wire(self, x: int, apply: Callable[[Tensor, float], Tensor]) -> int:
        return self.made.add_wire((x,), lambda xs, p: apply(xs[0], p))

    def _mean(self, x: int, axis: _Image) -> int:
        counts = torch.ones(axis.kept, dtype=torch.float64)
        counts[min(axis.left, axis.kept - 1)] = axis.equal()
        area = axis.size**2

        def mean(t: Tensor, power: float) -> Tensor:
            n = counts.to(t)
            return (t * n * n[:, None]).sum((2, 3)) * (1.0 / area) ** power

        return self._wire(x, mean)

    def _convolution(self, x: int, name: str, **geometry: Any) -> int:
        weight = f"{name}.weight"
        return self.made.add_synapse(x, self.tensors[weight], weight, form="conv", **geometry)

    def _norm(self, x: int, name: str) -> int:
        """A frozen batch norm: its scale and its shift."""
        names = [f"{name}.{part}" for part in ("weight", "running_var", "bias", "running_mean")]
        for each in names:
            self.made.add_tensor(each, self.tensors[each])

        def factor(tensors: Mapping[str, Tensor]) -> Tensor:
            gamma, variance = (tensors[each] for each in names[:2])
            return (gamma / (variance + 1e-5).sqrt()).view(1, -1, 1, 1)

        def shift(tensors: Mapping[str, Tensor]) -> Tensor:
            beta, mean = (tensors[each] for each in names[2:])
            return beta.view(1, -1, 1, 1) - mean.view(1, -1, 1, 1) * factor(tensors)

        shape = self.made.nodes[x].shape
        x = self.made.add(kinds.Scale((x,), shape, factor=factor, kind="batch_norm", where=name))
        return self.made.add(kinds.Shift((x,), shape, value=shift, kind="batch_norm", where=name))

    def _relu_conv_norm(self, x: int, name: str, **geometry: Any) -> int:
        x = self.made.add_gate(x)
        return self._norm(self._convolution(x, f"{name}.conv", **geometry), f"{name}.norm")

    def _reduction(self, x: int, name: str) -> int:
        long = self._relu_conv_norm(x, f"{name}.first", stride=2, padding=1)
        long = self._relu_conv_norm(long, f"{name}.second", padding=1)
        short = self._convolution(self._pool(x, 2, 2, 0), f"{name}.shortcut")
        return self.made.add_sum(long, short)

    def _pool(self, x: int, kernel: int, stride: int, padding: int) -> int:
        *lead, side, _ = self.made.nodes[x].shape
        shape = torch.Size((*lead, side // stride, side // stride))
        two = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": 1}
        geometry: dict[str, Any] = {key: (value, value) for key, value in two.items()}
        return self.made.add(kinds.Pool((x,), shape, kind="avg", count_include_pad=False, **geometry))

    def _cell(self, x: int, name: str, chosen: Sequence[Sequence[str]], switched: bool) -> int:
        nodes: list[int | None] = [x]
        for target in range(1, 4):
            terms = []
            for (source, to), several in zip(EDGES, chosen, strict=True):
                begin = nodes[source] if to == target else None
                for operation in several:
                    if begin is None or operation == "none":
                        continue
                    edge = f"e{source}{target}"
                    flow = self._switch(begin, f"{edge}.{operation}") if switched else begin
                    terms.append(self._operation(flow, f"{name}.{edge}.{operation}", operation))
            nodes.append(None if not terms else terms[0] if len(terms) == 1 else self.made.add_sum(*terms))
        if nodes[-1] is None:
            return self._wire(x, lambda t, p: t * 0.0)
        return nodes[-1]

    def _switch(self, x: int, name: str) -> int:
        tensor = f"switch.{name}"
        self.made.add_tensor(tensor, torch.ones(()))
        shape = self.made.nodes[x].shape
        return self.made.add(
            kinds.Scale((x,), shape, factor=lambda tensors: tensors[tensor], kind="switch", where=name)
        )

    def _operation(self, x: int, name: str, operation: str) -> int:
        if operation in KERNELS:
            return self._relu_conv_norm(x, name, padding=KERNELS[operation] // 2)
        return self._pool(x, 3, 1, 1) if operation == "avg_pool_3x3" else x
