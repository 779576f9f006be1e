"""Plans of torchvision's and timm's networks; run where timm is installed (the README's timm command)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planned_networks import check_budgets
from torch import nn

from spin_kernels import search

timm = pytest.importorskip("timm", reason="timm is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")


def resnet18() -> nn.Module:
    return torchvision.models.resnet18()


def resnet50() -> nn.Module:
    return timm.create_model("resnet50")


@pytest.mark.parametrize("build", [resnet18, resnet50])
def test_five_budgets(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    check_budgets(build, 64, tmp_path)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "mixer_s32_224"])
def test_other_networks(name: str) -> None:
    """With attention, grouped convolutions and layer norms; what plain() makes of the net computes the same."""
    model = timm.create_model(name, num_classes=10).eval()
    nn.init.normal_(model.get_classifier().weight)  # some start with zeros
    plan = search.plan(model, 0.4)
    net = search.apply(model, plan)
    assert sum(p.numel() for p in net.parameters()) == plan.parameters <= plan.budget
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        y = net(x)
        assert torch.isfinite(y).all()
        torch.testing.assert_close(search.plain(net)(x), y)
    net(x).sum().backward()
    assert net.bank.templates.grad.any()
