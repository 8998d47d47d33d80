"""Rounds that have been done are not done again: a killed run goes on, and gives the bytes of one without a break."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch
from torch import nn

from checkpoint_folders import contents, llama, mixtral, resnet, save
from kills import die, in_child, killed_at
from pathprune import (
    FORCE,
    PHEW,
    Magnitude,
    Sketch,
    SynFlow,
    SynFlowL2,
    TraceSaliency,
    Wanda,
    assembly,
    checkpoint_pruning,
    prune,
    prune_checkpoint,
    savepoints,
)
from pathprune.pruners.base import Round, Selection
from pathprune.real import Real
from pathprune.restartable import RestartableFolder
from pathprune.savepoints import Savepoints

pytest.importorskip("transformers")


@pytest.fixture
def always(monkeypatch):
    """Every round is kept."""
    monkeypatch.setattr(savepoints, "EVERY", 0.0)
    monkeypatch.setattr(savepoints, "SHARE", 0.0)


def dies_at(cut: int) -> None:
    """From now on the process is killed when it is about to make its ``cut``-th cut."""
    real, left = Selection.cut, cut

    def watched(self, *arguments):
        nonlocal left
        left -= 1
        if left < 0:
            die()
        return real(self, *arguments)

    Selection.cut = watched


FOLDERS = {
    "llama, synflow": (llama, SynFlow(rounds=8), {}),
    "llama, synflow-l2 by layers": (llama, SynFlowL2(rounds=8), {"scope": "layer"}),
    "resnet, synflow": (resnet, SynFlow(rounds=8), {"input_shape": "1,3,32,32"}),
    "mixtral, synflow": (mixtral, SynFlow(rounds=8), {}),
}
QUICK = "mixtral, synflow"


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == QUICK else pytest.mark.slow) for c in FOLDERS])
def test_killed_at_random_rounds(tmp_path, always, case):
    """Killed again and again, each time some rounds later."""
    make, pruner, options = FOLDERS[case]
    folder = save(make(), tmp_path / "model")
    expected = contents(prune_checkpoint(folder, pruner, tmp_path / "whole", density=0.1, **options).folder)
    generator, kills, kept = random.Random(case), 0, []

    def run():
        return prune_checkpoint(folder, pruner, tmp_path / "out", density=0.1, **options)

    for _ in range(3):
        first = generator.randrange(2, 4)  # in the third or fourth round that is still to do

        def killed(first=first):
            dies_at(first)
            run()

        kills += in_child(killed)
        kept.append([path.name for path in (tmp_path / ".out.partial").glob(".rounds-*")])
    assert kills == 3 and len({name for (name,) in kept}) == 3
    assert contents(run().folder) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


@pytest.mark.parametrize("make", [pytest.param(llama, marks=pytest.mark.slow), mixtral])
def test_killed_at_random_steps(tmp_path, always, make):
    """Anywhere in laying out, keeping rounds, and writing shards; resumed once, or killed again."""
    pruner = SynFlow(rounds=3)
    folder = save(make(), tmp_path / "model")
    before = contents(folder)
    expected = contents(prune_checkpoint(folder, pruner, tmp_path / "whole", density=0.1).folder)
    generator, kills = random.Random(0), 0

    def run():
        return prune_checkpoint(folder, pruner, tmp_path / "out", density=0.1)

    while killed_at(generator.randrange(2, 70), run):
        kills += 1
        assert kills < 40
    assert kills >= 2
    assert contents(tmp_path / "out") == expected
    assert contents(folder) == before


def test_killed_while_laying_out_and_after(tmp_path, monkeypatch):
    """What is laid out in part is laid out again; what is whole, and the same, is not."""
    folder = save(mixtral(), tmp_path / "model")
    expected = contents(prune_checkpoint(folder, Magnitude(), tmp_path / "whole", density=0.1).folder)
    monkeypatch.setattr(assembly, "PIECE_BYTES", 4096)  # 36 KB in a dozen pieces

    def run():
        return prune_checkpoint(folder, Magnitude(), tmp_path / "out", density=0.1)

    laid_out = tmp_path / ".out.partial" / ".assembled"
    for count in (4, 9, 14):
        assert killed_at(count, run)
        assert not laid_out.exists()
    count = 18
    while not laid_out.exists():
        assert killed_at(count, run)
        count += 1
    assert in_child(lambda: (dies_at(0), run()))
    monkeypatch.setattr(checkpoint_pruning, "laid_out", lambda *arguments: pytest.fail("laid out again"))
    assert contents(run().folder) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


# --------------------------------------------------------------------------------------------- in memory


class Stop(Exception):  # noqa: N818 (not an error: a run is broken off)
    pass


def broken_off(model, pruner, folder, after: int, **options):
    """Prunes, breaks off before the cut after ``after`` others, and goes on.

    Returns how many rounds were kept, how many were done in going on, and the masks.
    """
    real, left = Selection.cut, after

    def watched(self, *arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop
        return real(self, *arguments)

    with RestartableFolder(folder, {}) as work:
        Selection.cut = watched
        try:
            with pytest.raises(Stop):
                prune(model, pruner, savepoints=Savepoints(work), **options)
            kept = [int(name.removeprefix(".rounds-")) for name in work.finished_files()]
            left = 1000
            made = prune(model, pruner, savepoints=Savepoints(work), **options)
            return kept, 1000 - left, made
        finally:
            Selection.cut = real


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Conv2d(7, 7, 3, groups=7),
        nn.Flatten(),
        nn.Linear(7 * 36, 33),
        nn.ReLU(),
        nn.Linear(33, 16),
    ).eval()


IMAGES = torch.randn(4, 3, 8, 8)
RUNS = {
    "synflow": (SynFlow(rounds=5), {}),
    "synflow, linear schedule": (SynFlow(rounds=5), {"schedule": "linear"}),
    "synflow by rows": (SynFlow(rounds=4), {"scope": "row"}),
    "synflow by layers": (SynFlow(rounds=4), {"scope": "layer", "allocation": "erdos_renyi_kernel"}),
    "synflow, published": (SynFlow(rounds=5), {"count": "published"}),
    "synflow with regrowth": (SynFlow(rounds=5), {"allow_regrowth": True}),
    "synflow-l2": (SynFlowL2(rounds=5), {}),
    "trace": (TraceSaliency(rounds=5), {}),
    "wanda": (Wanda([IMAGES], rounds=4), {}),
    "magnitude": (Magnitude(rounds=4), {}),
}


@pytest.mark.parametrize(
    ("run", "after"), [*((run, 3) for run in RUNS), ("synflow", 0), ("synflow", 1), ("synflow", 2)]
)
def test_broken_off_and_taken_up(tmp_path, always, run, after):
    """The same masks, and the same numbers for every round."""
    pruner, options = RUNS[run]
    options = {"density": 0.1, "compact": False, "example_input": IMAGES[:1], **options}
    kept, done, found = broken_off(network(), pruner, tmp_path / "work", after, **options)
    expected = prune(network(), pruner, **options)
    assert kept == ([after - 1] if after > 1 else [])
    assert done == pruner.rounds - sum(kept)
    assert found == expected
    passing = ("seconds", "seconds_per_round", "peak_memory_bytes")
    ours, theirs = ({k: v for k, v in m.metadata["findings"].items() if k not in passing} for m in (found, expected))
    assert ours == theirs


def narrow() -> nn.Module:
    """Rows of odd lengths in bfloat16, every one streamed."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(192, 133), nn.ReLU(), nn.Linear(133, 41), nn.ReLU(), nn.Linear(41, 10)]
    return nn.Sequential(*layers).bfloat16().eval()


