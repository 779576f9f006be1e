"""ConvMixer (Trockman and Kolter, arXiv 2201.09792) and its weight-sharing form (SPIN, arXiv 2207.10237)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base import BatchNorm2d, Freezable, fold_batch_norm
from ..nn.mixer import SharedMixer
from ..reference import ACTIVATIONS
from ..sharing import Sharing

# oneDNN multiplies short types where there is AVX-512; elsewhere torch's takes up to 80 times float32's time.
_SHORT_CONVOLUTIONS = torch.backends.cpu.get_cpu_capability() == "AVX512"


class PatchEmbed(nn.Module):
    """Cuts an image (B, in_channels, H, W) into patches: convolution, activation, BatchNorm."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        patch_size: int,
        patch_stride: int,
        patch_padding: int,
        activation: str,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, dim, patch_size, patch_stride, patch_padding)
        self.activation = activation
        self.bn = BatchNorm2d(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.bn(ACTIVATIONS[self.activation](self._convolution(image)))

    def _convolution(self, image: Tensor) -> Tensor:
        # The layer itself is called, with wider parameters: hooks on it run, and other kinds of layers may replace it.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else image.dtype
        by_float32 = image.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _SHORT_CONVOLUTIONS
        if not by_float32 or type(self.conv) is not nn.Conv2d:
            return self.conv(image)
        with torch.autocast("cpu", enabled=False):
            parameters = {name: parameter.float() for name, parameter in self.conv.named_parameters()}
            return torch.func.functional_call(self.conv, parameters, image.float()).to(dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class Head(nn.Module):
    """Logits (B, num_classes) from features (B, C, H, W): average over positions, dropout, linear layer."""

    def __init__(self, dim: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(self.dropout(features.mean((2, 3))))


class ConvMixer(Freezable):
    """ConvMixer for images (B, in_channels, H, W), with logits (B, num_classes).

    ``patch_embed`` cuts the image into patches, ``mixer`` is the :class:`~spin_kernels.nn.SharedMixer` of all
    blocks, ``head`` averages over positions and classifies. BatchNorm's parameters and statistics, gains and
    coefficients stay float32 when the model is converted to bfloat16 or float16. ``freeze()`` packs the whole
    network, which then takes images in float32 or in the model's dtype and runs as one operator; logits have
    the image's dtype. In float32, pointwise matrices of 256 channels or more (multiples of 32) are packed as quarters
    and sums of quarters, twice their size, for Strassen's product.

    Args:
        dim: number of channels.
        depth: number of blocks.
        kernel_size: of the depthwise convolutions, odd.
        patch_size: side of a patch.
        patch_stride: distance between patches; None is patch_size.
        patch_padding: zeros around the image, fewer than patch_size.
        in_channels: of the image.
        num_classes: number of logits.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"``, ``"silu"`` or ``"identity"``.
        pw_residual: False is ConvMixer, True adds SPIN's residual around the pointwise half.
        sharing: plan of the shared pointwise weights, for ``depth`` blocks; None shares nothing.
        templates: number of templates that the pointwise matrices are combinations of (SuperWeights).
        transform: ``"scalar"`` or ``"channel"`` gives every block gains of its own on the shared product.
        drop_rate: of the dropout before the classifier.
        dw_sharing: plan of the shared depthwise filters; None shares none.

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int,
        patch_size: int,
        patch_stride: int | None = None,
        patch_padding: int = 0,
        in_channels: int = 3,
        num_classes: int = 1000,
        activation: str = "gelu",
        pw_residual: bool = False,
        sharing: Sharing | None = None,
        templates: int | None = None,
        transform: str | None = None,
        drop_rate: float = 0.0,
        dw_sharing: Sharing | None = None,
    ) -> None:
        super().__init__()
        patch_stride = patch_size if patch_stride is None else patch_stride
        for name, value, least in (
            ("patch_size", patch_size, 1),
            ("patch_stride", patch_stride, 1),
            ("patch_padding", patch_padding, 0),
            ("in_channels", in_channels, 1),
            ("num_classes", num_classes, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if patch_padding >= patch_size:  # patches of nothing but zeros; torch's float16 convolution breaks on them
            raise ValueError(f"patch_padding: expected less than patch_size {patch_size}, got {patch_padding}")
        blocks = (dim, depth, kernel_size, sharing, activation, pw_residual, templates, transform)
        mixer = SharedMixer(*blocks, dw_sharing=dw_sharing)
        self.patch_embed = PatchEmbed(in_channels, dim, patch_size, patch_stride, patch_padding, activation)
        self.mixer = mixer
        self.head = Head(dim, num_classes, drop_rate)
        self._drop_packed_on_load()

    def forward_features(self, image: Tensor) -> Tensor:
        """Feature maps (B, dim, H', W') before the head, from the parameters as they are (frozen or not)."""
        return self.mixer(self.patch_embed(image))

    def block_outputs(self, images: Tensor) -> Iterator[Tensor]:
        """The features (B, dim, H', W') after every block, one by one, in eval mode."""
        return self.mixer.block_outputs(self.patch_embed(images))

    def forward(self, image: Tensor) -> Tensor:
        if self.is_frozen:
            return self._call_packed(image)
        return self.head(self.forward_features(image))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: all but the layers' weights."""
        weights = {"patch_embed.conv.weight", "mixer.dw_weight", "mixer.pw_weight", "head.fc.weight"}
        return {name for name, _ in self.named_parameters()} - weights

    def _pack(self) -> tuple[Tensor, int] | tuple[PatchEmbed, dict[str, Any], Head]:
        arguments = self.mixer._op_arguments()
        if not self.mixer._has_packed_form(arguments):
            ends = copy.deepcopy(self.patch_embed), copy.deepcopy(self.head)
            for end in ends:
                end.zero_grad()  # frees the copied gradients
            return ends[0], self.mixer._composed(arguments), ends[1]
        conv, bn, fc = self.patch_embed.conv, self.patch_embed.bn, self.head.fc
        assert bn.running_mean is not None  # they are tracked
        assert bn.running_var is not None
        affine = fold_batch_norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, dim=0)
        packed = torch.ops.spin._pack_network(
            conv.weight,
            conv.bias,
            affine,
            conv.stride[0],
            conv.padding[0],
            fc.weight,
            fc.bias,
            *arguments.values(),
        )
        return packed, fc.out_features

    def _run_packed(
        self, image: Tensor, packed: tuple[Tensor, int] | tuple[PatchEmbed, dict[str, Any], Head]
    ) -> Tensor:
        if len(packed) == 2:
            return _frozen_network(image, *packed)
        patch_embed, mixer, head = packed
        with torch.no_grad():
            # As the packed network does: float32 images are converted, others have the weights' dtype.
            x = image.to(patch_embed.conv.weight.dtype) if image.dtype == torch.float32 else image
            return head(self.mixer._run_packed(patch_embed(x), mixer)).to(image.dtype)


_frozen_network = torch.ops.spin._frozen_network.default


@torch.library.register_fake("spin::_frozen_network")
def _(image: Tensor, packed: Tensor, num_classes: int) -> Tensor:
    return image.new_empty((image.shape[0], num_classes))


convmixer = ConvMixer
