"""What pruning left of a network: table, JSON, plot.

    print(masks.report())                        what ``prune`` found, at no cost
    print(masks.report(model, example_input))    the same, found anew on the model

Density counts the weights that are kept, effective density those of them that lie on an input-output path:
the others can never matter (Vysogorets and Kempe 2021). A layer with no weight left, or a residual branch
that no path runs through any more, is called out in words.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ._mask_io import MaskMismatchError, write_atomically
from .flow import PathFlow
from .liveness import Branch, LayerReach, Reach, reach
from .masks import Masks
from .network import PathNetwork, as_network
from .ops import WeightMap
from .policy import policy_of
from .spatial import merge_equal_positions
from .surroundings import undisturbed
from .weights import weights_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class PathCounts:
    """The paths of a (masked) network.

    Attributes:
        log2: log2 of the number of input-output paths, positions of feature maps told apart; -inf if none is.
        layers: weight name -> how many of its weights and units lie on a path.
        branches: residual branches, and whether a path still runs through each.
        effective: masks of the weights that lie on a path.
    """

    log2: float
    layers: dict[str, LayerReach]
    branches: tuple[Branch, ...]
    effective: Masks


@undisturbed
def path_counts(model: nn.Module | PathNetwork, masks: Masks | None = None, example_input: Any = None) -> PathCounts:
    """How many paths there are, and what they reach. Weights count for 1, biases begin no path.

    Args:
        model: a module (with ``example_input``) or its ``PathNetwork``; it is not touched.
        masks: what is left of it; None: everything.

    Raises:
        MaskMismatchError: the masks are of another model.
        UnsupportedModelError: the model cannot be read.

    Determinism: exact reachability; the count is rounded as float32 is (float64 for float64 weights).

    Example:
        >>> path_counts(model, masks, x).effective.density
    """
    network = merge_equal_positions(_network_of(model, masks, example_input), "paths")
    maps = (WeightMap.ONE, WeightMap.ONE)
    weights = weights_of(network, network.prunable, maps, masks=masks)
    policy = policy_of("paths", norm="unit")
    log2 = float(PathFlow(network, weights, f=WeightMap.ONE, policy=policy, scored=False).forward()[0])
    found = reach(network, weights, keep_bits=True)
    return PathCounts(log2, found.layers, found.branches, Masks.from_packed(found.packed))


def _network_of(model: nn.Module | PathNetwork, masks: Masks | None, example_input: Any) -> PathNetwork:
    network = as_network(model, example_input)
    if masks is not None and not isinstance(masks, Masks):
        raise TypeError(f"path_counts: masks: wanted Masks, got {type(masks).__name__}")
    for name in masks or ():
        tensor = network.tensors.get(name)
        if tensor is None and network.model is not None:
            tensor = dict(network.model.named_parameters()).get(name)
        if masks is not None and (tensor is None or tensor.shape != masks.packed(name)[1]):
            got = "none of that name" if tensor is None else f"shape {list(tensor.shape)}"
            raise MaskMismatchError(
                f"masks of another model: {name} {list(masks.packed(name)[1])}: the model has {got}"
            )
    return network


@dataclass(frozen=True)
class Layer:
    """One weight tensor. ``reach`` is None where nothing is known about paths."""

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    reach: LayerReach | None = None

    @property
    def density(self) -> float:
        return self.kept / self.weights if self.weights else 1.0

    @property
    def effective_density(self) -> float | None:
        if self.reach is None:
            return None
        return self.reach.live / self.weights if self.weights else 1.0

    @property
    def collapsed(self) -> bool:
        """No weight is left."""
        return self.kept == 0 < self.weights

    def as_dict(self) -> dict[str, Any]:
        known = {} if self.reach is None else {"effective_density": self.effective_density, **vars(self.reach)}
        return {
            "name": self.name,
            "shape": list(self.shape),
            "weights": self.weights,
            "kept": self.kept,
            "density": self.density,
            **known,
        }


@dataclass(frozen=True)
class BranchLayers:
    """One residual branch and its pruned layers."""

    branch: Branch
    layers: tuple[Layer, ...]

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers)

    @property
    def live(self) -> int:
        return sum(layer.reach.live for layer in self.layers if layer.reach)

    @property
    def units(self) -> tuple[int, int]:
        """Output units of the branch's layers: (on a path, all)."""
        reached = [layer.reach for layer in self.layers if layer.reach]
        return sum(r.live_outputs for r in reached), sum(r.outputs for r in reached)

    @property
    def narrowest(self) -> int:
        """The smallest width: paths through the branch squeeze through that many units."""
        return min((layer.reach.live_outputs for layer in self.layers if layer.reach), default=0)

    def as_dict(self) -> dict[str, Any]:
        return {
            **vars(self.branch),
            "weights": [layer.name for layer in self.layers],
            "total": self.weights,
            "kept": self.kept,
            "live": self.live,
            "density": self.kept / self.weights,
            "effective_density": self.live / self.weights,
            "live_units": self.units[0],
            "units": self.units[1],
            "narrowest": self.narrowest,
        }


