"""Tiny folders of each public image task, and the pixels that are in them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def pixels(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """uint8 [count, 3, height, width]."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=made, dtype=torch.uint8)


def cifar10(folder: Path, a_file: int = 50) -> Path:
    """Labels 0 to 9 in turn."""
    names = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
    for seed, name in enumerate(names):
        labels = (torch.arange(a_file) % 10).to(torch.uint8)[:, None]
        records = torch.cat([labels, pixels(a_file, 32, 32, seed).flatten(1)], 1)
        (folder / name).write_bytes(records.numpy().tobytes())
    return folder


def cifar100(folder: Path, train: int = 300, test: int = 200) -> Path:
    """Fine labels 0 to 99 in turn, a fifth of them as coarse labels."""
    for seed, (name, count) in enumerate({"train.bin": train, "test.bin": test}.items()):
        fine = (torch.arange(count) % 100).to(torch.uint8)[:, None]
        records = torch.cat([fine // 5, fine, pixels(count, 32, 32, seed).flatten(1)], 1)
        (folder / name).write_bytes(records.numpy().tobytes())
    return folder


def write_picture(path: Path, image: Tensor) -> None:
    """uint8 [3, height, width]; the suffix says the format."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path)


def tiny_imagenet(folder: Path, classes: int = 3, train: int = 4, val: int = 2) -> Path:
    """As it is published; in wnids.txt the classes are not in the order of their names."""
    wnids = [f"n{90 - k:08d}" for k in range(classes)]
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    for label, wnid in enumerate(wnids):
        for k, image in enumerate(pixels(train, 64, 64, label)):
            write_picture(folder / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", image)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("a box\n")
    lines = []
    for k, image in enumerate(pixels(classes * val, 64, 64, 99)):
        write_picture(folder / "val" / "images" / f"val_{k}.JPEG", image)
        lines.append(f"val_{k}.JPEG\t{wnids[k % classes]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def by_class(folder: Path, classes: tuple[str, ...] = ("cat", "dog", "emu"), train: int = 4, val: int = 2) -> Path:
    """ImageNet's layout: pictures of all sizes, without loss."""
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            for k in range(count):
                image = pixels(1, 20 + 7 * k + label, 31 - 4 * k, 10 * label + k)[0]
                write_picture(folder / part / name / f"{k}.png", image)
    return folder
