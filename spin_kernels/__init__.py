"""Fused kernels for networks that share their weights.

A *bank* holds trainable numbers, a *composition* turns a piece of a bank into a layer's weight, a *sharing plan*
(:class:`Sharing`) says which block uses which weight, and the *mixer* (:class:`nn.SharedMixer`,
``torch.ops.spin.shared_mixer_block``) runs the blocks.
"""

from . import (
    _library,  # noqa: F401  (registers the operators)
    convert,
    functional,
    models,
    nn,
    ops,
    reference,
)
from .dispatch import explain
from .sharing import Sharing

__all__ = ["Sharing", "convert", "explain", "functional", "models", "nn", "ops", "reference"]
