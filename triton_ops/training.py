"""Forward with what backward needs, and backward, on tokens x channels: which kernel runs when.

Forward, per block: x = normalised act(c) of the block before (+ its y); depthwise -> a; y = normalised act(a) + x;
product -> c. Statistics of the batch are measured where a and c are made. Kept: a and c of every block (with save=1
only c), and with pw_residual every eighth x, because subtracting residuals again would lose what they swallowed.

Backward, from the last block: d c; P (one product), added to the matrix' one float32 gradient; d y (one product) with
its sums behind a; d a; d x with its sums behind the c before; d taps.

y and x are written between kernels, not computed in the next one's prologue: a product reads its input once per tile of
channels (six times at 768), so a prologue would read two tensors instead of one as often, and L2 bounds it already.

Kept is one flat tensor: (save * D + anchors) planes of tokens x channels in the type of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .configs import VECTOR_TILES, Device, ProductTiles, depthwise_tiles, product_tiles
from .depthwise_training import depthwise_backward_kernel, depthwise_forward_kernel, taps_gradient_kernel
from .device import on
from .elementwise import (
    finish_gradient_kernel,
    finish_moments_kernel,
    gradient_kernel,
    gradient_sums_kernel,
    normalise_kernel,
)
from .mixer import Weights, as_tokens, from_tokens, nothing, pack
from .product_training import input_gradient_kernel, product_forward_kernel, weight_gradient_kernel

ANCHOR_INTERVAL = 8  # blocks between two kept inputs where residuals chain the blocks
SPLIT_TOKENS = 4096  # of the sum of a matrix' gradient, at least
MOST_SPLITS = 16


def saved_elements(x: Tensor, depth: int, pw_residual: bool, save: int) -> int:
    anchors = (depth - 1) // ANCHOR_INTERVAL if pw_residual and depth else 0
    return (save * depth + anchors) * x.numel() if save else 0


def anchor_plane(d: int, depth: int, pw_residual: bool, save: int) -> int | None:
    """Which plane keeps the input of block d, if any does."""
    keeps = save and pw_residual and 0 < d < depth and d % ANCHOR_INTERVAL == 0
    return save * depth + d // ANCHOR_INTERVAL - 1 if keeps else None


@dataclass
class Stage:
    """One of a block's two activations: what is under it, and its normalisation (4, C)."""

    pre: Tensor
    norm: Tensor


