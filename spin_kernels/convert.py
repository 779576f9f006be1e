"""Reads checkpoints of other implementations into the models of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .models import ConvMixer, convmixer
from .sharing import Sharing

_ACTIVATION_CLASSES = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "Swish": "silu",
    "Identity": "identity",
}

# The names of layers: {d} is a block, {s} a distinct pointwise matrix.
_TIMM = {
    "conv": "stem.0",
    "bn": "stem.2",
    "dw": "blocks.{d}.0.fn.0",
    "dw_bn": "blocks.{d}.0.fn.2",
    "pw_weight": "blocks.{s}.1.weight",
    "pw_bias": "blocks.{s}.1.bias",
    "pw_bn": "blocks.{d}.3",
    "head": "head",
}
_ML_SPIN = {
    "conv": "patch_embed.conv",
    "bn": "patch_embed.bn",
    "dw": "blocks.{d}.dwise_blk.0",
    "dw_bn": "blocks.{d}.dwise_blk.2",
    "pw_weight": "pwise_w.{s}",
    "pw_bias": "pwise_b.{s}",
    "pw_bn": "blocks.{d}.bn2",
    "head": "head.fc",
}


class _Checkpoint:
    """A state dict that is read key by key; every message names the key, what was expected and what came."""

    def __init__(self, state: Any, source: str) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"{source}: expected a state dict, got {type(state).__name__}")
        self.state, self.source = dict(state), source
        self.unread = set(self.state)

    def take(self, key: str, *shape: int) -> Tensor:
        """The tensor at ``key``; -1 in ``shape`` stands for any size."""
        expected = str(shape).replace("-1", "any")
        if key not in self.state:
            raise ValueError(f"{self.source}: expected key {key!r} with shape {expected}, got a checkpoint without it")
        value = self.state[key]
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.source}: expected a tensor at key {key!r}, got {type(value).__name__}")
        if value.dim() != len(shape) or any(n not in (-1, m) for n, m in zip(shape, value.shape, strict=True)):
            raise ValueError(f"{self.source}: expected shape {expected} at key {key!r}, got {tuple(value.shape)}")
        self.unread.discard(key)
        return value.detach()

    def indices(self, prefix: str) -> set[int]:
        """The numbers d of the keys ``<prefix>.<d>`` and ``<prefix>.<d>.<...>``."""
        tails = (key[len(prefix) + 1 :].split(".")[0] for key in self.state if key.startswith(prefix + "."))
        return {int(tail) for tail in tails if tail.isdecimal()}

    def expect_count(self, prefix: str, count: int, why: str) -> None:
        """Checks that ``<prefix>.0`` to ``<prefix>.<count-1>`` are there and no others."""
        found = self.indices(prefix)
        if found != set(range(count)):
            got = ", ".join(map(str, sorted(found))) or "none"
            raise ValueError(f"{self.source}: expected keys {prefix}.0 to {prefix}.{count - 1} ({why}), got {got}")

    def batch_norm(self, prefix: str, dim: int) -> tuple[Tensor, Tensor]:
        """BatchNorm's (gamma, beta) and (running mean, running variance), (2, dim) each."""
        self.unread.discard(f"{prefix}.num_batches_tracked")  # the mixer has one for all
        names = (("weight", "bias"), ("running_mean", "running_var"))
        affine, running = (torch.stack([self.take(f"{prefix}.{name}", dim) for name in pair]) for pair in names)
        return affine, running

    def finish(self) -> None:
        if self.unread:
            raise ValueError(
                f"{self.source}: expected no other keys, got {min(self.unread)!r}"
                + (f" and {len(self.unread) - 1} more" if len(self.unread) > 1 else "")
            )


