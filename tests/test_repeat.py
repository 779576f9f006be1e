"""repeat_weight on random tilings: results, gradients, every instruction set, any number of threads."""

import os
from random import Random
from typing import Any

import pytest
import torch
from random_weights import DTYPES, assert_same_bits, assert_sums, draws, on_every_isa
from torch import Tensor

from spin_kernels import dispatch, reference

SHAPES = int(os.environ.get("SPIN_RANDOM_SHAPES", "1000")) // 4
TENSORS = ("weight", "alpha", "beta", "gate")
REPEAT = torch.ops.spin.repeat_weight.default


def drawn(o: int, i: int, out: int, into: int, kh: int, kw: int, modulation: str, dtype: torch.dtype) -> dict[str, Any]:
    tiles = -(-out // o), -(-into // i)
    swish, gate = modulation == "swish", modulation == "gate"
    return {
        "weight": torch.randn(o, i, kh, kw, dtype=torch.float64).to(dtype),
        "alpha": torch.randn(tiles) if swish else None,
        "beta": 2 * torch.randn(tiles) if swish else None,
        "gate": torch.randn(out, into, kh, kw, dtype=torch.float64).to(dtype) if gate else None,
        "out_channels": out,
        "in_channels": into,
    }


def any_arguments(rng: Random) -> dict[str, Any]:
    o, i = rng.randint(1, rng.choice([2, 9, 40])), rng.randint(1, rng.choice([2, 9, 40]))
    return drawn(
        o,
        i,
        rng.choice([o, rng.randint(1, 5 * o)]),
        rng.choice([i, rng.randint(1, 5 * i)]),
        rng.choice([1, 1, 3]),
        rng.choice([1, 3, 5]),
        rng.choice(["plain", "swish", "swish", "gate"]),
        rng.choice(DTYPES),
    )


def run(function: Any, arguments: dict[str, Any], grad: Tensor) -> list[Tensor]:
    """The result, and the gradients of what there is."""
    leaves = {n: arguments[n].detach().requires_grad_() for n in TENSORS if arguments[n] is not None}
    result = function(**{**arguments, **leaves})
    return [result.detach(), *torch.autograd.grad(result, list(leaves.values()), grad)]


def terms(arguments: dict[str, Any], grad: Tensor) -> list[Tensor]:
    """What run() gives if nothing in a sum cancels: magnitudes of all its terms, in float64."""
    w, alpha, beta, gate = (None if arguments[n] is None else arguments[n].double() for n in TENSORS)
    (o, i), (out, into) = w.shape[:2], grad.shape[:2]
    rows, columns = torch.arange(out), torch.arange(into)
    tiled, g = w[rows % o][:, columns % i].abs(), grad.double().abs()

    def onto(number: int, index: Tensor, size: int, value: Tensor) -> Tensor:
        shape = [*value.shape[:number], size, *value.shape[number + 1 :]]
        return value.new_zeros(shape).index_add(number, index, value)

    def base(value: Tensor) -> Tensor:
        return onto(1, columns % i, i, onto(0, rows % o, o, value))

    if gate is not None:
        return [tiled * gate.abs(), base(g * gate.abs()), g * tiled]
    if alpha is None:
        return [tiled, base(g)]
    a, b = (t[rows // o][:, columns // i][..., None, None] for t in (alpha.abs(), beta))
    s = torch.sigmoid(-b * w[rows % o][:, columns % i])
    slope = tiled * s * (1 - s)

    def by_tile(value: Tensor) -> Tensor:
        summed = onto(0, rows // o, alpha.shape[0], value.sum((2, 3)))
        return onto(1, columns // i, alpha.shape[1], summed)

    of_weight = base(g * a * (s + b.abs() * slope))
    return [a * tiled * s, of_weight, by_tile(g * tiled * s), by_tile(g * a * tiled * slope)]


def assert_right(arguments: dict[str, Any], grad: Tensor) -> None:
    double = {n: a.double() if isinstance(a, Tensor) else a for n, a in arguments.items()}
    exact = run(reference.repeat_weight, double, grad.double())
    dtypes = [grad.dtype, *(t.dtype for n in TENSORS if (t := arguments[n]) is not None)]
    assert_sums(run(REPEAT, arguments, grad), exact, terms(arguments, grad), dtypes, eps=4e-6)


@on_every_isa
def test_random_tilings(chunk: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIN_CPU_ISA", isa)
    for arguments in draws(SHAPES, any_arguments):
        assert_right(arguments, torch.randn_like(REPEAT(**arguments)))


@pytest.mark.parametrize("modulation", ["plain", "swish", "gate"])
def test_long_streams(modulation: str) -> None:
    """A result of more than the 8 MB beyond which it bypasses the caches, in 25 tiles, the last ones partial."""
    arguments = drawn(120, 112, 500, 530, 3, 3, modulation, torch.float32)
    result = REPEAT(**arguments)
    assert result.numel() * 4 > 8 << 20
    assert_right(arguments, torch.randn_like(result))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("modulation", ["swish", "gate"])
def test_same_bits_with_any_number_of_threads(modulation: str) -> None:
    arguments, grad = drawn(64, 96, 200, 200, 3, 3, modulation, torch.float32), torch.randn(200, 200, 3, 3)
    assert_same_bits(lambda: run(REPEAT, arguments, grad))


def test_exponentials_do_not_overflow() -> None:
    arguments = drawn(2, 2, 4, 4, 1, 1, "swish", torch.float32)
    arguments["weight"] *= 100
    arguments["beta"] *= 100
    for value in run(REPEAT, arguments, torch.ones(4, 4, 1, 1)):
        assert value.isfinite().all()


def test_not_contiguous() -> None:
    arguments = drawn(4, 6, 10, 11, 3, 3, "swish", torch.float32)
    expected = REPEAT(**arguments)
    arguments["weight"] = arguments["weight"].to(memory_format=torch.channels_last)
    arguments["alpha"] = arguments["alpha"].t().contiguous().t()
    assert torch.equal(REPEAT(**arguments), expected)
    assert REPEAT(**arguments).is_contiguous()
    assert_right(arguments, torch.randn(3, 3, 10, 11).permute(2, 3, 0, 1))


def test_backend() -> None:
    arguments = drawn(2, 2, 4, 4, 1, 1, "plain", torch.bfloat16)
    assert dispatch.explain("repeat_weight", **arguments).backend == "cpu"
    arguments["weight"] = arguments["weight"].double()
    assert dispatch.explain("repeat_weight", **arguments).backend == "reference"
