"""How similar the gradients of two layers are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Layer = tuple[int, int]  # network, layer
Tensors = Sequence[Sequence[Tensor]]  # for each network those of its layers, or of a bank's users


def cosine(first: Tensor, second: Tensor, whose: str) -> float:
    """The cosine similarity of two tensors of one size, in float64; 0 where one is all zeros.

    Args:
        first, second: of any shape.
        whose: what an error calls them.

    Raises:
        ValueError: the sizes differ, or a value is not finite.
    """
    if first.numel() != second.numel():
        raise ValueError(
            f"gradients: expected the same number of values of {whose}, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}; compare what has one size"
        )
    result = float(F.cosine_similarity(first.detach().double().flatten(), second.detach().double().flatten(), dim=0))
    if result != result:
        raise ValueError(
            f"gradients: expected a similarity of {whose}, got nan; look for values that are not finite, or only zeros"
        )
    return result


def layer_similarity(first: Layer, second: Layer, gradients: Tensors, weights: Tensors | None = None) -> float:
    """The similarity of two layers: of their gradients, or of gradients and weights, each over its norm.

    Where sizes differ, the channels that both have are compared. As published the second layer's weight is divided by
    the norm of the first's: with weights the similarity depends on the order of the two.

    Args:
        first, second: (network, layer).
        gradients: of the weights (out, in, \\*kernel), for each network and layer.
        weights: of the same shapes, or None.

    Raises:
        ValueError: kernels differ, or a value is not finite; with weights also where a gradient or weight is all zeros.
    """

    def common(tensors: Tensors) -> tuple[Tensor, Tensor]:
        a, b = (tensors[network][layer].detach().double() for network, layer in (first, second))
        if a.dim() < 2 or a.shape[2:] != b.shape[2:]:
            raise ValueError(
                f"gradients: expected layers (out, in, *kernel) of one kernel size, got {tuple(a.shape)} for layer "
                f"{first} and {tuple(b.shape)} for layer {second}; keep kernel sizes in clusters of their own"
            )
        out, into = (min(a.shape[n], b.shape[n]) for n in (0, 1))
        return a[:out, :into].flatten(), b[:out, :into].flatten()

    a, b = common(gradients)
    if weights is not None:
        v, w = common(weights)
        norm_of_first_as_published = v.norm()
        a = torch.cat((a / a.norm(), v / norm_of_first_as_published))
        b = torch.cat((b / b.norm(), w / norm_of_first_as_published))
    return cosine(a, b, f"layers {first} and {second}")


class Similarities:
    """:func:`layer_similarity` of these gradients and weights, each pair compared once."""

    def __init__(self, gradients: Tensors, weights: Tensors | None = None) -> None:
        self._tensors = gradients, weights
        self._found: dict[tuple[Layer, Layer], float] = {}

    def __call__(self, first: Layer, second: Layer) -> float:
        pair = first, second
        if pair not in self._found:
            self._found[pair] = layer_similarity(*pair, *self._tensors)
            if self._tensors[1] is None:
                self._found[second, first] = self._found[pair]
        return self._found[pair]
