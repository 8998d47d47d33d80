"""The cell space of NAS-Bench-201's form: what it is, that its networks are the modules', and its scores."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import pathprune as pp
from enumeration import Units
from path_scores import path_scores, randomised
from pathprune.cell_networks import cell_network, network_of
from pathprune.cell_space import (
    EDGES,
    OPERATIONS,
    CellNet,
    CellSpace,
    architecture_of,
    index_of,
    live_part,
    name_of,
    switches,
    windows_of,
)
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from pathprune.path_kernel import log2_trace
from pathprune.policy import Policy
from pathprune.routed_flow import RoutedFlow
from pathprune.score_table import NetworkScore

SMALL = CellSpace(channels=4, cells=2, image=16)
PATHS = Policy(biases="drop")
NOTHING = ("none",) * 6
CHAIN = ("nor_conv_3x3", "none", "nor_conv_1x1", "none", "none", "avg_pool_3x3")  # 0 -> 1 -> 2 -> 3
DEAD_END = ("nor_conv_3x3", "none", "nor_conv_3x3", "none", "none", "none")  # 0 -> 1 -> 2, and no further
FULL = ("nor_conv_3x3", "nor_conv_1x1", "skip_connect", "avg_pool_3x3", "nor_conv_3x3", "nor_conv_1x1")
SAMPLE = [NOTHING, CHAIN, DEAD_END, FULL, *(SMALL[k] for k in random.Random(0).sample(range(15625), 14))]


def drawn(space: CellSpace, seed: int = 0) -> dict[str, Tensor]:
    """A supernet in float64, norms drawn too: nothing is 0 or 1 by chance."""
    tensors = space.draw(seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if "norm" in name or name.startswith("last"):
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensors[name] = values.abs() + 0.5 if name.endswith(("var", "weight")) else values
    return tensors


def module(space: CellSpace, architecture: tuple[str, ...], tensors: dict[str, Tensor]) -> CellNet:
    """The stand-alone network with its part of the supernet."""
    model = CellNet(space, architecture).to(tensors["head.weight"].dtype).eval()
    model.load_state_dict({k: tensors.get(k, v) for k, v in model.state_dict().items()})
    return model


def slope(network: PathNetwork) -> float:
    """log2 of the sum of SynFlow's scores of all weights."""
    _, scores = path_scores(network, policy="published", biases="drop")
    total = sum(float(score.sum()) for score in scores.values())
    return math.log2(total) if total > 0 else -math.inf


# ------------------------------------------------------------------------------------------------ the space


def test_the_space_is_the_published_one():
    space = CellSpace()
    assert len(space) == 15625 and len(set(space)) == 15625
    full = ("nor_conv_3x3",) * 6
    assert name_of(full) == (
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    )
    # NAS-Bench-201 states 1.531546 M parameters for this cell and 0.073306 M without a weight in it (10 classes).
    assert sum(p.numel() for p in CellNet(space, full).parameters()) == 1_531_546
    assert sum(p.numel() for p in CellNet(space, ("skip_connect",) * 6).parameters()) == 73_306


def test_numbers_and_names_are_one_to_one():
    for k in (0, 1, 624, 7812, 15624):
        architecture = CellSpace()[k]
        assert index_of(architecture) == k
        assert architecture_of(name_of(architecture)) == architecture


