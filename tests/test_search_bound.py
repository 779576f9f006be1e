"""Lists of models that share a bank: as lists, as modules, copied, saved, compiled."""

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from planned_models import Block, Net, applied, draws, images, planned_layers, trained
from torch import Tensor, nn

from spin_kernels import search
from spin_kernels.search import BoundModels


def small(width: int) -> Net:
    first, second = (nn.Conv2d(n, width, 3, padding=1) for n in (3, width))
    return Net(nn.Sequential(Block(first, True), Block(second, False)), width, [width]).eval()


def bound(budget: float = 0.8) -> BoundModels:
    """Three models; with a small budget they repeat blocks."""
    models = [small(6), small(4), small(5)]
    net = search.apply(models, search.plan(models, budget))
    assert bool(net.bank.plan.blocks) == (budget < 0.5)
    return net


def outputs(models: Any, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for model in models]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


# --- a list


def test_items() -> None:
    net = bound()
    listed = list(net)
    assert [type(model) for model in listed] == [Net, Net, Net]
    assert len(net) == 3
    assert [net[n] for n in range(3)] == listed == [net[n - 3] for n in range(3)]
    assert net[torch.tensor(1)] is listed[1]
    assert list(reversed(listed)) == list(net[::-1])
    assert listed[1] in net
    assert net.bank not in net
    for index in (3, -4):
        with pytest.raises(IndexError):
            net[index]


def test_parts_hold_the_same_models_and_bank() -> None:
    net = bound()
    for part, indices in (
        (net[:2], [0, 1]), (net[1:], [1, 2]), (net[::2], [0, 2]), (net[5:], []), (net.select([2, 0]), [2, 0]),
        (net.select([-1]), [2]), (net.select([]), []),
    ):  # fmt: skip
        assert isinstance(part, BoundModels)
        assert part.bank is net.bank
        assert list(part) == [net[index] for index in indices]
        assert sum(name.startswith("bank.") for name in part.state_dict()) == 2
        assert part.training == net.training
    assert len(net) == 3
    assert trained(net[:1]) < trained(net)
    with pytest.raises(IndexError):
        net.select([3])


def test_a_list_that_changes_does_what_lists_do() -> None:
    """Any sequence of changes, against a list beside it."""

    def index(rng: Random, beside: list[nn.Module]) -> int:
        return rng.randrange(-len(beside), len(beside))

    for rng in draws(10):
        net, number = bound(), 0
        beside, bank, before = list(net), net.bank, net.state_dict()["bank.templates"]
        for _ in range(25):
            number += 1
            kind = rng.choice(["append", "insert", "delete", "delete slice", "set", "extend", "pop", "iadd"])
            new = nn.Linear(number, 1)
            if kind in ("delete", "set", "pop") and not beside:
                continue
            if kind == "append":
                assert net.append(new) is net
                beside.append(new)
            elif kind == "insert":
                at = rng.randint(-len(beside) - 1, len(beside) + 1)
                net.insert(at, new)
                beside.insert(at, new)
            elif kind == "delete":
                at = index(rng, beside)
                del net[at], beside[at]
            elif kind == "delete slice":
                part = slice(rng.randint(-3, 3), rng.randint(-3, 3), rng.choice([1, 2, -1]))
                del net[part], beside[part]
            elif kind == "set":
                at = index(rng, beside)
                net[at] = beside[at] = new
            elif kind == "pop":
                at = index(rng, beside)
                assert net.pop(at) is beside.pop(at)
            elif kind == "extend":
                net.extend([new, nn.ReLU()])
                beside += list(net)[-2:]
            else:
                net += [new]
                beside.append(new)
            print(kind, len(beside))
            assert list(net) == beside
            assert len(net) == len(beside)
            assert net.bank is bank
            assert {name for name, _ in net.named_children()} == {"bank", *map(str, range(len(beside)))}
            assert [net.get_submodule(str(n)) for n in range(len(beside))] == beside
        assert torch.equal(net.state_dict()["bank.templates"], before)


# --- a module


def test_the_bank_is_there_once() -> None:
    for budget in (0.8, 0.3):
        net = bound(budget)
        state, names = net.state_dict(), [name for name, _ in net.named_parameters()]
        assert [name for name in state if "bank" in name] == ["bank.templates", "bank.coefficients.values"]
        assert set(names) <= set(state)
        assert sum(p.numel() for p in net.parameters()) == net.bank.plan.parameters
        other = search.apply([small(6), small(4), small(5)], net.bank.plan)
        x = images()
        assert not equal(outputs(other, x), outputs(net, x))
        assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
        assert equal(outputs(other, x), outputs(net, x))


def copies(net: BoundModels) -> Iterator[BoundModels]:
    yield copy.deepcopy(net)
    yield pickle.loads(pickle.dumps(net))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@pytest.mark.parametrize("budget", [0.8, 0.3])
