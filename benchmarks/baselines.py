"""The two loops the library is measured against: SynFlow as published, and the best plain PyTorch.

`published_synflow` repeats the published loop with its costs: masks in float buffers, a state_dict made
absolute and restored every round, autograd, one concatenation of all scores, `kthvalue`.
`best_pytorch_synflow` is the fastest exact SynFlow we could write with torch (and numpy views of its CPU
tensors) alone. Both take a model and an example input and return `{parameter name: bool mask}` on the model's
device; the model is not changed.

Both are also classes with `round(density)` and `masks()`, so that a benchmark can time one round.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from selection_baselines import (
    SELECTIONS,
    Kth,
    bracket_kth,
    count_reached,
    positions_equal,
    sample_positions,
    split_numpy,
    split_torch,
)

PRUNABLE = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear layers (Hugging Face's Conv1D too) and convolutions, in named_parameters' order."""
    owners = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, PRUNABLE) or type(module).__name__ == "Conv1D"
    }
    return {name: weight for name, weight in model.named_parameters() if name in owners}


def exponential_densities(density: float, rounds: int) -> list[float]:
    """Density after each round: density ** (r / rounds), the last one exactly `density`."""
    return [density ** (r / rounds) for r in range(1, rounds)] + [density]


def ones_like_one(example_input: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The data-free source: ones in the shape of one input."""
    return torch.ones((1, *example_input.shape[1:]), dtype=dtype, device=device)


def total(output: object) -> Tensor:
    """Sum of all tensors in a model's output: a tensor, tuple, list or mapping such as a ModelOutput."""
    if isinstance(output, Tensor):
        return output.sum()
    values = output.values() if isinstance(output, Mapping) else output
    return sum(total(value) for value in values if value is not None)


# The published loop


class FloatMask(nn.Module):
    """Effective weight = mask * weight, formed anew in every forward pass; the mask is a float buffer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight


class PublishedSynFlow:
    """SynFlow as published (Tanaka et al. 2020, arXiv:2006.05467), stage by stage, costs included.

    Args:
        model: any module; a copy of it is scored.
        example_input: `[batch, ...]`; only its shape is used.
        dtype: of the copy. float64 where the path sum overflows float32.
        count: "published" removes every score <= the int((1 - density) N)-th smallest, so ties at the
            threshold all go; "exact" keeps round(density N), the earlier weight first among equals.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        dtype: torch.dtype = torch.float32,
        count: str = "published",
    ) -> None:
        self.names = list(prunable_weights(model))
        self.count = count
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(True)
        self.weights: list[nn.Parameter] = []
        self.float_masks: list[Tensor] = []
        for name in self.names:
            layer = self.model.get_submodule(name.rpartition(".")[0])
            self.weights.append(layer.weight)
            mask = FloatMask(layer.weight.detach())
            parametrize.register_parametrization(layer, "weight", mask, unsafe=True)
            self.float_masks.append(mask.mask)
        self.ones = ones_like_one(example_input, dtype, self.weights[0].device)

    @torch.no_grad()
    def linearize(self) -> dict[str, Tensor]:
        """Replace every entry of the state_dict, masks too, by its absolute value; return the signs."""
        signs = {}
        for name, value in self.model.state_dict().items():
            signs[name] = torch.sign(value)
            value.abs_()
        return signs

    @torch.no_grad()
    def nonlinearize(self, signs: dict[str, Tensor]) -> None:
        for name, value in self.model.state_dict().items():
            value.mul_(signs[name])

    @torch.enable_grad()
    def scores(self) -> list[Tensor]:
        """|gradient * weight| of the sum of outputs on ones, one tensor per weight."""
        signs = self.linearize()
        total(self.model(self.ones)).backward()
        scores = []
        for weight in self.weights:
            scores.append(torch.clone(weight.grad * weight).detach().abs_())
            weight.grad.zero_()
        self.nonlinearize(signs)
        return scores

    def round(self, density: float) -> None:
        """Score the present network and keep the fraction `density` of all prunable weights."""
        scores = self.scores()
        everything = torch.cat([score.flatten() for score in scores])
        if self.count == "exact":
            self._keep_exactly(everything, round(density * everything.numel()))
            return
        removed = int((1 - density) * everything.numel())
        if removed < 1:
            return
        threshold = torch.kthvalue(everything, removed).values
        zero, one = everything.new_zeros(()), everything.new_ones(())
        for score, mask in zip(scores, self.float_masks, strict=True):
            mask.copy_(torch.where(score <= threshold, zero, one))

    def _keep_exactly(self, everything: Tensor, keep: int) -> None:
        # A pruned weight sorts below every live one, also below live weights of score zero.
        live = torch.cat([mask.flatten() for mask in self.float_masks]).bool()
        everything = everything.masked_fill(~live, -1)
        order = everything.argsort(descending=True, stable=True)
        kept = torch.zeros_like(live)
        kept[order[:keep]] = True
        kept &= live
        for part, mask in zip(kept.split([m.numel() for m in self.float_masks]), self.float_masks, strict=True):
            mask.copy_(part.view_as(mask))

    def masks(self) -> dict[str, Tensor]:
        return {name: mask.bool() for name, mask in zip(self.names, self.float_masks, strict=True)}


