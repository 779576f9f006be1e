"""The most templates that a budget buys for layers whose clusters are known, and blocks where it buys too few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .clusters import Cluster, Shape, build_clusters, deepest_first
from .coefficients import coefficient_vectors
from .joining import Partner
from .plans import Plan, PlannedLayer, layer_vectors
from .templates import spend


class OverBudgetError(ValueError):
    """No plan keeps the budget; ``least`` is what would do."""

    def __init__(self, least: int) -> None:
        super().__init__(f"budget: expected at least {least:,} parameters; raise it")
        self.least = least


@dataclass(frozen=True)
class Fitting:
    """How much may be spent, and how it is counted; see :func:`~.planning.plan`."""

    budget: int
    count: str
    strict: bool
    method: str
    max_templates: int

    def fit(
        self,
        layers: Sequence[Mapping[str, Shape]],
        numbers: Sequence[Sequence[int]],
        other_parameters: int,
        coefficients: str = "position",
        partners: Sequence[Mapping[int, Partner]] = (),
        *,
        repeat: bool = True,
        threshold: float | None = None,
    ) -> Plan:
        """The plan with the most templates that keeps the budget, for layers whose clusters are known.

        Args:
            layers: for each model the shapes of its layers by their names.
            numbers: for each model the clusters of its layers.
            coefficients, partners: of :func:`~.coefficients.coefficient_vectors`; partners for the deepest model first.
            repeat: whether clusters may get blocks that are repeated where ``strict`` needs them.

        Raises:
            OverBudgetError: no such plan keeps the budget.
        """
        order = deepest_first(layers)
        clusters = build_clusters([list(layers[n].values()) for n in order], [numbers[n] for n in order])
        partners = partners if coefficients == "position" and any(partners) else ()
        vectors = layer_vectors(clusters, coefficient_vectors(clusters, coefficients, partners))
        models = tuple(
            tuple(
                PlannedLayer(name, shape, number, vectors[order.index(n), at])
                for at, ((name, shape), number) in enumerate(zip(found.items(), numbers[n], strict=True))
            )
            for n, found in enumerate(layers)
        )
        settings: dict[str, Any] = {
            "budget": self.budget, "other_parameters": other_parameters, "count": self.count, "method": self.method,
            "max_templates": self.max_templates, "coefficients_of": coefficients, "threshold": threshold,
        }  # fmt: skip
        kept = other_parameters if self.count == "network" else 0

        def spent(blocks: Mapping[int, tuple[int, int]]) -> Plan:
            """As many templates as the budget buys for the clusters without blocks, and at least one for each level."""
            whole = [cluster for cluster in clusters if cluster.number not in blocks]
            beside = 0  # the number of coefficients depends on the banks, and what is left for banks on it
            while True:
                left = max(1, self.budget - kept - beside)
                banks = spend(whole, left) if whole else []
                templates = {(bank.cluster, bank.level): bank.templates for bank in banks}
                found = Plan(models, templates, blocks, strict=False, **settings)
                if found.spent <= self.budget or all(n == 1 for n in templates.values()):
                    return found
                beside += found.spent - self.budget

        found = spent({})
        if found.spent > self.budget and self.strict:
            if not repeat:
                raise OverBudgetError(found.spent)
            found = spent(_blocks(clusters, found, self.budget - kept, self.count == "network"))
        return replace(found, strict=self.strict)


# --- clusters with too few values for their largest layer


def _blocks(clusters: Sequence[Cluster], smallest: Plan, left: int, everything: bool) -> dict[int, tuple[int, int]]:
    """The blocks of the clusters that have to repeat one.

    A level of water: every cluster that needs more gets the largest block that stays below one limit, so that small
    clusters, such as the first layer's, stay whole. (The alternative, a part of the budget for each cluster like its
    part of the weights, would repeat in every cluster as soon as one has to.)
    """
    choices = [_Choices(cluster, smallest, everything) for cluster in clusters]
    least = sum(choice.least for choice in choices)
    if least > left:
        raise OverBudgetError(least + smallest.budget - left)
    low, high = 0, left  # the limit: sum(choice.at(low)) fits
    while low < high:
        limit = (low + high + 1) // 2
        low, high = (limit, high) if sum(c.best(limit)[0] for c in choices) <= left else (low, limit - 1)
    taken = [choice.best(low) for choice in choices]
    spare = left - sum(cost for cost, _ in taken)
    for n in sorted(range(len(choices)), key=lambda n: (-choices[n].whole, n)):  # what is left, largest first
        spare += taken[n][0]
        taken[n] = choices[n].best(taken[n][0] if spare < taken[n][0] else spare)
        spare -= taken[n][0]
    return {choice.number: block for choice, (_, block) in zip(choices, taken, strict=True) if block is not None}


class _Choices:
    """What a cluster can be made from, and what each of these costs."""

    def __init__(self, cluster: Cluster, smallest: Plan, everything: bool) -> None:
        self.number = cluster.number
        of_cluster = [layer for layers in smallest.models for layer in layers if layer.cluster == cluster.number]
        shapes: dict[Shape, int] = {}
        for layer in of_cluster:
            shapes[layer.shape] = shapes.get(layer.shape, 0) + 1
        vectors = len({layer.vectors[0] for layer in of_cluster})
        made = {
            (slab.cluster, slab.coefficients)
            for model, layers in enumerate(smallest.models)
            for number, layer in enumerate(layers)
            if layer.cluster == cluster.number
            for slab in smallest.slabs(model, number)
        }
        self.whole = sum(level.values for level in cluster.levels) + everything * len(made)
        # From one part of a layer's channels to the next the number of tiles stays, and the cost grows with the size.
        parts = [sorted({-(-m // n) for m in side for n in range(1, m + 1)}) for side in zip(
            *(shape[:2] for shape in shapes), strict=True)]  # fmt: skip
        self.rows, self.columns = np.meshgrid(*parts, indexing="ij")
        self.more = np.meshgrid(*(np.diff([*part, part[-1] + 1]) - 1 for part in parts), indexing="ij")
        self.taps = cluster.taps
        self.costs = self.rows * self.columns * self.taps
        if everything:
            self.costs += vectors
            for (out, into, *_), layers in shapes.items():
                tiles = -(-out // np.minimum(self.rows, out)) * -(-into // np.minimum(self.columns, into))
                self.costs += np.where(tiles > 1, 2 * tiles, 0) * layers
        self.least = min(self.whole, int(self.costs.min()))

    def best(self, limit: int) -> tuple[int, tuple[int, int] | None]:
        """The cost and the block of the most values within a limit; whole levels (None) or the least where none is."""
        limit = max(limit, self.least)
        if self.whole <= limit:
            return self.whole, None
        fits = self.costs <= limit
        rows, columns, costs = self.rows[fits], self.columns[fits], self.costs[fits]
        more_rows = np.minimum(self.more[0][fits], (limit - costs) // (columns * self.taps))
        more_columns = np.minimum(self.more[1][fits], (limit - costs) // (rows * self.taps))
        wider = rows * more_columns >= more_rows * columns
        more_rows[wider], more_columns[~wider] = 0, 0
        costs += ((rows + more_rows) * (columns + more_columns) - rows * columns) * self.taps
        rows, columns = rows + more_rows, columns + more_columns
        at = np.lexsort((-rows, costs, -rows * columns))[0]
        return int(costs[at]), (int(rows[at]), int(columns[at]))
