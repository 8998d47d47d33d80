"""Every op of pathprune in plain torch: the definition, the tests' oracle, the fallback without the binary.

The functions take exactly the arguments of the schemas in `ops.py`, which documents them for callers.
Letters: G groups or ensemble members, O rows, K columns, T positions or sources, W = ceil(K / 16) mask words,
A = float64 for float64 weights and float32 for all others (the type of flows, scores and sums).
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

from .checks import WORD, accumulate_dtype, checked, refuse, words

PADDING = 16  # values after the last stored one of a packed weight, so that a kernel may read a whole vector


class WeightMap(enum.IntEnum):
    """What a live weight w counts for; a pruned weight counts for exactly 0 under any map."""

    ONE = 0  # 1: counts paths
    ABS = 1  # |w|
    SQUARE = 2  # w * w
    IDENTITY = 3  # w


# ---- masks ---------------------------------------------------------------------------------------


@checked
def mask_pack(bits: Tensor) -> Tensor:
    """[G, O, K] bool -> [G, O, W] int16."""
    groups, rows, columns = bits.shape
    padded = bits.new_zeros((groups, rows, words(columns), WORD), dtype=torch.int64)  # [G, O, W, 16]
    padded.view(groups, rows, words(columns) * WORD)[:, :, :columns] = bits.long()
    place = torch.arange(WORD, device=bits.device)  # [16]
    return (padded << place).sum(-1).to(torch.int16)


@checked
def mask_unpack(mask: Tensor, columns: int) -> Tensor:
    """[G, O, W] int16 -> [G, O, K] bool."""
    place = torch.arange(WORD, device=mask.device)  # [16]
    bits = (mask.long()[..., None] >> place) & 1  # [G, O, W, 16]
    return bits.bool().flatten(2)[:, :, :columns].contiguous()


@checked
def mask_count(mask: Tensor) -> Tensor:
    """[G, O, W] int16 -> [] int64: the number of set bits."""
    return mask_unpack(mask, mask.shape[2] * WORD).sum()


def _shifted(x: Tensor, by: int) -> Tensor:
    """int64 words as unsigned ones, shifted to the right."""
    return (x >> by) & (2 ** (64 - by) - 1)


def fingerprint(tensor: Tensor) -> Tensor:
    """Any tensor -> [] int64: the sum of SplitMix64 of its 64-bit words and their places, modulo 2^64."""
    data = torch.cat([tensor.detach().reshape(-1)]).view(torch.uint8)  # of one value, too, the stride is 1 now
    words = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
    x = words + torch.arange(1, len(words) + 1, device=words.device) * (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return (x ^ _shifted(x, 31)).sum()


# ---- weights -------------------------------------------------------------------------------------


def map_weight(weight: Tensor, code: int) -> Tensor:
    """The weight map, in A, of every weight."""
    w = weight.to(accumulate_dtype(weight.dtype))
    if code == WeightMap.ONE:
        return torch.ones_like(w)
    if code == WeightMap.ABS:
        return w.abs()
    return w * w if code == WeightMap.SQUARE else w


def map_slope(weight: Tensor, code: int) -> Tensor:
    """The derivative of the weight map, in A, at every weight; 0 where |w| has its corner."""
    w = weight.to(accumulate_dtype(weight.dtype))
    if code == WeightMap.ONE:
        return torch.zeros_like(w)
    if code == WeightMap.ABS:
        return w.sign()
    return 2 * w if code == WeightMap.SQUARE else torch.ones_like(w)


def _dense(weight: Tensor, layout: Tensor | None, columns: int) -> Tensor:
    """[G, O, K]: a packed weight written out, with zeros where nothing is stored."""
    if layout is None:
        return weight
    stored = mask_unpack(layout, columns)  # [G, O, K]
    dense = weight.new_zeros(stored.shape)
    dense[stored] = weight[: int(stored.sum())]
    return dense


def _live(weight: Tensor, mask: Tensor | None) -> Tensor:
    """[G, O, K] bool: the weights that are not pruned."""
    return torch.ones_like(weight, dtype=torch.bool) if mask is None else mask_unpack(mask, weight.shape[2])


def _linear(dense: Tensor, mask: Tensor | None, x: Tensor, f: int, transposed: bool) -> Tensor:
    """The sum in float64, rounded once to A: of pruned weights only finite flows make the exact 0."""
    mapped = masked_weight(dense, mask, f).double()  # [G, O, K]
    return (x.double() @ (mapped if transposed else mapped.mT)).to(x.dtype)


@checked
def masked_weight(weight: Tensor, mask: Tensor | None, f: int) -> Tensor:
    """[G, O, K] in A: f(w) where the mask is set, else 0."""
    return torch.where(_live(weight, mask), map_weight(weight, f), 0)


@checked
def path_flow_linear(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor,
    f: int,
    transposed: bool,
    layout: Tensor | None,
    row_start: Tensor | None,
    columns: int,
) -> Tensor:
    """[G, T, O] for x [G, T, K]; transposed: [G, T, K] for x [G, T, O]. In float64, rounded once to A."""
    return _linear(_dense(weight, layout, columns), mask, x, f, transposed)


@checked
def compact_weight(
    weight: Tensor, mask: Tensor, layout: Tensor | None, row_start: Tensor | None, columns: int
) -> tuple[Tensor, Tensor]:
    """The live values row by row with the padding, and [G * O + 1] int64: where each row's values begin."""
    dense = _dense(weight, layout, columns)
    live = mask_unpack(mask, columns)  # [G, O, K]
    values = torch.cat((dense[live], dense.new_zeros(PADDING)))
    ends = live.sum(-1).flatten().cumsum(0)  # [G * O]
    return values, torch.cat((ends.new_zeros(1), ends))


