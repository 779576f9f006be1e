"""Weights of all layers from windows of one bank, and the gradients, for plans of csrc/torch/compose_plan.cpp.

    result[u; row, column] = sum_k c[u, k] bank[base + k stride + row pitch + column]     for every user u of a cell
    d bank[k; row, column] = sum_u c[u, k] g[u; row, column]      d c[u, k] = sum g[u; row, column] bank[k; row, column]

Tiling: a cell is a part of a window of the bank that the same layers use, one long run of its rows; a program takes
BLOCK elements of it with TEMPLATES templates in registers and walks the users. Forward is one launch for all layers,
backward one per step: of windows that overlap, or overlap themselves, one is added after the other. Rows of any length
follow one another in a tile, so only a cell's last one is partial, for one division per place and program.
Cost: bank and result, backward both and the bank's gradient, pass through memory once; templates multiply-adds per
element of the result forward, two backward. One warp per program: a user's products are a sum over lanes, no barrier.
Numerics: float32 in a tile, rounded once; products of tiles are added in float64. No atomics: every run has the same
bits. Tables are in pinned memory and copied by every call (8 bytes per program): a cache on the device would keep
memory of the pools of CUDA graphs, and die before the graphs that read it.

Rejected: templates from L1 for every user (as many loads as multiply-adds, and a sum over lanes for every product);
tiles of rows x columns (a row of 3 x 3 kernels fills half of one).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import ComposeTiles, Device, compose_tiles
from .device import on

SUM_BLOCK = 128  # products of a coefficient that are added at once
CELL = tl.constexpr(13)  # fields; which they are is in compose_plan.cpp


@triton.jit
def tile_of(programs, cells, program, BLOCK: tl.constexpr):
    """The program's cell, and rows and columns of its elements in it, and which exist."""
    cell = cells + tl.load(programs + program) * CELL
    rows, run = tl.load(cell + 6), tl.load(cell + 7)
    start = (program - tl.load(cell + 10)) * BLOCK
    column = (start % run).to(tl.int32) + tl.arange(0, BLOCK)
    row = start // run + column // run.to(tl.int32)
    return cell, row, column % run.to(tl.int32), row < rows


@triton.jit
def user_of(cell, users, number):
    """First element in the result, elements from one row to the next, first coefficient."""
    user = users + (tl.load(cell + 8) + number) * 3
    return tl.load(user), tl.load(user + 1), tl.load(user + 2)


