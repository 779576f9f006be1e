"""Forward and backward of csrc/core through spin_runtime: every instruction set against derivatives of the NumPy
reference along random directions. NumPy only, for the sanitizer build, like test_runtime.py."""

from statistics import median
from typing import Any

import numpy as np
import pytest
from numpy_reference import Array, decode, draw, encode, generator, nans_like, reference
from test_runtime import every_isa, runtime

NAMES = (
    "x", "dw_weight", "dw_bias", "dw_affine", "pw_weight", "pw_bias", "pw_affine", "pw_coefficients", "pw_gain",
)  # fmt: skip

REGIMES: dict[str, list[dict[str, Any]]] = {
    "channels": [{"C": C} for C in (1, 3, 4, 8, 9, 15, 16, 17, 31, 32, 48, 49, 64, 65)],
    "tokens": [
        {"H": H, "W": W, "k": 3, "C": 16, "B": 1} for H, W in ((1, 13), (3, 5), (4, 4), (7, 7), (16, 17), (33, 32))
    ],
    "kernels": [
        {"k": k, "H": H, "W": W, "C": 17, "D": 1} for k in (1, 3, 5, 7, 9, 11, 31) for H, W in ((3, 4), (5, 7), (2, 35))
    ],
    "batches": [{"B": B, "C": 9, "D": D} for B in (1, 2, 5) for D in (0, 1, 2, 4)],
    "activations": [
        {"activation": name, "C": 33, "bias": bias}
        for name in ("gelu", "gelu_tanh", "silu", "identity")
        for bias in (True, False)
    ],
    "sharing": [
        {"D": 4, "S": 1, "filters": 1, "C": 32},
        {"D": 3, "S": 5, "filters": 6},
        {"D": 4, "pw_index": [2, 0, 2, 1], "filters": 2, "pw_residual": True},
    ],
    "templates": [
        {"D": 3, "S": 2, "templates": T, "C": C, "gain": T == 3, "pw_residual": T == 2}
        for T in (1, 2, 3)
        for C in (1, 17, 48)
    ],
    "residuals": [{"D": D, "C": 16, "pw_residual": True, "gain": D == 9} for D in (1, 8, 9, 17)],
}


def gradients(a: dict[str, Any], grad: Array, isa: str, eps: float | None, **how: Any) -> tuple[Any, ...]:
    runtime.mixer_gradients(grad, **nans_like(a), eps=eps, isa=isa, **how)  # dirty scratch memory
    return runtime.mixer_gradients(grad, **a, eps=eps, isa=isa, **how)


@every_isa
@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("regime", REGIMES)
def test_gradients_along_random_directions(regime: str, eps: float | None, isa: str) -> None:
    for shape in REGIMES[regime]:
        rng = generator(regime, eps, isa, shape)
        a = draw(rng, **shape)
        grad = rng.standard_normal(a["x"].shape, np.float32)
        y, dw_stats, pw_stats, grads = gradients(a, grad, isa, eps)
        for how in ({"threads": 3}, {"checkpoint": True}):
            again = gradients(a, grad, isa, eps, **how)
            for one, other in zip((y, dw_stats, pw_stats, *grads), (*again[:3], *again[3]), strict=True):
                assert one is other or np.array_equal(one, other), (shape, how)
        exact, _ = reference(a, eps=eps)
        # A sum of channels may cancel: 1e-6 is of gelu's own size.
        assert np.linalg.norm(decode(y) - exact) <= 2e-5 * np.linalg.norm(exact) + 1e-6 * np.sqrt(exact.size), shape
        for name, gradient in zip(NAMES, grads, strict=True):
            if a.get(name) is None:
                assert gradient is None
                continue
            assert gradient.shape == a[name].shape
            if not gradient.size:
                continue
            # Along the gradient itself: no cancellation, and every component counts.
            direction = decode(gradient) / max(np.linalg.norm(gradient), 1e-30)
            step = 1e-5 * max(1.0, np.linalg.norm(a[name]) / np.sqrt(a[name].size))
            sides = [
                (reference({**{n: v if not isinstance(v, np.ndarray) else decode(v) for n, v in a.items()},
                            name: decode(a[name]) + s * step * direction}, eps=eps)[0] * grad).sum()
                for s in (1, -1)
            ]  # fmt: skip
            expected, got = (sides[0] - sides[1]) / (2 * step), float(np.linalg.norm(gradient))
            size = np.linalg.norm(grad) * np.linalg.norm(exact)
            assert abs(got - expected) <= 1e-3 * abs(expected) + 1e-6 * size, (shape, name, got, expected)


@every_isa
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_agree_with_float32(dtype: str, isa: str) -> None:
    for shape in ({"C": 17, "D": 3}, {"C": 32, "D": 9, "pw_residual": True, "B": 3}, {"C": 20, "templates": 2, "S": 2}):
        rng = generator(dtype, isa, shape)
        shares: dict[str, list[float]] = {}  # of the bound
        for _ in range(5):
            narrow = draw(rng, **shape, dtype=dtype)
            wide = {n: decode(v).astype(np.float32) if isinstance(v, np.ndarray) else v for n, v in narrow.items()}
            grad = rng.standard_normal(narrow["x"].shape, np.float32)
            rounded = encode(grad, dtype)
            *_, grads = gradients(narrow, rounded, isa, 1e-3)
            *_, lean = gradients(narrow, rounded, isa, 1e-3, checkpoint=True, threads=2)
            assert all(a is b or np.array_equal(a, b) for a, b in zip(grads, lean, strict=True)), shape
            *_, expected = gradients(wide, decode(rounded).astype(np.float32), isa, 1e-3)
            for name, got, exact in zip(NAMES, grads, expected, strict=True):
                if exact is not None:
                    bound = 0.05 * np.linalg.norm(exact) + 5e-4 * np.linalg.norm(grad)
                    shares.setdefault(name, []).append(float(np.linalg.norm(decode(got) - exact) / bound))
        # The median: one channel that is nearly constant decides over all gradients of a draw.
        assert all(median(values) <= 1 for values in shares.values()), (shape, shares)
