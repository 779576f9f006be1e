"""Second half of block d and first half of block d + 1 in one kernel, where a tile holds whole image planes.

    x = pw_scale * act(gain * (y W^T) + pw_bias) + pw_shift (+ y)        of block d
    y' = x + dw_scale * act(conv(x, taps) + dw_bias) + dw_shift          of block d + 1

Tiling: a program computes all tokens of one image for BLOCK_N channels, so the depthwise needs nothing from another
program: no halo, no exchange. x goes to memory (it stays in L1 and L2) because Triton cannot shift a tile in registers;
a barrier of the program stands between writing and reading it, BLOCK_T tokens at a time.
Cost: product.py's and depthwise.py's arithmetic; of the activations only y is read and x, y' written once each, and
half the launches. The planes must fit a tile: H * W <= 256.
"""

import triton
import triton.language as tl

from .depthwise import convolve, depthwise_end
from .product import multiply, product_end


@triton.jit
def fused_kernel(
    y, matrix, pw_bias, gain, pw_affine, x, taps, dw_bias, dw_affine, y_next, height, width, M,
    C: tl.constexpr, KERNEL: tl.constexpr, HAS_PW_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, RESIDUAL: tl.constexpr,
    HAS_DW_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(C, BLOCK_N)
    image, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    plane = height * width
    in_plane = tl.arange(0, BLOCK_M)
    channels = column * BLOCK_N + tl.arange(0, BLOCK_N)
    # Tokens past the plane belong to the next image: pushed past the end, so that every mask leaves them out.
    tokens = tl.where(in_plane < plane, image.to(tl.int64) * plane + in_plane, M)
    total = multiply(y, matrix, gain, tokens, channels, M, C, False, False, BLOCK_M, BLOCK_N, BLOCK_K)
    value = product_end(
        total, y, pw_bias, gain, pw_affine, tokens, channels, M, C, HAS_PW_BIAS, HAS_GAIN, RESIDUAL, ACTIVATION
    )
    mask = (tokens < M)[:, None] & (channels < C)[None, :]
    tl.store(x + tokens[:, None] * C + channels[None, :], value.to(x.dtype.element_ty), mask=mask)
    tl.debug_barrier()
    BLOCK_T: tl.constexpr = min(BLOCK_M, 64)  # sums of the product's whole tile would not fit the registers again
    for first in range(0, BLOCK_M, BLOCK_T):
        part = first + tl.arange(0, BLOCK_T)
        sums = convolve(x, taps, image, part, channels, height, width, C, KERNEL, BLOCK_T, BLOCK_N)
        depthwise_end(sums, x, dw_bias, dw_affine, y_next, image, part, channels, plane, C, HAS_DW_BIAS, ACTIVATION)
