"""Plans refined by what training shows: clusters split, and coefficients unshared, where gradients disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .applying import bound_bank, bound_layers, plain
from .coefficients import Bank
from .fitting import Fitting, OverBudgetError
from .joining import Assignment, assign_clusters
from .planning import as_models
from .plans import Plan
from .similarity import Similarities
from .splitting import cluster_numbers
from .stable import layer_similarities, split_stably
from .unsharing import unshare_vectors

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
COMPARED = ("gradients", "weights", "both")
STEP = 0.05  # by which a threshold is lowered until the budget fits, as published


def split(
    net: nn.Module,
    batches: Batches,
    loss_fn: Loss,
    threshold: float = 0.1,
    *,
    coefficient_threshold: float | None = None,
    compare: str = "gradients",
) -> Plan:
    """Splits clusters where the gradients of their layers' weights disagree.

    Under ``method="paper"`` the deepest model's clusters are split by the published priority queue, and the other
    models' layers join by similarity; under ``"stable"`` the layers of all models are put together so that the conflict
    is the least (:mod:`.stable`).

    The threshold is lowered by 0.05 until every cluster's largest layer fits the budget, without repeated blocks. Where
    it cannot, the plan stays as it is.

    Args:
        net: what :func:`apply` returned, after some training; it does not change.
        batches: (inputs, targets) on the model's device, as many as tell the layers apart: one epoch in the paper.
        loss_fn: from a model's output and the targets to a scalar, such as ``torch.nn.functional.cross_entropy``.
        threshold: the cosine similarity above which layers stay together.
        coefficient_threshold: of ``"paper"``: the similarity above which a layer takes the coefficients of the one it
            joined; None: always. Under ``"stable"`` coefficients are shared by position.
        compare: ``"gradients"``; ``"both"``: gradients and weights together, each over its norm; or ``"weights"``, as
            sharing by similarity did before.

    Returns:
        The new plan; ``threshold`` is that it came down to, None where nothing was split.

    Raises:
        ValueError: ``net`` has no plan, there are no batches, or a loss or gradient is not finite.
    """
    old: Plan = bound_bank(net).plan
    _check_threshold(threshold)
    if compare not in COMPARED:
        raise ValueError(f"compare: expected one of {', '.join(COMPARED)}, got {compare!r}; choose one of them")
    gradients, weights = weight_gradients(net, batches, loss_fn)
    compared = [(weights if compare == "weights" else gradients)[model] for model in old.order]
    beside = [weights[model] for model in old.order] if compare == "both" else None
    clusters = [
        {cluster.number: [m.layer for m in cluster.members[n]] for cluster in old.clusters if cluster.members[n]}
        for n in range(len(old.models))
    ]
    assign = _assigned(old, compared, clusters, coefficient_threshold, beside)
    fitting = Fitting(old.budget, old.count, True, old.method, old.max_templates)
    layers = [{layer.name: layer.shape for layer in found} for found in old.models]
    while threshold > -1 - STEP:  # at -1 or below all that may be together is
        assigned = assign(threshold)
        numbers = dict(zip(old.order, cluster_numbers(assigned.clusters), strict=True))
        try:
            found = fitting.fit(
                layers, [numbers[n] for n in range(len(layers))], old.other_parameters, old.coefficients_of,
                assigned.partners, repeat=False, threshold=threshold,
            )  # fmt: skip
        except OverBudgetError:
            threshold -= STEP
        else:
            return replace(found, strict=old.strict)
    return replace(old, threshold=None)


def unshare(net: nn.Module, batches: Batches, loss_fn: Loss, threshold: float = 0.1) -> Plan:
    """Gives layers coefficients of their own where the gradients that they give a shared vector disagree.

    The threshold is lowered by 0.05 until the new coefficients fit a strict budget. ``apply(net, plan)`` then goes on
    with the values that the layers had.

    Args, raises: as :func:`split`.
    """
    bank = bound_bank(net)
    old: Plan = bank.plan
    _check_threshold(threshold)
    gradients, _ = weight_gradients(net, batches, loss_fn)
    vectors, of_vectors = _vector_gradients(net, gradients)
    while threshold > -1 - STEP:
        unshared = unshare_vectors(vectors, of_vectors, threshold)
        found = replace(old, strict=False).with_vectors(list(unshared.vectors), threshold)
        if not old.strict or found.spent <= old.budget:
            return replace(found, strict=old.strict)
        threshold -= STEP
    return replace(old, threshold=None)


def weight_gradients(net: nn.Module, batches: Batches, loss_fn: Loss) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The gradients of the weights of all planned layers, summed over batches, and the weights.

    They are those of each layer alone, as if no two shared a template. Models run in the mode they are in; neither
    their parameters nor their running statistics change.

    Returns:
        For each model and layer the gradient, then the weight, of the layer's shape.

    Raises:
        ValueError: there are no batches, or a loss or gradient is not finite.
    """
    plan: Plan = bound_bank(net).plan
    bound_layers(net)
    networks = as_models(plain(net))
    weights: list[list[Any]] = [[network.get_submodule(layer.name).weight for layer in layers]
               for network, layers in zip(networks, plan.models, strict=True)]  # fmt: skip
    gradients = [[torch.zeros_like(weight) for weight in found] for found in weights]
    count = 0
    for count, (inputs, targets) in enumerate(batches, 1):
        for model, network in enumerate(networks):
            with torch.enable_grad():
                loss = loss_fn(network(inputs), targets)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not torch.isfinite(loss):
                got = f"one of {tuple(loss.shape)}" if isinstance(loss, Tensor) and loss.numel() != 1 else loss
                raise ValueError(
                    f"batches: expected a finite scalar loss, got {got} from model {model} in batch {count - 1}; "
                    "check inputs and targets, or train with a smaller learning rate"
                )
            if not loss.requires_grad:
                raise ValueError("loss_fn: expected a loss with a gradient, got none; compute it from the output")
            of_loss = torch.autograd.grad(loss, weights[model], allow_unused=True)
            for total, gradient in zip(gradients[model], of_loss, strict=True):
                if gradient is not None:
                    total += gradient
    if not count:
        raise ValueError("batches: expected one or more, got none; an iterator can be used once")
    for model, (found, layers) in enumerate(zip(gradients, plan.models, strict=True)):
        for gradient, layer in zip(found, layers, strict=True):
            if not torch.isfinite(gradient).all():
                raise ValueError(
                    f"batches: expected finite gradients, got others for layer {layer.name!r} of model {model}; check "
                    "inputs and targets, or train with a smaller learning rate"
                )
    return gradients, [[weight.detach() for weight in found] for found in weights]


