"""The convolutions and linear layers of any network: found, and replaced by layers of this package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from .nn.bank import Slab, SuperWeightBank
from .nn.superweight import SuperConv2d, SuperLinear

Layer = nn.Conv2d | nn.Linear
Shape = tuple[int, int, int, int]


def own_layers(network: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Convolutions and linear layers that are trained, by name; no subclasses, which may compute otherwise.

    Raises:
        ValueError: two of them share a weight.
    """
    owners: dict[int, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if name and type(module) in (nn.Conv2d, nn.Linear) and module.weight.requires_grad:
            owner = owners.setdefault(id(module.weight), name)
            if owner != name:
                raise ValueError(f"network: expected layers with weights of their own, got {owner} and {name} with one")
            yield name, module


def replaceable_layers(network: nn.Module, classifier: bool = False) -> dict[str, Layer]:
    """Those of :func:`own_layers` that a bank can make: no grouped convolutions, and not the last linear layer,
    the classifier, unless ``classifier`` asks for it."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return {
        name: module
        for name, module in own_layers(network)
        if (is_plain(module) if isinstance(module, nn.Conv2d) else classifier or module is not linear[-1])
    }


def is_plain(layer: nn.Conv2d) -> bool:
    """Whether a convolution has one group and pads with zeros."""
    return layer.groups == 1 and layer.padding_mode == "zeros"


def conv_shape(layer: Layer) -> Shape:
    """Of the weight, (out, in, kh, kw); 1 x 1 for linear layers."""
    return (*layer.weight.shape, 1, 1)[:4]


def from_bank(
    layer: Layer | SuperConv2d | SuperLinear,
    bank: SuperWeightBank,
    slabs: list[Slab],
    base: tuple[int, int] | None = None,
) -> SuperConv2d | SuperLinear:
    """A layer like this one, with its very bias, and a weight from a bank."""
    has_bias = layer.bias is not None
    options: dict[str, Any] = {"bank": bank, "slabs": slabs, "base": base}
    new: SuperConv2d | SuperLinear
    if isinstance(layer, nn.Linear | SuperLinear):
        new = SuperLinear(layer.in_features, layer.out_features, has_bias, **options)
    else:
        geometry: Any = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, has_bias
        new = SuperConv2d(layer.in_channels, layer.out_channels, *geometry, **options)
    new.bias = cast("nn.Parameter | None", layer.bias)
    return new.train(layer.training)


def replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer in the place of the one of this name."""
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, layer)
