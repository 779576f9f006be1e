"""What only a GPU shows: streams, graphs, synchronisation, several devices, autocast, compiled steps."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from arguments import mixer_arguments, tensors_of
from torch import Tensor

import spin_kernels as spin
from spin_kernels import dispatch
from spin_kernels.nn import SharedMixer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_triton")]
BLOCK = torch.ops.spin.shared_mixer_block.default
TRAIN = torch.ops.spin.shared_mixer_block_train.default
CASE = {"batch": 5, "channels": 96, "height": 16, "width": 15, "kernel": 5, "depth": 4, "matrices": 2}


def on_gpu(device: str = "cuda", **changes: Any) -> dict[str, Any]:
    a = mixer_arguments(**CASE | {"dtype": torch.float16} | changes)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in a.items()}


def step(a: dict[str, Any], train: bool) -> list[Tensor]:
    """Output and all gradients of new leaves."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors_of(a).items()}
    y = TRAIN(**a | leaves)[0] if train else BLOCK(**a | leaves)
    weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, list(leaves.values()), weight)]


CALLS: dict[str, Callable[[dict[str, Any]], list[Tensor]]] = {
    "inference": lambda a: [BLOCK(**a)],
    "frozen statistics": lambda a: step(a, False),
    "batch statistics": lambda a: step(a, True),
}


@pytest.fixture(params=list(CALLS))
def call(request: pytest.FixtureRequest) -> Iterator[Callable[[dict[str, Any]], list[Tensor]]]:
    yield CALLS[request.param]
    torch.cuda.synchronize()


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert all(g.isfinite().all() for g in got)


def test_same_bits_again(call: Callable) -> None:
    a = on_gpu()
    assert_same(call(a), call(a))


def test_runs_on_the_current_stream(call: Callable) -> None:
    a = on_gpu()
    expected, stream = call(a), torch.cuda.Stream()
    late = a | {"x": torch.full_like(a["x"], torch.nan)}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what is enqueued elsewhere would run before x is there
        late["x"].copy_(a["x"])
        got = call(late)
    stream.synchronize()
    assert_same(got, expected)


def test_captured_in_a_graph(call: Callable) -> None:
    a, other = on_gpu(), on_gpu()["x"]
    expected = call(a | {"x": other})
    call(a)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(a)
    a["x"].copy_(other)
    for _ in range(2):
        graph.replay()
        assert_same(got, expected)


def test_never_waits_for_the_gpu(call: Callable) -> None:
    a = on_gpu()
    expected = call(a)
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = call(a)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current(call: Callable) -> None:
    a = on_gpu()
    elsewhere = {name: value.to("cuda:1") if isinstance(value, Tensor) else value for name, value in a.items()}
    got = call(elsewhere)
    assert all(g.device == torch.device("cuda:1") for g in got)
    assert_same([g.to("cuda:0") for g in got], call(a))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    mixer = SharedMixer(64, 4, 5, spin.Sharing(4, 2)).cuda()
    x = torch.randn(4, 64, 12, 12, device="cuda", requires_grad=True)
    expected = mixer(x)
    with torch.autocast("cuda", dtype):
        y = mixer(x)
        assert dispatch.explain("shared_mixer_block", x, **mixer._op_arguments()).backend == "triton"
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    y.float().square().mean().backward()
    assert mixer.pw_weight.grad.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_step(mode: str) -> None:
    torch.manual_seed(1)
    mixer = SharedMixer(64, 4, 5, spin.Sharing(4, 2)).cuda()
    x = torch.randn(4, 64, 12, 12, device="cuda")

    def loss_of(call: Callable[[Tensor], Tensor]) -> Tensor:
        mixer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = call(x).float().square().mean()
        loss.backward()
        return loss.detach().clone()

    expected = loss_of(mixer)
    gradient = mixer.pw_weight.grad.clone()
    compiled = torch.compile(mixer, fullgraph=True, mode=mode)
    for _ in range(3):
        torch.testing.assert_close(loss_of(compiled), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mixer.pw_weight.grad, gradient, rtol=2e-2, atol=1e-4)


def test_memory_held_between_the_passes() -> None:
    """Two planes per block, as saved_elements says, and what is kept anyway."""
    a = on_gpu(batch=16, depth=8, matrices=4)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors_of(a).items()}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = BLOCK(**a | leaves)
    held = torch.cuda.memory_allocated() - before
    assert held < 1.05 * (2 * 8 + 1) * y.numel() * y.element_size() + (1 << 20)
