"""Random models for plans, and the weights that a plan gives them, computed from its words alone in NumPy."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import silu  # unlike relu it never keeps all gradients back

from spin_kernels import search
from spin_kernels.search import BoundModels, Plan

IMAGE = (3, 9, 8)
CLASSES = 5


class Block(nn.Module):
    """A convolution, perhaps a norm, and a shortcut where the shape allows it."""

    def __init__(self, conv: nn.Conv2d, norm: bool) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return silu(y) + (x if y.shape == x.shape else 0)


class Net(nn.Module):
    """Blocks in nested containers, then linear layers, the last one being the classifier."""

    def __init__(self, blocks: nn.Module, channels: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.blocks = blocks
        sizes = (channels, *hidden)
        linear = [nn.Linear(*pair, bias=n % 2 == 0) for n, pair in enumerate(pairwise(sizes))]
        self.hidden = nn.ModuleDict({f"layer{n}": layer for n, layer in enumerate(linear)})
        self.classifier = nn.Linear(sizes[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x).mean((2, 3))
        for layer in self.hidden.values():
            x = silu(layer(x))
        return self.classifier(x)


def random_conv(rng: Random, into: int, out: int, kernels: Sequence[tuple[int, int]]) -> nn.Conv2d:
    kernel = rng.choice(kernels)
    stride, dilation = rng.choice([(1, 1), (1, 1), (2, 1), (1, 2)])
    padding = "same" if stride == 1 and rng.random() < 0.2 else tuple(dilation * (k // 2) for k in kernel)
    common = [n for n in range(2, into + 1) if into % n == out % n == 0]
    groups = rng.choice(common) if common and rng.random() < 0.2 else 1
    mode = "replicate" if rng.random() < 0.1 else "zeros"
    return nn.Conv2d(into, out, kernel, stride, padding, dilation, groups, rng.random() < 0.5, mode)


def random_model(rng: Random, kernels: Sequence[tuple[int, int]]) -> nn.Module:
    """A few planned layers among grouped and frozen ones."""
    blocks, into, most = [], IMAGE[0], rng.choice([3, 6, 12])
    for _ in range(rng.randint(1, 5)):
        out = into if rng.random() < 0.3 else rng.randint(1, most)
        blocks.append(Block(random_conv(rng, into, out, kernels), rng.random() < 0.5))
        blocks[-1].conv.requires_grad_(rng.random() > 0.1)
        into = out
    half = rng.randrange(len(blocks) + 1)
    body = nn.Sequential(nn.Sequential(*blocks[:half]), *blocks[half:])
    hidden = [rng.randint(1, most) for _ in range(rng.randint(1, 2))]
    return Net(body, into, hidden).train(rng.random() < 0.7)


def random_models(rng: Random) -> list[nn.Module]:
    """One to four of several depths and widths, some of them alike."""
    kernels = rng.sample([(1, 1), (3, 3), (1, 3), (5, 5)], rng.randint(1, 3))
    models = [random_model(rng, kernels) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.3:
        state = rng.getstate()
        models += [random_model(rng, kernels)]
        rng.setstate(state)
        models[0] = random_model(rng, kernels)
    return models


def random_settings(rng: Random) -> dict[str, Any]:
    return {
        "clusters": rng.choice(["depth", "length"]),
        "bins": rng.randint(1, 6),
        "max_templates": rng.randint(1, 9),
        "count": rng.choice(["network", "bank"]),
        "method": rng.choice(["paper", "stable"]),
        "coefficients": rng.choice(["own", "position", "cluster"]),
    }


def random_plan(rng: Random) -> tuple[list[nn.Module], Plan]:
    """Models and a plan of them; every third or so repeats blocks in some clusters."""
    models, settings = random_models(rng), random_settings(rng) | {"strict": rng.random() < 0.8}
    try:
        return models, search.plan(models, rng.choice([0.25, 0.35, 0.5, 0.8, 1.6]), **settings)
    except ValueError:
        return models, search.plan(models, 4.0, **settings)


def applied(rng: Random) -> tuple[list[nn.Module], Plan, BoundModels]:
    """Models, a plan of them, and the two together with random numbers in the bank."""
    models, plan = random_plan(rng)
    net = search.apply(models, plan)
    assert isinstance(net, BoundModels)
    with torch.no_grad():
        for _, _, layer in planned_layers(net, plan):
            if layer.alpha is not None:
                layer.alpha.normal_(2, 0.5)
                layer.beta.normal_()
        net.bank.templates.normal_()
        net.bank.coefficients.values.normal_()
    return models, plan, net


def images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, *IMAGE).to(dtype)


def draws(count: int) -> Iterator[Random]:
    """Generators for so many draws, each with the seed that repeats it."""
    for _ in range(count):
        seed = int(torch.randint(2**31, ()))
        torch.manual_seed(seed)
        print(f"seed {seed}")
        yield Random(seed)


def trained(module: nn.Module) -> int:
    """The number of trained parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def planned_layers(net: nn.Module, plan: Plan) -> Iterator[tuple[int, int, nn.Module]]:
    models = list(net) if isinstance(net, nn.ModuleList) else [net]
    for model, layers in enumerate(plan.models):
        for number, layer in enumerate(layers):
            yield model, number, models[model].get_submodule(layer.name)


