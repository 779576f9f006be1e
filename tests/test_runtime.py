"""csrc/core through spin_runtime: every instruction set against an independent reference, NumPy only.

Torch is not imported, so that a sanitizer build can run this file alone (CONTRIBUTING.md has the command):
SPIN_RUNTIME_DIR names the folder of that build's spin_runtime. SPIN_TEST_SEED=<seed> repeats a run.
"""

import importlib.machinery
import importlib.util
import math
import os
from typing import Any

import numpy as np
import pytest
from numpy_reference import (
    ACTIVATIONS,
    DTYPES,
    Array,
    Expected,
    decode,
    draw,
    encode,
    generator,
    nans_like,
    reference,
    rounded,
)

RANDOM_SHAPES = int(os.environ.get("SPIN_RANDOM_SHAPES", "150"))


def load_runtime() -> Any:
    package = importlib.util.find_spec("spin_kernels")
    folders = list(package.submodule_search_locations or ()) if package else []
    folders = [os.environ["SPIN_RUNTIME_DIR"]] if os.environ.get("SPIN_RUNTIME_DIR") else folders
    spec = importlib.machinery.PathFinder.find_spec("spin_runtime", folders)
    if spec is None or spec.loader is None:
        raise ImportError(f"spin_runtime is not built in {folders}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runtime = load_runtime()
ISAS: list[str] = runtime.cpu_features()["isas"]
every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


# 2 MB of NaN that pass through no block.
NANS = nans_like(draw(generator("NaN"), B=1, C=64, H=88, W=88, D=0))


def soil(isa: str) -> None:
    """Fills the workspace that the next call will get with NaN."""
    runtime.mixer(**NANS, isa=isa)


def run(a: dict[str, Any], isa: str, **how: Any) -> Array:
    """The call from dirty scratch memory: the size of the packed form's differs, so it soils its own."""
    soil(isa)
    if how.get("packed"):
        runtime.mixer(**nans_like(a), isa=isa, **how)
    return runtime.mixer(**a, isa=isa, **how)


REGIMES: dict[str, list[dict[str, Any]]] = {
    # one vector more or less, one line (two vectors in bf16 chains), one panel of output channels
    "channels": [
        {"C": C} for C in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97)
    ],
    # tiles of 4, 6 or 8 tokens and what is left over
    "tokens": [{"H": H, "W": W, "k": 1} for H in (1, 2) for W in range(1, 14)],
    # compiled and general kernel sizes on planes smaller and larger than they are
    "kernels": [
        {"k": k, "H": H, "W": W, "C": 17}
        for k in (1, 3, 5, 7, 9, 11, 13, 31)
        for H, W in ((1, 1), (1, 7), (7, 1), (2, 2), (5, 7), (13, 3))
    ],
    # rows of one and of several register tiles, with both edges, for every kernel
    "rows": [
        {"k": k, "H": 3, "W": W, "C": 5, "D": 1}
        for k in (1, 3, 5, 7, 9, 11, 13, 31)
        for W in (8, 9, 12, 15, 16, 17, 18, 23, 24, 25, 31, 32, 33, 34, 47, 48, 49, 65)
    ],
    "tiles": [  # of 8, 16 and 32 tokens, and of 32 channels
        {"B": 1, "C": C, "H": 1, "W": W, "D": 2, "pw_residual": True}
        for W in (7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 98)
        for C in (31, 32, 33, 63, 96)
    ],
    "batches": [{"B": B, "C": 9, "D": D} for B in (0, 1, 2, 3, 5) for D in (0, 1, 2, 3, 4)],
    "activations": [{"activation": name, "C": 33, "bias": bias} for name in ACTIVATIONS for bias in (True, False)],
    "sharing": [
        {"D": 4, "S": 2},
        {"D": 4, "S": 1, "filters": 1},
        {"D": 3, "S": 5, "filters": 6},
        {"D": 4, "pw_index": [2, 0, 2, 1], "filters": 2, "pw_residual": True},
    ],
    "templates": [
        {"D": 3, "S": 2, "templates": T, "C": C, "gain": T == 3, "pw_residual": T == 2}
        for T in (1, 2, 3, 8)
        for C in (1, 17, 49)
    ],
    "epilogue": [
        {"gain": gain, "pw_residual": residual, "bias": bias, "C": 19, "activation": activation}
        for gain in (True, False)
        for residual in (True, False)
        for bias in (True, False)
        for activation in ("gelu", "relu")
    ],
}


