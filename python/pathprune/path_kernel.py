"""The path kernel of a network: what it is, exactly, and its spectrum, estimated.

J [paths, weights] holds the derivatives of all path values by all weights, ``Pi = J J^T`` (Gebhart, Saxena and Schrater
2021). ``G = J^T J`` [weights, weights] has the same non-zero eigenvalues and needs no list of paths. With u = w^2 and
R_2 the sum of squared path values, multi-affine in u:

* ``G_ii = dR_2/du_i``, so the trace is one forward and one backward flow of the squared network;
* ``G x = (dR_2/du) x + w * H (w * x)``, H the Hessian of R_2: one flow with its tangent (:mod:`pathprune.tangent`);
* deleting weight j loses ``dR_2/du_j + u_j (H m)_j`` of the trace, m the mask;
* ``1^T Pi 1 = sum_i (dR_lin/dw_i)^2``, R_lin the signed linear network on ones;
* the rank, for weights in general position, is the number of live weights less that of live hidden units.

Biases begin no path, max-pooling sums over its window, gates are open (policy ``paths``). Constant images have few
distinct positions, which are computed once. Oracle: enumeration of all paths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .flow import PathFlow
from .gates import GatedFlow
from .liveness import reach
from .masks import Masks
from .network import PathNetwork, as_network
from .nodes import Input, Norm, Product
from .ops import WeightMap
from .policy import Policy, policy_of
from .recording import Recording
from .spatial import merge_equal_positions
from .spectrum import Eigenpairs, SpectralDensity, lanczos_density, leading_eigenpairs
from .summed_weights import Reduced, summed_weights
from .surroundings import undisturbed
from .tangent import TangentFlow
from .walk_graph import WalkGraph, walk_graph
from .weights import Weight, power_of_two, weights_of

Vector = Tensor | Mapping[str, Tensor]


def log2_trace(
    network: PathNetwork, masks: Mapping[str, Tensor] | None = None, policy: str | Policy = "paths"
) -> float:
    """log2 of the path kernel's trace over the prunable weights that are left; -inf where no path is.

    Args:
        masks: bool tensors by name; None: all weights are there.

    Where norms without statistics or products of flows lie on the way, their factors are held fixed.
    """
    quick = merge_equal_positions(network, policy)
    if any(isinstance(network.nodes[k], (Norm, Product)) for k in network.alive):
        parts = [part.log2_sum() for part in _gradients(quick, masks, policy_of(policy)).values()]
        return float((torch.tensor(parts, dtype=torch.float64) * math.log(2)).logsumexp(0)) / math.log(2)
    weights = weights_of(quick, quick.prunable, (WeightMap.SQUARE, WeightMap.SQUARE), masks=masks)
    return TangentFlow(quick, weights, policy_of(policy)).log2_slope()


@dataclass(frozen=True)
class Powered:
    """Numbers ``tensor * 2^exponent``."""

    tensor: Tensor
    exponent: int

    def double(self) -> Tensor:
        return torch.ldexp(self.tensor.double(), torch.tensor(self.exponent))

    def log2_sum(self) -> float:
        total = float(self.tensor.sum(dtype=torch.float64))
        return math.log2(total) + self.exponent if total > 0 else -math.inf


def _gradients(network: PathNetwork, masks: Mapping[str, Tensor] | None, policy: Policy) -> dict[str, Powered]:
    """dR_2/du of every prunable weight that is left, 0 elsewhere."""
    weights = weights_of(network, network.prunable, (WeightMap.SQUARE, WeightMap.ONE), masks=masks)
    flow = PathFlow(network, weights, f=WeightMap.SQUARE, policy=policy)
    flow.forward()
    flow.backward()
    found = {}
    for name in network.prunable:
        made = weights[name].written_scores()
        found[name] = Powered(made.weight.reshape(network.tensors[name].shape), made.exponent)
    return found


@undisturbed
class PathKernel:
    """The path kernel of a model, or of what masks leave of it. The model is not touched.

    Args:
        model: a module (with ``example_input``, whose shapes alone matter) or its ``PathNetwork``.
        masks: bool tensors by parameter name, such as :class:`Masks`; None: every weight is there.
        policy: ``paths``, or another under which R_2 is multi-affine in u.

    Vectors have one entry for each prunable weight, pruned ones included (their entries are 0): either a mapping from
    name to a tensor of the weight's shape, or one flat tensor in the order of ``network.prunable``.

    Raises:
        ValueError: masks of another model, NaN weights, a network whose R_2 is not multi-affine.

    Example:
        >>> kernel = pp.PathKernel(model, torch.ones(1, 3, 32, 32), masks)
        >>> kernel.log2_trace(), kernel.top_eigenvalues(10)
    """

    def __init__(
        self,
        model: nn.Module | PathNetwork,
        example_input: Any = None,
        masks: Mapping[str, Tensor] | None = None,
        *,
        policy: str | Policy = "paths",
    ) -> None:
        self.network = as_network(model, example_input)
        self.policy = policy_of(policy)
        self.masks = None if masks is None else self._checked(masks)
        self._quick = merge_equal_positions(self.network, self.policy)
        names = self.network.prunable
        if not names:
            raise ValueError("PathKernel: model: wanted prunable weights, got none")
        self._sizes = [self.network.tensors[name].numel() for name in names]

    def _checked(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = {name: self.network.tensors[name].shape for name in self.network.prunable}
        for name in masks:
            if name not in known:
                raise ValueError(f"PathKernel: masks: wanted names of prunable weights, got '{name}'")
            if masks[name].shape != known[name] or masks[name].dtype != torch.bool:
                got = f"{masks[name].dtype} {tuple(masks[name].shape)}"
                raise ValueError(f"PathKernel: masks: '{name}': wanted bool {tuple(known[name])}, got {got}")
        return {name: masks[name] for name in masks}

    # ------------------------------------------------------------------------------------------------- exact

    @cached_property
    def _slope(self) -> dict[str, Powered]:
        return _gradients(self._quick, self.masks, self.policy)

    def log2_trace(self) -> float:
        """log2 of the trace; -inf where no path is left. One flow, forward."""
        return self._log2_trace

    @cached_property
    def _log2_trace(self) -> float:
        return self._flow.log2_slope()

    def trace(self) -> float:
        """The trace, ``sum_p sum_{i in p} (v_p / w_i)^2``; inf beyond the range of float64."""
        return _power(self.log2_trace())

    def diagonal(self) -> dict[str, Tensor]:
        """``dR_2/du`` of every weight, float64: what each adds to the trace; 0 where it is pruned."""
        return {name: part.double() for name, part in self._slope.items()}

    def shares(self) -> dict[str, float]:
        """The share of the trace that each layer has; they sum to 1 (all 0 where no path is left)."""
        total = self.log2_trace()
        return {
            name: _power(part.log2_sum() - total) if total > -math.inf else 0.0 for name, part in self._slope.items()
        }

    def branch_shares(self) -> dict[str, float]:
        """The share of the trace within each residual branch (branches may hold one another)."""
        shares = self.shares()
        return {b.name: sum(shares.get(name, 0.0) for name in b.weights) for b in self._reach.branches}

    @cached_property
    def _reach(self) -> Any:
        weights = weights_of(self._quick, self.network.prunable, (WeightMap.ONE, WeightMap.ONE), masks=self.masks)
        return reach(self._quick, weights, keep_bits=True)

    def trace_loss(self) -> dict[str, Tensor]:
        """What deleting each weight takes from the trace, float64: its own part and that of the paths it closes."""
        lost: dict[str, Tensor] = {}

        def take(weight: Weight, slope: Tensor | None, product: Tensor, exponent: Tensor) -> None:
            assert slope is not None
            u, unit = self._weight(weight.name).double().square(), _power(int(exponent))
            loss = (slope.double() + u * product.double()) * unit * self._mask(weight.name)
            lost[weight.name] = lost[weight.name] + loss if weight.name in lost else loss  # a tied weight's uses

        masks = {name: self._mask(name).to(self._flow.dtype) for name in self.network.prunable}
        self._flow.run(self._with_fixed(masks), take)
        return {name: lost[name] for name in self.network.prunable}

    def quadratic_form(self) -> float:
        """``1^T Pi 1``: the sum over weights of squared derivatives of the signed linear network's output on ones."""
        net = self.network
        weights = weights_of(net, net.prunable, (WeightMap.IDENTITY, WeightMap.ONE), masks=self.masks)
        ones = tuple(torch.ones((1, *node.shape), dtype=torch.float32) for node in net.nodes if isinstance(node, Input))
        recording = Recording(ones, (), {})  # no gates: all are open
        flow = GatedFlow(net, weights, recording, self.policy, source=ones, f=WeightMap.IDENTITY, scored=True)
        flow.forward()
        flow.backward()
        parts = [Powered((made := weights[n].written_scores()).weight, made.exponent) for n in net.prunable]
        return sum(float(part.double().square().sum()) for part in parts)

    def rank(self) -> int:
        """The rank of the kernel for weights in general position: live weights less live hidden units.

        Each hidden unit can be rescaled against the next layer without changing a path: one direction in which all
        path values stay. Units that identity connections tie together scale as one.
        """
        live = Masks.from_packed(self._reach.packed)
        weights = sum(int(bits.sum()) for bits in live.values())
        return weights - _scalings(walk_graph(self.network), live)

    # ------------------------------------------------------------------------------------------------ matvec

    def matvec(self, x: Vector) -> Vector:
        """``G x``, of the shape and type that x has (inf beyond that type's range). One flow with its tangent.

        Raises:
            ValueError: entries for other weights, or of another number.
        """
        parts, unit = self._parts(x), _power(self._scale)
        made = {name: part.to(parts[name].dtype) * unit for name, part in self._product(parts).items()}
        return self._flat(made) if isinstance(x, Tensor) else made

    def _parts(self, x: Vector) -> dict[str, Tensor]:
        names, total = self.network.prunable, sum(self._sizes)
        if isinstance(x, Tensor):
            if x.shape != (total,):
                raise ValueError(f"PathKernel.matvec: x: wanted shape ({total},), got {tuple(x.shape)}")
            pieces: Any = zip(names, x.split(self._sizes), strict=True)
        else:
            if set(x) != set(names):
                raise ValueError(f"PathKernel.matvec: x: wanted entries for {list(names)}, got {list(x)}")
            pieces = ((name, x[name]) for name in names)
        return {name: piece.reshape(self.network.tensors[name].shape) for name, piece in pieces}

    @cached_property
    def _scale(self) -> int:
        """G is handled as ``2^scale`` times a matrix of trace at most 1."""
        level = self.log2_trace()
        return math.ceil(level) if level > -math.inf else 0

    @cached_property
    def _flow(self) -> TangentFlow:
        weights = weights_of(self._quick, self.network.prunable, (WeightMap.SQUARE, WeightMap.SQUARE), masks=self.masks)
        return TangentFlow(self._quick, weights, self.policy, keep_squares=True)

    @cached_property
    def _scaled_slope(self) -> dict[str, Tensor]:
        return {name: _times(part, -self._scale) for name, part in self._slope.items()}

    def _weight(self, name: str) -> Tensor:
        return self.network.tensors[name].detach().to(self._flow.dtype)

    def _mask(self, name: str) -> Tensor:
        tensor = self.network.tensors[name]
        mask = None if self.masks is None else self.masks.get(name)
        return torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask.to(tensor.device)

    def _product(self, x: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """``2^-scale G x`` in the type of the flow; written to ``out``, if given.

        Fresh pages would cost as much as the passes that fill them, so directions have theirs for as long as this
        kernel lives, and Hessian products are added to the result as they are made.
        """
        dtype, device = self._flow.dtype, self.network.device
        made = {} if out is None else dict(out)
        for name in self.network.prunable:
            part = x[name].to(device, dtype)
            if self.masks is not None:
                part = part * self._mask(name)
            slope, along = self._scaled_slope[name], self._along[name]
            made[name] = torch.mul(part, slope, out=made[name]) if out is not None else part * slope
            torch.mul(part, self._weight(name), out=along)

        def take(weight: Weight, _: Tensor | None, product: Tensor, exponent: Tensor) -> None:
            made[weight.name].addcmul_(self._weight(weight.name), product, value=_power(int(exponent) - self._scale))

        self._flow.run(self._with_fixed(self._along), take, gradient=False)
        if self.masks is not None:
            for name in made:
                made[name] *= self._mask(name)
        return made

    @cached_property
    def _along(self) -> dict[str, Tensor]:
        return {name: torch.empty_like(self._weight(name)) for name in self.network.prunable}

    def _with_fixed(self, along: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A direction in which weights that are not prunable stay as they are."""
        fixed = {n: w for n, w in self._flow.weights.items() if n not in along}
        return {**along, **{n: torch.zeros(w.shape, dtype=self._flow.dtype) for n, w in fixed.items()}}

    # ---------------------------------------------------------------------------------------------- spectrum

    def top_eigenpairs(
        self, k: int = 10, *, tolerance: float | None = None, progress: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest eigenvalues of the kernel, descending, with eigenvectors of G and residuals.

        Lanczos with restarts (SciPy's ARPACK), begun at ``sign(w)``: with those signs G has no negative entry, so its
        leading eigenvector has those signs and no start could be nearer. Eigenvalues that are multiple because several
        weights enter R_2 by a sum (one for each output, say) are known in closed form (``summed_weights``).

        Args:
            tolerance: relative accuracy of the eigenvalues; None: 1e-10 for float64 weights, else 1e-5.
            progress: a bar of matrix products on stderr; None: when it is a terminal.

        Returns:
            values float64 [k] (inf beyond its range), vectors [weights, k], and residuals ``|G x - value x| / value``.

        Raises:
            ImportError: SciPy is missing.
            ValueError: k out of range.
        """
        pairs = self._leading(k, tolerance, progress)
        assert pairs.vectors is not None and pairs.residuals is not None
        return torch.ldexp(pairs.values, torch.tensor(self._scale)), pairs.vectors, pairs.residuals

    def top_eigenvalues(self, k: int = 10, **options: Any) -> Tensor:
        """The k largest eigenvalues, float64 [k], descending; options as for :meth:`top_eigenpairs`."""
        return torch.ldexp(self._leading_values(k, **options)[0], torch.tensor(self._scale))

    def log2_top_eigenvalues(self, k: int = 10, **options: Any) -> Tensor:
        """log2 of the k largest eigenvalues, however large they are."""
        return self._leading_values(k, **options)[0].log2() + self._scale

    def _leading_values(
        self, k: int, tolerance: float | None = None, progress: bool | None = None, vectors: bool = False
    ) -> tuple[Tensor, Eigenpairs, Reduced, list[tuple[int, int, int]]]:
        """Of ``2^-scale G``: the k largest eigenvalues; those found by products, and places of those within sets."""
        left = sum(int(self._mask(name).sum()) for name in self.network.prunable)
        if not 1 <= k <= left:
            raise ValueError(f"PathKernel.top_eigenpairs: k: wanted 1 to {left} (the live weights), got {k}")
        tolerance = tolerance if tolerance is not None else 1e-10 if self._flow.dtype == torch.float64 else 1e-5
        theta = {name: self._weight(name) for name in self.network.prunable}
        sets = summed_weights(self._quick, self.policy)
        space = Reduced(theta, self._scaled_slope, self.masks, sets)
        start = space.reduced({name: w.sign() for name, w in theta.items()})
        found = leading_eigenpairs(
            lambda y: space.product(y, self._product),
            start,
            min(k, space.count),
            tolerance,
            progress,
            vectors,
        )
        within, places = space.closed_form(k)
        both = torch.cat([found.values, within]).sort(descending=True, stable=True).values[:k]
        return both, found, space, places

    def _leading(self, k: int, tolerance: float | None, progress: bool | None) -> Eigenpairs:
        values, found, space, places = self._leading_values(k, tolerance, progress, vectors=True)
        assert found.vectors is not None and found.residuals is not None
        within = space.closed_form(k)[0]
        order = torch.cat([found.values, within]).argsort(descending=True, stable=True)[:k].tolist()
        vectors = torch.empty(sum(self._sizes), k, dtype=self._flow.dtype)
        residuals = torch.zeros(k, dtype=torch.float64)
        for column, position in enumerate(order):
            if position < len(found.values):
                parts = space.expanded(found.vectors[:, position].to(self.network.device))
                residuals[column] = found.residuals[position]
            else:
                parts = space.direction(*places[position - len(found.values)])
            vectors[:, column] = self._flat(parts)
        return Eigenpairs(values, vectors, residuals)

    def _flat(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([parts[name].flatten() for name in self.network.prunable])

    def _probe(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Signs drawn with equal chance, 0 where pruned."""
        drawn = {}
        for name in self.network.prunable:
            coins = torch.randint(0, 2, self.network.tensors[name].shape, generator=generator)
            drawn[name] = (2 * coins - 1).to(self.network.device, self._flow.dtype) * self._mask(name)
        return drawn

    def log2_frobenius(self, probes: int = 16, seed: int = 0) -> tuple[float, float]:
        """log2 of the Frobenius norm, ``sqrt(tr G^2)``, estimated (Hutchinson), and its relative standard error."""
        if probes < 2:
            raise ValueError(f"PathKernel.log2_frobenius: probes: wanted at least 2, got {probes}")
        generator = torch.Generator().manual_seed(seed)
        draws = []
        for _ in range(probes):
            made = self._product(self._probe(generator))
            draws.append(sum(float(part.double().square().sum()) for part in made.values()))
        squares = torch.tensor(draws, dtype=torch.float64)
        mean = float(squares.mean())
        if mean == 0:
            return -math.inf, 0.0
        error = float(squares.std()) / math.sqrt(probes) / mean / 2  # of the root
        return 0.5 * math.log2(mean) + self._scale, error

    def frobenius(self, probes: int = 16, seed: int = 0) -> float:
        """The Frobenius norm, estimated by ``probes`` products."""
        return _power(self.log2_frobenius(probes, seed)[0])

    def effective_rank(self, probes: int = 16, seed: int = 0) -> float:
        """``tr(G)^2 / tr(G^2)``: how many equal eigenvalues would have that trace and norm."""
        norm = self.log2_frobenius(probes, seed)[0]
        return _power(2 * (self.log2_trace() - norm)) if norm > -math.inf else 0.0

    def spectral_density(self, probes: int = 8, steps: int = 40, seed: int = 0) -> SpectralDensity:
        """The distribution of eigenvalues by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017).

        Args:
            probes: random starts; the spread over them is the error.
            steps: products, and points, for each.
        """
        generator = torch.Generator().manual_seed(seed)
        live = sum(int(self._mask(name).sum()) for name in self.network.prunable)
        starts = (self._flat(self._probe(generator)) for _ in range(probes))
        return lanczos_density(
            lambda x: self._flat(self._product(self._parts(x))), starts, min(steps, live), live, self._scale
        )


def _power(level: float) -> float:
    try:
        return 2.0**level
    except OverflowError:
        return math.inf


def _times(part: Powered, exponent: int) -> Tensor:
    """The numbers at another exponent, in their own type."""
    return part.tensor * power_of_two(torch.tensor(part.exponent + exponent), part.tensor.dtype).to(part.tensor.device)


def _scalings(graph: WalkGraph, live: Mapping[str, Tensor]) -> int:
    """Classes of hidden units that scale as one and lie on a path.

    Units that fixed connections link form a class. A class with an input or output unit cannot be rescaled.
    """
    first: dict[tuple[int, bool], int] = {}  # (node, whether the units that enter it) -> number of its first unit
    count = 0
    for k in graph.order:
        first[k, False], count = count, count + graph.units[k]
        if k in graph.sites:
            first[k, True], count = count, count + graph.sites[k].entering
    parent = list(range(count))

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for k in graph.order:
        for edge in graph.ahead[k]:
            base = first[edge.target, edge.target in graph.sites]
            sources = torch.repeat_interleave(torch.arange(len(edge.ahead.start) - 1), edge.ahead.counts)
            for source, target in zip(sources.tolist(), edge.ahead.targets.tolist(), strict=True):
                parent[root(first[k, False] + source)] = root(base + target)
    fixed = {root(first[k, False] + n) for k in (*graph.inputs, *graph.outputs) for n in range(graph.units[k])}
    used: set[int] = set()
    for k, site in graph.sites.items():
        groups, rows, columns, entries = site.shape
        there = live[site.weight].reshape(groups, rows, columns, entries).any(3)
        ends = (there.any(1).flatten(), there.any(2).flatten())  # at the columns, at the rows
        entering, leaving = ends if site.forward_to_rows else ends[::-1]
        used |= {root(first[k, True] + n) for n in entering.nonzero()[:, 0].tolist()}
        used |= {root(first[k, False] + n) for n in leaving.nonzero()[:, 0].tolist()}
    return len(used - fixed)
