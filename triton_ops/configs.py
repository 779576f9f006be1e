"""Which tiles a call takes: a pure function of the problem and the device, every choice with its reason.

No search at run time: a first call does not wait, and results do not depend on what was measured before. What a choice
can be is listed by `every_choice`, which the tests compile ahead of time for every architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from triton import next_power_of_2

LARGEST_PLANE = 256  # tokens of an image that the fused kernel holds in one tile


@dataclass(frozen=True)
class Device:
    """What the choices depend on; bytes per block and of L2, and how many blocks run at once."""

    arch: str
    shared_bytes: int
    l2_bytes: int
    processors: int

    @staticmethod
    def of(device: torch.device) -> Device:
        if device.type != "cuda":
            return DEVICES["sm_90"]  # the interpreter takes what an H100 would
        p = torch.cuda.get_device_properties(device)
        arch = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
        return Device(arch, p.shared_memory_per_block_optin, p.L2_cache_size, p.multi_processor_count)


# NVIDIA's and AMD's data sheets: A100, H100 SXM, B200, MI300X.
DEVICES = {
    "sm_80": Device("sm_80", 166_912, 40 << 20, 108),
    "sm_90": Device("sm_90", 232_448, 50 << 20, 132),
    "sm_100": Device("sm_100", 232_448, 126 << 20, 148),
    "gfx942": Device("gfx942", 65_536, 4 << 20, 304),
}


class ProductTiles(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    warps: int
    stages: int
    reason: str

    def shared_bytes(self, item: int) -> int:
        return (self.block_m + self.block_n) * self.block_k * item * self.stages


class DepthwiseTiles(NamedTuple):
    block_t: int
    block_c: int
    warps: int
    reason: str


def block(size: int, most: int) -> int:
    """A power of two for `size`, at least the 16 that a product needs."""
    return max(16, min(most, next_power_of_2(size)))


def product_tiles(tokens: int, channels: int, item: int, device: Device) -> ProductTiles:
    """Of product_kernel; `item` in bytes."""
    if item == 4:
        m, n, k, warps, reason = 64, 64, 32, 4, "float32 products run on the fma units: registers limit the tile"
    elif -(-tokens // 128) * -(-channels // 128) < device.processors:
        m, n, k, warps, reason = 64, 64, 64, 4, "tiles of 128 x 128 would leave processors idle"
    else:
        m, n, k, warps, reason = 128, 128, 64, 8, "the tensor cores' rate needs 128 x 128"
    tiles = ProductTiles(block(tokens, m), block(channels, n), block(channels, k), 8, warps, 4, reason)
    return fitting(tiles, item, device)


def fused_tiles(plane: int, channels: int, item: int, device: Device) -> ProductTiles | None:
    """Of fused_kernel, or None where two kernels serve better."""
    whole = next_power_of_2(plane)
    if item == 4 or plane > LARGEST_PLANE or plane < 0.75 * whole or plane < 16:
        return None
    tiles = ProductTiles(whole, block(channels, 64), block(channels, 64), 1, 8, 4, "an image's planes fit a tile")
    return fitting(tiles, item, device)


def fitting(tiles: ProductTiles, item: int, device: Device) -> ProductTiles:
    """With as many stages as shared memory holds."""
    while tiles.stages > 1 and tiles.shared_bytes(item) > device.shared_bytes:
        tiles = tiles._replace(stages=tiles.stages - 1)
    return tiles


def depthwise_tiles(plane: int, channels: int) -> DepthwiseTiles:
    """32 sums per thread: enough loads in flight, no spills."""
    block_c = block(channels, 64)
    return DepthwiseTiles(min(next_power_of_2(plane), 4096 // block_c), block_c, 4, "32 sums per thread")


def elementwise_tiles(tokens: int, channels: int) -> DepthwiseTiles:
    """Of what only passes over activations: as many values per thread, more tokens, fewer parts to add."""
    block_c = block(channels, 64)
    return DepthwiseTiles(block(tokens, 4096 // block_c), block_c, 4, "32 values per thread")


def images_per_chunk(batch: int, plane: int, channels: int, item: int, device: Device) -> int:
    """Images that go through all blocks together: their x and y stay in half of L2, and all processors have a tile."""
    stay = device.l2_bytes // 2 // (2 * plane * channels * item)
    busy = -(-device.processors * 128 * 128 // (plane * channels))
    return max(1, min(batch, max(stay, busy)))


def every_choice(device: Device) -> Iterator[tuple[int, int, ProductTiles | DepthwiseTiles]]:
    """(channels, item, tiles): what the functions above return for this device, each kind once."""
    seen = set()
    for channels in (1536, 768, 256, 64, 16):
        for item in (2, 4):
            for tokens in (49, 196, 256, 1024, 64 * 1024):
                for tiles in (
                    product_tiles(tokens, channels, item, device),
                    fused_tiles(tokens, channels, item, device),
                    depthwise_tiles(tokens, channels),
                ):
                    key = (item, type(tiles), tiles and tiles[:-1])
                    if tiles and key not in seen:
                        seen.add(key)
                        yield channels, item, tiles
