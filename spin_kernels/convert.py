"""Reads checkpoints of other implementations into the models of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import fusion
from .checkpoints import load
from .foreign import ML_SPIN, SEQUENTIAL, TIMM, StateReader, layer_name, read_mixer, read_model
from .models import ConvMixer, convmixer
from .nn import SharedMixer
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
    module = model if isinstance(model, nn.Module) else None
    reader = StateReader(model if module is None else module.state_dict(), "from_timm")
    names = TIMM
    depth = max(reader.indices("blocks"), default=0) + 1
    if "0.weight" in reader.state:
        head = max(int(key.split(".")[0]) for key in reader.state if key.split(".")[0].isdecimal())
        names, depth = SEQUENTIAL | {"head": str(head)}, max(head - 5, 1)
    dim, in_channels, patch, _ = reader.take(f"{names['conv']}.weight", -1, -1, -1, -1).shape
    if names is TIMM:
        reader.expect_count("blocks", depth, f"depth {depth}")
    kernel_size = _kernel_size(reader, names, dim)
    num_classes = reader.take(f"{names['head']}.weight", -1, dim).shape[0]
    if module is None:
        if activation is None:
            raise ValueError("from_timm: expected activation= beside a state dict, which has no record of it, got None")
        result = convmixer(dim, depth, kernel_size, patch, None, 0, in_channels, num_classes, activation)
        return read_model(result, reader, names)

    parts = dict(module.named_modules())
    if len({part.training for part in parts.values()}) > 1:
        raise ValueError("from_timm: expected all parts of the model in one mode, got some in training mode")
    stem = [parts.get(names[part]) for part in ("conv", "act", "bn")]
    settings = _block_settings(parts, names, depth, reader.source)
    found = _activation([stem[1]], reader.source)
    if found != settings["activation"] or activation not in (None, found):
        given = settings["activation"] if activation in (None, found) else activation
        raise ValueError(f"from_timm: expected activation {found!r}, as in the model's stem, got {given!r}")
    for name in ("global_pool", "pooling"):  # as timm calls it today, and as it did
        pool = getattr(parts.get(name), "pool_type", "avg")
        if pool != "avg":
            raise ValueError(f"from_timm: expected average pooling before the head, got {pool!r}")
    conv: Any = stem[0]
    norm = _batch_norms([(names["bn"], stem[2])], reader.source)
    _check_convolution(names["conv"], conv, {"dilation": (1, 1), "padding_mode": "zeros", "groups": 1}, reader.source)
    for name in ("stride", "padding"):
        value = getattr(conv, name)
        if isinstance(value, str) or value[0] != value[1]:
            raise ValueError(f"from_timm: expected one {name} for both sides at {names['conv']!r}, got {value!r}")
    drop_rate = getattr(parts.get("head_drop"), "p", 0.0)
    sizes = (dim, depth, kernel_size, patch, conv.stride[0], conv.padding[0], in_channels, num_classes, found)
    result = convmixer(*sizes, drop_rate=drop_rate)
    result.patch_embed.bn.eps, result.patch_embed.bn.momentum = norm["eps"], norm["momentum"]
    result.mixer.eps, result.mixer.momentum = settings["eps"], settings["momentum"]
    return read_model(result, reader, names).train(module.training)


def _kernel_size(reader: StateReader, names: dict[str, str], dim: int) -> int:
    key = layer_name(names, "dw", 0) + ".weight"
    kernel_size = reader.take(key, dim, 1, -1, -1).shape[2]
    if kernel_size % 2 == 0:
        raise ValueError(f"{reader.source}: expected an odd kernel size at key {key!r}, got {kernel_size}")
    return kernel_size


def _block_settings(parts: dict[str, nn.Module], names: dict[str, str], depth: int, source: str) -> dict[str, Any]:
    """activation, eps and momentum of the blocks, which have to agree; convolutions have to be those of a ConvMixer."""
    halves = [(half, d) for d in range(depth) for half in ("dw", "pw")]
    for half, d in halves:
        name = layer_name(names, half, d) if half == "dw" else layer_name(names, "pw_weight", d).removesuffix(".weight")
        conv: Any = parts.get(name)
        expected: dict[str, Any] = {"stride": (1, 1), "dilation": (1, 1), "padding_mode": "zeros"}
        _check_convolution(name, conv, expected, source)
        if half == "dw" and conv.padding not in ("same", tuple(side // 2 for side in conv.kernel_size)):
            raise ValueError(f"{source}: expected padding 'same' at {name!r}, got {conv.padding!r}")
    named = [layer_name(names, f"{half}_bn", d) for half, d in halves]
    activation = _activation([parts.get(layer_name(names, f"{half}_act", d)) for half, d in halves], source)
    return {"activation": activation, **_batch_norms([(name, parts.get(name)) for name in named], source)}


def _check_convolution(name: str, conv: nn.Module | None, expected: dict[str, Any], source: str) -> None:
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"{source}: expected a Conv2d at {name!r}, got {type(conv).__name__}")
    for key, value in expected.items():
        if getattr(conv, key) != value:
            raise ValueError(f"{source}: expected {key} {value!r} at {name!r}, got {getattr(conv, key)!r}")


def _batch_norms(norms: list[tuple[str, nn.Module | None]], source: str) -> dict[str, Any]:
    """eps and momentum of BatchNorms that agree, and that normalise with running statistics and an affine."""
    found: dict[str, Any] = {}
    for name, norm in norms:
        if not isinstance(norm, nn.BatchNorm2d) or not norm.affine or not norm.track_running_stats:
            raise ValueError(
                f"{source}: expected a BatchNorm2d with running statistics and an affine at {name!r}, got {norm!r}"
            )
        for key in ("eps", "momentum"):
            value = getattr(norm, key)
            if found.setdefault(key, value) != value:
                raise ValueError(f"{source}: expected one BatchNorm {key} in all blocks, got {found[key]} and {value}")
    return found


def _activation(modules: list[nn.Module | None], source: str) -> str:
    names = {
        _ACTIVATION_CLASSES.get(type(module).__name__, type(module).__name__)
        + ("_tanh" if getattr(module, "approximate", None) == "tanh" else "")
        for module in modules
    }
    if len(names) > 1 or not names <= set(_ACTIVATION_CLASSES.values()):
        raise ValueError(
            f"{source}: expected one activation of {', '.join(sorted(_ACTIVATION_CLASSES))} in all layers, "
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
    norms: dict[str, Any] = {"stem.2": model.patch_embed.bn}
    norms |= {f"blocks.{d}.{name}": mixer for d in range(mixer.depth) for name in ("0.fn.2", "3")}
    for name, source in norms.items():
        norm: Any = result.get_submodule(name)
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

    state: dict[str, Tensor] = {}
    for ours, theirs in (("patch_embed.conv", "conv"), ("patch_embed.bn", "bn"), ("head.fc", "head")):
        layer = model.get_submodule(ours).state_dict()
        state |= {f"{TIMM[theirs]}.{name}": tensor for name, tensor in layer.items()}
    for d in range(mixer.depth):
        state[layer_name(TIMM, "dw", d) + ".weight"] = filters[filter_index[d]][:, None]
        state[layer_name(TIMM, "dw", d) + ".bias"] = dw_bias[d]
        state[layer_name(TIMM, "pw_weight", d)] = matrices[d][:, :, None, None]
        state[layer_name(TIMM, "pw_bias", d)] = pw_bias[d]
        for half in ("dw", "pw"):
            affine, running = getattr(mixer, f"{half}_affine")[d], getattr(mixer, f"{half}_running")[d]
            norm = dict(zip(("weight", "bias", "running_mean", "running_var"), (*affine, *running), strict=True))
            norm["num_batches_tracked"] = mixer.num_batches_tracked
            state |= {f"{layer_name(TIMM, f'{half}_bn', d)}.{name}": tensor for name, tensor in norm.items()}
    return state


def accelerate(model: nn.Module) -> nn.Module:
    """Swaps the blocks of a timm ConvMixer for one :class:`~spin_kernels.nn.SharedMixer`, in place.

    Args:
        model: a ``timm.models.convmixer.ConvMixer``, in any mode, dtype and on any device. Its stem, pooling and head
            stay what they are.

    Returns:
        ``model``. Its parameters ``blocks.0.*`` are new ones, with the requires_grad of those that they replace: make
        optimizers afterwards, and leave all but ``blocks.0.dw_weight`` and ``blocks.0.pw_weight`` without weight decay
        (``model.blocks[0].no_weight_decay()``). All blocks count as one in ``forward_intermediates``.

    Raises:
        TypeError, ValueError: it is no ConvMixer of timm, or its blocks cannot be expressed, or they differ in mode or
            requires_grad; nothing has changed then.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(model, nn.Module) or not isinstance(blocks, nn.Sequential):
        hint = "; convert.from_timm reads that" if isinstance(model, nn.Sequential) else ""
        raise TypeError(f"accelerate: expected a ConvMixer of timm, got {type(model).__name__}{hint}")
    state = model.state_dict()
    reader = StateReader({key: state[key] for key in state if key.startswith("blocks.")}, "accelerate")
    dim = reader.take("blocks.0.0.fn.0.weight", -1, 1, -1, -1).shape[0]
    kernel_size = _kernel_size(reader, TIMM, dim)
    settings = _block_settings(dict(model.named_modules()), TIMM, len(blocks), reader.source)
    if len(modes := {part.training for part in blocks.modules()}) > 1:
        raise ValueError("accelerate: expected all parts of the blocks in one mode, got some in training mode")
    mixer = read_mixer(SharedMixer(dim, len(blocks), kernel_size, **settings), reader, TIMM)
    reader.finish()
    trained = dict(model.named_parameters())
    for name, parameter in mixer.named_parameters():
        half, kind = name.split("_")
        part = f"{half}_bn" if kind == "affine" else half if half == "dw" else f"{half}_{kind}"
        flags = set()
        for d in range(mixer.depth):
            theirs = layer_name(TIMM, part, d)
            keys = (f"{theirs}.weight", f"{theirs}.bias") if kind == "affine" else (f"{theirs}.{kind}", theirs)
            flags |= {trained[key].requires_grad for key in keys if key in trained}
        if len(flags) > 1:
            raise ValueError(f"accelerate: expected one requires_grad for what becomes {name}, got both")
        parameter.requires_grad_(flags.pop())
    model.blocks = nn.Sequential(mixer).train(modes.pop())
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
    reader = StateReader(state_dict, "from_ml_spin")
    weighted = reduction in ("scalar_weighted_mean", "channel_weighted_mean")
    if not weighted and (found := reader.indices("reduction_w")):
        raise ValueError(
            f"from_ml_spin: expected reduction= beside key 'reduction_w.{min(found)}', which belongs to a "
            f"scalar_weighted_mean or channel_weighted_mean, got {reduction!r}"
        )
    sharing = Sharing(depth, 1 if rate is None else rate, mapping, distribution, shared_depth, seed)
    reader.expect_count("blocks", depth, f"depth {depth}")
    matrices, why = sharing.num_shared, f"depth {depth} shared at rate {sharing.rate}"
    if reduction is not None:
        matrices, why = depth, f"depth {depth}, a weight per layer with reduction={reduction!r}"
    for prefix in ("pwise_w", "pwise_b"):
        reader.expect_count(prefix, matrices, why)
    if weighted:
        reader.expect_count("reduction_w", depth, why)
    in_channels = reader.take("patch_embed.conv.weight", dim, -1, patch_size, patch_size).shape[1]
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
        # The published code has uniform plans only; elsewhere runs of blocks would not match the plan.
        groups = "consecutive" if distribution == "uniform" else "sharing"
        model = fusion.prepare(model, sharing, reduction, groups)
    return read_model(model, reader, ML_SPIN)
