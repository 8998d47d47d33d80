"""What data do to a network: the gates of a real forward pass, sample by sample.

For an input x the network is linear along its open paths: ``f(x) = sum_p x_p a_p(x) v_p``, with ``a_p`` the product of
the gates on p. A ReLU's gate is 1 or 0; of any activation through zero it is ``phi(z) / z`` (0 at z = 0); a max-pool
lets the winner through; a norm has ``1 / sigma``. Attention weights P are the gate of the values, so nothing passes
through queries and keys. So is a sigmoid, which does not pass zero, of what it multiplies; the weight of an expert,
zero where data do not choose it, of its rows; the decay of a state, of that state. Any other product of two flows is
``(a [b] + [a] b) / 2``, with [.] what they are for the sample. Integers choose rows of an embedding, and paths begin at
these.

Gates are recorded from the model itself, run on the masked weights. Bytes: a batch's activations once. Oracle: the
model's output, which the signed flow through the gates gives again.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .batches import Batch
from .network import PathNetwork
from .nodes import Gate, Input, Node, Norm, Pool, Product, Scale, Softmax, Synapse, Tensors
from .pruned_convolution import pruned_convolution
from .routing import Routing

_SHIFTED = (
    *("sigmoid", "hardsigmoid", "softplus", "log_sigmoid", "softmax"),
    *("clamp", "clamp_min", "clamp_max", "threshold"),
)
_STEPS = ("relu", "leaky_relu", "prelu", "rrelu", "hardshrink", "centre")
_CONVOLUTIONS = tuple(getattr(torch.ops.aten, f"conv{n}d").default for n in (1, 2, 3))

Gates = Mapping[int, Any]


@dataclass(frozen=True)
class Recording:
    """What a batch does to the gates.

    Attributes:
        inputs: where paths begin, one for each input of the network, [N, *shape] each: the floating-point inputs, and
            the rows that integer inputs choose of an embedding.
        outputs: the model's, those of the network, [N, *shape] each.
        gates: node -> [N, *shape]: a ReLU's output (it is open where that is above 0); the factor of any other
            activation, and of a norm, an expert's weight or a decay (these broadcast); of a max-pool the winners' flat
            positions, int64 (-1: no one's). Of a product: position of a factor -> what it is multiplied with, half of
            the other factor's value, or all of it where no path passes the other.
        is_paired: gates are products of two samples' gates, so that squared they count once.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    gates: Gates
    is_paired: bool = False


def opened(network: PathNetwork, who: str) -> PathNetwork:
    """The network that paths see once data fix attention weights and sigmoids: products with these have one input.

    Raises:
        ValueError: attention weights that do more than to multiply values, activations that do not pass zero and do
            more than to multiply another flow; names the operator.
    """
    held: dict[int, int] = {}  # node -> the first of those it is computed from
    made = copy.copy(network)
    made.nodes = list(network.nodes)
    for k in sorted(network.alive):
        node = network.nodes[k]
        fixed = [i in held for i in node.inputs]
        if isinstance(node, Softmax) or (isinstance(node, Gate) and node.name in _SHIFTED):
            held[k] = k
        elif fixed and all(fixed) and not isinstance(node, Synapse):
            held[k] = held[node.inputs[0]]
        elif isinstance(node, Product) and any(fixed):
            made.nodes[k] = replace(node, inputs=tuple(i for i in node.inputs if i not in held))
    made.set_outputs(*network.outputs)
    wrong = {k: held[k] for k in network.outputs if k in held}
    wrong |= {k: held[i] for k in made.alive if k not in held for i in made.nodes[k].inputs if i in held}
    if wrong:
        first, node = min(wrong), network.nodes[wrong[min(wrong)]]
        if isinstance(node, Gate):
            raise ValueError(f"{who}: model: wanted activations through zero, got {node.name} in {node.where}")
        where = network.nodes[first].where
        raise ValueError(f"{who}: model: wanted attention weights that multiply values and no more, got {where}")
    return made


def smooth_gates(network: PathNetwork, who: str) -> list[str]:
    """The operators whose gates vary with the weights other than by steps: smooth activations, norms, products."""
    nodes = (network.nodes[k] for k in sorted(opened(network, who).alive))
    return [
        node.where
        for node in nodes
        if isinstance(node, (Norm, Product))
        or (isinstance(node, Gate) and node.name not in _STEPS)
        or (isinstance(node, Scale) and node.recorded is not None)
    ]


def elements(network: PathNetwork) -> int:
    """About how many numbers a sample's recording has."""
    nodes = network.nodes
    read = [i for k in network.recorded for i in (nodes[k].inputs if isinstance(nodes[k], Product) else (k,))]
    return sum(nodes[i].shape.numel() for i in read)


def record(network: PathNetwork, batch: Batch, weights: Mapping[str, Tensor], who: str) -> Recording:
    """Runs the model in eval mode on a batch and keeps its gates. The model is not touched.

    Args:
        weights: name -> tensors in place of the model's own (masked weights, say).

    Raises:
        ValueError: a network made by hand, an activation that has no gate, a norm by the statistics of a batch,
            experts that data choose, inputs of another shape, integers that choose other positions than those of the
            example, or outputs that are not finite.
    """
    forward = network.forward
    if forward is None:
        raise ValueError(f"{who}: model: wanted one that was read from a module, got a PathNetwork made by hand")
    through = opened(network, who)
    for k in sorted(through.alive):
        node = network.nodes[k]
        if isinstance(node, Product) and node.recorded is None:
            raise ValueError(f"{who}: model: wanted products of activations through zero, got {node.where}")
        if isinstance(node, Norm) and node.recorded is None:
            raise ValueError(f"{who}: model: wanted norms of each sample by itself, got {node.where} of a batch")
    tensors = {**network.tensors, **network._source, **weights}
    if batch.kwargs and not set(forward.keywords) <= set(batch.kwargs):
        wanted, got = sorted(forward.keywords), sorted(batch.kwargs)
        raise ValueError(f"{who}: data: wanted the arguments {wanted}, as example_input has them, got {got}")
    given = tree_leaves((batch.args, [batch.kwargs[key] for key in forward.keywords] if batch.kwargs else []))
    if len(given) != len(forward.example):
        raise ValueError(f"{who}: data: wanted {len(forward.example)} model inputs, got {len(given)}")
    for x, like in zip(given, forward.example, strict=True):
        if not (isinstance(x, Tensor) and isinstance(like, Tensor)):
            if type(x) is not type(like) or x != like:
                got = [f"a {type(a).__name__}" if isinstance(a, Tensor) else repr(a) for a in (like, x)]
                raise ValueError(f"{who}: data: wanted {got[0]} where example_input has it, got {got[1]}")
            continue
        if x.shape[1:] != like.shape[1:]:
            raise ValueError(f"{who}: data: wanted samples of shape {tuple(like.shape[1:])}, got {tuple(x.shape[1:])}")
        if x.is_floating_point() != like.is_floating_point():
            raise ValueError(f"{who}: data: wanted inputs of {like.dtype}, as example_input's, got {x.dtype}")

    routing = Routing(network, tensors, who) if network.routers else None

    def one(*sample: Tensor) -> tuple[list[Tensor], list[Tensor], dict[int, Any], dict[int, Tensor]]:
        entering = iter(x.unsqueeze(0) for x in sample)
        inputs = iter([next(entering) if isinstance(x, Tensor) else x for x in given])
        fed = [next(inputs) if f is None else tensors[f] if isinstance(f, str) else f for f in forward.feeds]
        run = _Run(forward.graph, network, through, tensors, routing)
        outputs = tree_leaves(run.run(*fed))
        begins = [run.inputs[k] for k in sorted(run.inputs)]
        return begins, [outputs[k] for k in forward.outputs], run.kept, run.moved

    dtype = _dtype(network)
    samples = [x for x in given if isinstance(x, Tensor)]
    samples = [x.to(network.device, dtype if x.is_floating_point() else x.dtype) for x in samples]
    with torch.no_grad():
        begins, outputs, gates, moved = torch.vmap(one)(*samples)
    for k, differs in moved.items():
        if bool(differs.any()):
            where = network.nodes[k].where
            raise ValueError(f"{who}: data: wanted integers that choose what example_input's do, got others at {where}")
    if not all(bool(torch.isfinite(out).all()) for out in outputs):
        raise ValueError(f"{who}: model: wanted finite outputs, got NaN or infinite ones")
    return Recording(tuple(begins), tuple(outputs), gates)


def _dtype(network: PathNetwork) -> torch.dtype:
    """The model's own floating-point type."""
    return next(t.dtype for name, t in network.tensors.items() if name in network.prunable)


class _Run(fx.Interpreter):
    """Runs the exported graph, keeping gates on the way."""

    def __init__(
        self,
        graph: fx.GraphModule,
        network: PathNetwork,
        through: PathNetwork,
        tensors: Tensors,
        routing: Routing | None,
    ) -> None:
        super().__init__(graph)
        self.network, self.through, self.tensors, self.routing = network, through, tensors, routing
        self.kept: dict[int, Any] = {}
        self.inputs: dict[int, Tensor] = {}
        self.folded: set[fx.Node] = set()  # batch norms that the convolution before them did
        self._spared = self._only_for_rows()
        self._beginning = {node.name: k for k, node in enumerate(network.nodes) if isinstance(node, Input)}
        self._recording: dict[str, list[int]] = defaultdict(list)  # operator -> nodes it makes
        for k, place in network.recorded.items():
            if k in through.alive:
                self._recording[place.operator].append(k)
        read = (k for made in self._recording.values() for k in made if _divides(through.nodes[k]))
        self._reads = Counter(network.recorded[k].entering for k in read)
        self._choices: dict[str, list[int]] = defaultdict(list)
        for k, choice in network.choices.items():
            if k in through.alive:
                self._choices[choice.operator].append(k)
        self.moved: dict[int, Tensor] = {}  # whether integers choose otherwise than the example's
        self._values: dict[str, Tensor] = {}  # what enters activations, from where it is made until it is read

    def run_node(self, n: fx.Node) -> Any:
        for k in self._choices.get(n.name, ()):
            arguments = self.network.choices[k].arguments
            pairs = [(self.env[a], arguments[a.name](self.tensors)) for a in n.all_input_nodes if a.name in arguments]
            self.moved[k] = torch.stack([(given != own.to(given.device)).any() for given, own in pairs]).any()
        routed = [a for a in n.all_input_nodes if a.name in self.network.routed and n.name in self._recording]
        stood = {a: self.env[a] for a in routed}
        if self.routing is not None:
            self.env.update({a: self.routing.factor(a.name) for a in routed})
        if n in self.folded:
            out = self.fetch_args_kwargs_from_env(n)[0][0]
        elif n.target in _CONVOLUTIONS:
            out = self._convolution(n)
        elif n in self._spared:
            out = None
        elif n.name in self.network.by_rows:
            way = self.network.by_rows[n.name]
            (flow,) = (a for a in n.all_input_nodes if a.name == way.flow)
            out = way.product(self.env[flow], self.tensors[way.weight])
        else:
            out = self._recorded(n, self._recording[n.name]) if n.name in self._recording else super().run_node(n)
        self.env.update(stood)
        if self.routing is not None and n.name in self.routing.read:
            self.routing.known[n.name] = out
            if n.name in self.network.routers:  # every expert is run: by data they differ in weight alone
                out = torch.zeros(out.shape, dtype=out.dtype, device=out.device)
        if n.name in self._beginning:
            self.inputs[self._beginning[n.name]] = _own(n, out)
        if n.name in self._reads:
            self._values[n.name] = _own(n, out)
        return out

    def _only_for_rows(self) -> set[fx.Node]:
        """Matrices laid out for each row, which no product reads."""
        ways = self.network.by_rows
        spared: set[fx.Node] = set()
        for n in reversed(list(self.graph.nodes)) if ways else ():
            readers = [user for user in n.users if user.name not in ways or ways[user.name].flow == n.name]
            if n.op == "call_function" and n.users and all(user in spared for user in readers):
                spared.add(n)
        return spared

    def _recorded(self, n: fx.Node, made: Sequence[int]) -> Any:
        nodes = [self.through.nodes[k] for k in made]
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        arguments = _named(n, args, kwargs)
        for k, node in zip(made, nodes, strict=True):
            if isinstance(node, (Norm, Scale)):
                assert node.recorded is not None
                self.kept[k] = node.recorded(arguments, self.tensors)
            elif isinstance(node, Product):
                assert node.recorded is not None
                self.kept[k] = self._partners(k, node, node.recorded(arguments, self.tensors))
        if isinstance(nodes[0], Pool):
            both = _pooled(args[0], nodes[0])
            self.kept[made[0]] = both[1]
            return both[0] if isinstance(n.meta["val"], Tensor) else both
        out = super().run_node(n)
        for k, node in zip(made, nodes, strict=True):
            if _divides(node):
                z = self._read(self.network.recorded[k].entering)
                self.kept[k] = (out / z).masked_fill_(z == 0, 0)
            elif isinstance(node, Gate):
                self.kept[k] = _own(n, out)
        return out

    def _read(self, entering: str) -> Tensor:
        """A value that enters an activation; let go of after the last."""
        self._reads[entering] -= 1
        return self._values[entering] if self._reads[entering] else self._values.pop(entering)

    def _partners(self, k: int, node: Product, factors: tuple[Tensor, Tensor]) -> dict[int, Tensor]:
        """What each factor that paths pass is multiplied with."""
        if len(node.inputs) == 2:
            return {0: factors[1] / 2, 1: factors[0] / 2}
        slot = self.network.nodes[k].inputs.index(node.inputs[0])
        return {slot: factors[1 - slot].clone()}

    def _convolution(self, n: fx.Node) -> Tensor:
        given = _named(n, *self.fetch_args_kwargs_from_env(n))
        x, w, bias = given["input"], given["weight"], given["bias"]
        dims = w.dim() - 2
        shape = [given[key] for key in ("stride", "padding", "dilation")]
        stride, padding, dilation = (tuple(v) * dims if len(v) == 1 else tuple(v) for v in shape)
        norm = next(iter(n.users)) if len(n.users) == 1 else None
        if norm is not None and norm.target is torch.ops.aten.batch_norm.default and norm.args[0] is n:
            rest: Any = self.map_nodes_to_values(norm.args[1:], norm)
            gamma, beta, mean, variance, training, _, eps = rest[:7]
            if not training:  # a scale and a shift, which the weights can take: a pass over the images less
                scale = (variance + eps).rsqrt() * (1 if gamma is None else gamma)
                w = w * scale.reshape(-1, *[1] * (dims + 1))
                shift = -mean if bias is None else bias - mean
                bias = shift * scale if beta is None else torch.addcmul(beta, shift, scale)
                self.folded.add(norm)
        return pruned_convolution(x, w, bias, stride, padding, dilation, given["groups"])


def _named(n: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An operator's arguments by name, defaults filled in."""
    schema = n.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema} | dict(zip((a.name for a in schema), args, strict=False))
    return given | dict(kwargs)


def _divides(node: Node) -> bool:
    """Whether a gate is what comes out over what goes in; of a ReLU what comes out says all."""
    return isinstance(node, Gate) and node.name != "relu"


def _own(n: fx.Node, out: Any) -> Any:
    """The value, copied where a node that follows changes it in place."""
    schemas = (getattr(user.target, "_schema", None) for user in n.users)
    return out.clone() if any(schema is not None and schema.is_mutable for schema in schemas) else out


def _pooled(z: Tensor, node: Pool) -> tuple[Tensor, Tensor]:
    """The largest in each window, and their flat positions over the pooled axes."""
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(node.kernel)]
    window = (node.kernel, node.stride, node.padding, node.dilation)
    return pool(z, *window, ceil_mode=node.ceil_mode, return_indices=True)
