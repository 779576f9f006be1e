"""Wide ResNet for CIFAR (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .convnet import Weights, initialise
from .isotropic import check_drop_rate, check_positive


class WideBlock(nn.Module):
    """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride): pre-activation, two 3x3 convolutions.

    Where the channels change, a 1x1 convolution of the activated input is the shortcut, else the input itself.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        same = in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.dropout(F.relu(self.bn2(self.conv1(y))))
        return shortcut + self.conv2(y)


class WideResNet(nn.Module):
    """WRN-depth-width for images (B, in_channels, H, W), with logits (B, num_classes).

    Three stages of n blocks have width, 2 width and 4 width times ``base_channels``; the second and the third halve
    H and W, which are multiples of 4.

    Args:
        depth: number of layers, 6n + 4.
        width: the widening factor.
        in_channels: of the images.
        num_classes: number of logits.
        base_channels: of the stem, 16 in the paper.
        drop_rate: of the dropout between the convolutions of a block.
        weights: has an ``apply(network)`` that replaces layers by ones that share or repeat their weights; None
            gives every layer its own.

    Modules: ``stem``; ``stages[s][b]`` with ``bn1``, ``conv1``, ``bn2``, ``conv2`` and ``shortcut``; ``bn``;
    ``classifier``.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        in_channels: int = 3,
        num_classes: int = 10,
        base_channels: int = 16,
        drop_rate: float = 0.0,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        check_positive(width=width, in_channels=in_channels, num_classes=num_classes, base_channels=base_channels)
        check_drop_rate(drop_rate)
        if not isinstance(depth, int) or depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth: expected 6n + 4 layers for a positive n, such as 28, got {depth!r}")
        self.depth, self.width = depth, width
        self.stem = nn.Conv2d(in_channels, base_channels, 3, 1, 1, bias=False)
        self.stages = nn.Sequential()
        channels = base_channels
        for stage in range(3):
            out, blocks = base_channels * width * 2**stage, nn.Sequential()
            for block in range((depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(WideBlock(channels, out, stride, drop_rate))
                channels = out
            self.stages.append(blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)
        nn.init.zeros_(self.classifier.bias)
        if weights is not None:
            weights.apply(self)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.bn(self.stages(self.stem(images))))
        return self.classifier(features.mean((2, 3)))


wide_resnet = WideResNet