def test_edges_no_path_takes_are_left_out():
    assert live_part(DEAD_END) == NOTHING
    assert live_part(("none", "skip_connect", *FULL[2:])) == ("none", "skip_connect", "none", FULL[3], "none", FULL[5])
    assert live_part(FULL) == FULL
    assert len({live_part(a) for a in CellSpace()}) == 9445
    for architecture in random.Random(1).sample(list(CellSpace()), 300):
        on = {edge for edge, operation in zip(EDGES, architecture, strict=True) if operation != "none"}
        routes = [((0, 3),), ((0, 1), (1, 3)), ((0, 2), (2, 3)), ((0, 1), (1, 2), (2, 3))]
        taken = {edge for route in routes if set(route) <= on for edge in route}
        assert live_part(architecture) == tuple(
            op if edge in taken else "none" for edge, op in zip(EDGES, architecture, strict=True)
        )
        several = [sum(architecture[EDGES.index(e)] in OPERATIONS[3:] for e in r) for r in routes if set(r) <= on]
        assert windows_of(architecture) == max(several, default=0)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: CellSpace(channels=0), "CellSpace: channels: wanted at least 1, got 0"),
        (lambda: CellSpace(image=30), "CellSpace: image: wanted a multiple of 4, got 30"),
        (lambda: name_of(("none",) * 5), "architecture: wanted 6 operations"),
        (lambda: name_of("none01"), "architecture: wanted 6 operations, got 'none01'"),
        (lambda: name_of(("none",) * 5 + ("conv",)), "architecture: wanted operations of .*, got 'conv'"),
        (lambda: architecture_of("|none~0|"), "architecture: wanted a name such as"),
        (lambda: architecture_of(name_of(FULL).replace("~2", "~1")), "architecture: wanted a name such as"),
        (lambda: CellNet(SMALL, ("none",)), "architecture: wanted 6 operations"),
        (lambda: cell_network(SMALL, {}, FULL), r"tensors: 'stem.weight': wanted shape \(4, 3, 3, 3\), got None"),
    ],
)
def test_bad_input_is_named(made, said):
    with pytest.raises(ValueError, match=said):
        made()


def test_no_architecture_beyond_the_last():
    with pytest.raises(IndexError, match="wanted 0 to 15624, got 15625"):
        CellSpace()[15625]


