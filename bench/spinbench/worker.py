"""One process per provider, because thread pools spin: all but the one timed are stopped by a signal."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from spinbench.compositions import MadeWeights
from spinbench.networks import Case, Network

START_SECONDS = 60
CHECKED_IMAGES = 16  # of a batch against float64; also what BatchNorm's statistics are taken from
FLUSH_BYTES = 256 << 20  # more than any L2


class WorkerFailed(Exception):
    """What a worker was asked for did not happen; the message is the reason."""


class Worker:
    """The parent's handle on one process: `start`, then `wait_ready`; `call` is send and receive."""

    def __init__(self, name: str, folder: Path, threads: int, device: str):
        self.name, self.folder, self.threads, self.device = name, folder, threads, device
        self.idle = False  # alive, and no command under way
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child = context.Pipe()
        arguments = (child, self.name, str(self.folder), self.threads, self.device)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is the parent's to handle
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, previous)
        child.close()

    def wait_ready(self) -> None:
        self.receive(START_SECONDS)

    def send(self, command: str, *arguments) -> None:
        self.idle = False
        try:
            self.connection.send((command, arguments))
        except OSError:
            raise WorkerFailed(self.obituary()) from None

    def receive(self, timeout: float):
        """The answer; WorkerFailed with the reason if it failed, is late or the process died."""
        try:
            if not self.connection.poll(timeout):
                raise WorkerFailed(f"no answer within {timeout:.0f} s")
            ok, answer = self.connection.recv()
        except (EOFError, ConnectionError):
            raise WorkerFailed(self.obituary()) from None
        self.idle = True
        if not ok:
            raise WorkerFailed(answer)
        return answer

    def call(self, command: str, *arguments, timeout: float):
        self.send(command, *arguments)
        return self.receive(timeout)

    def obituary(self) -> str:
        self.process.join(5)
        return f"its process ended with exit code {self.process.exitcode}"

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.join(5)
        self.connection.close()

    def restart(self) -> None:
        self.stop()
        self.start()
        self.wait_ready()

    def cpu_seconds(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def serve(connection: Connection, name: str, folder: str, threads: int, device: str) -> None:
    """The loop: (command, arguments) in, (True, answer) or (False, reason) out, until the pipe closes."""
    os.setpgrp()  # so that a signal reaches what this process starts, and the terminal's Ctrl-C does not
    log = os.open(Path(folder) / f"{name.replace(' ', '_')}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        TORCHINDUCTOR_CACHE_DIR=str(Path(folder) / "inductor"),
        TORCHINDUCTOR_COMPILE_THREADS=str(max(1, threads // 2)),  # several workers compile at once
    )
    state = WorkerState(name, Path(folder), threads, device)
    connection.send((True, "started"))
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(state, command)(*arguments))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            lines = str(error).strip().splitlines() or [""]
            answer = (False, f"{type(error).__name__}: {lines[0][:300]}")
        connection.send(answer)


class WorkerState:
    """The commands. torch is imported by the first that needs it, after the environment is set."""

    def __init__(self, name: str, folder: Path, threads: int, device: str):
        self.name, self.folder, self.threads, self.device = name, folder, threads, device

    def cuda_name(self) -> str | None:
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None

    def peaks(self, seconds: float) -> dict[str, float]:
        """This machine's ceilings: {float32,bfloat16}_gflops and copy_gbps."""
        if self.device == "cuda":
            return cuda_peaks(seconds)
        from spin_kernels import spin_runtime

        return spin_runtime.measure_peaks(self.threads, seconds)

    def pace(self, seconds: float) -> float:
        """float32 multiply-adds in registers that the machine gives right now, GFLOP/s."""
        from spin_kernels import spin_runtime

        return spin_runtime.multiply_add_rate(self.threads, seconds)

    def make(self, network: Network, batch: int, seed: int, training: bool) -> None:
        """Write weights, inputs and the float64 outputs of the first images (training: gradients) of a network, for all
        workers to load."""
        import torch

        torch.set_num_threads(self.threads)
        if isinstance(network, MadeWeights):
            from spinbench import composing

            found = {"reference": composing.reference(network, batch, seed), "seed": seed}
            torch.save(found, self.folder / f"{network.name}.pt")
            return
        from spinbench import plain

        x = plain.make_input(network, batch, seed)
        model = plain.make_plain(network, x[:CHECKED_IMAGES], seed)
        state = model.state_dict()  # keeps the float32 tensors: double() below puts new ones in the model
        if training:
            from spinbench.training import gradient, loss_of

            model = model.to(self.device, torch.float64).train()
            model.recompute = self.device == "cuda"  # its batches are large
            loss_of(model, x.to(self.device, torch.float64)).backward()
            reference = gradient(model)
        else:
            with torch.no_grad():
                reference = model.to(self.device, torch.float64)(x[:CHECKED_IMAGES].to(self.device, torch.float64))
        torch.save({"state": state, "x": x, "reference": reference.cpu()}, self.folder / f"{network.name}.pt")
        self.release()

    def prepare(self, case: Case) -> dict[str, float | None]:
        """Build this worker's provider and compare its output; answers relative L2 and max error."""
        import torch

        from spinbench import plain, providers

        self.run = None
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(case.training)
        torch.compiler.reset()
        data = torch.load(self.folder / f"{case.network.name}.pt")
        if isinstance(case.network, MadeWeights):
            from spinbench import composing

            torch.set_grad_enabled(True)
            self.run, output, figures = composing.prepare(self.name, case, data["seed"])
            return errors_of(output, data["reference"]) | figures
        x = data["x"][: case.batch].to(self.device)
        reference = data["reference"] if case.training else data["reference"][: case.batch]
        model = plain.load_plain(case.network, data["state"])
        folder = self.folder / self.name.replace(" ", "_")
        folder.mkdir(exist_ok=True)
        job = providers.Job(case, model, x, self.threads, folder)
        memory: dict[str, float] = {}
        if case.training:
            from spinbench.training import make_step

            run, memory = make_step(self.name, job)
        else:
            run = providers.BUILDERS[self.name](job)
        for _ in range(2):  # the first call may compile
            output = torch.as_tensor(run()).clone()
        if not case.training:
            output = output[: len(reference)]
        errors = errors_of(output, reference)
        self.run = run
        self.release()
        return errors | memory

    def burst(self, most_calls: int, least_calls: int, seconds: float) -> list[float]:
        """Seconds of each call: at most `most_calls`, about `seconds` in all, at least `least_calls`."""
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < least_calls or (len(times) < most_calls and time.perf_counter() < end):
            self.flush()
            start = time.perf_counter()
            self.run()
            self.wait()
            times.append(time.perf_counter() - start)
        self.release()
        return times

    def wait(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def flush(self) -> None:
        """Replaces what a GPU's L2 holds: a call finds it as another program would leave it."""
        if self.device == "cuda":
            import torch

            torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device).fill_(1)
            self.wait()

    def release(self) -> None:
        """Gives a GPU's memory back for the other workers; a burst's first call, which is dropped, takes it again."""
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()


def errors_of(output, reference) -> dict[str, float | None]:
    """Relative L2 and largest error of a float32 result against the float64 one; None of what computes nothing."""
    import torch

    if output is None:
        return {"error": None, "max_error": None}
    if output.dtype != torch.float32 or output.shape != reference.shape:
        raise RuntimeError(f"its output is {output.dtype} {tuple(output.shape)}")
    difference = output.double().cpu() - reference
    if not difference.isfinite().all():
        raise RuntimeError("its output is not finite")
    return {"error": float(difference.norm() / reference.norm()), "max_error": float(difference.abs().max())}


def cuda_peaks(seconds: float) -> dict[str, float]:
    """Large square matrix products and a device-to-device copy."""
    import torch

    def best(run) -> float:
        least, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            least = min(least, time.perf_counter() - start)
        return least

    size, peaks = 8192, {}
    for dtype in ("float32", "bfloat16"):
        a = torch.randn(size, size, device="cuda", dtype=getattr(torch, dtype))
        peaks[f"{dtype}_gflops"] = 2 * size**3 / best(lambda a=a: a @ a) / 1e9
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    peaks["copy_gbps"] = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9
    return peaks
