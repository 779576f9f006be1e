"""What only a GPU shows: streams, graphs, synchronisation, several devices, autocast, compiled steps."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from arguments import mixer_arguments, tensors_of
from test_compose import COMPOSE, nested_layers
from test_repeat import REPEAT, drawn
from torch import Tensor

import spin_kernels as spin
from spin_kernels import dispatch
from spin_kernels.nn import SharedMixer

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_triton")]
BLOCK = torch.ops.spin.shared_mixer_block.default
TRAIN = torch.ops.spin.shared_mixer_block_train.default
CASE = {"batch": 5, "channels": 96, "height": 16, "width": 15, "kernel": 5, "depth": 4, "matrices": 2}


def to_gpu(a: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in a.items()}


def on_gpu(**changes: Any) -> dict[str, Any]:
    return to_gpu(mixer_arguments(**CASE | {"dtype": torch.float16} | changes))


def step(op: Callable[..., Any], a: dict[str, Any]) -> list[Tensor]:
    """Output and all gradients of new leaves."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors_of(a).items()}
    y = op(**a | leaves)
    y = y if isinstance(y, Tensor) else y[0]
    weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, list(leaves.values()), weight)]


class Call(NamedTuple):
    draw: Callable[[], dict[str, Any]]
    source: str  # a tensor that changes
    run: Callable[[dict[str, Any]], list[Tensor]]


CALLS = {
    "inference": Call(on_gpu, "x", lambda a: [BLOCK(**a)]),
    "frozen statistics": Call(on_gpu, "x", lambda a: step(BLOCK, a)),
    "batch statistics": Call(on_gpu, "x", lambda a: step(TRAIN, a)),
    "composition": Call(lambda: to_gpu(nested_layers(3, 5)), "bank", lambda a: step(COMPOSE, a)),
    "repetition": Call(
        lambda: to_gpu(drawn(20, 16, 190, 170, 3, 3, "swish", torch.float32)), "weight", lambda a: step(REPEAT, a)
    ),
}


@pytest.fixture(params=list(CALLS))
def call(request: pytest.FixtureRequest) -> Iterator[Call]:
    yield CALLS[request.param]
    torch.cuda.synchronize()


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert all(g.isfinite().all() for g in got)


def test_same_bits_again(call: Call) -> None:
    a = call.draw()
    assert_same(call.run(a), call.run(a))


def test_runs_on_the_current_stream(call: Call) -> None:
    a = call.draw()
    expected, stream = call.run(a), torch.cuda.Stream()
    late = a | {call.source: torch.full_like(a[call.source], torch.nan)}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what is enqueued elsewhere would run before the source is there
        late[call.source].copy_(a[call.source])
        got = call.run(late)
    stream.synchronize()
    assert_same(got, expected)


def test_captured_in_a_graph(call: Call) -> None:
    a, other = call.draw(), call.draw()[call.source]
    expected = call.run(a | {call.source: other})
    call.run(a)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call.run(a)
    a[call.source].copy_(other)
    for _ in range(2):
        graph.replay()
        assert_same(got, expected)


def test_never_waits_for_the_gpu(call: Call) -> None:
    a = call.draw()
    expected = call.run(a)
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = call.run(a)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current(call: Call) -> None:
    a = call.draw()
    got = call.run(to_gpu(a, "cuda:1"))
    assert all(g.device == torch.device("cuda:1") for g in got)
    assert_same([g.to("cuda:0") for g in got], call.run(a))


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


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_weights(mode: str) -> None:
    """Composed and repeated; without a call before, so that plans are made while graphs are."""
    composed = to_gpu(nested_layers(2, 4, rows=24))
    weight, gate = torch.randn(8, 8, 3, 3, device="cuda"), torch.randn(40, 30, 3, 3, device="cuda")
    leaves = [composed["bank"].requires_grad_(), composed["coefficients"].requires_grad_(), weight.requires_grad_()]

    def loss_of(bank: Tensor, coefficients: Tensor, weight: Tensor) -> Tensor:
        flat = COMPOSE(bank, coefficients, composed["pieces"], composed["shapes"])
        return flat.square().mean() + REPEAT(weight, None, None, gate, 40, 30).square().mean()

    compiled = torch.compile(loss_of, fullgraph=True, mode=mode)
    got = [[g.clone() for g in torch.autograd.grad(compiled(*leaves), leaves)] for _ in range(3)]
    expected = torch.autograd.grad(loss_of(*leaves), leaves)
    for gradients in got:
        for g, e in zip(gradients, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_memory_held_between_the_passes() -> None:
    """Two planes per block, as saved_elements says, and what is kept anyway."""
    a = on_gpu(batch=16, depth=8, matrices=4)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors_of(a).items()}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = BLOCK(**a | leaves)
    held = torch.cuda.memory_allocated() - before
    assert held < 1.05 * (2 * 8 + 1) * y.numel() * y.element_size() + (1 << 20)
