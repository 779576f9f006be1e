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
bits. The plan is in pinned memory and copied by every call (a few kilobytes: programs find their cells by search): one
kept on the device would hold memory of the pool of a CUDA graph that is being made.

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

from .configs import COMPOSE_BLOCK, templates_held
from .device import on

SUM_BLOCK = 128  # products of a coefficient that are added at once
CELL = tl.constexpr(12)  # fields; which they are is in compose_plan.cpp


@triton.jit
def tile_of(firsts, cells, cells_count, program, BLOCK: tl.constexpr):
    """The program's cell, its number there and the first row; of its elements rows from there on, columns, and which
    exist."""
    low, high = tl.zeros((), dtype=tl.int64), tl.zeros((), dtype=tl.int64) + cells_count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(firsts + middle) <= program
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    cell, tile = cells + low * CELL, program - tl.load(firsts + low)
    rows, run = tl.load(cell + 6), tl.load(cell + 7)
    start = tile * BLOCK
    column = (start % run).to(tl.int32) + tl.arange(0, BLOCK)
    row = column // run.to(tl.int32)
    return cell, tile, start // run, row, column % run.to(tl.int32), row < rows - start // run


@triton.jit
def user_of(cell, users, number, first_row):
    """Of a user: the element of the result where the program's first row begins, elements from one row to the next, and
    the first coefficient."""
    user = users + (tl.load(cell + 8) + number) * 3
    pitch = tl.load(user + 1)
    return tl.load(user) + first_row * pitch, pitch, tl.load(user + 2)


