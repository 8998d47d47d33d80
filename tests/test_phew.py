"""PHEW as a pruner: masks, densities, report, errors; the path kernel's trace by enumeration."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import pathprune as pp
from enumeration import Units
from pathprune import cli, models
from pathprune.path_kernel import log2_trace


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)).to(dtype)


X = torch.ones(1, 20)


def test_the_density_is_reached_with_at_most_one_path_over():
    for density in (0.01, 0.1, 0.5, 0.9, 1.0):
        masks = pp.prune(net(), pp.PHEW(), density=density, example_input=X)
        target = round(density * masks.total)
        found = masks.metadata["findings"]
        assert masks.kept == target + found["overshoot"]
        assert 0 <= found["overshoot"] < 3
        assert (found["walks"] > 0) == (density < 1)
        assert pp.prune(net(), pp.PHEW(trim=True), density=density, example_input=X).kept == target


def test_masks_of_a_list_of_densities_are_nested_and_those_of_each():
    densities = [1.0, 0.5, 0.2, 0.02]
    several = pp.prune(net(), pp.PHEW(), density=densities, example_input=X, seed=4)
    for larger, smaller in itertools.pairwise(several):
        assert not any(bool((smaller[name] & ~larger[name]).any()) for name in smaller)
    for density, masks in zip(densities, several, strict=True):
        alone = pp.prune(net(), pp.PHEW(), density=density, example_input=X, seed=4)
        assert all(torch.equal(masks[name], alone[name]) for name in masks)


def test_effective_is_direct_density_and_the_model_is_untouched():
    model = models.resnet20()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    masks = pp.prune(model, pp.PHEW(), density=0.02, example_input=torch.ones(1, 3, 32, 32))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    report = masks.report()
    assert "all on a path" in str(report)
    found = json.loads(report.to_json())["findings"]
    assert f"{found['walks']:,} walks" in str(report)
    assert f"2^{found['log2_path_kernel_trace']:.4g}" in str(report)


def test_the_report_says_how_often_units_are_visited():
    model, x = models.resnet20(), torch.ones(1, 3, 32, 32)
    for kept in pp.prune(model, pp.PHEW(), density=[0.05, 0.01], example_input=x):
        visits, walks = kept.metadata["findings"]["unit_visits"], kept.metadata["findings"]["walks"]
        assert set(visits) == set(kept)
        head = next(name for name in kept if kept[name].dim() == 2)
        assert visits[head][1] * len(kept[head]) == walks  # every walk begins or ends there
        for name, width in kept.widths().items():
            least, mean = visits[name]
            assert (least > 0) == (width.live_rows == width.rows)
            assert least <= mean
            assert mean * width.rows >= kept.counts()[name].kept
        assert f"{visits[head][1]:,.4g}, {visits[head][0]:,}" in str(kept.report())
    assert "unit_visits" not in pp.prune(net(), pp.PHEW(), density=1.0, example_input=X).metadata["findings"]
    assert "visits" not in str(pp.prune(net(), pp.Magnitude(), density=0.5, example_input=X).report())


def test_the_seed_alone_decides():
    first = pp.prune(net(), pp.PHEW(), density=0.1, example_input=X, seed=1)
    torch.manual_seed(99)
    again = pp.prune(net(), pp.PHEW(), density=0.1, example_input=X, seed=1)
    other = pp.prune(net(), pp.PHEW(), density=0.1, example_input=X, seed=2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_bfloat16_weights_are_walked_as_they_are():
    low = net(torch.bfloat16)
    wide = net()
    wide.load_state_dict({name: tensor.float() for name, tensor in low.state_dict().items()})
    a = pp.prune(low, pp.PHEW(), density=0.1, example_input=X.bfloat16())
    b = pp.prune(wide, pp.PHEW(), density=0.1, example_input=X)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_larger_weights_are_kept_more_often():
    model = net()
    mean = {}
    for power in (2, 1, 0, -1):
        masks = pp.prune(model, pp.PHEW(power=power), density=0.1, example_input=X)
        weights = dict(model.named_parameters())
        kept = torch.cat(
            [weights[name].detach()[mask].abs() / weights[name].detach().abs().mean() for name, mask in masks.items()]
        )
        mean[power] = float(kept.mean())
    assert mean[2] > mean[1] > mean[0] > mean[-1]


@pytest.mark.parametrize("power", [1, 2])
def test_exact_paths_keep_whole_paths(power):
    torch.manual_seed(0)
    model = models.resnet20()
    masks = pp.prune(
        model, pp.PHEW(bias="flow", power=power), density=[0.05, 0.01], example_input=torch.ones(1, 3, 32, 32)
    )
    for kept in masks:
        assert "all on a path" in str(kept.report())
        assert 0 <= kept.metadata["findings"]["overshoot"] < 22
    assert not any(bool((masks[1][name] & ~masks[0][name]).any()) for name in masks[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 3}, "PHEW: power: wanted one of"),
        ({"branches": "coin"}, "PHEW: branches: wanted one of"),
        ({"start": "anywhere"}, "PHEW: start: wanted one of"),
        ({"bias": "mass"}, "PHEW: bias: wanted None or 'flow'"),
        ({"bias": "flow", "identities": True}, "PHEW: bias: 'flow' wanted power 1 or 2"),
        ({"bias": "flow", "power": 0}, "PHEW: bias: 'flow' wanted power 1 or 2"),
        ({"max_walks": 0}, "PHEW: max_walks: wanted at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pp.PHEW(**options)


def test_bad_weights_scopes_and_targets_are_refused():
    model = net()
    with torch.no_grad():
        model[2].weight[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"'2\.weight': wanted finite values"):
        pp.prune(model, pp.PHEW(), density=0.1, example_input=X)
    with pytest.raises(ValueError, match="PHEW: wanted scope='global'"):
        pp.prune(net(), pp.PHEW(), density=0.1, example_input=X, scope="layer")
    with pytest.raises(ValueError, match="PHEW: wanted scope='global' and count='exact'"):
        pp.prune(net(), pp.PHEW(), density=0.1, example_input=X, count="published")
    dead = net()
    with torch.no_grad():
        dead[0].weight[:, :10] *= (torch.arange(40) < 20).float()[:, None]
    with pytest.raises(ValueError, match=r"walks can take .* of .* weights .*0\.weight"):
        pp.prune(dead, pp.PHEW(), density=0.999, example_input=X)


def test_the_command_knows_it(tmp_path):
    out = tmp_path / "out"
    command = ["prune", "--model", "pathprune.models:resnet20", "--method", "phew", "--density", "0.05"]
    done = CliRunner().invoke(cli.app, [*command, "--input-shape", "1,3,32,32", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert pp.Masks.load(out / "masks.safetensors").metadata["method"] == "PHEW"


# ------------------------------------------------------------------------------------- the trace


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 2, bias=False), nn.Conv2d(2, 2, 1, bias=False)
        self.c = nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.c((x + torch.relu(self.b(x))).flatten(1))


def test_the_trace_is_the_sum_over_all_paths_and_their_weights():
    torch.manual_seed(0)
    model = Small().double()
    network = pp.PathNetwork.from_module(model, torch.ones(1, 2, 3, 3, dtype=torch.float64))
    units = Units()
    x = units.source(torch.ones(2, 3, 3))
    x = units.conv(x, model.a.weight, "a.weight")
    x = units.linear(units.flat(units.added(x, units.conv(x, model.b.weight, "b.weight"))), model.c.weight, "c.weight")
    flat = {name: p.detach().flatten() for name, p in model.named_parameters()}
    masks = {name: torch.rand(p.shape) < 0.7 for name, p in model.named_parameters()}
    for given in (None, masks):
        trace = 0.0
        for value, weights in units.paths(x):
            if given is None or all(bool(given[name].flatten()[k]) for name, k in weights):
                trace += sum((value / float(flat[name][k])) ** 2 for name, k in weights)
        assert log2_trace(network, given) == pytest.approx(math.log2(trace), abs=1e-12)
