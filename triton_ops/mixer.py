"""The mixer with frozen statistics on tokens x channels: which kernel runs when.

    depthwise 0, then for every block d: pointwise d and depthwise d + 1, one kernel where planes fit a tile, else two;
    last the pointwise of the last block. Chunks of images whose activations stay in L2 pass through all blocks in turn.

channels_last tensors have this layout already; others are copied once at either end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import compose
from .configs import Device, depthwise_tiles, fused_tiles, images_per_chunk, product_tiles
from .depthwise import depthwise_kernel
from .device import on
from .fused import fused_kernel
from .product import product_kernel


def mixer(*args: Any) -> Tensor:
    """y (B, C, H, W) of the checked arguments of ``spin::_mixer`` before eps, as spin_kernels.reference has it."""
    x, *parameters, pw_index, dw_index, activation, pw_residual = args
    if len(pw_index) == 0 or x.numel() == 0:
        return nothing(x)
    filters = range(len(pw_index)) if dw_index is None else dw_index
    with on(x.device):
        return from_tokens(run(as_tokens(x), pack(*parameters), filters, pw_index, activation, pw_residual), x)


@dataclass(frozen=True)
class Weights:
    """Contiguous: taps (F, k * k, C), biases (F, C) and (S, C), affines (D, 2, C), matrices (S, C, C), gain (D, C)."""

    taps: Tensor
    dw_bias: Tensor | None
    dw_affine: Tensor
    matrices: Tensor
    pw_bias: Tensor | None
    pw_affine: Tensor
    gain: Tensor | None


def pack(
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_affine: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    pw_affine: Tensor,
    pw_coefficients: Tensor | None,
    pw_gain: Tensor | None,
) -> Weights:
    return Weights(
        taps=dw_weight.flatten(2).transpose(1, 2).contiguous(),
        dw_bias=_contiguous(dw_bias),
        dw_affine=dw_affine.contiguous(),
        matrices=matrices_of(pw_weight, pw_coefficients),
        pw_bias=_contiguous(pw_bias),
        pw_affine=pw_affine.contiguous(),
        gain=_contiguous(pw_gain),
    )


def run(
    x: Tensor, w: Weights, dw_index: Sequence[int], pw_index: Sequence[int], activation: str, pw_residual: bool
) -> Tensor:
    """All blocks on x (B, H, W, C), which is left alone."""
    batch, height, width, channels = x.shape
    plane, item, depth, device = height * width, x.element_size(), len(pw_index), Device.of(x.device)
    kernel = round(w.taps.shape[1] ** 0.5)
    result = torch.empty_like(x)
    size = images_per_chunk(batch, plane, channels, item, device)
    buffers = [torch.empty_like(x[:size]) for _ in range(2)]  # y, and y of the next block
    fused = fused_tiles(size, plane, channels, item, device)
    spatial = depthwise_tiles(plane)

    def depthwise(d: int, chunk: Tensor, y: Tensor) -> None:
        bias = None if w.dw_bias is None else w.dw_bias[dw_index[d]]
        grid = (len(chunk) * triton.cdiv(plane, spatial.block_t), triton.cdiv(channels, spatial.block_c))
        depthwise_kernel[grid](
            chunk, w.taps[dw_index[d]], bias, w.dw_affine[d], y, height, width,
            C=channels, KERNEL=kernel, HAS_BIAS=bias is not None, ACTIVATION=activation,
            BLOCK_T=spatial.block_t, BLOCK_C=spatial.block_c, num_warps=spatial.warps,
        )  # fmt: skip

    def pointwise(d: int, y: Tensor, out: Tensor, y_next: Tensor | None = None) -> None:
        """Block d's output and, with y_next, the depthwise half of block d + 1."""
        tokens = len(y) * plane
        bias = None if w.pw_bias is None else w.pw_bias[pw_index[d]]
        gain = None if w.gain is None else w.gain[d]
        epilogue = {"HAS_GAIN": gain is not None, "RESIDUAL": pw_residual, "ACTIVATION": activation, "C": channels}
        if y_next is not None and fused is not None:
            next_bias = None if w.dw_bias is None else w.dw_bias[dw_index[d + 1]]
            fused_kernel[(len(y) * triton.cdiv(channels, fused.block_n),)](
                y, w.matrices[pw_index[d]], bias, gain, w.pw_affine[d], out,
                w.taps[dw_index[d + 1]], next_bias, w.dw_affine[d + 1], y_next, height, width, tokens,
                KERNEL=kernel, HAS_PW_BIAS=bias is not None, HAS_DW_BIAS=next_bias is not None, **epilogue,
                BLOCK_M=fused.block_m, BLOCK_N=fused.block_n, BLOCK_K=fused.block_k,
                num_warps=fused.warps, num_stages=fused.stages,
            )  # fmt: skip
            return
        tiles = product_tiles(tokens, channels, item, device)
        product_kernel[(triton.cdiv(tokens, tiles.block_m) * triton.cdiv(channels, tiles.block_n),)](
            y, w.matrices[pw_index[d]], bias, gain, w.pw_affine[d], out, tokens,
            HAS_BIAS=bias is not None, **epilogue,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if y_next is not None:
            depthwise(d + 1, out, y_next)

    for first in range(0, batch, size):
        chunk, out = x[first : first + size], result[first : first + size]
        y, y_next = (buffer[: len(chunk)] for buffer in buffers)
        depthwise(0, chunk, y)
        for d in range(depth - 1):
            pointwise(d, y, out, y_next)
            y, y_next = y_next, y
        pointwise(depth - 1, y, out)
    return result


def matrices_of(pw_weight: Tensor, pw_coefficients: Tensor | None) -> Tensor:
    """(S, C, C) matrices, summed from (T, C, C) templates where there are coefficients (S, T)."""
    if pw_coefficients is None:
        return pw_weight.contiguous()
    (matrices, templates), channels = pw_coefficients.shape, pw_weight.shape[-1]
    corner = (0, 0, channels, channels, channels)
    pieces = [n for s in range(matrices) for n in (s, 0, channels**2, templates, s * templates, *corner)]
    flat = compose.forward(
        pw_weight.flatten(), pw_coefficients.flatten(), pieces, [channels, channels, 1, 1] * matrices
    )
    return flat.view(matrices, channels, channels)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def as_tokens(x: Tensor) -> Tensor:
    """(B, H, W, C), x itself where it is channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def from_tokens(y: Tensor, x: Tensor) -> Tensor:
    """(B, C, H, W) in the layout of x."""
    y = y.permute(0, 3, 1, 2)
    return y if _is_channels_last(x) else y.contiguous()


def nothing(x: Tensor) -> Tensor:
    """The result of no blocks, or of no values."""
    return x.clone(memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
