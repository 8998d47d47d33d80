"""Which of today's architectures are read, each at a tiny width: clean reports, scores, cuts, masks, data; or by what
operator it is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pathprune as pp
from architectures import READ, REFUSED, made
from pathprune.network import PathNetwork, UnsupportedModelError
from pathprune.ops import WeightMap
from test_attention import scored
from test_conservation import assert_every_cut_carries_all, lively
from test_recording import through_gates
from test_transformers import MODELS

QUICK = ("DeepSeek-V2", "Llama4", "GPT-OSS", "Bloom", "LLaVA")
LOW_QUICK = ("GPT-OSS",)
DATA_QUICK = ("Bloom", "Gemma 2", "Qwen2-MoE")
REFUSED_QUICK = ("Phi-MoE",)


def marked(names: object, quick: tuple[str, ...]) -> list[object]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", marked(READ, QUICK))
def test_it_is_read_scored_conserved_and_pruned(name: str) -> None:
    model, inputs = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = PathNetwork.support_report(model, inputs)
    assert report, str(report)
    network = PathNetwork.from_module(model, inputs)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not [n.where for n in map(network.nodes.__getitem__, network.alive) if getattr(n, "name", "") == "softmax"]
    for f in (WeightMap.ABS, WeightMap.SQUARE):
        log2_total, scores, _ = scored(network, f=f)
        assert log2_total == log2_total and abs(log2_total) != float("inf")
        assert all(bool((score >= 0).all()) and bool(score.isfinite().all()) for score in scores.values())

    other = lively(copy.deepcopy(model))
    exact = network.with_tensors({**dict(other.named_parameters()), **dict(other.named_buffers())})
    for policy, attention in (("paths", "budget"), ("published", "half")):
        assert_every_cut_carries_all(exact, policy, WeightMap.ABS, attention=attention)

    masks = pp.prune(network, pp.SynFlow(rounds=3), density=0.4)
    assert sum(int(m.sum()) for m in masks.values()) == round(0.4 * sum(m.numel() for m in masks.values()))
    masks.apply_(model)
    with torch.no_grad():
        out = model(**inputs)
    assert all(bool(x.isfinite().all()) for x in out.values() if isinstance(x, Tensor))


@pytest.mark.parametrize("name", marked(READ, LOW_QUICK))
def test_scores_of_bfloat16_are_finite_and_those_of_its_values(name: str) -> None:
    low, low_inputs = made(name, torch.bfloat16)
    found = pp.scores(low, pp.SynFlow(rounds=1), example_input=low_inputs)
    wanted = pp.scores(low.float(), pp.SynFlow(rounds=1), example_input=made(name)[1])
    assert found.log2_R == pytest.approx(wanted.log2_R, abs=0.1)
    for key, score in found.tensors.items():
        assert bool((score >= 0).all()) and bool(score.isfinite().all())
        exact = found.double(key), wanted.double(key)
        assert float(exact[0].sum()) == pytest.approx(float(exact[1].sum()), rel=0.1)


@pytest.mark.parametrize("name", marked(READ, DATA_QUICK))
def test_signed_flow_through_what_data_do_is_the_model(name: str) -> None:
    model, inputs = made(name, torch.float64)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    given = {}
    for key, x in inputs.items():
        size = (2, *x.shape[1:])
        words = x.expand(size).contiguous() if name == "LLaVA" else torch.randint(3, 49, size, generator=generator)
        given[key] = torch.randn(size, generator=generator, dtype=torch.float64) if x.is_floating_point() else words
    found = through_gates(model, given, WeightMap.IDENTITY, "published")
    if READ[name].routes:
        model.config._experts_implementation = "eager"  # one expert after the other
    with torch.no_grad():
        outs = [model(**{key: x[n : n + 1] for key, x in given.items()}) for n in range(2)]
    keys = [key for key in outs[0] if "logits" in key] or list(outs[0])
    for flow, key in zip(found, keys, strict=False):
        wanted = torch.cat([out[key] for out in outs]).double()  # models turn queries, and norm, in float32
        allowed = 1e-6 * float(wanted.abs().max())
        torch.testing.assert_close(flow.reshape(wanted.shape), wanted, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", marked(REFUSED, REFUSED_QUICK))
def test_what_is_refused_is_refused_by_operator_and_module(name: str) -> None:
    _, operator, module = REFUSED[name]
    model, inputs = made(name)
    with torch.no_grad():
        assert model(**inputs) is not None
    message = rf"operator aten\.{operator} in module '[^']*' \({module}.*to support it, write a rule for '{operator}'"
    with pytest.raises(UnsupportedModelError, match=message):
        PathNetwork.from_module(model, inputs)
    assert not PathNetwork.support_report(model, inputs)


def test_the_page_says_which() -> None:
    page = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    read = {name for row in rows for name in row[-1].split(", ")}
    assert {name.split(",")[0] for name in [*READ, *MODELS]} <= read
    refused = {name: row[1].split(", ") for row in rows if len(row) == 3 for name in row[0].split(", ")}
    for name, (_, operator, _) in REFUSED.items():
        assert f"`{operator}`" in refused[name]
        assert name not in read
