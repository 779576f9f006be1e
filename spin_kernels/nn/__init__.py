"""Modules over the operators: layers and networks whose weights are shared."""

from .mixer import SharedMixer

__all__ = ["SharedMixer"]
