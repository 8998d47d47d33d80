"""The reruns of the papers' claims: each runs, goes on where it was stopped, and its page says what its results say."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pathprune as pp
from image_folders import by_class, cifar10, cifar100, tiny_imagenet
from pathprune.data import Split
from pathprune.models import mlp

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import convergence, experiment, gem_miner, path_exclusion, robust, run, training
from experiments.experiment import Pairs, Results, key_of


@pytest.mark.parametrize("name", run.EXPERIMENTS)
def test_every_experiment_runs_in_small(name, tmp_path):
    run.main([name, "--quick", "--out", str(tmp_path)])
    cases = run.EXPERIMENTS[name].cases(True, 3, training.DRAWN)
    rows = Results(tmp_path / "results" / f"{name}.jsonl").rows(cases)
    assert len(rows) == len(cases) == len({key_of(case) for case in cases})
    measured = [value for row in rows for key, value in row.items() if key in ("accuracy", "trained")]
    assert len(measured) == len(rows) and all(math.isfinite(value) for value in measured)
    assert (tmp_path / "results" / f"{name}.png").stat().st_size > 5000
    written = (tmp_path / "README.md").read_text()
    assert f"## {[*run.EXPERIMENTS].index(name) + 1}. {run.EXPERIMENTS[name].title}" in written
    assert f"{len(rows)} runs." in written and "* **" in written


def test_cases_of_different_settings_are_different_cases():
    for each in run.EXPERIMENTS.values():
        full, quick = ({key_of(case) for case in each.cases(q, 3, training.DRAWN)} for q in (False, True))
        assert full and quick and not full & quick, each.name
        assert len(full) == len(each.cases(False, 3, training.DRAWN)), each.name


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    ran: list[str] = []
    cases = [{"method": f"m{k}", "seed": k} for k in range(4)]

    def one(case, folder):
        ran.append(case["method"])
        if len(ran) == 3:
            raise KeyboardInterrupt
        return {"accuracy": case["seed"] / 10}

    small = copy.copy(run.EXPERIMENTS["sketching"])
    object.__setattr__(small, "run", one)
    results = Results(tmp_path / "results" / "x.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run.complete(small, results, cases, None)
    assert [row["method"] for row in results.rows(cases)] == ["m0", "m1"]
    with results.path.open("a") as file:
        file.write('{"case": {"method": "m2", "se')  # killed while it wrote
    assert [row["method"] for row in results.rows(cases)] == ["m0", "m1"]
    run.complete(small, results, cases, None)
    assert ran == ["m0", "m1", "m2", "m2", "m3"]
    assert [row["accuracy"] for row in results.rows(cases)] == [0, 0.1, 0.2, 0.3]
    assert all(json.loads(line) for line in results.path.read_text().splitlines())
    run.complete(small, results, [*cases, {**cases[0], "epochs": 7}], None)
    assert ran[5:] == ["m0"]  # another setting is another case


def test_a_damaged_result_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"case": {}, "result": {}}\n{"case": \n')
    with pytest.raises(ValueError, match=r"x\.jsonl: line 2: wanted a case and its result"):
        Results(path).read()


def test_the_page_is_in_step_with_the_results():
    assert run.page(run.HERE, 3) == (run.HERE / "README.md").read_text()
    for name, each in run.EXPERIMENTS.items():
        cases = each.cases(False, 3, training.DRAWN)
        assert len(Results(run.HERE / "results" / f"{name}.jsonl").rows(cases)) == len(cases), name
        assert (run.HERE / "results" / f"{name}.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["colapse"], "NAME: wanted some of collapse, .*got colapse"),
        (["--seeds", "0"], "--seeds: wanted at least 1, got 0"),
        (["--size", "32"], "--size: wanted --data FOLDER with it, got none"),
        (["--data", "nowhere", "--out", "out"], "--data: .*No such file or directory: 'nowhere'"),
        (["--data", "folder"], "--out: wanted a folder for the results on other data, got none"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("make", [cifar10, cifar100, tiny_imagenet, by_class])
def test_images_in_a_folder_take_the_place_of_the_drawn_ones(tmp_path, make):
    """With their classes and size; a second call finds its results again; the page says what they are of."""
    pytest.importorskip("PIL")
    (tmp_path / "data").mkdir()
    arguments = ["sketching", "--quick", "--data", str(make(tmp_path / "data")), "--out", str(tmp_path / "out")]
    run.main(arguments)
    results = tmp_path / "out" / "results" / "sketching.jsonl"
    (first, second) = (json.loads(line)["case"] for line in results.read_text().splitlines())
    task = training.task_of(tmp_path / "data")
    assert task.items() <= first.items() and {**first, "chosen": "drawn"} == second
    assert f"images of {task['task']}" in (tmp_path / "out" / "README.md").read_text()
    written = results.read_bytes()
    run.main(arguments)
    assert results.read_bytes() == written


def test_networks_take_over_classes_and_sizes(tmp_path):
    """Pre-trained on 100 classes of 32 x 32, then on digits of that size, with a head of its own."""
    task = training.task_of(cifar100(tmp_path))
    assert task.items() >= {"task": "cifar100", "classes": 100, "size": 32}.items()
    (case,) = (c for c in path_exclusion.cases(True, 1, task) if c["start"] == "pre-trained")
    assert case["size"] == 32
    assert math.isfinite(path_exclusion.run(case, tmp_path)["accuracy"])
    data = training.split_of(training.image_case(True, task, seed=1), tmp_path)
    assert (len(data.train_images), len(data.test_images), data.classes) == (200, 200, 100)
    assert torch.bincount(data.train_labels).tolist() == [2] * 100
    assert [len(y) for _, y in training.scoring_data(data)] == [128, 72]
    assert training.small_vgg(0, data.classes)(data.train_images[:2]).shape == (2, 100)
    large = training.image_case(False, {**task, "classes": 1000})
    assert (large["images"], large["tested"]) == (10_000, 2000)


def test_other_images_than_the_case_names_are_refused(tmp_path):
    task = training.task_of(cifar10(tmp_path))
    case = training.image_case(True, task, seed=0)
    with pytest.raises(ValueError, match="task 'cifar10': wanted --data FOLDER with its files, got none"):
        training.split_of(case)
    with pytest.raises(ValueError, match=r"task 'cifar10' 0123: .* has other images, cifar10"):
        training.split_of({**case, "data": "0123"}, tmp_path)


# ------------------------------------------------------------------------------------------------------- data


def test_drawn_images_depend_on_the_seed_alone():
    first, again, other = (training.shapes(40, 20, 16, seed) for seed in (3, 3, 4))
    torch.rand(5)
    for a, b in zip(vars(first).values(), vars(again).values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.train_images, other.train_images)
    assert not torch.equal(first.train_images[:20], first.test_images)
    assert first.train_images.shape == (40, 3, 16, 16) and first.train_images.dtype == torch.float32
    assert float(first.train_images.min()) >= 0 and float(first.train_images.max()) <= 1
    assert torch.bincount(first.train_labels).tolist() == [4] * 10


def test_drawn_classes_are_the_shapes_they_claim():
    images, labels = training.drawn(2000, 32, torch.Generator().manual_seed(0))
    bright = images.mean(1)
    middle = bright[:, 12:20, 12:20].mean((1, 2)) - bright.mean((1, 2))
    level = [float(middle[labels == label].mean()) for label in range(10)]
    for filled in range(0, 10, 2):
        assert level[filled] > level[filled + 1] + 0.05  # an outline leaves its middle dark
    covered = [float(bright[labels == label].mean()) for label in range(0, 10, 2)]
    assert covered[2] > max(covered[3], covered[4])  # a disc covers more than a star or a cross of its radius


def test_handwritten_images_are_few_and_enlarged():
    data = training.handwritten(16, 50, seed=1)
    assert data.train_images.shape == (50, 3, 16, 16) and len(data.test_images) == 450
    assert torch.equal(data.train_images[:, 0], data.train_images[:, 2])


# -------------------------------------------------------------------------------------------------- Gem-Miner


def first_feature(samples: int) -> Split:
    """Which side of 0 the first of twelve features is on."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 12, generator=made)
    y = (x[:, 0] > 0).long()
    return Split(x, y, x, y)


