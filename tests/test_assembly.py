"""Parameters made of several file tensors: the values that transformers makes of them, and masks back in the files."""

from __future__ import annotations

import itertools

import pytest
import torch

from pathprune import assembly
from pathprune._mask_io import pack_bits, unpack_bits
from pathprune.assembly import Assembly, NoWayBackError, concatenated, converted, file_bits, stacked

loading = pytest.importorskip("transformers.core_model_loading")
Cat, Chunk, Merge, Split, Turn = (
    getattr(loading, name) for name in ("Concatenate", "Chunk", "MergeModulelist", "Split", "Transpose")
)

# operations, sources (pattern -> shapes of its tensors), targets
CASES = {
    "experts, gate and up": ([Merge(0), Cat(1)], {"g": [(5, 3)] * 4, "u": [(5, 3)] * 4}, ["t"]),
    "experts, down": ([Merge(0)], {"d": [(3, 5)] * 4}, ["t"]),
    "experts along the last axis": ([Merge(2), Cat(1)], {"g": [(5, 3)] * 4, "u": [(5, 2)] * 4}, ["t"]),
    "side by side": ([Cat(1)], {"a": [(4, 3)], "b": [(4, 7)]}, ["t"]),
    "one after the other": ([Cat(0)], {"q": [(4, 3)], "k": [(2, 3)], "v": [(2, 3)]}, ["t"]),
    "turned": ([Turn(0, 1)], {"a": [(4, 7)]}, ["t"]),
    "turned experts": ([Merge(0), Turn(1, 2)], {"a": [(4, 7)] * 3}, ["t"]),
    "chunks": ([Chunk(0)], {"a": [(9, 4)]}, ["q", "k", "v"]),
    "unequal chunks": ([Chunk(0)], {"a": [(8, 4)]}, ["q", "k", "v"]),
    "chunks of columns": ([Chunk(1)], {"a": [(4, 6)]}, ["q", "k"]),
    "split": ([Split(0)], {"a": [(9, 4)]}, ["q", "k", "v"]),
    "turned, then chunks": ([Turn(0, 1), Chunk(0)], {"a": [(3, 8)]}, ["q", "k"]),
    "one axis": ([Cat(0)], {"a": [(5,)], "b": [(3,)]}, ["t"]),
}


class Model:
    """What ``Split`` asks for sizes."""

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty({"q": 4, "k": 3, "v": 2}[name], 4)


def made_both_ways(case: str):
    """File tensors whose values are all different; parameters by transformers and by us."""
    operations, sources, targets = CASES[case]
    counter = itertools.count(0)
    files = {
        (pattern, k): torch.tensor(list(itertools.islice(counter, torch.Size(shape).numel())), dtype=torch.int32)
        .reshape(shape)
        .contiguous()
        for pattern, shapes in sources.items()
        for k, shape in enumerate(shapes)
    }
    values = {p: [files[p, k].clone() for k in range(len(shapes))] for p, shapes in sources.items()}
    for operation in operations:
        names = {"source_patterns": list(sources), "target_patterns": targets, "full_layer_name": targets[0]}
        values = operation.convert(values, **names, model=Model(), config=None)
    expected = {name: value[0] if isinstance(value, list) else value for name, value in values.items()}
    converter = loading.WeightConverter(list(sources), list(targets), operations)
    collected = {
        pattern: [Assembly.of(f"{pattern} {k}", shape) for k, shape in enumerate(shapes)]
        for pattern, shapes in sources.items()
    }
    found = converted(converter, collected, lambda name: Model().get_parameter(name).shape)
    return {f"{pattern} {k}": value for (pattern, k), value in files.items()}, expected, found


@pytest.mark.parametrize("limit", [4, 40, 4 << 20])
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_that_transformers_makes(monkeypatch, case, limit):
    monkeypatch.setattr(assembly, "PIECE_BYTES", limit)
    files, expected, found = made_both_ways(case)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        pieces = list(found[name].pieces(files.__getitem__, torch.int32))
        assert found[name].shape == value.shape
        assert max(piece.numel() * 4 for piece in pieces) <= limit
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]), value.flatten())


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
@pytest.mark.parametrize("case", CASES)
def test_masks_go_back_to_where_the_values_came_from(monkeypatch, case, piece):
    """Values name their place in the files, so the mask of a value is known wherever it is."""
    monkeypatch.setattr(assembly, "PIECE", piece)
    files, expected, found = made_both_ways(case)
    generator = torch.Generator().manual_seed(1)
    total = sum(value.numel() for value in files.values())
    masks = {name: torch.rand(value.shape, generator=generator) < 0.5 for name, value in expected.items()}
    kept = torch.zeros(total, dtype=torch.bool)
    for name, value in expected.items():
        kept[value.flatten().long()] = masks[name].flatten()
    for key, value in files.items():
        uses = [
            (part, (pack_bits(masks[name]), masks[name].shape))
            for name, made in found.items()
            for part in made.parts
            if part.key == key
        ]
        bits = unpack_bits(file_bits(value.shape, uses), 0, value.numel())
        assert torch.equal(bits.view(value.shape), kept[value.long()])


def test_what_is_in_no_parameter_stays():
    first = Assembly.of("a", (4, 6)).narrowed(0, 1, 2)
    uses = [(first.parts[0], (pack_bits(torch.zeros(2, 6)), torch.Size((2, 6))))]
    bits = unpack_bits(file_bits(torch.Size((4, 6)), uses), 0, 24).view(4, 6)
    assert bits.any(1).tolist() == [True, False, False, True]


def test_whole_bytes_are_not_copied():
    """An expert's mask is a window on the bits of all experts'."""
    experts = stacked([Assembly.of(f"e{k}", (4, 6)) for k in range(3)], 0)
    packed = pack_bits(torch.rand(3, 4, 6) < 0.5)
    for k, part in enumerate(experts.parts):
        bits = file_bits(torch.Size((4, 6)), [(part, (packed, experts.shape))])
        assert bits.data_ptr() == packed.data_ptr() + 3 * k


def test_operations_without_a_way_back():
    class Doubled(loading.ConversionOps):
        def convert(self, input_dict, **kwargs):
            return {name: 2 * value for name, value in input_dict.items()}

        @property
        def reverse_op(self):
            return self

    for operation in (Doubled(), loading.Interleave(0), Chunk(0, num_shards_attribute="parts")):
        converter = loading.WeightConverter(["a"], ["t"], [operation])
        with pytest.raises(NoWayBackError):
            converted(converter, {"a": [Assembly.of("a", (4, 4))]}, lambda name: torch.Size((4, 4)))


def test_tensors_that_do_not_fit_together():
    a, b = Assembly.of("a", (4, 3)), Assembly.of("b", (4, 2))
    with pytest.raises(ValueError, match=r"wanted tensors of one shape, got \[\[4, 2\], \[4, 3\]\]"):
        stacked([a, b], 0)
    with pytest.raises(ValueError, match="wanted tensors that differ along axis 0 alone"):
        concatenated([a, b], 0)
    split = loading.WeightConverter(["a"], ["q", "k"], [Split(0)])
    with pytest.raises(ValueError, match=r"wanted 4 slices to be 1 \+ 1"):
        converted(split, {"a": [a]}, lambda name: torch.Size((1, 3)))
