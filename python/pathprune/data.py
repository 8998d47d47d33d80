"""Data for demonstrations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images float32 [n, channels, height, width] and labels int64 [n], to train on and to test on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(seed: int = 0, test_share: float = 0.25) -> Split:
    """The 1,797 handwritten digits that come with scikit-learn: 8x8, one channel, scaled to [0, 1].

    Args:
        seed: of the split.
        test_share: fraction held out, drawn from all classes alike.

    Raises:
        ImportError: scikit-learn is missing.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=test_share, random_state=seed, stratify=labels)
    train, test = (torch.from_numpy(part).float().div(16).reshape(-1, 1, 8, 8) for part in parts[:2])
    train_labels, test_labels = (torch.from_numpy(part).long() for part in parts[2:])
    return Split(train, train_labels, test, test_labels)


def cifar10(folder: str | os.PathLike[str]) -> Split:
    """CIFAR-10 from the files of its binary version: 32x32, three channels, scaled to [0, 1].

    Args:
        folder: has ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not made of records of a label below 10 and 3,072 bytes.
    """

    def read(name: str) -> tuple[Tensor, Tensor]:
        raw = torch.frombuffer(bytearray((Path(folder) / name).read_bytes()), dtype=torch.uint8)
        if len(raw) % 3073 or not len(raw) or int(raw[::3073].max()) > 9:
            raise ValueError(f"cifar10: {name}: wanted records of 3,073 bytes that begin with a label, got {len(raw)}")
        records = raw.reshape(-1, 3073)
        return records[:, 1:].float().div(255).reshape(-1, 3, 32, 32), records[:, 0].long()

    parts = [read(f"data_batch_{k}.bin") for k in range(1, 6)]
    train, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Split(train, labels, *read("test_batch.bin"))
