"""Wide ResNet, ResNet, VGG and P4CNN: sizes, layers that are replaced, rotations, and in use."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spin_kernels import models
from spin_kernels.models.p4cnn import P4Conv2d
from spin_kernels.nn import RepeatConv2d

PARAMETERS = {
    "p4cnn": 24_620,
    "p4cnn_repeated": 24_676,
    "resnet50": 25_557_032,
    "vgg11": 132_863_336,
    "vgg11_cifar": 9_231_114,
    "wrn_28_10": 36_479_194,
    "z2cnn": 21_630,
}
SMALL = {
    "wide_resnet": (models.WideResNet, {"depth": 16, "width": 2, "base_channels": 4, "num_classes": 5}, 12),
    "resnet": (models.ResNet, {"layers": (2, 1, 1, 1), "width": 4, "num_classes": 5}, 64),
    "vgg": (models.VGG, {"stages": ((4,), (6, 8)), "hidden": 32, "num_classes": 5, "drop_rate": 0.1}, 32),
    "vgg_cifar": (models.VGG, {"stages": ((4,), (8,)), "hidden": None, "batch_norm": True, "num_classes": 5}, 8),
    "p4cnn": (models.P4CNN, {"channels": 3, "in_channels": 3, "num_classes": 5}, 28),
    "z2cnn": (models.P4CNN, {"channels": 6, "in_channels": 3, "num_classes": 5, "orientations": 1}, 28),
}

every_network = pytest.mark.parametrize("kind", SMALL)


class Halved:
    """Weights that repeat a base of half the channels."""

    def apply(self, network: nn.Module) -> None:
        for parent in list(network.modules()):
            for name, conv in list(parent.named_children()):
                if isinstance(conv, nn.Conv2d):
                    into, out = conv.in_channels, conv.out_channels
                    base = (math.ceil(out / 2), math.ceil(into / 2))
                    options = {"stride": conv.stride, "padding": conv.padding, "bias": conv.bias is not None}
                    setattr(parent, name, RepeatConv2d(into, out, conv.kernel_size, base, **options))


def make(kind: str, **options) -> nn.Module:
    """A small network with random BatchNorms: fresh ones would hide mistakes."""
    build, published, _ = SMALL[kind]
    model = build(**{**published, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.3)
    return model


def images(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    side = SMALL[kind][2]
    return torch.randn(3, 3, side, side, dtype=dtype)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- published networks


def test_list_models():
    assert set(models.list_models()) - set(models.isotropic_models()) == set(PARAMETERS)


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_sizes(name, parameters):
    side, channels = models.image_size(name), 1 if name.endswith(("cnn", "repeated")) else 3
    with torch.device("meta"):
        model = models.create(name)
        assert model(torch.empty(2, channels, side, side)).shape == (2, 10 if side < 224 else 1000)
    assert count(model) == parameters


def test_more_published_sizes():
    with torch.device("meta"):
        assert count(models.wide_resnet(num_classes=100)) == 36_536_884
        assert count(models.resnet50()) == PARAMETERS["resnet50"]
        assert count(models.vgg11()) == PARAMETERS["vgg11"]
        assert count(models.vgg11(num_classes=10, batch_norm=True, hidden=None)) == PARAMETERS["vgg11_cifar"]
        assert count(models.create("wrn_28_10", depth=16, width=4)) == 2_748_890


@pytest.mark.parametrize(("channels", "classes"), [(10, 10), (3, 5)])
def test_sizes_of_p4cnn_add_up(channels, classes):
    rest = 6 * 2 * channels + classes
    fixed = 9 * channels + 5 * 9 * channels * 4 * channels + 16 * classes * 4 * channels + rest
    assert count(models.p4cnn(channels, classes)) == fixed
    repeated = models.p4cnn(channels, classes, weights=models.RepeatedOrientations())
    assert count(repeated) == fixed + 7 * 2 * 4
    layers = [module for module in repeated.modules() if isinstance(module, RepeatConv2d)]
    assert [layer.base for layer in layers] == [(channels, 1), *[(channels, 4 * channels)] * 5, (classes, 4 * channels)]
    plain = 9 * channels + 5 * 9 * channels**2 + 16 * classes * channels + rest
    assert count(models.p4cnn(channels, classes, orientations=1)) == plain


def test_order_of_a_wide_resnet():
    names = [name for name, module in models.wide_resnet(10, 1).named_modules() if not list(module.children())]
    block = ["bn1", "conv1", "bn2", "dropout", "conv2"]
    assert names == [
        "stem",
        *(f"stages.0.0.{name}" for name in block),  # with as many channels as the stem: no shortcut
        *(f"stages.{stage}.0.{name}" for stage in (1, 2) for name in [*block, "shortcut"]),
        "bn",
        "classifier",
    ]


# --- rotations


def test_p4_convolution_is_its_definition():
    for images_, into in ((True, 3), (False, 8)):
        conv = P4Conv2d(into, 12, 3, images_).double()
        x = torch.randn(2, into, 7, 6, dtype=torch.float64)
        expected = torch.zeros(2, 4, 3, 5, 4, dtype=torch.float64)
        maps = 1 if images_ else 4
        for r in range(4):
            for s in range(maps):
                read = x.unflatten(1, (maps, -1))[:, s]
                filters = conv.weight.unflatten(1, (maps, -1))[:, (s - r) % maps]
                expected[:, r] += F.conv2d(read, torch.rot90(filters, r, (2, 3)))
        torch.testing.assert_close(conv(x), expected.flatten(1, 2))


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """In float64 and eval mode with statistics of x, by which logits of different images differ clearly."""
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()(x)
    return model.eval()


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_p4cnn_and_turned_images(turns):
    x, exact = images("p4cnn", torch.float64), {"rtol": 1e-10, "atol": 1e-10}
    model = settled(make("p4cnn"), x)
    turned = torch.rot90(x, turns, (2, 3))
    maps = model.forward_features(x).unflatten(1, (4, -1))
    expected = torch.rot90(maps, turns, (3, 4)).roll(turns, 1)
    torch.testing.assert_close(model.forward_features(turned).unflatten(1, (4, -1)), expected, **exact)
    torch.testing.assert_close(model(turned), model(x), **exact)
    for other in (model, make("z2cnn"), make("p4cnn", weights=models.RepeatedOrientations())):
        logits = settled(other, x)(x)
        assert (logits[0] - logits[1]).abs().max() > 1e-6  # they depend on the image
        assert other is model or (other(turned) - logits).abs().max() > 1e-6


def test_gradients_of_turned_images():
    model = make("p4cnn", drop_rate=0.0).double()
    x = images("p4cnn", torch.float64)
    loss = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
    one, two = (torch.autograd.grad((model(y) * loss).sum(), list(model.parameters())) for y in (x, x.rot90(1, (2, 3))))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


# --- weights


@every_network
def test_replaced_layers(kind):
    fixed = kind == "p4cnn"
    model, x = make(kind, weights=Halved()), images(kind)
    assert not any(type(module) in (nn.Conv2d, P4Conv2d) for module in model.modules())
    plain = make(kind)
    assert fixed or count(model) < count(plain)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if fixed:
        return
    # The same network of plain layers that have the repeated weights.
    repeated = {n: m.repeated_weight() for n, m in model.named_modules() if isinstance(m, RepeatConv2d)}
    state = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(state | {f"{name}.weight": weight for name, weight in repeated.items()})
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


# --- in use


@every_network
def test_training_reduces_the_loss(kind):
    model, x, y = make(kind), images(kind), torch.tensor([1, 4, 0])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.9 * losses[0]


@every_network
def test_state_and_copies(kind):
    model, x = make(kind).eval(), images(kind)
    twin = make(kind).eval()
    twin.load_state_dict(model.state_dict())
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    for other in (twin, copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), model(x))
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x))


@every_network
def test_compiled_and_exported(kind):
    model, x = make(kind).eval(), images(kind)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        exported = torch.export.export(model, (x,), dynamic_shapes=(batch,)).module()
        torch.testing.assert_close(exported(x[:2]), model(x[:2]))
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["wide_resnet", "vgg", "p4cnn"])
def test_dropout(kind):
    model, x = make(kind, drop_rate=0.5), images(kind)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


# --- errors


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        *(("wide_resnet", "depth", value) for value in (4, 11, 28.0, "28")),
        *(("wide_resnet", name, 0) for name in ("width", "in_channels", "num_classes", "base_channels")),
        *((kind, "drop_rate", 1.5) for kind in ("wide_resnet", "vgg", "p4cnn")),
        *(("resnet", name, 0) for name in ("width", "in_channels", "num_classes")),
        *(("resnet", "layers", value) for value in ((3, 4, 6), (3, 4, 6, 0), ())),
        *(("vgg", name, 0) for name in ("in_channels", "num_classes", "hidden")),
        *(("vgg", "stages", value) for value in ((), ((4, 0),))),
        *(("p4cnn", name, 0) for name in ("channels", "num_classes", "in_channels", "orientations")),
        ("p4cnn", "orientations", 8),
    ],
)
def test_errors_name_the_argument(kind, argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got "):
        make(kind, **{argument: value})