class Measured(NamedTuple):
    """Where statistics (2, C) of one half of a block and the normalisation (4, C) they give are written."""

    stats: Tensor
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
        self.spatial = depthwise_tiles(self.plane)
        self.tiles: ProductTiles = product_tiles(self.tokens, self.channels, item, device)
        self.flat = VECTOR_TILES
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

    def normalisations(self, affine: Tensor, stats: Tensor | None) -> Tensor:
        """(D, 4, C) from affines (D, 2, C) and statistics (D, 2, C), None where they are frozen."""
        scale, shift = affine.unbind(1)
        if stats is None:
            return torch.stack((torch.zeros_like(scale), scale, shift, torch.ones_like(scale)), 1)
        assert self.eps is not None  # there are statistics of a batch
        inverse = (stats[:, 1] + self.eps).rsqrt()
        return torch.stack((stats[:, 0], scale * inverse, shift, inverse), 1)

    def finish(self, parts: Tensor, affine: Tensor, measured: Measured, block: int, period: int) -> None:
        grid, options = self.channel_launch()
        finish_moments_kernel[grid](
            parts, affine, measured.stats, measured.norm, len(parts), block, period, self.tokens, self.eps, **options
        )

    def normalise(self, stage: Stage, residual: Tensor | None, out: Tensor, second: Stage | None = None) -> Tensor:
        pre_2, norm_2 = (None, None) if second is None else (second.pre, second.norm)
        normalise_kernel[self.flat_grid()](
            stage.pre, stage.norm, pre_2, norm_2, residual, out, self.tokens,
            TWO=second is not None, RESIDUAL=residual is not None, ACTIVATION=self.activation, **self.flat_options(),
        )  # fmt: skip
        return out

    def depthwise(self, d: int, x: Tensor, a: Tensor, measured: Measured | None) -> None:
        """a from x, and what is measured behind it."""
        f = self.dw_index[d]
        bias, grid = None if self.w.dw_bias is None else self.w.dw_bias[f], self.spatial_grid()
        parts: Any = None if measured is None else self.new(grid[0], 2, self.channels, dtype=torch.float64)
        depthwise_forward_kernel[grid](
            x, self.w.taps[f], bias, a, parts, self.height, self.width,
            HAS_BIAS=bias is not None, BATCH=measured is not None, ACTIVATION=self.activation, **self.spatial_options(),
        )  # fmt: skip
        if measured is not None:
            self.finish(parts, self.w.dw_affine[d], measured, self.spatial.block_t, self.plane)

    def product(self, d: int, y: Tensor, c: Tensor, measured: Measured | None) -> None:
        """c from y, and what is measured behind it."""
        s = self.pw_index[d]
        bias = None if self.w.pw_bias is None else self.w.pw_bias[s]
        gain = None if self.w.gain is None else self.w.gain[d]
        parts: Any = None
        if measured is not None:
            parts = self.new(triton.cdiv(self.tokens, self.tiles.block_m), 2, self.channels, dtype=torch.float64)
        product_forward_kernel[self.product_grid()](
            y, self.w.matrices[s], bias, gain, c, parts, self.tokens,
            HAS_BIAS=bias is not None, HAS_GAIN=gain is not None, BATCH=measured is not None,
            ACTIVATION=self.activation, GROUP_M=self.tiles.group_m, **self.product_options(),
        )  # fmt: skip
        if measured is not None:
            self.finish(parts, self.w.pw_affine[d], measured, self.tiles.block_m, self.tokens)

    # ---- backward ----

    def sums(self, stage: Stage, gradient: Tensor) -> Tensor:
        """Sums behind an activation, parts of tiles (tiles, 2, C)."""
        grid = self.flat_grid()
        parts = self.new(grid[0], 2, self.channels)
        gradient_sums_kernel[grid](
            stage.pre, gradient, stage.norm, parts, self.tokens, ACTIVATION=self.activation, **self.flat_options()
        )
        return parts

    def through(self, stage: Stage, gradient: Tensor, parts: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient under an activation into `out`; the affine's gradient (2, C) and the bias' (C)."""
        grid, options = self.flat_grid(), self.flat_options()
        affine, factors = self.new(2, self.channels), self.new(3, self.channels)
        channel_grid, channel_options = self.channel_launch()
        batch = self.eps is not None
        finish_gradient_kernel[channel_grid](
            parts, stage.norm, affine, factors, len(parts), self.tokens, BATCH=batch, **channel_options
        )
        bias_parts = self.new(grid[0], self.channels)
        gradient_kernel[grid](
            stage.pre, gradient, stage.norm, factors, out, bias_parts, self.tokens,
            BATCH=batch, ACTIVATION=self.activation, **options,
        )  # fmt: skip
        return affine, bias_parts.sum(0)

    def input_gradient(self, d: int, gradient: Tensor, residual: Tensor | None, out: Tensor, behind: Stage) -> Tensor:
        """d y into `out`, and its sums behind the stage that made y."""
        gain = None if self.w.gain is None else self.w.gain[d]
        parts = self.new(triton.cdiv(self.tokens, self.tiles.block_m), 2, self.channels)
        input_gradient_kernel[self.product_grid()](
            gradient, self.w.matrices[self.pw_index[d]], gain, residual, out, behind.pre, behind.norm, parts,
            self.tokens, HAS_GAIN=gain is not None, RESIDUAL=residual is not None, ACTIVATION=self.activation,
            GROUP_M=self.tiles.group_m, **self.product_options(),
        )  # fmt: skip
        return parts

    def weight_gradient(self, gradient: Tensor, y: Tensor) -> Tensor:
        t, c = self.tiles, self.channels
        splits = triton.cdiv(self.tokens, self.split_tokens)
        parts = self.new(splits, c, c)
        weight_gradient_kernel[(triton.cdiv(c, t.block_m) * triton.cdiv(c, t.block_n), splits)](
            gradient, y, parts, self.tokens, self.split_tokens, **self.product_options()
        )
        return parts.sum(0)

    def depthwise_gradient(
        self, d: int, gradient: Tensor, residual: Tensor, out: Tensor, behind: Stage | None
    ) -> Tensor | None:
        """d x into `out`, and its sums behind the stage that made x, if there is one."""
        grid, flipped = self.spatial_grid(), self.w.taps[self.dw_index[d]].flip(0)
        parts = None if behind is None else self.new(grid[0], 2, self.channels)
        pre, norm = (None, None) if behind is None else (behind.pre, behind.norm)
        depthwise_backward_kernel[grid](
            gradient, flipped, residual, out, pre, norm, parts, self.height, self.width,
            SUMS=behind is not None, ACTIVATION=self.activation, **self.spatial_options(),
        )  # fmt: skip
        return parts

    def taps_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """(k * k, C)."""
        programs = triton.cdiv(self.batch, self.images)
        parts = self.new(programs, self.kernel**2, self.channels)
        taps_gradient_kernel[(programs, self.spatial_grid()[1])](
            gradient, x, parts, self.batch, self.images, self.height, self.width, **self.spatial_options()
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
        images, height, width, _ = tokens.shape
        b = Blocks(images, height, width, pack(*parameters), tokens, dw_index, pw_index, activation, pw_residual, eps)
        affines, batch = (b.w.dw_affine, b.w.pw_affine), eps is not None
        stats = [b.new(depth, 2, b.channels) if batch else b.new(0) for _ in affines]
        norms = [b.new(depth, 4, b.channels) if batch else b.normalisations(affine, None) for affine in affines]
        kept = b.new(saved_elements(x, depth, pw_residual, save), dtype=x.dtype)
        planes = kept.view(-1, b.tokens, b.channels)
        a: Any = None if save == 2 else b.new_plane()
        c: Any = None if save else b.new_plane()
        z = tokens.view(b.tokens, b.channels)
        for d in range(depth):
            dw, pw = (Measured(s[d], n[d]) if batch else None for s, n in zip(stats, norms, strict=True))
            a = planes[save * d] if save == 2 else a
            c = planes[save * (d + 1) - 1] if save else c
            b.depthwise(d, z, a, dw)
            y = b.normalise(Stage(a, norms[0][d]), z, b.new_plane())
            b.product(d, y, c, pw)
            anchor = anchor_plane(d + 1, depth, pw_residual, save)
            z = b.new_plane() if anchor is None else planes[anchor]
            b.normalise(Stage(c, norms[1][d]), y if pw_residual else None, z)
        return from_tokens(z.view(tokens.shape), x), *stats, kept


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
        images, height, width, _ = tokens.shape
        b = Blocks(images, height, width, pack(*parameters), tokens, dw_index, pw_index, activation, pw_residual, eps)
        w, flat = b.w, tokens.view(b.tokens, b.channels)
        save = 1 if kept.numel() == saved_elements(x, depth, pw_residual, 1) else 2
        planes = kept.view(-1, b.tokens, b.channels)
        matrices = torch.zeros(w.matrices.shape, dtype=torch.float32, device=x.device)
        taps = torch.zeros(w.taps.shape, dtype=torch.float32, device=x.device)
        dw_biases = torch.zeros(len(w.taps), b.channels, device=x.device)
        pw_biases = torch.zeros(len(matrices), b.channels, device=x.device)
        dw_affines, pw_affines = b.new(depth, 2, b.channels), b.new(depth, 2, b.channels)
        gains = b.new(depth, b.channels) if pw_gain is not None else None
        stats = (None, None) if eps is None else (dw_stats, pw_stats)
        norms = [b.normalisations(affine, s) for affine, s in zip((w.dw_affine, w.pw_affine), stats, strict=True)]

        def dw_stage(d: int) -> Stage:
            return Stage(recomputed[d] if save == 1 else planes[save * d], norms[0][d])

        def pw_stage(d: int) -> Stage:
            return Stage(planes[save * (d + 1) - 1], norms[1][d])

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
                inputs[first] = planes[anchor_plane(first, depth, pw_residual, save)]
            else:
                inputs[first] = b.normalise(pw_stage(first - 1), None, b.new_plane())
            for block in range(first, d + 1):
                if save == 1:
                    recomputed[block] = b.new_plane()
                    b.depthwise(block, inputs[block], recomputed[block], None)
                if block < d:
                    stages = pw_stage(block), dw_stage(block)
                    inputs[block + 1] = b.normalise(stages[0], inputs[block], b.new_plane(), stages[1])

        g = as_tokens(grad).view(b.tokens, b.channels)
        sums: Any = b.sums(pw_stage(depth - 1), g)
        for d in reversed(range(depth)):
            if d not in inputs:
                restore(d)
            s, f = pw_index[d], dw_index[d]
            dc, dy = b.new_plane(), b.new_plane()
            pw_affines[d], bias = b.through(pw_stage(d), g, sums, dc)
            pw_biases[s] += bias
            y = b.normalise(dw_stage(d), inputs[d], b.new_plane())
            outer = b.weight_gradient(dc, y)
            if gains is None:
                matrices[s] += outer
            else:
                matrices[s] += pw_gain[d][:, None] * outer
                gains[d] = (w.matrices[s] * outer).sum(1)
            sums = b.input_gradient(d, dc, g if pw_residual else None, dy, dw_stage(d))
            da = dc
            dw_affines[d], bias = b.through(dw_stage(d), dy, sums, da)
            dw_biases[f] += bias
            g = b.new_plane()
            sums = b.depthwise_gradient(d, da, dy, g, pw_stage(d - 1) if d else None)
            taps[f] += b.taps_gradient(da, inputs.pop(d))

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
