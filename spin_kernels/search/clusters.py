"""Layers into clusters, and clusters into levels: which part of a weight is made from which templates.

A cluster holds layers of several sizes. Ordered from the smallest to the largest, each distinct shape is a level: level
0 makes the whole weight of the smallest layers, level w what the shape w has beyond the shape w - 1. A layer uses the
levels up to its own shape, so that a large layer contains what the small ones are made from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from itertools import pairwise

Shape = tuple[int, ...]  # (out, in, kh, kw) of a convolution, (out, in) of a linear layer
Shapes = Sequence[Sequence[int]]  # of a network's layers, in their order

BIN_TYPES = ("all_nets_groupslim_depth", "all_nets_groupslim_lpb")


@dataclass(frozen=True)
class Level:
    """A step from one shape of a cluster to its next larger one (published: a width).

    Attributes:
        shape: of the weights that end with this level.
        pieces: shapes of what it adds: ``pieces[0]`` are the output channels below the weight so far, ``pieces[1]``, if
            there are more input channels than before, those to its right, which come first in a template. As
            published ``pieces[0]`` may have no output channels, or fewer than none where the weight so far is cut.
    """

    shape: Shape
    pieces: tuple[Shape, ...]

    @property
    def values(self) -> int:
        """The size of one of its templates."""
        return sum(max(0, math.prod(piece)) for piece in self.pieces)


@dataclass(frozen=True)
class Member:
    """A layer of a cluster: its number in its network, the shape of its weight, how many levels make it."""

    layer: int
    shape: Shape
    levels: int


@dataclass(frozen=True)
class Rectangle:
    """A part of a weight and where it is in the templates of a level.

    ``weight[out_offset + o, in_offset + i]`` for o < out, i < in_channels is a combination of the values from
    ``skip + (o * row + i) * taps`` on of the level's templates; row >= in_channels where the weight was cut later.
    """

    level: int
    out_offset: int
    in_offset: int
    out: int
    in_channels: int
    row: int
    skip: int


@dataclass(frozen=True)
class Cluster:
    """Layers of one kernel size that share templates (published: a group).

    Attributes:
        number: of the cluster; numbers may have gaps.
        levels: smallest shape first.
        members: for each network its layers in this cluster, in their order.
    """

    number: int
    levels: tuple[Level, ...]
    members: tuple[tuple[Member, ...], ...]

    @property
    def taps(self) -> int:
        """The number of values of a filter of one input channel."""
        return math.prod(self.levels[0].shape[2:])

    def users(self, level: int, network: int) -> list[tuple[int, Member]]:
        """The members of a network that have a level, each with its position among the network's members."""
        return [(at, member) for at, member in enumerate(self.members[network]) if member.levels > level]

    def rectangles(self, member: Member) -> list[Rectangle]:
        """The parts that tile a member's weight."""
        rows, columns = member.shape[:2]
        if member.levels == 1:
            # As published a template is reshaped where all layers of a cluster have one size but not one shape.
            return [Rectangle(0, 0, 0, rows, columns, columns, 0)]
        found: list[Rectangle] = []
        rows = columns = 0
        for number, level in enumerate(self.levels[: member.levels]):
            out, into, *kernel = level.shape
            found = [_cut(part, out, into) for part in found]
            kept, skip = min(rows, out), 0
            if kept and into > columns:
                found.append(Rectangle(number, 0, columns, kept, into - columns, into - columns, 0))
                skip = kept * (into - columns) * math.prod(kernel)
            if out > rows:
                found.append(Rectangle(number, rows, 0, out - rows, into, into, skip))
            rows, columns = out, into
        return [part for part in found if part.out > 0 and part.in_channels > 0]


def deepest_first(networks: Sequence[Sized]) -> list[int]:
    """The numbers of the networks, or of anything with a length, in the order that the published rules go by."""
    return sorted(range(len(networks)), key=lambda n: -len(networks[n]))


