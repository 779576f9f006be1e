"""What ``spin search`` does: models, pictures and a budget in; a plan, a trained checkpoint and results out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ensemble import Ensemble, anytime_curve
from .applying import apply
from .data import Inputs, Pictures, read_pictures, shifted
from .files import replaced
from .model_text import make_model
from .planning import as_models, plan
from .plans import Plan
from .refining import split, unshare
from .training import Recipe, Trainer

STATE, SETTINGS, PLAN, CHECKPOINT, RESULTS = "state.pt", "settings.json", "plan.json", "model.pt", "results.json"
PLANS = {"search": "plan-search.json", "train": "plan-train.json", "unshared": "plan-unshared.json"}  # of each stage
LOSS = nn.functional.cross_entropy
Progress = Callable[[str, int, int], None]  # what is going on, steps done, steps in all


@dataclass(frozen=True)
class Settings:
    """What a search is asked for; the command's help says what each means."""

    models: list[str]
    data: str
    budget: str
    image_size: int | None
    epochs: int
    search_epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    shift: int
    flip: bool
    held_out: float
    bins: int
    max_templates: int
    count: str
    strict: bool
    method: str
    threshold: float
    unshare: bool
    seed: int
    device: str


class Search:
    """A search in a folder, which may be interrupted at any time and goes on from the last epoch that it finished.

    1. Train with clusters by depth for ``search_epochs``, then split them where gradients disagree (0: no split).
    2. Train anew with the clusters found; with ``unshare``, give layers coefficients of their own after a third.
    3. Calibrate on one half of the held-out pictures, measure on the other, and write the report.

    Raises:
        ValueError: the folder belongs to a search with other settings, or a setting is out of its range.
    """

    def __init__(self, settings: Settings, folder: Path, progress: Progress) -> None:
        self.settings, self.folder, self.progress = settings, folder, progress
        self._take_folder()
        pictures = read_pictures(settings.data, settings.image_size)
        self.train, held_out = pictures.held_out(settings.held_out, settings.seed)
        self.calibration, self.test = held_out.held_out(0.5, settings.seed)
        self.inputs = Inputs.of(self.train, settings.device)
        self.history: list[dict[str, Any]] = []
        self._check_models()

    def run(self) -> dict[str, Any]:
        """Does what is left to do, and returns the results."""
        results = self.folder / RESULTS
        if results.exists():
            return json.loads(results.read_text())
        net = self._trained()
        found = self._measured(net)
        _write(self.folder / RESULTS, json.dumps(found, indent=1) + "\n")
        (self.folder / STATE).unlink(missing_ok=True)
        return found

    # --- stages

    def _trained(self) -> nn.Module:
        settings, state = self.settings, self._state()
        self.history = state["history"] if state else []
        stage = state["stage"] if state else ("search" if settings.search_epochs else "train")
        if not state:
            self._plan(self._networks()).save(self.folder / PLANS[stage])
        trainer = self._trainer(self._networks(), stage)
        if state:
            trainer.load_state_dict(state["trainer"])
        if stage == "search":
            self._train(trainer, stage)
            self._refined(trainer, split).save(self.folder / PLANS["train"])
            stage = "train"
            trainer = self._trainer(self._networks(), stage)  # from the beginning, as published
        if stage == "train":
            until = max(1, settings.epochs // 3) if settings.unshare else settings.epochs
            self._train(trainer, stage, until)
        if stage == "train" and settings.unshare:
            current, done, stage = self._refined(trainer, unshare), trainer.epochs_done, "unshared"
            current.save(self.folder / PLANS[stage])
            trainer = Trainer(apply(trainer.net, current), trainer.recipe, trainer.augment)
            trainer.epochs_done = done
        if stage == "unshared":
            self._train(trainer, stage)
        Plan.load(self.folder / PLANS[stage]).save(self.folder / PLAN)
        return trainer.net

    def _refined(self, trainer: Trainer, refine: Callable[..., Plan]) -> Plan:
        what = f"comparing gradients ({refine.__name__})"
        self.progress(what, 0, 1)
        torch.manual_seed(self.settings.seed)
        trainer.net.train()
        found = refine(trainer.net, self._batches(self.train, self.settings.batch), LOSS, self.settings.threshold)
        self.progress(what, 1, 1)
        return found

    def _plan(self, networks: list[nn.Module]) -> Plan:
        s = self.settings
        rules: dict[str, Any] = {"count": s.count, "strict": s.strict, "method": s.method}
        return plan(networks, s.budget, bins=s.bins, max_templates=s.max_templates, **rules)

    def _networks(self) -> list[nn.Module]:
        """The models as they begin."""
        torch.manual_seed(self.settings.seed)
        channels, classes = self.train.pixels.shape[1], len(self.train.classes)
        return [make_model(text, classes, channels).to(self.settings.device) for text in self.settings.models]

    def _check_models(self) -> None:
        """Tries the models with two pictures, in colour where they want it."""
        networks = self._networks()
        first = [next((m.in_channels for m in n.modules() if isinstance(m, nn.Conv2d)), None) for n in networks]
        if self.train.pixels.shape[1] == 1 and all(channels == 3 for channels in first):
            self.inputs = replace(self.inputs, channels=3)
        (x, _), *_ = self._batches(self.train.part(torch.arange(2)))
        expected = (2, len(self.train.classes))
        for text, network in zip(self.settings.models, networks, strict=True):
            try:
                with torch.no_grad():
                    found = tuple(network.eval()(x).shape)
            except (RuntimeError, ValueError, AttributeError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"models: expected {text} to take images of {tuple(x.shape[1:])}, got: {reason}; choose another "
                    "model or image size"
                ) from None
            if found != expected:
                raise ValueError(
                    f"models: expected logits of {expected} from {text}, got {found}; give it num_classes={expected[1]}"
                )

    def _trainer(self, networks: list[nn.Module], stage: str) -> Trainer:
        s = self.settings
        current = Plan.load(self.folder / PLANS[stage])
        net = apply(nn.ModuleList(networks) if len(networks) > 1 else networks[0], current)
        epochs = s.search_epochs if stage == "search" else s.epochs
        recipe = Recipe(epochs, s.batch, s.learning_rate, s.weight_decay, seed=s.seed)
        return Trainer(net, recipe, lambda pixels: shifted(self.inputs(pixels), s.shift, s.flip))

    def _train(self, trainer: Trainer, stage: str, until: int | None = None) -> None:
        pixels, labels = (tensor.to(self.settings.device) for tensor in (self.train.pixels, self.train.labels))
        while trainer.epochs_done < (trainer.recipe.epochs if until is None else until):
            what = f"{stage}, epoch {trainer.epochs_done + 1} of {trainer.recipe.epochs}"
            loss = trainer.epoch(pixels, labels, partial(self.progress, what))
            accuracies = [self._accuracy(network) for network in as_models(trainer.net)]
            self.history.append({"stage": stage, "epoch": trainer.epochs_done, "loss": loss, "accuracies": accuracies})
            _save(self.folder / STATE, {"stage": stage, "trainer": trainer.state_dict(), "history": self.history})

    # --- measurements

    @torch.no_grad()
    def _accuracy(self, network: nn.Module) -> float:
        network.eval()
        right = sum(int((network(x).argmax(1) == y).sum()) for x, y in self._batches(self.calibration))
        return right / len(self.calibration)

    def _measured(self, net: nn.Module) -> dict[str, Any]:
        self.progress("calibrating and measuring", 0, 1)
        ensemble = Ensemble(net if isinstance(net, nn.ModuleList) else [net]).eval()
        ensemble.calibrate(self._batches(self.calibration), reorder=len(self.settings.models) > 1)
        points = anytime_curve(ensemble, self._batches(self.test))
        members = range(len(self.settings.models))
        alone = [anytime_curve(ensemble.keep([member]), self._batches(self.test))[0] for member in members]
        whole = ensemble if len(members) > 1 else net
        _save(self.folder / CHECKPOINT, {name: value.cpu() for name, value in whole.state_dict().items()})
        current = Plan.load(self.folder / PLAN)
        self.progress("calibrating and measuring", 1, 1)
        parts = {"trained with": self.train, "calibrated with": self.calibration, "tested with": self.test}
        return {
            "settings": asdict(self.settings),
            "classes": list(self.train.classes),
            "pictures": {name: len(part) for name, part in parts.items()},
            "mean": self.inputs.mean.tolist(),
            "deviation": self.inputs.deviation.tolist(),
            "parameters": current.parameters,
            "budget": current.budget,
            "threshold": current.threshold,
            "order": list(ensemble.order),
            "weights": ensemble.weights.tolist(),
            "temperatures": ensemble.temperatures.tolist(),
            "anytime": [point._asdict() for point in points],
            "alone": [point._asdict() for point in alone],
            "history": self.history,
        }

    def _batches(self, pictures: Pictures, size: int = 250) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.settings.device
        for pixels, labels in zip(pictures.pixels.split(size), pictures.labels.split(size), strict=True):
            yield self.inputs(pixels.to(device)), labels.to(device)

    # --- the folder

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, mine = self.folder / SETTINGS, asdict(self.settings)
        if not path.exists():
            if found := sorted(p.name for p in self.folder.iterdir()):
                raise ValueError(
                    f"out: expected a new folder or one of a search, got one with {found[0]}; name another"
                )
            _write(path, json.dumps(mine, indent=1) + "\n")
            return
        try:
            before = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"out: expected settings in {str(path)!r}, got other text; name another folder") from None
        other = [name for name, value in mine.items() if before.get(name) != value]
        if other:
            raise ValueError(
                f"out: expected the settings of the search in {str(self.folder)!r}, got other {', '.join(other)}; "
                "repeat its command to go on, or name another folder"
            )

    def _state(self) -> dict[str, Any] | None:
        path = self.folder / STATE
        return torch.load(path, map_location=self.settings.device, weights_only=True) if path.exists() else None


def _save(path: Path, state: Any) -> None:
    with replaced(path) as beside:
        torch.save(state, beside)


def _write(path: Path, text: str) -> None:
    with replaced(path) as beside:
        beside.write_text(text)
