"""A training loop for one network, or several that share a bank, which can be interrupted after any epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.bank import SuperWeightBank
from .planning import as_models

_DECAYED = (nn.Conv2d, nn.Linear, SuperWeightBank)


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine to zero; every epoch draws from its own seed.

    Attributes:
        epochs: of the whole schedule.
        batch: images in a step.
        learning_rate: the highest.
        weight_decay: of weights and templates; of nothing else.
        smoothing: of labels.
        warm_up: the part of the steps before the highest learning rate.
        seed: of the order of images, and of what augmentation and dropout draw.
    """

    epochs: int = 20
    batch: int = 64
    learning_rate: float = 0.005
    weight_decay: float = 0.05
    smoothing: float = 0.1
    warm_up: float = 0.2
    seed: int = 0


class Trainer:
    """Trains networks by a recipe; each learns by its own loss, on the same images.

    Args:
        net: a network, or several in an ``nn.ModuleList`` that may share a bank, on the device of the data.
        recipe: how.
        augment: of a batch (B, C, H, W), before all networks see it.
    """

    def __init__(self, net: nn.Module, recipe: Recipe, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.net, self.recipe, self.augment = net, recipe, augment
        self.epochs_done = 0
        decayed = {
            id(p) for m in net.modules() if isinstance(m, _DECAYED) for n, p in m.named_parameters(recurse=False)
            if n in ("weight", "templates")
        }  # fmt: skip
        parameters = [p for p in net.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if id(p) in decayed], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)

    def epoch(self, inputs: Tensor, labels: Tensor, on_step: Callable[[int, int], None] | None = None) -> float:
        """Trains for one epoch and returns the mean loss, over its steps and the networks.

        The last images of an epoch's random order, fewer than a batch, wait for another epoch.

        Args:
            inputs: all images (N, C, H, W).
            labels: (N,).
            on_step: told how many steps are done, and of how many, after each.

        Raises:
            ValueError: there are fewer images than a batch, or a loss is not finite.
        """
        recipe, steps = self.recipe, len(labels) // self.recipe.batch
        if not steps:
            raise ValueError(
                f"batch: expected at most {len(labels)}, the number of images, got {recipe.batch}; lower it"
            )
        self.net.train()
        networks = as_models(self.net)
        devices = {parameter.device for parameter in self.net.parameters() if parameter.is_cuda}
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            torch.manual_seed(recipe.seed * 1_000_003 + self.epochs_done)
            order, total = torch.randperm(len(labels)), 0.0
            for step, chosen in enumerate(order[: steps * recipe.batch].split(recipe.batch)):
                x, y = inputs[chosen], labels[chosen]
                x = x if self.augment is None else self.augment(x)
                for group in self.optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * self._factor(self.epochs_done * steps + step, steps)
                self.optimizer.zero_grad(set_to_none=True)
                for network in networks:  # one after another: only one network's activations are held
                    loss = F.cross_entropy(network(x), y, label_smoothing=recipe.smoothing)
                    loss.backward()
                    total += loss.item() / len(networks) / steps
                if not math.isfinite(total):
                    raise ValueError(
                        f"learning_rate: expected finite losses, got {total}; lower it, or look at the images"
                    )
                self.optimizer.step()
                if on_step is not None:
                    on_step(step + 1, steps)
        self.epochs_done += 1
        return total

    def _factor(self, step: int, steps: int) -> float:
        total = self.recipe.epochs * steps
        rising = max(1, round(self.recipe.warm_up * total))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (total - rising + 1)))

    def state_dict(self) -> dict[str, Any]:
        """All that the next epochs depend on."""
        return {
            "epochs_done": self.epochs_done, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another trainer of such a net was."""
        self.epochs_done = state["epochs_done"]
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
