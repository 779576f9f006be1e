"""ConvMixers, Vision Transformers and isotropic ConvNeXts, with and without shared weights."""

from .convmixer import ConvMixer, convmixer
from .convnext import ConvNeXt, convnext
from .registry import Model, create, image_size, list_models
from .timm_registry import register_in_timm
from .vit import VisionTransformer, vit

__all__ = [
    "ConvMixer",
    "ConvNeXt",
    "Model",
    "VisionTransformer",
    "convmixer",
    "convnext",
    "create",
    "image_size",
    "list_models",
    "vit",
]

register_in_timm()
