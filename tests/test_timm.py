"""Conversion from and to timm's own ConvMixers; run where timm is installed (the README's timm command)."""

import pytest
import torch
from torch import nn

import spin_kernels as spin
from spin_kernels import Sharing, convert, fusion, models

timm = pytest.importorskip("timm", reason="timm is not installed")
ConvMixer = timm.models.convmixer.ConvMixer
TIMM_NAMES = [
    *("0.fn.0.weight", "0.fn.0.bias", "1.weight", "1.bias"),
    *("0.fn.2.weight", "0.fn.2.bias", "3.weight", "3.bias"),
]
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
    """Logits and the gradients of the image and of all weights, biases and affines: stem, blocks, head."""
    image = image.clone().requires_grad_()
    model.zero_grad()
    logits = model(image)
    logits.backward(torch.linspace(-1, 1, logits.numel()).view(logits.shape))
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    head = next(module for module in model.modules() if isinstance(module, nn.Linear))
    grads = {name: p.grad for name, p in model.named_parameters()}
    mixer = next((module for module in model.modules() if isinstance(module, spin.nn.SharedMixer)), None)
    if mixer is None:
        blocks = [[grads[f"blocks.{d}.{name}"] for d in range(len(model.blocks))] for name in TIMM_NAMES]
        stacked = [torch.stack(block).flatten(1) for block in blocks]
    else:
        dw, pw = mixer.dw_affine.grad, mixer.pw_affine.grad
        ours = (mixer.dw_weight.grad, mixer.dw_bias.grad, mixer.pw_weight.grad, mixer.pw_bias.grad)
        stacked = [t.flatten(1) for t in (*ours, dw[:, 0], dw[:, 1], pw[:, 0], pw[:, 1])]
    return logits.detach(), image.grad, stem.weight.grad, head.weight.grad, *stacked


def assert_equal(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    largest = max(e.norm() for e in expected[1:])
    for g, e in zip(got, expected, strict=True):
        # A gradient that is all but nothing beside the others is compared with these.
        assert (g - e).norm() <= 1e-5 * max(e.norm(), 1e-6 * largest)


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
    torch.testing.assert_close(convert.to_timm(model)(image), model(image), rtol=1e-4, atol=1e-5)
    fused = fusion.prepare(model, Sharing(4, 2), "channel_weighted_mean")
    torch.testing.assert_close(convert.to_timm(fused)(image), fused(image), rtol=1e-4, atol=1e-5)


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
    with pytest.raises(TypeError, match="accelerate: expected a ConvMixer of timm, got ResNet"):
        spin.accelerate(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match=r"accelerate: expected key 'blocks.0.0.fn.0.weight'"):
        spin.accelerate(timm.create_model("vit_tiny_patch16_224"))
    with pytest.raises(TypeError, match="accelerate: expected a ConvMixer of timm, got int"):
        spin.accelerate(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: setattr(b[2][0].fn[0], "dilation", (2, 2)), r"dilation \(1, 1\) at 'blocks.2.0.fn.0', got \(2, 2\)"),
        (lambda b: setattr(b[1][0].fn[0], "padding_mode", "circular"), "padding_mode 'zeros' at .*, got 'circular'"),
        (lambda b: setattr(b[1][0].fn[0], "padding", (0, 0)), r"padding 'same' at 'blocks.1.0.fn.0', got \(0, 0\)"),
        (lambda b: setattr(b[3], "3", nn.Identity()), "a BatchNorm2d with .* at 'blocks.3.3', got Identity"),
        (lambda b: setattr(b[0][3], "momentum", None), "one BatchNorm momentum in all blocks, got 0.1 and None"),
    ],
)
def test_blocks_that_cannot_be_expressed_are_refused(change, message) -> None:
    model = of_timm()
    change(model.blocks)
    for convert_to in (spin.accelerate, convert.from_timm):
        with pytest.raises(ValueError, match="expected " + message):
            convert_to(model)
    assert len(model.blocks) == 4


def test_ends_that_cannot_be_expressed_are_refused() -> None:
    pooled, strided = of_timm(global_pool="max"), of_timm()
    with pytest.raises(ValueError, match="from_timm: expected average pooling before the head, got 'max'"):
        convert.from_timm(pooled)
    strided.stem[0].stride = (4, 2)
    with pytest.raises(ValueError, match=r"from_timm: expected one stride for both sides at 'stem.0', got \(4, 2\)"):
        convert.from_timm(strided)
    image = torch.randn(2, 3, 32, 32)
    for model in (pooled, strided):  # but their blocks run
        expected = model.eval()(image)
        torch.testing.assert_close(spin.accelerate(model)(image), expected, rtol=1e-4, atol=1e-5)


def test_accelerate_without_a_head() -> None:
    model, image = of_timm().eval(), torch.randn(2, 3, 32, 32)
    model.reset_classifier(0)
    expected = model(image)
    accelerated = spin.accelerate(model)
    assert not accelerated.blocks.training
    torch.testing.assert_close(accelerated(image), expected, rtol=1e-4, atol=1e-5)


def test_accelerate_keeps_what_is_frozen() -> None:
    model = of_timm()
    model.blocks.requires_grad_(False)
    model.blocks.eval()
    assert not any(p.requires_grad for p in spin.accelerate(model).blocks.parameters())
    assert not model.blocks[0].training
    assert model.stem.training
    mixed = of_timm()
    mixed.blocks[1][1].requires_grad_(False)
    with pytest.raises(ValueError, match="accelerate: expected one requires_grad for what becomes pw_weight, got both"):
        spin.accelerate(mixed)
    mixed = of_timm()
    mixed.blocks[1][3].eval()
    for convert_to in (spin.accelerate, convert.from_timm):
        with pytest.raises(ValueError, match=r"expected all parts of the (blocks|model) in one mode"):
            convert_to(mixed)


def test_a_published_network() -> None:
    """1024/20 k9 with all its weights, on 4 x 4 tokens."""
    torch.manual_seed(0)
    model, image = timm.create_model("convmixer_1024_20_ks9_p14").eval(), torch.randn(1, 3, 56, 56)
    expected = results(model, image)
    assert_equal(results(convert.from_timm(model), image), expected)
    assert_equal(results(spin.accelerate(model), image), expected)


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
