"""PX, Path eXclusion (Iurada, Ciccone, Tommasi, CVPR 2024): data-driven saliency from the trace of the NTK.

The trace of the NTK is bounded by a data factor times a path factor. PX scores the saliency of
``R_PX = sum_n sum_k g_k(x_n^2; a(x_n)) h_k(u)``, with g the network of ones (the mask) gated as the real, masked one
is on x_n, and h the network of u = w^2 on ones without gates: ``S = u dR_PX / du``, over 100 exponential rounds.

On a norm, attention or a product of flows, paths in g have the sample's own factors; h has norms as their scales alone,
and attention and products as data-free flow has them, so that every weight is scored.

h knows no data, so with ``G_k = sum_n g_k(x_n^2)`` the sum is ``sum_k G_k h_k(u)``: all work on data is forward, and
one backward flow of a single row, G at the outputs, scores all weights.

The released code differs from the paper, and from itself over time; ``variant="released"`` is what its last version
computes (see :class:`PX`). Bytes: a round, the activations of one forward pass of the model and one of g over the data,
and two reads of the weights. Oracle: float64 autograd of the formula; enumeration of paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ..batches import Batch, Data, require_reiterable, runs_on, stream
from ..distributed import ALONE, Group
from ..exporting import in_mode
from ..flow import PathFlow
from ..gates import GatedFlow
from ..network import PathNetwork
from ..nodes import Synapse
from ..ops import WeightMap
from ..policy import Policy, policy_of
from ..recording import elements, record
from ..select import Bracket
from ..surroundings import device_of_caller
from ..weights import Scaled, Weight, power_of_two, weights_of
from .base import Pruner, Scorer
from .objective import Loss, batch_norm_arguments, labelled_output, logits_of, masked
from .sensitivity import Fisher

_GATES = 1 << 26  # gates that are held at once


@dataclass(frozen=True)
class PX(Pruner):
    """Keeps the weights on paths that carry most of the NTK's trace, as the data open them.

    Args:
        data: a re-iterable of batches ``x`` or ``(x, y)``; labels are not used. It is read once a round.
        variant: ``paper``, or ``released``: the last version of the released code, in which h and g are in train mode
            (batch norm by batch statistics, its parameters as they are), the last linear layer keeps its signed weights
            in both, biases are squared in h and 1 in g, average pooling keeps its constants, max pooling its winners;
            layers are told apart by type where that code looks for 'bn' and 'fc' in names (and so misses the batch
            norms of shortcuts). Its saliencies are not positive before the final absolute value.
        rounds: 100 in the paper.
        policy: of g and h in the paper's variant; biases begin no path. ``recorded``: norms of a sample are gates, 1 in
            h, as the sum over open paths has them; ``paths``: they divide by the RMS of the flow in g and in h.

    Gates come from the model in eval mode, the routing of experts and the decays of state spaces among them: an
    activation without a ReLU passes ``(phi(z) / z)^2``, attention weights and norms count squared, a factor of a
    product with the square of half of the other.

    Raises:
        TypeError: data that can be read only once.
        ValueError: no batches, NaN inputs or outputs, a hand-made network, what has no gate (see ``recording``); for
            ``released``, a model without ReLU.

    Example:
        >>> masks = prune(llama, PX([{"input_ids": tokens}]), density=0.5, example_input={"input_ids": tokens[:1]})

    Determinism: the same masks for the same data in the same order and batches, up to the rounding of torch's products.
    """

    data: Data = field(compare=False)
    variant: str = "paper"
    rounds: int = field(default=100, kw_only=True)
    policy: str | Policy = field(default="recorded", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_reiterable(self.data, "PX")
        policy_of(self.policy)
        if self.variant not in ("paper", "released"):
            raise ValueError(f"PX: variant: wanted 'paper' or 'released', got {self.variant!r}")

    @property
    def merged_under(self) -> Policy | None:
        return policy_of(self.policy) if self.variant == "paper" else None

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        return WeightMap.SQUARE, WeightMap.SQUARE

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        if self.variant == "released":
            if network.replicas.size > 1:
                raise ValueError("PX: variant: wanted 'paper' where several ranks share the data, got 'released'")
            return _released(network, weights, self.data)
        policy = policy_of(self.policy)
        without = replace(policy, norm="unit") if policy.norm == "recorded" else policy
        flow = PathFlow(network, weights, f=WeightMap.SQUARE, policy=without)
        factor = DataFactor(network.whole, weights, self.data, policy, network.replicas)

        def score(guess: Bracket | None) -> float:
            flow.forward()
            flow.leaving = dict(zip(network.outputs, factor(), strict=True))
            total = _log2_product(flow, network)
            for weight in weights.values():
                weight.compact_when_sparse()
            flow.backward(guess)
            return total

        return score


class DataFactor:
    """``G = sum_n g(x_n^2; a(x_n))`` at every output, under the weights' present masks.

    Args:
        network: with all its positions.
        weights: of the same tensors, maybe in another network; their masks are followed.
        ranks: processes that have a share of the data each.
    """

    def __init__(
        self,
        network: PathNetwork,
        weights: Mapping[str, Weight],
        data: Data,
        policy: Policy,
        ranks: Group = ALONE,
    ) -> None:
        self.ranks = ranks
        if network.forward is None:
            raise ValueError("PX: model: wanted one that was read from a module, got a PathNetwork made by hand")
        self.network, self.leaders, self.data, self.policy = network, weights, data, policy
        self.weights = weights_of(network, (), (WeightMap.ONE, WeightMap.ONE))

    def __call__(self) -> list[Scaled]:
        for name, weight in self.weights.items():
            weight.follow(self.leaders[name])
        real = {name: masked(self.network.tensors[name].detach(), weight) for name, weight in self.weights.items()}
        totals: list[Scaled] | None = None
        with self.ranks.together("PX"):
            for batch in self._pieces():
                recording = record(self.network, batch, real, "PX")
                squares = [x.square() for x in recording.inputs]
                flow = GatedFlow(self.network, self.weights, recording, self.policy, source=squares)
                flow.forward()
                found = [_summed(flow.values[k]) for k in self.network.outputs]
                totals = found if totals is None else [_plus(a, b) for a, b in zip(totals, found, strict=True)]
        assert totals is not None
        totals = [self._over_ranks(total) for total in totals]
        dtype = next(weight.effective() for weight in self.weights.values()).dtype
        return [_normalised(total, dtype) for total in totals]

    def _over_ranks(self, total: Scaled) -> Scaled:
        """The sum over the ranks, in their order."""
        parts = map(Scaled, self.ranks.each(total.tensor), self.ranks.each(total.exponent))
        return reduce(_plus, parts)

    def _pieces(self) -> Iterator[Batch]:
        """The batches, cut so that what their gates take stays small: sums over samples do not mind."""
        size = max(1, _GATES // max(1, elements(self.network)))
        for batch in stream(self.data, "PX", self.network.device):
            for at in range(0, batch.size, size):
                yield batch.part(at, at + size)


def _summed(flow: Scaled) -> Scaled:
    """[1, N, *shape] summed over the samples, in float64."""
    return Scaled(flow.tensor[0].sum(0, dtype=torch.float64), flow.exponent)


def _plus(a: Scaled, b: Scaled) -> Scaled:
    top = torch.maximum(a.exponent, b.exponent)
    left, right = (part.tensor * power_of_two(part.exponent - top, torch.float64) for part in (a, b))
    return Scaled(left + right, top)


def _normalised(flow: Scaled, dtype: torch.dtype) -> Scaled:
    shift = torch.frexp(flow.tensor.amax()).exponent.to(torch.int64).reshape(1)
    return Scaled((flow.tensor * power_of_two(-shift, torch.float64)).to(dtype), flow.exponent + shift)


def _log2_product(flow: PathFlow, network: PathNetwork) -> float:
    """log2 of ``sum_k G_k h_k`` over all outputs."""
    total = torch.tensor(-torch.inf, dtype=torch.float64)
    for k in network.outputs:
        h, g = flow.values[k], flow.leaving[k]
        amount = (h.tensor.double() * g.tensor.double()).sum().cpu()
        total = torch.logaddexp2(total, amount.log2() + (h.exponent + g.exponent).cpu())
    return float(total)


# ---------------------------------------------------------------------------------------------- as released


class _Gated(TorchFunctionMode):
    """Runs a model with its ReLUs recorded, replayed or open, and batch norm by batch statistics if asked."""

    _RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)

    def __init__(self, replay: Iterator[Tensor] | None, record_to: list[Tensor] | None, batch_statistics: bool) -> None:
        super().__init__()
        self.replay, self.kept, self.batch_statistics = replay, record_to, batch_statistics

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._RELUS:
            if self.kept is not None:
                out = torch.relu(args[0].detach())
                self.kept.append(out > 0)
                return out
            return args[0] if self.replay is None else args[0] * next(self.replay)
        if func is F.batch_norm and self.batch_statistics:
            own = {"running_mean": None, "running_var": None, "training": True}
            return func(**batch_norm_arguments(args, kwargs) | own)
        return func(*args, **kwargs)


def _released(network: PathNetwork, weights: Mapping[str, Weight], data: Data) -> Scorer:
    """The saliency of the released code's last version, summed over batches before the absolute value."""
    model = network.model
    if model is None:
        raise ValueError("PX: model: wanted one that was read from a module, got a PathNetwork made by hand")
    left = _head(network, model)  # parameters that stay as they are
    left |= {id(p) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    own = dict(model.named_parameters())

    def call(tensors: Mapping[str, Tensor], batch: Batch, mode: _Gated) -> Tensor:
        with runs_on(batch, "PX", network.example), mode, device_of_caller():
            return logits_of(functional_call(model, dict(tensors), batch.args, dict(batch.kwargs)))

    def score(guess: Bracket | None) -> None:
        masks = {name: weight.bits().to(network.device) for name, weight in weights.items()}
        real = {name: own[name].detach() * mask for name, mask in masks.items()}
        plain, squared = {}, {}
        for name, parameter in own.items():
            p = real.get(name, parameter.detach())
            kept = id(parameter) in left
            plain[name] = p if kept else masks[name].to(p.dtype) if name in masks else torch.ones_like(p)
            squared[name] = p if kept else p.square()
        reach, like = torch.zeros(()), None
        with torch.no_grad(), in_mode(model):
            for batch in stream(data, "PX", network.device):
                gates: list[Tensor] = []
                call(real, batch, _Gated(None, gates, False))
                if not gates:
                    raise ValueError("PX: model: variant 'released' wants ReLUs, got a model without; use 'paper'")
                squares = _with_inputs(batch, torch.square)
                reach = reach + call(plain, squares, _Gated(iter(gates), None, True)).sum(0, dtype=torch.float64)
                like = batch
        assert like is not None
        ones = _with_inputs(like, lambda a: torch.ones_like(a[:1]).expand(2, *a.shape[1:]))
        leaves = {name: squared[name].requires_grad_() for name in weights}
        with torch.enable_grad(), in_mode(model):
            out = call({**squared, **leaves}, ones, _Gated(None, None, True))[0]
            total = (out.double() * reach).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()))
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            if weights[name].scored:
                weights[name].replace_scores((gradient * leaf.detach() * masks[name]).abs())

    return score


