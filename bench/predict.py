"""Predicts what the GPU kernels take on a GPU that is not here: `python bench/predict.py` prints a table.

The cost models of the kernels' headers, added up in the order in which triton_ops/mixer.py, training.py and
csrc/cuda/mixer.cu launch them.
A kernel takes the longest of: its products on the tensor cores, its other operations on the lanes, its bytes. Nothing
in here was measured; a figure from it is a prediction, to be held against bench/run.py --device cuda.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.table import Table
from spinbench.networks import LARGE, Network

from spin_kernels.dispatch import hopper_images
from triton_ops import configs

ITEM = 2  # bytes: bfloat16
BATCHES, TRAINING_BATCHES = (1, 16, 64, 256), (32, 128)
# Operations of a lane per value: a tap converts, multiplies and pays for masks and addresses.
TAP, AFFINE = 3, 4
ACTIVATION = {"relu": 1, "gelu": 16}  # erf's polynomial and an exponential
DERIVATIVE = {"relu": 1, "gelu": 26}


@dataclass(frozen=True)
class Rates:
    """Of an H100 SXM: NVIDIA's data sheet at 1,755 MHz where nothing else is said; bytes and operations per second."""

    products: float = 0.6 * 989e12  # a good Triton product's part of the peak: an assumption
    lanes: float = 132 * 128 * 1.755e9
    l2: float = 132 * 38 * 1.755e9  # 38 bytes a clock and processor: NVIDIA's developer forum, topic 355253
    memory: float = 0.9 * 3.35e12  # of the peak what copies reach: an assumption
    launch: float = 1.3e-6  # in a CUDA graph: HazyResearch, "Look Ma, No Bubbles"


@dataclass(frozen=True)
class Kernel:
    """What one launch does, per value of an activation: tensors moved, C-long products, operations of a lane."""

    tensors: int
    products: int = 0
    lanes: int = 0


def seconds(
    kernel: Kernel, tokens: int, channels: int, rates: Rates, in_l2: bool, tiles: configs.ProductTiles | None = None
) -> float:
    values = tokens * channels
    products = 2 * channels * values * kernel.products / rates.products
    if kernel.products:
        device = configs.DEVICES["sm_90"]
        tiles = tiles or configs.product_tiles(tokens, channels, ITEM, device)
        count = math.ceil(tokens / tiles.block_m) * math.ceil(channels / tiles.block_n)
        products *= math.ceil(count / device.processors) * device.processors / count  # the last wave is not full
        # Both operands come from L2 once per tile; the shape is the product's own.
        moved = ITEM * values * channels * (1 / tiles.block_m + 1 / tiles.block_n)
        products = max(products, moved * kernel.products / rates.l2)
    bytes_ = ITEM * values * kernel.tensors / (rates.l2 if in_l2 else rates.memory)
    return max(products, kernel.lanes * values / rates.lanes, bytes_) + rates.launch


def inference(network: Network, batch: int, rates: Rates) -> float:
    """Of the blocks; the stem and the head are a few per cent."""
    device, plane, c = configs.DEVICES["sm_90"], network.tokens, network.dim
    act = ACTIVATION[network.activation] + AFFINE
    taps = TAP * network.kernel**2 + act
    residual = int(network.pw_residual)
    chunk = configs.images_per_chunk(batch, plane, c, ITEM, device)
    total, left = 0.0, batch
    while left > 0:
        tokens = min(chunk, left) * plane
        depthwise = seconds(Kernel(2, lanes=taps), tokens, c, rates, True)
        product = seconds(Kernel(2 + residual, products=1, lanes=act), tokens, c, rates, True)
        fused = configs.fused_tiles(chunk, plane, c, ITEM, device)
        both = product + depthwise  # the halves of a fused program follow each other
        if fused:
            both = seconds(Kernel(2 + residual, products=1, lanes=act), tokens, c, rates, True, fused)
            both += seconds(Kernel(1, lanes=taps), tokens, c, rates, True) - rates.launch
        total += depthwise + (network.depth - 1) * both + product
        left -= chunk
    return total


