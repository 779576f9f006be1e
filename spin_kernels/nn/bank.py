"""Banks of templates, and the weights that are combinations of them (SuperWeight Networks, arXiv 2312.01280)."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, ops
from .base import Freezable
from .coefficients import Coefficients, EmbeddedCoefficients, TrainedCoefficients

MOST_TEMPLATES = 8  # that a layer combines unless it asks for more, as in the published code


class Slab(NamedTuple):
    """A rectangle of a layer's weight, and the templates of a cluster that it is a combination of.

    weight[out_offset + o, in_offset + i] = sum_k c[k] * template_k[o, i] for o < out and i < in_channels, where
    template k is the (.., row, kh, kw) that begins at value ``start + k * stride`` of the cluster, row >= in_channels:
    a slab may be a corner of its templates. ``coefficients`` names the vector c within the cluster, by which slabs of
    any layers share it; None is the mean of the templates, without parameters.
    """

    cluster: str
    templates: int
    start: int
    stride: int
    out: int
    in_channels: int
    row: int
    out_offset: int = 0
    in_offset: int = 0
    coefficients: str | None = None


class _Plan(NamedTuple):
    """What the operator is asked for, and what follows bank and coefficients: turned windows, vectors of 1 / T."""

    composition: str  # pieces and shapes
    turned: tuple[tuple[int, int, int], ...]  # first value, number of values, side of their filters
    averages: tuple[int, ...]


class _Step(NamedTuple):
    """The weights of a forward pass, and who may use them: calls of its thread, with gradients if it has them."""

    network: nn.Module
    thread: int | None
    with_gradients: bool
    weights: dict[int, Tensor]


class SuperWeightBank(Freezable):
    """Clusters of trainable numbers, and the weights of all layers that are combinations of them.

    Layers (:class:`SuperConv2d`, :class:`SuperLinear`, :class:`SharedMixer`) join a bank when they are made and do not
    own it; the network does, and calls :meth:`attach`, after which one launch per forward pass makes all its weights::

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.bank = SuperWeightBank({"c0": 4 * 64 * 64 * 9})
                self.conv1 = SuperConv2d(64, 64, 3, padding=1, bank=self.bank, cluster="c0")
                self.conv2 = SuperConv2d(64, 64, 3, padding=1, bank=self.bank, cluster="c0")
                self.bank.attach(self)

    Make the optimizer after the layers: a layer that joins replaces the coefficients by longer ones.

    Args:
        sizes: the number of values of each cluster, by its name.
        rotations: 2 adds to every template of a square kernel larger than 1 its copy turned by -90 degrees, 4 those
            turned by 90 and by 180 degrees too; T templates then take T * rotations coefficients, turn by turn.
        embedding: the length E of coefficient embeddings: a vector of T coefficients is then a linear map, one for
            each cluster and T, of E trained values. None trains the coefficients themselves.

    Parameters: templates (P,), the clusters one after another, and those of ``coefficients``, which stay float32 (or
    float64). Each weight starts with the variance that ``nn.init.kaiming_normal_`` would give it. ``layers`` holds the
    shape and the slabs of every layer, by its number.

    :meth:`freeze` keeps the weights as they are composed then, until ``train()``, ``to()`` or a new state dict.

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    # One flat parameter for all clusters, as the operator reads it: a parameter per cluster would read better in a
    # state dict, but have to be copied together at every step, a pass over the bank.

    plan: Any  # where spin.search.apply made the bank: the spin.Plan that it follows

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        rotations: int = 1,
        embedding: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sizes, Mapping) or not sizes:
            raise TypeError(f"sizes: expected the sizes of one or more clusters by their names, got {sizes!r}")
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"sizes: expected a positive integer for cluster {name!r}, got {size!r}")
        if rotations not in (1, 2, 4):
            raise ValueError(f"rotations: expected 1, 2 or 4, got {rotations!r}")
        if embedding is not None and (not isinstance(embedding, int) or embedding < 1):
            raise ValueError(f"embedding: expected a positive integer or None, got {embedding!r}")
        self.sizes, self.rotations = dict(sizes), rotations
        dtype = dtype if dtype is not None else torch.get_default_dtype()
        state = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
        self.coefficients: Coefficients = (
            TrainedCoefficients(**state) if embedding is None else EmbeddedCoefficients(embedding, **state)
        )
        self.templates = nn.Parameter(torch.empty(sum(sizes.values()), device=device, dtype=dtype))
        nn.init.normal_(self.templates, std=0.02)  # until a layer joins
        self.layers: list[tuple[tuple[int, ...], tuple[Slab, ...]]] = []
        self._plans: dict[tuple[int, ...], _Plan] = {}  # of the layers that were composed together
        self._deviations: dict[str, float] = {}  # that the templates of a cluster started with
        self._step: _Step | None = None
        self._drop_packed_on_load()

    # --- layers join

    def add(self, shape: Sequence[int], slabs: Iterable[Slab], fan_in: int | None = None) -> int:
        """Adds a layer, whose weight (out, in, kh, kw) the slabs tile, and returns its number.

        Args:
            fan_in: the number of inputs of an output channel, which decides how large the weight's values start; None
                is in * kh * kw. A weight that is repeated over more channels has more.

        Raises:
            ValueError: the slabs leave a gap, overlap or reach past their cluster, or share a vector of another length.
        """
        shape, slabs = tuple(shape), tuple(slabs)
        for number, slab in enumerate(slabs):
            self._check(number, slab, shape)
        places = [(s.out_offset, s.in_offset, s.out, s.in_channels, s.row) for s in slabs]
        checks.superweight_plan(tuple(n for at in places for n in (0, 0, 0, 1, 0, *at)), shape)
        vectors: dict[tuple[str, str], int] = {}  # all lengths are checked before anything changes
        for slab in slabs:
            if slab.coefficients is not None:
                key, count = (slab.cluster, slab.coefficients), slab.templates * self._turns(shape)
                self.coefficients.check(key, count)
                if vectors.setdefault(key, count) != count:
                    raise ValueError(f"coefficients: expected one length of {key[1]!r}, got {vectors[key]} and {count}")
        deviation = math.sqrt(2 / (fan_in or math.prod(shape[1:])))
        for slab in slabs:
            if slab.cluster not in self._deviations:
                self._deviations[slab.cluster] = deviation
                with torch.no_grad():
                    self.templates[self.place(slab.cluster)].normal_(0, deviation)
        for key, count in vectors.items():
            self.coefficients.add(key, count, deviation / self._deviations[key[0]])
        self.layers.append((shape, slabs))
        self._plans.clear()
        self.unfreeze()
        return len(self.layers) - 1

    def add_matrices(self, count: int, dim: int, cluster: str) -> tuple[int]:
        """Adds ``count`` square matrices, each with coefficients of its own, as one layer (count * dim, dim, 1, 1)."""
        name, slabs = f"layer{len(self.layers)}", []
        for s in range(count):
            one = tile((dim, dim, 1, 1), self, cluster, coefficients=f"{name}.{s}")
            slabs += [slab._replace(out_offset=s * dim) for slab in one]
        return (self.add((count * dim, dim, 1, 1), slabs),)

    def _check(self, number: int, slab: Slab, shape: tuple[int, ...]) -> None:
        if slab.cluster not in self.sizes:
            raise ValueError(f"cluster: expected one of {', '.join(self.sizes)}, got {slab.cluster!r} in slab {number}")
        taps, size = shape[2] * shape[3], self.sizes[slab.cluster]
        last = slab.start + (slab.templates - 1) * slab.stride
        whole = ((slab.out - 1) * slab.row + slab.in_channels) * taps
        # Whole filters are turned, of which the slab itself may only use a corner.
        turned = self._turns(shape) > 1
        end = last + (slab.stride if turned else whole)
        if slab.templates < 1 or min(slab.start, slab.stride) < 0 or end > size:
            raise ValueError(
                f"slab {number}: expected templates within the {size} values of cluster {slab.cluster!r}, got "
                f"{slab.templates} from {slab.start} to {end}, {slab.stride} apart"
            )
        if turned and (slab.stride < whole or slab.stride % taps):
            raise ValueError(
                f"slab {number}: expected whole filters, {whole} values or more, from template to template to turn, "
                f"got {slab.stride}"
            )

    def _turns(self, shape: Sequence[int]) -> int:
        return self.rotations if shape[2] == shape[3] > 1 else 1

    def place(self, name: str) -> slice:
        """Where a cluster's values are in ``templates``."""
        first = 0
        for cluster, size in self.sizes.items():
            if cluster == name:
                return slice(first, first + size)
            first += size
        raise KeyError(name)

    def forward(self, x: Tensor) -> Tensor:
        """x itself: a bank may be the last module of an ``nn.Sequential``."""
        return x

    # --- weights

    def weight(self, layer: int) -> Tensor:
        """A layer's weight (out, in, kh, kw): of this forward pass of an attached network, or made for this call."""
        if self.is_frozen:
            if self._packed.value is None and not torch.compiler.is_compiling():  # a copy of a frozen bank
                self.freeze()
            if self._packed.value is not None:
                return self._packed.value[layer]
        step = self._step
        now = _thread(), torch.is_grad_enabled()
        if step is not None and (step.thread, step.with_gradients) == now and layer in step.weights:
            return step.weights[layer]
        if torch.compiler.is_compiling():
            return self.compose([layer])[0]
        # Checkpointed segments compose again in backward, and would miss what they had not saved in forward.
        with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            return self.compose([layer])[0]

    def compose(self, layers: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """The weights (out, in, kh, kw) of these layers, by default all, in one launch, with gradients."""
        layers = tuple(range(len(self.layers)) if layers is None else layers)
        if layers not in self._plans:
            self._plans[layers] = self._plan(layers)
        plan = self._plans[layers]
        bank: Tensor = self.templates
        coefficients = self.coefficients()
        if plan.turned:
            bank = torch.cat((bank, *(self._turn(*window) for window in plan.turned)))
        if plan.averages:
            means = [coefficients.new_full((count,), 1 / count) for count in plan.averages]
            coefficients = torch.cat((coefficients, *means))
        return ops.compose_layers(bank, coefficients, plan.composition)

    def _plan(self, layers: tuple[int, ...]) -> _Plan:
        pieces: list[int] = []
        shapes: list[int] = []
        turned: dict[tuple[int, int, int], int] = {}
        averages: dict[int, int] = {}
        end, first_average = len(self.templates), sum(self.coefficients.lengths.values())
        for number, layer in enumerate(layers):
            shape, slabs = self.layers[layer]
            shapes += shape
            for slab in slabs:
                base, templates = self.place(slab.cluster).start + slab.start, slab.templates
                if self._turns(shape) > 1:
                    window = (base, templates * slab.stride, shape[2])
                    if window not in turned:
                        turned[window] = end
                        end += window[1] * self.rotations
                    base, templates = turned[window], templates * self.rotations
                if slab.coefficients is not None:
                    coefficient = self.coefficients.start((slab.cluster, slab.coefficients))
                else:
                    coefficient = averages.setdefault(templates, first_average + sum(averages))
                corner = (slab.out_offset, slab.in_offset, slab.out, slab.in_channels, slab.row)
                pieces += [number, base, slab.stride, templates, coefficient, *corner]
        return _Plan(checks.composition_text(pieces, shapes), tuple(turned), tuple(averages))

    def _turn(self, first: int, count: int, side: int) -> Tensor:
        filters = self.templates[first : first + count].view(-1, side, side)
        quarters = (0, -1, 1, 2)[: self.rotations]
        return torch.cat([torch.rot90(filters, quarter, (1, 2)) for quarter in quarters]).flatten()

    # --- one launch for a network

    def attach(self, network: nn.Module) -> None:
        """Makes the weights of all layers in ``network`` at once, at the beginning of each of its forward passes."""
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end, always_call=True)

    def detach(self, network: nn.Module) -> None:
        """Undoes :meth:`attach`."""
        for hooks in (network._forward_pre_hooks, network._forward_hooks):
            for number, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del hooks[number]
                    network._forward_hooks_always_called.pop(number, None)

    def _begin(self, network: nn.Module, _: Any) -> None:
        # Of this network itself: a pass that was interrupted.
        if (self._step is None or self._step.network is network) and not self.is_frozen:
            layers = [n for m in network.modules() if isinstance(m, FromBank) and m.bank is self for n in m.bank_layers]
            weights = dict(zip(layers, self.compose(layers), strict=True))
            self._step = _Step(network, _thread(), torch.is_grad_enabled(), weights)

    def _end(self, network: nn.Module, *_: Any) -> None:
        if self._step is not None and self._step.network is network:
            self._step = None

    def _pack(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.compose()]

    def extra_repr(self) -> str:
        text = ", ".join(f"{name}: {size}" for name, size in self.sizes.items())
        return f"{text}, layers={len(self.layers)}" + (f", rotations={self.rotations}" if self.rotations > 1 else "")


