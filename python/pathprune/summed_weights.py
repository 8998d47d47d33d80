"""Weights that R_2 knows by the sum of their squares alone, and what that says of the path kernel's spectrum.

Inputs of ones feed the first layer alike, and all outputs count alike: R_2 depends on the head's column j by
``sum_i u_ij`` only. For such a set S, with d the common derivative, every x on S with ``sum_S w_i x_i = 0`` is an
eigenvector of G with eigenvalue d: multiplicity ``|S| - 1``, in closed form. What is left of S is the one direction
``w_S / |w_S|``. Krylov methods find one copy of a multiple eigenvalue, so these are taken out before they begin.

Found from the flows that pass no weight before the first, or after the last, synapse: exactly equal rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .flow import PathFlow
from .network import PathNetwork
from .nodes import Synapse
from .ops import WeightMap
from .policy import Policy
from .weights import weights_of


def summed_weights(network: PathNetwork, policy: Policy) -> dict[str, Tensor]:
    """For weights next to inputs or outputs: the set that each entry belongs to, int64 of the weight's shape."""
    synapses = network.synapses()
    uses = [network.nodes[k].weight for k in synapses]  # type: ignore[attr-defined]
    above, below = _touched(network)
    edge = [k for k in synapses if not (above[k] and below[k]) and uses.count(network.nodes[k].weight) == 1]  # type: ignore[attr-defined]
    if not edge:
        return {}
    weights = weights_of(network, (), (WeightMap.SQUARE, WeightMap.SQUARE))
    flow = PathFlow(network, weights, f=WeightMap.SQUARE, policy=policy)
    flow.keep_flows = True
    flow.forward()
    flow.backward()
    found = {}
    for k in edge:
        node = network.nodes[k]
        assert isinstance(node, Synapse)
        if node.weight not in network.prunable:
            continue
        shape = network.tensors[node.weight].shape
        entering = leaving = None
        if not above[k]:
            entering = _classes(flow.values[node.inputs[0]].tensor, node)
        if not below[k] and k in flow.backward_flows:
            leaving = _classes(flow.backward_flows[k].tensor, node)
        found[node.weight] = _sets(shape, node, entering, leaving)
    return found


def _touched(network: PathNetwork) -> tuple[dict[int, bool], dict[int, bool]]:
    """For each node: whether a synapse lies before it, and whether one lies behind it."""
    before: dict[int, bool] = {}
    behind = dict.fromkeys(network.alive, False)
    for k in sorted(network.alive):
        inputs = network.nodes[k].inputs
        before[k] = any(before[i] or isinstance(network.nodes[i], Synapse) for i in inputs)
    for k in sorted(network.alive, reverse=True):
        for i in network.nodes[k].inputs:
            behind[i] = behind[i] or behind[k] or isinstance(network.nodes[k], Synapse)
    return before, behind


def _classes(flow: Tensor, node: Synapse) -> Tensor:
    """Which units of a flow are equal at all positions: for each unit its class; for ``rows`` [groups, units]."""
    if node.form == "rows":  # [1, groups, positions, units]
        units = flow[0].movedim(1, 2)
        return torch.unique(units.flatten(0, 1), dim=0, return_inverse=True)[1].reshape(units.shape[:2])
    axis = 1 if node.form.startswith("conv") else flow.dim() - 1
    return torch.unique(flow.movedim(axis, 0).flatten(1), dim=0, return_inverse=True)[1]


