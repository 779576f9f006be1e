"""Our networks in timm's registry, the Vision Transformer against timm's, ResNet and VGG against torchvision's.

Run where timm is installed.
"""

import subprocess
import sys

import pytest
import torch

from spin_kernels import models

timm = pytest.importorskip("timm", reason="timm is not installed")
create_optimizer = pytest.importorskip("timm.optim").create_optimizer_v2

PUBLISHED = {"deit_small_patch16_224": "vit_384_12_h6_p16", "deit_tiny_patch16_224": "vit_192_12_h3_p16"}
RENAMED = {
    "patch_embed.proj.": "patch_embed.",
    ".norm1.": ".0.",
    ".norm2.": ".1.",
    ".attn.": ".attention.",
}


def ours(key: str) -> str:
    """Our name of a parameter of timm's Vision Transformer."""
    if key.startswith("blocks."):
        key = key.replace("blocks.", "norms." if ".norm" in key else "shared.", 1)
    for theirs, new in RENAMED.items():
        key = key.replace(theirs, new)
    return key


@pytest.mark.parametrize("order", ["import spin_kernels, timm", "import timm, spin_kernels", "import timm.models.vgg"])
def test_import_orders(order):
    program = f"""
import importlib.util, sys, warnings
warnings.simplefilter("error", UserWarning)  # of a name registered twice
{order}
import spin_kernels, timm, torch
assert timm.list_models("spin_*", module="timm_registry")
assert set(timm.list_models("spin_*")) == {{"spin_" + name for name in spin_kernels.models.isotropic_models()}}
model = timm.create_model("spin_ws_vit_384_12_h6_p16_s2", num_classes=10, in_chans=1, drop_rate=0.1)
assert model(torch.randn(1, 1, 224, 224)).shape == (1, 10) and model.dropout.p == 0.1
assert importlib.util.find_spec("timm") is timm.__spec__
assert not any(type(finder).__module__.startswith("spin_kernels") for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_importing_us_does_not_import_timm():
    program = """
import importlib.util, sys, spin_kernels
assert "timm" not in sys.modules
assert importlib.util.find_spec("timm").origin.endswith("__init__.py")
assert not any(name.split(".")[0] in ("timm", "torchvision") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", models.isotropic_models())
def test_every_name(name):
    with torch.device("meta"):
        model = timm.create_model(f"spin_{name}", num_classes=10, in_chans=2, drop_rate=0.1)
        expected = models.create(name, num_classes=10, in_channels=2)
        side = models.image_size(name)
        assert model(torch.empty(2, 2, side, side)).shape == (2, 10)
    assert type(model) is type(expected)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    assert any(m.p == 0.1 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert (model.num_classes, model.in_chans) == (10, 2)
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["mean"], config["std"]) == ((2, side, side), (0.5, 0.5), (0.5, 0.5))


def test_data_configurations():
    with torch.device("meta"):
        model = timm.create_model("spin_vit_192_12_h3_p16")
        wide = timm.create_model("spin_vit_192_12_h3_p16", img_size=(64, 96), pretrained_cfg_overlay={"crop_pct": 0.9})
        own = timm.create_model("spin_convmixer_768_32_k7_p7", pretrained_cfg={"input_size": (3, 288, 288)})
        gray = {"mean": (0.13,), "std": (0.31,)}
        digits = timm.create_model("spin_convmixer_256_8_k5_p2", in_chans=1, pretrained_cfg_overlay=gray)
        cifar = timm.create_model("spin_convmixer_256_8_k5_p2", cache_dir="nowhere")
        two = timm.create_model("spin_convnext_384_18_k7_p16", in_channels=2)
    assert model.pretrained_cfg is model.default_cfg
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 224, 224)
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert config["std"] == timm.data.IMAGENET_DEFAULT_STD
    assert wide(torch.empty(1, 3, 64, 96, device="meta")).shape == (1, 1000)
    assert timm.data.resolve_model_data_config(wide)["input_size"] == (3, 64, 96)
    assert timm.data.resolve_model_data_config(wide)["crop_pct"] == 0.9
    assert timm.data.resolve_model_data_config(own)["input_size"] == (3, 288, 288)
    config = timm.data.resolve_model_data_config(digits)
    assert (config["input_size"], config["mean"], config["std"]) == ((1, 32, 32), (0.13,), (0.31,))
    config = timm.data.resolve_model_data_config(cifar)
    assert (config["input_size"], config["mean"]) == ((3, 32, 32), (0.4914, 0.4822, 0.4465))
    assert two.in_chans == 2
    assert cifar.num_classes == timm.get_pretrained_cfg("spin_convmixer_256_8_k5_p2").num_classes == 10


