"""The cell search space of NAS-Bench-201 (Dong and Yang, ICLR 2020), from its public definition.

A cell is a complete DAG of four nodes; each of its six edges carries one of five operations, so there are 5^6 = 15,625
cells. A network stacks one cell fifteen times: a 3x3 stem of 16 channels, three stages of five cells with 16, 32 and 64
channels, residual blocks of stride 2 between the stages, then batch norm, ReLU, the mean over positions, a classifier.
Convolutions are ReLU - convolution - batch norm without bias; average pooling does not count what lies outside.

:class:`CellNet` is a network as a module. :meth:`CellSpace.network` is the same as a ``PathNetwork``, built by hand:
nothing is exported. Without an architecture it is the supernet: every operation on every edge, each behind a *switch*
(a ``Scale`` of 1 with ``kind="switch"``), which ``routed_flow`` opens or shuts for each architecture.

Constant images give flows that differ near the border only. A 3x3 window widens that border by one position, so with at
most d windows in a row a cell's feature maps are computed on ``left + 1 + right`` positions in each axis: a smaller
image, exactly. That cuts the work of the first stage to a tenth (d = 1) or a quarter (d = 2).

Oracle: ``CellNet`` exported, in float64; tiny spaces by enumeration of all paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import nodes as kinds
from .network import PathNetwork

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}
WINDOWS = ("nor_conv_3x3", "avg_pool_3x3")  # what sees a neighbour

Architecture = tuple[str, ...]
"""The operation of each edge, in the order of ``EDGES``."""


@dataclass(frozen=True)
class CellSpace:
    """The space, or a smaller one of its form.

    Args:
        channels: of the first stage; each later stage has twice as many.
        cells: in each stage.
        stages: a residual block of stride 2 lies between two.
        image: height and width, a multiple of ``2^(stages - 1)``.
        inputs: channels of the image.
        classes: outputs.

    Architectures are numbered: ``space[i]`` has the base-5 digits of i as operations, the last edge fastest.

    Raises:
        ValueError: sizes below 1, or an image that does not halve.

    Example:
        >>> space = CellSpace()
        >>> len(space), name_of(space[7812])
    """

    channels: int = 16
    cells: int = 5
    stages: int = 3
    image: int = 32
    inputs: int = 3
    classes: int = 10

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if value < 1:
                raise ValueError(f"CellSpace: {name}: wanted at least 1, got {value}")
        if self.image % 2 ** (self.stages - 1):
            raise ValueError(f"CellSpace: image: wanted a multiple of {2 ** (self.stages - 1)}, got {self.image}")

    def __len__(self) -> int:
        return len(OPERATIONS) ** len(EDGES)

    def __getitem__(self, index: int) -> Architecture:
        if not 0 <= index < len(self):
            raise IndexError(f"CellSpace: index: wanted 0 to {len(self) - 1}, got {index}")
        base = len(OPERATIONS)
        return tuple(OPERATIONS[index // base**power % base] for power in reversed(range(len(EDGES))))

    def __iter__(self) -> Iterator[Architecture]:
        return map(self.__getitem__, range(len(self)))

    def blocks(self) -> list[tuple[str, int, int]]:
        """``(kind, channels that enter, channels that leave)`` of each block, ``cell`` or ``reduction``."""
        found = []
        for stage in range(self.stages):
            width = self.channels << stage
            if stage:
                found.append(("reduction", width // 2, width))
            found += [("cell", width, width)] * self.cells
        return found

    def shapes(self, architecture: Architecture | None = None) -> dict[str, torch.Size]:
        """Name -> shape of every parameter and buffer of an architecture; of the supernet for None."""
        every = _supernet_shapes(self)
        if architecture is None:
            return dict(every)
        on = switches(architecture)
        return {name: shape for name, shape in every.items() if (op := _switch_of(name)) is None or op in on}

    def draw(
        self,
        seed: int | torch.Generator,
        shapes: Mapping[str, torch.Size] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Fresh tensors: weights as torch initialises them, uniform in ``+-1 / sqrt(fan in)``; norms the identity.

        Args:
            seed: or a generator on the CPU; the same gives the same tensors.
            shapes: of :meth:`shapes`; None: the supernet.
        """
        shapes = self.shapes() if shapes is None else shapes
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        drawn = [name for name, shape in shapes.items() if len(shape) > 1 or name == "head.bias"]
        sizes = [shapes[name].numel() for name in drawn]
        uniform = torch.rand(sum(sizes), generator=generator, dtype=dtype).mul_(2).sub_(1)
        tensors = {}
        for name, flat in zip(drawn, uniform.split(sizes), strict=True):
            fan_in = shapes["head.weight" if name == "head.bias" else name][1:].numel()
            tensors[name] = flat.mul_(1 / math.sqrt(fan_in)).view(shapes[name])
        ones, zeros = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        for name, shape in shapes.items():
            if name not in tensors:
                tensors[name] = (ones if name.endswith(("weight", "running_var")) else zeros).expand(shape)
        return tensors

    def network(
        self,
        tensors: Mapping[str, Tensor],
        architecture: Architecture | None = None,
        *,
        windows: int | None = None,
        model: nn.Module | None = None,
    ) -> PathNetwork:
        """A network of the space for constant sources, or the supernet with its switches.

        Args:
            tensors: by name, as :meth:`draw` gives them or as a ``CellNet`` holds them; not copied.
            architecture: None: the supernet.
            windows: the most 3x3 windows on a path through a cell, of all architectures it will be asked about
                (:func:`windows_of`). None: images of full size, which serve any source.
            model: what computes the network, for methods that run it on data.

        Raises:
            ValueError: an operation or an edge the space does not have; a tensor is missing or of another shape.
        """
        if architecture is not None:
            check_architecture(architecture)
        for name, shape in self.shapes(architecture).items():
            if name not in tensors or tensors[name].shape != shape:
                got = tuple(tensors[name].shape) if name in tensors else None
                raise ValueError(f"CellSpace.network: tensors: '{name}': wanted shape {tuple(shape)}, got {got}")
        return _Builder(self, tensors, windows, model).network(architecture)


