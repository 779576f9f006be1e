"""Bursts in rotating order over the providers, the others stopped; the median of the bursts' medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait

import psutil

from spinbench.networks import Case
from spinbench.worker import Worker, WorkerFailed

PREPARE_SECONDS = 240
DISTURBED = 0.05  # more of the processor than this used by other processes is worth a word
BURST_SECONDS = 60  # no answer by then is a failure


@dataclass(frozen=True)
class Method:
    most_calls: int = 15
    least_calls: int = 3
    burst_seconds: float = 0.5
    least_rounds: int = 5
    most_rounds: int = 15
    case_seconds: float = 15.0  # beyond least_rounds, rounds go on only until then
    # What cannot be the best is not waited for: calls that are longer than a second, and so many times longer than the
    # fastest provider's, are timed in one burst. PyTorch's bfloat16 is, on a processor without such instructions.
    hopeless: float = 10.0
    hopeless_seconds: float = 1.0


@dataclass
class Result:
    """What one provider did on one case: checked errors, then the median ms of each burst."""

    errors: dict[str, float | None]
    bursts: list[float] = field(default_factory=list)
    hopeless: bool = False

    @property
    def ms(self) -> float:
        return statistics.median(self.bursts)

    @property
    def spread(self) -> float | None:
        """Interquartile range of the bursts / median; None of a single burst."""
        if len(self.bursts) < 2:
            return None
        lower, _, upper = statistics.quantiles(self.bursts, n=4, method="inclusive")
        return (upper - lower) / self.ms


def prepare(
    workers: list[Worker], case: Case, timeout: float = PREPARE_SECONDS
) -> tuple[dict[str, Result], dict[str, str]]:
    """All workers build their provider at the same time, but those that choose kernels by timing them on a GPU: these
    one by one, last. Answers results without bursts, and failures."""
    alone = [worker for worker in workers if worker.name.startswith("autotune")]
    if alone and len(workers) > 1:
        results, failures = prepare([worker for worker in workers if worker not in alone], case, timeout)
        for worker in alone:
            more, failed = prepare([worker], case, timeout)
            results, failures = results | more, failures | failed
        return results, failures
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    pending: dict = {}
    for worker in workers:
        worker.resume()
        try:
            worker.send("prepare", case)
            pending[worker.connection] = worker
        except WorkerFailed as failure:
            failures[worker.name] = str(failure)
    end = time.monotonic() + timeout
    while pending:
        answered = wait(list(pending), max(0.0, end - time.monotonic()))
        if not answered:
            failures |= {worker.name: f"not ready within {timeout:.0f} s" for worker in pending.values()}
            break
        for connection in answered:
            worker = pending.pop(connection)
            try:
                results[worker.name] = Result(worker.receive(0))
            except WorkerFailed as failure:
                failures[worker.name] = str(failure)
    for worker in workers:
        if worker.name in failures and not worker.idle:
            worker.restart()
        worker.pause()
    return results, failures


def run(
    workers: list[Worker], results: dict[str, Result], method: Method, tick: Callable[[float], None]
) -> dict[str, str]:
    """Time every prepared provider; fills in the bursts, answers failures; `tick`: the fraction done, every round."""
    failures: dict[str, str] = {}
    ready = [worker for worker in workers if worker.name in results]
    start, rounds = time.monotonic(), 0
    while ready and rounds < method.most_rounds:
        if rounds >= method.least_rounds and time.monotonic() - start > method.case_seconds:
            break
        shift = rounds % len(ready)
        for worker in ready[shift:] + ready[:shift]:
            worker.resume()
            try:
                arguments = (method.most_calls, method.least_calls, method.burst_seconds)
                seconds = worker.call("burst", *arguments, timeout=BURST_SECONDS)
                results[worker.name].bursts.append(1e3 * statistics.median(seconds[1:]))
            except WorkerFailed as failure:
                failures[worker.name] = str(failure)
                del results[worker.name]
                if not worker.idle:
                    worker.restart()
            worker.pause()
        ready = [worker for worker in ready if worker.name in results]
        fastest = min((results[worker.name].ms for worker in ready), default=0.0)
        longest = max(1e3 * method.hopeless_seconds, method.hopeless * fastest)
        for worker in ready:
            results[worker.name].hopeless = results[worker.name].ms > longest
        ready = [worker for worker in ready if not results[worker.name].hopeless]
        rounds += 1
        tick(rounds / method.least_rounds)
    return failures


class Others:
    """The share of the processor that processes other than the benchmark's use between enter and exit."""

    def __init__(self, workers: list[Worker]):
        self.workers = workers
        self.share = 0.0

    def __enter__(self) -> Others:
        self.before = self._sample()
        return self

    def __exit__(self, *_) -> None:
        elapsed, busy, ours = (after - before for after, before in zip(self._sample(), self.before, strict=True))
        capacity = elapsed * (psutil.cpu_count() or 1)
        self.share = min(1.0, max(0.0, (busy - ours) / capacity)) if capacity > 0 else 0.0

    def _sample(self) -> tuple[float, float, float]:
        cpu, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(getattr(cpu, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        ours = own.user + own.system + sum(worker.cpu_seconds() for worker in self.workers)
        return time.monotonic(), busy, ours
