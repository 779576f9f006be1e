"""ConvMixer networks, with and without shared pointwise weights."""

from .convmixer import ConvMixer, convmixer
from .registry import create, list_models

__all__ = ["ConvMixer", "convmixer", "create", "list_models"]
