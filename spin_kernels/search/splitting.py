"""Clusters split where the gradients of their layers disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .priority import by_similarity, regroup
from .similarity import Layer, Similarities, Tensors

Clusters = Sequence[Mapping[int, Sequence[int]]]  # for each network the layers of each cluster, in an order of theirs
Queue = list[tuple[float, Layer, Layer]]


@dataclass(frozen=True)
class Split:
    """Clusters after a split.

    Attributes:
        clusters: for each network the layers of each new cluster, in the order of the clusters before.
        next_cluster: the first number that is free. As published every layer had a number, so there are gaps below.
    """

    clusters: tuple[dict[int, list[int]], ...]
    next_cluster: int


def layer_queues(
    gradients: Tensors,
    clusters: Clusters,
    weights: Tensors | None = None,
    similarities: Similarities | None = None,
) -> dict[int, Queue]:
    """Compares the layers of each cluster with one another; none of it depends on a threshold.

    Args:
        gradients: of the layers' weights (out, in, \\*kernel), for each network and layer.
        clusters: for each network the layers of each cluster.
        weights: of the same shapes, to compare gradients and weights.
        similarities: of these, kept from call to call; None compares anew.

    Returns:
        For each cluster a queue of pairs (similarity, first layer, second layer), the most similar last. As published
        every pair is there twice, in both orders.

    Raises:
        ValueError: a layer has no cluster or several, a cluster has no layers, or two cannot be compared; weights have
            other shapes.
    """
    compare = Similarities(gradients, weights) if similarities is None else similarities
    queues = {}
    for number, layers in layers_by_cluster(gradients, clusters, weights).items():
        pairs = [(first, second) for first in layers for second in layers if first != second]
        queues[number] = by_similarity((compare(*pair), *pair) for pair in pairs)
    return queues


def split_clusters(clusters: Clusters, queues: Mapping[int, Queue], threshold: float) -> Split:
    """Splits clusters so that layers stay together whose gradients are similar enough.

    Every layer starts in a cluster of its own, numbered in the order of the clusters, their networks and the layers as
    they are listed; then each queue puts similar ones together (:func:`~spin_kernels.search.priority.regroup`).

    Args:
        clusters: for each network the layers of each cluster; their order decides about the new numbers and ties.
        queues: of these clusters, from :func:`layer_queues`.
        threshold: the similarity above which two layers are put together.

    Raises:
        ValueError: the queues are not of these clusters, or the threshold is NaN.
    """
    numbers = sorted({number for network in clusters for number in network})
    if set(queues) != set(numbers):
        raise ValueError(f"queues: expected those of clusters {numbers}, got {sorted(queues)}; compare their layers")
    result: tuple[dict[int, list[int]], ...] = tuple({} for _ in clusters)
    following = 0
    for number in numbers:
        layers = [(n, layer) for n, network in enumerate(clusters) for layer in network.get(number, ())]
        own = {layer: following + at for at, layer in enumerate(layers)}
        following += len(layers)
        for (network, layer), new in regroup(own, queues[number], threshold).items():
            result[network].setdefault(new, []).append(layer)
    return Split(result, following)


def cluster_numbers(clusters: Clusters) -> list[list[int]]:
    """For each network the cluster number of each layer, as :func:`~.clusters.build_clusters` takes them."""
    found = [{layer: number for number, layers in network.items() for layer in layers} for network in clusters]
    return [[network[layer] for layer in sorted(network)] for network in found]


def largest_layers(gradients: Tensors, clusters: Clusters) -> dict[int, int]:
    """For each cluster the number of values of its largest layer: the least that it needs under the published rule."""
    largest: dict[int, int] = {}
    for network, found in enumerate(clusters):
        for number, layers in found.items():
            sizes = [gradients[network][layer].numel() for layer in layers]
            largest[number] = max(largest.get(number, 0), *sizes)
    return dict(sorted(largest.items()))


def layers_by_cluster(gradients: Tensors, clusters: Clusters, weights: Tensors | None) -> dict[int, list[Layer]]:
    """The layers of each cluster, of all networks, after a check of what else belongs to each layer.

    Raises:
        ValueError: a layer has no cluster or several, a cluster has no layers, or weights have other shapes.
    """
    if not clusters or len(clusters) != len(gradients):
        raise ValueError(
            f"clusters: expected those of each of {len(gradients)} networks with gradients, got {len(clusters)}; give "
            "one or more networks"
        )
    shapes = [[tuple(gradient.shape) for gradient in network] for network in gradients]
    if weights is not None and (got := [[tuple(weight.shape) for weight in network] for network in weights]) != shapes:
        raise ValueError(f"weights: expected one for each gradient, of shapes {shapes}, got {got}; give those compared")
    by_cluster: dict[int, list[Layer]] = {}
    for network, found in enumerate(clusters):
        for number, layers in found.items():
            if not layers:
                raise ValueError(
                    f"clusters: expected layers in cluster {number} of network {network}, got none; leave it out"
                )
            by_cluster.setdefault(number, []).extend((network, layer) for layer in layers)
        listed = sorted(layer for layers in found.values() for layer in layers)
        if listed != list(range(len(gradients[network]))):
            raise ValueError(
                f"clusters: expected each of the {len(gradients[network])} layers of network {network} once, got "
                f"{listed}; put every layer into one cluster"
            )
    return dict(sorted(by_cluster.items()))
