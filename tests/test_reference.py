"""The reference against plain nn.Modules and against loops over single elements."""

import math
from typing import Any

import pytest
import torch
from arguments import cast, compose_arguments, mixer_arguments, repeat_arguments, tensors_of
from torch import Tensor, nn

from spin_kernels import reference

ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
    "identity": nn.Identity(),
}


class Blocks(nn.Module):
    """ConvMixer as the paper writes it, of Conv2d and BatchNorm2d, sharing convolutions by sharing modules."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        dw_weight, pw_weight = arguments["dw_weight"], arguments["pw_weight"]
        channels, kernel = dw_weight.shape[1], dw_weight.shape[-1]
        bias = arguments["dw_bias"] is not None
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias) for _ in dw_weight
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=bias) for _ in pw_weight)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(channels, momentum=1.0) for _ in range(2 * len(arguments["pw_index"]))
        )
        self.to(dw_weight.dtype)
        self.norms.to(arguments["dw_affine"].dtype)
        self.index = arguments["pw_index"]
        self.dw_index = arguments["dw_index"] or list(range(len(self.index)))
        self.act = ACTIVATIONS[arguments.get("activation", "gelu")]
        self.residual = arguments.get("pw_residual", False)
        with torch.no_grad():
            for convs, name in ((self.depthwise, "dw"), (self.pointwise, "pw")):
                for s, conv in enumerate(convs):
                    conv.weight.copy_(arguments[f"{name}_weight"][s].reshape(conv.weight.shape))
                    if bias:
                        conv.bias.copy_(arguments[f"{name}_bias"][s])
            for j, norm in enumerate(self.norms):
                affine = arguments["pw_affine" if j % 2 else "dw_affine"][j // 2]
                norm.weight.copy_(affine[0])
                norm.bias.copy_(affine[1])
                norm.running_var.fill_(1 - norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        for d, s in enumerate(self.index):
            y = x + self.norms[2 * d](self.act(self.depthwise[self.dw_index[d]](x)))
            x = self.norms[2 * d + 1](self.act(self.pointwise[s](y)))
            x = x + y if self.residual else x
        return x


def grads_of(blocks: Blocks, arguments: dict[str, Any]) -> dict[str, Tensor]:
    def stack(convs: nn.ModuleList, name: str) -> Tensor:
        like = arguments["dw_weight" if convs is blocks.depthwise else "pw_weight"][0]
        parameters = [getattr(conv, name) for conv in convs]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return torch.stack([g.reshape(like.shape) if name == "weight" else g for g in grads])

    def affine(first: int) -> Tensor:
        return torch.stack([torch.stack([n.weight.grad, n.bias.grad]) for n in blocks.norms[first::2]])

    return {
        "dw_weight": stack(blocks.depthwise, "weight"),
        "dw_bias": stack(blocks.depthwise, "bias"),
        "dw_affine": affine(0),
        "pw_weight": stack(blocks.pointwise, "weight"),
        "pw_bias": stack(blocks.pointwise, "bias"),
        "pw_affine": affine(1),
    }


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("pw_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [{}, {"filters": 2, "kernel": 5, "matrices": 1}, {"kernel": 9, "height": 3, "width": 1}]
)
def test_mixer_matches_modules(shape: dict[str, Any], activation: str, pw_residual: bool, eps: float | None) -> None:
    arguments = mixer_arguments(
        dtype=torch.float64, requires_grad=True, activation=activation, pw_residual=pw_residual, **shape
    )
    blocks = Blocks(arguments).train(eps is not None)
    y, dw_stats, pw_stats = reference.mixer(**arguments, eps=eps)
    x = arguments["x"].detach().requires_grad_()
    expected = blocks(x)
    torch.testing.assert_close(y, expected)

    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, grad in {"x": x.grad, **grads_of(blocks, arguments)}.items():
        assert torch.allclose(arguments[name].grad, grad, rtol=1e-9, atol=1e-9), name
    if eps is None:
        assert dw_stats is None
        assert pw_stats is None
        return
    count = y[:, 0].numel()
    for j, norm in enumerate(blocks.norms):
        mean, variance = (pw_stats if j % 2 else dw_stats)[j // 2]
        torch.testing.assert_close(mean, norm.running_mean)
        torch.testing.assert_close(variance * count / (count - 1), norm.running_var)
    assert not dw_stats.requires_grad
    assert not pw_stats.requires_grad


def test_mixer_without_biases() -> None:
    arguments = mixer_arguments(dtype=torch.float64, bias=False)
    torch.testing.assert_close(reference.mixer(**arguments)[0], Blocks(arguments).eval()(arguments["x"]))


@pytest.mark.parametrize("bias", [False, True])
def test_gain_and_coefficients(bias: bool) -> None:
    arguments = mixer_arguments(dtype=torch.float64, templates=3, gain=True, bias=bias)
    expected = dict(arguments, pw_coefficients=None, pw_gain=None, pw_index=[0, 1, 2])
    matrices = torch.einsum("st,toi->soi", arguments["pw_coefficients"], arguments["pw_weight"])
    expected["pw_weight"] = arguments["pw_gain"][:, :, None] * matrices[arguments["pw_index"]]
    if bias:
        expected["pw_bias"] = arguments["pw_bias"][arguments["pw_index"]]
    torch.testing.assert_close(reference.mixer(**arguments)[0], Blocks(expected).eval()(arguments["x"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_low_precision_is_that_of_modules(dtype: torch.dtype, eps: float | None) -> None:
    arguments = mixer_arguments(batch=4, channels=16, height=8, width=8, dtype=dtype)
    exact = reference.mixer(**cast(arguments, torch.float64), eps=eps)[0]
    y, *stats = reference.mixer(**arguments, eps=eps)
    with torch.no_grad():
        plain = Blocks(arguments).train(eps is not None)(arguments["x"])
    assert y.dtype == dtype
    assert eps is None or {s.dtype for s in stats} == {torch.float32}
    bound = 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= bound
    assert (y - exact).norm() <= 1.5 * (plain - exact).norm() + torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [15, 31])
def test_low_precision_with_large_kernels(kernel: int, dtype: torch.dtype) -> None:
    # Plain float16 F.conv2d of torch 2.13 never returns from these where the processor has AVX512-FP16.
    arguments = mixer_arguments(batch=1, channels=13, height=5, width=60, kernel=kernel, dtype=dtype)
    exact = reference.mixer(**cast(arguments, torch.float64))[0]
    arguments["x"].requires_grad_()
    y = reference.mixer(**arguments)[0]
    assert (y - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert torch.autograd.grad(y.sum(), arguments["x"])[0].isfinite().all()


def test_coefficients_are_summed_in_float32_and_rounded_once() -> None:
    arguments = mixer_arguments(templates=4, dtype=torch.bfloat16)
    weight, coefficients = arguments["pw_weight"], arguments["pw_coefficients"]
    exact = torch.einsum("st,toi->soi", coefficients.double(), weight.double())
    composed = reference.compose_matrices(weight, coefficients)
    assert composed.dtype == torch.bfloat16
    torch.testing.assert_close(composed.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_no_blocks_clone(channels_last: bool, eps: float | None) -> None:
    arguments = mixer_arguments(depth=0, channels_last=channels_last)
    y, dw_stats, pw_stats = reference.mixer(**arguments, eps=eps)
    assert torch.equal(y, arguments["x"])
    assert y.data_ptr() != arguments["x"].data_ptr()
    assert y.stride() == arguments["x"].stride()
    assert (dw_stats is None) if eps is None else dw_stats.shape == pw_stats.shape == (0, 2, 6)


def test_non_finite_values_pass_through() -> None:
    arguments = mixer_arguments(activation="relu")
    arguments["x"][0, 0, 0, 0] = math.nan
    arguments["x"][1, 0, 0, 0] = math.inf
    with torch.no_grad():
        expected = Blocks(arguments).eval()(arguments["x"])
    y = reference.mixer(**arguments)[0]
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_compose_superweights_element_by_element() -> None:
    arguments = compose_arguments(torch.float64)
    bank, coefficients = arguments["bank"].tolist(), arguments["coefficients"].tolist()
    pieces, shapes = arguments["pieces"], arguments["shapes"]
    layers = [torch.full(shapes[i : i + 4], math.nan, dtype=torch.float64) for i in range(0, len(shapes), 4)]
    for p in range(0, len(pieces), 10):
        layer, base, stride, templates, first, out_offset, in_offset, out, into, row = pieces[p : p + 10]
        _, _, kh, kw = layers[layer].shape
        for o in range(out):
            for i in range(into):
                for y in range(kh):
                    for x in range(kw):
                        place = base + ((o * row + i) * kh + y) * kw + x
                        layers[layer][out_offset + o, in_offset + i, y, x] = sum(
                            coefficients[first + k] * bank[place + k * stride] for k in range(templates)
                        )
    expected = torch.cat([layer.flatten() for layer in layers])
    assert not expected.isnan().any()
    torch.testing.assert_close(reference.compose_superweights(**arguments), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compose_superweights_rounds_once(dtype: torch.dtype) -> None:
    arguments = compose_arguments(dtype)
    composed = reference.compose_superweights(**arguments)
    assert composed.dtype == dtype
    exact = reference.compose_superweights(**cast(arguments, torch.float64))
    torch.testing.assert_close(composed.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("modulation", ["swish", "gate", "none"])
def test_repeat_weight_element_by_element(modulation: str) -> None:
    arguments = repeat_arguments(modulation, torch.float64)
    weight, alpha, beta, gate = (arguments[name] for name in ("weight", "alpha", "beta", "gate"))
    expected = torch.empty(5, 7, 3, 1, dtype=torch.float64)
    for a in range(5):
        for b in range(7):
            w = weight[a % 2, b % 3]
            if modulation == "swish":
                w = w * alpha[a // 2, b // 3] / (1 + torch.exp(beta[a // 2, b // 3] * w))
            elif modulation == "gate":
                w = w * gate[a, b]
            expected[a, b] = w
    torch.testing.assert_close(reference.repeat_weight(**arguments), expected)


def test_repeat_weight_of_a_larger_weight_and_of_one_size() -> None:
    weight = torch.randn(4, 5, 3, 3)
    assert torch.equal(reference.repeat_weight(weight, None, None, None, 3, 2), weight[:3, :2])
    same = reference.repeat_weight(weight, None, None, None, 4, 5)
    assert torch.equal(same, weight)
    assert same.data_ptr() != weight.data_ptr()


def test_repeat_weight_does_not_overflow() -> None:
    arguments = repeat_arguments(requires_grad=True)
    with torch.no_grad():
        arguments["weight"].mul_(100)
        arguments["beta"].mul_(100)
    result = reference.repeat_weight(**arguments)
    result.sum().backward()
    for tensor in (result, *(t.grad for t in tensors_of(arguments).values())):
        assert tensor.isfinite().all()
