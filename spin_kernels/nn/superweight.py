"""Convolutions and linear layers whose weights are combinations of templates (SuperWeights, arXiv 2312.01280)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .. import functional
from .bank import FromBank, Slab, SuperWeightBank, tile
from .base import Float32State
from .repeat import spread_betas


class _SuperLayer(FromBank, Float32State):
    """Joins the bank with a weight of (out, in, kh, kw), and has a bias and, if that is repeated, modulation."""

    def _build(
        self,
        shape: tuple[int, int, int, int],
        bias: bool,
        bank: SuperWeightBank,
        cluster: str | None,
        slabs: Iterable[Slab] | None,
        base: tuple[int, int] | None,
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
        if base is not None and not (len(base) == 2 and 0 < base[0] <= shape[0] and 0 < base[1] <= shape[1]):
            raise ValueError(f"base: expected (o, i) from (1, 1) to {shape[:2]}, got {base!r}")
        made, fan_in = (*(base or shape)[:2], *shape[2:]), math.prod(shape[1:])
        if cluster is not None:
            slabs = tile(made, bank, cluster, **options)
        assert slabs is not None  # one of the two is given
        self._join(bank, bank.add(made, slabs, fan_in))
        bound = 1 / math.sqrt(fan_in)  # as nn.Conv2d and nn.Linear
        like = bank.templates
        self.bias = nn.Parameter(like.new_empty(shape[0]).uniform_(-bound, bound)) if bias else None
        self.channels = shape[:2]
        for name in ("alpha", "beta"):
            self.register_parameter(name, None)
        if made != shape:
            tiles = (-(-shape[0] // made[0]), -(-shape[1] // made[1]))
            wide = torch.promote_types(like.dtype, torch.float32)
            self.alpha = nn.Parameter(like.new_full(tiles, 2, dtype=wide))  # 2 / (1 + exp(0)) is 1
            self.beta = nn.Parameter(torch.empty_like(self.alpha))
            spread_betas(self.beta, math.sqrt(2) * bound)

    def _float32_state(self) -> tuple[Tensor | None, ...]:
        return self.alpha, self.beta

    @property
    def weight(self) -> Tensor:
        """The weight as the layer uses it now, with gradients to the bank."""
        return self._composed()

    def _composed(self) -> Tensor:
        return self.repeated(self._bank[0].weight(self.bank_layers[0]))

    def repeated(self, weight: Tensor) -> Tensor:
        """The layer's weight (out, in, kh, kw) from what its bank makes, which is that unless ``base`` is smaller."""
        if self.alpha is None:
            return weight
        return functional.repeat_weight(weight, self.alpha, self.beta, None, *self.channels)


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
        base: (o, i) of a smaller weight that the bank makes and the layer repeats over its channels, each tile
            modulated to w * alpha / (1 + exp(beta * w)), as :class:`RepeatConv2d` does; None is the layer's own size.

    Parameters: bias (out_channels,); alpha and beta (ceil(out / o), ceil(in / i)) where base is smaller, which stay
    float32.

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
        base: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups: expected a divisor of {in_channels} and {out_channels} channels, got {groups}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, _pair(kernel_size)
        self.stride, self.padding, self.dilation, self.groups = _pair(stride), padding, _pair(dilation), groups
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._build(shape, bias, bank, cluster, slabs, base, options)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{text}, padding={self.padding}" + ("" if self.bias is not None else ", bias=False")


class SuperLinear(_SuperLayer):
    """``nn.Linear`` with a weight (out_features, in_features) from a :class:`SuperWeightBank`.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        bank, cluster, slabs, base: as in :class:`SuperConv2d`, where the weight is (out_features, in_features, 1, 1).

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
        base: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._build((out_features, in_features, 1, 1), bias, bank, cluster, slabs, base, options)

    @property
    def weight(self) -> Tensor:
        """The weight (out_features, in_features) as the layer uses it now, with gradients to the bank."""
        return self._composed().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
