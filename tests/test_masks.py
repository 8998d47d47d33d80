"""Masks: packing, algebra, files, and zeros that hold on a model."""

import copy
import errno
import io
import os
import pickle
import re
import resource
import unittest.mock
from functools import partial

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from pathprune import _mask_io
from pathprune.belonging import base_hash
from pathprune.masks import MaskFileError, MaskMismatchError, Masks

SHAPES = [(1,), (7,), (8,), (9,), (3, 5), (16, 17), (0,), (4, 0), (2, 3, 3, 3), (1, 1, 65)]
UINT8 = torch.zeros(1, dtype=torch.uint8)
FORMAT = {"format": "pathprune.masks", "format_version": "1", "metadata": "{}"}


def bools(shape, seed=0, density=0.4):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def some_masks(seed=0, **metadata):
    return Masks({"a.weight": bools((5, 7), seed), "b.weight": bools((3, 2, 3, 3), seed + 100)}, metadata)


def small_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    head = [nn.Flatten(), nn.Linear(16, 9), nn.Linear(9, 2)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head).to(dtype)


def masks_for(model):
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.ndim > 1]
    return Masks({name: bools(weight.shape, seed) for seed, (name, weight) in enumerate(weights)})


def assert_zero_where_removed(model, masks):
    for name, mask in masks.items():
        removed = model.get_parameter(name).detach()[~mask]
        assert removed.numel() > 0
        assert torch.equal(removed, torch.zeros_like(removed)), name


def refuses(error, words, call, *args, **options):
    with pytest.raises(error, match=words):
        call(*args, **options)