def _thread() -> int | None:
    return None if torch.compiler.is_compiling() else threading.get_ident()


def _itself(t: Tensor) -> Tensor:
    return t


class FromBank:
    """A module with weights from a bank that it does not own: the bank is no submodule of it."""

    bank_layers: tuple[int, ...] = ()

    def _join(self, bank: SuperWeightBank, *layers: int) -> None:
        self._bank, self.bank_layers = (bank,), layers  # a tuple: nn.Module would register the bank itself

    @property
    def bank(self) -> SuperWeightBank | None:
        return self._bank[0] if self.bank_layers else None


def tile(
    shape: tuple[int, int, int, int],
    bank: SuperWeightBank,
    cluster: str,
    templates: int | None = None,
    block: tuple[int, int] | None = None,
    start: int = 0,
    coefficients: str | None = None,
) -> list[Slab]:
    """Slabs of a layer (out, in, kh, kw) from the templates (o, i, kh, kw) of one cluster.

    Args:
        templates: how many templates the layer combines; None is as many as follow ``start``, at most 8.
        block: (o, i) of the templates; None is the layer's own. A larger layer is tiled by them (the last tiles may be
            partial), each tile with coefficients of its own; a narrower one takes their corner.
        start: where the first template begins within the cluster.
        coefficients: names the vectors, which layers share by their name; None gives the layer vectors of its own.

    Raises:
        ValueError: the cluster is unknown or has no room for the templates.
    """
    if cluster not in bank.sizes:
        raise ValueError(f"cluster: expected one of {', '.join(bank.sizes)}, got {cluster!r}")
    out, into, kh, kw = shape
    o, i = (out, into) if block is None else block
    if min(o, i) < 1 or start < 0:
        raise ValueError(f"block, start: expected positive sizes and a start of at least 0, got {block} and {start}")
    size, room = o * i * kh * kw, bank.sizes[cluster] - start
    if templates is None:
        templates = min(room // size, MOST_TEMPLATES)
    if templates < 1 or templates * size > room:
        raise ValueError(
            f"cluster: expected room for {max(1, templates)} templates of {size} values, got {max(0, room)} values in "
            f"{cluster!r}; give it more, or a smaller block=(o, i)"
        )
    name = coefficients if coefficients is not None else f"layer{len(bank.layers)}"
    slabs: list[Slab] = []
    for a in range(0, out, o):
        for b in range(0, into, i):
            vector = name if out <= o and into <= i else f"{name}.{len(slabs)}"
            corner = (min(o, out - a), min(i, into - b), i, a, b)
            slabs.append(Slab(cluster, templates, start, size, *corner, vector))
    return slabs
