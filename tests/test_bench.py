"""The benchmark harness: floors against hand counts, a tiny run end to end, missing peers, interruption."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import spin_kernels as spin

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from spinbench import catalog, networks, report, session, timing  # noqa: E402
from spinbench.machine import Ceilings  # noqa: E402
from spinbench.worker import Worker, WorkerFailed, WorkerState, errors_of  # noqa: E402

TINY = networks.Network("tiny", 4, 2, 3, 8, 4, classes=5, activation="relu", rate=2)
TINY_BLOCKS = networks.Network("tiny_blocks", 16, 3, 3, 6, activation="gelu", pw_residual=True, rate=2)
PEAKS = {"float32_gflops": 100.0, "bfloat16_gflops": 50.0, "copy_gbps": 10.0}
FAST = timing.Method(most_calls=4, burst_seconds=0.05, most_rounds=5)


def measured(provider: str, ms: float, **changes) -> dict:
    row = {
        "net": "tiny",
        "batch": 1,
        "dtype": "float32",
        "provider": provider,
        "depth": 2,
        "ms": ms,
        "spread": 0.1,
    }
    row |= {
        "bursts": [ms] * 5,
        "error": 1e-6,
        "max_error": 1e-6,
        "flops": 1e8,
        "bytes": 1e6,
        "other_processes": 0.0,
        "pace_gflops": 75.0,
    }
    return row | changes


def test_flops_match_a_hand_count():
    stem, depthwise, pointwise, head = 2 * 48 * 4 * 4, 2 * (2 * 9 * 4 * 4), 2 * (2 * 16 * 4), 2 * 4 * 5
    activation = (2 * 2 + 1) * 4 * 4
    assert TINY.flops(1) == stem + depthwise + pointwise + head + activation == 2488
    assert TINY.flops(3) == 3 * TINY.flops(1)
    assert TINY_BLOCKS.flops(1) == 3 * 2 * (9 + 16) * 16 * 36 + 2 * 3 * 16 * 36 * 16


def test_bytes_match_a_hand_count():
    # Two depthwise filters, ONE shared matrix, stem, head (each with its bias); five affines in float32.
    weights, affines = 2 * (9 + 1) * 4 + (4 + 1) * 4 + (48 + 1) * 4 + (4 + 1) * 5, 5 * 2 * 4
    assert TINY.bytes(1, "float32") == 4 * weights + 4 * affines + 4 * (3 * 64 + 5)
    assert TINY.bytes(2, "bfloat16") == 2 * weights + 4 * affines + 2 * 4 * (3 * 64 + 5)


def test_floor_is_the_larger_of_compute_and_memory():
    assert networks.floor_ms(10**9, 0, "float32", PEAKS) == pytest.approx(10)
    assert networks.floor_ms(0, 10**9, "float32", PEAKS) == pytest.approx(100)
    # bfloat16 kernels may compute in float32: where that is the faster unit, it sets the floor.
    assert networks.floor_ms(10**9, 0, "bfloat16", PEAKS) == pytest.approx(10)
    assert networks.floor_ms(10**9, 0, "bfloat16", PEAKS | {"bfloat16_gflops": 200.0}) == pytest.approx(5)


def test_floor_of_the_published_network():
    floor = networks.NETWORKS[0].flops(1) / 538e6
    assert floor == pytest.approx(18.6, rel=0.01)


def test_ratio_and_fraction():
    rows = [
        measured("spin frozen", 2.0),
        measured("spin", 4.0),
        measured("eager", 8.0),
        measured("compile", 6.0),
    ]
    rows = report.finish(rows, PEAKS)
    assert [row["ratio"] for row in rows] == [3.0, 1.5, 4.0, 3.0]
    assert [row["fraction"] for row in rows] == pytest.approx([0.5, 0.25, 0.125, 1 / 6])
    assert [row["pace"] for row in rows] == pytest.approx([0.75] * 4)
    assert report.geometric_means(rows) == [("float32", pytest.approx(3.0), 1)]


def test_rows_without_peers_or_ceilings():
    (row,) = report.finish([measured("spin", 4.0)], {})
    assert row["ratio"] is None
    assert row["fraction"] is None
    assert row["floor_ms"] is None
    assert row["pace"] is None


def test_ceilings_keep_the_highest_and_say_when_disturbed():
    ceilings = Ceilings()
    ceilings.add({**PEAKS, "copy_gbps": 4.0}, 0.5)
    assert "too low: other processes took 50%" in report.describe(ceilings)
    ceilings.add({**PEAKS, "float32_gflops": 90.0}, 0.01)
    assert ceilings.peaks == PEAKS
    assert report.describe(ceilings) == "ceilings: float32 100 GFLOP/s, bfloat16 50 GFLOP/s, copy 10 GB/s"
    assert "not measured (no module)" in report.describe(Ceilings(failure="no module"))


def test_wrong_results_of_ours_are_named():
    results = {
        name: timing.Result({"error": error})
        for name, error in (("eager", 1e-2), ("spin", 1.4e-2), ("spin frozen", 2e-2))
    }
    assert list(session.wrong(results, "bfloat16")) == ["spin frozen"]
    assert list(session.wrong({"spin": timing.Result({"error": 2e-5})}, "float32")) == ["spin"]


def test_tiny_run(tmp_path, monkeypatch):
    """Every provider in a process of its own; a peer that cannot be imported is named with its reason."""
    (tmp_path / "openvino.py").write_text("raise ImportError('not on this machine')\n")
    monkeypatch.syspath_prepend(tmp_path)
    case = networks.Case(TINY_BLOCKS, 1, "float32")
    told = []
    with session.Session(["spin frozen", "eager", "openvino"], 1, "cpu") as run:
        run.run([case], FAST, lambda text, done: told.append((text, done)))
    assert not run.folder.exists()
    assert all(worker.process.exitcode is not None for worker in run.started)
    assert told[-1][0].startswith("tiny_blocks batch 1 float32: timing")
    assert told[-1][1] == 1.0

    rows = report.finish(run.rows, run.ceilings.peaks)
    assert [row["provider"] for row in rows] == ["spin frozen", "eager"]
    (failure,) = run.failures
    assert (failure["provider"], failure["reason"]) == ("openvino", "ImportError: not on this machine")
    path, chart = tmp_path / "deep" / "rows.json", tmp_path / "deep" / "rows.png"
    report.write_json(path, {"peaks": run.ceilings.peaks}, rows, run.failures)
    report.plot(chart, rows, "tiny")
    written = json.loads(path.read_text())
    assert set(written) == {"machine", "rows", "failures"}
    assert chart.stat().st_size > 0
    for row in written["rows"]:
        assert row["ms"] > 0
        assert row["ratio"] > 0
        assert row["fraction"] > 0
        assert 0 < row["error"] < 1e-5
        assert {"net", "batch", "dtype", "provider", "max_error", "spread", "bursts", "floor_ms"} < set(row)
        assert len(row["bursts"]) == FAST.least_rounds


def test_training_run(capsys):
    case = networks.Case(networks.NETWORKS[-1], 2, "float32", training=True)
    with session.Session(["spin", "spin checkpoint", "eager"], 1, "cpu") as run:
        run.run([case], FAST, lambda text, done: None)
    assert not run.failures
    rows = {row["provider"]: row for row in report.finish(run.rows, run.ceilings.peaks)}
    assert all(0 < row["error"] < 1e-4 and 0 < row["forward_share"] < 1 for row in rows.values())
    held = {name: row["held_mb"] for name, row in rows.items()}
    assert held["spin checkpoint"] < held["spin"] < held["eager"]
    report.show(Console(width=120), list(rows.values()), [], run.ceilings)
    printed = capsys.readouterr().out
    assert all(
        name in printed for name in ("fwd", "bwd", "held", "peak", "spin checkpoint", f"{rows['spin']['ratio']:.2f}")
    )


def test_a_dead_worker_is_a_reason(tmp_path):
    worker = Worker("eager", tmp_path, 1, "cpu")
    try:
        worker.wait_ready()
        worker.process.kill()
        with pytest.raises(WorkerFailed, match="its process ended with exit code -9"):
            worker.call("burst", 1, 1, 0.1, timeout=10)
        worker.restart()
        with pytest.raises(WorkerFailed, match="AttributeError"):
            worker.call("nonsense", timeout=10)
    finally:
        worker.stop()


class InterruptedSession:
    """Finishes one case, then gets Ctrl-C."""

    def __init__(self, *_):
        self.rows, self.failures, self.ceilings = [], [], Ceilings()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure_ceilings(self):
        self.ceilings.add(PEAKS, 0.0)

    def ask_maker(self, command, timeout):
        return None  # cuda_name

    def run(self, cases, method, progress):
        self.rows.append(measured("spin", 4.0))
        progress("second case", 0.5)
        raise KeyboardInterrupt


@pytest.fixture
def command(monkeypatch):
    import typer

    run = importlib.import_module("run")
    monkeypatch.setattr(run, "Session", InterruptedSession)
    app = typer.Typer()
    app.command()(run.main)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_interruption_keeps_the_finished_rows(command, tmp_path):
    path = tmp_path / "rows.json"
    result = command("--json", str(path), "--plot", str(tmp_path / "rows.png"))
    assert result.exit_code == 130, result.output
    assert "finished cases only" in result.output
    assert [row["provider"] for row in json.loads(path.read_text())["rows"]] == ["spin"]


def test_a_terminated_run_is_an_interrupted_one():
    code = f"""
