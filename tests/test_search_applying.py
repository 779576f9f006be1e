"""Models bound to a bank by random plans: their weights, gradients and values, and what stays when plans change."""

import copy
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from planned_models import (
    Block,
    Net,
    applied,
    draws,
    expected_weight,
    images,
    planned_layers,
    random_model,
    trained,
    window,
)
from torch import Tensor, nn

from spin_kernels import search
from spin_kernels.nn import SuperConv2d, SuperLinear, SuperWeightBank


def assert_close(got: Tensor, expected: Tensor | np.ndarray, eps: float = 1e-5) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert got.shape == expected.shape
    assert (got.detach().double() - expected).abs().max() <= eps * max(1.0, float(expected.abs().max()))


def small(width: int = 6) -> Net:
    """Two clusters of 3 x 3 under a plan of two bins, or one of 3 x 3 and one of linear layers."""
    first, second = (nn.Conv2d(n, width, 3, padding=1) for n in (3, width))
    return Net(nn.Sequential(Block(first, True), Block(second, False)), width, [width])


def storages(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# --- weights and gradients


def test_weights_follow_from_templates_coefficients_and_tiles() -> None:
    blocks = 0
    for rng in draws(25):
        _, plan, net = applied(rng)
        blocks += bool(plan.blocks)
        for model, number, layer in planned_layers(net, plan):
            assert_close(layer.weight, expected_weight(net, plan, model, number), 1e-4)
            assert layer.weight.shape == plan.models[model][number].shape
    assert blocks


def test_gradients_reach_every_number() -> None:
    """Coefficients, alphas, betas, and the templates that layers use, and no others."""
    for rng in draws(12):
        _, plan, net = applied(rng)
        layers = [layer for *_, layer in planned_layers(net, plan)]
        sum((layer.weight * torch.randn(layer.weight.shape)).sum() for layer in layers).backward()
        assert (net.bank.coefficients.values.grad != 0).all()
        for layer in layers:
            assert layer.alpha is None or ((layer.alpha.grad != 0).all() and (layer.beta.grad != 0).all())
        used = {at: np.zeros(count, dtype=bool) for at, count in plan.templates.items()}
        for model, number, _ in planned_layers(net, plan):
            layer = plan.models[model][number]
            for level in range(len(layer.vectors)) if layer.cluster not in plan.blocks else ():
                count, first = window(plan, model, number, level)
                used[layer.cluster, level][first : first + count] = True
                if level == len(layer.vectors) - 1:  # of which nothing is cut
                    values = net.bank.templates.grad[net.bank.place(f"{layer.cluster}.{level}")]
                    assert (values.view(plan.templates[layer.cluster, level], -1)[first : first + count] != 0).all()
        for at, templates in used.items():
            values = net.bank.templates.grad[net.bank.place(plan.bank_name(*at))].view(len(templates), -1)
            assert (values[~templates] == 0).all()
        for number in plan.blocks:
            assert net.bank.templates.grad[net.bank.place(f"{number}.block")].any()


def test_outputs_have_the_gradients_of_plain_models() -> None:
    for rng in draws(10):
        _, plan, net = applied(rng)
        x = images()
        released = search.plain(net)
        for model, twin in zip(net, released, strict=True):
            for one in (model, twin):
                y = one(x)
                assert torch.isfinite(y).all()
                y.square().mean().backward()
        bank = (net.bank.templates, net.bank.coefficients.values)
        found = [parameter.grad.clone() for parameter in bank]
        net.zero_grad()
        layers = zip(planned_layers(net, plan), planned_layers(released, plan), strict=True)
        sum((layer.weight * twin.weight.grad).sum() for (*_, layer), (*_, twin) in layers).backward()
        for parameter, gradient in zip(bank, found, strict=True):
            assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm()


def test_layers_of_one_vector_and_window_have_the_weight_of_the_smaller_one_in_common() -> None:
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(5, 6, 3)
    models = [nn.Sequential(first), nn.Sequential(second)]
    plan = search.plan(models, 5000, clusters=[{"0": 0}, {"0": 0}])
    net = search.apply(models, plan)
    assert torch.equal(net[0][0].weight, net[1][0].weight[:4, :3])


def test_training_steps_lower_a_loss() -> None:
    models = [small().train(), small(4).train()]
    for budget in (0.9, 0.3):
        net = search.apply(models, search.plan(models, budget))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        x, target = images(8), torch.randint(5, (8,))
        losses = []
        for _ in range(20):
            loss = sum(nn.functional.cross_entropy(model(x), target) for model in net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < 0.95 * losses[0]


# --- what else there is to models


def test_models_given_do_not_change_and_share_nothing() -> None:
    for rng in draws(8):
        models, plan, _ = applied(rng)
        before = [state(model) for model in models]
        modules = [list(model.modules()) for model in models]
        flags = [[module.training for module in model.modules()] for model in models]
        net = search.apply(models, plan)
        with torch.no_grad():
            for t in (*net.parameters(), *net.buffers()):
                t.add_(1)
        net.train()(images()) if not isinstance(net, nn.ModuleList) else [model.train()(images()) for model in net]
        assert all(same(old, model.state_dict()) for old, model in zip(before, models, strict=True))
        assert modules == [list(model.modules()) for model in models]
        assert flags == [[module.training for module in model.modules()] for model in models]
        assert not any(model._forward_pre_hooks or model._forward_hooks for model in models)
        given = [t for model in models for t in (*model.parameters(), *model.buffers())]
        assert not storages(given) & storages([*net.parameters(), *net.buffers()])


def test_all_but_planned_weights_keep_their_values_modes_and_settings() -> None:
    for rng in draws(8):
        models, plan, net = applied(rng)
        for model, planned, new in zip(models, plan.models, net, strict=True):
            names = {f"{layer.name}.weight" for layer in planned}
            before, after = state(model), state(new)
            for name, t in before.items():
                assert (name in after) == (name not in names)
                assert name in names or torch.equal(t, after[name])
            tiles = {f"{layer.name}.{kind}" for layer in planned for kind in ("alpha", "beta")}
            assert set(after) - set(before) <= tiles
            for name, module in model.named_modules():
                twin = new.get_submodule(name)
                assert twin.training == module.training
                if name not in {layer.name for layer in planned}:
                    assert type(twin) is type(module)
                elif isinstance(module, nn.Conv2d):
                    assert type(twin) is SuperConv2d
                    for key in ("stride", "padding", "dilation", "groups", "kernel_size"):
                        assert getattr(twin, key) == getattr(module, key)
                else:
                    assert type(twin) is SuperLinear
            frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
            assert frozen == {name for name, p in new.named_parameters() if not p.requires_grad}
        assert net.bank.training == net.training == all(model.training for model in models)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """The bank has the models' dtype; coefficients, alphas and betas are at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    for rng in draws(4):
        models, plan, _ = applied(rng)
        models = [copy.deepcopy(model).to(dtype).eval() for model in models]
        net = search.apply(models, plan)
        assert net.bank.templates.dtype == dtype
        assert net.bank.coefficients.values.dtype == wide
        exact = copy.deepcopy(net).double()
        for model, number, layer in planned_layers(net, plan):
            assert layer.weight.dtype == dtype
            assert layer.alpha is None or layer.alpha.dtype == layer.beta.dtype == wide
            assert_close(layer.weight, expected_weight(exact, plan, model, number), 8 * torch.finfo(dtype).eps)
        with torch.no_grad():
            assert all(model(images(dtype=dtype)).dtype == dtype for model in net)


# --- one model, lists, containers


def test_one_model_comes_back_as_one_with_the_bank() -> None:
    for rng in draws(5):
        model = random_model(rng, [(3, 3), (1, 1)]).eval()
        plan = search.plan(model, 3.0)
        net, listed = search.apply(model, plan), search.apply([model], plan)
        assert type(net) is Net
        assert isinstance(net.bank, SuperWeightBank)
        assert net.bank.plan == plan
        assert {"bank.templates", "bank.coefficients.values"} <= set(net.state_dict())
        assert len(listed) == 1
        listed[0].load_state_dict({n: t for n, t in net.state_dict().items() if not n.startswith("bank.")})
        listed.bank.load_state_dict(net.bank.state_dict())
        x = images()
        assert torch.equal(net(x), listed[0](x))
        assert search.plan([model], 3.0) == plan == search.plan(nn.ModuleList([model]), 3.0)


def test_sequential_models() -> None:
    def sequential(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(42 * width, 5)))

    models = [sequential(4).eval(), sequential(3).eval()]
    plan = search.plan(models[0], 0.9)
    net, x = search.apply(models[0], plan), images()
    assert [*dict(net.named_children())] == ["0", "1", "2", "bank"]
    assert torch.equal(net(x), net[:3](x))
    released = search.plain(net)
    assert [*dict(released.named_children())] == ["0", "1", "2"]
    assert_close(released(x), net(x).detach())
    both = search.apply(models, search.plan(models, 0.9))
    assert all(model(x).shape == (2, 5) and len(model) == 3 for model in both)


def test_plain_models() -> None:
    for rng in draws(8):
        models, plan, net = applied(rng)
        net.eval()
        before = state(net)
        released = search.plain(net)
        for model, new, old in zip(models, released, net, strict=True):
            assert [type(module) for module in new.modules()] == [type(module) for module in model.modules()]
            assert set(new.state_dict()) == set(model.state_dict())
            x = images()
            assert_close(new(x), old(x).detach(), 1e-4)
        for model, number, layer in planned_layers(released, plan):
            assert_close(layer.weight, expected_weight(net, plan, model, number), 1e-4)
        assert not storages(released.parameters()) & storages(net.parameters())
        with torch.no_grad():
            for parameter in released.parameters():
                parameter.zero_()
        assert same(before, net.state_dict())


def test_models_with_more_beside_the_plan_do_not_exceed_its_budget() -> None:
    model = small()
    plan = search.plan(model, trained(model) // 2)
    model.classifier = nn.Linear(model.classifier.in_features, 500)
    with pytest.raises(
        ValueError, match=r"^plan: expected at most [\d,]+ parameters, got [\d,]+ in these models; plan t"
    ):
        search.apply(model, plan)
    model.classifier.requires_grad_(False)
    assert trained(search.apply(model, plan)) <= plan.budget
