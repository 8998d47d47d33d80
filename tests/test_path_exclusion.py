"""PX: against float64 autograd of the paper's formula, written out for one network; its identities; bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from pathprune.batches import Batch
from pathprune.gates import GatedFlow
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from pathprune.policy import policy_of
from pathprune.recording import record
from pathprune.weights import weights_of


class Small(nn.Module):
    """Two convolutions with norms and a skip, max and average pooling, a hidden linear layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.hidden = nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        x = F.avg_pool2d(F.relu(x + self.inner(x)), 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def small(seed: int = 0) -> Small:
    generator = torch.Generator().manual_seed(seed)
    model = Small().double().eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
    return model


def images(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = ("stem.weight", "inner.weight", "hidden.weight", "head.weight")


def gates_by_hand(model: Small, w: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The four gates of the real network with weights ``w``."""
    z = model.norm(F.conv2d(x, w["stem.weight"], model.stem.bias, padding=1))
    pooled, winners = F.max_pool2d(z.relu(), 2, return_indices=True)
    y = pooled + F.conv2d(pooled, w["inner.weight"], padding=1)
    hidden = F.linear(F.avg_pool2d(y.relu(), 2).flatten(1), w["hidden.weight"], model.hidden.bias)
    return [(z > 0).double(), winners, (y > 0).double(), (hidden > 0).double()]


def gated_by_hand(w: dict[str, Tensor], gates: list[Tensor], x: Tensor) -> Tensor:
    """The data factor g: weights as they are (0 and 1), constants of norm and pooling 1, no biases."""
    z = F.conv2d(x, w["stem.weight"], padding=1) * gates[0]
    pooled = z.flatten(2).gather(2, gates[1].flatten(2)).reshape(gates[1].shape)
    y = (pooled + F.conv2d(pooled, w["inner.weight"], padding=1)) * gates[2]
    hidden = F.linear(4 * F.avg_pool2d(y, 2).flatten(1), w["hidden.weight"]) * gates[3]
    return F.linear(hidden, w["head.weight"])


def squared_by_hand(model: Small, u: dict[str, Tensor]) -> Tensor:
    """The path factor h: u = w^2 on ones, constants squared, the sum over a max-pool's window, no biases."""
    x = torch.ones(1, 2, 8, 8, dtype=torch.float64)
    scale = (model.norm.weight.detach() / (model.norm.running_var + model.norm.eps).sqrt()).square()
    z = F.conv2d(x, u["stem.weight"], padding=1) * scale.reshape(1, -1, 1, 1)
    pooled = 4 * F.avg_pool2d(z, 2)
    y = pooled + F.conv2d(pooled, u["inner.weight"], padding=1)
    hidden = F.linear((4 * F.avg_pool2d(y, 2)).flatten(1) / 16, u["hidden.weight"])
    return F.linear(hidden, u["head.weight"])


def px_by_hand(model: Small, data: list[Tensor], masks: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """R_PX and the saliencies, by autograd through the whole sum over samples."""
    own = {name: p.detach() for name, p in model.named_parameters() if name in masks}
    masked = {name: own[name] * mask for name, mask in masks.items()}
    u = {name: w.square().requires_grad_() for name, w in masked.items()}
    ones = {name: mask.double() for name, mask in masks.items()}
    total = torch.zeros((), dtype=torch.float64)
    for x in data:
        gates = gates_by_hand(model, masked, x)
        total = total + (gated_by_hand(ones, gates, x.square()) * squared_by_hand(model, u)).sum()
    grads = torch.autograd.grad(total, list(u.values()))
    return float(total.detach()), {name: (u[name] * g).detach() for name, g in zip(u, grads, strict=True)}


@pytest.mark.parametrize("batches", [(6,), (4, 1, 1)])
def test_scores_are_the_formula(batches):
    model = small()
    x = images(6)
    data = list(x.split(list(batches)))
    network = PathNetwork.from_module(model, x[:1])
    generator = torch.Generator().manual_seed(5)
    shapes = {name: network.tensors[name].shape for name in network.prunable}
    assert set(shapes) == set(WEIGHTS)
    random = {name: torch.rand(shape, generator=generator) < 0.6 for name, shape in shapes.items()}
    for masks in (None, random):
        found = pp.scores(network, pp.PX(data), masks=masks)
        full = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
        total, wanted = px_by_hand(model, data, masks or full)
        assert found.log2_R == pytest.approx(math.log2(total), abs=1e-11)
        for name, scores in wanted.items():
            torch.testing.assert_close(found.double(name), scores, rtol=1e-11, atol=1e-14 * float(scores.max()))


def test_rounds_follow_the_literal_loop():
    model, rounds, density = small(3), 5, 0.2
    x = images(8, seed=2)
    data = [(x[:5], torch.zeros(5)), (x[5:], torch.zeros(3))]
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if name in WEIGHTS}
    count = sum(mask.numel() for mask in masks.values())
    for r in range(1, rounds + 1):
        _, scores = px_by_hand(model, [batch[0] for batch in data], masks)
        flat = torch.cat([torch.where(masks[name], scores[name], -1.0).flatten() for name in masks])
        keep = torch.zeros(count, dtype=torch.bool)
        keep[flat.sort(descending=True, stable=True).indices[: round(count * density ** (r / rounds))]] = True
        parts = keep.split([mask.numel() for mask in masks.values()])
        masks = {name: part.reshape(masks[name].shape) for name, part in zip(masks, parts, strict=True)}
    found = pp.prune(model, pp.PX(data, rounds=rounds), density=density, example_input=x[:1], progress=False)
    for name, mask in masks.items():
        assert torch.equal(found[name], mask), name


def test_signed_gated_flow_gives_the_models_output():
    """The gates are right if the flow that passes them, with the real weights, is the model."""
    middle = [nn.GELU(), nn.LeakyReLU(), nn.Hardswish(inplace=True), nn.SiLU(inplace=True), nn.Tanh(), nn.ReLU6()]
    for activation in (*middle, nn.PReLU(), nn.ReLU(inplace=True)):
        model = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), activation, nn.MaxPool2d(2, padding=1)),
            *(nn.Conv2d(4, 4, 3, groups=2, padding="same"), nn.Flatten(), nn.Linear(64, 3)),
        )
        model = model.double().eval()
        x = images(3).repeat(1, 1, 2, 2)[..., :15, :15]
        network = PathNetwork.from_module(model, x[:1])
        with torch.no_grad():
            wanted = model(x)
        recording = record(network, Batch((x,), {}, None), {}, "test")
        weights = weights_of(network, (), (WeightMap.IDENTITY, WeightMap.IDENTITY))
        policy = policy_of("published")
        flow = GatedFlow(network, weights, recording, policy, source=recording.inputs, f=WeightMap.IDENTITY)
        flow.forward()
        out = flow.values[network.outputs[0]]
        got = torch.ldexp(out.tensor, out.exponent.reshape(-1, *[1] * (out.tensor.dim() - 1))).reshape(wanted.shape)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_first_round_is_the_data_free_score_where_the_head_is_dense():
    """With a head of ones, g is the same at every output: data only scale. Fact 2 of the algorithms' notes."""
    model = small()
    x = images(8)
    by_data = pp.scores(model, pp.PX([x]), example_input=x[:1])
    by_none = pp.scores(model, pp.SynFlowL2(policy="paths"), example_input=x[:1])
    ratios = torch.cat([(by_data.double(n) / by_none.double(n)).flatten() for n in WEIGHTS])
    assert float(ratios.std() / ratios.mean()) < 1e-12


