"""ConvMixer networks: the published ones by name, and a small one through everything a model meets."""

import copy
import io
import pickle
import sys

import pytest
import torch
from test_nn import randomise, relative_error
from torch import nn

from spin_kernels import Sharing, models

PARAMETERS = {
    "convmixer_1024_20_k9_p14": 24_383_464,
    "convmixer_1536_20_k9_p7": 51_625_960,
    "convmixer_256_8_k5_p2": 594_186,
    "convmixer_768_32_k7_p7": 21_110_248,
    "ws_convmixer_768_32_k3_p14_s1": 20_465_896,
    "ws_convmixer_768_32_k3_p14_s2": 11_016_424,
    "ws_convmixer_768_32_k3_p14_s4": 6_291_688,
    "ws_convmixer_768_32_k3_p14_s8": 3_929_320,
}
SMALL = {
    "dim": 16,
    "depth": 3,
    "kernel_size": 5,
    "patch_size": 4,
    "num_classes": 7,
    "sharing": Sharing(3, 2),
    "pw_residual": True,
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def make(**options) -> models.ConvMixer:
    return randomise(models.convmixer(**{**SMALL, **options}))


def image(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 19, 23).to(dtype)


# --- published networks


def test_list_models():
    names = models.list_models()
    assert names == sorted(names)
    assert {name for name in names if "convmixer" in name} == set(PARAMETERS)


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_published_sizes(name, parameters):
    with torch.device("meta"):
        model = models.create(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    _, dim, depth, kernel, patch = name.removeprefix("ws_").removesuffix("_s" + name[-1]).split("_")
    mixer, conv = model.mixer, model.patch_embed.conv
    assert (mixer.dim, mixer.depth, mixer.kernel_size) == (int(dim), int(depth), int(kernel[1:]))
    assert conv.kernel_size == conv.stride == (int(patch[1:]),) * 2
    assert mixer.pw_residual is name.startswith("ws_")
    assert mixer.activation == ("relu" if "768" in name else "gelu")
    assert mixer.sharing.rate == (int(name[-1]) if name.startswith("ws_") else 1)


def test_published_sizes_add_up():
    """Parameters of WS-ConvMixer 768/32 at rate 2, term by term."""
    dim, depth, matrices, classes = 768, 32, 16, 1000
    stem = 3 * 14 * 14 * dim + dim + 2 * dim
    blocks = depth * (9 * dim + dim + 2 * dim + 2 * dim) + matrices * (dim * dim + dim)
    assert stem + blocks + dim * classes + classes == PARAMETERS["ws_convmixer_768_32_k3_p14_s2"]


def test_create_overrides_and_errors():
    assert models.create("convmixer_256_8_k5_p2").head.fc.out_features == 10
    assert models.create("convmixer_256_8_k5_p2", num_classes=3, depth=1).head.fc.out_features == 3
    with pytest.raises(ValueError, match=r"^name: expected one of .*ws_convmixer.*, got 'resnet18'"):
        models.create("resnet18")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("patch_size", 0),
        ("patch_stride", 0),
        ("patch_padding", -1),
        ("patch_padding", 4),
        ("in_channels", 0),
        ("num_classes", 0),
        ("dim", 0),
    ],
)
def test_errors_name_the_argument(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: expected .* got {value}"):
        make(**{argument: value})


# --- frozen networks


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "relu", "pw_residual": False, "sharing": None, "patch_stride": 3, "patch_padding": 2},
        {"templates": 2, "transform": "channel", "in_channels": 1, "activation": "silu"},
    ],
    ids=["shared", "strided", "templates"],
)
def test_frozen_computes_the_same(dtype, options):
    model = make(**options).to(dtype).eval()
    x = image(dtype)[:, : options.get("in_channels", 3)]
    with torch.no_grad():
        expected = model(x)
        exact = copy.deepcopy(model).double()(x.double())
        model.freeze()
        actual = model(x)
        assert actual.dtype == dtype
        assert model.is_frozen
        assert relative_error(actual, exact) < TOLERANCE[dtype]
        assert relative_error(actual, expected) < 2 * TOLERANCE[dtype]
        assert relative_error(model(x.to(memory_format=torch.channels_last)), exact) < TOLERANCE[dtype]
        wide = x.new_zeros(2, x.shape[1], 19, 46)
        wide[..., ::2] = x
        assert relative_error(model(wide[..., ::2]), exact) < TOLERANCE[dtype]
        if dtype != torch.float64:
            logits = model(x.float())
            assert logits.dtype == torch.float32
            assert relative_error(logits, exact) < TOLERANCE[dtype]
    assert not model(x).requires_grad


