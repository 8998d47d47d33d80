"""The neural tangent kernel as the paths see it: ``Theta = J_f Pi J_f^T`` (Gebhart, Saxena and Schrater 2021).

``f(x) = sum_p x_p a_p(x) v_p``: the derivative of the output by the weights is that by the path values, J_f (the data
factor: which paths a sample opens, and the input at their start), times that of the path values, J_v (the path
kernel's). With gates recorded, the network between them is linear: one signed gated flow of a sample gives its row of
Theta's root. All derivatives are by the prunable weights; paths that begin at biases count with their value as input.

Oracle: torch.func's Jacobian of the model; enumeration of paths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Data, require_reiterable, stream
from .flow import PathFlow
from .gates import GatedFlow, Recording, record
from .network import PathNetwork, as_network
from .ops import WeightMap
from .policy import policy_of
from .spatial import merge_equal_positions
from .weights import Scaled, Weight, power_of_two, weights_of

Masks = Mapping[str, Tensor]


def ntk(model: nn.Module | PathNetwork, x: Tensor, masks: Masks | None = None, *, example_input: Any = None) -> Tensor:
    """The neural tangent kernel over a few samples, ``[n, outputs, n, outputs]`` in float64.

    Args:
        model: a module, or a ``PathNetwork`` read from one; it is run in eval mode and not touched.
        x: [n, *sample].
        masks: bool tensors by name: derivatives and gates of the masked network.

    Raises:
        ValueError: activations that have no gate, norms without running statistics, a hand-made network.
    """
    network = as_network(model, x[:1] if example_input is None else example_input)
    batch = Batch((x,), {}, None)
    rows = [torch.stack(list(_gradients(network, batch.part(n, n + 1), masks))) for n in range(len(x))]
    jacobian = torch.stack(rows)  # [n, outputs, weights]
    flat = jacobian.flatten(0, 1)
    return (flat @ flat.T).unflatten(1, jacobian.shape[:2]).unflatten(0, jacobian.shape[:2])


def ntk_trace(
    model: nn.Module | PathNetwork,
    data: Data,
    masks: Masks | None = None,
    *,
    probes: int | None = None,
    seed: int = 0,
    example_input: Any = None,
) -> float:
    """The trace of the neural tangent kernel, ``sum_n sum_k |d f_k(x_n) / d w|^2``.

    Args:
        data: a re-iterable of batches ``x`` or ``(x, y)``.
        probes: None: exact, one backward flow for each sample and output; else an unbiased estimate from this many
            random signs over the outputs of each sample (Hutchinson).
    """
    require_reiterable(data, "ntk_trace")
    if probes is not None and probes < 1:
        raise ValueError(f"ntk_trace: probes: wanted at least 1, got {probes}")
    network = as_network(model, _first_input(data) if example_input is None else example_input)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for batch in stream(data, "ntk_trace", network.device):
        for n in range(batch.size):
            sample = batch.part(n, n + 1)
            made = _gradients(network, sample, masks, None if probes is None else (probes, generator))
            squares = sum(float(row.square().sum()) for row in made)
            total += squares if probes is None else squares / probes
    return total


def path_activations(
    model: nn.Module | PathNetwork, x: Tensor, masks: Masks | None = None, *, full: bool = False
) -> Tensor:
    """The data factor ``J_f J_f^T``: how many open paths samples share, weighted by their inputs.

    Args:
        x: [n, *sample].
        full: all pairs of samples (n (n + 1) / 2 flows) instead of the diagonal.

    Returns:
        log2 of the diagonal ``sum_p x_p^2 a_p(x)``, float64 [n, outputs]; or, full, ``sum_p x_p x'_p a_p a'_p``,
        float64 [n, n, outputs] (paths to different outputs have none in common). Biases begin no path.
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


