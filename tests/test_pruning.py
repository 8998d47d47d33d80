"""``prune`` end to end: against autograd on a positive copy of the model, in float64, with sorting for selection."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pathprune as pp
from pathprune import pruning, weights
from pathprune.network import PathNetwork
from pathprune.pruners import PathPruner
from pathprune.reference import WeightMap
from pathprune.weights import weights_of


class Small(nn.Module):
    """Convolutions, batch norm, max pool, a skip, a concatenation, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.side = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(12 * 16, 10)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        x = x + torch.relu(self.block(x))
        x = torch.cat([x, torch.relu(self.side(x))], 1)
        return self.head(F.avg_pool2d(x, 2).flatten(1))


X = torch.ones(2, 3, 16, 16, dtype=torch.float64)
PRUNABLE = ("stem.weight", "block.weight", "side.weight", "head.weight")


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    model = Small().double().eval()
    with torch.no_grad():
        model.norm.weight.uniform_(-1, 1)
        model.norm.bias.uniform_(-1, 1)
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
    return model


def autograd_scores(model: Small, masks, power: float, score, x=None):
    """dR/df(w) by autograd on |w|^power, with norms, biases and pooling constants as the published policy has them."""
    positive = copy.deepcopy(model)
    norm = model.norm
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    with torch.no_grad():
        for name, p in positive.named_parameters():
            p.copy_(p.abs() ** power * (masks.get(name, 1.0)))
        positive.norm.weight.copy_(gain.abs() ** power)
        positive.norm.bias.copy_((norm.bias - norm.running_mean * gain).abs() ** power)
        positive.norm.running_mean.zero_()
        positive.norm.running_var.fill_(1 - norm.eps)
    source = torch.ones_like(X[:1]) if x is None else x[None]

    def pool(t, k):
        return F.avg_pool2d(t, k, divisor_override=1) * (1 / k**2) ** power

    h = F.max_pool2d(positive.norm(positive.stem(source)), 2)
    h = h + positive.block(h)
    h = torch.cat([h, positive.side(h)], 1)
    total = positive.head(pool(h, 2).flatten(1)).sum()
    total.backward()
    total = total.detach()
    grads = {name: p.grad for name, p in positive.named_parameters()}
    weights = dict(model.named_parameters())
    return {name: (score(weights[name].detach()) * grads[name] * masks[name]).abs() for name in masks}, float(total)


