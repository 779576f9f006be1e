"""Argument checks of the operators. They run on every call, in the kernels and in the fakes, and never read data.

Every error is one sentence: which argument, what was expected, what came.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import inf
from operator import index
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .reference import ACTIVATIONS

# dtype of the tensors -> dtype of the affines, gains, coefficients and statistics beside them
WIDE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


def mixer(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_affine: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    pw_affine: Tensor,
    pw_coefficients: Tensor | None,
    pw_gain: Tensor | None,
    pw_index: Sequence[int],
    dw_index: Sequence[int] | None,
    activation: str,
    pw_residual: bool,
    eps: float | None,
) -> None:
    """Arguments of shared_mixer_block (eps None) and shared_mixer_block_train."""
    if x is None or dw_weight is None or dw_affine is None or pw_weight is None or pw_affine is None:
        _refuse_none(x=x, dw_weight=dw_weight, dw_affine=dw_affine, pw_weight=pw_weight, pw_affine=pw_affine)
    dtype, device, shape = x.dtype, x.device, x.shape
    wide = WIDE.get(dtype)
    if wide is None or x.layout is not torch.strided:
        _refuse_kind("x", x)
    if len(shape) != 4:
        _refuse_shape("x", "(B, C, H, W)", shape)
    batch, channels, height, width = shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"x: expected C, H and W of at least 1, got shape {tuple(shape)}")

    depth = len(pw_index)
    filters = _stack("dw_weight", dw_weight, "(S_dw, C, k, k)", 4)
    kernel = dw_weight.shape[-1]
    if kernel % 2 == 0:
        raise ValueError(f"dw_weight: expected an odd kernel size k, got shape {tuple(dw_weight.shape)}")
    _tensor("dw_weight", dw_weight, (filters, channels, kernel, kernel), dtype, device)
    if dw_bias is not None:
        _tensor("dw_bias", dw_bias, (filters, channels), dtype, device)
    _tensor("dw_affine", dw_affine, (depth, 2, channels), wide, device)
    matrices = templates = _stack("pw_weight", pw_weight, "(S_pw, C, C)", 3)
    _tensor("pw_weight", pw_weight, (templates, channels, channels), dtype, device)
    if pw_coefficients is not None:
        matrices = _stack("pw_coefficients", pw_coefficients, "(S_pw, T)", 2)
        if templates == 0:
            raise ValueError("pw_weight: expected at least 1 template beside pw_coefficients, got 0")
        _tensor("pw_coefficients", pw_coefficients, (matrices, templates), wide, device)
    if pw_bias is not None:
        _tensor("pw_bias", pw_bias, (matrices, channels), dtype, device)
    _tensor("pw_affine", pw_affine, (depth, 2, channels), wide, device)
    if pw_gain is not None:
        _tensor("pw_gain", pw_gain, (depth, channels), wide, device)

    if depth and (min(pw_index) < 0 or max(pw_index) >= matrices):
        _refuse_index("pw_index", pw_index, matrices, "pointwise matrices")
    if dw_index is None:
        if filters != depth:
            raise ValueError(
                f"dw_index: expected {depth} ints because dw_weight has {filters} filters for {depth} blocks, got None"
            )
    elif len(dw_index) != depth:
        raise ValueError(f"dw_index: expected {depth} ints, as many as pw_index has, got {len(dw_index)}")
    elif depth and (min(dw_index) < 0 or max(dw_index) >= filters):
        _refuse_index("dw_index", dw_index, filters, "depthwise filters")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if eps is not None:
        if not 0 <= eps < inf:
            raise ValueError(f"eps: expected a finite number of at least 0, got {eps}")
        if batch * height * width < 2:
            raise ValueError(
                f"x: expected at least 2 values per channel (B*H*W) for batch statistics, got shape {tuple(shape)}"
            )


def mixer_backward(grad: Tensor, x: Tensor, *arguments) -> None:
    """Arguments of _mixer_backward: those of the mixer, and a gradient like its result."""
    mixer(x, *arguments)
    _tensor("grad", grad, x.shape, x.dtype, x.device)


class Piece(NamedTuple):
    """A slab of one layer's weight and the window of the bank it is made from."""

    layer: int
    base: int
    stride: int
    templates: int
    coefficient: int
    out_offset: int
    in_offset: int
    out: int
    into: int
    row: int

    def bank_end(self, kh: int, kw: int) -> int:
        """One past the last element of the bank that this piece reads."""
        last = self.base + (self.templates - 1) * self.stride
        return last + ((self.out - 1) * self.row + self.into) * kh * kw

    def overlaps(self, other: "Piece") -> bool:
        return (
            self.out_offset < other.out_offset + other.out
            and other.out_offset < self.out_offset + self.out
            and self.in_offset < other.in_offset + other.into
            and other.in_offset < self.in_offset + self.into
        )