@every_dtype
@pytest.mark.parametrize("regime", REGIMES)
def test_regime(dtype: str, regime: str) -> None:
    rng = generator("regime", regime, dtype)
    for settings in REGIMES[regime]:
        a = draw(rng, **settings, dtype=dtype)
        expected = Expected(a, dtype)
        for isa in ISAS:
            y = run(a, isa)
            expected.check(y, isa, settings)
            assert np.array_equal(y, run(a, isa, packed=True)), (isa, "packed", settings)


# Images of several bands of rows; compositions that do not fit the packed memory, so that a call has several segments.
LARGE: dict[str, dict[str, Any]] = {
    "bands-tall": {"B": 1, "C": 16, "H": 200, "W": 220, "k": 5, "activation": "relu"},
    "bands-general-kernel": {"B": 1, "C": 16, "H": 200, "W": 220, "k": 11, "D": 1, "activation": "relu"},
    "bands-wide": {"B": 2, "C": 300, "H": 50, "W": 70, "k": 3, "activation": "silu", "pw_residual": True},
    "bands-of-one-row": {"B": 1, "C": 40, "H": 3, "W": 9000, "k": 3, "D": 2, "activation": "relu"},
    "segments": {"B": 3, "C": 512, "H": 2, "W": 2, "D": 9, "templates": 2, "pw_index": [0, 1, 2, 3, 0, 4, 5, 1, 6]},
    "segments-of-a-block": {"B": 2, "C": 2064, "H": 1, "W": 3, "k": 1, "D": 3, "S": 2, "templates": 2},
}


@every_dtype
@pytest.mark.parametrize("name", LARGE)
def test_large(name: str, dtype: str) -> None:
    a = draw(generator("large", name, dtype), **LARGE[name], dtype=dtype)
    expected = Expected(a, dtype)
    for isa in ISAS:
        y = run(a, isa, threads=2)
        expected.check(y, isa)
        assert np.array_equal(y, run(a, isa, threads=3)), isa
        assert np.array_equal(y, run(a, isa, threads=1, packed=True)), isa


# Larger matrices of frozen networks lie in quarters, and images of 32 tokens or more get Strassen's product: an odd and
# even number of vectors of a half, of tokens, cuts and tiles, of threads for them; images that are grouped or banded.
QUARTERS: dict[str, dict[str, Any]] = {
    "fewest-channels": {"C": 256, "H": 16, "W": 16, "k": 5, "D": 3},
    "even": {"C": 576, "H": 12, "W": 12},
    "odd-tokens": {"C": 352, "H": 13, "W": 11, "activation": "relu"},
    "fewest-tokens": {"C": 288, "H": 3, "W": 43, "k": 1, "D": 1},
    "residual": {"C": 288, "H": 10, "W": 14, "pw_residual": True, "S": 1, "gain": True},
    "templates": {"C": 320, "H": 10, "W": 13, "S": 2, "templates": 3, "bias": False},
    "odd-cuts": {"C": 288, "H": 7, "W": 21, "k": 5, "D": 3},
    "four-cuts": {"C": 288, "H": 13, "W": 21, "k": 9, "D": 3, "pw_residual": True},
    "one-left-over": {"C": 320, "H": 12, "W": 12, "B": 3},
    "grouped": {"C": 288, "H": 7, "W": 9, "B": 5},
    "grouped-residual": {"C": 288, "H": 7, "W": 9, "B": 5, "k": 5, "pw_residual": True, "S": 1},
    "grouped-cuts": {"C": 288, "H": 8, "W": 16, "B": 5, "pw_residual": True},  # two cuts in each of two images
    "bands-residual": {"C": 288, "H": 79, "W": 17, "pw_residual": True, "activation": "relu"},
    "few-tokens": {"C": 288, "H": 5, "W": 6, "B": 7},
    "one-token": {"C": 288, "H": 1, "W": 1, "B": 2},
    "bands": {"C": 288, "H": 79, "W": 17, "D": 3},
    "one-row": {"C": 288, "H": 1, "W": 1351, "k": 7, "D": 2},
}


