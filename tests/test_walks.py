"""Walks: against a literal walker, exact visit probabilities and their chi-square, every path of small graphs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import walk_oracle
from pathprune import PathNetwork, models
from pathprune.ops import WeightMap
from pathprune.walk_graph import walk_graph
from pathprune.walk_masks import Marked
from pathprune.walks import WalkRule, Walks


class Kinds(nn.Module):
    """Every form of synapse, strides and groups, an identity skip, a projection, a concatenation, a flatten."""

    shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.b = nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0))
        self.shortcut = nn.Conv2d(4, 6, 1, stride=2)
        self.up = nn.ConvTranspose2d(6, 3, 2, stride=2)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Linear(7 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.a(x))
        y = self.shortcut(x) + self.b(x)
        x = torch.cat((self.up(y), self.deep(x)), 1)
        return self.head(torch.max_pool2d(x, 2).flatten(1))


class Sequence(nn.Module):
    """A network over positions: features are units, their positions are not; slices and a permutation."""

    shape = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 6), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        x = x + self.b(h[..., :4] + h[..., 4:].flip(-1))
        return self.c(x.transpose(1, 2).reshape(1, -1))


class Two(nn.Module):
    """Two inputs, two outputs, one of which is also read on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x) + self.b(y)
        return h, self.c(h)


def network(kind: str, seed: int = 0) -> PathNetwork:
    torch.manual_seed(seed)
    if kind == "two":
        return PathNetwork.from_module(Two(), (torch.ones(1, 3), torch.ones(1, 2)))
    if kind == "chain":
        layers = (nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 7))
        return PathNetwork.from_module(nn.Sequential(*layers), torch.ones(1, 12))
    model = {"kinds": Kinds, "sequence": Sequence}[kind]()
    return PathNetwork.from_module(model, torch.ones(1, *model.shape))


RULES = [
    WalkRule(),
    WalkRule(power=2, branches="mass"),
    WalkRule(power=-1, branches="flow", identities=True),
    WalkRule(power=0, start="uniform", identities=True),
]


def taken_by(walks: Walks, number: int) -> list[int]:
    return sorted(place for place in walks.steps(number, 1)[0].tolist() if place >= 0)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", ["chain", "kinds", "sequence", "two"])
def test_a_batch_of_walks_is_what_a_literal_walker_does(kind, rule):
    net = network(kind)
    walks = Walks(net, net.prunable, rule, seed=7)
    batch = walks.steps(3, 60)
    for row, number in enumerate(range(3, 63)):
        wanted = sorted(walks.offsets[name] + flat for name, flat in walk_oracle.walk(walks, number))
        assert sorted(place for place in batch[row].tolist() if place >= 0) == wanted


@pytest.mark.parametrize("keep_kernels", [False, True])
@pytest.mark.parametrize("kind", ["kinds", "sequence"])
def test_visits_are_those_of_literal_walks(kind, keep_kernels, monkeypatch):
    net = network(kind)
    walks = Walks(net, net.prunable, WalkRule(), seed=2, keep_kernels=keep_kernels, count_visits=True)
    visited: dict[str, list[int]] = {name: [] for name in net.prunable}
    step = walk_oracle.step

    def noted(walks: Walks, k: int, unit: int, number: int, ahead: bool) -> tuple[str, int, int]:
        name, flat, reached = step(walks, k, unit, number, ahead)
        visited[name].append(reached if ahead else unit)
        return name, flat, reached

    monkeypatch.setattr(walk_oracle, "step", noted)
    targets, done = [30, 120], 0
    for found in walks.until(targets):
        for number in range(done, found.walks):
            walk_oracle.walk(walks, number)
        done = found.walks
        for name, counts in found.visits.items():
            units = torch.tensor(visited[name], dtype=torch.int64)
            assert torch.equal(counts, torch.bincount(units, minlength=len(counts)))
    assert Walks(net, net.prunable, WalkRule()).until([5])[0].visits == {}


