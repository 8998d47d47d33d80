"""Safetensors files read in place: against the safetensors library, and files that lie."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from file_pages import mapped
from pathprune import CheckpointError
from pathprune._mask_io import pack_bits
from pathprune.residency import Residency, Window
from pathprune.shards import PIECE_BYTES, Shard

EVERY = {
    "double": torch.randn(3, 5, dtype=torch.float64),
    "single": torch.randn(7),
    "half": torch.randn(2, 3, 4).half(),
    "brain": torch.randn(5, 1).bfloat16(),
    "eight": torch.randn(9).to(torch.float8_e4m3fn),
    "integer": torch.arange(4),
    "byte": torch.arange(3, dtype=torch.uint8),
    "truth": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 4),
}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def written(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def one(shape=(2,), kind="F32", offsets=(0, 8)) -> dict:
    return {"w": {"dtype": kind, "shape": list(shape), "data_offsets": list(offsets)}}


def test_windows_are_what_the_library_reads(tmp_path):
    save_file(EVERY, tmp_path / "a.safetensors")
    shard = Shard(tmp_path / "a.safetensors")
    assert shard.entries.keys() == EVERY.keys()
    for name, value in load_file(tmp_path / "a.safetensors").items():
        window = shard.tensor(name)
        assert window.dtype == value.dtype and window.shape == value.shape
        assert torch.equal(
            window.view(torch.uint8) if value.dim() else window, value.view(torch.uint8) if value.dim() else value
        )


def test_a_window_stays_the_same_when_its_memory_is_dropped(tmp_path):
    value = torch.randn(300, 1000)
    save_file({"w": value, "v": value + 1}, tmp_path / "a.safetensors")
    shard = Shard(tmp_path / "a.safetensors")
    window = shard.tensor("w")
    assert torch.equal(window, value)
    shard.drop("w")
    shard.prefetch("v")
    assert torch.equal(window, value) and torch.equal(shard.tensor("v"), value + 1)


def test_dropping_gives_memory_back(tmp_path):
    save_file({"w": torch.ones(8 << 20)}, tmp_path / "a.safetensors")  # 32 MB
    shard = Shard(tmp_path / "a.safetensors")
    before = mapped()
    shard.tensor("w").sum()
    read = mapped()
    shard.drop("w")
    assert read - before > 30 << 20
    assert mapped() - before < 2 << 20


def test_a_write_to_a_window_stays_in_memory(tmp_path):
    save_file({"w": torch.ones(5)}, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    Shard(tmp_path / "a.safetensors").tensor("w").zero_()
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_a_tensor_off_its_alignment(tmp_path):
    data = b"x" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = {"b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, **one(offsets=(1, 9))}
    for pad in range(4):  # one of them puts the floats at a multiple of four
        path = written(tmp_path / f"{pad}.safetensors", json.dumps(header).encode() + b" " * pad, data)
        assert Shard(path).tensor("w").tolist() == [1.5, -2.0]


def test_a_dtype_that_torch_does_not_have_is_copied(tmp_path):
    path = written(tmp_path / "a.safetensors", one((2,), "F4_NEW", (0, 1)), b"\x12")
    shard = Shard(path)
    with pytest.raises(CheckpointError, match=r"a.safetensors: w: wanted a dtype of torch, got F4_NEW"):
        shard.tensor("w")
    assert b"".join(shard.pruned({})) == path.read_bytes()


LIES = {
    "short": (b"\x01\x02", "wanted at least 8 bytes, got 2"),
    "long header": ((10**6).to_bytes(8, "little") + b"{}", "its header should have 1000000 bytes, the file has 10"),
    "huge header": ((2**63).to_bytes(8, "little") + b"{}", "its header should have"),
    "not json": (b"{]", "its header cannot be read"),
    "a list": (b"[]", "it is not an object"),
    "not text": (b"\xff\xfe", "its header cannot be read"),
    "twice": (b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 1 + b'"w":1}', "a name occurs twice"),
    "deep": (b'{"w":' * 5000 + b"1" + b"}" * 5000, "its header cannot be read"),
}
CLAIMS = {
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, 8, "its header cannot be read: 'dtype'"),
    "negative": (one((-2,)), 8, "'w' has impossible sizes"),
    "fraction": (one((2.0,)), 8, "'w' has impossible sizes"),
    "backwards": (one(offsets=(8, 0)), 8, "'w' has impossible sizes"),
    "wrong size": (one((3,)), 8, r"'w' has 8 bytes, which is not F32 \[3\]"),
    "truncated": (one(), 7, "its tensors end at byte .*, the file at"),
    "trailing": (one(), 9, "its tensors end at byte .*, the file at"),
    "gap": (one(offsets=(4, 12)), 12, "'w' should begin at byte"),
    "overlap": ({**one(), "v": one(offsets=(4, 12))["w"]}, 12, "'v' should begin at byte"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_is_none(tmp_path, case):
    content, message = LIES[case]
    path = tmp_path / "bad.safetensors"
    if content[:1] in b"{[\xff":
        written(path, content)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="bad.safetensors: not a whole safetensors file: .*" + message):
        Shard(path)


@pytest.mark.parametrize("case", CLAIMS)
def test_a_header_that_lies(tmp_path, case):
    header, size, message = CLAIMS[case]
    path = written(tmp_path / "bad.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match="bad.safetensors: not a whole safetensors file: .*" + message):
        Shard(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_pruned_bytes(tmp_path, dtype):
    """Over several pieces, with NaN and infinities removed and kept; against the library."""
    torch.manual_seed(0)
    count = PIECE_BYTES // dtype.itemsize * 2 + 13
    value = torch.randn(count).to(dtype)
    value[3:7] = torch.tensor([math.nan, math.inf, -math.inf, -0.0]).to(dtype)
    keep = torch.rand(count) < 0.5
    keep[3:7] = torch.tensor([False, False, True, False])
    save_file({"w": value, "other": torch.ones(3)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    out = tmp_path / "b.safetensors"
    out.write_bytes(
        b"".join(bytes(piece) for piece in Shard(tmp_path / "a.safetensors").pruned({"w": pack_bits(keep)}))
    )
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        found, other = file.get_tensor("w"), file.get_tensor("other")
    assert torch.equal(other, torch.ones(3))
    assert torch.equal(
        found.view(torch.uint8), torch.where(keep, value, torch.zeros((), dtype=dtype)).view(torch.uint8)
    )


def test_a_file_that_changes_while_it_is_copied(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(4 * PIECE_BYTES // 4)}, path)
    shard = Shard(path)
    pieces = shard.pruned({})
    next(pieces)
    with open(path, "r+b") as file:
        file.truncate(PIECE_BYTES * 2)
    with pytest.raises(CheckpointError, match=r"a.safetensors: w: the file ends before the tensor does"):
        list(pieces)
    save_file({"w": torch.zeros(4 * PIECE_BYTES // 4)}, path)
    with pytest.raises(CheckpointError, match=r"a.safetensors: changed while it was being read"):
        list(shard.pruned({}))


# ------------------------------------------------------------------------------------------------- residency


class Recorder:
    """Windows that note what is asked of them."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.events: list[tuple[str, str]] = []
        self.windows = {name: self._window(name, size) for name, size in sizes.items()}

    def _window(self, name: str, size: int) -> Window:
        return Window(size, lambda: self.events.append(("drop", name)), lambda: self.events.append(("prefetch", name)))

    def of(self, kind: str) -> list[str]:
        return [name for event, name in self.events if event == kind]


