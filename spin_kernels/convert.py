"""Reads checkpoints of other implementations into the models of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import fusion
from .checkpoints import load
from .models import ConvMixer, convmixer
from .nn import FusedMixer
from .sharing import Sharing

__all__ = ["accelerate", "from_ml_spin", "from_timm", "load", "to_timm"]

_ACTIVATION_CLASSES = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "Swish": "silu",
    "Identity": "identity",
}

_ACTIVATION_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}

# The names of layers: {d} is a block or a distinct pointwise matrix, {n} = d + 3.
_TIMM = {
    "conv": "stem.0",
    "bn": "stem.2",
    "act": "stem.1",
    "dw": "blocks.{d}.0.fn.0",
    "dw_act": "blocks.{d}.0.fn.1",
    "dw_bn": "blocks.{d}.0.fn.2",
    "pw_weight": "blocks.{d}.1.weight",
    "pw_bias": "blocks.{d}.1.bias",
    "pw_act": "blocks.{d}.2",
    "pw_bn": "blocks.{d}.3",
    "head": "head",
}
# The authors' nn.Sequential: stem, blocks, average pooling, Flatten, head (the last layer, so its name is not here).
_SEQUENTIAL = {
    "conv": "0",
    "act": "1",
    "bn": "2",
    "dw": "{n}.0.fn.0",
    "dw_act": "{n}.0.fn.1",
    "dw_bn": "{n}.0.fn.2",
    "pw_weight": "{n}.1.weight",
    "pw_bias": "{n}.1.bias",
    "pw_act": "{n}.2",
    "pw_bn": "{n}.3",
}
_ML_SPIN = {
    "conv": "patch_embed.conv",
    "bn": "patch_embed.bn",
    "dw": "blocks.{d}.dwise_blk.0",
    "dw_bn": "blocks.{d}.dwise_blk.2",
    "pw_weight": "pwise_w.{d}",
    "pw_bias": "pwise_b.{d}",
    "pw_bn": "blocks.{d}.bn2",
    "pw_reduction": "reduction_w.{d}",
    "head": "head.fc",
}


class _Checkpoint:
    """A state dict that is read key by key; every message names the key, what was expected and what came."""

    def __init__(self, state: Any, source: str) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"{source}: expected a state dict, got {type(state).__name__}")
        if any(not isinstance(key, str) for key in state):
            raise TypeError(f"{source}: expected a state dict with names for keys, got other keys")
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


def _name(names: dict[str, str], part: str, d: int) -> str:
    return names[part].format(d=d, n=d + 3)


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

    depthwise = [_name(names, "dw", d) for d in range(mixer.depth)]
    filters = [checkpoint.take(f"{name}.weight", dim, 1, k, k) for name in depthwise]
    state["mixer.dw_weight"] = torch.cat(filters, 1).transpose(0, 1)
    state["mixer.dw_bias"] = torch.stack([checkpoint.take(f"{name}.bias", dim) for name in depthwise])
    for kind, shape in (("weight", (dim, dim, 1, 1)), ("bias", (dim,))):
        keys = [_name(names, f"pw_{kind}", s) for s in range(len(mixer.pw_weight))]
        state[f"mixer.pw_{kind}"] = torch.stack([checkpoint.take(key, *shape) for key in keys])
    state["mixer.pw_weight"] = state["mixer.pw_weight"].flatten(2)
    if isinstance(mixer, FusedMixer) and mixer.pw_reduction is not None:
        columns = mixer.pw_reduction.shape[1]
        rows = [checkpoint.take(_name(names, "pw_reduction", d), columns) for d in range(mixer.depth)]
        state["mixer.pw_reduction"] = torch.stack(rows)
    for half in ("dw", "pw"):
        pairs = [checkpoint.batch_norm(_name(names, f"{half}_bn", d), dim) for d in range(mixer.depth)]
        state[f"mixer.{half}_affine"], state[f"mixer.{half}_running"] = map(torch.stack, zip(*pairs, strict=True))

    for target, norm in (("patch_embed.bn", names["bn"]), ("mixer", _name(names, "pw_bn", 0))):
        batches = checkpoint.state.get(f"{norm}.num_batches_tracked", 0)
        state[f"{target}.num_batches_tracked"] = torch.as_tensor(batches)
    checkpoint.finish()
    first = state["patch_embed.conv.weight"]
    model.to(first.device, first.dtype).load_state_dict(state)
    return model


def from_timm(model: nn.Module | Mapping[str, Tensor], *, activation: str | None = None) -> ConvMixer:
    """The :class:`~spin_kernels.models.ConvMixer` with the weights of timm's ConvMixer, or of its authors'.

    Args:
        model: a ``timm.models.convmixer.ConvMixer`` or the ``nn.Sequential`` of arXiv 2201.09792 (figure 3), whose
            activation, stride, BatchNorm settings, dropout rate and mode are taken over; or the state dict of
            either, which tells neither the activation nor the stride (patch_size).
        activation: of a state dict, ``"gelu"`` or another name that :func:`~spin_kernels.models.convmixer`
            knows.

    Raises:
        ValueError: a key is missing, unexpected or of the wrong shape, or the model cannot be expressed.
        TypeError: ``model`` is neither a module nor a state dict.
    """
    return _from_timm(model, activation, "from_timm")


def _from_timm(model: nn.Module | Mapping[str, Tensor], activation: str | None, caller: str) -> ConvMixer:
    module = model if isinstance(model, nn.Module) else None
    checkpoint = _Checkpoint(model if module is None else module.state_dict(), caller)
    names = _TIMM
    depth = max(checkpoint.indices("blocks"), default=0) + 1
    if "0.weight" in checkpoint.state:
        head = max(int(key.split(".")[0]) for key in checkpoint.state if key.split(".")[0].isdecimal())
        names, depth = _SEQUENTIAL | {"head": str(head)}, max(head - 5, 1)
    dim, in_channels, patch, _ = checkpoint.take(f"{names['conv']}.weight", -1, -1, -1, -1).shape
    if names is _TIMM:
        checkpoint.expect_count("blocks", depth, f"depth {depth}")
    kernel_size = checkpoint.take(_name(names, "dw", 0) + ".weight", dim, 1, -1, -1).shape[2]
    num_classes = checkpoint.take(f"{names['head']}.weight", -1, dim).shape[0]
    if module is None:
        if activation is None:
            raise ValueError(f"{caller}: expected activation= beside a state dict, which has no record of it, got None")
        result = convmixer(dim, depth, kernel_size, patch, None, 0, in_channels, num_classes, activation)
        return _load(result, checkpoint, names)

    parts = dict(module.named_modules())
    found = _timm_activation([parts.get(names["act"]), *_parts_of_blocks(parts, names, "act", depth)], caller)
    if activation not in (None, found):
        raise ValueError(f"{caller}: expected activation {found!r}, as in the model, got {activation!r}")
    pool = getattr(parts.get("pooling"), "pool_type", "avg")
    if pool != "avg":
        raise ValueError(f"{caller}: expected average pooling before the head, got {pool!r}")
    conv = parts[names["conv"]]
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
    norms = _parts_of_blocks(parts, names, "bn", depth)
    for target, sources in ((result.patch_embed.bn, [parts[names["bn"]]]), (result.mixer, norms)):
        for name in ("eps", "momentum"):
            values = {getattr(norm, name) for norm in sources}
            if len(values) > 1:
                raise ValueError(f"{caller}: expected one BatchNorm {name} in all blocks, got {sorted(values)}")
            setattr(target, name, values.pop())
    return _load(result, checkpoint, names).train(module.training)


def _parts_of_blocks(parts: dict[str, nn.Module], names: dict[str, str], part: str, depth: int) -> list[nn.Module]:
    return [parts.get(_name(names, f"{half}_{part}", d)) for d in range(depth) for half in ("dw", "pw")]


def _timm_activation(modules: list[nn.Module | None], caller: str) -> str:
    names = {
        _ACTIVATION_CLASSES.get(type(module).__name__, type(module).__name__)
        + ("_tanh" if getattr(module, "approximate", None) == "tanh" else "")
        for module in modules
    }
    if len(names) > 1 or not names <= set(_ACTIVATION_CLASSES.values()):
        raise ValueError(
            f"{caller}: expected one activation of {', '.join(sorted(_ACTIVATION_CLASSES))} in all layers, "
            f"got {', '.join(sorted(names))}"
        )
    return names.pop()


def to_timm(model: ConvMixer) -> nn.Module:
    """timm's ConvMixer with the weights of ``model``: every block gets a copy of its shared, composed or fused matrix.

    Args:
        model: a :class:`~spin_kernels.models.ConvMixer` without the second residual, whose patches touch.

    Returns:
        A ``timm.models.convmixer.ConvMixer`` on the same device, in the same dtype and mode; gains are multiplied into
        its matrices.

    Raises:
        TypeError: ``model`` is no ConvMixer of this package.
        ValueError: timm's ConvMixer cannot express it.
        ImportError: timm is not installed.
    """
    if not isinstance(model, ConvMixer):
        raise TypeError(f"to_timm: expected a ConvMixer of spin_kernels, got {type(model).__name__}")
    mixer, conv = model.mixer, model.patch_embed.conv
    if mixer.pw_residual:
        raise ValueError(
            "to_timm: expected a model with pw_residual=False, got True; timm's block has no residual around its "
            "pointwise half"
        )
    if conv.stride != conv.kernel_size or any(conv.padding):
        raise ValueError(
            f"to_timm: expected patches that touch (stride {conv.kernel_size[0]}, no padding), got stride "
            f"{conv.stride[0]} and padding {conv.padding[0]}"
        )
    try:
        from timm.models.convmixer import ConvMixer as TimmConvMixer
    except ImportError as error:
        raise ImportError("to_timm: expected timm to be installed, got none; pip install timm") from error

    result = TimmConvMixer(
        mixer.dim,
        mixer.depth,
        kernel_size=mixer.kernel_size,
        patch_size=conv.kernel_size[0],
        in_chans=conv.in_channels,
        num_classes=model.head.fc.out_features,
        drop_rate=model.head.dropout.p,
        act_layer=_ACTIVATION_LAYERS[mixer.activation],
    )
    norms = {"stem.2": model.patch_embed.bn}
    norms |= {f"blocks.{d}.{name}": mixer for d in range(mixer.depth) for name in ("0.fn.2", "3")}
    for name, source in norms.items():
        norm = result.get_submodule(name)
        norm.eps, norm.momentum = source.eps, source.momentum
    result.to(conv.weight.device, conv.weight.dtype).load_state_dict(_timm_state(model))
    return result.train(model.training)


@torch.no_grad()
def _timm_state(model: ConvMixer) -> dict[str, Tensor]:
    """The state dict of the same network in timm: a matrix and a bias per block."""
    mixer, index = model.mixer, list(model.mixer.pw_index)
    weights, biases = mixer.distinct_weights()
    matrices = weights[index]
    if mixer.pw_gain is not None:
        matrices = (mixer.pw_gain[:, :, None] * matrices).to(matrices.dtype)
    filters, filter_index = mixer.dw_weight, list(mixer.dw_index)
    zeros = filters.new_zeros(mixer.depth, mixer.dim)
    pw_bias = zeros if biases is None else biases[index]
    dw_bias = zeros if mixer.dw_bias is None else mixer.dw_bias[filter_index]

    state = {}
    for ours, theirs in (("patch_embed.conv", "conv"), ("patch_embed.bn", "bn"), ("head.fc", "head")):
        layer = model.get_submodule(ours).state_dict()
        state |= {f"{_TIMM[theirs]}.{name}": tensor for name, tensor in layer.items()}
    for d in range(mixer.depth):
        state[_name(_TIMM, "dw", d) + ".weight"] = filters[filter_index[d]][:, None]
        state[_name(_TIMM, "dw", d) + ".bias"] = dw_bias[d]
        state[_name(_TIMM, "pw_weight", d)] = matrices[d][:, :, None, None]
        state[_name(_TIMM, "pw_bias", d)] = pw_bias[d]
        for half in ("dw", "pw"):
            affine, running = getattr(mixer, f"{half}_affine")[d], getattr(mixer, f"{half}_running")[d]
            norm = dict(zip(("weight", "bias", "running_mean", "running_var"), (*affine, *running), strict=True))
            norm["num_batches_tracked"] = mixer.num_batches_tracked
            state |= {f"{_name(_TIMM, f'{half}_bn', d)}.{name}": tensor for name, tensor in norm.items()}
    return state


def accelerate(model: nn.Module) -> nn.Module:
    """Swaps the blocks of a timm ConvMixer for one :class:`~spin_kernels.nn.SharedMixer`, in place.

    Args:
        model: a ``timm.models.convmixer.ConvMixer``, in any mode, dtype and on any device. Its stem, head and methods
            stay as they are; parameters of the blocks are new ones, so make optimizers afterwards.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: it is no ConvMixer of timm, or one that :func:`from_timm` cannot express; nothing has
            changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected a ConvMixer of timm, got {type(model).__name__}")
    if isinstance(model, nn.Sequential):
        raise TypeError("accelerate: expected a ConvMixer of timm, got Sequential; convert.from_timm reads that")
    mixer = _from_timm(model, None, "accelerate").mixer
    model.blocks = nn.Sequential(mixer)
    return model


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
    distribution: str = "uniform",
    shared_depth: int | None = None,
    seed: int = 0,
) -> ConvMixer:
    """The :class:`~spin_kernels.models.ConvMixer` with the weights of SPIN's WS-ConvMixer (arXiv 2207.10237).

    Args:
        state_dict: ``patch_embed.conv|bn.*``, ``blocks.{d}.dwise_blk.0|2.*``, ``blocks.{d}.bn2.*``,
            ``pwise_w.{s}`` (C, C, 1, 1), ``pwise_b.{s}`` (C,) and ``head.fc.*``, by themselves or under
            ``"model_state"``.
        dim, depth, kernel_size, patch_size, num_classes, activation, patch_stride, patch_padding: as in
            :func:`~spin_kernels.models.convmixer`.
        rate: how many blocks share a pointwise weight; None or 1 shares nothing.
        mapping, distribution, shared_depth, seed: of the plan, as in :class:`~spin_kernels.Sharing`; the published
            files have a uniform one.
        reduction: of a checkpoint with weight fusion, as in :func:`spin_kernels.fusion.prepare`: ``pwise_*`` are
            then per layer, ``reduction_w.{d}`` (1,) or (C,) are there where it is weighted, and runs of ``rate``
            layers are fused whatever the mapping, as in the published code. The result is the trainable model;
            ``fusion.fold`` makes it a plain shared one.

    Raises:
        ValueError: a key is missing, unexpected or of the wrong shape, or the checkpoint has weight fusion that
            ``reduction`` does not name.
        TypeError: ``state_dict`` is not a state dict of tensors.
    """
    if isinstance(state_dict, Mapping) and isinstance(state_dict.get("model_state"), Mapping):
        state_dict = state_dict["model_state"]
    checkpoint = _Checkpoint(state_dict, "from_ml_spin")
    weighted = reduction in ("scalar_weighted_mean", "channel_weighted_mean")
    if not weighted and (found := checkpoint.indices("reduction_w")):
        raise ValueError(
            f"from_ml_spin: expected reduction= beside key 'reduction_w.{min(found)}', which belongs to a "
            f"scalar_weighted_mean or channel_weighted_mean, got {reduction!r}"
        )
    sharing = Sharing(depth, 1 if rate is None else rate, mapping, distribution, shared_depth, seed)
    checkpoint.expect_count("blocks", depth, f"depth {depth}")
    matrices, why = sharing.num_shared, f"depth {depth} shared at rate {sharing.rate}"
    if reduction is not None:
        matrices, why = depth, f"depth {depth}, a weight per layer with reduction={reduction!r}"
    for prefix in ("pwise_w", "pwise_b"):
        checkpoint.expect_count(prefix, matrices, why)
    if weighted:
        checkpoint.expect_count("reduction_w", depth, why)
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
        sharing=sharing if reduction is None else None,
    )
    if reduction is not None:
        model = fusion.prepare(model, sharing, reduction, groups="consecutive")
    return _load(model, checkpoint, _ML_SPIN)