# ------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("architecture", [NOTHING, CHAIN, FULL, SAMPLE[5], SAMPLE[6]], ids=name_of)
def test_a_network_is_its_module_exported(architecture):
    tensors = drawn(SMALL)
    model = module(SMALL, architecture, tensors)
    exported = PathNetwork.from_module(model, torch.ones(1, 3, 16, 16, dtype=torch.float64))
    source = torch.rand(3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    small = cell_network(SMALL, tensors, architecture, windows=windows_of(architecture))
    for policy in ("published", "paths"):
        for given in (None, source):
            wanted, scores = path_scores(exported, policy=policy, source=given)
            got, others = path_scores(network_of(model), policy=policy, source=given)
            assert float(got) == pytest.approx(float(wanted), abs=1e-11)
            for name, score in scores.items():
                torch.testing.assert_close(others[name], score, rtol=1e-11, atol=0)
        for f in (WeightMap.ABS, WeightMap.SQUARE):
            wanted, scores = path_scores(exported, f, policy)
            got, others = path_scores(small, f, policy)
            assert float(got) == pytest.approx(float(wanted), abs=1e-11)
            for name, score in scores.items():
                torch.testing.assert_close(others[name], score, rtol=1e-10, atol=0)


@pytest.mark.parametrize("windows", [0, 1, 2, 3])
@pytest.mark.parametrize("image", [4, 8, 20, 32])
def test_small_images_stand_for_large_ones(windows, image):
    """As many windows in a row as were announced, on every size of image."""
    space = CellSpace(channels=1, cells=2, image=image)
    tensors = drawn(space)
    chain = [("nor_conv_3x3" if k < windows else "nor_conv_1x1") for k in range(3)]
    architecture = (chain[0], "none", chain[1], "skip_connect", "none", chain[2])
    wanted, scores = path_scores(cell_network(space, tensors, architecture))
    got, others = path_scores(cell_network(space, tensors, architecture, windows=windows))
    assert float(got) == pytest.approx(float(wanted), abs=1e-11)
    for name, score in scores.items():
        torch.testing.assert_close(others[name], score, rtol=1e-10, atol=0)


def test_a_tiny_cell_is_the_sum_over_its_paths():
    """Every path through one cell of two channels on a 3x3 image, walked one by one."""
    space = CellSpace(channels=2, cells=1, stages=1, image=3, inputs=1, classes=2)
    architecture = ("nor_conv_3x3", "none", "avg_pool_3x3", "skip_connect", "none", "nor_conv_1x1")
    tensors = space.draw(0, dtype=torch.float64)
    sigma = 1 / math.sqrt(1 + 1e-5)
    norm = torch.full((2,), sigma, dtype=torch.float64)
    net = Units()

    def convolved(units, name, padding):
        weight = tensors[name].abs()
        return net.scaled(net.conv(units, weight, name, padding=padding), norm)

    image = net.source(torch.ones(1, 3, 3))
    x = convolved(image, "stem.weight", 1)
    first = convolved(x, "blocks.0.e01.nor_conv_3x3.conv.weight", 1)
    second = {}
    for c, y, z in first:  # an average over what lies inside
        second[c, y, z] = net.new()
        near = [(c, y + dy, z + dz) for dy in (-1, 0, 1) for dz in (-1, 0, 1) if (c, y + dy, z + dz) in first]
        for at in near:
            net.connect(first[at], second[c, y, z], 1 / len(near))
    third = convolved(second, "blocks.0.e23.nor_conv_1x1.conv.weight", 0)
    for at, unit in x.items():
        net.connect(unit, third[at], 1.0)  # the skip connection ends here
    means = {}
    for c in range(2):
        means[c] = net.new()
        for (channel, _, _), unit in third.items():
            if channel == c:
                net.connect(unit, means[c], sigma / 9)
    out = net.linear(means, tensors["head.weight"].abs(), "head.weight")
    ends = set(out.values())
    total = count = summed = 0.0
    stack = [(unit, start, 0) for unit, start in net.starts.items()]
    while stack:  # all paths; a weight is an edge that has a name
        unit, value, weights = stack.pop()
        if unit in ends:
            total, count, summed = total + value, count + 1, summed + value * weights
        stack += [(to, value * w, weights + (name is not None)) for to, w, name in net.edges[unit]]
    row = next(
        pp.score_space(space, ["synflow", "log2_R", "path_count"], architectures=[architecture], weights=tensors)
    )
    assert row.scores["log2_R"] == pytest.approx(math.log2(total), abs=1e-11)
    assert row.scores["synflow"] == pytest.approx(math.log2(summed), abs=1e-11)
    assert row.scores["path_count"] == pytest.approx(math.log2(count), abs=1e-11)


# --------------------------------------------------------------------------------------------- many at once


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """A supernet, and every method's score of each architecture by itself, by flows forward and backward."""
    tensors, scores = drawn(SMALL), {}
    for architecture in SAMPLE:
        network = cell_network(SMALL, tensors, architecture)
        total, _ = path_scores(network, biases="drop")
        count, _ = path_scores(network, WeightMap.ONE, "paths")
        scores[name_of(architecture)] = [slope(network), float(total), float(count), log2_trace(network)]
    return tensors, scores


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [5, 128])
def test_rows_are_the_architectures_alone(alone, dtype, batch):
    tensors, wanted = alone
    given = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    methods = ["synflow", "log2_R", "path_count", "path_kernel_trace"]
    rows = {r.name: r for r in pp.score_space(SMALL, methods, architectures=SAMPLE, weights=given, batch=batch)}
    close = 1e-11 if dtype == torch.float64 else 1e-5
    assert len(rows) == len(SAMPLE)
    for name, row in rows.items():
        assert [row.scores[method] for method in methods] == pytest.approx(wanted[name], abs=close)


@pytest.mark.cuda
def test_a_gpu_finds_the_same():
    tensors = SMALL.draw(0)
    methods = ["synflow", "path_count", "path_kernel_trace"]
    here = list(pp.score_space(SMALL, methods, architectures=SAMPLE, weights=tensors))
    there = list(pp.score_space(SMALL, methods, architectures=SAMPLE, weights=tensors, device="cuda"))
    for mine, other in zip(there, here, strict=True):
        assert (mine.name, mine.flags) == (other.name, other.flags)
        assert mine.scores == pytest.approx(other.scores, abs=1e-4)


