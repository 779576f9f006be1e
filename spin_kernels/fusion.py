"""Weight fusion (SPIN, arXiv 2207.10237): train with a weight per layer, share what they are fused into."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

from .models import ConvMixer
from .nn import FusedMixer, SharedMixer
from .sharing import Sharing

__all__ = ["fold", "prepare"]

Model = TypeVar("Model", ConvMixer, SharedMixer)


def prepare(model: Model, sharing: Sharing, reduction: str = "mean", groups: str = "sharing") -> Model:
    """A trainable copy of ``model`` whose pointwise weights stay per layer and are fused at every call.

    Args:
        model: a :class:`~spin_kernels.models.ConvMixer` or :class:`~spin_kernels.nn.SharedMixer`, whose own
            sharing or templates are expanded into a weight per layer.
        sharing: the plan to share by.
        reduction: ``"choose_first"``, ``"mean"``, ``"scalar_weighted_mean"`` or ``"channel_weighted_mean"``.
        groups: ``"sharing"`` or ``"consecutive"``; both as in :class:`~spin_kernels.nn.FusedMixer`.

    Returns:
        The copy, not frozen, in the mode of ``model``, with a :class:`~spin_kernels.nn.FusedMixer`.

    Raises:
        TypeError: ``model`` is neither of the two.
        ValueError: an argument is out of its range, or the model is prepared already.
    """
    mixer = _mixer_of(model, "prepare")
    if isinstance(mixer, FusedMixer):
        raise ValueError("prepare: expected a model without weight fusion, got one that has it; fold() it first")
    fused = FusedMixer(mixer.dim, mixer.depth, mixer.kernel_size, sharing, reduction, groups, **_settings(mixer))
    with torch.no_grad():
        index = list(mixer.pw_index)
        weight, bias = mixer.distinct_weights()
        changed = {"pw_weight": weight[index], "pw_bias": None if bias is None else bias[index]}
    return _replaced(model, mixer, fused, changed)


def fold(model: Model) -> Model:
    """A copy of a model of :func:`prepare` with its weights fused for good: plain sharing, as it computes now.

    Raises:
        TypeError: ``model`` is neither a ConvMixer nor a SharedMixer.
        ValueError: the model has no weight fusion.
    """
    mixer = _mixer_of(model, "fold")
    if not isinstance(mixer, FusedMixer):
        raise ValueError("fold: expected a model with weight fusion, as prepare() makes one, got one without")
    shared = SharedMixer(mixer.dim, mixer.depth, mixer.kernel_size, mixer.sharing, **_settings(mixer))
    with torch.no_grad():
        weight, bias = mixer.distinct_weights()
    return _replaced(model, mixer, shared, {"pw_weight": weight, "pw_bias": bias})


def _mixer_of(model: object, function: str) -> SharedMixer:
    mixer = model.mixer if isinstance(model, ConvMixer) else model
    if not isinstance(mixer, SharedMixer):
        raise TypeError(f"{function}: expected a ConvMixer or a SharedMixer, got {type(model).__name__}")
    if mixer.bank is not None:
        raise ValueError(f"{function}: expected a mixer with matrices of its own, got one with a bank's")
    return mixer


def _settings(mixer: SharedMixer) -> dict:
    return {
        "activation": mixer.activation,
        "pw_residual": mixer.pw_residual,
        "transform": mixer.transform,
        "bias": mixer.pw_bias is not None,
        "eps": mixer.eps,
        "momentum": mixer.momentum,
        "checkpoint": mixer.checkpoint,
        "dw_sharing": mixer.dw_sharing,
        "device": mixer.pw_weight.device,
        "dtype": mixer.pw_weight.dtype,
    }


def _replaced(model: Model, old: SharedMixer, new: Any, changed: dict[str, Tensor | None]) -> Model:
    """A copy of the model with mixer `new`, whose state is that of `old` but for what changed."""
    state = {name: tensor for name, tensor in old.state_dict().items() if name in new.state_dict()}
    new.load_state_dict(state | {name: t for name, t in changed.items() if t is not None}, strict=False)
    new.train(old.training)
    trained = {name: p.requires_grad for name, p in old.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    if model is old:
        return new
    result = copy.deepcopy(model, {id(old): new})
    result.unfreeze()._drop_packed_on_load()
    return result
