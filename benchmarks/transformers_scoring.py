"""SynFlow on transformers: ViT-B/16 against plain PyTorch in path mode, a 1.1 B Llama against reading its weights.

The plain PyTorch is what one would write by hand: the model's forward on magnitudes, products of flows half to each
by stop-gradients, norms divided by a detached RMS, one backward, an exact k-th by bracket. Bytes of a round of ours
where few positions differ: two reads of every weight and three passes over one bit each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import BestPyTorchSynFlow, FlatWeights, exponential_densities
from harness import Case, Result, assert_same_masks
from scoring import OURS, OurRounds
from selection_baselines import sample_positions

PLAIN = "best PyTorch, path mode"
READ = "reading every weight once"
Forward = Callable[[Mapping[str, Tensor]], Tensor]


class PlainRounds(BestPyTorchSynFlow):
    """The same rounds in plain PyTorch: a forward in path mode and its autograd."""

    def __init__(self, weights: Mapping[str, nn.Parameter], forward: Forward) -> None:
        self.flat = FlatWeights(weights, torch.float32)
        self.count, self.select = "exact", "bracket"
        self.scorer = _PathMode(self.flat, forward)  # type: ignore[assignment]
        self.positions = sample_positions(self.flat.scores)
        self.live = torch.ones_like(self.flat.scores, dtype=torch.bool)


class _PathMode:
    def __init__(self, flat: FlatWeights, forward: Forward) -> None:
        self.flat, self.forward = flat, forward

    def score_(self) -> None:
        leaves = {name: w.detach().requires_grad_() for name, w in self.flat.views(self.flat.magnitudes).items()}
        gradients = torch.autograd.grad(self.forward(leaves), list(leaves.values()))
        scores = self.flat.views(self.flat.scores)
        for (name, w), gradient in zip(leaves.items(), gradients, strict=True):
            torch.mul(w.detach(), gradient, out=scores[name])


def half(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.detach() + a.detach() @ b) / 2


def over_rms(x: Tensor) -> Tensor:
    return x / x.detach().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)


class PlainViT:
    """The forward of a Hugging Face ViT on magnitudes; ``biases``: whether constants begin paths."""

    def __init__(self, model: nn.Module, biases: bool) -> None:
        self.fixed = {name: p.detach().abs() for name, p in model.named_parameters() if p.dim() == 1 or p.dim() == 3}
        self.layers, self.heads = model.config.num_hidden_layers, model.config.num_attention_heads
        self.size, self.patch, self.biases = model.config.image_size, model.config.patch_size, biases

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], self.fixed[f"{name}.bias"] if self.biases else None)

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = over_rms(x) * self.fixed[f"{name}.weight"]
        return x + self.fixed[f"{name}.bias"] if self.biases else x

    def __call__(self, w: Mapping[str, Tensor]) -> Tensor:
        stem = "vit.embeddings.patch_embeddings.projection"
        image = torch.ones(1, 3, self.size, self.size)
        bias = self.fixed[f"{stem}.bias"] if self.biases else None
        x = F.conv2d(image, w[f"{stem}.weight"], bias, stride=self.patch).flatten(2)[0].T
        first = self.fixed["vit.embeddings.cls_token"][0]
        x = torch.cat([first if self.biases else torch.zeros_like(first), x])
        if self.biases:
            x = x + self.fixed["vit.embeddings.position_embeddings"][0]
        for layer in range(self.layers):
            at = f"vit.layers.{layer}"
            h = self.norm(x, f"{at}.layernorm_before")
            q, k, v = (
                self.linear(h, w, f"{at}.attention.{part}_proj").unflatten(-1, (self.heads, -1)).transpose(0, 1)
                for part in "qkv"
            )
            similar = half(q, k.mT)
            is_open = similar.detach() > 0
            carried = torch.where(is_open, similar / similar.detach().clamp(min=1e-30), 0.0) / x.shape[0]
            y = carried / 2 @ v.detach() + (1 - is_open.float() / 2) / x.shape[0] @ v
            x = x + self.linear(y.transpose(0, 1).flatten(1), w, f"{at}.attention.o_proj")
            h = self.linear(self.norm(x, f"{at}.layernorm_after"), w, f"{at}.mlp.fc1")
            x = x + self.linear(h, w, f"{at}.mlp.fc2")
        return self.linear(self.norm(x, "vit.layernorm")[:1], w, "classifier").sum()


def _vit(**options: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=1000, **options)).eval()
    nn.init.normal_(model.vit.embeddings.position_embeddings, std=0.02)
    return model


def _rounds_of(model: nn.Module, policy: str) -> tuple[OurRounds, PlainRounds]:
    ours = OurRounds(model, torch.ones(1, 3, model.config.image_size, model.config.image_size), policy=policy)
    weights = {name: model.get_parameter(name) for name in ours.names}
    return ours, PlainRounds(weights, PlainViT(model, biases=policy == "published"))


def vit_round(policy: str, repeats: int, bandwidth: float) -> Result:
    """Rounds of a 100-round schedule to 10 %, each method on its own copy of the state."""
    model = _vit()

    def agree() -> str:
        ours, plain = _rounds_of(model, policy)
        for density in exponential_densities(0.8, 2):
            ours.round(density)
            plain.round(density)
        return assert_same_masks(ours.masks(), plain.masks(), int(2e-5 * ours.numel))

    case = Case(f"SynFlow round, ViT-B/16, 86 M weights, policy {policy}", agree)
    ours, plain = _rounds_of(model, policy)

    def stepping(method: Any) -> Callable[[], object]:
        densities = iter(exponential_densities(0.1, 100))
        return lambda: method.round(next(densities))

    case.add(OURS, stepping(ours), bytes_moved=8.375 * ours.numel)
    case.add(PLAIN, stepping(plain))
    return case.measure(repeats, warmup=3, bandwidth=bandwidth)


def llama(layers: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    """A Llama of TinyLlama's shape (22 layers: 1.1 B weights), normal weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632}
    config = LlamaConfig(**{**shape, "vocab_size": 32000, "num_hidden_layers": layers, **options})
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def llama_round(layers: int, threads: int, repeats: int, bandwidth: float) -> Result:
    """Rounds of a 100-round schedule to 50 %, of one token, against a plain read of the same weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _llama_round(layers, repeats, bandwidth)
    finally:
        torch.set_num_threads(before)


def _llama_round(layers: int, repeats: int, bandwidth: float) -> Result:
    model = llama(layers)
    ours = OurRounds(model, {"input_ids": torch.ones(1, 1, dtype=torch.long)})
    densities = iter(exponential_densities(0.5, 100))

    def conserves() -> str:
        """A few rounds keep the exact number of weights."""
        ours.round(next(densities))
        kept = sum(weight.live() for weight in ours.weights.values())
        wanted = round(ours.numel * 0.5 ** (1 / 100))
        if kept != wanted:
            raise AssertionError(f"kept {kept}, wanted {wanted}")
        return f"{kept:,} of {ours.numel:,} weights kept"

    case = Case(
        f"SynFlow round, Llama of {ours.numel / 1e9:.2f} B weights, bfloat16, {torch.get_num_threads()} threads",
        conserves,
    )
    case.add(OURS, lambda: ours.round(next(densities)), bytes_moved=4.375 * ours.numel)
    case.add(READ, lambda: [w.view(torch.int64).sum() for w in ours.tensors], bytes_moved=2.0 * ours.numel)
    return case.measure(repeats, warmup=2, bandwidth=bandwidth)
