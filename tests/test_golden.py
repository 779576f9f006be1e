"""Networks against results of the papers' own code: inference, training, running statistics and gradients."""

import golden
import pytest
import torch
from golden import assert_close
from torch import Tensor

from spin_kernels import convert, reference

CASES = golden.cases("spin", "convmixer")
DTYPES = [torch.float64, torch.float32]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])

_STEM_AND_HEAD = {"patch_embed.conv": "patch_embed.conv", "patch_embed.bn": "patch_embed.bn", "head": "head.fc"}


def model_of(case, dtype):
    """The model with a case's parameters; those of a fused case are its fused weights."""
    tensors = {name: t.to(dtype) for name, t in golden.load(case).items()}
    if any(name.startswith("state_dict.") for name in tensors):
        state = {k.removeprefix("state_dict."): t for k, t in tensors.items() if k.startswith("state_dict.")}
        return convert.from_timm(state, activation="gelu")
    config, timm = case["config"], case["family"] == "convmixer"
    state = {}
    for name, tensor in tensors.items():
        kind, _, key = name.partition(".")
        if kind in ("param", "buffer", "fused_pointwise") and not _is_before_fusion(key):
            key = f"pointwise.{key}" if kind == "fused_pointwise" else key
            state[_timm_name(key) if timm else published_name(key)] = tensor
    if timm:
        return convert.from_timm(state, activation=config["activation"].lower())
    return from_published(case, state)


def from_published(case, state, reduction=None):
    """The model of a spin case from a state dict with the published names."""
    config = case["config"]
    return convert.from_ml_spin(
        {"model_state": state},
        dim=config["dim"],
        depth=config["depth"],
        kernel_size=config["kernel_size"],
        patch_size=config["patch_kernel"],
        patch_stride=config["patch_stride"],
        patch_padding=config["patch_padding"],
        num_classes=config["num_classes"],
        activation=config["activation"].lower(),
        rate=config["share_rate"],
        mapping=config["mapping_kind"],
        reduction=reduction,
    )


def _is_before_fusion(key: str) -> bool:
    """Whether this is a weight per layer, of which the fused weights are made."""
    return key.startswith(("pointwise_layer.", "fusion_weight_layer."))


def _timm_name(key: str) -> str:
    layer, _, tensor = key.rpartition(".")
    if layer.startswith("block."):
        _, d, part = layer.split(".")
        part = {"depthwise": "0.fn.0", "bn1": "0.fn.2", "pointwise": "1", "bn2": "3"}[part]
        return f"blocks.{d}.{part}.{tensor}"
    return {"patch_embed.conv": "stem.0", "patch_embed.bn": "stem.2", "head": "head"}[layer] + f".{tensor}"


def published_name(key: str) -> str:
    layer, _, tensor = key.rpartition(".")
    if layer.startswith("pointwise."):
        return f"pwise_{tensor[0]}.{layer.removeprefix('pointwise.')}"
    if layer.startswith("block."):
        _, d, part = layer.split(".")
        part = {"depthwise": "dwise_blk.0", "bn1": "dwise_blk.2", "bn2": "bn2"}[part]
        return f"blocks.{d}.{part}.{tensor}"
    return ("head.fc" if layer == "head" else layer) + f".{tensor}"


def part_of(model, name: str, get) -> Tensor:
    """The part of the model's tensors (of get(parameter), or buffers) that a case calls ``name``."""
    mixer = model.mixer
    layer, _, tensor = name.rpartition(".")
    if layer in _STEM_AND_HEAD:
        return get(getattr(model.get_submodule(_STEM_AND_HEAD[layer]), tensor))
    kind, d, *part = layer.split(".")
    part = part[0] if part else kind
    if part in ("depthwise", "pointwise"):
        value = get(getattr(mixer, f"{part[0]}w_{tensor}"))[int(d)]
        return value if tensor == "bias" else value[:, None] if part == "depthwise" else value[:, :, None, None]
    half = {"bn1": "dw", "bn2": "pw"}[part]
    if tensor.startswith("running_"):
        return get(getattr(mixer, f"{half}_running"))[int(d), int(tensor == "running_var")]
    return get(getattr(mixer, f"{half}_affine"))[int(d), int(tensor == "bias")]


def input_of(case, dtype):
    return golden.load(case)["input"].to(dtype, copy=True)  # which collects a gradient of its own


@every_dtype
@every_case
def test_inference(case, dtype):
    tensors, model, image = golden.load(case), model_of(case, dtype).eval(), input_of(case, dtype)
    assert model.head.fc.weight.dtype == model.mixer.dw_affine.dtype == dtype
    with torch.no_grad():
        assert_close(model(image), tensors["eval.output"], case, "outputs", "model")
        if "eval.features" in tensors:
            assert_close(model.forward_features(image), tensors["eval.features"], case, "outputs", "features")
        model.freeze()
        assert_close(model(image), tensors["eval.output"], case, "outputs", "frozen model")


@every_dtype
@every_case
def test_inference_through_the_operator_and_the_reference(case, dtype):
    tensors, model, image = golden.load(case), model_of(case, dtype).eval(), input_of(case, dtype)
    with torch.no_grad():
        patches, arguments = model.patch_embed(image), model.mixer._op_arguments()
        for name, features in (
            ("operator", torch.ops.spin.shared_mixer_block(patches, **arguments)),
            ("reference", reference.mixer(patches, **arguments)[0]),
        ):
            assert_close(model.head(features), tensors["eval.output"], case, "outputs", name)


def assert_running_statistics(model, case):
    """Of a model that was called once in train mode; answers how many tensors the case has."""
    compared = 0
    for name, expected in golden.load(case).items():
        if name.startswith("train.after."):
            assert_close(
                part_of(model, name.removeprefix("train.after."), lambda t: t), expected, case, "outputs", name
            )
            compared += 1
    return compared


@every_dtype
@every_case
def test_training(case, dtype):
    tensors, model, image = golden.load(case), model_of(case, dtype).train(), input_of(case, dtype)
    image.requires_grad_()
    output = model(image)
    assert_close(output, tensors["train.output"], case, "outputs", "output")
    assert_running_statistics(model, case)
    if "loss_weight" not in tensors:
        return

    (output * tensors["loss_weight"].to(dtype)).sum().backward()
    compared = 0
    for name, expected in tensors.items():
        key = name.removeprefix("grad.")
        if name != key and not _is_before_fusion(key):
            actual = image.grad if key == "input" else part_of(model, key, lambda t: t.grad)
            assert_close(actual, expected, case, "grads", name)
            compared += 1
    assert compared > 10


def test_every_published_case_is_here():
    assert len(CASES) >= 13
