"""The same pruning by ``torch.nn.utils.prune`` and by the usual SynFlow loop, and here: the masks are the same.

python examples/migration.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import pathprune as pp
from pathprune.models import vgg11_bn


def magnitude_in_torch(model: nn.Module, sparsity: float) -> pp.Masks:
    """Global magnitude pruning as torch has it: hooks, `weight_orig`, `weight_mask`."""
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    pairs = [(layer, "weight") for layer in layers]
    torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=sparsity)
    return pp.Masks.from_torch_prune(model)


def synflow_by_hand(model: nn.Module, x: Tensor, density: float, rounds: int) -> dict[str, Tensor]:
    """SynFlow the usual way, in float64 so that it does not overflow: absolute weights, ones, autograd, `kthvalue`."""
    model = copy.deepcopy(model).double().eval()
    for tensor in model.state_dict().values():
        tensor.abs_()
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    for done in range(1, rounds + 1):
        model.zero_grad()
        model(torch.ones_like(x, dtype=torch.float64)).sum().backward()
        scores = torch.cat([(weight.grad * weight).flatten() for weight in weights.values()])
        keep = round(density ** (done / rounds) * scores.numel())
        threshold = scores.kthvalue(scores.numel() - keep + 1).values
        with torch.no_grad():
            for weight in weights.values():
                weight.mul_(weight.grad * weight >= threshold)
    return {name: weight != 0 for name, weight in weights.items()}


def main(network: Callable[[], nn.Module] = vgg11_bn) -> tuple[int, int]:
    """Prints how many bits differ; returns them, for magnitude and for SynFlow."""
    torch.manual_seed(0)
    model, x = network(), torch.ones(1, 3, 32, 32)

    theirs = magnitude_in_torch(model, sparsity=0.9)
    ours = pp.prune(model, pp.Magnitude(), sparsity=0.9, example_input=x)
    magnitude = (ours ^ theirs).kept
    print(f"magnitude: {magnitude} of {ours.total:,} bits differ from torch.nn.utils.prune")

    by_hand = pp.Masks(synflow_by_hand(model, x, density=0.1, rounds=3))
    ours = pp.prune(model, pp.SynFlow(rounds=3), density=0.1, example_input=x)
    synflow = (ours ^ by_hand).kept
    print(f"SynFlow: {synflow} of {ours.total:,} bits differ from the loop in float64; ours is in float32")
    return magnitude, synflow


if __name__ == "__main__":
    main()
