"""Models by text, for the command line."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import models


def make_model(text: str, classes: int, channels: int) -> nn.Module:
    """A model from a text: ``NAME``, ``package.module:function`` or ``file.py:function``, with ``(key=value, ...)``.

    NAME is one of :func:`spin_kernels.models.list_models`. ``num_classes`` and ``in_channels`` are given where the
    function takes them and the text does not.

    Raises:
        ValueError: there is no such model, or it cannot be made so.
    """
    found = re.fullmatch(r"\s*([^()]+?)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if found is None:
        raise ValueError(f"models: expected NAME, module:function or file.py:function, with (key=value), got {text!r}")
    name, options = found[1], _options(text, found[2] or "")
    make = _function(name)
    shape = {"num_classes": classes, "in_channels": channels}
    accepted = _parameters(make)
    options = {key: value for key, value in shape.items() if key in accepted} | options
    try:
        model = make(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"models: expected arguments that {name} takes, got {options}: {error}; change them") from None
    if not isinstance(model, nn.Module):
        raise ValueError(f"models: expected a torch.nn.Module from {name}, got {type(model).__name__}; name a model")
    return model


def _options(text: str, arguments: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(f"models: expected plain values as key=value in {text!r}, got others; write them so") from None


def _function(name: str) -> Callable[..., Any]:
    if ":" not in name:
        if name not in models.list_models():
            raise ValueError(
                f"models: expected one of {', '.join(models.list_models())}, module:function or file.py:function, got "
                f"{name!r}"
            )

        def create(num_classes: int, in_channels: int, **options: Any) -> nn.Module:
            return models.create(name, num_classes=num_classes, in_channels=in_channels, **options)

        return create
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            digest = hashlib.sha256(place.encode()).hexdigest()[:8]
            spec = importlib.util.spec_from_file_location(f"_spin_models_{digest}", place)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            module = importlib.import_module(place)
        return getattr(module, function)
    except (ImportError, OSError, AttributeError, SyntaxError) as error:
        raise ValueError(f"models: expected a function {function} in {place}, got {error}; check the name") from None


def _parameters(make: Callable[..., Any]) -> set[str]:
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # no function, or one in C
        return set()
    # What passes options on, as torchvision's and timm's functions do, knows the number of classes by this name.
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return set(parameters) | {"num_classes"}
    return set(parameters)
