"""What `--suite compose` times: the weights of a network from a bank of templates (no torch in here).

The network is WRN-28-10 whose convolutions come from one bank, so that it has 10, 25, 50 or 100 % of its parameters.
forward     all weights from bank and coefficients; least bytes: the bank and the weights once
backward    the gradients of bank and coefficients from those of all weights; the bank, its gradient, the weights' once
step        a training step of the whole network at batch 32 (eager: the same network with weights of its own)
"""

from __future__ import annotations

from dataclasses import dataclass

STEP_BATCH = 32
STEP_PERCENT = 25
SIDE = 32  # of the images
KEPT = 24_362  # parameters that are no convolution's: BatchNorm and the classifier
NETWORK = "wrn_28_10"


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


@dataclass(frozen=True)
class Composition:
    """A case's network in the place of networks.Network."""

    percent: int
    what: str  # forward | backward | step

    depth = 28

    @property
    def name(self) -> str:
        return f"{NETWORK}_{self.percent}%_{self.what}"

    @property
    def bank(self) -> int:
        """Values of the bank; its coefficients, some hundred, are counted as if they were in it."""
        return round(self.percent / 100 * (WEIGHTS + KEPT)) - KEPT

    def flops(self, batch: int) -> int:
        """The least: a multiply-add for a value of a weight, two backward; of a step its convolutions, three times."""
        if self.what == "step":
            return batch * 3 * sum(2 * out * into * k * k * side**2 for out, into, k, side in convolutions())
        return (2 if self.what == "forward" else 4) * WEIGHTS

    def bytes(self, batch: int, dtype: str) -> int:
        item = {"float32": 4, "bfloat16": 2}[dtype]
        return item * (self.bank * (2 if self.what == "backward" else 1) + WEIGHTS)


COMPOSITIONS = (
    *(Composition(percent, what) for percent in (10, 25, 50, 100) for what in ("forward", "backward")),
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