def test_the_trained_mask_has_exactly_its_density_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = training.normed_mlp((64, 20, 10), 0).eval()
    before = copy.deepcopy(model.state_dict())
    data = training.split_of({"task": "digits", "seed": 0})
    for density in (0.3, 0.013, 1.0):
        masks = gem_miner.gem_miner(model, data, density, 1, epochs=2, periods=2)
        assert masks.kept == round(density * masks.total) and masks.total == 64 * 20 + 200
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training and all(p.grad is None for p in model.parameters())
    again = gem_miner.gem_miner(model, data, 0.013, 1, epochs=2, periods=2)
    assert again == gem_miner.gem_miner(model, data, 0.013, 1, epochs=2, periods=2)


def test_the_trained_mask_finds_what_matters():
    torch.manual_seed(0)
    model, data = mlp((12, 16, 2), bias=False), first_feature(512)
    masks = gem_miner.gem_miner(model, data, 0.15, 0, epochs=30, periods=3, rate=0.05)
    shares = masks["1.weight"].sum(0) / masks["1.weight"].sum()
    assert int(shares.argmax()) == 0 and float(shares[0]) > 2 / 12

    def right(given: pp.Masks) -> float:  # of the weights as they were drawn
        with torch.no_grad():
            found = given.apply_(copy.deepcopy(model))(data.train_images).argmax(1)
        return float((found == data.train_labels).float().mean())

    assert right(masks) > 0.85
    assert right(masks) > 0.25 + max(right(masks.shuffle(0)), right(pp.Masks.ones(model)))


