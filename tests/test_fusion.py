"""Weight fusion: the published cases with a weight per layer, preparing, folding, and what every module must do."""

import copy
import pickle

import golden
import pytest
import torch
from golden import assert_close
from test_golden import assert_running_statistics, every_dtype, from_published, input_of, part_of, published_name

import spin_kernels as spin
from spin_kernels import Sharing, fusion, models
from spin_kernels.nn import FusedMixer, SharedMixer
from spin_kernels.nn.fused_mixer import REDUCTIONS

CASES = [case for case in golden.cases("spin") if case["config"].get("weight_fusion")]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


def model_of(case, dtype):
    """The trainable model with a case's weights per layer, read under the published names."""
    state = {}
    for name, tensor in golden.load(case).items():
        kind, _, key = name.partition(".")
        if kind in ("param", "buffer"):
            key = key.replace("pointwise_layer.", "pointwise.")
            layer = key.replace("fusion_weight_layer.", "reduction_w.")
            state[layer if layer != key else published_name(key)] = tensor.to(dtype)
    return from_published(case, state, case["config"]["weight_fusion"])


def test_every_published_reduction_is_here():
    assert {case["config"]["weight_fusion"] for case in CASES} == set(REDUCTIONS)


@every_dtype
@every_case
def test_inference(case, dtype):
    tensors, model, image = golden.load(case), model_of(case, dtype).eval(), input_of(case, dtype)
    with torch.no_grad():
        weight, bias = model.mixer.distinct_weights()
        for s in range(len(weight)):
            assert_close(weight[s, :, :, None, None], tensors[f"fused_pointwise.{s}.weight"], case, "outputs", "weight")
            assert_close(bias[s], tensors[f"fused_pointwise.{s}.bias"], case, "outputs", "bias")
        folded = fusion.fold(model)
        assert type(folded.mixer) is SharedMixer
        for name, m in (("prepared", model), ("folded", folded), ("frozen", copy.deepcopy(model).freeze())):
            assert_close(m(image), tensors["eval.output"], case, "outputs", name)


@every_dtype
@every_case
def test_training(case, dtype):
    tensors, model, image = golden.load(case), model_of(case, dtype).train(), input_of(case, dtype)
    image.requires_grad_()
    output = model(image)
    assert_close(output, tensors["train.output"], case, "outputs", "output")
    assert assert_running_statistics(model, case) == 2 + 4 * case["config"]["depth"]
    (output * tensors["loss_weight"].to(dtype)).sum().backward()
    compared = set()
    for name, expected in tensors.items():
        key = name.removeprefix("grad.")
        if name == key:
            continue
        if key == "input":
            actual = image.grad
        elif key.startswith("fusion_weight_layer."):
            actual = model.mixer.pw_reduction.grad[int(key.split(".")[1])]
        else:
            actual = part_of(model, key.replace("pointwise_layer.", "pointwise."), lambda t: t.grad)
        assert_close(actual, expected, case, "grads", name)
        compared.add(key.split(".")[0])
    assert "pointwise_layer" in compared
    assert ("fusion_weight_layer" in compared) == (model.mixer.pw_reduction is not None)


def prepared(reduction="mean", groups="sharing", sharing=None, **changes):
    torch.manual_seed(0)
    model = spin.models.convmixer(12, 5, 3, 4, num_classes=7, **changes)
    return model, fusion.prepare(model, sharing or Sharing(5, 2, "strided"), reduction, groups)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("groups", ["sharing", "consecutive"])
def test_what_is_fused(groups, reduction):
    model, fused = prepared(reduction, groups)
    layers, members = model.mixer.pw_weight, {"sharing": [[0, 3], [1, 4], [2]], "consecutive": [[0, 1], [2, 3], [4]]}
    assert fused.mixer.members() == members[groups]
    if fused.mixer.pw_reduction is not None:
        with torch.no_grad():
            fused.mixer.pw_reduction.normal_()
        layers = layers * fused.mixer.pw_reduction[:, :, None]
    for s, group in enumerate(members[groups]):
        group = group[:1] if reduction == "choose_first" else group
        weight, bias = fused.mixer.distinct_weights()
        torch.testing.assert_close(weight[s], layers[group].mean(0))
        torch.testing.assert_close(bias[s], model.mixer.pw_bias[group].mean(0))


def test_starts_as_the_mean_and_leaves_the_model_alone():
    model, fused = prepared("channel_weighted_mean")
    before = copy.deepcopy(model.state_dict())
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(fused(image), prepared("mean")[1](image))
    fused(image).square().mean().backward()
    torch.optim.SGD(fused.parameters(), lr=0.1).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    folded = fusion.fold(fused)
    torch.testing.assert_close(folded.eval()(image), fused.eval()(image))
    assert folded.mixer.sharing == fused.mixer.sharing
    assert sum(p.numel() for p in folded.parameters()) == sum(p.numel() for p in model.parameters()) - 2 * 12 * 13


@pytest.mark.parametrize(
    "changes", [{"templates": 2}, {"sharing": Sharing(5, 5)}, {"transform": "channel"}, {"dw_sharing": Sharing(5, 2)}]
)
def test_prepares_models_that_share_already(changes):
    torch.manual_seed(0)
    model = spin.models.convmixer(12, 5, 3, 4, num_classes=7, **changes).eval()
    image = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(fusion.prepare(model, Sharing(5, 1))(image), model(image))


