"""The path kernel of a network: what it is computed by.

J holds the derivatives of all path values by all weights, Pi = J J^T (Gebhart, Saxena and Schrater 2021). Its trace is
``sum_p sum_{i in p} (v_p / w_i)^2 = sum_i dR_2 / du_i`` with u = w^2: one forward and one backward flow of the squared
network, which read every weight twice. Oracle: enumeration of paths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .flow import PathFlow
from .network import PathNetwork
from .nodes import Synapse
from .ops import WeightMap
from .policy import Policy, policy_of
from .weights import Scratch, Weight


def log2_trace(
    network: PathNetwork, masks: Mapping[str, Tensor] | None = None, policy: str | Policy = "paths"
) -> float:
    """log2 of the path kernel's trace over the prunable weights that are left; -inf where no path is.

    Args:
        masks: bool tensors by name; None: all weights are there.
    """
    synapses = [node for k in network.synapses() if isinstance(node := network.nodes[k], Synapse)]
    uses = {node.weight: sum(other.weight == node.weight for other in synapses) for node in synapses}
    scratch = Scratch()
    weights = {
        node.weight: Weight(
            node.weight,
            network.tensors[node.weight],
            node,
            f=WeightMap.SQUARE,
            s=WeightMap.ONE,
            uses=uses[node.weight],
            scored=node.weight in network.prunable,
            mask=masks.get(node.weight) if masks else None,
            scratch=scratch,
        )
        for node in reversed(synapses)
    }
    flow = PathFlow(network, weights, f=WeightMap.SQUARE, policy=policy_of(policy))
    flow.forward()
    flow.backward()
    total = torch.tensor(-math.inf, dtype=torch.float64)
    for name in network.prunable:
        made = weights[name].written_scores()
        amount = made.weight.sum(dtype=torch.float64).cpu()
        total = torch.logaddexp2(total, amount.log2() + made.exponent)
    return float(total)
