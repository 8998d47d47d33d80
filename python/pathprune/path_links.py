"""Which elements a node links, one by one, and with which factor: paths spelled out between synapses.

A link is (element that enters, element that leaves, factor), the factor raised to the power of the flow. Wires that
copy elements are told by labels sent through them; pools, means and broadcasts from their geometry. Oracle:
enumeration of paths.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import nodes as kinds
from .network import PathNetwork
from .nodes import Synapse
from .pooling import pooled

_MIXING_LIMIT = 1 << 26  # elements in times elements out up to which a wire that mixes them is taken apart


def links_of(network: PathNetwork, k: int, slot: int, power: int, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The links of one input of a node that is no synapse.

    Args:
        factor: what an elementwise node multiplies its elements with; None: 1.

    Returns:
        (pairs [links, 2] int64, factors [links] float64 > 0).
    """
    node = network.nodes[k]
    entering = network.nodes[node.inputs[slot]].shape
    own = torch.arange(entering.numel()).reshape(entering)
    if isinstance(node, kinds.Pool):
        return _pool_links(node, entering, power)
    if isinstance(node, kinds.Reduce):
        kept = [1 if d in {e % len(entering) for e in node.dims} else size for d, size in enumerate(entering)]
        there = torch.arange(node.shape.numel()).reshape(kept).expand(entering)
        share = (node.shape.numel() / own.numel()) ** power if node.kind == "mean" else 1.0
        return torch.stack((own.flatten(), there.flatten()), 1), torch.full((own.numel(),), share, dtype=torch.float64)
    if isinstance(node, kinds.Wire):
        return _wire_links(network, node, slot, power)
    source = own.expand(node.shape).flatten()  # elementwise, broadcast where it is
    pairs = torch.stack((source, torch.arange(node.shape.numel())), 1)
    if factor is None:
        return pairs, torch.ones(len(pairs), dtype=torch.float64)
    factors = factor.double().expand(node.shape).flatten()
    return pairs[factors > 0], factors[factors > 0]


def _pool_links(node: kinds.Pool, entering: torch.Size, power: int) -> tuple[Tensor, Tensor]:
    """The elements of every window; an average's factor from what it makes of ones."""
    n = len(node.kernel)
    size, leaving = entering[-n:], node.shape[-n:]
    place = torch.zeros((1, 1), dtype=torch.int64)  # [windows, elements of a window], -1 outside
    for axis in range(n):
        starts = torch.arange(leaving[axis]) * node.stride[axis] - node.padding[axis]
        at = starts[:, None] + torch.arange(node.kernel[axis]) * node.dilation[axis]
        place = _joined(place, torch.where((at >= 0) & (at < size[axis]), at, -1), size[axis])
    target, column = (place >= 0).nonzero(as_tuple=True)
    source = place[target, column]
    factor = torch.ones(len(target), dtype=torch.float64)
    if node.kind == "avg":
        plane = replace(node, shape=torch.Size((1, 1, *leaving)))
        total = pooled(torch.ones((1, 1, *size), dtype=torch.float64), plane, float(power), "sum").flatten()
        factor = (total / torch.bincount(target, minlength=leaving.numel()))[target]
    planes = torch.arange(entering[:-n].numel())[:, None]
    pairs = (source + planes * size.numel(), target + planes * leaving.numel())
    return torch.stack([p.flatten() for p in pairs], 1), factor.repeat(len(planes))


def _wire_links(network: PathNetwork, node: kinds.Wire, slot: int, power: int) -> tuple[Tensor, Tensor]:
    """A wire that copies elements, told by labels; one that mixes them, element by element."""
    shapes = [network.nodes[i].shape for i in node.inputs]

    def made(flow: Tensor) -> Tensor:
        given = [flow if j == slot else torch.zeros(shape, dtype=torch.float64) for j, shape in enumerate(shapes)]
        return node.apply(given, float(power)).flatten()

    size = shapes[slot].numel()
    label = torch.arange(size, dtype=torch.float64).reshape(shapes[slot])
    share, total, squares = made(torch.ones_like(label)), made(label), made(label * label)
    mean = torch.where(share > 0, total / share, 0.0).round()
    copies = (total - mean * share).abs() <= 1e-9 * (share + total)
    copies &= (squares - mean * mean * share).abs() <= 1e-9 * (share + squares)
    if bool(copies.all()):
        there = (share > 0).nonzero().flatten()
        return torch.stack((mean[there].to(torch.int64), there), 1), share[there]
    if size * share.numel() > _MIXING_LIMIT:
        raise ValueError(f"sample_paths: '{node.where}' mixes {size} elements: too many to tell apart")
    columns = torch.stack([made(row.reshape(shapes[slot])) for row in torch.eye(size, dtype=torch.float64)])
    pairs = columns.nonzero()
    return pairs, columns[pairs[:, 0], pairs[:, 1]]


# ---- synapses ------------------------------------------------------------------------------------


def weight_shape(node: Synapse, weight: torch.Size) -> tuple[int, int, int, int]:
    """[G, R, C, E] of a synapse's weight."""
    if not node.form.startswith("conv"):
        return (1, weight[0], weight[1], 1)
    return (node.groups, weight[0] // node.groups, weight[1], weight[2:].numel())


def leads_to(node: Synapse, before: torch.Size, weight: torch.Size, ahead: bool) -> Tensor:
    """[positions, entries]: where each kernel entry leads from each position of one side; -1: nowhere."""
    if not node.form.startswith("conv"):
        return torch.arange(before[:-1].numel())[:, None]
    near, far = (before, node.shape) if ahead else (node.shape, before)
    leads = torch.zeros((1, 1), dtype=torch.int64)
    for axis, size in enumerate(weight[2:]):
        entries = torch.arange(size) * node.dilation[axis] - node.padding[axis]
        at, stride = torch.arange(near[2 + axis])[:, None], node.stride[axis]
        if (node.form == "conv_transpose") == ahead:  # from the coarser side: position * stride + entry
            there, fits = at * stride + entries, torch.ones(())
        else:
            there, fits = torch.div(at - entries, stride, rounding_mode="floor"), (at - entries) % stride == 0
        inside = (there >= 0) & (there < far[2 + axis]) & fits.bool()
        leads = _joined(leads, torch.where(inside, there, -1), far[2 + axis])
    return leads


def _joined(places: Tensor, axis: Tensor, size: int) -> Tensor:
    """Places of several axes, [n, e], with one more axis [m, f] of this size: [n * m, e * f]."""
    joined = places[:, None, :, None] * size + axis[None, :, None, :]
    nowhere = (places[:, None, :, None] < 0) | (axis[None, :, None, :] < 0)
    return torch.where(nowhere, -1, joined).reshape(len(places) * len(axis), -1)


def unit_and_position(node: Synapse, element: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Elements of a tensor on one side of a synapse, as units and positions."""
    if node.form.startswith("conv"):
        positions = shape[2:].numel()
        return element // positions, element % positions
    return element % shape[-1], element // shape[-1]


def element_of(node: Synapse, unit: Tensor, position: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`unit_and_position`."""
    if node.form.startswith("conv"):
        return unit * shape[2:].numel() + position
    return position * shape[-1] + unit


def by_unit(node: Synapse, flow: Tensor, shape: torch.Size) -> Tensor:
    """A flow as [units, positions]."""
    if node.form.startswith("conv"):
        return flow.reshape(shape[1], -1)
    return flow.reshape(-1, shape[-1]).t().contiguous()