def published_synflow(
    model: nn.Module,
    example_input: Tensor,
    density: float,
    rounds: int = 100,
    dtype: torch.dtype = torch.float32,
    count: str = "published",
) -> dict[str, Tensor]:
    """Masks of `rounds` rounds of the published loop, exponential schedule. See `PublishedSynFlow`."""
    loop = PublishedSynFlow(model, example_input, dtype, count)
    for target in exponential_densities(density, rounds):
        loop.round(target)
    return loop.masks()


# The best plain PyTorch


class FlatWeights:
    """|w| * mask and the scores of all prunable weights, each in one flat tensor with a view per weight.

    Scores are written where they are selected from, so nothing is ever concatenated.
    """

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        sizes = [weight.numel() for weight in weights.values()]
        device = next(iter(weights.values())).device
        self.magnitudes = torch.empty(sum(sizes), dtype=dtype, device=device)
        self.scores = torch.empty_like(self.magnitudes)
        self.magnitude = self.views(self.magnitudes)
        self.score = self.views(self.scores)
        for name, weight in weights.items():
            self.magnitude[name].copy_(weight.detach()).abs_()

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class ClosedFormChain:
    """Scores of a chain of linear layers, ReLUs and flattenings: (|w| x_j) g_i, without autograd."""

    SILENT = (nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout)

    def __init__(self, model: nn.Module, flat: FlatWeights, ones: Tensor) -> None:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.flat = flat
        self.names = [f"{name}.weight" for name, _ in layers]
        dtype = flat.magnitudes.dtype
        self.biases = [None if layer.bias is None else layer.bias.detach().to(dtype).abs() for _, layer in layers]
        widths = [layers[0][1].in_features, *(layer.out_features for _, layer in layers)]
        self.forward_flow = [ones.new_ones(width) for width in widths]
        self.backward_flow = [ones.new_ones(width) for width in widths]

    @classmethod
    def fits(cls, model: nn.Module, ones: Tensor) -> bool:
        """Whether the model is such a chain on one input vector (a nested Sequential is one)."""
        leaves = [m for m in model.modules() if not isinstance(m, nn.Sequential)]
        linear = [m for m in leaves if isinstance(m, nn.Linear)]
        plain = all(isinstance(m, (nn.Linear, *cls.SILENT)) for m in leaves)
        distinct = len({id(m.weight) for m in linear}) == len(linear)
        return plain and distinct and bool(linear) and ones.numel() == linear[0].in_features

    def score_(self) -> None:
        x, g, flat = self.forward_flow, self.backward_flow, self.flat
        for depth, (name, bias) in enumerate(zip(self.names, self.biases, strict=True)):
            weight = flat.magnitude[name]
            if bias is None:
                torch.mv(weight, x[depth], out=x[depth + 1])
            else:
                torch.addmv(bias, weight, x[depth], out=x[depth + 1])
        for depth in reversed(range(len(self.names))):
            weight, score = (part[self.names[depth]] for part in (flat.magnitude, flat.score))
            torch.mul(weight, x[depth], out=score)
            score.mul_(g[depth + 1][:, None])
            if depth:
                torch.mv(weight.t(), g[depth + 1], out=g[depth])


