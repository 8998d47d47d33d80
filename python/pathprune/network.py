"""``PathNetwork``: a network read as a DAG of path nodes, once, from any module that ``torch.export`` accepts."""

from __future__ import annotations

import copy
import fnmatch
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import ALONE, Group, is_distributed, local, reshard, row_group, whole
from .exporting import ONE_AT_A_TIME, UnsupportedModelError, canonical_names, export, module_path, operator_name
from .graph_values import ByRows, Choice, Forward, Place, Routed
from .nodes import Constant, Gate, Input, Node, Scale, Shift, Sum, Synapse, Wire
from .stores import held
from .structure import rebuilt, require_module, require_shapes, without_values
from .surroundings import undisturbed
from .tracer import Tracer, rule_of

__all__ = ["PathNetwork", "SupportReport", "UnsupportedModelError"]


class PathNetwork:
    """A DAG of path nodes over named tensors.

    Read from a module with :meth:`from_module`, or built by hand with the ``add_*`` methods. Nodes are in topological
    order. The tensors are the model's own (no copies): a network follows the weights as they are when it is used.

    Attributes:
        nodes: the path nodes; an input is an index into this list.
        outputs: indices of the nodes whose sum over all elements is R.
        tensors: name -> tensor, every parameter and buffer the nodes read.
        prunable: names of the weights a mask may touch, in the order of ``model.named_parameters()``.
        unreached: names of linear and convolution weights that lie on no input-output path.
        shards: the ranks over which the weights' rows are spread (then ``tensors`` has DTensors); else one process.
        replicas: the ranks whose data count as one; else one process.
        connected: whether its layers are joined as the model joins them; those of ``layer_network`` are not.

    Example:
        >>> net = PathNetwork.from_module(model, torch.ones(1, 3, 224, 224))
        >>> masks = pathprune.prune(net, pathprune.SynFlow(), density=0.05)
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.outputs: tuple[int, ...] = ()
        self.tensors: dict[str, Tensor] = {}
        self.prunable: tuple[str, ...] = ()
        self.unreached: tuple[str, ...] = ()
        self.model: nn.Module | None = None
        self.forward: Forward | None = None  # the model's own computation, where it was read from one
        self.recorded: dict[int, Place] = {}  # gate, max-pool, norm or product -> where that computation makes it
        self.choices: dict[int, Choice] = {}  # node -> what of it integer inputs of the model choose
        self.routers: set[str] = set()  # operators of that computation by whose values experts are chosen
        self.routed: dict[str, Routed] = {}  # values of it that say how much an expert counts
        self.by_rows: dict[str, ByRows] = {}  # its products of each row with an expert's matrix
        self.mixed: set[int] = set()  # nodes to which a choice of experts does other than to weight rows
        self.shards: Group = ALONE
        self.replicas: Group = ALONE
        self.connected = True
        self.whole: PathNetwork = self  # with all positions, where this one has distinct ones only
        self.used: Callable[[str], None] = _unwatched  # called with a weight's name when it has been read through
        self._fixed: set[str] = set()  # weights that are also used as something that is not prunable
        self._source: dict[str, Tensor] = {}  # the tensors of the model that nodes may ask for

    # ------------------------------------------------------------------------------------------ from a module

    @classmethod
    @undisturbed
    def from_module(
        cls,
        model: nn.Module,
        example_input: Any,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        sharded: bool = False,
    ) -> PathNetwork:
        """Reads an unmodified module.

        Parameters that are DTensors (FSDP2) are gathered, so every rank of their mesh calls this; those that
        accelerate has offloaded are read from where it keeps them. Threads take turns; while one reads a model, no
        other may run it.

        Args:
            model: any ``nn.Module`` that ``torch.export`` accepts; it is not touched.
            example_input: a tensor, a tuple of positional or a dict of keyword arguments; only shapes and dtypes of
                floating-point inputs matter (one sample is traced), integer and boolean inputs are held fixed.
            tensors: values by name, in place of the model's own parameters and buffers (which may be on the meta
                device then); those without an entry stay the model's.
            sharded: leave the DTensors of weights on their ranks, for methods that score rows where they are.

        Raises:
            UnsupportedModelError: the module cannot be exported, or an operator has no rule; names module and rule.
            ValueError: no parameters, meta tensors, or several devices; ``sharded``: a weight not cut along its rows.
        """
        with ONE_AT_A_TIME:
            net, tracer = cls._exported(model, example_input, tensors, sharded)
            tracer.run()
            net._drop_dead_ends()
            net._order_prunable(name for name, _ in model.named_parameters())
            if sharded:
                net._gather_all_but_weights()
            reached = {name for k in net.synapses() for name in [net.nodes[k].weight]}  # type: ignore[attr-defined]
            net.unreached = tuple(name for name in _weight_names(tracer.shown) if name not in reached)
            return net

    @classmethod
    def _exported(
        cls, model: nn.Module, example_input: Any, tensors: Mapping[str, Tensor] | None, sharded: bool
    ) -> tuple[PathNetwork, Tracer]:
        """A network without nodes, and what reads them of the model."""
        require_module(model, "PathNetwork")
        reshard(model)
        values = _values(model, tensors, sharded)
        net = cls()
        net.model = shown = structure = model
        if values is not None:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            net.model = rebuilt(model, values)
            shown = rebuilt(model, _each_once(local, values))
            shapes = without_values({name: value for name, value in values.items() if name in parameters})
            structure = rebuilt(model, {**values, **shapes})
        _check_tensors(shown)
        net._source = {**dict(net.model.named_parameters()), **dict(net.model.named_buffers())}
        tracer = Tracer(net, export(structure, example_input), shown)
        assert net.forward is not None
        choosing = functools.cache(lambda: export(structure, example_input, every_choice=False).graph_module)
        net.forward = replace(net.forward, choosing=choosing)
        return net, tracer

    def _gather_all_but_weights(self) -> None:
        """Biases, norms and constants are needed whole; weights stay where their rows are."""
        weights = {self.nodes[k].weight for k in self.synapses()} - self._fixed  # type: ignore[attr-defined]
        for name, tensor in self.tensors.items():
            if name not in weights:
                self.tensors[name] = whole(tensor)
        self.shards = row_group({name: self.tensors[name] for name in self.tensors if name in weights})

    @classmethod
    @undisturbed
    def support_report(cls, model: nn.Module, example_input: Any) -> SupportReport:
        """Every operator of the model, its rule or none, and the modules it comes from.

        Raises as :meth:`from_module` does, but not for operators.
        """
        with ONE_AT_A_TIME:
            _, tracer = cls._exported(model, example_input, None, False)
            lacking, refused = tracer.survey()
        rows: dict[str, tuple[str, list[str]]] = {}
        for node in tracer.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            known = isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
            if node.op != "call_function" or not known or (schema is not None and not schema.returns):
                continue
            name = operator_name(node)
            function = rule_of(name)
            if function is None and node not in lacking:
                continue
            rows.setdefault(name, (_rule_name(function), []))[1].append(module_path(node))
        uses = [f"{operator_name(node)} in {module_path(node)}: {why}" for node, why in refused.items()]
        return SupportReport(type(model).__name__, rows, tuple(uses))

    def _drop_dead_ends(self) -> None:
        """Keeps the nodes from which an output can be reached, so that dead code carries no weights."""
        alive = set(self.outputs)
        for index in reversed(range(len(self.nodes))):
            if index in alive:
                alive.update(self.nodes[index].inputs)
        used = {node.weight for index, node in enumerate(self.nodes) if index in alive and isinstance(node, Synapse)}
        self._alive = alive
        self.prunable = tuple(name for name in self.prunable if name in used)

    def _order_prunable(self, order: Iterable[str]) -> None:
        position = {name: k for k, name in enumerate(order)}
        self.prunable = tuple(sorted(self.prunable, key=lambda name: position[name]))

    # ------------------------------------------------------------------------------------------- building

    def add(self, node: Node) -> int:
        """Appends a node whose inputs are already there; returns its index."""
        for index in node.inputs:
            self._shape(index)
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _shape(self, index: int) -> torch.Size:
        if not 0 <= index < len(self.nodes):
            raise ValueError(f"PathNetwork: flow: wanted the index of a node, 0 to {len(self.nodes) - 1}, got {index}")
        return self.nodes[index].shape

    def add_tensor(self, name: str, tensor: Tensor | None = None) -> None:
        """Makes a tensor available to the nodes under ``name``."""
        self.tensors[name] = self._source[name] if tensor is None else tensor

    def add_weight(self, name: str, tensor: Tensor | None = None, prunable: bool = True) -> None:
        """Makes a weight available; it is prunable unless it is a buffer, or (also) used as something that is not."""
        self.add_tensor(name, tensor)
        if not prunable or (tensor is None and not isinstance(self._source[name], nn.Parameter)):
            self._fixed.add(name)
            self.prunable = tuple(other for other in self.prunable if other != name)
        elif name not in self.prunable and name not in self._fixed:
            self.prunable = (*self.prunable, name)

    def add_input(self, *shape: int, name: str = "input") -> int:
        """A source of flow of the given shape, batch axis of 1 included."""
        return self.add(Input((), torch.Size(shape), name=name, where=name))

    def add_synapse(
        self,
        flow: int,
        weight: Tensor,
        name: str,
        bias: Tensor | None = None,
        form: str = "linear",
        **options: Any,
    ) -> int:
        """A weight on the flow: ``form`` as in :class:`Synapse`, ``rows`` apart; options as in torch's functions."""
        n = weight.dim() - 2
        defaults = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
        groups = options.pop("groups", 1)
        unknown = set(options) - set(defaults)
        if unknown:
            raise ValueError(f"PathNetwork.add_synapse: options: wanted {sorted(defaults)}, got {sorted(unknown)}")
        values = {key: options.get(key, default) for key, default in defaults.items()}
        geometry = {key: (v,) * n if isinstance(v, int) else tuple(v) for key, v in values.items()}
        probe = Synapse((flow,), torch.Size(), weight=name, form=form, groups=groups, where=name, **geometry)
        shape = _synapse_shape(probe, self._shape(flow), weight)
        if self.tensors.get(name, weight) is not weight:
            raise ValueError(f"PathNetwork.add_synapse: name: wanted one that no other weight has, got {name!r}")
        self.add_weight(name, weight)
        index = self.add(Synapse(**{**probe.__dict__, "shape": shape}))
        if bias is None:
            return index
        self.add_tensor(f"{name}.bias", bias)
        view = [1] * len(shape)
        view[-1 if form.startswith("linear") else 1] = -1
        return self.add_shift(index, lambda tensors: tensors[f"{name}.bias"].reshape(view))

    def add_shift(self, flow: int, value: Callable[..., Tensor]) -> int:
        return self.add(Shift((flow,), self._shape(flow), value=value))

    def add_scale(self, flow: int, factor: Tensor) -> int:
        """Multiplies by a fixed tensor that broadcasts to the flow."""
        return self.add(Scale((flow,), self._shape(flow), factor=lambda tensors: factor))

    def add_gate(self, flow: int, name: str = "relu") -> int:
        return self.add(Gate((flow,), self._shape(flow), name=name))

    def add_constant(self, value: Tensor) -> int:
        return self.add(Constant((), value.shape, value=lambda tensors: value))

    def add_sum(self, *flows: int) -> int:
        """The sum of flows: the end of a skip connection."""
        if not flows:
            raise ValueError("PathNetwork.add_sum: flows: wanted at least one, got none")
        shape = torch.broadcast_shapes(*(self._shape(index) for index in flows))
        return self.add(Sum(flows, torch.Size(shape)))

    def add_cat(self, *flows: int, dim: int = 1) -> int:
        """Flows side by side along an axis, the batch axis being 0."""
        if not flows:
            raise ValueError("PathNetwork.add_cat: flows: wanted at least one, got none")
        shape = list(self._shape(flows[0]))
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"PathNetwork.add_cat: dim: wanted an axis of {len(shape)}, got {dim}")
        dim = dim % len(shape)
        shape[dim] = sum(self._shape(index)[dim] for index in flows)
        return self.add(Wire(flows, torch.Size(shape), apply=lambda xs, p: torch.cat(list(xs), dim), concat_dim=dim))

    def add_wire(self, flows: Sequence[int], apply: Callable[[Sequence[Tensor], float], Tensor]) -> int:
        """Any linear map of flows with entries 0 and 1, given as a function of (inputs, power)."""
        probe = apply([torch.zeros(self._shape(index), dtype=torch.float64) for index in flows], 1.0)
        return self.add(Wire(tuple(flows), probe.shape, apply=apply))

    def set_outputs(self, *flows: int) -> PathNetwork:
        """Names the output nodes; returns the network."""
        for index in flows:
            self._shape(index)
        self.outputs = flows
        self._drop_dead_ends()
        return self

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PathNetwork:
        """The same nodes on other tensors; those that are not given stay. It has no model to run."""
        other = copy.copy(self)
        other.tensors = {name: tensors.get(name, own) for name, own in self.tensors.items()}
        other.model = None
        other.whole = other if self.whole is self else self.whole.with_tensors(tensors)
        return other

    # -------------------------------------------------------------------------------------------- questions

    @property
    def alive(self) -> set[int]:
        """Indices of the nodes from which an output can be reached."""
        return self._alive

    def synapses(self) -> list[int]:
        """Indices of the live synapses, in topological order."""
        return [k for k, node in enumerate(self.nodes) if isinstance(node, Synapse) and k in self._alive]

    def select(self, include: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> tuple[str, ...]:
        """Names of prunable weights that match a pattern of ``include`` (None: all) and none of ``exclude``.

        Patterns are those of ``fnmatch`` on qualified names.

        Raises:
            TypeError: patterns that are no strings.
            ValueError: a pattern that matches no prunable weight, or nothing left to prune.
        """
        exclude = _patterns("exclude", exclude)
        include = None if include is None else _patterns("include", include)
        for pattern in (*(include or ()), *exclude):
            if not fnmatch.filter(self.prunable, pattern):
                raise ValueError(f"include/exclude: pattern '{pattern}' matches none of {list(self.prunable)}")

        def matches(name: str, patterns: Sequence[str]) -> bool:
            return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

        chosen = [n for n in self.prunable if include is None or matches(n, include)]
        chosen = [n for n in chosen if not matches(n, exclude)]
        if not chosen:
            raise ValueError("no prunable weight: the network has none, or include/exclude leave none")
        return tuple(chosen)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device if self.tensors else torch.device("cpu")

    @property
    def example(self) -> list[Any]:
        """The model inputs it was read with (see ``Forward``); none where it was made by hand."""
        return [] if self.forward is None else self.forward.example

    def __repr__(self) -> str:
        weights = sum(self.tensors[name].numel() for name in self.prunable)
        return f"PathNetwork({len(self.nodes)} nodes, {len(self.prunable)} prunable tensors, {weights:,} weights)"


def as_network(model: nn.Module | PathNetwork, example_input: Any, *, sharded: bool = False) -> PathNetwork:
    """A path network as it is; a module by way of ``PathNetwork.from_module``."""
    if isinstance(model, PathNetwork):
        if not model.outputs:
            raise ValueError("PathNetwork: model: wanted a PathNetwork with outputs (set_outputs), got none")
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"PathNetwork: model: wanted a module or PathNetwork, got {type(model).__name__}")
    if example_input is None:
        raise ValueError("example_input: wanted an input the model accepts, got None")
    return PathNetwork.from_module(model, example_input, sharded=sharded)


