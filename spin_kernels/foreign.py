"""How other implementations name the layers of a ConvMixer, and how their state dicts are read into ours."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .models import ConvMixer
from .nn import FusedMixer, SharedMixer

# The names of layers: {d} is a block or a distinct pointwise matrix, {n} = d + 3.
TIMM = {
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
SEQUENTIAL = {
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
ML_SPIN = {
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


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def layer_name(names: dict[str, str], part: str, d: int) -> str:
    """What part ``part`` of block ``d`` is called."""
    return names[part].format(d=d, n=d + 3)


class StateReader:
    """A state dict that is read key by key; every message names the key, what was expected and what came."""

    def __init__(self, state: Any, source: str) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"{source}: expected a state dict, got {type(state).__name__}")
        for key in state:
            if not isinstance(key, str):
                raise TypeError(f"{source}: expected names as keys of the state dict, got {key!r}")
        self.state, self.source = dict(state), source
        self.unread = set(self.state)

    def take(self, key: str, *shape: int) -> Tensor:
        """The tensor of floating-point numbers at ``key``; -1 in ``shape`` stands for any size above 0."""
        expected = str(shape).replace("-1", "any")
        if key not in self.state:
            raise ValueError(f"{self.source}: expected key {key!r} with shape {expected}, got a checkpoint without it")
        value = self.state[key]
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.source}: expected a tensor at key {key!r}, got {type(value).__name__}")
        if value.dim() != len(shape) or any(m < 1 or n not in (-1, m) for n, m in zip(shape, value.shape, strict=True)):
            raise ValueError(f"{self.source}: expected shape {expected} at key {key!r}, got {tuple(value.shape)}")
        if value.dtype not in _FLOATS or value.layout != torch.strided or value.is_meta:
            kind = "a meta tensor" if value.is_meta else f"{value.layout} of {value.dtype}".replace("torch.", "")
            raise TypeError(f"{self.source}: expected dense floating-point numbers at key {key!r}, got {kind}")
        self.unread.discard(key)
        return value.detach()

    def take_count(self, key: str) -> Tensor:
        """The integer at ``key``, 0 where there is none."""
        value = self.state.get(key, 0)
        self.unread.discard(key)
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta:
            value = int(value)
        if not isinstance(value, int):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{self.source}: expected one integer at key {key!r}, got {got}")
        return torch.tensor(value)

    def indices(self, prefix: str) -> set[int]:
        """The numbers d of the keys ``<prefix>.<d>`` and ``<prefix>.<d>.<...>``."""
        tails = (key[len(prefix) + 1 :].split(".")[0] for key in self.state if key.startswith(prefix + "."))
        return {int(tail) for tail in tails if tail.isdecimal()}

    def expect_count(self, prefix: str, count: int, why: str) -> None:
        """Checks that ``<prefix>.0`` to ``<prefix>.<count-1>`` are there and no others."""
        found = sorted(self.indices(prefix))
        if len(found) != count or found[-1:] != [count - 1]:
            got = ", ".join(map(str, found)) or "none"
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


def read_mixer(mixer: SharedMixer, reader: StateReader, names: dict[str, str]) -> SharedMixer:
    """Fills a mixer whose layers are called ``names``, and takes over dtype and device of its weights."""
    dim, k = mixer.dim, mixer.kernel_size
    depthwise = [layer_name(names, "dw", d) for d in range(mixer.depth)]
    filters = [reader.take(f"{name}.weight", dim, 1, k, k) for name in depthwise]
    state = {
        "dw_weight": torch.cat(filters, 1).transpose(0, 1),
        "dw_bias": torch.stack([reader.take(f"{name}.bias", dim) for name in depthwise]),
    }
    for kind, shape in (("weight", (dim, dim, 1, 1)), ("bias", (dim,))):
        keys = [layer_name(names, f"pw_{kind}", s) for s in range(len(mixer.pw_weight))]
        state[f"pw_{kind}"] = torch.stack([reader.take(key, *shape) for key in keys])
    state["pw_weight"] = state["pw_weight"].flatten(2)
    if isinstance(mixer, FusedMixer) and mixer.pw_reduction is not None:
        columns = mixer.pw_reduction.shape[1]
        rows = [reader.take(layer_name(names, "pw_reduction", d), columns) for d in range(mixer.depth)]
        state["pw_reduction"] = torch.stack(rows)
    for half in ("dw", "pw"):
        pairs = [reader.batch_norm(layer_name(names, f"{half}_bn", d), dim) for d in range(mixer.depth)]
        state[f"{half}_affine"], state[f"{half}_running"] = map(torch.stack, zip(*pairs, strict=True))
    state["num_batches_tracked"] = reader.take_count(layer_name(names, "pw_bn", 0) + ".num_batches_tracked")
    weights = state["dw_weight"], state["pw_weight"]
    mixer.to(weights[0].device, reduce(torch.promote_types, (w.dtype for w in weights))).load_state_dict(state)
    return mixer


def read_model(model: ConvMixer, reader: StateReader, names: dict[str, str]) -> ConvMixer:
    """Fills a whole model."""
    state = {}
    for ours, layer, theirs in (
        ("patch_embed.conv", model.patch_embed.conv, "conv"),
        ("head.fc", model.head.fc, "head"),
    ):
        for name, tensor in layer.named_parameters():
            state[f"{ours}.{name}"] = reader.take(f"{names[theirs]}.{name}", *tensor.shape)
    (gamma, beta), (mean, var) = reader.batch_norm(names["bn"], model.mixer.dim)
    norm = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": var}
    norm["num_batches_tracked"] = reader.take_count(f"{names['bn']}.num_batches_tracked")
    state |= {f"patch_embed.bn.{name}": tensor for name, tensor in norm.items()}
    mixer = read_mixer(model.mixer, reader, names)
    reader.finish()
    state |= {f"mixer.{name}": tensor for name, tensor in mixer.state_dict().items()}
    weights = state["patch_embed.conv.weight"], mixer.pw_weight, state["head.fc.weight"]
    model.to(weights[0].device, reduce(torch.promote_types, (w.dtype for w in weights))).load_state_dict(state)
    return model
