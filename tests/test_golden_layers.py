"""Weights composed and repeated by the papers' own code, through the layers: values, gradients, outputs."""

from typing import Any

import golden
import pytest
import torch
from golden import assert_close
from test_golden_weights import every_case, every_dtype, rectangles
from torch import Tensor, nn

from spin_kernels.nn import RepeatConv2d, Slab, SuperConv2d, SuperLinear, SuperWeightBank

# --- SuperWeight Networks: a bank of the case's banks, a layer for each of its layers


def slabs_of(layer: dict[str, Any]) -> list[Slab]:
    slabs = []
    for place in rectangles(layer["parts"])[0]:
        part = layer["parts"][place["part"]]
        stride = (part["end"] - part["start"]) // part["candidates"]
        window = part["candidates"], part["start"] + place["skip"], stride
        corner = place["out"], place["in"], place["row"], place["out_offset"], place["in_offset"]
        slabs.append(Slab(part["bank"], *window, *corner, part.get("coefficients")))
    return slabs


def layer_of(layer: dict[str, Any], bank: SuperWeightBank) -> SuperConv2d | SuperLinear:
    slabs = slabs_of(layer)
    if len(layer["shape"]) == 2:
        return SuperLinear(*layer["shape"][::-1], bias=False, bank=bank, slabs=slabs)
    out, into, kh, kw = layer["shape"]
    return SuperConv2d(into, out, (kh, kw), layer["stride"], layer["padding"], bias=False, bank=bank, slabs=slabs)


class Networks(nn.Module):
    """All layers of all networks of a case; a call returns their weights, composed in one launch."""

    def __init__(self, case: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        banks = [name for name in case["parameters"] if name.startswith("bank.")]
        self.bank = SuperWeightBank({name: tensors[name].numel() for name in banks}, dtype=dtype)
        layers = [(n, layer) for n, network in enumerate(case["networks"]) for layer in network["layers"]]
        self.names = [f"net{n}.layer{layer['layer']}" for n, layer in layers]
        self.layers = nn.ModuleList(layer_of(layer, self.bank) for _, layer in layers)
        self.bank.attach(self)
        with torch.no_grad():
            self.bank.templates.copy_(torch.cat([tensors[name].flatten() for name in banks]))
            for (_, name), at in self.vectors():
                self.bank.coefficients.values[at] = tensors[name].flatten().to(dtype)

    def vectors(self) -> list[tuple[tuple[str, str], slice]]:
        lengths, start = self.bank.coefficients.lengths, self.bank.coefficients.start
        return [(key, slice(start(key), start(key) + length)) for key, length in lengths.items()]

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]


@every_dtype
@every_case("superweight")
def test_superweight_layers(case: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = golden.load(case)
    networks = Networks(case, tensors, dtype)
    weights = networks()
    loss = torch.zeros((), dtype=dtype)
    for name, weight in zip(networks.names, weights, strict=True):
        assert_close(weight, tensors[f"weight.{name}"], case, "outputs", name)
        loss = loss + (weight * tensors[f"loss_weight.{name}"].to(dtype)).sum()
    loss.backward()
    bank = networks.bank
    for name in bank.sizes:
        assert_close(bank.templates.grad[bank.place(name)], tensors[f"grad.{name}"].flatten(), case, "grads", name)
    for (_, name), at in networks.vectors():
        grad = tensors[f"grad.{name}"].flatten()
        assert_close(bank.coefficients.values.grad[at], grad, case, "grads", name)


# --- learnable repetition

MODULATIONS = {
    "swish": "swish", "bireal": "sign", "linear": "linear", "static_drop": "drop", "random_bireal": "random",
}  # fmt: skip
NAMES = {
    "alphas": "alpha", "betas": "beta", "binary_weight": "sign", "binary_weight_extra_rows": "sign_rows",
    "binary_weight_extra_columns": "sign_columns",
}  # fmt: skip


def repeated_cases() -> pytest.MarkDecorator:
    """In mode hybrid the size of the weight that calls bring is known from an argument, a call, or a state dict."""
    found = []
    for case in golden.cases("repeatnet"):
        hybrid = case["config"]["conv_type"] == "hybrid"
        for tells in ("argument", "first call", "state dict")[: 3 if hybrid else 1]:
            found.append(pytest.param(case, tells, id=f"{case['name']}-{tells}" if hybrid else case["name"]))
    return pytest.mark.parametrize(("case", "tells"), found)


@every_dtype
@repeated_cases()
def test_repeat_layers(case: dict[str, Any], dtype: torch.dtype, tells: str) -> None:
    config, tensors = case["config"], golden.load(case)
    given = tensors["given_weight"].detach().to(dtype, copy=True) if "given_weight" in tensors else None
    out, into, kh, kw = config["repeated_weight_shape"]
    layer = RepeatConv2d(
        into, out, (kh, kw), (config["own_weight_shape"] or config["given_weight_shape"])[:2], config["stride"],
        config["padding"], mode=config["conv_type"], modulation=MODULATIONS[config["weight_activation"]],
        concat_dim=1 if config["concat_dim"] is None else config["concat_dim"], drop_rate=config["drop_rate"] or 0,
        given=given.shape[:2] if config["conv_type"] == "hybrid" and tells == "argument" else None, dtype=dtype,
    )  # fmt: skip
    x = tensors["input"].detach().to(dtype, copy=True)
    if tells == "first call":
        layer(x, given)
    names = [n for n in (*case["parameters"], *case["buffers"]) if n in tensors and n not in ("input", "given_weight")]
    state = {NAMES.get(name, name): tensors[name].detach().to(dtype) for name in names}
    if tells != "state dict":  # where nothing is modulated the published layers have unused parameters
        state = {
            name: t.view(getattr(layer, name).shape) for name, t in state.items() if getattr(layer, name) is not None
        }
    elif "alpha" in state:
        tiles = (config["r0"], config["r1"])
        state |= {name: state[name].view(tiles) for name in ("alpha", "beta")}
    layer.load_state_dict(state)
    used = [name for name in names if NAMES.get(name, name) in state]
    leaves = {"input": x.requires_grad_()} | {name: getattr(layer, NAMES.get(name, name)) for name in used}
    if given is not None:
        leaves["given_weight"] = given.requires_grad_()
    result = layer(x, given)
    assert_close(layer.repeated_weight(given), tensors["final_weight"], case, "outputs", "final_weight")
    assert_close(result, tensors["output"], case, "outputs", "output")
    (result * tensors["loss_weight"]).sum().backward()
    for name, leaf in leaves.items():
        if f"grad.{name}" in tensors:
            expected = tensors[f"grad.{name}"]
            assert_close(leaf.grad.view(expected.shape), expected, case, "grads", name)