def test_the_mask_is_that_of_the_sequential_rule():
    net = network("kinds")
    walks = Walks(net, net.prunable, WalkRule(), seed=1)
    targets = [40, 150, 300]
    marked: set[tuple[str, int]] = set()
    number, wanted = 0, []
    for target in targets:
        while len(marked) < target:
            marked |= set(walk_oracle.walk(walks, number))
            number += 1
        wanted.append((number, set(marked)))
    for found, (count, edges) in zip(walks.until(targets), wanted, strict=True):
        assert (found.walks, found.kept) == (count, len(edges))
        for name in net.prunable:
            mine = {flat for other, flat in edges if other == name}
            assert set(walks.bits(found, name).flatten().nonzero().flatten().tolist()) == mine


@pytest.mark.parametrize("batch_bytes", [1, 8 * 64 * 7, 1 << 30])
def test_batches_and_threads_do_not_show(batch_bytes, monkeypatch):
    net = network("kinds")
    found = Walks(net, net.prunable, WalkRule(branches="flow"), seed=2).until([100, 400])
    monkeypatch.setattr("pathprune.walk_masks._BATCH_BYTES", batch_bytes)
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        again = Walks(net, net.prunable, WalkRule(branches="flow"), seed=2).until([100, 400])
        torch.set_num_threads(before)
        for a, b in zip(found, again, strict=True):
            assert torch.equal(a.bits, b.bits)
            assert (a.kept, a.walks) == (b.kept, b.walks)


@pytest.mark.cuda
def test_cuda_walks_are_those_of_the_cpu():
    torch.manual_seed(0)
    model = Kinds()
    x = torch.ones(1, *Kinds.shape)
    net = PathNetwork.from_module(model, x)
    found = Walks(net, net.prunable, WalkRule(branches="flow"), seed=2).until([100, 400])
    there = PathNetwork.from_module(model.cuda(), x.cuda())
    for a, b in zip(
        found, Walks(there, net.prunable, WalkRule(branches="flow"), seed=2).until([100, 400]), strict=True
    ):
        assert torch.equal(a.bits, b.bits.cpu())
        assert (a.kept, a.walks) == (b.kept, b.walks)


# ------------------------------------------------------------------------------------- probabilities


def chi_square_quantile(degrees: int, z: float = 3.7) -> float:
    """Wilson and Hilferty's approximation; z = 3.7 is passed once in ten thousand."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", ["chain", "kinds", "sequence", "two"])
def test_visits_are_as_often_as_the_exact_probabilities_say(kind, rule):
    net = network(kind)
    walks = Walks(net, net.prunable, rule, seed=3)
    count = 2 * 24 * 420  # round-robin starts in whole turns
    steps = walks.steps(0, count)
    for ahead in (True, False):
        mine = steps[0 if ahead else 1 :: 2].flatten()
        for k, chance in walks.chances.visits(ahead).items():
            begin = walks.offsets[walks.graph.sites[k].weight]
            here = mine[(mine >= begin) & (mine < begin + chance.numel())] - begin
            seen = torch.bincount(here, minlength=chance.numel()).double()
            expected = chance.flatten() * count / 2
            assert not bool(seen[expected == 0].any())
            some = expected > 5
            degrees = int(some.sum()) - 1
            if degrees < 1:
                continue
            statistic = float(((seen - expected)[some] ** 2 / expected[some]).sum())
            assert statistic < chi_square_quantile(degrees), (k, ahead, statistic, degrees)


def test_a_chain_is_walked_as_the_published_sampler_walks_it():
    """P_f(o|i) = sum_k |w_oik| / sum_o' ..., then the entry in proportion to |w|: straight from the weights."""
    net = network("chain")
    a, b, c = (net.tensors[name].detach().double().abs() for name in net.prunable)
    visits = Walks(net, net.prunable, WalkRule()).chances.visits(True)
    unit = torch.full((12,), 1 / 12, dtype=torch.float64)
    for weight, found in zip((a, b, c), visits.values(), strict=True):
        edge = weight / weight.sum(0) * unit
        assert torch.allclose(found[0, :, :, 0], edge, rtol=1e-12)
        unit = edge.sum(1)
    backward = Walks(net, net.prunable, WalkRule()).chances.visits(False)
    unit = torch.full((7,), 1 / 7, dtype=torch.float64)
    for weight, found in zip((c, b, a), backward.values(), strict=True):
        edge = weight / weight.sum(1, keepdim=True) * unit[:, None]
        assert torch.allclose(found[0, :, :, 0], edge, rtol=1e-12)
        unit = edge.sum(0)


