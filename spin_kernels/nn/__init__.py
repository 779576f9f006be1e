"""Modules over the operators: layers and networks whose weights are shared."""

from .bank import Slab, SuperWeightBank
from .fused_mixer import FusedMixer
from .mixer import SharedMixer
from .repeat import RepeatConv2d
from .superweight import SuperConv2d, SuperLinear

__all__ = ["FusedMixer", "RepeatConv2d", "SharedMixer", "Slab", "SuperConv2d", "SuperLinear", "SuperWeightBank"]
