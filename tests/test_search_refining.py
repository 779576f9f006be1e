"""Plans split and unshared by gradients: what refines what, what stays, and which budgets are kept."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from planned_models import Block, Net, applied, draws, expected_weight, images, planned_layers, trained
from torch import Tensor, nn

from spin_kernels import search
from spin_kernels.search import Plan
from spin_kernels.search.joining import assign_clusters
from spin_kernels.search.refining import weight_gradients
from spin_kernels.search.splitting import cluster_numbers

Batches = list[tuple[Tensor, Tensor]]
cross_entropy = nn.functional.cross_entropy


def batches(count: int = 2, size: int = 4) -> Batches:
    return [(images(size), torch.randint(5, (size,))) for _ in range(count)]


def deep(depth: int = 4, width: int = 6) -> Net:
    convs = [nn.Conv2d(3 if n == 0 else width, width, 3, padding=1) for n in range(depth)]
    return Net(nn.Sequential(*(Block(conv, n % 2 == 0) for n, conv in enumerate(convs))), width, [width])


def bound(*models: nn.Module, budget: float = 1.2, **settings: Any) -> nn.Module:
    """One cluster of convolutions and one of linear layers, unless settings say otherwise."""
    settings = {"bins": 1, "method": "paper"} | settings
    return search.apply(list(models), search.plan(list(models), budget, **settings))


def parts(plan: Plan) -> list[set[tuple[int, int]]]:
    """The layers of each cluster."""
    found: dict[int, set[tuple[int, int]]] = {}
    for model, layers in enumerate(plan.models):
        for number, layer in enumerate(layers):
            found.setdefault(layer.cluster, set()).add((model, number))
    return list(found.values())


def vector_users(plan: Plan) -> list[set[tuple[int, int, int]]]:
    """The layers and levels of each vector."""
    found: dict[tuple[int, int, int], set[tuple[int, int, int]]] = {}
    for model, layers in enumerate(plan.models):
        for number, layer in enumerate(layers):
            for level, vector in enumerate(layer.vectors):
                found.setdefault((layer.cluster, level, vector), set()).add((model, number, level))
    return list(found.values())


def refines(new: list[set[Any]], old: list[set[Any]]) -> bool:
    return all(any(part <= whole for whole in old) for part in new) and set().union(*new) == set().union(*old)


def everything(net: nn.Module) -> list[tuple[str, Any]]:
    """Parameters, gradients, statistics and modes."""
    found: list[tuple[str, Any]] = [(name, t.clone()) for name, t in net.state_dict().items()]
    found += [(name, p.requires_grad) for name, p in net.named_parameters()]
    found += [(name, None if p.grad is None else p.grad.clone()) for name, p in net.named_parameters()]
    return found + [(name, (type(module), module.training)) for name, module in net.named_modules()]


def unchanged(before: list[tuple[str, Any]], after: list[tuple[str, Any]]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(n == m and (torch.equal(a, b) if isinstance(a, Tensor) else a == b) for (n, a), (m, b) in pairs)


# --- gradients of weights


def test_weight_gradients_are_those_of_plain_models() -> None:
    """Of the models given with the weights from NumPy, batch by batch, in float64."""
    for rng in draws(8):
        models, plan, net = applied(rng)
        net.double().train(rng.random() < 0.5)
        given = [(inputs.double(), targets) for inputs, targets in batches(rng.randint(1, 3), 3)]
        gradients, weights = weight_gradients(net, given, cross_entropy)
        twins = [copy.deepcopy(model).double() for model in models]
        for twin, model in zip(twins, net, strict=True):
            twin.train(model.training)
            for name, module in twin.named_modules():
                module.train(model.get_submodule(name).training)
        with torch.no_grad():
            for model, number, layer in planned_layers(nn.ModuleList(twins), plan):
                layer.weight.copy_(torch.from_numpy(expected_weight(net, plan, model, number)))
        for inputs, targets in given:
            for twin in twins:
                cross_entropy(twin(inputs), targets).backward()
        largest = max(layer.weight.grad.norm() for *_, layer in planned_layers(nn.ModuleList(twins), plan))
        for model, number, layer in planned_layers(nn.ModuleList(twins), plan):
            assert weights[model][number].shape == gradients[model][number].shape == plan.models[model][number].shape
            assert torch.allclose(weights[model][number], layer.weight, rtol=1e-9, atol=1e-9)
            error = (gradients[model][number] - layer.weight.grad).norm()
            assert error <= 1e-7 * layer.weight.grad.norm() + 1e-9 * largest


@pytest.mark.parametrize("refine", [search.split, search.unshare, lambda *a: weight_gradients(*a[:3])])
def test_refining_leaves_the_net_alone(refine: Callable[..., Any]) -> None:
    for training in (True, False):
        net = bound(deep(4), deep(3)).train(training)
        net[0].blocks[1].eval()
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        net.bank.coefficients.values.grad = None
        before, plan = everything(net), net.bank.plan
        with torch.no_grad():
            refine(net, batches(), cross_entropy, 0.3)
        assert unchanged(before, everything(net))
        assert net.bank.plan is plan


# --- clusters


def test_splits_refine_clusters_within_the_budget() -> None:
    splits = 0
    for budget in (0.6, 0.9, 1.2, 1.6):
        for models in ([deep(5)], [deep(5), deep(5, 4)], [deep(5), deep(4), deep(3, 5)]):
            for count in ("network", "bank"):
                net = bound(*models, budget=budget, count=count, strict=bool(splits % 2))
                threshold = float(torch.rand(()))
                old, new = net.bank.plan, search.split(net, batches(), cross_entropy, threshold)
                assert refines(parts(new), parts(old))
                for name in ("budget", "count", "method", "strict", "max_templates", "other_parameters"):
                    assert getattr(new, name) == getattr(old, name)
                if new.threshold is None:
                    assert new == replace(old, threshold=None)
                    continue
                splits += len(parts(new)) > len(parts(old))
                steps = (threshold - new.threshold) / 0.05
                assert steps > -1e-6
                assert abs(steps - round(steps)) < 1e-6
                assert new.spent <= new.budget
                assert not new.blocks
                after = search.apply(net, new)
                assert trained(after) == new.parameters
                assert all(torch.isfinite(model(images())).all() for model in after)
    assert splits > 3


def test_a_threshold_comes_down_until_every_largest_layer_fits() -> None:
    """One step above, the clusters that the published rules make need more than the budget."""
    lowered = 0
    for budget in torch.linspace(0.45, 0.8, 6).tolist():
        net, given = bound(deep(6), budget=budget), batches()
        old = net.bank.plan
        new = search.split(net, given, cross_entropy, 0.8)
        if new.threshold is None or new.threshold > 0.79:
            continue
        lowered += 1
        gradients, _ = weight_gradients(net, given, cross_entropy)
        clusters = [{c.number: [member.layer for member in c.members[0]] for c in old.clusters}]
        for threshold, fits in ((new.threshold + 0.05, False), (new.threshold, True)):
            (numbers,) = cluster_numbers(assign_clusters(gradients, clusters, threshold).clusters)
            shapes = [layer.shape for layer in old.models[0]]
            together = {n: {shape for shape, of in zip(shapes, numbers, strict=True) if of == n} for n in numbers}
            largest = sum(max(map(math.prod, found)) for found in together.values())  # here each contains the smaller
            levels = sum(
                sum(math.prod(other) <= math.prod(shape) for other in together[n])
                for shape, n in zip(shapes, numbers, strict=True)
            )
            assert fits == (largest + levels + old.other_parameters <= old.budget)
            if fits:
                assert [layer.cluster for layer in new.models[0]] == numbers
    assert lowered


def test_a_plan_that_cannot_be_split_stays() -> None:
    """Where not even the clusters that there are have one template of their largest layer."""
    for settings in ({"strict": True}, {"strict": False}):
        net = bound(deep(3), deep(4), budget=0.2, **settings)
        assert bool(net.bank.plan.blocks) == settings["strict"]
        net.bank.plan = replace(net.bank.plan, threshold=0.7)
        assert search.split(net, batches(), cross_entropy, 0.9) == replace(net.bank.plan, threshold=None)


def test_clusters_that_stay_keep_templates_and_coefficients() -> None:
    """The only hidden linear layer has its cluster for itself, and with such a budget eight templates."""
    net = bound(deep(5), budget=30.0)
    new = search.apply(net, search.split(net, batches(), cross_entropy, 1.0))
    assert sorted(map(len, parts(new.bank.plan))) == [1] * 6
    assert torch.equal(new[0].hidden["layer0"].weight, net[0].hidden["layer0"].weight)
    assert new.bank.plan.templates[new.bank.plan.models[0][5].cluster, 0] == 8


@pytest.mark.parametrize("coefficients", ["own", "cluster"])
def test_splits_share_coefficients_as_the_plan_did(coefficients: str) -> None:
    net = bound(deep(4).eval(), deep(4).eval(), budget=30.0, coefficients=coefficients)
    plan = search.split(net, batches(), cross_entropy, 0.9)
    clusters = {layer.cluster for layers in plan.models for layer in layers}
    assert len(clusters) > len({layer.cluster for layers in net.bank.plan.models for layer in layers})
    users: dict[tuple[int, int], list[int]] = {}
    for layer in (layer for layers in plan.models for layer in layers):
        users.setdefault((layer.cluster, 0), []).append(layer.vectors[0])
    for vectors in users.values():
        assert len(set(vectors)) == (1 if coefficients == "cluster" else len(vectors))


def test_comparing_weights_too() -> None:
    """Layers of one size have one weight here, which makes other clusters where it counts."""
    net, given = bound(deep(6), budget=30.0, coefficients="cluster"), batches()
    with_weights, without = (
        search.split(net, given, cross_entropy, 0.3, compare=compare) for compare in ("both", "gradients")
    )
    assert parts(with_weights) != parts(without)
    gradients, weights = weight_gradients(net, given, cross_entropy)
    clusters = [{c.number: [member.layer for member in c.members[0]] for c in net.bank.plan.clusters}]
    for plan, compared in ((with_weights, weights), (without, None)):
        (numbers,) = cluster_numbers(assign_clusters(gradients, clusters, plan.threshold, None, compared).clusters)
        assert [layer.cluster for layer in plan.models[0]] == numbers


# --- coefficients


def test_unshared_layers_go_on_with_the_values_they_had() -> None:
    unshared = 0
    for method in ("paper", "stable"):
        for budget in (0.2, 0.9, 1.5):
            models = [deep(4).eval(), deep(4).eval(), deep(3, 4).eval()]
            net = bound(*models, budget=budget, method=method, coefficients="position")
            if budget == 0.2:
                assert net.bank.plan.blocks
                net.bank.plan = replace(net.bank.plan, budget=net.bank.plan.budget + 20)
            old, new = net.bank.plan, search.unshare(net, batches(), cross_entropy, 0.5)
            assert refines(vector_users(new), vector_users(old))
            assert new.spent <= new.budget
            assert (new.templates, new.blocks, parts(new)) == (old.templates, old.blocks, parts(old))
            unshared += len(vector_users(new)) > len(vector_users(old))
            after, x = search.apply(net, new), images()
            assert trained(after) == new.parameters
            before = [model(x) for model in net]
            assert all(torch.equal(model(x), y) for model, y in zip(after, before, strict=True))
            assert torch.equal(after.bank.templates, net.bank.templates)
    assert unshared > 2


def opposed(**settings: Any) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Two equal models that share all coefficients and the loss's gradients but for their signs."""
    model = deep(3).eval()
    net = bound(model, copy.deepcopy(model), coefficients="position", **settings)
    with torch.no_grad():
        net[1].classifier.weight.neg_()
    return net, lambda y, _: y.sum()


