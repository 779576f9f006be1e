"""Modules over the operators: layers and networks whose weights are shared."""

from .fused_mixer import FusedMixer
from .mixer import SharedMixer

__all__ = ["FusedMixer", "SharedMixer"]
