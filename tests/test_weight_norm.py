"""Weight norm over other axes than rows is a fixed map: float64 autograd, the model itself; over rows it is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import pathprune as pp
from pathprune.network import PathNetwork, UnsupportedModelError
from pathprune.ops import WeightMap
from test_conservation import assert_every_cut_carries_all
from test_expert_rules import by_hand
from test_recording import drawn, is_the_model


class Normed(nn.Module):
    """A convolution normed along its last axis, as speech models place words with, and a linear layer."""

    def __init__(self, legacy: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.utils.weight_norm if legacy else weight_norm
        self.conv = norm(nn.Conv1d(4, 6, 3, padding=1, groups=2), dim=2)
        self.last = nn.Linear(6, 2, bias=False)
        self.double()
        for name, p in self.named_parameters():
            if name.endswith(("original0", "weight_g")):
                p.data.normal_()  # of either sign

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(x)).mT)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("f", [WeightMap.ABS, WeightMap.SQUARE])
def test_over_another_axis_it_is_a_fixed_map(f: WeightMap, legacy: bool) -> None:
    model, x = Normed(legacy), torch.rand(1, 4, 5).double()
    network = PathNetwork.from_module(model, x)
    assert network.prunable == ("last.weight",)
    fixed = model(x) is not None and model.conv.weight.detach().abs() ** (1 if f is WeightMap.ABS else 2)

    def forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(F.conv1d(x, fixed, padding=1, groups=2).mT, w["last.weight"])

    by_hand(model, forward, f, x)
    assert_every_cut_carries_all(network, "published", f)
    is_the_model(model, drawn(3, 4, 5))
    masks = pp.prune(model.float(), pp.SynFlow(rounds=3), density=0.4, example_input=x.float(), progress=False)
    masks.apply_(model)
    assert bool(model(x.float()).isfinite().all())


def test_over_rows_it_is_refused() -> None:
    """A row of which all is pruned would be 0 / 0."""
    for layer, operator in ((nn.Linear(4, 4), "linear"), (nn.Conv1d(4, 4, 1), "conv1d")):
        model, x = nn.Sequential(weight_norm(layer)), torch.ones(1, 4, 4)
        model[0].parametrizations.weight.original1.data[0] = 0
        assert bool(model(x).isnan().any())
        with pytest.raises(UnsupportedModelError, match=rf"aten\.{operator} .*computed by .*remove_parametrizations"):
            PathNetwork.from_module(model, x)
