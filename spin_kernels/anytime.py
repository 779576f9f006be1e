"""What an ensemble's members cost, and how good its predictions are at every number of members."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .calibration import accuracy, check_targets, expected_calibration_error, negative_log_likelihood
from .flops import count_flops

if TYPE_CHECKING:
    from .ensemble import Ensemble

__all__ = ["Point", "anytime_curve"]

Batches = Iterable[tuple[Tensor, Tensor]]


class Point(NamedTuple):
    """Some members: FLOPs and seconds for one input, accuracy (0 to 1), NLL (nats), ECE (0 to 1; 15 bins)."""

    members: tuple[int, ...]
    flops: int
    seconds: float
    accuracy: float
    nll: float
    ece: float


def anytime_curve(ensemble: Ensemble, batches: Batches) -> list[Point]:
    """What the first 1, 2, ... members in the order of evaluation cost, and how good their average is.

    Every member is evaluated once on each batch. Its seconds for one input are the median over batches, so that the
    first batch, which warms up, counts where it is the only one. Held in memory: all logits.

    Args:
        ensemble: in eval mode.
        batches: (inputs (B, ...), targets (B,)), which are moved to the device of the ensemble.

    Raises:
        ValueError: no batches, targets that are no classes, or logits that are not finite.
        RuntimeError: a member is in training mode.
    """
    found = evaluate(ensemble, batches)
    flops = ensemble.flops(found.example)
    points = []
    for k in range(1, len(ensemble.order) + 1):
        members = ensemble.order[:k]
        chunks = zip(*(found.logits[member].split(4096) for member in members), strict=True)
        log_p = torch.cat([ensemble._average(chunk, list(range(k))) for chunk in chunks])
        cost = sum(flops[member] for member in members), sum(found.seconds[member] for member in members)
        metrics = (accuracy, negative_log_likelihood, expected_calibration_error)
        points.append(Point(members, *cost, *(metric(log_p, found.targets) for metric in metrics)))
    return points


class Outputs(NamedTuple):
    """Of every member: logits (N, classes) and the median of seconds per input over batches; targets; one input."""

    logits: list[Tensor]
    targets: Tensor
    seconds: list[float]
    example: Tensor


@torch.no_grad()
def evaluate(ensemble: Ensemble, batches: Batches) -> Outputs:
    """Evaluates every member once on each batch."""
    ensemble._check_eval()
    members = range(len(ensemble.order))
    logits: list[list[Tensor]] = [[] for _ in members]
    seconds: list[list[float]] = [[] for _ in members]
    goals, example = [], None
    for x, targets in batches:
        x, targets = x.to(ensemble.weights.device), targets.to(ensemble.weights.device)
        example = x[:1] if example is None else example
        for member in members:
            start = now(x)
            z = ensemble._logits(member, x, logits[0][-1] if member > 0 else None)
            seconds[member].append((now(x) - start) / len(x))
            if not z.isfinite().all():
                raise ValueError(
                    f"networks: expected finite logits, got others from member {member}; drop it or look at its weights"
                )
            check_targets(z, targets)
            logits[member].append(z)
        goals.append(targets)
    if example is None:
        raise ValueError("batches: expected one or more, got none; an iterator serves once, a list every time")
    return Outputs([torch.cat(z) for z in logits], torch.cat(goals), [statistics.median(s) for s in seconds], example)


class Clock:
    """The seconds that a member takes for one kind of batch: smoothed, and the fewest that were seen."""

    def __init__(self, seconds: float | None = None) -> None:
        self.estimate = self.fewest = seconds

    def took(self, seconds: float) -> None:
        if self.estimate is None:
            self.estimate = seconds  # with what only a first call does: the second one replaces it
        elif self.fewest is None:
            self.estimate = self.fewest = seconds
        else:
            self.estimate += 0.3 * (seconds - self.estimate)
            self.fewest = min(self.fewest, seconds)

    def fits(self, left: float) -> bool:
        """Whether to start the member with so many seconds left."""
        if self.estimate is None:
            return left > 0
        if self.estimate > left:
            # A slow call, or a first one, must not keep a member out for ever: while it waits, its estimate returns to
            # the fewest seconds that it was seen to take.
            self.estimate += 0.1 * ((self.fewest or 0.0) - self.estimate)
            return False
        return True


class Costs:
    """What one member takes: FLOPs for one input, by its shape, and a clock for each kind of batch."""

    def __init__(self) -> None:
        self._flops: dict[torch.Size, int] = {}
        self._clocks: dict[tuple[torch.Size, torch.dtype, torch.device], Clock] = {}

    def flops(self, network: nn.Module, x: Tensor) -> int:
        if x.shape not in self._flops:
            self._flops[x.shape] = count_flops(network, x)
        return self._flops[x.shape]

    def clock(self, x: Tensor) -> Clock:
        return self._clocks.setdefault((x.shape, x.dtype, x.device), Clock())

    def seconds(self, network: nn.Module, x: Tensor, repeats: int) -> float:
        network(x)
        times = [now(x)]
        for _ in range(repeats):
            network(x)
            times.append(now(x))
        median = statistics.median(end - start for start, end in pairwise(times))
        self._clocks[x.shape, x.dtype, x.device] = Clock(median)
        return median


def now(x: Tensor) -> float:
    """The time in seconds when the device of x has done all it was given."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
