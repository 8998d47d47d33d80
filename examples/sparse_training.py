"""Trains a network that was pruned at initialization twice: masked dense, and sparse.

python examples/sparse_training.py [--density 0.05] [--width 1024] [--epochs 5] [--method synflow,phew]
                                   [--data folder [--images 10000] [--size 64]]

Both runs see the same batches in the same order from the same weights; their losses agree within rounding.
Prints time per step and accuracy of both, and the peak memory of a training run beyond what was held before.
Digits come with scikit-learn; --data names a folder with CIFAR-10, CIFAR-100 (binary versions), Tiny-ImageNet or
pictures by class (train/CLASS/*, val/CLASS/*), of which --images at most are held in memory. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import pathprune as pp
from pathprune.data import Split, digits, open_images
from pathprune.models import mlp

METHODS = {"synflow": pp.SynFlow(rounds=100), "phew": pp.PHEW(), "magnitude": pp.Magnitude(), "random": pp.Random()}


@dataclass(frozen=True)
class Run:
    """What one training run gave. `seconds` is the processor time of a step, the median over all."""

    losses: list[float]
    seconds: float
    accuracy: float


def images_of(options: argparse.Namespace) -> Split:
    """The images that the command line names, as many of each class to train on and to test on."""
    if options.data is None:
        return digits()
    return open_images(options.data, options.size).split(options.images, options.images)


def flat(data: Split) -> Split:
    return Split(data.train_images.flatten(1), data.train_labels, data.test_images.flatten(1), data.test_labels)


def pruned(method: str, width: int, density: float, data: Split) -> tuple[nn.Module, pp.Masks]:
    """A multilayer perceptron at its initialization with masks applied, and these."""
    torch.manual_seed(0)
    model = mlp((data.train_images.shape[1], width, width, data.classes))
    made = pp.prune(model, METHODS[method], density=density, example_input=data.train_images[:1], progress=False)
    assert isinstance(made, pp.Masks)
    made.apply_(model)
    return model, made


def train(model: nn.Module, masks: pp.Masks, data: Split, epochs: int, batch: int, sparse: bool) -> Run:
    """SGD with momentum; layers that are not sparse keep their zeros by `Masks.maintain`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if sparse:
        pp.sparsify(model, masks, batch=batch, optimizer=optimizer)
        masks = pp.Masks({swap.name: masks[swap.name] for swap in model.sparsify_report if not swap.swapped})
    keeping = masks.maintain(model, optimizer)
    order, losses, seconds = torch.Generator().manual_seed(0), [], []
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.train_labels), generator=order).split(batch):
            began = time.process_time()
            loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.process_time() - began)
            losses.append(loss.item())
    keeping.remove()
    with torch.no_grad():
        right = (model(data.test_images).argmax(1) == data.test_labels).float().mean()
    return Run(losses, statistics.median(seconds), float(right))


def memory(key: str) -> float:
    """MB of this process: VmRSS, held now; VmHWM, held at most. Linux."""
    found = re.search(rf"^{key}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1e3 if found else float("nan")


def peak_of(options: argparse.Namespace, method: str, kind: str) -> float:
    """MB that a training run holds at its peak beyond what was held before it, in a process of its own."""
    command = [sys.executable, __file__, "--peak", kind, "--method", method, "--epochs", "1"]
    for name in ("width", "density", "batch"):
        command += [f"--{name}", str(getattr(options, name))]
    for name in ("data", "images", "size"):
        command += [] if getattr(options, name) is None else [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--method", default="synflow")
    parser.add_argument("--data", type=Path, help="a folder with images; else digits")
    parser.add_argument("--images", type=int, default=10_000, help="of --data, to train on and to test on at most")
    parser.add_argument("--size", type=int, help="pixels of a side that pictures of --data are resized to")
    parser.add_argument("--peak", choices=("dense", "sparse"), help="train once and print the peak memory in MB")
    options = parser.parse_args(arguments)
    data = flat(images_of(options))
    if options.peak:
        model, masks = pruned(options.method, options.width, options.density, data)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what pruning has freed would hide what training takes
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = memory("VmRSS")
        train(model, masks, data, options.epochs, options.batch, options.peak == "sparse")
        print(memory("VmHWM") - before)
        return
    for method in options.method.split(","):
        model, masks = pruned(method, options.width, options.density, data)
        print(pp.sparsify(copy.deepcopy(model), masks, batch=options.batch).sparsify_report)
        print(f"{method}: {masks.kept:,} of {masks.total:,} weights kept")
        for dtype in (torch.float64, torch.float32):
            cast = Split(data.train_images.to(dtype), data.train_labels, data.test_images.to(dtype), data.test_labels)
            sparse, dense = (
                train(copy.deepcopy(model).to(dtype), masks, cast, options.epochs, options.batch, is_sparse)
                for is_sparse in (True, False)
            )
            apart = [abs(a - b) / abs(b) for a, b in zip(sparse.losses, dense.losses, strict=True)]
            print(f"{dtype}: losses from {dense.losses[0]:.6f} to {dense.losses[-1]:.6f}; the sparse run's")
            print(f"  are {max(apart[:10]):.1e} apart in the first ten steps, {max(apart):.1e} in all {len(apart)}")
        for kind, run in (("dense", dense), ("sparse", sparse)):
            peak = peak_of(options, method, kind)
            name = "masked dense" if kind == "dense" else kind
            print(f"{name:>12}: {1e3 * run.seconds:.2f} ms a step, {peak:.1f} MB, accuracy {run.accuracy:.1%}")


if __name__ == "__main__":
    main()
