"""Ours and plain PyTorch, making the weights of a network. Imports torch and spin_kernels.

The peers do what users write. From a bank: one product (or one broadcast sum) of coefficients and templates for each
cluster, then every layer's part of the tiles; a layer that is one tile takes it as it is. Repeated: `Tensor.repeat`,
and the tiles' alpha and beta spread over the filters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spin_kernels as spin
from spinbench.catalog import COPY, READ, WRITE
from spinbench.compositions import NETWORK, SIDE, TILES, MadeWeights, Repetition
from spinbench.networks import Case

Weights = list[Tensor]


class RepeatedLayers(nn.ModuleList):
    """The repeated convolutions of a network, in the place of a bank."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(module for module in network.modules() if isinstance(module, spin.nn.RepeatConv2d))

    def compose(self) -> Weights:
        return [layer.repeated_weight() for layer in self]


def network_of(made: MadeWeights, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    repeated = isinstance(made, Repetition)
    weights = spin.Repeated(TILES, "swish") if repeated else spin.SuperWeights(made.percent / 100)
    return spin.models.create(NETWORK, weights=weights)


def source_of(network: nn.Module) -> nn.Module:
    """What the weights are made of: its compose() makes them, its parameters have the gradients."""
    return network.bank if hasattr(network, "bank") else RepeatedLayers(network)


def reference(made: MadeWeights, batch: int, seed: int) -> Tensor:
    """In float64: all weights, the gradients of what they are made of, or that of the last BatchNorm's scale."""
    network = network_of(made, seed).double()
    if made.what == "step":
        return gradient_of_step(network, *images(batch, torch.float64))
    source = source_of(network)
    if made.what == "forward":
        with torch.no_grad():
            return flat(source.compose())
    weights = source.compose()
    grads = torch.autograd.grad(weights, list(source.parameters()), gradients(weights, torch.float64))
    return flat(grads)


def prepare(provider: str, case: Case, seed: int) -> tuple[Callable[[], Any], Tensor | None, dict[str, float]]:
    """The call that is timed, its result as one float32 tensor (None of a ceiling), and figures of the provider."""
    made, dtype = case.network, getattr(torch, case.dtype)
    if provider == COPY:
        return copying(case), None, {}
    if provider == WRITE:
        return partial(torch.ones(made.weights, dtype=dtype).fill_, 2.0), None, {}
    if provider == READ:
        bytes_read = (made.source + made.weights) * dtype.itemsize
        return torch.ones(bytes_read // torch.float32.itemsize).sum, None, {}
    network = network_of(made, seed)
    if made.what == "step":
        if provider != "spin":
            plain = spin.models.create(NETWORK)
            copy_weights(network, plain)
            network = plain
        x, classes = images(case.batch, torch.float32)

        def step() -> Tensor:
            return gradient_of_step(network, x, classes)

        return step, step(), {"between_mb": held_weights(network, x) / 1e6}
    source = source_of(network).to(dtype)
    make = source.compose if provider == "spin" else PEERS[provider](source)
    if made.what == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return make()

        return forward, flat(forward()).float(), {}
    leaves, weights = list(source.parameters()), make()
    loss = Given.apply(gradients(weights, dtype), *weights)

    def backward() -> Any:
        return torch.autograd.grad(loss, leaves, retain_graph=True)

    return backward, flat(backward()).float(), {}


def copying(case: Case) -> Callable[[], Tensor]:
    """copy_ of half the case's least bytes, which reads and writes as many as the case has."""
    dtype = getattr(torch, case.dtype)
    values = torch.ones(case.bytes // (2 * dtype.itemsize), dtype=dtype)
    target = torch.zeros_like(values)
    return lambda: target.copy_(values)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def gradients(weights: Weights, dtype: torch.dtype) -> Weights:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(w.shape, generator=generator).to(dtype) for w in weights]


class Given(torch.autograd.Function):
    """A loss of which the gradients are given: of many outputs `torch.autograd.grad` compares shapes in Python, for 0.1
    to 0.2 ms of a call, which no training step does."""

    @staticmethod
    def forward(ctx: Any, grads: Weights, *weights: Tensor) -> Tensor:
        ctx.grads = grads
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads


# --- plain PyTorch


def product(coefficients: Tensor, templates: Tensor) -> Tensor:
    return coefficients @ templates


def broadcast_sum(coefficients: Tensor, templates: Tensor) -> Tensor:
    return (coefficients[:, :, None] * templates).sum(1)


def by_clusters(bank: spin.nn.SuperWeightBank, combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Weights]:
    windows: dict[str, tuple[int, int, int, int]] = {}  # of each cluster: templates, their size, rows and columns
    vectors: dict[str, list[str]] = {name: [] for name in bank.sizes}
    for (cluster, name), _ in bank.coefficients.lengths.items():
        vectors[cluster].append(name)
    for shape, slabs in bank.layers:
        for slab in slabs:
            if slab.coefficients is not None:
                taps = shape[2] * shape[3]
                rows = slab.stride // (slab.row * taps)
                windows[slab.cluster] = (slab.templates, slab.stride, rows, slab.row)
    starts = {
        cluster: [bank.coefficients.start((cluster, name)) for name in names] for cluster, names in vectors.items()
    }
    index = {
        cluster: torch.tensor([[first + k for k in range(windows[cluster][0])] for first in firsts])
        for cluster, firsts in starts.items()
        if firsts
    }

    def make() -> Weights:
        tiles = {}
        for cluster, (count, size, *_) in windows.items():
            coefficients = bank.coefficients.values[index[cluster]].to(bank.templates.dtype)
            templates = bank.templates[bank.place(cluster)][: count * size].view(count, size)
            tiles[cluster] = combine(coefficients, templates)
        return [layer(shape, slabs, tiles) for shape, slabs in bank.layers]

    def layer(shape: tuple[int, ...], slabs: tuple[spin.nn.Slab, ...], tiles: dict[str, Tensor]) -> Tensor:
        taps, weight = shape[2] * shape[3], None
        for slab in slabs:
            if slab.coefficients is None:
                first = bank.place(slab.cluster).start + slab.start
                values = bank.templates[first : first + slab.out * slab.in_channels * taps]
                part = values.view(slab.out, slab.in_channels, *shape[2:])
            else:
                number = vectors[slab.cluster].index(slab.coefficients)
                _, _, rows, row = windows[slab.cluster]
                tile = tiles[slab.cluster][number].view(rows, row, *shape[2:])
                a, b = divmod(slab.start // taps, row)
                part = tile[a : a + slab.out, b : b + slab.in_channels]
            if part.shape == shape:
                return part
            if weight is None:
                weight = part.new_empty(shape)
            columns = slice(slab.in_offset, slab.in_offset + slab.in_channels)
            weight[slab.out_offset : slab.out_offset + slab.out, columns] = part
        return weight

    return make


def repeated(layer: spin.nn.RepeatConv2d) -> Tensor:
    (o, i), (out, into, *_), dtype = layer.base, layer.shape, layer.weight.dtype
    w = layer.weight.repeat(*layer.alpha.shape, 1, 1)[:out, :into]
    alpha, beta = (
        t.to(dtype).repeat_interleave(o, 0).repeat_interleave(i, 1)[:out, :into, None, None]
        for t in (layer.alpha, layer.beta)
    )
    return w * alpha / (1 + torch.exp(beta * w))


PEERS: dict[str, Callable[[Any], Callable[[], Weights]]] = {
    "product": lambda bank: by_clusters(bank, product),
    "broadcast sum": lambda bank: by_clusters(bank, broadcast_sum),
    "eager": lambda layers: lambda: [repeated(layer) for layer in layers],
}


# --- a training step


def images(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Smooth colours with noise, and classes."""
    generator = torch.Generator().manual_seed(2)
    rough = torch.randn(batch, 3, 4, 4, generator=generator)
    noise = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
    x = F.interpolate(rough, (SIDE, SIDE), mode="bilinear") + 0.3 * noise
    return x.to(dtype), torch.arange(batch) % 10


@torch.no_grad()
def copy_weights(network: nn.Module, plain: nn.Module) -> None:
    """Into the same network with convolutions of its own."""
    modules = dict(network.named_modules())
    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(modules[name].weight)
        elif isinstance(module, nn.BatchNorm2d | nn.Linear):
            module.load_state_dict(modules[name].state_dict())


def gradient_of_step(network: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    for parameter in network.parameters():
        parameter.grad = None
    F.cross_entropy(network(x), classes).backward()
    return network.bn.weight.grad


def held_weights(network: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps between the passes, without parameters and what has an image's dimension."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.dim() > 0 and len(t) != len(x) and t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(x)
    return sum(kept.values())