def test_ranks_are_those_of_float64_and_of_exported_modules():
    chosen = random.Random(3).sample(list(SMALL), 150)
    drawn_once = SMALL.draw(5)
    doubled = {name: tensor.double() for name, tensor in drawn_once.items()}
    single = list(pp.score_space(SMALL, architectures=chosen, weights=drawn_once))
    double = list(pp.score_space(SMALL, architectures=chosen, weights=doubled))
    order = [row.name for row in sorted(single, key=lambda row: (row.scores["synflow"], row.name))]
    exact = {row.name: row.scores["synflow"] for row in double}
    values = [exact[name] for name in order]
    assert all(a <= b or a - b < 1e-12 for a, b in pairwise(values))
    assert (
        max(abs(row.scores["synflow"] - exact[row.name]) for row in single if row.scores["synflow"] > -math.inf) < 2e-6
    )
    for architecture in chosen[:3]:
        model = module(SMALL, architecture, doubled)
        exported = PathNetwork.from_module(model, torch.ones(1, 3, 16, 16, dtype=torch.float64))
        assert exact[name_of(architecture)] == pytest.approx(slope(exported), abs=1e-11)


def test_dead_cells_are_flagged_and_score_nothing():
    rows = {row.name: row for row in pp.score_space(SMALL, "synflow", architectures=SAMPLE)}
    for architecture in (NOTHING, DEAD_END):
        row = rows[name_of(architecture)]
        assert row.scores == {"synflow": -math.inf}
        assert row.flags == ("disconnected", "zero_score")
    assert rows[name_of(FULL)].flags == ()


def test_fresh_weights_are_the_architecture_s_own():
    chosen = SAMPLE[1:6]
    rows = {row.name: row for row in pp.score_space(SMALL, architectures=chosen, weights="fresh", seed=7)}
    for architecture in chosen:
        tensors = SMALL.draw(7 * 15625 + index_of(architecture), SMALL.shapes(architecture))
        tensors = {name: tensor.double() for name, tensor in tensors.items()}
        wanted = slope(cell_network(SMALL, tensors, architecture))
        assert rows[name_of(architecture)].scores["synflow"] == pytest.approx(wanted, abs=1e-5)
    again = {row.name: row for row in pp.score_space(SMALL, architectures=chosen[::-1], weights="fresh", seed=7)}
    assert again == rows
    other = pp.score_space(SMALL, architectures=[FULL], weights="fresh", seed=8)
    assert next(iter(other)).scores != rows[name_of(FULL)].scores


def test_weights_of_any_size_keep_their_exponents():
    """Layers of 1e-30 and 1e25, and a unit without weights: float32 alone would be 0 or infinite."""
    space = CellSpace(channels=2, cells=3, stages=2, image=4)
    tensors = space.draw(0, dtype=torch.float64)
    for k, name in enumerate(n for n in tensors if n.endswith("conv.weight")):
        tensors[name] = tensors[name] * (1e-30, 1e25, 1.0)[k % 3]
        tensors[name][0] = 0 if k % 5 == 0 else tensors[name][0]
    chosen = [CHAIN, FULL, *random.Random(4).sample(list(space), 20)]
    single = {name: tensor.float() for name, tensor in tensors.items()}
    for method in ("synflow", "log2_R"):
        for row in pp.score_space(space, method, architectures=chosen, weights=single):
            network = cell_network(space, tensors, architecture_of(row.name))
            wanted = slope(network) if method == "synflow" else float(path_scores(network, biases="drop")[0])
            assert row.scores[method] == pytest.approx(wanted, abs=1e-4)


def test_only_what_matters_is_computed():
    network = cell_network(SMALL, SMALL.draw(0))
    flow = RoutedFlow(network, WeightMap.ABS, PATHS)
    both = flow._planned([switches(CHAIN), switches(CHAIN), switches(NOTHING), switches(DEAD_END)])
    rows = Counter(both[k].count for k in flow._order if network.nodes[k].where.startswith("e"))
    assert set(rows) == {0, 1}  # two equal architectures share a row; of the dead ones nothing is left
    assert rows[1] == 3 * SMALL.cells * SMALL.stages


def test_a_flow_refuses_nodes_it_does_not_know():
    other = PathNetwork.from_module(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)), torch.ones(1, 4))
    with pytest.raises(ValueError, match="RoutedFlow: network: wanted nodes it knows, got Norm"):
        RoutedFlow(other, WeightMap.ABS, PATHS)
    with pytest.raises(ValueError, match="RoutedFlow: derivative: wanted one of"):
        RoutedFlow(cell_network(SMALL, SMALL.draw(0)), WeightMap.ABS, PATHS, "slope")