def pointwise() -> nn.Module:
    """Convolutions of one position over maps whose edges differ: products over the weights that are left alone."""
    torch.manual_seed(0)
    inner = [nn.Conv2d(24, 40, 1), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 33, 1), nn.ReLU()]
    ends = [nn.Conv2d(33, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 20)]
    return nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), *inner, *ends).eval()


COMPACTED = {  # how a net, and the options, leave its weights: packed alone, or with products over those left
    "streamed": (network, SynFlow(rounds=8), {}, False),
    "odd rows": (narrow, SynFlowL2(rounds=8), {"compact": 0.6, "scope": "layer"}, False),
    "products of those left": (pointwise, SynFlow(rounds=8), {}, True),
}


@pytest.mark.parametrize("case", COMPACTED)
def test_killed_after_weights_were_packed(tmp_path, always, monkeypatch, case):
    """Before any weight was packed, after the first, and when all are few: a killed run packs anew, later or at once.

    Values and order of sums are the same however a weight is held: so are the masks, and what rounds report.
    """
    make, pruner, options, is_sparse = COMPACTED[case]
    model = make()
    x = IMAGES[:1].to(next(model.parameters()).dtype)
    options = {"density": 0.02, "compact": True, "example_input": x, "progress": False, **options}
    held, real = [], Selection.cut

    def watched(self, *arguments):
        weights = self.all_weights.values()
        held.append((any(w.packed is not None for w in weights), any(w._pattern is not None for w in weights)))
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Selection, "cut", watched)
        expected = prune(model, pruner, **options)
    first = next(cut for cut, (packed, _) in enumerate(held) if packed)
    assert 2 <= first <= 5 and len(held) == 8 and held[-1] == (True, is_sparse)

    def run(folder):
        with RestartableFolder(folder, {}) as work:
            return work.finished_files(), prune(model, pruner, savepoints=Savepoints(work), **options)

    passing = ("seconds", "seconds_per_round", "peak_memory_bytes")
    for cut in (first, first + 1, first + 2, 7):
        folder = tmp_path / f"killed-{cut}"
        assert in_child(lambda at=cut, to=folder: (dies_at(at), run(to)))
        kept, found = run(folder)
        assert kept == [f".rounds-{cut - 1}"] and found == expected
        ours, theirs = (
            {key: value for key, value in masks.metadata["findings"].items() if key not in passing}
            for masks in (found, expected)
        )
        assert ours == theirs, cut


