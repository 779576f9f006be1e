"""Three networks from one bank against three of their own, and what either answers within a limit.

``pip install -e '.[examples]' && python examples/ensemble_study.py OUT``: WRN-16-1, WRN-10-2 and WRN-10-1 on 5,000
MNIST digits (SuperWeight Networks, arXiv 2312.01280). Trained together from banks of as many parameters as the largest
of them, and as a quarter of all three; and each by itself. Half of the digits are held out: a fifth of these calibrates
the averages and chooses the order of evaluation, the others test. Three seeds.
"""

from __future__ import annotations

import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import typer
from study import CORES, Epochs, Out, Seeds, Workers, batches, each, show, small_digits, summary, train, write
from torch import nn

import spin_kernels as spin
from spin_kernels.weights import count_parameters

SHAPES = {"WRN-16-1": (16, 1), "WRN-10-2": (10, 2), "WRN-10-1": (10, 1)}
OWN = "of their own"


def networks(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [spin.models.wide_resnet(*shape, in_channels=1, base_channels=8) for shape in SHAPES.values()]


def run(way: str, seed: int, epochs: int) -> list[dict]:
    """A row for each member alone and for each number of members."""
    images, labels, test_images, test_labels = small_digits(seed)
    models = networks(seed)
    if way == OWN:
        nets = nn.ModuleList(train(model, images, labels, epochs, seed) for model in models)
    else:
        sizes = [count_parameters(model) for model in models]
        plan = spin.search.plan(models, max(sizes) if way == "bank as the largest" else sum(sizes) // 4)
        nets = train(spin.search.apply(models, plan), images, labels, epochs, seed)
    fifth = torch.arange(len(test_labels)) % 5 == 0
    ensemble = spin.Ensemble(nets).eval()
    ensemble.calibrate(batches(test_images[fifth], test_labels[fifth]), reorder=True)
    test = batches(test_images[~fifth], test_labels[~fifth])
    rows = [
        (f"{name} alone", spin.ensemble.anytime_curve(ensemble.keep([member]), test)[0])
        for member, name in enumerate(SHAPES)
    ]
    rows += [(f"first {n}", point) for n, point in enumerate(spin.ensemble.anytime_curve(ensemble, test), 1)]
    return [
        {
            "weights": way, "members": name, "seed": seed, "parameters": count_parameters(nets),
            "kFLOPs": point.flops / 1e3, "accuracy": point.accuracy, "NLL": point.nll, "ECE": point.ece,
        }
        for name, point in rows
    ]  # fmt: skip


def main(out: Out, seeds: Seeds = 3, epochs: Epochs = 12, workers: Workers = CORES) -> None:
    """Trains everything, prints the table, writes the figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    ways = (OWN, "bank as the largest", "bank as a quarter of all")
    rows = each(run, [(way, seed, epochs) for way in ways for seed in range(seeds)], workers)
    rows.sort(key=lambda row: ways.index(row["weights"]))
    found = summary(rows, ("weights", "members"), ("parameters", "kFLOPs", "accuracy", "NLL", "ECE"))
    show(found, f"mean ± deviation of {seeds} seeds")
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, measure, label in zip(axes, ("accuracy", "NLL", "ECE"), ("accuracy", "NLL, nats", "ECE"), strict=True):
        for way in ways:
            points = [row for row in found if row["weights"] == way and row["members"].startswith("first")]
            x, y, deviation = zip(*((r["kFLOPs"][0], *r[measure]) for r in points), strict=True)
            axis.errorbar(x, y, deviation, marker="o", capsize=3, label=f"{way}: {points[0]['parameters'][0]:,.0f}")
        axis.set(xlabel="limit: kFLOPs an image", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(title="weights: parameters", fontsize=8)
    figure.savefig(out.with_suffix(".png"), dpi=110)
    write(out, start, {"seeds": seeds, "epochs": epochs, "rows": found, "runs": rows})


if __name__ == "__main__":
    typer.run(main)