def hopper(network: Network, batch: int, rates: Rates) -> float | None:
    """Of the blocks through csrc/cuda, by the model in mixer_shape.h; None where a plane does not fit its tile."""
    side = round(network.tokens**0.5)
    images = hopper_images(side, side)
    if images == 0:
        return None
    clock, processors = 1.755e9, configs.DEVICES["sm_90"].processors
    act = {"relu": 1, "gelu": 17}[network.activation]
    image_rows = sum(min(network.kernel, network.kernel // 2 + 1 + min(r, side - 1 - r)) for r in range(side)) / side
    finish, convolution = 128 + 112 * network.pw_residual + 32 * act, 208 + 32 * act
    convolution += image_rows * {3: 171, 5: 233, 7: 209, 9: 235}[network.kernel]
    product = 128 * 256 * network.dim / 2048 / 0.8 + 700
    tiles = math.ceil(batch / images) * math.ceil(network.dim / 128)
    waves = math.ceil(tiles / processors)

    def launch(*clocks: float) -> float:
        moved = 2 * ITEM * batch * network.tokens * network.dim / rates.memory
        return max(waves * max(clocks) / clock, moved) + rates.launch

    middle = launch(product, 8 * (finish + convolution))
    return launch(8 * convolution) + (network.depth - 1) * middle + launch(product, 8 * finish)


def training(network: Network, batch: int, rates: Rates) -> float:
    """Forward and backward of the blocks with batch statistics: what training.py launches for one, depth times."""
    tokens, c = batch * network.tokens, network.dim
    act, slope = ACTIVATION[network.activation] + AFFINE, DERIVATIVE[network.activation] + AFFINE
    taps, residual = TAP * network.kernel**2, int(network.pw_residual)
    through = Kernel(3, lanes=slope)
    kernels = [
        Kernel(2, lanes=taps + act),  # depthwise
        Kernel(3, lanes=act),  # y
        Kernel(2, products=1, lanes=act),
        Kernel(2 + residual, lanes=act),  # the block's output
        through,
        Kernel(3, lanes=act),  # y again
        Kernel(2, products=1),  # of the matrix
        Kernel(3 + residual, products=1, lanes=act),  # of y, with sums
        through,
        Kernel(4, lanes=taps + act),  # of the input, with sums
        Kernel(2, lanes=taps),  # of the taps
        Kernel(2 + 2 * residual, lanes=act * (1 + residual)),  # the block's input again
    ]
    in_l2 = 4 * ITEM * tokens * c < configs.DEVICES["sm_90"].l2_bytes
    return network.depth * sum(seconds(kernel, tokens, c, rates, in_l2) for kernel in kernels)


def main() -> None:
    rates = Rates()
    table = Table(box=box.MARKDOWN, title="predicted ms on an H100 SXM, bfloat16; nothing here was measured")
    table.add_column("network")
    for batch in BATCHES:
        table.add_column(f"batch {batch}", justify="right")
    for batch in TRAINING_BATCHES:
        table.add_column(f"step, batch {batch}", justify="right")
    for network in LARGE:
        times = [inference(network, batch, rates) for batch in BATCHES]
        times += [training(network, batch, rates) for batch in TRAINING_BATCHES]
        table.add_row(network.name, *(f"{1e3 * time:.3g}" for time in times))
        if all(own := [hopper(network, batch, rates) for batch in BATCHES]):
            per_block = 1e6 * own[-1] / BATCHES[-1] / network.depth
            note = f"{network.name}, csrc/cuda, {per_block:.2f} us per image and block"
            table.add_row(note, *(f"{1e3 * time:.3g}" for time in own), "", "")
    Console(width=180).print(table)
    free = replace(rates, lanes=math.inf, l2=math.inf, memory=math.inf, launch=0.0)
    parts = [inference(network, 256, free) / inference(network, 256, rates) for network in LARGE]
    print("products' part of the time at batch 256: " + ", ".join(f"{part:.0%}" for part in parts))


if __name__ == "__main__":
    main()