class SupportReport:
    """Operators of a model and their rules. ``bool(report)`` is True when ``PathNetwork.from_module`` reads the model.

    Attributes:
        model: the name of its class.
        rows: operator -> (rule or "none", the modules it is in).
        refused: uses of operators that their rule refuses: operator, module and reason.
    """

    def __init__(self, model: str, rows: dict[str, tuple[str, list[str]]], refused: tuple[str, ...] = ()) -> None:
        self.model, self.rows, self.refused = model, rows, refused

    def missing(self) -> list[str]:
        """Operators without a rule."""
        return sorted(name for name, (rule, _) in self.rows.items() if rule == "none")

    def __bool__(self) -> bool:
        return not self.missing() and not self.refused

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.rows)} operators, {len(self.missing())} without a rule"]
        width = max((len(name) for name in self.rows), default=0)
        rules = max((len(rule) for rule, _ in self.rows.values()), default=0)
        for name, (rule, modules) in sorted(self.rows.items(), key=lambda row: (row[1][0] != "none", row[0])):
            more = f" and {len(modules) - 2} more" if len(modules) > 2 else ""
            lines.append(f"  {name:<{width}}  {rule:<{rules}}  {len(modules):>4} x  {', '.join(modules[:2])}{more}")
        lines += [f"  refused: {use}" for use in self.refused]
        return "\n".join(lines)


