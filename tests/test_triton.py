"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

import os
from random import Random
from typing import Any

import pytest
import torch
from arguments import cast, mixer_arguments, tensors_of
from test_random_shapes import any_arguments, assert_right, expected_format
from torch import Tensor

from spin_kernels import dispatch, reference

pytest.importorskip("triton", reason="triton is not installed")
from triton_ops import configs, mixer

ON_GPU = torch.cuda.is_available()
SHAPES = int(os.environ.get("SPIN_RANDOM_SHAPES", "150"))
CHUNKS = 10
BLOCK = torch.ops.spin.shared_mixer_block.default
pytestmark = pytest.mark.usefixtures("on_triton")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU  # the interpreter's bfloat16 products are wrong


def on_device(a: dict[str, Any]) -> dict[str, Any]:
    return {n: v.cuda() if ON_GPU and isinstance(v, Tensor) else v for n, v in a.items()}


def for_interpreter(a: dict[str, Any]) -> dict[str, Any]:
    """Without a GPU: no bfloat16, and fewer taps, because every one of a program takes a millisecond."""
    if ON_GPU:
        return a
    a = a | {n: t.half() for n, t in tensors_of(a).items() if t.dtype == torch.bfloat16}
    if a["dw_weight"].shape[-1] > 5:
        a["dw_weight"] = a["dw_weight"][..., :3, :3]
    return a


def check(a: dict[str, Any]) -> None:
    before = {name: tensor.clone() for name, tensor in tensors_of(a).items()}
    y = BLOCK(**on_device(a)).cpu()
    assert y.dtype == a["x"].dtype
    assert y.is_contiguous(memory_format=expected_format(a["x"]))
    for name, tensor in tensors_of(a).items():
        assert torch.equal(tensor, before[name]), f"{name} was changed"
    assert_right(y, lambda dtype: reference.mixer(**(cast(a, dtype) if dtype == torch.float64 else a))[0], a["x"])


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_shapes(chunk: int) -> None:
    for _ in range(SHAPES // CHUNKS):
        seed = int(torch.randint(2**31, ()))
        torch.manual_seed(seed)
        rng = Random(seed)
        a, layout = any_arguments(rng)
        a = for_interpreter(a)
        print(f"seed {seed}: {a['x'].dtype} {layout}", {n: tuple(v.shape) for n, v in tensors_of(a).items()})
        check(a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("size", [(7, 7), (16, 16), (14, 15), (20, 3)])
def test_every_kernel_and_epilogue(
    size: tuple[int, int], activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a large batch would choose: two images fill no device.
    monkeypatch.setattr(mixer, "fused_tiles", lambda images, *problem: configs.fused_tiles(1000, *problem))
    for bias, gain, residual, templates in ((True, False, False, None), (False, True, True, 3)):
        a = mixer_arguments(
            batch=2, channels=70, height=size[0], width=size[1], kernel=3, depth=3, filters=2, templates=templates,
            bias=bias, gain=gain, dtype=dtype, activation=activation, pw_residual=residual,
        )  # fmt: skip
        check(a)


def test_large_kernels() -> None:
    for kernel in (11, 31):
        check(mixer_arguments(batch=1, channels=5, height=6, width=7, kernel=kernel, depth=1))


def test_chunks_of_a_batch_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    a = mixer_arguments(batch=5, channels=20, height=7, width=7, depth=3, dtype=torch.float16)
    whole = BLOCK(**on_device(a))
    monkeypatch.setattr(mixer, "images_per_chunk", lambda *_: 2)
    assert torch.equal(BLOCK(**on_device(a)), whole)


def test_both_paths_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a = mixer_arguments(batch=2, channels=40, height=16, width=15, depth=3, dtype=torch.float16, pw_residual=True)
    tiles = configs.fused_tiles(1000, 240, 40, 2, configs.Device.of(on_device(a)["x"].device))
    assert tiles is not None
    assert configs.fused_tiles(2, 240, 40, 2, configs.DEVICES["sm_90"]) is None
    monkeypatch.setattr(mixer, "fused_tiles", lambda *_: tiles)
    fused = BLOCK(**on_device(a))
    monkeypatch.setattr(mixer, "fused_tiles", lambda *_: None)
    apart = BLOCK(**on_device(a))
    torch.testing.assert_close(fused, apart, rtol=2e-3, atol=2e-3)


def test_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    a = on_device(mixer_arguments())
    assert dispatch.explain("shared_mixer_block", **a).backend == "triton"
    assert dispatch.explain("shared_mixer_block", **a).kernel == "triton_ops.mixer"
    assert dispatch.explain("shared_mixer_block_train", **a).kernel == "triton_ops.training"
    leaf = a["x"].clone().requires_grad_()
    explained = dispatch.explain("shared_mixer_block", **a | {"x": leaf})
    assert (explained.kernel, explained.backward) == ("triton_ops.training", "triton")
    wide = torch.zeros(1).expand(1, 1 << 16, 1, 1 << 15)
    assert "2^31" in dispatch._triton_mixer_refusal([wide])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not ON_GPU:
        with pytest.raises(RuntimeError, match="x is not on a GPU and Triton's interpreter is off"):
            BLOCK(**a)
        monkeypatch.delenv("SPIN_BACKEND")
        assert dispatch.explain("shared_mixer_block", **a).backend == "cpu"


def test_tiles_fit_every_device_and_are_listed() -> None:
    rng = Random(int(torch.randint(2**31, ())))
    for device in configs.DEVICES.values():
        choices = list(configs.every_choice(device))
        assert 5 < len(choices) < 100
        for _, item, tiles in choices:
            if isinstance(tiles, configs.ProductTiles):
                assert tiles.shared_bytes(item) <= device.shared_bytes
            assert tiles.reason
        listed = {(choice.kernel, choice.item, choice.tiles[:-1]) for choice in choices}
        for _ in range(1000):
            item, tokens, channels = rng.choice((2, 4)), int(10 ** rng.uniform(0, 6)), int(10 ** rng.uniform(0, 4))
            assert ("product", item, configs.product_tiles(tokens, channels, item, device)[:-1]) in listed
            assert ("depthwise", item, configs.depthwise_tiles(tokens)[:-1]) in listed
            fused = configs.fused_tiles(rng.randrange(1000), tokens, channels, item, device)
            assert fused is None or ("fused", item, fused[:-1]) in listed
        assert configs.images_per_chunk(1, 256, 768, 2, device) == 1
        assert configs.images_per_chunk(10**6, 256, 768, 2, device) < 10**4