@every_dtype
@pytest.mark.parametrize("name", QUARTERS)
def test_quarters(name: str, dtype: str) -> None:
    a = draw(generator("quarters", name, dtype), **QUARTERS[name], dtype=dtype)
    expected = Expected(a, dtype)
    for isa in ISAS:
        y = run(a, isa, packed=True, quarters=True)
        expected.check(y, isa)
        for threads in (2, 3, 4) if dtype == "float32" else (2,):  # other types differ at the network's ends only
            assert np.array_equal(y, run(a, isa, threads=threads, packed=True, quarters=True)), (isa, threads)


@every_isa
def test_strassen_is_used_and_nearly_as_exact(isa: str) -> None:
    a = draw(generator("strassen"), C=768, H=16, W=16, D=1, activation="identity")
    exact = decode(Expected(a, "float32").exact)
    plain, strassen = (decode(run(a, isa, packed=True, quarters=quarters)) for quarters in (False, True))
    assert not np.array_equal(plain, strassen)
    assert np.linalg.norm(strassen - exact) <= 3 * np.linalg.norm(plain - exact)


@every_isa
@pytest.mark.parametrize("side", [7, 12])
def test_quarters_keep_images_apart(side: int, isa: str) -> None:
    a = draw(generator("apart"), C=544, H=side, W=side, B=3)
    y = run(a, isa, packed=True, quarters=True)
    a["x"][1, 5, 3, 3] = np.nan
    soiled = run(a, isa, packed=True, quarters=True)
    assert np.isnan(soiled[1]).any()
    assert np.array_equal(y[[0, 2]], soiled[[0, 2]])


THREADED: list[dict[str, Any]] = [
    *({"B": B, "C": 97, "H": 17, "W": 16, "k": k, "D": 3} for B in (1, 2, 3, 5, 8) for k in (3, 11)),
    {"B": 1, "C": 700, "H": 1, "W": 9, "k": 9, "D": 3},  # fewer rows than threads
    {"B": 4, "C": 130, "H": 5, "W": 33, "k": 5, "D": 4, "S": 2, "filters": 2, "templates": 3, "gain": True},
    {"B": 9, "C": 64, "H": 16, "W": 16, "k": 7, "D": 2},
]  # fmt: skip


@every_dtype
@pytest.mark.parametrize("settings", THREADED, ids=lambda settings: f"B{settings['B']}C{settings['C']}k{settings['k']}")
def test_same_bits_at_any_thread_count(settings: dict[str, Any], dtype: str) -> None:
    a = draw(generator("threads", dtype), **settings, activation="relu", dtype=dtype)
    expected = Expected(a, dtype)
    for isa in ISAS:
        y = run(a, isa)
        expected.check(y, isa)
        for threads in (2, 3, 7):
            assert np.array_equal(y, run(a, isa, threads=threads)), (isa, threads)
        for threads in (1, 7):
            assert np.array_equal(y, run(a, isa, threads=threads, packed=True)), (isa, threads, "packed")


