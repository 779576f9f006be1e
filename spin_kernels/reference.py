"""The mathematics of every operator in plain PyTorch: the specification the kernels are tested against.

Any device, any floating dtype, differentiable by autograd. Nothing is validated here (``checks`` does that).
Low-precision inputs are computed op by op in their own dtype, as plain PyTorch would; affines, gains,
coefficients and statistics are float32 there, and everything is float64 for float64 inputs.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda u: u,
}


def output_format(x: Tensor) -> torch.memory_format:
    """Memory format of an operator's result: channels_last only where x is that and nothing else."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of affines, coefficients, statistics and sums beside tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mixer(
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
    eps: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """D = len(pw_index) ConvMixer blocks that share weights (Trockman & Kolter 2022; SPIN, Lin et al. 2022).

    Block d, with zero padding k // 2 and stride 1::

        u = act(depthwise(x, dw_weight[dw_index[d]]) + dw_bias[dw_index[d]])
        y = x + dw_affine[d, 0] * u + dw_affine[d, 1]
        v = act(pw_gain[d] * pointwise(y, pw_weight[pw_index[d]]) + pw_bias[pw_index[d]])
        x = pw_affine[d, 0] * v + pw_affine[d, 1]          (+ y if pw_residual)

    With `eps`, u and v are first normalised by their statistics over (B, H, W), as BatchNorm does in training.

    Args:
        x: (B, C, H, W).
        dw_weight, dw_bias: (S_dw, C, k, k), (S_dw, C), k odd.
        dw_affine, pw_affine: (D, 2, C), scale and shift.
        pw_weight, pw_bias: (S_pw, C, C) as [out, in], (S_pw, C).
        pw_index, dw_index: D ints; without dw_index block d uses filter d.
        pw_coefficients: (S_pw, T); then pw_weight is (T, C, C), and matrix s is
            sum_t pw_coefficients[s, t] * pw_weight[t].
        pw_gain: (D, C).

    Returns:
        y (B, C, H, W) in `output_format(x)`, and the statistics (D, 2, C) of u and of v: mean and biased variance,
        detached; None without `eps`.
    """
    act = ACTIVATIONS[activation]
    depth, channels = len(pw_index), x.shape[1]
    layout = output_format(x)
    if depth == 0:
        y = x.clone(memory_format=layout)
        return (y, None, None) if eps is None else (y, torch.empty_like(dw_affine), torch.empty_like(pw_affine))

    # unbind, not indexing: its gradient is one stack, where every index would fill a whole stack of zeros.
    filters, matrices = dw_weight.unbind(), compose_matrices(pw_weight, pw_coefficients).unbind()
    filter_biases = [None] * len(filters) if dw_bias is None else dw_bias.unbind()
    matrix_biases = [None] * len(matrices) if pw_bias is None else pw_bias.unbind()
    padding = dw_weight.shape[-1] // 2
    dw_stats: list[Tensor] = []
    pw_stats: list[Tensor] = []
    for d in range(depth):
        f = d if dw_index is None else dw_index[d]
        s = pw_index[d]
        filter_d, matrix = filters[f][:, None], matrices[s][:, :, None, None]
        u = act(_conv2d(x, filter_d, filter_biases[f], padding=padding, groups=channels))
        y = x + _normalise(u, dw_affine[d], eps, dw_stats)
        if pw_gain is None:
            v = _conv2d(y, matrix, matrix_biases[s])
        else:
            v = _affine(_conv2d(y, matrix), pw_gain[d], matrix_biases[s])
        x = _normalise(act(v), pw_affine[d], eps, pw_stats)
        if pw_residual:
            x = x + y

    x = x.contiguous(memory_format=layout)
    if eps is None:
        return x, None, None
    return x, torch.stack(dw_stats), torch.stack(pw_stats)


def compose_matrices(pw_weight: Tensor, pw_coefficients: Tensor | None) -> Tensor:
    """(S_pw, C, C) matrices of (T, C, C) templates: summed in the coefficients' dtype, rounded once."""
    if pw_coefficients is None:
        return pw_weight
    columns, templates = pw_coefficients[:, :, None, None].unbind(1), pw_weight.unbind()
    total = columns[0] * templates[0]
    for column, template in zip(columns[1:], templates[1:], strict=True):
        total = total + column * template
    return total.to(pw_weight.dtype)


def compose_superweights(bank: Tensor, coefficients: Tensor, pieces: Sequence[int], shapes: Sequence[int]) -> Tensor:
    """Weights of every layer from a flat bank of templates (SuperWeight Networks, Teterwak et al. 2024).

    Args:
        bank: (P,).
        coefficients: (Q,).
        pieces: ten ints each, (layer, base, stride, templates, coefficient, out_offset, in_offset, out, in, row)::

            weight[layer][out_offset + o, in_offset + i, y, x] =
                sum_k coefficients[coefficient + k] * bank[base + k * stride + ((o * row + i) * kh + y) * kw + x]

        shapes: four ints (out, in, kh, kw) per layer.

    Returns:
        The layers' weights, flat, one after another, in the bank's dtype; sums in `wide_dtype`.
    """
    wide = bank.to(wide_dtype(bank.dtype)).contiguous()
    layers = [wide.new_empty(tuple(shapes[i : i + 4])) for i in range(0, len(shapes), 4)]
    for piece in _pieces(pieces):
        layer, _, _, templates, coefficient, out_offset, in_offset, out, into, _ = piece
        weight = layers[layer]
        slabs = [_template(wide, piece, weight.shape, k) for k in range(templates)]
        total = coefficients[coefficient] * slabs[0]
        for k in range(1, templates):
            total = total + coefficients[coefficient + k] * slabs[k]
        weight[out_offset : out_offset + out, in_offset : in_offset + into] = total
    if not layers:
        return bank.new_empty(0)
    return torch.cat([weight.flatten() for weight in layers]).to(bank.dtype)


