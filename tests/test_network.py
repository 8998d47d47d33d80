"""Reading modules: what is refused and how, what is left untouched, what inputs and outputs may be."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from path_scores import assert_scores_close, path_scores, randomised
from pathprune.network import PathNetwork, UnsupportedModelError
from pathprune.ops import WeightMap


@pytest.fixture(autouse=True)
def _one_thread():
    """Nets this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def convnet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(36, 5)),
    )


IMAGE = torch.ones(2, 3, 8, 8)


# ------------------------------------------------------------------------------------------ what is refused


class Calls(nn.Module):
    """A function of the module and of what a linear layer gives."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.inner = function, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.inner(x))


def writes_into_a_view(m: Calls, x: Tensor) -> Tensor:
    x[:, :2].add_(1.0)
    return x


def reads_an_old_view(m: Calls, x: Tensor) -> Tensor:
    old = x.view(1, 4)
    x.mul_(2.0)
    return old + x


def writes_into_a_view_of_a_constant(m: Calls, x: Tensor) -> Tensor:
    ramp = torch.zeros(4, dtype=torch.float64)
    ramp[1:].add_(1.0)
    return x * ramp


def unpools(m: Calls, x: Tensor) -> Tensor:
    return F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2)


def replaces_values(m: Calls, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 3.0
    return x


def casts(m: Calls, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return torch.relu(m.inner(x))


STALE = "changes a tensor in place while views of it are used later"
REFUSED = {
    "no rule": (
        lambda m, x: torch.sin(x),
        r"aten\.sin .*no rule for this operator.*'sin' in pathprune/rules\.py",
    ),
    "einsum": (lambda m, x: torch.einsum("bi,ij->bj", x, m.inner.weight), "other than a product of two flows"),
    "division by a flow": (lambda m, x: x / x.sum(), r"aten\.div .*division by a flow"),
    "division by another's size": (lambda m, x: m.inner(x) / x.norm(), "not divided by its own"),
    "size as a flow": (lambda m, x: m.inner(x) + x.norm(), "used other than to divide that flow"),
    "sizes combined": (lambda m, x: x / (x.norm() + m.inner(x).norm()), "sizes of two flows are combined"),
    "order of a norm": (lambda m, x: x / x.norm(p=1), "a norm of order 1"),
    "root of a flow": (lambda m, x: torch.relu(x).sqrt(), "a root or reciprocal of other than"),
    "filled with ones": (lambda m, x: x.masked_fill(m.inner.bias > 0, 1.0), "fills with other than zero"),
    "choice of flows": (lambda m, x: torch.where(m.inner.bias > 0, x, m.inner(x)), "or between two flows"),
    "batched constant": (
        lambda m, x: torch.bmm(m.inner.weight[None], x[:, :, None]),
        "the weight is computed by the model",
    ),
    "constant times flow": (lambda m, x: m.inner.bias @ x.T, "a constant matrix times a flow"),
    "computed weight": (lambda m, x: F.linear(x, m.inner.weight * 2), "the weight is computed by the model"),
    "vector": (lambda m, x: x @ m.inner.bias, r"wanted a matrix as the weight, got shape \(4,\)"),
    "scaled product": (lambda m, x: torch.addmm(x, x, m.inner.weight, beta=2), "beta and alpha other than 1"),
    "padding with ones": (lambda m, x: F.pad(x, (1, 1), value=1.0), r"aten\.pad .*padding with 1"),
    "uneven max windows": (lambda m, x: F.adaptive_max_pool1d(x, 3), "windows of unequal size"),
    "indices used": (unpools, "no rule for this operator"),
    "values replaced": (replaces_values, STALE),
    "view changed in place": (writes_into_a_view, STALE),
    "old view of a changed tensor": (reads_an_old_view, STALE),
    "view of a constant changed in place": (writes_into_a_view_of_a_constant, STALE),
    "noise": (lambda m, x: x * torch.rand(4, dtype=torch.float64), r"a constant that is random \(rand\)"),
    "autocast region": (casts, "wrap_with_autocast.*no rule for this operator"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_the_operator_and_the_module(case):
    function, message = REFUSED[case]
    model = nn.Sequential(nn.Linear(4, 4), Calls(function)).double()
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        PathNetwork.from_module(model, torch.ones(1, 4).double())
    assert "'1' (Calls)" in str(caught.value)


COMPUTED = {
    "parametrize.remove_parametrizations": nn.utils.parametrizations.weight_norm,
    "remove_weight_norm": nn.utils.weight_norm,
    "remove_spectral_norm": nn.utils.spectral_norm,
    "prune.remove": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated", "ignore:The tensor attribute")
@pytest.mark.parametrize("remedy", COMPUTED)
def test_a_computed_weight_is_refused_with_what_makes_it_a_parameter(remedy):
    model = nn.Sequential(nn.Linear(4, 4), COMPUTED[remedy](nn.Linear(4, 4)))
    message = rf"linear in module '1' .*the weight is computed by the model, not a parameter; torch.nn.utils.{remedy} "
    with pytest.raises(UnsupportedModelError, match=message):
        PathNetwork.from_module(model, torch.ones(1, 4))


def test_a_sparse_model_is_told_to_be_densified():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1] = pp.SparseLinear(model[1], torch.eye(4).bool())
    with pytest.raises(UnsupportedModelError, match=r"in module '1' \(SparseLinear\).*; pathprune.densify first"):
        PathNetwork.from_module(model, torch.ones(1, 4))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Branches(), torch.ones(1, 4), r"Branches could not be exported.*must not branch on values"),
        (convnet(), torch.ones(1, 4, 8, 8), r"Sequential could not be exported .*\(1, 4, 8, 8\)"),
        (convnet(), torch.ones(3, 8, 8), "could not be exported"),
        (convnet(), {"image": IMAGE}, "could not be exported"),
        (convnet(), (IMAGE, IMAGE), "could not be exported"),
        (convnet(), IMAGE.long(), "could not be exported"),
        (convnet(), torch.ones(0, 3, 8, 8), "wanted at least one sample"),
        (convnet(), (), "wanted at least one tensor .*, got none"),
        (nn.Sequential(), torch.ones(1, 4), "wanted parameters, got Sequential with none"),
        (nn.ReLU(), torch.ones(1, 4), "wanted parameters, got ReLU with none"),
    ],
)
def test_what_cannot_be_read_is_a_clear_error(model, example, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        PathNetwork.from_module(model, example)


def test_wrong_type_of_example_input():
    with pytest.raises(TypeError, match="example_input: wanted a tensor, tuple or dict of kwargs, got str"):
        PathNetwork.from_module(convnet(), "an image")


def test_integer_inputs_carry_no_flow():
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.float())

    with pytest.raises(UnsupportedModelError, match="no output of the model depends on a floating-point input"):
        PathNetwork.from_module(Casts(), torch.ones(1, 4, dtype=torch.int64))


def test_meta_tensors_and_mixed_devices():
    with torch.device("meta"):
        model = convnet()
    with pytest.raises(ValueError, match=r"wanted materialised weights, got meta tensors: 0\.weight"):
        PathNetwork.from_module(model, IMAGE)
    mixed = convnet()
    mixed[6].to("meta")
    with pytest.raises(ValueError, match=r"got meta tensors: 6\.weight"):
        PathNetwork.from_module(mixed, IMAGE)
    buffers = convnet()
    buffers[1].running_mean = buffers[1].running_mean.to("meta")
    with pytest.raises(ValueError, match=r"got meta tensors: 1\.running_mean"):
        PathNetwork.from_module(buffers, IMAGE)


def test_no_prunable_weight():
    network = PathNetwork.from_module(nn.BatchNorm1d(4).eval(), torch.ones(1, 4))
    with pytest.raises(ValueError, match="no prunable weight"):
        network.select()
    with pytest.raises(ValueError, match="no prunable weight"):
        pp.prune(network, pp.SynFlow(rounds=1), density=0.5)


def test_include_and_exclude_patterns():
    network = PathNetwork.from_module(convnet(), IMAGE)
    assert network.prunable == network.select() == ("0.weight", "6.weight")
    assert network.select(include="0.*") == ("0.weight",)
    assert network.select(exclude=["6.*"]) == ("0.weight",)
    assert network.select(include=["*.weight"], exclude="0.weight") == ("6.weight",)
    for patterns in ({"include": "1.*"}, {"exclude": ("0.weight", "head.*")}):
        with pytest.raises(ValueError, match=r"matches none of \['0\.weight', '6\.weight'\]"):
            network.select(**patterns)
    with pytest.raises(ValueError, match="no prunable weight"):
        network.select(exclude="*")


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_weights_of_mixed_types(other):
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.ReLU(), nn.Linear(4, 2))
    model[2] = model[2].to(other)
    network = PathNetwork()
    flow = network.add_input(1, 4)
    for layer in (model[0], model[2]):
        flow = network.add_synapse(flow, layer.weight, f"{len(network.nodes)}.weight")
    network.set_outputs(flow)
    with pytest.raises(ValueError, match=r"wanted float32/bfloat16/float16 weights, or all float64"):
        path_scores(network)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad):
    model = convnet()
    with torch.no_grad():
        model[6].weight[0, 0] = bad
    network = PathNetwork.from_module(model, IMAGE)
    with pytest.raises(ValueError, match=r"6\.weight.*finite"):
        path_scores(network)
    model = convnet()
    model[1].running_mean[0] = bad
    with pytest.raises(ValueError, match="wanted finite biases, norms and constants"):
        path_scores(PathNetwork.from_module(model, IMAGE))


# --------------------------------------------------------------------------------- the model is not touched


class Counts(nn.Module):
    """Changes a buffer when it is called, and uses it."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(4))
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        x = x * self.calls.reshape(4, 1, 1)
        return torch.sin(x) if self.fails else x