def any_shape(rng: np.random.Generator) -> dict[str, Any]:
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    D = int(rng.integers(5))
    k = int(pick(1, 3, 3, 5, 7, 9, 11, 13, 31))
    area = pick(8, 60, 400)
    H = int(rng.integers(1, area + 1)) if rng.integers(2) else int(rng.integers(1, math.isqrt(area) + 1))
    return {
        "B": int(pick(0, 1, 1, 2, 3, 5)),
        "C": int(pick(1, *rng.integers(1, 130, size=3), 16 * rng.integers(1, 9))),
        "H": H,
        "W": int(rng.integers(1, max(area // H, 1) + 1)),
        "k": k,
        "D": D,
        "S": int(rng.integers(1, 5)),
        "filters": pick(None, int(rng.integers(1, 4))),
        "templates": pick(None, None, int(rng.integers(1, 5))),
        "gain": bool(rng.integers(2)),
        "bias": bool(rng.integers(2)),
        "activation": pick("gelu", "gelu", *ACTIVATIONS),
        "pw_residual": bool(rng.integers(2)),
        "dtype": pick(*DTYPES),
    }


def test_random_shapes() -> None:
    for number in range(RANDOM_SHAPES):
        rng = generator("random", number)
        settings = any_shape(rng)
        a = draw(rng, **settings)
        expected = Expected(a, settings["dtype"])
        for isa in ISAS:
            y = run(a, isa)
            expected.check(y, number, isa, settings)
            how = {"threads": int(rng.integers(1, 8)), "packed": bool(rng.integers(2))}
            assert np.array_equal(y, run(a, isa, **how)), (number, isa, settings, how)


def permuted(x: Array, *order: int) -> Array:
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


def end_of_larger(x: Array, axis: int) -> Array:
    """x as the last part along `axis` of an array that ends with it: reading further is reading out of bounds."""
    larger = np.concatenate([x.take([0] * 3, axis), x], axis)
    return larger[(slice(None),) * axis + (slice(3, None),)]


@every_isa
@every_dtype
def test_views(isa: str, dtype: str) -> None:
    rng = generator("views", dtype)
    for C, H, W in ((1, 1, 1), (16, 4, 4), (16, 1, 40), (17, 5, 9), (32, 16, 16), (40, 7, 7)):
        a = draw(rng, B=3, C=C, H=H, W=W, D=1, dtype=dtype)
        x = a["x"]

        views = {
            "channels_last": permuted(x, 0, 2, 3, 1),
            "columns outermost": permuted(x, 0, 3, 2, 1),
            "transposed plane": permuted(x, 0, 1, 3, 2),
            "batch innermost": permuted(x, 1, 2, 3, 0),
            "every second": end_of_larger(x.repeat(2, 2).repeat(2, 3), 0)[:, :, ::2, ::2],
            "last channels of channels_last": end_of_larger(x.transpose(0, 2, 3, 1), 3).transpose(0, 3, 1, 2),
        }
        for axis in range(4):
            views[f"end of axis {axis}"] = end_of_larger(x, axis)
            views[f"expanded axis {axis}"] = np.broadcast_to(x.take([0], axis), x.shape)
        for name, view in views.items():
            before = view.copy()
            y = run(a | {"x": view}, isa)
            assert np.array_equal(y, run(a | {"x": before}, isa)), (name, C, H, W)
            assert np.array_equal(view, before), name


# --- activations


SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-40, -1e-40, 1.2e-38, -1.2e-38, 3.4e38, -3.4e38, 87.0, -87.0]
    + [88.8, -88.8, 103.0, -103.0, 104.0, -104.0, 5.625, -5.625, 5.6249995, 15.5, -15.5, 1e10, -1e10, 1e20, -1e20]
    + [sign * 10.0**e for e in range(-38, 39) for sign in (1, -1)],
    np.float32,
)


@every_isa
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(isa: str, name: str) -> None:
    rng = generator("activation", name)
    dense = np.concatenate([np.linspace(-20, 20, 200_001), np.linspace(-110, 110, 20_001), rng.normal(0, 3, 50_000)])
    x = np.concatenate([SPECIAL, dense.astype(np.float32)])
    with np.errstate(all="ignore"):
        exact = ACTIVATIONS[name](x.astype(np.float64))
        if name == "gelu_tanh":  # the cube of a huge number is exact in no precision
            exact = np.where(x < -30, np.where(np.isinf(x), np.nan, 0.0), exact)
    y = runtime.activate(name, x, isa=isa)
    assert y.dtype == np.float32
    wrong = np.isnan(y) != np.isnan(exact)
    assert not wrong.any(), list(zip(x[wrong], y[wrong], exact[wrong], strict=True))
    infinite = np.isinf(exact)
    assert np.array_equal(y[infinite], exact[infinite]), list(zip(x[infinite], y[infinite], strict=True))
    finite = np.isfinite(exact)
    x, y, exact = x[finite], y[finite].astype(np.float64), exact[finite]
    # gelu: absolute, but of large values no better than float32 itself; the others: relative where it matters
    allowed = np.maximum(6e-7, 2.0**-23 * np.abs(exact)) if name == "gelu" else 1e-6 * np.abs(exact) + 1e-8
    worst = np.argmax(np.abs(y - exact) / allowed)
    assert abs(y[worst] - exact[worst]) <= allowed[worst], (x[worst], y[worst], exact[worst])
    small = np.abs(x) < 1e-3  # of small values the relative accuracy counts
    np.testing.assert_allclose(y[small], exact[small], rtol=2e-6, atol=3e-45)


@every_isa
def test_activation_of_every_length(isa: str) -> None:
    x = generator("lengths").standard_normal((2, 40), np.float32)
    whole = runtime.activate("gelu", x, isa=isa)
    assert whole.shape == x.shape
    for length in range(40):
        assert np.array_equal(runtime.activate("gelu", x[0, :length], isa=isa), whole[0, :length])


# --- NaN and infinity


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("C", [1, 3, 16, 17, 33])
def test_not_finite_values_pass_through(C: int, activation: str, value: float) -> None:
    rng = generator("special", C, activation, value)
    for D, k, residual in ((1, 3, False), (2, 3, True), (3, 3, False), (2, 1, False), (2, 11, False)):
        settings = {"B": 2, "C": C, "H": 12, "W": 19, "k": k, "D": D, "pw_residual": residual}
        a = draw(rng, **settings, gain=bool(rng.integers(2)), activation=activation)
        a["x"][0, rng.integers(C), rng.integers(12), rng.integers(19)] = value
        exact = reference(a)[0]
        nan, infinite, finite = np.isnan(exact), np.isinf(exact), np.isfinite(exact)
        for isa in ISAS:
            y = run(a, isa).astype(np.float64)
            wrong = np.argwhere(np.isnan(y) != nan)
            assert not len(wrong), f"{isa} {settings}: {len(wrong)} values, {y[tuple(wrong[0])]} at {wrong[0]}"
            assert np.array_equal(y[infinite], exact[infinite]), (isa, settings, "infinities")
            np.testing.assert_allclose(y[finite], exact[finite], rtol=1e-4, atol=1e-4 * np.abs(exact[finite]).max())


@every_isa
def test_low_precision_outputs_overflow_and_underflow_as_they_round(isa: str) -> None:
    # x passes through unchanged: no filter, the identity matrix. (bf16 instructions flush subnormals.)
    for dtype, values in (
        ("float16", [65504.0, -65504.0, 2.0**-24, -(2.0**-24), 2.0**-14, 0.0]),
        ("bfloat16", [3.38e38, -3.38e38, 2.0**-126, -(2.0**-126), 1e-37, 0.0]),
    ):
        for C in (1, 16, 17):
            a = draw(generator("limits"), B=1, C=C, H=1, W=18, k=1, D=1, bias=False, activation="identity", dtype=dtype)
            a["x"] = encode(np.tile(np.array(values * 3), (1, C, 1, 1)), dtype)
            a["dw_weight"][:], a["dw_affine"][:], a["pw_affine"][:, 0], a["pw_affine"][:, 1] = 0, 0, 1, 0
            a["pw_weight"] = encode(np.eye(C)[None], dtype)
            np.testing.assert_array_equal(decode(run(a, isa)), decode(a["x"]), str((dtype, C)))
            if dtype == "float16":
                for factor in (0.5, 2):  # half the smallest number is zero, 131008 is infinity
                    a["pw_affine"][:, 0] = factor
                    np.testing.assert_array_equal(decode(run(a, isa)), rounded(factor * decode(a["x"]), dtype))


# --- the rest of the module


def test_features() -> None:
    features = runtime.cpu_features()
    assert set(features["isas"]) <= {"portable", "avx2", "avx512", "avx512_bf16", "amx"}
    assert features["isas"][0] == "portable"
    assert {features["float32_kernels"], features["bfloat16_kernels"]} <= set(features["isas"])
    assert ("avx2" in ISAS) <= features["avx2_fma"]
    assert ("avx512" in ISAS) <= features["avx512"]
    assert ("avx512_bf16" in ISAS) <= features["avx512_bf16"]
    assert ("amx" in ISAS) <= features["amx_bf16"]


def test_measure_peaks() -> None:
    peaks = runtime.measure_peaks(1, seconds=0.06)
    assert set(peaks) == {"float32_gflops", "bfloat16_gflops", "copy_gbps"}
    assert all(0.05 < value < 1e5 for value in peaks.values()), peaks
    for threads in (0, -1):
        with pytest.raises(ValueError, match="threads"):
            runtime.measure_peaks(threads, seconds=0.06)
        with pytest.raises(ValueError, match="threads"):
            runtime.multiply_add_rate(threads)
    # The same unit, and no rate beyond the peak; other work may slow either, so one try of several has to agree.
    tries = ((runtime.multiply_add_rate(1, 0.02), runtime.measure_peaks(1, seconds=0.06)) for _ in range(20))
    assert any(0.05 < rate < 1.2 * peaks["float32_gflops"] for rate, peaks in tries)


def test_bad_arguments_raise() -> None:
    good, halves = (
        draw(generator("bad", dtype), S=2, templates=3, gain=True, filters=2, dtype=dtype)
        for dtype in ("float32", "float16")
    )
    x = good["x"]
    records = np.zeros(x.shape, [("pad", "u1"), ("x", "f4")])  # strides that are no multiple of the element size
    bad: list[dict[str, Any]] = [
        *({"x": view} for view in (x[0], x[:, :-1], x[:, :0], x[:, :, :0], x[..., :0], records["x"])),
        *({"x": x.astype(dtype)} for dtype in ("f8", "i4", ">f4", "c8", "i2", ">u2")),
        *({"dw_weight": np.zeros((2, 20, *k), np.float32)} for k in ((2, 2), (33, 33), (3, 5), (0, 0))),
        *({"pw_index": index} for index in ([0, 2], [-1, 0], [0, 2**62], [0])),
        *({"dw_index": index} for index in ([0, 2], [0, -1], [0], [0, 1, 0], [])),
        {"dw_index": None, "dw_weight": good["dw_weight"][:1]},
        {"pw_coefficients": np.float32(1)},
        {"pw_coefficients": np.zeros((2, 3, 1), np.float32)},
        {"pw_weight": np.zeros((0, 20, 20), np.float32), "pw_coefficients": np.zeros((2, 0), np.float32)},
        {"pw_weight": np.zeros((0, 20, 20), np.float32), "pw_coefficients": None},
        *({"activation": name} for name in ("swish", "")),
        {"isa": "avx1024"},
        *({"threads": threads} for threads in (0, -3)),
    ]
    for name, value in good.items():
        if isinstance(value, np.ndarray) and name != "x":
            bad += [{name: value[:-1]}, {name: value[..., :-1]}, {name: value.astype(np.float64)}, {name: value[None]}]
            bad += [{name: np.asfortranarray(value)}, {name: np.repeat(value, 2, -1)[..., ::2]}]
    accepted = [change for change in bad if accepts(good | change)]
    accepted += [
        {name: halves[name].astype(">f2")}
        for name in ("x", "pw_weight")
        if accepts(halves | {name: halves[name].astype(">f2")})
    ]
    described = [{n: getattr(v, "dtype", v) for n, v in change.items()} for change in accepted]
    assert not accepted, f"accepted {described}"
    Expected(good, "float32").check(runtime.mixer(**good))


def accepts(a: dict[str, Any]) -> bool:
    try:
        runtime.mixer(**a)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return False
    return True
