"""Scans whose states decay by what data say: every path by hand, float64 autograd, the model itself, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathprune as pp
from pathprune.network import PathNetwork
from pathprune.ops import WeightMap
from test_attention import scored
from test_expert_rules import assert_refused, by_hand
from test_recording import drawn, is_the_model, through_gates
from test_transformers import half

TOKENS, WIDTH, STATES = 3, 2, 2


class Decaying(nn.Module):
    """``h_t = exp(-softplus(D x_t + d)) h_(t-1) + B x_t``, ``y_t = C h_t``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.d, self.b = nn.Linear(WIDTH, STATES), nn.Linear(WIDTH, STATES, bias=False)
        self.c = nn.Linear(STATES, WIDTH, bias=False)
        self.double()

    def decays(self, x: Tensor) -> Tensor:
        return torch.exp(-F.softplus(self.d(x)))

    def forward(self, x: Tensor) -> Tensor:
        decays, entering = self.decays(x), self.b(x)
        state, made = torch.zeros(len(x), STATES, dtype=x.dtype), []
        for k in range(x.shape[1]):
            state = decays[:, k] * state + entering[:, k]
            made.append(self.c(state))
        return torch.stack(made, 1)


def paths_of(
    model: Decaying, decays: list[list[float]]
) -> list[tuple[int, int, int, int, float, float, tuple[int, int, int]]]:
    """Every path: token and unit of its begin and of its end, gate, value, and the units that name its weights."""
    b, c = model.b.weight.tolist(), model.c.weight.tolist()
    found = []
    for j, t in itertools.combinations_with_replacement(range(TOKENS), 2):
        for i, s, o in itertools.product(range(WIDTH), range(STATES), range(WIDTH)):
            gate = 1.0
            for between in range(j + 1, t + 1):
                gate *= decays[between][s]
            found.append((j, i, t, o, gate, b[s][i] * c[o][s], (i, s, o)))
    return found


def test_every_path_of_a_scan() -> None:
    """Data-free decays are those of the bias; with data those of the sample, squared where paths are counted."""
    model, x = Decaying(), drawn(4, TOKENS, WIDTH, seed=1)
    network = PathNetwork.from_module(model, x)
    assert network.prunable == ("b.weight", "c.weight")  # of what decays are computed from no weight is on a path
    at_rest = torch.exp(-F.softplus(model.d.bias.detach())).tolist()
    for f, power in ((WeightMap.ABS, 1), (WeightMap.SQUARE, 2)):
        total, slopes = 0.0, {name: torch.zeros(2, 2).double() for name in network.prunable}
        for _, _, _, _, gate, value, (i, s, o) in paths_of(model, [at_rest] * TOKENS):
            amount = (gate * abs(value)) ** power
            total += amount
            slopes["b.weight"][s, i] += amount
            slopes["c.weight"][o, s] += amount
        log2_total, scores, _ = scored(network, f=f)
        assert 2**log2_total == pytest.approx(total, rel=1e-12)
        for name, slope in slopes.items():
            torch.testing.assert_close(scores[name], slope, rtol=1e-12, atol=0)
    signed, data = (through_gates(model, x, f)[0] for f in (WeightMap.IDENTITY, WeightMap.ONE))
    torch.testing.assert_close(signed, model(x).detach(), rtol=1e-12, atol=1e-14)
    for n, sample in enumerate(x):
        g = torch.zeros(TOKENS, WIDTH).double()
        for j, i, t, o, gate, _, _ in paths_of(model, model.decays(sample).tolist()):
            g[t, o] += float(sample[j, i]) ** 2 * gate**2
        torch.testing.assert_close(data[n], g, rtol=1e-12, atol=0)


def test_kernel_is_that_of_detached_decays() -> None:
    model, x = Decaying(), drawn(2, TOKENS, WIDTH, seed=2)
    found = pp.ntk(model, x, hold_gates=True)
    leaves, rows = [model.b.weight, model.c.weight], []
    decays = model.decays
    model.decays = lambda x: decays(x).detach()  # type: ignore[method-assign]
    for out in model(x).flatten():
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(out, leaves, retain_graph=True)]))
    jacobian = torch.stack(rows).unflatten(0, (2, -1))
    torch.testing.assert_close(found, torch.einsum("nki,mli->nkml", jacobian, jacobian), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"move by steps alone .*, got .*\(mul\)"):
        pp.ntk(Decaying(), x)


# -------------------------------------------------------------------------------------------- a selective scan


