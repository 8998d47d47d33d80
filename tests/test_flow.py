"""Path arithmetic: every path walked on small nets (enumeration.py), several sources, ensembles, dead ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enumeration import Units
from path_scores import MAPS, POWER, assert_scores_close, path_scores, randomised
from pathprune.flow import PathFlow
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from pathprune.policy import Policy, policy_of
from pathprune.spatial import merge_equal_positions
from pathprune.weights import weights_of


@pytest.fixture(autouse=True)
def _one_thread():
    """Nets this small only wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------- networks, and the same spelled out unit by unit


class Chain(nn.Module):
    shapes = ((3,),)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    def spell(self, u: Units, x: dict) -> dict:
        for name in ("a", "b", "c"):
            layer = getattr(self, name)
            x = u.linear(x, layer.weight, f"{name}.weight", layer.bias)
        return x


class Skip(nn.Module):
    """An identity skip, and a projection beside a strided convolution."""

    shapes = ((2, 3, 3),)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(2, 2, 3, padding=1, bias=False),
            nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        )
        self.project, self.head = nn.Conv2d(2, 3, 1, stride=2, bias=False), nn.Linear(12, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x + self.a(x))
        return self.head(torch.relu(self.b(x) + self.project(x)).flatten(1))

    def spell(self, u: Units, x: dict) -> dict:
        x = u.added(x, u.conv(x, self.a.weight, "a.weight", padding=1))
        projected = u.conv(x, self.project.weight, "project.weight", stride=2)
        x = u.added(u.conv(x, self.b.weight, "b.weight", stride=2, padding=1), projected)
        return u.linear(u.flat(x), self.head.weight, "head.weight")


class Dense(nn.Module):
    """Concatenation, batch norm, an average pool and a max pool."""

    shapes = ((1, 5, 4),)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 2, 2, dilation=2, bias=False), nn.BatchNorm2d(2)
        self.b = nn.Conv2d(2, 1, (2, 1), padding=1, bias=False)
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = torch.cat([F.max_pool2d(x, 2, 1), self.b(F.avg_pool2d(x, 2, 1))[:, :, :2, 1:2]], 1)
        return self.head(x.sum(3).mean(2))

    def spell(self, u: Units, x: dict) -> dict:
        x = u.conv(x, self.a.weight, "a.weight", dilation=2)
        x = u.scaled(x, self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt())
        y = u.conv(u.pool(x, 2, 1, 0.25), self.b.weight, "b.weight", padding=1)
        y = {(c, i, 0): unit for (c, i, j), unit in y.items() if i < 2 and j == 1}
        x = u.concatenated(u.pool(x, 2, 1, 1.0), y)
        means = {c: u.new() for c, _, _ in x}
        for (c, _, _), unit in x.items():
            u.connect(unit, means[c], 0.5)
        return u.linear(means, self.head.weight, "head.weight")


class Separable(nn.Module):
    """Depthwise and grouped convolutions with biases, and a transposed one."""

    shapes = ((2, 3, 3),)

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.grouped = nn.Conv2d(2, 4, 2, groups=2), nn.Conv2d(4, 2, 2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(2, 1, 2, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.hardswish(self.grouped(F.relu6(self.depth(x)))))

    def spell(self, u: Units, x: dict) -> dict:
        x = u.conv(x, self.depth.weight, "depth.weight", groups=2, bias=self.depth.bias)
        x = u.conv(x, self.grouped.weight, "grouped.weight", padding=1, groups=2, bias=self.grouped.bias)
        return u.conv_transpose(x, self.up.weight, "up.weight", stride=2, padding=1)


class TiedTwice(nn.Module):
    shapes = ((3,),)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(torch.relu(self.inner(x)))))

    def spell(self, u: Units, x: dict) -> dict:
        for _ in range(2):
            x = u.linear(x, self.inner.weight, "inner.weight", self.inner.bias)
        return u.linear(x, self.head.weight, "head.weight")