@lru_cache(maxsize=8)
def _supernet_shapes(space: CellSpace) -> dict[str, torch.Size]:
    with torch.device("meta"):
        tensors = CellNet(space).state_dict()
    return {name: tensor.shape for name, tensor in tensors.items() if "num_batches" not in name}


def _switch_of(name: str) -> str | None:
    """The switch a tensor lies behind: ``blocks.3.e01.nor_conv_1x1.conv.weight`` behind ``e01.nor_conv_1x1``."""
    parts = name.split(".")
    return f"{parts[2]}.{parts[3]}" if len(parts) > 4 and parts[3] in OPERATIONS else None


def check_architecture(architecture: Sequence[str]) -> None:
    """Raises ValueError for what is no architecture."""
    if isinstance(architecture, str) or len(architecture) != len(EDGES):
        raise ValueError(f"architecture: wanted {len(EDGES)} operations, got {architecture!r}")
    for operation in architecture:
        if operation not in OPERATIONS:
            raise ValueError(f"architecture: wanted operations of {OPERATIONS}, got {operation!r}")


def name_of(architecture: Architecture) -> str:
    """The name NAS-Bench-201 gives it, such as ``|none~0|+|skip_connect~0|none~1|+|...~0|...~1|...~2|``."""
    check_architecture(architecture)
    parts: dict[int, list[str]] = {}
    for (source, target), operation in zip(EDGES, architecture, strict=True):
        parts.setdefault(target, []).append(f"{operation}~{source}")
    return "+".join(f"|{'|'.join(of)}|" for of in parts.values())


def architecture_of(name: str) -> Architecture:
    """The architecture of a name. Raises ValueError for anything else."""
    operations = tuple(part.split("~")[0] for node in name.split("+") for part in node.strip("|").split("|"))
    if len(operations) != len(EDGES) or any(op not in OPERATIONS for op in operations) or name_of(operations) != name:
        raise ValueError(f"architecture: wanted a name such as '{name_of(('none',) * len(EDGES))}', got {name!r}")
    return operations


def windows_of(architecture: Architecture) -> int:
    """The most 3x3 windows on a path through the cell; 0 where none leads through it."""
    longest: list[float] = [0.0, -math.inf, -math.inf, -math.inf]
    for (source, target), operation in zip(EDGES, architecture, strict=True):
        if operation != "none":
            longest[target] = max(longest[target], longest[source] + (operation in WINDOWS))
    return int(max(longest[-1], 0))


