"""Documented front of the operators in ``torch.ops.spin``: gradients, autocast, torch.compile and torch.export hold.

Tensors, weights and biases share one dtype (float32, bfloat16, float16, or float64, which the reference runs); affines,
gains and coefficients are float32 (float64 beside float64). A wrong argument raises a TypeError (dtype, layout) or a
ValueError (shape, index, device, value) that names it. First derivatives only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, ops

# The two mixers spell out the schema's arguments, alike as they are, so that help() and editors show them.


def shared_mixer_block(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_affine: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    pw_affine: Tensor,
    pw_index: Sequence[int],
    *,
    dw_index: Sequence[int] | None = None,
    pw_coefficients: Tensor | None = None,
    pw_gain: Tensor | None = None,
    activation: str = "gelu",
    pw_residual: bool = False,
) -> Tensor:
    """Runs D = len(pw_index) ConvMixer blocks that share weights, with frozen BatchNorm statistics.

    ConvMixer: Trockman & Kolter, "Patches Are All You Need?"; sharing: SPIN, Lin et al., ECCV 2022, arXiv 2207.10237;
    pw_coefficients: SuperWeight Networks, Teterwak et al., WACV 2024, arXiv 2312.01280. Block d::

        u = act(depthwise(x, dw_weight[dw_index[d]]) + dw_bias[dw_index[d]])
        y = x + dw_affine[d, 0] * u + dw_affine[d, 1]
        v = act(pw_gain[d] * pointwise(y, pw_weight[pw_index[d]]) + pw_bias[pw_index[d]])
        x = pw_affine[d, 0] * v + pw_affine[d, 1]          (+ y if pw_residual)

    Args:
        x: (B, C, H, W), any strides.
        dw_weight: (S_dw, C, k, k) depthwise filters, k odd; zero padding k // 2, stride 1.
        dw_bias: (S_dw, C) or None.
        dw_affine: (D, 2, C), scale and shift of the BatchNorm after the first activation.
        pw_weight: (S_pw, C, C) matrices as [out, in].
        pw_bias: (S_pw, C) or None.
        pw_affine: (D, 2, C), scale and shift of the BatchNorm after the second activation.
        pw_index: D ints, the matrix that block d uses.
        dw_index: D ints, the filter that block d uses; without it S_dw must be D and block d uses filter d.
        pw_coefficients: (S_pw, T); then pw_weight is (T, C, C), templates, and matrix s is
            sum_t pw_coefficients[s, t] * pw_weight[t], rounded once to pw_weight's dtype.
        pw_gain: (D, C), multiplies block d's product before the bias.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or "identity".
        pw_residual: adds y to the block's result, as SPIN's own block does.

    Returns:
        (B, C, H, W) in x's dtype; channels_last where x is that and not contiguous as well, else contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit. RuntimeError: SPIN_BACKEND forces a backend that cannot run.
    """
    return torch.ops.spin.shared_mixer_block.default(
        x, dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_index,
        dw_index=dw_index, pw_coefficients=pw_coefficients, pw_gain=pw_gain, activation=activation,
        pw_residual=pw_residual,
    )  # fmt: skip


def shared_mixer_block_train(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_affine: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    pw_affine: Tensor,
    pw_index: Sequence[int],
    *,
    dw_index: Sequence[int] | None = None,
    pw_coefficients: Tensor | None = None,
    pw_gain: Tensor | None = None,
    activation: str = "gelu",
    pw_residual: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """`shared_mixer_block` as in training: u and v are normalised by their own statistics over (B, H, W).

    Arguments as there; the affines are BatchNorm's gamma and beta, `eps` is added to the variances.

    Returns:
        y (B, C, H, W); dw_stats and pw_stats (D, 2, C): batch mean and biased variance of u and v, not differentiable,
        float32 (float64 beside float64).

    Raises:
        ValueError: fewer than two values per channel (B * H * W), eps negative or not finite; and as there.
    """
    return torch.ops.spin.shared_mixer_block_train.default(
        x, dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_index,
        dw_index=dw_index, pw_coefficients=pw_coefficients, pw_gain=pw_gain, activation=activation,
        pw_residual=pw_residual, eps=eps,
    )  # fmt: skip


def compose_superweights(
    bank: Tensor, coefficients: Tensor, pieces: Sequence[int], shapes: Sequence[int]
) -> tuple[Tensor, ...]:
    """Composes the weights of all layers from a bank of templates.

    SuperWeight Networks: Teterwak et al., WACV 2024, arXiv 2312.01280.

    Args:
        bank: (P,), every template, flat.
        coefficients: (Q,).
        pieces: ten ints per piece, (layer, base, stride, templates, coefficient, out_offset, in_offset, out, in, row)::

            weight[layer][out_offset + o, in_offset + i, y, x] =
                sum_k coefficients[coefficient + k] * bank[base + k * stride + ((o * row + i) * kh + y) * kw + x]

            for o < out and i < in; row >= in is the stored number of input channels. The pieces of a layer tile it.
        shapes: four ints (out, in, kh, kw) per layer.

    Returns:
        One (out, in, kh, kw) weight per layer in the bank's dtype. Autocast changes nothing.

    Raises:
        TypeError, ValueError: an argument does not fit, or pieces leave a gap, overlap or reach past the bank.
    """
    return ops.compose_layers(bank, coefficients, checks.composition_text(pieces, shapes))


def repeat_weight(
    weight: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
    out_channels: int,
    in_channels: int,
) -> Tensor:
    """Tiles a small filter bank into a large layer's weight, W[a, b] = weight[a mod o, b mod i], and modulates it.

    Learnable repetition (RepeatNet): Chavan et al., ICIP 2021, arXiv 2101.05650.

    Args:
        weight: (o, i, kh, kw); the last tiles may be partial.
        alpha, beta: (ceil(out_channels / o), ceil(in_channels / i)) each, both or neither: W becomes
            w * alpha / (1 + exp(beta * w)), with the entries of the tile (a div o, b div i).
        gate: (out_channels, in_channels, kh, kw) in the weight's dtype, instead of alpha and beta: W becomes w * gate.
        out_channels, in_channels: sizes of the result.

    Returns:
        (out_channels, in_channels, kh, kw) in the weight's dtype. Autocast changes nothing.

    Raises:
        TypeError, ValueError: an argument does not fit, or gate comes together with alpha and beta.
    """
    return torch.ops.spin.repeat_weight.default(weight, alpha, beta, gate, out_channels, in_channels)
