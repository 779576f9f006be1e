"""Networks that make their weights from a bank or by repeating smaller ones: counts, values, errors."""

import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor, nn

from spin_kernels import models
from spin_kernels.nn import RepeatConv2d, SuperConv2d, SuperLinear, SuperWeightBank
from spin_kernels.weights import Repeated, SuperWeights, count_parameters


def network(sides: tuple[int, ...] = (3, 3, 1, 3, 1), width: int = 12) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for number, side in enumerate(sides):
        out = width + 5 * number
        layers += [nn.Conv2d(channels, out, side, padding=side // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 40), nn.ReLU(), nn.Linear(40, 7)]
    return nn.Sequential(*layers)


def values_used(bank: SuperWeightBank) -> Tensor:
    used = torch.zeros(len(bank.templates), dtype=torch.bool, device="cpu")
    for shape, slabs in bank.layers:
        taps = shape[2] * shape[3]
        for slab in slabs:
            for k in range(slab.templates):
                first = bank.place(slab.cluster).start + slab.start + k * slab.stride
                for o in range(slab.out):
                    used[first + o * slab.row * taps : first + (o * slab.row + slab.in_channels) * taps] = True
    return used


@pytest.mark.parametrize("bins", [1, 3])
@pytest.mark.parametrize("width", [5, 12, 33])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.77, 1.0, "count"])
def test_exact_budget(budget: float | str, width: int, bins: int) -> None:
    net = network(width=width)
    own = count_parameters(net)
    wanted = round(own * budget) if isinstance(budget, float) else own // 2 + int(torch.randint(own // 4, ()))
    SuperWeights(budget if isinstance(budget, float) else wanted, bins=bins).apply(net)
    assert count_parameters(net) == wanted
    assert values_used(net.bank).all()  # no number is there for the count alone
    y = net(torch.randn(2, 3, 8, 8))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    made = sum((weight * torch.randn_like(weight)).sum() for weight in net.bank.compose())
    (gradient,) = torch.autograd.grad(made, net.bank.templates)  # not the loss': channels may be dead
    assert (gradient != 0).all()


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 1.0])
def test_wide_resnet_of_exact_counts(budget: float) -> None:
    with torch.device("meta"):
        net = models.create("wrn_28_10", weights=SuperWeights(budget))
    assert count_parameters(net) == round(budget * 36_479_194)
    assert values_used(net.bank).all()


def test_no_budget_is_exceeded() -> None:
    """Or it is refused: tiny networks of any kernel sizes."""
    rng = Random(int(torch.randint(2**31, ())))
    made, refusals = 0, []
    for _ in range(300):
        sizes = [(rng.randint(1, 9), rng.randint(1, 9), rng.choice([1, 3, 5, 7])) for _ in range(rng.randint(1, 4))]
        net = nn.Sequential(*(nn.Conv2d(*size) for size in sizes))
        budget = rng.randint(1, count_parameters(net))
        settings = SuperWeights(budget, bins=rng.randint(1, 3), max_templates=rng.choice([1, 2, 8]))
        try:
            settings.apply(net)
        except ValueError as error:
            refusals.append(str(error))
            continue
        made += 1
        assert count_parameters(net) <= budget, f"{sizes}, {settings}"
        assert values_used(net.bank).all()
        assert all(weight.isfinite().all() for weight in net.bank.compose())
    assert made > 100
    assert all(text.startswith("budget: expected") for text in refusals)


@pytest.mark.parametrize("side", [3, 5])
def test_budget_without_small_kernels(side: int) -> None:
    net = nn.Sequential(*[nn.Conv2d(6, 6, side, padding="same") for _ in range(5)], nn.Flatten(), nn.Linear(384, 3))
    wanted = count_parameters(net) // 2
    SuperWeights(wanted).apply(net)
    assert 0 <= wanted - count_parameters(net) < side**2
    assert values_used(net.bank).all()


