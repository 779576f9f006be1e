"""Threads: the same bits at any number of them, from any of them, at once, inside torch's own, and after a fork."""

import ctypes
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from arguments import mixer_arguments
from torch import Tensor

import spin_kernels

spin = torch.ops.spin
BLOCK = spin.shared_mixer_block.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Call = Callable[[], Tensor]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def op_call(**shape: Any) -> Call:
    arguments = mixer_arguments(**shape)
    return lambda: BLOCK(**arguments)


def frozen_mixer_call(batch: int, dim: int, kernel: int, size: int, dtype: torch.dtype) -> Call:
    mixer = spin_kernels.nn.SharedMixer(dim, 3, kernel, spin_kernels.Sharing(3, 2)).to(dtype).eval().freeze()
    x = torch.randn(batch, dim, size, size).to(dtype)
    return lambda: mixer(x)


def frozen_network_call(batch: int, dim: int, kernel: int, size: int, dtype: torch.dtype) -> Call:
    model = spin_kernels.models.convmixer(dim, 3, kernel, 2, num_classes=37).to(dtype).eval().freeze()
    image = torch.randn(batch, 3, 2 * size, 2 * size)
    return lambda: model(image)


# Enough work for two threads and more, in batches that give every thread images of its own, leave one over, or are one;
# images so small that several go together, in groups of equal and of unequal size, shared by the threads and not; and
# matrices so large that compositions come in segments, and that an image is cut into bands for its small filters only.
SHAPES = [(batch, 96, kernel, 17) for batch in (1, 2, 3, 8) for kernel in (3, 11)]
SHAPES += [(9, 160, 3, 7), (6, 160, 11, 4), (1, 600, 3, 2), (3, 600, 3, 2), (1, 736, 3, 16)]


def make_calls(dtype: torch.dtype) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for batch, dim, kernel, size in SHAPES:
        shape = {"batch": batch, "channels": dim, "height": size, "width": size, "kernel": kernel, "dtype": dtype}
        calls[f"op {batch} {dim} {kernel}"] = op_call(**shape)
        calls[f"op with templates {batch} {dim} {kernel}"] = op_call(
            **shape, matrices=3, templates=3, gain=True, pw_residual=True
        )
        calls[f"frozen mixer {batch} {dim} {kernel}"] = frozen_mixer_call(batch, dim, kernel, size, dtype)
        calls[f"frozen network {batch} {dim} {kernel}"] = frozen_network_call(batch, dim, kernel, size, dtype)
    return calls


def results(calls: dict[str, Call]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: call().clone() for name, call in calls.items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], when: str) -> None:
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different, f"{when}: {different}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_any_thread_count_and_from_run_to_run(dtype: torch.dtype) -> None:
    calls = make_calls(dtype)
    torch.set_num_threads(1)
    one = results(calls)
    assert all(result.isfinite().all() for result in one.values())
    assert_same(results(calls), one, "run to run")
    for threads in (2, 4, 5):
        torch.set_num_threads(threads)
        for _ in range(2):
            assert_same(results(calls), one, f"{threads} threads")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "size"), [(9, 7), (7, 3), (3, 11), (5, 16)])
def test_an_image_does_not_see_its_batch(batch: int, size: int, dtype: torch.dtype) -> None:
    shape = {"channels": 144, "height": size, "width": size, "kernel": 5, "dtype": dtype}
    arguments = mixer_arguments(batch=batch, **shape, pw_residual=True)
    expected = torch.cat([BLOCK(**{**arguments, "x": image}) for image in arguments["x"].split(1)])
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        assert torch.equal(BLOCK(**arguments), expected), f"{threads} threads"


@pytest.mark.parametrize("threads", [1, 2])
def test_many_calls_at_once(threads: int) -> None:
    torch.set_num_threads(1)
    calls = [
        call
        for number, dtype in enumerate(DTYPES)
        for call in (
            op_call(batch=number + 1, channels=64, height=12, width=11, kernel=2 * number + 3, dtype=dtype),
            op_call(batch=3, channels=33, height=7, width=19, templates=2, dtype=dtype, channels_last=True),
            frozen_mixer_call(2, 48, 5, 9 + number, dtype),
            frozen_network_call(2, 40, 3, 8 + number, dtype),
        )
    ]
    expected = [call() for call in calls]
    torch.set_num_threads(threads)
    start, stop = threading.Barrier(9), threading.Event()

    def work(first: int) -> list[int]:
        start.wait()
        order = [(first + 5 * i) % len(calls) for i in range(3 * len(calls))]
        return [i for i in order if not torch.equal(calls[i](), expected[i])]

    def release() -> int:
        start.wait()
        freed = 0
        while not stop.wait(0.0005):
            freed += spin._release_workspace()
        return freed

    with ThreadPoolExecutor(9) as pool:
        releasing = pool.submit(release)
        wrong = [future.result() for future in [pool.submit(work, first) for first in range(8)]]
        stop.set()
        freed = releasing.result()
    assert wrong == [[]] * 8
    assert freed + spin._release_workspace() > 0
    assert spin._release_workspace() == 0


def openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch's thread pool is made of."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libgomp" in line}
        return ctypes.CDLL(min(paths)) if len(paths) == 1 else None
    except OSError:
        return None


def test_inside_parallel_regions_of_torchs_own_pool() -> None:
    library = openmp()
    if library is None:
        pytest.skip("torch does not use the one libgomp of this process")
    torch.set_num_threads(2)
    calls = [op_call(batch=batch, channels=96, height=16, width=16) for batch in (1, 2, 3)]
    calls.append(frozen_network_call(2, 96, 5, 17, torch.float32))
    expected, seen = [call() for call in calls], []

    def body(_: Any) -> None:
        with torch.no_grad():
            seen.extend(torch.equal(call(), result) for call, result in zip(calls, expected, strict=True))

    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    library.GOMP_parallel(signature(body), None, ctypes.c_uint(2), ctypes.c_uint(0))
    assert seen == [True] * 2 * len(calls)


def _child(connection: Any, call: Call, threads: int) -> None:
    torch.set_num_threads(threads)
    connection.send(call().numpy().tobytes())
    connection.close()
    os._exit(0)  # without pytest's exit handlers


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("parent_threads", [1, 2])
@pytest.mark.parametrize("make", [op_call, None], ids=["op", "frozen"])
def test_in_a_forked_process(parent_threads: int, make: Any) -> None:
    # With one thread, as a DataLoader's worker has: after a fork torch's OpenMP pool hangs in any operator.
    torch.set_num_threads(parent_threads)
    shape = {"batch": 2, "channels": 96, "height": 17, "width": 17}
    call = op_call(**shape) if make else frozen_network_call(2, 96, 5, 17, torch.float32)
    with torch.no_grad():
        expected = call().numpy().tobytes()
        context = multiprocessing.get_context("fork")
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sending, call, 1))
        process.start()
        sending.close()
        try:
            assert receiving.poll(60), "the child does not return"
            assert receiving.recv() == expected
        finally:
            process.join(10)
            if process.is_alive():
                process.kill()
        assert process.exitcode == 0
        assert call().numpy().tobytes() == expected, "the parent after the fork"
