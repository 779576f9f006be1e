"""Published networks by name."""

from __future__ import annotations

from typing import Any

from ..sharing import Sharing
from .convmixer import ConvMixer, convmixer

_MODELS: dict[str, dict[str, Any]] = {
    "convmixer_1536_20_k9_p7": dict(dim=1536, depth=20, kernel_size=9, patch_size=7),
    "convmixer_768_32_k7_p7": dict(dim=768, depth=32, kernel_size=7, patch_size=7, activation="relu"),
    "convmixer_1024_20_k9_p14": dict(dim=1024, depth=20, kernel_size=9, patch_size=14),
    "convmixer_256_8_k5_p2": dict(dim=256, depth=8, kernel_size=5, patch_size=2, num_classes=10),
    **{
        f"ws_convmixer_768_32_k3_p14_s{rate}": dict(
            dim=768,
            depth=32,
            kernel_size=3,
            patch_size=14,
            activation="relu",
            pw_residual=True,
            sharing=Sharing(32, rate),
        )
        for rate in (1, 2, 4, 8)
    },
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


def create(name: str, **overrides: Any) -> ConvMixer:
    """Builds a published network with fresh random weights.

    ``convmixer_<dim>_<depth>_k<kernel>_p<patch>`` are those of arXiv 2201.09792, the ``ws_`` ones the
    weight-sharing networks of arXiv 2207.10237, where ``_s<rate>`` says how many blocks share a pointwise
    weight.

    Args:
        name: one of :func:`list_models`.
        overrides: arguments of :func:`convmixer` that replace the published ones, such as ``num_classes``.

    Raises:
        ValueError: there is no network of this name.
    """
    _check(name)
    return convmixer(**{**_MODELS[name], **overrides})


def _check(name: str) -> None:
    if name not in _MODELS:
        raise ValueError(f"name: expected one of {', '.join(list_models())}, got {name!r}")
