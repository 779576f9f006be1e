"""Conversion from and to timm's own ConvMixers; run where timm is installed (the README's timm command)."""

import pytest
import torch
from torch import nn

import spin_kernels as spin
from spin_kernels import Sharing, convert, fusion, models

timm = pytest.importorskip("timm", reason="timm is not installed")
ConvMixer = timm.models.convmixer.ConvMixer
PUBLISHED = {
    "convmixer_1536_20": "convmixer_1536_20_k9_p7",
    "convmixer_768_32": "convmixer_768_32_k7_p7",
    "convmixer_1024_20_ks9_p14": "convmixer_1024_20_k9_p14",
}


def of_timm(act_layer=nn.GELU, size=4, **options) -> nn.Module:
    """A small ConvMixer of timm with running statistics and affines of its own."""
    torch.manual_seed(0)
    model = ConvMixer(48, 4, kernel_size=5, patch_size=size, num_classes=10, act_layer=act_layer, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    model(torch.randn(4, 3, 32, 32))
    return model


def results(model: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits and the gradients of the image, of the stem's and of the head's weight."""
    image = image.clone().requires_grad_()
    logits = model(image)
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight
    head = next(module for module in model.modules() if isinstance(module, nn.Linear)).weight
    weight = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    return logits, *torch.autograd.grad(logits, (image, stem, head), weight)


def assert_equal(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for g, e in zip(got, expected, strict=True):
        assert (g - e).norm() <= 1e-5 * e.norm()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("act_layer", [nn.GELU, nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("convert_to", ["from_timm", "accelerate", "there and back"])
def test_same_outputs_and_gradients(convert_to: str, act_layer: type, train: bool) -> None:
    model, image = of_timm(act_layer).train(train), torch.randn(4, 3, 32, 32)
    expected = results(model, image)
    if convert_to == "from_timm":
        ours = convert.from_timm(model)
    elif convert_to == "accelerate":
        ours = spin.accelerate(model)
        assert ours is model
    else:
        ours = convert.to_timm(convert.from_timm(model))
        assert isinstance(ours, ConvMixer)
        for name, tensor in model.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
    assert ours.training == train
    assert_equal(results(ours, image), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"sharing": Sharing(4, 2, "strided")},
        {"sharing": Sharing(4, 2), "templates": 3},
        {"sharing": Sharing(4, 4), "transform": "scalar"},
        {"transform": "channel"},
        {"sharing": Sharing(4, 2), "dw_sharing": Sharing(4, 4)},
    ],
)
def test_to_timm_expands_what_is_shared(changes: dict) -> None:
    torch.manual_seed(0)
    model = models.convmixer(48, 4, 5, 4, num_classes=10, drop_rate=0.5, **changes).eval()
    if model.mixer.pw_gain is not None:
        nn.init.normal_(model.mixer.pw_gain)
    image = torch.randn(2, 3, 32, 32)
    assert_equal(results(convert.to_timm(model), image), results(model, image))
    fused = fusion.prepare(model, Sharing(4, 2), "channel_weighted_mean")
    assert_equal(results(convert.to_timm(fused), image), results(fused, image))


def test_to_timm_without_biases_and_in_other_dtypes() -> None:
    torch.manual_seed(0)
    model = models.convmixer(16, 2, 3, 4, num_classes=3).eval()
    model.mixer = spin.nn.SharedMixer(16, 2, 3, bias=False).eval()
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    double = convert.to_timm(model.double())
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    torch.testing.assert_close(double(image), model(image))
    assert convert.to_timm(model.to(torch.bfloat16)).head.weight.dtype == torch.bfloat16


def test_to_timm_refuses_what_timm_cannot_express() -> None:
    with pytest.raises(ValueError, match="to_timm: expected a model with pw_residual=False, got True"):
        convert.to_timm(models.convmixer(8, 2, 3, 4, pw_residual=True))
    with pytest.raises(ValueError, match=r"to_timm: expected patches that touch .*, got stride 2 and padding 1"):
        convert.to_timm(models.convmixer(8, 2, 3, 4, 2, 1))
    with pytest.raises(TypeError, match="to_timm: expected a ConvMixer of spin_kernels, got ConvMixer"):
        convert.to_timm(of_timm())


def test_accelerate_refuses_other_models_and_leaves_them_alone() -> None:
    model = of_timm()
    model.blocks[1][2] = nn.Tanh()
    before = list(model.named_modules())
    with pytest.raises(ValueError, match="accelerate: expected one activation of"):
        spin.accelerate(model)
    assert list(model.named_modules()) == before
    with pytest.raises(ValueError, match=r"accelerate: expected key 'stem.0.weight'"):
        spin.accelerate(timm.create_model("resnet18"))
    with pytest.raises(TypeError, match="accelerate: expected a ConvMixer of timm, got int"):
        spin.accelerate(3)


def test_accelerated_models_keep_their_methods() -> None:
    model = spin.accelerate(of_timm()).eval()
    image = torch.randn(2, 3, 32, 32)
    features = model.forward_features(image)
    torch.testing.assert_close(model.forward_head(features), model(image))
    model.reset_classifier(7)
    assert model(image).shape == (2, 7)
    assert "blocks.0.pw_weight" in model.state_dict()


@pytest.mark.parametrize(("theirs", "ours"), PUBLISHED.items())
def test_published_models_have_as_many_parameters(theirs: str, ours: str) -> None:
    with torch.device("meta"):
        expected = timm.create_model(theirs)
    model = models.create(ours)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in expected.parameters())
    assert model.mixer.activation == ("relu" if "768" in ours else "gelu")