def snapshot(model: nn.Module) -> dict[str, object]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "bytes": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "identity": {name: (id(tensor), tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002 (the legacy state is what must not move)
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key, value in before.items():
        if key in ("bytes", "grads"):
            assert value.keys() == after[key].keys()
            for name, tensor in value.items():
                if tensor is None:
                    assert after[key][name] is None
                    continue
                bits, bits_after = (t.reshape(-1).view(torch.uint8) for t in (tensor, after[key][name]))
                assert torch.equal(bits, bits_after), (key, name)
        elif isinstance(value, Tensor):
            assert value.equal(after[key]), key
        else:
            assert value == after[key], key


@pytest.mark.parametrize("outcome", ["scored", "no rule", "not exported", "not finite"])
def test_the_model_is_bit_identical_afterwards(outcome):
    middle = [Counts(outcome == "no rule")]
    model = nn.Sequential(*convnet()[:5], *middle, *convnet()[5:])
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    model.eval()
    model[0].train()
    model[3].train()
    model[6].requires_grad_(False)
    if outcome == "not finite":
        model[7].weight.data[0, 0] = math.nan
    before = snapshot(model)

    def score() -> None:
        network = PathNetwork.from_module(model, torch.ones(2, 3, 7 if outcome == "not exported" else 8, 8))
        for policy in ("published", "paths"):
            path_scores(network, WeightMap.SQUARE, policy)
        pp.prune(network, pp.SynFlow(rounds=3), density=0.3)

    if outcome == "scored":
        score()
    else:
        with pytest.raises(ValueError, match=r"PathNetwork|prune"):
            score()
    assert_same(before, snapshot(model))


def test_the_mode_of_the_model_does_not_matter():
    model = randomised(convnet())
    _, wanted = path_scores(PathNetwork.from_module(model, IMAGE.double()))
    total, got = path_scores(PathNetwork.from_module(model.train(), IMAGE.double()))
    assert model.training
    assert math.isfinite(float(total))
    assert_scores_close(got, wanted, 0.0)


def test_a_network_follows_the_weights_of_its_model():
    model = randomised(convnet())
    network = PathNetwork.from_module(model, IMAGE.double())
    before, _ = path_scores(network)
    with torch.no_grad():
        model[6].weight.mul_(4.0)
        model[6].bias.mul_(4.0)
    after, _ = path_scores(network)
    assert float(after - before) == pytest.approx(2.0, abs=1e-12)


# ----------------------------------------------------------------------------------------- inputs and outputs


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor, *, y: Tensor, scale: float = 1.0, keep: Tensor | None = None) -> tuple:
        h = self.a(x) + self.b(y) * scale
        return (h, h.sum(1)) if keep is None else (h * keep, h.sum(1))


def test_keyword_inputs_in_any_order_and_plain_numbers():
    model = randomised(TwoInputs())
    u, v = (layer.weight.detach().abs() for layer in (model.a, model.b))
    x, y = torch.ones(2, 4).double(), torch.ones(2, 5).double()
    keep = torch.tensor([[1, 0, 1], [1, 1, 1]])
    wanted = {"a.weight": 2 * u, "b.weight": 6 * v}  # two outputs that see each unit once
    for example in ({"x": x, "y": y, "scale": 3.0}, {"scale": 3.0, "y": y, "x": x}):
        total, got = path_scores(PathNetwork.from_module(model, example))
        assert_scores_close(got, wanted)
        assert float(total) == pytest.approx(math.log2(float(2 * u.sum() + 6 * v.sum())), abs=1e-12)
    masked = {"keep": keep, "y": y, "scale": 3.0, "x": x}  # integer inputs are constants, of the first sample
    rows = torch.tensor([2.0, 1.0, 2.0]).double()[:, None]
    _, got = path_scores(PathNetwork.from_module(model, masked))
    assert_scores_close(got, {"a.weight": rows * u, "b.weight": rows * 3 * v})


def test_batch_size_and_values_of_the_example_do_not_matter():
    model = randomised(convnet())
    total, wanted = path_scores(PathNetwork.from_module(model, torch.ones(1, 3, 8, 8).double()))
    other, got = path_scores(PathNetwork.from_module(model, (torch.randn(5, 3, 8, 8).double(),)))
    assert torch.equal(total, other)
    assert_scores_close(got, wanted, 0.0)


def test_an_output_returned_three_times_counts_three_times():
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop = nn.Linear(4, 3, bias=False), nn.Dropout()

        def forward(self, x: Tensor) -> dict[str, object]:
            h = self.a(x)
            return {"first": h, "again": h, "third": [self.drop(h)], "none": None, "number": 3}

    model = randomised(Thrice())
    total, got = path_scores(PathNetwork.from_module(model, torch.ones(1, 4).double()))
    u = model.a.weight.detach().abs()
    assert float(total) == pytest.approx(math.log2(3 * float(u.sum())), abs=1e-12)
    assert_scores_close(got, {"a.weight": 3 * u})
