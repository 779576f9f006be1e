"""Which layers of several networks start with the same coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

from .clusters import Cluster
from .joining import Partner

Bank = tuple[int, int]  # cluster, level
SHARINGS = ("own", "position", "cluster")


def coefficient_vectors(
    clusters: Sequence[Cluster], sharing: str = "position", partners: Sequence[Mapping[int, Partner]] = ()
) -> list[dict[Bank, list[int]]]:
    """Gives each level of each layer a coefficient vector; equal numbers mean the same one.

    Args:
        clusters: of the networks.
        sharing: ``"own"``: no layer shares; ``"position"``: layers at one position of a cluster share with that of
            the first network that has the bank; ``"cluster"``: all users of a bank share one vector.
        partners: with ``"position"``, for each network whose coefficients its layers use instead, from
            :func:`~spin_kernels.search.joining.assign_clusters`; empty for networks that go by position.

    Returns:
        For each network and bank (cluster, level) the vectors of the layers that have the level, in their order, as
        :func:`~spin_kernels.search.unsharing.unshare_vectors` takes them.

    Raises:
        ValueError: there are no clusters, ``sharing`` is unknown, or a layer has no partner in an earlier network.
    """
    if not clusters:
        raise ValueError("clusters: expected one or more, got none; build them from networks with layers")
    if sharing not in SHARINGS:
        raise ValueError(f"sharing: expected one of {', '.join(SHARINGS)}, got {sharing!r}; choose one of them")
    networks = len(clusters[0].members)
    if partners and (len(partners) != networks or sharing != "position"):
        raise ValueError(
            f"partners: expected those of {networks} networks that share by position, or none at all, got "
            f"{len(partners)} with sharing {sharing!r}; give an empty dictionary for a network without"
        )
    fresh = count()
    result: list[dict[Bank, list[int]]] = [{} for _ in range(networks)]
    for cluster in clusters:
        for level in range(len(cluster.levels)):
            one = next(fresh) if sharing == "cluster" else 0  # for all users of the bank
            vectors: list[dict[int, int]] = []  # for each network by position in the cluster
            for network in range(networks):
                users = [at for at, _ in cluster.users(level, network)]
                shared: Mapping[int, int] = {}
                if sharing == "cluster":
                    shared = dict.fromkeys(users, one)
                elif partners and partners[network]:
                    shared = _of_partners(cluster, level, network, partners, vectors)
                elif sharing == "position":
                    shared = next((found for found in vectors if found), {})
                vectors.append({at: shared[at] if at in shared else next(fresh) for at in users})
                if users:
                    result[network][cluster.number, level] = list(vectors[network].values())
    return result


def _of_partners(
    cluster: Cluster,
    level: int,
    network: int,
    partners: Sequence[Mapping[int, Partner]],
    vectors: Sequence[Mapping[int, int]],
) -> dict[int, int]:
    """The vectors of earlier networks that a network's layers take over, by the layers' positions."""
    wanted: dict[int, Partner] = {}
    for at, member in cluster.users(level, network):
        partner = partners[network].get(member.layer)
        if partner is None or not 0 <= partner.network < network:
            raise ValueError(
                f"partners: expected one in an earlier network for layer {member.layer} of network {network}, got "
                f"{partner}; give every layer one, or none of the network"
            )
        wanted[at] = partner
    if not wanted:
        return {}
    # As published the partner of the bank's first layer says for all of them which network that is.
    found = vectors[next(iter(wanted.values())).network]
    positions = {at: partner.position for at, partner in wanted.items()}
    if not found:  # its layers are not that large, but those of another network with the same partners may be
        other = next((n for n in range(1, network) if vectors[n] and partners[n]), None)
        if other is None:
            return {}
        found = vectors[other]
        at_partner: dict[int | None, int] = {}
        for at, member in cluster.users(level, other):
            at_partner.setdefault(partners[other][member.layer].position, at)
        positions = {at: None if of is None else at_partner.get(of) for at, of in positions.items()}
    return {at: found[of] for at, of in positions.items() if of is not None and of in found}
