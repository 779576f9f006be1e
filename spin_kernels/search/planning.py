"""From models and a budget of parameters to a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

from torch import nn

from ..nn.bank import FromBank
from ..surgery import replaceable_layers
from ..weights import count_parameters
from .clusters import BIN_TYPES, Shape, deepest_first, number_layers
from .coefficients import SHARINGS
from .fitting import Fitting, OverBudgetError
from .plans import Plan

Models = nn.Module | Sequence[nn.Module]
Numbers = Sequence[Mapping[str, int]]  # for each model the cluster of each layer, by its name
CLUSTERS = {"depth": BIN_TYPES[0], "length": BIN_TYPES[1]}
_MOST = 1000.0  # times the models' own parameters; a larger float is a number of parameters, wrongly written
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
            ``"0.25"`` or ``"25%"``).
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
    known = _planned_layers(networks, classifier=True)
    _check_plain(networks, known)
    if coefficients not in SHARINGS:
        raise ValueError(
            f"coefficients: expected one of {', '.join(SHARINGS)}, got {coefficients!r}; choose one of them"
        )
    fitting = Fitting(
        budget=_budget(budget, networks, count), count=count, strict=strict, method=method, max_templates=max_templates
    )
    if isinstance(clusters, str):  # with classifiers of their own first; a model may have nothing else
        chosen = [found for found in (_planned_layers(networks, which) for which in (False, True)) if all(found)]
        choices = [(layers, _by_depth(layers, clusters, bins)) for layers in chosen]
    else:
        choices = [_by_name(known, clusters)]
    tried = []
    for layers, numbers in choices:
        _check_owners(networks, layers)
        try:
            return fitting.fit(layers, numbers, count_others(networks, layers), coefficients)
        except OverBudgetError as error:
            tried.append(error)
    least = min(error.least for error in tried)
    raise ValueError(
        f"budget: expected at least {least:,} parameters for these models, got {fitting.budget:,}; raise it, use fewer "
        "bins, or smaller models"
    )


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


def _planned_layers(networks: Sequence[nn.Module], classifier: bool) -> list[dict[str, Shape]]:
    """For each model the shapes of the layers that a plan may have, by name."""
    return [
        {name: tuple(layer.weight.shape) for name, layer in replaceable_layers(network, classifier).items()}
        for network in networks
    ]


def _budget(budget: int | float | str, networks: Sequence[nn.Module], count: str) -> int:
    given = budget
    if isinstance(budget, Real) and not isinstance(budget, bool):  # NumPy's numbers, too
        budget = int(budget) if isinstance(budget, Integral) else float(budget)
    fraction = isinstance(budget, float)
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[kmbg]?)\s*", budget, re.IGNORECASE)
        if match is None:
            raise ValueError(f"budget: expected a text such as '4.5M', '300k' or '25%', got {budget!r}; write it so")
        fraction = match[2] == "%" or (not match[2] and "." in match[1])
        budget = float(match[1]) / (100 if match[2] else 1) if fraction else float(match[1]) * _UNITS[match[2].lower()]
    if fraction:
        if _MOST < budget < math.inf:
            raise ValueError(
                f"budget: expected a fraction of the models' own parameters of at most {_MOST:,.0f}, got {given!r}; "
                "write a number of parameters as an integer"
            )
        own = count_parameters(nn.ModuleList(networks))
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


def _by_depth(layers: Sequence[Mapping[str, Shape]], clusters: str, bins: int) -> list[list[int]]:
    """For each model the cluster numbers of its layers."""
    if clusters not in CLUSTERS:
        raise ValueError(
            f"clusters: expected one of {', '.join(CLUSTERS)} or the numbers of layers by their names, got {clusters!r}"
        )
    order = deepest_first(layers)
    numbers = number_layers([list(layers[n].values()) for n in order], bins, CLUSTERS[clusters])
    return [numbers[order.index(n)] for n in range(len(layers))]


def _by_name(
    known: Sequence[Mapping[str, Shape]], clusters: Mapping[str, int] | Numbers
) -> tuple[list[dict[str, Shape]], list[list[int]]]:
    """For each model the layers that the clusters name, and their numbers."""
    named = [clusters] if isinstance(clusters, Mapping) else clusters
    if not isinstance(named, Sequence) or not all(named) or not all(isinstance(found, Mapping) for found in named):
        raise ValueError(
            f"clusters: expected one of {', '.join(CLUSTERS)} or for each model the numbers of some layers by their "
            f"names, got {clusters!r}; name layers of each model"
        )
    if len(named) != len(known):
        raise ValueError(f"clusters: expected the layers of each of {len(known)} models, got those of {len(named)}")
    layers = []
    for model, (found, of_model) in enumerate(zip(named, known, strict=True)):
        if unknown := [name for name in found if name not in of_model]:
            raise ValueError(
                f"clusters: expected trained convolutions or linear layers of model {model}, such as "
                f"{next(iter(of_model), 'none')!r}, got {', '.join(map(repr, unknown))}; name its own layers"
            )
        layers.append({name: shape for name, shape in of_model.items() if name in found})
    return layers, [[found[name] for name in of] for found, of in zip(named, layers, strict=True)]
