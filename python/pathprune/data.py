"""Data for demonstrations."""

from __future__ import annotations

from dataclasses import dataclass

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