import os, runpy, signal, sys, typer
sys.path.insert(0, {str(BENCH)!r})
typer.run = lambda main: os.kill(os.getpid(), signal.SIGTERM)
try:
    runpy.run_path({str(BENCH / "run.py")!r}, run_name="__main__")
except KeyboardInterrupt:
    print("interrupted")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "interrupted\n", ended.stderr


def test_cases_of_a_gpu():
    cases = networks.cases("networks", None, ["bfloat16"], device="cuda")
    assert {case.batch for case in cases} == {1, 16, 64, 256}
    assert {case.network.name for case in cases} <= set(spin.models.list_models())
    assert {case.batch for case in networks.cases("train", None, ["bfloat16"], device="cuda")} == {32, 128}
    (quick,) = networks.cases("networks", None, ["bfloat16"], quick=True, device="cuda")
    assert (quick.network.name, quick.batch) == ("ws_convmixer_768_32_k3_p14_s2", 64)
    ours = {"spin", "spin frozen", "spin graphs"}
    assert set(catalog.select("networks", "cuda", [])) == ours
    peers = set(catalog.select("train", "cuda", None)) - ours
    assert peers == {"spin checkpoint"} | {
        f"{peer}{layout}" for peer in ("eager", "compile", "autotune", "graphs") for layout in ("", " channels_last")
    }


