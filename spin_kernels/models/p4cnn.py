"""The rotation-equivariant P4CNN for rotated MNIST (Cohen and Welling, arXiv 1602.07576), and without fixed rotations.

Feature maps are (B, 4 * C, H, W): C maps for each of four orientations, orientation by orientation. A quarter turn of
the image turns them and shifts them on by one orientation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.repeat import RepeatConv2d
from .convnet import Weights
from .isotropic import check_drop_rate, check_positive


class P4Conv2d(nn.Module):
    """A convolution on images (B, C, H, W) or feature maps (B, 4 * C, H, W) with one filter bank for four orientations.

    Orientation r convolves with the bank turned by r * 90 degrees, the orientations that it reads shifted by r.

    Args:
        in_channels: of the input: C of images, 4 * C of feature maps.
        out_channels: of the output, a multiple of 4.
        kernel_size: side of the filters.
        images: the input is images, without orientations.

    Parameters: weight (out_channels / 4, in_channels, kernel_size, kernel_size).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, images: bool = False) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.images = in_channels, out_channels, images
        self.kernel_size = (kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(out_channels // 4, in_channels, kernel_size, kernel_size))
        bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))  # as nn.Conv2d
        nn.init.uniform_(self.weight, -bound, bound)

    def turned_weight(self) -> Tensor:
        """The weight (out_channels, in_channels, kernel_size, kernel_size) of all four orientations."""
        bank = self.weight.unflatten(1, (1 if self.images else 4, -1))
        return torch.cat([torch.rot90(bank, r, (3, 4)).roll(r, 1) for r in range(4)]).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.turned_weight())

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, images={self.images}"


class RepeatedOrientations:
    """``weights`` of a :class:`P4CNN`: each orientation learns how it modulates the one filter bank of a layer.

    Learnable repetition (Chavan et al., arXiv 2101.05650) in the place of rotations: a layer has an alpha and a beta
    per orientation beside the filters of a :class:`P4Conv2d`.
    """

    def apply(self, network: nn.Module) -> None:
        """Replaces every ``nn.Conv2d`` by a RepeatConv2d whose base has a quarter of its output channels."""
        for parent in list(network.modules()):
            for name, conv in list(parent.named_children()):
                if isinstance(conv, nn.Conv2d):
                    into, out = conv.in_channels, conv.out_channels
                    kernel_size: Any = conv.kernel_size
                    repeated = RepeatConv2d(into, out, kernel_size, (out // 4, into), bias=False)
                    setattr(parent, name, repeated)


class P4Block(nn.Module):
    """Convolution, BatchNorm with statistics over all orientations, ReLU."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        maps = x.reshape(-1, self.bn.num_features, *x.shape[2:])
        return F.relu(self.bn(maps)).reshape_as(x)


class P4CNN(nn.Module):
    """Seven layers for images (B, in_channels, 28, 28), with logits (B, num_classes) that quarter turns leave alone.

    Six 3x3 convolutions without padding, with BatchNorm, ReLU and dropout, a 2x2 max-pool in the place of the second
    dropout, and a 4x4 convolution, of which the largest value over orientations and positions is a logit. Larger
    images may be used, too; quarter turns of square ones leave the logits alone if the side is even.

    Args:
        channels: C, of each orientation.
        num_classes: number of logits.
        drop_rate: of the dropouts.
        in_channels: of the images.
        orientations: 4, or 1 for the paper's baseline of plain convolutions (with 20 channels).
        weights: has an ``apply(network)`` that decides how orientations get their filters, in the place of fixed
            rotations, such as :class:`RepeatedOrientations`: the layers are plain convolutions of the channels of all
            orientations, which it replaces.

    Modules: ``blocks``, six times ``conv`` and ``bn``; ``top``, the last convolution. Parameters: theirs and bias
    (num_classes,).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        channels: int = 10,
        num_classes: int = 10,
        drop_rate: float = 0.3,
        in_channels: int = 1,
        orientations: int = 4,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, num_classes=num_classes, in_channels=in_channels)
        check_drop_rate(drop_rate)
        if orientations not in (1, 4):
            raise ValueError(f"orientations: expected 1 or 4, got {orientations!r}")
        self.orientations = orientations

        def conv(into: int, out: int, kernel_size: int, images: bool = False) -> nn.Module:
            if orientations == 1 or weights is not None:
                return nn.Conv2d(into, orientations * out, kernel_size, bias=False)
            return P4Conv2d(into, 4 * out, kernel_size, images)

        maps = orientations * channels
        self.blocks = nn.ModuleList([P4Block(conv(in_channels, channels, 3, images=True), channels)])
        self.blocks.extend(P4Block(conv(maps, channels, 3), channels) for _ in range(5))
        self.dropout = nn.Dropout(drop_rate)
        self.top = conv(maps, num_classes, 4)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        if weights is not None:
            weights.apply(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """The feature maps (B, orientations * C, H', W') before the last convolution, 4 x 4 for 28 x 28."""
        x = images
        for number, block in enumerate(self.blocks):
            x = block(x)
            x = F.max_pool2d(x, 2) if number == 1 else self.dropout(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        maps = self.top(self.forward_features(images))
        return maps.unflatten(1, (self.orientations, -1)).amax((1, 3, 4)) + self.bias


p4cnn = P4CNN