def _sets(shape: torch.Size, node: Synapse, entering: Tensor | None, leaving: Tensor | None) -> Tensor:
    """Entries whose entering and leaving classes (or units, where those are their own) agree are one set."""
    groups = node.groups if node.form in ("conv", "rows", "conv_transpose") else 1
    turned = node.form in ("linear_t", "conv_transpose")
    if node.form == "rows":
        rows, columns = shape[0] // groups, shape[1:].numel()
        by_row = (leaving if leaving is not None else torch.arange(shape[0])).reshape(groups, rows, 1)
        by_column = (entering if entering is not None else torch.arange(groups * columns)).reshape(groups, 1, columns)
        entry = torch.zeros(1, dtype=torch.int64)
    else:
        first, second = (entering, leaving) if turned else (leaving, entering)
        rows = shape[0] // groups
        by_row = (first if first is not None else torch.arange(shape[0])).reshape(groups, rows, 1, 1)
        count = shape[1]
        # the second axis counts within a group
        by_column = (second if second is not None else torch.arange(groups * count)).reshape(groups, 1, count, 1)
        entry = torch.arange(shape[2:].numel()).reshape(1, 1, 1, -1)
    part = torch.arange(groups).reshape(groups, *[1] * (by_row.dim() - 1))
    key = torch.stack(
        [
            t.expand(torch.broadcast_shapes(by_row.shape, by_column.shape, entry.shape)).flatten()
            for t in (part.to(by_row), by_row, by_column, entry)
        ],
        1,
    )
    return torch.unique(key, dim=0, return_inverse=True)[1].reshape(shape)


class Reduced:
    """Coordinates of the live weights with each set of summed weights as one.

    Args:
        theta: the live weights, flat.
        slope: their dR_2/du.
        sets: for each live weight the number of its set, in [0, count); those of no set are a set of one.
    """

    def __init__(self, theta: Tensor, slope: Tensor, sets: Tensor) -> None:
        self.sets, self.slope = sets, slope
        self.count = int(sets.max()) + 1 if sets.numel() else 0
        self.sizes = torch.bincount(sets, minlength=self.count)
        norm = torch.zeros(self.count, dtype=torch.float64, device=theta.device)
        norm.index_add_(0, sets, theta.double().square()).sqrt_()
        alone = (self.sizes == 1)[sets]
        self.directions = torch.where(alone, 1.0, theta.double() / norm.clamp(min=5e-324)[sets]).to(theta.dtype)
        self.empty = (norm == 0) & (self.sizes > 1)  # sets of zeros have no direction of their own

    def reduced(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.count).index_add_(0, self.sets, x * self.directions)

    def expanded(self, y: Tensor) -> Tensor:
        return y[self.sets] * self.directions

    def closed_form(self, k: int) -> tuple[Tensor, list[tuple[int, int]]]:
        """The k largest eigenvalues within sets, descending, and for each (set, which of its directions)."""
        shared = torch.zeros(self.count, dtype=torch.float64, device=self.slope.device)
        shared.index_add_(0, self.sets, self.slope.double())
        multiplicity = self.sizes - 1 + self.empty
        values = torch.where(multiplicity > 0, shared / self.sizes.clamp(min=1), -torch.inf)
        chosen: list[tuple[int, int]] = []
        found: list[float] = []
        top = values.topk(min(k, self.count))
        for value, s in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            for which in range(min(int(multiplicity[s]), k - len(found))):
                chosen.append((s, which))
                found.append(value)
        return torch.tensor(found, dtype=torch.float64), chosen

    def direction(self, s: int, which: int) -> Tensor:
        """The which-th of an orthonormal basis of the directions within a set that leave R_2 alone."""
        members = (self.sets == s).nonzero()[:, 0]
        own = self.directions[members].double()
        basis = torch.linalg.qr(torch.cat([own[:, None], torch.eye(len(own)).to(own)], 1))[0]
        first = 0 if bool(self.empty[s]) else 1
        vector = torch.zeros(len(self.sets), dtype=torch.float64, device=own.device)
        vector[members] = basis[:, which + first]
        return vector


def numbered(sets: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], live: Tensor) -> Tensor:
    """Sets of all live weights, in order, numbered from 0 without gaps."""
    parts, count = [], 0
    for name, shape in shapes.items():
        own = sets.get(name)
        flat = torch.arange(shape.numel()) if own is None else own.flatten().cpu()
        parts.append(flat + count)
        count += int(flat.max()) + 1 if flat.numel() else 0
    every = torch.cat(parts).to(live.device)[live]
    used = torch.zeros(count, dtype=torch.bool, device=live.device)
    used[every] = True
    return (used.cumsum(0) - 1)[every]