def test_distinct_edges_are_as_many_as_expected():
    net = network("chain")
    rule = WalkRule(start="uniform")
    chance = torch.cat([v.flatten() for v in Walks(net, net.prunable, rule).chances.visits(True).values()])
    back = Walks(net, net.prunable, rule).chances.visits(False)
    other = torch.cat([back[k].flatten() for k in sorted(back)])
    n = 300
    expected = float((1 - (1 - chance) ** (n / 2) * (1 - other) ** (n / 2)).sum())
    counts = []
    for seed in range(60):
        steps = Walks(net, net.prunable, rule, seed=seed).steps(0, n)
        counts.append(len(steps.unique()))
    mean, error = torch.tensor(counts).double().mean(), torch.tensor(counts).double().std() / 60**0.5
    assert abs(float(mean) - expected) < 4 * float(error)


def test_a_fork_is_taken_by_its_policy():
    torch.manual_seed(0)
    net = network("kinds")
    graph = Walks(net, net.prunable, WalkRule()).graph
    names = {net.nodes[k].weight: k for k in graph.sites}
    (identity,) = graph.skips
    share = {}
    for branches, identities in itertools.product(("uniform", "mass", "flow"), (False, True)):
        visits = Walks(net, net.prunable, WalkRule(branches=branches, identities=identities)).chances.visits(True)
        share[branches, identities] = {name: float(visits[k].sum()) for name, k in names.items()}
    assert net.nodes[identity[0]].inputs  # the skip ends at a sum
    for name, expected in {"a": 1.0, "shortcut": 1 / 3, "b": 1 / 3, "deep": 1 / 3, "up": 2 / 3, "head": 1.0}.items():
        assert share["uniform", False][f"{name}.weight"] == pytest.approx(expected)
    assert share["uniform", True]["a.weight"] == pytest.approx(0.5)
    assert share["mass", False]["shortcut.weight"] != pytest.approx(1 / 3, abs=1e-3)
    assert share["flow", True]["a.weight"] < 0.99
    for found in share.values():
        total = found["shortcut.weight"] + found["b.weight"] + found["deep.weight"]
        assert total == pytest.approx(1.0)


