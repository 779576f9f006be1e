"""From models and a budget of parameters to a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from ..nn.bank import FromBank
from ..surgery import replaceable_layers
from .clusters import BIN_TYPES, Cluster, Shape, build_clusters, number_layers
from .coefficients import SHARINGS, coefficient_vectors
from .joining import Partner
from .plans import Plan, PlannedLayer, layer_vectors
from .templates import spend

Models = nn.Module | Sequence[nn.Module]
Numbers = Sequence[Mapping[str, int]]  # for each model the cluster of each layer, by its name
CLUSTERS = {"depth": BIN_TYPES[0], "length": BIN_TYPES[1]}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def plan(
    models: Models,
    budget: int | float | str,
    *,
    clusters: str | Mapping[str, int] | Numbers = "depth",
    bins: int = 4,
    max_templates: int = 8,
    count: str = "network",
    strict: bool = True,
    method: str = "paper",
    coefficients: str = "position",
) -> Plan:
    """Plans how the weights of models are made from one bank, so that a budget of parameters is kept.

    Trained ``nn.Conv2d`` and ``nn.Linear`` layers are planned (no grouped convolutions, no subclasses). The classifier,
    a model's last linear layer, keeps a weight of its own unless the budget cannot pay for it.

    Args:
        models: a model, or several that will share the bank.
        budget: the number of parameters of all models together, ``"4.5M"``, or a fraction of the models' own (a float,
            or ``"25%"``).
        clusters: ``"depth"``: the layers of a kernel size are cut into runs, ``bins`` clusters in all; ``"length"``:
            runs of ``bins`` layers; or for each model the number of the cluster of each layer, by its name: layers
            that are not named stay as they are.
        max_templates: the most that a layer combines in each level.
        count: ``"network"``: the budget is of all trained parameters; ``"bank"``: of templates only, as published.
        strict: never exceeds the budget. Where it is too small for one template of each cluster's largest layer, the
            largest clusters get one smaller block (o, i), which layers repeat over their channels with a modulation
            for every tile (:func:`~spin_kernels.functional.repeat_weight`). False: the published rule, which gives
            every cluster as much as its largest layer needs.
        method: ``"paper"``: the published allocation and, later, splits; ``"stable"``: windows reach all templates of
            a bank, and splits do not depend on the order of layers.
        coefficients: which layers start with the same vector: ``"position"``: those at one position of a cluster, in
            different models; ``"own"``: none; ``"cluster"``: all.

    Returns:
        The plan, for :func:`apply`.

    Raises:
        ValueError: an argument is out of its range, no plan keeps the budget, or models have no such layers.
    """
    networks = as_models(models)
    known = replaceable_all(networks)
    _check_plain(networks, known)
    if coefficients not in SHARINGS:
        raise ValueError(
            f"coefficients: expected one of {', '.join(SHARINGS)}, got {coefficients!r}; choose one of them"
        )
    fitting = Fitting(
        budget=_budget(budget, networks, count), count=count, strict=strict, method=method, max_templates=max_templates
    )
    tried = []
    for classifier in (False, True):
        layers = [
            {name: tuple(layer.weight.shape) for name, layer in replaceable_layers(network, classifier).items()}
            for network in networks
        ]
        if not isinstance(clusters, str):
            layers = _named(layers, known, clusters)
        if not all(layers):
            continue  # of models with a classifier only
        _check_owners(networks, layers)
        order = sorted(range(len(networks)), key=lambda n: -len(layers[n]))
        shapes = [list(layers[n].values()) for n in order]
        numbers = (
            _by_depth(shapes, clusters, bins)
            if isinstance(clusters, str)
            else [[_listed(clusters)[n][name] for name in layers[n]] for n in order]
        )
        of_models = [numbers[order.index(n)] for n in range(len(networks))]
        others = count_others(networks, layers)
        try:
            return fitting.fit(layers, of_models, others, coefficients)
        except OverBudgetError as error:
            tried.append(error)
        if not isinstance(clusters, str):
            break
    least = min(error.least for error in tried)
    raise ValueError(
        f"budget: expected at least {least:,} parameters for these models, got {fitting.budget:,}; raise it, use fewer "
        "bins, or smaller models"
    )


class OverBudgetError(ValueError):
    """No plan keeps the budget; ``least`` is what would do."""

    def __init__(self, least: int) -> None:
        super().__init__(f"budget: expected at least {least:,} parameters; raise it")
        self.least = least


@dataclass(frozen=True)
class Fitting:
    """How much may be spent, and how it is counted; see :func:`plan`."""

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
        order = sorted(range(len(layers)), key=lambda n: -len(layers[n]))
        clusters = build_clusters([list(layers[n].values()) for n in order], [numbers[n] for n in order])
        vectors = layer_vectors(clusters, coefficient_vectors(clusters, coefficients, partners))
        models = tuple(
            tuple(
                PlannedLayer(name, shape, number, vectors[order.index(n), at])
                for at, ((name, shape), number) in enumerate(zip(found.items(), numbers[n], strict=True))
            )
            for n, found in enumerate(layers)
        )
        settings = {
            "budget": self.budget, "other_parameters": other_parameters, "count": self.count, "method": self.method,
            "max_templates": self.max_templates, "threshold": threshold,
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


# --- arguments


def as_models(models: Models) -> list[nn.Module]:
    """One model or several as a list.

    Raises:
        ValueError, TypeError: there are none, one is there twice, or something else is given.
    """
    networks = [models] if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList) else list(models)
    if wrong := [type(network).__name__ for network in networks if not isinstance(network, nn.Module)]:
        raise TypeError(
            f"models: expected a torch.nn.Module or a sequence of them, got {', '.join(wrong)}; give models"
        )
    if not networks or len({id(network) for network in networks}) < len(networks):
        raise ValueError(f"models: expected one or more different models, got {len(networks)}; give each one once")
    return networks


def _check_plain(networks: Sequence[nn.Module], known: Sequence[Mapping[str, Shape]]) -> None:
    for model, (network, layers) in enumerate(zip(networks, known, strict=True)):
        for module in network.modules():
            if isinstance(module, FromBank) and isinstance(getattr(module.bank, "plan", None), Plan):
                raise ValueError(
                    f"models: expected plain models, got model {model} with layers that an earlier plan made; give "
                    "the models before they were applied, or what spin.search.plain makes of them"
                )
        if not layers:
            raise ValueError(
                f"models: expected trained nn.Conv2d or nn.Linear layers in each, got none in model {model}; leave it "
                "out, or set requires_grad"
            )


def _check_owners(networks: Sequence[nn.Module], layers: Sequence[Mapping[str, Shape]]) -> None:
    owners: dict[int, tuple[int, str]] = {}
    for model, (network, found) in enumerate(zip(networks, layers, strict=True)):
        for name in found:
            owner = owners.setdefault(id(network.get_submodule(name).weight), (model, name))
            if owner != (model, name):
                raise ValueError(
                    f"models: expected layers with weights of their own, got {owner[1]!r} of model {owner[0]} and "
                    f"{name!r} of model {model} with one; copy it, or name the other layers in clusters"
                )


def count_others(networks: Sequence[nn.Module], layers: Sequence[Mapping[str, Shape]]) -> int:
    """What models train beside the weights of these layers, shared tensors once.

    A tensor that another layer uses, too, such as an embedding, stays with that layer.
    """
    planned = {network.get_submodule(name) for network, found in zip(networks, layers, strict=True) for name in found}
    others = {
        id(parameter): parameter.numel()
        for network in networks
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and not (name == "weight" and module in planned)
    }
    return sum(others.values())


def replaceable_all(networks: Sequence[nn.Module]) -> list[dict[str, Shape]]:
    """The shapes of all layers that a plan may name, by model and name."""
    return [
        {name: tuple(layer.weight.shape) for name, layer in replaceable_layers(network, True).items()}
        for network in networks
    ]


def _own_parameters(networks: Sequence[nn.Module]) -> int:
    return sum(p.numel() for p in nn.ModuleList(networks).parameters() if p.requires_grad)


def _budget(budget: int | float | str, networks: Sequence[nn.Module], count: str) -> int:
    given, fraction = budget, isinstance(budget, float)
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[kmbg]?)\s*", budget, re.IGNORECASE)
        if match is None:
            raise ValueError(f"budget: expected a text such as '4.5M', '300k' or '25%', got {budget!r}; write it so")
        fraction = match[2] == "%"
        budget = float(match[1]) / 100 if fraction else float(match[1]) * _UNITS[match[2].lower()]
    if fraction:
        own = _own_parameters(networks)
        if count == "bank":
            found = [replaceable_layers(network) for network in networks]
            found = found if all(found) else [replaceable_layers(network, True) for network in networks]
            own = sum(layer.weight.numel() for layers in found for layer in layers.values())
        budget *= own
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
        raise ValueError(f"budget: expected a positive number of parameters, a text or a fraction, got {given!r}")
    budget = round(budget)
    if budget < 1:
        raise ValueError(f"budget: expected one parameter or more, got {given!r}; raise it")
    return budget


def _by_depth(shapes: list[list[Shape]], clusters: str, bins: int) -> list[list[int]]:
    if clusters not in CLUSTERS:
        raise ValueError(
            f"clusters: expected one of {', '.join(CLUSTERS)} or the numbers of layers by their names, got {clusters!r}"
        )
    return number_layers(shapes, bins, CLUSTERS[clusters])


def _listed(clusters: Mapping[str, int] | Numbers) -> Numbers:
    return [clusters] if isinstance(clusters, Mapping) else clusters


def _named(
    layers: list[dict[str, Shape]], known: list[dict[str, Shape]], clusters: Mapping[str, int] | Numbers
) -> list[dict[str, Shape]]:
    """The layers that the clusters name."""
    named = _listed(clusters)
    if not isinstance(named, Sequence) or not all(named) or not all(isinstance(found, Mapping) for found in named):
        raise ValueError(
            f"clusters: expected one of {', '.join(CLUSTERS)} or for each model the numbers of some layers by their "
            f"names, got {clusters!r}; name layers of each model"
        )
    if len(named) != len(layers):
        raise ValueError(f"clusters: expected the layers of each of {len(layers)} models, got those of {len(named)}")
    for model, (found, of_model) in enumerate(zip(named, known, strict=True)):
        if unknown := [name for name in found if name not in of_model]:
            raise ValueError(
                f"clusters: expected trained convolutions or linear layers of model {model}, such as "
                f"{next(iter(of_model), 'none')!r}, got {', '.join(map(repr, unknown))}; name its own layers"
            )
    return [{name: shape for name, shape in of_model.items() if name in found}
            for found, of_model in zip(named, known, strict=True)]  # fmt: skip