class TwoByTwo(nn.Module):
    """Two inputs and two outputs, one of which feeds the other."""

    shapes = ((3,), (2, 2))

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Conv1d(2, 2, 2, bias=False)
        self.head = nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = self.left(x) - 2 * self.right(y)[:, :, 0]
        return self.head(torch.tanh(h)), h

    def spell(self, u: Units, x: dict, y: dict) -> dict:
        x = u.linear(x, self.left.weight, "left.weight", self.left.bias)
        z = {c: u.new() for c in range(2)}
        for c, d, k in ((c, d, k) for c in range(2) for d in range(2) for k in range(2)):
            u.connect(y[d, k], z[c], float(self.right.weight[c, d, k]), ("right.weight", (c * 2 + d) * 2 + k))
        h = u.added(x, u.scaled(z, torch.tensor([-2.0, -2.0])))
        out = u.linear(h, self.head.weight, "head.weight")
        return {**{("head", k): unit for k, unit in out.items()}, **{("h", k): unit for k, unit in h.items()}}


NETS = {
    "chain with biases": (Chain, "published"),
    "chain": (Chain, "paths"),
    "skips": (Skip, "paths"),
    "cat, pools, batch norm": (Dense, "paths"),
    "depthwise, groups, transposed, biases": (Separable, "published"),
    "tied": (TiedTwice, "published"),
    "two inputs, two outputs": (TwoByTwo, "published"),
}