def test_frozen_under_the_reference_backend(monkeypatch):
    model, x = make(templates=2).eval(), image()
    expected = model(x)
    monkeypatch.setenv("SPIN_BACKEND", "reference")
    model.freeze()
    assert not isinstance(model._packed.value[0], torch.Tensor)
    frozen = model(x)
    assert relative_error(frozen, expected) < 1e-5
    assert not frozen.requires_grad
    for parameter in model.parameters():
        parameter.data.mul_(2)
    assert torch.equal(model(x), frozen)
    assert not torch.equal(model.unfreeze()(x), frozen)


UNFREEZE = {
    "train": lambda model: model.train(),
    "load_state_dict": lambda model: model.load_state_dict(model.state_dict()),
    "mixer.load_state_dict": lambda model: model.mixer.load_state_dict(model.mixer.state_dict()),
    "fc.load_state_dict": lambda model: model.head.fc.load_state_dict(model.head.fc.state_dict()),
    "loaded by its parent": lambda model: nn.Sequential(model).load_state_dict(nn.Sequential(model).state_dict()),
    "to": lambda model: model.to(torch.float64),
}


@pytest.mark.parametrize("change", UNFREEZE.values(), ids=UNFREEZE.keys())
def test_what_unfreezes(change):
    model = make().eval().freeze()
    twin = copy.deepcopy(model)
    change(model)
    assert not model.is_frozen
    assert twin.is_frozen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(48, 48), (44, 60), (28, 36), (140, 100)], ids=str)  # tokens: even, odd, few, many
def test_frozen_with_large_matrices(size, dtype):
    """Of more than 1 MB in float32: the product of halves, or a plain one from the same packed weights."""
    model = make(dim=544, kernel_size=3).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        model = model.to(dtype)
        plain = model(x.to(dtype)).double()
        frozen = model.freeze()(x.to(dtype)).double()
    assert relative_error(frozen, exact) < max(3 * relative_error(plain, exact), 1e-6)
    assert relative_error(frozen, exact) < TOLERANCE[dtype]


def test_freeze_wants_every_part_in_eval_mode():
    model = make().eval()
    model.mixer.train()
    with pytest.raises(RuntimeError, match=r"^freeze: expected eval mode"):
        model.freeze()


def test_frozen_input_that_requires_gradients():
    model = make().eval().freeze()
    with pytest.raises(RuntimeError, match=r"^x: a frozen module expected"):
        model(image().requires_grad_())


def test_frozen_mixer_in_an_unfrozen_model():
    model, x = make().eval(), image()
    expected = model(x)
    model.mixer.freeze()
    assert not model.is_frozen
    with torch.no_grad():
        assert relative_error(model(x), expected) < 1e-5


def test_copies_stay_frozen():
    model, x = make().eval().freeze(), image()
    expected = model(x)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert twin.is_frozen
        assert torch.equal(twin(x), expected)
        twin.mixer.load_state_dict(twin.mixer.state_dict())
        assert not twin.is_frozen
        assert model.is_frozen