def expected_weight(net: nn.Module, plan: Plan, model: int, number: int) -> np.ndarray:
    """A layer's weight from the templates, coefficients, alphas and betas of ``net``, in float64."""
    layer = plan.models[model][number]
    out, into, *kernel = layer.shape
    taps = int(np.prod(kernel, dtype=int))
    _, _, module = next(found for found in planned_layers(net, plan) if found[:2] == (model, number))

    def values(name: str) -> np.ndarray:
        found = net.bank.templates.detach()[net.bank.place(name)]
        return found.double().numpy()

    def coefficients(name: str, level: int, count: int) -> np.ndarray:
        start = net.bank.coefficients.start((name, str(layer.vectors[level])))
        return net.bank.coefficients.values.detach()[start : start + count].double().numpy()

    if layer.cluster in plan.blocks:
        name = f"{layer.cluster}.block"
        block = values(name).reshape(*plan.blocks[layer.cluster], taps) * coefficients(name, 0, 1)
        block = block[:out, :into]
        rows, columns = block.shape[:2]
        weight = np.empty((out, into, taps))
        for a in range(out):
            for b in range(into):
                weight[a, b] = block[a % rows, b % columns]
                if (rows, columns) != (out, into):
                    at = a // rows, b // columns
                    w, alpha, beta = weight[a, b], float(module.alpha[at]), float(module.beta[at])
                    weight[a, b] = w * alpha / (1 + np.exp(beta * w))
        return weight.reshape(layer.shape)

    steps = level_shapes(plan, layer.cluster)
    weight = np.zeros((0, 0, taps))
    for level, (o, i) in enumerate(steps[: len(layer.vectors)]):
        rows, columns = weight.shape[:2]
        right = min(rows, o) * max(0, i - columns) if level else 0
        below = max(0, o - rows) * i
        size = (right + below) * taps
        templates, start = window(plan, model, number, level)
        combined = np.zeros(size)
        factors: Any = None
        if size:
            name = f"{layer.cluster}.{level}"
            bank = values(name).reshape(plan.templates[layer.cluster, level], size)
            key = name, str(layer.vectors[level])
            if key in net.bank.coefficients.lengths:
                factors = coefficients(name, level, templates)
                combined = factors @ bank[start : start + templates]
            else:
                combined = np.full(size, np.nan)  # of what no layer may use
        weight = weight[:o, :i]
        rows, columns = weight.shape[:2]
        if rows and i > columns:
            weight = np.concatenate((weight, combined[: right * taps].reshape(rows, i - columns, taps)), 1)
        if o > rows:
            weight = weight if rows else np.zeros((0, i, taps))
            weight = np.concatenate((weight, combined[right * taps :].reshape(o - rows, i, taps)))
    return weight.reshape(layer.shape)


def level_shapes(plan: Plan, cluster: int) -> list[tuple[int, int]]:
    """(out, in) of each level: the distinct shapes of a cluster's layers from the smallest to the largest."""
    found = []
    for turn, model in enumerate(depth_order(plan)):
        for number, layer in enumerate(plan.models[model]):
            if layer.cluster == cluster:
                found.append((int(np.prod(layer.shape)), number, turn, layer.shape[:2]))
    found.sort()
    if found[0][0] == found[-1][0]:
        return [found[0][3]]
    shapes = [shape for *_, shape in found]
    return [shape for n, shape in enumerate(shapes) if n == 0 or shape != shapes[n - 1]]


def depth_order(plan: Plan) -> list[int]:
    return sorted(range(len(plan.models)), key=lambda model: -len(plan.models[model]))


def window(plan: Plan, model: int, number: int, level: int) -> tuple[int, int]:
    """The templates that a layer combines in a level: how many, and the first."""
    layer = plan.models[model][number]
    count = plan.templates[layer.cluster, level]
    templates = min(count, plan.max_templates)
    users = [n for n, o in enumerate(plan.models[model]) if o.cluster == layer.cluster and len(o.vectors) > level]
    turn = users.index(number)
    if plan.method == "stable":
        return templates, min(turn % -(-count // templates) * templates, count - templates)
    return templates, turn % min(count // templates, templates) * templates