def test_only_layers_whose_gradients_disagree_are_unshared() -> None:
    net, loss = opposed(budget=5.0)
    old = vector_users(net.bank.plan)
    assert all(len(users) == 2 for users in old)
    apart = search.unshare(net, batches(), loss, -0.9)
    assert apart.threshold == -0.9
    assert all(len(users) == 1 for users in vector_users(apart))
    with torch.no_grad():
        net[1].classifier.weight.neg_()
    together = search.unshare(net, batches(), loss, 0.99)
    assert together.threshold == 0.99
    assert sorted(map(sorted, vector_users(together))) == sorted(map(sorted, old))


def test_unshared_vectors_are_parameters_of_their_own() -> None:
    net, loss = opposed(budget=5.0)
    after = search.apply(net, search.unshare(net, batches(), loss, 0.9))
    plan = after.bank.plan
    weights = {at: layer.weight.detach() for *at, layer in planned_layers(after, plan) for at in [tuple(at)]}
    assert all(torch.equal(weights[0, n], weights[1, n]) for n in range(4))
    with torch.no_grad():
        for layer in plan.models[1]:
            for level, vector in enumerate(layer.vectors):
                start = after.bank.coefficients.start((plan.bank_name(layer.cluster, level), str(vector)))
                after.bank.coefficients.values[start] += 1
    for model, number, layer in planned_layers(after, plan):
        assert torch.equal(layer.weight, weights[model, number]) == (model == 0)


