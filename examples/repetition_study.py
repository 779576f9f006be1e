"""What repeating a small network's weights is worth (learnable repetition, RepeatNet, arXiv 2101.05650).

``pip install -e '.[examples]' && python examples/repetition_study.py OUT``: on 5,000 MNIST digits

- WRN-10-1, the base; WRN-10-2, the big network; and WRN-10-2 whose convolutions repeat weights of the base's size, two
  by two times, with each modulation;
- on digits that are turned by any angle: a plain network, the P4CNN whose filters are turned by quarter turns, and one
  whose orientations learn how to modulate the filters.

Half of the digits are held out. Three seeds.
"""

from __future__ import annotations

import math
import time

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import typer
from digits import accuracy, digits
from study import CORES, Epochs, Out, Seeds, Workers, each, show, small_digits, summary, train, write
from torch import Tensor, nn

import spin_kernels as spin
from spin_kernels.weights import count_parameters

UPRIGHT = ("base", "big", "swish", "sign", "linear")
TURNED = ("z2cnn", "p4cnn", "p4cnn_repeated")


def upright(name: str) -> nn.Module:
    """WRN-10 with the base's width, twice that, or that by repetition."""
    weights = None if name in ("base", "big") else spin.Repeated((2, 2), name)
    width = 1 if name == "base" else 2
    return spin.models.wide_resnet(10, width, in_channels=1, base_channels=8, weights=weights)


def turned(images: Tensor, seed: int) -> Tensor:
    """Each image turned by an angle of its own, bilinearly."""
    angles = 2 * math.pi * torch.rand(len(images), generator=torch.Generator().manual_seed(seed))
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack([cos, -sin, torch.zeros_like(cos), sin, cos, torch.zeros_like(cos)], 1).view(-1, 2, 3)
    grid = F.affine_grid(turns, list(images.shape), align_corners=False)
    low = images.min()
    return F.grid_sample(images - low, grid, align_corners=False) + low


def run(name: str, seed: int, epochs: int) -> list[dict]:
    """One row: what is trained, for `epochs`, and how well it does."""
    if name in TURNED:
        images, labels, test_images, test_labels = digits(seed, held_out=2)
        images, test_images = turned(images, 2 * seed), turned(test_images, 2 * seed + 1)
    else:
        images, labels, test_images, test_labels = small_digits(seed)
    torch.manual_seed(seed)
    # Without dropout: so few steps do not make up for it.
    net = spin.models.create(name, drop_rate=0.0) if name in TURNED else upright(name)
    train(net, images, labels, epochs, seed)
    score = accuracy(net, test_images, test_labels)
    digit = "turned" if name in TURNED else "upright"
    return [{"digits": digit, "network": name, "seed": seed, "parameters": count_parameters(net), "accuracy": score}]


def main(out: Out, seeds: Seeds = 3, epochs: Epochs = 12, turned_epochs: Epochs = 10, workers: Workers = CORES) -> None:
    """Trains everything, prints the table, writes the figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    names = (*reversed(TURNED), *UPRIGHT)
    jobs = [(name, seed, turned_epochs if name in TURNED else epochs) for name in names for seed in range(seeds)]
    rows = each(run, jobs, workers)
    rows.sort(key=lambda row: (*UPRIGHT, *TURNED).index(row["network"]))
    found = summary(rows, ("digits", "network"), ("parameters", "accuracy"))
    show(found, f"held-out accuracy, mean ± deviation of {seeds} seeds")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, kind in zip(axes, ("upright", "turned"), strict=True):
        for row in (row for row in found if row["digits"] == kind):
            y, deviation = (100 * value for value in row["accuracy"])
            axis.errorbar(row["parameters"][0], y, deviation, marker="o", capsize=3, linestyle="", label=row["network"])
        axis.set(title=f"{kind} digits", xlabel="parameters", ylabel="held-out accuracy, %")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out.with_suffix(".png"), dpi=110)
    write(out, start, {"seeds": seeds, "epochs": [epochs, turned_epochs], "rows": found, "runs": rows})


if __name__ == "__main__":
    typer.run(main)
