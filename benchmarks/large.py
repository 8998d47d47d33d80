"""From file to file: peak memory and time of ``prune_checkpoint`` on a synthetic Llama or Mixtral.

    python benchmarks/large.py --shape 1.1b [--method magnitude] [--scope global] [--folder KEPT]

A fresh process prunes; its time is compared with reading and with copying the files. Its peak resident memory counts
file pages too, so the weights it has mapped are in it.
"beyond the start" is the peak less what Python, torch and transformers had when the work began; "beyond the shard" the
peak less the largest shard. The masks are checked against a count made from the files afterwards.

SynFlow runs three rounds, each of two sweeps; Wanda on eight samples of 128 tokens, so that its time is that of the
weights, not of the matrix products.

Bytes: magnitude reads the weights four times (finite, bracket, cut, hash), reads and writes each shard once, and hashes
what it writes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from harness import machine_facts, machine_name
from pathprune import Magnitude, Masks, SynFlow, SynFlowL2, Wanda, prune_checkpoint
from pathprune.residency import DEFAULT_BUDGET
from pathprune.shards import PIECE_BYTES, Shard
from synthetic_checkpoint import SHAPES, write

TOKENS = [{"input_ids": torch.arange(k, k + 128)[None]} for k in range(8)]
METHODS = {
    "magnitude": Magnitude(),
    "synflow": SynFlow(rounds=3),
    "synflow-l2": SynFlowL2(rounds=3),
    "wanda": Wanda(TOKENS, by_blocks=True),
}
RESULTS = Path(__file__).parent / "results"


def peak() -> int:
    """Bytes this process has had resident at most, file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def read_once(folder: Path) -> float:
    """Seconds to read every shard from end to end, piece by piece."""
    piece = bytearray(PIECE_BYTES)
    began = time.perf_counter()
    for path in sorted(folder.glob("model*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    return time.perf_counter() - began


def copy_once(folder: Path, out: Path) -> float:
    """Seconds to copy every shard, piece by piece, and to bring it to the disk: what any rewriting takes."""
    began = time.perf_counter()
    out.mkdir()
    for path in sorted(folder.glob("model*.safetensors")):
        with open(path, "rb", buffering=0) as file, open(out / path.name, "wb", buffering=0) as copy:
            while piece := file.read(PIECE_BYTES):
                copy.write(piece)
            os.fsync(copy.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def child(folder: Path, out: Path, method: str, scope: str, budget: int) -> dict[str, Any]:
    """What the measured process does."""
    from transformers import LlamaForCausalLM  # noqa: F401 (so that its memory is in the start)

    before, start = read_once(folder), peak()
    began = time.perf_counter()
    density = {} if ":" in scope else {"density": 0.5}
    made = prune_checkpoint(folder, METHODS[method], out, scope=scope, budget=budget, **density)
    seconds = time.perf_counter() - began
    facts = {"start": start, "peak": peak(), "seconds": seconds, "kept": made.masks.kept}
    reading = min(before, read_once(folder))
    return {**facts, "read_once": reading, "copy_once": copy_once(folder, out.with_name(out.name + "-copy"))}


def mask_of(masks: Masks, name: str) -> torch.Tensor | None:
    """The mask of a file tensor; of an expert, its part of the mask of all: gate rows (w1), then up rows (w3)."""
    layer, _, expert = name.partition(".block_sparse_moe.experts.")
    if not expert:
        return masks.get(name)
    k, which, _ = expert.split(".")
    if which == "w2":
        return masks[f"{layer}.mlp.experts.down_proj"][int(k)]
    return masks[f"{layer}.mlp.experts.gate_up_proj"][int(k)].chunk(2)[which == "w3"]


def check(folder: Path, out: Path) -> None:
    """Weights that stay are the file's own, the others zero; per tensor, from the files."""
    masks = Masks.load(out / "masks.safetensors")
    for path in sorted(folder.glob("model*.safetensors")):
        before, after = Shard(path), Shard(out / path.name)
        for name in before.entries:
            kept = mask_of(masks, name)
            weight, pruned = before.tensor(name).view(torch.int16), after.tensor(name).view(torch.int16)
            expected = weight if kept is None else weight * kept
            if not torch.equal(pruned, expected):
                raise AssertionError(f"{name}: not the weights under the mask")
            before.drop(name)
            after.drop(name)


def measure(folder: Path, method: str, scope: str, budget: int) -> dict[str, Any]:
    out = folder.with_name(folder.name + "-pruned")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--child", str(folder), str(out), method, scope, str(budget)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    check(folder, out)
    shutil.rmtree(out)
    shards = [path.stat().st_size for path in folder.glob("model*.safetensors")]
    return {
        "method": method,
        "scope": scope,
        "budget": budget,
        "weights": sum(shards),
        "largest_shard": max(shards),
        "beyond_start": found["peak"] - found["start"],
        "beyond_shard": found["peak"] - max(shards),
        "over_reading_once": found["seconds"] / found["read_once"],
        "over_copying_once": found["seconds"] / found["copy_once"],
        **found,
    }


def save(path: Path, result: dict[str, Any], facts: dict[str, Any]) -> None:
    """Adds a result, in place of one of the same case; each keeps when it was run, and on how many cores."""
    before = json.loads(path.read_text()) if path.exists() else {"results": [], "machine": facts}
    own, theirs = ({name: about[name] for name in ("date", "usable_cores")} for about in (facts, before["machine"]))
    known = [{**theirs, **old} for old in before["results"]]
    same = ("shape", "method", "scope", "budget")
    known = [old for old in known if any(old[key] != result[key] for key in same)]
    results = [*known, {**result, **own}]
    path.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--method", choices=METHODS, default="magnitude")
    parser.add_argument("--scope", help="default: the method's own")
    parser.add_argument("--folder", type=Path, help="keep the synthetic checkpoint here")
    parser.add_argument("--budget", type=int, default=DEFAULT_BUDGET)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/large.MACHINE.json")
    given = parser.parse_args()
    scope = given.scope or METHODS[given.method].scope
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / given.shape
        if not (folder / "config.json").exists():
            write(folder, SHAPES[given.shape])
        result = {"shape": given.shape, **measure(folder, given.method, scope, given.budget)}
    gb, mb = 1e9, 1 << 20
    print(f"{given.shape} {given.method} {scope}: {result['weights'] / gb:.2f} GB of weights on disk")
    print(f"  peak resident {result['peak'] / mb:.0f} MB: {result['beyond_start'] / mb:.0f} MB beyond the start")
    print(f"  largest shard {result['largest_shard'] / mb:.0f} MB: peak {result['beyond_shard'] / mb:.0f} MB beyond it")
    print(f"  {result['seconds']:.1f} s, {result['over_copying_once']:.1f} times copying the shards, ", end="")
    print(f"{result['over_reading_once']:.1f} times reading them (from the system's file cache, where it has them)")
    if given.save:
        save(RESULTS / f"large.{machine_name()}.json", result, machine_facts())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        source, target, name, kind, bytes_ = sys.argv[2:]
        os.environ["HF_HUB_OFFLINE"] = "1"
        print(json.dumps(child(Path(source), Path(target), name, kind, int(bytes_))))
    else:
        main()
