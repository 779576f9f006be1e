"""A run: starts the workers, makes, prepares and times every case, and collects the rows as they finish."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from spinbench import catalog, timing
from spinbench.compositions import MadeWeights
from spinbench.machine import Ceilings
from spinbench.networks import Case, Network
from spinbench.worker import Worker, WorkerFailed

SEED = 20
MAKE_SECONDS = 300
COMPILE_SECONDS = 600  # of forward and backward, in two layouts at a time
PEAK_SECONDS = 0.3
PEAK_TRIES = 5
PACE_SECONDS = 0.1


# Relative L2. Ours may be this many times as wrong as eager PyTorch in the same dtype, in float32 always this much.
OUTPUT_ERROR, GRADIENT_ERROR = (1.5, 1e-5), (2.0, 1e-4)


def wrong(results: dict[str, timing.Result], dtype: str, training: bool = False) -> dict[str, str]:
    """Which of ours are too far from the float64 reference; without eager, only float32 is judged."""
    eager = [result.errors["error"] for name, result in results.items() if name in catalog.PEERS["eager"]]
    factor, least = GRADIENT_ERROR if training else OUTPUT_ERROR
    limit = max(factor * max(eager, default=0.0), least if dtype == "float32" else 0.0)
    return {
        name: f"wrong: its error {result.errors['error']:.1e} is above {limit:.1e}"
        for name, result in results.items()
        if name in catalog.OURS and limit and result.errors["error"] > limit
    }


class Session:
    """Rows and failures fill up case by case, so that an interrupted run keeps its finished cases."""

    def __init__(self, providers: list[str], threads: int, device: str):
        self.rows: list[dict] = []
        self.failures: list[dict] = []
        self.ceilings = Ceilings()
        self.hopeless: dict[tuple[str, str], str] = {}  # provider and dtype -> why it is not asked again
        self.folder = Path(tempfile.mkdtemp(prefix="spin-bench-"))
        self.made: Network | None = None
        self.started: list[Worker] = []
        try:
            for name in ("maker", *providers):
                self.started.append(Worker(name, self.folder, threads, device))
            for worker in self.started:
                worker.wait_ready()
                worker.pause()
        except BaseException:
            self.close()
            raise
        self.device = device
        self.maker, *self.workers = self.started

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.started:
            worker.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, cases: list[Case], method: timing.Method, progress: Callable[[str, float], None]) -> None:
        """`progress` gets a text and the fraction of the whole run that is done."""
        batches: dict[Network, int] = {}
        for case in cases:
            batches[case.network] = max(case.batch, batches.get(case.network, 0))
        for index, case in enumerate(cases):

            def tell(text: str, done: float, index: int = index, case: Case = case) -> None:
                progress(
                    f"{case.network.name} batch {case.batch} {case.dtype}: {text}",
                    (index + done) / len(cases),
                )

            tell("making weights and reference" if case.network != self.made else "preparing", 0.0)
            self.measure_ceilings()
            if case.network != self.made:
                self.ask_maker("make", case.network, batches[case.network], SEED, case.training, timeout=MAKE_SECONDS)
                self.made = case.network
            self.run_case(case, method, tell)

    def run_case(self, case: Case, method: timing.Method, tell: Callable[[str, float], None]) -> None:
        tell("preparing", 0.1)
        absent = {worker.name: self.absent(worker.name, case.dtype) for worker in self.workers}
        part = [worker for worker in self.workers if catalog.takes_part(worker.name, case.network)]
        workers = [worker for worker in part if absent[worker.name] is None]
        results, failures = timing.prepare(workers, case, COMPILE_SECONDS if case.training else timing.PREPARE_SECONDS)
        paces: list[float] = []

        def after_round(done: float) -> None:
            if self.device == "cpu" and self.ceilings.peaks:
                paces.append(self.ask_maker("pace", PACE_SECONDS, timeout=60))
            tell("timing", 0.6 + 0.4 * min(1.0, done))

        with timing.Others(self.started) as others:
            failures |= timing.run(workers, results, method, after_round)
        failures |= wrong(results, case.dtype, case.training)
        # Ways of making weights are few, and differ from case to case: those are asked again.
        fastest = min((result.ms for result in results.values()), default=0.0)
        for name, result in results.items():
            if result.hopeless and name not in catalog.OURS and not isinstance(case.network, MadeWeights):
                self.hopeless[name, case.dtype] = (
                    f"took {result.ms / fastest:.0f} times as long as the fastest in the case {case.network.name} "
                    f"batch {case.batch} {case.dtype}"
                )
        key = {"net": case.network.name, "batch": case.batch, "dtype": case.dtype}
        failures |= {name: reason for name, reason in absent.items() if reason}
        self.failures += [{**key, "provider": name, "reason": reason} for name, reason in failures.items()]
        self.rows += [
            {
                **key,
                "provider": worker.name,
                "depth": case.network.depth,
                "ms": results[worker.name].ms,
                "spread": results[worker.name].spread,
                "bursts": results[worker.name].bursts,
                **results[worker.name].errors,
                "flops": case.flops,
                "bytes": case.bytes,
                "other_processes": others.share,
                "pace_gflops": statistics.median(paces) if paces else None,
            }
            for worker in workers
            if worker.name in results
        ]

    def absent(self, provider: str, dtype: str) -> str | None:
        """Why a provider is not asked at this dtype, or None."""
        return self.hopeless.get((provider, dtype)) or catalog.unsupported(provider, dtype)

    def measure_ceilings(self) -> None:
        """Tries a few times for a quiet moment, keeps the highest of the run: a low ceiling would flatter a row."""
        for _ in range(PEAK_TRIES):
            with timing.Others(self.started) as others:
                try:
                    measured = self.ask_maker("peaks", PEAK_SECONDS, timeout=60)
                except WorkerFailed as failure:
                    self.ceilings.failure = str(failure)
                    return
            self.ceilings.add(measured, others.share)
            if others.share <= timing.DISTURBED:
                return

    def ask_maker(self, command: str, *arguments, timeout: float):
        self.maker.resume()
        try:
            return self.maker.call(command, *arguments, timeout=timeout)
        finally:
            self.maker.pause()