def compose_superweights_backward(
    grad: Tensor, bank: Tensor, coefficients: Tensor, pieces: Sequence[int], shapes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of bank and coefficients. Written out: autograd would fill a bank of zeros for every template."""
    wide = bank.to(wide_dtype(bank.dtype)).contiguous()
    grad_bank, grad_coefficients = torch.zeros_like(wide), torch.zeros_like(coefficients)
    sizes = [shapes[i : i + 4] for i in range(0, len(shapes), 4)]
    grads = grad.to(wide.dtype).split([out * into * kh * kw for out, into, kh, kw in sizes]) if sizes else ()
    layers = [g.view(tuple(size)) for g, size in zip(grads, sizes, strict=True)]
    for piece in _pieces(pieces):
        layer, _, _, templates, coefficient, out_offset, in_offset, out, into, _ = piece
        g = layers[layer][out_offset : out_offset + out, in_offset : in_offset + into]
        for k in range(templates):
            grad_coefficients[coefficient + k] += (g * _template(wide, piece, layers[layer].shape, k)).sum()
            slab = _template(grad_bank, piece, layers[layer].shape, k)
            slab += coefficients[coefficient + k] * g
    return grad_bank.to(bank.dtype), grad_coefficients


def repeat_weight(
    weight: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
    out_channels: int,
    in_channels: int,
) -> Tensor:
    """A small filter bank tiled into a large layer (RepeatNet, Chavan et al. 2021).

    W[a, b] = weight[a mod o, b mod i], then with alpha and beta w * alpha / (1 + exp(beta * w)), their entry being
    that of the tile (a div o, b div i), or with gate w * gate, or neither.

    Args:
        weight: (o, i, kh, kw).
        alpha, beta: (ceil(out_channels / o), ceil(in_channels / i)).
        gate: (out_channels, in_channels, kh, kw).

    Returns:
        (out_channels, in_channels, kh, kw) in the weight's dtype.
    """
    o, i = weight.shape[:2]
    rows, columns = -(-out_channels // o), -(-in_channels // i)
    tiled = weight.repeat(rows, columns, 1, 1)[:out_channels, :in_channels]
    if gate is not None:
        return (tiled * gate).contiguous()
    if alpha is not None and beta is not None:
        alpha, beta = (
            t.repeat_interleave(o, 0).repeat_interleave(i, 1)[:out_channels, :in_channels, None, None]
            for t in (alpha, beta)
        )
        # sigmoid(-beta * w) is 1 / (1 + exp(beta * w)) without the overflow.
        wide = tiled.to(alpha.dtype)
        tiled = (wide * torch.sigmoid(-beta * wide) * alpha).to(weight.dtype)
    return tiled.contiguous()


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 0, groups: int = 1) -> Tensor:
    """F.conv2d. In 16 bits on the CPU it is computed in float32 and rounded once, which is what it means: torch 2.13
    itself never returns from a float16 depthwise convolution with k >= 15 where the processor has AVX512-FP16."""
    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        wide_bias = None if bias is None else bias.float()
        return F.conv2d(x.float(), weight.float(), wide_bias, padding=padding, groups=groups).to(x.dtype)
    return F.conv2d(x, weight, bias, padding=padding, groups=groups)


def _affine(u: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Per-channel scale and shift in their own precision, rounded to u's dtype."""
    scaled = u * scale[:, None, None]
    return (scaled if shift is None else scaled + shift[:, None, None]).to(u.dtype)


def _normalise(u: Tensor, affine: Tensor, eps: float | None, stats: list[Tensor]) -> Tensor:
    """The affine (2, C); with `eps` u is first normalised by its own statistics (2, C), which join `stats`."""
    scale, shift = affine
    if eps is None:
        return _affine(u, scale, shift)
    wide = u.to(affine.dtype)
    variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    stats.append(torch.stack([mean, variance]).detach())
    normal = (wide - mean[:, None, None]) * torch.rsqrt(variance + eps)[:, None, None]
    return _affine(normal, scale, shift).to(u.dtype)


def _pieces(pieces: Sequence[int]) -> list[Sequence[int]]:
    return [pieces[i : i + 10] for i in range(0, len(pieces), 10)]


def _template(flat: Tensor, piece: Sequence[int], shape: Sequence[int], k: int) -> Tensor:
    """View (out, in, kh, kw) of template k of a piece in the flat bank (or in its gradient)."""
    _, base, stride, _, _, _, _, out, into, row = piece
    _, _, kh, kw = shape
    return flat[base + k * stride :].as_strided((out, into, kh, kw), (row * kh * kw, kh * kw, kw, 1))
