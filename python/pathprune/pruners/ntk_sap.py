"""NTK-SAP: Improving Neural Network Pruning by Aligning Training Dynamics (Wang et al. 2023).

The nuclear norm of the neural tangent kernel, to which ``E |f(x; w) - f(x; w + d)|^2`` with small Gaussian d is
proportional, should not change under pruning; so the score of a weight is

    ``|d/dm_j  E |f(x; theta * m) - f(x; (theta + d) * m)|^2|``,

the expectation over fresh weights theta, ``d ~ N(0, epsilon^2)`` and ``x ~ N(0, 1)``: no data, and no particular draw
of the weights. As in the published code all three are drawn anew for each batch, and batch norms take the statistics of
the batch (here: under the unperturbed weights) before the two networks run. Unlike there, a generator of our own draws,
biases and norms are those of the model, and what is pruned stays out of later rounds.

Oracle: a literal loop over the same draws in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..batches import Batch, Data, require_reiterable, stream
from ..network import PathNetwork
from ..nodes import Input, Synapse
from ..ops import WeightMap
from ..select import Bracket
from ..weights import Weight
from .base import Pruner, Scorer
from .objective import Accumulator, ModelCall, Point, batch_norm_arguments, logits_of, masked

INITIALISATIONS = ("he", "present")


@dataclass(frozen=True)
class NTKSAP(Pruner):
    """Keeps the weights that the trace of the neural tangent kernel feels most, over random weights and inputs.

    Args:
        data: re-iterable of batches whose floating-point inputs give the noise its shapes; what else is in them is
            passed on (token indices, attention masks), targets are ignored. None: ``batches`` of ``batch_size`` inputs
            of the shape the network was read with.
        epsilon: standard deviation of the perturbation.
        initialisation: ``he``: weights are drawn from N(0, 2 / fan_in) for each batch; ``present``: those of the model.
        batches, batch_size: of noise, where there is no ``data``.
        rounds: of the schedule (exponential, unless ``prune`` is told otherwise).

    Determinism: all draws come from one generator with ``prune``'s seed, on the CPU, in this order for each batch: each
    weight of a synapse and then its perturbation, in the order of the network; then the inputs.

    Raises:
        ValueError: no model (a network built by hand), an output that is no tensor, options out of range.

    Example:
        >>> masks = pp.prune(model, pp.NTKSAP(batch_size=64), density=0.05, example_input=x)
    """

    data: Data | None = field(default=None, repr=False, compare=False)
    epsilon: float = field(default=0.01, kw_only=True)
    initialisation: str = field(default="he", kw_only=True)
    batches: int = field(default=5, kw_only=True)
    batch_size: int = field(default=128, kw_only=True)
    rounds: int = field(default=20, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"NTKSAP: epsilon: wanted a positive number, got {self.epsilon}")
        if self.initialisation not in INITIALISATIONS:
            raise ValueError(f"NTKSAP: initialisation: wanted one of {INITIALISATIONS}, got {self.initialisation!r}")
        for name in ("batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"NTKSAP: {name}: wanted at least 1, got {getattr(self, name)}")
        if self.data is not None:
            with torch.random.fork_rng(devices=[]):  # a DataLoader draws when its iterator is made
                require_reiterable(self.data, self.name)

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        return WeightMap.IDENTITY, WeightMap.IDENTITY

    def scorer(self, network: PathNetwork, weights: Mapping[str, Weight], seed: int) -> Scorer:
        call = ModelCall(self.name, network, weights, train_mode=False, seed=seed)
        draws = Draws(self, network, seed)

        def score(guess: Bracket | None) -> None:
            for name, slope in kernel_sensitivity(call, draws).items():
                weights[name].replace_scores(slope.abs_())

        return score


class Draws:
    """Everything NTK-SAP draws, in the order its docstring states."""

    def __init__(self, method: NTKSAP, network: PathNetwork, seed: int) -> None:
        self.method, self.network = method, network
        self.shapes = [node.shape for node in network.nodes if isinstance(node, Input)]
        self.scales: dict[str, float] = {}
        for k in network.synapses():
            node = network.nodes[k]
            if isinstance(node, Synapse) and node.weight not in self.scales:  # the first use of a tied weight
                self.scales[node.weight] = math.sqrt(2 / fan_in(network.tensors[node.weight], node))
        self.dtype = network.tensors[next(iter(self.scales))].dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype).to(self.network.device)

    def weights(self) -> tuple[Point, Point]:
        """Fresh weights, and the same perturbed."""
        first, second = {}, {}
        for name, scale in self.scales.items():
            present = self.network.tensors[name].detach()
            fresh = self.method.initialisation == "he"
            first[name] = self.normal(present.shape, present.dtype).mul_(scale) if fresh else present
            second[name] = self.normal(present.shape, present.dtype).mul_(self.method.epsilon).add_(first[name])
        return first, second

    def inputs(self) -> Iterator[Batch | None]:
        """One pass: the batches that :meth:`noise` is shaped like."""
        if self.method.data is None:
            yield from [None] * self.method.batches
        else:
            yield from stream(self.method.data, self.method.name, self.network.device)

    def noise(self, like: Batch | None) -> Batch:
        """Gaussian inputs."""
        if like is None:
            size = self.method.batch_size
            return Batch(tuple(self.normal(torch.Size((size, *s[1:])), self.dtype) for s in self.shapes), {}, None)

        def drawn(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return self.normal(value.shape, value.dtype) if floating else value

        return Batch(tuple(map(drawn, like.args)), {key: drawn(value) for key, value in like.kwargs.items()}, None)


def fan_in(weight: Tensor, synapse: Synapse) -> int:
    """Weights that enter one output unit."""
    if synapse.form == "linear_t":
        return weight.shape[0]
    if synapse.form == "conv_transpose":  # [in, out / groups, ...]
        return weight.numel() // weight.shape[1] // synapse.groups
    return weight[0].numel()


class RecalibratedNorms(TorchFunctionMode):
    """Batch norms take the statistics of what enters them, and write them into their buffers (momentum 1)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return func(**batch_norm_arguments(args, kwargs) | {"training": True, "momentum": 1.0})
        return func(*args, **(kwargs or {}))


def kernel_sensitivity(call: ModelCall, draws: Draws) -> Point:
    """d/dm of the mean over samples and draws of ``|f(x; theta m) - f(x; (theta + d) m)|^2``, at the present mask."""
    masks: Point = {}
    for name, weight in call.weights.items():
        if weight.scored:
            tensor = call.network.tensors[name]
            masks[name] = weight.bits().to(tensor.device, tensor.dtype).requires_grad_()

    def at(values: Point) -> Point:
        return {
            name: value * masks[name] if name in masks else masked(value, call.weights[name])
            for name, value in values.items()
        }

    def output(point: Point, batch: Batch, buffers: Mapping[str, Tensor]) -> Tensor:
        made = logits_of(call.output(point, batch, buffers))
        if not isinstance(made, Tensor):
            raise ValueError(f"NTKSAP: model: wanted a tensor or .logits as output, got {type(made).__name__}")
        return made

    with call.undisturbed(), Accumulator(masks, ranks=call.network.replicas) as total:
        for like in draws.inputs():
            theta, moved = draws.weights()
            batch, buffers = draws.noise(like), call.buffers()
            with torch.no_grad(), RecalibratedNorms():
                output(at(theta), batch, buffers)
            change = output(at(theta), batch, buffers) - output(at(moved), batch, buffers)
            total.begin(batch.size)
            change.square().sum().div(batch.size).backward(inputs=total.inputs)
            del change  # its graph would live through the next forward pass
    return total.mean()
