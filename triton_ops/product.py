"""Pointwise half of a block on tokens x channels: x = scale * act(gain * (y W^T) + bias) + shift (+ y).

Tiling: BLOCK_M tokens x BLOCK_N output channels per program, the sum over input channels in steps of BLOCK_K. Programs
go through GROUP_M tiles of tokens before the next tile of channels, so that what runs at once shares rows of y and
the matrix (1.2 MB at 768 channels in bf16) stays in L2, however many blocks use it.
Cost: 2 C flops and 2 / BLOCK_N + 2 / BLOCK_M values of y and W from L2 per output; bound by the tensor cores for
tiles of 128 x 128 on.
Numerics: float32 sums, float32 operands multiplied as such (no tf32), one rounding on the way out.
"""

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def tile_of_product(M, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Of this program: the tile's number along tokens, its tokens (64-bit, may run past M) and channels (past C)."""
    in_group = GROUP_M * tl.cdiv(C, BLOCK_N)
    group, place = tl.program_id(0) // in_group, tl.program_id(0) % in_group
    group_rows = min(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    tile, column = group * GROUP_M + place % group_rows, place // group_rows
    return tile, tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def multiply(
    y, matrix, gain, tokens, channels, M,
    C: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_GAIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y W^T, or (gain * y) W if TRANSPOSED, for `tokens` and `channels` of the result, both as tile_of_product's."""
    steps = tl.arange(0, BLOCK_K)
    in_m, in_c = tokens < M, channels < C
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, C, BLOCK_K):
        k = first + steps
        in_k = k < C
        a = tl.load(y + tokens[:, None] * C + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0)
        if TRANSPOSED:
            place = k[:, None] * C + channels[None, :]
            if HAS_GAIN:
                a = (a * tl.load(gain + k, mask=in_k, other=0.0)[None, :]).to(a.dtype)
        else:
            place = channels[None, :] * C + k[:, None]
        b = tl.load(matrix + place, mask=in_k[:, None] & in_c[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def pre_activation(total, bias, gain, rows, C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr):
    """gain * total + bias."""
    if HAS_GAIN:
        total *= tl.load(gain + rows, mask=rows < C, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < C, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def product_end(
    total, y, bias, gain, affine, tokens, rows, M,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The block's output for these tokens and channels, float32."""
    in_c = rows < C
    total = pre_activation(total, bias, gain, rows, C, HAS_BIAS, HAS_GAIN)
    scale, shift = tl.load(affine + rows, mask=in_c, other=0.0), tl.load(affine + C + rows, mask=in_c, other=0.0)
    value = activate(total, ACTIVATION) * scale[None, :] + shift[None, :]
    if RESIDUAL:
        mask = (tokens < M)[:, None] & in_c[None, :]
        value += tl.load(y + tokens[:, None] * C + rows[None, :], mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def product_kernel(
    y, matrix, bias, gain, affine, x, M,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    _, tokens, rows = tile_of_product(M, C, BLOCK_M, BLOCK_N, GROUP_M)
    total = multiply(y, matrix, gain, tokens, rows, M, C, False, False, BLOCK_M, BLOCK_N, BLOCK_K)
    value = product_end(total, y, bias, gain, affine, tokens, rows, M, C, HAS_BIAS, HAS_GAIN, RESIDUAL, ACTIVATION)
    mask = (tokens < M)[:, None] & (rows < C)[None, :]
    tl.store(x + tokens[:, None] * C + rows[None, :], value.to(x.dtype.element_ty), mask=mask)
