"""What sharing costs and what it gains, on 5,000 MNIST digits: the questions of SPIN (arXiv 2207.10237) in small.

``pip install -e '.[examples]' && python examples/sharing_study.py OUT``: three seeds of 18 networks, minutes on two
cores; writes OUT.json and OUT.png. Half of the digits are held out, so that a tenth of a per cent is 2.5 digits.
All networks are ConvMixers of 8 blocks on 7 x 7 tokens and see the same digits in the same order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import typer
from digits import Digits, accuracy, adamw, digits
from rich.console import Console
from rich.table import Table
from study import CORES, Epochs, Out, Seeds, Workers, each, spread, write

import spin_kernels as spin
from spin_kernels.analysis import block_similarity
from spin_kernels.nn.fused_mixer import REDUCTIONS
from spin_kernels.search.data import shifted
from spin_kernels.weights import count_parameters

DIM, DEPTH, KERNEL, RATE, BATCH = 32, 8, 3, 4, 64
Model = spin.models.ConvMixer


def network(seed: int, dim: int = DIM, **plan: object) -> Model:
    torch.manual_seed(seed)
    sharing = spin.Sharing(DEPTH, **plan) if plan else None
    return spin.models.convmixer(dim, DEPTH, KERNEL, 4, in_channels=1, num_classes=10, sharing=sharing)


def narrower(seed: int, size: int) -> Model:
    """The widest unshared network of at most `size` parameters."""
    return network(seed, max(dim for dim in range(4, DIM + 1) if count_parameters(network(seed, dim)) <= size))


def train(model: Model, data: Digits, epochs: int, seed: int, learning_rate: float = 0.01) -> float:
    """The held-out accuracy after `epochs`."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    optimizer, steps = adamw(model, learning_rate), len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for chosen in order[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(shifted(images[chosen], 2)), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return accuracy(model, test_images, test_labels)


# --- the questions: group, name -> how the network is made


def alone() -> dict[tuple[str, str], dict]:
    """Networks that are trained from scratch, by themselves."""
    rows = {("share rate", f"rate {rate}"): {"rate": rate} for rate in (2, 8)}
    for mapping in ("strided", "random"):
        rows["mapping, rate 4", mapping] = {"rate": RATE, "mapping": mapping}
    for place in ("front", "middle", "back"):
        rows["4 blocks share one", place] = {"rate": RATE, "distribution": place, "shared_depth": 4}
    return rows


def run(job: tuple[str, str] | str, seed: int, epochs: int) -> Iterator[dict]:
    """The rows of one job: a network by itself, or what depends on the unshared network."""
    data = digits(seed, held_out=2)

    def row(group: str, name: str, model: Model, epochs: int, **options: float) -> dict:
        score = train(model, data, epochs, seed, **options)
        shared = spin.fusion.fold(model) if isinstance(model.mixer, spin.nn.FusedMixer) else model
        return {"group": group, "name": name, "seed": seed, "parameters": count_parameters(shared), "accuracy": score}

    if isinstance(job, tuple):
        yield row(*job, network(seed, **alone()[job]), epochs)
    elif job == "narrow":
        for rate in (2, 4, 8):
            yield row(
                "narrower, as large as",
                f"rate {rate}",
                narrower(seed, count_parameters(network(seed, rate=rate))),
                epochs,
            )
    elif job == "long":
        yield row("from scratch or fused, rate 4", "scratch, twice as long", network(seed, rate=RATE), 2 * epochs)
        yield row("share rate", "rate 1, twice as long", network(seed), 2 * epochs)
    else:
        unshared, shared = network(seed), network(seed, rate=RATE)
        yield row("share rate", "rate 1", unshared, epochs)
        yield row("share rate", "rate 4", shared, epochs)
        for reduction in REDUCTIONS:
            fused = spin.fusion.prepare(unshared, spin.Sharing(DEPTH, RATE), reduction)
            yield row("from scratch or fused, rate 4", f"fused: {reduction}", fused, epochs)
        pairs = {"rate 1": (unshared,) * 2, "rate 4": (shared,) * 2, "rate 1 against rate 4": (unshared, shared)}
        images = data[2][:256]
        yield {"seed": seed, "cka": {name: block_similarity(*pair, images).tolist() for name, pair in pairs.items()}}