def test_data_matter_once_the_head_is_thinned():
    model = small()
    x = images(8)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if name in WEIGHTS}
    masks["head.weight"][0, :4] = False
    by_data = pp.scores(model, pp.PX([x]), example_input=x[:1], masks=masks)
    by_none = pp.scores(model, pp.SynFlowL2(policy="paths"), example_input=x[:1], masks=masks)
    kept = masks["head.weight"]
    ratios = (by_data.double("head.weight") / by_none.double("head.weight"))[kept]
    assert float(ratios.std() / ratios.mean()) > 1e-3


def test_released_variant_against_a_literal_copy():
    """Train mode in h and g, head and norms as they are, biases 1 in g and squared in h."""
    model = small(4)
    x = images(7)
    found = pp.scores(model, pp.PX([x[:4], x[4:]], variant="released"), example_input=x[:1])
    g, h = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    for name, p in g.named_parameters():
        if not name.startswith(("norm", "head")):
            p.data.fill_(1)
    for name, p in h.named_parameters():
        if not name.startswith(("norm", "head")):
            p.data.square_()

    def run(net: Small, x: Tensor, gates: list[Tensor] | None) -> Tensor:
        first, second, third = gates or (1, 1, 1)
        y = F.max_pool2d(net.norm(net.stem(x)) * first, 2)
        y = F.avg_pool2d((y + net.inner(y)) * second, 2)
        return net.head(net.hidden(y.flatten(1)) * third)

    gradients: dict[str, Tensor] = {}
    for batch in (x[:4], x[4:]):
        gates = gates_by_hand(model, {n: p.detach() for n, p in model.named_parameters()}, batch)
        total = (run(g, batch.square(), [gates[0], gates[2], gates[3]]) * run(h, torch.ones_like(batch), None)).sum()
        found_here = torch.autograd.grad(total, [h.get_parameter(n) for n in WEIGHTS])
        for name, gradient in zip(WEIGHTS, found_here, strict=True):
            gradients[name] = gradients.get(name, 0) + gradient
    for name in WEIGHTS:
        wanted = (gradients[name] * h.get_parameter(name)).abs().detach()
        torch.testing.assert_close(found.double(name), wanted, rtol=1e-9, atol=1e-12 * float(wanted.max()))


