"""Weights composed and repeated by the papers' own code, through the operators: values and gradients."""

from typing import Any

import golden
import pytest
import torch
import torch.nn.functional as F
from golden import assert_close
from torch import Tensor

from spin_kernels import functional

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def every_case(family: str) -> pytest.MarkDecorator:
    cases = golden.cases(family)
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


# --- SuperWeight Networks


def rectangles(parts: list[dict[str, Any]]) -> tuple[list[dict[str, int]], tuple[int, int]]:
    """Where the parts of a layer end up, and the layer's (out, in): later parts enclose or cut the earlier ones."""
    found: list[dict[str, int]] = []
    out = into = 0

    def add(part: int, rows: int, columns: int, at: tuple[int, int], skip: int) -> None:
        place = {"part": part, "out": rows, "in": columns, "row": columns, "skip": skip}
        found.append(place | {"out_offset": at[0], "in_offset": at[1]})

    def cut(rows: int, columns: int) -> None:
        for place in found:
            place["out"] = min(place["out"], rows - place["out_offset"])
            place["in"] = min(place["in"], columns - place["in_offset"])
        found[:] = [place for place in found if place["out"] > 0 and place["in"] > 0]

    for number, part in enumerate(parts):
        (rows, columns, kh, kw), *extra = part["pieces"]
        if number == 0 or not extra:  # further output channels of the input channels so far
            out, into = (out, columns) if number else (0, columns)
            cut(out, into)
            add(number, rows, columns, (out, 0), 0)
            out += rows
            continue
        more_rows, more_columns = extra[0][:2]
        if rows < 0:
            out += rows
            cut(out, into)
        assert more_rows == out
        add(number, out, more_columns, (0, into), 0)
        into += more_columns
        if rows > 0:
            assert columns == into
            add(number, rows, into, (out, 0), out * more_columns * kh * kw)
            out += rows
    return found, (out, into)


def composition(case: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[list[int], list[int], list[str], list[str]]:
    """pieces and shapes of all layers of all networks; banks and coefficients in the order of their concatenation."""
    names = case["parameters"]
    banks, vectors = ([n for n in names if n.startswith(kind + ".")] for kind in ("bank", "coefficients"))
    starts, end = {}, 0
    for bank in banks:
        starts[bank] = end
        end += tensors[bank].numel()
    firsts, last = {}, 0
    for vector in vectors:
        firsts[vector] = last
        last += tensors[vector].numel()
    pieces, shapes = [], []
    for layer in (layer for network in case["networks"] for layer in network["layers"]):
        places, (out, into) = rectangles(layer["parts"])
        for place in places:
            part = layer["parts"][place["part"]]
            base = starts[part["bank"]] + part["start"] + place["skip"]
            candidates = part["candidates"]
            stride = (part["end"] - part["start"]) // candidates
            # Uniform averages have no coefficients: as many equal ones are appended as templates are averaged.
            coefficient = firsts[part["coefficients"]] if "coefficients" in part else last + sum(range(candidates))
            corner = (place["out_offset"], place["in_offset"], place["out"], place["in"], place["row"])
            pieces += [len(shapes) // 4, base, stride, candidates, coefficient, *corner]
        assert [out, into] == layer["shape"][:2]
        shapes += layer["shape"]
    return pieces, shapes, banks, vectors


@every_dtype
@every_case("superweight")
def test_superweights(case: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = golden.load(case)
    pieces, shapes, banks, vectors = composition(case, tensors)
    leaves = {name: tensors[name].detach().to(dtype, copy=True).requires_grad_() for name in (*banks, *vectors)}
    averages = torch.cat([torch.full((n,), 1 / n, dtype=dtype) for n in range(1, 9)])  # n of them from n (n - 1) / 2 on
    coefficients = torch.cat([*(leaves[name].flatten() for name in vectors), averages])
    bank = torch.cat([leaves[name].flatten() for name in banks])
    weights = functional.compose_superweights(bank, coefficients, pieces, shapes)
    names = [f"net{n}.layer{l['layer']}" for n, net in enumerate(case["networks"]) for l in net["layers"]]  # noqa: E741
    loss = torch.zeros((), dtype=dtype)
    for name, weight in zip(names, weights, strict=True):
        assert_close(weight, tensors[f"weight.{name}"], case, "outputs", name)
        loss = loss + (weight * tensors[f"loss_weight.{name}"].to(dtype)).sum()
    loss.backward()
    for name, leaf in leaves.items():
        assert_close(leaf.grad, tensors[f"grad.{name}"], case, "grads", name)


# --- learnable repetition


@every_dtype
@every_case("repeatnet")
def test_repetition(case: dict[str, Any], dtype: torch.dtype) -> None:
    config = case["config"]
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in golden.load(case).items()}
    trained = [n for n in (*case["parameters"], "given_weight", "input") if n in tensors]
    leaves = {name: tensors[name].clone().requires_grad_() for name in trained}
    own, given = leaves.get("weight"), leaves.get("given_weight")
    source = own if given is None else given
    if own is not None and given is not None:
        source = torch.cat((own, given), config["concat_dim"])
    out, into, kh, kw = config["repeated_weight_shape"]
    (o, i), (e0, e1) = source.shape[:2], (config["e0"], config["e1"])

    def signs(name: str) -> Tensor:
        """sign(x), with the gradient of x clipped to [-1, 1]."""
        x = leaves[name]
        return x.sign().detach() + x.clamp(-1, 1) - x.clamp(-1, 1).detach()

    alpha = beta = gate = None
    kind, base = config["weight_activation"], source
    if kind == "random_bireal" and "random_weights" in tensors:
        kernels = torch.cat((source.reshape(-1, kh, kw), tensors["random_weights"].reshape(-1, kh, kw)))
        base, gate = kernels.reshape(out, into, kh, kw), signs("binary_weight")
    elif not config["repeats"]:
        pass  # a base of the layer's own size is used as it is
    elif "alphas" in leaves:
        alpha, beta = (leaves[name].view(config["r0"], config["r1"]) for name in ("alphas", "betas"))
    elif "drop_mask" in tensors:
        gate = tensors["drop_mask"].view(out, into, kh, kw)
    elif "binary_weight" in leaves:
        gate = signs("binary_weight").view(out - e0, into - e1, kh, kw)
        if e0:  # the remainder is cut from what is gated already
            gate = torch.cat((gate, gate[:e0] * signs("binary_weight_extra_rows").view(e0, into - e1, kh, kw)))
        if e1:
            extra = signs("binary_weight_extra_columns").view(out, e1, kh, kw)
            gate = torch.cat((gate, gate[:, :e1] * extra), 1)
    weight = functional.repeat_weight(base, alpha, beta, None if gate is None else gate.contiguous(), out, into)
    assert weight.shape == (out, into, kh, kw)
    if kind != "random_bireal":
        assert (o * config["r0"] + e0, i * config["r1"] + e1) == (out, into)
    result = F.conv2d(leaves["input"], weight, leaves.get("bias"), config["stride"], config["padding"])
    assert_close(weight, tensors["final_weight"], case, "outputs", "final_weight")
    assert_close(result, golden.load(case)["output"], case, "outputs", "output")
    (result * tensors["loss_weight"]).sum().backward()
    for name, leaf in leaves.items():
        if f"grad.{name}" in tensors:
            assert_close(leaf.grad, golden.load(case)[f"grad.{name}"], case, "grads", name)
