"""Every op as it is loaded: against the reference, under torch's checks of custom ops, and at its edges."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import op_samples
from op_samples import CASES, LARGE, SMALL, Arguments, Case, draw, samples
from pathprune import _library, ops, reference
from pathprune.ops import WeightMap

NAMES = list(ops.SCHEMAS)
FLOWS = (
    "path_flow_linear",
    "path_flow_linear_collect",
    "path_flow_linear_prune_",
)  # the first result is a flow
COLLECTS = ("through_flow_collect", "path_flow_linear_collect")  # the last three results are a collection


def by_name(case: Case) -> str:
    return case.name


def loaded(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.pathprune, op).default


def native(op: str, key: str) -> bool:
    """Whether the binary has a kernel of the op."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pathprune::{op}", key)


def exactly(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def run(op: str, function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """What a call returns, then the mask if the op writes one. All other arguments must stay as they are."""
    given = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    made = function(*given)
    results = list(made) if isinstance(made, tuple) else [] if made is None else [made]
    for k, (old, new) in enumerate(zip(arguments, given, strict=True)):
        if op.endswith("_") and k == 1:
            results.append(new)
        elif isinstance(old, Tensor):
            exactly(new, old)
    return results


def flow_bound(op: str, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """(the flow in float64 by its definition, how far any order of summation may be from it)."""
    given = dict(zip((a.name for a in loaded(op)._schema.arguments), arguments, strict=True))
    transposed = given.get("transposed", op.endswith("collect"))
    x = given["g" if op.endswith("collect") else "x"]
    mask, kind = given["mask"], x.dtype
    if op.endswith("_"):
        mask = run(op, getattr(reference, op), arguments)[-1]
    dense = given["weight"]
    if given["layout"] is not None:
        dense = torch.zeros(*given["layout"].shape[:2], given["columns"], dtype=dense.dtype, device=dense.device)
        dense[reference.mask_unpack(given["layout"], given["columns"])] = given["weight"][:-16]
    mapped = reference.masked_weight(dense, mask, given["f"]).double()
    mapped = mapped if transposed else mapped.mT
    bound = (x.double().abs() @ mapped.abs()) * (mapped.shape[1] + 4) * torch.finfo(kind).eps
    return x.double() @ mapped, bound + torch.finfo(kind).tiny


def compare(op: str, arguments: Arguments, got: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to the bit but for the rounding of sums and logarithms, and the order of what is collected."""
    assert [(t.dtype, t.shape, t.device) for t in got] == [(t.dtype, t.shape, t.device) for t in expected]
    if op in FLOWS:
        exact, bound = flow_bound(op, arguments)
        flow, kept = got.pop(0), exact.isfinite()
        expected.pop(0)
        exactly(flow[~kept].double(), exact[~kept])
        assert bool(((flow.double() - exact).abs() <= bound)[kept].all())
    if op in COLLECTS:
        values, wanted = got.pop(0), expected.pop(0)
        inside = int(expected[0][1])
        if inside <= values.numel():
            exactly(values[:inside].sort().values, wanted[:inside].sort().values)
        else:  # any of those inside: each is one of them, no more often than it is there
            scored = arguments[:4] + (arguments[5:6] if op in FLOWS else arguments[4:5]) + arguments[-3:]
            scores, there = reference.through_flow(*scored).unique(return_counts=True)
            collected, times = values.unique(return_counts=True)
            place = torch.searchsorted(scores, collected)
            exactly(scores[place], collected)
            assert bool((times <= there[place]).all())
    for result, wanted in zip(got, expected, strict=True):
        if op == "gumbel_keys":
            torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)
        else:
            exactly(result, wanted)


# ---- the loaded implementation is the reference ---------------------------------------------------


def test_every_op_is_complete() -> None:
    assert set(op_samples.ROWS) == set(NAMES)
    for op in NAMES:
        wrapper = getattr(ops, op)
        assert wrapper.__doc__
        assert op in ops.__all__
        named = [argument.name for argument in loaded(op)._schema.arguments]
        assert list(wrapper.__annotations__)[:-1] == named


@pytest.mark.parametrize("op", NAMES)
def test_binary_is_complete(op: str) -> None:
    assert native(op, "CPU") == _library.cpu_loaded
    assert native(op, "CUDA") == _library.cuda_loaded


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=by_name)
@pytest.mark.parametrize("op", NAMES)
def test_matches_reference(op: str, case: Case, device: torch.device) -> None:
    for arguments in samples(op, case, str(device)):
        expected = run(op, getattr(reference, op), arguments)
        compare(op, arguments, run(op, loaded(op), arguments), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.values != "nonfinite"], ids=by_name)
@pytest.mark.parametrize("transposed", [False, True])
def test_flow_closed_form(case: Case, transposed: bool, device: torch.device) -> None:
    """|W| on ones is the row and column sums."""
    drawn = draw(replace(case, device=str(device)))
    live = torch.ones_like(drawn.dense) if drawn.mask is None else reference.mask_unpack(drawn.mask, case.columns)
    expected = (drawn.dense.double().abs() * live).sum(1 if transposed else 2)[:, None]
    kind = torch.float64 if case.dtype == torch.float64 else torch.float32
    units = case.rows if transposed else case.columns
    ones = torch.ones(case.groups, 1, units, dtype=kind, device=device)
    got = ops.path_flow_linear(drawn.weight, drawn.mask, ones, WeightMap.ABS, transposed, *drawn.packed)
    torch.testing.assert_close(got, expected.to(kind), rtol=64 * torch.finfo(kind).eps, atol=1e-30)


@pytest.mark.parametrize("op", [op for op in NAMES if "flow" in op])
@pytest.mark.parametrize("case", [case for case in [*CASES, *LARGE] if case.packed], ids=by_name)
def test_packed_is_dense(op: str, case: Case, device: torch.device) -> None:
    for arguments in samples(op, case, str(device)):
        drawn = draw(replace(case, device=str(device)))
        dense = (drawn.dense, *arguments[1:-3], None, None, arguments[-1])
        expected = run(op, loaded(op), dense)
        compare(op, arguments, run(op, loaded(op), arguments), expected)


@pytest.mark.parametrize("case", LARGE, ids=by_name)
@pytest.mark.parametrize("op", NAMES)
def test_threads_change_nothing(op: str, case: Case) -> None:
    before = torch.get_num_threads()
    for arguments in samples(op, case):
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(run(op, loaded(op), arguments))
        finally:
            torch.set_num_threads(before)
        for results in found[1:]:
            for k, (one, many) in enumerate(zip(found[0], results, strict=True)):
                if op in COLLECTS and k == len(results) - 3:  # collected in any order, and cut off anywhere
                    inside = int(results[-2][1])
                    if inside <= one.numel():
                        exactly(many[:inside].sort().values, one[:inside].sort().values)
                else:
                    exactly(many, one)


@pytest.mark.parametrize("op", NAMES)
def test_strided_arguments(op: str, device: torch.device) -> None:
    """Tensors that are not contiguous give the same; a mask to write to is refused."""
    for case in SMALL:
        for arguments in samples(op, case, str(device)):
            writes = op.endswith("_")
            strided = tuple(
                torch.stack((v, v), -1)[..., 0] if isinstance(v, Tensor) and not (writes and k == 1) else v
                for k, v in enumerate(arguments)
            )
            compare(op, arguments, run(op, loaded(op), strided), run(op, getattr(reference, op), arguments))
            if writes and arguments[1].numel() > 1:
                mask = torch.stack((arguments[1],) * 2, -1)[..., 0]
                with pytest.raises((ValueError, RuntimeError), match=f"{op}: mask: wanted"):
                    loaded(op)(*arguments[:1], mask, *arguments[2:])


@pytest.mark.parametrize("op", [op for op in NAMES if op not in ("kth_largest", "gumbel_keys")])
def test_wrapper_takes_weights_without_groups(op: str, device: torch.device) -> None:
    names = [argument.name for argument in loaded(op)._schema.arguments]
    for case in (Case("ragged"), Case("no_flows", positions=None), Case("packed", packed=True)):
        for arguments in samples(op, case, str(device)):
            flat = [v[0] if isinstance(v, Tensor) and v.dim() == 3 else v for v in arguments]
            mask = flat[1].clone() if op.endswith("_") else None
            if mask is not None:
                flat[1] = mask
            if "columns" in names and op != "mask_unpack" and not case.packed:
                flat = flat[: names.index("layout")]
            made = getattr(ops, op)(*flat)
            results = [] if made is None else list(made) if isinstance(made, tuple) else [made]
            results += [] if mask is None else [mask]
            expected = list(run(op, loaded(op), arguments))
            if op in COLLECTS:  # collected in any order; what lies behind is not specified
                inside = min(int(results[-2][1]), results[-3].numel())
                results[-3], expected[-3] = (values[-3][:inside].sort().values for values in (results, expected))
            for result, wanted in zip(results, expected, strict=True):
                exactly(result, wanted[0] if wanted.dim() == 3 else wanted)


# ---- torch's machinery ----------------------------------------------------------------------------


def deterministic(op: str, case: Case) -> list[Arguments]:
    """The samples whose results are specified to the last element."""
    calls = samples(op, case)
    return calls[:1] if op in COLLECTS else calls[:3]


@pytest.mark.parametrize("case", SMALL, ids=by_name)
@pytest.mark.parametrize("op", NAMES)
def test_opcheck(op: str, case: Case) -> None:
    for arguments in deterministic(op, case)[:2]:
        torch.library.opcheck(loaded(op), arguments)


@pytest.mark.parametrize("weights", [True, False])
def test_opcheck_with_gradients(weights: bool) -> None:
    for transposed, arguments in enumerate(samples("path_flow_linear", SMALL[0])[2:4]):
        weight, mask, x, *rest = arguments
        assert rest[1] == bool(transposed)
        x.requires_grad_()
        torch.library.opcheck(loaded("path_flow_linear"), (weight.requires_grad_(weights), mask, x, *rest))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("f", WeightMap)
def test_gradients(f: WeightMap, transposed: bool, masked: bool) -> None:
    drawn = draw(Case("", groups=2, rows=3, columns=18, dtype=torch.float64, density=0.6))
    weight = (drawn.dense + 0.1 * drawn.dense.sign()).requires_grad_()  # off the corner of |w|
    x = drawn.flow(3 if transposed else 18).requires_grad_()
    mask = drawn.mask if masked else None

    def flow(weight: Tensor, x: Tensor) -> Tensor:
        return ops.path_flow_linear(weight, mask, x, f, transposed)

    assert torch.autograd.gradcheck(flow, (weight, x))
    assert torch.autograd.gradgradcheck(flow, (weight, x))


def test_gradients_stop_at_the_mask() -> None:
    weight = torch.tensor([[math.nan, 2.0, -3.0]], requires_grad=True)
    mask = ops.mask_pack(torch.tensor([[False, True, True]]))
    x = torch.tensor([[1.0, 1.0, 5.0]], requires_grad=True)
    ops.path_flow_linear(weight, mask, x, WeightMap.SQUARE).sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
    assert weight.grad.tolist() == [[0.0, 4.0, -30.0]]
    assert x.grad.tolist() == [[0.0, 4.0, 9.0]]


def test_gradient_of_low_precision_and_packed_weights() -> None:
    weight = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16, requires_grad=True)
    ops.path_flow_linear(weight, None, torch.ones(1, 2)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [[1.0, -1.0]]
    mask = ops.mask_pack(torch.tensor([[True, False]]))
    values, row_start = ops.compact_weight(weight.detach(), mask)
    packed = (mask, row_start, 2)
    x = torch.ones(1, 2, requires_grad=True)
    ops.path_flow_linear(values, mask, x, WeightMap.ABS, False, *packed).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.5, 0.0]]
    flow = ops.path_flow_linear(values.requires_grad_(), mask, x, WeightMap.ABS, False, *packed)
    with pytest.raises(ValueError, match="weight: wanted a dense weight"):
        flow.sum().backward()


@pytest.mark.parametrize("op", [op for op in NAMES if op != "path_flow_linear"])
def test_other_ops_make_no_graph(op: str) -> None:
    for arguments in deterministic(op, SMALL[0]):
        given = [
            v.clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in arguments
        ]
        made = loaded(op)(*given)
        for result in made if isinstance(made, tuple) else () if made is None else (made,):
            assert not result.requires_grad


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", NAMES)
def test_compile(op: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, op), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for case in SMALL[:4]:
        for arguments in deterministic(op, case)[:2]:
            compare(op, arguments, run(op, compiled, arguments), run(op, loaded(op), arguments))


@pytest.mark.slow
def test_compile_a_round_to_code() -> None:
    """Scores, a cut and the next flow in one graph, compiled by the default backend."""

    def score_and_cut(weight: Tensor, mask: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        inward, values, counts, _ = ops.path_flow_linear_collect(weight, mask, x, g, 1, 1, 0.0, 1.0, 8)
        y = ops.path_flow_linear_prune_(weight, mask, x, g, 1, 0.5, 0.5, 0, 2 * x, 1)
        return y + values.sum() * 0 + counts[3], inward

    drawn = draw(Case("", groups=1, rows=6, columns=40))
    assert drawn.mask is not None
    assert drawn.x is not None
    assert drawn.g is not None
    torch._dynamo.reset()
    found = []
    for function in (score_and_cut, torch.compile(score_and_cut, fullgraph=True)):
        mask = drawn.mask.clone()
        found.append((*function(drawn.dense, mask, drawn.x, drawn.g), mask))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)
    assert not torch.equal(found[1][2], drawn.mask)


def test_export() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 20))

        def forward(self, x: Tensor) -> Tensor:
            return ops.path_flow_linear(self.weight, None, x, WeightMap.SQUARE)

    layer, x = Layer(), torch.rand(3, 20)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("positions", min=2)},))
    assert "pathprune.path_flow_linear" in exported.graph_module.code
    x = torch.rand(7, 20)
    exactly(exported.module()(x), layer(x))


@pytest.mark.skipif(not _library.cpu_loaded, reason="this run is the one without the binary")
@pytest.mark.parametrize(
    "chosen",
    ["complete or refuses", pytest.param("opcheck or gradient or compile or export", marks=pytest.mark.slow)],
)
def test_without_the_binary(chosen: str) -> None:
    """The tests of torch's machinery and of errors pass on the reference, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "PATHPRUNE_DISABLE_BINARY": "1", "PATHPRUNE_REQUIRE_CUDA": "0"}
    done = subprocess.run(
        [*command, "-k", chosen],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# ---- refusals -------------------------------------------------------------------------------------


def refusals() -> Iterator[Any]:
    """op, the arguments that are wrong, and what the message says."""
    weight, mask, packed = torch.ones(2, 3, 20), torch.zeros(2, 3, 2, dtype=torch.int16), torch.ones(30)
    x, g = torch.ones(2, 1, 20), torch.ones(2, 1, 3)
    layout, row_start = mask.clone(), torch.zeros(7, dtype=torch.int64)
    flow = {"weight": weight, "mask": mask, "x": x, "f": 1, "transposed": False}
    score = {"weight": weight, "mask": mask, "x": x, "g": g, "s": 1}
    bits = torch.ones(1, 2, 3, dtype=torch.bool)
    table: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("path_flow_linear", flow, {"weight": weight.int()}, "weight: wanted float32.* got int32"),
        ("path_flow_linear", flow, {"weight": weight.flatten()}, "weight: wanted 3 dimensions"),
        ("path_flow_linear", flow, {"x": x.double()}, r"x: wanted float32 \[2, 1, 20\].* got float64"),
        ("path_flow_linear", flow, {"weight": weight.double()}, r"x: wanted float64"),
        ("path_flow_linear", flow, {"x": g}, r"x: wanted .*\[2, 1, 20\]"),
        ("path_flow_linear", flow, {"x": x[0]}, "x: wanted 3 dimensions"),
        ("path_flow_linear", flow, {"x": x[:1]}, r"x: wanted .*\[2, 1, 20\]"),
        ("path_flow_linear", flow, {"transposed": True}, r"x: wanted .*\[2, 1, 3\]"),
        ("path_flow_linear", flow, {"f": 4}, "f: wanted a WeightMap"),
        ("path_flow_linear", flow, {"f": -1}, "f: wanted a WeightMap"),
        ("path_flow_linear", flow, {"columns": 21}, "columns: wanted the weight's K = 20, got 21"),
        ("path_flow_linear", flow, {"mask": mask.int()}, "mask: wanted int16"),
        ("path_flow_linear", flow, {"mask": mask[:, :, :1]}, r"mask: wanted int16 \[2, 3, 2\]"),
        ("path_flow_linear", flow, {"row_start": row_start}, "row_start: wanted None"),
        ("path_flow_linear", flow, {"weight": packed, "layout": layout, "columns": 20}, "row_start: wanted"),
        (
            "path_flow_linear",
            flow,
            {"weight": packed, "layout": layout, "row_start": row_start, "columns": 20, "mask": None},
            "mask: wanted a mask",
        ),
        (
            "path_flow_linear",
            flow,
            {"weight": packed, "layout": layout, "row_start": row_start[1:], "columns": 20},
            r"row_start: wanted int64 \[7\]",
        ),
        (
            "path_flow_linear",
            flow,
            {"weight": packed, "layout": layout, "row_start": row_start, "columns": 40},
            r"layout: wanted int16 \[2, 3, 3\]",
        ),
        (
            "path_flow_linear",
            flow,
            {"layout": layout, "row_start": row_start, "columns": 20},
            "weight: wanted 1 dim",
        ),
        (
            "through_flow",
            score,
            {"weight": packed, "layout": layout, "row_start": row_start},
            "columns: wanted a num",
        ),
        ("through_flow", score, {"g": None}, "g: wanted x and g"),
        ("through_flow", score, {"x": None}, "g: wanted x and g"),
        ("through_flow", score, {"g": torch.ones(2, 2, 3)}, "g: wanted T = 1"),
        ("through_flow", score, {"g": torch.ones(2, 1, 4)}, r"g: wanted .*\[2, 1, 3\]"),
        ("through_flow", score, {"s": 9}, "s: wanted a WeightMap"),
        ("through_flow_collect", score, {"lo": math.nan, "hi": 1.0, "capacity": 1}, "lo: wanted a number"),
        (
            "through_flow_collect",
            score,
            {"lo": 0.0, "hi": 1.0, "capacity": -1},
            "capacity: wanted a number >= 0",
        ),
        ("through_flow_histogram", score, {"stride": 0}, "stride: wanted a number >= 1"),
        ("through_flow_nth", score, {"at_least": 0.0, "above": 1.0, "n": -1}, "n: wanted a number >= 0"),
        ("through_flow_prune_", score, {"at_least": 0.0, "above": math.nan, "cut": 0}, "above: wanted"),
        ("masked_weight", {"weight": weight, "mask": mask, "f": 7}, {}, "f: wanted a WeightMap"),
        ("mask_pack", {}, {"bits": bits.int()}, "bits: wanted bool"),
        ("mask_unpack", {}, {"mask": mask, "columns": 33}, "mask: wanted W = 3 words for 33 columns"),
        ("mask_unpack", {}, {"mask": mask, "columns": -1}, "columns: wanted a number >= 0"),
        ("mask_count", {}, {"mask": mask.long()}, "mask: wanted int16"),
        ("kth_largest", {"values": torch.ones(4)}, {"k": 0}, "k: wanted 1 to 4, got 0"),
        ("kth_largest", {"values": torch.ones(4)}, {"k": 5}, "k: wanted 1 to 4, got 5"),
        ("kth_largest", {"values": torch.ones(2, 2)}, {"k": 1}, "values: wanted 1 dimension"),
        ("kth_largest", {"values": torch.ones(2).int()}, {"k": 1}, "values: wanted"),
        ("gumbel_keys", {}, {"scores": torch.tensor([1.0, -1.0])}, "scores: wanted numbers >= 0, got -1"),
        ("gumbel_keys", {}, {"scores": torch.tensor([math.nan])}, "scores: wanted numbers >= 0, got nan"),
        ("gumbel_keys", {}, {"scores": torch.ones(3).int()}, "scores: wanted float32"),
        (
            "gumbel_keys",
            {"scores": torch.ones(3)},
            {"temperature_inverse": math.inf},
            "temperature_inverse: wanted",
        ),
        ("gumbel_keys", {"scores": torch.ones(3)}, {"offset": -1}, "offset: wanted a number >= 0"),
    ]
    for k, (op, right, wrong, message) in enumerate(table):
        yield pytest.param(op, {**right, **wrong}, message, id=f"{op}-{k}")


@pytest.mark.parametrize(("op", "given", "message"), list(refusals()))
def test_refuses(op: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(ops, op)(**given)
