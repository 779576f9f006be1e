"""Compositions and repetitions of csrc/core through spin_runtime, against their definitions in NumPy. NumPy only, for
the sanitizer build, like test_runtime.py."""

from typing import Any

import numpy as np
import pytest
from numpy_reference import Array, decode, encode, generator
from test_runtime import every_isa, runtime

DTYPES = ("float32", "bfloat16", "float16")
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def assert_right(got: Array, exact: Array, terms: Array, dtype: str) -> None:
    """Sums in float32 of terms with these magnitudes, rounded once."""
    bound = 4e-6 * terms + EPS[dtype] * np.abs(exact) + 1e-30 + (6e-8 if dtype == "float16" else 0)
    np.testing.assert_array_less(np.abs(decode(got) - exact), bound + 1e-38)


# --- compositions: (layers, pieces); the bank's base and stride of a piece in units of its own size

COMPOSITIONS: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "one row": ([(1, 1, 1, 1)], [(0, 0, 1, 1, 0, 0, 0, 1, 1, 1)]),
    "lanes": (
        [(1, n, 1, 1) for n in (7, 8, 15, 16, 17, 33, 65)],
        [(l, l, 70, 3, l, 0, 0, 1, n, n) for l, n in enumerate((7, 8, 15, 16, 17, 33, 65))],  # noqa: E741
    ),
    "many templates": ([(3, 5, 3, 3)] * 3, [(l, 0, 135, 19, 19 * l, 0, 0, 3, 5, 5) for l in range(3)]),  # noqa: E741
    "corners": (
        [(6, 6, 3, 1), (6, 3, 3, 1), (2, 6, 3, 1), (2, 3, 3, 1)],
        [(l, 5, 108, 2, 2 * l, 0, 0, o, i, 6) for l, (o, i) in enumerate([(6, 6), (6, 3), (2, 6), (2, 3)])],  # noqa: E741
    ),
    "overlap": (
        [(2, 9, 1, 1), (2, 9, 1, 1)],
        [(0, 0, 5, 4, 0, 0, 0, 2, 9, 9), (1, 3, 0, 2, 1, 0, 0, 2, 9, 11)],
    ),
    "slabs": (
        [(8, 8, 3, 3), (4, 8, 3, 3)],
        [(0, 0, 144, 2, n, 4 * (n // 2), 4 * (n % 2), 4, 4, 4) for n in range(4)]
        + [(1, 0, 144, 2, n + 2, 0, 4 * n, 4, 4, 4) for n in range(2)],
    ),
    "many users": ([(20, 40, 3, 3)] * 30, [(l, 0, 7200, 2, l, 0, 0, 20, 40, 40) for l in range(30)]),  # noqa: E741
    "beyond the caches": ([(512, 512, 3, 3)], [(0, 0, 512 * 512 * 9, 1, 0, 0, 0, 512, 512, 512)]),
    "beyond the caches, between lines": (
        [(255, 511, 3, 3)] * 3,
        [(l, 5, 255 * 511 * 9, 2, 2 * l, 0, 0, 255, 511, 511) for l in range(3)],  # noqa: E741
    ),
}


def places(shapes: list[tuple[int, ...]], piece: tuple[int, ...]) -> tuple[Array, Array]:
    """Where a piece's values are: in the flat result, and in the bank for template 0."""
    layer, base, _, _, _, out_offset, in_offset, out, into, row = piece
    _, columns, kh, kw = shapes[layer]
    start = sum(int(np.prod(shape)) for shape in shapes[:layer])
    o, i, tap = np.ix_(range(out), range(into), range(kh * kw))
    return start + ((out_offset + o) * columns + in_offset + i) * kh * kw + tap, base + (o * row + i) * kh * kw + tap


def composed(name: str, bank: Array, c: Array, grad: Array) -> list[Array]:
    """Result, gradient of the bank, gradient of the coefficients."""
    shapes, pieces = COMPOSITIONS[name]
    result, to_bank, to_c = np.full(grad.shape, np.nan), np.zeros(bank.shape), np.zeros(c.shape)
    for piece in pieces:
        stride, templates, first = piece[2:5]
        to, source = places(shapes, piece)
        result[to] = sum(c[first + k] * bank[source + k * stride] for k in range(templates))
        for k in range(templates):
            np.add.at(to_bank, source + k * stride, c[first + k] * grad[to])
            to_c[first + k] += (grad[to] * bank[source + k * stride]).sum()
    return [result, to_bank, to_c]


@every_isa
@every_dtype
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_composition(name: str, dtype: str, isa: str) -> None:
    shapes, pieces = COMPOSITIONS[name]
    rng = generator(name, dtype, isa)
    size = max(int(places(shapes, p)[1].max()) + (p[3] - 1) * p[2] + 1 for p in pieces)
    bank = encode(rng.standard_normal(size + 3), dtype)
    c = rng.standard_normal(max(p[4] + p[3] for p in pieces)).astype(np.float32)
    grad = encode(rng.standard_normal(sum(int(np.prod(s)) for s in shapes)), dtype)
    flat = [n for p in pieces for n in p], [n for s in shapes for n in s]
    values = decode(bank), decode(c), decode(grad)
    exact, terms = composed(name, *values), composed(name, *map(np.abs, values))
    for threads in (1, 3):
        got = runtime.compose(bank, c, *flat, threads=threads, isa=isa)
        gradients = runtime.compose_gradients(grad, bank, c, *flat, threads=threads, isa=isa)
        for one, e, t, kind in zip((got, *gradients), exact, terms, (dtype, "float32", "float32"), strict=True):
            assert_right(one, e, t, kind)


# --- repetitions: (o, i, out, in, kh, kw)

REPETITIONS = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 5, 7, 3, 1),
    (4, 16, 8, 32, 1, 1),
    (3, 5, 3, 17, 3, 3),
    (40, 33, 100, 60, 1, 3),
    (7, 9, 3, 4, 5, 5),  # of a larger base
    (300, 16, 310, 16, 3, 3),
    (64, 64, 512, 600, 3, 3),  # beyond the caches
]


