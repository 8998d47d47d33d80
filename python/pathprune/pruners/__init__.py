"""Pruners: one file per paper, one loop for all (``base``)."""

from .base import PathPruner, Pruner
from .grasp import GraSP
from .magnitude import Magnitude, Random
from .ntk_sap import NTKSAP
from .objective import cross_entropy
from .path_exclusion import PX, PXExact
from .phew import PHEW
from .sensitivity import FORCE, SBP, SNIP, Fisher, Hutchinson, IterSNIP
from .sketching import Sketch, sample_with_replacement
from .unified_paths import SynFlow, SynFlowDist, SynFlowL2, SynFlowL2Dist, TraceSaliency
from .wanda import Wanda

__all__ = [
    "FORCE",
    "NTKSAP",
    "PHEW",
    "PX",
    "SBP",
    "SNIP",
    "Fisher",
    "GraSP",
    "Hutchinson",
    "IterSNIP",
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
    "Wanda",
    "cross_entropy",
    "sample_with_replacement",
]
