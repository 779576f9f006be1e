"""Command line: ``spin info``, ``spin analyze`` and ``spin search`` (or ``python -m spin_kernels ...``)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

try:
    import typer
    from matplotlib.figure import Figure
    from PIL import Image, ImageOps, UnidentifiedImageError
    from rich.console import Console
    from rich.progress import Progress, track
    from rich.table import Table
except ImportError as error:  # the operators and layers need none of them
    sys.exit(f"spin: expected {error.name} to be installed, got none; pip install -e '.[cli]'")

from . import models
from .analysis import block_similarity
from .checkpoints import load
from .summary import Summary, summarise

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Networks that share their weights.")
_ModelName = Annotated[str, typer.Argument(help="A registered name; 'spin info list' prints them.")]
_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@app.command()
def info(
    model: _ModelName,
    image_size: Annotated[int | None, typer.Option(help="Side of the image; the published one.", min=1)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the sharing map into this PNG, PDF or SVG.")] = None,
) -> None:
    """Layers, who shares what, parameters, FLOPs and bytes of a network."""
    if model == "list":
        print("\n".join(models.list_models()))
        return
    network = _create(model, "MODEL")
    side = image_size or models.image_size(model)
    try:
        summary = summarise(network, (side, side))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--image-size") from None
    if plot:
        if not summary.plans:
            raise typer.BadParameter(f"expected a network of equal blocks, got {model}", param_hint="--plot")
        _check_plot(plot)
    _show(model, summary)
    if plot:
        _save(_map(summary, model), plot)


@app.command()
def analyze(
    model: _ModelName,
    other: Annotated[str, typer.Argument(help="The network to compare its blocks with; may be the same.")],
    images: Annotated[Path, typer.Option(help="Folder of photographs; both networks see the same crops.")],
    weights: Annotated[Path | None, typer.Option(help="State dict of MODEL; random weights without.")] = None,
    other_weights: Annotated[Path | None, typer.Option(help="State dict of OTHER.")] = None,
    count: Annotated[int, typer.Option(help="At most so many images.", min=2)] = 256,
    plot: Annotated[Path, typer.Option(help="The heat map.")] = Path("similarity.png"),
) -> None:
    """How alike the blocks of two networks are (linear CKA), say of a shared and an unshared one, as a heat map."""
    _check_plot(plot)
    pair: list[Any] = []  # of equal blocks, which the name of each tells
    for name, path, hint in ((model, weights, "--weights"), (other, other_weights, "--other-weights")):
        argument = "MODEL" if hint == "--weights" else "OTHER"
        network = _create(name, argument).eval()
        if name not in models.isotropic_models():
            raise typer.BadParameter(f"expected a network of equal blocks, got {name}", param_hint=argument)
        if path:
            _load_weights(network, path, hint)
        pair.append(network)
    sides = {models.image_size(name) for name in (model, other)}
    if len(sides) > 1:
        raise typer.BadParameter(f"expected networks for images of one size, got sides {sorted(sides)}")
    similarity = block_similarity(pair[0], pair[1], _photographs(images, count, sides.pop()))
    print(f"linear CKA of the blocks of {model} (rows, from the first block) and {other} (columns):")
    for row in similarity.tolist():
        print(" ".join(f"{value:.2f}" for value in row))
    _save(_heat_map(similarity, model, other), plot)


@app.command()
def search(
    model: Annotated[
        list[str],
        typer.Argument(
            help="One or more that share a bank: NAME of 'spin info list', package.module:function or "
            "file.py:function, each with (key=value, ...) if need be."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="A folder with a folder of pictures for each class, an .npz with images and labels, mnist (5,000 "
            "digits) or digits (8 x 8)."
        ),
    ],
    budget: Annotated[str, typer.Option(help="Parameters of all models together: 4500000, 4.5M, or 0.25 or 25%.")],
    out: Annotated[Path, typer.Option(help="Folder for plan, checkpoint and report; the same again goes on.")],
    image_size: Annotated[int | None, typer.Option(help="Side that pictures are resized to.", min=4)] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    search_epochs: Annotated[int, typer.Option(help="Before clusters are split; 0: no split.", min=0)] = 4,
    batch: Annotated[int, typer.Option(min=2)] = 64,
    learning_rate: Annotated[float, typer.Option(min=0)] = 0.005,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.05,
    shift: Annotated[int, typer.Option(help="Pixels that pictures are moved by in training.", min=0)] = 2,
    flip: Annotated[bool, typer.Option(help="Mirror half of the pictures in training.")] = False,
    held_out: Annotated[float, typer.Option(help="Part for calibration and test, half each.", min=0.01, max=0.9)] = 0.3,
    bins: Annotated[int, typer.Option(help="Clusters to begin with.", min=1)] = 4,
    max_templates: Annotated[int, typer.Option(help="Most that a layer combines.", min=1)] = 8,
    count: Annotated[str, typer.Option(help="What the budget counts: network or bank.")] = "network",
    strict: Annotated[bool, typer.Option(help="Never exceed the budget.")] = True,
    method: Annotated[str, typer.Option(help="paper or stable.")] = "paper",
    threshold: Annotated[float, typer.Option(help="Similarity of gradients that keeps layers together.")] = 0.1,
    unshare: Annotated[bool, typer.Option(help="Give layers coefficients of their own after a third.")] = False,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Fit models into a budget of parameters, and train them: a plan, a checkpoint and a report with figures."""
    from .search.procedure import Search, Settings
    from .search.report import write_report

    settings = Settings(
        model, data, budget, image_size, epochs, search_epochs, batch, learning_rate, weight_decay, shift, flip,
        held_out, bins, max_templates, count, strict, method, threshold, unshare, seed, device,
    )  # fmt: skip
    console = Console(stderr=True)
    try:
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("reading", total=None)

            def show(what: str, done: int, steps: int) -> None:
                progress.update(task, description=what, completed=done, total=steps)
                if not console.is_terminal and done == steps:
                    print(what, file=sys.stderr)

            results = Search(settings, out, show).run()
            report = write_report(out, results)
    except KeyboardInterrupt:
        sys.exit("spin search: interrupted; the same command goes on after the last epoch that was finished")
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        name, _, rest = str(error).partition(":")
        hint = "--" + name.replace("_", "-") if name in Settings.__dataclass_fields__ and name != "models" else None
        raise typer.BadParameter(rest.strip() if hint else str(error), param_hint=hint) from None
    last = results["anytime"][-1]
    print(
        f"{results['parameters']:,} parameters, {last['accuracy']:.2%} of {results['pictures']['tested with']} "
        f"pictures, NLL {last['nll']:.4f}; wrote {report}"
    )


