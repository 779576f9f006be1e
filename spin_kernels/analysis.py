"""How alike the blocks of two networks are: linear centred kernel alignment (CKA; Kornblith et al., arXiv 1905.00414).

With features X (N, p) and Y (N, q) of the same N images, columns centred, CKA = |XᵀY|² / (|XᵀX| |YᵀY|) in Frobenius
norms: 1 where the two are equal up to rotation and scale. SPIN (arXiv 2207.10237) compares the blocks of a network with
and without shared weights by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["block_similarity", "linear_cka"]


class Blocks(Protocol):
    """A network of equal blocks, such as those of :func:`spin_kernels.models.isotropic_models`."""

    def block_outputs(self, images: Tensor) -> Iterator[Tensor]: ...


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA, from 0 to 1, of features (N, ...) and (N, ...) of the same N images.

    It is NaN where all rows of one of the two are equal.

    Raises:
        ValueError: their first dimensions differ, or are below 2.
    """
    if min(x.dim(), y.dim()) < 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"x, y: expected features of the same images, two or more, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return float(_alignment(_gram(x), _gram(y)))


@torch.no_grad()
def block_similarity(model: Blocks, other: Blocks, images: Tensor, batch: int = 32) -> Tensor:
    """Linear CKA (D, D') between the features after every block of ``model`` and of ``other`` on ``images``.

    Memory: the features of all images after one block, and an N x N matrix per block.

    Args:
        model, other: networks in eval mode; their blocks may differ in width and in number.
        images: (N, in_channels, H, W), N at least 2.
        batch: images at a time.

    Raises:
        ValueError: fewer than two images, or no positive batch.
        RuntimeError: a network is in training mode, where features would depend on the batches.
    """
    if images.dim() == 0 or len(images) < 2:
        raise ValueError(f"images: expected two or more, got shape {tuple(images.shape)}")
    if batch < 1:
        raise ValueError(f"batch: expected a positive number of images, got {batch}")
    grams = [torch.stack(list(_grams(network, images, batch))) for network in (model, other)]
    return torch.stack([torch.stack([_alignment(one, two) for two in grams[1]]) for one in grams[0]])


def _grams(model: Blocks, images: Tensor, batch: int) -> Iterator[Tensor]:
    if isinstance(model, nn.Module) and model.training:
        raise RuntimeError("block_similarity: expected networks in eval mode, got one in training mode; call eval()")
    streams = [model.block_outputs(chunk) for chunk in images.split(batch)]
    for outputs in zip(*streams, strict=True):  # all batches advance block by block, so that one block's are held
        yield _gram(torch.cat(outputs))


def _gram(features: Tensor) -> Tensor:
    """X Xᵀ (N, N) in float64 of features whose mean over the images is taken off."""
    rows = features.detach().flatten(1)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in rows.split(1 << 14, dim=1):  # a float64 copy of all would be several times the features
        wide = columns.double()
        wide = wide - wide.mean(0)
        total.addmm_(wide, wide.T)
    return total


def _alignment(one: Tensor, two: Tensor) -> Tensor:
    # |XᵀY|² is the inner product of X Xᵀ and Y Yᵀ.
    return (one * two).sum() / (one.norm() * two.norm())
