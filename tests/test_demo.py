"""The pieces of the demonstration, in small."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import pathprune as pp
from pathprune import demo

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TINY = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 2],
    "layer_type": "basic",
    "num_labels": 5,
}


def test_digits_are_split_and_scaled() -> None:
    data = demo.digits()
    assert data.train_images.shape == (1347, 1, 8, 8)
    assert data.test_images.shape == (450, 1, 8, 8)
    assert (data.train_images.min(), data.train_images.max()) == (0, 1)
    assert data.train_images.dtype == torch.float32
    assert torch.bincount(data.test_labels).min() >= 40
    assert torch.equal(demo.digits().test_images, data.test_images)
    assert not torch.equal(demo.digits(seed=1).test_images, data.test_images)


def test_classifiers_are_pruned_reported_and_written(tmp_path, capsys) -> None:
    pytest.importorskip("transformers")
    model = demo.hugging_face_resnet(seed=1, **TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = demo.prune_classifier(model, 32, rounds=3, density=0.2, out=tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    masks = pp.Masks.load(tmp_path / "resnet50-masks.safetensors", model, base="raise")
    assert masks.kept == round(0.2 * masks.total) == report.kept
    assert json.loads((tmp_path / "resnet50.json").read_text())["kept"] == report.kept
    assert (tmp_path / "resnet50.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "SynFlow: " in printed
    assert "all scores are finite" in printed


def test_published_scores_sum_to_all_paths() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    total, bad, of = demo.published_scores(model, (1, 3))
    paths = model[2].weight.abs().detach() @ model[0].weight.abs().detach()
    assert total == pytest.approx(float(paths.sum()))
    assert (bad, of) == (0, 20)
    assert (model[0].weight < 0).any()  # the model itself keeps its signs


@pytest.mark.slow
def test_published_scores_of_resnet50_are_not_finite() -> None:
    pytest.importorskip("transformers")
    total, bad, of = demo.published_scores(demo.hugging_face_resnet(), (1, 3, 224, 224))
    assert not math.isfinite(total)
    assert bad == of == 25_502_912


def test_pruned_weights_stay_zero_while_the_rest_learns() -> None:
    data, model = demo.digits(), demo.network_of(0)
    masks = pp.prune(model, pp.Magnitude(), density=0.1, example_input=data.train_images[:1])
    accuracy = demo.train(model, data, masks, seed=0, epochs=2)
    assert len(accuracy) == 2
    assert accuracy[-1] > 0.5
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].any()


def test_a_run_is_the_same_again() -> None:
    data = demo.digits()
    first, again = (demo.one_run(pp.Random(), 0.1, 3, data, epochs=1) for _ in range(2))
    other = demo.one_run(pp.Random(), 0.1, 4, data, epochs=1)
    assert (first.accuracy, first.kept) == (again.accuracy, again.kept)
    assert first.accuracy != other.accuracy


def test_accuracies_are_tabled_written_and_drawn(tmp_path, capsys) -> None:
    methods = (pp.SynFlow(rounds=2), pp.Random())
    runs = demo.train_on_digits(tmp_path, methods=methods, densities=(0.5, 0.1), seeds=(0,), epochs=1)
    assert [(run.method, run.density) for run in runs] == [
        ("dense", 1.0),
        ("SynFlow", 0.5),
        ("Random", 0.5),
        ("SynFlow", 0.1),
        ("Random", 0.1),
    ]
    assert [run.kept for run in runs] == [97_568, 48_784, 48_784, 9_757, 9_757]
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 5
    assert f"{100 * runs[3].accuracy[-1]:.1f} %" in rows[5]
    written = json.loads((tmp_path / "digits.json").read_text())
    assert [run["accuracy"] for run in written] == [run.accuracy for run in runs]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_over_seeds() -> None:
    runs = [demo.Run("dense", 1.0, 1.0, 10, seed, [0.25, 0.5 + seed], 0.0, 0.0) for seed in (0, 1)]
    assert demo.curves(runs) == {("dense", 1.0): [0.25, 1.0]}
    assert "100.0 %" in demo.accuracy_table(runs)


def test_main_runs_both_parts(tmp_path, monkeypatch, capsys) -> None:
    called = []
    monkeypatch.setattr(demo, "prune_classifier", lambda *given: called.append(given[1:4]))
    monkeypatch.setattr(demo, "hugging_face_resnet", lambda: None)
    monkeypatch.setattr(demo, "train_on_digits", lambda out, epochs: called.append(epochs))
    demo.main(["--out", str(tmp_path / "new"), "--rounds", "7", "--epochs", "2"])
    assert called == [(224, 7, 0.05), 2]
    assert "7 rounds of SynFlow to 5 % in float32" in capsys.readouterr().out
    assert (tmp_path / "new").is_dir()


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "NEEDED", ("torch", "no_such_library"))
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path / "out")])
    assert "needs no_such_library: pip install 'pathprune[cli,plot,examples]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