class Plan(NamedTuple):
    """Checked pieces and shapes, as they came and read, what they need of bank and coefficients, and the result."""

    integers: tuple[tuple[int, ...], tuple[int, ...]]
    pieces: tuple[Piece, ...]
    layers: tuple[tuple[int, ...], ...]  # (out, in, kh, kw) of each
    bank_ends: tuple[int, ...]
    bank_end: int
    coefficient_end: int
    numel: int


def composition_text(pieces: Sequence[int], shapes: Sequence[int]) -> str:
    """The integers of a composition as one string, which private operators take. Cached, but not for torch.compile,
    which warns about caches."""
    write = _write if torch.compiler.is_compiling() else _written
    return write(_integers("pieces", pieces), _integers("shapes", shapes))


def _integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(map(index, values))
    except TypeError:
        raise TypeError(f"{name}: expected integers, got {values!r:.200}") from None


def _write(*lists: tuple[int, ...]) -> str:
    return ";".join(" ".join(map(str, values)) for values in lists)


_written = lru_cache(maxsize=64)(_write)


def composition_layers(text: str) -> list[list[int]]:
    """The shapes in a text of ``composition_text``, without checks: torch.compile traces this."""
    shapes = [int(size) for size in text.split(";")[1].split()]
    return [shapes[i : i + 4] for i in range(0, len(shapes), 4)]


@lru_cache(maxsize=64)
def composition_plan(text: str) -> Plan:
    """All that a text says, checked. Cached: a network's is the same in every call."""
    pieces, shapes = (tuple(map(int, values.split())) for values in text.split(";"))
    return superweight_plan(pieces, shapes)


def compose_superweights(bank: Tensor, coefficients: Tensor, pieces: Sequence[int], shapes: Sequence[int]) -> int:
    """Arguments of compose_superweights; returns the number of elements of its result."""
    return composition(bank, coefficients, composition_text(pieces, shapes)).numel


def composition(bank: Tensor, coefficients: Tensor, text: str) -> Plan:
    """The same of a private operator."""
    if bank is None or coefficients is None:
        _refuse_none(bank=bank, coefficients=coefficients)
    wide = WIDE.get(bank.dtype)
    if wide is None or bank.layout is not torch.strided:
        _refuse_kind("bank", bank)
    if bank.dim() != 1:
        _refuse_shape("bank", "(P,)", bank.shape)
    if coefficients.dim() != 1:
        _refuse_shape("coefficients", "(Q,)", coefficients.shape)
    _tensor("coefficients", coefficients, coefficients.shape, wide, bank.device)
    plan = composition_plan(text)
    size = bank.shape[0]
    if plan.bank_end > size:
        p, end = next((p, end) for p, end in enumerate(plan.bank_ends) if end > size)
        raise ValueError(f"pieces: piece {p} expected a bank of at least {end} elements, got {size}")
    size = coefficients.shape[0]
    if plan.coefficient_end > size:
        p, end = next(
            (p, piece.coefficient + piece.templates)
            for p, piece in enumerate(plan.pieces)
            if piece.coefficient + piece.templates > size
        )
        raise ValueError(f"pieces: piece {p} expected at least {end} coefficients, got {size}")
    return plan


