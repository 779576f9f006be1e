"""Counts of networks against PyTorch's own, and the command that prints them."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spin_kernels import Sharing, fusion, models, reference
from spin_kernels.nn import SuperConv2d, SuperWeightBank
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


@pytest.mark.parametrize(
    "model",
    [
        models.vit(24, 4, 2, 8, 32, num_classes=10, sharing=Sharing(4, 2, "strided")),
        models.convnext(24, 4, 5, 8, num_classes=10, sharing=Sharing(4, 4), layer_scale=1e-6),
    ],
    ids=["vit", "convnext"],
)
def test_counts_of_isotropic_networks(model):
    summary = summarise(model, (32, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 32, 32))
    assert summary.flops == counter.get_total_flops()
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    alone = (
        type(model)(24, 4, 2, 8, 32) if isinstance(model, models.VisionTransformer) else models.convnext(24, 4, 5, 8)
    )
    assert summary.unshared_parameters == sum(
        p.numel() for name, p in alone.named_parameters() if not name.startswith("head")
    ) + 25 * 10 + (0 if model.index[1] else 4 * 24)  # the head; layer_scale
    others = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    extra = {"cls_token", "pos_embed", "layer_scale"}
    missing = sum(p.numel() for m in others for p in m.parameters())
    missing += sum(p.numel() for name, p in model.named_parameters() if name in extra)
    assert sum(layer.parameters for layer in summary.layers) == summary.parameters - missing
    assert summary.plans == {"W": tuple(model.sharing.index)}


def test_counts_of_a_fused_model():
    model = models.convmixer(16, 6, 5, 4, num_classes=10)
    fused = summarise(fusion.prepare(model, Sharing(6, 2), "scalar_weighted_mean"))
    assert fused.unshared_parameters == summarise(model).parameters == fused.parameters - 6
    assert sum(layer.parameters for layer in fused.layers) == fused.parameters - 6
    assert fused.plans == {"W": (0, 0, 1, 1, 2, 2)}


class FromOneBank:
    """Weights that are combinations of templates, all of one bank."""

    def apply(self, network: nn.Module) -> None:
        network.bank = SuperWeightBank({"all": 9 * 16 * 16 * 2})
        for parent in list(network.modules()):
            for name, conv in list(parent.named_children()):
                if isinstance(conv, nn.Conv2d):
                    options = {"stride": conv.stride, "padding": conv.padding, "bias": conv.bias is not None}
                    sizes = conv.in_channels, conv.out_channels, conv.kernel_size
                    setattr(parent, name, SuperConv2d(*sizes, bank=network.bank, cluster="all", **options))
        network.bank.attach(network)


@pytest.mark.parametrize("frozen", [False, True], ids=["unfrozen", "frozen"])
def test_counts_of_weights_from_a_bank(frozen):
    model = models.WideResNet(10, 2, base_channels=2, weights=FromOneBank()).bfloat16().eval()
    if frozen:
        model.bank.freeze()
    summary, plain = (summarise(m, (16, 16)) for m in (model, models.WideResNet(10, 2, base_channels=2)))
    assert [layer.shape for layer in summary.layers] == [layer.shape for layer in plain.layers]
    assert (summary.flops, summary.unshared_parameters) == (plain.flops, plain.parameters)
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    assert summary.layers[0].parameters == 0  # in the bank
    assert not frozen or model.bank.is_frozen


CONVNETS = {
    "wide_resnet": (models.WideResNet(10, 2, base_channels=4), 16),
    "resnet": (models.ResNet((1, 2, 1, 1), width=4, num_classes=7), 64),
    "vgg": (models.VGG(((4,), (6, 8)), batch_norm=True, hidden=5, num_classes=7), 32),
    "p4cnn": (models.p4cnn(3), 28),
    "repeated": (models.p4cnn(3, weights=models.RepeatedOrientations()), 28),
}


@pytest.mark.parametrize(("model", "side"), CONVNETS.values(), ids=CONVNETS)
def test_counts_of_convnets(model, side):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    summary = summarise(model, (side, side))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    images = torch.randn(2, next(m for m in model.modules() if hasattr(m, "kernel_size")).in_channels, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert 2 * summary.flops == counter.get_total_flops()
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    extra = model.bias.numel() if isinstance(model, models.P4CNN) else 0
    assert sum(layer.parameters for layer in summary.layers) == summary.parameters - norms - extra
    if isinstance(model, models.P4CNN):
        plain = 4 * 9 * 3 + 5 * 12 * 12 * 9 + 12 * 40 * 16
        assert summary.unshared_parameters == plain + norms + extra
    else:
        assert summary.unshared_parameters == summary.parameters
    assert (summary.plans, summary.map()) == ({}, "")


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
    summary = summarise(models.convmixer(8, 4, 3, 4, dw_sharing=Sharing(4, 2, "strided")))
    assert summary.plans == {"W": (0, 1, 2, 3), "F": (0, 1, 0, 1)}
    assert summary.map().splitlines()[-2:] == ["    F0 █·█·", "    F1 ·█·█"]


def test_map_of_a_deep_network():
    rows = summarise(models.convmixer(8, 112, 3, 4, sharing=Sharing(112, 112))).map().splitlines()
    assert rows[0].endswith("9         0         1")
    assert {len(row) for row in rows[1:]} == {7 + 112}


def test_refusals():
    with pytest.raises(TypeError, match=r"model: expected a network of spin_kernels.models, got Linear"):
        summarise(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"image_size: expected at least a patch of \(4, 4\), got \(3, 8\)"):
        summarise(models.convmixer(8, 2, 3, 4), (3, 8))
    with pytest.raises(ValueError, match=r"image_size: expected \(16, 16\), as the position embedding, got \(16, 8\)"):
        summarise(models.vit(8, 2, 2, 4, 16), (16, 8))
    with pytest.raises(ValueError, match=r"image_size: expected a larger image, got \(20, 28\)"):
        summarise(models.p4cnn(2), (20, 28))


def spin(*arguments):
    """Runs the command line."""
    testing = pytest.importorskip("typer.testing", reason="typer is not installed")
    from spin_kernels.__main__ import app

    return testing.CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})


@pytest.mark.parametrize("name", ["convmixer_256_8_k5_p2", "ws_vit_384_12_h6_p16_s2"])
def test_info(name, tmp_path):
    chart = tmp_path / "deep" / "map.png"
    (tmp_path / "folder.png").mkdir()
    done = spin("info", name, "--plot", chart)
    assert done.exit_code == 0, done.output
    assert f"{sum(p.numel() for p in models.create(name).parameters()):,} parameters" in done.output
    assert "block 7 pointwise" in done.output or "block 11 mlp.fc2" in done.output
    assert f"image {models.image_size(name)} x" in done.output
    assert chart.stat().st_size > 0
    for arguments, said in (
        (("info", "resnet18"), "MODEL"),
        (("info", name, "--image-size", "1"), "--image-size"),
        (("info", name, "--plot", tmp_path / "map.txt"), "expected a .png, .pdf or .svg file"),
        (("info", name, "--plot", chart / "map.png"), "expected a file that can be written"),
        (("info", name, "--plot", tmp_path / "folder.png"), "expected a file that can be written"),
        (("info", name, "--plot", tmp_path / f"{'x' * 300}.png"), "expected a file that can be written"),
    ):
        done = spin(*arguments)
        assert done.exit_code == 2
        assert said in done.output


def test_info_of_a_network_without_equal_blocks(tmp_path):
    done = spin("info", "p4cnn_repeated")
    assert done.exit_code == 0, done.output
    assert "24,676 parameters (98,090 without sharing: 75% saved)" in done.output
    assert "blocks.5.conv" in done.output
    done = spin("info", "p4cnn", "--plot", tmp_path / "map.png")
    assert done.exit_code == 2
    assert "expected a network of equal blocks, got p4cnn" in done.output
    done = spin("analyze", "vit_192_12_h3_p16", "p4cnn", "--images", tmp_path, "--plot", tmp_path / "cka.png")
    assert done.exit_code == 2
    assert "expected a network of equal blocks, got p4cnn" in done.output


def test_analyze(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the heat map goes without --plot
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    name, chart = "convmixer_256_8_k5_p2", tmp_path / "cka.png"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("not a picture")
    for i in range(3):
        pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    torch.save(models.create(name).state_dict(), tmp_path / "one.pth")
    torch.save({"head.fc.bias": torch.zeros(10)}, tmp_path / "other.pth")
    call = ("analyze", name, name, "--images", tmp_path / "images", "--plot", chart)
    one = ("--weights", tmp_path / "one.pth", "--other-weights")
    done = spin(*call, *one, tmp_path / "one.pth")
    assert done.exit_code == 0, done.output
    rows = [[float(value) for value in line.split()] for line in done.output.splitlines()[1:9]]
    assert [row[i] for i, row in enumerate(rows)] == [1.0] * 8  # a network and itself
    assert chart.stat().st_size > 0
    chart.unlink()
    for arguments, said in (
        ((*call, *one, tmp_path / "other.pth"), "expected the network's own state dict, got: Missing key"),
        ((*call, *one, tmp_path / "none.pth"), "which is not there"),
        ((*call[:4], tmp_path), "expected two pictures or more, got 0"),
        ((*call[:4], tmp_path / "images" / "0.png"), "expected a folder"),
        (("analyze", name, "ws_convmixer_768_32_k3_p14_s8", *call[3:]), "images of one size, got sides [32, 224]"),
    ):
        done = spin(*arguments)
        assert done.exit_code == 2
        assert said in done.output
    assert not list(tmp_path.glob("*.png"))  # nothing of a call that failed


def test_module_runs():
    pytest.importorskip("typer", reason="typer is not installed")
    command = [sys.executable, "-m", "spin_kernels", "info", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == models.list_models()


def test_published_image_sizes():
    sizes = {name: models.image_size(name) for name in models.list_models()}
    small = {name: size for name, size in sizes.items() if size != 224}
    assert small == dict.fromkeys(("convmixer_256_8_k5_p2", "vgg11_cifar", "wrn_28_10"), 32) | dict.fromkeys(
        ("p4cnn", "p4cnn_repeated", "z2cnn"), 28
    )
    with pytest.raises(ValueError, match="name: expected one of"):
        models.image_size("resnet18")
