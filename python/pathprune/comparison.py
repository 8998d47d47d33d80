"""Masks side by side: what they leave of the path kernel, of the tangent kernel on data, of widths and of paths."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ._mask_io import write_atomically
from .batches import Data
from .masks import Masks
from .network import PathNetwork, as_network
from .path_kernel import PathKernel
from .report import path_counts
from .surroundings import undisturbed
from .tables import percent, table
from .tangent_kernel import ntk_trace, ntk_trace_bound

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class MaskFacts:
    """What one set of masks leaves of a network.

    Attributes:
        density, effective_density: weights kept; weights kept that lie on a path.
        live_units: output units of all layers that lie on a path, and ``narrowest``: of the layer with fewest.
        log2_paths: paths that are left.
        log2_trace: of the path kernel. log2_eigenvalues: its largest, descending.
        ntk_trace, log2_ntk_bound: of the tangent kernel on the data, gates held as they are, and its bound through
            paths; None without data.
    """

    name: str
    density: float
    effective_density: float
    live_units: int
    narrowest: int
    log2_paths: float
    log2_trace: float
    log2_eigenvalues: tuple[float, ...]
    ntk_trace: float | None
    log2_ntk_bound: float | None


@dataclass(frozen=True)
class Comparison:
    """``print(comparison)``, ``comparison.to_json()``, ``comparison.plot("masks.png")``."""

    rows: tuple[MaskFacts, ...]

    def __str__(self) -> str:
        with_data = any(row.ntk_trace is not None for row in self.rows)
        head = ["masks", "density", "effective", "live units", "narrowest", "log2 paths", "log2 tr Pi", "log2 top"]
        body = []
        for row in self.rows:
            cells = [row.name, percent(row.density), percent(row.effective_density), f"{row.live_units:,}"]
            cells += [str(row.narrowest), _short(row.log2_paths), _short(row.log2_trace)]
            cells += [_short(row.log2_eigenvalues[0]) if row.log2_eigenvalues else "-"]
            body.append([*cells, f"{row.ntk_trace:.4g}"] if row.ntk_trace is not None else cells)
        return table([*head, "tr NTK"] if with_data else head, body)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON text (infinities as null); with a path, also written there, whole or not at all."""
        rows = [{key: _finite(value) for key, value in asdict(row).items()} for row in self.rows]
        text = json.dumps(rows, indent=2) + "\n"
        if path is not None:
            write_atomically(path, [text.encode()])
        return text

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Bars for each set of masks: trace and largest eigenvalue, the tangent kernel's trace, units, paths.

        Raises:
            ImportError: matplotlib is missing.
        """
        from .plots import plot_comparison

        return plot_comparison(self.rows, path)


@undisturbed
def compare(
    model: nn.Module | PathNetwork,
    masks: Mapping[str, Masks | None] | Sequence[Masks],
    example_input: Any = None,
    *,
    data: Data | None = None,
    eigenvalues: int = 1,
    probes: int | None = 4,
) -> Comparison:
    """Puts masks of one model side by side.

    Args:
        model: a module (with ``example_input``) or its ``PathNetwork``.
        masks: by name (None: the whole network), or a list, named by their methods and densities.
        data: a re-iterable of batches, for the tangent kernel.
        eigenvalues: how many of the path kernel's to find (0: none; they take most of the time).
        probes: for the trace of the tangent kernel; None: exact.

    Raises:
        ValueError: nothing to compare, or what :class:`PathKernel` refuses.

    Example:
        >>> print(pp.compare(model, {"SynFlow": a, "PHEW": b, "dense": None}, x, data=batches))
    """
    if isinstance(masks, Masks):
        raise TypeError("compare: masks: wanted several, by name or in a list, got one Masks; put it into a list")
    named = masks if isinstance(masks, Mapping) else {_title(m, k): m for k, m in enumerate(masks)}
    if not named:
        raise ValueError("compare: masks: wanted at least one, got none")
    network = as_network(model, example_input)
    return Comparison(tuple(_facts(name, network, m, data, eigenvalues, probes) for name, m in named.items()))


def _title(masks: Masks, position: int) -> str:
    method = masks.metadata.get("method", f"masks {position}")
    return f"{method} {percent(masks.density)}"


def _facts(
    name: str, network: PathNetwork, masks: Masks | None, data: Data | None, eigenvalues: int, probes: int | None
) -> MaskFacts:
    counts = path_counts(network, masks)
    widths = [reached.live_outputs for reached in counts.layers.values()]
    kernel = PathKernel(network, masks=masks)
    level = kernel.log2_trace()
    top: tuple[float, ...] = ()
    if eigenvalues and level > -math.inf:
        top = tuple(kernel.log2_top_eigenvalues(eigenvalues, progress=False).tolist())
    return MaskFacts(
        name=name,
        density=1.0 if masks is None else masks.density,
        effective_density=counts.effective.density,
        live_units=sum(widths),
        narrowest=min(widths, default=0),
        log2_paths=counts.log2,
        log2_trace=level,
        log2_eigenvalues=top,
        ntk_trace=None if data is None else ntk_trace(network, data, masks, probes=probes, hold_gates=True),
        log2_ntk_bound=None if data is None else ntk_trace_bound(network, data, masks, hold_gates=True),
    )


def _short(level: float) -> str:
    return f"{level:.2f}" if math.isfinite(level) else "none"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
