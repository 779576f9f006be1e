"""Rows to a table, a JSON file and a chart."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spinbench.catalog import COPY, OURS, READ, WRITE, is_peer
from spinbench.compositions import shares
from spinbench.machine import Ceilings
from spinbench.networks import floor_ms
from spinbench.timing import DISTURBED


def case_of(row: dict) -> tuple:
    return row["net"], row["batch"], row["dtype"]


def finish(rows: list[dict], peaks: dict[str, float]) -> list[dict]:
    """Adds floor_ms, fraction (floor / ms), ratio (ours: best peer / ms; others: ms / best of ours), pace (part of the
    float32 peak that the machine gave in the same minute)."""
    finished = []
    for _, group in groupby(rows, case_of):
        group = list(group)
        ours = min((row["ms"] for row in group if row["provider"] in OURS), default=None)
        peer = min((row["ms"] for row in group if is_peer(row["provider"])), default=None)
        for row in group:
            floor = floor_ms(row["flops"], row["bytes"], row["dtype"], peaks) if peaks else None
            mine = row["provider"] in OURS
            ratio = (peer and peer / row["ms"]) if mine else (ours and row["ms"] / ours)
            pace = row["pace_gflops"] / peaks["float32_gflops"] if peaks and row["pace_gflops"] else None
            fraction = floor and floor / row["ms"]
            finished.append({**row, "floor_ms": floor, "fraction": fraction, "ratio": ratio, "pace": pace})
    return finished


def header(machine: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['processor']} (family/model/stepping {machine['family_model_stepping']}), "
        f"{machine['cores']} cores, {machine['threads']} threads, {machine['memory_gb']} GB, "
        f"{machine['system']}\nISA: {' '.join(machine['isa'])}\n"
        f"Python {machine['python']}, {versions}, commit {machine['commit']}"
    )


def describe(ceilings: Ceilings) -> str:
    if not ceilings.peaks:
        return f"ceilings: not measured ({ceilings.failure})"
    float32, bfloat16, copy = (ceilings.peaks[key] for key in ("float32_gflops", "bfloat16_gflops", "copy_gbps"))
    text = f"ceilings: float32 {float32:.0f} GFLOP/s, bfloat16 {bfloat16:.0f} GFLOP/s, copy {copy:.0f} GB/s"
    if ceilings.other_processes > DISTURBED:
        text += f" (too low: other processes took {ceilings.other_processes:.0%} of the processor, fractions flatter)"
    return text


def show(console: Console, rows: list[dict], failures: list[dict], ceilings: Ceilings) -> None:
    if rows:
        console.print(table(rows))
        console.print("floor: the part of it that was reached; error: relative L2; *: the best of each side")
        console.print("ratio: for ours best peer / ours, for others their time / ours")
        if is_training(rows):
            console.print("fwd, bwd: floor of either pass; MB held between them, and at the peak of a step")
        console.print("machine at: multiply-adds in registers during the same bursts / the best of the run")
    console.print(describe(ceilings), highlight=False)
    for line in (*shares(rows), *beside_copies(rows)):
        console.print(line, highlight=False)
    for dtype, mean, count in geometric_means(rows):
        console.print(
            f"{dtype}: best peer / best of ours, geometric mean of {count} cases: {mean:.2f}", highlight=False
        )
    for (provider, reason), group in groupby(sorted(failures, key=reason_of), reason_of):
        where = [f"{item['net']} batch {item['batch']} {item['dtype']}" for item in group]
        console.print(f"[yellow]{provider}[/]: {escape(reason)} ({'; '.join(where)})", highlight=False)
    disturbed = {case_of(row): row["other_processes"] for row in rows if row["other_processes"] > DISTURBED}
    if disturbed:
        console.print(
            f"[yellow]disturbed[/]: other processes took up to {max(disturbed.values()):.0%} of the "
            f"processor during {len(disturbed)} of {len(set(map(case_of, rows)))} cases; those times are too high",
            highlight=False,
        )


def table(rows: list[dict]) -> Table:
    per_block = any("block" in row["net"] for row in rows)
    training = is_training(rows)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("case", no_wrap=True)
    table.add_column("provider", no_wrap=True)
    for name in (
        "ms",
        "spread",
        *(["us/block"] if per_block else []),
        "floor",
        *(["fwd", "bwd"] if training else []),
        "ratio",
        "error",
        *(["held", "peak"] if training else []),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for (net, batch, dtype), group in groupby(rows, case_of):
        group = list(group)
        best = {
            min(side, key=lambda row: row["ms"])["provider"]
            for belongs in (OURS.__contains__, is_peer)
            if (side := [row for row in group if belongs(row["provider"])])
        }
        lines = [net, f"  batch {batch}, {dtype}"]
        if group[0]["pace"]:
            lines.append(f"  machine at {group[0]['pace']:.0%}")
        for line, row in zip_longest(lines, group):
            cells = [""] if row is None else cells_of(row, row["provider"] in best, per_block, training)
            table.add_row(line or "", *cells, style="bold" if row and row["provider"] in OURS else None)
        table.add_section()
    return table


def is_training(rows: list[dict]) -> bool:
    return any("held_mb" in row for row in rows)


def cells_of(row: dict, best: bool, per_block: bool, training: bool) -> list[str]:
    return [
        row["provider"] + ("*" if best else ""),
        f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:.0f}",
        "" if row["spread"] is None else f"{row['spread']:.0%}",
        *([f"{1e3 * row['ms'] / row['depth']:.0f}"] if per_block else []),
        f"{row['fraction']:.0%}" if row["fraction"] else "-",
        *(fractions_of_passes(row) if training else []),
        f"{row['ratio']:.2f}" if row["ratio"] else "-",
        f"{row['error']:.1e}" if row["error"] is not None else "-",
        *([f"{row['held_mb']:.0f}", f"{row['peak_mb']:.0f}"] if training else []),
    ]


def fractions_of_passes(row: dict) -> list[str]:
    """Of a training step: a third of the floor is the forward pass', two thirds are the backward pass'."""
    if not row["fraction"]:
        return ["-", "-"]
    share = row["forward_share"]
    return [f"{row['fraction'] / 3 / share:.0%}", f"{row['fraction'] * 2 / 3 / (1 - share):.0%}"]


def geometric_means(rows: list[dict]) -> list[tuple[str, float, int]]:
    """(dtype, geometric mean of best peer / best of ours, number of cases) for every dtype that has both."""
    best: dict[tuple, float] = {}
    for row in rows:
        if row["provider"] in OURS and row["ratio"]:
            best[case_of(row)] = max(row["ratio"], best.get(case_of(row), 0.0))
    means = []
    for dtype in dict.fromkeys(key[2] for key in best):
        ratios = [ratio for key, ratio in best.items() if key[2] == dtype]
        means.append((dtype, math.exp(sum(map(math.log, ratios)) / len(ratios)), len(ratios)))
    return means


def beside_copies(rows: list[dict]) -> list[str]:
    """Of every case with ceilings: how fast ours moves its least bytes, how fast a copy does, and how much of the time
    writing or reading takes alone."""
    lines = []
    for (net, _, dtype), group in groupby(rows, case_of):
        group = list(group)
        by_provider = {row["provider"]: row for row in group}
        ours = min((row for row in group if row["provider"] in OURS), key=itemgetter("ms"), default=None)
        if ours and COPY in by_provider:
            rate = f"{ours['bytes'] / ours['ms'] / 1e6:.1f} GB/s of its least bytes"
            share = relative_time(by_provider[COPY], ours)
            line = f"{net} {dtype}: {rate}, {share:.0%} of what Tensor.copy_ reached in the same rounds of bursts"
            for name, alone in ((WRITE, "fill_ of what it writes"), (READ, "sum of what it reads")):
                if name in by_provider:
                    line += f"; Tensor.{alone} takes {relative_time(by_provider[name], ours):.0%} of its time"
            lines.append(line)
    return lines


def relative_time(row: dict, ours: dict) -> float:
    """Its time / ours, the median of their rounds: memory may be half as fast again in some of them, for both."""
    return statistics.median(a / b for a, b in zip(row["bursts"], ours["bursts"], strict=False))


def reason_of(failure: dict) -> tuple[str, str]:
    return failure["provider"], failure["reason"]


def write_json(path: Path, machine: dict, rows: list[dict], failures: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows, "failures": failures}, indent=1) + "\n")


def label_of(row: dict) -> str:
    """Of a group of bars: the name in short lines, broken at underscores, and the batch."""
    words = row["net"].replace("_", "_ ")
    return "\n".join([*(line.replace("_ ", "_") for line in textwrap.wrap(words, 20)), f"batch {row['batch']}"])


def plot(path: Path, rows: list[dict], title: str) -> None:
    """One panel per dtype, one group of bars per case: fraction of the floor, or ms without ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    value, label = ("fraction", "fraction of the floor") if all(row["fraction"] for row in rows) else ("ms", "ms")
    dtypes, providers = (
        list(dict.fromkeys(row["dtype"] for row in rows)),
        list(dict.fromkeys(row["provider"] for row in rows)),
    )
    names = list(dict.fromkeys(label_of(row) for row in rows))
    size = (max(7.0, 1.7 * len(names)), 4.0 * len(dtypes) + 0.6)
    figure, axes = plt.subplots(len(dtypes), 1, figsize=size, squeeze=False, layout="constrained")
    width = 0.85 / len(providers)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        for i, provider in enumerate(providers):
            chosen = [row for row in rows if row["dtype"] == dtype and row["provider"] == provider]
            places = [names.index(label_of(row)) + (i + 0.5) * width - 0.425 for row in chosen]
            color = (
                ("#c0392b", "#e59866", "#f5cba7", "#922b21")[OURS.index(provider)]
                if provider in OURS
                else plt.cm.viridis(i / len(providers))
            )
            axis.bar(places, [row[value] for row in chosen], width, color=color, label=provider)
        axis.set(title=dtype, ylabel=label)
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.grid(axis="y", alpha=0.3)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=7, ncols=4)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
