"""Fused kernels for networks that share their weights.

A *bank* holds trainable numbers, a *composition* turns a piece of a bank into a layer's weight, a *sharing plan*
(:class:`Sharing`) says which block uses which weight, and the *mixer* (:class:`nn.SharedMixer`,
``torch.ops.spin.shared_mixer_block``) runs the blocks.
"""

from . import (
    _library,  # noqa: F401  (registers the operators)
    convert,
    functional,
    fusion,
    models,
    nn,
    ops,
    reference,
)
from .convert import accelerate
from .dispatch import explain
from .sharing import Sharing

__all__ = ["Sharing", "accelerate", "convert", "explain", "functional", "fusion", "models", "nn", "ops", "reference"]
