"""Checkpoints of other implementations: what they become, and what is said of malformed ones."""

import pytest
import torch
from torch import nn

from spin_kernels import convert, models

DIM, DEPTH, KERNEL, PATCH, CLASSES = 8, 3, 3, 2, 5


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


class TimmConvMixer(nn.Module):
    """A ConvMixer with timm's module names."""

    def __init__(self, act=nn.GELU, eps=1e-5, stride=PATCH, pool_type="avg"):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, DIM, PATCH, stride), act(), nn.BatchNorm2d(DIM, eps=eps))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(
                        nn.Sequential(
                            nn.Conv2d(DIM, DIM, KERNEL, groups=DIM, padding="same"),
                            act(),
                            nn.BatchNorm2d(DIM, eps=eps),
                        )
                    ),
                    nn.Conv2d(DIM, DIM, 1),
                    act(),
                    nn.BatchNorm2d(DIM, eps=eps),
                )
                for _ in range(DEPTH)
            )
        )
        self.pooling = nn.Flatten(2)
        self.pooling.pool_type = pool_type
        self.head_drop = nn.Dropout(0.25)
        self.head = nn.Linear(DIM, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)

    def forward(self, x):
        return self.head(self.head_drop(self.pooling(self.blocks(self.stem(x))).mean(-1)))


def trained(**options) -> TimmConvMixer:
    """With running statistics of its own."""
    model = TimmConvMixer(**options)
    for _ in range(3):
        model(torch.randn(2, 3, 12, 10))
    return model


class TanhGELU(nn.GELU):
    def __init__(self):
        super().__init__(approximate="tanh")


TanhGELU.__name__ = "GELU"


@pytest.mark.parametrize(
    ("act", "name"),
    [(nn.GELU, "gelu"), (nn.ReLU, "relu"), (nn.SiLU, "silu"), (nn.Identity, "identity"), (TanhGELU, "gelu_tanh")],
)
def test_from_timm_module(act, name):
    timm, x = trained(act=act, eps=1e-3, stride=3).eval(), torch.randn(2, 3, 11, 13)
    model = convert.from_timm(timm)
    assert isinstance(model, models.ConvMixer)
    assert not model.training
    assert model.mixer.activation == name
    assert model.head.dropout.p == 0.25
    assert model.mixer.num_batches_tracked == model.patch_embed.bn.num_batches_tracked == 3
    torch.testing.assert_close(model(x), timm(x), rtol=1e-4, atol=1e-5)
    timm.train(), (model := convert.from_timm(timm)).train()
    torch.manual_seed(0)
    expected = timm(x)
    torch.manual_seed(0)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_from_timm_takes_over_dtype_and_copies():
    timm = trained().double()
    model = convert.from_timm(timm)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.training
    timm.head.weight.data.zero_()
    assert model.head.fc.weight.any()
    assert convert.from_timm(trained().to(torch.bfloat16)).mixer.dw_affine.dtype == torch.float32


def test_from_timm_state_dict():
    timm, x = trained(act=nn.ReLU).eval(), torch.randn(2, 3, 12, 10)
    model = convert.from_timm(timm.state_dict(), activation="relu").eval()
    torch.testing.assert_close(model(x), timm(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected activation="):
        convert.from_timm(timm.state_dict())


def of_the_authors(act=nn.GELU) -> nn.Sequential:
    """The nn.Sequential of figure 3 of the paper, with the weights of a model with timm's names."""
    like = trained(act=act)
    pool = (nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), like.head)
    return nn.Sequential(*like.stem, *like.blocks, *pool)


def test_from_the_authors_sequential():
    model, x = of_the_authors(nn.ReLU), torch.randn(2, 3, 12, 10)
    from_module = convert.from_timm(model)
    assert from_module.training
    model.eval(), from_module.eval()
    from_state = convert.from_timm(model.state_dict(), activation="relu").eval()
    for ours in (from_module, from_state):
        assert ours.mixer.depth == DEPTH
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="accelerate: expected a ConvMixer of timm, got Sequential"):
        convert.accelerate(model)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("4.0.fn.2.weight", r"expected key '4.0.fn.2.weight' with shape"),
        ("3.0.fn.0.weight", r"expected key '3.0.fn.0.weight' with shape"),
        ("0.bias", "expected key '0.bias'"),
        (f"{DEPTH + 5}.bias", rf"expected key '{DEPTH + 5}.bias'"),
    ],
)
def test_errors_name_the_authors_keys(key, message):
    state = of_the_authors().state_dict()
    del state[key]
    with pytest.raises(ValueError, match="from_timm: " + message):
        convert.from_timm(state, activation="gelu")


