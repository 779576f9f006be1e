"""ResNet-50 (He et al., arXiv 1512.03385), v1.5: the stride is in the 3x3 convolution of a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .convnet import Weights, initialise
from .isotropic import check_positive


class BottleneckBlock(nn.Module):
    """(B, in_channels, H, W) to (B, 4 * channels, H / stride, W / stride) through ``channels`` of 1x1, 3x3, 1x1."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or in_channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet of bottleneck blocks for images (B, in_channels, H, W), with logits (B, num_classes).

    Its state dict has torchvision's names, so that torchvision's checkpoints load.

    Args:
        layers: number of blocks of each of the four stages, which narrow the image by 4, 8, 16 and 32.
        width: channels of the stem and within the blocks of the first stage; every stage doubles them.
        in_channels: of the images.
        num_classes: number of logits.
        weights: has an ``apply(network)`` that replaces layers by ones that share or repeat their weights; None
            gives every layer its own.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        check_positive(width=width, in_channels=in_channels, num_classes=num_classes)
        if len(layers) != 4 or any(not isinstance(n, int) or n < 1 for n in layers):
            raise ValueError(f"layers: expected four positive integers, got {layers!r}")
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = [width, *(4 * width * 2**stage for stage in range(4))]  # before and after every stage
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                BottleneckBlock(channels[stage], width * 2**stage, 2 if stage else 1),
                *(BottleneckBlock(channels[stage + 1], width * 2**stage, 1) for _ in range(depth - 1)),
            )
            for stage, depth in enumerate(layers)
        )
        self.fc = nn.Linear(channels[-1], num_classes)
        initialise(self)
        if weights is not None:
            weights.apply(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet50(in_channels: int = 3, num_classes: int = 1000, weights: Weights | None = None) -> ResNet:
    """ResNet-50 v1.5; arguments as of :class:`ResNet`.

    Raises:
        ValueError: an argument is out of its range.
    """
    return ResNet((3, 4, 6, 3), 64, in_channels, num_classes, weights)