def test_rounding_passes_gradients_straight_through():
    score = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    weight = torch.tensor([1.0, -2.0, 3.0])
    value = weight * gem_miner.rounded(score)
    assert value.tolist() == [0, -2, 3]
    value.square().sum().backward()
    assert score.grad is not None and torch.equal(score.grad, 2 * value.detach() * weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"density": 0.0, "epochs": 2, "periods": 1}, r"density: wanted a fraction in \(0, 1\], got 0"),
        ({"density": 0.5, "epochs": 3, "periods": 2}, "periods: wanted at least 1, dividing the epochs, got 2 of 3"),
    ],
)
def test_the_trainer_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        gem_miner.gem_miner(mlp((12, 4, 2)), first_feature(8), seed=0, **given)


# ------------------------------------------------------------------------------------------- numbers and nets


def test_verdicts_need_pairs_that_agree():
    assert Pairs((1.0, 1.1, 0.9, 1.0)).verdict() == "agrees"
    assert Pairs((-1.0, -1.1, -0.9, -1.0)).verdict() == "contradicts"
    assert Pairs((-1.0, -1.1, -0.9, -1.0)).verdict(-1) == "agrees"
    assert Pairs((1.0, 1.1, 0.9, 1.0)).verdict(0) == "agrees"  # not behind
    assert Pairs((-1.0, -1.1, -0.9, -1.0)).verdict(0) == "contradicts"
    assert Pairs((5.0, -1.0, 1.0, -2.0)).verdict() == "mixed"  # they disagree
    assert Pairs((0.1, 0.1, 5.0)).verdict() == "mixed"  # within two standard errors
    assert Pairs((1.0, 1.0)).verdict() == "mixed"  # too few
    rows = [{"m": m, "seed": s, "accuracy": a} for m, s, a in (("a", 0, 0.5), ("a", 1, 0.75), ("b", 1, 0.5))]
    found = experiment.pairs(experiment.where(rows, m="a"), experiment.where(rows, m="b"), ("seed",))
    assert found.differences == (25.0,)


def test_rank_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    made = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 6, (2, 30), generator=made).double()  # with ties
    rows = [{"score": float(a), "trained": float(b)} for a, b in zip(x, y, strict=True)]
    wanted = stats.spearmanr(x.numpy(), y.numpy()).statistic
    assert convergence.spearman(rows, "score") == pytest.approx(wanted, abs=1e-12)


def test_deep_networks_are_on_and_off_the_edge_of_chaos():
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    edge, ordered = (robust.deep_network("relu MLP", 20, 0, scale) for scale in (1.0, 0.9))
    assert sum(isinstance(module, nn.Linear) for module in edge.modules()) == 20
    # Weights of scale s multiply the mean square by s^2 a layer.
    assert abs(robust.signal_slope(edge, x)) < 0.3
    difference = robust.signal_slope(ordered, x) - robust.signal_slope(edge, x)
    assert difference == pytest.approx(2 * math.log2(0.9), rel=1e-3)
    stable = robust.deep_network("Stable ResNet", 20, 0)
    plain = robust.signal_slope(stable, x)
    pp.stable_resnet(stable, x[:1])
    assert robust.signal_slope(stable, x) < plain / 3
