"""Path-based pruning of neural networks at the speed of the memory bus.

import pathprune as pp

masks = pp.prune(model, pp.SynFlow(rounds=100), density=0.05, example_input=x)   # the model is unchanged
masks.apply_(model)
"""

from ._mask_io import MaskFileError, MaskMismatchError
from .allocation import allocate
from .batches import class_balanced
from .cell_space import CellSpace
from .checkpoint import Checkpoint
from .checkpoint_pruning import PrunedCheckpoint, prune_checkpoint
from .comparison import Comparison, compare
from .convergence import Convergence, predict_convergence
from .gradient_moments import GradientMoments, gradient_moments
from .layers import layer_network
from .many_networks import score_many
from .masked import PackedMask, masked_matmul, pack_mask
from .masks import Masks
from .mean_field import EdgeOfChaos, chi, critical_sparsity_bound, edge_of_chaos, edge_of_chaos_init_
from .network import PathNetwork, SupportReport, UnsupportedModelError
from .ops import WeightMap
from .path_kernel import PathKernel
from .path_sampling import Paths, sample_paths
from .policy import Policy
from .pruners import (
    FORCE,
    NTKSAP,
    PHEW,
    PX,
    SBP,
    SNIP,
    Fisher,
    GraSP,
    Hutchinson,
    IterSNIP,
    Magnitude,
    Pruner,
    PXExact,
    Random,
    Sketch,
    SynFlow,
    SynFlowDist,
    SynFlowL2,
    SynFlowL2Dist,
    TraceSaliency,
    Wanda,
    cross_entropy,
    sample_with_replacement,
)
from .pruning import prune
from .report import PathCounts, Report, path_counts
from .rescaling import Rescaling, rescale_
from .sanity import Inverted, random_labels, reinit, shuffled_pixels
from .score_table import NetworkScore
from .scoring import NetworkScores, scores
from .select import NonFiniteScoreError, Threshold, keep_masks, select_threshold
from .sharded_masks import ShardedMasks
from .shards import CheckpointError
from .space_scores import score_space
from .sparse import SparseConv2d, SparseLinear, densify, load_sparse, save_sparse, sparsify
from .stable_resnet import StableResNet, stable_resnet
from .tangent_kernel import ntk, ntk_trace, ntk_trace_bound, path_activations
from .version import __version__

__all__ = [
    "FORCE",
    "NTKSAP",
    "PHEW",
    "PX",
    "SBP",
    "SNIP",
    "CellSpace",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "Convergence",
    "EdgeOfChaos",
    "Fisher",
    "GraSP",
    "GradientMoments",
    "Hutchinson",
    "Inverted",
    "IterSNIP",
    "Magnitude",
    "MaskFileError",
    "MaskMismatchError",
    "Masks",
    "NetworkScore",
    "NetworkScores",
    "NonFiniteScoreError",
    "PXExact",
    "PackedMask",
    "PathCounts",
    "PathKernel",
    "PathNetwork",
    "Paths",
    "Policy",
    "PrunedCheckpoint",
    "Pruner",
    "Random",
    "Report",
    "Rescaling",
    "ShardedMasks",
    "Sketch",
    "SparseConv2d",
    "SparseLinear",
    "StableResNet",
    "SupportReport",
    "SynFlow",
    "SynFlowDist",
    "SynFlowL2",
    "SynFlowL2Dist",
    "Threshold",
    "TraceSaliency",
    "UnsupportedModelError",
    "Wanda",
    "WeightMap",
    "__version__",
    "allocate",
    "chi",
    "class_balanced",
    "compare",
    "critical_sparsity_bound",
    "cross_entropy",
    "densify",
    "edge_of_chaos",
    "edge_of_chaos_init_",
    "gradient_moments",
    "keep_masks",
    "layer_network",
    "load_sparse",
    "masked_matmul",
    "ntk",
    "ntk_trace",
    "ntk_trace_bound",
    "pack_mask",
    "path_activations",
    "path_counts",
    "predict_convergence",
    "prune",
    "prune_checkpoint",
    "random_labels",
    "reinit",
    "rescale_",
    "sample_paths",
    "sample_with_replacement",
    "save_sparse",
    "score_many",
    "score_space",
    "scores",
    "select_threshold",
    "shuffled_pixels",
    "sparsify",
    "stable_resnet",
]
