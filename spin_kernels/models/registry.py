"""Published networks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..sharing import Sharing
from .convmixer import ConvMixer
from .convnext import ConvNeXt
from .p4cnn import P4CNN, RepeatedOrientations
from .resnet import ResNet
from .vgg import VGG
from .vit import VisionTransformer
from .wide_resnet import WideResNet

ConvNet = WideResNet | ResNet | VGG | P4CNN
Model = ConvMixer | ConvNeXt | VisionTransformer | ConvNet

_convmixer_spin = partial(
    ConvMixer, dim=768, depth=32, kernel_size=3, patch_size=14, activation="relu", pw_residual=True
)
_deit_s = partial(VisionTransformer, dim=384, depth=12, heads=6, patch_size=16)
_convnext_s = partial(ConvNeXt, dim=384, depth=18, kernel_size=7, patch_size=16)
_ISOTROPIC: dict[str, Callable[..., Model]] = {
    "convmixer_1536_20_k9_p7": partial(ConvMixer, dim=1536, depth=20, kernel_size=9, patch_size=7),
    "convmixer_768_32_k7_p7": partial(ConvMixer, dim=768, depth=32, kernel_size=7, patch_size=7, activation="relu"),
    "convmixer_1024_20_k9_p14": partial(ConvMixer, dim=1024, depth=20, kernel_size=9, patch_size=14),
    "convmixer_256_8_k5_p2": partial(ConvMixer, dim=256, depth=8, kernel_size=5, patch_size=2, num_classes=10),
    **{
        f"ws_convmixer_768_32_k3_p14_s{rate}": partial(_convmixer_spin, sharing=Sharing(32, rate))
        for rate in (1, 2, 4, 8)
    },
    "vit_192_12_h3_p16": partial(VisionTransformer, dim=192, depth=12, heads=3, patch_size=16),
    "vit_384_12_h6_p16": _deit_s,
    **{f"ws_vit_384_12_h6_p16_s{rate}": partial(_deit_s, sharing=Sharing(12, rate)) for rate in (2, 3)},
    "convnext_384_18_k7_p16": _convnext_s,
    **{f"ws_convnext_384_18_k7_p16_s{rate}": partial(_convnext_s, sharing=Sharing(18, rate)) for rate in (2, 3)},
}
_CONVNETS: dict[str, Callable[..., ConvNet]] = {
    "wrn_28_10": WideResNet,
    "resnet50": partial(ResNet, layers=(3, 4, 6, 3)),
    "vgg11": VGG,
    "vgg11_cifar": partial(VGG, batch_norm=True, hidden=None, num_classes=10),
    "p4cnn": P4CNN,
    "p4cnn_repeated": partial(P4CNN, weights=RepeatedOrientations()),
    "z2cnn": partial(P4CNN, channels=20, orientations=1),
}
_MODELS: dict[str, Callable[..., Model]] = {**_ISOTROPIC, **_CONVNETS}
_CIFAR, _MNIST = ("convmixer_256_8_k5_p2", "wrn_28_10", "vgg11_cifar"), ("p4cnn", "p4cnn_repeated", "z2cnn")
_IMAGE_SIZES = dict.fromkeys(_CIFAR, 32) | dict.fromkeys(_MNIST, 28)


def list_models() -> list[str]:
    """The names that :func:`create` knows, sorted."""
    return sorted(_MODELS)


def isotropic_models() -> list[str]:
    """Those of :func:`list_models` whose blocks have one width, sorted; they have ``block_outputs``."""
    return sorted(_ISOTROPIC)


def image_size(name: str) -> int:
    """The side of the images that a network was published for: ImageNet's 224, CIFAR's 32 or MNIST's 28.

    Raises:
        ValueError: there is no network of this name.
    """
    _check(name)
    return _IMAGE_SIZES.get(name, 224)


def create(name: str, **overrides: Any) -> Model:
    """Builds a published network with fresh random weights.

    ``convmixer_<dim>_<depth>_k<kernel>_p<patch>`` are those of arXiv 2201.09792,
    ``vit_<dim>_<depth>_h<heads>_p<patch>`` DeiT-Ti and DeiT-S (arXiv 2012.12877), and
    ``convnext_<dim>_<depth>_k<kernel>_p<patch>`` is the isotropic ConvNeXt-S (arXiv 2201.03545). The ``ws_`` ones
    share weights as arXiv 2207.10237 does: ``_s<rate>`` says how many blocks share a pointwise weight or, in a
    Vision Transformer, all linear layers.

    ``wrn_28_10`` is the :class:`WideResNet` for CIFAR, ``resnet50`` and ``vgg11`` are ImageNet's, ``vgg11_cifar`` has
    BatchNorm and one linear layer, and ``p4cnn``, ``p4cnn_repeated`` and ``z2cnn`` are the :class:`P4CNN` for rotated
    MNIST with fixed rotations, with learnable repetition, and without orientations.

    Args:
        name: one of :func:`list_models`.
        overrides: arguments of the network's class that replace the published ones, such as ``num_classes``.

    Raises:
        ValueError: there is no network of this name.
    """
    _check(name)
    return _MODELS[name](**overrides)


def _check(name: str) -> None:
    if name not in _MODELS:
        raise ValueError(f"name: expected one of {', '.join(list_models())}, got {name!r}")