def test_copies_share_within_themselves_only(budget: float) -> None:
    net, x = bound(budget), images()
    before = outputs(net, x)
    for other in copies(net):
        assert type(other) is BoundModels
        assert equal(outputs(other, x), before)
        assert other.bank.plan == net.bank.plan
        layers = [layer for *_, layer in planned_layers(other, other.bank.plan)]
        assert all(layer.bank is other.bank for layer in layers)
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in net.parameters()}
        with torch.no_grad():
            other.bank.templates.mul_(3)
        assert not any(map(torch.equal, outputs(other, x), before))
        assert equal(outputs(net, x), before)
        for model in other:
            model(x).sum().backward()
        assert other.bank.templates.grad.any()
        assert net.bank.templates.grad is None
        again = search.apply(other, other.bank.plan)
        assert equal(outputs(again, x), outputs(other, x))


def test_a_member_works_alone() -> None:
    """And so does its copy, which has a copy of the bank."""
    net, x = bound(), images()
    before = outputs(net, x)
    member, alone = net[1], copy.deepcopy(net[1])
    del net
    assert equal(outputs([member, alone], x), [before[1], before[1]])
    layers = [[m for m in model.modules() if hasattr(m, "bank_layers")] for model in (member, alone)]
    assert len({id(layer.bank) for layer in layers[1]} | {id(layers[0][0].bank)}) == 2
    with torch.no_grad():
        layers[1][0].bank.templates.zero_()
    assert torch.equal(outputs([member], x)[0], before[1])
    assert not torch.equal(outputs([alone], x)[0], before[1])


def test_dtypes_and_modes() -> None:
    net, x = bound(0.3), images()
    before = outputs(net, x)
    for dtype, eps in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        other = copy.deepcopy(net).to(dtype)
        assert other.bank.templates.dtype == dtype
        assert other.bank.coefficients.values.dtype == torch.promote_types(dtype, torch.float32)
        for got, expected in zip(outputs(other, x.to(dtype)), before, strict=True):
            assert got.dtype == dtype
            assert (got.double() - expected).norm() <= eps * expected.norm()
    for mode in (True, False):
        assert net.train(mode) is net
        assert all(module.training == mode for module in net.modules())
    net.bank.freeze()
    assert all(map(torch.allclose, outputs(net, x), before))
    net.train()
    assert not net.bank.is_frozen
    assert not any(p.requires_grad for p in net.requires_grad_(False).parameters())


def test_a_bank_composes_once_in_a_pass_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    net, made = bound(), []
    compose = type(net.bank).compose
    monkeypatch.setattr(type(net.bank), "compose", lambda self, layers: made.append(layers) or compose(self, layers))
    outputs(net, images())
    layers = [[layer.bank_layers[0] for m, _, layer in planned_layers(net, net.bank.plan) if m == n] for n in range(3)]
    assert made == layers


def test_models_that_run_side_by_side() -> None:
    net, x = bound(), images()
    before, found = outputs(net, x), {}

    def call(n: int) -> None:
        for _ in range(20):
            found.setdefault(n, []).append(outputs([net[n]], x)[0])

    threads = [threading.Thread(target=call, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(found[n], [before[n]] * 20) for n in range(3))


def test_compiled_and_exported() -> None:
    """A member with repeated blocks, and a model of its own with whole levels."""
    x = images()
    single = small(6)
    single = search.apply(single, search.plan(single, 0.8))
    for model in (bound(0.3)[1], single):
        (expected,) = outputs([model], x)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        bank = next(m.bank for m in model.modules() if hasattr(m, "bank_layers"))
        gradients = []
        for call in (model, compiled):
            y = call(x)
            assert torch.equal(y, expected)
            y.square().sum().backward()
            gradients.append(bank.templates.grad)
            bank.templates.grad = None
        assert gradients[0].any()
        torch.testing.assert_close(*gradients)
    exported = torch.export.export(single, (x,)).module()
    assert torch.equal(exported(x), expected)
    with torch.no_grad():
        exported.bank.templates.zero_()
    assert not torch.equal(exported(x), expected)


def test_random_nets_survive_copies() -> None:
    for rng in draws(5):
        _, plan, net = applied(rng)
        net.eval()
        x = images()
        other = pickle.loads(pickle.dumps(copy.deepcopy(net)))
        assert equal(outputs(other, x), outputs(net, x))
        assert trained(other) == plan.parameters


@pytest.mark.parametrize("change", [
    lambda net: net[:2], lambda net: net[::-1], lambda net: net.select([0, 0, 1]), lambda net: net.append(small(6)),
    lambda net: net.insert(0, small(6)) or net, lambda net: net.__setitem__(1, small(4)) or net,
    lambda net: net[0].set_submodule("blocks.0.conv", nn.Conv2d(3, 6, 3)) or net,
])  # fmt: skip
def test_what_is_no_longer_that_of_the_plan_is_not_refined(change: Callable[[BoundModels], BoundModels]) -> None:
    net = change(bound())
    for refine in (search.split, search.unshare):
        with pytest.raises(ValueError, match=r"^(net: expected the 3|models: .* different) models"):
            refine(net, [(images(), torch.tensor([0, 1]))], nn.functional.cross_entropy)
