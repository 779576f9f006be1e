"""Checkpoint files: state dicts of tensors, read without running what else may be in a file."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where training programs put the model: ml-spin (SlowFast), ConvMixer's authors and timm, and others.
_WRAPPERS = ("model_state", "state_dict", "model")
# Modules and names in a state dict's pickle.
_OF_TENSORS = re.compile(
    r"torch \w+$|torch\._\w+ |torch\.(storage|serialization) |collections OrderedDict|_codecs encode"
)


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
    if any(not isinstance(name, str) for name in state):
        raise ValueError(f"load: expected names as keys in {str(path)!r}, got {_describe(state)}")
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
    except Exception as error:  # torch lets through whatever damaged bytes cause: struct.error, AssertionError, ...
        foreign, protocol = _scan(path)
        if foreign:
            raise ValueError(
                f"load: expected tensors only in {str(path)!r}, got other Python objects ({foreign}), which could run "
                "code; save its state_dict() where you trust it, and load that"
            ) from error
        if protocol > 3:
            raise ValueError(
                f"load: expected a file of torch.save's own pickle protocol 2 in {str(path)!r}, got protocol "
                f"{protocol}; save it again without pickle_protocol="
            ) from error
        raise _damaged(path, error) from error


def _scan(path: Path) -> tuple[str, int]:
    """What a pickle names but tensors do not need, "" if nothing, and its protocol; reads, and runs nothing."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            data = path.read_bytes()
    except (OSError, StopIteration, zipfile.BadZipFile, zlib.error):
        return "", 0
    protocol, strings = 0, [""]
    stream = io.BytesIO(data)  # a file of torch.save's old format is several pickles, one after the other
    try:
        while stream.tell() < len(data):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "PROTO" and isinstance(argument, int):
                    protocol = max(protocol, argument)
                elif isinstance(argument, str) and "GLOBAL" not in opcode.name:
                    strings = [*strings[-1:], argument]
                name = {"GLOBAL": argument, "INST": argument, "STACK_GLOBAL": " ".join(strings)}.get(opcode.name, "")
                if name and not _OF_TENSORS.match(name):
                    return name.replace(" ", "."), protocol
    except Exception:  # the pickles end here, in storage or in damage
        pass
    return "", protocol


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ValueError(
        f"load: expected a whole checkpoint in {str(path)!r}, got a damaged one ({reason}); fetch it again"
    )


def _describe(state: Any) -> str:
    if isinstance(state, Mapping):
        return f"a dictionary with keys {', '.join(map(str, list(state)[:5])) or 'none'}"
    return type(state).__name__
