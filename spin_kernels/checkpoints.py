"""Checkpoint files: state dicts of tensors, read without running what else may be in a file."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where training programs put the model: ml-spin (SlowFast), ConvMixer's authors and timm, and others.
_WRAPPERS = ("model_state", "state_dict", "model")
# What torch says of a pickle that asks for more than tensors; it says the same first line of damaged ones.
_OF_FOREIGN_OBJECTS = ("allowed global", "unsupported global", "unsupported class", "unrecognized function")


def load(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of ``torch.save`` (``.pth``, ``.pth.tar``, ``.pyth``, ``.pt``, ...) or ``.safetensors``.

    A dictionary under ``"model_state"``, ``"state_dict"`` or ``"model"`` is taken out, and the prefix ``module.`` of
    DistributedDataParallel is taken off. Tensors are on the CPU. Pass the result to ``convert.from_timm`` (timm's files
    and those of ConvMixer's authors) or ``convert.from_ml_spin``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds Python objects other than tensors (a pickle can run code, so none is
            loaded), or no state dict.
        ImportError: a ``.safetensors`` file, and safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: expected a checkpoint file, got {str(path)!r}, which is not there")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for name in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"load: expected a state dict in {str(path)!r}, got {_describe(state)}")
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("load: expected safetensors to be installed, got none; pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not any(words in str(error).lower() for words in _OF_FOREIGN_OBJECTS):
            raise _damaged(path, error) from error
        raise ValueError(
            f"load: expected tensors only in {str(path)!r}, got other Python objects, which could run code; save its "
            "state_dict() where you trust it, and load that"
        ) from error
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ValueError(
        f"load: expected a whole checkpoint in {str(path)!r}, got a damaged one ({reason}); fetch it again"
    )


def _describe(state: Any) -> str:
    if isinstance(state, Mapping):
        return f"a dictionary with keys {', '.join(map(str, list(state)[:5])) or 'none'}"
    return type(state).__name__
