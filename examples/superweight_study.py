"""What a bank of templates is worth at four budgets, on 5,000 MNIST digits (SuperWeight Networks, arXiv 2312.01280).

``pip install -e '.[examples]' && python examples/superweight_study.py OUT``: a WRN-22-1 of 8 to 32 channels, and with
as many parameters as one of 3, 4, 6 and 7 to four times as many channels

- SuperWeights: clusters by depth for a fifth of the epochs, split where gradients disagree, trained anew;
- the same without the split;
- clusters split by the similarity of weights, as sharing by similarity did before;
- that narrower network itself.

Three seeds; half of the digits are held out, so that a tenth of a per cent is 2.5 digits.
"""

from __future__ import annotations

import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import typer
from digits import accuracy
from study import CORES, Epochs, Out, Seeds, Workers, batches, each, show, small_digits, summary, train, write
from torch import nn

import spin_kernels as spin
from spin_kernels.weights import count_parameters

BASE, NARROWER = 8, (3, 4, 6, 7)  # channels of the first stage
WAYS = ("SuperWeights", "without split", "split by weights", "narrower")


def network(seed: int, base_channels: int = BASE) -> nn.Module:
    torch.manual_seed(seed)
    return spin.models.wide_resnet(22, 1, in_channels=1, base_channels=base_channels)


def run(way: str, channels: int, seed: int, epochs: int) -> list[dict]:
    """One row: what is trained, for `epochs`, and how well it does."""
    images, labels, test_images, test_labels = small_digits(seed)
    net, model = network(seed, channels), network(seed)
    budget = count_parameters(net)
    bank = way not in ("plain", "narrower")
    if bank:
        plan = spin.search.plan(model, budget)
        if way != "without split":
            net = spin.search.apply(model, plan)
            train(net, images, labels, max(1, epochs // 5), seed).train()
            compare = "weights" if way == "split by weights" else "gradients"
            plan = spin.search.split(net, batches(images, labels, 64), F.cross_entropy, compare=compare)
        torch.manual_seed(seed)  # where nothing was split, the same as without
        net = spin.search.apply(model, plan)
    train(net, images, labels, epochs, seed)
    clusters = len({layer.cluster for layer in plan.models[0]}) if bank else 0
    score = accuracy(net, test_images, test_labels)
    return [
        {
            "budget": f"{budget / count_parameters(model):.0%}", "network": way, "seed": seed,
            "parameters": count_parameters(net), "clusters": clusters, "accuracy": score,
        }
    ]  # fmt: skip


def main(out: Out, seeds: Seeds = 3, epochs: Epochs = 10, workers: Workers = CORES) -> None:
    """Trains everything, prints the table, writes the figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    cases = [("plain", BASE), *((way, channels) for channels in reversed(NARROWER) for way in WAYS)]
    rows = each(run, [(*case, seed, epochs) for case in cases for seed in range(seeds)], workers)
    rows.sort(key=lambda row: (int(row["budget"].rstrip("%")), ("plain", *WAYS).index(row["network"])))
    found = summary(rows, ("budget", "network"), ("parameters", "clusters", "accuracy"))
    show(found, f"held-out accuracy, mean ± deviation of {seeds} seeds")
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for way in WAYS:
        points = [row for row in found if row["network"] == way]
        x, y, deviation = zip(*((r["parameters"][0], *(100 * v for v in r["accuracy"])) for r in points), strict=True)
        axis.errorbar(x, y, deviation, marker="o", capsize=3, label=way)
    plain = found[-1]
    axis.axhline(
        100 * plain["accuracy"][0], color="gray", linestyle="--", label=f"plain, {plain['parameters'][0]:,.0f}"
    )
    axis.set(xlabel="parameters", ylabel="held-out accuracy, %", xscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out.with_suffix(".png"), dpi=110)
    write(out, start, {"seeds": seeds, "epochs": epochs, "rows": found, "runs": rows})


if __name__ == "__main__":
    typer.run(main)
