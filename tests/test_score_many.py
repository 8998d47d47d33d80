"""Many networks scored as they come: the numbers, the order, the file, and what is said of networks that are broken."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp
from path_scores import path_scores
from pathprune.measures import METHODS
from pathprune.models import mlp, resnet_cifar
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from pathprune.path_kernel import log2_trace
from pathprune.score_table import NetworkScore
from pathprune.zico import _Welford

X = torch.ones(1, 6)
DATA_FREE = ["synflow", "log2_R", "path_count", "path_kernel_trace"]


def net(width: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return mlp((6, width, 3))


def batches(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def exact(model: nn.Module, example: Tensor) -> list[float]:
    """The data-free scores in float64, from every weight's score."""
    network = PathNetwork.from_module(model.double(), example.double())
    sums = sum(float(score.sum()) for score in path_scores(network)[1].values())
    total, _ = path_scores(network, policy="paths")
    count, _ = path_scores(network, WeightMap.ONE, "paths")
    return [math.log2(sums), float(total), float(count), log2_trace(network)]


# --------------------------------------------------------------------------------------------------- scores


def test_data_free_scores_are_those_of_float64():
    models = [net(4), net(9), resnet_cifar(8)]
    examples = [X, X, torch.ones(1, 3, 8, 8)]
    for model, example in zip(models, examples, strict=True):
        row = next(iter(pp.score_many([model], DATA_FREE, example_input=example)))
        assert [row.scores[method] for method in DATA_FREE] == pytest.approx(exact(model, example), abs=1e-5)
        assert row.flags == ()


