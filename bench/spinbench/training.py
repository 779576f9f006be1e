"""A training step of ours and of the peers, and the memory it takes. Imports torch.

The step: gradients to None, forward, cross-entropy, backward; no optimizer, which is the same for all. bfloat16 is
autocast. What is compared is the gradient of the stem's weight: the last one made, everything before it went into it.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spinbench.catalog import OURS
from spinbench.providers import Job, captured


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    logits = model(x)
    return F.cross_entropy(logits, torch.arange(len(x), device=x.device) % logits.shape[1])


def gradient(model: nn.Module) -> Tensor:
    """Of the stem's weight: the first convolution of ours and of the plain network alike."""
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return stem.weight.grad.contiguous()


def make_step(name: str, job: Job) -> tuple[Callable[[], Tensor], dict[str, float]]:
    """The step of a provider, the share of the forward pass (with the loss) in it, and megabytes: held between forward
    and backward (without parameters and their casts), and by which a step's peak of memory (resident; on a GPU
    allocated) is above what the process had with its model and nothing else."""
    x, graphs = job.x, "graphs" in name
    if name in OURS:
        from spinbench.ours import make_ours

        model = make_ours(job.case.network, job.plain, checkpoint=name == "spin checkpoint").to(x.device)
        layout = torch.channels_last if x.is_cuda else torch.contiguous_format  # see providers.spin
    else:
        layout = torch.channels_last if name.endswith("channels_last") else torch.contiguous_format
        model = job.plain.to(x.device).to(memory_format=layout)
    model, x = model.train(), x.to(memory_format=layout)
    mode = {"compile": "default", "autotune": "max-autotune"}.get(name.split()[0])
    call = model if mode is None else torch.compile(model, dynamic=False, mode=mode)

    def forward() -> Tensor:
        # Casts kept from outside a graph would be stale in it.
        with torch.autocast(
            x.device.type, torch.bfloat16, enabled=job.case.dtype == "bfloat16", cache_enabled=not graphs
        ):
            return loss_of(call, x)

    def step() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        forward().backward()
        return gradient(model).float()

    step()  # may compile
    figures = {
        "peak_mb": peak_bytes(step, x.device) / 1e6,
        "forward_share": forward_share(forward),
        "held_mb": held_bytes(forward, model) / 1e6,
    }
    return captured(step) if graphs else step, figures


def peak_bytes(step: Callable[[], Tensor], device: torch.device) -> int:
    trim()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    reset_peak()
    step()
    return resident("VmHWM") - before


def forward_share(forward: Callable[[], Tensor], tries: int = 3) -> float:
    """Of the time of both passes, the best of each."""
    passes = []
    for _ in range(tries):
        start = time.perf_counter()
        loss = forward()
        wait(loss)
        middle = time.perf_counter()
        loss.backward()
        wait(loss)
        passes.append((middle - start, time.perf_counter() - middle))
    first, second = map(min, zip(*passes, strict=True))
    return first / (first + second)


def wait(result: Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize()


def trim() -> None:
    """Gives the system back what allocators keep for the next step."""
    gc.collect()
    if hasattr(torch.ops.spin, "_release_workspace"):
        torch.ops.spin._release_workspace()
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak since the last reset), bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def held_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the distinct storages that autograd keeps, without those of parameters, buffers and their casts."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    shapes = {p.numel() for p in model.parameters() if p.dim() > 1}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        is_cast = t.dtype != torch.float32 and t.numel() in shapes
        if storage.data_ptr() not in own and not is_cast:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    total = sum(kept.values())
    del loss
    return total