def assert_same_values(model, values):
    torch.testing.assert_close(dict(model.state_dict()), values, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_follows_the_documented_layout(shape):
    mask = bools(shape)
    masks, flat = Masks({"w": mask}), mask.flatten().tolist()
    packed, stored_shape = masks.packed("w")
    octets = [flat[first : first + 8] for first in range(0, len(flat), 8)]
    assert packed.tolist() == [sum(bit << place for place, bit in enumerate(octet)) for octet in octets]
    assert (stored_shape, packed.dtype) == (mask.shape, torch.uint8)
    assert torch.equal(masks["w"], mask)
    assert Masks.from_packed({"w": (packed, shape)}) == masks


@pytest.fixture
def tiny_pieces(monkeypatch):
    """Pieces of 16 weights, so that small tensors cross many borders."""
    monkeypatch.setattr(_mask_io, "PIECE", 16)
    monkeypatch.setattr(_mask_io.flat_pieces, "__defaults__", (16,))


def test_everything_holds_across_piece_borders(tiny_pieces):
    mask, strided = bools((13, 11), density=0.3), bools((11, 13), density=0.3).t()
    masks = Masks({"w": mask, "t": strided})
    torch.testing.assert_close(dict(masks), {"w": mask, "t": strided})
    assert masks.shuffle(3).counts() == masks.counts() == {"w": (mask.sum(), 143), "t": (strided.sum(), 143)}
    mask[4] = mask[:, 2] = False
    assert Masks({"w": mask}).widths()["w"] == (mask.any(1).sum(), 13, mask.any(0).sum(), 11)
    three = [Masks({"w": bools((13, 11), seed)}) for seed in range(3)]
    assert torch.equal(Masks.soup(three, at_least=2)["w"], sum(member["w"].int() for member in three) >= 2)
    model = nn.Linear(11, 13)
    contiguous = base_hash(model, ["weight"])
    model.weight.data = model.weight.detach().t().contiguous().t()
    assert base_hash(model, ["weight"]) == contiguous
    expected = model.weight.detach() * mask
    Masks({"weight": mask}).apply_(model)
    assert torch.equal(model.weight, expected)


@pytest.mark.parametrize(
    ("make", "given", "error", "words"),
    [
        (Masks, torch.tensor(True), ValueError, "w: wanted at least one dimension"),
        (Masks, torch.ones(3), TypeError, "w: wanted a bool tensor, got torch.float32"),
        (Masks, torch.ones(3, dtype=torch.bool, device="meta"), ValueError, "meta"),
        (Masks.from_packed, (UINT8 + 255, (7,)), ValueError, "zeros beyond bit 7"),
        (Masks.from_packed, (UINT8, (9,)), ValueError, r"wanted uint8 \[2\]"),
        (Masks.from_packed, (UINT8.char(), (8,)), ValueError, "int8"),
        (Masks.from_packed, (UINT8, ()), ValueError, "at least one dimension"),
    ],
)
def test_what_is_no_mask_is_refused(make, given, error, words):
    refuses(error, words, make, {"w": given})


def test_it_is_a_mapping():
    masks = some_masks(method="synflow")
    shapes = {name: mask.shape for name, mask in masks.items()}
    assert shapes == {"a.weight": (5, 7), "b.weight": (3, 2, 3, 3)}
    assert (len(masks), "c.weight" in masks, masks.get("c.weight", 3)) == (2, False, 3)
    refuses(KeyError, r"c\.weight", masks.__getitem__, "c.weight")
    masks["a.weight"].zero_()  # a fresh tensor: nothing changes
    assert masks == some_masks(method="magnitude")
    assert masks not in (some_masks(1), Masks({"a.weight": masks["a.weight"]}), 3)
    assert Masks.ones({"w": (2, 4)}) != Masks.ones({"w": (4, 2)})
    elsewhere = masks.to("meta")  # a device that every machine has; the values it lacks are proved below
    assert (elsewhere["a.weight"].device.type, elsewhere["a.weight"].shape) == ("meta", (5, 7))
    packed = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(_mask_io.unpack_by_shifts(packed), _mask_io.unpack_bits(packed, 0, 2048))


def test_counts_density_and_widths():
    conv = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    conv[0, 1, 1, 0] = conv[2, 1, 0, 0] = conv[2, 2, 1, 1] = True
    masks = Masks({"c": conv, "v": torch.tensor([True, False]), "e": torch.ones(3, 0, dtype=torch.bool)})
    assert masks.counts() == {"c": (3, 48), "v": (1, 2), "e": (0, 0)}
    assert (masks.kept, masks.total, masks.density, masks.sparsity) == (4, 50, 0.08, 0.92)
    assert masks.widths() == {"c": (2, 4, 2, 3), "v": (1, 2, 1, 1), "e": (0, 3, 0, 0)}
    assert repr(masks) == "Masks(3 layers, 4 of 50 weights kept, density 0.08)"
    assert (Masks({}).density, Masks({}).sparsity) == (1, 0)


def test_ones_and_masks_of_the_zeros_of_a_model():
    layers = {"norm": nn.LayerNorm(4), "conv": nn.Conv1d(4, 3, 3), "head": nn.Linear(4, 5)}
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), **layers})
    assert list(Masks.ones(model)) == ["conv.weight", "head.weight"]
    model["head"].weight = model["embed"].weight
    assert Masks.ones(model) == Masks.ones({"embed.weight": (5, 4), "conv.weight": (3, 4, 3)})
    assert (Masks.ones({"w": (3, 3)}).packed("w")[0].tolist(), Masks.ones(model).density) == ([255, 1], 1)
    model = small_model()
    assert Masks.from_model(masks_for(model).apply_(model)) == masks_for(model)
    model[4].weight.data.fill_(torch.nan)
    assert Masks.from_model(model, ["4.weight"])["4.weight"].all()
    refuses(ValueError, "meta", Masks.from_model, model.to("meta"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.tuples(st.integers(0), st.integers(0)))
def test_algebra_laws(shape, seeds):
    a, b = (Masks({"v": bools(shape, seed % 2**31), "w": bools((3, 5), seed % 5)}) for seed in seeds)
    assert (a & b) == (b & a) == Masks.soup([a, b], at_least=2)
    assert (a | b) == a.union(b) == Masks.soup([a, b])
    assert ~(a & b) == (~a | ~b)
    assert ~~a == a == a.invert().invert() == (a & (a | b))
    assert (a ^ b) == ((a | b) & ~(a & b))
    assert ((a ^ a).kept, (a | ~a).kept) == (0, a.total)
    assert (a | ~a) == Masks.ones({name: mask.shape for name, mask in a.items()})
    for name in a:
        assert torch.equal((a & b)[name], a[name] & b[name])
        assert torch.equal((a ^ b)[name], a[name] ^ b[name])


def test_masks_of_different_layers_do_not_mix():
    first = Masks({"a": bools((2, 3)), "b": bools((4,)), "d": bools((5,))})
    second = Masks({"a": bools((3, 2)), "c": bools((4,)), "d": bools((5,))})
    words = "only in the first: b; only in the second: c; other shapes: a ([2, 3] and [3, 2])"
    for mix in (first.__and__, first.union, lambda other: Masks.soup([first, other])):
        refuses(MaskMismatchError, re.escape(words), mix, second)
    assert first.__and__({"a": bools((2, 3))}) is NotImplemented
    refuses(ValueError, r"wanted 1 \.\. 1, got 2", Masks.soup, [first], at_least=2)


def test_shuffle_keeps_counts_moves_weights_and_repeats():
    masks = Masks({"a": bools((40, 30), 1, 0.1), "b": bools((17, 3), 2), "full": bools((9,), density=2)})
    shuffled = masks.shuffle(7)
    assert shuffled.counts() == masks.counts()
    assert not any(torch.equal(shuffled[name], masks[name]) for name in ("a", "b"))
    assert masks.shuffle(8) != shuffled == masks.shuffle(7)
    assert torch.equal(Masks({"b": masks["b"]}).shuffle(7)["b"], shuffled["b"])
    generator = torch.Generator().manual_seed(3)
    first, second = masks.shuffle(generator), masks.shuffle(generator)
    assert second != first == masks.shuffle(torch.Generator().manual_seed(3))
    # What a seed means is pinned: it is quoted in files and papers.
    pinned = Masks({"w": torch.arange(24) < 6}).shuffle(0)["w"]
    assert pinned.nonzero().flatten().tolist() == [6, 7, 11, 19, 21, 22]


def test_shuffle_is_uniform(tiny_pieces):
    """Each weight is kept equally often: chi-square over 1000 shuffles, six standard deviations allowed."""
    masks, times, kept = Masks({"w": torch.arange(37) < 10}), 1000, 10 / 37
    hits = sum(masks.shuffle(seed)["w"].double() for seed in range(times))
    statistic = ((hits - times * kept) ** 2 / (times * kept * (1 - kept))).sum().item() * 36 / 37
    assert abs(statistic - 36) < 6 * (2 * 36) ** 0.5


def test_metadata():
    config = {"rounds": (1, 2)}
    masks = some_masks(method="synflow", base_hash="h", config=config)
    config["rounds"] = None
    assert (masks.metadata["findings"], masks.metadata["config"]) == ({}, {"rounds": [1, 2]})
    both = masks & some_masks(1, method="magnitude", base_hash="h")
    assert [operand["method"] for operand in both.metadata["operands"]] == ["synflow", "magnitude"]
    assert (both.metadata["operation"], both.metadata["base_hash"]) == ("and", "h")
    assert "base_hash" not in (masks | some_masks(2)).metadata
    assert masks.shuffle(5).metadata["seed"] == 5
    refuses(TypeError, "JSON", some_masks, config=torch.float32)
    for twin in (copy.deepcopy(masks), pickle.loads(pickle.dumps(masks)), masks.to("cpu")):
        assert (twin, twin.metadata) == (masks, masks.metadata)
        twin.metadata["config"]["rounds"] = 1
        assert masks.metadata["config"]["rounds"] == [1, 2]


def test_round_trip(tmp_path):
    layers = {f"layer{i}.weight": bools(shape, i) for i, shape in enumerate(SHAPES)}
    masks = Masks(layers, {"method": "synflow", "density": 0.05, "note": "ünï"})
    masks.metadata["findings"] = {"log2_sum": [1.5, None]}
    path, link = tmp_path / "masks.safetensors", tmp_path / "link"
    masks.save(path)
    loaded = Masks.load(str(path))
    assert (loaded, loaded.metadata, list(loaded)) == (masks, masks.metadata, list(masks))
    tensors = safetensors.torch.load_file(path)  # any reader of the format sees the packed bits
    assert all(torch.equal(tensors[name], masks.packed(name)[0]) for name in masks)
    first = path.read_bytes()
    link.symlink_to(path)
    masks.save(link)
    assert (link.is_symlink(), path.read_bytes()) == (True, first)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    Masks({}).save(path)
    assert Masks.load(path) == Masks({})
    assert sorted(os.listdir(tmp_path)) == ["link", "masks.safetensors", "plain"]


def test_every_truncation_and_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "m"
    Masks({"w": bools((3, 7))}, {"seed": 1}).save(path)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))] + [whole + b"\0"]
    number = int.from_bytes(whole, "little")
    damaged += [(number ^ 1 << bit).to_bytes(len(whole), "little") for bit in range(8 * len(whole))]
    for content in damaged:
        path.write_bytes(content)
        refuses(MaskFileError, re.escape(str(path)), Masks.load, path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, r"wanted metadata with format 'pathprune\.masks', got no such entry"),
        ({"format": "pt"}, "got format 'pt'"),
        ({**FORMAT, "format_version": "2"}, "wanted format version 1, got 2"),
        ({**FORMAT, "shapes": '{"w": [3, 7]}'}, "altered or damaged"),
        *(({**FORMAT, "shapes": shapes}, "") for shapes in ('{"w": [9]}', '{"v": [21]}', "{", "{}")),
    ],
)
def test_foreign_and_forged_files_are_refused(tmp_path, metadata, words):
    packed = {"w": torch.zeros(3, dtype=torch.uint8)}
    if not words:
        metadata = {**metadata, "checksum": _mask_io._checksum(metadata, packed)}
    safetensors.torch.save_file(packed, tmp_path / "m", metadata)
    refuses(MaskFileError, words or "shape", Masks.load, tmp_path / "m")
    torch.save(packed, tmp_path / "m")
    refuses(MaskFileError, "not a safetensors file", Masks.load, tmp_path / "m")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_leaves_things_as_they_were(tmp_path, monkeypatch, step, error, existing):
    if existing:
        some_masks(1).save(tmp_path / "m")
    monkeypatch.setattr(os, step, unittest.mock.Mock(side_effect=error))
    refuses(type(error), None, some_masks(2).save, tmp_path / "m")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["m"] * existing
    assert not existing or Masks.load(tmp_path / "m") == some_masks(1)