def _create(name: str, hint: str) -> models.Model:
    names = models.list_models()
    if name not in names:
        raise typer.BadParameter(f"expected one of {', '.join(names)}, got {name!r}", param_hint=hint)
    return models.create(name)


def _load_weights(network: nn.Module, path: Path, hint: str) -> None:
    try:
        network.load_state_dict(load(path))
    except (OSError, ValueError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None
    except RuntimeError as error:  # one line per key that is missing, unexpected or of another shape
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" and {len(lines) - 1} more such lines" if len(lines) > 1 else ""
        raise typer.BadParameter(
            f"expected the network's own state dict, got: {lines[0]}{more}", param_hint=hint
        ) from None


def _photographs(folder: Path, count: int, side: int) -> Tensor:
    """The middles of the first `count` pictures in a folder, (N, 3, side, side), normalised as for ImageNet."""
    if not folder.is_dir():
        raise typer.BadParameter(f"expected a folder, got {str(folder)!r}", param_hint="--images")
    found: list[Tensor] = []
    for path in track(sorted(folder.iterdir()), "images", transient=True, disable=not sys.stderr.isatty()):
        if len(found) == count:
            break
        try:
            with Image.open(path) as picture:
                square = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
        except (UnidentifiedImageError, OSError):
            continue  # not a picture
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3)
        found.append((pixels / 255 - _MEAN) / _STD)
    if len(found) < 2:
        raise typer.BadParameter(
            f"expected two pictures or more, got {len(found)} in {str(folder)!r}", param_hint="--images"
        )
    return torch.stack(found).permute(0, 3, 1, 2).contiguous()


def _show(name: str, summary: Summary) -> None:
    table = Table(title=f"{name}, image {summary.image_size[0]} x {summary.image_size[1]}", box=None)
    for column in ("layer", "shape", "weight"):
        table.add_column(column)
    for column in ("parameters", "MFLOPs"):
        table.add_column(column, justify="right")
    for layer in summary.layers:
        shape = " x ".join(map(str, layer.shape))
        table.add_row(layer.name, shape, layer.weight, f"{layer.parameters:,}", f"{layer.flops / 1e6:,.1f}")
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    if summary.plans:
        console.print(summary.map(), highlight=False)
    saved = 1 - summary.parameters / summary.unshared_parameters
    console.print(
        f"{summary.parameters:,} parameters ({summary.unshared_parameters:,} without sharing: {saved:.0%} saved), "
        f"{summary.bytes / 1e6:,.1f} MB with buffers, {summary.flops / 1e9:,.2f} GFLOPs an image",
        highlight=False,
    )


def _map(summary: Summary, title: str) -> Figure:
    depth, rows = len(summary.plans["W"]), [max(index) + 1 for index in summary.plans.values()]
    figure = Figure(figsize=(2 + 0.25 * depth, sum(1.5 + 0.2 * n for n in rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, height_ratios=rows, squeeze=False)[:, 0]
    for axis, n, (kind, index) in zip(axes, rows, summary.plans.items(), strict=True):
        grid = torch.full((n, depth), torch.nan)
        grid[list(index), range(depth)] = torch.tensor(index, dtype=torch.float32)
        axis.imshow(grid.numpy(), cmap="viridis", aspect="auto")
        axis.set(xlabel="block", ylabel={"W": "distinct weight", "F": "distinct depthwise filters"}[kind])
    figure.suptitle(title)
    return figure


def _heat_map(similarity: Tensor, model: str, other: str) -> Figure:
    figure = Figure(figsize=(7, 6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(similarity.numpy(), vmin=0, vmax=1, cmap="magma", origin="lower")
    axis.set(title="linear CKA of blocks", xlabel=f"block of {other}", ylabel=f"block of {model}")
    figure.colorbar(image)
    return figure


def _check_plot(path: Path) -> None:
    """Refuses what cannot be written before the work is done for it, and makes no file: the work may fail."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"expected a .png, .pdf or .svg file, got {str(path)!r}", param_hint="--plot")
    there = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    folder = there != path
    if there.is_dir() != folder or not os.access(there, os.W_OK | (os.X_OK if folder else 0)):
        raise typer.BadParameter(f"expected a file that can be written, got {str(path)!r}", param_hint="--plot")


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise typer.BadParameter(f"expected a file that can be written, got {error}", param_hint="--plot") from None
    print(f"wrote {path}")


def main() -> None:
    app(prog_name="spin")


if __name__ == "__main__":
    main()
