"""Convolutions with repeated weights: what they compute beside the published cases, and that they are modules."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spin_kernels.nn import RepeatConv2d, SharedMixer, SuperConv2d, SuperWeightBank
from spin_kernels.nn.repeat import MODES, MODULATIONS
from spin_kernels.weights import train_modulation_only

every_mode = pytest.mark.parametrize("mode", MODES)
every_modulation = pytest.mark.parametrize("modulation", MODULATIONS)


def layer_of(mode: str, modulation: str, **options: Any) -> tuple[RepeatConv2d, Tensor | None]:
    """An uneven layer of 7 -> 11 channels over a base of (4, 3), and the weight that a call brings."""
    options = {"padding": 1, "drop_rate": 0.4, "concat_dim": 0} | options
    layer = RepeatConv2d(7, 11, 3, (4, 3), mode=mode, modulation=modulation, **options)
    given = {"intra": None, "inter": (4, 3), "hybrid": (2, 3)}[mode]
    return layer, None if given is None else torch.randn(*given, 3, 3, dtype=layer.bias.dtype)


def expected_weight(layer: RepeatConv2d, given: Tensor | None) -> Tensor:
    """From the definition, value by value of the channels."""
    source = {"intra": layer.weight, "inter": given}.get(layer.mode)
    if source is None:
        source = torch.cat((layer.weight, given))
    out, into = layer.out_channels, layer.in_channels
    o, i = source.shape[:2]
    if layer.modulation == "random":
        filters = [*source.reshape(-1, 3, 3), *layer.random_weights]
        return torch.stack(filters).view(out, into, 3, 3) * layer.sign.sign()
    rows = []
    for a in range(out):
        row = []
        for b in range(into):
            w = source[a % o, b % i]
            if layer.modulation == "swish":
                alpha, beta = layer.alpha[a // o, b // i], layer.beta[a // o, b // i]
                w = w * alpha / (1 + torch.exp(beta * w))
            elif layer.modulation == "drop":
                w = w * layer.drop_mask[a, b]
            elif layer.modulation == "sign":
                whole = (out // o * o, into // i * i)
                w = w * layer.sign[a % whole[0], b % whole[1]].sign()
                if a >= whole[0]:
                    w = w * layer.sign_rows[a - whole[0], b % whole[1]].sign()
                if b >= whole[1]:
                    w = w * layer.sign_columns[a, b - whole[1]].sign()
            row.append(w)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@every_mode
@every_modulation
def test_uneven_sizes(mode: str, modulation: str) -> None:
    layer, given = layer_of(mode, modulation, dtype=torch.float64)
    x = torch.randn(2, 7, 5, 6, dtype=torch.float64)
    y = layer(x, given)
    weight = expected_weight(layer, given)
    torch.testing.assert_close(layer.repeated_weight(given), weight)
    torch.testing.assert_close(y, F.conv2d(x, weight, layer.bias, padding=1))
    y.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_signs_pass_gradients_between_minus_one_and_one() -> None:
    layer = RepeatConv2d(2, 4, 1, (2, 2), bias=False, modulation="sign", dtype=torch.float64)
    with torch.no_grad():
        layer.sign.copy_(torch.linspace(-2, 2, 8).view(4, 2, 1, 1))
    factor = torch.randn(4, 2, 1, 1, dtype=torch.float64)
    (layer.repeated_weight() * factor).sum().backward()
    tiled = layer.weight.detach().repeat(2, 1, 1, 1)
    torch.testing.assert_close(layer.sign.grad, tiled * factor * (layer.sign.abs() <= 1))


@pytest.mark.parametrize("mode", ["intra", "inter"])
@pytest.mark.parametrize("modulation", [m for m in MODULATIONS if m != "random"])
def test_sizes_that_agree_are_not_modulated(mode: str, modulation: str) -> None:
    layer = RepeatConv2d(3, 4, 3, (4, 3), mode=mode, modulation=modulation)
    given = torch.randn(4, 3, 3, 3) if mode == "inter" else None
    assert torch.equal(layer.repeated_weight(given), layer.weight if given is None else given)
    assert {name for name, _ in layer.named_parameters()} <= {"weight", "bias"}


@every_modulation
def test_hybrid_learns_its_size(modulation: str) -> None:
    layer, given = layer_of("hybrid", modulation)
    told, _ = layer_of("hybrid", modulation, given=(2, 3))
    names = {name: t.shape for name, t in told.state_dict().items()}
    loaded, _ = layer_of("hybrid", modulation)
    loaded.load_state_dict(told.state_dict())
    x = torch.randn(1, 7, 4, 4)
    assert torch.equal(loaded(x, given), told(x, given))
    assert "alpha" not in layer.state_dict()
    layer(x, given)
    for other in (layer, loaded):
        assert {name: t.shape for name, t in other.state_dict().items()} == names
    for other in (told, layer, loaded):
        with pytest.raises(ValueError, match="weight"):
            other(x, torch.randn(7, 3, 3, 3))


def test_hybrid_layers_refuse_the_state_of_others() -> None:
    signs, swish = (layer_of("hybrid", modulation, given=(2, 3))[0] for modulation in ("sign", "swish"))
    layer, _ = layer_of("hybrid", "swish")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(signs.state_dict())
    layer.load_state_dict(swish.state_dict())


@every_modulation
def test_first_call_in_inference_mode(modulation: str) -> None:
    layer, given = layer_of("hybrid", modulation)
    x = torch.randn(1, 7, 4, 4)
    with torch.inference_mode():
        layer(x, given)
    layer(x, given).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_drop_mask_stays() -> None:
    layer = RepeatConv2d(30, 40, 3, (20, 10), modulation="drop", drop_rate=0.25)
    assert layer.drop_mask.mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(layer.repeated_weight(), layer.repeated_weight())
    other = RepeatConv2d(30, 40, 3, (20, 10), modulation="drop", drop_rate=0.25)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.repeated_weight(), other.repeated_weight())


def test_swish_starts_with_the_size_of_a_convolution_and_different_tiles() -> None:
    layer = RepeatConv2d(64, 128, 3, (32, 32))
    weight, plain = layer.repeated_weight(), nn.Conv2d(64, 128, 3).weight
    assert weight.std().item() == pytest.approx(plain.std().item(), rel=0.5)
    tiles = weight.view(4, 32, 64, 9)[:, :, :32].flatten(1)
    correlation = torch.corrcoef(tiles) - torch.eye(4)
    assert correlation.abs().max() < 0.999


@every_mode
@every_modulation
def test_module_habits(mode: str, modulation: str) -> None:
    torch._dynamo.reset()  # its limit of versions counts all layers of the class
    layer, given = layer_of(mode, modulation)
    x = torch.randn(2, 7, 5, 5)
    y = layer(x, given)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.compile(layer, fullgraph=True)):
        torch.testing.assert_close(other(x, given), y)
    exported = torch.export.export(layer, (x,) if given is None else (x, given)).module()
    torch.testing.assert_close(exported(x) if given is None else exported(x, given), y)


@every_modulation
def test_short_types_keep_alpha_and_beta(modulation: str) -> None:
    layer, _ = layer_of("intra", modulation)
    layer.to(torch.bfloat16)
    assert all(
        p.dtype == (torch.float32 if n in ("alpha", "beta") else torch.bfloat16) for n, p in layer.named_parameters()
    )
    assert layer(torch.randn(2, 7, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_only_modulation_is_trained() -> None:
    bank = SuperWeightBank({"c": 4 * 9 * 64})
    net = nn.Sequential(
        RepeatConv2d(8, 8, 3, (4, 4)), nn.BatchNorm2d(8), RepeatConv2d(8, 8, 3, (4, 4), modulation="sign"),
        SuperConv2d(8, 8, 3, bank=bank, cluster="c"), SharedMixer(8, 2, 3, transform="scalar"), nn.Flatten(),
        nn.Linear(9, 9), nn.Linear(9, 3), bank,
    )  # fmt: skip
    trained = train_modulation_only(net)
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    assert names == {
        "0.alpha", "0.beta", "1.weight", "1.bias", "2.sign", "4.dw_affine", "4.pw_affine", "4.pw_gain", "7.weight",
        "7.bias", "8.coefficients.values",
    }  # fmt: skip
    assert {id(p) for p in trained} == {id(p) for p in net.parameters() if p.requires_grad}
    assert "6.weight" in {n for n, p in net.named_parameters() if p in set(train_modulation_only(net, net[6]))}


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "mode": (lambda: RepeatConv2d(4, 4, 3, (2, 2), mode="outer"), ValueError, "mode"),
    "modulation": (lambda: RepeatConv2d(4, 4, 3, (2, 2), modulation="tanh"), ValueError, "modulation"),
    "concat_dim": (lambda: RepeatConv2d(4, 4, 3, (2, 2), mode="hybrid", concat_dim=2), ValueError, "concat_dim"),
    "drop_rate": (lambda: RepeatConv2d(4, 4, 3, (2, 2), modulation="drop", drop_rate=1), ValueError, "drop_rate"),
    "base is no pair": (lambda: RepeatConv2d(4, 4, 3, 2), TypeError, "base"),
    "base too large": (lambda: RepeatConv2d(4, 4, 3, (5, 2)), ValueError, "base"),
    "empty base": (lambda: RepeatConv2d(4, 4, 3, (0, 2)), ValueError, "base"),
    "no channels": (lambda: RepeatConv2d(4, 0, 3, (1, 2)), ValueError, "channels"),
    "given": (lambda: RepeatConv2d(4, 4, 3, (2, 2), given=(2, 2)), ValueError, "given"),
    "given that does not join": (
        lambda: RepeatConv2d(4, 4, 3, (2, 2), mode="hybrid", given=(1, 2)),
        ValueError,
        "weight",
    ),
    "weight in intra": (lambda: layer_of("intra", "swish")[0](IMAGE, torch.ones(4, 3, 3, 3)), ValueError, "weight"),
    "no weight": (lambda: layer_of("inter", "swish")[0](IMAGE), TypeError, "weight"),
    "other kernel": (lambda: layer_of("inter", "swish")[0](IMAGE, torch.ones(4, 3, 1, 1)), ValueError, "weight"),
    "other base": (lambda: layer_of("inter", "swish")[0](IMAGE, torch.ones(3, 3, 3, 3)), ValueError, "weight"),
    "too much": (lambda: layer_of("hybrid", "swish")[0](IMAGE, torch.ones(8, 3, 3, 3)), ValueError, "weight"),
}
IMAGE = torch.randn(1, 7, 4, 4)


@pytest.mark.parametrize(("make", "error", "text"), BAD.values(), ids=BAD)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()
