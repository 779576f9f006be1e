"""Fused kernels for networks that share their weights.

A *bank* holds trainable numbers, a *composition* turns a piece of a bank into a layer's weight, a *sharing plan*
(:class:`Sharing`) says which block uses which weight, and the *mixer* (:class:`nn.SharedMixer`,
``torch.ops.spin.shared_mixer_block``) runs the blocks.
"""

from . import (
    _library,  # noqa: F401  (registers the operators)
    calibration,
    convert,
    ensemble,
    functional,
    fusion,
    models,
    nn,
    ops,
    reference,
    search,
    weights,
)
from .convert import accelerate
from .dispatch import explain
from .ensemble import Ensemble
from .search import Plan
from .sharing import Sharing
from .weights import Repeated, SuperWeights

__all__ = [
    "Ensemble", "Plan", "Repeated", "Sharing", "SuperWeights", "accelerate", "calibration", "convert", "ensemble",
    "explain", "functional", "fusion", "models", "nn", "ops", "reference", "search", "weights",
]  # fmt: skip