def looped(model, density, rounds, power, score, count="exact", x=None):
    """The pruning loop by sorting everything."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if name in PRUNABLE}
    total = sum(mask.numel() for mask in masks.values())
    for r in range(1, rounds + 1):
        scores, _ = autograd_scores(model, masks, power, score, x)
        flat = torch.cat([scores[name].flatten() for name in masks])
        live = torch.cat([mask.flatten() for mask in masks.values()])
        if count == "exact":
            order = torch.where(live, flat, -1.0).sort(descending=True, stable=True).indices
            kept = torch.zeros(total, dtype=torch.bool)
            kept[order[: round(total * density ** (r / rounds))]] = True
        else:
            k = int((1 - density ** (r / rounds)) * total)
            kept = flat > flat.kthvalue(k).values if k >= 1 else live
        parts = kept.split([mask.numel() for mask in masks.values()])
        masks = {name: part.reshape(masks[name].shape) for name, part in zip(masks, parts, strict=True)}
    return masks


def assert_same(masks, wanted):
    for name in wanted:
        assert torch.equal(masks[name], wanted[name]), f"{name}: {int((masks[name] != wanted[name]).sum())} bits differ"


METHODS = [
    (pp.SynFlow(rounds=15), 1.0, torch.abs),
    (pp.SynFlowL2(rounds=15), 2.0, torch.square),
    (pp.SynFlowL2(rounds=15, variant="phew"), 2.0, torch.abs),
    (pp.SynFlowL2(rounds=15, variant="author"), 1.0, torch.square),
]


@pytest.mark.parametrize("count", ["exact", "published"])
@pytest.mark.parametrize(("pruner", "power", "score"), METHODS, ids=lambda v: str(getattr(v, "variant", "")) or None)
def test_masks_are_those_of_the_published_rule(pruner, power, score, count):
    model = small()
    masks = pp.prune(model, pruner, density=0.1, example_input=X, count=count)
    assert_same(masks, looped(model, 0.1, 15, power, score, count))
    if count == "exact":
        assert masks.kept == round(0.1 * masks.total)


@pytest.mark.parametrize(("pruner", "power", "score"), [
    (lambda mean: pp.SynFlowDist(mean, rounds=8), 1.0, torch.abs),
    (lambda mean: pp.SynFlowL2Dist(mean, rounds=8), 2.0, torch.square),
    (lambda mean: pp.SynFlowL2Dist(mean, rounds=8, variant="author"), 1.0, torch.square),
])  # fmt: skip
def test_distributional_variants_start_from_the_mean(pruner, power, score):
    model = small()
    batches = [
        (torch.rand(5, 3, 16, 16, dtype=torch.float64), None),
        (torch.rand(3, 3, 16, 16, dtype=torch.float64), None),
    ]
    mean = torch.cat([x for x, _ in batches]).mean(0)
    for given in (mean, batches, iter(batches)):
        masks = pp.prune(model, pruner(given), density=0.2, example_input=X)
        assert_same(masks, looped(model, 0.2, 8, power, score, x=mean**power))


@pytest.mark.parametrize("options", [{"compact": False}, {"compact": 0.9}, {"compact": True}])
def test_packing_changes_nothing(options):
    wanted = pp.prune(deep_mlp(), pp.SynFlow(rounds=25), density=0.01, example_input=torch.ones(1, 48), compact=False)
    masks = pp.prune(deep_mlp(), pp.SynFlow(rounds=25), density=0.01, example_input=torch.ones(1, 48), **options)
    assert_same(masks, wanted)


def deep_mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = (48, 100, 77, 120, 10)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_streamed_and_written_out_agree(monkeypatch):
    """Products made on the fly give the masks of products written out (float64, so that rounding decides nothing)."""
    cases = ((deep_mlp().double(), torch.ones(1, 48).double()), (small(), X))

    def pruned():
        return [pp.prune(model, pp.SynFlow(rounds=15), density=0.05, example_input=x) for model, x in cases]

    streamed = pruned()
    monkeypatch.setattr(weights, "STREAMED_POSITIONS", 0)
    written = pruned()
    for a, b in zip(streamed, written, strict=True):
        assert_same(a, b)


def test_threads_change_nothing():
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(pp.prune(deep_mlp(), pp.SynFlow(rounds=10), density=0.05, example_input=torch.ones(1, 48)))
        assert_same(found[1], found[0])
        assert_same(found[2], found[0])
    finally:
        torch.set_num_threads(threads)


def test_many_densities_are_one_schedule():
    densities = [0.5, 0.2, 0.05]
    found = pp.prune(small(), pp.SynFlow(rounds=30), density=densities, example_input=X)
    assert [masks.kept for masks in found] == [round(d * found[0].total) for d in densities]
    for denser, sparser in itertools.pairwise(found):
        assert (denser & sparser) == sparser
    assert pp.prune(small(), pp.SynFlow(rounds=4), sparsity=[0.5, 0.8], example_input=X)[1].kept == found[1].kept


def test_full_density_keeps_everything():
    masks = pp.prune(small(), pp.SynFlow(rounds=3), density=1.0, example_input=X)
    assert masks.kept == masks.total


def test_regrowth_is_explicit():
    """A method whose scores change sign of rank between rounds: random. With regrowth masks need not be nested."""
    options = {"example_input": X, "schedule": "linear", "seed": 3}
    nested = pp.prune(small(), pp.Random(rounds=4), density=[0.5, 0.2], **options)
    free = pp.prune(small(), pp.Random(rounds=4), density=[0.5, 0.2], allow_regrowth=True, **options)
    assert (nested[0] & nested[1]) == nested[1]
    assert (free[0] & free[1]).kept == free[1].kept  # random keys of one seed are the same each round
    magnitude = pp.prune(small(), pp.Magnitude(), density=0.3, allow_regrowth=True, example_input=X)
    assert magnitude == pp.prune(small(), pp.Magnitude(), density=0.3, example_input=X)


def test_magnitude_is_a_sort():
    model = small()
    masks = pp.prune(model, pp.Magnitude(), density=0.25, example_input=X)
    flat = torch.cat([p.detach().abs().flatten() for n, p in model.named_parameters() if n in PRUNABLE])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[: masks.kept]] = True
    assert torch.equal(torch.cat([masks[name].flatten() for name in PRUNABLE]), kept)


def test_random_masks_depend_on_the_seed_alone_and_are_uniform():
    model = PathNetwork.from_module(deep_mlp(), torch.ones(1, 48))
    options = {"density": 0.3}
    a, b, c = (pp.prune(model, pp.Random(), seed=s, **options) for s in (1, 1, 2))
    assert a == b and a != c
    counts = torch.zeros(48 * 100)
    for seed in range(40):
        counts += pp.prune(model, pp.Random(), seed=seed, **options)["0.weight"].flatten()
    frequency = counts / 40
    assert abs(float(frequency.mean()) - 0.3) < 0.01
    assert abs(float(frequency.var()) - 0.3 * 0.7 / 40) < 0.001  # binomial: no weight is favoured


def test_what_looks_at_no_paths_needs_no_example_and_says_nothing_of_paths():
    model = small()
    for pruner in (pp.Magnitude(), pp.Random()):
        masks = pp.prune(model, pruner, density=0.3, seed=2)
        assert masks == pp.prune(model, pruner, density=0.3, seed=2, example_input=X)
        assert "structure" not in masks.metadata["findings"]
        assert masks.report().effective_density is None
        assert "path" not in str(masks.report())
    branching = nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4))  # with what no path rule reads
    assert list(pp.prune(branching, pp.Random(), density=0.5)) == ["1.weight"]


@pytest.mark.parametrize("scope", ["layer", "row", "2:4", "1:2"])
def test_scopes(scope):
    model = deep_mlp()
    fixed = ":" in scope
    exclude = ("4.weight",) if fixed else ()  # 77 inputs are no multiple of 4
    asked = {} if fixed else {"density": 0.3}
    masks = pp.prune(model, pp.Magnitude(), example_input=torch.ones(1, 48), scope=scope, exclude=exclude, **asked)
    for name, mask in masks.items():
        w = dict(model.named_parameters())[name].detach().abs()
        if scope == "layer":
            assert int(mask.sum()) == round(0.3 * mask.numel())
            assert float(w[mask].min()) >= float(w[~mask].max())
        elif scope == "row":
            assert mask.sum(1).eq(round(0.3 * mask.shape[1])).all()
        else:
            n, m = map(int, scope.split(":"))
            groups, inside = w.unflatten(1, (-1, m)), mask.unflatten(1, (-1, m))
            assert inside.sum(-1).eq(n).all()
            assert torch.equal(inside, torch.zeros_like(inside).scatter_(-1, groups.topk(n).indices, True))


@pytest.mark.parametrize("allocation", ["uniform", "erdos_renyi_kernel", "smart_ratio"])
def test_allocations_keep_the_density(allocation):
    options = {"scope": "layer", "allocation": allocation, "example_input": X}
    masks = pp.prune(small(), pp.Random(), density=0.2, **options)
    assert abs(masks.density - 0.2) < 4 / masks.total
    shares = {name: kept / total for name, (kept, total) in masks.counts().items()}
    if allocation == "erdos_renyi_kernel":
        shape = masks["block.weight"].shape
        ratio = (sum(shape) / shape.numel()) / (sum(masks["head.weight"].shape) / masks["head.weight"].numel())
        assert shares["block.weight"] / shares["head.weight"] == pytest.approx(ratio, rel=0.05)
    if allocation == "smart_ratio":
        assert shares["head.weight"] == pytest.approx(0.3, abs=0.01) or shares["head.weight"] == pytest.approx(
            0.2, abs=0.01
        )


class RawTrace(PathPruner):
    """The gradient dR/du by itself: the parameter's own share of the trace, which is not conserved."""

    @property
    def maps(self):
        return WeightMap.SQUARE, WeightMap.ONE


