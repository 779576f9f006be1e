"""What is timed: the networks, and what each must at least cost (no torch in here).

Floor of a call = max(flops / peak of its dtype, bytes / copy bandwidth).

flops, per image of T tokens, depth D, width C, kernel k, patch p (a multiply-add is 2, padding taps count):
    stem       2 * 3 * p*p * C * T         depthwise  D * 2 * k*k * C * T
    pointwise  D * 2 * C * C * T           head       2 * C * classes
    activation (2 * D + 1) * C * T values (2 * D without a stem) times ACTIVATION_FLOPS
bytes: every distinct weight once in the call's dtype, the float32 input and the float32 output once.

A training step (forward, cross-entropy, backward) counts every product and convolution three times, the stem, whose
input needs no gradient, twice, and the activations twice (value and derivative); its bytes three times.
"""

from __future__ import annotations

from dataclasses import dataclass

from spinbench.compositions import COMPOSITIONS, STEP_BATCH, MadeWeights

# Of polynomials of the usual accuracy: about 7 multiply-adds and a blend for GELU; one maximum for ReLU.
ACTIVATION_FLOPS = {"gelu": 16, "gelu_tanh": 16, "silu": 16, "relu": 1, "identity": 0}
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Network:
    """A ConvMixer-like network; patch 0: blocks alone, fed with `side` x `side` tokens of `dim` channels."""

    name: str
    dim: int
    depth: int
    kernel: int
    side: int  # of the image, or of the token grid where patch is 0
    patch: int = 0
    classes: int = 1000
    activation: str = "gelu"
    pw_residual: bool = False
    rate: int = 1  # consecutive blocks that use one pointwise matrix

    @property
    def tokens(self) -> int:
        return (self.side // self.patch if self.patch else self.side) ** 2

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        return (batch, 3 if self.patch else self.dim, self.side, self.side)

    def flops(self, batch: int) -> int:
        c, t, d = self.dim, self.tokens, self.depth
        total = d * 2 * (self.kernel**2 + c) * c * t + 2 * d * c * t * ACTIVATION_FLOPS[self.activation]
        if self.patch:
            total += 2 * 3 * self.patch**2 * c * t + c * t * ACTIVATION_FLOPS[self.activation] + 2 * c * self.classes
        return batch * total

    def training_flops(self, batch: int) -> int:
        c, t = self.dim, self.tokens
        activation = (2 * self.depth + bool(self.patch)) * c * t * ACTIVATION_FLOPS[self.activation]
        stem = 2 * 3 * self.patch**2 * c * t
        return 3 * self.flops(batch) - batch * (activation + stem)

    def bytes(self, batch: int, dtype: str) -> int:
        c, d, matrices = self.dim, self.depth, -(-self.depth // self.rate)
        weights = d * (self.kernel**2 + 1) * c + matrices * (c + 1) * c
        image = c * self.side**2
        output = image
        if self.patch:
            weights += (3 * self.patch**2 + 1) * c + (c + 1) * self.classes
            image, output = 3 * self.side**2, self.classes
        affines = 4 * 2 * c * (2 * d + (1 if self.patch else 0))  # BatchNorm scale and shift stay float32
        return weights * ITEM_BYTES[dtype] + affines + 4 * batch * (image + output)


def floor_ms(flops: int, bytes: int, dtype: str, peaks: dict[str, float]) -> float:
    """Least ms of a call; bfloat16 kernels may compute in float32, so theirs is the higher of both peaks."""
    gflops = peaks["float32_gflops"]
    if dtype == "bfloat16":
        gflops = max(gflops, peaks["bfloat16_gflops"])
    return max(flops / gflops, bytes / peaks["copy_gbps"]) / 1e6


@dataclass(frozen=True)
class Case:
    network: Network | MadeWeights
    batch: int
    dtype: str
    training: bool = False  # a step, bfloat16 by autocast, instead of a forward pass

    @property
    def flops(self) -> int:
        return self.network.training_flops(self.batch) if self.training else self.network.flops(self.batch)

    @property
    def bytes(self) -> int:
        return (3 if self.training else 1) * self.network.bytes(self.batch, self.dtype)


NETWORKS = (
    Network("ws_convmixer_768_32_k3_p14_s2", 768, 32, 3, 224, 14, activation="relu", pw_residual=True, rate=2),
    Network("convmixer_1024_20_k9_p14", 1024, 20, 9, 224, 14),
    Network("convmixer_256_8_k5_p2", 256, 8, 5, 32, 2, classes=10),
)
BLOCKS = tuple(
    Network(f"block_{dim}_k{kernel}", dim, 1, kernel, 16)
    for dim in (64, 128, 256, 512, 768, 1024, 1536)
    for kernel in (3, 5, 7, 9)
)
SHARING = tuple(
    Network(
        f"blocks_{dim}_32_k{kernel}_s{rate}",
        dim,
        32,
        kernel,
        16,
        activation="relu",
        pw_residual=True,
        rate=rate,
    )
    for dim, kernel in ((768, 3), (256, 5))
    for rate in (1, 2, 4, 8, 16, 32)
)
TRAIN = (NETWORKS[0], NETWORKS[2])
LARGE = (*NETWORKS[:2], Network("convmixer_1536_20_k9_p7", 1536, 20, 9, 224, 7))  # for GPUs
SUITES = {
    "cpu": {"networks": NETWORKS, "blocks": BLOCKS, "sharing": SHARING, "train": TRAIN, "compose": COMPOSITIONS},
    "cuda": {"networks": LARGE, "blocks": BLOCKS, "sharing": SHARING, "train": LARGE},
}
TRAIN_BATCH = {TRAIN[0].name: 4, TRAIN[1].name: 32}


def batches_of(suite: str, network: Network | MadeWeights, device: str) -> list[int]:
    """Where none are asked for; on a GPU those that fill it come first, for a run that is cut short."""
    if isinstance(network, MadeWeights):
        return [STEP_BATCH if network.what == "step" else 1]
    if device == "cuda":
        return {"networks": [64, 1, 256, 16], "train": [32, 128]}.get(suite, [64])
    return {"networks": [1, 8], "train": [TRAIN_BATCH.get(network.name, 1)]}.get(suite, [1])


def cases(
    suite: str, batches: list[int] | None, dtypes: list[str], quick: bool = False, device: str = "cpu"
) -> list[Case]:
    """The cases of a suite, network by network; quick keeps its smallest network, at the first of its batches."""
    networks = SUITES[device][suite]
    if quick:
        networks = (min(networks, key=lambda network: network.flops(1)),)
    return [
        Case(network, batch, dtype, suite == "train")
        for network in networks
        for batch in batches or batches_of(suite, network, device)[: 1 if quick else None]
        for dtype in dtypes
    ]
