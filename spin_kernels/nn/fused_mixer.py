"""The mixer whose shared pointwise weights are fused at every call from a weight per layer: SPIN's weight fusion."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..sharing import Sharing, check_plan
from .mixer import SharedMixer

REDUCTIONS = ("choose_first", "mean", "scalar_weighted_mean", "channel_weighted_mean")
GROUPS = ("sharing", "consecutive")


class FusedMixer(SharedMixer):
    """A :class:`SharedMixer` that is trained before its weights are shared (SPIN, arXiv 2207.10237, section 3.3).

    Every block keeps a pointwise weight of its own; distinct weight s is fused from those of n blocks at each call:
    ``sum_j c_j * W_j / n``, c being 1 at the start and not normalised; biases take the plain mean.

    Args:
        dim, depth, kernel_size: as in :class:`SharedMixer`.
        sharing: the plan to share by.
        reduction: ``"mean"`` (c is 1), ``"scalar_weighted_mean"`` (c is a number per block),
            ``"channel_weighted_mean"`` (one per block and output channel), or ``"choose_first"``: the weight and the
            bias of the group's first block, the others get no gradient.
        groups: ``"sharing"`` fuses the blocks that will share; ``"consecutive"`` fuses runs of ``sharing.rate``
            blocks whatever the mapping, as the published code does, and needs a uniform distribution.
        **options: activation, pw_residual, transform, bias, eps, momentum, checkpoint, dw_sharing, device and dtype of
            :class:`SharedMixer`.

    Parameters: those of a SharedMixer that shares nothing, pw_weight (D, C, C) and pw_bias (D, C) among them, and
    pw_reduction (D, 1) or (D, C), which stays float32 as affines do.

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int,
        sharing: Sharing,
        reduction: str = "mean",
        groups: str = "sharing",
        **options: Any,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if groups not in GROUPS:
            raise ValueError(f"groups: expected one of {', '.join(GROUPS)}, got {groups!r}")
        if sharing is None:
            raise TypeError("sharing: expected a Sharing, got None")
        sharing = check_plan("sharing", sharing, depth)
        if groups == "consecutive" and sharing.distribution != "uniform":
            raise ValueError(
                f"groups: expected 'sharing' with a distribution other than uniform, got {groups!r} with "
                f"{sharing.distribution!r}; runs of blocks do not match such a plan"
            )
        if options.get("templates") is not None:
            raise ValueError("templates: expected None, got a number; fused weights are not combinations of templates")
        super().__init__(dim, depth, kernel_size, Sharing(depth, 1), **options)
        self.sharing, self.reduction, self.groups = sharing, reduction, groups
        self.pw_index = tuple(sharing.index)
        columns = {"scalar_weighted_mean": 1, "channel_weighted_mean": dim}.get(reduction)
        like = self.pw_affine
        self.pw_reduction = None if columns is None else nn.Parameter(like.new_ones(depth, columns))

    def distinct_weights(self) -> tuple[Tensor, Tensor | None]:
        """The pointwise weights (S, C, C) and biases (S, C) as they are fused now, with gradients."""
        dtype = self.pw_weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # sums are rounded once
        weights = list(self.pw_weight.to(wide))
        if self.pw_reduction is not None:
            weights = [c[:, None] * weight for c, weight in zip(self.pw_reduction, weights, strict=True)]
        biases = None if self.pw_bias is None else self._each_group(list(self.pw_bias.to(wide))).to(dtype)
        return self._each_group(weights).to(dtype), biases

    def _each_group(self, layers: list[Tensor]) -> Tensor:
        groups = [[layers[d] for d in group] for group in self.members()]
        if self.reduction == "choose_first":
            return torch.stack([group[0] for group in groups])
        return torch.stack([reduce(torch.add, group) / len(group) for group in groups])

    def reset_parameters(self) -> None:
        """As a SharedMixer that shares nothing; reduction weights become 1."""
        super().reset_parameters()
        reduction = getattr(self, "pw_reduction", None)  # it is made after the other parameters
        if reduction is not None:
            nn.init.ones_(reduction)

    def members(self) -> list[list[int]]:
        """The blocks whose weights make each distinct weight."""
        if self.groups == "consecutive":
            rate = self.sharing.rate
            return [list(range(d, min(d + rate, self.depth))) for d in range(0, self.depth, rate)]
        return [[d for d, s in enumerate(self.pw_index) if s == shared] for shared in range(self.sharing.num_shared)]

    def _op_arguments(self) -> dict[str, Any]:
        weight, bias = self.distinct_weights()
        return super()._op_arguments() | {"pw_weight": weight, "pw_bias": bias}

    def _float32_state(self) -> Any:
        yield from super()._float32_state()
        yield self.pw_reduction

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction}, groups={self.groups}"