def fc(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = (784, *(100,) * 6, 10)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("seed", [0, 1])
def test_chains_do_not_collapse_and_the_raw_gradient_does(seed):
    x = torch.ones(1, 784)
    densities = [10.0**-c for c in (1, 2, 3, 3.5, 4)]
    for pruner in (pp.SynFlow(), pp.SynFlowL2()):
        for masks in pp.prune(fc(seed), pruner, density=densities, example_input=x):
            assert min(kept for kept, _ in masks.counts().values()) > 0, f"{pruner} at {masks.density}"
    raw = pp.prune(fc(seed), RawTrace(rounds=100), density=10.0**-3.5, example_input=x)
    assert min(kept for kept, _ in raw.counts().values()) == 0


def test_one_shot_synflow_collapses():
    masks = pp.prune(fc(0), pp.SynFlow(), density=0.01, example_input=torch.ones(1, 784), schedule="one-shot")
    assert min(kept for kept, _ in masks.counts().values()) == 0


def test_masks_exist_where_float64_overflows():
    torch.manual_seed(0)
    layers = [m for _ in range(40) for m in (nn.Linear(24, 24, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers)
    for p in model.parameters():
        nn.init.normal_(p, std=1e8)
    found = [
        pp.prune(m, pp.SynFlow(rounds=5), density=0.2, example_input=torch.ones(1, 24, dtype=m[0].weight.dtype))
        for m in (model, copy.deepcopy(model).double())
    ]
    assert found[0].metadata["findings"]["log2_R_first"] > 1024
    differing = sum(int((found[0][name] != found[1][name]).sum()) for name in found[0])
    assert differing <= 2 and found[0].kept == found[1].kept


class Leave(nn.Module):
    """A network whose trace can be taken apart by hand: convolutions, a skip, average pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.b = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.c = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        h = torch.relu(self.a(x))
        h = h + torch.relu(self.b(h))
        return self.c(F.avg_pool2d(h, 2).flatten(1))


def test_trace_saliency_is_the_loss_of_trace_when_a_weight_is_deleted():
    torch.manual_seed(0)
    model = Leave().double()
    names = [name for name, _ in model.named_parameters()]
    keep = {name: torch.rand(p.shape) < 0.8 for name, p in model.named_parameters()}

    def trace(deleted=None):
        u = {n: (p.detach() ** 2 * keep[n]) for n, p in model.named_parameters()}
        live = {n: keep[n].clone() for n in names}
        if deleted:
            u[deleted[0]].view(-1)[deleted[1]] = 0
            live[deleted[0]].view(-1)[deleted[1]] = False
        u = {n: t.requires_grad_() for n, t in u.items()}
        h = F.conv2d(torch.ones(1, 1, 4, 4, dtype=torch.float64), u["a.weight"], padding=1)
        h = h + F.conv2d(h, u["b.weight"], padding=1)
        pooled = F.avg_pool2d(h, 2, divisor_override=1) / 16
        (pooled.flatten(1) @ u["c.weight"].T).sum().backward()
        return sum(float((t.grad * live[n]).sum()) for n, t in u.items())

    network = PathNetwork.from_module(model, torch.ones(1, 1, 4, 4, dtype=torch.float64))
    pruner = pp.TraceSaliency()
    states = weights_of(network, network.prunable, pruner.maps, masks=keep)
    pruner.scorer(network, states, 0)(None)
    whole = trace()
    for name in names:
        made = states[name].written_scores()
        got = torch.ldexp(made.weight, torch.tensor(made.exponent)).flatten()
        for k in range(got.numel()):
            wanted = whole - trace((name, k)) if keep[name].flatten()[k] else 0.0
            assert float(got[k]) == pytest.approx(wanted, rel=1e-9, abs=1e-12 * whole)
    masks = pp.prune(
        model,
        pp.TraceSaliency(rounds=5),
        density=0.3,
        example_input=torch.ones(1, 1, 4, 4, dtype=torch.float64),
    )
    assert masks.kept == round(0.3 * masks.total)


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    flags = [(m.training, p) for m in model.modules() for p in (m.training,)]
    return state, grads, flags, torch.get_rng_state()


def assert_untouched(model, before):
    after = snapshot(model)
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name
    for name, grad in before[1].items():
        assert (grad is None) == (after[1][name] is None)
        assert grad is None or torch.equal(grad, after[1][name])
    assert before[2] == after[2] and torch.equal(before[3], after[3])


def test_the_model_is_untouched_also_when_scoring_raises(monkeypatch):
    model = small().train()
    model.norm.eval()
    model(X).sum().backward()
    before = snapshot(model)
    pp.prune(model, pp.SynFlow(rounds=3), density=0.5, example_input=X)
    pp.prune(model, pp.Random(), density=0.5, example_input=X)
    assert_untouched(model, before)

    def broken(*_):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(pruning.Selection, "cut", broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        pp.prune(model, pp.SynFlow(rounds=3), density=0.5, example_input=X)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of density .* neither"),
        ({"density": 0.5, "sparsity": 0.5}, "exactly one of density .* both"),
        ({"density": 0.0}, r"density: wanted a fraction in \(0, 1\], got 0.0"),
        ({"density": 1.5}, "density: wanted a fraction"),
        ({"density": -0.1}, "density: wanted a fraction"),
        ({"density": math.nan}, "density: wanted a fraction"),
        ({"sparsity": 1.0}, r"sparsity: wanted a fraction in \[0, 1\), got 1.0"),
        ({"density": []}, "empty list"),
        ({"density": [0.1, 0.5]}, "descend"),
        ({"density": 0.5, "scope": "everything"}, "scope: wanted"),
        ({"density": 0.5, "scope": "2:4"}, "fixes it"),
        ({"scope": "4:2"}, "scope: wanted"),
        ({"density": 0.5, "schedule": "cosine"}, "schedule: wanted"),
        ({"density": 0.5, "count": "about"}, "count: wanted"),
        ({"density": 0.5, "exclude": "nothing*"}, "matches none"),
        ({"density": 0.5, "exclude": "*"}, "no prunable weight"),
        ({"density": 0.5, "scope": "layer", "allocation": "best"}, "allocation: wanted"),
        (
            {"density": 0.5, "scope": "layer", "allocation": {"stem.weight": 0.5}},
            "wanted a density for every layer",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pp.prune(small(), pp.Magnitude(), example_input=X, **arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["block.weight", "head.weight"])
def test_non_finite_weights_are_refused_by_name(bad, name):
    model = small()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[3] = bad
    with pytest.raises(ValueError, match=name):
        pp.prune(model, pp.SynFlow(), density=0.5, example_input=X)


def test_weights_too_large_for_their_square_are_refused():
    model = deep_mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = 1e30
    with pytest.raises(ValueError, match=r"2\.weight|finite"):
        pp.prune(model, pp.SynFlowL2(), density=0.5, example_input=torch.ones(1, 48))


def test_half_precision_weights():
    model = deep_mlp().to(torch.bfloat16)
    masks = pp.prune(model, pp.SynFlow(rounds=10), density=0.1, example_input=torch.ones(1, 48, dtype=torch.bfloat16))
    wide = pp.prune(copy.deepcopy(model).float(), pp.SynFlow(rounds=10), density=0.1, example_input=torch.ones(1, 48))
    assert masks == wide


@pytest.mark.parametrize("variant", ["conservative", "phew"])
def test_products_over_the_weights_that_are_left_give_the_same_masks(variant, monkeypatch):
    """In float64, where rounding decides nothing: packed after every cut, or dense to the end."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.Flatten(),
        nn.Linear(32 * 36, 20), nn.ReLU(), nn.Linear(20, 10)
    ).double()  # fmt: skip
    network = pp.PathNetwork.from_module(model, torch.ones(1, 2, 6, 6).double())
    used = []
    monkeypatch.setattr(
        "pathprune.weights.sparse_index", lambda *a, made=weights.sparse_index: used.append(1) or made(*a)
    )
    for pruner in (pp.SynFlow(rounds=12), pp.SynFlowL2(rounds=12, variant=variant)):
        packed = pp.prune(network, pruner, density=[0.1, 0.02])
        count = len(used)
        assert count > 0
        dense = pp.prune(network, pruner, density=[0.1, 0.02], compact=False)
        assert len(used) == count
        used.clear()
        for a, b in zip(packed, dense, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
