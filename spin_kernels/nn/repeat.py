"""Convolutions whose weight is a smaller one, repeated (learnable repetition, RepeatNet, arXiv 2101.05650)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .. import functional
from .base import Float32State

MODES = ("intra", "inter", "hybrid")
_NAMES = {  # of the parameters and buffers that modulate
    "swish": ("alpha", "beta"),
    "sign": ("sign", "sign_rows", "sign_columns"),
    "linear": (),
    "drop": ("drop_mask",),
    "random": ("sign", "random_weights"),
}
MODULATIONS = tuple(_NAMES)


class _Sign(torch.autograd.Function):
    """sign(x) with the gradient of x clipped to [-1, 1] (the straight-through estimator of binary networks)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


@torch.no_grad()
def spread_betas(beta: Tensor, deviation: float) -> None:
    """Sets the betas of tiles of values with this standard deviation.

    Tiles that differ by a factor only would stay the same after BatchNorm: beta * w is of order 1, and every tile's is
    another.
    """
    count = beta.numel()
    spread = (torch.randperm(count, device=beta.device) + 0.5) * (4 / count) - 2
    beta.copy_(spread.view_as(beta) / deviation)


class RepeatConv2d(Float32State):
    """``nn.Conv2d`` whose weight repeats a smaller one, the source, over output and input channels.

    weight[a, b] = source[a mod o, b mod i], the last tiles partial, and modulated: ``"swish"`` to
    w * alpha / (1 + exp(beta * w)) with an alpha and a beta per tile, ``"sign"`` by trained signs (with the gradient
    of the identity within [-1, 1]), ``"drop"`` by a fixed random mask that keeps 1 - drop_rate of the values,
    ``"linear"`` not at all. ``"random"`` repeats nothing: the source's filters and fixed random ones, as many as are
    missing, fill the weight one after another and take trained signs.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as in ``nn.Conv2d``.
        base: (o, i) of the layer's own filters, or in mode ``"inter"`` of the weight that calls bring.
        mode: ``"intra"`` repeats filters of its own, ``"inter"`` the ``weight`` of an earlier layer, that calls bring,
            and ``"hybrid"`` both, its own first, concatenated along ``concat_dim``.
        modulation: as above. A source of the layer's own size is used as it is, but by ``"random"`` and ``"hybrid"``.
        concat_dim: 0 or 1, of mode ``"hybrid"``.
        drop_rate: of modulation ``"drop"``, in [0, 1).
        given: (o, i) of the weight that calls bring in mode ``"hybrid"``. None: the first call (or state dict) tells,
            until which the layer has no alpha, beta, signs or random filters; make the optimizer after it.

    Parameters: weight (o, i, kh, kw) unless inter; bias; alpha and beta (ceil(out / o), ceil(in / i)) for the source's
    (o, i), which stay float32; sign (out, in, kh, kw). Where whole tiles do not fill the layer, sign covers them only,
    and sign_rows and sign_columns gate what the gated weight lends for the rest: first the missing rows, then the
    missing columns. Buffers: drop_mask (out, in, kh, kw), random_weights (n, kh, kw).

    Raises:
        ValueError, TypeError: an argument is out of its range, or a call's weight is missing or does not fit.
    """

    weight: Tensor
    bias: Tensor | None
    alpha: Tensor | None
    beta: Tensor | None
    sign: Tensor | None
    sign_rows: Tensor | None
    sign_columns: Tensor | None
    drop_mask: Tensor | None
    random_weights: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        base: tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        bias: bool = True,
        mode: str = "intra",
        modulation: str = "swish",
        concat_dim: int = 1,
        drop_rate: float = 0.0,
        *,
        given: tuple[int, int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if modulation not in MODULATIONS:
            raise ValueError(f"modulation: expected one of {', '.join(MODULATIONS)}, got {modulation!r}")
        if concat_dim not in (0, 1):
            raise ValueError(f"concat_dim: expected 0 or 1, got {concat_dim!r}")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate: expected a number in [0, 1), got {drop_rate!r}")
        shape = (out_channels, in_channels, *_pair(kernel_size))
        if min(shape) < 1:
            raise ValueError(f"channels, kernel_size: expected at least 1 each, got a weight of shape {shape}")
        for name, size in {"base": base, "given": given}.items():
            if not isinstance(size, tuple | list | None):
                raise TypeError(f"{name}: expected (o, i), got {size!r}")
            if size is not None and not (len(size) == 2 and 0 < size[0] <= shape[0] and 0 < size[1] <= shape[1]):
                raise ValueError(f"{name}: expected (o, i) from (1, 1) to {shape[:2]}, got {size!r}")
        if given is not None and mode != "hybrid":
            raise ValueError(f"given: expected None in mode {mode!r}, got {given!r}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, shape[2:]
        self.base = base[0], base[1]
        self.given = None if given is None else (given[0], given[1])
        self.stride, self.padding = _pair(stride), padding
        self.mode, self.modulation, self.concat_dim, self.drop_rate = mode, modulation, concat_dim, drop_rate

        options = {"device": device, "dtype": dtype if dtype is not None else torch.get_default_dtype()}
        own = None if mode == "inter" else nn.Parameter(torch.empty(*base, *shape[2:], **options))
        self.register_parameter("weight", own)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **options)) if bias else None)
        for name in ("alpha", "beta", "sign", "sign_rows", "sign_columns"):
            self.register_parameter(name, None)
        for name in ("drop_mask", "random_weights"):
            self.register_buffer(name, None)
        self._has_modulation = False
        if mode != "hybrid":
            self._add_modulation(self.base, options)
        elif given is not None:
            self._add_modulation(self._joined(given), options)
        self.reset_parameters()

    # --- what modulates

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the repeated weight: (out_channels, in_channels, kh, kw)."""
        return self.out_channels, self.in_channels, *self.kernel_size

    def _joined(self, given: tuple[int, int]) -> tuple[int, int]:
        other = 1 - self.concat_dim
        if given[other] != self.base[other]:
            raise ValueError(
                f"weight: expected {self.base[other]} channels in dimension {other} as base has, got {given[other]}"
            )
        size = list(given)
        size[self.concat_dim] += self.base[self.concat_dim]
        if size[0] > self.out_channels or size[1] > self.in_channels:
            raise ValueError(f"weight: expected with base at most {self.shape[:2]} channels, got {tuple(size)}")
        return size[0], size[1]

    def _shapes(self, source: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Of the parameters and buffers that modulate a source of (o, i)."""
        (o, i), (out, into, *kernel) = source, self.shape
        if self.modulation == "random":
            return {"sign": self.shape, "random_weights": (out * into - o * i, *kernel)}
        if self.modulation == "linear" or (self.mode != "hybrid" and source == (out, into)):
            return {}
        if self.modulation == "swish":
            tiles = (-(-out // o), -(-into // i))
            return {"alpha": tiles, "beta": tiles}
        if self.modulation == "drop":
            return {"drop_mask": self.shape}
        rows, columns = out // o * o, into // i * i
        shapes = {"sign": (rows, columns), "sign_rows": (out - rows, columns), "sign_columns": (out, into - columns)}
        return {name: (*shape, *kernel) for name, shape in shapes.items() if min(shape) > 0}

    def _add_modulation(self, source: tuple[int, int], options: dict[str, Any]) -> None:
        with torch.inference_mode(False):  # a first call may be under it
            self._add(self._shapes(source), options)
        self._has_modulation = True

    def _add(self, shapes: dict[str, tuple[int, ...]], options: dict[str, Any]) -> None:
        wide = torch.promote_types(options["dtype"], torch.float32)
        for name, shape in shapes.items():
            state = options | {"dtype": wide} if name in ("alpha", "beta") else options
            tensor = torch.empty(shape, **state)
            setattr(self, name, tensor if name in self._buffers else nn.Parameter(tensor))
            self._reset(name, tensor)

    def reset_parameters(self) -> None:
        """Filters and bias as ``nn.Conv2d`` of the full size; modulation that keeps the size of the values."""
        for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            self._reset(name, tensor.detach())

    def _reset(self, name: str, tensor: Tensor) -> None:
        bound = 1 / math.sqrt(math.prod(self.shape[1:]))
        if name == "alpha":
            tensor.fill_(2)  # 2 / (1 + exp(0)) is 1
        elif name == "beta":
            spread_betas(tensor, bound / math.sqrt(3))
        elif name.startswith("sign"):
            tensor.normal_(0, 1e-3)  # near 0, where signs can change
        elif name == "drop_mask":
            tensor.bernoulli_(1 - self.drop_rate)
        else:
            tensor.uniform_(-bound, bound)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not self._has_modulation:  # of the size that the state dict has
            names = _NAMES[self.modulation]
            found = {name: state_dict[prefix + name].shape for name in names if prefix + name in state_dict}
            if found:
                self._add(found, {"device": self.weight.device, "dtype": self.weight.dtype})
                self._has_modulation = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _float32_state(self) -> tuple[Tensor | None, ...]:
        return self.alpha, self.beta

    # --- the weight

    def source(self, weight: Tensor | None = None) -> Tensor:
        """What is repeated, (o, i, kh, kw): the layer's own filters, the given ones, or both.

        Raises:
            ValueError, TypeError: ``weight`` does not fit, is missing, or comes in mode "intra".
        """
        if self.mode == "intra":
            if weight is not None:
                raise ValueError("weight: expected None in mode 'intra', got a tensor; other modes repeat it")
            return self.weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: expected that of an earlier layer in mode {self.mode!r}, got {weight!r}")
        if weight.dim() != 4 or tuple(weight.shape[2:]) != self.kernel_size:
            raise ValueError(f"weight: expected shape (o, i, *{self.kernel_size}), got {tuple(weight.shape)}")
        if self.mode == "hybrid":
            if self.given is None:
                self._joined((weight.shape[0], weight.shape[1]))
                self.given = (weight.shape[0], weight.shape[1])
            self._check_channels(weight, self.given)
            return torch.cat((self.weight, weight), self.concat_dim)
        self._check_channels(weight, self.base)
        return weight

    def _check_channels(self, weight: Tensor, expected: tuple[int, int]) -> None:
        if tuple(weight.shape[:2]) != expected:
            raise ValueError(f"weight: expected (o, i) = {expected}, got {tuple(weight.shape[:2])}")

    def repeated_weight(self, weight: Tensor | None = None) -> Tensor:
        """The weight (out_channels, in_channels, kh, kw) as the layer uses it now, with gradients."""
        source = self.source(weight)
        if not self._has_modulation:
            options = {"device": source.device, "dtype": source.dtype}
            self._add_modulation((source.shape[0], source.shape[1]), options)
        gate = self.drop_mask
        if self.modulation == "random":
            source = torch.cat((source.flatten(0, 1), self.random_weights)).view(self.shape)
        if self.sign is not None:
            gate = self._signs()
        sizes = self.out_channels, self.in_channels
        return functional.repeat_weight(source, self.alpha, self.beta, gate, *sizes)

    def _signs(self) -> Tensor:
        gate = _Sign.apply(self.sign)
        if self.sign_rows is not None:
            gate = torch.cat((gate, gate[: len(self.sign_rows)] * _Sign.apply(self.sign_rows)))
        if self.sign_columns is not None:
            columns = self.sign_columns.shape[1]
            gate = torch.cat((gate, gate[:, :columns] * _Sign.apply(self.sign_columns)), 1)
        return gate

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Convolves x (B, in_channels, H, W); ``weight`` as :meth:`source` takes it."""
        padding: Any = self.padding
        return F.conv2d(x, self.repeated_weight(weight), self.bias, self.stride, padding)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, base={self.base}"
        text += f", stride={self.stride}, padding={self.padding}, mode={self.mode}, modulation={self.modulation}"
        return text + ("" if self.bias is not None else ", bias=False")
