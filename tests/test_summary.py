"""Counts of networks against PyTorch's own, and the command that prints them."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spin_kernels import Sharing, fusion, models, reference
from spin_kernels.summary import summarise

PLANS = {
    "shared": {"sharing": Sharing(6, 3, "strided")},
    "part": {"sharing": Sharing(6, 2, distribution="middle", shared_depth=4)},
    "templates": {"sharing": Sharing(6, 2), "templates": 2},
    "gains": {"sharing": Sharing(6, 6), "transform": "channel"},
    "filters": {"sharing": Sharing(6, 2), "dw_sharing": Sharing(6, 3)},
    "alone": {},
}


@pytest.mark.parametrize("plan", PLANS)
def test_counts(plan):
    model = models.convmixer(16, 6, 5, 4, num_classes=10, **PLANS[plan]).eval()
    summary = summarise(model, (32, 24))
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # which knows ordinary convolutions only
        patches = model.patch_embed(torch.randn(1, 3, 32, 24))
        model.head(reference.mixer(patches, **model.mixer._op_arguments())[0])
    assert abs(counter.get_total_flops() - summary.flops) <= 2 * 3 * 2 * 16 * 16  # but for composing templates
    assert summary.tokens == (8, 6)
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    assert summary.bytes == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if plan in ("shared", "part", "filters", "alone"):
        assert sum(layer.parameters for layer in summary.layers) == summary.parameters
    plain = models.convmixer(16, 6, 5, 4, num_classes=10)
    gains = 0 if model.mixer.pw_gain is None else model.mixer.pw_gain.numel()
    assert summary.unshared_parameters == sum(p.numel() for p in plain.parameters()) + gains


def test_counts_of_a_fused_model():
    model = models.convmixer(16, 6, 5, 4, num_classes=10)
    fused = summarise(fusion.prepare(model, Sharing(6, 2), "scalar_weighted_mean"))
    assert fused.unshared_parameters == summarise(model).parameters == fused.parameters - 6
    assert sum(layer.parameters for layer in fused.layers) == fused.parameters - 6
    assert fused.index == (0, 0, 1, 1, 2, 2)


def test_the_published_file():
    """Of 44,624,480 bytes, parameters and buffers account for all but half a per cent."""
    summary = summarise(models.create("ws_convmixer_768_32_k3_p14_s2"))
    assert summary.parameters == 11_016_424
    assert abs(summary.bytes / 44_624_480 - 1) < 0.005


def test_map():
    summary = summarise(models.convmixer(8, 12, 3, 4, sharing=Sharing(12, 4)))
    assert summary.map().splitlines() == [
        " block           1",
        "       012345678901",
        "    W0 ████········",
        "    W1 ····████····",
        "    W2 ········████",
    ]


def test_refusals():
    with pytest.raises(TypeError, match="model: expected a ConvMixer of spin_kernels, got Linear"):
        summarise(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"image_size: expected at least a patch of \(4, 4\), got \(3, 8\)"):
        summarise(models.convmixer(8, 2, 3, 4), (3, 8))


def test_command(tmp_path):
    testing = pytest.importorskip("typer.testing", reason="typer is not installed")
    from spin_kernels.__main__ import app

    def spin(*arguments):
        return testing.CliRunner().invoke(app, arguments)

    name, chart = "convmixer_256_8_k5_p2", tmp_path / "deep" / "map.png"
    done = spin("info", name, "--plot", str(chart))
    assert done.exit_code == 0, done.output
    assert f"{sum(p.numel() for p in models.create(name).parameters()):,} parameters" in done.output
    assert "block 7 pointwise" in done.output
    assert "image 32 x 32" in done.output
    assert chart.stat().st_size > 0
    for arguments, said in ((("info", "resnet18"), "MODEL"), (("info", name, "--image-size", "1"), "--image-size")):
        done = spin(*arguments)
        assert done.exit_code == 2
        assert said in done.output


def test_module_runs():
    pytest.importorskip("typer", reason="typer is not installed")
    command = [sys.executable, "-m", "spin_kernels", "info", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == models.list_models()


def test_published_image_sizes():
    sizes = {name: models.image_size(name) for name in models.list_models()}
    assert {name for name, size in sizes.items() if size != 224} == {"convmixer_256_8_k5_p2"}
    assert sizes["convmixer_256_8_k5_p2"] == 32
    with pytest.raises(ValueError, match="name: expected one of"):
        models.image_size("resnet18")
