"""Which tiles a call takes: a pure function of the problem and the device, every choice with its reason.

No search at run time: a first call does not wait, and results do not depend on what was measured before. What a choice
can be is listed by `every_choice`, which the tests compile ahead of time for every architecture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from triton import next_power_of_2

LARGEST_PLANE = 256  # tokens of an image that the fused kernel holds in one tile


@dataclass(frozen=True)
class Device:
    """What the choices depend on; bytes per block and of L2, and how many blocks run at once."""

    shared_bytes: int
    l2_bytes: int
    processors: int

    @staticmethod
    def of(device: torch.device) -> Device:
        if device.type != "cuda":
            return DEVICES["sm_90"]  # the interpreter takes what an H100 would
        p: Any = torch.cuda.get_device_properties(device)  # torch names no types for some of these
        return Device(p.shared_memory_per_block_optin, p.L2_cache_size, p.multi_processor_count)


# NVIDIA's and AMD's data sheets: A100, H100 SXM, B200, MI300X.
DEVICES = {
    "sm_80": Device(166_912, 40 << 20, 108),
    "sm_90": Device(232_448, 50 << 20, 132),
    "sm_100": Device(232_448, 126 << 20, 148),
    "gfx942": Device(65_536, 4 << 20, 304),
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


class VectorTiles(NamedTuple):
    """Of kernels without products."""

    block_t: int
    block_c: int
    warps: int
    reason: str


VECTOR_TILES = VectorTiles(64, 64, 4, "32 float32 values per thread: enough loads in flight, no spills")


def product_tiles(tokens: int, channels: int, item: int, device: Device) -> ProductTiles:
    """Of products; `item` in bytes. Few kinds: what a tile holds past the end is masked, and costs only small cases."""
    if item == 4:
        m, n, k, warps, reason = 64, 64, 32, 4, "float32 products run on the fma units: registers limit the tile"
    elif -(-tokens // 128) * -(-channels // 128) < device.processors:
        m, n, k, warps, reason = 64, 64, 64, 4, "tiles of 128 x 128 would leave processors idle"
    else:
        m, n, k, warps, reason = 128, 128, 64, 8, "the tensor cores' rate needs 128 x 128"
    m, n = (16 if tokens <= 16 else m), (64 if channels <= 64 else n)
    return fitting(ProductTiles(m, n, k, 8, warps, 4, reason), item, device)


def fused_tiles(images: int, plane: int, channels: int, item: int, device: Device) -> ProductTiles | None:
    """Of fused_kernel, or None where two kernels serve better: other planes, or too few programs for the device."""
    whole = next_power_of_2(plane)
    if item == 4 or plane > LARGEST_PLANE or plane < 0.75 * whole or plane < 16:
        return None
    n = 64 if channels <= 64 else 128  # wide: y comes from L2 once per tile of channels
    if images * -(-channels // n) < device.processors:
        return None
    return fitting(ProductTiles(whole, n, 64, 1, 8, 3, "an image's planes fit a tile"), item, device)


def fitting(tiles: ProductTiles, item: int, device: Device) -> ProductTiles:
    """With as many stages as shared memory holds."""
    while tiles.stages > 1 and tiles.shared_bytes(item) > device.shared_bytes:
        tiles = tiles._replace(stages=tiles.stages - 1)
    return tiles


def depthwise_tiles(plane: int) -> VectorTiles:
    return VECTOR_TILES._replace(block_t=16) if plane <= 16 else VECTOR_TILES


COMPOSE_BLOCK = 128  # 4 values of each template per lane: 64 to 128 registers, so 16 warps or more hide the memory


def templates_held(templates: int) -> int:
    """Of so many templates those that registers hold: 16 would take all registers, and fewer than 4 save little."""
    return 4 if templates <= 4 else 8


REPEAT_BLOCK = 256  # 8 values of the base per lane: enough loads in flight, and few sums over lanes per value


def repeat_groups(pieces: int, tiles: int, device: Device) -> int:
    """Groups of tiles that go to programs of their own: the fewest that occupy the device, of 8 tiles or more, because
    each writes a gradient of the base."""
    return max(1, min(16 * device.processors // pieces, tiles // 8))


def images_per_chunk(batch: int, plane: int, channels: int, item: int, device: Device) -> int:
    """Images that go through all blocks together: their x and y stay in half of L2, and all processors have a tile; of
    such numbers the one that leaves the fewest processors idle in the last wave of products."""
    stay = device.l2_bytes // 2 // (2 * plane * channels * item)
    busy = -(-device.processors * 128 * 128 // (plane * channels))
    most = max(1, stay, busy)
    if batch <= most:
        return batch

    def idle(images: int) -> float:
        if tiles := fused_tiles(images, plane, channels, item, device):
            rows = images  # one in a tile, however few tokens it has
        else:
            tiles = product_tiles(images * plane, channels, item, device)
            rows = -(-images * plane // tiles.block_m)
        waves = rows * -(-channels // tiles.block_n) / device.processors
        return round(math.ceil(waves) / waves, 2)

    return min(range(max(1, most // 2), most + 1), key=lambda images: (idle(images), -images))


class Choice(NamedTuple):
    kernel: str  # "product", "fused" or "depthwise"
    item: int
    tiles: ProductTiles | VectorTiles


def every_choice(device: Device) -> Iterator[Choice]:
    """What the functions above can return for this device, each once: sizes on both sides of every border."""
    sizes = [2**i + more for i in range(4, 9) for more in (0, 1)]
    found: dict[tuple, Choice] = {}
    for item in (2, 4):
        for size in (*sizes, 1 << 20):
            choices = [Choice("depthwise", item, depthwise_tiles(size))]
            for channels in (64, 1024):
                choices.append(Choice("product", item, product_tiles(size, channels, item, device)))
                if tiles := fused_tiles(1 << 10, size, channels, item, device):
                    choices.append(Choice("fused", item, tiles))
            for choice in choices:
                found.setdefault((choice.kernel, item, choice.tiles[:-1]), choice)
    yield from found.values()