class AutogradScores:
    """Scores of any model by one autograd pass through `torch.func.functional_call` on |w| * mask.

    With `cuts`, the output of each named module is multiplied by a power of two that keeps it near 1 (a round
    uses the maxima of the round before). Exact up to rounding if every path passes every cut: then all scores
    are multiplied by one and the same power. Biases and running means that enter after a cut are multiplied
    likewise.
    """

    def __init__(self, model: nn.Module, flat: FlatWeights, ones: Tensor, cuts: Sequence[str]) -> None:
        self.flat, self.ones = flat, ones
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        # The copy keeps the structure alone: its tensors have no storage.
        skeleton = {
            id(value): nn.Parameter(value.detach().to("meta"), requires_grad=False)
            if isinstance(value, nn.Parameter)
            else value.to("meta")
            for value in tensors.values()
        }
        self.model = copy.deepcopy(model, skeleton).eval()
        self.constants = {
            name: value.detach().to(ones.dtype).abs() if value.is_floating_point() else value
            for name, value in tensors.items()
            if name not in flat.shapes
        }
        self.leaves = {name: part.detach().requires_grad_() for name, part in flat.magnitude.items()}
        self.exponents = dict.fromkeys(cuts, 0)
        self.maxima: dict[str, Tensor] = {}
        self.order: list[str] = []
        if cuts:
            self._install(cuts)

    def _install(self, cuts: Sequence[str]) -> None:
        def rescale(name: str, output: Tensor) -> Tensor:
            output = output * 2.0 ** -self.exponents[name]
            self.maxima[name] = output.detach().max()
            return output

        for name in cuts:
            module = self.model.get_submodule(name)
            module.register_forward_hook(lambda _m, _x, output, name=name: rescale(name, output))
        # The order of execution tells which biases enter after which cuts.
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_hook(lambda _m, _x, _y, name=name: self.order.append(name)))
        with torch.no_grad():
            self._forward()
            for handle in handles:
                handle.remove()
            # A cut beyond an overflow is only seen once those before it are near 1.
            for _ in range(len(cuts) + 1):
                if not self._follow_maxima():
                    return
                self._forward()
        raise ValueError(f"rescale: wanted a finite positive flow at every cut, got {self.maxima}")

    def _follow_maxima(self) -> bool:
        """Update each cut's exponent from its last maximum; True if one moved far and a new pass is due."""
        far, before = False, 0
        for name in [name for name in self.order if name in self.exponents]:
            peak = float(self.maxima[name])
            if not 0 < peak < math.inf:
                return True
            shift = math.frexp(peak)[1] - before
            self.exponents[name] += shift
            before += shift
            far |= abs(shift) > 16
        return far

    def _constants(self) -> dict[str, Tensor]:
        if not any(self.exponents.values()):
            return self.constants
        scaled, passed = dict(self.constants), 0
        for owner in self.order:
            for shift in ("bias", "running_mean"):
                name = f"{owner}.{shift}" if owner else shift
                if name in scaled:
                    scaled[name] = scaled[name] * 2.0**-passed
            passed += self.exponents.get(owner, 0)
        return scaled

    def _forward(self) -> Tensor:
        tensors = {**self._constants(), **self.leaves}
        return total(torch.func.functional_call(self.model, tensors, (self.ones,)))

    @torch.enable_grad()
    def score_(self) -> None:
        gradients = torch.autograd.grad(self._forward(), list(self.leaves.values()), materialize_grads=True)
        for (name, weight), gradient in zip(self.flat.magnitude.items(), gradients, strict=True):
            torch.mul(weight, gradient, out=self.flat.score[name])
        if self.exponents:
            self._follow_maxima()


