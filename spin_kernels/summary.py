"""What a network is made of: layers, who shares what, parameters, operations, bytes."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .models import ConvMixer, ConvNeXt, Model, VisionTransformer
from .models.isotropic import Isotropic
from .models.p4cnn import P4Conv2d
from .models.registry import ConvNet
from .models.vit import Attention
from .nn import FusedMixer, RepeatConv2d, SharedMixer, SuperConv2d, SuperLinear, SuperWeightBank

_CONVOLUTIONS = (nn.Conv2d, SuperConv2d, RepeatConv2d, P4Conv2d)
_LINEAR = (nn.Linear, SuperLinear)


@dataclass(frozen=True)
class Layer:
    """One layer for one image.

    `parameters` are those that no earlier layer has (templates, coefficients, weights of a fusion, tokens and, outside
    of ConvMixers, normalisation are in the total alone); `weight` is what the layer shares with others, as in the map.
    """

    name: str
    shape: tuple[int, ...]
    parameters: int
    flops: int
    weight: str = ""


@dataclass(frozen=True)
class Summary:
    """Of a network on one image of `image_size`; a multiply-add is two FLOPs, padding counts, activations do not.

    `plans` holds the distinct weight that each block uses: "W", the pointwise ones of a ConvMixer or ConvNeXt and all
    linear layers of a Vision Transformer, and "F", depthwise filters, where blocks share them; nothing for networks
    of blocks of several widths. `tokens` are the positions that come out of the stem, their first convolution.
    `unshared_parameters` are those of the same network with all weights per block; `bytes` those of all
    parameters and buffers, each once: what a checkpoint holds.
    """

    image_size: tuple[int, int]
    tokens: tuple[int, int]
    layers: tuple[Layer, ...]
    plans: dict[str, tuple[int, ...]]
    parameters: int
    unshared_parameters: int
    bytes: int

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    def map(self) -> str:
        """The sharing plans as text: a row per distinct weight, a column per block; empty without plans."""
        if not self.plans:
            return ""
        blocks = range(len(self.plans["W"]))
        tens = "".join(str(d // 10 % 10) if d and d % 10 == 0 else " " for d in blocks)
        rows = [f"{'block':>6} {tens}".rstrip(), " " * 7 + "".join(str(d % 10) for d in blocks)]
        for kind, index in self.plans.items():
            for s in range(max(index) + 1):
                rows.append(f"{kind + str(s):>6} " + "".join("█" if weight == s else "·" for weight in index))
        return "\n".join(rows)


def summarise(model: Model, image_size: tuple[int, int] = (224, 224)) -> Summary:
    """Counts a network of :mod:`spin_kernels.models` on an image (height, width).

    Raises:
        TypeError: ``model`` is none of them.
        ValueError: the image is too small, or not what a Vision Transformer is made for.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model: expected a network of spin_kernels.models, got {type(model).__name__}")
    if isinstance(model, ConvNet):
        return _summarise_convnet(model, image_size)
    conv: Any = model.patch_embed.conv if isinstance(model, ConvMixer) else model.patch_embed
    grid = [
        (side + 2 * padding - kernel) // stride + 1
        for side, kernel, stride, padding in zip(image_size, conv.kernel_size, conv.stride, conv.padding, strict=True)
    ]
    if min(grid) < 1:
        raise ValueError(f"image_size: expected at least a patch of {conv.kernel_size}, got {tuple(image_size)}")
    if isinstance(model, VisionTransformer) and tuple(image_size) != model.image_size:
        raise ValueError(f"image_size: expected {model.image_size}, as the position embedding, got {tuple(image_size)}")
    patches = grid[0] * grid[1]
    if isinstance(model, ConvMixer):
        layers, unshared = _convmixer_blocks(model.mixer, patches), _without_sharing(model)
        head, plans = model.head.fc, {"W": tuple(model.mixer.pw_index)}
        if model.mixer.dw_sharing.num_shared < model.mixer.depth:
            plans["F"] = tuple(model.mixer.dw_index)
    else:
        tokens = patches + isinstance(model, VisionTransformer)  # the class token
        layers = _isotropic_blocks(model, tokens)
        unshared = _count(model) + sum(_count(model.shared[s]) for s in model.index) - _count(model.shared)
        head, plans = model.head, {"W": tuple(model.index)}
    ends = (
        Layer("stem", tuple(conv.weight.shape), _count(model.patch_embed), 2 * conv.weight.numel() * patches),
        Layer("head", tuple(head.weight.shape), _count(head), 2 * head.weight.numel()),
    )
    return Summary(
        (image_size[0], image_size[1]),
        (grid[0], grid[1]),
        (ends[0], *layers, ends[1]),
        plans,
        _count(model),
        unshared,
        _bytes(model),
    )