def composition_backward(grads: Sequence[Tensor], bank: Tensor, coefficients: Tensor, text: str) -> Plan:
    """Arguments of _compose_superweights_backward: one flat gradient, or one per layer."""
    plan, dtype, device = composition(bank, coefficients, text), bank.dtype, bank.device
    if len(grads) == 1 and grads[0].dim() == 1:
        _tensor("grads", grads[0], (plan.numel,), dtype, device)
    elif len(grads) != len(plan.layers):
        raise ValueError(f"grads: expected one per layer, {len(plan.layers)}, got {len(grads)}")
    else:
        for grad, shape in zip(grads, plan.layers, strict=True):
            _tensor("grads", grad, shape, dtype, device)
    return plan


def superweight_plan(pieces: tuple[int, ...], shapes: tuple[int, ...]) -> Plan:
    """Checks that the pieces tile every layer exactly."""
    if len(shapes) % 4:
        raise ValueError(f"shapes: expected four ints (out, in, kh, kw) per layer, got {len(shapes)} ints")
    if len(pieces) % 10:
        raise ValueError(f"pieces: expected ten ints per piece, got {len(pieces)} ints")
    layers = tuple(shapes[i : i + 4] for i in range(0, len(shapes), 4))
    for number, shape in enumerate(layers):
        if min(shape) < 1:
            raise ValueError(f"shapes: expected sizes of at least 1, got {shape} for layer {number}")
    numel = sum(out * into * kh * kw for out, into, kh, kw in layers)
    if numel >= 2**63:
        raise ValueError(f"shapes: expected fewer than 2**63 elements in all, got {numel}")

    parsed = tuple(Piece(*pieces[i : i + 10]) for i in range(0, len(pieces), 10))
    of_layer: list[list[int]] = [[] for _ in layers]
    bank_ends = []
    for number, piece in enumerate(parsed):
        _check_piece(number, piece, layers)
        of_layer[piece.layer].append(number)
        bank_ends.append(piece.bank_end(*layers[piece.layer][2:]))
    for layer, numbers in enumerate(of_layer):
        _check_tiling(layer, layers[layer], numbers, parsed)
    return Plan(
        (pieces, shapes),
        parsed,
        layers,
        tuple(bank_ends),
        max(bank_ends, default=0),
        max((piece.coefficient + piece.templates for piece in parsed), default=0),
        numel,
    )


def _check_piece(number: int, piece: Piece, layers: Sequence[tuple[int, ...]]) -> None:
    if not 0 <= piece.layer < len(layers):
        raise ValueError(f"pieces: piece {number} expected a layer below {len(layers)}, got {piece.layer}")
    for name in ("base", "stride", "coefficient", "out_offset", "in_offset"):
        if getattr(piece, name) < 0:
            raise ValueError(f"pieces: piece {number} expected {name} of at least 0, got {getattr(piece, name)}")
    for name in ("templates", "out", "into"):
        if getattr(piece, name) < 1:
            field = "in" if name == "into" else name
            raise ValueError(f"pieces: piece {number} expected {field} of at least 1, got {getattr(piece, name)}")
    if piece.row < piece.into:
        raise ValueError(f"pieces: piece {number} expected row of at least its in, {piece.into}, got {piece.row}")
    out, into = layers[piece.layer][:2]
    if piece.out_offset + piece.out > out or piece.in_offset + piece.into > into:
        raise ValueError(
            f"pieces: piece {number} expected to lie inside layer {piece.layer} of {out} x {into} channels, "
            f"got channels up to {piece.out_offset + piece.out} x {piece.in_offset + piece.into}"
        )