# ---- scores --------------------------------------------------------------------------------------


def _scores(dense: Tensor, mask: Tensor | None, x: Tensor | None, g: Tensor | None, s: int) -> tuple[Tensor, Tensor]:
    """(scores [G, O, K] in A, live [G, O, K] bool); every product and every sum is rounded on its own."""
    live = _live(dense, mask)
    scores = map_weight(dense, s)
    if x is not None and g is not None and x.shape[1] == 1:
        scores = (scores * g[:, 0, :, None]) * x[:, 0, None, :]
    elif x is not None and g is not None:
        total = torch.zeros_like(scores)
        for t in range(x.shape[1]):
            total = total + x[:, t, None, :] * g[:, t, :, None]
        scores = scores * total
    return torch.where(live, scores, 0), live


def _collect(scores: Tensor, live: Tensor, lo: float, hi: float, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    alive = scores[live]
    above = alive > alive.new_tensor(hi)
    within = (alive >= alive.new_tensor(lo)) & (alive <= alive.new_tensor(hi))
    inside = alive[within]
    values = torch.cat((inside, inside.new_zeros(capacity)))[:capacity].clone()
    counts = torch.stack((above.sum(), within.sum(), (~alive.isfinite()).sum(), live.sum()))
    none = inside.new_tensor([math.inf], dtype=torch.float64)
    extremes = torch.stack((torch.cat((inside, none)).amin(), torch.cat((inside, -none)).amax()))
    return values, counts, extremes


def _prune_(mask: Tensor, scores: Tensor, live: Tensor, at_least: float, above: float, cut: int) -> None:
    index = torch.arange(scores.numel(), device=scores.device).view(scores.shape)
    stays = (scores >= scores.new_tensor(above)) | ((scores >= scores.new_tensor(at_least)) & (index < cut))
    mask.copy_(mask_pack(live & stays))


@checked
def through_flow(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    g: Tensor | None,
    s: int,
    layout: Tensor | None,
    row_start: Tensor | None,
    columns: int,
) -> Tensor:
    """[G, O, K] in A: the score of every weight, 0 off the mask."""
    return _scores(_dense(weight, layout, columns), mask, x, g, s)[0]


@checked
def through_flow_collect(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    g: Tensor | None,
    s: int,
    lo: float,
    hi: float,
    capacity: int,
    layout: Tensor | None,
    row_start: Tensor | None,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values [capacity] in A, counts [4], extremes [2]) of the live scores with lo <= score <= hi."""
    return _collect(*_scores(_dense(weight, layout, columns), mask, x, g, s), lo, hi, capacity)


def histogram_bits(dtype: torch.dtype) -> int:
    """How many top bits of a score make its bin: the sign, the exponent and 8 bits of the mantissa."""
    return 20 if dtype == torch.float64 else 17


def histogram_bin(scores: Tensor) -> Tensor:
    """int64 of the same shape: the top bits of a key that orders as the scores do; -0 counts as +0."""
    bits = histogram_bits(scores.dtype)
    total = 64 if scores.dtype == torch.float64 else 32
    raw = (scores + 0).view(torch.int64 if total == 64 else torch.int32).long()
    top = (raw >> (total - bits)) & ((1 << bits) - 1)
    return torch.where(raw < 0, (1 << bits) - 1 - top, top + (1 << (bits - 1)))


@checked
def through_flow_histogram(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    g: Tensor | None,
    s: int,
    stride: int,
    layout: Tensor | None,
    row_start: Tensor | None,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """(histogram [2**bits] of the finite live scores, counts [2]) over every stride-th word of 16 columns."""
    scores, live = _scores(_dense(weight, layout, columns), mask, x, g, s)
    groups, rows, _ = scores.shape
    first_word = torch.arange(groups * rows, device=scores.device).view(groups, rows, 1) * words(columns)
    word = first_word + torch.arange(columns, device=scores.device) // WORD  # [G, O, K]
    visited = scores[live & (word % stride == 0)]
    finite = visited.isfinite()
    bins = torch.bincount(histogram_bin(visited[finite]), minlength=1 << histogram_bits(scores.dtype))
    return bins, torch.stack((torch.ones_like(finite).sum(), (~finite).sum()))


@checked
def through_flow_prune_(
    weight: Tensor,
    mask: Tensor,
    x: Tensor | None,
    g: Tensor | None,
    s: int,
    at_least: float,
    above: float,
    cut: int,
    layout: Tensor | None,
    row_start: Tensor | None,
    columns: int,
) -> None:
    """Keeps in the mask the live weights with score >= above, or score >= at_least and flat index < cut."""
    _prune_(mask, *_scores(_dense(weight, layout, columns), mask, x, g, s), at_least, above, cut)


@checked
def through_flow_nth(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor | None,
    g: Tensor | None,
    s: int,
    at_least: float,
    above: float,
    n: int,
    layout: Tensor | None,
    row_start: Tensor | None,
    columns: int,
) -> Tensor:
    """[] int64, flat index of the n-th live weight with at_least <= score < above; else G * O * K."""
    scores, live = _scores(_dense(weight, layout, columns), mask, x, g, s)
    within = live & (scores >= scores.new_tensor(at_least)) & (scores < scores.new_tensor(above))
    indices = within.flatten().nonzero()[:, 0]
    return torch.cat((indices[n : n + 1], indices.new_tensor([scores.numel()])))[0].clone()


# ---- two passes in one read ----------------------------------------------------------------------


@checked
def path_flow_linear_collect(
    weight: Tensor,
    mask: Tensor | None,
    x: Tensor,
    g: Tensor,
    f: int,
    s: int,
    lo: float,
    hi: float,
    capacity: int,
    layout: Tensor | None,
    row_start: Tensor | None,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`path_flow_linear` transposed on g, and `through_flow_collect` of (x, g)."""
    gx = _linear(_dense(weight, layout, columns), mask, g, f, True)
    return gx, *_collect(*_scores(_dense(weight, layout, columns), mask, x, g, s), lo, hi, capacity)


@checked
def path_flow_linear_prune_(
    weight: Tensor,
    mask: Tensor,
    x_old: Tensor,
    g_old: Tensor,
    s: int,
    at_least: float,
    above: float,
    cut: int,
    x: Tensor,
    f: int,
    layout: Tensor | None,
    row_start: Tensor | None,
    columns: int,
) -> Tensor:
    """`through_flow_prune_` by (x_old, g_old), then `path_flow_linear` of x through what is left."""
    _prune_(mask, *_scores(_dense(weight, layout, columns), mask, x_old, g_old, s), at_least, above, cut)
    return _linear(_dense(weight, layout, columns), mask, x, f, False)


# ---- selection and chance ------------------------------------------------------------------------


@checked
def kth_largest(values: Tensor, k: int) -> Tensor:
    """[]: the k-th largest (from 1) of finite values [n]."""
    return values.sort(descending=True).values[k - 1].clone()


def philox(counter: Tensor, seed: int, high: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words, as int64, of Philox4x32-10 (Salmon et al., 2011) at counters ``high * 2^64 + counter``."""
    low = 0xFFFFFFFF
    key0, key1 = seed & low, (seed >> 32) & low
    c0, c1 = counter & low, (counter >> 32) & low
    c2, c3 = torch.full_like(counter, high & low), torch.full_like(counter, (high >> 32) & low)
    for _ in range(10):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products; int64 wraps, the bits are right
        c0, c1, c2, c3 = (odd >> 32 & low) ^ c1 ^ key0, odd & low, (even >> 32 & low) ^ c3 ^ key1, even & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def philox_uniform(counter: Tensor, seed: int) -> Tensor:
    """float64 of the counter's shape, in (0, 1): 53 random bits each."""
    w0, w1, _, _ = philox(counter, seed)
    u = (((w0 >> 5 << 26) + (w1 >> 6)).double() + 0.5) * 2.0**-53
    return u.clamp(max=1 - 2.0**-53)  # adding the half rounds the largest of the 2^53 values up to 1


@checked
def gumbel_keys(scores: Tensor, exponent: int, temperature_inverse: float, seed: int, offset: int) -> Tensor:
    """float64 of the same shape: temperature_inverse * ln(score * 2**exponent) + Gumbel; -inf for score 0."""
    bad = ~(scores >= 0)
    if bool(bad.any()):
        refuse("gumbel_keys", "scores", "numbers >= 0", float(scores[bad][0]))
    index = torch.arange(scores.numel(), device=scores.device).view(scores.shape)
    gumbel = -(-philox_uniform(index + offset, seed).log()).log()
    keys = temperature_inverse * (scores.double().log() + exponent * math.log(2)) + gumbel
    return torch.where(scores == 0, -math.inf, keys)