def test_rows_of_their_own_keep_their_values() -> None:
    net = network(width=30)
    before = [m.weight.detach().clone() for m in net if isinstance(m, (nn.Conv2d, nn.Linear))]
    SuperWeights(0.8).apply(net)
    kept = 0
    for (_, slabs), weight, now in zip(net.bank.layers, before, net.bank.compose(), strict=False):
        for slab in slabs:
            rows = slice(slab.out_offset, slab.out_offset + slab.out)
            columns = slice(slab.in_offset, slab.in_offset + slab.in_channels)
            if slab.coefficients is None:
                torch.testing.assert_close(now[rows, columns], weight.view(now.shape)[rows, columns])
                kept += 1
    assert kept > 2


def test_what_is_replaced() -> None:
    net = network()
    net.append(nn.Conv2d(7, 7, 1, groups=7))
    bias = net[17].bias
    SuperWeights(0.5).apply(net)
    kinds = [type(m) for m in net if isinstance(m, (nn.Conv2d, nn.Linear, SuperConv2d, SuperLinear))]
    assert kinds == [SuperConv2d] * 5 + [SuperLinear, nn.Linear, nn.Conv2d]
    assert net[17].bias is bias


@pytest.mark.parametrize("modulation", ["swish", "sign", "linear", "drop", "random"])
def test_repeated(modulation: str) -> None:
    net = network()
    shapes = [m.weight.shape for m in net if isinstance(m, nn.Conv2d)]
    Repeated((2, 3), modulation).apply(net)
    convolutions = [m for m in net if isinstance(m, (nn.Conv2d, RepeatConv2d))]
    assert [type(m) for m in convolutions] == [nn.Conv2d] + [RepeatConv2d] * 4
    for layer, shape in zip(convolutions[1:], shapes[1:], strict=True):
        assert layer.weight.shape[:2] == (math.ceil(shape[0] / 2), math.ceil(shape[1] / 3))
        assert layer.repeated_weight().shape == shape
    y = net(torch.randn(2, 3, 8, 8))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None for p in net.parameters())


def test_layers_that_are_not_trained_or_subclasses_stay() -> None:
    class Standardised(nn.Conv2d):
        pass

    for weights in (SuperWeights(0.7), Repeated((2, 2), first=True)):
        net = nn.Sequential(Standardised(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).eval()
        net[1].requires_grad_(False)
        kept = [net[0], net[1]]
        weights.apply(net)
        assert [net[0], net[1]] == kept
        assert type(net[2]) in (SuperConv2d, RepeatConv2d)
        assert not any(module.training for module in net.modules())


def test_networks_that_cannot_be_changed() -> None:
    tied, twice = [nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)) for _ in range(2)]
    tied[1].weight = tied[0].weight
    twice[1] = twice[0]
    for net in (tied, twice):
        for weights in (SuperWeights(0.7), Repeated((2, 2))):
            with pytest.raises(ValueError, match=r"network: .*0 and 1"):
                weights.apply(net)
    mixed = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3).double())
    taken = nn.Sequential(nn.Conv2d(4, 4, 3))
    taken.bank = nn.Identity()
    for net in (mixed, taken, nn.ModuleList([nn.Conv2d(4, 4, 3)]), nn.Conv2d(4, 4, 3)):
        with pytest.raises(ValueError, match=r"^network: expected"):
            SuperWeights(0.7).apply(net)


BAD: dict[str, tuple[Callable[[], None], str]] = {
    "negative budget": (lambda: SuperWeights(-3), "budget"),
    "no number": (lambda: SuperWeights("4M"), "budget"),
    "no number at all": (lambda: SuperWeights(float("nan")), "budget"),
    "infinite": (lambda: SuperWeights(float("inf")), "budget"),
    "one number of tiles": (lambda: Repeated(2), "tiles"),
    "too small": (lambda: SuperWeights(0.05).apply(network()), "budget"),
    "too large": (lambda: SuperWeights(1.5).apply(network()), "budget"),
    "no bins": (lambda: SuperWeights(0.5, bins=0), "bins"),
    "no templates": (lambda: SuperWeights(0.5, max_templates=0), "max_templates"),
    "nothing to replace": (lambda: SuperWeights(0.5).apply(nn.Sequential(nn.Linear(3, 4))), "network"),
    "tiles": (lambda: Repeated((0, 2)), "tiles"),
    "modulation": (lambda: Repeated(modulation="tanh").apply(network()), "modulation"),
}


@pytest.mark.parametrize(("make", "text"), BAD.values(), ids=BAD)
def test_bad_arguments(make: Callable[[], None], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
