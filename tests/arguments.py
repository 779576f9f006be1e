"""Random arguments of the operators, in the order of their public schemas."""

from typing import Any

import torch
from torch import Tensor

from spin_kernels import checks


def mixer_arguments(
    batch: int = 2,
    channels: int = 6,
    height: int = 5,
    width: int = 4,
    kernel: int = 3,
    depth: int = 3,
    matrices: int = 2,
    filters: int | None = None,
    templates: int | None = None,
    gain: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    requires_grad: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    filters_drawn = depth if filters is None else filters

    def draw(*size: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, dtype=torch.float64).mul(scale).add(shift).to(dtype)

    def affine() -> Tensor:
        return draw(depth, 2, channels, scale=0.5, shift=0.4, dtype=wide)

    x = draw(batch, channels, height, width)
    arguments = {
        "x": x.to(memory_format=torch.channels_last) if channels_last else x,
        "dw_weight": draw(filters_drawn, channels, kernel, kernel, scale=1 / kernel),
        "dw_bias": draw(filters_drawn, channels) if bias else None,
        "dw_affine": affine(),
        "pw_weight": draw(templates or matrices, channels, channels, scale=channels**-0.5),
        "pw_bias": draw(matrices, channels) if bias else None,
        "pw_affine": affine(),
        "pw_index": torch.randint(matrices, (depth,)).tolist(),
        "dw_index": None if filters is None else torch.randint(filters, (depth,)).tolist(),
        "pw_coefficients": draw(matrices, templates, dtype=wide) if templates else None,
        "pw_gain": draw(depth, channels, scale=0.5, shift=1.0, dtype=wide) if gain else None,
        **settings,
    }
    if requires_grad:
        for tensor in tensors_of(arguments).values():
            tensor.requires_grad_()
    return arguments


def tensors_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers with every tensor in `dtype`."""
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}


# Two layers: (5, 4, 3, 3) of three slabs, the last of overlapping templates and a longer row, and (2, 3, 1, 1).
PIECES = [
    *(0, 3, 60, 3, 0, 0, 0, 2, 3, 3),
    *(0, 0, 20, 2, 3, 0, 3, 2, 1, 1),
    *(0, 7, 5, 2, 1, 2, 0, 3, 4, 5),
    *(1, 1, 6, 4, 2, 0, 0, 2, 3, 3),
]
SHAPES = [5, 4, 3, 3, 2, 3, 1, 1]


def compose_arguments(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "bank": torch.randn(220, dtype=torch.float64).to(dtype).requires_grad_(requires_grad),
        "coefficients": torch.randn(6, dtype=wide).requires_grad_(requires_grad),
        "pieces": list(PIECES),
        "shapes": list(SHAPES),
    }


def private_composition(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, str]:
    """The same call of a private operator: both lists in one text."""
    bank, coefficients, pieces, shapes = arguments.values()
    return bank, coefficients, checks.composition_text(pieces, shapes)


def repeat_arguments(
    modulation: str = "swish", dtype: torch.dtype = torch.float32, requires_grad: bool = False
) -> dict[str, Any]:
    """(2, 3, 3, 1) tiled to (5, 7, 3, 1); modulation swish (alpha, beta), gate or none."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    swish, gate = modulation == "swish", modulation == "gate"
    arguments = {
        "weight": torch.randn(2, 3, 3, 1, dtype=torch.float64).to(dtype),
        "alpha": torch.randn(3, 3, dtype=wide) if swish else None,
        "beta": torch.randn(3, 3, dtype=wide) if swish else None,
        "gate": torch.randn(5, 7, 3, 1, dtype=torch.float64).to(dtype) if gate else None,
        "out_channels": 5,
        "in_channels": 7,
    }
    if requires_grad:
        for tensor in tensors_of(arguments).values():
            tensor.requires_grad_()
    return arguments