class Report:
    """What masks leave of a network. ``print(report)``, ``report.to_json()``, ``report.plot()``.

    Attributes:
        layers: one :class:`Layer` per mask.
        branches: one :class:`BranchLayers` per residual branch that was pruned.
        biases: (kept, all) of the biases, where the masks have some; they count nowhere else.
        findings: what ``prune`` observed on the way: rounds, seconds, log2 R, ...
        metadata: the masks' metadata.
        log2_paths: log2 of the number of paths left, or None where the network is not known.
    """

    def __init__(
        self,
        layers: list[Layer],
        branches: list[BranchLayers],
        metadata: Mapping[str, Any],
        log2_paths: float | None,
        biases: tuple[int, int] = (0, 0),
    ) -> None:
        self.layers, self.branches, self.metadata, self.log2_paths = layers, branches, metadata, log2_paths
        self.biases = biases
        self.findings: Mapping[str, Any] = metadata.get("findings", {})

    @classmethod
    @undisturbed
    def of(cls, masks: Masks, model: nn.Module | PathNetwork | None = None, example_input: Any = None) -> Report:
        """A report from what the masks' metadata say, or with a model found anew.

        Raises:
            MaskMismatchError: the masks are of another model.
            ValueError: a model without ``example_input``.
        """
        log2_paths, found = None, None
        if model is not None:
            counts = path_counts(model, masks, example_input)
            log2_paths, found = counts.log2, Reach(counts.layers, counts.branches, {})
        elif "structure" in masks.metadata.get("findings", {}):
            found = Reach.from_dict(masks.metadata["findings"]["structure"])
        layers, biases = {}, [0, 0]
        for name, (kept, total) in masks.counts().items():
            shape = tuple(masks.packed(name)[1])
            if len(shape) == 1:
                biases = [biases[0] + kept, biases[1] + total]
                continue
            reached = None if found is None else found.layers.get(name, LayerReach(0, 0, 0, 0, 0))
            layers[name] = Layer(name, shape, total, kept, reached)
        branches = []
        for branch in found.branches if found else ():
            inside = tuple(layers[name] for name in branch.weights if name in layers)
            if inside:
                branches.append(BranchLayers(branch, inside))
        return cls(list(layers.values()), branches, masks.metadata, log2_paths, (biases[0], biases[1]))

    # ------------------------------------------------------------------------------------------------ totals

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers)

    @property
    def density(self) -> float:
        return self.kept / self.weights if self.weights else 1.0

    @property
    def live(self) -> int | None:
        """Kept weights that lie on a path; None where nothing is known about paths."""
        if any(layer.reach is None for layer in self.layers):
            return None
        return sum(layer.reach.live for layer in self.layers if layer.reach)

    @property
    def effective_density(self) -> float | None:
        live = self.live
        return None if live is None else live / self.weights if self.weights else 1.0

    @property
    def collapsed_layers(self) -> list[str]:
        """Names of layers with no weight left."""
        return [layer.name for layer in self.layers if layer.collapsed]

    @property
    def dead_layers(self) -> list[str]:
        """Names of layers that keep weights, none of them on a path."""
        return [layer.name for layer in self.layers if layer.kept and layer.reach and not layer.reach.live]

    @property
    def collapsed_branches(self) -> list[str]:
        """Names of residual branches that no path runs through."""
        return [side.branch.name for side in self.branches if not side.branch.open]

    @property
    def disconnected(self) -> bool:
        """Whether no pruned weight lies on a path any more."""
        return self.live == 0 and self.weights > 0

    # ---------------------------------------------------------------------------------------------- the forms

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; non-finite numbers are None."""
        about = {key: value for key, value in self.metadata.items() if key != "findings"}
        findings = {key: value for key, value in self.findings.items() if key != "structure"}
        whole = {
            "weights": self.weights,
            "kept": self.kept,
            "live": self.live,
            "density": self.density,
            "effective_density": self.effective_density,
            "log2_paths": self.log2_paths,
            "collapsed_layers": self.collapsed_layers,
            "dead_layers": self.dead_layers,
            "collapsed_branches": self.collapsed_branches,
            "disconnected": self.disconnected,
            **({"biases": self.biases[1], "kept_biases": self.biases[0]} if self.biases[1] else {}),
            "layers": [layer.as_dict() for layer in self.layers],
            "branches": [side.as_dict() for side in self.branches],
            "findings": findings,
            "masks": about,
        }
        return _finite(whole)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text; with a path, also written there, whole or not at all."""
        text = json.dumps(self.as_dict(), indent=2) + "\n"
        if path is not None:
            write_atomically(path, [text.encode()])
        return text

    def plot(self, path: str | os.PathLike[str] | None = None, ax: Axes | None = None) -> Axes:
        """Density, effective density and width of every layer.

        Args:
            path: where to save the figure (its suffix says how); None: nowhere.
            ax: axes to draw into; room for the widths is taken from their right. None: a new figure.

        Returns:
            The axes of the densities.

        Raises:
            ImportError: matplotlib is missing.
        """
        from .plots import plot_layers

        return plot_layers(self, path, ax)

    def __str__(self) -> str:
        from .tables import report_text

        return report_text(self)

    def __repr__(self) -> str:
        known = self.effective_density
        effective = "" if known is None else f", effective density {known:.4g}"
        return f"Report({len(self.layers)} layers, density {self.density:.4g}{effective})"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
