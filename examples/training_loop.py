"""A training loop under a mask: prune at initialization, then train with the pruned weights held at zero.

python examples/training_loop.py [--density 0.05] [--epochs 5] [--method synflow]

Momentum and weight decay would bring pruned weights back; ``masks.maintain`` keeps them, gradients and optimizer state
at zero. The loop itself knows nothing of it. Digits come with scikit-learn.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import pathprune as pp
from pathprune.data import digits
from pathprune.models import convnet_digits

METHODS = {"synflow": pp.SynFlow(rounds=100), "phew": pp.PHEW(), "magnitude": pp.Magnitude(), "random": pp.Random()}


def main(arguments: list[str] | None = None) -> tuple[float, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--method", choices=tuple(METHODS), default="synflow")
    options = parser.parse_args(arguments)

    data = digits()
    torch.manual_seed(0)
    model = convnet_digits()
    masks = pp.prune(model, METHODS[options.method], density=options.density, example_input=data.train_images[:1])
    masks.apply_(model)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    order = torch.Generator().manual_seed(0)
    with masks.maintain(model, optimizer):
        for epoch in range(options.epochs):
            model.train()
            for chosen in torch.randperm(len(data.train_labels), generator=order).split(64):
                loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                accuracy = float((model(data.test_images).argmax(1) == data.test_labels).float().mean())
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")

    revived = pp.Masks.from_model(model, masks) & ~masks
    print(f"{masks.kept:,} of {masks.total:,} weights were trained, {revived.kept} others are not zero")
    return accuracy, revived.kept


if __name__ == "__main__":
    main()
