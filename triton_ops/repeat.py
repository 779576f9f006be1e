"""A small filter bank tiled into a large layer's weight and modulated, and the gradients.

    result[a, b, tap] = modulate(base[a mod o, b mod i, tap]),  tile t = (a div o, b div i), the last ones partial
    plain: w      swish: alpha[t] w s, s = 1 / (1 + exp(beta[t] w))      gate: w gate[a, b, tap]
    swish: d w = alpha (s - beta w s (1 - s)),  d alpha = w s,  d beta = -alpha w^2 s (1 - s)

Tiling: a program holds BLOCK elements of the base, all its rows one long run, and walks a group of tiles: divisions,
once per program, find its places. There is more than one group only where the base alone would leave processors idle;
then backward's parts of the base's gradient, one per group, are added in their order.
Cost: base and result, backward both gradients too, pass through memory once (the base once per group, from L2); swish
one exponential and one division per element. One warp per program: sums of alpha and beta are over lanes, no barrier.
Numerics: float32, rounded once; parts of alpha's and beta's gradients, one per program and tile, are added in float64.
No atomics: every run has the same bits.

Rejected: a program per piece of the result (four divisions per element, and backward's sums in other programs than its
results); one group always (a base of 64 x 64 x 3 x 3 is 72 programs).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import REPEAT_BLOCK, Device, repeat_groups
from .device import on

SIZES = ["o", "run", "rows", "pitch", "columns", "tiles", "group"]


@triton.jit
def piece_of(o, run, BLOCK: tl.constexpr):
    """First row of the program's elements of the base (o, run); their rows from there on, columns, and which exist."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    column = (start % run).to(tl.int32) + tl.arange(0, BLOCK)
    row = column // run
    return start // run, row, column % run, row < o - start // run


@triton.jit
def place_of(first_row, row, column, pitch):
    return first_row * pitch + (row.to(tl.int64) * pitch + column)


@triton.jit
def places_of(tile, first_row, row, column, inside, o, run, rows, pitch, columns):
    """Places in the result (rows, pitch) of the elements of a tile, `columns` of which are side by side."""
    first_row += tile // columns * o
    first = tile % columns * run
    mask = inside & (row < rows - first_row) & (column < pitch - first)
    return place_of(first_row, row, column, pitch) + first, mask


@triton.jit
def gates(x):
    """1 / (1 + exp(x)) and 1 - that, neither by a difference; the exponential never overflows."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    return tl.where(x > 0, e * large, large), tl.where(x > 0, large, e * large)


@triton.jit(do_not_specialize=SIZES)
def repeat_kernel(
    base, alpha, beta, gate, result, o, run, rows, pitch, columns, tiles, group,
    MODULATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first_row, row, column, inside = piece_of(o, run, BLOCK)
    w = tl.load(base + place_of(first_row, row, column, run), mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(1).to(tl.int64) * group
    for tile in range(first, min(first + group, tiles)):
        place, mask = places_of(tile, first_row, row, column, inside, o, run, rows, pitch, columns)
        value = w
        if MODULATION == "swish":
            s, _ = gates(tl.load(beta + tile) * w)
            value = tl.load(alpha + tile) * (w * s)
        elif MODULATION == "gate":
            value = w * tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(result + place, value.to(result.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def repeat_gradient_kernel(
    gradient, base, alpha, beta, gate, base_gradient, gate_gradient, parts,
    o, run, rows, pitch, columns, tiles, group, MODULATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """base_gradient (groups, o, run); parts (2, tiles, programs per group): of alpha's and beta's."""
    first_row, row, column, inside = piece_of(o, run, BLOCK)
    w = tl.load(base + place_of(first_row, row, column, run), mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    number = tl.program_id(1).to(tl.int64)
    for tile in range(number * group, min((number + 1) * group, tiles)):
        place, mask = places_of(tile, first_row, row, column, inside, o, run, rows, pitch, columns)
        g = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
        if MODULATION == "swish":
            a, b = tl.load(alpha + tile), tl.load(beta + tile)
            s, rest = gates(b * w)
            slope = w * (s * rest)  # 0 where the exponential is infinite
            # An infinite weight times no gradient is not a number, also where the tile ends before the piece.
            total += tl.where(mask, a * g * (s - b * slope), 0.0)
            to = parts + tile * tl.num_programs(0) + tl.program_id(0)
            tl.store(to, tl.sum(tl.where(mask, g * (w * s), 0.0), axis=0))
            to += tl.num_programs(0) * tl.cast(tiles, tl.int64)
            tl.store(to, -tl.sum(tl.where(mask, a * g * (w * slope), 0.0), axis=0))
        elif MODULATION == "gate":
            total += g * tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
            tl.store(gate_gradient + place, (g * w).to(gate_gradient.dtype.element_ty), mask=mask)
        else:
            total += g
    to = base_gradient + place_of(number * o + first_row, row, column, run)
    tl.store(to, total.to(base_gradient.dtype.element_ty), mask=inside)


class Call:
    """Launches of either kernel for the checked arguments of ``spin::repeat_weight``."""

    def __init__(
        self, weight: Tensor, alpha: Tensor | None, beta: Tensor | None, gate: Tensor | None, out: int, into: int
    ) -> None:
        o, i, kh, kw = weight.shape
        rows, columns, taps = triton.cdiv(out, o), triton.cdiv(into, i), kh * kw
        self.shape, self.tiles = (out, into, kh, kw), (rows, columns)
        pieces = triton.cdiv(weight.numel(), REPEAT_BLOCK)
        group = triton.cdiv(rows * columns, repeat_groups(pieces, rows * columns, Device.of(weight.device)))
        self.grid = pieces, triton.cdiv(rows * columns, group)
        self.tensors = [None if t is None else t.contiguous() for t in (weight, alpha, beta, gate)]
        self.sizes = o, i * taps, out, into * taps, columns, rows * columns, group
        self.modulation = "swish" if alpha is not None else "gate" if gate is not None else "plain"
        self.options = {"MODULATION": self.modulation, "BLOCK": REPEAT_BLOCK, "num_warps": 1}


def forward(weight: Tensor, *args: Any) -> Tensor:
    """The result of the checked arguments of ``spin::repeat_weight``."""
    with on(weight.device):
        call = Call(weight, *args)
        result = weight.new_empty(call.shape)
        repeat_kernel[call.grid](*call.tensors, result, *call.sizes, **call.options)
        return result


def backward(grad: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """Gradients of weight, alpha, beta and gate, None for absent ones."""
    with on(weight.device):
        call = Call(weight, *args)
        pieces, groups = call.grid
        dtype = weight.dtype if groups == 1 else torch.float32
        parts = torch.empty((groups, *weight.shape), dtype=dtype, device=weight.device)
        to_gate = grad.new_empty(call.shape) if call.modulation == "gate" else None
        swish = call.modulation == "swish"
        sums = torch.empty((2, *call.tiles, pieces), device=weight.device) if swish else None
        repeat_gradient_kernel[call.grid](
            grad.contiguous(), *call.tensors, parts, to_gate, sums, *call.sizes, **call.options
        )
        to_weight = parts[0] if groups == 1 else parts.sum(0).to(weight.dtype)
        to_alpha, to_beta = (None, None) if sums is None else (s.sum(-1, dtype=torch.float64).float() for s in sums)
        return to_weight, to_alpha, to_beta, to_gate
