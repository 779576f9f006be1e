"""Benchmark: `python bench/run.py` times the networks against every peer; `--help` lists the rest."""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from spinbench import catalog, machine, networks, report
from spinbench.session import Session
from spinbench.timing import Method
from spinbench.worker import WorkerFailed

OUT = Path(__file__).parent / "out"
QUICK = Method(most_rounds=5, case_seconds=5.0)


def chosen(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    values = [value for value in text.split(",") if value]
    for value in values:
        if value not in allowed:
            raise typer.BadParameter(f"expected some of {', '.join(allowed)}, got {value!r}", param_hint=option)
    return values


def main(
    suite: Annotated[str, typer.Option(help="networks | blocks | sharing | train | compose")] = "networks",
    batch: Annotated[
        str | None,
        typer.Option(help="Batch sizes, e.g. 1,8 (the default of networks on a CPU); train: 4 and 32, others: 1."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or both. Blocks and sharing default to float32, a GPU to bfloat16."),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Some of eager, compile, openvino, onnxruntime (GPU: autotune, graphs); '' for none."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu | cuda")] = "cpu",
    only: Annotated[str, typer.Option(help="Only networks whose name contains this.")] = "",
    threads: Annotated[int, typer.Option(help="Threads of every provider; 0: one per core.", min=0)] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smallest network, batch 1, fewer bursts: under a minute.")
    ] = False,
    json: Annotated[Path, typer.Option(help="Where the rows go.")] = OUT / "bench.json",
    plot: Annotated[Path, typer.Option(help="Where the chart goes.")] = OUT / "bench.png",
) -> None:
    """Times ours against the peers; every row shows its distance from this machine's floor and its error."""
    chosen(device, tuple(networks.SUITES), "--device")
    chosen(suite, tuple(networks.SUITES[device]), "--suite")
    both = "float32,bfloat16" if suite in ("networks", "train") else "float32"
    dtypes = chosen(dtype or ("bfloat16" if device == "cuda" else both), tuple(networks.ITEM_BYTES), "--dtype")
    names = None if peers is None else chosen(peers, catalog.peers_of(suite, device), "--peers")
    try:
        batches = [int(value) for value in batch.split(",")] if batch else None
        if batches and min(batches) < 1:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"expected positive integers, got {batch!r}", param_hint="--batch") from None
    cases = [case for case in networks.cases(suite, batches, dtypes, quick, device) if only in case.network.name]
    if not cases:
        known = ", ".join(network.name for network in networks.SUITES[device][suite])
        raise typer.BadParameter(f"expected a part of one of {known}, got {only!r}", param_hint="--only")

    # An output that is no terminal would get 80 columns, too few for the table.
    console = Console(width=None if sys.stdout.isatty() else 120)
    if find_spec("spin_kernels") is None:  # the peers alone would run for ten minutes
        console.print("[red]spin_kernels: expected to be installed, is not found; run `pip install -e .` first[/]")
        raise typer.Exit(2)
    threads = threads or machine.default_threads()
    info = machine.describe(threads)
    console.print(report.header(info), highlight=False)
    interrupted = False
    with Session(catalog.select(suite, device, names), threads, device) as session:
        try:
            if device == "cuda":
                info["gpu"] = session.ask_maker("cuda_name", timeout=120)
                if info["gpu"] is None:
                    console.print("[red]--device cuda: this torch sees no CUDA device[/]")
                    raise typer.Exit(2)
            session.measure_ceilings()
            console.print(report.describe(session.ceilings), highlight=False)
            columns = (
                BarColumn(),
                TextColumn("{task.percentage:.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            with Progress(*columns, console=console) as progress:
                task = progress.add_task("starting", total=1.0)
                session.run(
                    cases,
                    QUICK if quick else Method(),
                    lambda text, done: progress.update(task, description=text, completed=done),
                )
                progress.update(task, description="done", completed=1.0)
        except KeyboardInterrupt:
            interrupted = True
        except WorkerFailed as failure:
            console.print(f"[red]stopped[/]: {failure}")
            interrupted = True
    rows = report.finish(session.rows, session.ceilings.peaks)
    report.show(console, rows, session.failures, session.ceilings)
    if rows:
        info = {**info, "device": device, "ceilings": asdict(session.ceilings)}
        report.write_json(json, info, rows, session.failures)
        where = info.get("gpu") or f"{info['processor']}, {threads} threads"
        report.plot(plot, rows, f"{where}, commit {info['commit']}")
        console.print(f"wrote {json} and {plot}" + (" (finished cases only)" if interrupted else ""), highlight=False)
    failed = any(failure["provider"] in catalog.OURS for failure in session.failures)
    sys.exit(130 if interrupted else 1 if failed else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` keeps the finished rows too
    typer.run(main)
