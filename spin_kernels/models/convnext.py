"""Isotropic ConvNeXt (Liu et al., arXiv 2201.03545, section 3.3) and its weight-sharing form (arXiv 2207.10237)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..sharing import Sharing
from .isotropic import Isotropic, Mlp, check_positive


class ConvNeXt(Isotropic):
    """Isotropic ConvNeXt for images (B, in_channels, H, W), with logits (B, num_classes).

    A block is a depthwise convolution, a LayerNorm over channels and an MLP at every position, with a residual
    around all three; the average over positions is normalised and classified. Blocks may share the two linear
    layers of the MLP, with biases, as SPIN shares pointwise layers; all else is each block's own.

    Args:
        dim: number of channels.
        depth: number of blocks D.
        kernel_size: of the depthwise convolutions, odd.
        patch_size: side of a patch.
        mlp_ratio: hidden channels of the MLP, in units of dim.
        in_channels: of the images.
        num_classes: number of logits.
        layer_scale: what the factors on the MLP's channels start from (arXiv 2103.17239); None has no factors,
            as the published S and B.
        sharing: plan of the shared linear layers, for ``depth`` blocks; None shares nothing. S is its number of
            distinct ones.
        drop_rate: of the dropout before the classifier.

    Parameters: ``shared``, S times ``fc1`` and ``fc2``; ``depthwise`` and ``norms``, D of each; layer_scale
    (D, dim) or None; ``patch_embed``, ``norm`` and ``head``. H and W are multiples of patch_size; features, of
    :meth:`block_outputs` and :meth:`forward_features`, are (B, dim, H / patch_size, W / patch_size).

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    layer_scale: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 7,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        layer_scale: float | None = None,
        sharing: Sharing | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(dim, depth, patch_size, mlp_ratio, in_channels, num_classes, sharing, drop_rate)
        check_positive(kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if layer_scale is not None and not (isinstance(layer_scale, int | float) and layer_scale > 0):
            raise ValueError(f"layer_scale: expected a positive number or None, got {layer_scale!r}")
        self.shared = nn.ModuleList(Mlp(dim, self.hidden) for _ in range(self.sharing.num_shared))
        self.depthwise = nn.ModuleList(
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(depth))
        factors = None if layer_scale is None else nn.Parameter(torch.full((depth, dim), float(layer_scale)))
        self.register_parameter("layer_scale", factors)
        self.reset_parameters()

    def _embed(self, images: Tensor) -> Tensor:
        channels, side = self.patch_embed.in_channels, self.patch_embed.stride[0]
        if images.ndim != 4 or images.shape[1] != channels or any(s < side or s % side for s in images.shape[2:]):
            raise ValueError(
                f"images: expected shape (B, {channels}, H, W) with H and W multiples of patch_size {side}, "
                f"got {tuple(images.shape)}"
            )
        return self.patch_embed(images)

    def _block(self, d: int, x: Tensor) -> Tensor:
        y = self.norms[d](self.depthwise[d](x).permute(0, 2, 3, 1))
        y = self.shared[self.index[d]](y)
        if self.layer_scale is not None:
            y = self.layer_scale[d] * y
        return x + y.permute(0, 3, 1, 2)

    def _pool(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))


convnext = ConvNeXt
