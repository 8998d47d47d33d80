"""What tells one model's weights from another's."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import pathprune as pp
from pathprune import ops
from pathprune.belonging import base_hash

# The first numbers of SplitMix64 at seed 0, as published with it.
SPLITMIX64 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]


def found(tensor: Tensor) -> int:
    return int(ops.fingerprint(tensor)) % 2**64


def test_zeros_sum_the_generators_numbers():
    for count in range(5):
        assert found(torch.zeros(count, dtype=torch.int64)) == sum(SPLITMIX64[:count]) % 2**64
    assert found(torch.zeros(3)) == sum(SPLITMIX64[:2]) % 2**64  # the half of a word is filled with zeros


def test_a_word_counts_with_its_place():
    """word + k * gamma is the generator's k-th state after another seed."""
    gamma = 0x9E3779B97F4A7C15
    words = torch.tensor([gamma - 2**64, 2 * gamma - 2**64], dtype=torch.int64)  # gamma, 2 gamma modulo 2^64
    assert found(words) == (SPLITMIX64[1] + SPLITMIX64[3]) % 2**64
    assert found(words.flip(0)) == 2 * SPLITMIX64[2] % 2**64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.complex64])
def test_every_bit_counts(dtype: torch.dtype):
    weight = (torch.randn(5, 13) > 0) if dtype == torch.bool else torch.randn(5, 13).to(dtype)
    seen = {found(weight)}
    for place in range(weight.numel()):
        other = weight.clone()
        other.view(torch.uint8).view(-1)[place * weight.element_size()] ^= 1
        seen.add(found(other))
    assert len(seen) == weight.numel() + 1


def test_the_order_of_values_counts_and_strides_do_not():
    weight = torch.randn(64, 48)
    assert found(weight.t().contiguous().t()) == found(weight) != found(weight.t())
    assert found(weight[torch.randperm(64)]) != found(weight)
    assert found(-weight) != found(weight)


def test_a_hash_of_another_kind_is_not_compared():
    model = nn.Linear(8, 8)
    masks = pp.prune(model, pp.Magnitude(), density=0.5, example_input=torch.ones(1, 8))
    assert masks.metadata["base_hash"] == base_hash(model, masks)
    nn.init.ones_(model.weight)
    assert masks.difference(model).base is not None
    masks.metadata["base_hash"] = "blake2b:0123"
    assert masks.difference(model).base is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.check(model)
