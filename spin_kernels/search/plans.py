"""A plan: which layers of which models share templates and coefficients, and how many templates there are."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..nn.bank import Slab
from .clusters import Cluster, Shape, build_clusters, deepest_first
from .coefficients import SHARINGS
from .files import replaced
from .templates import Bank, Window, place_windows

COUNTS = ("network", "bank")
METHODS = ("paper", "stable")
FORMAT = "spin-kernels plan 1"


@dataclass(frozen=True)
class PlannedLayer:
    """A layer of a model: its name, the shape of its weight, its cluster, and its coefficient vector in each level.

    Layers with one number in one level of one cluster share a vector.
    """

    name: str
    shape: Shape
    cluster: int
    vectors: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How the layers of models are made from one bank. :func:`~spin_kernels.search.plan` makes it.

    Attributes:
        models: for each model its layers that the bank makes, in their order.
        templates: how many each (cluster, level) has.
        blocks: (o, i) of the one template of each cluster that has too few values for its largest layer; its layers
            repeat it over their channels and modulate every tile. Such clusters have no levels.
        budget: the most parameters, as ``count`` counts them.
        other_parameters: what the models train beside these weights: biases, norms, other layers.
        count: ``"network"``: all trained parameters; ``"bank"``: templates only, as the published code counts.
        strict: whether the budget may not be exceeded; the published rule gives every cluster its largest layer.
        method: ``"paper"`` or ``"stable"``, of this plan and of later splits.
        max_templates: the most that a layer combines in each of its levels.
        coefficients_of: which layers share vectors after a split, see :func:`~spin_kernels.search.plan`.
        threshold: the similarity that the last split or unsharing came down to; None without one.

    Raises:
        ValueError: the parts do not fit together, or exceed a strict budget.
    """

    models: tuple[tuple[PlannedLayer, ...], ...]
    templates: Mapping[tuple[int, int], int]
    blocks: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    budget: int = 1
    other_parameters: int = 0
    count: str = "network"
    strict: bool = True
    method: str = "paper"
    max_templates: int = 8
    coefficients_of: str = "position"
    threshold: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("count", COUNTS), ("method", METHODS), ("coefficients_of", SHARINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in (("budget", 1), ("other_parameters", 0), ("max_templates", 1)):
            value = getattr(self, name)
            if not _is_integer(value, least):
                raise ValueError(f"{name}: expected an integer from {least} on, got {value!r}")
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict: expected true or false, got {self.strict!r}")
        if self.threshold is not None and not _is_number(self.threshold):
            raise ValueError(f"threshold: expected a number or none, got {self.threshold!r}")
        for model, layers in enumerate(self.models):
            for layer in layers:
                if not isinstance(layer.name, str) or not all(_is_integer(vector, 0) for vector in layer.vectors):
                    raise ValueError(
                        f"models: expected a name and numbers of vectors from 0 on of each layer, got {layer.name!r} "
                        f"with {list(layer.vectors)} in model {model}; name the layer and number its vectors"
                    )
            if len(names := [layer.name for layer in layers]) != len(set(names)):
                raise ValueError(f"models: expected each layer of model {model} once, got {names}; remove the others")
        clusters = {cluster.number: cluster for cluster in self.clusters}
        levels = {(n, level) for n, c in clusters.items() if n not in self.blocks for level in range(len(c.levels))}
        if set(self.templates) != levels:
            raise ValueError(
                f"templates: expected those of the levels {sorted(levels)} that the layers' shapes give, got "
                f"{list(self.templates)}; add what is missing and remove the rest"
            )
        if wrong := {at: n for at, n in self.templates.items() if not _is_integer(n, 1)}:
            raise ValueError(f"templates: expected positive integers, got {wrong}; give every level one or more")
        for number, block in self.blocks.items():
            if number not in clusters or len(block) != 2 or not all(_is_integer(n, 1) for n in block):
                raise ValueError(
                    f"blocks: expected positive (o, i) of one of the clusters {sorted(clusters)}, got {block} of "
                    f"{number}; remove it or name a cluster that has layers"
                )
        for cluster in self.clusters:
            for model, members in zip(self.order, cluster.members, strict=True):
                for member in members:
                    layer = self.models[model][member.layer]
                    if len(layer.vectors) != member.levels:
                        raise ValueError(
                            f"vectors: expected {member.levels} of layer {layer.name!r} of model {model}, one for each "
                            f"of its levels, got {list(layer.vectors)}; give each a number, a new one for its own"
                        )
        if self.parameters >= 2**63:
            raise ValueError(
                f"templates: expected fewer than 2**63 parameters, got {self.parameters}; lower templates or shapes"
            )
        if self.strict and self.spent > self.budget:
            raise ValueError(
                f"budget: expected at least {self.spent} parameters for these templates, got {self.budget}; raise it, "
                "lower templates, or set strict to false"
            )

    # --- what follows from it

    @cached_property
    def order(self) -> list[int]:
        """The models, deepest first, as :attr:`clusters` and the published rules number them."""
        return deepest_first(self.models)

    @cached_property
    def clusters(self) -> tuple[Cluster, ...]:
        """Clusters with their levels; ``members`` are in the order of :attr:`order`."""
        layers = [self.models[model] for model in self.order]
        numbers = [[layer.cluster for layer in found] for found in layers]
        return build_clusters([[layer.shape for layer in found] for found in layers], numbers)

    @cached_property
    def banks(self) -> list[Bank]:
        """The templates of all levels; those of repeated blocks are not among them."""
        banks = []
        for cluster in self.clusters:
            for level, of in enumerate(cluster.levels):
                if (at := (cluster.number, level)) in self.templates:
                    users = sum(len(cluster.users(level, network)) for network in range(len(self.models)))
                    banks.append(Bank(*at, of.values, users, self.templates[at]))
        return banks

    @cached_property
    def windows(self) -> list[list[tuple[Window, ...]]]:
        """For each model and layer the templates that it combines in each of its levels; of blocks there are none."""
        whole = [cluster for cluster in self.clusters if cluster.number not in self.blocks]
        found = place_windows(whole, self.banks, self.max_templates, cover=self.method == "stable")
        result: list[list[tuple[Window, ...]]] = [[() for _ in layers] for layers in self.models]
        for model, windows in zip(self.order, found, strict=False):
            for layer, of_levels in windows.items():
                result[model][layer] = of_levels
        return result

    @cached_property
    def bank_sizes(self) -> dict[str, int]:
        """The number of values of each cluster of the :class:`~spin_kernels.nn.SuperWeightBank`, by its name."""
        sizes = {self.bank_name(bank.cluster, bank.level): bank.size for bank in self.banks}
        for cluster in self.clusters:
            if cluster.number in self.blocks:
                o, i = self.blocks[cluster.number]
                sizes[self.bank_name(cluster.number, 0)] = o * i * cluster.taps
        return sizes

    def bank_name(self, cluster: int, level: int) -> str:
        """What the :class:`~spin_kernels.nn.SuperWeightBank` calls a level's templates, or a repeated block."""
        return f"{cluster}.block" if cluster in self.blocks else f"{cluster}.{level}"

    def base(self, model: int, layer: int) -> tuple[int, int] | None:
        """The (o, i) that a layer repeats over its channels; None of a layer that the bank makes whole."""
        found = self.models[model][layer]
        if found.cluster not in self.blocks:
            return None
        o, i = self.blocks[found.cluster]
        return min(o, found.shape[0]), min(i, found.shape[1])

    def slabs(self, model: int, layer: int) -> list[Slab]:
        """How the bank makes a layer's weight, or what of it the layer repeats."""
        found = self.models[model][layer]
        cluster = next(cluster for cluster in self.clusters if cluster.number == found.cluster)
        if base := self.base(model, layer):
            row, name = self.blocks[found.cluster][1], self.bank_name(found.cluster, 0)
            return [Slab(name, 1, 0, self.bank_sizes[name], *base, row, coefficients=str(found.vectors[0]))]
        network = self.order.index(model)
        member = next(member for member in cluster.members[network] if member.layer == layer)
        slabs = []
        for part in cluster.rectangles(member):
            window, stride = self.windows[model][layer][part.level], cluster.levels[part.level].values
            templates = window.templates, window.start + part.skip, stride
            place = part.out, part.in_channels, part.row, part.out_offset, part.in_offset
            name, vector = self.bank_name(found.cluster, part.level), str(found.vectors[part.level])
            slabs.append(Slab(name, *templates, *place, vector))
        return slabs

    # --- counts

    @property
    def bank_parameters(self) -> int:
        """Values of all templates."""
        return sum(self.bank_sizes.values())

    @cached_property
    def coefficients(self) -> int:
        """Coefficients, shared ones once; a vector of which later levels cut all that it makes has none."""
        lengths = {
            (slab.cluster, slab.coefficients): slab.templates
            for model, layers in enumerate(self.models)
            for number in range(len(layers))
            for slab in self.slabs(model, number)
        }
        return sum(lengths.values())

    @cached_property
    def modulation(self) -> int:
        """Alphas and betas of the tiles of repeated blocks."""
        bases = [
            (layer.shape, base)
            for model, layers in enumerate(self.models)
            for number, layer in enumerate(layers)
            if (base := self.base(model, number))
        ]
        return sum(tile_parameters(shape, base) for shape, base in bases)

    @property
    def parameters(self) -> int:
        """All trained parameters of the models together."""
        return self.bank_parameters + self.coefficients + self.modulation + self.other_parameters

    @property
    def spent(self) -> int:
        """Of the budget: as :attr:`count` counts."""
        return self.parameters if self.count == "network" else self.bank_parameters

    # --- for people

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, one layer a line, to be read and edited.

        Raises:
            OSError: the file cannot be written; one that was there stays.
        """
        entries: dict[str, Any] = {"format": FORMAT}
        entries |= {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("models", "templates", "blocks")
        }
        lists: dict[str, list[dict[str, Any]]] = {
            "templates": [{"cluster": c, "level": w, "templates": n} for (c, w), n in self.templates.items()],
            "blocks": [{"cluster": cluster, "block": block} for cluster, block in self.blocks.items()],
        }
        lines = [f'  "{name}": {json.dumps(value)}' for name, value in entries.items()]
        lines += [f'  "{name}": {_list(entries)}' for name, entries in lists.items()]
        models = ",\n    ".join(_list([asdict(layer) for layer in layers], 6) for layers in self.models)
        lines.append(f'  "models": [\n    {models}\n  ]')
        with replaced(path) as beside:
            beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Reads a plan.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no plan, or one whose parts do not fit together.
        """
        try:
            found = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"path: expected a plan in JSON, got {str(path)!r}: {error}; save it again") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"path: expected a file with format {FORMAT!r}, got {str(path)!r}; save it with Plan.save")
        expected = {f.name for f in fields(Plan)} | {"format"}
        if set(found) != expected:
            raise ValueError(f"path: expected the keys {sorted(expected)} in {str(path)!r}, got {sorted(found)}")
        try:
            models = tuple(
                tuple(PlannedLayer(e["name"], tuple(e["shape"]), e["cluster"], tuple(e["vectors"])) for e in layers)
                for layers in found.pop("models")
            )
            listed, repeated = found.pop("templates"), found.pop("blocks")
            templates = {(e["cluster"], e["level"]): e["templates"] for e in listed}
            blocks = {e["cluster"]: tuple(e["block"]) for e in repeated}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"path: expected layers with name, shape, cluster and vectors, and templates and blocks as Plan.save "
                f"writes them, got {str(path)!r} with {error!r}; compare it with one that was saved"
            ) from None
        if len(templates) < len(listed) or len(blocks) < len(repeated):
            raise ValueError(
                f"path: expected each level and each block once in {str(path)!r}, got {listed} and {repeated}; remove "
                "what is there twice"
            )
        del found["format"]
        return Plan(models, templates, blocks, **found)

    def table(self) -> str:
        """The plan as text: levels and their templates, then the layers of each cluster, then the counts."""
        rows = [("cluster", "level", "shape", "templates", "values", "layers")]
        for cluster in self.clusters:
            users = [member for members in cluster.members for member in members]
            if cluster.number in self.blocks:
                o, i = self.blocks[cluster.number]
                shape = (o, i, *cluster.levels[0].shape[2:])
                rows.append(
                    (f"{cluster.number}", "repeated", _times(shape), "1", f"{o * i * cluster.taps:,}", f"{len(users)}")
                )
            for bank in (bank for bank in self.banks if bank.cluster == cluster.number):
                shape = cluster.levels[bank.level].shape
                rows.append(
                    (
                        f"{bank.cluster}",
                        f"{bank.level}",
                        _times(shape),
                        f"{bank.templates}",
                        f"{bank.size:,}",
                        f"{bank.users}",
                    )
                )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
        lines.append("")
        for cluster in self.clusters:
            for model, members in zip(self.order, cluster.members, strict=True):
                if members:
                    names = ", ".join(self.models[model][member.layer].name for member in members)
                    lines.append(f"cluster {cluster.number}, model {model}: {names}")
        lines.append("")
        lines.append(
            f"{self.bank_parameters:,} in templates, {self.coefficients:,} coefficients, {self.modulation:,} that "
            f"modulate blocks, {self.other_parameters:,} others: {self.parameters:,} parameters"
        )
        lines.append(f"budget {self.budget:,} ({self.count}): {self.spent / self.budget:.1%} spent")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws layers x clusters, one panel a model, into a PNG, PDF or SVG. Needs matplotlib.

        A field says from how many templates the layer is made, ``r`` that it repeats a block.
        """
        from .picture import draw_plan

        draw_plan(self, path)

    @property
    def vectors(self) -> list[dict[tuple[int, int], list[int]]]:
        """Coefficient vectors as :func:`~.coefficients.coefficient_vectors` gives them, models in :attr:`order`."""
        found: list[dict[tuple[int, int], list[int]]] = [{} for _ in self.models]
        for cluster in self.clusters:
            for network, model in enumerate(self.order):
                for level in range(len(cluster.levels)):
                    if users := cluster.users(level, network):
                        of_layers = [self.models[model][member.layer].vectors[level] for _, member in users]
                        found[network][cluster.number, level] = of_layers
        return found

    def with_vectors(self, vectors: list[dict[tuple[int, int], list[int]]], threshold: float) -> Plan:
        """The plan with other coefficient vectors; banks that are not given keep theirs."""
        merged = [before | after for before, after in zip(self.vectors, vectors, strict=True)]
        names = layer_vectors(self.clusters, merged)
        models = list(self.models)
        for network, model in enumerate(self.order):
            models[model] = tuple(replace(layer, vectors=names[network, n]) for n, layer in enumerate(models[model]))
        return replace(self, models=tuple(models), threshold=threshold)


def layer_vectors(
    clusters: tuple[Cluster, ...], vectors: list[dict[tuple[int, int], list[int]]]
) -> dict[tuple[int, int], tuple[int, ...]]:
    """For each (network, layer) its vectors by level, from those of each network and bank."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for cluster in clusters:
        for network, _ in enumerate(cluster.members):
            for level in range(len(cluster.levels)):
                of_level = vectors[network].get((cluster.number, level), [])
                for (_, member), vector in zip(cluster.users(level, network), of_level, strict=True):
                    found[network, member.layer] = (*found.get((network, member.layer), ()), vector)
    return found


def tile_parameters(shape: Shape, base: tuple[int, int]) -> int:
    """Alphas and betas of a weight that repeats one of (o, i): none where that is as large."""
    return 0 if base == shape[:2] else 2 * -(-shape[0] // base[0]) * -(-shape[1] // base[1])


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _list(entries: list[dict[str, Any]], indent: int = 4) -> str:
    if not entries:
        return "[]"
    space = " " * indent
    return "[\n" + ",\n".join(space + json.dumps(entry) for entry in entries) + f"\n{space[2:]}]"


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))