def repeated(
    modulation: str, w: Array, alpha: Array, beta: Array, gate: Array, grad: Array, absolute: bool
) -> list[Array]:
    """Result and gradients of weight, alpha, beta and gate; with `absolute` sums of magnitudes."""
    (o, i), (out, into) = w.shape[:2], grad.shape[:2]
    rows, columns = np.arange(out), np.arange(into)
    size = np.abs if absolute else np.asarray
    x, g = w[rows % o][:, columns % i], size(grad)
    a, b = (t[rows // o][:, columns // i][:, :, None, None] for t in (alpha, beta))
    s = 1 / (1 + np.exp(b * x))
    if modulation == "swish":
        result, slope = size(a * x * s), size(x * x * s * (1 - s))
        sign = 1 if absolute else -1
        local, of_alpha, of_beta = (
            size(a) * (s + sign * size(b * x * s * (1 - s))),
            g * size(x * s),
            sign * g * size(a) * slope,
        )
    elif modulation == "gate":
        result, local = size(x * gate), size(gate)
    else:
        result, local = size(x), np.ones_like(x)
    to_w, to_alpha, to_beta = np.zeros(w.shape), np.zeros(alpha.shape), np.zeros(beta.shape)
    np.add.at(to_w, np.ix_(rows % o, columns % i), g * local)
    if modulation == "swish":
        tiles = np.ix_(rows // o, columns // i)
        np.add.at(to_alpha, tiles, of_alpha.sum((2, 3)))
        np.add.at(to_beta, tiles, of_beta.sum((2, 3)))
    return [result, to_w, to_alpha, to_beta, g * size(x)]


@every_isa
@every_dtype
@pytest.mark.parametrize("modulation", ["plain", "swish", "gate"])
def test_repetition(modulation: str, dtype: str, isa: str) -> None:
    for o, i, out, into, kh, kw in REPETITIONS:
        rng = generator(modulation, dtype, isa, o, i, out)
        w, grad, gate = (
            encode(rng.standard_normal(shape), dtype)
            for shape in ((o, i, kh, kw), (out, into, kh, kw), (out, into, kh, kw))
        )
        alpha, beta = (rng.standard_normal((-(-out // o), -(-into // i))).astype(np.float32) for _ in range(2))
        swish = modulation == "swish"
        call: tuple[Any, ...] = (
            alpha if swish else None,
            beta if swish else None,
            gate if modulation == "gate" else None,
        )
        values = [decode(t) for t in (w, alpha, beta, gate, grad)]
        exact, terms = (repeated(modulation, *values, absolute) for absolute in (False, True))
        for threads in (1, 3):
            got = runtime.repeat(w, *call, out, into, threads=threads, isa=isa)
            assert_right(got, exact[0], terms[0], dtype)
            gradients = runtime.repeat_gradients(grad, w, *call, out, into, threads=threads, isa=isa)
            for number, there in enumerate((True, swish, swish, modulation == "gate")):
                if there:
                    kind = dtype if number == 3 else "float32"
                    assert_right(gradients[number], exact[number + 1], terms[number + 1], kind)


def test_bad_arguments_raise() -> None:
    bank, c = np.zeros(10, np.float32), np.zeros(2, np.float32)
    good = [0, 0, 5, 2, 0, 0, 0, 1, 5, 5]
    runtime.compose(bank, c, good, [1, 5, 1, 1])
    for place, value in (
        (0, 1),
        (0, -1),
        (1, 1),
        (1, -1),
        (2, 6),
        (2, 2**62),
        (3, 0),
        (3, 2**62),
        (4, 1),
        (5, 1),
        (7, 2),
        (8, 6),
        (9, 4),
    ):
        piece = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(ValueError, match="pieces"):
            runtime.compose(bank, c, piece, [1, 5, 1, 1])
        with pytest.raises(ValueError, match="pieces"):
            runtime.compose_gradients(np.zeros(5, np.float32), bank, c, piece, [1, 5, 1, 1])
    for pieces, shapes in ((good[:9], [1, 5, 1, 1]), (good, [1, 5, 1]), (good, [1, 5, -1, -1]), (good, [2**40] * 4)):
        with pytest.raises(ValueError, match="pieces"):
            runtime.compose(bank, c, pieces, shapes)
    weight = np.zeros((2, 2, 1, 1), np.float32)
    with pytest.raises(ValueError, match="grad"):
        runtime.repeat_gradients(weight, weight, None, None, None, 4, 4)
    with pytest.raises(ValueError, match="alpha and beta"):
        runtime.repeat(weight, np.ones((2, 2), np.float32), None, None, 4, 4)