def _with_inputs(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with its floating-point inputs changed."""

    def changed(a: Any) -> Any:
        return change(a) if isinstance(a, Tensor) and a.is_floating_point() else a

    return Batch(tuple(map(changed, batch.args)), {key: changed(a) for key, a in batch.kwargs.items()}, None)


def _head(network: PathNetwork, model: nn.Module) -> set[int]:
    """The parameters of the linear layer behind which there is no other synapse."""
    beyond: set[int] = set(network.outputs)
    for k in reversed(range(len(network.nodes))):
        node = network.nodes[k]
        if k in beyond and isinstance(node, Synapse):
            owner = model.get_submodule(node.weight.rpartition(".")[0])
            return {id(p) for p in owner.parameters()} if node.form.startswith("linear") else set()
        if k in beyond:
            beyond.update(node.inputs)
    return set()


# ------------------------------------------------------------------------------------------------------ PXact


@dataclass(frozen=True)
class PXExact(Fisher):
    """Keeps the weights with most of the NTK's diagonal: ``S_i = w_i^2 mean_n (d f_{y_n}(x_n) / d w_i)^2``.

    What the bound of :class:`PX` stands for; and :class:`Fisher` of the labelled output in place of a loss, so the sum
    is made as a mean.

    Args:
        data: a re-iterable of batches ``(x, y)``, y int64 [N] class labels.
        chunk: see :class:`Fisher`.

    Raises:
        TypeError: data that can be read only once.
        ValueError: no batches, no labels, labels out of range, NaN inputs or gradients, a hand-made network.
    """

    loss: Loss = field(default_factory=lambda: labelled_output, init=False, compare=False)
