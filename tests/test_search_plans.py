"""Plans of random models and budgets: what they promise about numbers of parameters, and what their users get wrong."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from planned_models import Net, depth_order, draws, random_models, random_settings, trained
from torch import nn

from spin_kernels import search
from spin_kernels.search import Plan
from spin_kernels.search.clusters import build_clusters
from spin_kernels.search.templates import MOST_TEMPLATES, spend

LEAST = r"^budget: expected at least ([\d,]+) parameters for these models, got ([\d,]+); raise it, "


def least_budget(models: list[nn.Module], **settings: Any) -> int:
    """What the error about a budget of one parameter names; 1 where that is enough for the only bank."""
    try:
        assert search.plan(models, 1, **settings).bank_parameters == 1
    except ValueError as error:
        least, got = re.match(LEAST, str(error)).groups()
        assert got == "1"
        return int(least.replace(",", ""))
    return 1


def explicit(plan: Plan) -> list[dict[str, int]]:
    return [{layer.name: layer.cluster for layer in layers} for layers in plan.models]


def test_the_least_budget_of_an_error_is_the_least() -> None:
    for rng in draws(12):
        models, settings = random_models(rng), random_settings(rng)
        least = least_budget(models, **settings)
        assert search.plan(models, least, **settings).spent <= least
        if least == 1:
            continue
        with pytest.raises(ValueError, match=rf"at least {least:,} parameters .* got {least - 1:,}; "):
            search.plan(models, least - 1, **settings)


def test_the_least_budget_does_not_count_coefficients_of_what_is_cut() -> None:
    """The second layer's column is cut from the third one's weight, which has no coefficient for it."""
    model = nn.Sequential(*(nn.Conv2d(into, out, 1, bias=False) for out, into in ((2, 2), (2, 3), (7, 1))))
    clusters = {"0": 0, "1": 0, "2": 0}
    assert least_budget([model], clusters=clusters) == 16
    assert search.plan(model, 16, clusters=clusters).parameters == trained(
        search.apply(model, search.plan(model, 16, clusters=clusters))
    )


@pytest.mark.parametrize("strict", [True, False])
def test_counts_are_those_of_the_network(strict: bool) -> None:
    """And a strict budget is never exceeded, whatever form it has."""
    for rng in draws(20):
        models, settings = random_models(rng), random_settings(rng)
        own = sum(map(trained, models))
        least = least_budget(models, **settings)
        number = rng.randint(least, max(least, 2 * own))
        budget = rng.choice([number, f"{number}", f" {number / 1000}K ", f"{math.ceil(1e4 * number / own) / 100}%"])
        if settings["count"] == "bank" and isinstance(budget, str) and "%" in budget:
            budget = number  # of fewer parameters
        plan = search.plan(models, budget, strict=strict, **settings)
        net = search.apply(models, plan)
        assert trained(net) == plan.parameters
        assert net.bank.templates.numel() == plan.bank_parameters == sum(plan.bank_sizes.values())
        assert net.bank.coefficients.values.numel() == plan.coefficients
        assert plan.spent == (plan.parameters if settings["count"] == "network" else plan.bank_parameters)
        assert plan.budget >= number
        assert not (strict and plan.spent > plan.budget)
        assert not (plan.blocks and not strict)
        modulated = [m for m in net.modules() if getattr(m, "alpha", None) is not None]
        assert sum(m.alpha.numel() + m.beta.numel() for m in modulated) == plan.modulation
        assert bool(modulated) <= bool(plan.blocks)


def test_a_budget_is_spent() -> None:
    """What is left buys no template for any level that may have more of them."""
    for rng in draws(12):
        models = random_models(rng)
        settings = random_settings(rng) | {"count": "bank"}
        plan = search.plan(models, rng.randint(1, 3) * sum(map(trained, models)), **settings)
        left = plan.budget - plan.spent
        assert not plan.blocks
        assert all(bank.templates == MOST_TEMPLATES or bank.values >= left for bank in plan.banks)


def test_without_strict_the_published_rule_spends() -> None:
    for rng in draws(12):
        models, settings = random_models(rng), random_settings(rng) | {"count": "bank"}
        plan = search.plan(models, rng.randint(1, sum(map(trained, models))), strict=False, **settings)
        layers = [plan.models[model] for model in depth_order(plan)]
        clusters = build_clusters(
            [[layer.shape for layer in found] for found in layers],
            [[layer.cluster for layer in found] for found in layers],
        )
        assert plan.banks == spend(clusters, plan.budget)
        assert not plan.blocks


def test_planned_layers() -> None:
    """Trained plain layers but the last linear one, which joins where the budget cannot pay for it."""
    for rng in draws(12):
        models = random_models(rng)
        expected = [
            [
                name
                for name, module in model.named_modules()
                if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
                and getattr(module, "padding_mode", "zeros") == "zeros"
                and module.weight.requires_grad
            ]
            for model in models
        ]
        plans = search.plan(models, 2.0), search.plan(models, least_budget(models))
        found = [[[layer.name for layer in layers] for layers in plan.models] for plan in plans]
        assert found[0] == [[name for name in names if name != "classifier"] for names in expected]
        assert found[1] in (found[0], expected)
        for layers, model in zip(plans[0].models, models, strict=True):
            assert all(layer.shape == tuple(model.get_submodule(layer.name).weight.shape) for layer in layers)


def test_the_classifier_keeps_its_weight_for_as_long_as_it_can() -> None:
    torch.manual_seed(0)
    model = Net(nn.Conv2d(3, 8, 3), 8, [6])
    apart = [{"blocks": 0, "hidden.layer0": 1}]
    for bins in (1, 3):
        first = least_budget([model], clusters=apart)
        assert len(search.plan(model, first, bins=bins).models[0]) == 2
        assert len(search.plan(model, first - 1, bins=bins).models[0]) == 3


def test_numbers_of_clusters_given_by_name() -> None:
    """Those of a plan give the plan, gaps and other numbers change nothing but names, unnamed layers stay."""
    for rng in draws(10):
        models, settings = random_models(rng), random_settings(rng)
        plan = search.plan(models, 1.2, **settings)
        named = settings | {"clusters": explicit(plan)}
        assert search.plan(models, plan.budget, **named) == plan
        numbers = {number: n for n, number in enumerate(sorted({c.number for c in plan.clusters}))}
        later = [{name: 7 * numbers[number] + 3 for name, number in found.items()} for found in explicit(plan)]
        moved = search.plan(models, plan.budget, **settings | {"clusters": later})
        assert list(moved.templates.values()) == list(plan.templates.values())
        assert [[layer.vectors for layer in layers] for layers in moved.models] == [
            [layer.vectors for layer in layers] for layers in plan.models
        ]
        few = [dict(rng.sample(list(found.items()), rng.randint(1, len(found)))) for found in explicit(plan)]
        part = search.plan(models, 2.0, **settings | {"clusters": few})
        assert explicit(part) == [
            {n: c for n, c in of.items() if n in f} for of, f in zip(explicit(plan), few, strict=True)
        ]
        assert trained(search.apply(models, part)) == part.parameters


def test_the_order_of_models_of_different_depths_does_not_matter() -> None:
    def net(depth: int) -> Net:
        return Net(nn.Sequential(*(nn.Conv2d(3 if n == 0 else 6, 6, 3, padding=1) for n in range(depth))), 6)

    models = [net(2), net(4), net(3)]
    for method in ("paper", "stable"):
        plan, turned = (search.plan(found, 0.7, method=method) for found in (models, models[::-1]))
        assert turned.models == plan.models[::-1]
        assert (turned.templates, turned.blocks, turned.parameters) == (plan.templates, plan.blocks, plan.parameters)


# Of 446 trained parameters, 390 of them in planned weights.
@pytest.mark.parametrize(("budget", "count", "expected"), [
    (1000, "network", 1000), ("1000", "network", 1000), ("1k", "network", 1000), ("1.25 K", "network", 1250),
    (".5m", "network", 500_000), ("2G", "network", 2 * 10**9), ("1b", "network", 10**9), (10**400, "network", 10**400),
    (0.5, "network", 223), ("50%", "network", 223), ("150 %", "network", 669), (1.0, "network", 446),
    (0.5, "bank", 195), ("50%", "bank", 195), (1000.0, "network", 446_000),
    ("0.5", "network", 223), ("1.5", "network", 669),
    (np.int64(1000), "network", 1000), (np.float32(0.5), "network", 223),
])  # fmt: skip
def test_budgets(budget: float | str, count: str, expected: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Conv2d(10, 12, 1), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(4, 4))
    model[0].bias.requires_grad_(False)
    model.extra = nn.Parameter(torch.zeros(55), requires_grad=False)
    assert search.plan(model, budget, count=count, strict=False).budget == expected


def test_a_tied_tensor_that_stays_is_counted() -> None:
    """A linear layer gets a weight of its own from the bank, the embedding keeps the one they had."""
    model = nn.ModuleDict({"words": nn.Embedding(30, 8), "scores": nn.Linear(8, 30), "last": nn.Linear(30, 2)})
    model["scores"].weight = model["words"].weight
    plan = search.plan(model, 700)
    assert trained(search.apply(model, plan)) == plan.parameters <= 700


# --- what a user can get wrong


def small(**attributes: Any) -> nn.Module:
    model = Net(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)), 4)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def one_layer_in_two() -> list[nn.Module]:
    first, second = small(), small()
    second.blocks[1] = first.blocks[1]
    return [first, second]


MODEL = small()
NO_LAYERS = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(4, 4, 3, groups=2))
CASES: list[tuple[Callable[[], Any], str]] = [
    *(
        ((lambda b=b: search.plan(MODEL, b)), rf"^budget: expected a positive number .* or a fraction, got {t}$")
        for b, t in [
            (0, "0"), (-1, "-1"), (0.0, "0.0"), (-0.5, "-0.5"), (math.nan, "nan"), (math.inf, "inf"), (True, "True"),
            (None, "None"), ([5], r"\[5\]"), ("0", "'0'"), ("0%", "'0%'"), ("9" * 400, "'9*'"),
            ("9" * 400 + "%", "'9*%'"), ("9" * 400 + "k", "'9*k'"),
        ]
    ),
    *(
        ((lambda b=b: search.plan(MODEL, b)), r"^budget: expected a text such as '4.5M', .*, got '.*'; write it so$")
        for b in ("abc", "", "-5", "1e3", "5 %%", "k", "5kk", "0x10", "1,000", "\u0665\u0665x")
    ),
    *(
        ((lambda b=b: search.plan(MODEL, b)), r"^budget: expected a fraction of .* of at most 1,000, got .*; write a ")
        for b in (1e6, 1001.0, np.float64(4.5e6), "1000000.0", "100001%", 1e308)
    ),
    (lambda: search.plan(MODEL, 1e-9), r"^budget: expected one parameter or more, got 1e-09; raise it$"),
    (lambda: search.plan(MODEL, 30), r"^budget: expected at least [\d,]+ parameters .* got 30; raise it, use fewer "),
    (lambda: search.plan(MODEL, 0.9, clusters="deep"), r"^clusters: expected one of depth, length or .*, got 'deep'"),
    *(
        ((lambda c=c: search.plan(MODEL, 0.9, clusters=c)), r"^clusters: expected one of depth, length or for each .*;")
        for c in ({}, [{}], None, 5, ["blocks.0"], [None])
    ),
    (lambda: search.plan(MODEL, 0.9, clusters=[]), r"^clusters: .* each of 1 models, got those of 0$"),
    (lambda: search.plan(MODEL, 0.9, clusters=[{"blocks.0": 0}] * 2), r"^clusters: .* 1 models, got those of 2$"),
    (lambda: search.plan([MODEL, small()], 0.9, clusters=[{"blocks.0": 0}, {}]), r"^clusters: .*; name layers of each"),
    (
        lambda: search.plan(MODEL, 0.9, clusters={"blocks.0": 0, "conv": 1, "blocks": 1}),
        r"^clusters: .* layers of model 0, such as 'blocks.0', got 'conv', 'blocks'; name its own layers$",
    ),
    *(
        ((lambda n=n: search.plan(MODEL, 0.9, clusters={"blocks.0": n})), rf"^numbers: expected integ.* got {n!r} ")
        for n in (-1, "0", None, True, 0.0)
    ),
    (
        lambda: search.plan(MODEL, 0.9, clusters={"blocks.0": 0, "blocks.1": 0}),
        r"^numbers: expected layers of one kernel size in cluster 0, got .*; keep them apart$",
    ),
    (lambda: search.plan(MODEL, 0.9, bins=0), r"^bins: expected a positive integer, got 0; "),
    (lambda: search.plan(MODEL, 0.9, max_templates=0), r"^max_templates: expected an integer from 1 on, got 0$"),
    (lambda: search.plan(MODEL, 0.9, count="all"), r"^count: expected one of network, bank, got 'all'$"),
    (lambda: search.plan(MODEL, 0.9, method="best"), r"^method: expected one of paper, stable, got 'best'$"),
    (lambda: search.plan(MODEL, 0.9, coefficients="none"), r"^coefficients: expected one of own, .*, got 'none'; "),
    (lambda: search.plan(MODEL, 0.9, strict="no"), r"^strict: expected true or false, got 'no'$"),
    *(
        ((lambda m=m: search.plan(m, 0.9)), rf"^models: expected trained nn.Conv2d .* none in model {at}; leave it")
        for m, at in (
            (NO_LAYERS, 0), (nn.Linear(3, 4), 0), ([MODEL, nn.ReLU()], 1), (small().requires_grad_(False), 0),
            (nn.Sequential(nn.ReLU()), 0),
        )
    ),
    (lambda: search.plan([], 0.9), r"^models: expected one or more different models, got 0; "),
    (lambda: search.plan(nn.ModuleList(), 0.9), r"^models: expected one or more different models, got 0; "),
    (lambda: search.plan([MODEL, MODEL], 0.9), r"^models: .* different models, got 2; give each one once$"),
    (
        lambda: search.plan([MODEL, MODEL.blocks], 0.9),
        r"^models: .* got 'blocks.0' of model 0 and '0' of model 1 with one; copy it, or name the other layers in cl",
    ),
    (lambda: search.plan(one_layer_in_two(), 0.9), r"^models: .* 'blocks.1' of model 0 and 'blocks.1' of model 1 wi"),
    (lambda: search.plan(small(twin=nn.Sequential(MODEL.blocks, MODEL.blocks)), 0.9), r"^network: .* with one$"),
    (
        lambda: search.plan(search.apply(MODEL, search.plan(MODEL, 0.9)), 0.9),
        r"^models: expected plain models, got model 0 with layers that an earlier plan made; .*spin.search.plain",
    ),
    (
        lambda: search.plan(search.apply([MODEL, small()], search.plan([MODEL, small()], 0.9)), 0.9),
        r"^models: expected plain models, got model 0 with layers that an earlier plan made; ",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), CASES)
def test_errors_are_one_sentence(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_what_is_no_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"^models: expected a torch.nn.Module or a sequence of them, got int; "):
        search.plan([MODEL, 5], 0.9)


def test_shared_layers_that_are_not_planned_stay_shared() -> None:
    models = one_layer_in_two()
    plan = search.plan(models, 2.0, clusters=[{"blocks.0": 0}, {"blocks.0": 0}])
    net = search.apply(models, plan)
    assert net[0].blocks[1] is net[1].blocks[1]
    assert trained(net) == plan.parameters