def _check_tiling(layer: int, shape: tuple[int, ...], numbers: list[int], pieces: tuple[Piece, ...]) -> None:
    """Rectangles inside the layer tile it exactly when they are disjoint and their areas add up."""
    numbers = sorted(numbers, key=lambda number: pieces[number].out_offset)
    for position, number in enumerate(numbers):
        end = pieces[number].out_offset + pieces[number].out
        for other in numbers[position + 1 :]:
            if pieces[other].out_offset >= end:
                break
            if pieces[number].overlaps(pieces[other]):
                raise ValueError(
                    f"pieces: piece {other} expected a part of layer {layer} of its own, "
                    f"got one that overlaps piece {number}"
                )
    covered = sum(pieces[number].out * pieces[number].into for number in numbers)
    if covered != shape[0] * shape[1]:
        names = f"pieces {', '.join(map(str, sorted(numbers)))}" if numbers else "no piece"
        raise ValueError(
            f"pieces: layer {layer} expected to be tiled without a gap, got {names} covering {covered} of "
            f"{shape[0] * shape[1]} channel pairs"
        )


def repeat_weight(
    weight: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
    out_channels: int,
    in_channels: int,
) -> None:
    """Arguments of repeat_weight."""
    if weight is None:
        _refuse_none(weight=weight)
    dtype, device = weight.dtype, weight.device
    wide = WIDE.get(dtype)
    if wide is None or weight.layout is not torch.strided:
        _refuse_kind("weight", weight)
    if weight.dim() != 4:
        _refuse_shape("weight", "(o, i, kh, kw)", weight.shape)
    o, i, kh, kw = weight.shape
    if min(o, i, kh, kw) < 1:
        raise ValueError(f"weight: expected sizes of at least 1, got shape {tuple(weight.shape)}")
    for name, size in (("out_channels", out_channels), ("in_channels", in_channels)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if out_channels * in_channels * kh * kw > 2**60:
        raise ValueError(
            f"out_channels, in_channels: expected a weight that fits in memory, got {out_channels} x {in_channels}"
        )
    if gate is not None:
        if alpha is not None or beta is not None:
            raise ValueError("gate: expected None beside alpha and beta, got a tensor")
        _tensor("gate", gate, (out_channels, in_channels, kh, kw), dtype, device)
    if (alpha is None) != (beta is None):
        missing, given = ("alpha", "beta") if alpha is None else ("beta", "alpha")
        raise ValueError(f"{missing}: expected a tensor beside {given}, got None")
    if alpha is not None and beta is not None:
        tiles = (-(-out_channels // o), -(-in_channels // i))
        _tensor("alpha", alpha, tiles, wide, device)
        _tensor("beta", beta, tiles, wide, device)


def repeat_weight_backward(grad: Tensor, weight: Tensor, *arguments) -> None:
    """Arguments of _repeat_weight_backward."""
    repeat_weight(weight, *arguments)
    _tensor("grad", grad, (*arguments[-2:], *weight.shape[2:]), weight.dtype, weight.device)


def _tensor(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype is not dtype:
        _refuse_dtype(name, tensor, dtype)
    if tensor.shape != shape:
        _refuse_shape(name, str(tuple(shape)), tensor.shape)
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    if tensor.layout is not torch.strided:
        _refuse_kind(name, tensor)


def _stack(name: str, tensor: Tensor, form: str, rank: int) -> int:
    """First size of a tensor of the given rank."""
    shape = tensor.shape
    if len(shape) != rank:
        _refuse_shape(name, form, shape)
    return shape[0]


def _refuse_none(**tensors: Tensor | None) -> NoReturn:
    name = next(name for name, tensor in tensors.items() if tensor is None)
    raise TypeError(f"{name}: expected a tensor, got None")


def _refuse_shape(name: str, expected: str, shape: Sequence[int]) -> NoReturn:
    raise ValueError(f"{name}: expected shape {expected}, got {tuple(shape)}")


def _refuse_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> NoReturn:
    raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")


def _refuse_kind(name: str, tensor: Tensor) -> NoReturn:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    raise TypeError(f"{name}: expected dtype float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _refuse_index(name: str, index: Sequence[int], count: int, what: str) -> NoReturn:
    position = next(d for d, value in enumerate(index) if not 0 <= value < count)
    raise ValueError(
        f"{name}: expected values from 0 to {count - 1}, indices of the {count} {what}, "
        f"got {index[position]} for block {position}"
    )
