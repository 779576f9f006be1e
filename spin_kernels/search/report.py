"""The report of a search: a page of Markdown with figures. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .plans import Plan

USE = (
    (
        "import spin_kernels as spin",
        "",
        'net = spin.search.apply(model, spin.Plan.load("plan.json"))  # the model as it was given to the search',
        'net.load_state_dict(spin.convert.load("model.pt"))',
    ),
    (
        "import spin_kernels as spin",
        "",
        'nets = spin.search.apply(models, spin.Plan.load("plan.json"))  # a list of those above',
        "ensemble = spin.Ensemble(nets).eval()",
        'ensemble.load_state_dict(spin.convert.load("model.pt"))  # with its calibration',
        "ensemble.predict(inputs, seconds=0.01).log_probabilities",
    ),
)


def write_report(folder: Path, results: dict[str, Any]) -> Path:
    """Writes ``report.md`` and its figures ``plan.png``, ``history.png`` and, of several models, ``anytime.png``."""
    settings = results["settings"]
    current = Plan.load(folder / "plan.json")
    current.plot(folder / "plan.png")
    _history(results).savefig(folder / "history.png", dpi=120)
    several = len(settings["models"]) > 1
    lines = [
        f"# {', '.join(settings['models'])} within {current.budget:,} parameters",
        "",
        f"{current.parameters:,} parameters, {current.spent:,} of them counted ({current.count}); pictures: "
        + ", ".join(f"{count} {name}" for name, count in results["pictures"].items())
        + ".",
        "",
        "| | accuracy | NLL (nats) | ECE | MFLOPs an image | ms an image |",
        "|---|---|---|---|---|---|",
        *(_row(name, point) for name, point in zip(settings["models"], results["alone"], strict=True)),
    ]
    if several:
        names = ["the first in order", *(f"the first {n}" for n in range(2, len(settings["models"]))), "all"]
        lines += [_row(name, point) for name, point in zip(names, results["anytime"], strict=True)]
        order = ", ".join(settings["models"][member] for member in results["order"])
        lines += ["", f"Order of evaluation: {order}.", "", "![Accuracy and NLL by FLOPs](anytime.png)"]
        _anytime(results).savefig(folder / "anytime.png", dpi=120)
    lines += [
        "",
        "![Loss and accuracy by epoch](history.png)",
        "",
        "## Plan",
        "",
        "![Layers by clusters](plan.png)",
        "",
        "```",
        current.table(),
        "```",
        "",
        "## Use it",
        "",
        "```python",
        *USE[several],
        "```",
        "",
        f"Inputs are pixels less {_numbers(results['mean'])}, over {_numbers(results['deviation'])}.",
        "",
    ]
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path


def _row(name: str, point: dict[str, Any]) -> str:
    return (
        f"| {name} | {point['accuracy']:.2%} | {point['nll']:.4f} | {point['ece']:.4f} | {point['flops'] / 1e6:,.1f} | "
        f"{1e3 * point['seconds']:.3f} |"
    )


def _numbers(values: Any) -> str:
    if isinstance(values, list):
        return f"[{', '.join(map(_numbers, values))}]" if len(values) != 1 else _numbers(values[0])
    return f"{values:.6g}"


def _history(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    history = results["history"]
    stages = list(dict.fromkeys(entry["stage"] for entry in history))
    for number, stage in enumerate(stages):
        at = [n for n, entry in enumerate(history) if entry["stage"] == stage]
        left.plot([n + 1 for n in at], [history[n]["loss"] for n in at], marker=".", color=f"C{number}", label=stage)
        for model in range(len(results["settings"]["models"])):
            accuracies = [100 * history[n]["accuracies"][model] for n in at]
            right.plot(
                [n + 1 for n in at], accuracies, marker=".", color=f"C{number}", linestyle=("-", "--", ":")[model % 3]
            )
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    right.set(xlabel="epoch", ylabel="held-out accuracy, %")
    return figure


def _anytime(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 3)
    flops = [point["flops"] / 1e6 for point in results["anytime"]]
    for axis, (key, label, factor) in zip(
        axes, (("accuracy", "accuracy, %", 100), ("nll", "NLL, nats", 1), ("ece", "ECE", 1)), strict=True
    ):
        values = [factor * point[key] for point in results["anytime"]]
        axis.plot(flops, values, marker="o", drawstyle="steps-post")
        axis.set(xlabel="MFLOPs an image", ylabel=label)
        if min(flops) > 0 and math.log10(max(flops) / min(flops)) > 1:
            axis.set_xscale("log")
    return figure
