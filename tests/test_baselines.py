"""The benchmark baselines give the masks they claim to, and the harness measures what it says."""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pathprune import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import baselines
import harness
import nas
import selection_baselines as selection

NETS = {
    "mlp": (lambda: models.mlp((64, 100, 80, 10)), (64,)),
    "mlp above the sample's size": (lambda: models.mlp((400, 600, 80, 10)), (400,)),
    "convnet": (lambda: models.convnet_digits(16), (1, 8, 8)),
    "resnet20": (models.resnet20, (3, 32, 32)),
    "mobilenet": (models.mobilenet_tiny, (3, 32, 32)),
    "densenet": (models.densenet_tiny, (3, 32, 32)),
    "unet": (models.unet_tiny, (1, 16, 16)),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and on a busy machine their barriers cost seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    factory, shape = NETS[name]
    torch.manual_seed(seed)
    model = factory()
    with torch.no_grad():
        for module in model.modules():  # signed biases and statistics, as after some training
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-0.5, 1.5)
                module.bias.uniform_(-0.1, 0.1)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 2)
            elif getattr(module, "bias", None) is not None:
                module.bias.uniform_(-0.1, 0.1)
    return model, torch.randn(2, *shape)


def kept(masks: dict[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def total(masks: dict[str, torch.Tensor]) -> int:
    return sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("select", ["kthvalue", "bracket", "bracket_numpy", "topk", "sort", "fastest"])
def test_both_baselines_give_the_same_float64_masks(name, select):
    model, x = make(name)
    loop = {"density": 0.12, "rounds": 6, "dtype": torch.float64, "count": "exact"}
    published = baselines.published_synflow(model, x, **loop)
    best = baselines.best_pytorch_synflow(model, x, **loop, select=select)
    harness.assert_same_masks(best, published)
    assert list(best) == list(published) == list(baselines.prunable_weights(model))
    assert kept(best) == round(0.12 * total(best))
    assert all(mask.dtype == torch.bool for mask in best.values())


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet20", "unet"])
def test_published_count_removes_the_ties(name):
    model, x = make(name)
    published = baselines.published_synflow(model, x, 0.12, 6, torch.float64)
    best = baselines.best_pytorch_synflow(model, x, 0.12, 6, torch.float64, count="published")
    harness.assert_same_masks(best, published)
    size = total(published)
    assert kept(published) == size - int((1 - 0.12) * size)  # no ties among random weights


@pytest.mark.parametrize("loop", [baselines.PublishedSynFlow, baselines.BestPyTorchSynFlow])
def test_ties_at_the_threshold(loop):
    """One constant layer: every score is equal. Exact keeps the first ones, published removes them all."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    nn.init.constant_(model[0].weight, -0.5)
    exact, published = (loop(model, torch.ones(1, 6), count=count) for count in ("exact", "published"))
    exact.round(0.3)
    published.round(0.3)
    assert exact.masks()["0.weight"].flatten().tolist() == [True] * 9 + [False] * 21
    assert not published.masks()["0.weight"].any()


@pytest.mark.parametrize("loop", [baselines.PublishedSynFlow, baselines.BestPyTorchSynFlow])
def test_published_count_is_an_int_of_the_removed_share(loop):
    """N = 10, density 0.25: int(7.5) = 7 are removed and 3 kept; exact keeps round(2.5) = 2."""
    model = nn.Sequential(nn.Linear(10, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 11.0))
    for count, first in (("published", 7), ("exact", 8)):
        run = loop(model, torch.ones(1, 10), count=count)
        run.round(0.25)
        assert run.masks()["0.weight"].flatten().tolist() == [False] * first + [True] * (10 - first)
        run.round(1.0)  # pruned weights do not come back
        assert kept(run.masks()) == 10 - first


@pytest.mark.parametrize("loop", [baselines.PublishedSynFlow, baselines.BestPyTorchSynFlow])
def test_live_weights_of_score_zero_outrank_pruned_ones(loop):
    """Only weight 3 of 8 has a score; the first live weights of score zero fill up, in every round."""
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()[0, 3] = 2.0
    run = loop(model, torch.ones(1, 8), count="exact")
    expected = {1.0: range(8), 0.5: [0, 1, 2, 3], 0.25: [0, 3], 0.125: [3]}
    for density, live in expected.items():
        run.round(density)
        assert run.masks()["0.weight"].flatten().nonzero().flatten().tolist() == list(live)


@pytest.mark.parametrize("run", [baselines.published_synflow, baselines.best_pytorch_synflow])
@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet20"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(run, name, training):
    model, x = make(name)
    model.train(training)
    model(x).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    modules = [(n, type(m)) for n, m in model.named_modules()]
    state = torch.get_rng_state()
    with torch.no_grad():  # the caller's grad mode must not matter
        run(model, x, 0.2, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training is training for m in model.modules())
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[n]) and p.requires_grad for n, p in model.named_parameters())


def test_a_hugging_face_model_is_taken_unmodified():
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2]}
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    x = torch.ones(1, 3, 32, 32)
    loop = {"density": 0.1, "rounds": 4, "count": "exact"}
    published = baselines.published_synflow(model, x, dtype=torch.float64, **loop)
    best = baselines.best_pytorch_synflow(model, x, dtype=torch.float64, **loop)
    harness.assert_same_masks(best, published)
    cuts = [f"resnet.encoder.stages.{stage}" for stage in (0, 1)]
    rescaled = baselines.best_pytorch_synflow(model, x, rescale=cuts, **loop)
    harness.assert_same_masks(rescaled, published)


def test_closed_form_is_used_for_plain_chains_alone():
    def scorer(name: str) -> object:
        return baselines.BestPyTorchSynFlow(*make(name)).scorer

    assert isinstance(scorer("mlp"), baselines.ClosedFormChain)
    assert isinstance(scorer("convnet"), baselines.AutogradScores)


def test_scores_of_one_hidden_layer_by_hand():
    """Weights [2, 2], [1, 2]: a score is the product of weights on the paths through it, summed."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        model[2].weight.copy_(torch.tensor([[-5.0, 6.0]]))
    best = baselines.BestPyTorchSynFlow(model, torch.zeros(3, 2))
    best.scorer.score_()
    assert best.flat.scores.tolist() == [5.0, 10.0, 18.0, 24.0, 15.0, 42.0]
    published = baselines.PublishedSynFlow(model, torch.zeros(3, 2))
    assert torch.cat([s.flatten() for s in published.scores()]).tolist() == best.flat.scores.tolist()


@pytest.mark.parametrize("shifts", [False, True])
def test_rescaling_ranks_in_float32_what_overflows_it(shifts):
    """Scores are those of float64 up to one power of two, biases and running means included."""
    torch.manual_seed(0)
    model = models.resnet_cifar(110)
    cuts = [name for name, module in model.named_modules() if isinstance(module, models.BasicBlock)]
    for module in model.modules():
        if shifts and isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias)
            nn.init.uniform_(module.running_mean, 0, 0.5)
    x = torch.ones(1, 3, 32, 32)
    with pytest.raises(ValueError, match="rescale"):
        baselines.best_pytorch_synflow(model, x, 0.5, 1)
    single = baselines.BestPyTorchSynFlow(model, x, rescale=cuts)
    double = baselines.BestPyTorchSynFlow(model, x, torch.float64)
    single.scorer.score_()
    double.scorer.score_()
    live = double.flat.scores > 0
    power = (double.flat.scores[live] / single.flat.scores[live].double()).log2()
    exponent = power.median().round()
    assert exponent > 128
    assert (power - exponent).abs().max() < 1e-5


def test_rescaling_a_dead_network_is_refused():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match="every cut"):
        baselines.BestPyTorchSynFlow(model, torch.ones(1, 4), rescale=["0"])


