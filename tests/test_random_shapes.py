"""The mixer, frozen and not, and whole frozen networks on random legal shapes, dtypes and layouts."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from arguments import cast, mixer_arguments, tensors_of
from torch import Tensor

from spin_kernels import reference, spin_runtime

CHUNKS = 10
SHAPES = int(os.environ.get("SPIN_RANDOM_SHAPES", "1000"))
WEIGHTS = ("dw_weight", "dw_bias", "dw_affine", "pw_weight", "pw_bias", "pw_affine", "pw_coefficients", "pw_gain")
BLOCK = torch.ops.spin.shared_mixer_block.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("one_thread")


def sliced(x: Tensor) -> Tensor:
    larger = torch.full([2 * n + 1 for n in x.shape], math.nan, dtype=x.dtype)
    larger[1::2, 1::2, 1::2, 1::2] = x
    return larger[1::2, 1::2, 1::2, 1::2]


def cut_from_channels_last(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    larger = torch.full((batch, height + 1, width + 2, channels + 3), math.nan, dtype=x.dtype)
    larger[:, 1:, 2:, 3:] = x.permute(0, 2, 3, 1)
    return larger[:, 1:, 2:, 3:].permute(0, 3, 1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "channels_last by strides": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "sliced": sliced,
    "cut from channels_last": cut_from_channels_last,
    "transposed plane": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "transposed channels": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "expanded plane": lambda x: x[:, :, :1, :1].expand_as(x),
}


def any_settings(rng: Random, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    """Of mixer_arguments, all but the sizes."""
    return {
        "matrices": rng.randint(1, 4),
        "filters": rng.choice([None, rng.randint(1, 4)]),
        "templates": rng.choice([None, None, rng.randint(1, 4)]),
        "gain": rng.random() < 0.5,
        "bias": rng.random() < 0.8,
        "dtype": rng.choice(dtypes),
        "activation": rng.choice([*reference.ACTIVATIONS, "gelu"]),
        "pw_residual": rng.random() < 0.5,
    }


def any_arguments(rng: Random) -> tuple[dict[str, Any], str]:
    area = rng.choice([1, 9, 50, 300])
    height = rng.randint(1, rng.choice([area, math.isqrt(area)]))
    depth = rng.randint(0, 4)
    a = mixer_arguments(
        batch=rng.choice([0, 1, 1, 2, 3, 5]),
        channels=rng.choice([1, rng.randint(1, 20), rng.randint(20, 100), 16 * rng.randint(1, 6)]),
        height=height,
        width=rng.randint(1, max(1, area // height)),
        kernel=rng.choice([1, 3, 3, 3, 5, 5, 7, 7, 9, 9, 11, 13, 31]),
        depth=depth,
        **any_settings(rng, DTYPES),
    )
    for name in ("dw_bias", "pw_bias"):  # one without the other
        a[name] = a[name] if rng.random() < 0.8 else None
    layout = rng.choice(list(LAYOUTS))
    a["x"] = LAYOUTS[layout](a["x"]) if a["x"].shape[0] else a["x"]
    for name, tensor in tensors_of(a).items():  # weights that are views as well
        if name != "x" and rng.random() < 0.2:
            a[name] = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return a, layout


def assert_right(y: Tensor, compute: Callable[[torch.dtype], Tensor], scale: Tensor) -> None:
    """The rule of the numbers; compute(dtype) is plain PyTorch. Few values may cancel: then `scale` is the measure."""
    exact = compute(torch.float64)
    assert y.shape == exact.shape
    if y.numel() == 0:
        return
    error, norm, largest = (y.double() - exact).abs(), exact.norm(), exact.abs().max()
    if y.numel() < 256:
        largest = torch.maximum(largest, scale.abs().max().double())
        norm = torch.maximum(norm, largest * math.sqrt(y.numel()))
    if y.dtype == torch.float32:
        assert error.norm() <= 1e-5 * norm, f"relative error {error.norm() / norm}"
        return
    eps = torch.finfo(y.dtype).eps
    plain = (compute(y.dtype).double() - exact).abs()
    assert error.max() <= 2 * plain.max() + eps * largest, f"{error.max()}, plain {plain.max()}, of {largest}"
    assert error.norm() <= 1.5 * plain.norm() + eps * norm, f"{error.norm()}, plain {plain.norm()}, of {norm}"


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """F.conv2d, rounded once: torch 2.13's float16 one destroys the heap where padding >= k and stride > k."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.conv2d(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), stride, padding).to(x.dtype)


