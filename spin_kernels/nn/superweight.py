"""Convolutions and linear layers whose weights are combinations of templates (SuperWeights, arXiv 2312.01280)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .bank import FromBank, Slab, SuperWeightBank, tile


class _SuperLayer(FromBank, nn.Module):
    """Joins the bank with a weight of (out, in, kh, kw), and has a bias of its own."""

    def _build(
        self,
        shape: tuple[int, int, int, int],
        bias: bool,
        bank: SuperWeightBank,
        cluster: str | None,
        slabs: Iterable[Slab] | None,
        options: dict[str, Any],
    ) -> None:
        if not isinstance(bank, SuperWeightBank):
            raise TypeError(f"bank: expected a SuperWeightBank, got {type(bank).__name__}")
        if min(shape) < 1:
            raise ValueError(f"channels and kernel_size: expected at least 1 each, got a weight of {shape}")
        if (cluster is None) == (slabs is None):
            raise ValueError("cluster, slabs: expected one of the two, got " + ("both" if cluster else "none"))
        if slabs is not None and options:
            raise ValueError(f"{', '.join(options)}: expected together with cluster only, got slabs")
        self._join(bank, bank.add(shape, tile(shape, bank, cluster, **options) if slabs is None else slabs))
        bound = 1 / math.sqrt(math.prod(shape[1:]))  # as nn.Conv2d and nn.Linear
        like = bank.templates
        self.bias = nn.Parameter(like.new_empty(shape[0]).uniform_(-bound, bound)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The weight as the layer uses it now, with gradients to the bank."""
        return self._composed()

    def _composed(self) -> Tensor:
        return self._bank[0].weight(self.bank_layers[0])


class SuperConv2d(_SuperLayer):
    """``nn.Conv2d`` with a weight from a :class:`SuperWeightBank`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in ``nn.Conv2d``; the layer
            convolves (B, in_channels, H, W).
        bank: the bank that the weight (out_channels, in_channels / groups, kh, kw) comes from; it also decides the
            bias's device and dtype.
        cluster: the cluster of the bank that the layer's templates are in, with the options ``templates``, ``block``,
            ``start`` and ``coefficients`` of :func:`tile`.
        slabs: instead of the cluster, the :class:`Slab` list that makes the weight.

    Raises:
        ValueError, TypeError: an argument is out of its range, or the bank has no room for the templates.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        bank: SuperWeightBank,
        cluster: str | None = None,
        slabs: Iterable[Slab] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups: expected a divisor of {in_channels} and {out_channels} channels, got {groups}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, _pair(kernel_size)
        self.stride, self.padding, self.dilation, self.groups = _pair(stride), padding, _pair(dilation), groups
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._build(shape, bias, bank, cluster, slabs, options)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{text}, padding={self.padding}" + ("" if self.bias is not None else ", bias=False")


class SuperLinear(_SuperLayer):
    """``nn.Linear`` with a weight (out_features, in_features) from a :class:`SuperWeightBank`.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        bank, cluster, slabs: as in :class:`SuperConv2d`; the weight's shape is (out_features, in_features, 1, 1) there.

    Raises:
        ValueError, TypeError: an argument is out of its range, or the bank has no room for the templates.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bank: SuperWeightBank,
        cluster: str | None = None,
        slabs: Iterable[Slab] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._build((out_features, in_features, 1, 1), bias, bank, cluster, slabs, options)

    @property
    def weight(self) -> Tensor:
        """The weight (out_features, in_features) as the layer uses it now, with gradients to the bank."""
        return self._composed().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
