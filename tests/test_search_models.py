"""Plans of this package's own networks at five budgets, applied, trained, saved, and loaded by a new process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from planned_networks import check_budgets
from torch import nn

from spin_kernels import models, search
from spin_kernels.models.resnet import ResNet
from spin_kernels.models.vgg import VGG


def narrow_resnet50() -> nn.Module:
    """An eighth of the width, to be fast."""
    return ResNet((3, 4, 6, 3), 8, 3, 10)


def narrow_vgg11() -> nn.Module:
    return VGG(((8,), (16,), (32, 32), (64, 64), (64, 64)), 3, 10, batch_norm=True, hidden=None)


def wide_resnets() -> list[nn.Module]:
    return [models.wide_resnet(10, 2, base_channels=8), models.wide_resnet(16, 1), models.wide_resnet(10, 1)]


@pytest.mark.parametrize("build", [narrow_resnet50, narrow_vgg11, wide_resnets])
def test_five_budgets(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    check_budgets(build, 32, tmp_path)


def test_resnet50_and_vgg11_as_they_are() -> None:
    """Their numbers only: the classifier stays out as long as it can."""
    for model in (models.resnet50(), models.vgg11()):
        own = sum(p.numel() for p in model.parameters())
        names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        for budget in (1.0, 0.25, 0.01):
            plan = search.plan(model, budget)
            assert 0.9 * budget * own < plan.parameters <= plan.budget == round(budget * own)
            missing = names - {layer.name for layer in plan.models[0]}
            assert missing == (set() if budget < 0.1 else {max(names & {"fc", "classifier.6"})})