def walked(
    model: nn.Module,
    sources: Sequence[Tensor],
    power: float,
    policy: str,
    masks: Mapping[str, Tensor] | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """R and scores by enumeration of all paths. Biases of zero stand for none."""
    units = Units()
    kept = {name: p for name, p in model.named_parameters() if name.endswith("bias") and policy == "paths"}
    biases = {name: p.detach().clone() for name, p in kept.items()}
    for name in kept:
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.bias = None
    with torch.no_grad():
        outputs = model.spell(units, *(units.source(source) for source in sources))
        total, through = units.sums(outputs, power, masks)
    for name, bias in biases.items():
        model.get_submodule(name.rpartition(".")[0]).bias = nn.Parameter(bias)
    scores = {}
    for name, p in model.named_parameters():
        if p.dim() > 1:
            flat = [through[name, k] for k in range(p.numel())]
            scores[name] = torch.tensor(flat, dtype=torch.float64).reshape(p.shape)
    return total, scores


def network_of(model: nn.Module) -> PathNetwork:
    return PathNetwork.from_module(model, tuple(torch.ones(1, *shape).double() for shape in model.shapes))


def random_masks(network: PathNetwork, density: float = 0.7, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(network.tensors[name].shape, generator=generator) < density for name in network.prunable}


@pytest.mark.parametrize("f", MAPS)
@pytest.mark.parametrize("net", NETS)
def test_every_path_is_counted(net, f):
    build, policy = NETS[net]
    model = randomised(build())
    network = network_of(model)
    ones = [torch.ones(shape).double() for shape in model.shapes]
    for masks in (None, random_masks(network)):
        wanted_total, wanted = walked(model, ones, POWER[f], policy, masks)
        total, got = path_scores(network, f, policy, masks=masks)
        assert wanted_total > 0
        assert float(total) == pytest.approx(math.log2(wanted_total), abs=1e-11)
        assert_scores_close(got, wanted)
        if f == WeightMap.ONE:
            assert round(2 ** float(total)) == wanted_total  # the number of paths
            assert all(torch.equal(score.round(), wanted[name]) for name, score in got.items())
        if masks is not None:
            assert all((got[name][~mask] == 0).all() for name, mask in masks.items())
            merged_total, merged = path_scores(merge_equal_positions(network), f, policy, masks=masks)
            assert float(merged_total) == pytest.approx(float(total), abs=1e-11)
            assert_scores_close(merged, wanted)


@pytest.mark.parametrize("net", NETS)
def test_every_path_is_counted_from_any_source(net):
    build, policy = NETS[net]
    model = randomised(build())
    generator = torch.Generator().manual_seed(2)
    sources = [torch.rand(shape, generator=generator).double() for shape in model.shapes]
    wanted_total, wanted = walked(model, sources, 1.0, policy)
    total, got = path_scores(network_of(model), WeightMap.ABS, policy, source=sources)
    assert float(total) == pytest.approx(math.log2(wanted_total), abs=1e-11)
    assert_scores_close(got, wanted)


@pytest.mark.parametrize(("f", "s"), [(WeightMap.SQUARE, WeightMap.ABS), (WeightMap.ABS, WeightMap.SQUARE)])
def test_flow_and_score_may_see_weights_differently(f, s):
    model = randomised(Skip())
    _, wanted = walked(model, [torch.ones(2, 3, 3).double()], POWER[f], "paths")
    _, got = path_scores(network_of(model), f, "paths", s=s)
    powers = {name: p.detach().abs() ** (POWER[s] - POWER[f]) for name, p in model.named_parameters()}
    assert_scores_close(got, {name: score * powers[name] for name, score in wanted.items()}, 1e-9)


# ---------------------------------------------------------------------------------- several sources at once

BATCHED = {
    "chain": Chain,
    "skips": Skip,
    "cat, pools, batch norm": Dense,
    "depthwise, groups, transposed": Separable,
    "tied": TiedTwice,
}


class Mixed(nn.Module):
    """Norms, a gating product, one axis padded in a circle, resized, and reduced."""

    shapes = ((2, 4, 4),)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
        self.norms = nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4, affine=True))
        self.gate, self.b = nn.Linear(4, 4), nn.Conv2d(4, 3, 2, stride=2, groups=1)
        self.up, self.head = (
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.ConvTranspose2d(3, 2, 2, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms(self.a(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        x = F.max_pool2d(self.up(self.b(x)), 3, 2, 1, dilation=1, ceil_mode=True)
        return self.head(torch.cat([x, x.flip(2)], 3))


BATCHED["norms, product, resizing"] = Mixed


@pytest.mark.parametrize("policy", ["published", "paths"])
@pytest.mark.parametrize("net", BATCHED)
def test_several_sources_are_the_sum_of_single_ones(net, policy):
    model = randomised(BATCHED[net]())
    network = network_of(model)
    generator = torch.Generator().manual_seed(3)
    sources = torch.rand(3, *model.shapes[0], generator=generator, dtype=torch.float64)
    sources[1] *= 50.0
    sources[2] *= 1e-3
    for f in (WeightMap.ABS, WeightMap.SQUARE):
        single = [path_scores(network, f, policy, source=source) for source in sources]
        total, got = path_scores(network, f, policy, source=sources)
        wanted = {name: sum(scores[name] for _, scores in single) for name in network.prunable}
        wanted_total = torch.stack([t for t, _ in single]).exp2().sum().log2()
        assert float(total) == pytest.approx(float(wanted_total), abs=1e-11)
        assert_scores_close(got, wanted)
        masks = random_masks(network)
        _, got = path_scores(network, f, policy, source=sources, masks=masks)
        single = [path_scores(network, f, policy, source=source, masks=masks) for source in sources]
        assert_scores_close(got, {name: sum(scores[name] for _, scores in single) for name in masks})


def test_sources_of_two_inputs():
    model = randomised(TwoByTwo())
    network = network_of(model)
    x, y = torch.rand(4, 3).double(), torch.rand(4, 2, 2).double()
    single = [path_scores(network, source=[x[k], y[k]]) for k in range(4)]
    total, got = path_scores(network, source=[x, y])
    assert float(total) == pytest.approx(math.log2(sum(2 ** float(t) for t, _ in single)), abs=1e-11)
    assert_scores_close(got, {name: sum(s[name] for _, s in single) for name in network.prunable})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (-torch.ones(3), "wanted finite values >= 0"),
        (torch.full((3,), math.nan), "wanted finite values >= 0"),
        (torch.ones(4), r"wanted one sample of shape \(3,\), got \(4,\)"),
        ([torch.ones(3), torch.ones(3)], r"wanted 1 tensors \(one per input\), got 2"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(ValueError, match=f"source: {message}"):
        path_scores(network_of(Chain()), source=source)


def test_sources_of_two_inputs_must_agree():
    with pytest.raises(ValueError, match="source: wanted 2 sources for every input, got 3"):
        path_scores(network_of(TwoByTwo()), source=[torch.ones(2, 3), torch.ones(3, 2, 2)])


# ------------------------------------------------------------------------------------------------- ensembles


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("policy", ["published", "paths"])
@pytest.mark.parametrize("net", BATCHED)
def test_an_ensemble_is_its_members_one_by_one(net, policy, merged):
    model = randomised(BATCHED[net]())
    network = network_of(model)
    network = merge_equal_positions(network) if merged else network
    generator = torch.Generator().manual_seed(4)
    sizes = torch.tensor([1.0, 1e-30, 1e40], dtype=torch.float64)  # members have exponents of their own
    stacked = {
        name: torch.randn(3, *network.tensors[name].shape, generator=generator, dtype=torch.float64)
        * sizes.reshape(-1, *[1] * network.tensors[name].dim())
        for name in network.prunable
    }
    masks = random_masks(network)
    spread = {name: mask.expand(3, *mask.shape) for name, mask in masks.items()}
    for f in (WeightMap.ABS, WeightMap.SQUARE):
        total, got = path_scores(network, f, policy, tensors=stacked, masks=spread, log2=True)
        assert total.shape == (3,)
        for member in range(3):
            single = _with_tensors(network, {name: tensor[member] for name, tensor in stacked.items()})
            wanted_total, wanted = path_scores(single, f, policy, masks=masks, log2=True)
            assert float(total[member]) == pytest.approx(float(wanted_total), abs=1e-9)
            for name, score in wanted.items():
                torch.testing.assert_close(got[name][member], score, rtol=1e-12, atol=1e-9)


def _with_tensors(network: PathNetwork, tensors: Mapping[str, Tensor]) -> PathNetwork:
    other = PathNetwork()
    other.__dict__.update(network.__dict__)
    other.tensors = {**network.tensors, **tensors}
    return other


# ---------------------------------------------------------------------- no path left, and what is not scored


@pytest.mark.parametrize("net", NETS)
def test_no_path_left(net):
    network = network_of(randomised(NETS[net][0]()))
    masks = {name: torch.zeros(network.tensors[name].shape, dtype=torch.bool) for name in network.prunable}
    total, got = path_scores(network, WeightMap.ABS, "paths", masks=masks)
    assert float(total) == -math.inf
    assert all((score == 0).all() for score in got.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_branch_of_huge_flow_does_not_drown_the_other(dtype):
    network = PathNetwork()
    source = network.add_input(1, 4)
    weights = [torch.full((4, 4), 1e20, dtype=dtype) for _ in range(6)]
    small, head = torch.full((4, 4), 1e-20, dtype=dtype), torch.full((2, 8), 0.5, dtype=dtype)
    flow = source
    for k, weight in enumerate(weights):
        flow = network.add_synapse(flow, weight, f"huge{k}")
    joined = network.add_sum(flow, network.add_synapse(source, small, "small"))
    network.set_outputs(network.add_synapse(network.add_cat(flow, joined), head, "head"))
    masks = {"huge5": torch.zeros(4, 4, dtype=torch.bool)}
    total, scores = path_scores(network, WeightMap.ABS, "paths", masks=masks, log2=True)
    small = math.log2(1e-20)
    assert float(total) == pytest.approx(math.log2(4 * 2 * 0.5 * 4) + small, abs=1e-5)
    torch.testing.assert_close(scores["small"], torch.full((4, 4), small).double(), rtol=0, atol=1e-5)
    assert (scores["huge2"] == -math.inf).all()
    assert (scores["head"][:, :4] == -math.inf).all()
    torch.testing.assert_close(scores["head"][:, 4:], torch.full((2, 4), small + 1.0).double(), rtol=0, atol=1e-5)


def test_constants_that_are_dropped_do_not_drown_a_small_flow():
    network = PathNetwork()
    flow = network.add_input(1, 4)
    for k in range(12):
        flow = network.add_synapse(flow, torch.full((4, 4), 2.0**-32), f"w{k}")
    network.set_outputs(network.add_cat(flow, network.add_constant(torch.ones(1, 3))))
    total, scores = path_scores(network, WeightMap.ABS, "paths", log2=True)
    assert float(total) == pytest.approx(-32 * 12 + 2 * 13, abs=1e-9)
    for score in scores.values():
        assert score.sub(-32 * 12 + 2 * 11).abs().max() < 1e-9


@pytest.mark.parametrize("power", [-32, 32])
def test_a_bias_beside_a_flow_of_another_scale(power):
    network = PathNetwork()
    flow = network.add_input(1, 4)
    for k in range(8):
        bias = torch.full((4,), 3.0) if k == 7 else None
        flow = network.add_synapse(flow, torch.full((4, 4), 2.0**power), f"w{k}", bias)
    network.set_outputs(network.add_synapse(flow, torch.ones(1, 4), "head"))
    total, scores = path_scores(network, WeightMap.ABS, "published", log2=True)
    through = 8 * power + 2 * 9  # of the paths from the input
    assert float(total) == pytest.approx(max(through, math.log2(12.0)), abs=1e-6)
    assert (scores["w0"] - (through - 4)).abs().max() < 1e-6
    assert (scores["head"] - (float(total) - 2)).abs().max() < 1e-6


def test_weights_that_are_not_scored_still_carry_flow():
    model = randomised(Chain())
    network = network_of(model)
    total, wanted = path_scores(network)
    for names in (("b.weight",), ("a.weight", "c.weight")):
        weights = weights_of(network, names, (WeightMap.ABS, WeightMap.ABS))
        flow = PathFlow(network, weights, f=WeightMap.ABS, policy=policy_of("published"))
        assert torch.equal(flow.forward(), total)
        flow.backward()
        for name in names:
            made = weights[name].written_scores()
            torch.testing.assert_close(made.weight[0] * 2.0**made.exponent, wanted[name], rtol=1e-12, atol=0.0)
        for name in set(network.prunable) - set(names):
            with pytest.raises(RuntimeError, match="has not been scored"):
                _ = weights[name].scores


def test_two_sweeps_in_a_row_are_the_same():
    model = randomised(TiedTwice())
    network = network_of(model)
    weights = weights_of(network, network.prunable, (WeightMap.ABS, WeightMap.ABS))
    flow = PathFlow(network, weights, f=WeightMap.ABS, policy=policy_of("published"))
    found = []
    for _ in range(2):
        total = flow.forward()
        flow.backward()
        found.append((total, {name: w.written_scores().weight.clone() for name, w in weights.items()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(score, found[1][1][name]) for name, score in found[0][1].items())


def test_keeping_flows_changes_no_score():
    model = randomised(Mixed())
    network = network_of(model)
    _, wanted = path_scores(network)
    weights = weights_of(network, network.prunable, (WeightMap.ABS, WeightMap.ABS))
    flow = PathFlow(network, weights, f=WeightMap.ABS, policy=policy_of("published"))
    flow.keep_flows = True
    flow.forward()
    flow.backward()
    assert set(flow.values) == set(flow.backward_flows) == network.alive
    for name, weight in weights.items():
        made = weight.written_scores()
        got = (made.weight * 2.0**made.exponent).reshape(weight.shape)
        torch.testing.assert_close(got, wanted[name], rtol=1e-12, atol=0.0)


def test_policies():
    assert policy_of("published") == Policy("flow", "affine", "winner", "flow")
    assert policy_of("paths") == Policy("drop", "affine", "sum", "flow")
    assert policy_of("paths", biases="flow") == Policy(biases="flow", max_pool="sum")
    assert policy_of(Policy(norm="unit"), max_pool="sum").norm == "unit"
    with pytest.raises(ValueError, match=r"policy: wanted one of .* got 'pure'"):
        policy_of("pure")
    with pytest.raises(ValueError, match=r"Policy: max_pool: wanted one of \('winner', 'sum'\), got 'mean'"):
        policy_of("paths", max_pool="mean")
