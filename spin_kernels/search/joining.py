"""Further networks join the clusters that the first one was split into."""

from __future__ import annotations

from dataclasses import dataclass

from .similarity import Similarities, Tensors
from .splitting import Clusters, layer_queues, layers_by_cluster, split_clusters


@dataclass(frozen=True)
class Partner:
    """Whose coefficients a layer uses.

    Attributes:
        network: that of the partner.
        position: of the partner among that network's layers in the cluster; None (published: -1) where the layer gets
            coefficients of its own.
    """

    network: int
    position: int | None


@dataclass(frozen=True)
class Assignment:
    """Clusters of several networks.

    Attributes:
        clusters: for each network the layers of each cluster, numbered from 0 on without gaps.
        partners: for each network that of each layer; the first network has none.
    """

    clusters: tuple[dict[int, list[int]], ...]
    partners: tuple[dict[int, Partner], ...]


def assign_clusters(
    gradients: Tensors,
    clusters: Clusters,
    threshold: float,
    coefficient_threshold: float | None = None,
    weights: Tensors | None = None,
    similarities: Similarities | None = None,
) -> Assignment:
    """Splits the first network's clusters and lets the other networks' layers join them (published: assign_groups).

    The first network of each further depth joins by similarity: each layer goes where that layer of the first network
    went that is the most similar of those that shared its cluster before, and becomes its partner. Networks of a depth
    that is there follow the first one of that depth, position by position.

    Args:
        gradients: of the layers' weights (out, in, \\*kernel), for each network and layer.
        clusters: for each network the layers of each cluster before the split.
        threshold: of the split.
        coefficient_threshold: the similarity above which a layer takes its partner's coefficients; None: it always
            does. As published a layer that follows by position takes those of its partner, but is judged by the most
            similar layer of the partner's cluster. (The published code only knows this for the first network's depth.)
        weights: of the same shapes, to compare gradients and weights.
        similarities: of these gradients and weights, kept from call to call; None compares anew.

    Raises:
        ValueError: a layer has no cluster or several, or one without layers in the network that it is compared with;
            a network is deeper than the first; two layers cannot be compared; weights have other shapes; the threshold
            is NaN.
    """
    layers_by_cluster(gradients, clusters, weights)
    depths = [len(network) for network in gradients]
    if max(depths) > depths[0]:
        raise ValueError(f"gradients: expected the deepest network first, got depths {depths}; sort them by depth")
    compare = Similarities(gradients, weights) if similarities is None else similarities
    split = split_clusters(clusters[:1], layer_queues(gradients[:1], clusters[:1], similarities=compare), threshold)
    joining = _Joining(compare, clusters, coefficient_threshold, split.clusters[0])
    leaders = {depths[0]: 0}
    for network in sorted(range(1, len(depths)), key=lambda n: -depths[n]):
        leader = leaders.setdefault(depths[network], network)
        joining.join(network, leader)
    used = sorted({number for network in joining.clusters for number in network})
    numbered = tuple(
        {new: network[number] for new, number in enumerate(used) if number in network} for network in joining.clusters
    )
    return Assignment(numbered, tuple(joining.partners))


class _Joining:
    """The clusters while networks join."""

    def __init__(
        self,
        similarities: Similarities,
        before: Clusters,
        coefficient_threshold: float | None,
        split: dict[int, list[int]],
    ) -> None:
        self.similarities, self.before = similarities, before
        self.coefficient_threshold = coefficient_threshold
        self.clusters: list[dict[int, list[int]]] = [split, *({} for _ in before[1:])]
        self.partners: list[dict[int, Partner]] = [{} for _ in before]
        self.numbers = {(0, layer): number for number, layers in split.items() for layer in layers}

    def join(self, network: int, leader: int) -> None:
        """Lets a network join: the leader of its depth by similarity, others like the leader, position by position."""
        leads = network == leader
        other = 0 if leads else leader
        for cluster in sorted(self.before[network]):
            layers, twins = (sorted(self.before[n].get(cluster, ())) for n in (network, other))
            if not twins or (not leads and len(layers) != len(twins)):
                raise ValueError(
                    f"clusters: expected layers of network {network} in cluster {cluster} to have their like in "
                    f"network {other}, got {len(layers)} and {len(twins)}; number the layers of both "
                    "alike, or use method='stable'"
                )
            for position, layer in enumerate(layers):
                similarity = None
                if leads or self.coefficient_threshold is not None:
                    similarity, partner = self._most_similar(network, layer, other, twins)
                if not leads:
                    partner = twins[position]
                self._join(network, layer, other, partner, similarity)

    def _most_similar(self, network: int, layer: int, other: int, twins: list[int]) -> tuple[float, int]:
        found = [(self.similarities((network, layer), (other, twin)), twin) for twin in twins]
        return max(found, key=lambda pair: pair[0])  # the first of equal ones

    def _join(self, network: int, layer: int, other: int, partner: int, similarity: float | None) -> None:
        number = self.numbers[network, layer] = self.numbers[other, partner]
        self.clusters[network].setdefault(number, []).append(layer)
        listed = self.clusters[other][number]
        # As published positions are those of the list where layers were compared, else those of the sorted list.
        position: int | None = (sorted(listed) if similarity is None else listed).index(partner)
        if self.coefficient_threshold is not None and similarity is not None:
            position = position if similarity > self.coefficient_threshold else None
        self.partners[network][layer] = Partner(other, position)
