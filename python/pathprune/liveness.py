"""What paths still reach: which weights, units and branches of a masked network lie on an input-output path.

A weight is alive when a path enters it and leaves it: effective density counts those alone (Vysogorets and
Kempe 2021). Flows of zeros and ones answer exactly, where path counts in floating point would underflow. No
weight value is looked at, and no gate closes: what is dead here is dead for every input.

Bytes: one forward and one backward sweep, as in a round of SynFlow; results take one bit per weight.
Oracle: enumeration of all paths on small networks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._mask_io import pack_bits
from .flow import PathFlow
from .network import PathNetwork
from .nodes import Node, Sum, Synapse
from .ops import WeightMap
from .policy import policy_of
from .select import Bracket, Scores
from .weights import Scaled, Weight


@dataclass(frozen=True)
class LayerReach:
    """One weight tensor: how many of its weights lie on a path, and of its units."""

    live: int
    live_inputs: int
    inputs: int
    live_outputs: int
    outputs: int


@dataclass(frozen=True)
class Branch:
    """What lies between a fork and the sum that ends it, on one side.

    Attributes:
        name: what its weights' names have in common.
        where: the module and operator of the sum.
        weights: names of the weights on it.
        open: whether a path still runs through it.
    """

    name: str
    where: str
    weights: tuple[str, ...]
    open: bool


@dataclass(frozen=True)
class Reach:
    """What paths reach in a network under masks.

    Attributes:
        layers: weight name -> counts.
        branches: residual branches that hold weights, in network order.
        packed: weight name -> (bits of the weights that lie on a path, shape), for ``Masks.from_packed``;
            empty unless asked for.
    """

    layers: dict[str, LayerReach]
    branches: tuple[Branch, ...]
    packed: dict[str, tuple[Tensor, torch.Size]]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; ``from_dict`` reads it."""
        return {
            "layers": {name: list(vars(layer).values()) for name, layer in self.layers.items()},
            "branches": [vars(branch) for branch in self.branches],
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Reach:
        layers = {name: LayerReach(*counts) for name, counts in found["layers"].items()}
        branches = [Branch(**{**branch, "weights": tuple(branch["weights"])}) for branch in found["branches"]]
        return cls(layers, tuple(branches), {})


def reach(
    network: PathNetwork, weights: Mapping[str, Weight], *, keep_bits: bool = False, attention: str = "half"
) -> Reach:
    """What paths reach under the masks the weights have now. The weights are left as they are.

    Args:
        network: with all its positions or with equal ones merged: the answer is the same.
        weights: one for each tensor the synapses use.
        keep_bits: also return which weights are alive, at one bit each.
        attention: ``values``: paths pass attention by its values alone, not by its queries and keys.

    Determinism: exact.
    """
    synapses: dict[str, Synapse] = {}
    for k in network.synapses():
        node = network.nodes[k]
        assert isinstance(node, Synapse)
        synapses.setdefault(node.weight, node)
    counted = {name: _counting(weights[name], node) for name, node in synapses.items()}
    flow = _Reachability(network, counted, attention)
    flow.forward()
    flow.backward()
    layers, packed = {}, {}
    for name, node in synapses.items():
        weight = counted[name]
        words = weight.whole_words(flow.live.pop(name))
        layers[name] = _layer(weight, node, words)
        if keep_bits:
            packed[name] = (_bits(words, weight.columns), weight.shape)
    return Reach(layers, tuple(_branches(network, flow.open)), packed)


class _Reachability(PathFlow):
    """Flow that says only where it is: zero where no path comes, positive where one does."""

    def __init__(self, network: PathNetwork, weights: Mapping[str, Weight], attention: str) -> None:
        policy = policy_of("paths", norm="unit", attention=attention)
        super().__init__(network, weights, f=WeightMap.ONE, policy=policy)
        self.live: dict[str, Tensor] = {}  # weight name -> mask words of the weights on a path
        self.open: dict[tuple[int, int], bool] = {}  # (sum, position of the summand) -> whether a path runs there
        self._summands: dict[int, list[Tensor]] = {}

    def backward(self, guess: Bracket | None = None) -> None:
        super().backward(guess)
        for name, weight in self.weights.items():
            if weight.uses > 1:
                self.live[name] = _live_words(weight.scores)
                weight.forget()

    def _normalised(self, tensor: Tensor, exponent: Tensor) -> Scaled:
        return Scaled((tensor > 0).to(self.dtype), torch.zeros_like(exponent))

    def _forward_synapse(self, k: int, node: Synapse, entering: list[Scaled]) -> Scaled:
        result = super()._forward_synapse(k, node, entering)
        self.weights[node.weight].drop_effective()  # made again on the way back: one layer's is held at a time
        return result

    def _backward_synapse(self, k: int, node: Synapse, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        inward = super()._backward_synapse(k, node, g, guess)
        weight = self.weights[node.weight]
        weight.drop_effective()
        if weight.uses == 1:
            self.live[node.weight] = _live_words(weight.scores)
            weight.forget()
        return inward

    def _forward_sum(self, k: int, node: Sum, entering: list[Scaled]) -> Scaled:
        self._summands[k] = [flow.tensor > 0 for flow in entering]
        return super()._forward_sum(k, node, entering)

    def _backward_sum(self, k: int, node: Node, g: Scaled, guess: Bracket | None) -> list[Scaled]:
        inward = super()._backward_sum(k, node, g, guess)
        for position, (came, leaves) in enumerate(zip(self._summands.pop(k), inward, strict=True)):
            self.open[k, position] = bool((came & (leaves.tensor > 0)).any())
        return inward


def _counting(weight: Weight, node: Synapse) -> Weight:
    """The same weight and mask, every live weight counting for 1, read as ``node`` reads it."""
    weight.settle()
    counting = copy.copy(weight)
    counting.f = counting.s = WeightMap.ONE
    counting.scored, counting.form = True, node.form
    counting.stay_dense()
    counting.forget()
    return counting


def _live_words(made: Scores) -> Tensor:
    """Mask words [G, O, W] of the weights whose score is positive."""
    if made.x is None or made.g is None:
        return ops.mask_pack(made.weight > 0)
    entered, left = ops.mask_pack(made.x > 0), -(made.g > 0).to(torch.int16)  # a -1 has all bits set
    live = torch.zeros((), dtype=torch.int16, device=entered.device)
    for t in range(entered.shape[1]):
        live = live | (entered[:, t, None, :] & left[:, t, :, None])
    return live if made.mask is None else live & made.mask


def _layer(weight: Weight, node: Synapse, words: Tensor) -> LayerReach:
    """Counts of one layer. A convolution's units are its channels."""
    grouped = words.reshape(node.groups, -1, words.shape[-1])
    rows = (grouped != 0).any(-1)  # [groups, rows]
    columns = ops.mask_unpack(_any_row(grouped), weight.columns)  # [groups, 1, columns]
    units = weight.shape[-1] if node.form.startswith("experts") else weight.shape[1]
    columns = columns.reshape(node.groups, units, -1).any(-1)
    outputs, inputs = (columns, rows) if weight.transposed else (rows, columns)
    counts = (int(inputs.sum()), inputs.numel(), int(outputs.sum()), outputs.numel())
    return LayerReach(int(ops.mask_count(words)), *counts)


def _any_row(words: Tensor) -> Tensor:
    """[G, O, W] -> [G, 1, W]: the bits set in any row."""
    while words.shape[1] > 1:
        half = words.shape[1] // 2
        joined = words[:, :half] | words[:, half : 2 * half]
        words = torch.cat([joined, words[:, 2 * half :]], dim=1)
    return words.contiguous()


def _bits(words: Tensor, columns: int) -> Tensor:
    """Mask words as flat little-endian bits on the CPU."""
    if columns % 16 == 0:
        return words.contiguous().cpu().view(torch.uint8).flatten()
    return pack_bits(ops.mask_unpack(words, columns).cpu())


# -------------------------------------------------------------------------------------------------- branches


def _branches(network: PathNetwork, open_: Mapping[tuple[int, int], bool]) -> Iterator[Branch]:
    """The sides of every sum that begin at a common fork and hold weights."""
    for k, sides in forks(network):
        for position, side in sides.items():
            weights = _weights_in(network, side)
            if weights and (k, position) in open_:
                yield Branch(_common_name(weights), network.nodes[k].where, weights, open_[k, position])


def forks(network: PathNetwork) -> Iterator[tuple[int, dict[int, int]]]:
    """Every live sum whose summands begin at a common fork, as its index.

    With it, position of a summand -> the nodes that lead to this summand and no other, as the bits of an integer.
    """
    above = _ancestors(network)
    for k, node in enumerate(network.nodes):
        if not isinstance(node, Sum) or k not in network.alive:
            continue
        ancestors = [above[i] for i in node.inputs]
        sides = {}
        for position, side in enumerate(ancestors):
            others = 0
            for other, bits in enumerate(ancestors):
                others |= bits if other != position else 0
            if side & others:
                sides[position] = side & ~others
        if sides:
            yield k, sides


def _ancestors(network: PathNetwork) -> list[int]:
    """For every node, itself and all it is made of, as the bits of an integer."""
    above: list[int] = []
    for k, node in enumerate(network.nodes):
        bits = 1 << k
        for i in node.inputs:
            bits |= above[i]
        above.append(bits)
    return above


def _weights_in(network: PathNetwork, nodes: int) -> tuple[str, ...]:
    found = (network.nodes[k] for k in network.synapses() if nodes >> k & 1)
    return tuple(dict.fromkeys(node.weight for node in found if isinstance(node, Synapse)))


def _common_name(weights: Sequence[str]) -> str:
    """What the modules of the weights have in common: ``layer1.0``; else the first and the last of them."""
    modules = [name.removesuffix(".weight").split(".") for name in weights]
    shared = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or f"{'.'.join(modules[0])} ... {'.'.join(modules[-1])}"