def rows_of(job: tuple[str, str] | str, seed: int, epochs: int) -> list[dict]:
    return list(run(job, seed, epochs))


# --- what came out


def summary(rows: list[dict]) -> list[dict]:
    """Mean and deviation over the seeds of the accuracy and of its difference to the unshared network of the seed."""
    base = {row["seed"]: row["accuracy"] for row in rows if row["name"] == "rate 1"}
    by_name: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        by_name.setdefault((row["group"], row["name"]), []).append(row)
    found = []
    for (group, name), same in by_name.items():
        accuracies = [row["accuracy"] for row in same]
        differences = [row["accuracy"] - base[row["seed"]] for row in same]
        statistics = {"accuracy": spread(accuracies), "difference": spread(differences)}
        found.append({"group": group, "name": name, "parameters": same[0]["parameters"], **statistics})
    rate4 = next(row for row in found if row["name"] == "rate 4" and row["group"] == "share rate")
    found.append(rate4 | {"group": "mapping, rate 4", "name": "sequential"})
    found.append(rate4 | {"group": "from scratch or fused, rate 4", "name": "scratch"})
    groups = list(dict.fromkeys(["share rate", *(row["group"] for row in found)]))
    return sorted(found, key=lambda row: (groups.index(row["group"]), row["name"]))


def show(rows: list[dict], seeds: int) -> None:
    table = Table(title=f"held-out accuracy, mean ± deviation of {seeds} seeds", box=None)
    for column in ("group", "network", "parameters", "accuracy", "less rate 1"):
        table.add_column(column, justify="left" if column in ("group", "network") else "right")
    last = None
    for row in rows:
        accuracy, difference = ("{:.2%} ± {:.2%}".format(*row[key]) for key in ("accuracy", "difference"))
        group = row["group"] if row["group"] != last else ""
        table.add_row(group, row["name"], f"{row['parameters']:,}", accuracy, difference)
        last = row["group"]
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def draw(rows: list[dict], cka: dict[str, list], path: Path) -> None:
    figure = plt.figure(figsize=(12, 9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    axis = left.subplots()
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for y, row in enumerate(reversed(rows)):
        color = f"C{groups.index(row['group'])}"
        center, deviation = (100 * value for value in row["difference"])
        axis.errorbar(center, y, xerr=deviation, fmt="o", color=color, capsize=3)
    labels = [f"{row['group']}: {row['name']}" for row in reversed(rows)]
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.set_xlabel("held-out accuracy less that of rate 1, % of the digits")
    axis.grid(axis="x", alpha=0.3)
    maps = right.subplots(3, 1)
    for axis, (name, values) in zip(maps, cka.items(), strict=True):
        image = axis.imshow(values, vmin=0, vmax=1, cmap="magma", origin="lower")
        axis.set(title=name, xlabel="block", ylabel="block")
    right.suptitle("linear CKA of blocks")
    right.colorbar(image, ax=maps)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(out: Out, seeds: Seeds = 3, epochs: Epochs = 20, workers: Workers = CORES) -> None:
    """Trains everything, prints the table, writes the figures."""
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    jobs = ("base", "long", "narrow", *alone())  # the long ones first
    found = each(rows_of, [(job, seed, epochs) for job in jobs for seed in range(seeds)], workers)
    rows, similarities = ([row for row in found if ("cka" in row) == is_map] for is_map in (False, True))
    found = summary(rows)
    cka = {
        name: torch.tensor([s["cka"][name] for s in similarities]).mean(0).tolist() for name in similarities[0]["cka"]
    }
    show(found, seeds)
    draw(found, cka, out.with_suffix(".png"))
    write(out, start, {"seeds": seeds, "epochs": epochs, "rows": found, "runs": rows, "cka": cka})


if __name__ == "__main__":
    typer.run(main)