def literal(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """SNIP, GraSP and ZiCo as their papers write them, all gradients kept, in float64."""
    model = model.double()
    weights = [p for p in model.parameters() if p.dim() > 1]

    def loss(x: Tensor, y: Tensor, temperature: float = 1.0) -> Tensor:
        return nn.functional.cross_entropy(model(x.double()) / temperature, y)

    each = [torch.autograd.grad(loss(x, y), weights) for x, y in data]
    sizes = [len(y) for _, y in data]
    mean = [sum(n * g[k] for n, g in zip(sizes, each, strict=True)) / sum(sizes) for k in range(len(weights))]
    snip = sum(float((w * g).detach().abs().sum()) for w, g in zip(weights, mean, strict=True))
    everything = sum(n * loss(x, y, 200.0) for n, (x, y) in zip(sizes, data, strict=True)) / sum(sizes)
    first = torch.autograd.grad(everything, weights, create_graph=True)
    product = sum((g * g.detach()).sum() for g in first)
    grasp = sum(
        float((w * h).detach().sum()) for w, h in zip(weights, torch.autograd.grad(product, weights), strict=True)
    )
    zico = 0.0
    for k in range(len(weights)):
        stack = torch.stack([g[k] for g in each])
        spread = stack.std(0, unbiased=False)
        varies = spread > 0
        if varies.any():
            zico += math.log(float((stack.abs().mean(0)[varies] / spread[varies]).sum()))
    return {"snip": snip, "grasp": grasp, "zico": zico}


@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 1, 3, 2)])
def test_scores_on_data_are_the_papers(sizes):
    data = [(torch.randn(n, 6, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 3) for n in sizes]
    model = net(7)
    with torch.no_grad():
        model[1].weight[2] = -1e3  # a unit that is never on: its gradients do not vary
        model[1].bias[2] = -1e6
    methods = ["snip", "grasp", "zico"]
    row = next(iter(pp.score_many([model], methods, data=data, example_input=X)))
    double = [(x.double(), y) for x, y in data]
    wanted = literal(model, double)
    assert row.scores == pytest.approx(wanted, rel=2e-4)
    exactly = next(iter(pp.score_many([model.double()], methods, data=double, example_input=X.double())))
    assert exactly.scores == pytest.approx(wanted, rel=1e-9)


class SometimesReached(nn.Module):
    """Its branch takes part only where the first input is positive, so batches may not reach it at all."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) + self.branch(x) * (x[:, :1] > 0)


@pytest.mark.parametrize("signs", [(1, -1, 1, -1), (-1, -1, 1, 1)])
def test_a_layer_that_a_batch_does_not_reach_had_no_gradient_there(signs):
    torch.manual_seed(0)
    model = SometimesReached().double()
    data = []
    for k, sign in enumerate(signs):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        x[:, 0] = sign * x[:, 0].abs()
        data.append((x, torch.arange(4) % 3))
    leaves = {"branch": model.branch.weight, "trunk": model.trunk.weight}
    gradients = []
    with _Welford(leaves) as seen:
        for x, y in data:
            seen.begin(len(y))
            on = bool((x[:, 0] > 0).any())
            output = model(x) if on else model.trunk(x)  # the graph lacks the branch
            nn.functional.cross_entropy(output, y).backward(inputs=seen.inputs)
        seen.finish()
    for x, y in data:
        on = float((x[:, 0] > 0).any())
        output = model.trunk(x) + on * model.branch(x) * (x[:, :1] > 0)
        gradients.append(torch.autograd.grad(nn.functional.cross_entropy(output, y), list(leaves.values())))
    for k, name in enumerate(leaves):
        stack = torch.stack([g[k] for g in gradients])
        torch.testing.assert_close(seen.magnitude[name], stack.abs().mean(0))
        torch.testing.assert_close(seen.deviation[name] / 4, stack.var(0, unbiased=False))


def test_ntk_sap_and_pruners_are_sums_of_their_scores():
    model = net(5)
    methods = ["ntk_sap", pp.SynFlowL2(), pp.Magnitude()]
    row = next(iter(pp.score_many([model], methods, example_input=X, seed=3)))
    for method, column in ((pp.NTKSAP(), "ntk_sap"), (pp.SynFlowL2(), "SynFlowL2"), (pp.Magnitude(), "Magnitude")):
        found = pp.scores(model, method, example_input=X, seed=3)
        total = sum(float(found.double(name).sum()) for name in found.tensors)
        wanted = math.log2(total) if column == "SynFlowL2" else total
        assert row.scores[column] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("as_modules", [False, True])
def test_weight_sets_are_their_networks_one_by_one(batch, as_modules):
    """Norms of their own included."""
    torch.manual_seed(0)
    models = [resnet_cifar(8) for _ in range(5)]
    with torch.no_grad():
        for k, model in enumerate(models):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_var.fill_(0.5 + k)
                    module.bias.fill_(0.1 * k)
    x = torch.ones(1, 3, 8, 8)
    wanted = list(pp.score_many(models, [*DATA_FREE, pp.SynFlowL2()], example_input=x))
    sets = models if as_modules else [dict(model.state_dict()) for model in models]
    options = {"architecture": resnet_cifar(8), "example_input": x, "batch": batch}
    got = list(pp.score_many(sets, [*DATA_FREE, pp.SynFlowL2()], **options))
    for mine, other in zip(got, wanted, strict=True):
        assert (mine.name, mine.flags) == (other.name, other.flags)
        assert mine.scores == pytest.approx(other.scores, abs=1e-5)
    assert len({row.scores["synflow"] for row in got}) == 5


def test_scores_of_a_single_weight_set():
    """An ensemble of one, norms included, as ``scores`` writes it out."""
    torch.manual_seed(0)
    model, x = resnet_cifar(8), torch.ones(1, 3, 8, 8)
    wanted = pp.scores(model, pp.SynFlow(), example_input=x)
    (got,) = pp.scores([dict(model.state_dict())], pp.SynFlow(), architecture=resnet_cifar(8), example_input=x)
    for name in wanted.tensors:
        torch.testing.assert_close(got.double(name), wanted.double(name))


def test_a_network_on_other_tensors():
    model, other = net(5), net(5, seed=1)
    network = PathNetwork.from_module(model, X)
    moved = network.with_tensors(dict(other.state_dict()))
    assert moved.model is None and moved.whole is moved and network.model is model
    assert path_scores(moved)[0] == path_scores(PathNetwork.from_module(other, X))[0]
    assert path_scores(network)[0] == path_scores(PathNetwork.from_module(model, X))[0]
    with pytest.raises(ValueError, match="SNIP: model: wanted a module"):
        next(iter(pp.score_many([moved], "snip", data=batches())))


def test_names_order_and_functions():
    made = []

    def make(width: int) -> nn.Module:
        made.append(width)
        return net(width)

    rows = pp.score_many([("a", partial(make, 4)), net(5), ("c", partial(make, 6))], example_input=X)
    assert made == []
    assert next(rows).name == "a" and made == [4]  # a network is made when its row is asked for
    assert [row.name for row in rows] == ["1", "c"]
    again = pp.score_many([("c", net(6)), ("a", net(4))], example_input=X)
    assert [row.scores for row in again] == [
        row.scores for row in pp.score_many([("c", net(6)), ("a", net(4))], example_input=X)
    ]


def test_networks_are_not_touched():
    model = net(5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    list(pp.score_many([model], list(METHODS), data=batches(), example_input=X))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# -------------------------------------------------------------------------------------------------- degenerate


def test_degenerate_networks_are_flagged():
    dead, broken, exploding = net(5), net(5), net(5)
    with torch.no_grad():
        dead[1].weight.zero_()
        dead[1].bias.zero_()
        broken[3].weight[0, 0] = math.nan
        exploding[1].weight.mul_(1e30)
        exploding[3].weight.mul_(1e30)
    networks = [("dead", dead), ("broken", broken), ("exploding", exploding), ("fine", net(5))]
    rows = {r.name: r for r in pp.score_many(networks, ["synflow", "log2_R"], example_input=X)}
    assert rows["dead"].flags == ("disconnected", "zero_score")
    assert rows["dead"].scores == {"synflow": -math.inf, "log2_R": -math.inf}
    assert rows["broken"].flags == ("non_finite",) and all(map(math.isnan, rows["broken"].scores.values()))
    assert rows["exploding"].flags == () and rows["exploding"].scores["log2_R"] > 190
    assert rows["fine"].flags == ()
    on_data = {r.name: r for r in pp.score_many(networks, ["snip", "zico"], data=batches(), example_input=X)}
    assert on_data["dead"].flags == ("disconnected", "zero_score")
    assert on_data["exploding"].flags == ("non_finite",)  # its loss is not a number
    assert on_data["fine"].flags == ()
    sets = [(name, dict(model.state_dict())) for name, model in networks]
    several = list(pp.score_many(sets, ["synflow", "log2_R"], architecture=net(5), example_input=X))
    assert [row.name for row in several] == ["dead", "broken", "exploding", "fine"]
    assert [row.flags for row in several] == [rows[name].flags for name, _ in networks]


# ------------------------------------------------------------------------------------------------------ files


def test_a_file_is_gone_on_with(tmp_path):
    path = tmp_path / "scores.jsonl"
    networks = [(str(width), partial(net, width)) for width in range(3, 11)]
    whole = list(pp.score_many(networks, DATA_FREE, example_input=X))
    rows = pp.score_many(networks, DATA_FREE, example_input=X, results=path)
    for _ in range(3):
        next(rows)
    rows.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[1])["name"] == "3"
    path.write_bytes(path.read_bytes() + b'{"name": "6", "synfl')  # killed while it wrote
    unused = [(name, partial(pytest.fail, f"{name} was built again")) for name, _ in networks[:3]]
    again = list(pp.score_many([*unused, *networks[3:]], DATA_FREE, example_input=X, results=path))
    assert again == whole
    assert path.read_text().splitlines()[:4] == lines and len(path.read_text().splitlines()) == 9


@pytest.mark.parametrize("cut", [1, 20])
def test_a_header_cut_short_is_written_anew(tmp_path, cut):
    path = tmp_path / "scores.jsonl"
    list(pp.score_many([net()], example_input=X, results=path))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    list(pp.score_many([net()], example_input=X, results=path))
    assert path.read_bytes() == whole


def test_what_json_has_no_numbers_for_comes_back(tmp_path):
    path = tmp_path / "scores.jsonl"
    dead, broken = net(), net()
    with torch.no_grad():
        dead[1].weight.zero_()
        broken[1].weight.fill_(math.inf)
    networks = [("dead", dead), ("broken", broken)]
    first = list(pp.score_many(networks, ["synflow", "snip"], data=batches(), example_input=X, results=path))
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = list(pp.score_many(networks, ["synflow", "snip"], data=batches(), example_input=X, results=path))
    assert again[0] == first[0]
    assert again[0].scores == {"synflow": -math.inf, "snip": 0.0}
    assert again[1].flags == first[1].flags and all(map(math.isnan, again[1].scores.values()))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n", "wanted a file of scores, got another"),
        (b"not scores", "wanted a file of scores, got another"),
        (b'{"format": "pathprune scores 1", "methods": ["log2_R"], "settings": {}}\n', r"wanted methods \['synflow'\]"),
    ],
)
def test_other_files_stay_as_they_are(tmp_path, content, said):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        pp.score_many([net()], example_input=X, results=path)
    assert path.read_bytes() == content


def test_a_damaged_line_is_named_and_the_file_stays(tmp_path):
    path = tmp_path / "scores.jsonl"
    list(pp.score_many([net(3), net(4)], example_input=X, results=path))
    lines = path.read_text().splitlines(keepends=True)
    for damage in ("garbage\n", "[1]\n", '{"name": "0", "flags": []}\n', '{"name": "0", "synflow": 1, "flags": 2}\n'):
        damaged = "".join([lines[0], damage, lines[2]])
        path.write_text(damaged)
        with pytest.raises(ValueError, match="line 2: wanted a network's scores"):
            pp.score_many([net(3), net(4)], example_input=X, results=path)
        assert path.read_text() == damaged


def test_two_runs_do_not_share_a_file(tmp_path):
    path = tmp_path / "scores.jsonl"
    rows = pp.score_many([net(3), net(4)], example_input=X, results=path)
    next(rows)
    with pytest.raises(ValueError, match="another run is writing to it"):
        pp.score_many([net(3)], example_input=X, results=path)
    list(rows)
    assert len(list(pp.score_many([net(3), net(4)], example_input=X, results=path))) == 2


KILLED = """
import sys, torch, pathprune as pp
torch.set_num_threads(1)
space = pp.CellSpace(channels=2, cells=1, image=8)
cells = [space[k] for k in range(9000, 10500)]
list(pp.score_space(space, architectures=cells, batch=8, results=sys.argv[1]))
"""


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL in the middle: what is there is kept, nothing is scored twice, and the table is that of one run."""
    path = tmp_path / "scores.jsonl"
    running = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b"\n") < 50:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    kept = path.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    done = kept.count(b"\n") - 1
    assert 49 <= done < 1500
    space = pp.CellSpace(channels=2, cells=1, image=8)
    cells = [space[k] for k in range(9000, 10500)]
    rows = {row.name: row for row in pp.score_space(space, architectures=cells, results=path)}
    assert path.read_bytes().startswith(kept)
    assert path.read_bytes().count(b"\n") == 1501 and len(rows) == 1500
    for row in pp.score_space(space, architectures=cells):
        assert row.scores == pytest.approx(rows[row.name].scores, abs=1e-5) and row.flags == rows[row.name].flags


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"method": "naswot"}, ValueError, "score_many: method: wanted one of .* or a pruner, got 'naswot'"),
        ({"method": []}, ValueError, "score_many: method: wanted one or several different ones"),
        ({"method": ["snip"]}, ValueError, r"score_many: data: wanted batches \(x, y\) for 'snip', got None"),
        ({"method": ["synflow", "synflow"]}, ValueError, "wanted one or several different ones"),
        ({"method": pp.PHEW()}, TypeError, "score_many: method: wanted a pruner that scores weights, got PHEW"),
        ({"batch": 0}, ValueError, "score_many: batch: wanted at least 1, got 0"),
        ({"method": "snip", "data": [1], "architecture": mlp((6, 5, 3))}, ValueError, "wanted a path method"),
    ],
)
def test_bad_calls_leave_no_file(tmp_path, options, kind, said):
    with pytest.raises(kind, match=said):
        pp.score_many([net()], **{"example_input": X, "results": tmp_path / "s.jsonl", **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [mlp((6, 5, 3)), {"a": X}, "nets", 3])
def test_what_is_no_iterable_of_networks(given):
    with pytest.raises(TypeError, match="score_many: networks: wanted an iterable of networks"):
        pp.score_many(given, example_input=X)


class Sorting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumprod(self.first(x), 1)


@pytest.mark.parametrize(
    ("entry", "options", "kind", "said"),
    [
        (3, {}, TypeError, "network '1': wanted a module or PathNetwork, got int"),
        (lambda: 3, {}, TypeError, "network '1': wanted a module or PathNetwork, got int"),
        ({"a": X}, {}, ValueError, "network '1': architecture: wanted the network a weight set belongs to, got None"),
        (("a", "b", "c"), {}, TypeError, r"network 1: wanted \(name, network\), got a tuple of 3"),
        (("0", mlp((6, 5, 3))), {}, ValueError, "wanted a name of its own for each, got '0' twice"),
        (Sorting(), {}, ValueError, "network '1': PathNetwork: operator aten.cumprod"),
        (mlp((6, 5, 3)), {"example_input": None}, ValueError, "network '.': .*example_input: wanted an input"),
        (
            mlp((6, 4, 3)),
            {"architecture": mlp((6, 5, 3))},
            ValueError,
            r"weight set: '1.weight': wanted shape \(5, 6\)",
        ),
        (3, {"architecture": mlp((6, 5, 3))}, TypeError, "network '1': wanted a weight set or a module, got int"),
        (mlp((6, 5, 3)), {"method": "zico", "data": batches(1)}, ValueError, "ZiCo: data: wanted at least two batches"),
    ],
)
def test_a_bad_network_is_named_and_the_rows_before_it_stay(tmp_path, entry, options, kind, said):
    path = tmp_path / "scores.jsonl"
    rows = pp.score_many([net(), entry], **{"example_input": X, "results": path, "batch": 1, **options})
    with pytest.raises(kind, match=said):
        list(rows)
    assert len(path.read_text().splitlines()) <= 2


def test_a_row_is_a_line():
    row = NetworkScore.of("a", {"synflow": 1.5}, {"synflow": True}, False)
    assert json.loads(row.line()) == {"name": "a", "synflow": 1.5, "flags": []}