def number_layers(networks: Sequence[Shapes], bins: int, bin_type: str = BIN_TYPES[0]) -> list[list[int]]:
    """Numbers the clusters of a first, coarse sharing: by kernel size and depth.

    Args:
        networks: the shapes of their layers, deepest network first.
        bins: for ``"all_nets_groupslim_depth"`` the number of clusters, of which each kernel size gets a part like its
            part of the first network's layers, at least one; each network cuts its layers of that size into as many
            runs of one length, the first runs one longer. For ``"all_nets_groupslim_lpb"`` the length of the runs.
        bin_type: one of these published names.

    Networks may lack kernel sizes that others have; the published code then puts different ones into one cluster.

    Returns:
        For each network the cluster number of each layer.

    Raises:
        ValueError: an argument is out of its range.
    """
    networks = _checked(networks)
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise ValueError(f"bins: expected a positive integer, got {bins!r}; 4 is usual")
    if bin_type not in BIN_TYPES:
        raise ValueError(f"bin_type: expected one of {', '.join(BIN_TYPES)}, got {bin_type!r}; choose one of them")
    numbers = [[0] * len(network) for network in networks]
    first = 0
    for kernel in _kernels_in_published_order(networks):
        layers = [[n for n, shape in enumerate(network) if shape[2:] == kernel] for network in networks]
        if bin_type == BIN_TYPES[0]:
            deepest = next(n for n, found in enumerate(layers) if found)
            count = max(1, round(bins * len(layers[deepest]) / len(networks[deepest])))
            runs = [_even_runs(len(found), count) for found in layers]
        else:
            count = max(-(-len(found) // bins) for found in layers)
            runs = [[bins] * count for _ in layers]
        for found, lengths, result in zip(layers, runs, numbers, strict=True):
            of_positions = [first + run for run, length in enumerate(lengths) for _ in range(length)]
            for layer, number in zip(found, of_positions, strict=False):
                result[layer] = number
        first += count
    return numbers


def build_clusters(networks: Sequence[Shapes], numbers: Sequence[Sequence[int]]) -> tuple[Cluster, ...]:
    """Builds the clusters of given numbers, in the order of the numbers.

    Args:
        networks: the shapes of their layers, deepest network first.
        numbers: for each network the cluster number of each layer, from :func:`number_layers` or a split.

    Raises:
        ValueError: networks and numbers do not fit, or a cluster has layers of several kernel sizes.
    """
    networks = _checked(networks)
    if [len(found) for found in numbers] != [len(network) for network in networks]:
        raise ValueError(
            f"numbers: expected a cluster number for each of {[len(network) for network in networks]} layers, got "
            f"{[len(found) for found in numbers]}; number the layers of the same networks"
        )
    layers: dict[int, list[tuple[int, int]]] = {}
    for network, found in enumerate(numbers):
        for layer, number in enumerate(found):
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ValueError(
                    f"numbers: expected integers from 0 on, got {number!r} for layer {layer} of network {network}; "
                    "give every layer a cluster"
                )
            layers.setdefault(number, []).append((network, layer))
    return tuple(_cluster(number, networks, layers[number]) for number in sorted(layers))


def _even_runs(layers: int, count: int) -> list[int]:
    length, longer = divmod(layers, count)
    return [length + (run < longer) for run in range(count)]


def _cluster(number: int, networks: Sequence[Sequence[Shape]], layers: list[tuple[int, int]]) -> Cluster:
    # Layers of one size stay in the order of their numbers: where such shapes differ, levels depend on it.
    order = sorted(layers, key=lambda at: (math.prod(networks[at[0]][at[1]]), at[1], at[0]))
    shapes = [networks[network][layer] for network, layer in order]
    if len(kernels := {shape[2:] for shape in shapes}) > 1:
        raise ValueError(
            f"numbers: expected layers of one kernel size in cluster {number}, got {sorted(kernels)}; keep them apart"
        )
    one_size = math.prod(shapes[0]) == math.prod(shapes[-1])  # as published then one level, whatever the shapes
    steps: list[Shape] = []
    members: list[list[Member]] = [[] for _ in networks]
    for (network, layer), shape in zip(order, shapes, strict=True):
        if not steps or (shape != steps[-1] and not one_size):
            steps.append(shape)
        members[network].append(Member(layer, shape, len(steps)))
    levels = [Level(steps[0], (steps[0],))]
    levels += [Level(shape, _pieces(before, shape)) for before, shape in pairwise(steps)]
    by_layer = tuple(tuple(sorted(found, key=lambda member: member.layer)) for found in members)
    return Cluster(number, tuple(levels), by_layer)


def _pieces(before: Shape, shape: Shape) -> tuple[Shape, ...]:
    below = (shape[0] - before[0], *shape[1:])
    if shape[1] <= before[1]:
        return (below,)
    return below, (min(before[0], shape[0]), shape[1] - before[1], *shape[2:])


def _cut(part: Rectangle, out: int, in_channels: int) -> Rectangle:
    """What is left of a part in a weight of so many channels."""
    rows, columns = min(part.out, out - part.out_offset), min(part.in_channels, in_channels - part.in_offset)
    return replace(part, out=rows, in_channels=columns)


def _kernels_in_published_order(networks: Sequence[Sequence[Shape]]) -> list[Shape]:
    """Kernel sizes as texts, so (1, 1), (11, 11), (3, 3): this order numbers the clusters."""
    kernels = {shape[2:] for network in networks for shape in network}
    return sorted(kernels, key=lambda kernel: " ".join(map(str, kernel)))


def _checked(networks: Sequence[Shapes]) -> list[list[Shape]]:
    checked = [[tuple(shape) for shape in network] for network in networks]
    if not checked or not all(checked):
        raise ValueError(
            f"networks: expected one or more networks with layers, got {len(checked)} with "
            f"{[len(network) for network in checked]} layers; leave out those without"
        )
    for number, network in enumerate(checked):
        for layer, shape in enumerate(network):
            if len(shape) < 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
                raise ValueError(
                    f"networks: expected shapes (out, in, *kernel) of positive integers, got {shape} for layer {layer} "
                    f"of network {number}; give the shapes of weights"
                )
    depths = [len(network) for network in checked]
    if depths != sorted(depths, reverse=True):
        raise ValueError(f"networks: expected the deepest network first, got depths {depths}; sort them by depth")
    return checked
