"""Which experts data choose, and how much each counts: computed as the model does, laid out as the network has them.

A network has every expert for every row. What a router makes of data is therefore a gate: the weight of the experts
that it chooses, zero for all others. It is computed by the model's own operators, exported a second time with the
model's own choice in place of every one, from the products that the router reads. Rows that a choice selects are put
where the network has those of their experts.

Bytes: the routing weights, [rows, experts]. Oracle: the model's output, which signed flow through the gates gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from .graph_values import evaluated
from .network import PathNetwork
from .nodes import Tensors


class Routing:
    """The routing weights of a batch, asked for operator by operator while the model runs.

    Args:
        network: one whose data choose experts.
        tensors: the model's.

    Raises:
        ValueError: experts' choice that does other than to weight rows, or another computation where not all are taken.
    """

    def __init__(self, network: PathNetwork, tensors: Tensors, who: str) -> None:
        self._network, self._tensors = network, tensors
        mixed = sorted(network.mixed & network.alive)
        if mixed:
            where = network.nodes[mixed[0]].where
            raise ValueError(f"{who}: model: wanted experts that a choice weights and no more, got {where}")
        forward = network.forward
        assert forward is not None and forward.choosing is not None
        every, own = forward.graph.graph, forward.choosing().graph
        if [(n.name, n.target) for n in every.nodes] != [(n.name, n.target) for n in own.nodes]:
            raise ValueError(f"{who}: model: wanted the same operators whatever number of experts is chosen")
        self._nodes = {n.name: n for n in own.nodes}
        self._shapes = {n.name: n.meta["val"].shape for n in every.nodes if n.name in network.routed}
        self._steps = {name: self._before(name) for name in self._asked()}
        self.read = {n.name for steps in self._steps.values() for step in steps for n in step.all_input_nodes}
        self.read -= {n.name for steps in self._steps.values() for n in steps}
        self.known: dict[str, Any] = {}  # what the run of the model has computed of that
        self._values: dict[fx.Node, Any] = {}

    def _asked(self) -> Iterable[str]:
        for name, routed in self._network.routed.items():
            yield name
            if routed.experts is not None:
                yield routed.experts

    def _before(self, name: str) -> Sequence[fx.Node]:
        """The operators that compute a value, in order: from the routers' products, tensors and constants."""
        steps: set[fx.Node] = set()
        asked = [self._nodes[name]]
        while asked:
            n = asked.pop()
            if n not in steps and n.op == "call_function" and n.name not in self._network.routers:
                steps.add(n)
                asked += n.all_input_nodes
        return [n for n in self._nodes.values() if n in steps]

    def _value(self, name: str) -> Tensor:
        for n in self._steps[name]:
            if n not in self._values:
                self._values |= {a: self.known[a.name] for a in n.all_input_nodes if a.name in self.known}
                self._values[n] = evaluated(n, self._values)
        return self._values[self._nodes[name]]

    def factor(self, name: str) -> Tensor:
        """A value as data have it, in the place of what stands for it in the network's computation."""
        value, routed = self._value(name), self._network.routed[name]
        if routed.experts is None:
            return value
        assert routed.expression is not None
        chosen, every = self._value(routed.experts), routed.expression(self._tensors)
        wide = value.new_zeros(every.shape).scatter(routed.axis, chosen, value.reshape(chosen.shape))
        return wide.gather(routed.axis, every).reshape(self._shapes[name])