def test_predictions_stay_above_the_floor():
    pytest.importorskip("triton", reason="triton is not installed")
    predict = importlib.import_module("predict")
    for network in networks.LARGE:
        products = network.depth * 2 * network.dim**2 * network.tokens
        for batch in predict.BATCHES:
            assert predict.inference(network, batch, predict.Rates()) > batch * products / 989e12
            hopper = predict.hopper(network, batch, predict.Rates())
            assert (hopper is None) == (network.tokens > 256)
            assert hopper is None or hopper > batch * products / 989e12
        for batch in predict.TRAINING_BATCHES:
            assert predict.training(network, batch, predict.Rates()) > 3 * batch * products / 989e12


def test_peers_that_time_kernels_are_prepared_alone(monkeypatch):
    groups = []

    class Idle:
        def __init__(self, name):
            self.name, self.idle, self.connection = name, True, self

        def send(self, command, case):
            groups[-1].append(self.name)

        def receive(self, timeout):
            return {}

        def resume(self): ...

        def pause(self):
            if groups[-1]:
                groups.append([])

    groups.append([])
    monkeypatch.setattr(timing, "wait", lambda connections, timeout: connections)
    names = ["spin", "autotune", "eager", "autotune channels_last"]
    results, failures = timing.prepare([Idle(name) for name in names], networks.Case(TINY, 1, "float32"))
    assert list(results) == ["spin", "eager", "autotune", "autotune channels_last"]
    assert not failures
    assert groups[:-1] == [["spin", "eager"], ["autotune"], ["autotune channels_last"]]


