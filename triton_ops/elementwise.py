"""What training does between the convolutions, on tiles of BLOCK_T tokens x BLOCK_C channels.

    normalise   out = scale (act(pre) - center) + shift (+ residual (+ the first two of another pre-activation))
    sums        sum g and sum g (act(pre) - center), a part per tile of tokens; mostly in the kernel that makes g
    gradient    act'(pre) (p g + q (act(pre) - center) + r), and its sum per tile: the bias' gradient

A normalisation is four rows of channels: center, scale, shift, 1 / deviation (frozen statistics: 0, gamma, beta, 1).
With u = act(pre), BatchNorm's (m, v) over N values and s = gamma / sqrt(v + eps) the gradient of s (u - m) + beta is
    s g - (s / N) sum g - (u - m) (s / (v + eps) / N) sum g (u - m):
p = s, q and r are the other two factors; with frozen statistics there are none.

Cost: bytes; every kernel passes once over what it reads and writes.
Numerics: float32 in a tile; the parts of tiles are added in float64 and in one order, so the bits do not depend on what
runs when. A tile's moments are two passes over registers, of which the second corrects the first one's mean; tiles are
combined from their means and deviations, not from sums of squares: normalising magnifies the last bit of a mean.
"""

import triton
import triton.language as tl

from .activation import activate, differentiate


