"""Vision Transformers and isotropic ConvNeXts: against plain PyTorch, shared against unshared, and in use."""

import copy
import io
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spin_kernels import Sharing, models
from spin_kernels.sharing import DISTRIBUTIONS, MAPPINGS

PARAMETERS = {
    "convnext_384_18_k7_p16": 22_308_712,
    "vit_192_12_h3_p16": 5_717_416,
    "vit_384_12_h6_p16": 22_050_664,
    "ws_convnext_384_18_k7_p16_s2": 11_674_600,
    "ws_convnext_384_18_k7_p16_s3": 8_129_896,
    "ws_vit_384_12_h6_p16_s2": 11_413_096,
    "ws_vit_384_12_h6_p16_s3": 7_867_240,
}
COMMON = {"dim": 24, "depth": 5, "patch_size": 4, "mlp_ratio": 2.0, "num_classes": 7}
SMALL = {
    "vit": COMMON | {"heads": 3, "image_size": (12, 20)},
    "convnext": COMMON | {"kernel_size": 5, "layer_scale": 0.5},
}
KINDS = ("weight", "bias")
PLAN = Sharing(5, 2)  # blocks 0 and 1, 2 and 3, 4

every_family = pytest.mark.parametrize("family", SMALL)


def make(family: str, **options) -> models.VisionTransformer | models.ConvNeXt:
    """A small network with random norms and biases: fresh ones would hide mistakes."""
    model = getattr(models, family)(**{**SMALL[family], **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def image(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(3, 3, 12, 20).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = model(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    weight = torch.linspace(-1, 1, logits.numel(), dtype=x.dtype).view(logits.shape)
    return dict(zip(names, torch.autograd.grad(logits, parameters, weight), strict=True))


# --- what they compute


def plain_vit(model: models.VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """The same from nn.TransformerEncoderLayer, which has matrices of its own in every block."""
    dim, heads, stem = model.dim, model.shared[0].attention.heads, model.patch_embed
    patches = F.unfold(images, stem.kernel_size, stride=stem.stride).transpose(1, 2)
    x = torch.stack([torch.cat((model.cls_token[0], p @ stem.weight.flatten(1).T + stem.bias)) for p in patches])
    x = x + model.pos_embed
    for d in range(model.depth):
        options = {"activation": "gelu", "layer_norm_eps": 1e-6, "batch_first": True, "norm_first": True}
        block = nn.TransformerEncoderLayer(dim, heads, model.hidden, 0.0, dtype=images.dtype, **options)
        layers = model.shared[model.sharing.index[d]]
        parts = {
            "self_attn.in_proj_": layers.attention.qkv,
            "self_attn.out_proj.": layers.attention.proj,
            "linear1.": layers.mlp.fc1,
            "linear2.": layers.mlp.fc2,
            "norm1.": model.norms[d][0],
            "norm2.": model.norms[d][1],
        }
        block.load_state_dict({f"{name}{kind}": getattr(p, kind) for name, p in parts.items() for kind in KINDS})
        x = block(x)
    return model.head(F.layer_norm(x[:, 0], (dim,), model.norm.weight, model.norm.bias, 1e-6))


def plain_convnext(model: models.ConvNeXt, images: torch.Tensor) -> torch.Tensor:
    """The same from convolutions alone, and a normalisation written out."""

    def normalise(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        return norm.weight[:, None, None] * x + norm.bias[:, None, None]

    x = F.conv2d(images, model.patch_embed.weight, model.patch_embed.bias, stride=model.patch_embed.stride)
    for d in range(model.depth):
        conv, layers = model.depthwise[d], model.shared[model.sharing.index[d]]
        k = conv.weight.shape[-1]
        y = normalise(F.conv2d(F.pad(x, [k // 2] * 4), conv.weight, conv.bias, groups=model.dim), model.norms[d])
        y = F.gelu(F.conv2d(y, layers.fc1.weight[:, :, None, None], layers.fc1.bias))
        y = F.conv2d(y, layers.fc2.weight[:, :, None, None], layers.fc2.bias)
        x = x + (y if model.layer_scale is None else y * model.layer_scale[d][:, None, None])
    return model.head(normalise(x.mean((2, 3), keepdim=True), model.norm).flatten(1))


PLAIN = {"vit": plain_vit, "convnext": plain_convnext}


@pytest.mark.parametrize("sharing", [None, PLAN], ids=["unshared", "shared"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@every_family
def test_is_that_of_plain_pytorch(family, dtype, tolerance, sharing):
    model, x = make(family, sharing=sharing).to(dtype), image(dtype)
    logits = model(x)
    assert logits.shape == (3, 7)
    assert logits.dtype == dtype
    assert relative_error(logits, PLAIN[family](model, x)) < tolerance
    assert relative_error(model.eval()(x), logits) < tolerance


def test_convnext_without_layer_scale_and_other_images():
    model = make("convnext", layer_scale=None, in_channels=1, kernel_size=7)
    assert model.layer_scale is None
    x = torch.randn(2, 1, 8, 4)  # smaller than the kernel
    assert relative_error(model(x), plain_convnext(model, x)) < 1e-5
    assert model.forward_features(x).shape == (2, 24, 2, 1)


def test_one_gray_image_of_one_patch():
    model = make("vit", image_size=4, in_channels=1)
    x = torch.randn(1, 1, 4, 4)
    assert relative_error(model(x), plain_vit(model, x)) < 1e-5
    assert model.pos_embed.shape == (1, 2, 24)


def unshared(family: str, model: nn.Module) -> nn.Module:
    """The same network with a copy of its linear layers in every block."""
    twin = make(family).to(model.norm.weight.dtype)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("shared.")}, strict=False)
    for d, s in enumerate(model.sharing.index):
        twin.shared[d].load_state_dict(model.shared[s].state_dict())
    return twin


@pytest.mark.parametrize(("mapping", "distribution"), list(itertools.product(MAPPINGS, DISTRIBUTIONS)))
@every_family
def test_gradient_of_a_shared_layer_is_the_sum_over_its_blocks(family, mapping, distribution):
    shared_depth = None if distribution == "uniform" else 4
    plan = Sharing(5, 2, mapping, distribution, shared_depth)
    model, x = make(family, sharing=plan).double(), image(torch.float64)
    twin = unshared(family, model)
    assert len(model.shared) == plan.num_shared < len(twin.shared) == 5
    torch.testing.assert_close(model(x), twin(x))
    expected = gradients(twin, x)
    for name, gradient in gradients(model, x).items():
        if name.startswith("shared."):
            _, s, layer = name.split(".", 2)
            users = [d for d in range(5) if plan.index[d] == int(s)]
            torch.testing.assert_close(gradient, sum(expected[f"shared.{d}.{layer}"] for d in users), msg=name)
        else:
            torch.testing.assert_close(gradient, expected[name], msg=name)


@every_family
def test_block_outputs_come_one_by_one(family):
    model, x = make(family, sharing=PLAN), image()
    calls = []
    for module in model.shared:
        (module if family == "convnext" else module.mlp).register_forward_hook(lambda *_: calls.append(1))
    outputs = []
    for d, features in enumerate(model.block_outputs(x)):
        assert len(calls) == d + 1
        outputs.append(features)
    assert [tuple(y.shape) for y in outputs] == [(3, 16, 24) if family == "vit" else (3, 24, 3, 5)] * 5
    assert torch.equal(outputs[-1], model.forward_features(x))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))


# --- parameters


def test_names_and_shapes():
    """Each distinct layer once, whatever the number of its blocks."""
    shapes = {name: tuple(t.shape) for name, t in make("vit", sharing=Sharing(5, 5)).state_dict().items()}
    norms = {f"norms.{d}.{i}.{kind}": (24,) for d in range(5) for i in range(2) for kind in KINDS}
    assert shapes == norms | {
        "cls_token": (1, 1, 24),
        "pos_embed": (1, 16, 24),
        "patch_embed.weight": (24, 3, 4, 4),
        "patch_embed.bias": (24,),
        "shared.0.attention.qkv.weight": (72, 24),
        "shared.0.attention.qkv.bias": (72,),
        "shared.0.attention.proj.weight": (24, 24),
        "shared.0.attention.proj.bias": (24,),
        "shared.0.mlp.fc1.weight": (48, 24),
        "shared.0.mlp.fc1.bias": (48,),
        "shared.0.mlp.fc2.weight": (24, 48),
        "shared.0.mlp.fc2.bias": (24,),
        "norm.weight": (24,),
        "norm.bias": (24,),
        "head.weight": (7, 24),
        "head.bias": (7,),
    }
    shapes = {name: tuple(t.shape) for name, t in make("convnext", sharing=Sharing(5, 5)).state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if name.startswith(("shared", "depthwise.4", "layer"))} == {
        "shared.0.fc1.weight": (48, 24),
        "shared.0.fc1.bias": (48,),
        "shared.0.fc2.weight": (24, 48),
        "shared.0.fc2.bias": (24,),
        "depthwise.4.weight": (24, 1, 5, 5),
        "depthwise.4.bias": (24,),
        "layer_scale": (5, 24),
    }


@every_family
def test_initialisation_is_that_of_the_papers(family):
    model = getattr(models, family)(**SMALL[family] | {"dim": 96})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert parameter.eq(1).all(), name
        elif name == "layer_scale":
            assert parameter.eq(0.5).all()
        elif parameter.numel() > 500:
            assert 0.018 < parameter.std() < 0.022, name
            assert parameter.abs().max() < 0.12, name
    assert family == "convnext" or model.cls_token.any()


def test_no_weight_decay():
    model = make("vit", sharing=Sharing(5, 5))
    decayed = {name for name, _ in model.named_parameters()} - model.no_weight_decay()
    layers = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    assert decayed == {"patch_embed.weight", "head.weight", *(f"shared.0.{layer}.weight" for layer in layers)}
    model = make("convnext", sharing=Sharing(5, 5))
    decayed = {name for name, _ in model.named_parameters()} - model.no_weight_decay()
    filters = {f"depthwise.{d}.weight" for d in range(5)}
    assert decayed == {"patch_embed.weight", "head.weight", "shared.0.fc1.weight", "shared.0.fc2.weight", *filters}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = models.create(name)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    family, dim, depth, size, patch = name.removeprefix("ws_").split("_")[:5]
    assert (model.dim, model.depth) == (int(dim), int(depth))
    assert model.patch_embed.kernel_size == model.patch_embed.stride == (int(patch[1:]),) * 2
    has = model.shared[0].attention.heads if family == "vit" else model.depthwise[0].kernel_size[0]
    assert has == int(size[1:])
    assert model.sharing.rate == (int(name[-1]) if name.startswith("ws_") else 1)
    assert models.image_size(name) == 224
    assert name in models.list_models()
    assert name in models.isotropic_models()


def test_published_sizes_add_up():
    """Parameters of WS-DeiT-S and of the isotropic WS-ConvNeXt-S at rate 2, term by term."""
    dim, hidden, classes = 384, 4 * 384, 1000
    mlp = dim * hidden + hidden + hidden * dim + dim
    ends = 3 * 16 * 16 * dim + dim + 2 * dim + dim * classes + classes
    attention = dim * 3 * dim + 3 * dim + dim * dim + dim
    vit = ends + dim + (1 + 14 * 14) * dim + 12 * 4 * dim + 6 * (attention + mlp)
    assert vit == PARAMETERS["ws_vit_384_12_h6_p16_s2"]
    convnext = ends + 18 * (49 * dim + dim + 2 * dim) + 9 * mlp
    assert convnext == PARAMETERS["ws_convnext_384_18_k7_p16_s2"]


def test_create_overrides():
    model = models.create("ws_vit_384_12_h6_p16_s2", dim=12, image_size=32, num_classes=3, drop_rate=0.5)
    assert (model.dim, model.image_size, model.head.out_features, model.dropout.p) == (12, (32, 32), 3, 0.5)
    assert models.create("convnext_384_18_k7_p16", dim=8, depth=1, layer_scale=1e-6).layer_scale.shape == (1, 8)


# --- errors


@pytest.mark.parametrize(
    ("family", "argument", "value"),
    [
        *itertools.product(SMALL, ("dim", "depth", "patch_size", "in_channels", "num_classes"), (0, 1.5, True, "1")),
        *itertools.product(SMALL, ("mlp_ratio",), (0, -1.0, 0.01, float("nan"), "4")),
        *itertools.product(SMALL, ("drop_rate",), (-0.1, 1.1, None)),
        *itertools.product(("vit",), ("heads",), (0, 5, 48, 3.0)),
        *itertools.product(("vit",), ("image_size",), (0, 10, (8, 10), (8,), (8, 8, 8), 8.0, None, "88")),
        *itertools.product(("convnext",), ("kernel_size",), (0, 4, 5.0)),
        *itertools.product(("convnext",), ("layer_scale",), (0, -1.0, "1")),
    ],
)
def test_errors_name_the_argument(family, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: expected .* got ") as raised:
        make(family, **{argument: value})
    assert str(raised.value).endswith(f"got {value!r}")


@every_family
def test_errors_of_plans(family):
    with pytest.raises(TypeError, match=r"^sharing: expected a Sharing"):
        make(family, sharing=2)
    with pytest.raises(ValueError, match=r"^sharing: expected a plan for 5 blocks, got one for 6"):
        make(family, sharing=Sharing(6, 2))


@pytest.mark.parametrize("shape", [(2, 1, 12, 20), (3, 12, 20), (2, 3, 12, 18), (2, 3, 0, 20), (2, 3, 12, 20, 1)])
@every_family
def test_images_of_another_shape(family, shape):
    with pytest.raises(ValueError, match=r"^images: expected shape \(B, 3, .* got \(") as raised:
        make(family)(torch.empty(shape))
    assert str(raised.value).endswith(f"got {shape}")


def test_images_of_another_size():
    with pytest.raises(ValueError, match=r"^images: expected shape \(B, 3, 12, 20\), got \(2, 3, 20, 12\)"):
        make("vit")(torch.randn(2, 3, 20, 12))
    assert make("convnext")(torch.randn(2, 3, 20, 12)).shape == (2, 7)


# --- what a model meets


@every_family
def test_dropout(family):
    model, x = make(family, drop_rate=0.5), image()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.forward_features(x), model.forward_features(x))
    assert torch.equal(model.eval()(x), model(x))


@every_family
def test_no_images(family):
    assert make(family, sharing=PLAN)(image()[:0]).shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_family
def test_low_precision(family, dtype):
    model, x = make(family, sharing=PLAN).to(dtype), image(dtype)
    logits = model(x)
    assert logits.dtype == dtype
    assert relative_error(logits, copy.deepcopy(model).double()(x.double())) < 0.05
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


@every_family
def test_autocast(family):
    model, x = make(family, sharing=PLAN), image()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        features = model.forward_features(x)
    assert logits.dtype == torch.bfloat16
    assert features.dtype == torch.float32  # the residual is not rounded block by block
    assert relative_error(logits, model(x)) < 0.05
    logits.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@every_family
def test_copies_and_state_dict(family):
    model, x = make(family, sharing=Sharing(5, 2, "random")), image()
    expected = model(x)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    loaded = getattr(models, family)(**SMALL[family], sharing=Sharing(5, 2, "random"))
    loaded.load_state_dict(model.state_dict())
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False), loaded)
    for twin in copies:
        assert torch.equal(twin(x), expected)
        twin.shared[0].load_state_dict(twin.shared[1].state_dict())
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match=r"shared\.3"):
        loaded.load_state_dict(make(family).state_dict())


@every_family
def test_training_reduces_the_loss(family):
    model, x, y = make(family, sharing=PLAN), image(), torch.tensor([1, 4, 6])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@every_family
def test_compiled_training_step(family):
    model, x = make(family, sharing=PLAN), image()
    compiled = torch.compile(model, fullgraph=True)
    assert relative_error(compiled(x), model(x)) < 1e-5
    for name, gradient in gradients(compiled, x).items():
        expected = gradients(model, x)[name.removeprefix("_orig_mod.")]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-6, name


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
@every_family
def test_export(family, strict, tmp_path):
    model, x = make(family, sharing=PLAN).eval(), image()
    batch = {"images": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (x,), dynamic_shapes=batch, strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert relative_error(loaded(x), model(x)) < 1e-5
    assert relative_error(loaded(x[:1]), model(x[:1])) < 1e-5
    stored = sum(t.numel() for t in program.state_dict.values())
    assert stored == sum(p.numel() for p in model.parameters())  # a shared layer once


# --- registration in a timm that does not load at first (test_timm_models.py has the real one)


def test_registration_survives_a_broken_timm(tmp_path):
    package = tmp_path / "timm"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import sys\n"
        "if sys.broken:\n"
        "    raise ImportError('torchvision does not load')\n"
        "from .models import create_model\n"
    )
    (package / "models.py").write_text(
        "registered = []\n"
        "def create_model(): pass\n"
        "def register_model(function): registered.append(function.__name__)\n"
    )
    program = f"""
import importlib.util, sys
from importlib.machinery import SourceFileLoader
sys.path.insert(0, {str(tmp_path)!r})
finders = list(sys.meta_path)
import spin_kernels
assert "timm" not in sys.modules
sys.broken = True
for _ in range(2):
    try:
        import timm
    except ImportError as error:
        assert str(error) == "torchvision does not load"
    else:
        raise AssertionError
    spec = importlib.util.find_spec("timm")
    assert "timm" not in sys.modules
    assert spec.origin == {str(package / "__init__.py")!r}
    assert spec.loader.is_package("timm") and "broken" in spec.loader.get_source("timm")
    assert importlib.util.find_spec("timmy") is None
sys.broken = False
import timm.models
assert timm.models.registered == ["spin_" + name for name in spin_kernels.models.isotropic_models()]
assert type(timm.__loader__) is SourceFileLoader and timm.__spec__.loader is timm.__loader__
assert not any(type(finder).__module__.startswith("spin_kernels") for finder in sys.meta_path)
importlib.reload(timm)
assert len(timm.models.registered) == len(spin_kernels.models.isotropic_models())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
