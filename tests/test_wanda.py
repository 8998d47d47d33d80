"""Wanda: scores and masks against the definition, from activations that are all kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathprune import PathNetwork, Wanda, activations, layer_network, prune, scores


class Tokens(nn.Module):
    """Two linear layers and a Conv1D over tokens, one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 20)
        self.again = nn.Linear(20, 20)
        self.last = nn.Linear(20, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.again(F.relu(self.again(F.relu(self.first(x)))))))


def definition(weight: Tensor, inputs: list[Tensor], keep: int) -> Tensor:
    """|w| ||x||, and of each row the ``keep`` largest: as the paper has it, in float64."""
    x = torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs]).double()
    metric = weight.double().abs() * x.norm(dim=0)
    order = metric.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(metric, dtype=torch.bool).scatter_(1, order, True)


def seen(model: nn.Module, data: list[Tensor]) -> dict[str, list[Tensor]]:
    """What enters each linear layer."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: found.setdefault(f"{name}.weight", []).append(args[0].detach())
        )
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Tokens()


@pytest.fixture
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 7, 6), torch.randn(1, 3, 6) * 5, torch.randn(2, 50, 6)]


@pytest.mark.parametrize("tokens", [1, 16, 4096])
def test_masks_are_those_of_the_definition(monkeypatch, model, data, tokens):
    monkeypatch.setattr(activations, "_TOKENS", tokens)
    masks = prune(model, Wanda(data), density=0.3)
    inputs = seen(model, data)
    assert len(inputs["again.weight"]) == 2 * len(data)
    for name, weight in model.named_parameters():
        if name in masks:
            assert torch.equal(masks[name], definition(weight.detach(), inputs[name], round(0.3 * weight.shape[1])))
    assert masks.metadata["config"]["scope"] == "row"


def test_two_of_every_four(model, data):
    masks = prune(model, Wanda(data), scope="2:4", exclude="first.weight")
    inputs = seen(model, data)
    for name in masks:
        weight = dict(model.named_parameters())[name].detach()
        x = torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs[name]]).double()
        metric = (weight.double().abs() * x.norm(dim=0)).unflatten(1, (-1, 4))
        third = metric.sort(dim=-1, descending=True).values[..., 1:2]
        assert torch.equal(masks[name], (metric >= third).flatten(1))


def test_the_network_may_be_given(model, data):
    expected = prune(model, Wanda(data), density=0.5)
    assert prune(layer_network(model), Wanda(data), density=0.5) == expected
    assert prune(PathNetwork.from_module(model, data[1]), Wanda(data), density=0.5) == expected
    assert prune(model, Wanda(data), density=0.5, example_input=data[1]) == expected
    assert prune(model, Wanda([(x, torch.zeros(1)) for x in data]), density=0.5) == expected


def test_conv1d_rows_are_output_units(data):
    """The same function as a Hugging Face Conv1D has the same masks, turned."""
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 24))
    turned = nn.Sequential(Conv1D(40, 6), nn.ReLU(), Conv1D(24, 40))
    with torch.no_grad():
        for k in (0, 2):
            turned[k].weight.copy_(plain[k].weight.T)
            turned[k].bias.copy_(plain[k].bias)
    for options in ({"density": 0.4}, {"scope": "2:4", "exclude": "0.weight"}):
        expected, found = prune(plain, Wanda(data), **options), prune(turned, Wanda(data), **options)
        assert all(torch.equal(found[name], expected[name].T) for name in expected)


@pytest.mark.parametrize("padding", [0, (1, 2), "same"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_see_patches(padding, groups):
    """As the linear layer over patches that a convolution is."""
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, (3, 2), padding=padding, groups=groups, dilation=(1, 2), bias=False)
    batches = [torch.randn(2, 4, 9, 8), torch.randn(1, 4, 7, 11)]
    made = scores(nn.Sequential(module), Wanda(batches), example_input=batches[0]).double("0.weight")
    patches = []
    for x in batches:
        padded = F.pad(x.double(), module._reversed_padding_repeated_twice)
        for group in padded.chunk(groups, 1):
            patches.append(F.unfold(group, (3, 2), dilation=(1, 2)).transpose(1, 2).reshape(-1, 2 * 3 * 4 // groups))
    for group in range(groups):
        rows = slice(group * 6 // groups, (group + 1) * 6 // groups)
        norm = torch.cat(patches[group::groups]).norm(dim=0)
        expected = module.weight[rows].detach().double().abs().flatten(1) * norm
        torch.testing.assert_close(made[rows].flatten(1), expected, rtol=1e-6, atol=0)


def test_the_model_stays_as_it_is(model, data):
    model.train()
    model.again.training = False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    prune(model, Wanda(data), density=0.5)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_mistakes(model, data):
    with pytest.raises(TypeError, match="Wanda: data: wanted a re-iterable"):
        Wanda(iter(data))
    with pytest.raises(ValueError, match="Wanda: data: wanted at least one batch, got none"):
        prune(model, Wanda([]), density=0.5)
    with pytest.raises(ValueError, match="Wanda: data: wanted finite inputs, got NaN"):
        prune(model, Wanda([torch.full((1, 6), torch.nan)]), density=0.5)
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Wanda: data: 'unused.weight' was not run by any batch; exclude it"):
        prune(model, Wanda(data), density=0.5)
    assert prune(model, Wanda(data), density=0.5, exclude="unused.weight").kept
    turned = nn.Sequential(nn.ConvTranspose2d(2, 2, 3))
    with pytest.raises(
        ValueError, match=r"Wanda: '0.weight': wanted a linear layer or a convolution, got one transposed"
    ):
        prune(turned, Wanda([torch.ones(1, 2, 4, 4)]), density=0.5)
    by_hand = PathNetwork()
    flow = by_hand.add_synapse(by_hand.add_input(1, 4), torch.ones(3, 4), "w")
    with pytest.raises(ValueError, match="Wanda: model: wanted a module"):
        prune(by_hand.set_outputs(flow), Wanda(data), density=0.5)


def test_inputs_that_overflow_are_refused(data):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(1e38)
    with pytest.raises(ValueError, match=r"Wanda: data: the inputs of '1.weight' are NaN or infinite"):
        prune(model, Wanda([x.abs() for x in data]), density=0.5)


# ---------------------------------------------------------------------------------------------- block by block


class Chain(nn.Module):
    """A convolutional stem, blocks with an argument besides, and a head."""

    def __init__(self, tuples: bool = False, kind: str = "chain") -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Step(tuples) for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for k, block in enumerate(self.blocks):
            if self.kind == "short" and k == 2:
                break
            scale = float(k) if self.kind == "arguments" else 0.5
            out = block(h, scale=scale * block.gain)
            out = out[0] if isinstance(out, tuple) else out
            h = out + 1 if self.kind == "between" else out
        if self.kind == "twice":
            h = self.blocks[0](h, scale=0.5)
        return self.head(h)


class Step(nn.Module):
    gain = 1.0

    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.layer, self.tuples = nn.Linear(8, 8), tuples

    def forward(self, h: Tensor, scale: float) -> Tensor | tuple[Tensor]:
        h = h + scale * F.relu(self.layer(h))
        return (h,) if self.tuples else h


@pytest.mark.parametrize("tuples", [False, True])
def test_block_by_block_is_the_same(data, tuples):
    """Masks and norms bit for bit; every layer of every block is run once for each sample, and once to check."""
    torch.manual_seed(0)
    chain = Chain(tuples)
    runs = dict.fromkeys(range(3), 0)
    for k, block in enumerate(chain.blocks):
        block.layer.register_forward_hook(lambda *_, k=k: runs.__setitem__(k, runs[k] + 1))
    blocks = list(chain.blocks)
    expected = prune(chain, Wanda(data), density=0.4)
    runs = dict.fromkeys(range(3), 0)
    assert prune(chain, Wanda(data, by_blocks=True), density=0.4) == expected
    assert set(runs.values()) == {len(data) + 1}
    assert list(chain.blocks) == blocks


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("arguments", "block 1 is called with other arguments than block 0"),
        ("between", "block 1 does not take what block 0 gives"),
        ("twice", "they are not run one after the other, once each"),
        ("short", "only 2 of 3 are run"),
    ],
)
def test_what_is_no_chain_is_refused(data, kind, message):
    model = Chain(kind=kind)
    with pytest.raises(ValueError, match=f"blocks: Chain: wanted 'blocks' to be a chain of blocks: {message}"):
        prune(model, Wanda(data, by_blocks=True), density=0.5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="blocks: wanted a chain of blocks in a ModuleList, Tokens has none"):
        prune(Tokens(), Wanda(data, by_blocks=True), density=0.5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "vit"])
def test_models_of_transformers_block_by_block(name):
    transformers = pytest.importorskip("transformers")
    import checkpoint_folders

    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(64, (1, length))} for length in (5, 9, 1)]
    if name == "vit":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **sizes))
        batches = [torch.randn(n, 3, 16, 16) for n in (1, 3)]
    else:
        model = getattr(checkpoint_folders, name)()
    before = getattr(model.config, "use_cache", None)
    expected = prune(model, Wanda(batches), density=0.5)
    assert prune(model, Wanda(batches, by_blocks=True), density=0.5) == expected
    assert getattr(model.config, "use_cache", None) == before
