"""Images to train on: scikit-learn's digits, and the public image tasks from a folder on disk, read when asked for.

``open_images`` tells from what a folder has in it which task it is: CIFAR-10 and CIFAR-100 (binary versions),
Tiny-ImageNet as it is published, or ImageNet's layout, ``train/CLASS/*`` and ``val/CLASS/*``.

Memory: CIFAR's pixels as bytes (184 MB); of a folder of pictures (:mod:`pictures`) the names and labels alone, until
images are asked for: batches are decoded one at a time, a subset is drawn before it is decoded.
Oracle: the bytes and pictures that were written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .pictures import Pictures, annotated, class_folders, of_classes, require_decoder


@dataclass(frozen=True)
class Split:
    """Images float32 [n, channels, height, width] and labels int64 [n], to train on and to test on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """Labels are in [0, classes), and the last class is among those to train on."""
        return int(self.train_labels.max()) + 1


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


# -------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled square images of three channels: a map-style dataset that a ``DataLoader`` takes too.

    Attributes:
        pixels: indexed by an int64 tensor, gives uint8 [..., 3, size, size]: a tensor, or pictures on disk.
        rows: int64 [n], which of ``pixels`` these are.
        labels: int64 [n], in [0, number of classes).
        classes: their names.
    """

    pixels: Tensor | Pictures
    rows: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 [..., 3, size, size] in [0, 1], and their labels.

        Raises:
            ValueError: a picture that cannot be read; names the file.
        """
        return self.pixels[self.rows[chosen]].float().div(255), self.labels[chosen]

    @property
    def size(self) -> int:
        return self.pixels.shape[-1]

    def take(self, chosen: Tensor) -> Images:
        """A part, int64 [m] in any order; nothing is read."""
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen])

    def held(self) -> Images:
        """The same with its pixels in memory, as bytes: for who goes through them more than once."""
        return replace(self, pixels=self.pixels[self.rows], rows=torch.arange(len(self)))

    def balanced(self, per_class: int, seed: int = 0) -> Images:
        """``per_class`` images of each class, drawn without replacement, in the order they were drawn.

        Raises:
            ValueError: a class with fewer; names it. ``per_class`` below 1.
        """
        if per_class < 1:
            raise ValueError(f"Images.balanced: per_class: wanted at least 1, got {per_class}")
        counts = torch.bincount(self.labels, minlength=len(self.classes))
        short = int(counts.argmin())
        if int(counts[short]) < per_class:
            raise ValueError(
                f"Images.balanced: wanted {per_class} images of each class, got {int(counts[short])} of "
                f"'{self.classes[short]}'"
            )
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        by_class = drawn[self.labels[drawn].argsort(stable=True)]
        place = torch.arange(len(self)) - (counts.cumsum(0) - counts)[self.labels[by_class]]  # within its class
        is_taken = torch.zeros(len(self), dtype=torch.bool)
        is_taken[by_class[place < per_class]] = True
        return self.take(drawn[is_taken[drawn]])

    def at_most(self, count: int | None, seed: int = 0) -> Images:
        """All, or if they are more than ``count``: as many of each class as fit into it, and one at least."""
        if count is None or count >= len(self):
            return self
        fewest = int(torch.bincount(self.labels, minlength=len(self.classes)).min())
        return self.balanced(max(1, min(count // len(self.classes), fewest)), seed)

    def batches(self, batch: int = 128, seed: int | None = None) -> ImageBatches:
        """Batches ``(x, y)`` as pruners take them, decoded one at a time; every pass gives the same.

        Args:
            batch: images in each but the last.
            seed: of the order; None: as they are.

        Raises:
            ValueError: ``batch`` below 1.

        Example:
            >>> images = open_images("imagenet", size=224).train.balanced(10)
            >>> masks = pp.prune(model, pp.SNIP(images.batches(64), pp.cross_entropy), density=0.1, example_input=x)
        """
        if batch < 1:
            raise ValueError(f"Images.batches: batch: wanted at least 1, got {batch}")
        if seed is None:
            return ImageBatches(self, batch)
        made = torch.Generator().manual_seed(seed)
        return ImageBatches(self.take(torch.randperm(len(self), generator=made)), batch)


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """A re-iterable of batches (x float32 [b, 3, size, size] in [0, 1], y int64 [b])."""

    images: Images
    batch: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.arange(len(self.images)).split(self.batch):
            yield self.images[chosen]


@dataclass(frozen=True, eq=False)
class ImageTask:
    """What a folder has: ``kind`` is cifar10, cifar100, tiny-imagenet or folder."""

    kind: str
    train: Images
    test: Images

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def size(self) -> int:
        return self.train.size

    def split(self, train: int | None = None, test: int | None = None, seed: int = 0) -> Split:
        """The images in memory as float32, ``Images.at_most`` so many to train on and to test on."""
        return Split(*self.train.at_most(train, seed)[:], *self.test.at_most(test, seed)[:])

    def digest(self) -> str:
        """16 hex digits of kind, size, classes and labels: other data have others."""
        found = hashlib.blake2b(repr((self.kind, self.size, self.classes)).encode(), digest_size=8)
        for images in (self.train, self.test):
            found.update(images.labels.numpy().tobytes())
        return found.hexdigest()


# ------------------------------------------------------------------------------------------------------- folders


def open_images(folder: str | os.PathLike[str], size: int | None = None) -> ImageTask:
    """The image task in a folder, known by its files. Nothing is downloaded.

    * CIFAR-10, binary version: ``data_batch_1.bin`` to ``data_batch_5.bin``, ``test_batch.bin``.
    * CIFAR-100, binary version: ``train.bin``, ``test.bin``; labels are the fine ones.
    * Tiny-ImageNet: ``wnids.txt``, ``train/WNID/images/*``, ``val/images/*`` and ``val/val_annotations.txt``.
    * ImageNet's layout: ``train/CLASS/*`` and ``val/CLASS/*``, pictures of any size, also in folders within; classes
      are in the order of their names.

    Args:
        folder: the one that these are in.
        size: pixels of a side; of a picture the largest square in its middle is taken, resized with an antialiased
            bilinear filter. None: 64. CIFAR's images are 32 and stay so.

    Raises:
        OSError: no such folder, or a file that cannot be read.
        ValueError: none of these; a file of records that is cut off or has labels out of range; a class without
            pictures; annotations that do not fit the pictures; a size that CIFAR has not. Names the file.
        ImportError: a folder of pictures, and Pillow is missing.

    Example:
        >>> task = open_images("tiny-imagenet-200")
        >>> data = task.split(train=2000, test=1000)
    """
    folder = Path(folder)
    if size is not None and size < 1:
        raise ValueError(f"open_images: size: wanted at least 1 pixel, got {size}")
    there = sorted(os.listdir(folder))
    if any(name.startswith("data_batch_") for name in there) or "test_batch.bin" in there:
        train = [folder / f"data_batch_{k}.bin" for k in range(1, 6)]
        return _cifar("cifar10", train, [folder / "test_batch.bin"], (10,), size)
    if "train.bin" in there or "test.bin" in there:
        return _cifar("cifar100", [folder / "train.bin"], [folder / "test.bin"], (20, 100), size)
    if not ((folder / "train").is_dir() and (folder / "val").is_dir()):
        got = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") if there else "nothing"
        raise ValueError(
            "open_images: folder: wanted CIFAR-10 (data_batch_1.bin, ...), CIFAR-100 (train.bin, test.bin), "
            "Tiny-ImageNet (wnids.txt, train, val) or classes of pictures (train/CLASS/*, val/CLASS/*); "
            f"{folder} has {got}"
        )
    require_decoder()
    return _pictures(folder, size or 64)


def _cifar(
    kind: str, train: Sequence[Path], test: Sequence[Path], below: tuple[int, ...], size: int | None
) -> ImageTask:
    """Records of label bytes, each below its number, the last one the class, and 3 x 32 x 32 bytes."""
    if size not in (None, 32):
        raise ValueError(f"open_images: size: {kind} has images of 32 pixels a side, wanted {size}")
    classes = tuple(map(str, range(below[-1])))
    length = len(below) + 3072

    def read(path: Path) -> Tensor:
        raw = bytearray(path.read_bytes())
        if not raw or len(raw) % length:
            raise ValueError(f"{kind}: {path}: wanted whole records of {length:,} bytes, got {len(raw):,} bytes")
        records = torch.frombuffer(raw, dtype=torch.uint8).reshape(-1, length)
        largest = tuple(records[:, : len(below)].amax(0).tolist())
        if any(value >= bound for value, bound in zip(largest, below, strict=True)):
            raise ValueError(f"{kind}: {path}: wanted records that begin with labels below {below}, got {largest}")
        return records

    def images(paths: Sequence[Path]) -> Images:
        records = torch.cat([read(path) for path in paths])
        labels = records[:, len(below) - 1].long()
        return Images(records[:, len(below) :].unflatten(1, (3, 32, 32)), torch.arange(len(labels)), labels, classes)

    return ImageTask(kind, images(train), images(test))


def _pictures(folder: Path, size: int) -> ImageTask:
    def images(found: tuple[Path, list[str], list[int]], classes: tuple[str, ...]) -> Images:
        root, names, labels = found
        return Images(Pictures(root, names, size), torch.arange(len(names)), torch.tensor(labels), classes)

    train, val = folder / "train", folder / "val"
    is_tiny = (val / "val_annotations.txt").exists() or ((folder / "wnids.txt").exists() and (val / "images").exists())
    if is_tiny:
        classes = tuple((folder / "wnids.txt").read_text().split())
        return ImageTask(
            "tiny-imagenet", images(of_classes(train, classes), classes), images(annotated(val, classes), classes)
        )
    classes = class_folders(train)
    unknown = set(class_folders(val)) - set(classes)
    if unknown:
        raise ValueError(f"open_images: {val}: wanted the classes of {train}, got '{min(unknown)}' besides them")
    return ImageTask("folder", images(of_classes(train, classes), classes), images(of_classes(val, classes), classes))
