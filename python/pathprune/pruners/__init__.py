"""Pruners: one file per paper, one loop for all (``base``)."""

from .base import PathPruner, Pruner
from .magnitude import Magnitude, Random
from .path_exclusion import PX, PXExact
from .phew import PHEW
from .sketching import Sketch, sample_with_replacement
from .unified_paths import SynFlow, SynFlowDist, SynFlowL2, SynFlowL2Dist, TraceSaliency

__all__ = [
    "PHEW",
    "PX",
    "Magnitude",
    "PXExact",
    "PathPruner",
    "Pruner",
    "Random",
    "Sketch",
    "SynFlow",
    "SynFlowDist",
    "SynFlowL2",
    "SynFlowL2Dist",
    "TraceSaliency",
    "sample_with_replacement",
]
