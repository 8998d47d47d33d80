"""From an unmodified ``nn.Module`` to nodes: reads the graph of ``torch.export`` once, rule by rule."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_unflatten

from . import attention_rules  # noqa: F401 (enters its rules into the table)
from .exporting import UnsupportedModelError, module_path, operator_name
from .nodes import Expression, Gate, Input, Node, Norm, Pool, Product, Softmax, Tensors, WireMap
from .norm_rules import Moment, through_moment
from .rules import RULES, RuleError

if TYPE_CHECKING:
    from .network import PathNetwork


_USER_INPUT = torch.export.graph_signature.InputKind.USER_INPUT


@dataclass(frozen=True)
class Forward:
    """The model's own computation for one sample, as it was exported in eval mode.

    Attributes:
        graph: the ATen graph.
        feeds: for each of its inputs: the name of a tensor of the network, a literal, or None for a model input.
        keywords: names of the model inputs that are given by keyword, in order.
        outputs: which of its outputs, counted as leaves, are those of the network.
    """

    graph: fx.GraphModule
    feeds: tuple[str | Tensor | None, ...]
    keywords: tuple[str, ...]
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where the model computes what a node records: the operator, and the value that enters an activation."""

    operator: str
    entering: str = ""


@dataclass(frozen=True)
class Choice:
    """Where the model's integer inputs choose a node's fixed numbers: the operator, its arguments as expressions."""

    operator: str
    arguments: Mapping[str, Expression]


