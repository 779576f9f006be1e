"""The mixer in NumPy: its mathematics in float64 written out, random arguments, and what a kernel must reach.

Independent of the package and of torch: the sanitizer build's tests import this alone.
"""

import math
import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

Array = np.ndarray
SEED = int(os.environ.get("SPIN_TEST_SEED") or random.SystemRandom().randrange(2**31))
DTYPES = ("float32", "bfloat16", "float16")
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def generator(*key: object) -> np.random.Generator:
    text = "/".join(map(str, key))
    print(f"SPIN_TEST_SEED={SEED} {text}")
    return np.random.default_rng([SEED, *text.encode()])


# --- numbers


def encode(values: Array, dtype: str) -> Array:
    """Rounds to `dtype`; bfloat16 becomes its bits in uint16."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return np.asarray(values, dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest_even = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, nearest_even).astype(np.uint16)


def decode(values: Array) -> Array:
    """float64 of what `encode` made."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def rounded(values: Array, dtype: str) -> Array:
    return decode(encode(values, dtype))


# --- the reference: DESIGN of the block, in float64, convolutions as shifted sums

erf = np.frompyfunc(math.erf, 1, 1)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x * math.sqrt(0.5)).astype(np.float64)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.where(np.isnan(x), x, np.maximum(x, 0)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "identity": lambda x: x,
}


def depthwise(x: Array, weight: Array) -> Array:
    k = weight.shape[-1]
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    total = np.zeros_like(x)
    for i in range(k):
        for j in range(k):
            total += padded[:, :, i : i + height, j : j + width] * weight[:, i, j, None, None]
    return total


def normalised(u: Array, eps: float | None) -> Array:
    """u itself, or with `eps` as BatchNorm's statistics of the batch make it."""
    if eps is None:
        return u
    mean, variance = u.mean((0, 2, 3), keepdims=True), u.var((0, 2, 3), keepdims=True)
    return (u - mean) / np.sqrt(variance + eps)


@np.errstate(all="ignore")
def reference(
    a: dict[str, Any], round_to: Callable[[Array], Array] = lambda x: x, eps: float | None = None
) -> tuple[Array, float]:
    """The output and the largest intermediate; with `round_to` every operation's result is rounded, with `eps` the
    statistics are the batch's."""
    channels = (slice(None), None, None)
    w = {name: decode(value) for name, value in a.items() if isinstance(value, np.ndarray)}
    matrices, act = w["pw_weight"], ACTIVATIONS[a["activation"]]
    if "pw_coefficients" in w:
        matrices = round_to(np.einsum("st,toi->soi", w["pw_coefficients"], matrices))
    x, largest = w["x"], float(np.max(np.abs(w["x"]), initial=0.0))
    for d, s in enumerate(a["pw_index"]):
        f = d if a["dw_index"] is None else a["dw_index"][d]
        u = depthwise(x, w["dw_weight"][f])
        u = round_to(u + w["dw_bias"][f][channels] if "dw_bias" in w else u)
        scale, shift = w["dw_affine"][d]
        y = round_to(x + round_to(normalised(round_to(act(u)), eps) * scale[channels] + shift[channels]))
        v = np.einsum("oi,bihw->bohw", matrices[s], y, optimize=True)
        v = round_to(v) * w["pw_gain"][d][channels] if "pw_gain" in w else v
        v = round_to(v + w["pw_bias"][s][channels] if "pw_bias" in w else v)
        scale, shift = w["pw_affine"][d]
        x = round_to(normalised(round_to(act(v)), eps) * scale[channels] + shift[channels])
        x = round_to(x + y) if a["pw_residual"] else x
        largest = max(largest, float(np.max(np.abs(x), initial=0.0)), float(np.max(np.abs(y), initial=0.0)))
    return x, largest


# --- cases


def draw(
    rng: np.random.Generator, B: int = 2, C: int = 20, H: int = 6, W: int = 5, k: int = 3, D: int = 2,
    S: int | None = None, filters: int | None = None, templates: int | None = None, gain: bool = False,
    bias: bool = True, pw_index: list[int] | None = None, activation: str = "gelu", pw_residual: bool = False,
    dtype: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    S = max(pw_index) + 1 if pw_index else max(D, 1) if S is None else S
    F = D if filters is None else filters

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0, dtype: str = dtype) -> Array:
        return encode(rng.standard_normal(shape, np.float32) * np.float32(scale) + np.float32(shift), dtype)

    wide = {"dtype": "float32"}
    arguments = {
        "x": normal(B, C, H, W),
        "dw_weight": normal(F, C, k, k, scale=1 / k),
        "dw_bias": normal(F, C, scale=0.5) if bias else None,
        "dw_affine": normal(D, 2, C, scale=0.5, shift=0.3, **wide),
        "pw_weight": normal(templates or S, C, C, scale=C**-0.5),
        "pw_bias": normal(S, C, scale=0.5) if bias else None,
        "pw_affine": normal(D, 2, C, scale=0.5, shift=0.3, **wide),
        "pw_index": pw_index or rng.integers(S, size=D).tolist(),
        "dw_index": None if filters is None else rng.integers(filters, size=D).tolist(),
        "pw_coefficients": normal(S, templates, scale=templates**-0.5, **wide) if templates else None,
        "pw_gain": normal(D, C, scale=0.3, shift=1.0, **wide) if gain else None,
        "activation": activation,
        "pw_residual": pw_residual,
    }
    return arguments


def nans_like(a: dict[str, Any]) -> dict[str, Any]:
    def nans(value: Array) -> Array:
        return np.full_like(value, 0x7FC0 if value.dtype == np.uint16 else np.nan)

    return {name: nans(value) if isinstance(value, np.ndarray) else value for name, value in a.items()}


# --- what a kernel must reach


class Expected:
    """What a call must return; the rule of the numbers for its dtype."""

    def __init__(self, a: dict[str, Any], dtype: str) -> None:
        self.a, self.dtype = a, dtype
        self.exact, largest = reference(a)
        few = self.exact.size < 256  # they may cancel: then what they were made of is the measure
        self.top = largest if few else float(np.abs(self.exact).max())
        self.norm = max(float(np.linalg.norm(self.exact)), largest * math.sqrt(self.exact.size) if few else 0.0)
        self.plain = np.zeros(1)
        if dtype != "float32" and self.exact.size:
            self.plain = np.abs(reference(a, partial(rounded, dtype=dtype))[0] - self.exact)

    def check(self, y: Array, *what: object) -> None:
        assert y.shape == self.exact.shape, what
        assert y.dtype == self.a["x"].dtype, what
        if y.size == 0:
            return
        got, eps = decode(y), EPS[self.dtype]
        assert np.isfinite(got).all(), (*what, np.argwhere(~np.isfinite(got))[:5])
        error = np.abs(got - self.exact)
        worst, rms = error.max(), np.linalg.norm(error)
        if self.dtype == "float32":
            assert rms <= 1e-5 * self.norm, (*what, rms / self.norm)
            assert worst <= 1e-4 * self.top, (*what, "one value", worst / self.top, error.argmax())
        else:
            assert worst <= 2 * self.plain.max() + eps * self.top, (*what, worst, self.plain.max(), self.top)
            assert rms <= 1.5 * np.linalg.norm(self.plain) + eps * self.norm, (*what, rms, self.norm)