def ntk_trace_bound(model: nn.Module | PathNetwork, data: Data, masks: Masks | None = None) -> float:
    """log2 of ``sum_n sum_k g_k(x_n^2; a) sum_i d h_k / d u_i``, which the trace of the NTK never exceeds.

    The data factor's diagonal times the path kernel's trace, output by output. Of networks whose biases are zero.
    """
    require_reiterable(data, "ntk_trace_bound")
    network = as_network(model, _first_input(data))
    totals: list[Tensor] | None = None
    for batch in stream(data, "ntk_trace_bound", network.device):
        recording = _recorded(network, batch, masks, "ntk_trace_bound")
        levels = [_log2(flow) for flow in _open_paths(network, recording, masks)]
        found = [(level * math.log(2)).logsumexp(0) / math.log(2) for level in levels]
        totals = found if totals is None else [torch.logaddexp2(a, b) for a, b in zip(totals, found, strict=True)]
    assert totals is not None
    quick = merge_equal_positions(network, "paths")
    weights = weights_of(quick, quick.prunable, (WeightMap.SQUARE, WeightMap.ONE), masks=masks)
    flow = PathFlow(quick, weights, f=WeightMap.SQUARE, policy=policy_of("paths"))
    flow.forward()
    for k, level in zip(quick.outputs, totals, strict=True):
        top = level.max().floor().to(torch.int64)
        shares = (level - top).exp2().to(flow.dtype)
        flow.leaving[k] = Scaled(shares.reshape(flow.values[k].tensor.shape), top.reshape(1))
    flow.backward()
    bound = torch.tensor(-torch.inf, dtype=torch.float64)
    for name in quick.prunable:
        made = weights[name].written_scores()
        bound = torch.logaddexp2(bound, made.weight.sum(dtype=torch.float64).log2().cpu() + made.exponent)
    return float(bound)


def _first_input(data: Data) -> Any:
    for batch in data:
        return batch[0] if isinstance(batch, (tuple, list)) else batch
    raise ValueError("data: wanted at least one batch, got none")


def _recorded(network: PathNetwork, batch: Batch, masks: Masks | None, who: str) -> Recording:
    masked = {name: network.tensors[name].detach() * mask for name, mask in (masks or {}).items()}
    return record(network, batch, masked, who)


def _open_paths(
    network: PathNetwork, recording: Recording, masks: Masks | None, source: list[Tensor] | None = None
) -> list[Scaled]:
    """The sum of inputs over open paths, at every output: [1, N, *shape] each."""
    weights = weights_of(network, (), (WeightMap.ONE, WeightMap.ONE), masks=masks)
    given = [x.square() for x in recording.inputs] if source is None else source
    flow = GatedFlow(network, weights, recording, policy_of("paths"), source=given, any_sign=source is not None)
    flow.forward()
    return [flow.values[k] for k in network.outputs]


def _paired(network: PathNetwork, recording: Recording, i: int) -> Recording:
    """The gates that each sample shares with sample i: both open; factors multiply, so that squared they count once.

    A max-pool lets through what is the winner in both windows; elsewhere nothing.
    """
    gates = {}
    for k, gate in recording.gates.items():
        if gate.dtype == torch.int64:
            gates[k] = torch.where(gate == gate[i : i + 1], gate, -1)
        elif network.nodes[k].name == "relu":  # type: ignore[attr-defined]
            gates[k] = torch.minimum(gate, gate[i : i + 1])  # above 0 where both are
        else:
            product = gate * gate[i : i + 1]
            if bool((product < 0).any()):
                raise ValueError("path_activations: full: wanted activations that keep signs")
            gates[k] = product.sqrt()
    return Recording(recording.inputs, recording.outputs, gates)


def _log2(flow: Scaled) -> Tensor:
    return flow.tensor[0].double().flatten(1).log2() + flow.exponent.cpu()


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
    options = {"source": recording.inputs, "signed": True, "scored": True}
    flow = GatedFlow(network, weights, recording, policy_of("published"), **options)  # type: ignore[arg-type]
    flow.forward()
    outputs = [(k, n) for k in network.outputs for n in range(flow.values[k].tensor.numel())]
    _check_outputs(flow, network, recording)
    for position, leaving in enumerate(_leaving(flow, network, outputs, probes)):
        if position:
            flow.forward()  # the backward flow has used up what the forward one kept
        flow.leaving = leaving
        flow.backward()
        yield torch.cat([_slope(weights[name]) for name in network.prunable])


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


def _slope(weight: Weight) -> Tensor:
    made = weight.written_scores()
    kept = made.weight.double().flatten()
    return kept * power_of_two(torch.tensor(made.exponent), torch.float64).to(kept.device)