class Selective(nn.Module):
    """One S6 layer: steps, inputs' and outputs' maps chosen by the token, a skip, gated by SiLU."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.enter, self.leave = nn.Linear(3, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 3, bias=False)
        self.maps = nn.Linear(WIDTH, WIDTH + 2 * STATES, bias=False)
        self.step = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.bias, self.log_a, self.d = (nn.Parameter(torch.randn(s)) for s in (WIDTH, (WIDTH, STATES), WIDTH))
        self.written = written
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.enter(x).chunk(2, -1)
        dt, b, c = self.maps(u).split([WIDTH, STATES, STATES], -1)
        dt = F.softplus((self.step @ dt.mT).mT + self.bias)
        logs = dt.unsqueeze(-1) * -torch.exp(self.log_a)
        if self.written:
            decay, given = torch.exp(logs), dt.unsqueeze(-1) * b.unsqueeze(2) * u.unsqueeze(-1)
            state, made = torch.zeros(len(x), WIDTH, STATES, dtype=x.dtype), []
            for k in range(x.shape[1]):
                state = decay[:, k] * state + given[:, k]
                made.append((state @ c[:, k].unsqueeze(-1)).squeeze(-1))
            y = torch.stack(made, 1)
        else:  # all pairs of tokens at once
            sums = logs.cumsum(1)
            apart = sums.unsqueeze(2) - sums.unsqueeze(1)  # [N, t, j, channels, states]
            ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            lasting = torch.exp(apart.masked_fill(ahead[:, :, None, None], -torch.inf))
            given = dt.unsqueeze(-1) * b.unsqueeze(2) * u.unsqueeze(-1)
            state = torch.einsum("ntjds,njds->ntds", lasting, given)
            y = torch.einsum("ntds,nts->ntd", state, c)
        return self.leave((y + u * self.d) * F.silu(z))


def flow_of(w: dict[str, Tensor], x: Tensor, power: int) -> Tensor:
    """The layer's path flow; log_a, bias and d are as they are."""
    u, z = (x[0] @ w["enter.weight"].T).chunk(2, -1)
    dt, b, c = (u @ w["maps.weight"].T).split([WIDTH, STATES, STATES], -1)
    dt = dt @ w["step"].T
    decay = torch.exp(-w["plain log_a"].exp() * F.softplus(w["plain bias"]).unsqueeze(-1)) ** power
    both = half(dt.unsqueeze(-1), b.unsqueeze(1), torch.mul)
    given = half(both, u.unsqueeze(-1), torch.mul)
    state, made = torch.zeros(WIDTH, STATES).double(), []
    for k in range(len(u)):
        state = decay * state + given[k]
        made.append(half(state, c[k], lambda a, b: (a * b).sum(-1)))
    y = torch.stack(made) + u * w["plain d"].abs() ** power
    return half(y, z, torch.mul) @ w["leave.weight"].T


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("f", [WeightMap.ABS, WeightMap.SQUARE])
def test_a_selective_scan_is_autograd_of_its_rules(f: WeightMap, written: bool) -> None:
    model = Selective(written)
    plain = {f"plain {name}": p.detach() for name, p in model.named_parameters()}
    power = 1 if f is WeightMap.ABS else 2
    x = torch.rand(1, TOKENS, 3).double()
    assert PathNetwork.support_report(model, x)
    assert PathNetwork.from_module(model, x).prunable == ("step", "enter.weight", "leave.weight", "maps.weight")
    by_hand(model, lambda w, x: flow_of(w | plain, x, power), f, x)


@pytest.mark.parametrize("written", [True, False])
def test_signed_flow_is_a_selective_scan(written: bool) -> None:
    is_the_model(Selective(written), drawn(3, TOKENS, 3, seed=4))


class Does(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


LINEAR = {
    "running sums": lambda m, x: m.first(x).cumsum(1),
    "a matrix first": lambda m, x: m.first.weight @ m.other(x).mT,
    "a matrix first, turned": lambda m, x: m.first.weight.T @ m.other(x).mT,
    "einsum with a decay": lambda m, x: torch.einsum("nti,ntj->nij", m.first(x), torch.exp(m.other(x))),
    "scaled by an exponential": lambda m, x: m.other(x) * torch.exp(m.first(x).tanh()),
    "decays of decays": lambda m, x: m.first(x) * (1 - torch.exp(2 * torch.log_softmax(m.other.bias, 0))).sqrt(),
    "from one": lambda m, x: m.first(x) * (1 + torch.exp(-m.other(x).square())).rsqrt(),
}
SOME = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64).abs()


@pytest.mark.parametrize("case", LINEAR)
def test_what_scans_are_written_with(case: str) -> None:
    model, x = Does(LINEAR[case]).double(), drawn(3, 3, 4, seed=7)
    (found,) = through_gates(model, x, WeightMap.IDENTITY, "published")
    wanted = torch.stack([model(sample[None]) for sample in x]).detach()
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-12, atol=1e-12)


REFUSED = {
    "added": (lambda m, x: m.first(x) + torch.exp(m.other(x)), "an exponential of a flow, other than to multiply"),
    "of the input": (lambda m, x: m.first(x) * torch.exp(x), "an exponential of the model's input itself"),
    "alone": (lambda m, x: m.first(torch.exp(m.other(x))), "no output of the model depends on"),
    "twice": (lambda m, x: torch.einsum("nii,nij->ij", m.first(x) @ x.mT, torch.exp(m.other(x))), "an axis twice in"),
    "a weight": (lambda m, x: torch.einsum("nti,ij->ntj", x, m.first.weight), "other than a product of two flows"),
    "three": (lambda m, x: torch.einsum("nti,i,i->nt", m.first(x), *SOME[0].T), "other than a product of two flows"),
    "some rows first": (lambda m, x: m.first.weight[:2] @ x.mT, "some rows of a matrix times a flow"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(case: str) -> None:
    function, message = REFUSED[case]
    model, x = Does(function).double(), torch.rand(1, 3, 4).double()
    assert_refused(model, x, message)
    if case != "alone":
        report = PathNetwork.support_report(model, x)
        assert not report and message in str(report)