# --- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    model, x = make().to(dtype), image(dtype)
    wide = {"mixer.dw_affine", "mixer.pw_affine", "mixer.dw_running", "mixer.pw_running"}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            expected = torch.float32 if name in wide or name.startswith("patch_embed.bn.") else dtype
            assert tensor.dtype == expected, name
    out = model(x)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        model.eval()
        exact = copy.deepcopy(model).double()(x.double())
        assert relative_error(model(x), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_patches_without_short_convolutions(monkeypatch, dtype):
    embed, x, ran = make().patch_embed.to(dtype).eval(), image(dtype), []
    embed.conv.register_forward_hook(lambda *_: ran.append(1))
    exact = copy.deepcopy(embed).double()(x.double())
    errors, gradients = [], []
    for native in (True, False):
        monkeypatch.setattr(sys.modules[models.ConvMixer.__module__], "_SHORT_CONVOLUTIONS", native)
        out = embed(x)
        out.float().square().sum().backward()
        assert out.dtype == dtype
        errors.append(relative_error(out, exact))
        gradients.append(embed.conv.weight.grad)
        embed.conv.weight.grad = None
    assert len(ran) == 3  # with the exact one
    assert errors[1] <= 1.5 * errors[0]
    assert gradients[1].dtype == dtype
    assert relative_error(gradients[1], gradients[0]) < TOLERANCE[dtype]
    nn.utils.parametrizations.weight_norm(embed.conv)  # no plain layer any more: called as it is
    assert relative_error(embed(x), exact) < TOLERANCE[dtype]


def test_patches_without_short_convolutions_under_autocast(monkeypatch):
    embed, x = make().patch_embed.eval(), image()
    exact = copy.deepcopy(embed).double()(x.double())
    monkeypatch.setattr(sys.modules[models.ConvMixer.__module__], "_SHORT_CONVOLUTIONS", False)
    with torch.autocast("cpu", torch.bfloat16):
        out = embed(x)
        assert torch.is_autocast_enabled("cpu")
    assert embed.conv(x).dtype == torch.float32
    out.float().square().sum().backward()
    assert relative_error(out, exact) < TOLERANCE[torch.bfloat16]
    assert embed.conv.weight.grad.dtype == torch.float32


def test_autocast():
    model, x = make(), image()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()
        assert model.eval()(x).dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# --- state


def test_state_dict_round_trip():
    model, x = make(transform="scalar", templates=2), image()
    model(x)
    model.eval()
    twin = models.convmixer(**SMALL, transform="scalar", templates=2).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    broken = {**model.state_dict(), "mixer.pw_weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"size mismatch for mixer\.pw_weight"):
        twin.load_state_dict(broken)


def test_no_weight_decay():
    model = make(transform="scalar", templates=2)
    decayed = {name for name, _ in model.named_parameters()} - model.no_weight_decay()
    assert decayed == {"patch_embed.conv.weight", "mixer.dw_weight", "mixer.pw_weight", "head.fc.weight"}


def test_dropout():
    model, x = make(drop_rate=0.5), image()
    features = model.forward_features(x)
    assert not torch.equal(model.head(features), model.head(features))
    assert torch.equal(model.eval()(x), model(x))


def test_training_reduces_the_loss():
    model, x, y = make(), image(), torch.tensor([1, 4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- compile and export


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_compiled_training_step():
    model, x = make(), image()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        out, expected = compiled(x), twin(x)
        assert relative_error(out, expected) < 1e-5
        out.square().sum().backward()
        expected.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-4, name
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_compiled_inference_sees_changes_and_freezing():
    model, x = make().eval(), image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-5
        model.mixer.pw_weight.data.mul_(2)
        assert relative_error(compiled(x), model(x)) < 1e-5
        model.freeze()
        expected = model(x)
        assert torch.equal(compiled(x), expected)
        model.mixer.pw_weight.data.mul_(2)
        assert torch.equal(compiled(x), expected)
        model.unfreeze()
        assert relative_error(compiled(x), model(x)) < 1e-5
        assert relative_error(compiled(x), expected) > 1e-3


@pytest.mark.parametrize("frozen", [False, True], ids=["unfrozen", "frozen"])
def test_export(frozen, tmp_path):
    model, x = make(templates=2, transform="scalar").eval(), image()
    if frozen:
        model.freeze()
    with torch.no_grad():
        expected = model(x)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes={"image": {0: batch}})
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        assert relative_error(loaded(x), expected) < 1e-5
        assert relative_error(loaded(x[:1]), expected[:1]) < 1e-5
