"""The pointwise half of a block in training: its pre-activation with statistics, and both of its gradients.

    c = gain * (y W^T) + bias, kept; mean and deviations of act(c), a part per tile
    d y = (gain * d c) W (+ residual), and its sums behind the depthwise activation
    P[o, i] = sum over tokens of d c[o] y[i]; the matrix' gradient is gain * P, the gain's the sum of W * P over i

Tiling: as product.py. P's sum over tokens is split between programs, SPLIT_TOKENS each, whose parts are added in order
into one float32 buffer per matrix, however many blocks share it.
Cost: three products of 2 C^2 flops per token.
"""

import triton
import triton.language as tl

from .activation import activate
from .elementwise import store_moments, store_sums
from .product import multiply, pre_activation, tile_of_product


@triton.jit
def product_forward_kernel(
    y, matrix, bias, gain, c, parts, M,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, BATCH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile, tokens, rows = tile_of_product(M, C, BLOCK_M, BLOCK_N, GROUP_M)
    total = multiply(y, matrix, gain, tokens, rows, M, C, False, False, BLOCK_M, BLOCK_N, BLOCK_K)
    kept = pre_activation(total, bias, gain, rows, C, HAS_BIAS, HAS_GAIN).to(c.dtype.element_ty)
    inside = (tokens < M)[:, None]
    tl.store(c + tokens[:, None] * C + rows[None, :], kept, mask=inside & (rows < C)[None, :])
    if BATCH:
        count = min(BLOCK_M, M - tile * BLOCK_M)
        store_moments(activate(kept.to(tl.float32), ACTIVATION), inside, count, parts, tile, rows, C)


@triton.jit
def input_gradient_kernel(
    gradient, matrix, gain, residual, out, pre, norm, parts, M,
    C: tl.constexpr, HAS_GAIN: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile, tokens, inputs = tile_of_product(M, C, BLOCK_M, BLOCK_N, GROUP_M)
    total = multiply(gradient, matrix, gain, tokens, inputs, M, C, True, HAS_GAIN, BLOCK_M, BLOCK_N, BLOCK_K)
    mask, place = (tokens < M)[:, None] & (inputs < C)[None, :], tokens[:, None] * C + inputs[None, :]
    if RESIDUAL:
        total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    kept = total.to(out.dtype.element_ty)
    tl.store(out + place, kept, mask=mask)
    g = tl.where(mask, kept.to(tl.float32), 0.0)
    store_sums(g, pre, norm, parts, tile, inputs, place, mask, C, ACTIVATION)


@triton.jit
def weight_gradient_kernel(
    gradient, y, parts, M, split_tokens,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts (splits, C, C): rows are output channels (BLOCK_M), columns input channels (BLOCK_N)."""
    columns = tl.cdiv(C, BLOCK_N)
    outputs = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    inputs = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    last = min((split + 1) * split_tokens, M)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(split * split_tokens, last, BLOCK_K):
        tokens = first + tl.arange(0, BLOCK_K)
        a = tl.load(
            gradient + tokens[None, :] * C + outputs[:, None],
            mask=(tokens < last)[None, :] & (outputs < C)[:, None], other=0.0,
        )  # fmt: skip
        b = tl.load(
            y + tokens[:, None] * C + inputs[None, :], mask=(tokens < last)[:, None] & (inputs < C)[None, :], other=0.0
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    mask = (outputs < C)[:, None] & (inputs < C)[None, :]
    tl.store(parts + (split * C + outputs[:, None]) * C + inputs[None, :], total, mask=mask)
