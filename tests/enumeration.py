"""The first oracle: a network spelled out unit by unit, and every path in it walked one at a time.

Nothing here knows flows, exponents or torch's products: units are integers, edges are Python tuples, a path is a list
of edges. Slow and obvious; for networks with up to some 10^5 paths.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Units:
    """A network of scalar units. Feature maps are nested as {(channel, row, column): unit} or {index: unit}."""

    edges: dict[int, list[tuple[int, float, tuple[str, int] | None]]] = field(default_factory=lambda: defaultdict(list))
    starts: dict[int, float] = field(default_factory=dict)
    count: int = 0

    def new(self) -> int:
        self.count += 1
        return self.count - 1

    def source(self, values: Tensor) -> dict:
        """Input units that hold ``values``."""
        units = {}
        for index in itertools.product(*(range(n) for n in values.shape)):
            units[index if len(index) > 1 else index[0]] = unit = self.new()
            self.starts[unit] = float(values[index])
        return units

    def connect(self, a: int, b: int, value: float, weight: tuple[str, int] | None = None) -> None:
        self.edges[a].append((b, value, weight))

    def linear(self, units: dict, weight: Tensor, name: str, bias: Tensor | None = None) -> dict:
        out = {o: self.new() for o in range(weight.shape[0])}
        inputs = list(units.values())
        for o in out:
            for i, unit in enumerate(inputs):
                self.connect(unit, out[o], float(weight[o, i]), (name, o * weight.shape[1] + i))
        return self.biased(out, bias)

    def biased(self, units: dict, bias: Tensor | None) -> dict:
        """Adds edges from a constant unit; the bias belongs to the first index (channel or feature)."""
        if bias is not None:
            constant = self.new()
            self.starts[constant] = 1.0
            for index, unit in units.items():
                channel = index[0] if isinstance(index, tuple) else index
                self.connect(constant, unit, float(bias[channel]))
        return units

    def conv(
        self, units: dict, weight: Tensor, name: str, stride=1, padding=0, dilation=1, groups=1, bias=None
    ) -> dict:
        height, width = (1 + max(index[axis] for index in units) for axis in (1, 2))
        out_channels, per_group, kh, kw = weight.shape
        rows = (height + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
        columns = (width + 2 * padding - dilation * (kw - 1) - 1) // stride + 1
        out = {}
        for o, y, x in itertools.product(range(out_channels), range(rows), range(columns)):
            out[o, y, x] = self.new()
            first = (o // (out_channels // groups)) * per_group
            for c, r, s in itertools.product(range(per_group), range(kh), range(kw)):
                at = (first + c, y * stride - padding + r * dilation, x * stride - padding + s * dilation)
                if at in units:
                    flat = ((o * per_group + c) * kh + r) * kw + s
                    self.connect(units[at], out[o, y, x], float(weight[o, c, r, s]), (name, flat))
        return self.biased(out, bias)

    def conv_transpose(self, units: dict, weight: Tensor, name: str, stride=1, padding=0) -> dict:
        height, width = (1 + max(index[axis] for index in units) for axis in (1, 2))
        _channels, out_channels, kh, kw = weight.shape
        rows, columns = ((n - 1) * stride - 2 * padding + k for n, k in ((height, kh), (width, kw)))
        out = {index: self.new() for index in itertools.product(range(out_channels), range(rows), range(columns))}
        for (c, y, x), unit in units.items():
            for o, r, s in itertools.product(range(out_channels), range(kh), range(kw)):
                at = (o, y * stride - padding + r, x * stride - padding + s)
                if at in out:
                    flat = ((c * out_channels + o) * kh + r) * kw + s
                    self.connect(unit, out[at], float(weight[c, o, r, s]), (name, flat))
        return out

    def scaled(self, units: dict, factor: Tensor) -> dict:
        """Each channel times a fixed number."""
        out = {index: self.new() for index in units}
        for index, unit in units.items():
            self.connect(unit, out[index], float(factor[index[0] if isinstance(index, tuple) else index]))
        return out

    def pool(self, units: dict, kernel: int, stride: int, value: float) -> dict:
        """A sum over windows times ``value``."""
        channels, height, width = (1 + max(index[axis] for index in units) for axis in range(3))
        out = {}
        for c in range(channels):
            for y, x in itertools.product(*((range((n - kernel) // stride + 1)) for n in (height, width))):
                out[c, y, x] = self.new()
                for r, s in itertools.product(range(kernel), range(kernel)):
                    self.connect(units[c, y * stride + r, x * stride + s], out[c, y, x], value)
        return out

    def added(self, *maps: dict) -> dict:
        out = {index: self.new() for index in maps[0]}
        for units in maps:
            for index, unit in units.items():
                self.connect(unit, out[index], 1.0)
        return out

    def concatenated(self, *maps: dict) -> dict:
        """Feature maps joined along the channels."""
        out, offset = {}, 0
        for units in maps:
            for index, unit in units.items():
                out[(index[0] + offset, *index[1:])] = unit
            offset += 1 + max(index[0] for index in units)
        return out

    @staticmethod
    def flat(units: dict) -> dict:
        return dict(enumerate(units[index] for index in sorted(units)))

    def paths(self, outputs: dict):
        """Every path as (value, weights on it)."""
        ends = set(outputs.values())

        def walk(unit: int, value: float, weights: tuple):
            if unit in ends:
                yield value, weights
            for following, factor, weight in self.edges[unit]:
                yield from walk(following, value * factor, (*weights, weight) if weight else weights)

        for unit, value in self.starts.items():
            yield from walk(unit, value, ())

    def sums(self, outputs: dict, power: float, masks: dict[str, Tensor] | None = None) -> tuple[float, dict]:
        """R and, by weight, the sum over the paths through it of |value|^power; masked weights close their paths."""
        total, through = 0.0, defaultdict(float)
        for value, weights in self.paths(outputs):
            if masks and not all(bool(masks[name].flatten()[k]) for name, k in weights if name in masks):
                continue
            amount = abs(value) ** power
            total += amount
            for weight in weights:
                through[weight] += amount
        return total, through