def test_exact_variant_against_a_loop_over_samples():
    model = small(6)
    x, y = images(5), torch.tensor([0, 2, 1, 1, 0])
    found = pp.scores(model, pp.PXExact([(x[:3], y[:3]), (x[3:], y[3:])], chunk=2), example_input=x[:1])
    wanted = {name: torch.zeros_like(model.get_parameter(name)) for name in WEIGHTS}
    for sample, label in zip(x, y, strict=True):
        out = model(sample[None])[0, label]
        for name, gradient in zip(
            WEIGHTS, torch.autograd.grad(out, [model.get_parameter(n) for n in WEIGHTS]), strict=True
        ):
            wanted[name] += (gradient * model.get_parameter(name)).square().detach()
    for name in WEIGHTS:
        torch.testing.assert_close(found.double(name), wanted[name] / 5, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("pruner", [lambda d: pp.PX(d, rounds=2), lambda d: pp.PX(d, "released", rounds=2), pp.PXExact])
def test_the_model_stays_as_it_is(pruner):
    model = small().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.random.get_rng_state()
    data = [(images(4), torch.tensor([0, 1, 2, 0]))]
    pp.prune(model, pruner(data), density=0.3, example_input=data[0][0][:1], progress=False)
    bad = [(torch.full_like(images(4), torch.nan), data[0][1])]
    with pytest.raises(ValueError, match="finite"):
        pp.prune(model, pruner(bad), density=0.3, example_input=data[0][0][:1], progress=False)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_works_on_pretrained_weights_and_where_float32_would_overflow():
    """A plain stack of 60 layers with large weights: R_PX is beyond float32, masks are those of float64."""
    torch.manual_seed(0)
    layers = [module for _ in range(60) for module in (nn.Linear(24, 24), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(24, 5))
    for p in model.parameters():
        p.data.mul_(8)
    x = torch.randn(16, 24)
    single = pp.prune(model, pp.PX([x], rounds=3), density=0.3, example_input=x[:1], progress=False)
    assert single.metadata["findings"]["log2_R_last"] > 128
    double = pp.prune(
        model.double(), pp.PX([x.double()], rounds=3), density=0.3, example_input=x[:1].double(), progress=False
    )
    differ = sum(int((single[n] != double[n]).sum()) for n in single)
    assert differ <= 4, differ


def test_bad_data():
    model, x = small(), images(4)
    run = lambda pruner: pp.prune(model, pruner, density=0.5, example_input=x[:1], progress=False)  # noqa: E731
    with pytest.raises(TypeError, match=r"PX: data: wanted a re-iterable .* only once"):
        pp.PX(iter([x]))
    with pytest.raises(TypeError, match="got a tensor"):
        pp.PX(x)
    with pytest.raises(TypeError, match="re-iterable"):
        pp.PXExact(batch for batch in [x])
    with pytest.raises(ValueError, match="at least one batch"):
        run(pp.PX([], rounds=1))
    with pytest.raises(ValueError, match="at least one sample in batch 1"):
        run(pp.PX([x, x[:0]], rounds=1))
    with pytest.raises(ValueError, match=r"samples of shape \(2, 8, 8\), got \(2, 9, 8\)"):
        run(pp.PX([torch.zeros(2, 2, 9, 8)], rounds=1))
    with pytest.raises(ValueError, match="variant: wanted 'paper' or 'released', got 'head'"):
        pp.PX([x], variant="head")
    with pytest.raises(ValueError, match=r"wanted batches \(x, y\), got x alone"):
        run(pp.PXExact([x]))
    with pytest.raises(ValueError, match=r"labels in \[0, 3\), got 3 in batch 0"):
        run(pp.PXExact([(x, torch.tensor([0, 1, 2, 3]))]))
    with pytest.raises(ValueError, match=r"labels in \[0, 3\), got -1"):
        run(pp.PXExact([(x, torch.tensor([0, 1, 2, -1]))]))
    by_hand = PathNetwork()
    out = by_hand.add_synapse(by_hand.add_input(1, 2), torch.ones(2, 2), "w")
    by_hand.set_outputs(out)
    for pruner in (pp.PX([x], rounds=1), pp.PX([x], "released"), pp.PXExact([(x, torch.zeros(4).long())])):
        with pytest.raises(ValueError, match="by hand"):
            pp.prune(by_hand, pruner, density=0.5)
    shifted = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="activations through zero, got sigmoid"):
        pp.prune(shifted, pp.PX([torch.ones(2, 3)], rounds=1), density=0.5, example_input=torch.ones(1, 3))
    with pytest.raises(ValueError, match="wants ReLUs"):
        pp.prune(shifted, pp.PX([torch.ones(2, 3)], "released"), density=0.5, example_input=torch.ones(1, 3))