class Tracer:
    """Walks an exported graph and lets the rules add nodes to ``net``.

    A value of the graph is either a *flow* (it depends on a model input: an index into ``net.nodes``) or a *constant*
    (computed from parameters, buffers and literals: an expression evaluated when it is needed, so that the network
    follows the model's present weights).
    """

    def __init__(self, net: PathNetwork, program: torch.export.ExportedProgram, canonical: Mapping[str, str]) -> None:
        self.net = net
        self.graph = program.graph
        self._outputs = program.call_spec.out_spec
        self._flows: dict[fx.Node, Any] = {}  # fx node -> node index, or list of them
        self._squares: dict[fx.Node, int] = {}  # squares that are read for themselves -> node index
        self._names: dict[fx.Node, str] = {}  # fx placeholder -> tensor name
        self._literals: dict[fx.Node, Tensor] = {}  # integer and boolean model inputs, lifted constants
        self._reads_input: dict[fx.Node, bool] = {}
        self._asked: set[fx.Node] = set()  # placeholders that are the model's own inputs
        self._position = {node: k for k, node in enumerate(self.graph.nodes)}
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
        examples = iter(tree_leaves(program.example_inputs))
        for node in self.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind == _USER_INPUT:
                self._asked.add(node)
                self._enter_input(node, next(examples))
            elif spec.target in canonical:
                self._names[node] = canonical[spec.target]
            else:
                self._literals[node] = program.constants[spec.target]

        feeds = [self._names.get(n, self._literals.get(n)) for n in self.graph.nodes if n.op == "placeholder"]
        asked = [n in self._asked for n in self.graph.nodes if n.op == "placeholder"]
        net.forward = Forward(
            program.graph_module,
            tuple(None if own else feed for own, feed in zip(asked, feeds, strict=True)),
            tuple(program.example_inputs[1]) if program.example_inputs else (),
        )

    def _enter_input(self, node: fx.Node, example: Any) -> None:
        if not isinstance(example, Tensor):
            return
        if example.is_floating_point():
            self._flows[node] = self.net.add(Input((), example.shape, name=node.name, where=f"input {node.name}"))
        else:
            self._literals[node] = example

    def run(self) -> None:
        """Explains every node of the graph, and marks the outputs."""
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._explain(node)
            elif node.op == "output":
                every = tree_leaves(node.args)
                leaves = [a for a in self._chosen(every) if isinstance(a, fx.Node) and a in self._flows]
                if not leaves:
                    raise UnsupportedModelError("no output of the model depends on a floating-point input")
                self.net.outputs = tuple(self.flow(a) for a in leaves)
                assert self.net.forward is not None
                self.net.forward = replace(self.net.forward, outputs=tuple(map(every.index, leaves)))

    def _chosen(self, leaves: list[Any]) -> list[Any]:
        """The logits, where the outputs have names and some are called so; else all."""
        if self._outputs is None or self._outputs.num_leaves != len(leaves):
            return leaves
        named = tree_unflatten(leaves, self._outputs)
        logits = [value for key, value in named.items() if "logits" in str(key)] if isinstance(named, Mapping) else []
        return tree_leaves(logits) or leaves

    def _explain(self, node: fx.Node) -> None:
        if node.target is python_operator.getitem:
            source, index = cast("tuple[fx.Node, int]", node.args)
            part = self._flows[source][index] if source in self._flows else None
            if isinstance(part, Tensor):  # what data would have chosen
                self._literals[node] = part
            elif part is not None:
                self._flows[node] = part
            return
        name, schema = self.operator(node), getattr(node.target, "_schema", None)
        reads_flow = any(argument in self._flows for argument in node.all_input_nodes)
        before = len(self.net.nodes)
        try:
            if schema is not None and schema.is_mutable:
                self._check_views(node)
            if not (reads_flow or name == "embedding") or (schema is not None and not schema.returns):
                return  # a constant, evaluated when a rule asks for it; or an assertion
            if schema is None or name not in RULES:
                raise RuleError("no rule for this operator")
            bound, found = self._bind(node), None
            if any(self.moment(argument) is not None for argument in node.all_input_nodes):
                found = through_moment(self, node, bound)
            found = RULES[name](self, node, bound) if found is None else found
            if found is None:
                return
            self._flows[node] = found
            for k in range(before, len(self.net.nodes)):
                made = self.net.nodes[k]
                if isinstance(made, (Norm, Product)) or (isinstance(made, Pool) and made.kind == "max"):
                    self.net.recorded[k] = Place(node.name)
                if not isinstance(made, (Input, Product, Softmax)):
                    self._note_choices(k, node)
        except RuleError as error:
            raise UnsupportedModelError(
                f"PathNetwork: operator aten.{name} in module {self.module_path(node)}: {error}; to support it, write "
                f"a rule for '{name}' in pathprune/rules.py (PathNetwork.support_report(model) lists every operator)"
            ) from error

    def _note_choices(self, k: int, node: fx.Node) -> None:
        """Numbers that other inputs of the model choose: paths take those of the example."""
        taken = [a for a in node.all_input_nodes if a not in self._flows and self.reads_input(a)]
        if taken:
            self.net.choices[k] = Choice(node.name, {a.name: self.constant(a) for a in taken})

    def _check_views(self, node: fx.Node) -> None:
        """An in-place operator is read as a value: no other view of the memory it changes may be read afterwards."""
        if RULES.get(self.operator(node)) in (RULES["relu"], RULES["dropout"]):  # the identity on path flow
            return
        now, memory = self._position[node], _memory(node.args[0])
        for view, position in self._position.items():
            is_older = position < now and view is not node.args[0] and _memory(view) is memory
            if is_older and any(self._position[user] > now for user in view.users):
                raise RuleError("changes a tensor in place while views of it are used later")

    # What rules ask of the graph.

    def add(self, new: Node, node: fx.Node) -> int:
        """Adds a path node that stands for ``node``; returns its index."""
        return self.net.add(_located(new, f"{self.module_path(node)} ({self.operator(node)})"))

    def gate(self, new: Gate, node: fx.Node) -> int:
        """Adds an activation, whose output is that of ``node``."""
        index, flow = self.add(new, node), new.inputs[0]
        known = self._flows | self._squares
        entering = [*(a for a in node.all_input_nodes if known.get(a) == flow), *(a for a in known if known[a] == flow)]
        self.net.recorded[index] = Place(node.name, entering[0].name)
        return index

    def is_flow(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self._flows

    def flow(self, value: Any) -> int:
        """The index of the path node that carries ``value``."""
        if not self.is_flow(value):
            raise RuleError("expects a value that depends on the model's input")
        index = self._flows[value]
        if isinstance(index, Moment):
            if value not in self._squares:
                self._squares[value] = index.as_flow(self)
            return self._squares[value]
        if not isinstance(index, int):
            raise RuleError("a value with several parts is used as one")
        return index

    def moment(self, value: Any) -> Moment | None:
        """The size of a flow that ``value`` is, if it is one."""
        found = self._flows.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, Moment) else None

    def reads_input(self, value: Any) -> bool:
        """Whether a value depends on any input of the model, integers included."""
        if not isinstance(value, fx.Node):
            return False
        if value not in self._reads_input:
            is_input = value.op == "placeholder" and value in self._asked
            self._reads_input[value] = is_input or any(self.reads_input(a) for a in value.all_input_nodes)
        return self._reads_input[value]

    def weight(self, value: Any, prunable: bool = True) -> str:
        """The name of the parameter that ``value`` is; registers it with the network."""
        name = self._names.get(value) if isinstance(value, fx.Node) else None
        if name is None:
            raise RuleError("the weight is computed by the model, not a parameter")
        self.net.add_weight(name, prunable=prunable)
        return name

    def weight_or_transpose(self, value: Any) -> tuple[str, bool]:
        """The parameter that ``value`` is, or is the transpose of."""
        if isinstance(value, fx.Node) and value.op == "call_function" and len(self.shape(value)) == 2:
            name, source = self.operator(value), value.args[0]
            axes: Any = value.args[1:]
            if name in ("t", "numpy_T", "mT"):
                return self.weight(source), True
            if name == "permute":
                return self.weight(source), axes[0][0] % 2 == 1
            if name in ("transpose", "swapaxes"):
                return self.weight(source), axes[0] % 2 != axes[1] % 2
        return self.weight(value), False

    def constant(self, value: Any, zero: fx.Node | None = None, through: Container[fx.Node] = ()) -> Expression:
        """``value`` as a function of the model's tensors.

        Args:
            zero: a flow that counts as zeros.
            through: flows that are computed from it.
        """
        if value is zero and isinstance(value, fx.Node):
            zeros = torch.zeros(self.shape(value))
            return lambda tensors: zeros
        if not isinstance(value, fx.Node):
            number = torch.tensor(float(value), dtype=torch.float64)
            return lambda tensors: number
        if value in self._names:
            name = self._names[value]
            self.net.add_tensor(name)
            return lambda tensors: tensors[name]
        if value in self._literals:
            literal = self._literals[value]
            return lambda tensors: literal
        if value.op != "call_function" or (value in self._flows and value not in through):
            raise RuleError(f"expects a constant, got {value.name}")
        if _draws(value):
            raise RuleError(f"a constant that is random ({self.operator(value)})")
        flat = {a: self.constant(a, zero, through) for a in value.all_input_nodes}
        changes = getattr(getattr(value.target, "_schema", None), "is_mutable", False)

        def evaluate(tensors: Tensors) -> Tensor:
            def resolve(a: Any) -> Any:
                if not isinstance(a, fx.Node):
                    return a
                found = flat[a](tensors)
                return found.clone() if changes and isinstance(found, Tensor) else found  # the model's stays as it is

            with torch.no_grad():
                return value.target(  # type: ignore[operator]
                    *fx.node.map_aggregate(value.args, resolve),
                    **fx.node.map_aggregate(value.kwargs, resolve),
                )

        return evaluate

    def replay(self, node: fx.Node) -> WireMap:
        """The operator itself as a map of its flow arguments, in the order of ``node.all_input_nodes``."""
        flows = [a for a in node.all_input_nodes if a in self._flows]
        fixed = {a: self.constant(a) for a in node.all_input_nodes if a not in self._flows}
        tensors = self.net.tensors

        def apply(xs: Sequence[Tensor], power: float) -> Any:
            values: dict[fx.Node, Any] = dict(zip(flows, xs, strict=True))

            def resolve(a: Any) -> Any:
                if not isinstance(a, fx.Node):
                    return a
                return values[a] if a in values else fixed[a](tensors)

            return node.target(  # type: ignore[operator]
                *fx.node.map_aggregate(node.args, resolve), **fx.node.map_aggregate(node.kwargs, resolve)
            )

        return apply

    def shape(self, node: Any) -> torch.Size:
        return node.meta["val"].shape

    def shapes(self, node: fx.Node) -> list[torch.Size]:
        values = node.meta["val"]
        return [value.shape for value in ([values] if isinstance(values, Tensor) else values)]

    @staticmethod
    def operator(node: fx.Node) -> str:
        """The ATen name, without overload and the trailing underscore of in-place forms."""
        return operator_name(node)

    @staticmethod
    def module_path(node: fx.Node) -> str:
        return module_path(node)

    @staticmethod
    def _bind(node: fx.Node) -> dict[str, Any]:
        """Arguments by schema name, defaults filled in."""
        schema = node.target._schema  # type: ignore[union-attr]
        bound: dict[str, Any] = {}
        for k, argument in enumerate(schema.arguments):
            if k < len(node.args):
                bound[argument.name] = node.args[k]
            elif argument.name in node.kwargs:
                bound[argument.name] = node.kwargs[argument.name]
            else:
                bound[argument.name] = argument.default_value
        return bound


def _located(node: Node, where: str) -> Node:
    return node if node.where else type(node)(**{**node.__dict__, "where": where})


def _memory(node: Any) -> Any:
    """The graph node whose memory ``node`` is, or is a view of."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args:
        if node.target is python_operator.getitem:
            source, part = cast("tuple[fx.Node, int]", node.args)
            returns = getattr(getattr(source.target, "_schema", None), "returns", [])
            is_view = returns and returns[part if len(returns) > 1 else 0].alias_info is not None
        else:
            returns = getattr(getattr(node.target, "_schema", None), "returns", [])
            is_view = returns and returns[0].alias_info is not None
        if not is_view:
            break
        node = node.args[0]
    return node


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers (dropout does not in eval mode)."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags and RULES.get(operator_name(node)) is not RULES["dropout"]


def rule_of(name: str) -> Callable[..., Any] | None:
    """The rule for an operator, or None."""
    return RULES.get(name)