@triton.jit
def tile_of(M, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: the tile's number along tokens, its channels and which exist, its places and which exist."""
    tile = tl.program_id(0)
    tokens = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < C
    return tile, channels, in_c, tokens[:, None] * C + channels[None, :], (tokens < M)[:, None] & in_c[None, :]


@triton.jit
def store_moments(value, inside, count, parts, tile, channels, C: tl.constexpr):
    """Mean and squared deviations of a tile's columns, `inside` (BLOCK_T, 1) counts, into parts (tiles, 2, C)."""
    in_c = channels < C
    mean = tl.sum(tl.where(inside, value, 0.0), axis=0) / count
    off = tl.where(inside, value - mean[None, :], 0.0)
    rest = tl.sum(off, axis=0).to(tl.float64) / count
    deviations = tl.sum(off * off, axis=0).to(tl.float64) - rest * rest * count
    tl.store(parts + (2 * tile) * C + channels, mean.to(tl.float64) + rest, mask=in_c)
    tl.store(parts + (2 * tile + 1) * C + channels, deviations, mask=in_c)


@triton.jit
def finish_moments_kernel(
    parts, affine, stats, norm, tiles, block, period, total, eps, C: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Statistics (2, C) and normalisation (4, C) from the moments of tiles: `block` tokens of every `period`."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < C
    per_period = tl.cdiv(period, block)
    mean = tl.zeros((BLOCK_C,), dtype=tl.float64)
    for tile in range(tiles):
        count = min(block, period - tile % per_period * block)
        mean += tl.load(parts + (2 * tile) * C + channels, mask=in_c, other=0.0) * count
    mean /= total
    deviations = tl.zeros((BLOCK_C,), dtype=tl.float64)
    for tile in range(tiles):
        count = min(block, period - tile % per_period * block)
        off = tl.load(parts + (2 * tile) * C + channels, mask=in_c, other=0.0) - mean
        deviations += tl.load(parts + (2 * tile + 1) * C + channels, mask=in_c, other=0.0) + count * off * off
    variance = (deviations / total).to(tl.float32)
    inverse = 1.0 / tl.sqrt(variance + eps)
    mean = mean.to(tl.float32)
    tl.store(stats + channels, mean, mask=in_c)
    tl.store(stats + C + channels, variance, mask=in_c)
    tl.store(norm + channels, mean, mask=in_c)
    tl.store(norm + C + channels, tl.load(affine + channels, mask=in_c, other=0.0) * inverse, mask=in_c)
    tl.store(norm + 2 * C + channels, tl.load(affine + C + channels, mask=in_c, other=0.0), mask=in_c)
    tl.store(norm + 3 * C + channels, inverse, mask=in_c)


@triton.jit
def normalised(pre, norm, channels, in_c, place, mask, C: tl.constexpr, ACTIVATION: tl.constexpr):
    center, scale = tl.load(norm + channels, mask=in_c, other=0.0), tl.load(norm + C + channels, mask=in_c, other=0.0)
    shift = tl.load(norm + 2 * C + channels, mask=in_c, other=0.0)
    value = activate(tl.load(pre + place, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    return (value - center[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def normalise_kernel(
    pre, norm, pre_2, norm_2, residual, out, M,
    C: tl.constexpr, TWO: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, channels, in_c, place, mask = tile_of(M, C, BLOCK_T, BLOCK_C)
    value = normalised(pre, norm, channels, in_c, place, mask, C, ACTIVATION)
    if RESIDUAL:
        rest = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        if TWO:  # rounded as where it is a tensor of its own
            rest += normalised(pre_2, norm_2, channels, in_c, place, mask, C, ACTIVATION)
            rest = rest.to(out.dtype.element_ty).to(tl.float32)
        value += rest
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def store_sums(g, pre, norm, parts, tile, channels, place, mask, C: tl.constexpr, ACTIVATION: tl.constexpr):
    """The sums of a tile of g, zero outside the mask, into parts (tiles, 2, C)."""
    in_c = channels < C
    u = activate(tl.load(pre + place, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    off = tl.where(mask, u - tl.load(norm + channels, mask=in_c, other=0.0)[None, :], 0.0)
    tl.store(parts + (2 * tile) * C + channels, tl.sum(g, axis=0), mask=in_c)
    tl.store(parts + (2 * tile + 1) * C + channels, tl.sum(g * off, axis=0), mask=in_c)


@triton.jit
def gradient_sums_kernel(
    pre, gradient, norm, parts, M,
    C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, channels, _, place, mask = tile_of(M, C, BLOCK_T, BLOCK_C)
    g = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
    store_sums(g, pre, norm, parts, tile, channels, place, mask, C, ACTIVATION)


@triton.jit
def finish_gradient_kernel(
    parts, norm, affine_gradient, factors, tiles, total, C: tl.constexpr, BATCH: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The affine's gradient (2, C) and the factors p, q, r (3, C) from the sums of tiles."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = channels < C
    sums, moments = tl.zeros((BLOCK_C,), dtype=tl.float64), tl.zeros((BLOCK_C,), dtype=tl.float64)
    for tile in range(tiles):
        sums += tl.load(parts + (2 * tile) * C + channels, mask=in_c, other=0.0)
        moments += tl.load(parts + (2 * tile + 1) * C + channels, mask=in_c, other=0.0)
    scale = tl.load(norm + C + channels, mask=in_c, other=0.0)
    inverse = tl.load(norm + 3 * C + channels, mask=in_c, other=0.0)
    moments *= inverse
    tl.store(affine_gradient + channels, moments.to(tl.float32), mask=in_c)
    tl.store(affine_gradient + C + channels, sums.to(tl.float32), mask=in_c)
    tl.store(factors + channels, scale, mask=in_c)
    if BATCH:
        tl.store(factors + C + channels, (-scale * inverse * moments / total).to(tl.float32), mask=in_c)
        tl.store(factors + 2 * C + channels, (-scale * sums / total).to(tl.float32), mask=in_c)


@triton.jit
def gradient_kernel(
    pre, gradient, norm, factors, out, parts, M,
    C: tl.constexpr, BATCH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, channels, in_c, place, mask = tile_of(M, C, BLOCK_T, BLOCK_C)
    x = tl.load(pre + place, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32)
    value *= tl.load(factors + channels, mask=in_c, other=0.0)[None, :]
    if BATCH:
        off = activate(x, ACTIVATION) - tl.load(norm + channels, mask=in_c, other=0.0)[None, :]
        value += off * tl.load(factors + C + channels, mask=in_c, other=0.0)[None, :]
        value += tl.load(factors + 2 * C + channels, mask=in_c, other=0.0)[None, :]
    value = tl.where(mask, differentiate(x, value, ACTIVATION), 0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)
    tl.store(parts + tile * C + channels, tl.sum(value, axis=0), mask=in_c)