def test_errors():
    with pytest.raises(
        ValueError, match=r"^pretrained: expected False, got True; no weights of spin_vit_192_12_h3_p16"
    ):
        timm.create_model("spin_vit_192_12_h3_p16", pretrained=True)
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag"):
        timm.create_model("spin_vit_192_12_h3_p16.in1k")
    with pytest.raises(ValueError, match=r"^num_classes: expected a positive integer, got 0"):
        timm.create_model("spin_vit_192_12_h3_p16", num_classes=0)


def test_checkpoints_and_optimizers_of_timm(tmp_path):
    options = {"dim": 12, "image_size": 32, "num_classes": 5}
    model = timm.create_model("spin_ws_vit_384_12_h6_p16_s3", **options)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = timm.create_model("spin_ws_vit_384_12_h6_p16_s3", checkpoint_path=tmp_path / "model.pth", **options)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))
    groups = create_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for name, p in model.named_parameters() if name not in model.no_weight_decay()}


@pytest.mark.parametrize(("theirs", "name"), PUBLISHED.items())
def test_deit_has_the_same_parameters(theirs, name):
    with torch.device("meta"):
        expected, model = timm.create_model(theirs), models.create(name)
    shapes = {ours(key): tensor.shape for key, tensor in expected.state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in expected.parameters())


@pytest.mark.parametrize(("theirs", "name"), PUBLISHED.items())
def test_deit_computes_the_same(theirs, name):
    expected, model = timm.create_model(theirs).eval(), models.create(name).eval()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.load_state_dict({ours(key): tensor for key, tensor in expected.state_dict().items()})
        x = torch.randn(2, 3, 224, 224)
        pairs = [
            (model(x), expected(x)),
            (model.norm(model.forward_features(x)), expected.forward_features(x)),
        ]
    for actual, theirs_ in pairs:
        assert (actual - theirs_).norm() <= 1e-5 * theirs_.norm()


# --- torchvision's


CONVNETS = {
    "resnet50": (models.resnet50, {}),
    "vgg11": (models.vgg11, {}),
    "vgg11_bn": (models.vgg11, {"batch_norm": True}),
}


@pytest.mark.parametrize("name", CONVNETS)
def test_torchvision_has_the_same_names(name):
    zoo = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    build, options = CONVNETS[name]
    with torch.device("meta"):
        expected, model = getattr(zoo, name)(), build(**options)
    names = [(key, tensor.shape) for key, tensor in expected.state_dict().items()]
    assert [(key, tensor.shape) for key, tensor in model.state_dict().items()] == names


@pytest.mark.parametrize(("name", "side"), [("resnet50", 64), ("vgg11", 40)])
def test_torchvision_computes_the_same(name, side):
    zoo = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    build, options = CONVNETS[name]
    expected = getattr(zoo, name)().eval()
    with torch.device("meta"):
        model = build(**options).eval()
    for module in expected.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # fresh ones would hide mistakes
            for tensor in (module.weight, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                torch.nn.init.normal_(tensor, std=0.1)
    model.load_state_dict(expected.state_dict(), assign=True)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        actual, theirs = model(x), expected(x)
    assert (actual - theirs).norm() <= 1e-5 * theirs.norm()