def _convmixer_blocks(mixer: SharedMixer, tokens: int) -> list[Layer]:
    c, k = mixer.dim, mixer.kernel_size
    depthwise = [t for t in (mixer.dw_weight, mixer.dw_bias) if t is not None]
    pointwise = [t for t in (mixer.pw_weight, mixer.pw_bias) if t is not None]
    stored = pointwise[1:] if mixer.templates else pointwise
    layers, seen_filters, seen = [], set(), set()
    for d, (f, s) in enumerate(zip(mixer.dw_index, mixer.pw_index, strict=True)):
        own = d if isinstance(mixer, FusedMixer) else s  # whose weight is stored
        filters = mixer.dw_affine[d].numel() + (0 if f in seen_filters else sum(t[f].numel() for t in depthwise))
        parameters = mixer.pw_affine[d].numel() + (0 if own in seen else sum(t[own].numel() for t in stored))
        seen_filters.add(f)
        seen.add(own)
        layers.append(Layer(f"block {d} depthwise", (c, 1, k, k), filters, 2 * k * k * c * tokens, f"F{f}"))
        layers.append(Layer(f"block {d} pointwise", (c, c), parameters, 2 * c * c * tokens, f"W{s}"))
    return layers


def _without_sharing(model: ConvMixer) -> int:
    mixer = model.mixer
    layers = (mixer.dw_weight, mixer.dw_bias, mixer.pw_weight, mixer.pw_bias)
    extra = (*layers, mixer.pw_coefficients, getattr(mixer, "pw_reduction", None))
    biases = sum(mixer.dim for bias in (mixer.dw_bias, mixer.pw_bias) if bias is not None)
    block = mixer.dim**2 + mixer.kernel_size**2 * mixer.dim + biases
    return _count(model) - sum(t.numel() for t in extra if t is not None) + mixer.depth * block


def _isotropic_blocks(model: Isotropic, tokens: int) -> list[Layer]:
    """The linear layers and convolutions of every block, and the two products of attention without weights."""
    layers, seen = [], set()
    for d, s in enumerate(model.index):
        if isinstance(model, ConvNeXt):
            conv: Any = model.depthwise[d]
            shape, flops = tuple(conv.weight.shape), 2 * conv.weight.numel() * tokens
            layers.append(Layer(f"block {d} depthwise", shape, _count(conv), flops))
        for name, layer in model.shared[s].named_modules():
            if isinstance(layer, nn.Linear):
                parameters = 0 if s in seen else _count(layer)
                flops = 2 * layer.weight.numel() * tokens
                layers.append(Layer(f"block {d} {name}", tuple(layer.weight.shape), parameters, flops, f"W{s}"))
            elif isinstance(layer, Attention):
                layers.append(Layer(f"block {d} {name}", (tokens, tokens), 0, 4 * tokens**2 * model.dim))
        seen.add(s)
    return layers


def _summarise_convnet(model: ConvNet, image_size: tuple[int, int]) -> Summary:
    """Its convolutions and linear layers in the order in which an image meets them."""
    layers: list[Layer] = []
    grids: list[tuple[int, ...]] = []
    own: set[Tensor] = set()
    seen: set[Tensor] = set()

    def record(name: str, layer: Any, _: Any, output: Tensor) -> None:
        if isinstance(layer, _LINEAR):
            shape: tuple[int, ...] = (layer.out_features, layer.in_features)
        else:
            shape = (layer.out_channels, layer.in_channels // getattr(layer, "groups", 1), *layer.kernel_size)
        new = [p for p in layer.parameters() if p not in seen]
        seen.update(new)
        positions = math.prod(output.shape[2:])
        layers.append(Layer(name, shape, sum(p.numel() for p in new), 2 * math.prod(shape) * positions))
        grids.append(tuple(output.shape[2:]))

    biases = 0
    twin = copy.deepcopy(model).to("meta")  # shapes alone, nothing is computed and no statistics change
    for name, module in twin.named_modules():
        if isinstance(module, (*_CONVOLUTIONS, *_LINEAR)):
            module.register_forward_hook(partial(record, name))
            bias = getattr(module, "bias", None)
            biases += 0 if bias is None else bias.numel()
        if isinstance(module, (*_CONVOLUTIONS, *_LINEAR, SuperWeightBank)):
            own.update(module.parameters())
    first: Any = next(module for module in twin.modules() if isinstance(module, _CONVOLUTIONS))
    try:
        with torch.no_grad():
            twin(torch.empty(2, first.in_channels, *image_size, dtype=first.weight.dtype, device="meta"))
    except RuntimeError as error:
        raise ValueError(f"image_size: expected a larger image, got {tuple(image_size)}") from error
    parameters = _count(model)
    weights = sum(math.prod(layer.shape) for layer in layers)
    unshared = parameters - sum(p.numel() for p in own) + weights + biases
    size, tokens = (image_size[0], image_size[1]), (grids[0][0], grids[0][1])
    return Summary(size, tokens, tuple(layers), {}, parameters, unshared, _bytes(model))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
