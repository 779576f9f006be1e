"""The depthwise half of a block in training: its pre-activation with statistics, and both of its gradients.

    a = conv(x, taps) + bias, kept; mean and deviations of act(a), a part per tile
    d x = conv(d a, flipped taps) + residual, and its sums behind the activation before it
    d taps[i, j] = sum over tokens of d a[row, column] x[row + i - pad, column + j - pad]

Tiling: as depthwise.py. The taps' gradient takes BLOCK_C channels of a few images per program, tap after tap: a plane
of both tensors (64 KB at 256 tokens in bf16) is read k^2 times from L1, and sums stay in registers.
Cost: k^2 fma per value for each of the three.
"""

import triton
import triton.language as tl

from .activation import activate
from .depthwise import convolve, places_of, tile_of_image
from .elementwise import store_moments, store_sums


@triton.jit
def depthwise_forward_kernel(
    x, taps, bias, a, parts, height, width,
    C: tl.constexpr, KERNEL: tl.constexpr, HAS_BIAS: tl.constexpr, BATCH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    plane = height * width
    image, tile, tokens, channels = tile_of_image(plane, BLOCK_T, BLOCK_C)
    total = convolve(x, taps, image, tokens, channels, height, width, C, KERNEL, BLOCK_T, BLOCK_C)
    if HAS_BIAS:
        total += tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    kept = total.to(a.dtype.element_ty)
    place, mask = places_of(image, tokens, channels, plane, C)
    tl.store(a + place, kept, mask=mask)
    if BATCH:
        count = min(BLOCK_T, plane - tile * BLOCK_T)
        value = activate(kept.to(tl.float32), ACTIVATION)
        store_moments(value, (tokens < plane)[:, None], count, parts, tl.program_id(0), channels, C)


@triton.jit
def depthwise_backward_kernel(
    gradient, taps, residual, out, pre, norm, parts, height, width,
    C: tl.constexpr, KERNEL: tl.constexpr, SUMS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    plane = height * width
    image, _, tokens, channels = tile_of_image(plane, BLOCK_T, BLOCK_C)
    total = convolve(gradient, taps, image, tokens, channels, height, width, C, KERNEL, BLOCK_T, BLOCK_C)
    place, mask = places_of(image, tokens, channels, plane, C)
    total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    kept = total.to(out.dtype.element_ty)
    tl.store(out + place, kept, mask=mask)
    if SUMS:
        g = tl.where(mask, kept.to(tl.float32), 0.0)
        store_sums(g, pre, norm, parts, tl.program_id(0), channels, place, mask, C, ACTIVATION)


@triton.jit
def taps_gradient_kernel(
    gradient, x, parts, batch, images, height, width,
    C: tl.constexpr, KERNEL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """parts (programs along the batch, k * k, C): each of `images` images."""
    PAD: tl.constexpr = KERNEL // 2
    part = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c, plane = channels < C, height * width
    last = min(batch, (part + 1) * images)
    for tap in range(KERNEL * KERNEL):
        down, right = tap // KERNEL - PAD, tap % KERNEL - PAD
        total = tl.zeros((BLOCK_C,), dtype=tl.float32)
        for image in range(part * images, last):
            first = (tl.full((), 0, tl.int64) + image) * plane * C
            for begin in range(0, plane, BLOCK_T):
                tokens = begin + tl.arange(0, BLOCK_T)
                row, column = tokens // width + down, tokens % width + right
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (tokens < plane)
                mask = inside[:, None] & in_c[None, :]
                g = tl.load(gradient + first + tokens[:, None] * C + channels[None, :], mask=mask, other=0.0)
                value = tl.load(
                    x + first + (row * width + column)[:, None] * C + channels[None, :], mask=mask, other=0.0
                )
                total += tl.sum(g.to(tl.float32) * value.to(tl.float32), axis=0)
        tl.store(parts + (part * KERNEL * KERNEL + tap) * C + channels, total, mask=in_c)
