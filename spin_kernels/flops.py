"""Floating-point operations of any network, those within this package's operators among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import ops  # noqa: F401  (defines the operators)
from .dispatch import MIXER_TENSORS
from .nn.base import Freezable

__all__ = ["count_flops"]


@torch.no_grad()
def count_flops(network: nn.Module, x: Tensor) -> int:
    """The FLOPs of ``network(x)``, which is run once: of convolutions, products of matrices, attention and mixers.

    A multiply-add is two FLOPs and padding counts. Activations, normalisation and what does not depend on the batch,
    such as the making of weights from a bank, do not. Put the network in eval mode, or its statistics change.

    Args:
        network: any module.
        x: its input, (B, ...); the FLOPs are those of all B.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which takes a third of a second

    with _unfrozen(network), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        network(x)
    return counter.get_total_flops()


def _mixer(x: torch.Size, dw_weight: torch.Size, *args: Any, **_: Any) -> int:
    depth = len(args[len(MIXER_TENSORS) - 2])  # of pw_index, which follows the tensors
    return 2 * x.numel() * (dw_weight[-2:].numel() + x[1]) * depth


_FORMULAS = {torch.ops.spin._mixer: _mixer}


@contextmanager
def _unfrozen(network: nn.Module) -> Iterator[None]:
    """Packed weights, whose operators do not say how large they are, step aside and are there again afterwards."""
    packed = [module._packed for module in network.modules() if isinstance(module, Freezable) and module.is_frozen]
    for weights in packed:
        weights.frozen = False
    try:
        yield
    finally:
        for weights in packed:
            weights.frozen = True