def test_a_write_that_fails_half_way(tmp_path):
    some_masks().save(tmp_path / "m")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # no file may be longer: a real short write
    try:
        refuses(OSError, "too large", Masks({"w": bools((1000, 1000))}).save, tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (os.listdir(tmp_path), Masks.load(tmp_path / "m")) == (["m"], some_masks())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_apply_writes_exact_zeros_in_place_and_nothing_else(dtype):
    model = small_model(dtype=dtype).to(memory_format=torch.channels_last)
    masks = masks_for(model)
    for name, mask in masks.items():
        poison = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype).repeat(len(mask.flatten()))
        model.get_parameter(name).data[~mask] = poison[: int((~mask).sum())]
    dense, pointers = copy.deepcopy(model.state_dict()), [weight.data_ptr() for weight in model.parameters()]
    expected = dense | {name: dense[name].masked_fill(~mask, 0) for name, mask in masks.items()}
    assert masks.apply_(model) is model
    assert_same_values(model, expected)
    assert [weight.data_ptr() for weight in model.parameters()] == pointers
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    fresh = small_model(1, dtype)
    fresh.load_state_dict(model.state_dict())  # the dense model takes it
    assert_same_values(fresh, expected)


def test_tied_weights_are_one():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    for names in (["0.weight"], ["1.weight"], ["0.weight", "1.weight"]):
        model[0].weight.data.fill_(1)
        Masks(dict.fromkeys(names, bools((6, 6)))).apply_(model)
        assert torch.equal(model[1].weight != 0, bools((6, 6)))
    conflicting = Masks({"0.weight": bools((6, 6)), "1.weight": ~bools((6, 6))})
    refuses(MaskMismatchError, r"0\.weight and 1\.weight are one tied weight", conflicting.apply_, model)