def _assigned(
    plan: Plan,
    gradients: Sequence[Sequence[Tensor]],
    clusters: Sequence[Mapping[int, Sequence[int]]],
    coefficient_threshold: float | None,
    weights: Sequence[Sequence[Tensor]] | None,
) -> Callable[[float], Assignment]:
    """Clusters for a threshold; what does not depend on it is computed once."""
    if plan.method == "stable":
        pairs = layer_similarities(gradients, clusters, weights)
        names = [[f"{model}/{layer.name}" for layer in plan.models[model]] for model in plan.order]
        return lambda t: split_stably(clusters, pairs, t, names)
    similarities = Similarities(gradients, weights)
    return lambda t: assign_clusters(gradients, clusters, t, coefficient_threshold, weights, similarities)


def _vector_gradients(
    net: nn.Module, gradients: list[list[Tensor]]
) -> tuple[list[dict[Bank, list[int]]], list[dict[Bank, list[Tensor]]]]:
    """For each network and bank the vectors of its layers, and what each layer adds to the gradient of its vector."""
    bank = bound_bank(net)
    plan: Plan = bank.plan
    layers = bound_layers(net)
    values: Any = bank.coefficients.values
    if not values.requires_grad:
        raise ValueError("net: expected coefficients that are trained, got requires_grad=False; set it to True")
    vectors: list[dict[Bank, list[int]]] = [{} for _ in layers]
    of_vectors: list[dict[Bank, list[Tensor]]] = [{} for _ in layers]
    for network, model in enumerate(plan.order):
        for number, layer in enumerate(plan.models[model]):
            module = layers[model][number]
            with torch.enable_grad():
                weight = module.repeated(bank.compose(module.bank_layers)[0]).view(layer.shape)
            (found,) = torch.autograd.grad(weight, values, gradients[model][number])
            for level in [0] if layer.cluster in plan.blocks else range(len(layer.vectors)):
                key = plan.bank_name(layer.cluster, level), str(layer.vectors[level])
                part = found[:0]  # of a vector of which later levels cut all that it makes
                if key in bank.coefficients.lengths:
                    start = bank.coefficients.start(key)
                    part = found[start : start + bank.coefficients.lengths[key]]
                vectors[network].setdefault((layer.cluster, level), []).append(layer.vectors[level])
                of_vectors[network].setdefault((layer.cluster, level), []).append(part)
    return vectors, of_vectors


def _check_threshold(threshold: float) -> None:
    # Beyond 1 it would be lowered for long, from inf for ever, before anything changes.
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 <= threshold <= 1:
        raise ValueError(
            f"threshold: expected a number from -1 to 1, got {threshold!r}; cosine similarities lie between them"
        )
