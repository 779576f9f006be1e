"""What the networks of ordinary convolutions have in common: where their weights come from, and how they start."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class Weights(Protocol):
    """How the layers of a network share or repeat their weights."""

    def apply(self, network: nn.Module) -> None:
        """Replaces layers of the network (``nn.Conv2d``, ``nn.Linear``) in place."""


def initialise(network: nn.Module) -> None:
    """Convolutions as He et al. (arXiv 1502.01852): a normal that keeps the gradients' size; their biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
