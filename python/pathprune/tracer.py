"""From an unmodified ``nn.Module`` to nodes: reads the graph of ``torch.export`` once, rule by rule."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from . import attention_rules, complex_rules, expert_rules, norm_rules  # noqa: F401 (enter rules; so do those they import)
from .exporting import UnsupportedModelError, canonical_names, module_path, operator_name
from .graph_values import (
    Choice,
    Forward,
    Place,
    always,
    arguments_of,
    evaluated,
    exchanges_last_axes,
    memory_of,
    part_of,
    tensor_of,
    zeros_like_value,
)
from .nodes import Expression, Gate, Input, Node, Norm, Pool, Product, Scale, Softmax, Tensors, WireMap
from .rules import IDENTITIES, PRODUCTS, RULES, Marker, RuleError, remedy_of

if TYPE_CHECKING:
    from .network import PathNetwork

_USER_INPUT = torch.export.graph_signature.InputKind.USER_INPUT
_EMPTY = {"empty_like", "new_empty"}  # what they hold before it is written counts as zeros
_FILLED = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_SAME_ORDER = {*IDENTITIES, "squeeze", "unsqueeze", "view", "reshape"}  # of a weight's elements
_REMEDIES = {"_mask": "prune.remove", "_g": "remove_weight_norm", "_orig": "remove_spectral_norm"}  # by tensors' names
_LIKE = {"type_as": 0, "expand_as": 0, "view_as": 0, "to": 0, "copy": 1}  # a value, laid out as another is -> which


class Tracer:
    """Walks an exported graph and lets the rules add nodes to ``net``.

    A value of the graph is either a *flow* (it depends on a model input: an index into ``net.nodes``) or a *constant*
    (computed from parameters, buffers and literals: an expression evaluated when it is needed, so that the network
    follows the model's present weights).
    """

    def __init__(self, net: PathNetwork, program: torch.export.ExportedProgram, shown: nn.Module) -> None:
        self.net, self.shown = net, shown
        canonical = canonical_names(shown)
        self.graph = program.graph
        self._outputs = program.call_spec.out_spec
        self._flows: dict[fx.Node, Any] = {}  # fx node -> node index, or list of them
        self._squares: dict[fx.Node, int] = {}  # squares that are read for themselves -> node index
        self._names: dict[fx.Node, str] = {}  # fx placeholder -> tensor name
        self._literals: dict[fx.Node, Tensor] = {}  # integer and boolean model inputs, lifted constants
        self._of_shapes: dict[fx.Node, Expression] = {}  # constants in the shape or type of a flow
        self._reads_input: dict[fx.Node, bool] = {}
        self._asked: set[fx.Node] = set()  # placeholders that are the model's own inputs
        self._routers: set[fx.Node] = set()  # products that experts are chosen by
        self._held: set[fx.Node] = set()  # values of data that constants stand for
        self._depends: dict[tuple[fx.Node, int], bool] = {}
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

    def survey(self) -> tuple[set[fx.Node], dict[fx.Node, str]]:
        """``(operators that read flow and have no rule, uses that a rule refuses -> why)``, all there are.

        What leaves one of them counts as flow, and nothing that reads it as refused.
        """
        lacking: set[fx.Node] = set()
        refused: dict[fx.Node, str] = {}
        opaque: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "output":
                refused |= self._refused_leaves(node)
            if node.op != "call_function":
                continue
            reads_opaque = any(a in opaque for a in node.all_input_nodes)
            try:
                if not reads_opaque:
                    self._explain(node)
                    continue
            except UnsupportedModelError as error:
                if self.operator(node) in RULES:
                    cause = cast("RuleError", error.__cause__)
                    refused[cause.node or node] = str(cause)
            if node.target is not python_operator.getitem and self.operator(node) not in RULES:
                lacking.add(node)
            opaque.add(node)
            self._flows[node] = None
        return lacking, refused

    def run(self) -> None:
        """Explains every node of the graph, and marks the outputs."""
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._explain(node)
            elif node.op == "output":
                every, leaves = tree_leaves(node.args), self._leaves(node)
                if not leaves:
                    raise UnsupportedModelError("no output of the model depends on a floating-point input")
                self.net.outputs = tuple(map(self._leaving, leaves))
                assert self.net.forward is not None
                self.net.forward = replace(self.net.forward, outputs=tuple(map(every.index, leaves)))

    def _leaves(self, output: fx.Node) -> list[fx.Node]:
        """The outputs of the model that paths run to."""
        return [a for a in self._chosen(tree_leaves(output.args)) if isinstance(a, fx.Node) and a in self._flows]

    def _refused_leaves(self, output: fx.Node) -> dict[fx.Node, str]:
        refused = {}
        for node in self._leaves(output):
            try:
                if self.marker(node) is not None:
                    self.flow(node)
            except RuleError as error:
                refused[error.node or node] = str(error)
        return refused

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
        if reads_flow and self._reads_shapes(node, name):
            return
        before = len(self.net.nodes)
        try:
            if schema is not None and schema.is_mutable:
                self._check_views(node)
            if not (reads_flow or name == "embedding") or (schema is not None and not schema.returns):
                return  # a constant, evaluated when a rule asks for it; or an assertion
            if schema is None or name not in RULES:
                raise RuleError("no rule for this operator", remedy=remedy_of(node, name))
            bound = arguments_of(node)
            markers = (self.marker(argument) for argument in node.all_input_nodes)
            marker = next((found for found in markers if found is not None), None)
            found = None if marker is None else marker.through(self, node, bound)
            found = RULES[name](self, node, bound) if found is None else found
            if found is None:
                return
            self._flows[node] = found
            for k in range(before, len(self.net.nodes)):
                made = self.net.nodes[k]
                is_known = isinstance(made, (Norm, Product)) or (isinstance(made, Scale) and made.recorded is not None)
                if is_known or (isinstance(made, Pool) and made.kind == "max"):
                    self.net.recorded[k] = Place(node.name)
                if not isinstance(made, (Input, Product, Softmax)):
                    self._note_choices(k, node)
            expert_rules.note_routed(self, node, range(before, len(self.net.nodes)))
        except RuleError as error:
            raise self._refusal(node, error) from error

    def _leaving(self, node: fx.Node) -> int:
        try:
            return self.flow(node)
        except RuleError as error:
            raise self._refusal(node, error) from error

    def _refusal(self, node: fx.Node, error: RuleError) -> UnsupportedModelError:
        node = error.node or node
        name = self.operator(node)
        rule = f"to support it, write a rule for '{name}' in pathprune/rules.py"
        return UnsupportedModelError(
            f"PathNetwork: operator aten.{name} in module {self.module_path(node)}: {error}; {error.remedy or rule} "
            "(PathNetwork.support_report(model) lists every operator)"
        )

    def _reads_shapes(self, node: fx.Node, name: str) -> bool:
        """Whether an operator reads of flows only what shape and type they have; then its value is a constant."""
        flows = [a for a in node.all_input_nodes if a in self._flows]
        if name in _EMPTY:
            self._literals[node] = zeros_like_value(node)
        elif name in _FILLED or (name in _LIKE and node.args[_LIKE[name]] not in self._flows):
            self._of_shapes[node] = self.constant(node, zero=flows)
        if node not in self._literals and node not in self._of_shapes:
            return False
        self._reads_input[node] = any(self.reads_input(a) for a in node.all_input_nodes if a not in flows)
        return True

    def _note_choices(self, k: int, node: fx.Node) -> None:
        """Numbers that other inputs of the model choose: paths take those of the example."""
        taken = [a for a in node.all_input_nodes if a not in self._flows and self.reads_input(a)]
        if taken:
            self.net.choices[k] = Choice(node.name, {a.name: self.constant(a) for a in taken})

    def _check_views(self, node: fx.Node) -> None:
        """An in-place operator is read as a value: no other view of the memory it changes may be read afterwards."""
        if RULES.get(self.operator(node)) in (RULES["relu"], RULES["dropout"]):  # the identity on path flow
            return
        now, memory = self._position[node], memory_of(node.args[0])
        for view, position in self._position.items():
            is_older = position < now and view is not node.args[0] and memory_of(view) is memory
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
        if isinstance(index, Marker):
            if value not in self._squares:
                self._squares[value] = index.as_flow(self)
            return self._squares[value]
        if not isinstance(index, int):
            raise RuleError("a value with several parts is used as one")
        return index

    def marker(self, value: Any) -> Marker | None:
        """What ``value`` is of a flow, where it depends on the model's input and is none itself."""
        found = self._flows.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, Marker) else None

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
        source = value
        while isinstance(source, fx.Node) and source.op == "call_function" and self.operator(source) in _SAME_ORDER:
            source = source.args[0]
        name = self._names.get(source) if isinstance(source, fx.Node) else None
        if name is None or self.shape(source) != self.shape(value):
            raise RuleError("the weight is computed by the model, not a parameter", remedy=self._made_plain(source))
        self.net.add_weight(name, prunable=prunable)
        return name

    def _made_plain(self, weight: Any) -> str:
        """What makes a parameter of a weight that torch's own utilities compute; empty for other weights."""
        if not isinstance(weight, fx.Node):
            return ""
        if "parametrizations" in self.module_path(weight):
            return "torch.nn.utils.parametrize.remove_parametrizations makes it one"
        read = [node for argument in weight.all_input_nodes for node in (argument, *argument.all_input_nodes)]
        names = [self._names[node] for node in read if node in self._names]
        found = (f for ending, f in _REMEDIES.items() if any(name.endswith(ending) for name in names))
        function = next(found, None)
        return f"torch.nn.utils.{function} makes it one" if function else ""

    def matrix(self, value: Any, out: int) -> tuple[str, int, int]:
        """The parameter that a matrix is, or is a part of.

        Args:
            out: the axis of ``value`` along which its result has its features, -1 or -2.

        Returns:
            the parameter's name, its axis of that kind, and where the part begins along it.
        """
        first = 0
        while isinstance(value, fx.Node) and value.op == "call_function":
            part = part_of(value)
            if part is not None and part[1] == len(self.shape(value)) + out:
                value, _, begin = part
                first += begin
            elif (exchanged := exchanges_last_axes(value)) is not None:
                value, out = value.args[0], -3 - out if exchanged else out
            elif self.operator(value) in IDENTITIES:
                value = value.args[0]
            else:
                break
        return self.weight(value), out, first

    def constant(self, value: Any, zero: Container[fx.Node] = (), through: Container[fx.Node] = ()) -> Expression:
        """``value`` as a function of the model's tensors.

        Args:
            zero: flows that count as zeros.
            through: flows that are computed from them.
        """
        if not isinstance(value, fx.Node):
            number = torch.tensor(float(value), dtype=torch.float64)
            return lambda tensors: number
        leaves, steps = self._constant_steps(value, zero, through)
        if value in leaves:
            return leaves[value]
        last_use = {a: n for n in steps for a in n.all_input_nodes}

        def evaluate(tensors: Tensors) -> Tensor:
            found: dict[fx.Node, Any] = {leaf: expression(tensors) for leaf, expression in leaves.items()}
            with torch.no_grad():
                for n in steps:
                    found[n] = evaluated(n, found)
                    for a in n.all_input_nodes:
                        if last_use[a] is n:
                            found.pop(a, None)
            return found[value]

        return evaluate

    def _constant_steps(
        self, value: fx.Node, zero: Container[fx.Node], through: Container[fx.Node]
    ) -> tuple[dict[fx.Node, Expression], list[fx.Node]]:
        """What a constant is computed from, and the operators that do, in the graph's order."""
        leaves: dict[fx.Node, Expression] = {}
        steps: set[fx.Node] = set()
        asked = [value]
        while asked:
            n = asked.pop()
            if n in steps or n in leaves:
                continue
            if n in zero:
                leaves[n] = always(zeros_like_value(n))
            elif n in self._names:
                name = self._names[n]
                self.net.add_tensor(name)
                leaves[n] = tensor_of(name)
            elif n in self._literals:
                leaves[n] = always(self._literals[n])
            elif n in self._of_shapes:
                leaves[n] = self._of_shapes[n]
            elif n.op != "call_function" or (n in self._flows and n not in through):
                raise RuleError(f"expects a constant, got {n.name}")
            elif _draws(n):
                raise RuleError(f"a constant that is random ({self.operator(n)})")
            else:
                steps.add(n)
                asked += n.all_input_nodes
        return leaves, sorted(steps, key=self._position.__getitem__)

    def detach(self, choice: fx.Node) -> None:
        """Makes constants of what a choice is read from: what data would have it be is zero where it is computed.

        These are the nearest products with weights before ``choice``. All that depends on nothing else is a constant
        from here on, so that a choice, and what is made of it, are what the model has for equal inputs to it.
        """
        seen: set[fx.Node] = set()
        asked = [x for x in choice.all_input_nodes if x in self._flows]
        while asked:
            n = asked.pop()
            if n in seen:
                continue
            seen.add(n)
            if self.operator(n) in PRODUCTS:
                self._literals[n] = zeros_like_value(n)
                self._reads_input[n] = False
                self._routers.add(n)
                self.net.routers.add(n.name)
                continue
            before = [x for x in n.all_input_nodes if x in self._flows]
            if not before:
                raise RuleError("a choice by the model's input itself")
            asked += before
        for n in self._position:
            if n is choice:
                break
            if n in self._literals or (n in self._flows and n.op == "call_function" and self._is_left_behind(n)):
                self._flows.pop(n, None)

    def hold(self, node: fx.Node, value: Expression) -> None:
        """Makes a constant of a value that data decide."""
        self._of_shapes[node] = value
        self._held.add(node)
        self._reads_input[node] = False

    def is_routed(self, value: Any) -> bool:
        """Whether a constant is what it is where every expert is chosen, and another where data choose."""
        return self._is_made_of(value, self._routers, 0)

    def is_varying(self, value: Any) -> bool:
        """Whether data decide what a constant stands for: the weight of an expert, or a decay."""
        return self.is_routed(value) or self._is_made_of(value, self._held, 1)

    def _is_made_of(self, value: Any, origins: set[fx.Node], which: int) -> bool:
        """Whether a constant is computed from others; the rows that a choice selects are not, nor what is zero."""
        if not isinstance(value, fx.Node) or value in self._flows:
            return False
        if (value, which) not in self._depends:
            name = self.operator(value) if value.op == "call_function" else ""
            asked = value.all_input_nodes[:1] if name in ("index", "index_select") else value.all_input_nodes
            is_zero = name == "mul" and any(a.op == "call_function" and self.operator(a) in _ZEROS for a in asked)
            found = value in origins or (not is_zero and any(self._is_made_of(a, origins, which) for a in asked))
            self._depends[value, which] = found
        return self._depends[value, which]

    def _is_left_behind(self, n: fx.Node) -> bool:
        """Whether nothing that a value is computed from is a flow any more."""
        return self.operator(n) != "embedding" and not any(a in self._flows for a in n.all_input_nodes)

    def replay(self, node: fx.Node, of: Sequence[fx.Node] | None = None) -> WireMap:
        """The operator itself as a map of some arguments: of its flows, in the order of ``node.all_input_nodes``."""
        flows = [a for a in node.all_input_nodes if a in self._flows] if of is None else of
        fixed = {a: self.constant(a) for a in node.all_input_nodes if a not in flows}
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


def _located(node: Node, where: str) -> Node:
    return node if node.where else type(node)(**{**node.__dict__, "where": where})


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers (dropout does not in eval mode)."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags and RULES.get(operator_name(node)) is not RULES["dropout"]


def rule_of(name: str) -> Callable[..., Any] | None:
    """The rule for an operator, or None."""
    return RULES.get(name)
