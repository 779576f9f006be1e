"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929), as DeiT trains it (Touvron et al., arXiv 2012.12877)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sharing import Sharing
from .isotropic import Isotropic, Mlp, check_positive


class Attention(nn.Module):
    """Self-attention over tokens (B, N, dim); ``qkv`` gives queries, keys and values of all heads in this order."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, dim))

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class VisionTransformer(Isotropic):
    """Vision Transformer for images (B, in_channels, height, width) of one size, with logits (B, num_classes).

    Tokens are a learned class token and one per patch, with a learned position embedding. A block is attention
    and an MLP, each after a LayerNorm and with a residual around it; the class token is classified. Blocks may
    share their four linear layers, with biases (SPIN, arXiv 2207.10237); the LayerNorms are each block's own.

    Args:
        dim: number of channels.
        depth: number of blocks D.
        heads: of the attention; dim is a multiple of it.
        patch_size: side of a patch.
        image_size: side of the images, or (height, width); multiples of patch_size.
        mlp_ratio: hidden channels of the MLP, in units of dim.
        in_channels: of the images.
        num_classes: number of logits.
        sharing: plan of the shared linear layers, for ``depth`` blocks; None shares nothing. S is its number of
            distinct ones.
        drop_rate: of the dropout before the classifier.

    Parameters: cls_token (1, 1, dim); pos_embed (1, 1 + N, dim) for N patches, the class token's first;
    ``shared``, S times ``attention.qkv``, ``attention.proj``, ``mlp.fc1`` and ``mlp.fc2``; ``norms``, D times
    the LayerNorms before attention and MLP; ``patch_embed``, ``norm`` and ``head``. Features, of
    :meth:`block_outputs` and :meth:`forward_features`, are (B, 1 + N, dim).

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        patch_size: int,
        image_size: int | tuple[int, int] = 224,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        num_classes: int = 1000,
        sharing: Sharing | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(dim, depth, patch_size, mlp_ratio, in_channels, num_classes, sharing, drop_rate)
        check_positive(heads=heads)
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of dim {dim}, got {heads}")
        sides = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
        if len(sides) != 2 or any(not isinstance(s, int) or s < 1 or s % patch_size for s in sides):
            raise ValueError(
                f"image_size: expected a multiple of patch_size {patch_size}, or two as (height, width), "
                f"got {image_size!r}"
            )
        self.image_size = (sides[0], sides[1])
        patches = (sides[0] // patch_size) * (sides[1] // patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, dim))
        self.shared = nn.ModuleList(
            nn.ModuleDict({"attention": Attention(dim, heads), "mlp": Mlp(dim, self.hidden)})
            for _ in range(self.sharing.num_shared)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)]) for _ in range(depth)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _embed(self, images: Tensor) -> Tensor:
        channels, (height, width) = self.patch_embed.in_channels, self.image_size
        if images.ndim != 4 or images.shape[1:] != (channels, height, width):
            raise ValueError(f"images: expected shape (B, {channels}, {height}, {width}), got {tuple(images.shape)}")
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), 1) + self.pos_embed

    def _block(self, d: int, x: Tensor) -> Tensor:
        layers: Any = self.shared[self.index[d]]
        norms: Any = self.norms[d]  # before attention, before the MLP
        x = x + layers["attention"](norms[0](x))
        return x + layers["mlp"](norms[1](x))

    def _pool(self, features: Tensor) -> Tensor:
        return features[:, 0]


vit = VisionTransformer
