"""Clusters split alike in any order of their layers, with the least conflict between layers that stay together.

The published splitting (:mod:`.splitting`) takes pairs by their similarity and moves one layer of each, so that the
order of the layers decides, dissimilar layers may end up together and similar ones apart. Here a partition is judged as
a whole, by correlation clustering (Bansal, Blum and Chawla, Machine Learning 56, 2004): every pair that is together
adds threshold - similarity to its conflict, and the partition with the least conflict is looked for.

- Layers are joined by pairs from the threshold on; what these do not connect is apart in every best partition.
- Up to 13 connected layers: the best of all partitions, by dynamic programming over sets of layers.
- More: the best of what a search finds that merges clusters and moves layers one after another, as Kernighan and Lin do
  (Bell System Technical Journal 49, 1970), from several starts.

All of this is done with integers, on layers in an order of their own, so that the given order plays no part. It does in
one case: a search that found worse than the published partition, which depends on that order, starts again from it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import TypeVar

import numpy as np

from .joining import Assignment
from .partition import Integers, components, exact_partition, numbered, searched_partition
from .priority import regroup
from .similarity import Layer, Tensors, layer_similarity
from .splitting import Clusters, layers_by_cluster

Item = TypeVar("Item", bound=Hashable)
Similarities = Mapping[Item, Mapping[Item, float]]  # of each item with every other one, the same both ways

ONE = 2**40  # similarities become multiples of 1 / ONE: sums of floats depend on their order, which would decide ties
EXACT = 13  # the most that a tenth of a second is enough for; one more takes three times as long


def layer_similarities(
    gradients: Tensors, clusters: Clusters, weights: Tensors | None = None
) -> dict[int, dict[Layer, dict[Layer, float]]]:
    """Compares the layers of each cluster, of all networks, with one another; none of it depends on a threshold.

    Args:
        gradients: of the layers' weights (out, in, \\*kernel), for each network and layer.
        clusters: for each network the layers of each cluster.
        weights: of the same shapes, to compare gradients and weights, each over its own norm: the mean of both
            similarities. (The published one takes one norm for both layers' weights and depends on their order.)

    Returns:
        For each cluster and layer (network, number) its similarities with the cluster's other layers.

    Raises:
        ValueError: a layer has no cluster or several, a cluster has no layers, or two cannot be compared; weights have
            other shapes.
    """
    result: dict[int, dict[Layer, dict[Layer, float]]] = {}
    for number, layers in layers_by_cluster(gradients, clusters, weights).items():
        rows: dict[Layer, dict[Layer, float]] = {layer: {} for layer in layers}
        for pair in combinations(sorted(layers), 2):
            found = [layer_similarity(*pair, tensors) for tensors in (gradients, weights) if tensors is not None]
            first, second = pair
            rows[first][second] = rows[second][first] = sum(found) / len(found)
        result[number] = rows
    return result


def split_stably(
    clusters: Clusters,
    similarities: Mapping[int, Similarities[Layer]],
    threshold: float,
    names: Sequence[Sequence[str]] | None = None,
) -> Assignment:
    """Splits the clusters of all networks together, each into the partition of least conflict.

    Args:
        clusters: for each network the layers of each cluster.
        similarities: of the layers of these clusters, from :func:`layer_similarities`.
        threshold: the similarity from which on two layers gain by staying together.
        names: for each network those of its layers, all different; they decide between equally good partitions.

    Returns:
        Clusters numbered in the order of those before and their first layers, without gaps. There are no partners:
        layers share coefficients by position.

    Raises:
        ValueError: the similarities are not of these clusters, the names not of these layers, or the threshold is not
            finite.
    """
    members: dict[int, list[Layer]] = {}
    for n, network in enumerate(clusters):
        for number, found in network.items():
            members.setdefault(number, []).extend((n, layer) for layer in found)
    expected = {number: sorted(layers) for number, layers in sorted(members.items())}
    if (got := {number: sorted(rows) for number, rows in sorted(similarities.items())}) != expected:
        raise ValueError(f"similarities: expected those of clusters {expected}, got {got}; compare their layers")
    by_layer: dict[Layer, str] = {}
    if names is not None:
        by_layer = {(n, layer): name for n, network in enumerate(names) for layer, name in enumerate(network)}
        if sorted(by_layer) != (listed := sorted(layer for layers in expected.values() for layer in layers)):
            raise ValueError(f"names: expected one for each layer of {listed}, got {sorted(by_layer)}; name all layers")
    result: tuple[dict[int, list[int]], ...] = tuple({} for _ in clusters)
    following = 0
    for number, layers in expected.items():
        own = {layer: by_layer[layer] for layer in layers} if by_layer else None
        for part in sorted(map(sorted, least_conflict(similarities[number], threshold, own))):
            for n, layer in part:
                result[n].setdefault(following, []).append(layer)
            following += 1
    return Assignment(result, tuple({} for _ in clusters))


def conflict(partition: Iterable[Collection[Item]], similarities: Similarities[Item], threshold: float) -> float:
    """The sum of threshold - similarity over all pairs that are together in a partition; the less, the better.

    Args:
        partition: collections that together hold every item once.
        similarities: between -1 and 1, of every item with every other one.
        threshold: the similarity from which on two items gain by being together.

    Raises:
        ValueError: the partition is not one of these items, a similarity is missing, not between -1 and 1, or
            depends on the order of two items, or the threshold is not finite.
    """
    parts = [list(part) for part in partition]
    values, limit = _integers(similarities), _integer_threshold(threshold)
    at = {item: n for n, item in enumerate(similarities)}
    listed = [item for part in parts for item in part]
    if len(listed) != len(at) or set(listed) != set(at):
        raise ValueError(f"partition: expected each of {list(at)} once, got {parts}; put every item into one part")
    return sum(limit - int(values[at[i], at[j]]) for part in parts for i, j in combinations(part, 2)) / ONE


def least_conflict(
    similarities: Similarities[Item], threshold: float, names: Mapping[Item, str] | None = None
) -> list[list[Item]]:
    """The partition of least :func:`conflict`, of equal ones that with the fewest clusters.

    Of several such partitions it is the one in which the first item, in an order that does not depend on the given
    one, is with the earliest others, then the first of those left, and so on. (Searches only compare what they find.)

    Args:
        similarities: between -1 and 1, of every item with every other one.
        threshold: the similarity from which on two items gain by being together.
        names: of the items, all different: items go in the order of their names. None: in the order of their sorted
            similarities, and as given where those of several are equal.

    Returns:
        The clusters by their first items, items as given. Where more than 13 items are connected by similarities from
        the threshold on, the best of what a search found, never worse than the outcome of
        :func:`~spin_kernels.search.priority.regroup` with every pair in both orders.

    Raises:
        ValueError: a similarity is missing, not between -1 and 1, or depends on the order of two items, the threshold
            is not finite, or names are missing or not different.
    """
    values = _integers(similarities)
    # No similarity lies beyond these, so that the partition is the same; and 64 bits hold the sums of 2000 items.
    limit = min(max(_integer_threshold(threshold), -ONE - 1), ONE + 1)
    items = list(similarities)
    order = _own_order(items, values, names)
    gains = values[np.ix_(order, order)] - limit
    np.fill_diagonal(gains, 0)
    parts: list[list[int]] = []
    for component in components(gains >= 0):
        own, at = gains[np.ix_(component, component)], [order[n] for n in component]
        if len(at) <= EXACT:
            labels = exact_partition(own)
        else:
            published = _published(similarities, [items[n] for n in sorted(at)], threshold)
            labels = searched_partition(own, numbered(published[items[n]] for n in at))
        found: dict[int, list[int]] = {}
        for n, label in sorted(zip(at, labels.tolist(), strict=True)):
            found.setdefault(label, []).append(n)
        parts += found.values()
    return [[items[n] for n in part] for part in sorted(parts)]


def _integer_threshold(threshold: float) -> int:
    if not math.isfinite(threshold):
        raise ValueError(
            f"threshold: expected a finite number, got {threshold}; cosine similarities lie between -1 and 1"
        )
    return round(Fraction(threshold) * ONE)  # a float could overflow


def _integers(similarities: Similarities[Item]) -> Integers:
    """Similarities as multiples of 1 / ONE, (items, items), after a check."""
    for item, row in similarities.items():
        if row.keys() != similarities.keys() - {item}:
            raise ValueError(
                f"similarities: expected those of {item} with all others of {list(similarities)}, got {list(row)}; "
                "compare every two"
            )
    for i, j in combinations(similarities, 2):
        value, other = similarities[i][j], similarities[j][i]
        if not abs(value) < 1 + 1 / ONE:  # also NaN
            raise ValueError(
                f"similarities: expected numbers between -1 and 1, got {value} for {i} and {j}; take cosines, of "
                "gradients that are finite"
            )
        if value != other:
            raise ValueError(
                f"similarities: expected one of {i} and {j}, got {value} and {other}; take one that does not depend on "
                "their order"
            )
    rows = [[round(float(row.get(item, 0)) * ONE) for item in similarities] for row in similarities.values()]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(rows))


def _own_order(items: list[Item], values: Integers, names: Mapping[Item, str] | None) -> list[int]:
    if names is None:
        return sorted(range(len(items)), key=lambda n: (sorted(values[n].tolist()), n))
    if names.keys() != set(items) or len(set(names.values())) != len(items):
        raise ValueError(f"names: expected different ones for all of {items}, got {dict(names)}; name every item")
    return sorted(range(len(items)), key=lambda n: names[items[n]])


def _published(similarities: Similarities[Item], items: list[Item], threshold: float) -> dict[Item, int]:
    queue = [(similarities[i][j], i, j) for i in items for j in items if i != j]
    return regroup({item: n for n, item in enumerate(items)}, queue, threshold)
