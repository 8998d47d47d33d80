"""Path-based pruning of neural networks at the speed of the memory bus.

import pathprune as pp

masks = pp.prune(model, pp.SynFlow(rounds=100), density=0.05, example_input=x)   # the model is unchanged
masks.apply_(model)
"""

from ._mask_io import MaskFileError, MaskMismatchError
from .masked import PackedMask, masked_matmul, pack_mask
from .masks import Masks
from .network import PathNetwork, SupportReport, UnsupportedModelError
from .ops import WeightMap
from .path_sampling import Paths, sample_paths
from .policy import Policy
from .pruners import (
    FORCE,
    NTKSAP,
    PHEW,
    SBP,
    SNIP,
    Fisher,
    GraSP,
    Hutchinson,
    IterSNIP,
    Magnitude,
    Pruner,
    Random,
    Sketch,
    SynFlow,
    SynFlowDist,
    SynFlowL2,
    SynFlowL2Dist,
    TraceSaliency,
    cross_entropy,
    sample_with_replacement,
)
from .pruning import prune
from .report import PathCounts, Report, path_counts
from .scoring import NetworkScores, scores
from .select import NonFiniteScoreError, Threshold, keep_masks, select_threshold
from .sparse import SparseConv2d, SparseLinear, densify, load_sparse, save_sparse, sparsify
from .version import __version__

__all__ = [
    "FORCE",
    "NTKSAP",
    "PHEW",
    "SBP",
    "SNIP",
    "Fisher",
    "GraSP",
    "Hutchinson",
    "IterSNIP",
    "Magnitude",
    "MaskFileError",
    "MaskMismatchError",
    "Masks",
    "NetworkScores",
    "NonFiniteScoreError",
    "PackedMask",
    "PathCounts",
    "PathNetwork",
    "Paths",
    "Policy",
    "Pruner",
    "Random",
    "Report",
    "Sketch",
    "SparseConv2d",
    "SparseLinear",
    "SupportReport",
    "SynFlow",
    "SynFlowDist",
    "SynFlowL2",
    "SynFlowL2Dist",
    "Threshold",
    "TraceSaliency",
    "UnsupportedModelError",
    "WeightMap",
    "__version__",
    "cross_entropy",
    "densify",
    "keep_masks",
    "load_sparse",
    "masked_matmul",
    "pack_mask",
    "path_counts",
    "prune",
    "sample_paths",
    "sample_with_replacement",
    "save_sparse",
    "scores",
    "select_threshold",
    "sparsify",
]