@pytest.mark.parametrize("pruner", [Sketch(SynFlow(rounds=4)), FORCE([(IMAGES, torch.arange(4))], rounds=4)])
def test_methods_with_more_than_masks_begin_anew(tmp_path, always, pruner):
    options = {"density": 0.1, "example_input": IMAGES[:1], "seed": 3}
    kept, done, found = broken_off(network(), pruner, tmp_path / "work", 2, **options)
    assert kept == [] and done == 4
    assert found == prune(network(), pruner, **options)


def test_rounds_that_were_damaged_are_done_again(tmp_path, always, monkeypatch):
    has = RestartableFolder.has
    options = {"density": 0.1, "compact": False, "example_input": IMAGES[:1]}

    def damaged(self, name):
        data = bytearray((self.partial / name).read_bytes())
        data[-1] ^= 1
        (self.partial / name).write_bytes(data)
        assert not has(self, name)
        return False

    monkeypatch.setattr(RestartableFolder, "has", damaged)
    kept, done, found = broken_off(network(), SynFlow(rounds=5), tmp_path / "work", 3, **options)
    assert kept == [2] and done == 5
    assert found == prune(network(), SynFlow(rounds=5), **options)


@pytest.mark.slow
def test_walks_begin_anew(tmp_path, always):
    folder = save(resnet(), tmp_path / "model")
    options = {"density": 0.2, "input_shape": "1,3,32,32"}
    expected = contents(prune_checkpoint(folder, PHEW(), tmp_path / "whole", **options).folder)
    assert killed_at(12, lambda: prune_checkpoint(folder, PHEW(), tmp_path / "out", **options))
    assert contents(prune_checkpoint(folder, PHEW(), tmp_path / "out", **options).folder) == expected


def test_several_densities_are_refused(tmp_path):
    with (
        RestartableFolder(tmp_path / "work", {}) as work,
        pytest.raises(ValueError, match="prune: savepoints: wanted one density on one process, got several"),
    ):
        prune(network(), SynFlow(), density=[0.5, 0.1], example_input=IMAGES[:1], savepoints=Savepoints(work))


# --------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize(("a_round", "keeping"), [(0.5, 0.2), (100.0, 30.0)])
def test_keeping_takes_a_hundredth_of_the_time(tmp_path, monkeypatch, a_round, keeping):
    """By a clock that stands still but for rounds and for keeping them."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rounds = [Round(1, 0.5, Real.of(3.0), 1.0)]
    bits = {"w": (torch.ones(1, dtype=torch.uint8), torch.Size((8,)))}
    with RestartableFolder(tmp_path / "work", {}) as work:
        write = work.write

        def slow(name, chunks):
            nonlocal now
            now += keeping
            write(name, chunks)

        monkeypatch.setattr(work, "write", slow)
        kept = Savepoints(work)
        times = []
        while now < 50 * max(60.0, 100 * keeping, a_round):
            now += a_round
            if kept.is_due(len(times) + 1):
                kept.keep(rounds * (len(times) + 1), bits)
                times.append(now)
        assert len(times) > 10
        assert keeping * len(times) <= 0.01 * now + 2 * keeping
        assert min(b - a for a, b in itertools.pairwise(times)) >= 60.0
        assert work.finished_files() == [f".rounds-{len(times)}"]


def test_nothing_is_kept_of_a_short_run(tmp_path, monkeypatch):
    folder = save(llama(), tmp_path / "model")
    monkeypatch.setattr(Savepoints, "keep", lambda *arguments: pytest.fail("kept within a minute"))
    prune_checkpoint(folder, SynFlow(rounds=4), tmp_path / "out", density=0.1)
