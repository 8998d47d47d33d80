"""Pictures in folders: listed by class without reading them, decoded when they are indexed.

Decoding is Pillow's, which is needed for folders of pictures alone. The largest square in the middle of a picture is
resized to the size asked for: resizing the shorter side and cropping the centre, without rounding to pixels in between.

Memory: about 100 bytes a picture listed, and the pictures of one batch.
Oracle: the filter by its definition, in float64.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Files ``names`` in the folder ``root``, as square images of ``size`` pixels a side."""

    root: Path
    names: list[str]
    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.names), 3, self.size, self.size)

    def __getitem__(self, chosen: Tensor) -> Tensor:
        """uint8 [..., 3, size, size] of an int64 tensor [...].

        Raises:
            ValueError: a picture that cannot be read; names the file.
        """
        found = torch.empty(chosen.numel(), 3, self.size, self.size, dtype=torch.uint8)
        for place, row in enumerate(chosen.reshape(-1).tolist()):
            found[place] = decoded(self.root / self.names[row], self.size)
        return found.reshape(*chosen.shape, 3, self.size, self.size)


def decoded(path: Path, size: int) -> Tensor:
    """The picture's largest centred square, uint8 [3, size, size]; grey and other colours become RGB.

    Raises:
        ValueError: not a whole picture of a format that Pillow reads; names the file.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Images: {path}: wanted a whole picture that Pillow reads: {error}") from error
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    square = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def require_decoder() -> None:
    """Raises ImportError if Pillow is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("open_images: a folder of pictures needs Pillow: pip install 'pathprune[images]'") from error


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, in order; hidden ones are none.

    Raises:
        ValueError: there is none.
    """
    with os.scandir(folder) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(f"open_images: {folder}: wanted a folder of pictures for each class, got none")
    return tuple(found)


def of_classes(folder: Path, classes: Sequence[str]) -> tuple[Path, list[str], list[int]]:
    """``folder``, the pictures in the folder of each class, also in folders within, and their labels.

    Raises:
        ValueError: a class without pictures; names its folder.
    """
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        before = len(names)
        for within, folders, files in os.walk(folder / name):
            folders.sort()
            relative = os.path.relpath(within, folder)
            names += [os.path.join(relative, file) for file in sorted(files) if _is_picture(file)]
        if len(names) == before:
            raise ValueError(f"open_images: {folder / name}: wanted at least one picture, got none")
        labels += [label] * (len(names) - before)
    return folder, names, labels


def annotated(folder: Path, classes: Sequence[str]) -> tuple[Path, list[str], list[int]]:
    """``folder/images``, the pictures that ``folder/val_annotations.txt`` names, and their labels.

    Each line is a file's name, a tab and its class; what follows (a box) is not read.

    Raises:
        OSError: no annotations.
        ValueError: a line that is none of these, a class that is not known, a picture that is not there, a class
            without pictures; names the file.
    """
    path, labels_of = folder / "val_annotations.txt", {name: label for label, name in enumerate(classes)}
    there = set(os.listdir(folder / "images"))
    names: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, class_name, *_ = [*line.split("\t"), "", ""]
        if class_name not in labels_of:
            raise ValueError(f"open_images: {path}: line {number}: wanted a picture and a class, got {line!r}")
        if name not in there:
            raise ValueError(f"open_images: {path}: line {number}: wanted a picture in {folder / 'images'}, got {name}")
        names.append(name)
        labels.append(labels_of[class_name])
    missing = sorted(set(range(len(classes))) - set(labels))
    if missing:
        raise ValueError(f"open_images: {path}: wanted pictures of each class, got none of '{classes[missing[0]]}'")
    return folder / "images", names, labels


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