def expected_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def in_dtype(a: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return cast(a, dtype) if dtype == torch.float64 else a


def draws(chunk: int, count: int) -> Iterator[tuple[Random, dict[str, Any]]]:
    for _ in range(count // CHUNKS):
        seed = int(torch.randint(2**31, ()))
        torch.manual_seed(seed)
        rng = Random(seed)
        a, layout = any_arguments(rng)
        described = {n: tuple(v.shape) if isinstance(v, Tensor) else v for n, v in a.items()}
        print(f"seed {seed}: {a['x'].dtype} {layout} {described}")
        yield rng, a


def packing_arguments(a: dict[str, Any]) -> list[Any]:
    return [a[name] for name in (*WEIGHTS, "pw_index", "dw_index", "activation", "pw_residual")]


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_shapes(chunk: int) -> None:
    for _, a in draws(chunk, SHAPES):
        before = {name: tensor.clone() for name, tensor in tensors_of(a).items()}
        y = BLOCK(**a)
        assert y.dtype == a["x"].dtype
        assert y.is_contiguous(memory_format=expected_format(a["x"]))
        for name, tensor in tensors_of(a).items():
            assert torch.equal(tensor, before[name]), f"{name} was changed"
        assert_right(y, lambda dtype: reference.mixer(**in_dtype(a, dtype))[0], a["x"])  # noqa: B023
        assert torch.equal(y, BLOCK(**a | {"x": a["x"].contiguous()})), "another layout of x gives other bits"
        frozen = torch.ops.spin._frozen_mixer(a["x"], torch.ops.spin._pack_mixer(*packing_arguments(a)))
        assert torch.equal(y, frozen), "frozen weights give other bits"
        assert frozen.stride() == y.stride()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_frozen_networks(chunk: int) -> None:
    for rng, a in draws(chunk, SHAPES // 2):
        channels, dtype, wide = a["x"].shape[1], a["x"].dtype, torch.float32
        patch, stride, padding = rng.choice([1, 2, 3, 5, 7, 14]), rng.choice([1, 2, 3, 7, 20]), rng.choice([0, 1, 4])
        inputs, classes, batch = rng.choice([1, 3, 4, 20]), rng.choice([1, 10, 100]), rng.choice([0, 1, 2, 3, 5])
        if batch and classes == 1 and dtype != torch.float32:
            batch = 10  # the error of a few logits in 16 bits is luck, and so is its ratio to plain PyTorch's
        least = max(1, patch - 2 * padding)
        image = torch.randn(batch, inputs, *(least + stride * rng.randint(0, 5) + rng.randint(0, 2) for _ in "hw"))
        image = LAYOUTS[rng.choice(list(LAYOUTS))](image) if batch else image
        image = image.to(rng.choice([dtype, wide]))
        ends = {
            "patch_weight": torch.randn(channels, inputs, patch, patch).div(patch * inputs**0.5).to(dtype),
            "patch_bias": rng.choice([None, torch.randn(channels).to(dtype)]),
            "patch_affine": torch.randn(2, channels),
            "head_weight": torch.randn(classes, channels).div(channels**0.5).to(dtype),
            "head_bias": rng.choice([None, torch.randn(classes).to(dtype)]),
        }
        print(f"  image {tuple(image.shape)} {image.dtype}, patch {patch}, stride {stride}, padding {padding}")

        def compute(
            dtype: torch.dtype, a: dict[str, Any] = a, ends: dict[str, Any] = ends, image: Tensor = image,
            stride: int = stride, padding: int = padding,
        ) -> Tensor:  # fmt: skip
            a, e = in_dtype(a, dtype), in_dtype(ends, dtype)
            x = image.to(e["patch_weight"].dtype)
            x = conv2d(x, e["patch_weight"], e["patch_bias"], stride, padding)
            scale, shift = e["patch_affine"][:, :, None, None]
            x = (reference.ACTIVATIONS[a["activation"]](x) * scale + shift).to(x.dtype)
            x = reference.mixer(**a | {"x": x})[0]
            return F.linear(x.mean((2, 3)), e["head_weight"], e["head_bias"])

        before = image.clone()
        packed = torch.ops.spin._pack_network(
            ends["patch_weight"], ends["patch_bias"], ends["patch_affine"], stride, padding, ends["head_weight"],
            ends["head_bias"], *packing_arguments(a),
        )  # fmt: skip
        logits = torch.ops.spin._frozen_network(image, packed, classes)
        assert torch.equal(image, before)
        assert logits.dtype == image.dtype
        # Logits of a float32 image in a float16 or bfloat16 network have the network's precision at most.
        assert_right(logits.to(dtype), compute, a["x"][:1].new_ones(1) * 4)


@pytest.mark.parametrize("isa", spin_runtime.cpu_features()["isas"])
def test_long_sums_round_less_than_single_ones(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIN_CPU_ISA", isa)
    channels = 2048
    shape = {"batch": 1, "channels": channels, "height": 3, "width": 5, "kernel": 1, "depth": 1, "matrices": 1}
    a = mixer_arguments(**shape, bias=False, activation="identity")
    a["dw_affine"].zero_()  # y = x: the product alone
    a["pw_affine"][:, 0], a["pw_affine"][:, 1] = 1, 0
    for name in ("x", "pw_weight"):
        a[name] = torch.rand_like(a[name])
    tokens, matrix = a["x"].flatten(2)[0].double(), a["pw_weight"][0].double()
    single = torch.zeros(channels, tokens.shape[1])
    for i in range(channels):
        single = torch.addcmul(single.double(), matrix[:, i, None], tokens[i]).float()
    exact = matrix @ tokens
    error = (BLOCK(**a).flatten(2)[0].double() - exact).norm()
    assert error <= 0.6 * (single.double() - exact).norm()


@pytest.mark.parametrize("isa", spin_runtime.cpu_features()["isas"])
def test_gelu_of_bfloat16_is_exact_but_for_its_rounding(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIN_CPU_ISA", isa)
    channels = 16
    shape = {"batch": 1, "channels": channels, "height": 64, "width": 65, "kernel": 1, "depth": 1, "matrices": 1}
    a = mixer_arguments(**shape, bias=False, activation="gelu", dtype=torch.bfloat16)
    a["dw_affine"].zero_()
    a["pw_weight"][0] = torch.eye(channels)  # y = gelu(x)
    a["pw_affine"][:, 0], a["pw_affine"][:, 1] = 1, 0
    a["x"].uniform_(-9, 9)
    a["x"][:, :, 0, :4] = torch.tensor([1e30, -1e30, 3e-30, 0.0])
    x = a["x"].double()
    exact, got = torch.nn.functional.gelu(x), BLOCK(**a).double()
    # A rounding, and what a table of pieces may add.
    near = x.abs() < 10
    assert ((got - exact).abs() <= 2**-8 * exact.abs() + 1e-4).logical_or(~near).all()
    assert torch.equal(got[~near].sign(), torch.nn.functional.relu(x[~near]).sign())
    assert torch.allclose(got[~near], torch.nn.functional.relu(x[~near]), rtol=2**-8, atol=0)