# ----------------------------------------------------------------------------------------------- as a module


class Convolution(nn.Module):
    """ReLU, a convolution that keeps the size (or halves it), batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(x)))


class Cell(nn.Module):
    """Four nodes; each sums what its edges bring. Several operations on an edge are summed too (the supernet)."""

    def __init__(self, channels: int, operations: Sequence[Sequence[str]]) -> None:
        super().__init__()
        for (source, target), several in zip(EDGES, operations, strict=True):
            made: dict[str, nn.Module] = {}
            for name in several:
                if name in KERNELS:
                    made[name] = Convolution(channels, channels, KERNELS[name])
                elif name == "avg_pool_3x3":
                    made[name] = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
                elif name == "skip_connect":
                    made[name] = nn.Identity()
            self.add_module(f"e{source}{target}", nn.ModuleDict(made))

    def forward(self, x: Tensor) -> Tensor:
        nodes: list[Tensor | None] = [x]
        for target in range(1, 4):
            total = None
            for source in range(target):
                entering = nodes[source]
                for operation in getattr(self, f"e{source}{target}").values() if entering is not None else ():
                    term = operation(entering)
                    total = term if total is None else total + term
            nodes.append(total)
        return x * 0.0 if nodes[-1] is None else nodes[-1]


class Reduction(nn.Module):
    """A residual block that halves the image: two 3x3 convolutions beside a mean of four pixels and a projection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = Convolution(inputs, outputs, 3, 2)
        self.second = Convolution(outputs, outputs, 3)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.shortcut(F.avg_pool2d(x, 2))


class CellNet(nn.Module):
    """One network of the space as a module; for ``architecture=None`` the supernet, all operations at once.

    Parameter names of an architecture are among those of the supernet, so tensors of one load into the other.
    """

    def __init__(self, space: CellSpace, architecture: Architecture | None = None) -> None:
        super().__init__()
        if architecture is not None:
            check_architecture(architecture)
        operations = [OPERATIONS[1:]] * len(EDGES) if architecture is None else [(op,) for op in architecture]
        self.stem = nn.Conv2d(space.inputs, space.channels, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(space.channels)
        self.blocks = nn.Sequential(
            *(
                Cell(width, operations) if kind == "cell" else Reduction(inputs, width)
                for kind, inputs, width in space.blocks()
            )
        )
        self.last = nn.BatchNorm2d(space.blocks()[-1][2])
        self.head = nn.Linear(space.blocks()[-1][2], space.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem_norm(self.stem(x)))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


# ----------------------------------------------------------------------------------------- as a path network


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

    def __init__(
        self, space: CellSpace, tensors: Mapping[str, Tensor], windows: int | None, model: nn.Module | None
    ) -> None:
        self.space, self.tensors, self.windows = space, tensors, windows
        self.made = PathNetwork()
        self.made.model = model

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

    def _convolution(self, x: int, name: str, **geometry: int) -> int:
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

    def _relu_conv_norm(self, x: int, name: str, **geometry: int) -> int:
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
        geometry = {key: (value, value) for key, value in two.items()}
        return self.made.add(kinds.Pool((x,), shape, kind="avg", count_include_pad=False, **geometry))

    def _cell(self, x: int, name: str, chosen: Sequence[Sequence[str]], switched: bool) -> int:
        nodes: list[int | None] = [x]
        for target in range(1, 4):
            terms = []
            for (source, to), several in zip(EDGES, chosen, strict=True):
                entering = nodes[source] if to == target else None
                for operation in several if entering is not None else ():
                    if operation == "none":
                        continue
                    edge = f"e{source}{target}"
                    begin = self._switch(entering, f"{edge}.{operation}") if switched else entering
                    terms.append(self._operation(begin, f"{name}.{edge}.{operation}", operation))
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


def switches(architecture: Architecture) -> set[str]:
    """The names of the switches that are open in an architecture."""
    return {f"e{a}{b}.{op}" for (a, b), op in zip(EDGES, architecture, strict=True) if op != "none"}