def test_the_oldest_goes_first():
    record = Recorder({"a": 3, "b": 3, "c": 3})
    used = Residency(record.windows, budget=6)
    for name in "abab":
        used(name)
    assert record.of("drop") == [] and used.held == 6
    used("c")
    assert record.of("drop") == ["a"] and used.held == 6
    used("b")
    used("a")
    assert record.of("drop") == ["a", "c"]


def test_what_is_larger_than_the_budget_goes_at_once():
    record = Recorder({"a": 3, "b": 30})
    used = Residency(record.windows, budget=6)
    used("a")
    used("b")
    assert record.of("drop") == ["a", "b"] and used.held == 0
    used("unknown")
    assert used.held == 0


def test_sweeps_are_foreseen_in_both_directions():
    record = Recorder(dict.fromkeys("abcd", 4))
    used = Residency(record.windows, budget=4)
    for name in "abcdcba":
        used(name)
    assert record.of("prefetch") == []
    for name in "bcdcba":
        used(name)
    assert record.of("prefetch") == ["c", "d", "c", "b", "a", "b"]


def test_release_lets_everything_go():
    record = Recorder({"a": 3, "b": 3})
    used = Residency(record.windows, budget=10)
    used("a")
    used.release()
    assert sorted(record.of("drop")) == ["a", "b"] and used.held == 0


def test_a_negative_budget():
    with pytest.raises(ValueError, match="Residency: budget: wanted at least 0 bytes, got -1"):
        Residency({}, -1)
