"""Every path of a small network written out: the path kernel as a matrix, for teaching and as an oracle.

A path is followed element by element through every node: at a synapse it takes one weight, at any other node a fixed
factor. Its value is the product of both. Nothing here is shared with path arithmetic; it takes exponential time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import nodes as kinds
from .network import PathNetwork, as_network
from .nodes import Node, Synapse
from .pooling import pooled

_Path = tuple[float, tuple[int, ...]]  # (fixed factor, weights on it)


@dataclass(frozen=True)
class PathGram:
    """All paths of a network whose weights are left.

    Attributes:
        values: float64 [paths]: the product of weights and fixed factors.
        weights: for each path, the flat positions of its weights in the order of ``network.prunable``.
        jacobian: float64 [paths, weights]: the derivative of each path's value by each weight.
    """

    values: Tensor
    weights: tuple[tuple[int, ...], ...]
    jacobian: Tensor

    @property
    def kernel(self) -> Tensor:
        """Pi = J J^T, float64 [paths, paths]."""
        return self.jacobian @ self.jacobian.T

    @property
    def gram(self) -> Tensor:
        """G = J^T J, float64 [weights, weights]: the same eigenvalues, but for zeros."""
        return self.jacobian.T @ self.jacobian


def gram(
    model: nn.Module | PathNetwork,
    example_input: Any = None,
    masks: Mapping[str, Tensor] | None = None,
    *,
    limit: int = 100_000,
) -> PathGram:
    """Enumerates the paths of a small network: biases begin none, max-pooling sums, gates are open.

    Args:
        limit: the most paths to write out.

    Raises:
        ValueError: more paths than ``limit``, or norms or products, which are not fixed factors.
    """
    return _Enumerator(as_network(model, example_input), masks, limit).run()


class _Enumerator:
    def __init__(self, network: PathNetwork, masks: Mapping[str, Tensor] | None, limit: int) -> None:
        self.network, self.limit = network, limit
        self.first: dict[str, int] = {}
        count, parts = 0, []
        for name in network.prunable:
            self.first[name], count = count, count + network.tensors[name].numel()
            tensor = network.tensors[name].detach().double().cpu()
            parts.append((tensor if masks is None or name not in masks else tensor * masks[name]).flatten())
        self.theta = torch.cat(parts)
        self.masks = masks or {}

    def run(self) -> PathGram:
        found: dict[int, list[list[_Path]]] = {}
        for k in sorted(self.network.alive):
            node = self.network.nodes[k]
            found[k] = self._step(node, [found[i] for i in node.inputs])
            total = sum(len(paths) for paths in found[k])
            if total > self.limit:
                raise ValueError(f"gram: limit: {total} paths reach {node.where or node}; wanted at most {self.limit}")
        paths = [path for k in self.network.outputs for element in found[k] for path in element]
        jacobian = torch.zeros(len(paths), len(self.theta), dtype=torch.float64)
        values = torch.empty(len(paths), dtype=torch.float64)
        for row, (factor, weights) in enumerate(paths):
            w = self.theta[list(weights)]
            values[row] = factor * w.prod()
            for place, position in enumerate(weights):
                others = torch.cat([w[:place], w[place + 1 :]])
                jacobian[row, position] += factor * others.prod()
        return PathGram(values, tuple(weights for _, weights in paths), jacobian)

    def _step(self, node: Node, entering: list[list[list[_Path]]]) -> list[list[_Path]]:
        count = node.shape.numel()
        if isinstance(node, kinds.Input):
            return [[(1.0, ())] for _ in range(count)]
        if isinstance(node, (kinds.Norm, kinds.Product)):
            raise ValueError(f"gram: model: wanted fixed factors between weights, got {node.where}")
        if isinstance(node, Synapse):
            return self._across(node, entering[0])
        if isinstance(node, kinds.Constant):
            return [[] for _ in range(count)]
        out: list[list[_Path]] = [[] for _ in range(count)]
        for slot, paths in enumerate(entering):
            matrix = self._matrix(node, slot)
            for o, i in matrix.nonzero().tolist():
                factor = float(matrix[o, i])
                out[o] += [(value * factor, weights) for value, weights in paths[i]]
        return out

    def _matrix(self, node: Node, slot: int) -> Tensor:
        """A linear node as [elements out, elements in] for one of its inputs."""
        shapes = [self.network.nodes[i].shape for i in node.inputs]
        columns = []
        for n in range(shapes[slot].numel()):
            xs = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
            xs[slot].view(-1)[n] = 1.0
            columns.append(self._apply(node, xs).expand(node.shape).flatten())
        return torch.stack(columns, 1) if columns else torch.zeros(node.shape.numel(), 0)

    def _apply(self, node: Node, xs: list[Tensor]) -> Tensor:
        tensors = self.network.tensors
        if isinstance(node, kinds.Scale):
            return xs[0] * node.factor(tensors).detach().double().cpu()
        if isinstance(node, kinds.Pool):
            return pooled(xs[0], node, 1.0, "sum")
        if isinstance(node, kinds.Reduce):
            total = xs[0].sum(node.dims, keepdim=node.keepdim)
            return total / (xs[0].numel() / total.numel()) if node.kind == "mean" else total
        if isinstance(node, kinds.Wire):
            return node.apply(xs, 1.0).double()
        if isinstance(node, kinds.Sum):
            return sum(x.expand(node.shape) for x in xs)  # type: ignore[return-value]
        return xs[0]  # gates are open, biases begin no path

    def _across(self, node: Synapse, paths: list[list[_Path]]) -> list[list[_Path]]:
        """One weight on: which one joins two elements is read off a weight tensor that holds its own positions."""
        name = node.weight
        shape = self.network.tensors[name].shape
        numbered = torch.arange(1.0, shape.numel() + 1, dtype=torch.float64).reshape(shape)
        left = self.masks[name].flatten() if name in self.masks else torch.ones(shape.numel(), dtype=torch.bool)
        out: list[list[_Path]] = [[] for _ in range(node.shape.numel())]
        entering = self.network.nodes[node.inputs[0]].shape
        for i in range(entering.numel()):
            if not paths[i]:
                continue
            x = torch.zeros(entering, dtype=torch.float64)
            x.view(-1)[i] = 1.0
            joined = self._synapse(node, x, numbered).flatten().round().long() - 1
            for o in (joined >= 0).nonzero()[:, 0].tolist():
                position = int(joined[o])
                if left[position]:
                    taken = self.first[name] + position
                    out[o] += [(value, (*weights, taken)) for value, weights in paths[i]]
        return out

    @staticmethod
    def _synapse(node: Synapse, x: Tensor, w: Tensor) -> Tensor:
        if node.form == "linear":
            return x @ w.T
        if node.form == "linear_t":
            return x @ w
        padding = node.output_padding or (0,) * len(node.stride)
        transposed = node.form == "conv_transpose"
        return torch.convolution(x, w, None, node.stride, node.padding, node.dilation, transposed, padding, node.groups)
