"""The sanity checks of the field: what does a mask's quality really depend on?

Su et al., Sanity-Checking Pruning Methods (NeurIPS 2020); Frankle et al., Pruning Neural Networks at Initialization:
Why Are We Missing the Mark? (ICLR 2021). A method that profits from the data, from the scores and from where its
weights lie should lose accuracy when

* its data are corrupted: ``random_labels(data, classes, seed)``, ``shuffled_pixels(data, seed)``;
* its scores are turned upside down: ``Inverted(pruner)``;
* its weights are drawn anew after masking: ``reinit(model, seed)``;
* its mask is permuted within each layer: ``masks.shuffle(seed)``, a random mask with the same layer-wise ratios.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .batches import Data, require_reiterable
from .checks import seed_of
from .network import PathNetwork
from .pruners.base import Scorer, Wrapper
from .select import Bracket
from .structure import require_module
from .weights import Weight


@dataclass(frozen=True)
class Inverted(Wrapper):
    """Keeps the weights with the LOWEST scores of a method, in every round of it. Zero scores are the lowest but for
    negative ones.

    Not ``masks.invert()``, which keeps exactly what a mask removes: at density d this keeps the share d from the
    bottom. A good score inverted should do worse than chance.

    Args:
        base: the pruner whose scores are inverted; its rounds are the rounds.

    Raises:
        TypeError: a base that takes weights without scoring them (PHEW).
    """

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        base = self.base.scorer(network, weights, seed)

        def score(guess: Bracket | None) -> float | None:
            total = base(None)
            for weight in weights.values():
                if weight.scored:
                    weight.replace_scores(_turned(weight))
            return total

        return score


_STEP = 2.0**20  # beyond the log2 of any score


def _turned(weight: Weight) -> Tensor:
    """Keys in the opposite order of a tensor's scores: of logarithms, since scores may exceed the range of float64."""
    made = weight.written_scores()
    scores = ops.through_flow(made.weight, made.mask, None, None, made.s, columns=made.columns).double()
    size = scores.abs().log2() + made.exponent
    return torch.where(scores > 0, -size, torch.where(scores < 0, 2 * _STEP + size, _STEP))


def reinit(model: nn.Module, seed: int, initialize: Callable[[nn.Module], object] | None = None) -> nn.Module:
    """A copy of the model with fresh weights: every module's own ``reset_parameters``, in the order of the modules.

    Masks are made outside the model, so they go on fitting: ``masks.apply_(reinit(model, seed))``.

    Args:
        model: not touched.
        seed: of torch's generators while the weights are drawn; their states are put back afterwards.
        initialize: called with the copy after the modules' own resets, under the same seed: for models that are
            initialized in another way than their modules would (``lambda m: edge_of_chaos_init_(m, "relu")``).

    Returns:
        The copy, in the same mode, without gradients.

    Raises:
        ValueError: parameters of a module that has no ``reset_parameters``, without ``initialize``; names them.

    Determinism: the same seed gives the same weights on one kind of device.
    """
    require_module(model, "reinit")
    seed = seed_of(seed, "reinit")
    fresh = copy.deepcopy(model)
    devices = sorted({p.device.index for p in fresh.parameters() if p.device.type == "cuda"})
    stale: list[str] = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for name, module in fresh.named_modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is not None:
                reset()
            else:
                stale += [f"{name}.{key}".lstrip(".") for key, p in module._parameters.items() if p is not None]
        if initialize is not None:
            initialize(fresh)
        elif stale:
            raise ValueError(
                f"reinit: initialize: wanted a function for parameters whose module has no reset_parameters "
                f"({', '.join(stale[:5])}{', ...' if len(stale) > 5 else ''}), got None"
            )
    for parameter in fresh.parameters():
        parameter.grad = None
    return fresh


def random_labels(data: Data, classes: int, seed: int) -> Data:
    """The data with labels drawn uniformly: a view, re-iterable as the data are, the same labels in every pass.

    Args:
        data: a re-iterable of batches ``(x, y)``, y an integer tensor of any shape; x is handed on as it is. Labels go
            by position, so where a loader shuffles, a sample gets another label in every pass.
        classes: at least 2; labels are in [0, classes).
        seed: the labels depend on nothing else than it, the batch's position and its shape.

    Raises:
        TypeError: data that can be read only once.
        ValueError: fewer than 2 classes; when read, a batch without integer labels.
    """
    require_reiterable(data, "random_labels")
    if classes < 2:
        raise ValueError(f"random_labels: classes: wanted at least 2, got {classes}")

    def relabelled(raw: Any, position: int) -> Any:
        x, y = _pair(raw)
        if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex():
            got = str(y.dtype) if isinstance(y, Tensor) else "none" if y is None else type(y).__name__
            raise ValueError(f"random_labels: data: wanted integer labels, got {got} in batch {position}")
        key = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()  # passes may overlap
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        return x, torch.randint(classes, y.shape, generator=generator).to(y)

    return _View(data, relabelled)


def shuffled_pixels(data: Data, seed: int) -> Data:
    """The data with the pixels of every image in another order, one order for all: a view, re-iterable as the data are.

    Args:
        data: a re-iterable of batches ``x`` or ``(x, y)``, x a tensor: images [n, channels, *size], whose channels stay
            together, or features [n, features]; all of one size. y is handed on as it is.
        seed: the order depends on nothing else than it and the number of pixels.

    Raises:
        TypeError: data that can be read only once.
        ValueError: when read, an x that is no tensor of two dimensions or more.
    """
    require_reiterable(data, "shuffled_pixels")

    def shuffled(raw: Any, position: int) -> Any:
        x, y = _pair(raw)
        if not isinstance(x, Tensor) or x.dim() < 2:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"shuffled_pixels: data: wanted a tensor of 2 dimensions or more, got {got}")
        flat = x.flatten(2) if x.dim() > 2 else x
        order = torch.randperm(flat.shape[-1], generator=torch.Generator().manual_seed(seed)).to(x.device)
        moved = flat[..., order].reshape(x.shape)
        return moved if y is None else (moved, y)

    return _View(data, shuffled)


class _View:
    """Batches of other data, each changed as it passes by."""

    def __init__(self, data: Data, change: Callable[[Any, int], Any]) -> None:
        self._data, self._change = data, change

    def __iter__(self) -> Iterator[Any]:
        for position, raw in enumerate(self._data):
            yield self._change(raw, position)

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]


def _pair(raw: Any) -> tuple[Any, Any]:
    """x and y of a batch as pruners take it; y None where there is none."""
    if isinstance(raw, (tuple, list)):
        return raw[0], raw[1] if len(raw) == 2 else None
    return raw, None