def test_a_foreign_model_is_refused_in_words_before_any_write(tmp_path):
    masks = Masks({"0.weight": bools((4, 3, 3, 3)), "4.weight": bools((9, 15)), "7.weight": bools((2, 2))})
    masks.save(tmp_path / "m")
    model = small_model()
    dense, optimizer = copy.deepcopy(model.state_dict()), torch.optim.SGD(model.parameters(), 0.1)
    uses = [masks.apply_, masks.check, masks.to_torch_prune, partial(masks.maintain, optimizer=optimizer)]
    words = "no 7.weight; other shapes: 4.weight (mask [9, 15], model [9, 16]); weights of the model without"
    for use in (*uses, partial(Masks.load, tmp_path / "m")):
        refuses(MaskMismatchError, re.escape(words), use, model)
    refuses(MaskMismatchError, "other shapes", masks.apply_, model, strict=False)
    assert_same_values(model, dense)
    fits = Masks({"4.weight": bools((9, 16)), "7.weight": bools((2, 2))})
    assert fits.check(model, strict=False).absent == ("7.weight",)
    assert torch.equal(fits.apply_(model, strict=False)[4].weight, dense["4.weight"] * fits["4.weight"])
    wrapped = nn.ModuleDict({"module": model})
    refuses(MaskMismatchError, r"its names begin with 'module\.'", masks_for(model).apply_, wrapped)
    refuses(MaskMismatchError, r"masks' names begin with 'module\.'", masks_for(wrapped).apply_, model)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model: model[1].to("meta"), r"1\.weight .*meta device.*load the weights first"),
        (lambda model: setattr(model[1], "weight", nn.Parameter(torch.eye(4).to_sparse())), "sparse_coo"),
        (lambda model: setattr(model[1], "weight", nn.Parameter(torch.ones(4).expand(4, 4))), "share memory"),
    ],
)
def test_weights_that_cannot_be_written_are_refused_before_any_write(spoil, words):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first = model[0].weight.data
    values = first.clone()
    spoil(model)
    refuses(ValueError, words, masks_for(model).apply_, model)
    assert torch.equal(first, values)