class BestPyTorchSynFlow:
    """SynFlow without the bookkeeping: closed form for chains of linear layers, else one autograd pass.

    Args:
        model: any module; it is only read.
        example_input: `[batch, ...]`; only its shape is used.
        dtype: of magnitudes, flows and scores.
        count: "exact" or "published", as in `PublishedSynFlow`.
        select: "kthvalue", "bracket", "bracket_numpy" (CPU), "topk", "sort", or "fastest": the sensible
            ones are timed on the first round's scores, then `self.select` names the fastest, which is used.
        rescale: names of modules all paths pass, such as the residual blocks; see `AutogradScores`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        dtype: torch.dtype = torch.float32,
        count: str = "exact",
        select: str = "fastest",
        rescale: Sequence[str] = (),
    ) -> None:
        self.flat = FlatWeights(prunable_weights(model), dtype)
        self.count, self.select = count, select
        ones = ones_like_one(example_input, dtype, self.flat.scores.device)
        if not rescale and ClosedFormChain.fits(model, ones):
            self.scorer: ClosedFormChain | AutogradScores = ClosedFormChain(model, self.flat, ones)
        else:
            self.scorer = AutogradScores(model, self.flat, ones, rescale)
        self.positions = sample_positions(self.flat.scores)
        # A flat bool tensor only where |w| * mask does not tell: live weights of score zero.
        self.live: Tensor | None = torch.ones_like(self.flat.scores, dtype=torch.bool)

    def round(self, density: float) -> None:
        """Score the present network and keep the fraction `density` of all prunable weights."""
        size = self.flat.scores.numel()
        if self.count == "exact":
            keep = round(density * size)
        else:
            keep = size + 1 - int((1 - density) * size)  # the largest score that is removed has this rank
        if keep >= size + (self.count != "exact"):
            return
        self.scorer.score_()
        if keep == 0:
            self._keep_above(math.inf)
            return
        value, reached = self._kth(keep)
        if not math.isfinite(value):
            raise ValueError(f"scores: wanted finite values, got {value}: use float64 or rescale")
        if self.count != "exact":
            self._keep_above(value)
        elif value > 0:
            self._keep_reached(value, keep, reached)
        else:
            self._keep_some_zeros(keep)

    def _kth(self, k: int) -> Kth:
        if self.select == "fastest":
            on_cpu = self.flat.scores.device.type == "cpu"
            names = ("kthvalue", "bracket", "bracket_numpy" if on_cpu else "sort")
            seconds = {}
            for self.select in names:
                if not on_cpu:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                self._kth(k)
                seconds[self.select] = time.perf_counter() - start
            self.select = min(seconds, key=seconds.__getitem__)
        if self.select in ("bracket", "bracket_numpy"):
            split = split_torch if self.select == "bracket" else split_numpy
            return bracket_kth(self.flat.scores, k, self.positions, split)
        return Kth(float(SELECTIONS[self.select](self.flat.scores, k)), None)

    def _keep_above(self, value: float) -> None:
        """Zero every magnitude whose score is <= value, in one vectorised pass."""
        magnitudes = self.flat.magnitudes
        torch.ops.aten.threshold_backward.grad_input(magnitudes, self.flat.scores, value, grad_input=magnitudes)
        self.live = None

    def _keep_reached(self, value: float, keep: int, reached: int | None) -> None:
        """Keep every score > value > 0, and of those equal to it the first ones."""
        scores, magnitudes = self.flat.scores, self.flat.magnitudes
        surplus = (count_reached(scores, value) if reached is None else reached) - keep
        if surplus == 0:
            below = torch.nextafter(scores.new_tensor(value), scores.new_zeros(()))
            self._keep_above(float(below))
            return
        tied = positions_equal(scores, value)
        spared = tied[: tied.numel() - surplus]
        saved = magnitudes[spared]
        self._keep_above(value)
        magnitudes[spared] = saved

    def _keep_some_zeros(self, keep: int) -> None:
        """Fewer than `keep` scores are positive: the first live weights of score zero fill up."""
        if self.live is None:
            self.live = self.flat.magnitudes > 0
        zeros = positions_equal(self.flat.scores, 0.0)
        positive = self.flat.scores.numel() - zeros.numel()
        dropped = zeros[self.live[zeros]][keep - positive :]
        self.flat.magnitudes[dropped] = 0
        self.live[dropped] = False

    def masks(self) -> dict[str, Tensor]:
        live = self.flat.magnitudes > 0 if self.live is None else self.live.clone()
        return self.flat.views(live)


def best_pytorch_synflow(
    model: nn.Module,
    example_input: Tensor,
    density: float,
    rounds: int = 100,
    dtype: torch.dtype = torch.float32,
    count: str = "exact",
    select: str = "fastest",
    rescale: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Masks of `rounds` rounds under the exponential schedule. See `BestPyTorchSynFlow`."""
    loop = BestPyTorchSynFlow(model, example_input, dtype, count, select, rescale)
    for target in exponential_densities(density, rounds):
        loop.round(target)
    return loop.masks()