def score_samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    wide = torch.rand(300_000, generator=generator).mul_(200).sub_(100).exp2_()
    return {
        "small": torch.rand(1_000, generator=generator),
        "200 binades": wide,
        "half zeros": wide * torch.randint(2, wide.shape, generator=generator),
        "ten values": torch.randint(10, (300_000,), generator=generator).float(),
        "float64": wide.double(),
        "all equal": torch.ones(300_000),
    }


@pytest.mark.parametrize("name", selection.SELECTIONS)
@pytest.mark.parametrize("kind", score_samples())
def test_every_selection_finds_the_kth_largest(name, kind):
    scores = score_samples()[kind]
    untouched = scores.clone()
    ordered = scores.sort(descending=True).values
    size = scores.numel()
    for k in (1, 2, size // 100, size // 2, size - 1, size):
        found = selection.SELECTIONS[name](scores, k)
        assert found.dtype == scores.dtype
        assert found == ordered[k - 1], k
    assert torch.equal(scores, untouched)


def test_bracket_falls_back_when_the_sample_misleads():
    scores = torch.arange(300_000.0)
    misleading = torch.zeros(selection.SAMPLE, dtype=torch.long)
    found = selection.bracket_kth(scores, 1_000, misleading, selection.split_torch)
    assert found == selection.Kth(299_000.0, None)


def test_bracket_counts_what_reaches_the_threshold():
    scores = score_samples()["ten values"]
    for split in (selection.split_torch, selection.split_numpy):
        found = selection.bracket_kth(scores, 90_000, selection.sample_positions(scores), split)
        assert found.reached == int((scores >= found.value).sum()) == selection.count_reached(scores, found.value)


# The harness


def test_nothing_is_timed_before_it_is_verified():
    calls = []

    def disagree() -> str:
        raise AssertionError("masks differ")

    case = harness.Case("unverified", disagree).add("work", lambda: calls.append(1))
    with pytest.raises(AssertionError, match="differ"):
        case.measure()
    silent = harness.Case("silent", lambda: "").add("work", lambda: calls.append(1))
    with pytest.raises(ValueError, match="sentence"):
        silent.measure()
    assert not calls
    with pytest.raises(ValueError, match="candidates"):
        harness.Case("empty", lambda: "yes").measure()
    with pytest.raises(ValueError, match="new one"):
        case.add("work", lambda: None)


def test_runs_are_interleaved_and_set_up():
    calls = []
    case = harness.Case("order", lambda: "equal")
    case.add("a", lambda state: calls.append(state), setup=lambda: "a")
    case.add("b", lambda: calls.append("b"))
    result = case.measure(repeats=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert all(len(result.seconds[name][clock]) == 3 for name in "ab" for clock in harness.CLOCKS)


def test_who_has_waited_long_is_called_once_before(monkeypatch):
    monkeypatch.setattr(harness, "IDLE", -1.0)  # any time is long
    calls = []
    case = harness.Case("waiting", lambda: "equal")
    case.add("a", lambda: calls.append("a")).add("b", lambda: calls.append("b"))
    result = case.measure(repeats=2, warmup=0)
    assert calls == ["a", "b", "a", "a", "b", "b"]  # who was never called has nothing to lose
    assert len(result.seconds["a"]["wall"]) == 2


def test_ratio_is_the_median_of_pairs():
    clock = {"wall": [1.0, 10.0, 1.0]}
    slow = {"wall": [2.0, 30.0, 50.0]}
    result = harness.Result("case", "equal", {"ours": clock, "theirs": slow}, {"ours": 4e9}, bandwidth=8.0)
    assert result.ratio("theirs", "ours") == 3.0  # of 2, 3, 50
    assert result.ratio("ours", "ours") == 1.0
    assert result.median("theirs") == 30.0
    assert result.minimum("theirs") == 2.0
    assert result.rate("ours") == 4.0
    assert result.rate("theirs") is None


def test_clocks_tell_waiting_from_working():
    waiting = harness.clocked(lambda: time.sleep(0.05), torch.device("cpu"))
    assert waiting["wall"] >= 0.05
    assert waiting["device"] == waiting["wall"]
    assert waiting["thread"] < waiting["wall"]


def test_peak_memory_sees_a_short_allocation():
    with harness.peak_memory() as peak:
        block = torch.ones(32 << 20, dtype=torch.uint8)
        del block
    if peak.source == "unavailable":
        pytest.skip("no /proc/self/status")
    # The high-water mark counts pages in batches per core, hence the slack.
    assert 30 << 20 <= peak.bytes < 64 << 20


def test_assert_same_masks():
    first = {"a": torch.tensor([True, False]), "b": torch.tensor([True])}
    assert "3 mask bits compared, 2 kept, 0 differ" in harness.assert_same_masks(first, first)
    other = {"a": torch.tensor([False, False]), "b": torch.tensor([True])}
    with pytest.raises(AssertionError, match="1 of 3"):
        harness.assert_same_masks(first, other)
    assert "1 differ" in harness.assert_same_masks(first, other, allowed=1)
    with pytest.raises(AssertionError, match="parameters"):
        harness.assert_same_masks(first, {"a": first["a"]})
    with pytest.raises(AssertionError, match="shape"):
        harness.assert_same_masks(first, {"a": torch.ones(3, dtype=torch.bool), "b": first["b"]})


def test_results_are_saved_whole_and_printed(tmp_path):
    case = harness.Case("copy", lambda: "both copy")
    x, y = torch.ones(1000), torch.empty(1000)
    case.add("ours", lambda: y.copy_(x), bytes_moved=8000).add("theirs", lambda: x.clone())
    bandwidth = harness.copy_bandwidth(size=1 << 20, repeats=2)
    result = case.measure(repeats=2, bandwidth=bandwidth, peaks=True, weights=1000)
    path = harness.save("copy", [result], tmp_path, revision="abc")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    content = json.loads(path.read_text())
    for key in ("cpu", "cores", "torch", "threads", "load_average", "date", "machine", "revision"):
        assert key in content
    (saved,) = content["results"]
    assert saved["verified"] == "both copy"
    assert saved["notes"] == {"weights": 1000}
    assert saved["summary"]["ours"]["gb_per_second"] == pytest.approx(result.rate("ours", "device"))
    assert saved["summary"]["theirs"]["slower_than"]["ours"]["wall"] == result.ratio("theirs", "ours")
    table = harness.markdown([result], subject="ours")
    assert "### copy" in table
    assert table.count("\n| ours |") == table.count("\n| theirs |") == 1


# The cell space's


def test_the_published_loop_and_plain_pytorch_score_cells_alike(monkeypatch):
    tensors = nas.SPACE.draw(0)
    sample = [nas.SPACE[k] for k in (0, 9631, 12418)]
    assert nas.verify(sample, tensors).startswith("3 architectures: ")
    monkeypatch.setattr(nas, "published", lambda *_: 100.0)
    with pytest.raises(AssertionError, match="nas: "):
        nas.verify(sample, tensors)
