"""The exact k-th largest of many scores, against torch.kthvalue and what else PyTorch and numpy have.

Bytes of ours: one sampled pass (1/64 of the reads) and one full read.
"""

from __future__ import annotations

import torch

import pathprune as pp
from harness import Case, Result
from selection_baselines import SELECTIONS

OURS = "pathprune"


def kth_of(
    millions: int, repeats: int, bandwidth: float, zeros: float = 0.0, slow: bool = True, device: str = "cpu"
) -> Result:
    """The threshold that keeps a tenth of ``millions`` * 2^20 scores."""
    rows = millions * 256
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(rows, 4096, generator=generator)
    if zeros:
        scores *= torch.rand(rows, 4096, generator=generator) >= zeros
    scores = scores.to(device)
    keep = scores.numel() // 10
    flat = scores.flatten()

    def ours() -> float:
        value = pp.select_threshold([scores], keep).value
        return value.mantissa * 2.0**value.exponent

    def verify() -> str:
        wanted = float(flat.kthvalue(flat.numel() - keep + 1).values)
        if ours() != wanted:
            raise AssertionError(f"threshold: wanted {wanted}, got {ours()}")
        return f"the threshold is torch.kthvalue's to the bit, {wanted}"

    name = f"k-th of {millions} Mi scores" + (f", {zeros:.0%} zeros" if zeros else "")
    case = Case(name, verify, device).add(OURS, ours, bytes_moved=4.0 * scores.numel())
    for other in ("kthvalue", "bracket") + (("partition",) if device == "cpu" else ()) + (("topk",) if slow else ()):
        case.add(other, lambda other=other: SELECTIONS[other](flat, keep))
    return case.measure(repeats, bandwidth=bandwidth)
