"""timm's ConvMixers before and after ``spin_kernels.accelerate``: inference, and a training step.

``PYTHONPATH=. .venv-timm/bin/python bench/accelerate.py OUT.json`` in the environment of the README's timm command.
float32 images of random numbers, 224 x 224. Every provider answers in turns, up to five calls or a second each, at
least two; the first is dropped and the median of the turns' medians is taken. The better of contiguous and
channels_last is the untouched model. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import spin_kernels as spin

NETWORKS = ("convmixer_1024_20_ks9_p14", "convmixer_768_32")
ROUNDS, CALLS, SECONDS = 5, 5, 1.0


def randomised(model: nn.Module) -> nn.Module:
    """Running statistics and affines that are not those of a new BatchNorm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def infer(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return call


def step(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def call() -> None:
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()

    return call


def times(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds of each, measured in rotating order."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds: list[float] = []
            while len(seconds) < 2 or (len(seconds) < CALLS and sum(seconds) < SECONDS):
                start = time.perf_counter()
                calls[name]()
                seconds.append(time.perf_counter() - start)
            found[name].append(1e3 * statistics.median(seconds[1:]))
    return {name: statistics.median(values) for name, values in found.items()}


def measure(network: str, batch: int, train: bool) -> dict:
    torch.manual_seed(0)
    untouched = randomised(timm.create_model(network)).train(train)
    ours = spin.accelerate(copy.deepcopy(untouched))
    images = torch.randn(batch, 3, 224, 224)
    with torch.no_grad():
        expected, got = copy.deepcopy(untouched).eval()(images), copy.deepcopy(ours).eval()(images)
    last = copy.deepcopy(untouched).to(memory_format=torch.channels_last)
    make = step if train else infer
    ms = times(
        {
            "contiguous": make(untouched, images),
            "channels_last": make(last, images.to(memory_format=torch.channels_last)),
            "accelerated": make(ours, images),
        }
    )
    return {
        "network": network,
        "batch": batch,
        "what": "training step" if train else "inference",
        "ms": ms,
        "ratio": min(ms["contiguous"], ms["channels_last"]) / ms["accelerated"],
        "error": float((got - expected).norm() / expected.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the results")
    out = parser.parse_args().out
    rows = []
    print(f"{'network':26} {'batch':>5} {'what':13} {'contiguous':>10} {'ch. last':>9} {'ours':>8}  ratio  error")
    for network in NETWORKS:
        for batch, train in ((1, False), (4, False), (4, True)):
            row = measure(network, batch, train)
            rows.append(row)
            a, b, c = row["ms"].values()
            print(
                f"{network:26} {batch:5} {row['what']:13} {a:7.0f} ms {b:6.0f} ms {c:5.0f} ms {row['ratio']:6.2f} "
                f"{row['error']:6.0e}",
                flush=True,
            )
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine | versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