def _rule_name(function: Callable[..., Any] | None) -> str:
    if function is None:
        return "none"
    return function.__name__.lstrip("_")


def _weight_names(model: nn.Module) -> list[str]:
    """Canonical names of the weights that linear and convolution modules hold."""
    canonical = canonical_names(model)
    hugging_face = sys.modules.get("transformers.pytorch_utils")  # imported, if the model has one of its layers
    kinds = (nn.Linear, nn.modules.conv._ConvNd, *([hugging_face.Conv1D] if hugging_face else []))
    names = [f"{path}.weight".lstrip(".") for path, module in model.named_modules() if isinstance(module, kinds)]
    return list(dict.fromkeys(canonical[name] for name in names if name in canonical))


def _values(model: nn.Module, tensors: Mapping[str, Tensor] | None, sharded: bool) -> dict[str, Tensor] | None:
    """What stands in for the model's own tensors; None where they can be used as they are."""
    dispatched = any(hasattr(module, "_hf_hook") for module in model.modules())
    every = [*model.parameters(), *model.buffers()]
    if tensors is None and not dispatched and not any(is_distributed(tensor) for tensor in every):
        return None
    values = held(model, tensors)
    parameters = dict(model.named_parameters(remove_duplicate=False)) if sharded else {}
    values |= _each_once(whole, {name: value for name, value in values.items() if name not in parameters})
    if dispatched and len({value.device for value in values.values()}) > 1:
        values = _each_once(Tensor.cpu, values)  # accelerate spreads a model; it is scored in the CPU's memory
    return values


