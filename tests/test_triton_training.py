"""Training through the Triton kernels: gradients and statistics against the reference in float64, and golden cases."""

import os
from random import Random

import pytest
import test_golden
import torch
from arguments import mixer_arguments, tensors_of
from test_random_shapes import any_arguments
from test_training_shapes import BLOCK, CHECKPOINTED, EPS, TRAIN, assert_right, fused, is_degenerate, leaves, plain
from torch.library import opcheck

pytest.importorskip("triton", reason="triton is not installed")
from test_triton import DTYPES, ON_GPU, for_interpreter, on_device

from triton_ops import training

SHAPES = int(os.environ.get("SPIN_RANDOM_SHAPES", "40"))
CHUNKS = 10
pytestmark = pytest.mark.usefixtures("on_triton")


def check(a: dict, eps: float | None) -> None:
    dtype = a["x"].dtype
    grad = torch.randn(a["x"].shape, dtype=torch.float64).to(dtype)
    given = on_device(a)
    got = {name: t.cpu() for name, t in fused(given, eps, grad.to(given["x"].device)).items()}
    for name, tensor in tensors_of(a).items():
        assert got[f"grad {name}"].dtype == tensor.dtype
    if dtype != torch.float32 and (eps is not None or a["x"].numel() < 1000):
        return  # see test_training_shapes.py: of few values a rounded one can decide over a whole gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIN_BACKEND", "reference")
        assert_right(got, plain(a, torch.float64, eps, grad), plain(a, dtype, eps, grad), dtype)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_shapes(chunk: int, statistics: str) -> None:
    eps = EPS if statistics == "batch" else None
    left = SHAPES // CHUNKS // 2
    while left:
        seed = int(torch.randint(2**31, ()))
        torch.manual_seed(seed)
        rng = Random(seed)
        a = for_interpreter(any_arguments(rng)[0])
        if a["x"].shape[1] == 1 or (eps is not None and (a["x"].shape[0] == 0 or is_degenerate(a))):
            continue
        left -= 1
        print(f"seed {seed}: {a['x'].dtype}", {n: tuple(v.shape) for n, v in tensors_of(a).items()})
        check(a, eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "eps"), [
    *((name, eps) for name in ("gelu", "gelu_tanh", "relu", "silu") for eps in (None, EPS)),
    ("identity", None),  # behind BatchNorm its scales have no gradient
])  # fmt: skip
def test_every_epilogue(activation: str, eps: float | None, dtype: torch.dtype) -> None:
    for rich in (True, False):
        bias = not rich or activation == "relu"  # BatchNorm takes out the scale of a ReLU without bias, its gain's
        check(
            mixer_arguments(
                batch=3, channels=70, height=9, width=7, kernel=3, depth=2, filters=2, gain=rich, bias=bias,
                templates=2 if rich else None, activation=activation, pw_residual=rich, dtype=dtype,
            ),
            eps,
        )  # fmt: skip


@pytest.mark.parametrize("eps", [None, EPS])
@pytest.mark.parametrize("pw_residual", [False, True])
def test_one_tensor_per_block_gives_the_same_bits(pw_residual: bool, eps: float | None) -> None:
    a = mixer_arguments(batch=2, channels=17, height=4, width=5, depth=9, matrices=2) | {"pw_residual": pw_residual}
    a = leaves(on_device(a))
    grad = torch.randn_like(a["x"])
    results = []
    for op, options in ((BLOCK, {}) if eps is None else (TRAIN, {"eps": eps}), (CHECKPOINTED, {"eps": eps})):
        y = op(**a, **options)
        y = y if isinstance(y, torch.Tensor) else y[0]
        results.append([y, *torch.autograd.grad(y, list(tensors_of(a).values()), grad)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    assert training.saved_elements(a["x"], 9, pw_residual, 1) == (9 + pw_residual) * a["x"].numel()


@pytest.mark.parametrize("eps", [None, EPS])
def test_opcheck(eps: float | None) -> None:
    a = on_device(mixer_arguments(depth=1))
    names = ("x", "dw_weight", "dw_bias", "dw_affine", "pw_weight", "pw_bias", "pw_affine")
    private = (*(a[name] for name in names), None, None, a["pw_index"], None, "gelu", False, eps)
    for save in (0, 2):
        opcheck(torch.ops.spin._mixer.default, (*private, save))
    _, *kept = torch.ops.spin._mixer.default(*private, 2)
    opcheck(torch.ops.spin._mixer_backward.default, (torch.randn_like(a["x"]), *kept, *private))


@pytest.mark.skipif(ON_GPU, reason="the cases are CPU tensors; on a GPU the shapes above are what is checked")
@pytest.mark.parametrize("case", test_golden.CASES, ids=lambda case: case["name"])
def test_published_cases(case: dict) -> None:
    test_golden.test_inference(case, torch.float32)  # the assertions are in these
    test_golden.test_training(case, torch.float32)
