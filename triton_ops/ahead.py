"""Compiles ahead of time, for a device that need not be there, everything the configurations can ask for.

``python -m triton_ops.ahead sm_90`` prints one line of JSON per kernel: what it is and the shared memory it takes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import compose, elementwise, repeat
from .configs import (
    COMPOSE_BLOCK,
    DEVICES,
    REPEAT_BLOCK,
    VECTOR_TILES,
    ProductTiles,
    VectorTiles,
    every_choice,
    templates_held,
)
from .depthwise import depthwise_kernel
from .depthwise_training import depthwise_backward_kernel, depthwise_forward_kernel, taps_gradient_kernel
from .fused import fused_kernel
from .product import product_kernel
from .product_training import input_gradient_kernel, product_forward_kernel, weight_gradient_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Arguments by name; all others are tensors in the type of the chain.
FLOATS = (
    "affine", "gain", "pw_affine", "dw_affine", "coefficients", "norm", "norm_2", "stats", "factors",
    "affine_gradient", "parts", "alpha", "beta", "products", "coefficient_gradient",
)  # fmt: skip
SIZES = (
    "height", "width", "M", "tiles", "block", "period", "total", "batch", "images", "split_tokens", "cells_count",
    "first_program", *repeat.SIZES,
)  # fmt: skip
TABLES = ("firsts", "cells", "users", "sums", "terms")
CHANNELS = 768
KERNEL_SIZES = (3, 9)  # the loop over taps is the same code for all

Found = dict[str, Any]


def compiled(
    kernel: Any, item: int, arch: str, constants: dict[str, Any], parts: str = "*fp32", **options: int
) -> Found:
    """What a call with aligned tensors would compile; `item` bytes: float32 or bfloat16."""
    kinds = dict.fromkeys(kernel.arg_names, "*fp32" if item == 4 else "*bf16")
    kinds |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(SIZES, "i32") | {"parts": parts, "eps": "fp32"}
    kinds |= dict.fromkeys(TABLES, "*i64") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    result = triton.compile(source, target=TARGETS[arch], options=options)
    return {"kernel": kernel.__name__, "item": item, **constants, **options, "shared": result.metadata.shared}


def every_kernel(arch: str) -> Iterator[Found]:
    """Every kernel with every choice of tiles and the richest epilogue; products with the plainest, too."""
    for item in (2, 4):
        yield from of_elementwise(item, arch)
        yield from of_weights(item, arch)
    kinds = {"depthwise": of_depthwise, "fused": of_fused, "product": of_product}
    for choice in every_choice(DEVICES[arch]):
        yield from kinds[choice.kernel](choice.item, choice.tiles, arch)


def of_depthwise(item: int, tiles: VectorTiles, arch: str) -> Iterator[Found]:
    shape = {"C": CHANNELS, "KERNEL": KERNEL_SIZES[0], "BLOCK_T": tiles.block_t, "BLOCK_C": tiles.block_c}
    rich, options = {"HAS_BIAS": True, "ACTIVATION": "gelu"}, {"num_warps": tiles.warps}
    for size in KERNEL_SIZES:
        yield compiled(depthwise_kernel, item, arch, shape | rich | {"KERNEL": size}, **options)
    yield compiled(depthwise_forward_kernel, item, arch, shape | rich | {"BATCH": True}, "*fp64", **options)
    yield compiled(depthwise_backward_kernel, item, arch, shape | {"SUMS": True, "ACTIVATION": "gelu"}, **options)
    yield compiled(taps_gradient_kernel, item, arch, shape, **options)


def blocks_of(tiles: ProductTiles) -> tuple[dict[str, Any], dict[str, int]]:
    blocks = {"C": CHANNELS, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    return blocks, {"num_warps": tiles.warps, "num_stages": tiles.stages}


def of_fused(item: int, tiles: ProductTiles, arch: str) -> Iterator[Found]:
    blocks, options = blocks_of(tiles)
    rich = {"HAS_PW_BIAS": True, "HAS_DW_BIAS": True, "HAS_GAIN": True, "RESIDUAL": True, "ACTIVATION": "gelu"}
    yield compiled(fused_kernel, item, arch, blocks | rich | {"KERNEL": 3}, **options)


def of_product(item: int, tiles: ProductTiles, arch: str) -> Iterator[Found]:
    blocks, options = blocks_of(tiles)
    grouped = blocks | {"GROUP_M": tiles.group_m}
    rich = {"HAS_BIAS": True, "HAS_GAIN": True, "ACTIVATION": "gelu"}
    gradient = {"HAS_GAIN": True, "RESIDUAL": True, "ACTIVATION": "gelu"}
    plain = {"HAS_BIAS": False, "HAS_GAIN": False, "RESIDUAL": False, "ACTIVATION": "relu"}
    yield compiled(product_kernel, item, arch, grouped | plain, **options)
    yield compiled(product_kernel, item, arch, grouped | rich | {"RESIDUAL": True}, **options)
    yield compiled(product_forward_kernel, item, arch, grouped | rich | {"BATCH": True}, "*fp64", **options)
    yield compiled(input_gradient_kernel, item, arch, grouped | gradient, **options)
    yield compiled(weight_gradient_kernel, item, arch, blocks, **options)


def of_elementwise(item: int, arch: str) -> Iterator[Found]:
    tiles = VECTOR_TILES
    columns = {"C": CHANNELS, "BLOCK_C": tiles.block_c}
    shape, options = columns | {"BLOCK_T": tiles.block_t, "ACTIVATION": "gelu"}, {"num_warps": tiles.warps}
    yield compiled(elementwise.finish_moments_kernel, item, arch, columns, "*fp64", num_warps=1)
    yield compiled(elementwise.normalise_kernel, item, arch, shape | {"RESIDUAL": True, "TWO": True}, **options)
    yield compiled(elementwise.gradient_sums_kernel, item, arch, shape, **options)
    yield compiled(elementwise.finish_gradient_kernel, item, arch, columns | {"BATCH": True}, num_warps=1)
    yield compiled(elementwise.gradient_kernel, item, arch, shape | {"BATCH": True}, **options)


def of_weights(item: int, arch: str) -> Iterator[Found]:
    for templates in sorted({templates_held(n) for n in range(1, 65)}):
        shape = {"TEMPLATES": templates, "BLOCK": COMPOSE_BLOCK}
        yield compiled(compose.compose_kernel, item, arch, shape, num_warps=1)
        for add in (False, True):
            yield compiled(compose.compose_gradient_kernel, item, arch, shape | {"ADD": add}, num_warps=1)
    yield compiled(compose.coefficient_gradient_kernel, item, arch, {"BLOCK": compose.SUM_BLOCK}, num_warps=1)
    for modulation in ("plain", "swish", "gate"):
        shape = {"MODULATION": modulation, "BLOCK": REPEAT_BLOCK}
        yield compiled(repeat.repeat_kernel, item, arch, shape, num_warps=1)
        yield compiled(repeat.repeat_gradient_kernel, item, arch, shape, num_warps=1)


if __name__ == "__main__":
    for found in every_kernel(sys.argv[1]):
        print(json.dumps(found), flush=True)
