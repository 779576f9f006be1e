"""Published networks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..sharing import Sharing
from .convmixer import ConvMixer
from .convnext import ConvNeXt
from .vit import VisionTransformer

Model = ConvMixer | ConvNeXt | VisionTransformer

_convmixer_spin = partial(
    ConvMixer, dim=768, depth=32, kernel_size=3, patch_size=14, activation="relu", pw_residual=True
)
_deit_s = partial(VisionTransformer, dim=384, depth=12, heads=6, patch_size=16)
_convnext_s = partial(ConvNeXt, dim=384, depth=18, kernel_size=7, patch_size=16)
_MODELS: dict[str, Callable[..., Model]] = {
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
_IMAGE_SIZES = {"convmixer_256_8_k5_p2": 32}


def list_models() -> list[str]:
    """The names that :func:`create` knows, sorted."""
    return sorted(_MODELS)


def image_size(name: str) -> int:
    """The side of the images that a network was published for: ImageNet's 224, or CIFAR's 32.

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

    Args:
        name: one of :func:`list_models`.
        overrides: arguments of :class:`ConvMixer`, :class:`VisionTransformer` or :class:`ConvNeXt` that replace
            the published ones, such as ``num_classes``.

    Raises:
        ValueError: there is no network of this name.
    """
    _check(name)
    return _MODELS[name](**overrides)


def _check(name: str) -> None:
    if name not in _MODELS:
        raise ValueError(f"name: expected one of {', '.join(list_models())}, got {name!r}")