def _load(model: ConvMixer, checkpoint: _Checkpoint, names: dict[str, str]) -> ConvMixer:
    """Fills the model from a checkpoint whose layers are called ``names``."""
    mixer, conv = model.mixer, model.patch_embed.conv
    dim, k = mixer.dim, mixer.kernel_size
    state = {
        f"patch_embed.conv.{name}": checkpoint.take(f"{names['conv']}.{name}", *tensor.shape)
        for name, tensor in conv.named_parameters()
    }
    state |= {
        f"head.fc.{name}": checkpoint.take(f"{names['head']}.{name}", *tensor.shape)
        for name, tensor in model.head.fc.named_parameters()
    }
    (gamma, beta), (mean, var) = checkpoint.batch_norm(names["bn"], dim)
    norm = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var}
    state |= {f"patch_embed.bn.{name}": tensor for name, tensor in norm.items()}

    depthwise = [names["dw"].format(d=d) for d in range(mixer.depth)]
    filters = [checkpoint.take(f"{name}.weight", dim, 1, k, k) for name in depthwise]
    state["mixer.dw_weight"] = torch.cat(filters, 1).transpose(0, 1)
    state["mixer.dw_bias"] = torch.stack([checkpoint.take(f"{name}.bias", dim) for name in depthwise])
    for kind, shape in (("weight", (dim, dim, 1, 1)), ("bias", (dim,))):
        keys = [names[f"pw_{kind}"].format(s=s) for s in range(mixer.sharing.num_shared)]
        state[f"mixer.pw_{kind}"] = torch.stack([checkpoint.take(key, *shape) for key in keys])
    state["mixer.pw_weight"] = state["mixer.pw_weight"].flatten(2)
    for half in ("dw", "pw"):
        pairs = [checkpoint.batch_norm(names[f"{half}_bn"].format(d=d), dim) for d in range(mixer.depth)]
        state[f"mixer.{half}_affine"], state[f"mixer.{half}_running"] = map(torch.stack, zip(*pairs, strict=True))

    for target, norm in (("patch_embed.bn", names["bn"]), ("mixer", names["pw_bn"].format(d=0))):
        batches = checkpoint.state.get(f"{norm}.num_batches_tracked", 0)
        state[f"{target}.num_batches_tracked"] = torch.as_tensor(batches)
    checkpoint.finish()
    first = state["patch_embed.conv.weight"]
    model.to(first.device, first.dtype).load_state_dict(state)
    return model


def from_timm(model: nn.Module | Mapping[str, Tensor], *, activation: str | None = None) -> ConvMixer:
    """The :class:`~spin_kernels.models.ConvMixer` with the weights of timm's ConvMixer.

    Args:
        model: a ``timm.models.convmixer.ConvMixer``, whose activation, stride, BatchNorm settings, dropout
            rate and mode are taken over; or its state dict, which tells neither the activation nor the stride
            (patch_size).
        activation: of a state dict, ``"gelu"`` or another name that :func:`~spin_kernels.models.convmixer`
            knows.

    Raises:
        ValueError: a key is missing, unexpected or of the wrong shape, or the model cannot be expressed.
        TypeError: ``model`` is neither a module nor a state dict.
    """
    module = model if isinstance(model, nn.Module) else None
    checkpoint = _Checkpoint(model if module is None else module.state_dict(), "from_timm")
    dim, in_channels, patch, _ = checkpoint.take("stem.0.weight", -1, -1, -1, -1).shape
    depth = max(checkpoint.indices("blocks"), default=0) + 1
    checkpoint.expect_count("blocks", depth, f"depth {depth}")
    kernel_size = checkpoint.take("blocks.0.0.fn.0.weight", dim, 1, -1, -1).shape[2]
    num_classes = checkpoint.take("head.weight", -1, dim).shape[0]
    if module is None:
        if activation is None:
            raise ValueError("from_timm: expected activation= beside a state dict, which has no record of it, got None")
        result = convmixer(dim, depth, kernel_size, patch, None, 0, in_channels, num_classes, activation)
        return _load(result, checkpoint, _TIMM)

    parts = dict(module.named_modules())
    blocks = range(depth)
    found = _timm_activation(
        [parts.get("stem.1")] + [parts.get(f"blocks.{d}.{a}") for d in blocks for a in ("0.fn.1", "2")]
    )
    if activation not in (None, found):
        raise ValueError(f"from_timm: expected activation {found!r}, as in the model, got {activation!r}")
    pool = getattr(parts.get("pooling"), "pool_type", "avg")
    if pool != "avg":
        raise ValueError(f"from_timm: expected average pooling before the head, got {pool!r}")
    conv = parts["stem.0"]
    result = convmixer(
        dim,
        depth,
        kernel_size,
        patch,
        conv.stride[0],
        conv.padding[0],
        in_channels,
        num_classes,
        found,
        drop_rate=getattr(parts.get("head_drop"), "p", 0.0),
    )
    norms = [parts[f"blocks.{d}.{b}"] for d in blocks for b in ("0.fn.2", "3")]
    for target, sources in ((result.patch_embed.bn, [parts["stem.2"]]), (result.mixer, norms)):
        for name in ("eps", "momentum"):
            values = {getattr(norm, name) for norm in sources}
            if len(values) > 1:
                raise ValueError(f"from_timm: expected one BatchNorm {name} in all blocks, got {sorted(values)}")
            setattr(target, name, values.pop())
    return _load(result, checkpoint, _TIMM).train(module.training)


