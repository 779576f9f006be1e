"""Gradients of the fused kernels against the reference's in float64, frozen and batch statistics, on random shapes."""

import math
import os
from statistics import median
from typing import Any

import pytest
import torch
from arguments import cast, mixer_arguments, tensors_of
from test_random_shapes import CHUNKS, draws, expected_format
from torch import Tensor

from spin_kernels import reference, spin_runtime

SHAPES = int(os.environ.get("SPIN_RANDOM_SHAPES", "400"))
EPS = 1e-5
BLOCK, TRAIN = torch.ops.spin.shared_mixer_block.default, torch.ops.spin.shared_mixer_block_train.default
CHECKPOINTED = torch.ops.spin._checkpointed_mixer_block.default
pytestmark = pytest.mark.usefixtures("one_thread")


def differentiate(y: Tensor, a: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    tensors = tensors_of(a)
    grads = torch.autograd.grad(y, list(tensors.values()), grad.to(y.dtype), allow_unused=True, materialize_grads=True)
    return dict(zip(tensors, grads, strict=True))


def leaves(a: dict[str, Any]) -> dict[str, Any]:
    return {n: v.detach().requires_grad_() if isinstance(v, Tensor) else v for n, v in a.items()}


def plain(a: dict[str, Any], dtype: torch.dtype, eps: float | None, grad: Tensor) -> dict[str, Tensor]:
    """Output, statistics and gradients of the reference; float64 or the call's own types."""
    a = leaves(cast(a, dtype) if dtype == torch.float64 else a)
    y, dw_stats, pw_stats = reference.mixer(**a, eps=eps)
    results = {"y": y.detach(), **{f"grad {n}": g for n, g in differentiate(y, a, grad).items()}}
    return results if eps is None else results | {"dw_stats": dw_stats, "pw_stats": pw_stats}


def fused(a: dict[str, Any], eps: float | None, grad: Tensor) -> dict[str, Tensor]:
    a = leaves(a)
    if eps is None:
        y = BLOCK(**a)
        return {"y": y.detach(), **{f"grad {n}": g for n, g in differentiate(y, a, grad).items()}}
    y, dw_stats, pw_stats = TRAIN(**a, eps=eps)
    gradients = {f"grad {n}": g for n, g in differentiate(y, a, grad).items()}
    return {"y": y.detach(), **gradients, "dw_stats": dw_stats, "pw_stats": pw_stats}


def errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
    assert all(got[name].shape == exact[name].shape for name in exact)
    return {name: (got[name].double() - exact[name]).norm() for name in exact}


def magnifies_rounding(exact: dict[str, Tensor]) -> bool:
    """Whether a channel's mean is over 32 of the deviations that BatchNorm divides by, and with it all rounding."""
    statistics = [exact[n].double().unbind(1) for n in ("dw_stats", "pw_stats") if n in exact and exact[n].numel()]
    return any(float((mean.square() / (variance + EPS)).max()) > 32**2 for mean, variance in statistics)


def assert_right(got: dict[str, Tensor], exact: dict[str, Tensor], same: dict[str, Tensor], dtype: torch.dtype) -> None:
    """One draw. In 16 bits the sign of a value near zero is open: relu passes or stops its whole gradient."""
    largest = max((exact[n].norm() for n in exact if n.startswith("grad")), default=torch.zeros(()))
    of_plain, magnified, worst = errors(same, exact), magnifies_rounding(exact), 0.0
    norms = {n: torch.maximum(t.norm(), 1e-6 * largest) if n.startswith("grad") else t.norm() for n, t in exact.items()}
    if magnified:  # plain PyTorch misses the rule in every ninth of these; which gradient suffers most is luck
        worst = max(float(of_plain[n] / norms[n]) for n in exact if n.startswith("grad") and norms[n] > 0)
    for name, error in errors(got, exact).items():
        norm = norms[name]
        if dtype != torch.float32:
            bound = 3 * of_plain[name] + 0.2 * norm
        elif name.startswith("grad"):
            bound = max(1e-4 * norm, 2 * of_plain[name], 4 * worst * norm)
        else:
            bound = max(1e-5 * norm, 4 * magnified * of_plain[name])
        assert error <= bound, f"{name}: error {error / norm:.2e}, of plain PyTorch {of_plain[name] / norm:.2e}"


def is_degenerate(a: dict[str, Any]) -> bool:
    """Few values, whose variance magnifies rounding; or weights whose scale BatchNorm takes out again: their gradients
    are zero but for rounding."""
    batch, channels, height, width = a["x"].shape
    values = batch if torch.equal(a["x"], a["x"][:, :, :1, :1].expand_as(a["x"])) else batch * height * width
    one_template = a["pw_coefficients"] is not None and a["pw_coefficients"].shape[1] == 1
    matrices_scaled = a["pw_bias"] is None and (a["pw_gain"] is not None or one_template)
    filters_scaled = a["dw_bias"] is None and a["dw_weight"].shape[-1] == 1
    scaled_only = a["activation"] == "relu" and (matrices_scaled or filters_scaled)
    return values < 48 or channels == 1 or a["activation"] == "identity" or scaled_only


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_gradients(chunk: int, statistics: str) -> None:
    eps = EPS if statistics == "batch" else None
    for _, a in draws(chunk, SHAPES // 2):
        if a["x"].shape[0] == 0 or (eps is not None and is_degenerate(a)):
            continue
        grad = torch.randn(a["x"].shape, dtype=torch.float64).to(a["x"].dtype)
        before = {name: tensor.clone() for name, tensor in tensors_of(a).items()}
        got = fused(a, eps, grad)
        for name, tensor in tensors_of(a).items():
            assert torch.equal(tensor, before[name]), f"{name} was changed"
            assert got[f"grad {name}"].dtype == tensor.dtype
        assert got["grad x"].is_contiguous(memory_format=expected_format(a["x"]))
        dtype = a["x"].dtype
        if dtype != torch.float32 and (eps is not None or a["x"].numel() < 1000):
            continue  # of few values a rounded one can decide over a variance or a whole gradient: see the next test
        if a["x"].shape[1] == 1:
            continue  # a single channel may lie where gelu turns round, its gradients nothing but rounding
        assert_right(got, plain(a, torch.float64, eps, grad), plain(a, dtype, eps, grad), dtype)


@pytest.mark.parametrize("isa", spin_runtime.cpu_features()["isas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", ["frozen", "batch"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_gradients_of_a_usual_shape(
    activation: str, statistics: str, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIN_CPU_ISA", isa)
    eps = EPS if statistics == "batch" else None
    shape = {"batch": 4, "channels": 64, "height": 16, "width": 16, "kernel": 5, "depth": 4, "matrices": 2}
    draws = []
    for _ in range(1 if dtype == torch.float32 else 9):
        a = mixer_arguments(**shape, dtype=dtype, activation=activation, pw_residual=activation == "relu")
        grad = torch.randn(a["x"].shape, dtype=torch.float64).to(dtype)
        draws.append((fused(a, eps, grad), plain(a, torch.float64, eps, grad), plain(a, dtype, eps, grad)))
    if dtype == torch.float32:
        return assert_right(*draws[0], dtype)
    # The median: of a single draw one nearly dead channel can decide over a whole gradient.
    ratios = [(errors(got, exact), errors(same, exact), exact) for got, exact, same in draws]
    for name in draws[0][0]:
        slack = torch.finfo(dtype).eps
        shares = [float(e[name] / (1.5 * p[name] + slack * exact[name].norm())) for e, p, exact in ratios]
        assert median(shares) <= 1, f"{name}: {shares}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, EPS])
@pytest.mark.parametrize("pw_residual", [False, True])
def test_one_tensor_per_block_gives_the_same_bits(pw_residual: bool, eps: float | None, dtype: torch.dtype) -> None:
    for depth in (1, 8, 11):  # with residuals every eighth input is kept
        a = leaves(
            mixer_arguments(batch=3, channels=40, height=9, width=7, kernel=5, depth=depth, matrices=2, dtype=dtype)
            | {"pw_residual": pw_residual}
        )
        grad = torch.randn_like(a["x"])
        results, held = [], []
        for op, options in ((BLOCK, {}) if eps is None else (TRAIN, {"eps": eps}), (CHECKPOINTED, {"eps": eps})):
            result, size = call_and_weigh(op, a, options)
            y = result if isinstance(result, Tensor) else result[0]
            results.append([y.detach(), *differentiate(y, a, grad).values()])
            held.append(size)
        assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
        assert held[0] - held[1] == depth * 48 * 3 * 9 * 7 * a["x"].itemsize


def call_and_weigh(op: Any, a: dict[str, Any], options: dict[str, Any]) -> tuple[Any, int]:
    """The result, and the bytes that autograd keeps."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        return op(**a, **options), sum(sizes)


def test_infinite_and_missing_values_stay_where_plain_pytorch_has_them() -> None:
    for value in (math.nan, math.inf):
        a = mixer_arguments(batch=3, channels=20, height=9, width=9, kernel=3, depth=2, activation="relu")
        a["x"][1, 3, 4, 4] = value
        grad = torch.randn_like(a["x"])
        got, exact = fused(a, None, grad), plain(a, torch.float64, None, grad)
        for name in got:
            assert torch.equal(got[name].isfinite(), exact[name].isfinite()), name
