"""Image tasks read from folders: the pixels that were written, drawn parts, bounded memory, and what is refused."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pathprune as pp
from image_folders import by_class, cifar10, cifar100, pixels, tiny_imagenet, write_picture
from pathprune import data, pictures
from pathprune.data import open_images

pytest.importorskip("PIL")

# ------------------------------------------------------------------------------------------------ what is read


def test_cifar10_is_read_from_its_binary_files(tmp_path):
    task = open_images(cifar10(tmp_path, 20))
    assert (task.kind, len(task.classes), task.size, len(task.train), len(task.test)) == ("cifar10", 10, 32, 100, 20)
    images, labels = task.train[:]
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(images[20:40], pixels(20, 32, 32, 1) / 255)
    assert torch.equal(task.test[:][0], pixels(20, 32, 32, 5) / 255)
    assert labels.tolist() == [*range(10)] * 10


def test_cifar100_has_its_fine_labels(tmp_path):
    task = open_images(cifar100(tmp_path))
    assert (task.kind, len(task.classes), task.size) == ("cifar100", 100, 32)
    assert task.train.labels.tolist() == [*range(100)] * 3
    assert torch.equal(task.train[:][0], pixels(300, 32, 32, 0) / 255)
    assert torch.equal(task.test[torch.tensor([7, 199])][0], pixels(200, 32, 32, 1)[[7, 199]] / 255)


def test_tiny_imagenet_is_read_as_published(tmp_path):
    from PIL import Image

    task = open_images(tiny_imagenet(tmp_path))
    assert (task.kind, task.size) == ("tiny-imagenet", 64)
    assert task.classes == ("n00000090", "n00000089", "n00000088")  # as in wnids.txt
    assert task.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert task.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    image, label = task.test[4]
    with Image.open(tmp_path / "val" / "images" / "val_4.JPEG") as opened:
        raw = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8).reshape(64, 64, 3)
    assert label == 1 and torch.equal(image, raw.permute(2, 0, 1) / 255)  # at its own size no pixel is touched


def triangles(length: int, begin: float, side: float, size: int) -> Tensor:
    """[size, length]: the antialiased bilinear filter by its definition, from ``begin`` on over ``side`` pixels."""
    scale = side / size
    middles = begin + (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    away = (torch.arange(length, dtype=torch.float64) + 0.5 - middles[:, None]).abs()
    weights = (1 - away / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def test_pictures_of_any_size_give_their_resized_middle(tmp_path):
    task = open_images(by_class(tmp_path), size=12)
    assert (task.kind, task.classes, task.size) == ("folder", ("cat", "dog", "emu"), 12)
    assert task.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(task.test) == 6
    images, _ = task.train[:]
    for place, image in enumerate(images):
        label, k = divmod(place, 4)
        height, width = 20 + 7 * k + label, 31 - 4 * k
        side = min(height, width)
        down, across = (triangles(n, (n - side) / 2, side, 12) for n in (height, width))
        wanted = down @ pixels(1, height, width, 10 * label + k)[0].double() @ across.T
        torch.testing.assert_close(image.double() * 255, wanted, rtol=0, atol=1.2)  # rounded twice to whole levels


def test_the_middle_of_a_picture_is_taken(tmp_path):
    """Black beside the largest centred square, wide or high; grey and transparent pictures become three channels."""
    from PIL import Image

    for name, shape in (("wide.png", (3, 16, 40)), ("high.bmp", (3, 40, 16))):
        image = torch.zeros(shape, dtype=torch.uint8)
        image[:, (shape[1] - 16) // 2 : (shape[1] + 16) // 2, (shape[2] - 16) // 2 : (shape[2] + 16) // 2] = 200
        write_picture(tmp_path / name, image)
        assert bool((pictures.decoded(tmp_path / name, 16) == 200).all())
    Image.new("L", (9, 9), 77).save(tmp_path / "grey.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 50)).save(tmp_path / "clear.png")
    assert pictures.decoded(tmp_path / "grey.png", 4).unique().tolist() == [77]
    assert pictures.decoded(tmp_path / "clear.png", 4)[:, 0, 0].tolist() == [1, 2, 3]


def test_what_is_no_picture_or_no_class_is_passed_over(tmp_path):
    by_class(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("x")
    (tmp_path / "train" / "cat" / "._0.png").write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "README").write_text("x")
    within = tmp_path / "train" / "cat" / "more" / "3.PNG"
    write_picture(within, pixels(1, 8, 8)[0])
    task = open_images(tmp_path, size=8)
    assert len(task.train) == 13 and task.classes == ("cat", "dog", "emu")
    assert torch.equal(task.train[4][0], pixels(1, 8, 8)[0] / 255)


# -------------------------------------------------------------------------------------------- parts and batches


def test_balanced_parts_are_drawn_by_seed(tmp_path):
    train = open_images(cifar10(tmp_path)).train
    part, again, other = (train.balanced(3, seed) for seed in (1, 1, 2))
    assert torch.bincount(part.labels).tolist() == [3] * 10
    assert torch.equal(part.rows, again.rows) and not torch.equal(part.rows, other.rows)
    assert len(set(part.rows.tolist())) == 30
    assert torch.equal(part.labels, train.labels[part.rows]) and torch.equal(part[:][0], train[part.rows][0])
    assert part.labels.tolist() != sorted(part.labels.tolist())  # batches are of all classes
    assert torch.equal(part.balanced(2, 5)[:][1], part.balanced(2, 5).labels)
    assert [len(train.at_most(count)) for count in (None, 250, 249, 25, 4)] == [250, 250, 240, 20, 10]
    split = open_images(tmp_path).split(train=40, test=30, seed=3)
    assert (len(split.train_images), len(split.test_images), split.classes) == (40, 30, 10)
    assert torch.equal(split.train_images, train.at_most(40, 3)[:][0])


def test_an_uneven_folder_gives_what_its_smallest_class_has(tmp_path):
    by_class(tmp_path)
    for k in range(4, 9):
        write_picture(tmp_path / "train" / "dog" / f"{k}.png", pixels(1, 5, 5)[0])
    train = open_images(tmp_path).train
    assert torch.bincount(train.at_most(15).labels).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="wanted 5 images of each class, got 4 of 'cat'"):
        train.balanced(5)


def test_batches_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    real, read = pictures.decoded, []
    monkeypatch.setattr(pictures, "decoded", lambda path, size: read.append(path.name) or real(path, size))
    task = open_images(by_class(tmp_path), size=10)
    batches = task.train.balanced(3, seed=1).batches(4, seed=2)
    assert not read and len(batches) == 3
    going = iter(batches)
    first = next(going)
    assert len(read) == 4 and first[0].shape == (4, 3, 10, 10)
    rest = list(going)
    assert [len(y) for _, y in (first, *rest)] == [4, 4, 1] and len(read) == 9
    for (x, y), (x_again, y_again) in zip((first, *rest), batches, strict=True):  # another pass
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    held = task.train.held()
    count = len(read)
    assert torch.equal(held[:][0], held.take(torch.arange(12))[:][0]) and len(read) == count
    assert torch.equal(held[:][0], task.train[:][0]) and held.size == 10


def test_torchs_loader_takes_them(tmp_path):
    images = open_images(cifar10(tmp_path, 10)).test
    (x, y), *rest = DataLoader(images, batch_size=8)
    assert torch.equal(x, images[:8][0]) and torch.equal(y, images.labels[:8]) and len(rest) == 1


def test_a_pruner_reads_a_folder_as_it_reads_tensors(tmp_path):
    train = open_images(by_class(tmp_path), size=8).train
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    options = {"density": 0.3, "example_input": train[:1][0], "progress": False}
    lazy = pp.prune(model, pp.SNIP(train.batches(5), pp.cross_entropy), **options)
    x, y = train[:]
    assert lazy == pp.prune(model, pp.SNIP([*zip(x.split(5), y.split(5), strict=True)], pp.cross_entropy), **options)


def test_other_data_have_another_digest(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    by_class(folders[0]), by_class(folders[1]), by_class(folders[2], train=5)
    a, b, c = (open_images(folder, size=8).digest() for folder in folders)
    assert a == b and len({a, c, open_images(folders[0], size=9).digest()}) == 3


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_folder_with_nothing_known_is_described(tmp_path):
    with pytest.raises(ValueError, match=r"wanted CIFAR-10 .* CIFAR-100 .* Tiny-ImageNet .* has nothing"):
        open_images(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"train/CLASS/\*, val/CLASS/\*.* has notes.txt, train"):
        open_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_images(tmp_path / "nowhere")


@pytest.mark.parametrize(("make", "name", "length"), [(cifar10, "data_batch_3", 3073), (cifar100, "test", 3074)])
def test_binary_files_that_are_cut_off_or_others_are_named(tmp_path, make, name, length):
    path = make(tmp_path) / f"{name}.bin"
    whole = path.read_bytes()
    where = re.escape(str(path))
    for content in (whole[:-1], b""):
        path.write_bytes(content)
        wanted = f"{where}: wanted whole records of {length:,} bytes, got {len(content):,} bytes"
        with pytest.raises(ValueError, match=wanted):
            open_images(tmp_path)
    path.write_bytes(b"\xfa" * 2 * length)
    with pytest.raises(ValueError, match=rf"{where}: wanted records that begin with labels below .*, got \(250,"):
        open_images(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        open_images(tmp_path)


def test_a_class_without_pictures_is_named(tmp_path):
    by_class(tmp_path)
    for name in ("0.png", "1.png"):
        (tmp_path / "val" / "dog" / name).unlink()
    with pytest.raises(ValueError, match=r"val/dog: wanted at least one picture, got none"):
        open_images(tmp_path)
    (tmp_path / "val" / "dog").rmdir()
    with pytest.raises(ValueError, match=r"val/dog: wanted at least one picture, got none"):
        open_images(tmp_path)
    write_picture(tmp_path / "val" / "gnu" / "0.png", pixels(1, 5, 5)[0])
    with pytest.raises(ValueError, match=r"val: wanted the classes of .*train, got 'gnu' besides them"):
        open_images(tmp_path)


def test_validation_pictures_without_classes_are_refused(tmp_path):
    by_class(tmp_path / "a")
    (tmp_path / "b" / "val").mkdir(parents=True)
    (tmp_path / "b" / "val" / "0.JPEG").write_bytes(b"")
    (tmp_path / "a" / "train").rename(tmp_path / "b" / "train")
    with pytest.raises(ValueError, match=r"val: wanted a folder of pictures for each class, got none"):
        open_images(tmp_path / "b")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "wnids.txt").unlink(), FileNotFoundError, r"wnids\.txt"),
        (lambda f: (f / "val" / "val_annotations.txt").unlink(), FileNotFoundError, r"val_annotations\.txt"),
        (lambda f: (f / "val" / "images" / "val_3.JPEG").unlink(), ValueError, r"txt: line 4: wanted a picture in .*3"),
        (lambda f: annotate(f, "val_0.JPEG\tdog\t0\n"), ValueError, r"txt: line 1: .* a class, got 'val_0\.JPEG.tdog"),
        (lambda f: annotate(f, "val_0.JPEG"), ValueError, r"txt: line 1: wanted a picture and a class, got 'val_0"),
        (lambda f: annotate(f, "val_0.JPEG\tn00000089\n"), ValueError, "wanted pictures of each class, .*'n00000090'"),
    ],
)
def test_annotations_that_do_not_fit_are_named(tmp_path, spoil, error, message):
    spoil(tiny_imagenet(tmp_path))
    with pytest.raises(error, match=message):
        open_images(tmp_path)


def annotate(folder, text):
    (folder / "val" / "val_annotations.txt").write_text(text)


@pytest.mark.parametrize("suffix", ["png", "JPEG", "bmp"])
def test_a_broken_picture_is_named(tmp_path, suffix):
    by_class(tmp_path)
    path = tmp_path / "train" / "dog" / f"9.{suffix}"
    write_picture(path, pixels(1, 40, 40)[0])
    whole = path.read_bytes()
    task = open_images(tmp_path)
    for content in (whole[: len(whole) // 2], b"no picture", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"train/dog/9\.{suffix}: wanted a whole picture that Pillow reads: "):
            task.train[:]
    path.write_bytes(whole)
    assert len(task.train[:][0]) == 13


def test_without_pillow_it_says_what_to_install(tmp_path, monkeypatch):
    by_class(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install 'pathprune\[images\]'"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: open_images(f, size=64), "size: cifar10 has images of 32 pixels a side, wanted 64"),
        (lambda f: open_images(f, size=0), "size: wanted at least 1 pixel, got 0"),
        (lambda f: open_images(f).train.balanced(0), "per_class: wanted at least 1, got 0"),
        (lambda f: open_images(f).train.batches(0), "batch: wanted at least 1, got 0"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(cifar10(tmp_path, 10))


def test_a_split_knows_its_classes():
    x = torch.zeros(3, 1, 2, 2)
    assert data.Split(x, torch.tensor([0, 4, 1]), x, torch.tensor([0, 1, 1])).classes == 5
