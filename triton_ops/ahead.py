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

from .compose import compose_kernel
from .configs import DEVICES, DepthwiseTiles, every_choice
from .depthwise import depthwise_kernel
from .fused import fused_kernel
from .mixer import COMPOSE_BLOCK
from .product import product_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "float32": ("affine", "gain", "pw_affine", "dw_affine", "coefficients"),
    "chain": ("x", "y", "y_next", "taps", "bias", "pw_bias", "dw_bias", "matrix", "matrices", "templates"),
}
SIZES = ("height", "width", "M", "size")
KERNEL_SIZES = (3, 9)


def compiled(
    kernel: Any, item: int, arch: str, constants: dict[str, Any], **options: int
) -> triton.compiler.CompiledKernel:
    """As a call with aligned tensors would compile it; `item` bytes: float32 or bfloat16."""
    chain = "*fp32" if item == 4 else "*bf16"
    kinds = dict.fromkeys(POINTERS["float32"], "*fp32") | dict.fromkeys(POINTERS["chain"], chain)
    kinds |= dict.fromkeys(SIZES, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=TARGETS[arch], options=options)


def every_kernel(arch: str) -> Iterator[dict[str, Any]]:
    """Every kernel with every choice of tiles and the richest epilogue; and products with the plainest."""
    for item in (2, 4):
        k = compiled(compose_kernel, item, arch, {"TEMPLATES": 4, "BLOCK": COMPOSE_BLOCK})
        yield {"kernel": "compose", "item": item, "shared": k.metadata.shared}
    for channels, item, tiles in every_choice(DEVICES[arch]):
        shape = {"channels": channels, "item": item, "tiles": tiles}
        if isinstance(tiles, DepthwiseTiles):
            for size in KERNEL_SIZES:
                constants = {"C": channels, "KERNEL": size, "HAS_BIAS": True, "ACTIVATION": "gelu"}
                constants |= {"BLOCK_T": tiles.block_t, "BLOCK_C": tiles.block_c}
                k = compiled(depthwise_kernel, item, arch, constants, num_warps=tiles.warps)
                yield {"kernel": "depthwise", "size": size, **shape, "shared": k.metadata.shared}
            continue
        blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "C": channels}
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        if tiles.group_m == 1:
            constants = blocks | {"KERNEL": 3, "HAS_PW_BIAS": True, "HAS_DW_BIAS": True, "HAS_GAIN": True}
            constants |= {"RESIDUAL": True, "ACTIVATION": "gelu"}
            k = compiled(fused_kernel, item, arch, constants, **options)
            yield {"kernel": "fused", **shape, "shared": k.metadata.shared}
            continue
        for rich in (True, False):
            constants = blocks | {"GROUP_M": tiles.group_m, "HAS_BIAS": rich, "HAS_GAIN": rich, "RESIDUAL": rich}
            constants["ACTIVATION"] = "gelu" if rich else "relu"
            k = compiled(product_kernel, item, arch, constants, **options)
            yield {"kernel": "product", "rich": rich, **shape, "shared": k.metadata.shared}


if __name__ == "__main__":
    for found in every_kernel(sys.argv[1]):
        print(json.dumps(found), flush=True)
