"""The Hopper kernel on a GPU against the reference; test_hopper.py runs its code without one."""

import os
from random import Random
from typing import Any

import golden
import pytest
import torch
from arguments import cast, mixer_arguments, tensors_of
from test_golden import CASES, input_of, model_of
from test_random_shapes import LAYOUTS, any_settings, assert_right, expected_format
from torch import Tensor

from spin_kernels import _library, dispatch, reference

SHAPES = int(os.environ.get("SPIN_RANDOM_SHAPES", "300"))
CHUNKS = 10
BLOCK = torch.ops.spin.shared_mixer_block.default
DTYPES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0) or not _library.HAS_CUDA_LIBRARY:
        pytest.skip("needs a Hopper GPU and libspin_cuda.so")
    monkeypatch.setenv("SPIN_BACKEND", "cuda")


def on_gpu(a: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in a.items()}


def check(a: dict[str, Any]) -> None:
    given = on_gpu(a)
    junk = torch.full((1 << 26,), float("nan"), device="cuda")  # what the call's memory holds at first
    del junk
    y = BLOCK(**given)
    assert y.is_contiguous(memory_format=expected_format(given["x"]))
    assert torch.equal(y, BLOCK(**given)), "other bits from run to run"
    assert_right(y.cpu(), lambda dtype: reference.mixer(**(cast(a, dtype) if dtype == torch.float64 else a))[0], a["x"])


def any_arguments(rng: Random) -> dict[str, Any]:
    """Of what the kernel serves: planes of 1 to 256 places, also several images to a tile."""
    while True:
        height, width = rng.randint(1, 32), rng.randint(1, rng.choice([8, 16, 40, 256]))
        if dispatch.hopper_images(height, width):
            break
    a = mixer_arguments(
        batch=rng.choice([1, 2, 3, 5, 8, 33, rng.randint(1, 100)]),
        channels=8 * rng.choice([1, rng.randint(1, 40), 16 * rng.randint(1, 6)]),
        height=height,
        width=width,
        kernel=rng.choice(dispatch.HOPPER_KERNEL_SIZES),
        depth=rng.randint(1, 4),
        **any_settings(rng, DTYPES),
    )
    return a | {"x": LAYOUTS[rng.choice(list(LAYOUTS))](a["x"])}


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_shapes(chunk: int) -> None:
    for _ in range(SHAPES // CHUNKS):
        seed = int(torch.randint(2**31, ()))
        torch.manual_seed(seed)
        a = any_arguments(Random(seed))
        print(f"seed {seed}: {a['x'].dtype}", {n: tuple(v.shape) for n, v in tensors_of(a).items()})
        check(a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "kernel", "residual"), [(768, 3, True), (1024, 9, False), (2048, 7, False)])
def test_published_sizes(channels: int, kernel: int, residual: bool, dtype: torch.dtype) -> None:
    sizes = {"batch": 9, "channels": channels, "height": 16, "width": 16, "kernel": kernel, "depth": 3}
    check(mixer_arguments(**sizes, dtype=dtype, activation="gelu", pw_residual=residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_blocks(case: dict[str, Any], dtype: torch.dtype) -> None:
    """The blocks of the published cases whose sizes it serves, their numbers in 2 bytes."""
    model, image = model_of(case, torch.float64).eval(), input_of(case, torch.float64)
    with torch.no_grad():
        x, arguments = model.patch_embed(image), model.mixer._op_arguments()
        a = {"x": x} | {n: v.detach() if isinstance(v, Tensor) else v for n, v in arguments.items()}
        narrow = ("x", "dw_weight", "dw_bias", "pw_weight", "pw_bias")
        a = {n: v.to(dtype if n in narrow else torch.float32) if isinstance(v, Tensor) else v for n, v in a.items()}
        if why := dispatch._hopper_refusal([on_gpu(a)[name] for name in dispatch.MIXER_TENSORS] + [a["pw_index"]]):
            pytest.skip(why)
        assert golden.load(case)["eval.output"].isfinite().all()
        check(a)


def test_captured_in_a_graph_and_on_another_stream() -> None:
    a, other = (on_gpu(mixer_arguments(batch=5, channels=264, height=14, width=14, dtype=DTYPES[0])) for _ in range(2))
    expected = BLOCK(**a | {"x": other["x"]})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = BLOCK(**a)
    a["x"].copy_(other["x"])
    for _ in range(2):
        graph.replay()
        assert torch.equal(y, expected)
    stream = torch.cuda.Stream()
    late = other | {"x": torch.full_like(other["x"], torch.nan)}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late["x"].copy_(other["x"])
        got = BLOCK(**late)
    stream.synchronize()
    assert torch.equal(got, BLOCK(**other))


@pytest.mark.parametrize("changes", [{"dtype": torch.float32}, {"kernel": 11}, {"channels": 132}, {"height": 300}])
def test_the_private_operator_refuses_what_the_kernel_cannot(changes: dict[str, Any]) -> None:
    a = on_gpu(
        mixer_arguments(**{"batch": 2, "channels": 128, "height": 16, "width": 16, "dtype": DTYPES[0]} | changes)
    )
    tensors = [a[name] for name in dispatch.MIXER_TENSORS]
    with pytest.raises(RuntimeError, match="could not be launched"):
        torch.ops.spin._mixer_cuda(*tensors, a["pw_index"], a["dw_index"], "gelu", False)
