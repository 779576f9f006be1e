"""What the isotropic networks made of plain PyTorch layers have in common: blocks of one width that share layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from ..sharing import Sharing, check_plan


class Mlp(nn.Module):
    """(..., dim) to (..., dim) through a hidden layer with GELU (erf)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Isotropic(nn.Module, ABC):
    """Images (B, in_channels, H, W) to logits (B, num_classes) through ``depth`` blocks of one width.

    ``patch_embed`` cuts the image into patches; block d uses the d-th of what each block has for itself and
    ``shared[index[d]]``, which blocks share; ``norm`` and ``head`` classify. Subclasses create the blocks,
    call :meth:`reset_parameters` and define the three abstract methods.

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    shared: nn.ModuleList

    def __init__(
        self,
        dim: int,
        depth: int,
        patch_size: int,
        mlp_ratio: float,
        in_channels: int,
        num_classes: int,
        sharing: Sharing | None,
        drop_rate: float,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes)
        if not isinstance(mlp_ratio, int | float) or not 1 <= dim * mlp_ratio < 2**31:
            raise ValueError(f"mlp_ratio: expected a number from 1 / dim to 2**31 / dim, got {mlp_ratio!r}")
        check_drop_rate(drop_rate)
        self.sharing = check_plan("sharing", sharing, depth)
        self.index = tuple(self.sharing.index)
        self.dim, self.depth, self.hidden = dim, depth, int(dim * mlp_ratio)
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes)

    def reset_parameters(self) -> None:
        """Initialises convolutions and linear layers as both papers do: a truncated normal of std 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @abstractmethod
    def _embed(self, images: Tensor) -> Tensor:
        """What the first block gets; raises ValueError for images that the network is not made for."""

    @abstractmethod
    def _block(self, d: int, x: Tensor) -> Tensor:
        """What block d makes of x."""

    @abstractmethod
    def _pool(self, features: Tensor) -> Tensor:
        """(B, dim), what is normalised and classified."""

    def block_outputs(self, images: Tensor) -> Iterator[Tensor]:
        """The features after every block, one by one; a block runs when its features are asked for.

        Raises:
            ValueError: images of another shape, at the first features.
        """
        x = self._embed(images)
        for d in range(self.depth):
            x = self._block(d, x)
            yield x

    def forward_features(self, images: Tensor) -> Tensor:
        """The features after the last block, before ``norm``: the last of :meth:`block_outputs`."""
        for x in self.block_outputs(images):
            features = x
        return features

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self._pool(self.forward_features(images)))))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: all but the layers' weights."""
        layers = (name for name, module in self.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
        return {name for name, _ in self.named_parameters()} - {f"{name}.weight" for name in layers}

    def extra_repr(self) -> str:
        return f"{self.dim}, depth={self.depth}, shared={self.sharing.num_shared}"


def check_positive(**values: int) -> None:
    """Raises ValueError unless every argument is a positive integer."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_drop_rate(drop_rate: float) -> None:
    """Raises ValueError unless it is a number from 0 to 1."""
    if not isinstance(drop_rate, int | float) or not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate: expected a number from 0 to 1, got {drop_rate!r}")