@triton.jit
def compose_kernel(
    bank, coefficients, result, programs, cells, users, TEMPLATES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    cell, row, column, inside = tile_of(programs, cells, tl.program_id(0).to(tl.int64), BLOCK)
    stride, templates, pitch = tl.load(cell + 1), tl.load(cell + 2), tl.load(cell + 5)
    count = tl.load(cell + 9)
    if tl.load(cell + 3) > 0:  # a further step of backward
        count = count * 0
    first = bank + tl.load(cell) + row * pitch + column
    k = tl.arange(0, TEMPLATES)
    there = k < templates
    values = tl.load(first[None, :] + k[:, None] * stride, mask=there[:, None] & inside[None, :], other=0.0)
    values = values.to(tl.float32)
    for number in range(count):
        to, to_pitch, coefficient = user_of(cell, users, number)
        weights = tl.load(coefficients + coefficient + k, mask=there, other=0.0)
        total = tl.sum(weights[:, None] * values, axis=0)
        for more in range(TEMPLATES, templates):  # than registers hold
            value = tl.load(first + more * stride, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(coefficients + coefficient + more) * value
        tl.store(result + to + row * to_pitch + column, total.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_program"])
def compose_gradient_kernel(
    gradient, bank, coefficients, bank_gradient, products, programs, cells, users, first_program,
    ADD: tl.constexpr, TEMPLATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64) + first_program
    cell, row, column, inside = tile_of(programs, cells, program, BLOCK)
    base, stride, templates, last = tl.load(cell), tl.load(cell + 1), tl.load(cell + 2), tl.load(cell + 4)
    pitch, count, tiles = tl.load(cell + 5), tl.load(cell + 9), tl.load(cell + 11)
    products += tl.load(cell + 12) + program - tl.load(cell + 10)
    for begin in range(tl.load(cell + 3), last, TEMPLATES):
        k = begin + tl.arange(0, TEMPLATES)
        place = base + (row * pitch + column)[None, :] + k[:, None] * stride
        there = k < last
        mask = there[:, None] & inside[None, :]
        values = tl.load(bank + place, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros((TEMPLATES, BLOCK), dtype=tl.float32)
        for number in range(count):
            to, to_pitch, coefficient = user_of(cell, users, number)
            g = tl.load(gradient + to + row * to_pitch + column, mask=inside, other=0.0).to(tl.float32)
            weights = tl.load(coefficients + coefficient + k, mask=there, other=0.0)
            total += weights[:, None] * g[None, :]
            tl.store(products + (number * templates + k) * tiles, tl.sum(values * g[None, :], axis=1), mask=there)
        if ADD:
            total += tl.load(bank_gradient + place, mask=mask, other=0.0)
        tl.store(bank_gradient + place, total.to(bank_gradient.dtype.element_ty), mask=mask)


@triton.jit
def coefficient_gradient_kernel(products, sums, terms, coefficient_gradient, BLOCK: tl.constexpr):
    coefficient = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for term in range(tl.load(sums + coefficient), tl.load(sums + coefficient + 1)):
        first, count = tl.load(terms + 2 * term), tl.load(terms + 2 * term + 1)
        for begin in range(0, count, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            total += tl.load(products + first + place, mask=place < count, other=0.0)
    tl.store(coefficient_gradient + coefficient, tl.sum(total, axis=0).to(tl.float32))


class Plan(NamedTuple):
    table: Tensor  # programs, cells, users, sums, terms, one after another
    sizes: list[int]
    steps: list[int]  # first program of each, and their number
    sums: int  # coefficients that are used
    products: int
    written: int  # elements of the bank that the first step writes
    numel: int  # of the result


@lru_cache(maxsize=256)
def plan_of(pieces: tuple[int, ...], shapes: tuple[int, ...], block: int, pinned: bool) -> Plan:
    *tables, steps = torch.ops.spin._plan_composition.default(pieces, shapes, block)
    _, cells, _, sums, terms = tables
    steps = steps.tolist()
    written = sum(
        (last - begin) * rows * run
        for _, _, _, begin, last, _, rows, run, _, _, first, *_ in cells.tolist()
        if first < steps[min(1, len(steps) - 1)]
    )
    # Pointers to tables stay divisible by 16.
    padded = [torch.nn.functional.pad(t.flatten(), (0, t.numel() % 2)) for t in tables]
    table = torch.cat(padded)
    numel = sum(math.prod(shapes[i : i + 4]) for i in range(0, len(shapes), 4))
    return Plan(
        table.pin_memory() if pinned else table, [len(t) for t in padded], steps, len(sums) - 1,
        int(terms[:, 1].sum()), written, numel,
    )  # fmt: skip


def planned(bank: Tensor, pieces: Sequence[int], shapes: Sequence[int]) -> tuple[Plan, list[Tensor], ComposeTiles]:
    """The plan, its tables on the bank's device and the tiles it was made for."""
    tiles = compose_tiles(max(pieces[3::10], default=1), bank.numel(), Device.of(bank.device))
    plan = plan_of(tuple(pieces), tuple(shapes), tiles.block, bank.device.type == "cuda")
    return plan, list(plan.table.to(bank.device, non_blocking=True).split(plan.sizes)), tiles


def forward(bank: Tensor, coefficients: Tensor, pieces: Sequence[int], shapes: Sequence[int]) -> Tensor:
    """The flat result of the checked arguments of ``spin::compose_superweights``."""
    with on(bank.device):
        plan, tables, tiles = planned(bank, pieces, shapes)
        result = bank.new_empty(plan.numel)
        if plan.numel:
            compose_kernel[(plan.steps[-1],)](
                bank.contiguous(), coefficients.contiguous(), result, *tables[:3],
                TEMPLATES=tiles.templates, BLOCK=tiles.block, num_warps=tiles.warps,
            )  # fmt: skip
        return result


def backward(
    grad: Tensor, bank: Tensor, coefficients: Tensor, pieces: Sequence[int], shapes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of bank and coefficients."""
    with on(bank.device):
        plan, tables, tiles = planned(bank, pieces, shapes)
        # What steps add up is rounded after the last one.
        new = torch.empty if plan.written == bank.numel() else torch.zeros
        dtype = bank.dtype if len(plan.steps) <= 2 else torch.float32
        to_bank = new(bank.shape, dtype=dtype, device=bank.device)
        to_coefficients = torch.zeros_like(coefficients, memory_format=torch.contiguous_format)
        if plan.numel:
            given = grad.contiguous(), bank.contiguous(), coefficients.contiguous()
            products = torch.empty(plan.products, dtype=torch.float32, device=bank.device)
            for step, (first, last) in enumerate(zip(plan.steps, plan.steps[1:], strict=False)):
                compose_gradient_kernel[(last - first,)](
                    *given, to_bank, products, *tables[:3], first,
                    ADD=step > 0, TEMPLATES=tiles.templates, BLOCK=tiles.block, num_warps=tiles.warps,
                )  # fmt: skip
            coefficient_gradient_kernel[(plan.sums,)](
                products, *tables[3:], to_coefficients, BLOCK=SUM_BLOCK, num_warps=1
            )
        return to_bank.to(bank.dtype), to_coefficients
