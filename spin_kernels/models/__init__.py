"""ConvMixer networks, with and without shared pointwise weights."""

from .convmixer import ConvMixer, convmixer
from .registry import create, image_size, list_models

__all__ = ["ConvMixer", "convmixer", "create", "image_size", "list_models"]
