"""How a network makes its weights: from the templates of a bank, or by repeating smaller ones.

``SuperWeights(0.25).apply(network)`` and ``Repeated((2, 2)).apply(network)`` replace the convolutions and linear layers
of any network in place; the models of this package take either as their ``weights``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .nn.bank import MOST_TEMPLATES, Slab, SuperWeightBank
from .nn.coefficients import Coefficients
from .nn.mixer import SharedMixer
from .nn.repeat import RepeatConv2d
from .nn.superweight import SuperConv2d, SuperLinear
from .surgery import Layer, Shape, conv_shape, from_bank, is_plain, own_layers, replace, replaceable_layers


def count_parameters(network: nn.Module) -> int:
    """The number of trained values of a network, shared ones once."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


@dataclass(frozen=True)
class SuperWeights:
    """Makes the layers of a network from one bank, so that it has exactly the parameters that it may spend.

    Layers of one kernel size are cut into ``bins`` clusters by depth, each with a part of the budget like its part of
    the network's weights. Its templates have the shape of its largest layer, or of as large a block of that as leaves
    two of them; layers are tiled by them, narrower ones take a corner, and every tile has coefficients of its own.
    What is left when no further template fits goes to the cluster's smallest layers, as rows of their own, which keep
    the values that they have; to larger ones where a part of the templates would serve nobody.
    The last linear layer, the classifier, stays as it is, and so do biases, norms and grouped convolutions.

    Args:
        budget: trained parameters of the network: their number, or as a float the fraction of the network's own.
        bins: the number of clusters for each kernel size.
        max_templates: the most that one tile combines.

    The budget is never exceeded; where no layer is 1 x 1, or those are tiny, less than a filter's values may stay.
    """

    budget: int | float
    bins: int = 4
    max_templates: int = MOST_TEMPLATES

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float) or not 0 < self.budget < math.inf:
            raise ValueError(f"budget: expected a positive number of parameters or a fraction, got {self.budget!r}")
        for name in ("bins", "max_templates"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")

    def apply(self, network: nn.Module) -> None:
        """Replaces the network's layers by those of a bank, which becomes its submodule ``bank``.

        In an ``nn.Sequential`` that is the last module. Layers that are not trained stay.

        Raises:
            ValueError: the budget is smaller than what the network keeps for itself, or larger than its parameters;
                layers share weights, or differ in dtype or device; the network has a ``bank``, or is a list.
        """
        if hasattr(network, "bank") or isinstance(network, nn.ModuleList | nn.ModuleDict):
            raise ValueError(f"network: expected a module that can take a submodule bank, got {type(network).__name__}")
        layers = replaceable_layers(network)
        if not layers:
            raise ValueError("network: expected trained convolutions or linear layers before the classifier, got none")
        if len(kinds := {(layer.weight.dtype, layer.weight.device) for layer in layers.values()}) > 1:
            raise ValueError(f"network: expected layers of one dtype on one device, got {kinds}")
        own = count_parameters(network)
        budget = self.budget if isinstance(self.budget, int) else round(self.budget * own)
        shapes = {name: conv_shape(layer) for name, layer in layers.items()}
        kept = own - sum(math.prod(shape) for shape in shapes.values())
        clusters = self._clusters(shapes, budget, kept)
        like = next(iter(layers.values())).weight
        bank = SuperWeightBank({c.name: c.size for c in clusters}, device=like.device, dtype=like.dtype)
        slabs = {name: found for c in clusters for name, found in c.slabs().items()}
        for name, layer in layers.items():
            replace(network, name, from_bank(layer, bank, slabs[name]))
            _keep_own_rows(layer, bank, slabs[name])
        network.bank = bank.train(network.training)
        bank.attach(network)

    def _clusters(self, shapes: dict[str, Shape], budget: int, kept: int) -> list[_Cluster]:
        """Clusters with their sizes: bank and coefficients together are what the budget leaves."""
        by_kernel: dict[tuple[int, int], list[str]] = {}
        for name, shape in shapes.items():
            by_kernel.setdefault(shape[2:], []).append(name)
        clusters = []
        for (kh, kw), names in sorted(by_kernel.items(), reverse=True):  # 1 x 1 last
            for number, part in enumerate(_bins(names, self.bins)):
                clusters.append(_Cluster(f"{kh}x{kw}_{number}", {n: shapes[n] for n in part}, self.max_templates))
        coefficients, found = -1, 0  # their number depends on the bank's size, and the size on it
        while found > coefficients:
            coefficients = found
            _share(clusters, budget - kept - coefficients)
            found = sum(c.coefficients() for c in clusters)
        # Then exactly: with the templates as they are, more rows of layers' own only make fewer coefficients.
        while (before := budget - kept - sum(c.size + c.coefficients() for c in clusters)) > 0:
            left = before
            for c in clusters:  # 1 x 1 last: they can spend any rest
                left -= c.grow(left)
            if left == before:
                break
        if before < 0:
            raise ValueError(f"budget: expected at least {budget - before} parameters with these bins, got {budget}")
        return clusters


@dataclass(frozen=True)
class Repeated:
    """Makes every convolution of a network repeat a smaller weight (RepeatNet, arXiv 2101.05650).

    Args:
        tiles: how often a weight is repeated over its output and its input channels; sizes are rounded up.
        modulation: of :class:`~spin_kernels.nn.RepeatConv2d`, with ``options`` of it, such as ``drop_rate``.
        first: whether the first convolution, that of the image, is repeated, too.
    """

    tiles: tuple[int, int] = (2, 2)
    modulation: str = "swish"
    first: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (
            not isinstance(self.tiles, tuple | list)
            or len(self.tiles) != 2
            or not all(isinstance(n, int) and n > 0 for n in self.tiles)
        ):
            raise ValueError(f"tiles: expected two positive integers, got {self.tiles!r}")

    def apply(self, network: nn.Module) -> None:
        """Replaces the network's convolutions but grouped and dilated ones; linear layers stay.

        Raises:
            ValueError: convolutions share weights.
        """
        layers = [(n, m) for n, m in own_layers(network) if isinstance(m, nn.Conv2d)]
        for name, layer in layers if self.first else layers[1:]:
            if is_plain(layer) and layer.dilation == (1, 1):
                replace(network, name, self._repeated(layer).train(layer.training))

    def _repeated(self, layer: nn.Conv2d) -> RepeatConv2d:
        out, into = layer.out_channels, layer.in_channels
        base = -(-out // self.tiles[0]), -(-into // self.tiles[1])
        sides: Any = layer  # torch's types say less than its layers: these are pairs
        return RepeatConv2d(
            into, out, sides.kernel_size, base, sides.stride, sides.padding, layer.bias is not None,
            modulation=self.modulation, device=layer.weight.device, dtype=layer.weight.dtype, **self.options,
        )  # fmt: skip


# Modulation in the modules of this package, by the names of the parameters.
_MODULATION = {
    RepeatConv2d: ("alpha", "beta", "sign", "sign_rows", "sign_columns"),
    SuperConv2d: ("alpha", "beta"),
    SuperLinear: ("alpha", "beta"),
    SharedMixer: ("dw_affine", "pw_affine", "pw_gain", "pw_coefficients", "pw_reduction"),
}


def train_modulation_only(network: nn.Module, head: nn.Module | None = None) -> list[nn.Parameter]:
    """Freezes the weights that are shared or repeated and all others but modulation, BatchNorm and the classifier.

    This is RepeatNet's stage on a frozen base (arXiv 2101.05650). ``network.requires_grad_(True)`` ends it.

    Args:
        network: any network; its bank's coefficients, alphas, betas, signs and gains are modulation.
        head: the classifier; None is the last linear layer.

    Returns:
        The parameters that are still trained, for an optimizer.
    """
    modules = list(network.modules())
    if head is None:
        head = next((m for m in reversed(modules) if isinstance(m, nn.Linear)), None)
    trained = [] if head is None else list(head.parameters())
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm | Coefficients):
            trained += module.parameters()
        for kind, names in _MODULATION.items():
            if isinstance(module, kind):
                trained += [p for name in names if (p := getattr(module, name, None)) is not None]
    trained = list(dict.fromkeys(trained))
    network.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


# --- how a bank is spent


class _Cluster:
    """Layers of one kernel size, and how a given number of values serves them."""

    def __init__(self, name: str, shapes: dict[str, Shape], max_templates: int) -> None:
        self.name, self.shapes, self.max_templates = name, shapes, max_templates
        self.largest = max(shapes.values(), key=math.prod)
        self.taps = self.largest[2] * self.largest[3]
        self.own = sum(math.prod(shape) for shape in shapes.values())
        self.size = self.templates = 0
        self.block = self.largest[:2]

    def take(self, values: int) -> None:
        """Sets the size, in whole filters, and with it the templates: the largest block of which there are two."""
        self.size = max(values // self.taps, 1) * self.taps
        out, into = self.largest[:2]
        # Cut by rows: rows of a layer's own then leave a whole tile, in which all of a template is used.
        for o, i in [(-(-out // n), into) for n in range(1, out + 1)] + [
            (1, -(-into // n)) for n in range(2, into + 1)
        ]:
            users = sum(-(-s[0] // o) * -(-s[1] // i) for s in self.shapes.values())
            templates = min(self.size // (o * i * self.taps), users, self.max_templates)
            if templates >= min(2, users):
                break
        self.block, self.templates = (o, i), max(1, templates)

    def grow(self, values: int) -> int:
        """Adds up to so many values without other templates, and returns how many."""
        more = min(values, self.own - self.size) // self.taps * self.taps
        self.size += more
        return more

    def slabs(self) -> dict[str, list[Slab]]:
        """The layers' slabs: tiles of templates first, then rows of the layer's own.

        Those go to the smallest layers, unless nobody else uses a part of the templates.
        """
        names = sorted(self.shapes, key=lambda name: math.prod(self.shapes[name]))
        for first in range(len(names)):
            slabs = self._slabs(names[first:] + names[:first])
            if self._uses_all(slabs):
                return slabs
        return self._slabs(names)

    def _uses_all(self, slabs: dict[str, list[Slab]]) -> bool:
        made = [slab for slab in itertools.chain.from_iterable(slabs.values()) if slab.coefficients is not None]
        if any((slab.out, slab.in_channels) == self.block for slab in made):
            return True
        used = torch.zeros(self.block, dtype=torch.bool, device="cpu")
        for slab in made:
            row, column = divmod(slab.start // self.taps, self.block[1])
            used[row : row + slab.out, column : column + slab.in_channels] = True
        return bool(used.all())

    def _slabs(self, names: list[str]) -> dict[str, list[Slab]]:
        (o, i), templates = self.block, self.templates
        size = o * i * self.taps
        spare = (self.size - templates * size) // self.taps  # filters
        at = self.size - spare * self.taps
        result = {}
        for name in names:
            out, into = self.shapes[name][:2]
            keep = min(spare, out * into)
            spare -= keep
            rows, rest = divmod(out * into - keep, into)  # the filters that templates make, row by row
            below = rows + (rest > 0)
            found = []
            for a, b in itertools.product(range(0, out, o), range(0, into, i)):
                for region in ((0, 0, rows, into), (rows, 0, 1, rest)):
                    if part := _intersection((a, b, o, i), region):
                        start = ((part[0] - a) * i + part[1] - b) * self.taps
                        vector = f"{name}[{a // o},{b // i}]"
                        found.append(Slab(self.name, templates, start, size, *part[2:], i, *part[:2], vector))
            own = [(rows, rest, 1, into - rest)] if rest else []
            for row, column, height, width in (*own, (below, 0, out - below, into)):
                if height > 0:
                    found.append(Slab(self.name, 1, at, 0, height, width, width, row, column))
                    at += height * width * self.taps
            result[name] = found
        return result

    def coefficients(self) -> int:
        slabs = [slab for found in self.slabs().values() for slab in found if slab.coefficients is not None]
        return sum({slab.coefficients: slab.templates for slab in slabs}.values())


def _share(clusters: list[_Cluster], values: int) -> None:
    """Sets the clusters' sizes, each like its part of the weights and in whole filters."""
    own = sum(c.own for c in clusters)
    if not sum(c.taps for c in clusters) <= values <= own:
        raise ValueError(
            f"budget: expected to leave from a filter per cluster to {own} values for the bank, got one that leaves "
            f"{values}"
        )
    left, later = values, sum(c.taps for c in clusters)
    for c in clusters:
        # 1 x 1 keep room for the rest, which may be no whole filter of others; each cluster has one.
        room = (max(c.taps for c in clusters) - 1) * (c.taps == 1)
        later -= c.taps
        c.take(min(left - later, values * c.own // own, c.own - room))
        left -= c.size


def _intersection(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """Of two rectangles (row, column, rows, columns)."""
    row, column = max(a[0], b[0]), max(a[1], b[1])
    rows, columns = min(a[0] + a[2], b[0] + b[2]) - row, min(a[1] + a[3], b[1] + b[3]) - column
    return (row, column, rows, columns) if rows > 0 and columns > 0 else None


def _bins(names: list[str], bins: int) -> Iterator[list[str]]:
    """As many runs of names, as equal in length as can be."""
    bins = min(bins, len(names))
    for n in range(bins):
        yield names[n * len(names) // bins : (n + 1) * len(names) // bins]


@torch.no_grad()
def _keep_own_rows(layer: Layer, bank: SuperWeightBank, slabs: list[Slab]) -> None:
    """Rows that templates do not make begin with the values that the layer had."""
    weight = layer.weight.view(conv_shape(layer))
    for slab in slabs:
        if slab.coefficients is None:
            rows, columns = slice(slab.out_offset, slab.out_offset + slab.out), slab.in_offset
            own = weight[rows, columns : columns + slab.in_channels].flatten()
            first = bank.place(slab.cluster).start + slab.start
            bank.templates[first : first + len(own)] = own
