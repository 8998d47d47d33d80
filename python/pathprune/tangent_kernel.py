"""The neural tangent kernel as the paths see it: ``Theta = J_f Pi J_f^T`` (Gebhart, Saxena and Schrater 2021).

``f(x) = sum_p x_p a_p(x) v_p``: the derivative of the output by the weights is that by the path values, J_f (the data
factor: which paths a sample opens, and the input at their start), times that of the path values, J_v (the path
kernel's). With gates recorded, the network between them is linear: one signed gated flow of a sample gives its row of
Theta's root. All derivatives are by the prunable weights; paths that begin at biases count with their value as input.

That is the whole derivative where gates move by steps alone: ReLU, leaky ReLU, max-pool. Other gates (``phi(z) / z`` of
a GELU, ``1 / sigma``, attention weights, factors of a product) have derivatives of their own, which paths do not know;
such models are refused unless gates are to be held: then it is the kernel of the linear network between them.

Oracle: torch.func's Jacobian of the model, or of the model with its gates detached; enumeration of paths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Data, require_reiterable, stream
from .gates import GatedFlow
from .network import PathNetwork, as_network
from .nodes import Gate, Input, Pool, Product, Scale
from .ops import WeightMap
from .policy import policy_of
from .recording import Recording, opened, record, smooth_gates
from .spatial import merge_equal_positions
from .surroundings import undisturbed
from .weights import Scaled, Weight, power_of_two, weights_of

Masks = Mapping[str, Tensor]


@undisturbed
def ntk(
    model: nn.Module | PathNetwork,
    x: Tensor,
    masks: Masks | None = None,
    *,
    hold_gates: bool = False,
    example_input: Any = None,
) -> Tensor:
    """The neural tangent kernel over a few samples, ``[n, outputs, n, outputs]`` in float64.

    Args:
        model: a module, or a ``PathNetwork`` read from one; it is run in eval mode and not touched.
        x: [n, *sample]; of models that embed, integers.
        masks: bool tensors by name: derivatives and gates of the masked network.
        hold_gates: take derivatives with all gates held as they are for the sample. Elsewhere models with gates that
            move other than by steps are refused (GELU, norms, attention): their tangent kernel is another.

    Raises:
        ValueError: activations that have no gate, or gates to be held; a hand-made network.

    Example:
        >>> theta = ntk(llama, tokens, masks, hold_gates=True)
        >>> theta.shape  # [n, outputs, n, outputs]
    """
    network = as_network(model, x[:1] if example_input is None else example_input)
    _check_gates(network, hold_gates, "ntk")
    batch = Batch((x,), {}, None)
    rows = [torch.stack(list(_gradients(network, batch.part(n, n + 1), masks))) for n in range(len(x))]
    jacobian = torch.stack(rows)  # [n, outputs, weights]
    flat = jacobian.flatten(0, 1)
    return (flat @ flat.T).unflatten(1, jacobian.shape[:2]).unflatten(0, jacobian.shape[:2])


@undisturbed
def ntk_trace(
    model: nn.Module | PathNetwork,
    data: Data,
    masks: Masks | None = None,
    *,
    probes: int | None = None,
    seed: int = 0,
    hold_gates: bool = False,
    example_input: Any = None,
) -> float:
    """The trace of the neural tangent kernel, ``sum_n sum_k |d f_k(x_n) / d w|^2``.

    Args:
        model, masks, hold_gates: as for :func:`ntk`.
        data: a re-iterable of batches ``x`` or ``(x, y)``.
        probes: None: exact, one backward flow for each sample and output; else an unbiased estimate from this many
            random signs over the outputs of each sample (Hutchinson).
        seed: of the signs.
        example_input: what the model is read with; None: the first sample.

    Returns:
        A sum over all samples of the data, not their mean.

    Raises:
        TypeError: data that can be read only once.
        ValueError: no data, probes below 1, what :func:`ntk` refuses.

    Determinism: the same data and seed give the same number, up to the rounding of torch's products.

    Example:
        >>> ntk_trace(model, loader, masks, probes=8)
    """
    require_reiterable(data, "ntk_trace")
    if probes is not None and probes < 1:
        raise ValueError(f"ntk_trace: probes: wanted at least 1, got {probes}")
    network = as_network(model, _first_input(data) if example_input is None else example_input)
    _check_gates(network, hold_gates, "ntk_trace")
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for batch in stream(data, "ntk_trace", network.device):
        for n in range(batch.size):
            sample = batch.part(n, n + 1)
            made = _gradients(network, sample, masks, None if probes is None else (probes, generator))
            squares = sum(float(row.square().sum()) for row in made)
            total += squares if probes is None else squares / probes
    return total


@undisturbed
def path_activations(
    model: nn.Module | PathNetwork, x: Tensor, masks: Masks | None = None, *, full: bool = False
) -> Tensor:
    """The data factor ``J_f J_f^T``: how many open paths samples share, weighted by their inputs.

    Args:
        model, masks: as for :func:`ntk`.
        x: [n, *sample].
        full: all pairs of samples (n (n + 1) / 2 flows) instead of the diagonal.

    Returns:
        log2 of the diagonal ``sum_p x_p^2 a_p(x)``, float64 [n, outputs]; or, full, ``sum_p x_p x'_p a_p a'_p``,
        float64 [n, n, outputs] (paths to different outputs have none in common). Biases begin no path; where norms
        centre, that is dropped.

    Raises:
        ValueError: what has no gate, other inputs than the model takes, a hand-made network.

    Example:
        >>> path_activations(model, x).exp2()  # [n, outputs]
    """
    network = as_network(model, x[:1])
    recording = _recorded(network, Batch((x,), {}, None), masks, "path_activations")
    if not full:
        return torch.cat([_log2(flow) for flow in _open_paths(network, recording, masks)], 1)
    n = len(x)
    rows = []
    for i in range(n):
        pair = _paired(network, recording, i)
        flows = _open_paths(network, pair, masks, source=[own * own[i : i + 1] for own in recording.inputs])
        rows.append(torch.cat([_double(flow) for flow in flows], 1))
    return torch.stack(rows)


@undisturbed
def ntk_trace_bound(
    model: nn.Module | PathNetwork, data: Data, masks: Masks | None = None, *, hold_gates: bool = False
) -> float:
    """log2 of ``sum_n sum_k g_k(x_n^2; a) sum_i d h_k / d u_i``, which the trace of the NTK never exceeds.

    The data factor's diagonal times the path kernel's trace, output by output (the bound that PX descends, Iurada et
    al. 2024). Of networks whose biases are zero.

    Args:
        model, masks: as for :func:`ntk`.
        data: a re-iterable of batches ``x`` or ``(x, y)``.
        hold_gates: see :func:`ntk`; of the kernel with gates held it is a bound.

    Raises:
        ValueError: what :func:`ntk` refuses, and norms that centre, whose paths lead from each unit to all others.
    """
    require_reiterable(data, "ntk_trace_bound")
    network = as_network(model, _first_input(data))
    _check_gates(network, hold_gates, "ntk_trace_bound")
    through = opened(network, "ntk_trace_bound")
    for node in (through.nodes[k] for k in sorted(through.alive)):
        if isinstance(node, Gate) and not node.bends:
            raise ValueError(f"ntk_trace_bound: model: wanted norms that do not centre, got {node.where}")
    totals: list[Tensor] | None = None
    for batch in stream(data, "ntk_trace_bound", network.device):
        recording = _recorded(network, batch, masks, "ntk_trace_bound")
        levels = [_log2(flow) for flow in _open_paths(network, recording, masks)]
        found = [(level * math.log(2)).logsumexp(0) / math.log(2) for level in levels]
        totals = found if totals is None else [torch.logaddexp2(a, b) for a, b in zip(totals, found, strict=True)]
    assert totals is not None
    weights, flow = _all_open(network, recording, masks)
    flow.forward()
    for k, level in zip(flow.network.outputs, totals, strict=True):
        top = level.max().floor().to(torch.int64)
        shares = (level - top).exp2().to(flow.dtype)
        flow.leaving[k] = Scaled(shares.reshape(flow.values[k].tensor.shape), top.reshape(1))
    flow.backward()
    bound = torch.tensor(-torch.inf, dtype=torch.float64)
    for name in flow.network.prunable:
        made = weights[name].written_scores()
        bound = torch.logaddexp2(bound, made.weight.sum(dtype=torch.float64).log2().cpu() + made.exponent)
    return float(bound)


def _all_open(network: PathNetwork, recording: Recording, masks: Masks | None) -> tuple[dict[str, Weight], GatedFlow]:
    """The flow of squared weights on ones with all gates 1: the sum over paths of their squared values."""
    gates: dict[int, Any] = {}
    for k, gate in recording.gates.items():
        if isinstance(network.nodes[k], Product):
            gates[k] = {slot: torch.ones_like(partner[:1]) for slot, partner in gate.items()}
        elif isinstance(network.nodes[k], Scale):  # weights of experts, decays
            gates[k] = torch.ones_like(gate[:1])
    network = network if gates else merge_equal_positions(network, "paths")
    ones = [torch.ones((1, *node.shape), dtype=torch.float32) for node in network.nodes if isinstance(node, Input)]
    weights = weights_of(network, network.prunable, (WeightMap.SQUARE, WeightMap.ONE), masks=masks)
    options = {"source": ones, "f": WeightMap.SQUARE, "scored": True}
    return weights, GatedFlow(network, weights, Recording((), (), gates), policy_of("recorded"), **options)  # type: ignore[arg-type]


def _check_gates(network: PathNetwork, hold_gates: bool, who: str) -> None:
    smooth = [] if hold_gates else smooth_gates(network, who)
    if smooth:
        more = f" and {len(smooth) - 1} more" if len(smooth) > 1 else ""
        raise ValueError(
            f"{who}: model: wanted gates that move by steps alone (ReLU, leaky ReLU, max-pool), got {smooth[0]}{more}; "
            "hold_gates=True takes derivatives with all gates held as they are"
        )


def _first_input(data: Data) -> Any:
    for batch in data:
        return batch[0] if isinstance(batch, (tuple, list)) else batch
    raise ValueError("data: wanted at least one batch, got none")


def _recorded(network: PathNetwork, batch: Batch, masks: Masks | None, who: str) -> Recording:
    whole = {name: network.tensors[name].detach() for name in masks or ()}
    masked = {name: whole[name] * mask.to(whole[name].device) for name, mask in (masks or {}).items()}
    return record(network, batch, masked, who)


def _open_paths(
    network: PathNetwork, recording: Recording, masks: Masks | None, source: list[Tensor] | None = None
) -> list[Scaled]:
    """The sum of inputs over open paths, at every output: [1, N, *shape] each."""
    weights = weights_of(network, (), (WeightMap.ONE, WeightMap.ONE), masks=masks)
    given = [x.square() for x in recording.inputs] if source is None else source
    flow = GatedFlow(network, weights, recording, policy_of("recorded"), source=given, any_sign=source is not None)
    flow.forward()
    return [flow.values[k] for k in network.outputs]


def _paired(network: PathNetwork, recording: Recording, i: int) -> Recording:
    """The gates that each sample shares with sample i: both open; factors multiply.

    A max-pool lets through what is the winner in both windows; elsewhere nothing.
    """

    def paired(k: int, gate: Any) -> Any:
        node = network.nodes[k]
        if isinstance(node, Product):
            return {slot: partner * partner[i : i + 1] for slot, partner in gate.items()}
        if isinstance(node, Pool):
            return torch.where(gate == gate[i : i + 1], gate, -1)
        if isinstance(node, Gate) and node.name == "relu":
            return torch.minimum(gate, gate[i : i + 1])  # above 0 where both are
        return gate * gate[i : i + 1]

    gates = {k: paired(k, gate) for k, gate in recording.gates.items()}
    return Recording(recording.inputs, recording.outputs, gates, is_paired=True)


def _log2(flow: Scaled) -> Tensor:
    return flow.tensor[0].double().flatten(1).log2() + flow.exponent.to(flow.tensor.device)


def _double(flow: Scaled) -> Tensor:
    return torch.ldexp(flow.tensor[0].double().flatten(1), flow.exponent)


def _gradients(
    network: PathNetwork,
    sample: Batch,
    masks: Masks | None,
    probes: tuple[int, torch.Generator] | None = None,
) -> Iterator[Tensor]:
    """The derivative of each output of one sample (or of signed sums of them) by all weights, float64 [weights]."""
    recording = _recorded(network, sample, masks, "ntk")
    weights = weights_of(network, network.prunable, (WeightMap.IDENTITY, WeightMap.ONE), masks=masks)
    options = {"source": recording.inputs, "f": WeightMap.IDENTITY, "scored": True}
    policy = policy_of("published", norm="recorded")
    flow = GatedFlow(network, weights, recording, policy, **options)  # type: ignore[arg-type]
    flow.forward()
    passed = set(flow.network.prunable)  # of queries and keys no path is left
    outputs = [(k, n) for k in network.outputs for n in range(flow.values[k].tensor.numel())]
    _check_outputs(flow, network, recording)
    for position, leaving in enumerate(_leaving(flow, network, outputs, probes)):
        if position:
            flow.forward()  # the backward flow has used up what the forward one kept
        flow.leaving = leaving
        flow.backward()
        yield torch.cat([_slope(weights[name], name in passed) for name in network.prunable])


def _leaving(
    flow: GatedFlow,
    network: PathNetwork,
    outputs: list[tuple[int, int]],
    probes: tuple[int, torch.Generator] | None,
) -> Iterator[dict[int, Scaled]]:
    zero = torch.zeros(1, dtype=torch.int64, device=flow.device)
    shapes = {k: flow.values[k].tensor for k in network.outputs}
    if probes is not None:
        for _ in range(probes[0]):
            yield {
                k: Scaled((2.0 * torch.randint(0, 2, like.shape, generator=probes[1]) - 1).to(like), zero)
                for k, like in shapes.items()
            }
        return
    for k, n in outputs:
        chosen = {j: torch.zeros_like(like) for j, like in shapes.items()}
        chosen[k].view(-1)[n] = 1
        yield {j: Scaled(tensor, zero) for j, tensor in chosen.items()}


def _check_outputs(flow: GatedFlow, network: PathNetwork, recording: Recording) -> None:
    """The signed gated flow must be the model, else its derivatives are not either."""
    for k, wanted in zip(network.outputs, recording.outputs, strict=False):
        out = flow.values[k]
        got = _double(out).flatten()
        scale = float(wanted.abs().max()) or 1.0
        if got.shape != wanted.flatten().shape or float((got - wanted.flatten()).abs().max()) > 1e-3 * scale:
            raise ValueError("ntk: model: wanted one whose output is the sum over its open paths (no subtraction, say)")


def _slope(weight: Weight, is_passed: bool) -> Tensor:
    if not is_passed:
        return torch.zeros(weight.rows.numel(), dtype=torch.float64)
    made = weight.written_scores()
    kept = made.weight.double().flatten()
    return kept * power_of_two(torch.tensor(made.exponent), torch.float64).to(kept.device)
