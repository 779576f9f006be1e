"""What `--suite compose` times: the weights of a network, made from fewer values (no torch in here).

The network is WRN-28-10 whose convolutions come from one bank, so that it has 10, 25, 50 or 100 % of its parameters, or
repeat smaller ones, modulated by swish. The source is the bank with its coefficients, or all the smaller weights with
their alpha and beta.
forward     all weights from the source; least bytes: the source and the weights once
backward    the gradients of the source from those of all weights; the source, its gradient, the weights' once
step        a training step of the whole network at batch 32 (eager: the same network with weights of its own)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

STEP_BATCH = 32
STEP_PERCENT = 25
SIDE = 32  # of the images
KEPT = 24_362  # parameters that are no convolution's: BatchNorm and the classifier
NETWORK = "wrn_28_10"
TILES = (2, 2)  # of a repeated convolution, over its output and its input channels
SWISH_FLOPS = 20  # of a value and of its gradient, mostly the exponential


def convolutions() -> list[tuple[int, int, int, int]]:
    """(out, in, side of the kernel, side of the output) of WRN-28-10."""
    found, channels, side = [(16, 3, 3, SIDE)], 16, SIDE
    for out, stride in ((160, 1), (320, 2), (640, 2)):
        side //= stride
        found += [(out, channels, 3, side), (out, out, 3, side), (out, channels, 1, side)]
        found += 6 * [(out, out, 3, side)]
        channels = out
    return found


WEIGHTS = sum(out * into * k * k for out, into, k, _ in convolutions())


class MadeWeights(ABC):
    """A case's network in the place of networks.Network."""

    what: str  # forward | backward | step
    name: str
    peers: tuple[str, ...]  # providers in plain PyTorch
    source: int  # values
    weights: int  # values

    depth = 28

    @abstractmethod
    def flops(self, batch: int) -> int: ...

    def bytes(self, batch: int, dtype: str) -> int:
        item = {"float32": 4, "bfloat16": 2}[dtype]
        return item * (self.source * (2 if self.what == "backward" else 1) + self.weights)


@dataclass(frozen=True)
class Composition(MadeWeights):
    """From a bank that leaves the network so many per cent of its parameters."""

    percent: int
    what: str

    weights = WEIGHTS

    @property
    def name(self) -> str:
        return f"{NETWORK}_{self.percent}%_{self.what}"

    @property
    def peers(self) -> tuple[str, ...]:
        return ("eager",) if self.what == "step" else ("product", "broadcast sum")

    @property
    def source(self) -> int:
        """Values of the bank; its coefficients, some hundred, are counted as if they were in it."""
        return round(self.percent / 100 * (WEIGHTS + KEPT)) - KEPT

    def flops(self, batch: int) -> int:
        """The least: a multiply-add for a value of a weight, two backward; of a step its convolutions, three times."""
        if self.what == "step":
            return batch * 3 * sum(2 * out * into * k * k * side**2 for out, into, k, side in convolutions())
        return (2 if self.what == "forward" else 4) * WEIGHTS


@dataclass(frozen=True)
class Repetition(MadeWeights):
    """Repeated weights, of all convolutions but that of the image."""

    what: str

    weights = sum(out * into * k * k for out, into, k, _ in convolutions()[1:])
    peers = ("eager",)

    @property
    def name(self) -> str:
        return f"{NETWORK}_repeated_{self.what}"

    @property
    def source(self) -> int:
        """Values that are repeated; alpha and beta, two for each of some hundred tiles, are left out."""
        return sum(-(-out // TILES[0]) * -(-into // TILES[1]) * k * k for out, into, k, _ in convolutions()[1:])

    def flops(self, batch: int) -> int:
        return SWISH_FLOPS * self.weights


COMPOSITIONS = (
    *(Composition(percent, what) for percent in (10, 25, 50, 100) for what in ("forward", "backward")),
    *(Repetition(what) for what in ("forward", "backward")),
    Composition(STEP_PERCENT, "step"),
)


def shares(rows: list[dict]) -> list[str]:
    """What making the weights takes of a training step, from the rows of a run."""
    ms = {row["net"]: row["ms"] for row in rows if row["provider"] == "spin" and row["dtype"] == "float32"}
    steps = [row for row in rows if row["net"] == Composition(STEP_PERCENT, "step").name]
    lines = [
        f"{row['provider']}: {row['between_mb']:.0f} MB between the passes of a step beside activations"
        for row in steps
    ]
    step = ms.get(Composition(STEP_PERCENT, "step").name)
    for percent in (10, 25, 50, 100):
        forward, backward = (ms.get(Composition(percent, what).name) for what in ("forward", "backward"))
        if step and forward and backward:
            share = (forward + backward) / step
            lines.append(f"weights from a bank of {percent} %: {share:.1%} of a training step at batch {STEP_BATCH}")
    return lines
