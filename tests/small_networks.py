"""Small networks, ensembles of them, and classifiers that are tables."""

from typing import Any

import torch
from torch import Tensor, nn

from spin_kernels.ensemble import Ensemble
from spin_kernels.nn import SuperConv2d, SuperLinear, SuperWeightBank


class Net(nn.Sequential):
    """A small network for images (B, 3, 8, 8), with logits (B, 5); of a bank, if there is one."""

    def __init__(self, width: int, bank: SuperWeightBank | None = None, classes: int = 5) -> None:
        own = {} if bank is None else {"bank": bank}
        conv, linear = (nn.Conv2d, nn.Linear) if bank is None else (SuperConv2d, SuperLinear)
        convs, classifier = ({"cluster": "conv"}, {"cluster": "fc"}) if bank is not None else ({}, {})
        super().__init__(
            conv(3, width, 3, padding=1, **own, **convs), nn.BatchNorm2d(width), nn.ReLU(),
            conv(width, width, 3, stride=2, padding=1, **own, **convs), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(width, classes, **own, **classifier),
        )  # fmt: skip


WIDTHS = (4, 8, 6)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8)


def ensemble(**options: Any) -> Ensemble:
    return Ensemble([Net(width) for width in WIDTHS], **options).eval()


def held_out(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(images(40), torch.randint(5, (40,))) for _ in range(count)]


class Bank(nn.ModuleList):
    """Networks over one bank, a submodule beside them."""

    def __init__(self) -> None:
        bank = SuperWeightBank({"conv": 2 * 8 * 8 * 9, "fc": 2 * 40})
        super().__init__(Net(width, bank) for width in WIDTHS)
        for network in self:
            bank.attach(network)
        self.bank = bank


class Table(nn.Module):
    """The logits of numbered inputs, overconfident by a factor."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.logits[numbers]


def tables(count: int = 600, scales: tuple[float, ...] = (6.0, 3.0, 0.5)) -> tuple[list[nn.Module], Tensor]:
    true = 2 * torch.randn(count, 4)
    targets = torch.distributions.Categorical(logits=true).sample()
    return [Table(scale * (true + torch.randn(count, 4))) for scale in scales], targets
