"""Training as users do it: several processes, loss scaling, accumulated gradients, functional calls, checkpointing,
whole compiled steps. What the operators compute is in test_training_shapes.py."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_models import make
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spin_kernels import Sharing
from spin_kernels.nn import SharedMixer

Batch = tuple[Tensor, Tensor]


def batch(size: int = 4, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 16, 16, generator=rng), torch.randint(7, (size,), generator=rng)


def step(model: nn.Module, data: Batch, scale: float = 1.0) -> Tensor:
    loss = F.cross_entropy(model(data[0]), data[1])
    (loss * scale).backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    assert got
    largest = max(e.norm() for e in expected.values())
    for name, e in expected.items():
        assert (got[name] - e).norm() <= tolerance * e.norm() + 1e-7 * largest, name


# --- processes


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    state = torch.load(f"{folder}/state.pt")
    model = make()
    model.load_state_dict(state)
    image, label = batch()
    half = slice(2 * rank, 2 * rank + 2)
    with pytest.raises(RuntimeError, match="expected a single process in training mode, got 2: batch statistics"):
        copy.deepcopy(model).train()(image[half])
    parallel = DistributedDataParallel(model.eval())
    step(parallel, (image[half], label[half]))
    torch.save(gradients(model), f"{folder}/{rank}.pt")
    dist.barrier()  # gloo's threads abort where the other side has gone already
    del parallel
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path) -> None:
    model = make().eval()  # frozen statistics
    torch.save(model.state_dict(), tmp_path / "state.pt")
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    step(model, batch())
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), gradients(model))


# --- automatic mixed precision


def test_loss_scaling() -> None:
    model, data = make(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
    scales, losses, before = [], [], copy.deepcopy(model.state_dict())
    for i in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(data[0]), data[1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        losses.append(loss.item())
        if i == 0:  # 2^40 overflows float16: this step is left out
            assert scales[0] == 2.0**39
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert min(scales) < 2.0**30
    assert losses[-1] < 0.7 * losses[0]


# --- gradients over several calls


@pytest.mark.parametrize("checkpoint", [False, True])
def test_accumulation(checkpoint: bool) -> None:
    model = make().eval()
    model.mixer.checkpoint = checkpoint
    image, label = batch(6)
    step(model, (image, label))
    expected = gradients(model)
    model.zero_grad()  # to None
    assert not gradients(model)
    for part in (slice(0, 4), slice(4, 6)):
        size = part.stop - part.start
        step(model, (image[part], label[part]), scale=size / 6)
    assert_close(gradients(model), expected)


def test_accumulation_adds_what_each_call_gives() -> None:
    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    parts = [batch(seed=seed) for seed in range(2)]
    for part in parts:
        step(model, part)
    total: dict[str, Tensor] = {}
    for part in parts:
        twin.zero_grad()
        step(twin, part)
        total = {name: g + total[name] if total else g for name, g in gradients(twin).items()}
    assert all(torch.equal(g, total[name]) for name, g in gradients(model).items())
    assert torch.equal(model.mixer.dw_running, twin.mixer.dw_running)


def test_two_graphs_at_once_and_one_of_them_twice() -> None:
    mixer = SharedMixer(16, 3, 3, Sharing(3, 3))
    x, y = (torch.randn(2, 16, 5, 5, requires_grad=True) for _ in range(2))
    first, second = mixer(x), mixer(y)
    weight = torch.randn_like(first)
    (expected,) = torch.autograd.grad(mixer(x), x, weight)
    (second * weight).sum().backward()
    for _ in range(2):
        (grad,) = torch.autograd.grad(first, x, weight, retain_graph=True)
        assert torch.equal(grad, expected)


# --- functional calls


@pytest.mark.parametrize("training", [False, True])
def test_functional_call(training: bool) -> None:
    model, other = make().train(training), make().train(training)
    data = batch()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    buffers = {name: b.clone() for name, b in other.named_buffers()}
    before = copy.deepcopy(model.state_dict())
    logits = torch.func.functional_call(model, parameters | buffers, (data[0],))
    F.cross_entropy(logits, data[1]).backward()
    step(other, data)
    expected = gradients(other)
    assert all(torch.equal(parameters[name].grad, g) for name, g in expected.items())
    assert all(torch.equal(b, buffers[name]) for name, b in other.named_buffers())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not gradients(model)


# --- keeping less


@pytest.mark.parametrize("training", [False, True])
def test_checkpoint(training: bool) -> None:
    options: dict[str, Any] = {"dim": 24, "depth": 11, "kernel_size": 3, "pw_residual": True}
    mixer = SharedMixer(**options).train(training)
    twin = SharedMixer(**options, checkpoint=True).train(training)
    twin.load_state_dict(mixer.state_dict())
    assert "checkpoint=True" in repr(twin)
    assert "checkpoint" not in repr(mixer)
    x = torch.randn(3, 24, 7, 6)
    held = []
    for module in (mixer, twin):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.nbytes) or t, lambda t: t):
            module(x).square().sum().backward()
        held.append(sum(sizes))
    assert held[0] - held[1] == 11 * 32 * 3 * 7 * 6 * 4
    assert all(torch.equal(g, gradients(twin)[name]) for name, g in gradients(mixer).items())
    assert all(torch.equal(a, b) for a, b in zip(mixer.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_training_computes_the_same(dtype: torch.dtype) -> None:
    mixer = SharedMixer(24, 11, 3, pw_residual=True, dtype=dtype)
    twin, x = copy.deepcopy(mixer), torch.randn(3, 24, 7, 6).to(dtype)
    with torch.no_grad():
        y = mixer(x)
    assert torch.equal(y, twin(x).detach())
    assert all(torch.equal(a, b) for a, b in zip(mixer.buffers(), twin.buffers(), strict=True))


# --- compiled


@pytest.mark.parametrize("narrow", [False, True])
def test_whole_step_compiled(narrow: bool) -> None:
    """Forward, loss and backward in one graph, two steps of an optimizer."""
    torch.compiler.reset()
    model = make()
    model.mixer.checkpoint = narrow
    twin, data = copy.deepcopy(model), batch()

    def loss_of(model: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return F.cross_entropy(model(image), label)

    compiled = torch.compile(loss_of, fullgraph=True)
    for function, module in ((compiled, model), (loss_of, twin)):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            function(module, *data).backward()
            optimizer.step()
    assert_close(gradients(model), gradients(twin), 0.1 if narrow else 1e-3)
    torch.compiler.reset()
