"""What the studies share: jobs in processes of one thread each, a training run, means and deviations, tables."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from digits import digits
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from spin_kernels.search.data import shifted
from spin_kernels.search.training import Recipe, Trainer

Out = Annotated[Path, typer.Argument(help="Where results go, without ending: OUT.json and OUT.png.")]
Seeds = Annotated[int, typer.Option(min=1)]
Epochs = Annotated[int, typer.Option(min=1)]
Workers = Annotated[int, typer.Option(help="Processes of one thread each.", min=1)]
CORES = os.cpu_count() or 1


def each(function: Callable[..., list[dict]], jobs: Sequence[tuple], workers: int) -> list[dict]:
    """The rows of ``function(*job)`` of all jobs; put the long ones first."""
    rows = []
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool, Progress() as progress:
        task = progress.add_task("jobs", total=len(jobs))
        for done in as_completed(pool.submit(function, *job) for job in jobs):
            rows += done.result()
            progress.advance(task)
    return sorted(rows, key=lambda row: row["seed"])


def _one_thread() -> None:
    torch.set_num_threads(1)


def small_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST 5k in 16 x 16, means of 2 x 2 pixels with an edge of 1: half to train with, half to test."""
    images, labels, test_images, test_labels = digits(seed, held_out=2)
    images, test_images = (F.pad(F.avg_pool2d(x, 2), [1] * 4, value=float(x.min())) for x in (images, test_images))
    return images, labels, test_images, test_labels


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int, of: int | None = None) -> nn.Module:
    """The network, or several that share a bank, after ``epochs`` of a schedule ``of`` so many."""
    trainer = Trainer(net, Recipe(epochs=of or epochs, seed=seed), lambda x: shifted(x, 1))
    for _ in range(epochs):
        trainer.epoch(images, labels)
    return net.eval()


def batches(images: Tensor, labels: Tensor, size: int = 250) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and deviation."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def summary(rows: list[dict], keys: Sequence[str], measures: Sequence[str]) -> list[dict]:
    """A row for each value of the keys, in the order of first use, with the spread of each measure over the seeds."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, group, strict=True)) | {name: spread([row[name] for row in same]) for name in measures}
        for group, same in groups.items()
    ]


def show(rows: list[dict], title: str) -> None:
    """A table; spreads of parts of 1 are per cent."""
    table = Table(title=title, box=None)
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_text(name, value) for name, value in row.items()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, tuple | list):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if name == "accuracy":
        return "{:.2%} ± {:.2%}".format(*value)
    if name in ("parameters", "kFLOPs"):
        return f"{value[0]:,.0f}"
    if name == "clusters":
        return "{:.1f}".format(*value)
    return "{:.4f} ± {:.4f}".format(*value)


def write(out: Path, start: float, record: dict[str, Any]) -> None:
    """OUT.json, with the seconds since the start."""
    seconds = time.perf_counter() - start
    out.with_suffix(".json").write_text(json.dumps({"seconds": round(seconds), **record}, indent=1) + "\n")
    print(f"{seconds:.0f} s; wrote {out}.json and {out}.png")
