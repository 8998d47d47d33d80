"""What the rule for queries and keys does: how much each part of a transformer keeps, and how it then learns.

python benchmarks/attention_rules.py [--seeds 3] [--epochs 30] [--out benchmarks/results/attention_rules]

A ViT of four layers for scikit-learn's digits, pruned at initialization by SynFlow under each rule of
``Policy.attention`` (and by PHEW and magnitude), then trained. ``values`` leaves queries and keys to the last: they
score nothing, so they are cut first and attention stays uniform.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import pathprune as pp
from pathprune.data import Split, digits

DENSITIES = (0.5, 0.2, 0.05)
METHODS = {
    "SynFlow, half": lambda: pp.SynFlow(rounds=50, policy=pp.Policy(biases="drop", attention="half")),
    "SynFlow, budget": lambda: pp.SynFlow(rounds=50, policy=pp.Policy(biases="drop", attention="budget")),
    "SynFlow, values": lambda: pp.SynFlow(rounds=50, policy=pp.Policy(biases="drop", attention="values")),
    "PHEW": lambda: pp.PHEW(),
    "magnitude": lambda: pp.Magnitude(),
}
PARTS = {"queries, keys": ("q_proj", "k_proj"), "values": ("v_proj",), "outputs": ("o_proj",), "MLP": ("fc1", "fc2")}


def vit(seed: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=2, num_channels=1, num_labels=10))


def kept(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """The density of each part of the network."""
    shares = {}
    for part, names in PARTS.items():
        chosen = [mask for name, mask in masks.items() if any(n in name for n in names)]
        shares[part] = sum(int(mask.sum()) for mask in chosen) / sum(mask.numel() for mask in chosen)
    return shares


def accuracy(model: nn.Module, masks: pp.Masks | None, data: Split, epochs: int, seed: int) -> float:
    """Test accuracy after training what the masks leave."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    if masks is not None:
        masks.apply_(model)
        masks.maintain(model, optimizer)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_images), generator=generator).split(128):
            loss = nn.functional.cross_entropy(model(data.train_images[batch]).logits, data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = model.eval()(data.test_images).logits.argmax(1)
    return float((found == data.test_labels).float().mean())


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), gridspec_kw={"width_ratios": [3, 2]})
    width, methods = 0.8 / len(METHODS), list(METHODS)
    for m, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method and row["density"] == 0.2]
        heights = [sum(row["kept"][part] for row in mine) / len(mine) for part in PARTS]
        axes[0].bar([p + (m - (len(methods) - 1) / 2) * width for p in range(len(PARTS))], heights, width, label=method)
        by_density = [
            [row["accuracy"] for row in rows if (row["method"], row["density"]) == (method, d)] for d in DENSITIES
        ]
        means = [sum(found) / len(found) for found in by_density]
        errors = [float(torch.tensor(found).std()) if len(found) > 1 else 0 for found in by_density]
        axes[1].errorbar(DENSITIES, means, errors, marker="o", capsize=3, label=method)
    dense = [row["accuracy"] for row in rows if row["method"] == "dense"]
    axes[1].axhline(sum(dense) / len(dense), color="black", linestyle=":", label="dense")
    axes[0].set_xticks(range(len(PARTS)), list(PARTS))
    axes[0].set_ylabel("density of the part, at 20 % in all")
    axes[0].legend(fontsize=8)
    axes[1].set_xscale("log")
    axes[1].set_xticks(DENSITIES, [f"{d:.0%}" for d in DENSITIES])
    axes[1].minorticks_off()
    axes[1].set_xlabel("density")
    axes[1].set_ylabel("test accuracy on digits")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention_rules")
    options = parser.parse_args()
    rows = []
    bar = tqdm(total=options.seeds * (1 + len(METHODS) * len(DENSITIES)), unit="net")
    for seed in range(options.seeds):
        data = digits(seed)
        rows.append({"method": "dense", "density": 1.0, "seed": seed})
        rows[-1]["accuracy"] = accuracy(vit(seed), None, data, options.epochs, seed)
        bar.update()
        for method, make in METHODS.items():
            for density in DENSITIES:
                model = vit(seed)
                masks = pp.prune(model, make(), density=density, example_input=torch.ones(1, 1, 8, 8), progress=False)
                row = {"method": method, "density": density, "seed": seed, "kept": kept(masks)}
                rows.append({**row, "accuracy": accuracy(model, masks, data, options.epochs, seed)})
                bar.update()
    options.out.with_suffix(".json").write_text(json.dumps({"epochs": options.epochs, "rows": rows}, indent=1) + "\n")
    plot(rows, options.out.with_suffix(".png"))
    print("| method | density | queries, keys | values | outputs | MLP | accuracy |\n|---|---|---|---|---|---|---|")
    for method in METHODS:
        for density in DENSITIES:
            mine = [row for row in rows if (row["method"], row["density"]) == (method, density)]
            parts = [sum(row["kept"][part] for row in mine) / len(mine) for part in PARTS]
            mean = sum(row["accuracy"] for row in mine) / len(mine)
            print(f"| {method} | {density:.0%} | {' | '.join(f'{p:.0%}' for p in parts)} | {mean:.1%} |")


if __name__ == "__main__":
    main()