class Clock:
    """Time that only a call of its own moves on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class Timed:
    """A worker whose calls take a fixed time, and whose bursts are counted."""

    def __init__(self, name: str, seconds: float):
        self.name, self.seconds, self.idle, self.bursts = name, seconds, True, 0

    def resume(self): ...

    def pause(self): ...

    def call(self, command, most, least, seconds, timeout):
        self.bursts += 1
        return [self.seconds] * least


@pytest.mark.parametrize(("seconds", "bursts"), [(0.9, 5), (1.1, 1), (4.0, 1)])
def test_what_cannot_be_the_best_is_timed_once(seconds, bursts):
    fast, slow = Timed("spin", 0.1), Timed("eager", seconds)
    results = {worker.name: timing.Result({}) for worker in (fast, slow)}
    assert not timing.run([fast, slow], results, timing.Method(most_rounds=5), lambda done: None)
    assert (fast.bursts, slow.bursts) == (5, bursts)
    assert results["eager"].ms == pytest.approx(1e3 * seconds)
    assert (results["eager"].spread is None) == (bursts == 1)


def test_slow_calls_within_ten_times_the_fastest_are_timed_like_others():
    workers = [Timed("spin", 2.0), Timed("eager", 19.0)]
    results = {worker.name: timing.Result({}) for worker in workers}
    timing.run(workers, results, timing.Method(case_seconds=0.0), lambda done: None)
    assert [worker.bursts for worker in workers] == [5, 5]


@pytest.mark.parametrize(("seconds", "calls"), [(0.01, 15), (0.1, 5), (0.4, 3), (30.0, 3)])
def test_calls_of_a_burst(monkeypatch, seconds, calls):
    clock = Clock()
    monkeypatch.setattr("spinbench.worker.time.perf_counter", clock)
    state = WorkerState("spin", Path(), 1, "cpu")
    state.run = lambda: clock.pass_by(seconds)
    assert state.burst(15, 3, 0.5) == pytest.approx([seconds] * calls)


def test_a_hopeless_peer_is_not_asked_again_at_that_dtype(monkeypatch):
    held = object.__new__(session.Session)
    held.rows, held.failures, held.hopeless, held.started, held.device = [], [], {}, [], "cpu"
    held.ceilings = Ceilings()
    held.workers = [Timed("spin", 0.1), Timed("eager", 3.0), Timed("compile", 0.2)]
    asked = []

    def prepare(workers, case, timeout):
        asked.append([worker.name for worker in workers])
        return {worker.name: timing.Result({"error": 1e-3}) for worker in workers}, {}

    monkeypatch.setattr(timing, "prepare", prepare)
    for batch, dtype in ((1, "bfloat16"), (8, "bfloat16"), (1, "float32")):
        held.run_case(networks.Case(TINY, batch, dtype), timing.Method(), lambda text, done: None)
    assert asked == [["spin", "eager", "compile"], ["spin", "compile"], ["spin", "eager", "compile"]]
    reasons = [failure["reason"] for failure in held.failures if failure["provider"] == "eager"]
    assert reasons == ["took 30 times as long as the fastest in the case tiny batch 1 bfloat16"]


def test_cuda_without_a_device(command):
    result = command("--device", "cuda")
    assert result.exit_code == 2
    assert "no CUDA device" in result.output


def test_stops_at_once_without_the_package(command, monkeypatch):
    monkeypatch.setattr(importlib.import_module("run"), "find_spec", lambda name: None)
    result = command("--quick")
    assert result.exit_code == 2
    assert "pip install" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("--suite", "none"),
        ("--batch", "0"),
        ("--dtype", "int8"),
        ("--only", "resnet"),
        ("--peers", "tvm"),
        ("--peers", "openvino", "--suite", "train"),
    ],
)
def test_bad_options(command, arguments):
    result = command(*arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_our_model_has_the_weights_of_the_plain_one():
    from spinbench import ours, plain

    network = networks.NETWORKS[-1]
    image = plain.make_input(network, 2, seed=1)
    assert image.shape == (2, 3, 32, 32)
    assert image.is_contiguous()
    assert image.std() > 0.3
    model = plain.make_plain(network, image, seed=1)
    negative = [norm.weight.lt(0).float().mean() for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    assert 0 < sum(negative) / len(negative) < 0.5
    with torch.no_grad():
        expected, got = model(image), ours.make_ours(network, model)(image)
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)


def test_a_copy_moves_the_least_bytes():
    from spinbench import composing

    case = networks.Case(TINY, 1, "float32")
    target = composing.copying(case)()
    assert 2 * target.nbytes == case.bytes
    assert target.eq(1).all()
    assert errors_of(None, target) == {"error": None, "max_error": None}


def test_a_share_of_a_copy_is_taken_round_by_round():
    """Both are twice as fast in some rounds; their medians may then be of different ones."""
    ours, copy = measured("spin", 2.0, bursts=[4.0, 2.0, 2.0]), measured("copy", 3.0, bursts=[3.0, 3.0, 1.5])
    (line,) = report.beside_copies([ours, copy])
    assert ", 75% of what Tensor.copy_" in line
    assert report.relative_time(copy | {"bursts": [3.0]}, ours) == 0.75  # given up after a round


def test_ceilings_are_no_peers(capsys):
    ceilings = [measured(name, ms, error=None, max_error=None) for name, ms in (("copy", 3.0), ("read", 2.0))]
    rows = report.finish([measured("spin", 4.0), measured("eager", 8.0), *ceilings], PEAKS)
    assert [row["ratio"] for row in rows] == [2.0, 2.0, 0.75, 0.5]
    assert report.geometric_means(rows) == [("float32", pytest.approx(2.0), 1)]
    report.show(Console(width=120), rows, [], Ceilings(PEAKS, 0.0))
    printed = " ".join(capsys.readouterr().out.split())
    assert "eager*" in printed
    assert "copy*" not in printed
    assert "read*" not in printed
    line = "tiny float32: 0.2 GB/s of its least bytes, 75% of what Tensor.copy_ reached in the same rounds of bursts; "
    assert line + "Tensor.sum of what it reads takes 50% of its time" in printed
