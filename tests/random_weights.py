"""What the tests of the operators that make weights share: random calls, and the rule of their numbers."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

runtime = pytest.importorskip("spin_kernels.spin_runtime", reason="the library is not built")
CHUNKS = 10
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_isa = pytest.mark.parametrize("isa", runtime.cpu_features()["isas"])


def on_every_isa(test: Callable[..., None]) -> Callable[..., None]:
    """In chunks, for tests that run side by side."""
    return pytest.mark.parametrize("chunk", range(CHUNKS))(every_isa(test))


def draws(count: int, draw: Callable[[Random], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A chunk of `count` random calls, each described in the output of a test that fails."""
    for _ in range(count // CHUNKS):
        seed = int(torch.randint(2**31, ()))
        torch.manual_seed(seed)
        arguments = draw(Random(seed))
        described = {n: (v.dtype, *v.shape) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        print(f"seed {seed}: {described}")
        yield arguments


def assert_sums(
    values: Sequence[Tensor],
    exact: Sequence[Tensor],
    terms: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    eps: float,
) -> None:
    """Sums in float32 or wider, rounded once; `terms` are the sums of all magnitudes, `eps` the error of a term."""
    for got, expected, size, dtype in zip(values, exact, terms, dtypes, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == dtype
        error, kind = (got.double() - expected).abs(), torch.finfo(dtype)
        right = error <= eps * size + kind.eps * expected.abs() + kind.tiny
        assert right.all(), f"{dtype}: {error[~right][:5]} of {expected[~right][:5]}"


def assert_same_bits(compute: Callable[[], Sequence[Tensor]]) -> None:
    """With any number of threads; for tests with the fixture one_thread, which puts the number back."""
    expected = compute()
    for number in (2, 3, 2):
        torch.set_num_threads(number)
        assert all(map(torch.equal, compute(), expected))