def _timm_activation(modules: list[nn.Module | None]) -> str:
    names = {
        _ACTIVATION_CLASSES.get(type(module).__name__, type(module).__name__)
        + ("_tanh" if getattr(module, "approximate", None) == "tanh" else "")
        for module in modules
    }
    if len(names) > 1 or not names <= set(_ACTIVATION_CLASSES.values()):
        raise ValueError(
            f"from_timm: expected one activation of {', '.join(sorted(_ACTIVATION_CLASSES))} in all layers, "
            f"got {', '.join(sorted(names))}"
        )
    return names.pop()


def from_ml_spin(
    state_dict: Mapping[str, Any],
    *,
    dim: int,
    depth: int,
    kernel_size: int,
    patch_size: int,
    num_classes: int,
    activation: str,
    patch_stride: int | None = None,
    patch_padding: int = 0,
    rate: int | None = None,
    mapping: str = "sequential",
    reduction: str | None = None,
) -> ConvMixer:
    """The :class:`~spin_kernels.models.ConvMixer` with the weights of SPIN's WS-ConvMixer (arXiv 2207.10237).

    Args:
        state_dict: ``patch_embed.conv|bn.*``, ``blocks.{d}.dwise_blk.0|2.*``, ``blocks.{d}.bn2.*``,
            ``pwise_w.{s}`` (C, C, 1, 1), ``pwise_b.{s}`` (C,) and ``head.fc.*``, by themselves or under
            ``"model_state"``.
        dim, depth, kernel_size, patch_size, num_classes, activation, patch_stride, patch_padding: as in
            :func:`~spin_kernels.models.convmixer`.
        rate: how many blocks share a pointwise weight; None or 1 shares nothing.
        mapping: of the shared weights to blocks, as in :class:`~spin_kernels.Sharing`.
        reduction: must be None; checkpoints with weight fusion are not supported.

    Raises:
        ValueError: a key is missing, unexpected or of the wrong shape, or the checkpoint has weight fusion.
        TypeError: ``state_dict`` is not a state dict of tensors.
    """
    if reduction is not None:
        raise ValueError(
            f"from_ml_spin: expected reduction=None, got {reduction!r}: weight fusion is not available in this version"
        )
    if isinstance(state_dict, Mapping) and isinstance(state_dict.get("model_state"), Mapping):
        state_dict = state_dict["model_state"]
    checkpoint = _Checkpoint(state_dict, "from_ml_spin")
    if fused := checkpoint.indices("reduction_w"):
        raise ValueError(
            f"from_ml_spin: expected no key 'reduction_w.{min(fused)}', got a checkpoint with weight fusion, "
            "which is not available in this version"
        )
    sharing = Sharing(depth, 1 if rate is None else rate, mapping)
    checkpoint.expect_count("blocks", depth, f"depth {depth}")
    for prefix in ("pwise_w", "pwise_b"):
        checkpoint.expect_count(prefix, sharing.num_shared, f"depth {depth} shared at rate {sharing.rate}")
    in_channels = checkpoint.take("patch_embed.conv.weight", dim, -1, patch_size, patch_size).shape[1]
    model = convmixer(
        dim,
        depth,
        kernel_size,
        patch_size,
        patch_stride,
        patch_padding,
        in_channels,
        num_classes,
        activation,
        pw_residual=True,
        sharing=sharing,
    )
    return _load(model, checkpoint, _ML_SPIN)
