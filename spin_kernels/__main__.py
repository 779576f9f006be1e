"""Command line: ``spin info MODEL`` (or ``python -m spin_kernels info MODEL``)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:  # the operators and layers need neither
    sys.exit(f"spin: expected {error.name} to be installed, got none; pip install -e '.[cli]'")

from . import models
from .summary import Summary, summarise

app = typer.Typer(add_completion=False, help="Networks that share their weights.")


@app.callback()
def root() -> None:  # keeps `info` a subcommand while it is the only one
    pass


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A registered name; 'list' prints them.")],
    image_size: Annotated[int | None, typer.Option(help="Side of the image; the published one.", min=1)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the sharing map into this PNG, PDF or SVG.")] = None,
) -> None:
    """Layers, who shares what, parameters, FLOPs and bytes of a network."""
    names = models.list_models()
    if model == "list":
        print("\n".join(names))
        return
    if model not in names:
        raise typer.BadParameter(f"expected one of {', '.join(names)}, got {model!r}", param_hint="MODEL")
    side = image_size or models.image_size(model)
    try:
        summary = summarise(models.create(model), (side, side))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--image-size") from None
    show(model, summary)
    if plot:
        draw(summary, model, plot)
        print(f"wrote {plot}")


def show(name: str, summary: Summary) -> None:
    table = Table(title=f"{name}, image {summary.image_size[0]} x {summary.image_size[1]}", box=None)
    for column, justify in (("layer", "left"), ("shape", "left"), ("weight", "left"), ("parameters", "right")):
        table.add_column(column, justify=justify)
    table.add_column("MFLOPs", justify="right")
    for layer in summary.layers:
        weight = "" if layer.weight is None else f"W{layer.weight}"
        shape = " x ".join(map(str, layer.shape))
        table.add_row(layer.name, shape, weight, f"{layer.parameters:,}", f"{layer.flops / 1e6:,.1f}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(summary.map(), highlight=False)
    saved = 1 - summary.parameters / summary.unshared_parameters
    console.print(
        f"{summary.parameters:,} parameters ({summary.unshared_parameters:,} without sharing: {saved:.0%} saved), "
        f"{summary.bytes / 1e6:,.1f} MB with buffers, {summary.flops / 1e9:,.2f} GFLOPs an image",
        highlight=False,
    )


def draw(summary: Summary, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    rows = max(summary.index) + 1
    grid = np.full((rows, len(summary.index)), np.nan)
    for block, weight in enumerate(summary.index):
        grid[weight, block] = weight
    figure, axis = plt.subplots(figsize=(2 + 0.25 * len(summary.index), 1.5 + 0.2 * rows), layout="constrained")
    axis.imshow(grid, cmap="viridis", aspect="auto")
    axis.set(title=title, xlabel="block", ylabel="distinct pointwise weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    app(prog_name="spin")


if __name__ == "__main__":
    main()