def test_is_a_module_like_any_other(tmp_path):
    _, fused = prepared("scalar_weighted_mean", transform="scalar")
    image = torch.randn(2, 3, 16, 16)
    expected = fused.eval()(image)
    assert torch.equal(copy.deepcopy(fused)(image), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(image), expected)
    _, other = prepared("scalar_weighted_mean", transform="scalar")
    torch.save(fused.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other.eval()(image), expected)
    torch.testing.assert_close(torch.compile(fused, fullgraph=True)(image), expected)
    half = fused.to(torch.bfloat16)
    assert half.mixer.pw_reduction.dtype == torch.float32
    assert half.mixer.distinct_weights()[0].dtype == torch.bfloat16
    half.freeze()
    half.mixer.load_state_dict(half.mixer.state_dict())
    assert not half.is_frozen
    assert "mixer.pw_reduction" in half.no_weight_decay()
    assert "reduction=scalar_weighted_mean" in repr(half)


def test_no_stale_weights():
    _, fused = prepared("channel_weighted_mean")
    image = torch.randn(2, 3, 16, 16)
    fused.eval()
    before = fused(image)
    fused.mixer.pw_reduction.data.mul_(2)
    after = fused(image)
    assert not torch.equal(before, after)
    fused.mixer.pw_weight.data[0].zero_()
    assert not torch.equal(fused(image), after)


def test_weights_are_fused_once_a_call_or_freezing(monkeypatch):
    _, fused = prepared("mean")
    calls, original = [], FusedMixer.distinct_weights
    monkeypatch.setattr(FusedMixer, "distinct_weights", lambda self: calls.append(1) or original(self))
    fused(torch.randn(2, 3, 16, 16)).sum().backward()
    assert len(calls) == 1
    fused.eval().freeze()
    fused.mixer.freeze()
    assert len(calls) == 3
    monkeypatch.setenv("SPIN_BACKEND", "reference")
    fused.freeze()
    fused.mixer.freeze()
    assert len(calls) == 5


@pytest.mark.parametrize("reduction", ["mean", "channel_weighted_mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_are_rounded_once(dtype, reduction):
    """As those of torch.mean, which the published code calls."""
    fused = FusedMixer(16, 16, 3, Sharing(16, 16), reduction).to(dtype)
    if fused.pw_reduction is not None:
        torch.nn.init.normal_(fused.pw_reduction)
    got, exact = fused.distinct_weights(), fused.double().distinct_weights()
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).abs() <= torch.finfo(dtype).eps * b.abs() + 1e-6).all()


def test_what_is_not_trained_stays_so():
    model = models.convmixer(8, 4, 3, 4)
    for frozen in (model.mixer.dw_weight, model.mixer.dw_affine, model.head.fc.weight):
        frozen.requires_grad_(False)
    fused = fusion.prepare(model, Sharing(4, 2), "scalar_weighted_mean")
    for other in (fused, fusion.fold(fused)):
        off = {name for name, p in other.named_parameters() if not p.requires_grad}
        assert off == {"mixer.dw_weight", "mixer.dw_affine", "head.fc.weight"}


def test_reset_parameters_resets_all():
    mixer = FusedMixer(8, 4, 3, Sharing(4, 2), "scalar_weighted_mean", device="meta").to_empty(device="cpu")
    for p in mixer.parameters():
        torch.nn.init.constant_(p, float("nan"))
    mixer.reset_parameters()
    assert mixer.pw_reduction.eq(1).all()
    assert all(t.isfinite().all() for t in mixer.state_dict().values())


def test_whole_step_compiles():
    _, fused = prepared("channel_weighted_mean", pw_residual=True)
    other = copy.deepcopy(fused)
    image = torch.randn(2, 3, 16, 16)
    fused(image).square().mean().backward()
    torch.compile(other, fullgraph=True)(image).square().mean().backward()
    for (name, p), q in zip(fused.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fusion.prepare(m, Sharing(5, 2), "median"), ValueError, "reduction: expected one of choose_first"),
        (lambda m: fusion.prepare(m, Sharing(5, 2), groups="runs"), ValueError, "groups: expected one of sharing"),
        (
            lambda m: fusion.prepare(m, Sharing(4, 2)),
            ValueError,
            "sharing: expected a plan for 5 blocks, got one for 4",
        ),
        (lambda m: fusion.prepare(m, [0, 0, 1, 1, 2]), TypeError, "sharing: expected a Sharing, got list"),
        (lambda m: fusion.prepare(m.head, Sharing(5, 2)), TypeError, "prepare: expected a ConvMixer or a SharedMixer"),
        (lambda m: fusion.fold(m), ValueError, "fold: expected a model with weight fusion"),
        (lambda m: fusion.fold(3), TypeError, "fold: expected a ConvMixer or a SharedMixer, got int"),
        (
            lambda m: fusion.prepare(fusion.prepare(m, Sharing(5, 2)), Sharing(5, 2)),
            ValueError,
            "prepare: expected a model without weight fusion",
        ),
        (
            lambda m: fusion.prepare(m, Sharing(5, 2, distribution="front", shared_depth=4), groups="consecutive"),
            ValueError,
            "groups: expected 'sharing' with a distribution other than uniform",
        ),
        (lambda m: FusedMixer(8, 2, 3, Sharing(2, 2), templates=2), ValueError, "templates: expected None"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(spin.models.convmixer(12, 5, 3, 4))


def test_accepts_a_mixer_by_itself():
    mixer = SharedMixer(12, 4, 3, bias=False).eval()
    x = torch.randn(2, 12, 5, 5)
    fused = fusion.prepare(mixer, Sharing(4, 1))
    assert not fused.training
    assert torch.equal(fused(x), mixer(x))
    assert torch.equal(fusion.fold(fused)(x), mixer(x))
