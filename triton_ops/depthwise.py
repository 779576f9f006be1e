"""Depthwise half of a block on tokens x channels: y = x + scale * act(conv(x, taps) + bias) + shift.

Tiling: a program computes BLOCK_T tokens of one image x BLOCK_C channels. Channels are contiguous, so every load is a
row of BLOCK_C values; the k^2 shifted tiles of a program overlap and come from L1 after the first row of taps. Taps are
[filter][k * k][channel], transposed once per call. Padding is masked: zero after the affine of the block before, as the
mathematics wants it.
Cost: k^2 fma per value (float32, on the CUDA cores) and 2 * itemsize bytes through L2; at k = 3 bound by bytes, from
k = 7 on by the fma rate. Loads from L1 are k^2 * itemsize per value.
Numerics: float32 sums in order of the taps, the same whatever the tile.
"""

import triton
import triton.language as tl

from .activation import activate


@triton.jit
def tile_of_image(plane, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: image, tile within it, the tile's tokens (may run past the plane) and channels (past C)."""
    tiles = tl.cdiv(plane, BLOCK_T)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    return image, tile, tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def places_of(image, tokens, channels, plane, C: tl.constexpr):
    """Where a tile lies in (batch, plane, C), and which of its places exist."""
    place = (image.to(tl.int64) * plane + tokens)[:, None] * C + channels[None, :]
    return place, (tokens < plane)[:, None] & (channels < C)[None, :]


@triton.jit
def convolve(
    x, taps, image, tokens, channels, height, width,
    C: tl.constexpr, KERNEL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over the taps for `tokens` (may run past the plane) and `channels` (may run past C) of an image."""
    PAD: tl.constexpr = KERNEL // 2
    row, column = tokens // width, tokens % width
    first = x + image.to(tl.int64) * height * width * C
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for i in range(KERNEL):
        for j in range(KERNEL):
            y_in, x_in = row + i - PAD, column + j - PAD
            inside = (y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width) & (tokens < height * width)
            mask = inside[:, None] & (channels < C)[None, :]
            value = tl.load(first + (y_in * width + x_in)[:, None] * C + channels[None, :], mask=mask, other=0.0)
            tap = tl.load(taps + (i * KERNEL + j) * C + channels, mask=channels < C, other=0.0)
            total += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    return total


@triton.jit
def depthwise_end(
    total, x, bias, affine, y, image, tokens, channels, plane,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Bias, activation, affine and the residual x, stored."""
    in_c = channels < C
    if HAS_BIAS:
        total += tl.load(bias + channels, mask=in_c, other=0.0).to(tl.float32)[None, :]
    scale, shift = (
        tl.load(affine + channels, mask=in_c, other=0.0),
        tl.load(affine + C + channels, mask=in_c, other=0.0),
    )
    place, mask = places_of(image, tokens, channels, plane, C)
    value = activate(total, ACTIVATION) * scale[None, :] + shift[None, :]
    value += tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_kernel(
    x, taps, bias, affine, y, height, width,
    C: tl.constexpr, KERNEL: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    plane = height * width
    image, _, tokens, channels = tile_of_image(plane, BLOCK_T, BLOCK_C)
    total = convolve(x, taps, image, tokens, channels, height, width, C, KERNEL, BLOCK_T, BLOCK_C)
    depthwise_end(total, x, bias, affine, y, image, tokens, channels, plane, C, HAS_BIAS, ACTIVATION)