def test_a_budget_bounds_what_is_unshared() -> None:
    for spare in (0, 3, 8):
        net, loss = opposed(budget=5.0)
        plan = net.bank.plan
        net.bank.plan = replace(plan, budget=plan.parameters + spare)
        found = search.unshare(net, batches(), loss, 0.5)
        assert plan.parameters <= found.parameters <= plan.parameters + spare
        assert trained(search.apply(net, found)) == found.parameters
        assert spare or sorted(map(sorted, vector_users(found))) == sorted(map(sorted, vector_users(plan)))
        net.bank.plan = replace(plan, budget=plan.parameters + spare, strict=False)
        assert search.unshare(net, batches(), loss, 0.5).parameters == plan.parameters + plan.coefficients


# --- what a user can get wrong


class Root(nn.Module):
    """A finite output of which the gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.layer(x) * 0).abs().sqrt())


NET = bound(deep(3), deep(2))
BATCHES = [(torch.ones(2, 3, 9, 8), torch.tensor([0, 1]))]
NAN = math.nan


def frozen() -> nn.Module:
    net = bound(deep(3), deep(3))
    net.bank.coefficients.requires_grad_(False)
    return net


def without_twins() -> nn.Module:
    """The second model has a layer in a cluster in which the first has none."""
    clusters = [{f"blocks.{n}.conv": 0 for n in range(3)}, {"blocks.0.conv": 0, "blocks.1.conv": 5}]
    return bound(deep(3), deep(2), clusters=clusters)


SPLIT_AND_UNSHARE: list[tuple[Callable[[Any], Any], str]] = [
    (lambda f: f(deep(2), BATCHES, cross_entropy), r"^net: expected what spin.search.apply returned, got Net; apply "),
    (lambda f: f(NET[0], BATCHES, cross_entropy), r"^net: expected what spin.search.apply returned, got Net; "),
    (lambda f: f(search.plain(NET), BATCHES, cross_entropy), r"^net: .* spin.search.apply returned, got ModuleList; "),
    (lambda f: f(NET, [], cross_entropy), r"^batches: expected one or more, got none; an iterator can be used once$"),
    (lambda f: [f(NET, once, cross_entropy) for once in [iter(BATCHES)] * 2], r"^batches: expected one or more, got "),
    (lambda f: f(NET, BATCHES, lambda y, _: y), r"^batches: expected a finite scalar loss, got one of \(2, 5\) from "),
    (lambda f: f(NET, BATCHES, lambda y, _: y.detach().sum()), r"^loss_fn: expected a loss with a gradient, got none"),
    (lambda f: f(NET, BATCHES, lambda y, _: 1.0), r"^batches: expected a finite scalar loss, got 1.0 from model 0 in "),
    (lambda f: f(NET, BATCHES, lambda y, _: y.sum() * NAN), r"^batches: .* got nan from model 0 in batch 0; check inp"),
    (
        lambda f: f(NET, [*BATCHES, (BATCHES[0][0] * NAN, BATCHES[0][1])], cross_entropy),
        r"^batches: expected a finite scalar loss, got nan from model 0 in batch 1; check inputs and targets, or train",
    ),
    (
        lambda f: f(bound(Root(), budget=2.0), [(torch.ones(2, 4), torch.zeros(2))], lambda y, _: y.sum()),
        r"^batches: expected finite gradients, got others for layer 'layer' of model 0; check inputs and targets, or ",
    ),
    *(
        ((lambda f, t=t: f(NET, BATCHES, cross_entropy, t)), rf"^threshold: expected a number .*, got {t!r}; ")
        for t in (NAN, math.inf, -math.inf, 1.5, -1.01, "0.1", None, True)
    ),
]  # fmt: skip


@pytest.mark.parametrize("refine", [search.split, search.unshare])
@pytest.mark.parametrize(("call", "text"), SPLIT_AND_UNSHARE)
def test_errors_are_one_sentence(call: Callable[[Any], Any], text: str, refine: Callable[..., Plan]) -> None:
    with pytest.raises(ValueError, match=text):
        call(refine)


def test_what_only_one_of_them_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"^net: expected coefficients that are trained, got requires_grad=False; "):
        search.unshare(frozen(), BATCHES, cross_entropy)
    with pytest.raises(ValueError, match=r"^clusters: .* network 1 in cluster 5 .* alike, or use method='stable'$"):
        search.split(without_twins(), BATCHES, cross_entropy)
