"""Plans that follow one another on the same models, and plans and models that do not fit together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from planned_models import applied, draws, images, planned_layers, trained
from test_search_applying import same, small, state, storages
from torch import nn

from spin_kernels import search


def test_the_same_plan_again_keeps_everything() -> None:
    for rng in draws(8):
        _, plan, net = applied(rng)
        net.train(rng.random() < 0.5)
        again = search.apply(net, plan)
        assert same(net.state_dict(), again.state_dict())
        assert not storages(net.parameters()) & storages(again.parameters())
        assert net.training == again.training
        before = state(net)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.add_(1)
        assert same(before, net.state_dict())
        x = images()
        for old, new in zip(net.eval(), search.apply(net, plan), strict=True):
            assert torch.equal(old(x), new(x))


def test_other_plans_keep_the_banks_that_they_leave() -> None:
    for rng in draws(10):
        _, plan, net = applied(rng)
        if not plan.templates:
            continue
        changed = rng.choice(list(plan.templates))
        more = plan.templates | {changed: plan.templates[changed] + 1}
        new = search.apply(net, replace(plan, templates=more, strict=False))
        for number in plan.blocks:
            place = f"{number}.block"
            assert torch.equal(new.bank.templates[new.bank.place(place)], net.bank.templates[net.bank.place(place)])
        for at in plan.templates.keys() - {changed}:
            place = plan.bank_name(*at)
            assert torch.equal(new.bank.templates[new.bank.place(place)], net.bank.templates[net.bank.place(place)])
        for (model, number, layer), (*_, old) in zip(planned_layers(new, plan), planned_layers(net, plan), strict=True):
            planned = plan.models[model][number]
            if planned.cluster != changed[0]:
                assert torch.equal(layer.weight, old.weight)
            assert layer.bias is old.bias or torch.equal(layer.bias, old.bias)
        assert (new.bank.plan.templates, net.bank.plan) == (more, plan)


def test_a_block_of_another_form_starts_anew() -> None:
    """It has as many values, but other tiles."""
    model = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1), nn.Flatten())
    clusters = {"0": 0, "1": 0}
    plan = replace(search.plan(model, 5000, clusters=clusters), templates={}, blocks={0: (2, 6)})
    net = search.apply(model, plan)
    for changed in (replace(plan, blocks={0: (3, 4)}), replace(plan, blocks={}, templates={(0, 0): 1})):
        new = search.apply(net, changed)
        assert trained(new) == changed.parameters
        assert torch.isfinite(new(torch.randn(2, 6, 3, 3))).all()
        assert torch.isfinite(search.apply(new, plan)(torch.randn(2, 6, 3, 3))).all()


# --- what a user can get wrong

MODEL = small()
PLAN = search.plan(MODEL, 0.9)
BOTH = search.plan([small(), small(4)], 0.9)


def with_layer(name: str, module: nn.Module) -> nn.Module:
    model = small()
    model.set_submodule(name, module)
    return model


def with_bank(value: Any) -> nn.Module:
    model = small()
    model.bank = value
    return model


@pytest.mark.parametrize(("call", "text"), [
    (lambda: search.apply([small(), small()], PLAN), r"^models: expected the 1 of the plan, got 2; plan these models$"),
    (lambda: search.apply(MODEL, BOTH), r"^models: expected the 2 of the plan, got 1; "),
    (lambda: search.apply([small(4), small()], BOTH), r"^plan: .* 'blocks.0.conv' .* in model 0, got \(4, 3, 3, 3\); "),
    (lambda: search.apply(small(7), PLAN), r"^plan: .* of \(6, 3, 3, 3\) in model 0, got \(7, 3, 3, 3\); plan these "),
    (lambda: search.apply(with_layer("hidden.layer0", nn.Identity()), PLAN), r"^plan: .* \(6, 6\) .*, got Identity; "),
    (lambda: search.apply(nn.Sequential(MODEL), PLAN), r"^plan: expected a layer 'blocks.0.conv' .*, got none; "),
    (lambda: search.apply([], PLAN), r"^models: expected one or more different models, got 0; "),
    (lambda: search.apply([MODEL, MODEL], BOTH), r"^models: expected one or more different models, got 2; "),
    (lambda: search.apply(with_bank(nn.Linear(1, 1)), PLAN), r"^models: .* attribute 'bank' in model 0, got one; "),
    (lambda: search.apply(with_bank(None), PLAN), r"^models: .* attribute 'bank' in model 0, got one; rename"),
    (lambda: search.apply([small(), with_bank(5)], search.plan([small(), small()], 0.9)), r"^models: .* in model 1, "),
    (
        lambda: search.apply(with_layer("hidden.layer0", nn.Linear(6, 6).bfloat16()), PLAN),
        r"^models: expected layers of one dtype on one device, got .*; move them before$",
    ),
    (
        lambda: search.apply(list(search.apply([small(), small(4)], BOTH)), BOTH),
        r"^plan: .* 'blocks.0.conv' .* in model 0, got SuperConv2d; plan these models, or apply the plan to those it ",
    ),
    (
        lambda: search.apply(search.apply([small(), small(4)], BOTH).select([1, 0]), BOTH),
        r"^net: expected the 2 models that spin.search.apply returned, in their order and with all of their layers, ",
    ),
    (lambda: search.plain(MODEL), r"^net: expected what spin.search.apply returned, got Net; apply a plan first$"),
    (lambda: search.plain([MODEL]), r"^net: expected what spin.search.apply returned, got list; apply a plan first$"),
])  # fmt: skip
def test_errors_are_one_sentence(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
