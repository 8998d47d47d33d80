"""Trains under a mask with Hugging Face Accelerate: mixed precision, gradient accumulation, any number of processes.

python examples/accelerate_training.py
accelerate launch examples/accelerate_training.py

Prune before ``prepare``, while the model is whole and in one place; every process makes the same masks from the same
weights. After ``prepare`` the masks are maintained on the unwrapped model and the optimizer that accelerate wraps.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import pathprune as pp
from pathprune.data import digits
from pathprune.models import convnet_digits


def main(arguments: list[str] | None = None) -> tuple[float, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(mixed_precision=options.mixed_precision, gradient_accumulation_steps=2)
    data = digits()
    torch.manual_seed(0)
    model = convnet_digits()
    masks = pp.prune(model, pp.SynFlow(), density=options.density, example_input=data.train_images[:1])
    masks.apply_(model)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    plain = accelerator.unwrap_model(model)
    with masks.maintain(plain, optimizer.optimizer):
        for _ in range(options.epochs):
            model.train()
            for images, labels in loader:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(images), labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()

    revived = pp.Masks.from_model(plain, masks) & ~masks
    plain.eval()
    with torch.no_grad():
        images, labels = (tensor.to(accelerator.device) for tensor in (data.test_images, data.test_labels))
        accuracy = float((plain(images).argmax(1) == labels).float().mean())
    accelerator.print(
        f"density {masks.density:.1%}: test accuracy {accuracy:.1%}; {revived.kept} pruned weights are not zero"
    )
    return accuracy, revived.kept


if __name__ == "__main__":
    main()
