"""VGG (Simonyan and Zisserman, arXiv 1409.1556) for ImageNet, and with one linear layer as it is used for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .convnet import Weights, initialise
from .isotropic import check_drop_rate, check_positive

VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG(nn.Module):
    """VGG for images (B, in_channels, H, W) of at least 32 x 32, with logits (B, num_classes).

    Its state dict has torchvision's names, so that torchvision's checkpoints load.

    Args:
        stages: output channels of the 3x3 convolutions of every stage; a 2x2 max-pool follows each stage.
        in_channels: of the images.
        num_classes: number of logits.
        batch_norm: a BatchNorm follows every convolution.
        hidden: channels of the two hidden layers of the classifier, behind an average over 7 x 7 areas. None: the
            classifier is one linear layer behind the average over all positions, the form for CIFAR.
        drop_rate: of the dropout behind both hidden layers.
        weights: has an ``apply(network)`` that replaces layers by ones that share or repeat their weights; None
            gives every layer its own.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]] = VGG11,
        in_channels: int = 3,
        num_classes: int = 1000,
        batch_norm: bool = False,
        hidden: int | None = 4096,
        drop_rate: float = 0.5,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, num_classes=num_classes)
        check_drop_rate(drop_rate)
        if not stages or any(not isinstance(n, int) or n < 1 for stage in stages for n in stage):
            raise ValueError(f"stages: expected positive numbers of channels in one or more stages, got {stages!r}")
        self.features = nn.Sequential()
        channels = in_channels
        for stage in stages:
            for out in stage:
                self.features.append(nn.Conv2d(channels, out, 3, padding=1))
                if batch_norm:
                    self.features.append(nn.BatchNorm2d(out))
                self.features.append(nn.ReLU(inplace=True))
                channels = out
            self.features.append(nn.MaxPool2d(2))
        self.avgpool = nn.AdaptiveAvgPool2d(1 if hidden is None else 7)
        self.classifier: nn.Module
        if hidden is None:
            self.classifier = nn.Linear(channels, num_classes)
        else:
            check_positive(hidden=hidden)
            self.classifier = nn.Sequential(
                nn.Linear(channels * 49, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(drop_rate),
                nn.Linear(hidden, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(drop_rate),
                nn.Linear(hidden, num_classes),
            )
        initialise(self)
        for module in self.classifier.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        if weights is not None:
            weights.apply(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def vgg11(
    in_channels: int = 3,
    num_classes: int = 1000,
    batch_norm: bool = False,
    hidden: int | None = 4096,
    drop_rate: float = 0.5,
    weights: Weights | None = None,
) -> VGG:
    """VGG-11, and with ``hidden=None`` its form for CIFAR; arguments as of :class:`VGG`.

    Raises:
        ValueError: an argument is out of its range.
    """
    return VGG(VGG11, in_channels, num_classes, batch_norm, hidden, drop_rate, weights)
