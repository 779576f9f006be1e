"""Forward with what backward needs, and backward, on tokens x channels: which kernel runs when.

Forward, per block: x = normalised act(c) of the block before (+ its y); depthwise -> a; y = normalised act(a) + x;
product -> c. Statistics of the batch are measured where a and c are made. Kept: a and c of every block (with save=1
only c), and with pw_residual every eighth x, because subtracting residuals again would lose what they swallowed.

Backward, from the last block: sums behind c; d c; d y (one product); P (one product), added to the matrix' one float32
gradient; sums behind a; d a; d taps; d x.

Kept is one flat tensor: (save * D + anchors) planes of tokens x channels in the type of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .configs import Device, ProductTiles, depthwise_tiles, elementwise_tiles, product_tiles
from .depthwise_training import depthwise_backward_kernel, depthwise_forward_kernel, taps_gradient_kernel
from .elementwise import (
    finish_gradient_kernel,
    finish_moments_kernel,
    gradient_kernel,
    gradient_sums_kernel,
    normalise_kernel,
)
from .mixer import Weights, as_tokens, from_tokens, nothing, on, pack
from .product_training import input_gradient_kernel, product_forward_kernel, weight_gradient_kernel

ANCHOR_INTERVAL = 8  # blocks between two kept inputs where residuals chain the blocks
SPLIT_TOKENS = 4096  # of the sum of a matrix' gradient, at least
MOST_SPLITS = 16


def saved_elements(x: Tensor, depth: int, pw_residual: bool, save: int) -> int:
    anchors = (depth - 1) // ANCHOR_INTERVAL if pw_residual and depth else 0
    return (save * depth + anchors) * x.numel() if save else 0


@dataclass
class Stage:
    """One of a block's two activations: what is under it, and its normalisation (4, C)."""

    pre: Tensor
    norm: Tensor