@pytest.mark.filterwarnings("error")
def test_other_base_weights_are_reported_as_asked():
    model, trained = small_model(dtype=torch.bfloat16), small_model(1)
    masks = masks_for(model)
    masks.metadata["base_hash"] = base = base_hash(model, masks)
    assert re.fullmatch(r"splitmix64:[0-9a-f]{32}", base)
    strided = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert base_hash(strided, reversed(list(masks))) == base
    assert base_hash(copy.deepcopy(model).float(), masks) != base
    assert (masks.check(model).base, masks.check(trained, base="ignore").base) == (None, None)
    model[4].weight.data[-1, -1] *= 1.01
    for other in (model, trained):
        refuses(MaskMismatchError, "base weights: masks made on splitmix64:", masks.apply_, other, base="raise")
        assert Masks.from_model(other).density == 1
        with pytest.warns(UserWarning, match="other weights"):
            masks.apply_(other)
        assert_zero_where_removed(other, masks)
    refuses(ValueError, "wanted 'warn'", masks.check, model, base="loud")


def train_step(model, optimizer, step, after_backward=lambda: None):
    optimizer.zero_grad()
    model(torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
    after_backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "foreach": False}),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
        (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "foreach": False}),
        (torch.optim.Adam, {"foreach": True}),
        (torch.optim.AdamW, {"weight_decay": 0.3}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    ],
)
def test_maintained_training_is_training_multiplied_by_hand(kind, options):
    model = small_model()
    masks, by_hand = masks_for(model), copy.deepcopy(model)
    nets = [(net[:4].parameters(), net[4:].parameters()) for net in (model, by_hand)]
    groups = [[{"params": body}, {"params": head, "lr": 0.02}] for body, head in nets]
    optimizer, hand_optimizer = (kind(group, 0.01, **options) for group in groups)

    def parts(net, held, name):
        weight = net.get_parameter(name)
        states = (state for state in held.state[weight].values() if torch.is_tensor(state) and state.ndim)
        return [weight.data, weight.grad, *states]

    def multiply():
        for name, mask in masks.items():
            for part in parts(by_hand, hand_optimizer, name):
                part.mul_(mask)

    for step in range(3):  # dense first: momentum at the weights that will go
        train_step(model, optimizer, step)
        train_step(by_hand, hand_optimizer, step)
    multiply()
    with masks.maintain(model, optimizer):
        for step in range(3, 9):
            for name, mask in masks.items():
                assert not any(part[~mask].count_nonzero() for part in parts(model, optimizer, name))
            train_step(model, optimizer, step)
            train_step(by_hand, hand_optimizer, step, multiply)
            multiply()
        assert list(model.state_dict()) == list(by_hand.state_dict())
    assert_same_values(model, by_hand.state_dict())
    assert not torch.equal(model[4].weight, small_model()[4].weight * masks["4.weight"])


