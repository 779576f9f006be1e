"""Every test draws fresh random numbers; the seed is printed, and SPIN_TEST_SEED=<seed> repeats a run."""

import os
import zlib
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available() and find_spec("triton"):
    # Triton reads this where kernels are defined, its own among them: before anything else imports it.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton_ops.repeat
    import triton_ops.training  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

_SEED = int(os.environ.get("SPIN_TEST_SEED") or torch.seed() % 2**31)


def pytest_report_header() -> str:
    return f"SPIN_TEST_SEED={_SEED}"


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if torch.cuda.is_available() and "on_triton" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")  # the tests that run in Triton's interpreter elsewhere
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The references' many small float64 convolutions crawl on a busy machine with more; test_threads.py has more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls take the Triton kernels (without a GPU in the interpreter), and new tensors hold NaN."""
    monkeypatch.setenv("SPIN_BACKEND", "triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        # There a program takes some ten milliseconds, however much it does.
        monkeypatch.setattr("triton_ops.compose.COMPOSE_BLOCK", 1024)
        monkeypatch.setattr("triton_ops.repeat.REPEAT_BLOCK", 1024)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    # One seed per test, so that a test draws the same numbers alone as in the whole suite.
    seed = (_SEED + zlib.crc32(request.node.nodeid.encode())) % 2**31
    print(f"SPIN_TEST_SEED={_SEED}: this test's seed is {seed}")
    torch.manual_seed(seed)
