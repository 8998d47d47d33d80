"""SNIP and GraSP on VGG-16-BN for 32x32, 100 images in one batch: time, and peak memory beyond the model.

Ours is the whole of `prune`, effective density included, from a network that is already read (torch.export takes a
second or two once, which the others do not need); the others end with their masks.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch
from torch import Tensor, nn

import pathprune as pp
from harness import Case, Result, assert_same_masks
from pathprune import models
from sensitivity_baselines import PlainSensitivity, published_grasp, published_snip

OURS = "pathprune"
DIFFERENCES = "pathprune, finite differences"
PUBLISHED = "published way"
PLAIN = "best PyTorch"
DENSITY = 0.05


def _made() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = models.vgg16_bn().eval()
    return model, [(torch.randn(100, 3, 32, 32), torch.arange(100) % 10)]


def _case(method: str, what: str) -> Case:
    """All ways of one method ("SNIP" or "GraSP"); their masks are compared first."""
    model, data = _made()
    network = pp.PathNetwork.from_module(model, data[0][0][:1])
    plain = PlainSensitivity(_made()[0])
    published = published_snip if method == "SNIP" else published_grasp

    def ours(**options: str) -> pp.Masks:
        pruner = (pp.SNIP if method == "SNIP" else pp.GraSP)(data, **options)
        return pp.prune(network, pruner, density=DENSITY, progress=False)

    def plainly() -> dict[str, Tensor]:
        return (plain.snip if method == "SNIP" else plain.grasp)(data, DENSITY)

    def verify() -> str:
        masks = ours()
        rounding = int(1e-4 * masks.total)  # float32, in another order
        said = [
            f"against the {name}: {assert_same_masks(masks, other, rounding)}"
            for name, other in ((PUBLISHED, published(model, data, DENSITY)), (PLAIN, plainly()))
        ]
        if method == "GraSP":
            differing = sum(int((masks[n] != m).sum()) for n, m in ours(method="finite_difference").items())
            said.append(f"finite differences (not the same computation): {differing} bits differ")
        return "; ".join(said)

    case = Case(f"{method} to {DENSITY:.0%}, VGG-16-BN for 32x32, 14.7 M weights, 100 images{what}", verify)
    case.add(OURS, ours)
    if method == "GraSP":
        case.add(DIFFERENCES, lambda: ours(method="finite_difference"))
    return case.add(PUBLISHED, lambda: published(model, data, DENSITY)).add(PLAIN, plainly)


def seconds(method: str, repeats: int, bandwidth: float) -> Result:
    """Time of each way."""
    return _case(method, "").measure(repeats, bandwidth=bandwidth)


def memory(method: str, bandwidth: float) -> Result:
    """Peak of what is alive, and the time that takes.

    Every large block is mapped by itself, so that it leaves the resident set when it is freed: else the peak also has
    how the heap is fragmented, by all that ran before. Hence these cases come first.
    """
    case = _case(method, ", every large block mapped")
    _set_heap(map_from=1 << 20, keep=1 << 17)
    try:
        return case.measure(1, warmup=0, bandwidth=bandwidth, peaks=True)
    finally:
        _set_heap(map_from=1 << 25, keep=1 << 26)  # what glibc itself arrives at with blocks of this size


def _set_heap(map_from: int, keep: int) -> None:
    """From which size blocks are mapped by themselves, and how much freed memory the heap keeps, in bytes."""
    trim_threshold, map_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).mallopt(map_threshold, map_from)
        ctypes.CDLL(None).mallopt(trim_threshold, keep)