@triton.jit(do_not_specialize=["cells_count"])
def compose_kernel(
    bank, coefficients, result, firsts, cells, users, cells_count, TEMPLATES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cell, _, first_row, row, column, inside = tile_of(firsts, cells, cells_count, program, BLOCK)
    stride, templates, pitch = tl.load(cell + 1), tl.load(cell + 2), tl.load(cell + 5)
    count = tl.load(cell + 9)
    if tl.load(cell + 3) > 0:  # a further step of backward
        count = count * 0
    first = bank + tl.load(cell) + first_row * pitch + row * pitch + column
    k = tl.arange(0, TEMPLATES)
    there = k < templates
    values = tl.load(first[None, :] + k[:, None] * stride, mask=there[:, None] & inside[None, :], other=0.0)
    values = values.to(tl.float32)
    for number in range(count):
        to, to_pitch, coefficient = user_of(cell, users, number, first_row)
        weights = tl.load(coefficients + coefficient + k, mask=there, other=0.0)
        total = tl.sum(weights[:, None] * values, axis=0)
        for more in range(TEMPLATES, templates):  # than registers hold
            value = tl.load(first + more * stride, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(coefficients + coefficient + more) * value
        tl.store(result + to + (row * to_pitch + column), total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def places_of(cell, first_row, row, column, inside, k, last):
    """Where the tile's elements of templates k below `last` lie in the bank, and which exist."""
    first = tl.load(cell) + first_row * tl.load(cell + 5)
    place = first + (row * tl.load(cell + 5) + column)[None, :] + k[:, None] * tl.load(cell + 1)
    return place, (k < last)[:, None] & inside[None, :]


@triton.jit
def gradient_of(gradient, cell, users, number, count, first_row, row, column, inside):
    """The tile's elements of a user's gradient; past the last user those of the last one, which a cache holds."""
    to, pitch, _ = user_of(cell, users, min(number, count - 1), first_row)
    return tl.load(gradient + to + (row * pitch + column), mask=inside, other=0.0)


@triton.jit(do_not_specialize=["cells_count", "first_program"])
def compose_gradient_kernel(
    gradient, bank, coefficients, bank_gradient, products, firsts, cells, users, cells_count, first_program,
    ADD: tl.constexpr, TEMPLATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64) + first_program
    cell, tile, first_row, row, column, inside = tile_of(firsts, cells, cells_count, program, BLOCK)
    templates, last, count, tiles = tl.load(cell + 2), tl.load(cell + 4), tl.load(cell + 9), tl.load(cell + 10)
    products += tl.load(cell + 11) + tile
    for begin in range(tl.load(cell + 3), last, TEMPLATES):
        k = begin + tl.arange(0, TEMPLATES)
        place, mask = places_of(cell, first_row, row, column, inside, k, last)
        values = tl.load(bank + place, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros((TEMPLATES, BLOCK), dtype=tl.float32)
        ahead = gradient_of(gradient, cell, users, 0, count, first_row, row, column, inside)
        for number in range(count):
            g = ahead.to(tl.float32)
            ahead = gradient_of(gradient, cell, users, number + 1, count, first_row, row, column, inside)
            _, _, coefficient = user_of(cell, users, number, first_row)
            weights = tl.load(coefficients + coefficient + k, mask=k < last, other=0.0)
            total += weights[:, None] * g[None, :]
            product = products + (number * templates + k) * tiles
            tl.store(product, tl.sum(values * g[None, :], axis=1), mask=k < last)
        # Found again: as 64-bit places they would take two registers per value through the loop.
        place, mask = places_of(cell, first_row, row, column, inside, k, last)
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
    table: Tensor  # firsts, cells, users, sums, terms, one after another
    sizes: list[int]
    cells: int
    steps: list[int]  # first program of each, and their number
    sums: int  # coefficients that are used
    products: int
    written: int  # elements of the bank that the first step writes
    numel: int  # of the result


@lru_cache(maxsize=256)
def plan_of(pieces: tuple[int, ...], shapes: tuple[int, ...], block: int, pinned: bool) -> Plan:
    *tables, steps = torch.ops.spin._plan_composition.default(pieces, shapes, block)
    firsts, cells, _, sums, terms = tables
    of_step = cells[: int((firsts < steps[1]).sum())] if len(steps) > 1 else cells
    _, _, _, begin, last, _, rows, run, *_ = of_step.unbind(1)
    # Pointers to tables stay divisible by 16.
    padded = [torch.nn.functional.pad(t.flatten(), (0, t.numel() % 2)) for t in tables]
    table = torch.cat(padded)
    return Plan(
        table.pin_memory() if pinned else table, [len(t) for t in padded], len(cells), steps.tolist(), len(sums) - 1,
        int(terms[:, 1].sum()), int(((last - begin) * rows * run).sum()),
        sum(math.prod(shapes[i : i + 4]) for i in range(0, len(shapes), 4)),
    )  # fmt: skip


_captured: dict[int, Plan] = {}  # CUDA graphs copy from these whenever they are replayed


def planned(bank: Tensor, pieces: Sequence[int], shapes: Sequence[int]) -> tuple[Plan, list[Tensor], dict[str, int]]:
    """The plan, its tables on the bank's device and the kernels' options."""
    on_gpu = bank.device.type == "cuda"
    plan = plan_of(tuple(pieces), tuple(shapes), COMPOSE_BLOCK, on_gpu)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _captured[id(plan)] = plan
    held = templates_held(max(pieces[3::10], default=1))
    options = {"TEMPLATES": held, "BLOCK": COMPOSE_BLOCK, "num_warps": 1}
    return plan, list(plan.table.to(bank.device, non_blocking=True).split(plan.sizes)), options


def forward(bank: Tensor, coefficients: Tensor, pieces: Sequence[int], shapes: Sequence[int]) -> Tensor:
    """The flat result of the checked arguments of ``spin::compose_superweights``."""
    with on(bank.device):
        plan, tables, options = planned(bank, pieces, shapes)
        result = bank.new_empty(plan.numel)
        if plan.numel:
            given = bank.contiguous(), coefficients.contiguous()
            compose_kernel[(plan.steps[-1],)](*given, result, *tables[:3], plan.cells, **options)
        return result


def backward(
    grad: Tensor, bank: Tensor, coefficients: Tensor, pieces: Sequence[int], shapes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of bank and coefficients."""
    with on(bank.device):
        plan, tables, options = planned(bank, pieces, shapes)
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
                    *given, to_bank, products, *tables[:3], plan.cells, first, ADD=step > 0, **options
                )
            coefficient_gradient_kernel[(plan.sums,)](
                products, *tables[3:], to_coefficients, BLOCK=SUM_BLOCK, num_warps=1
            )
        return to_bank.to(bank.dtype), to_coefficients