def hooks_of(model, optimizer):
    gradient = sum(len(weight._post_accumulate_grad_hooks or ()) for weight in model.parameters())
    return gradient + len(optimizer._optimizer_step_post_hooks)


def test_maintenance_ends_with_its_block_and_copies_are_free_of_it():
    model, buffer = small_model(), io.BytesIO()
    masks, optimizer = masks_for(model), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(KeyboardInterrupt), masks.maintain(model, optimizer):  # noqa: PT012
        assert hooks_of(model, optimizer) == 4
        torch.save(model, buffer)
        twins = [copy.deepcopy(model), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)]
        raise KeyboardInterrupt
    assert b"pathprune" not in buffer.getvalue()
    maintenance = masks.maintain(model, optimizer)
    train_step(model, optimizer, 0)
    assert_zero_where_removed(model, masks)
    maintenance.remove()
    maintenance.remove()
    for net in (model, *twins):
        own = optimizer if net is model else torch.optim.SGD(net.parameters(), 0.1)
        assert hooks_of(net, own) == 0
        train_step(net, own, 1)
        assert Masks.from_model(net).kept > masks.kept


def test_maintenance_of_odd_setups():
    model = small_model()
    masks, dense = masks_for(model), copy.deepcopy(model.state_dict())
    refuses(ValueError, "no masked", masks.maintain, model, torch.optim.SGD(small_model().parameters(), 1))
    assert_same_values(model, dense)
    model[4].weight.requires_grad_(False)  # frozen at first, joins the optimizer later
    model[5].weight.grad = torch.full((2, 9), torch.nan)  # a gradient from before
    optimizer = torch.optim.SGD([model[5].weight], 0.1, momentum=0.9, weight_decay=0.1)
    optimizer.state[model[5].weight]["codes"] = codes = torch.ones(2, 9, dtype=torch.uint8)
    with masks.maintain(model, type("Wrapper", (), {"optimizer": optimizer})()):
        assert not model[5].weight.grad[~masks["5.weight"]].count_nonzero()
        optimizer.add_param_group({"params": [model[4].weight.requires_grad_(True)]})
        for step in range(3):
            train_step(model, optimizer, step)
            assert_zero_where_removed(model, masks)
        assert codes.all()


def test_bridges_to_and_from_torch_prune():
    model = small_model().append(nn.Linear(2, 9)).append(nn.Linear(9, 2))
    model[7].weight = model[5].weight
    masks, expected = masks_for(model), copy.deepcopy(model)
    masks.to_torch_prune(model)
    assert "7.weight_orig" in dict(model.named_parameters(remove_duplicate=False))
    assert Masks.from_torch_prune(model) == masks
    refuses(MaskMismatchError, r"under torch\.nn\.utils\.prune", masks.check, model)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(x), masks.apply_(expected).eval()(x))
    linear = nn.Linear(5, 4).bfloat16()
    refuses(ValueError, "no tensor of the model", Masks.from_torch_prune, linear)
    torch_prune.random_unstructured(linear, "weight", 7)
    torch_prune.l1_unstructured(linear, "bias", 1)
    assert Masks.from_torch_prune(linear).counts() == {"weight": (13, 20), "bias": (3, 4)}