def _each_once(function: Callable[[Tensor], Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A function of tensors by name; a tensor that has several names stays one."""
    made: dict[int, Tensor] = {}
    for value in values.values():
        if id(value) not in made:
            made[id(value)] = function(value)
    return {name: made[id(value)] for name, value in values.items()}


def _check_tensors(model: nn.Module) -> None:
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    if not tensors:
        raise ValueError(f"PathNetwork: model: wanted parameters, got {type(model).__name__} with none")
    tensors |= dict(model.named_buffers())
    require_shapes(tensors, "PathNetwork")
    frozen = [name for name, tensor in tensors.items() if tensor.is_inference()]
    if frozen:
        raise ValueError(
            "PathNetwork: model: wanted ordinary tensors (copy.deepcopy of the model makes them), got some made under "
            f"torch.inference_mode: {frozen[0]}"
        )
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"PathNetwork: model: wanted materialised weights, got meta tensors: {', '.join(meta[:5])}")
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"PathNetwork: model: wanted one device, got {sorted(map(str, devices))}")


def _patterns(name: str, given: object) -> tuple[str, ...]:
    """One pattern or several, as several."""
    several = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [None]
    if not all(isinstance(pattern, str) for pattern in several):
        raise TypeError(f"{name}: wanted a name pattern or a list of them, got {given!r}")
    return tuple(several)


def _unwatched(name: str) -> None:
    """Nobody wants to know which weights have been read."""


def _synapse_shape(node: Synapse, entering: torch.Size, weight: Tensor) -> torch.Size:
    """The shape a synapse gives, found by running it on meta tensors."""
    forms = ("linear", "linear_t", "experts", "experts_t", "conv", "conv_transpose")
    if node.form not in forms:
        raise ValueError(f"PathNetwork.add_synapse: form: wanted one of {forms}, got {node.form!r}")
    try:
        return _run_on_meta(node, entering, weight)
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"PathNetwork.add_synapse: weight: wanted one that a {node.form} takes with a flow of shape "
            f"{tuple(entering)}, got {tuple(weight.shape)}: {error}"
        ) from error


def _run_on_meta(node: Synapse, entering: torch.Size, weight: Tensor) -> torch.Size:
    x, w = torch.empty(entering, device="meta"), torch.empty(weight.shape, device="meta")
    if node.form == "linear":
        return torch.nn.functional.linear(x, w).shape
    if node.form == "experts":
        return (x @ w.mT).shape
    if node.form in ("linear_t", "experts_t"):
        return (x @ w).shape
    transposed = node.form == "conv_transpose"
    geometry = (node.stride, node.padding, node.dilation, transposed, node.output_padding, node.groups)
    return torch.convolution(x, w, None, *geometry).shape
