"""Interrupted anywhere, a pruned checkpoint is completed with the same bytes; before that it is not there at all."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from checkpoint_folders import contents, llama, save
from kills import killed_at
from pathprune import CheckpointError, Magnitude, _mask_io, prune_checkpoint
from pathprune.checkpoint import verify
from pathprune.restartable import RestartableFolder

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(llama(), tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="module")
def expected(whole, tmp_path_factory):
    """The bytes of a run without interruption."""
    return contents(pruned(whole, tmp_path_factory.mktemp("expected") / "out").folder)


def pruned(folder, out, **options):
    return prune_checkpoint(folder, Magnitude(), out, **{"density": 0.5, **options})


def test_a_run_is_repeatable(whole, expected, tmp_path):
    assert contents(pruned(whole, tmp_path / "out", budget=0).folder) == expected


def test_killed_at_any_step(whole, expected, tmp_path):
    """Killed ever later, each time from the beginning; then resumed."""
    before = contents(whole)
    count, kills = 0, 0
    while True:
        out = tmp_path / str(count) / "out"
        out.parent.mkdir()
        if not killed_at(count, lambda out=out: pruned(whole, out)):
            break
        kills += 1
        if out.exists():
            verify(out)
        assert contents(pruned(whole, out).folder) == expected
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        count += 1 if count < 3 else 17
    assert kills > 5
    assert contents(whole) == before


def test_killed_again_and_again(whole, expected, tmp_path):
    """Each attempt is killed after a few steps; what is finished stays finished, so that it ends."""
    generator = random.Random(0)
    attempts = 0
    while killed_at(generator.randrange(20, 60), lambda: pruned(whole, tmp_path / "out")):
        attempts += 1
        assert attempts < 40
    assert attempts >= 2
    assert contents(tmp_path / "out") == expected


def test_finished_shards_are_not_written_again(whole, expected, tmp_path):
    killed_at(70, lambda: pruned(whole, tmp_path / "out"))
    partial = tmp_path / ".out.partial"
    done = {path.name: path.stat().st_mtime_ns for path in partial.glob("model-*")}
    assert done
    made = pruned(whole, tmp_path / "out").folder
    assert {name: (made / name).stat().st_mtime_ns for name in done} == done
    assert contents(made) == expected


def test_a_finished_shard_that_was_damaged_is_made_again(whole, expected, tmp_path):
    killed_at(70, lambda: pruned(whole, tmp_path / "out"))
    for path in (tmp_path / ".out.partial").glob("m*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert contents(pruned(whole, tmp_path / "out").folder) == expected


def test_a_journal_that_was_damaged_begins_anew(whole, expected, tmp_path):
    killed_at(70, lambda: pruned(whole, tmp_path / "out"))
    (tmp_path / ".out.partial" / "pathprune.json").write_text("{")
    assert contents(pruned(whole, tmp_path / "out").folder) == expected


def test_other_arguments_do_not_go_on(whole, tmp_path):
    killed_at(70, lambda: pruned(whole, tmp_path / "out"))
    partial = contents(tmp_path / ".out.partial")
    with pytest.raises(CheckpointError, match=r"left of a run with other arguments \(density was 0.5, now 0.4\)"):
        pruned(whole, tmp_path / "out", density=0.4)
    assert contents(tmp_path / ".out.partial") == partial


def test_a_source_that_has_changed_does_not_go_on(whole, tmp_path):
    import shutil

    folder = shutil.copytree(whole, tmp_path / "llama")
    killed_at(70, lambda: pruned(folder, tmp_path / "out"))
    shard = sorted(folder.glob("model-*"))[0]
    os.utime(shard, ns=(0, 0))
    with pytest.raises(CheckpointError, match=r"left of a run with other arguments \(source was"):
        pruned(folder, tmp_path / "out")


def test_two_at_once(whole, tmp_path):
    with (
        RestartableFolder(tmp_path / "out", {}),
        pytest.raises(CheckpointError, match="another process is writing"),
        RestartableFolder(tmp_path / "out", {}),
    ):
        pass


# ------------------------------------------------------------------------------------------------- full disks


def test_a_file_size_limit(whole, expected, tmp_path):
    """A limit on file sizes stands for a full disk: an error by name, no output, and the next attempt goes on."""
    before = contents(whole)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:  # noqa: PT011 (the errno says which)
            pruned(whole, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "out").exists()
    assert contents(whole) == before
    assert contents(pruned(whole, tmp_path / "out").folder) == expected


def test_a_disk_that_fills_up(whole, expected, tmp_path, monkeypatch):
    real, calls = os.fsync, 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(_mask_io.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        pruned(whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    names = {path.name for path in (tmp_path / ".out.partial").iterdir()}
    assert not any(name.endswith(".tmp") for name in names)
    monkeypatch.setattr(_mask_io.os, "fsync", real)
    assert contents(pruned(whole, tmp_path / "out").folder) == expected


def test_a_disk_without_room_is_refused_before_any_work(whole, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"bytes of free space, the disk has 1,000"):
        pruned(whole, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_at_random_times(whole, expected, tmp_path):
    """The command itself, killed from outside."""
    command = [sys.executable, "-m", "pathprune.cli", "prune-checkpoint", str(whole), "--density", "0.5"]
    command += ["--out", str(tmp_path / "out")]
    generator = random.Random(1)
    began = time.monotonic()
    subprocess.run([*command[:-1], str(tmp_path / "timed")], check=True, capture_output=True)
    takes = time.monotonic() - began
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(takes * generator.uniform(0.7, 1.0))
        process.kill()
        process.wait()
        if (tmp_path / "out").exists():
            verify(tmp_path / "out")
    subprocess.run(command, check=True, capture_output=True)
    assert contents(tmp_path / "out") == expected