def test_a_checkpoint_that_is_no_convmixer():
    with pytest.raises(ValueError, match=r"from_timm: expected"):
        convert.from_timm(nn.Sequential(nn.Conv2d(3, 8, 2), nn.Linear(8, 3)))
    with pytest.raises(TypeError, match="from_timm: expected names as keys of the state dict, got 0"):
        convert.from_timm({0: torch.zeros(1)}, activation="gelu")


def test_from_timm_refuses_what_cannot_be_expressed():
    with pytest.raises(ValueError, match=r"expected average pooling .* got 'max'"):
        convert.from_timm(trained(pool_type="max"))
    mixed = trained()
    mixed.blocks[1][2] = nn.ReLU()
    with pytest.raises(ValueError, match=r"expected one activation .* got gelu, relu"):
        convert.from_timm(mixed)
    mixed = trained()
    mixed.blocks[1][3].eps = 1e-3
    with pytest.raises(ValueError, match="expected one BatchNorm eps"):
        convert.from_timm(mixed)
    with pytest.raises(ValueError, match=r"expected one activation .* got Tanh"):
        convert.from_timm(trained(act=nn.Tanh))
    with pytest.raises(ValueError, match=r"expected key 'stem.0.weight'"):
        convert.from_timm(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a state dict, got int"):
        convert.from_timm(3)


CONFIG = {
    "dim": DIM,
    "depth": DEPTH,
    "kernel_size": KERNEL,
    "patch_size": PATCH,
    "num_classes": CLASSES,
    "activation": "relu",
    "rate": 2,
}


def published(matrices=2) -> dict[str, torch.Tensor]:
    """A state dict with the names of a published WS-ConvMixer."""
    state = {
        "patch_embed.conv.weight": torch.randn(DIM, 3, PATCH, PATCH),
        "patch_embed.conv.bias": torch.randn(DIM),
        "head.fc.weight": torch.randn(CLASSES, DIM),
        "head.fc.bias": torch.randn(CLASSES),
    }
    for d in range(DEPTH):
        state[f"blocks.{d}.dwise_blk.0.weight"] = torch.randn(DIM, 1, KERNEL, KERNEL)
        state[f"blocks.{d}.dwise_blk.0.bias"] = torch.randn(DIM)
    for s in range(matrices):
        state[f"pwise_w.{s}"] = torch.randn(DIM, DIM, 1, 1)
        state[f"pwise_b.{s}"] = torch.randn(DIM)
    norms = ["patch_embed.bn"] + [f"blocks.{d}.{n}" for d in range(DEPTH) for n in ("dwise_blk.2", "bn2")]
    for norm in norms:
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{name}"] = torch.rand(DIM) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
    return state


def test_from_ml_spin():
    state = published()
    model = convert.from_ml_spin(state, **CONFIG)
    assert model.mixer.pw_residual
    assert model.mixer.sharing.index == [0, 0, 1]
    assert model.mixer.num_batches_tracked == 7
    assert torch.equal(model.mixer.pw_weight[1], state["pwise_w.1"][:, :, 0, 0])
    assert torch.equal(model.mixer.pw_running[2, 1], state["blocks.2.bn2.running_var"])
    assert torch.equal(model.mixer.dw_affine[1, 0], state["blocks.1.dwise_blk.2.weight"])
    wrapped = convert.from_ml_spin({"model_state": state, "epoch": 3}, **CONFIG)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), wrapped.state_dict().values(), strict=True)
    )
    assert convert.from_ml_spin(state, **CONFIG, mapping="strided").mixer.sharing.index == [0, 1, 0]
    plan = {"distribution": "front", "shared_depth": 2}
    assert convert.from_ml_spin(state, **CONFIG, **plan).mixer.sharing.index == [0, 0, 1]
    with pytest.raises(ValueError, match=r"expected keys pwise_w.0 to pwise_w.2 .*, got 0, 1"):
        convert.from_ml_spin(state, **CONFIG, distribution="back", shared_depth=1)
    unshared = convert.from_ml_spin(published(3), **{**CONFIG, "rate": None})
    assert unshared.mixer.sharing.index == [0, 1, 2]
    padded = convert.from_ml_spin(state, **CONFIG, patch_stride=1, patch_padding=1)
    assert padded.patch_embed.conv.stride == padded.patch_embed.conv.padding == (1, 1)


def _without(key):
    return lambda state: state.pop(key)


