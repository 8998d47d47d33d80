"""The loss of a model on data, as a function of the weights that are scored.

The real model runs, by ``torch.func.functional_call``: its scored weights are replaced by leaves of our own that share
memory with them (copies only where a mask has zeroed some), all other parameters are detached, buffers are clones. So a
backward pass makes gradients of the scored weights and of nothing else, adds them up as it makes them, and the model's
parameters, ``.grad``, buffers, modes and torch's random state are what they were, also after an exception.

Memory of a pass: the sums (one number a weight), the masked weights, and the activations of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import ops
from ..batches import Batch, Data, require_reiterable, runs_on, stream
from ..distributed import ALONE, Group
from ..exporting import canonical_names, in_mode
from ..network import PathNetwork
from ..ops import WeightMap
from ..surroundings import device_of_caller
from ..weights import Weight
from .base import Pruner

Loss = Callable[[Any, Any], Tensor]
Point = dict[str, Tensor]
"""Values of all synapse weights by name; those that are scored are leaves."""


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy of logits ``[n, classes, ...]`` against labels int64 ``[n, ...]`` or probabilities."""
    return F.cross_entropy(output, target)


def labelled_output(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the output that each label int64 ``[n]`` names, of logits ``[n, classes]``."""
    return output.gather(1, target[:, None]).mean()


class NonFiniteLossError(ValueError):
    """A loss that is NaN or infinite: the data or the network's numbers are."""


_OF_LABELS = (cross_entropy, labelled_output)  # losses whose labels can be checked before they are used


@dataclass(frozen=True)
class DataPruner(Pruner):
    """A method that scores weights by derivatives of a loss on data.

    Args:
        data: re-iterable of batches ``(x, y)``; see ``batches``. Batches are streamed and may differ in size. Where
            several ranks prune together, each has its own share of them, and sums run over all samples.
        loss: ``loss(output, y) -> scalar``, the mean over the batch: every batch counts by its size, so every sample
            counts alike. ``output`` is the model's, or its ``.logits`` where it has them (Hugging Face). With the
            default, batches may be ``x`` alone if the model returns its own ``.loss``.
        train_mode: run the model in training mode (batch norms use the statistics of the batch, dropout draws from
            ``prune``'s seed), as most published runs do. Default: in evaluation mode, whatever mode it is in.
    """

    data: Data = field(repr=False, compare=False)
    loss: Loss = field(default=cross_entropy, compare=False)
    train_mode: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.loss):
            raise TypeError(f"{self.name}: loss: wanted a function of (output, y), got {self.loss!r}")
        require_reiterable(self.data, self.name)

    @property
    def maps(self) -> tuple[WeightMap, WeightMap]:
        return WeightMap.IDENTITY, WeightMap.IDENTITY

    def config(self) -> dict[str, Any]:
        return {**super().config(), "loss": getattr(self.loss, "__name__", type(self.loss).__name__)}


class ModelCall:
    """The model as a function of its synapse weights and a batch.

    Args:
        who: the pruner's name, for messages.
        train_mode: the mode of every module while :meth:`undisturbed`.
        seed: of what the model and the data loader draw; every pass draws the same.

    Raises:
        ValueError: the network was built by hand, and there is no model to run; or it runs on several GPUs.
    """

    def __init__(
        self, who: str, network: PathNetwork, weights: Mapping[str, Weight], train_mode: bool, seed: int
    ) -> None:
        if network.model is None:
            raise ValueError(f"{who}: model: wanted a module, or a PathNetwork read from one; this was built by hand")
        if any(isinstance(module, nn.DataParallel) for module in network.model.modules()):
            raise ValueError(
                f"{who}: model: wanted one that can run on other tensors, got nn.DataParallel: prune .module"
            )
        self.who, self.model, self.network, self.weights = who, network.model, network, weights
        self.train_mode, self.seed = train_mode, seed
        self._names = canonical_names(self.model)  # tied parameters are given under each of their names
        self._parameters = {name: p.detach() for name, p in self.model.named_parameters(remove_duplicate=False)}

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Where the model is run: the mode that was asked for, seeded draws; all put back at the end."""
        gpus = [self.network.device] if self.network.device.type == "cuda" else []
        mode = in_mode(self.model, self.train_mode)
        with mode, torch.random.fork_rng(gpus), torch.enable_grad(), FrozenNorms():
            torch.default_generator.manual_seed(self.seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(self.seed)
            yield

    def point(self) -> Point:
        """The weights as they are, under the present mask; nothing is copied where nothing is pruned."""
        values = {}
        for name, weight in self.weights.items():
            weight.settle()
            values[name] = masked(self.network.tensors[name].detach(), weight).requires_grad_(weight.scored)
        return values

    def leaves(self, point: Point) -> dict[str, Tensor]:
        """Those of a point that are scored."""
        return {name: value for name, value in point.items() if self.weights[name].scored}

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the model's buffers: what a run may write to."""
        copies = {self._names[name]: buffer for name, buffer in self.model.named_buffers()}
        copies = {name: buffer.detach().clone() for name, buffer in copies.items()}
        every = self.model.named_buffers(remove_duplicate=False)
        return {name: copies[self._names[name]] for name, _ in every}

    def output(self, point: Point, batch: Batch, buffers: Mapping[str, Tensor] | None = None) -> Any:
        """What the model returns.

        Raises:
            ValueError: the model does not take the batch.
        """
        values = {**self._parameters, **(self.buffers() if buffers is None else buffers)}
        values.update({name: point[known] for name, known in self._names.items() if known in point})
        with runs_on(batch, self.who, self.network.example), device_of_caller():
            return torch.func.functional_call(self.model, values, batch.args, dict(batch.kwargs), tie_weights=False)