class Blocks:
    """The launches that both directions share, for tokens (M, C) of images of height x width."""

    def __init__(
        self, batch: int, height: int, width: int, w: Weights, like: Tensor,
        dw_index: Sequence[int], pw_index: Sequence[int], activation: str, pw_residual: bool, eps: float | None,
    ) -> None:  # fmt: skip
        self.batch, self.height, self.width, self.plane = batch, height, width, height * width
        self.w, self.like, self.dw_index, self.pw_index = w, like, dw_index, pw_index
        self.activation, self.pw_residual, self.eps = activation, pw_residual, eps
        self.depth, self.channels, self.tokens = len(pw_index), w.matrices.shape[-1], batch * height * width
        self.kernel = round(w.taps.shape[1] ** 0.5)
        item, device = like.element_size(), Device.of(like.device)
        self.spatial = depthwise_tiles(self.plane, self.channels)
        self.tiles: ProductTiles = product_tiles(self.tokens, self.channels, item, device)
        self.flat = elementwise_tiles(self.tokens, self.channels)
        self.images = triton.cdiv(batch, MOST_SPLITS)  # of a part of the taps' gradient
        self.split_tokens = max(SPLIT_TOKENS, triton.cdiv(self.tokens, MOST_SPLITS))

    def new(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.like.device)

    def new_plane(self) -> Tensor:
        return self.new(self.tokens, self.channels, dtype=self.like.dtype)

    def spatial_options(self) -> dict:
        return {
            "C": self.channels, "KERNEL": self.kernel, "BLOCK_T": self.spatial.block_t,
            "BLOCK_C": self.spatial.block_c, "num_warps": self.spatial.warps,
        }  # fmt: skip

    def spatial_grid(self) -> tuple[int, int]:
        per_image = triton.cdiv(self.plane, self.spatial.block_t)
        return self.batch * per_image, triton.cdiv(self.channels, self.spatial.block_c)

    def flat_options(self) -> dict:
        return {
            "C": self.channels,
            "BLOCK_T": self.flat.block_t,
            "BLOCK_C": self.flat.block_c,
            "num_warps": self.flat.warps,
        }

    def flat_grid(self) -> tuple[int, int]:
        return triton.cdiv(self.tokens, self.flat.block_t), triton.cdiv(self.channels, self.flat.block_c)

    def product_options(self) -> dict:
        t = self.tiles
        return {
            "C": self.channels, "BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "BLOCK_K": t.block_k,
            "num_warps": t.warps, "num_stages": t.stages,
        }  # fmt: skip

    def product_grid(self) -> tuple[int]:
        return (triton.cdiv(self.tokens, self.tiles.block_m) * triton.cdiv(self.channels, self.tiles.block_n),)

    def channel_launch(self) -> tuple[tuple[int], dict]:
        block_c = self.flat.block_c
        return (triton.cdiv(self.channels, block_c),), {"C": self.channels, "BLOCK_C": block_c, "num_warps": 1}

    def frozen(self, affine: Tensor) -> Tensor:
        scale, shift = affine
        return torch.stack((torch.zeros_like(scale), scale, shift, torch.ones_like(scale)))

    def norm_of(self, affine: Tensor, stats: Tensor) -> Tensor:
        """The normalisation again from statistics (2, C)."""
        inverse = (stats[1] + self.eps).rsqrt()
        return torch.stack((stats[0], affine[0] * inverse, affine[1], inverse))

    def finish(self, parts: Tensor, affine: Tensor, stats: Tensor, block: int, period: int) -> Tensor:
        norm, (grid, options) = self.new(4, self.channels), self.channel_launch()
        finish_moments_kernel[grid](
            parts, affine, stats, norm, len(parts), block, period, self.tokens, self.eps, **options
        )
        return norm

    def normalise(self, stage: Stage, residual: Tensor | None, out: Tensor) -> Tensor:
        normalise_kernel[self.flat_grid()](
            stage.pre, stage.norm, residual, out, self.tokens,
            RESIDUAL=residual is not None, ACTIVATION=self.activation, **self.flat_options(),
        )  # fmt: skip
        return out

    def depthwise(self, d: int, x: Tensor, a: Tensor, stats: Tensor | None) -> Tensor | None:
        """a from x; the normalisation behind it where the batch's statistics are wanted."""
        f = self.dw_index[d]
        bias, grid = None if self.w.dw_bias is None else self.w.dw_bias[f], self.spatial_grid()
        parts = None if stats is None else self.new(grid[0], 2, self.channels, dtype=torch.float64)
        depthwise_forward_kernel[grid](
            x, self.w.taps[f], bias, a, parts, self.height, self.width,
            HAS_BIAS=bias is not None, BATCH=stats is not None, ACTIVATION=self.activation, **self.spatial_options(),
        )  # fmt: skip
        return (
            None if stats is None else self.finish(parts, self.w.dw_affine[d], stats, self.spatial.block_t, self.plane)
        )

    def product(self, d: int, y: Tensor, c: Tensor, stats: Tensor | None) -> Tensor | None:
        s = self.pw_index[d]
        bias = None if self.w.pw_bias is None else self.w.pw_bias[s]
        gain = None if self.w.gain is None else self.w.gain[d]
        parts = None
        if stats is not None:
            parts = self.new(triton.cdiv(self.tokens, self.tiles.block_m), 2, self.channels, dtype=torch.float64)
        product_forward_kernel[self.product_grid()](
            y, self.w.matrices[s], bias, gain, c, parts, self.tokens,
            HAS_BIAS=bias is not None, HAS_GAIN=gain is not None, BATCH=stats is not None,
            ACTIVATION=self.activation, **self.product_options(),
        )  # fmt: skip
        return (
            None if stats is None else self.finish(parts, self.w.pw_affine[d], stats, self.tiles.block_m, self.tokens)
        )

    # ---- backward ----

    def through(self, stage: Stage, gradient: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient under an activation into `out`; the affine's gradient (2, C) and the bias' (C)."""
        grid, options = self.flat_grid(), self.flat_options()
        parts = self.new(grid[0], 2, self.channels)
        gradient_sums_kernel[grid](
            stage.pre, gradient, stage.norm, parts, self.tokens, ACTIVATION=self.activation, **options
        )
        affine, factors = self.new(2, self.channels), self.new(3, self.channels)
        channel_grid, channel_options = self.channel_launch()
        batch = self.eps is not None
        finish_gradient_kernel[channel_grid](
            parts, stage.norm, affine, factors, grid[0], self.tokens, BATCH=batch, **channel_options
        )
        bias_parts = self.new(grid[0], self.channels)
        gradient_kernel[grid](
            stage.pre, gradient, stage.norm, factors, out, bias_parts, self.tokens,
            BATCH=batch, ACTIVATION=self.activation, **options,
        )  # fmt: skip
        return affine, bias_parts.sum(0)

    def input_gradient(self, d: int, gradient: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
        gain = None if self.w.gain is None else self.w.gain[d]
        input_gradient_kernel[self.product_grid()](
            gradient, self.w.matrices[self.pw_index[d]], gain, residual, out, self.tokens,
            HAS_GAIN=gain is not None, RESIDUAL=residual is not None, **self.product_options(),
        )  # fmt: skip
        return out

    def weight_gradient(self, gradient: Tensor, y: Tensor) -> Tensor:
        t, c = self.tiles, self.channels
        splits = triton.cdiv(self.tokens, self.split_tokens)
        parts = self.new(splits, c, c)
        rows = min(t.block_m, triton.next_power_of_2(max(16, c)))
        weight_gradient_kernel[(triton.cdiv(c, rows) * triton.cdiv(c, t.block_n), splits)](
            gradient, y, parts, self.tokens, self.split_tokens, **(self.product_options() | {"BLOCK_M": rows})
        )
        return parts.sum(0)

    def depthwise_gradients(self, d: int, gradient: Tensor, x: Tensor, residual: Tensor, out: Tensor) -> Tensor:
        """d x into `out`, and the taps' gradient (k * k, C)."""
        options = self.spatial_options()
        flipped = self.w.taps[self.dw_index[d]].flip(0)
        depthwise_backward_kernel[self.spatial_grid()](
            gradient, flipped, residual, out, self.height, self.width, **options
        )
        programs = triton.cdiv(self.batch, self.images)
        parts = self.new(programs, self.kernel**2, self.channels)
        taps_gradient_kernel[(programs, self.spatial_grid()[1])](
            gradient, x, parts, self.batch, self.images, self.height, self.width, **options
        )
        return parts.sum(0)


def forward(*args: Any, eps: float | None, save: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dw_stats, pw_stats (empty without eps) and what was kept; the arguments of ``spin::_mixer`` before eps."""
    x, *parameters, pw_index, dw_index, activation, pw_residual = args
    depth = len(pw_index)
    dw_index = range(depth) if dw_index is None else dw_index
    with on(x.device):
        if depth == 0 or x.numel() == 0:
            empty = x.new_empty(0, dtype=torch.float32)
            stats = empty if eps is None else empty.new_empty(depth, 2, x.shape[1])
            return nothing(x), stats, stats.clone(), x.new_empty(0)
        tokens = as_tokens(x)
        blocks = Blocks(*tokens.shape[:3], pack(*parameters), tokens, dw_index, pw_index, activation, pw_residual, eps)
        stats = None if eps is None else [blocks.new(depth, 2, blocks.channels) for _ in range(2)]
        kept = blocks.new(saved_elements(x, depth, pw_residual, save), dtype=x.dtype)
        planes = iter(kept.view(-1, blocks.tokens, blocks.channels) if kept.numel() else ())
        anchors = {}
        a = c = None
        z = tokens.view(blocks.tokens, blocks.channels)
        for d in range(depth):
            a = next(planes) if save == 2 else blocks.new_plane() if a is None else a
            c = next(planes) if save >= 1 else blocks.new_plane() if c is None else c
            if pw_residual and d and d % ANCHOR_INTERVAL == 0:
                anchors[d] = z
            w = blocks.w
            norm = blocks.depthwise(d, z, a, None if stats is None else stats[0][d])
            norm = blocks.frozen(w.dw_affine[d]) if norm is None else norm
            y = blocks.normalise(Stage(a, norm), z, blocks.new_plane())
            norm = blocks.product(d, y, c, None if stats is None else stats[1][d])
            norm = blocks.frozen(w.pw_affine[d]) if norm is None else norm
            z = blocks.normalise(Stage(c, norm), y if pw_residual else None, blocks.new_plane())
        if save:
            for plane, anchor in zip(planes, anchors.values(), strict=True):
                plane.copy_(anchor)
        dw_stats, pw_stats = (blocks.new(0), blocks.new(0)) if stats is None else stats
        return from_tokens(z.view(tokens.shape), x), dw_stats, pw_stats, kept


def backward(
    grad: Tensor, dw_stats: Tensor, pw_stats: Tensor, kept: Tensor, *args: Any, eps: float | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the nine tensors, None for absent ones."""
    x, *parameters, pw_index, dw_index, activation, pw_residual = args
    dw_weight, dw_bias, _, pw_weight, pw_bias, _, pw_coefficients, pw_gain = parameters
    depth = len(pw_index)
    dw_index = range(depth) if dw_index is None else dw_index
    with on(x.device):
        if depth == 0 or x.numel() == 0:
            return nothing(grad), *(None if t is None else torch.zeros_like(t) for t in parameters)
        tokens = as_tokens(x)
        b = Blocks(*tokens.shape[:3], pack(*parameters), tokens, dw_index, pw_index, activation, pw_residual, eps)
        w, flat = b.w, tokens.view(b.tokens, b.channels)
        save = 1 if kept.numel() == saved_elements(x, depth, pw_residual, 1) else 2
        planes = kept.view(-1, b.tokens, b.channels)
        matrices = torch.zeros(w.matrices.shape, dtype=torch.float32, device=x.device)
        taps = torch.zeros(w.taps.shape, dtype=torch.float32, device=x.device)
        dw_biases = torch.zeros(len(w.taps), b.channels, device=x.device)
        pw_biases = torch.zeros(len(matrices), b.channels, device=x.device)
        dw_affines, pw_affines = b.new(depth, 2, b.channels), b.new(depth, 2, b.channels)
        gains = b.new(depth, b.channels) if pw_gain is not None else None

        def stage(d: int, half: int) -> Stage:
            affine, stats = ((w.dw_affine, dw_stats), (w.pw_affine, pw_stats))[half]
            norm = b.frozen(affine[d]) if eps is None else b.norm_of(affine[d], stats[d])
            if save == 1 and half == 0:
                return Stage(recomputed[d], norm)
            return Stage(planes[save * d + (half if save == 2 else 0)], norm)

        inputs: dict[int, Tensor] = {}
        recomputed: dict[int, Tensor] = {}

        def restore(d: int) -> None:
            """x of block d, with residuals of all blocks back to the last that is there; a where it was not kept."""
            interval = ANCHOR_INTERVAL if pw_residual else 1
            first = d // interval * interval
            inputs.clear()
            recomputed.clear()
            if first == 0:
                inputs[0] = flat
            elif pw_residual:
                inputs[first] = planes[save * depth + first // ANCHOR_INTERVAL - 1]
            else:
                inputs[first] = b.normalise(stage(first - 1, 1), None, b.new_plane())
            for block in range(first, d + 1):
                if save == 1:
                    recomputed[block] = b.new_plane()
                    b.depthwise(block, inputs[block], recomputed[block], None)
                if block < d:
                    y = b.normalise(stage(block, 0), inputs[block], b.new_plane())
                    inputs[block + 1] = b.normalise(stage(block, 1), y, b.new_plane())

        g = as_tokens(grad).view(b.tokens, b.channels)
        for d in reversed(range(depth)):
            if d not in inputs:
                restore(d)
            s, f = pw_index[d], dw_index[d]
            dc, dy = b.new_plane(), b.new_plane()
            pw_affines[d], bias = b.through(stage(d, 1), g, dc)
            pw_biases[s] += bias
            y = b.normalise(stage(d, 0), inputs[d], b.new_plane())
            outer = b.weight_gradient(dc, y)
            if gains is None:
                matrices[s] += outer
            else:
                matrices[s] += pw_gain[d][:, None] * outer
                gains[d] = (w.matrices[s] * outer).sum(1)
            b.input_gradient(d, dc, g if pw_residual else None, dy)
            dw_affines[d], bias = b.through(stage(d, 0), dy, dc)
            dw_biases[f] += bias
            g = b.new_plane()
            taps[f] += b.depthwise_gradients(d, dc, inputs[d], dy, g)
            del inputs[d]

        if pw_coefficients is None:
            coefficients, weights = None, matrices
        else:
            flat_matrices, templates = matrices.flatten(1), pw_weight.flatten(1).float()
            coefficients = flat_matrices @ templates.t()
            weights = (pw_coefficients.t() @ flat_matrices).view(pw_weight.shape)
        return (
            from_tokens(g.view(tokens.shape), x),
            taps.transpose(1, 2).contiguous().view(dw_weight.shape).to(dw_weight.dtype),
            None if dw_bias is None else dw_biases.to(dw_bias.dtype),
            dw_affines,
            weights.to(pw_weight.dtype),
            None if pw_bias is None else pw_biases.to(pw_bias.dtype),
            pw_affines,
            coefficients,
            gains,
        )