def test_flow_branches_with_uniform_forks_left_out_follow_all_that_lies_ahead():
    """At a fork of two linear branches the flow ahead is a matrix product: P(branch) from it, by hand."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    torch.manual_seed(1)
    model = Fork()
    net = PathNetwork.from_module(model, torch.ones(1, 3))
    visits = Walks(net, net.prunable, WalkRule(branches="flow")).chances.visits(True)
    a, b, c = (getattr(model, n).weight.detach().double().abs() for n in "abc")
    ahead = c.sum(0)
    to_a, to_b = ahead @ a, ahead @ b
    by_name = {net.nodes[k].weight: v for k, v in visits.items()}
    assert torch.allclose(by_name["a.weight"].sum((0, 1, 3)), to_a / (to_a + to_b) / 3, rtol=1e-12)


# ------------------------------------------------------------------------------------------ the graph


def test_a_flattened_channel_is_its_block_of_features():
    net = PathNetwork.from_module(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)),
        torch.ones(1, 2, 4, 4),
    )
    walks = Walks(net, net.prunable, WalkRule(), seed=0)
    name, features = net.prunable[1], 12
    for number in range(400):
        edges = dict(walk_oracle.walk(walks, number))
        channel = edges[net.prunable[0]] // (2 * 9)
        assert edges[name] % features // 4 == channel
    steps = walks.steps(0, 400)
    begin = walks.offsets[name]
    seen = {place - begin for place in steps.flatten().tolist() if place >= begin}
    assert {place % features for place in seen} == set(range(features))


def test_channel_shuffle_and_space_to_depth_are_read_as_they_are():
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 1), nn.Conv2d(24, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).reshape(1, 2, 3, 4, 4).transpose(1, 2).reshape(1, 6, 4, 4)
            x = x.reshape(1, 6, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 24, 2, 2)
            return self.b(x)

    net = PathNetwork.from_module(Shuffle(), torch.ones(1, 2, 4, 4))
    walks = Walks(net, net.prunable, WalkRule(), seed=0)
    for number in range(100):
        edges = dict(walk_oracle.walk(walks, number))
        before, after = edges["a.weight"] // 2, edges["b.weight"] % 24 // 4
        assert after == before % 3 * 2 + before // 3


def test_kernel_entries_without_a_position_are_never_taken():
    net = PathNetwork.from_module(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten()), torch.ones(1, 2, 1, 2))
    steps = Walks(net, net.prunable, WalkRule(), seed=0).steps(0, 500)
    assert {place % 9 for place in steps.flatten().tolist()} == {3, 4, 5}


def test_units_that_lead_nowhere_are_not_walked():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[:, :3])

    net = PathNetwork.from_module(Cut(), torch.ones(1, 4))
    steps = Walks(net, net.prunable, WalkRule(), seed=0).steps(0, 300)
    assert {place // 4 for place in steps.flatten().tolist() if place < 24} == {0, 1, 2}


def live_weights(net: PathNetwork, walks: Walks, found: Marked) -> int:
    """How many of the kept weights lie on a path, by path counts."""
    from pathprune.flow import PathFlow
    from pathprune.policy import policy_of
    from pathprune.weights import weights_of

    masks = {name: walks.bits(found, name) for name in net.prunable}
    weights = weights_of(net, net.prunable, (WeightMap.ONE, WeightMap.ONE), masks=masks)
    flow = PathFlow(net, weights, f=WeightMap.ONE, policy=policy_of("paths"))
    flow.forward()
    flow.backward()
    return sum(int((weights[name].written_scores().weight > 0).sum()) for name in net.prunable)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_kept_weight_lies_on_a_path(rule):
    """Where a pool over all positions ends the convolutions. (A flattened corner may be reached by channels alone.)"""
    torch.manual_seed(0)
    for net in (PathNetwork.from_module(models.resnet20(), torch.ones(1, 3, 32, 32)), network("chain"), network("two")):
        walks = Walks(net, net.prunable, rule, seed=0)
        (found,) = walks.until([max(walks.total // 20, 3)])
        assert live_weights(net, walks, found) == found.kept


# ---------------------------------------------------------------------------------- stopping and refusing


def test_trimming_keeps_the_exact_number():
    net = network("kinds")
    walks = Walks(net, net.prunable, WalkRule(), seed=5)
    for target in (1, 2, 57, 58, 59, 60, 301):
        (whole,) = walks.until([target])
        (exact,) = walks.until([target], trim=True)
        assert exact.kept == target
        for name in net.prunable:
            assert not bool((walks.bits(exact, name) & ~walks.bits(whole, name)).any())
        assert sum(int(walks.bits(exact, name).sum()) for name in net.prunable) == target
        assert whole.kept - target < walks.width


def test_whole_kernels():
    net = network("kinds")
    walks = Walks(net, net.prunable, WalkRule(), seed=5, keep_kernels=True)
    (found,) = walks.until([300])
    kernels = walks.bits(found, "stem.weight").flatten(2)
    assert bool((kernels.all(2) == kernels.any(2)).all())
    assert sum(int(walks.bits(found, name).sum()) for name in net.prunable) == found.kept


def test_weights_left_out_are_walked_through_but_neither_marked_nor_counted():
    net = network("chain")
    middle = net.prunable[1]
    walks = Walks(net, [name for name in net.prunable if name != middle], WalkRule(), seed=0)
    whole = Walks(net, net.prunable, WalkRule(), seed=0)
    (found,) = walks.until([100])
    assert found.kept >= 100
    assert walks.total == whole.total - net.tensors[middle].numel()
    columns = [column for column, name in enumerate(net.prunable) if name != middle]
    flat = [whole.steps(0, 50)[:, c] - whole.offsets[net.prunable[c]] for c in columns]
    mine = [walks.steps(0, 50)[:, k] - walks.offsets[net.prunable[c]] for k, c in enumerate(columns)]
    assert all(torch.equal(a, b) for a, b in zip(flat, mine, strict=True))


def test_a_target_that_no_walk_reaches_says_how_far_it_goes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[:, 1] *= (torch.arange(6) < 2).float()  # 4 of the 24 are zero
    net = PathNetwork.from_module(model, torch.ones(1, 4))
    walks = Walks(net, net.prunable, WalkRule(), seed=0)
    assert walks.until([38])[0].kept == 38
    with pytest.raises(ValueError, match=r"walks can take 38 of 42 weights .*0\.weight \(4\)"):
        walks.until([39])


def test_max_walks_says_what_was_reached():
    net = network("chain")
    walks = Walks(net, net.prunable, WalkRule(), seed=0)
    with pytest.raises(ValueError, match=r"max_walks: 30 walks reached density 0\.\d+ "):
        walks.until([walks.total - 1], max_walks=30)


def test_zero_rows_and_zero_kernels_are_walked_evenly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
    with torch.no_grad():
        model[1].weight.zero_()
    net = PathNetwork.from_module(model, torch.ones(1, 1, 5, 5))
    walks = Walks(net, net.prunable, WalkRule(), seed=0)
    chance = walks.chances.visits(True)[max(walks.graph.sites)]
    steps = walks.steps(0, 4000)
    begin = walks.offsets[net.prunable[1]]
    seen = torch.bincount(steps[::2].flatten()[steps[::2].flatten() >= begin] - begin, minlength=36).double()
    expected = chance.flatten() * 2000
    assert float(((seen - expected) ** 2 / expected).sum()) < chi_square_quantile(35)


def test_integers_are_near_the_weights_and_what_is_lost_is_told():
    net = network("kinds")
    walks = Walks(net, net.prunable, WalkRule())
    for ahead in (True, False):
        for distance, lost in walks.chances.quantisation(ahead).values():
            assert 0 <= distance < 2.0**-31
            assert lost == 0
    assert walks.lost() == 0
    with torch.no_grad():
        net.tensors["head.weight"][0, :3] = 1e-30
    walks = Walks(net, net.prunable, WalkRule(power=2))
    assert walks.lost() == 6  # three weights, each in its row and in its column


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_graphs(data):
    """Chains of random widths with random sums and concatenations: literal walks, live weights, nested masks."""
    made = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    net = PathNetwork()
    flows = [net.add_input(1, data.draw(st.integers(1, 5)))]
    for k in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.sampled_from(flows))
        width = data.draw(st.integers(1, 5))
        weight = torch.randn(width, net.nodes[at].shape[1], generator=made)
        weight[torch.rand(weight.shape, generator=made) < 0.2] = 0
        new = net.add_synapse(at, weight, f"w{k}")
        alike = [i for i in flows if net.nodes[i].shape == net.nodes[new].shape]
        if alike and data.draw(st.booleans()):
            new = net.add_sum(new, data.draw(st.sampled_from(alike)))
        elif data.draw(st.booleans()):
            new = net.add_cat(new, data.draw(st.sampled_from(flows)))
        flows.append(new)
    net.set_outputs(flows[-1])
    if not net.prunable:
        return
    rule = data.draw(st.sampled_from(RULES))
    walks = Walks(net, net.prunable, rule, seed=3)
    batch = walks.steps(0, 12)
    for number in range(12):
        wanted = sorted(walks.offsets[name] + flat for name, flat in walk_oracle.walk(walks, number))
        assert sorted(place for place in batch[number].tolist() if place >= 0) == wanted


def test_the_graph_is_read_once_until_the_network_grows():
    net = PathNetwork()
    first = net.add_synapse(net.add_input(1, 4), torch.ones(3, 4), "a")
    net.set_outputs(first)
    read = walk_graph(net)
    assert walk_graph(net) is read
    net.set_outputs(net.add_synapse(first, torch.ones(2, 3), "b"))
    assert [site.weight for site in walk_graph(net).sites.values()] == ["a", "b"]
