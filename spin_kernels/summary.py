"""What a network is made of: layers, who shares what, parameters, operations, bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .models import ConvMixer
from .nn import FusedMixer


@dataclass(frozen=True)
class Layer:
    """One layer for one image.

    `parameters` are those that no earlier layer has (templates, coefficients and weights of a fusion are in the total
    alone); `weight` is the number of the distinct pointwise weight.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    flops: int
    weight: int | None = None


@dataclass(frozen=True)
class Summary:
    """Of a network on one image of `image_size`; a multiply-add is two FLOPs, padding counts, activations do not.

    `unshared_parameters` are those of the same network with a pointwise weight per block; `bytes` those of all
    parameters and buffers, each once: what a checkpoint holds.
    """

    image_size: tuple[int, int]
    tokens: tuple[int, int]
    layers: tuple[Layer, ...]
    index: tuple[int, ...]
    parameters: int
    unshared_parameters: int
    bytes: int

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    def map(self) -> str:
        """The sharing plan as text: a row per distinct weight, a column per block."""
        blocks = range(len(self.index))
        tens = "".join(str(d // 10) if d and d % 10 == 0 else " " for d in blocks)
        rows = [f"{'block':>6} {tens}".rstrip(), " " * 7 + "".join(str(d % 10) for d in blocks)]
        for s in range(max(self.index, default=-1) + 1):
            rows.append(f"{'W' + str(s):>6} " + "".join("█" if weight == s else "·" for weight in self.index))
        return "\n".join(rows)


def summarise(model: ConvMixer, image_size: tuple[int, int] = (224, 224)) -> Summary:
    """Counts a :class:`~spin_kernels.models.ConvMixer` on an image (height, width).

    Raises:
        TypeError: ``model`` is no ConvMixer of this package.
        ValueError: the image is smaller than a patch.
    """
    if not isinstance(model, ConvMixer):
        raise TypeError(f"model: expected a ConvMixer of spin_kernels, got {type(model).__name__}")
    conv, mixer, fc = model.patch_embed.conv, model.mixer, model.head.fc
    grid = [
        (side + 2 * padding - kernel) // stride + 1
        for side, kernel, stride, padding in zip(image_size, conv.kernel_size, conv.stride, conv.padding, strict=True)
    ]
    if min(grid) < 1:
        raise ValueError(f"image_size: expected at least a patch of {conv.kernel_size}, got {tuple(image_size)}")
    tokens, c = grid[0] * grid[1], mixer.dim
    layers = [Layer("stem", tuple(conv.weight.shape), _count(model.patch_embed), 2 * conv.weight.numel() * tokens)]
    pointwise = [t for t in (mixer.pw_weight, mixer.pw_bias) if t is not None]
    depthwise = [t for t in (mixer.dw_weight, mixer.dw_bias) if t is not None]
    stored = pointwise[1:] if mixer.templates else pointwise
    seen: set[int] = set()
    seen_filters: set[int] = set()
    for d, (f, s) in enumerate(zip(mixer.dw_index, mixer.pw_index, strict=True)):
        own = d if isinstance(mixer, FusedMixer) else s  # whose weight is stored
        parameters = mixer.pw_affine[d].numel() + (0 if own in seen else sum(t[own].numel() for t in stored))
        seen.add(own)
        k = mixer.kernel_size
        filters = mixer.dw_affine[d].numel() + (0 if f in seen_filters else sum(t[f].numel() for t in depthwise))
        seen_filters.add(f)
        layers.append(Layer(f"block {d} depthwise", (c, 1, k, k), filters, 2 * k * k * c * tokens))
        layers.append(Layer(f"block {d} pointwise", (c, c), parameters, 2 * c * c * tokens, s))
    layers.append(Layer("head", tuple(fc.weight.shape), _count(model.head), 2 * fc.weight.numel()))
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    extra = (*depthwise, *pointwise, mixer.pw_coefficients, getattr(mixer, "pw_reduction", None))
    unshared = _count(model) - sum(t.numel() for t in extra if t is not None)
    k = mixer.kernel_size
    unshared += mixer.depth * (c * c + k * k * c + sum(c for t in (mixer.pw_bias, mixer.dw_bias) if t is not None))
    return Summary(
        (image_size[0], image_size[1]),
        (grid[0], grid[1]),
        tuple(layers),
        tuple(mixer.pw_index),
        _count(model),
        unshared,
        sum(t.numel() * t.element_size() for t in tensors),
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
