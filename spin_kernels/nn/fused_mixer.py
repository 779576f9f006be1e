"""The mixer whose shared pointwise weights are fused at every call from a weight per layer: SPIN's weight fusion."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
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

    pw_reduction: Tensor | None

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
        if options.get("bank") is not None:
            raise ValueError("bank: expected None, got a bank; fused weights are combinations of the blocks' own")
        super().__init__(dim, depth, kernel_size, Sharing(depth, 1), **options)
        self.sharing, self.reduction, self.groups = sharing, reduction, groups
        self.pw_index = tuple(sharing.index)
        columns = {"scalar_weighted_mean": 1, "channel_weighted_mean": dim}.get(reduction)
        like = self.pw_affine
        self.pw_reduction = None if columns is None else nn.Parameter(like.new_ones(depth, columns))

    def distinct_weights(self) -> tuple[Tensor, Tensor | None]:
        """The pointwise weights (S, C, C) and biases (S, C) as they are fused now, with gradients."""
        groups, c = self.members(), self.dim
        if self.reduction == "choose_first":
            first = [group[0] for group in groups]
            return self.pw_weight[first], None if self.pw_bias is None else self.pw_bias[first]
        dtype, reduction = self.pw_weight.dtype, self.pw_reduction
        weights = self.pw_weight
        factors = self.pw_affine.new_tensor([1 / len(group) for group in groups for _ in group])
        if reduction is not None and self.reduction == "channel_weighted_mean":  # per row, as no composition has them
            weights = reduction[:, :, None] * weights
        elif reduction is not None:
            factors = factors * reduction[[d for group in groups for d in group], 0]
        if any(len({b - a for a, b in pairwise(group)}) > 1 for group in groups):  # a random plan
            weights = weights[[d for group in groups for d in group]]
            ends = list(accumulate(map(len, groups)))
            groups = [list(range(end - len(group), end)) for group, end in zip(groups, ends, strict=True)]
        pieces: list[int] = []
        start = 0
        for s, group in enumerate(groups):
            step = group[1] - group[0] if len(group) > 1 else 0
            pieces += [0, group[0] * c * c, step * c * c, len(group), start, s * c, 0, c, c, c]
            start += len(group)
        (fused,) = functional.compose_superweights(weights.flatten(), factors, pieces, (len(groups) * c, c, 1, 1))
        return fused.view(-1, c, c).to(dtype), self._mean_biases()

    def _mean_biases(self) -> Tensor | None:
        if self.pw_bias is None:
            return None
        wide = self.pw_bias.to(self.pw_affine.dtype)  # sums are rounded once
        return torch.stack([wide[group].mean(0) for group in self.members()]).to(self.pw_bias.dtype)

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
