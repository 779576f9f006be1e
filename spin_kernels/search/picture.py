"""A plan as a picture: layers by clusters. Needs matplotlib (``pip install 'spin-kernels[cli]'``)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .plans import Plan


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draws one panel a model, a column a layer, a row a cluster; see :meth:`Plan.plot`.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or has no known ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot: expected matplotlib to be installed, got none; pip install matplotlib") from None
    rows = {cluster.number: row for row, cluster in enumerate(plan.clusters)}
    widths = [len(layers) for layers in plan.models]
    figure = Figure(figsize=(2.5 + 0.28 * sum(widths), 2.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, sharey=True, width_ratios=widths)[0]
    most = max(plan.templates.values(), default=1)
    for model, (axis, layers) in enumerate(zip(axes, plan.models, strict=True)):
        grid = np.full((len(rows), len(layers)), np.nan)
        for column, layer in enumerate(layers):
            windows = plan.windows[model][column]
            templates = max((window.templates for window in windows), default=0)
            grid[rows[layer.cluster], column] = templates
            axis.text(column, rows[layer.cluster], templates or "r", ha="center", va="center", fontsize=7)
        axis.imshow(grid, cmap="viridis", alpha=0.6, vmin=0, vmax=most, aspect="auto")
        axis.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=90, fontsize=6)
        axis.set(title=f"model {model}")
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].set_ylabel("cluster")
    figure.suptitle(
        f"most templates of a layer's levels (r: repeated block); {plan.parameters:,} parameters", fontsize=9
    )
    figure.savefig(os.fspath(path), dpi=150)
