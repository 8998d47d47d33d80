"""The cell search space of NAS-Bench-201 (Dong and Yang, ICLR 2020), from its public definition.

A cell is a complete DAG of four nodes; each of its six edges carries one of five operations, so there are 5^6 = 15,625
cells. A network stacks one cell fifteen times: a 3x3 stem of 16 channels, three stages of five cells with 16, 32 and 64
channels, residual blocks of stride 2 between the stages, then batch norm, ReLU, the mean over positions, a classifier.
Convolutions are ReLU - convolution - batch norm without bias; average pooling does not count what lies outside.

:class:`CellNet` is a network as a module; ``cell_network`` makes the same a ``PathNetwork`` without any export.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def check_tensors(self, tensors: Mapping[str, Tensor], architecture: Architecture | None = None) -> None:
        """Raises ValueError for a tensor that is missing or of another shape."""
        for name, shape in self.shapes(architecture).items():
            if name not in tensors or tensors[name].shape != shape:
                got = tuple(tensors[name].shape) if name in tensors else None
                raise ValueError(f"CellSpace: tensors: '{name}': wanted shape {tuple(shape)}, got {got}")


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


def index_of(architecture: Architecture) -> int:
    """Its number in a :class:`CellSpace`."""
    check_architecture(architecture)
    digits = map(OPERATIONS.index, architecture)
    return reduce(lambda number, digit: number * len(OPERATIONS) + digit, digits)


def live_part(architecture: Architecture) -> Architecture:
    """The same network with nothing on the edges that no path through the cell takes."""
    on = [edge for edge, operation in zip(EDGES, architecture, strict=True) if operation != "none"]
    reached, leads_on = {0}, {3}
    for target in range(1, 4):
        reached |= {target for edge in on if edge[1] == target and edge[0] in reached}
    for source in range(2, -1, -1):
        leads_on |= {source for edge in on if edge[0] == source and edge[1] in leads_on}
    lives = [source in reached and target in leads_on for source, target in EDGES]
    return tuple(operation if live else "none" for operation, live in zip(architecture, lives, strict=True))


def switches(architecture: Architecture) -> set[str]:
    """The names of the switches that are open in an architecture."""
    return {f"e{a}{b}.{op}" for (a, b), op in zip(EDGES, architecture, strict=True) if op != "none"}


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
        self.space, self.architecture = space, architecture
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