# ---------------------------------------------------------------------------------------------- rows and files


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "snip"}, "score_space: method: wanted different ones of"),
        ({"method": ["synflow", "synflow"]}, "score_space: method: wanted different ones of"),
        ({"method": []}, "score_space: method: wanted different ones of"),
        ({"weights": "new"}, "score_space: weights: wanted 'shared', 'fresh' or tensors, got 'new'"),
        ({"weights": {}}, r"tensors: 'stem.weight': wanted shape \(4, 3, 3, 3\), got None"),
        ({"batch": 0}, "score_space: batch: wanted at least 1, got 0"),
        ({"architectures": [FULL, FULL]}, "score_space: architectures: wanted different ones, got 1 twice"),
        ({"architectures": [("none",)]}, "architecture: wanted 6 operations"),
    ],
)
def test_bad_calls_leave_no_file(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        pp.score_space(SMALL, **options, results=tmp_path / "scores.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_goes_on(tmp_path):
    path = tmp_path / "scores.jsonl"
    whole = {row.name: row for row in pp.score_space(SMALL, architectures=SAMPLE, batch=4)}
    rows = pp.score_space(SMALL, architectures=SAMPLE, batch=4, results=path)
    first = [next(rows) for _ in range(7)]
    rows.close()
    assert len(path.read_text().splitlines()) == 1 + 7
    again = list(pp.score_space(SMALL, architectures=SAMPLE, batch=4, results=path))
    assert again[:7] == [row for row in again if row.name in {r.name for r in first}]
    assert {row.name for row in again} == set(whole) and len(again) == len(SAMPLE)
    for row in again:
        assert row.scores == pytest.approx(whole[row.name].scores, abs=1e-6)
    lines = path.read_text().splitlines()
    assert Counter(json.loads(line)["name"] for line in lines[1:]) == Counter(whole.keys())
    with pytest.raises(ValueError, match=r"wanted settings .*'seed': 1"):
        pp.score_space(SMALL, architectures=SAMPLE, seed=1, results=path)
    assert path.read_text().splitlines() == lines


def test_other_tensors_are_another_run(tmp_path):
    path = tmp_path / "scores.jsonl"
    tensors = SMALL.draw(0)
    rows = list(pp.score_space(SMALL, architectures=[FULL], weights=tensors, results=path))
    assert list(pp.score_space(SMALL, architectures=[FULL], weights=tensors, results=path)) == rows
    tensors["head.weight"] = tensors["head.weight"] * 2
    with pytest.raises(ValueError, match="wanted settings"):
        pp.score_space(SMALL, architectures=[FULL], weights=tensors, results=path)


def test_a_module_is_scored_on_data_without_an_export():
    torch.manual_seed(0)
    models = {name_of(a): CellNet(SMALL, a) for a in (CHAIN, FULL)}
    data = [(torch.randn(4, 3, 16, 16), torch.randint(10, (4,))) for _ in range(3)]
    methods = ["synflow", "snip", "zico"]
    x = torch.ones(1, 3, 16, 16)
    wanted = list(pp.score_many(models.items(), methods, data=data, example_input=x))
    got = list(pp.score_many([(n, network_of(m)) for n, m in models.items()], methods, data=data))
    for mine, other in zip(got, wanted, strict=True):
        assert mine.scores == pytest.approx(other.scores, rel=1e-5)
        assert isinstance(mine, NetworkScore)


def test_randomised_norms_shift_no_path():
    """Trained norms have shifts; the routed flow drops them, as ``biases="drop"`` does."""
    model = randomised(CellNet(SMALL, FULL))
    tensors = {**SMALL.draw(0, dtype=torch.float64), **model.state_dict()}
    row = next(pp.score_space(SMALL, architectures=[FULL], weights=tensors))
    assert row.scores["synflow"] == pytest.approx(slope(network_of(model)), abs=1e-11)
