"""Reports: what masks leave of a network, against counts by hand and by autograd in float64."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pathprune as pp
from pathprune import models
from pathprune.liveness import LayerReach, Reach, reach
from pathprune.ops import WeightMap
from pathprune.report import Report
from pathprune.spatial import merge_equal_positions
from pathprune.weights import weights_of


def bits(*rows: str) -> Tensor:
    """bits("101", "001") -> bool [2, 3]"""
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def chain(*sizes: int) -> pp.PathNetwork:
    """Linear layers w1, w2, ... without biases."""
    network = pp.PathNetwork()
    flow = network.add_input(1, sizes[0])
    for k, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        flow = network.add_synapse(flow, torch.randn(outputs, inputs), f"w{k}")
    return network.set_outputs(flow)


class Block(nn.Module):
    """A residual block with a projection, a block without, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4, bias=False)
        self.down = nn.Linear(4, 2, bias=False)
        self.project = nn.Linear(3, 2, bias=False)
        self.body = nn.Sequential(nn.Linear(2, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
        self.head = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(F.relu(self.up(x))) + self.project(x)
        return self.head(x + self.body(x))


def test_dead_units_and_weights_by_hand() -> None:
    # Hidden unit 0 is alive; unit 1 has no way out, unit 2 no way in; output 1 has no way in.
    masks = pp.Masks({"w1": bits("110", "100", "000"), "w2": bits("101", "000")})
    report = Report.of(masks, chain(3, 3, 2))
    first, second = report.layers
    assert first.reach == LayerReach(live=2, live_inputs=2, inputs=3, live_outputs=1, outputs=3)
    assert second.reach == LayerReach(live=1, live_inputs=1, inputs=3, live_outputs=1, outputs=2)
    assert (first.kept, second.kept, report.live) == (3, 2, 3)
    assert first.effective_density == 2 / 9
    assert report.density == 5 / 15
    assert report.effective_density == 3 / 15
    assert report.log2_paths == 1.0  # two inputs reach output 0, one way each
    assert report.collapsed_layers == report.dead_layers == report.collapsed_branches == []


def test_effective_masks_name_the_weights() -> None:
    masks = pp.Masks({"w1": bits("110", "100", "000"), "w2": bits("101", "000")})
    found = pp.path_counts(chain(3, 3, 2), masks)
    assert torch.equal(found.effective["w1"], bits("110", "000", "000"))
    assert torch.equal(found.effective["w2"], bits("100", "000"))


def test_paths_of_a_whole_network_are_counted() -> None:
    found = pp.path_counts(chain(3, 4, 2))
    assert found.log2 == pytest.approx(math.log2(3 * 4 * 2))
    assert found.effective.density == 1.0
    block = pp.path_counts(Block(), example_input=torch.ones(1, 3))
    assert block.log2 == pytest.approx(math.log2(3 * (4 + 1) * 2 * (1 + 5 * 2) * 2))


@pytest.mark.parametrize(
    ("size", "stride", "live"),
    [
        (1, 1, [4]),  # a single pixel: all but the middle of the kernel lies on padding
        (2, 2, [4, 5, 7, 8]),  # one window, its first row and column on padding
        (2, 1, range(9)),
    ],
)
def test_kernel_entries_that_see_only_padding_are_dead(size: int, stride: int, live) -> None:
    network = pp.PathNetwork()
    flow = network.add_input(1, 1, size, size)
    flow = network.add_synapse(flow, torch.randn(1, 1, 3, 3), "w", form="conv", padding=1, stride=stride)
    found = pp.path_counts(network.set_outputs(flow))
    assert found.effective["w"].flatten().nonzero().flatten().tolist() == list(live)


def test_layer_collapse_is_called_out() -> None:
    masks = pp.Masks({"w1": bits("110", "100", "000"), "w2": bits("000", "000")})
    report = Report.of(masks, chain(3, 3, 2))
    assert report.collapsed_layers == ["w2"]
    assert report.dead_layers == ["w1"]
    assert report.disconnected
    assert report.log2_paths == -math.inf
    text = str(report)
    assert "LAYER COLLAPSE: no weight is left in 'w2'." in text
    assert "NO PATH LEFT" in text
    assert json.loads(report.to_json())["log2_paths"] is None


def test_branch_collapse_is_not_layer_collapse() -> None:
    model = Block()
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    masks["body.0.weight"] = bits("10", "00", "00", "00", "00")
    masks["body.2.weight"] = bits("01111", "01111")  # leaves from units that nothing enters
    report = Report.of(pp.Masks(masks), model, torch.ones(1, 3))
    assert [side.branch.name for side in report.branches] == ["up ... down", "project", "body"]
    assert report.branches[0].branch.weights == ("up.weight", "down.weight")
    assert report.collapsed_branches == ["body"]
    assert report.collapsed_layers == []
    assert report.dead_layers == ["body.0.weight", "body.2.weight"]
    assert not report.disconnected
    body = report.branches[2]
    assert (body.weights, body.kept, body.live, body.units, body.narrowest) == (20, 9, 0, (0, 7), 0)
    assert "BRANCH COLLAPSE: no path runs any more through 'body'" in str(report)

    masks["body.2.weight"] = bits("01111", "11111")
    report = Report.of(pp.Masks(masks), model, torch.ones(1, 3))
    assert report.collapsed_branches == report.dead_layers == []
    assert "Nothing collapsed" in str(report)
    assert report.branches[2].narrowest == 1

    # Flow enters the branch and comes out at unit 0, but the head reads unit 1 alone.
    masks["body.2.weight"] = bits("11111", "00000")
    masks["head.weight"] = bits("01", "01")
    report = Report.of(pp.Masks(masks), model, torch.ones(1, 3))
    assert report.collapsed_branches == ["body"]
    assert not report.disconnected


def test_a_projection_that_is_cut_leaves_the_block_alive() -> None:
    model = Block()
    masks = pp.Masks.ones(model)
    cut = pp.Masks({**masks, "project.weight": torch.zeros(2, 3, dtype=torch.bool)})
    report = Report.of(cut, model, torch.ones(1, 3))
    assert report.collapsed_branches == ["project"]
    assert report.collapsed_layers == ["project.weight"]
    assert report.branches[0].live == 4 * 3 + 2 * 4
    assert "BRANCH COLLAPSE" in str(report)
    assert "LAYER COLLAPSE" not in str(report)  # told once


def test_sums_of_unrelated_flows_are_no_branches() -> None:
    network = pp.PathNetwork()
    left = network.add_synapse(network.add_input(1, 3), torch.randn(2, 3), "left")
    right = network.add_synapse(network.add_input(1, 4), torch.randn(2, 4), "right")
    network.set_outputs(network.add_sum(left, right))
    assert pp.path_counts(network).branches == ()


def test_a_tied_weight_is_alive_where_any_use_is() -> None:
    network = pp.PathNetwork()
    weight = torch.randn(3, 3)
    flow = network.add_input(1, 3)
    for _ in range(2):
        flow = network.add_synapse(flow, weight, "w")
    network.set_outputs(flow)
    found = pp.path_counts(network, pp.Masks({"w": bits("000", "100", "010")}))  # 0 -> 1 -> 2
    assert found.log2 == 0.0
    assert torch.equal(found.effective["w"], bits("000", "100", "010"))
    assert found.layers["w"] == LayerReach(live=2, live_inputs=2, inputs=3, live_outputs=2, outputs=3)
    alone = pp.path_counts(network, pp.Masks({"w": bits("000", "100", "000")}))  # 0 -> 1 and no further
    assert alone.layers["w"].live == 0


class Mixed(nn.Module):
    """Every form of weight: strided, grouped and transposed convolution, linear maps over many positions."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.group = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.back = nn.ConvTranspose2d(10, 4, 2, stride=2, groups=2, bias=False)
        self.mix = nn.Linear(4, 5)
        self.table = nn.Parameter(torch.randn(5, 3))  # [in, out]
        self.head = nn.Linear(3 * 64 if form == "flat" else 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.back(torch.cat([x, self.group(x)], 1))
        x = self.mix(x.flatten(2).transpose(1, 2)) @ self.table
        return self.head(x.flatten(1) if self.form == "flat" else x)


def counted_by_autograd(model: nn.Module, masks: pp.Masks, x: Tensor) -> tuple[float, dict[str, Tensor]]:
    """log2 of the number of paths and the weights on one: R and dR/dm of the 0/1 network, in float64."""
    whole = copy.deepcopy(model).double().eval()
    for name, p in whole.named_parameters():
        p.data = masks[name].double() if name in masks else torch.zeros_like(p)
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_(1.0)
            module.eps = 0.0
            module.reset_running_stats()
    total = whole(x.double()).sum()
    total.backward()
    alive = {name: (p.grad * p > 0) for name, p in whole.named_parameters() if name in masks}
    return float(total.detach().log2()), alive


@pytest.mark.parametrize("form", ["flat", "tokens"])
@pytest.mark.parametrize("density", [0.3, 0.2])
@pytest.mark.parametrize("merged", [False, True])
def test_reachability_is_that_of_autograd(form: str, density: float, merged: bool) -> None:
    torch.manual_seed(3)
    model, x = Mixed(form).eval(), torch.ones(1, 2, 8, 8)
    network = pp.PathNetwork.from_module(model, x)
    shapes = {name: network.tensors[name].shape for name in network.prunable}
    masks = pp.Masks({name: torch.rand(shape) < density for name, shape in shapes.items()})
    log2, alive = counted_by_autograd(model, masks, x)
    if merged:
        network = merge_equal_positions(network)
    weights = weights_of(network, network.prunable, (WeightMap.ABS, WeightMap.ABS), masks=masks)
    found = reach(network, weights, keep_bits=True)
    effective = pp.Masks.from_packed(found.packed)
    assert effective == pp.Masks(alive)
    units = {
        "stem.weight": (alive["stem.weight"].any((0, 2, 3)), alive["stem.weight"].any((1, 2, 3))),
        "group.weight": (
            alive["group.weight"].view(2, 3, 2, 9).any(3).any(1),
            alive["group.weight"].any((1, 2, 3)),
        ),
        "back.weight": (
            alive["back.weight"].any((1, 2, 3)),
            alive["back.weight"].view(2, 5, 2, 4).any(3).any(1),
        ),
        "table": (alive["table"].any(1), alive["table"].any(0)),
        "mix.weight": (alive["mix.weight"].any(0), alive["mix.weight"].any(1)),
    }
    for name, (inputs, outputs) in units.items():
        counts = (int(inputs.sum()), inputs.numel(), int(outputs.sum()), outputs.numel())
        assert found.layers[name] == LayerReach(int(alive[name].sum()), *counts), name
    assert 0 < effective.kept < masks.kept
    assert pp.path_counts(model, masks, x).log2 == pytest.approx(log2, abs=1e-5)


def test_small_counts_beside_large_ones_do_not_vanish() -> None:
    """One path beside 2^300 of them, past three concatenations: in float32 its flow underflows to zero."""
    network = pp.PathNetwork()
    flow = network.add_input(1, 16)
    first = network.add_wire([flow], lambda xs, p: xs[0][:, :1])
    for stage in range(3):
        for k in range(25):
            flow = network.add_synapse(flow, torch.randn(16, 16), f"w{stage}.{k}")
        first = network.add_cat(first, flow)
    flow = network.add_synapse(first, torch.randn(1, first_width := network.nodes[first].shape[1]), "head")
    network.set_outputs(flow)
    only = torch.zeros(1, first_width, dtype=torch.bool)
    only[0, 0] = True
    found = pp.path_counts(network, pp.Masks({"head": only}))
    assert found.layers["head"].live == 1
    assert found.layers["w0.0"].live == 0


def test_findings_travel_with_the_masks(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = models.resnet_cifar(8).eval(), torch.ones(1, 3, 16, 16)
    masks = pp.prune(model, pp.SynFlow(rounds=4), density=0.05, example_input=x)
    masks.save(tmp_path / "masks.safetensors")
    loaded = pp.Masks.load(tmp_path / "masks.safetensors").report()
    anew = masks.report(model, x)
    assert [layer.reach for layer in loaded.layers] == [layer.reach for layer in anew.layers]
    assert [side.branch for side in loaded.branches] == [side.branch for side in anew.branches]
    assert len(loaded.branches) == 5
    assert loaded.live == anew.live > 0
    assert len(loaded.findings["kept"]) == loaded.findings["rounds"] == 4
    assert loaded.findings["kept"][-1] == masks.kept
    assert "4 rounds, exponential schedule" in str(loaded)


@pytest.mark.parametrize("pruner", [pp.SynFlow(rounds=3), pp.Magnitude(), pp.Random(), pp.TraceSaliency(rounds=2)])
def test_every_pruner_leaves_findings(pruner: pp.Pruner) -> None:
    torch.manual_seed(0)
    model, x = models.mobilenet_tiny().eval(), torch.ones(1, 3, 16, 16)
    lists = pp.prune(model, pruner, density=[0.6, 0.3] if pruner.rounds > 1 else [0.3], example_input=x)
    for masks in lists:
        found = masks.report()
        assert [layer.reach for layer in found.layers] == [layer.reach for layer in masks.report(model, x).layers]


def test_derived_masks_do_not_keep_findings() -> None:
    masks = pp.prune(chain(6, 5, 4), pp.SynFlow(rounds=3), density=0.3)
    assert masks.report().live is not None
    derived = (masks & masks.shuffle(1)).report()
    assert derived.live is None
    assert "effective density not known" in str(derived)
    assert json.loads(derived.to_json())["effective_density"] is None


def test_masks_of_another_model_are_refused() -> None:
    with pytest.raises(pp.MaskMismatchError, match="w1"):
        Report.of(pp.Masks({"w1": bits("11", "11")}), chain(3, 3, 2))
    with pytest.raises(pp.MaskMismatchError, match="nothing"):
        Report.of(pp.Masks({"nothing": bits("1")}), chain(3, 3, 2))
    with pytest.raises(ValueError, match="example_input"):
        Report.of(pp.Masks.ones(Block()), Block())


def test_the_model_is_not_touched() -> None:
    model = Block().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    pp.path_counts(model, pp.Masks.ones(model), torch.ones(1, 3))
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------------ text and picture


def many_layers(count: int, collapsed: tuple[int, ...] = ()) -> Report:
    names = [
        f"segmenter.backbone.encoder.stages.{k // 9}.layers.{k // 3 % 3}.layer.{k % 3}.convolution"
        for k in range(count)
    ]
    masks, layers = {}, {}
    for k, name in enumerate(names):
        mask = torch.rand(64, 32, generator=torch.Generator().manual_seed(k)) < 0.5 / (k + 1)
        mask &= k not in collapsed
        masks[f"{name}.weight"] = mask
        live = int(mask.sum())
        layers[f"{name}.weight"] = LayerReach(live, 32 if live else 0, 32, int(mask.any(1).sum()), 64)
    structure = Reach(layers, (), {}).as_dict()
    return Report.of(pp.Masks(masks, {"method": "SynFlow", "findings": {"structure": structure}}))


def test_the_table_fits_and_names_stay_apart() -> None:
    text = str(many_layers(60, collapsed=tuple(range(20, 31))))
    assert max(map(len, text.splitlines())) <= 110
    rows = [line for line in text.splitlines() if "convolution  " in line]
    assert len({row.split()[0] for row in rows}) == 60
    assert "and 5 more" in text


def test_json_holds_the_whole_report(tmp_path) -> None:
    report = many_layers(3, collapsed=(1,))
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text
    read = json.loads(text)
    assert [layer["kept"] for layer in read["layers"]] == [layer.kept for layer in report.layers]
    assert read["collapsed_layers"] == [report.layers[1].name]
    assert read["masks"]["method"] == "SynFlow"


@pytest.mark.parametrize("count", [1, 5, 60])
def test_the_plot_shows_every_layer(tmp_path, count: int) -> None:
    pytest.importorskip("matplotlib")
    collapsed = (1,) if count > 1 else ()
    report = many_layers(count, collapsed)
    axes = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    densities, widths = axes.figure.axes
    assert [bar.get_width() for bar in densities.patches] == [layer.density for layer in report.layers]
    assert [bar.get_width() for bar in widths.patches] == [layer.reach.live_outputs / 64 for layer in report.layers]
    notes = [text.get_text() for text in densities.texts]
    assert notes == ["no weight left"] * len(collapsed)
    figure, drawn = axes.figure, axes.figure.canvas.get_renderer()
    boxes = [label.get_window_extent(drawn) for label in densities.get_yticklabels()]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    figure.draw_without_rendering()
    ticks = [*densities.get_xticklabels(), *densities.get_xticklabels(minor=True)]
    shown = sorted((tick.get_window_extent(drawn) for tick in ticks if tick.get_text()), key=lambda box: box.x0)
    assert len(shown) > 1
    assert not any(a.overlaps(b) for a, b in pairwise(shown))


def test_the_plot_draws_into_given_axes() -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure()
    left, right = figure.subplots(1, 2)
    assert many_layers(4).plot(ax=right) is right
    assert not left.patches
    unknown = Report.of(pp.Masks({"a": bits("10"), "b": bits("11")}))
    plain = figure_module.Figure().subplots()
    assert len(unknown.plot(ax=plain).figure.axes) == 1
