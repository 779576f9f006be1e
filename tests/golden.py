"""Reference cases computed by the papers' own public code: inputs, parameters, outputs and gradients.

They are looked for in $SPIN_GOLDEN, then in shared/golden beside the repository, then in tests/data, which holds
the spin and convmixer families only.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_TESTS = Path(__file__).resolve().parent


@cache
def folder() -> Path:
    """Where the cases are."""
    if given := os.environ.get("SPIN_GOLDEN"):
        return Path(given)
    beside = _TESTS.parent.parent / "shared" / "golden"
    return beside if (beside / "index.json").exists() else _TESTS / "data"


@cache
def _index() -> list[dict[str, Any]]:
    return json.loads((folder() / "index.json").read_text())["cases"]


def cases(*families: str, suffix: str = ".safetensors") -> list[dict[str, Any]]:
    """The index entries of these families whose file has this suffix."""
    return [case for case in _index() if case["family"] in families and case["file"].endswith(suffix)]


@cache
def _load(file: str) -> Any:
    path = folder() / file
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def load(case: dict[str, Any]) -> Any:
    """A case's tensors by name, or its JSON content; not to be written to."""
    return _load(case["file"])


def assert_close(actual: Tensor, expected: Tensor, case: dict[str, Any], kind: str, what: str) -> None:
    """Compares with a float64 result by the case's tolerance for actual's dtype; kind: "outputs" or "grads"."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.detach().double() - expected.double()).abs()
    if actual.dtype == torch.float64:
        tolerance = case["tolerance"]["float64_run"]
        bound = tolerance["atol"] + tolerance["rtol"] * expected.abs().double()
    else:
        bound = case["tolerance"]["float32_run"][kind] * expected.abs().max().double()
    assert bool((difference <= bound).all()), f"{what}: largest difference {difference.max():.3g}"