def _with(key, value):
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_without("blocks.1.bn2.bias"), ValueError, r"expected key 'blocks.1.bn2.bias' with shape \(8,\), got a"),
        (_without("patch_embed.conv.weight"), ValueError, "expected key 'patch_embed.conv.weight'"),
        (_without("pwise_w.1"), ValueError, r"expected keys pwise_w.0 to pwise_w.1 .*, got 0$"),
        (_with("pwise_w.2", torch.zeros(1)), ValueError, r"expected keys pwise_w.0 to pwise_w.1 .*, got 0, 1, 2"),
        (_with("blocks.3.bn2.bias", torch.zeros(8)), ValueError, r"blocks.0 to blocks.2 \(depth 3\), got 0, 1, 2, 3"),
        (_with("ema.decay", torch.zeros(1)), ValueError, "expected no other keys, got 'ema.decay'"),
        (_with("pwise_b.0", torch.zeros(9)), ValueError, r"expected shape \(8,\) at key 'pwise_b.0', got \(9,\)"),
        (
            _with("blocks.2.dwise_blk.0.weight", torch.zeros(8, 1, 5, 5)),
            ValueError,
            r"expected shape \(8, 1, 3, 3\) at key 'blocks.2.dwise_blk.0.weight', got \(8, 1, 5, 5\)",
        ),
        (_with("head.fc.weight", torch.zeros(6, 8)), ValueError, r"\(5, 8\) at key 'head.fc.weight', got \(6, 8\)"),
        (_with("head.fc.bias", [0.0]), TypeError, "expected a tensor at key 'head.fc.bias', got list"),
        (
            _with("blocks.0.bn2.num_batches_tracked", torch.zeros(2)),
            TypeError,
            r"expected one integer at key 'blocks.0.bn2.num_batches_tracked', got shape \(2,\)",
        ),
        (_with("patch_embed.bn.num_batches_tracked", None), TypeError, "expected one integer at key .*, got NoneType"),
        (
            _with("pwise_b.1", torch.zeros(8, dtype=torch.int8)),
            TypeError,
            "expected dense floating-point numbers at key 'pwise_b.1', got strided of int8",
        ),
        (
            _with("pwise_b.1", torch.zeros(8, device="meta")),
            TypeError,
            "expected dense floating-point numbers at key 'pwise_b.1', got a meta tensor",
        ),
        (_with("reduction_w.1", torch.ones(1)), ValueError, "expected reduction= beside key 'reduction_w.1'"),
    ],
)
def test_malformed_checkpoints(damage, error, message):
    state = published()
    damage(state)
    with pytest.raises(error, match="^from_ml_spin: .*" + message):
        convert.from_ml_spin(state, **CONFIG)


def test_checkpoints_with_weight_fusion():
    assert convert.from_ml_spin(published(3), **CONFIG, reduction="mean").mixer.members() == [[0, 1], [2]]
    with pytest.raises(ValueError, match=r"expected keys pwise_w.0 to pwise_w.2 \(depth 3, a weight per layer"):
        convert.from_ml_spin(published(), **CONFIG, reduction="mean")
    with pytest.raises(ValueError, match=r"expected keys reduction_w.0 to reduction_w.2 .*, got none"):
        convert.from_ml_spin(published(3), **CONFIG, reduction="scalar_weighted_mean")
    weights = {f"reduction_w.{d}": torch.rand(1) for d in range(3)}
    fused = convert.from_ml_spin(published(3) | weights, **CONFIG, reduction="scalar_weighted_mean")
    assert torch.equal(fused.mixer.pw_reduction, torch.stack(list(weights.values())))
    with pytest.raises(ValueError, match=r"expected shape \(8,\) at key 'reduction_w.0', got \(1,\)"):
        convert.from_ml_spin(published(3) | weights, **CONFIG, reduction="channel_weighted_mean")
    with pytest.raises(ValueError, match="reduction: expected one of choose_first"):
        convert.from_ml_spin(published(3), **CONFIG, reduction="median")


def test_fusion_of_any_distribution():
    """The published code has uniform ones only."""
    plan = {"distribution": "back", "shared_depth": 2, "reduction": "mean"}
    mixer = convert.from_ml_spin(published(3), **CONFIG, **plan).mixer
    assert mixer.pw_index == (0, 1, 1)
    assert mixer.members() == [[0], [1, 2]]


def test_mixed_dtypes_become_the_widest():
    state = published()
    state["patch_embed.conv.weight"] = state["patch_embed.conv.weight"].half()
    assert {p.dtype for p in convert.from_ml_spin(state, **CONFIG).parameters()} == {torch.float32}


def test_arguments_of_published_checkpoints():
    with pytest.raises(ValueError, match="mapping: expected one of"):
        convert.from_ml_spin(published(), **CONFIG, mapping="spiral")
    with pytest.raises(TypeError, match="expected a state dict"):
        convert.from_ml_spin([], **CONFIG)