class Objective(ModelCall):
    """The mean loss over the data, and its gradient.

    Args:
        method: whose data, loss and mode.
        temperature: outputs are divided by it before the loss.
    """

    def __init__(
        self,
        method: DataPruner,
        network: PathNetwork,
        weights: Mapping[str, Weight],
        seed: int,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(method.name, network, weights, method.train_mode, seed)
        self.data, self.of_output, self.temperature = method.data, method.loss, temperature

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """One pass over the data: (position, batch)."""
        own = self.of_output is not cross_entropy
        return enumerate(stream(self.data, self.who, self.network.device, needs_target=own))

    def loss(self, point: Point, batch: Batch, position: int) -> Tensor:
        """The loss of a batch, a finite scalar.

        Raises:
            ValueError: no target, labels out of range, a loss that is no scalar, is NaN or infinite, or does not depend
                on the weights; names the batch.
        """
        loss = self.raw_loss(point, batch, position, check=True)
        where = f"in batch {position}"
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"{self.who}: loss: wanted a scalar tensor, got {got} {where}")
        if not bool(torch.isfinite(loss)):
            raise NonFiniteLossError(f"{self.who}: loss: wanted a finite number, got {float(loss.detach())} {where}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(f"{self.who}: loss: wanted one that depends on the weights, got a constant {where}")
        return loss

    def raw_loss(self, point: Point, batch: Batch, position: int, check: bool = False) -> Tensor:
        """The loss without a look at its value; ``check``: look at the labels."""
        output = self.output(point, batch)
        if batch.target is None:
            loss = part(output, "loss")
            if loss is None:
                wanted = "batches (x, y), or a model that returns its loss"
                raise ValueError(f"{self.who}: data: wanted {wanted}, got x alone in batch {position}")
            if self.temperature != 1.0:
                wanted = f"batches (x, y), to divide outputs by {self.temperature:g} before the loss"
                raise ValueError(f"{self.who}: temperature: wanted {wanted}, got x alone in batch {position}")
            return loss
        logits = logits_of(output)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if check and self.of_output in _OF_LABELS:
            check_labels(self.who, logits, batch.target, position, self.of_output is cross_entropy)
        return self.of_output(logits, batch.target)

    def gradient(self, point: Point) -> Point:
        """The gradient of the mean loss with respect to the scored weights; zero where the loss has none."""
        with self.undisturbed(), Accumulator(self.leaves(point), ranks=self.network.replicas) as total:
            for position, batch in self.batches():
                total.begin(batch.size)
                self.loss(point, batch, position).backward(inputs=total.inputs)
        return total.mean()


class Accumulator:
    """Sums what backward passes bring to leaves while they bring it, so that no pass holds a gradient of all weights.

    Args:
        leaves: name -> leaf tensor.
        term: makes what is added from (name, gradient in the score's type); may write to the gradient.
        ranks: processes that have a share of the samples each; all end the pass together, or none.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        term: Callable[[str, Tensor], Tensor] | None = None,
        ranks: Group = ALONE,
    ) -> None:
        self.leaves, self.term, self.ranks = leaves, term, ranks
        self._together = ranks.together("prune: data")
        self.inputs = list(leaves.values())
        self.sums: Point = {}
        self.samples, self._factor = 0, 1.0
        self._handles: list[Any] = []

    def __enter__(self) -> Accumulator:
        self._together.__enter__()
        for name, leaf in self.leaves.items():
            self._handles.append(leaf.register_post_accumulate_grad_hook(partial(self._take, name)))
        return self

    def __exit__(self, *failure: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._together.__exit__(*failure)

    def begin(self, samples: int, passes: int = 1) -> None:
        """The backward passes to come (``passes`` of them) are means over so many samples."""
        self.samples += samples
        self._factor = samples / passes

    def _take(self, name: str, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        term = gradient.detach().to(score_dtype(leaf))
        self.add(name, term if self.term is None else self.term(name, term))

    def add(self, name: str, term: Tensor) -> None:
        """Adds a term of the present batch; the tensor is taken over."""
        if name in self.sums:
            self.sums[name].add_(term, alpha=self._factor)
        else:
            self.sums[name] = term.mul_(self._factor)

    def mean(self) -> Point:
        """The mean over all samples, of all ranks, of each leaf's terms, in place; the accumulator is spent."""
        samples = self.samples
        if self.ranks.size > 1:
            samples = int(self.ranks.sum_(torch.tensor(samples, device=self.inputs[0].device)))
        for name, leaf in self.leaves.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(leaf.shape, dtype=score_dtype(leaf), device=leaf.device)
            self.ranks.sum_(self.sums[name]).div_(samples)
        return self.sums


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def batch_norm_arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """What ``F.batch_norm`` was called with, by name."""
    return dict(zip(_BATCH_NORM, args, strict=False)) | (kwargs or {})


class FrozenNorms(TorchFunctionMode):
    """Runs frozen batch norms as the affine maps they are.

    Torch's own keeps its input for the gradient of gamma, which nobody asks for here, and that is half of what a
    convolutional network keeps for the backward pass. Batch norms in training mode stay as they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,  # [n, channels, ...]
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    given = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    plain = all(t.dtype == x.dtype and not t.requires_grad for t in given)
    if training or running_mean is None or running_var is None or not plain:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    along = [1, -1, *[1] * (x.dim() - 2)]
    return (x * scale.view(along)).add_(shift.view(along))


def masked(value: Tensor, weight: Weight) -> Tensor:
    """``value`` with the weights that are gone set to 0; itself where none is."""
    if weight.mask is None:
        return value
    rows = value.contiguous().reshape(weight.groups, -1, weight.columns)
    return ops.masked_weight(rows, weight.mask, WeightMap.IDENTITY).reshape(value.shape).to(value.dtype)


def score_dtype(tensor: Tensor) -> torch.dtype:
    """What sums and scores of a tensor are kept in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def part(output: Any, name: str) -> Any:
    """A named part of a model's output (Hugging Face's, or a dict), or None."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def logits_of(output: Any) -> Any:
    """The logits of an output that has them; any other output itself."""
    logits = part(output, "logits")
    return output if logits is None else logits


def check_labels(who: str, logits: Any, target: Any, position: int, probabilities: bool = False) -> None:
    """Refuses what a loss would refuse too late (a CUDA assertion ends the process), or in other words.

    Args:
        probabilities: whether the target may be those of all classes.

    Raises:
        ValueError: no logits [n, classes, ...], or labels of another shape or outside [0, classes); names the batch.
    """
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{who}: loss: wanted logits [n, classes, ...] for cross entropy, got {got}")
    if not isinstance(target, Tensor):
        raise ValueError(f"{who}: data: wanted labels in a tensor, got {type(target).__name__} in batch {position}")
    labels = logits.shape[:1] + logits.shape[2:]
    is_floating = target.is_floating_point()
    if target.shape != (logits.shape if is_floating else labels) or (is_floating and not probabilities):
        wanted = f"labels, integers of shape {list(labels)}"
        wanted += f", or probabilities of shape {list(logits.shape)}" if probabilities else ""
        got = f"{str(target.dtype).removeprefix('torch.')} {list(target.shape)} in batch {position}"
        raise ValueError(f"{who}: data: wanted {wanted}, got {got}")
    if is_floating:
        return
    classes = logits.shape[1]
    wrong = target[(target < 0) | (target >= classes)]
    wrong = wrong[wrong != -100]  # torch's mark for labels that do not count
    if wrong.numel():
        got = f"{int(wrong[0])} in batch {position}"
        raise ValueError(f"{who}: data: wanted labels in [0, {classes}), got {got}")
