"""How a budget of parameters becomes templates, and which of them a layer combines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .clusters import Cluster

MOST_TEMPLATES = 8  # that a budget buys for one bank, as published, whatever number a layer may combine


@dataclass(frozen=True)
class Bank:
    """The templates of one level of one cluster, one after another (published: a ParameterBank).

    Attributes:
        cluster, level: whose templates they are.
        values: the size of one template.
        users: the number of layers that have this level, of all networks.
        templates: their number.
    """

    cluster: int
    level: int
    values: int
    users: int
    templates: int = 1

    @property
    def size(self) -> int:
        """The number of trained values."""
        return self.templates * self.values


@dataclass(frozen=True)
class Window:
    """The templates of a bank that a layer combines: its values from ``start`` to ``end`` are ``templates`` of them."""

    cluster: int
    level: int
    templates: int
    start: int
    end: int


def smallest_banks(clusters: Sequence[Cluster]) -> list[Bank]:
    """One template for every level: the least that the published rule gives, enough for each cluster's largest layer.

    Raises:
        ValueError: there are no clusters.
    """
    if not clusters:
        raise ValueError("clusters: expected one or more, got none; build them from networks with layers")
    banks = []
    for cluster in clusters:
        for number, level in enumerate(cluster.levels):
            users = sum(len(cluster.users(number, network)) for network in range(len(cluster.members)))
            banks.append(Bank(cluster.number, number, level.values, users))
    return banks


def spend(clusters: Sequence[Cluster], budget: int) -> list[Bank]:
    """Spends a budget on templates: the banks of all levels, in the order of clusters and levels.

    Every bank gets one template, **also where that is more than the budget** (the published rule). Then each gets one
    more, round by round, first only those with more users than rounds so far, then all; at most 8 each.

    Args:
        clusters: of all networks that share the banks.
        budget: the number of values of all banks; coefficients and other parameters are not counted.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise ValueError(f"budget: expected a positive number of values, got {budget!r}; count templates only")
    banks = smallest_banks(clusters)
    left = budget - sum(bank.size for bank in banks)
    for by_users in (True, False):
        for rounds in range(1, MOST_TEMPLATES):
            for number, bank in enumerate(banks):
                wanted = bank.users > rounds if by_users else bank.templates < MOST_TEMPLATES
                if wanted and left > bank.values:  # as published a template that would use up the budget is not bought
                    banks[number] = replace(bank, templates=bank.templates + 1)
                    left -= bank.values
    return banks


def place_windows(
    clusters: Sequence[Cluster], banks: Sequence[Bank], max_templates: int, cover: bool = False
) -> list[dict[int, tuple[Window, ...]]]:
    """Chooses the templates that each layer combines, for the published ``share_type`` ``"..._slide"``.

    The layers of a network take a bank's templates in turn, ``max_templates`` of them each. As published they start
    over after ``max_templates`` windows at the latest, so that the last templates of a bank may have no user.

    Args:
        clusters: of the networks.
        banks: of these clusters, from :func:`spend`.
        max_templates: the most that a layer combines in each of its levels (published: max_candidates).
        cover: lets the windows go on to the bank's end, the last of them moved back to end with it.

    Returns:
        For each network the windows of the levels of each of its layers.

    Raises:
        ValueError: an argument is out of its range, or a bank is missing.
    """
    if not isinstance(max_templates, int) or isinstance(max_templates, bool) or max_templates < 1:
        raise ValueError(f"max_templates: expected a positive integer, got {max_templates!r}; 8 is usual")
    by_level = {(bank.cluster, bank.level): bank for bank in banks}
    needed = {(cluster.number, level) for cluster in clusters for level in range(len(cluster.levels))}
    if missing := sorted(needed - by_level.keys()):
        raise ValueError(
            f"banks: expected one for each level of each cluster, got none for {missing}; spend on these clusters"
        )
    networks = len(clusters[0].members) if clusters else 0
    found: list[dict[int, list[Window]]] = [{} for _ in range(networks)]
    for cluster in clusters:
        for level in range(len(cluster.levels)):
            bank = by_level[cluster.number, level]
            templates = min(bank.templates, max_templates)
            places = -(-bank.templates // templates) if cover else min(bank.templates // templates, templates)
            size = templates * bank.values
            for network in range(networks):
                for turn, (_, member) in enumerate(cluster.users(level, network)):
                    start = min(turn % places * size, bank.size - size)
                    window = Window(cluster.number, level, templates, start, start + size)
                    found[network].setdefault(member.layer, []).append(window)
    return [{layer: tuple(layers[layer]) for layer in sorted(layers)} for layers in found]
