"""``spin search``: from models, pictures and a budget to a plan, a checkpoint and a report; interrupted and resumed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spin_kernels as spin

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from spin_kernels.search.data import Inputs, Pictures, read_pictures, shifted
from spin_kernels.search.model_text import make_model
from spin_kernels.search.procedure import Search, Settings
from spin_kernels.search.report import write_report
from spin_kernels.search.training import Recipe, Trainer

SMALL, WIDE = "wrn_28_10(depth=10, width=1, base_channels=4)", "wrn_28_10(depth=10, width=2, base_channels=4)"


def pictures_file(folder: Path, count: int = 120) -> str:
    """Pictures of three classes that differ in where they are bright, with noise."""
    rng = np.random.default_rng(torch.initial_seed() % 2**32)
    labels = np.arange(count) % 3
    images = rng.normal(100, 30, (count, 8, 8))
    for n, label in enumerate(labels):
        images[n, label * 3 : label * 3 + 2] += 100
    path = folder / "pictures.npz"
    np.savez(path, images=images.clip(0, 255).astype(np.uint8), labels=labels)
    return str(path)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        models=[SMALL, WIDE], data=pictures_file(tmp_path), budget="0.6", image_size=None, epochs=3, search_epochs=1,
        batch=16, learning_rate=0.01, weight_decay=0.01, shift=1, flip=True, held_out=0.3, bins=2, max_templates=4,
        count="network", strict=True, method="paper", threshold=0.2, unshare=True, seed=3, device="cpu",
    )  # fmt: skip


def quiet(what: str, done: int, steps: int) -> None:
    pass


def without_seconds(results: dict[str, Any]) -> dict[str, Any]:
    for points in (results["anytime"], results["alone"]):
        for point in points:
            del point["seconds"]
    return results


def test_a_search_keeps_the_budget_learns_and_can_be_used(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = Search(settings, out, quiet).run()
    plan = spin.Plan.load(out / "plan.json")
    networks = [make_model(text, 3, 1) for text in settings.models]
    own = sum(p.numel() for network in networks for p in network.parameters())
    nets = spin.search.apply(networks, plan)
    assert results["parameters"] == sum(p.numel() for p in nets.parameters()) == plan.parameters
    assert plan.parameters <= plan.budget == round(0.6 * own)
    ensemble = spin.Ensemble(nets).eval()
    ensemble.load_state_dict(spin.convert.load(out / "model.pt"))
    _, held_out = read_pictures(settings.data).held_out(settings.held_out, settings.seed)
    _, test = held_out.held_out(0.5, settings.seed)
    x = (test.pixels.float() - torch.tensor(results["mean"])) / torch.tensor(results["deviation"])
    right = (ensemble(x).argmax(1) == test.labels).float().mean()
    assert right == pytest.approx(results["anytime"][-1]["accuracy"])
    assert right > 0.6  # of three classes that are easy to tell apart
    assert [entry["stage"] for entry in results["history"]] == ["search"] + ["train"] + ["unshared"] * 2
    assert results["history"][-1]["loss"] < results["history"][0]["loss"]
    text = write_report(out, results).read_text()
    for figure in ("plan.png", "history.png", "anytime.png"):
        assert figure in text
        assert (out / figure).stat().st_size > 5000


@pytest.mark.parametrize("unshare", [False, True])
def test_an_interrupted_search_ends_as_one_that_was_not(settings: Settings, tmp_path: Path, unshare: bool) -> None:
    settings = replace(settings, unshare=unshare)
    expected = without_seconds(Search(settings, tmp_path / "whole", quiet).run())
    calls = 0

    def interrupt(what: str, done: int, steps: int) -> None:
        nonlocal calls
        calls += 1
        if calls % 9 == 0:  # more steps than an epoch has, so that it gets on
            raise KeyboardInterrupt

    for _ in range(10):
        try:
            found = Search(settings, tmp_path / "parts", interrupt).run()
            break
        except KeyboardInterrupt:
            continue
    assert calls > 14
    assert without_seconds(found) == expected
    whole, parts = (torch.load(tmp_path / name / "model.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert Search(settings, tmp_path / "parts", interrupt).run()["parameters"] == found["parameters"]  # nothing to do


INTERRUPTED = """
import os, signal
from spin_kernels.__main__ import main
from spin_kernels.search.training import Trainer
epoch = Trainer.epoch
def interrupted(self, *args):
    if self.epochs_done == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return epoch(self, *args)
Trainer.epoch = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the parent runs in the background, it is ignored
main()
"""


def test_the_command_goes_on_after_a_signal(settings: Settings, tmp_path: Path) -> None:
    arguments = [
        "search", SMALL, "--data", settings.data, "--budget", "2k", "--out", str(tmp_path / "out"), "--epochs", "4",
        "--search-epochs", "1", "--batch", "16",
    ]  # fmt: skip

    def run(*how: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *how], capture_output=True, text=True, env=environment, check=False)

    stopped = run("-c", INTERRUPTED, *arguments)
    assert stopped.returncode == 1
    assert "the same command goes on" in stopped.stderr
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert [entry["stage"] for entry in state["history"]] == ["search", "train", "train"]
    done = run("-m", "spin_kernels", *arguments)
    assert done.returncode == 0
    assert done.stdout.startswith("1,9")
    assert "wrote" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["history"][:3] == state["history"]
    assert len(results["history"]) == 5
    assert results["parameters"] <= 2000
    other = run("-m", "spin_kernels", *arguments, "--seed", "1")
    assert other.returncode == 2
    assert "got other seed" in " ".join(other.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"budget": "many"}, r"^budget: expected a text such as '4.5M', .*, got 'many'; "),
        ({"budget": "10"}, r"^budget: expected at least \d.* parameters for these models, got 10; "),
        ({"data": "nowhere"}, r"^data: expected a folder, an .npz file, or one of mnist, digits, got 'nowhere'"),
        ({"models": ["resnet51"]}, r"^models: expected one of .*, got 'resnet51'"),
        ({"models": ["wrn_28_10(depth=11)"]}, r"^models: expected arguments that wrn_28_10 takes, .*6n \+ 4.*; "),
        ({"models": ["wrn_28_10(depth)"]}, r"^models: expected plain values as key=value in .*; "),
        ({"models": ["torch.nn:Nothing"]}, r"^models: expected a function Nothing in torch.nn, got .*; "),
        ({"models": ["torch.nn:Flatten"]}, r"^models: expected logits of \(2, 3\) from .*Flatten, got \(2, 64\)"),
        ({"models": ["builtins:dict"]}, r"^models: expected a torch.nn.Module from builtins:dict, got dict; "),
        ({"models": ["vgg11"]}, r"^models: expected vgg11 to take images of \(1, 8, 8\), got: .*; "),
        ({"batch": 1000}, r"^batch: expected at most \d+, the number of images, got 1000; "),
        ({"learning_rate": 1e30}, r"^learning_rate: expected finite losses, got .*; "),
    ],
)  # fmt: skip
def test_errors_say_what_to_change(settings: Settings, tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Search(replace(settings, **change), tmp_path / "out", quiet).run()


def test_a_folder_of_something_else_stays_as_it_is(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^out: expected a new folder .*, got one with thesis.txt; "):
        Search(settings, out, quiet)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


# --- models, pictures and the loop


def test_models_of_modules_and_files(tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text(
        "from torch import nn\n"
        "def net(num_classes, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3), nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    model = make_model(f"{path}:net(width=6)", 7, 1)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    assert model[0].out_channels == 6
    assert isinstance(make_model("spin_kernels.models:wide_resnet(depth=10, width=1)", 5, 3), spin.models.WideResNet)
    assert make_model(SMALL, 5, 2).stem.in_channels == 2


def test_pictures_of_folders(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name, value in (("cat", 50), ("dog", 200), ("empty", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("no picture")
        for n in range(3 if value else 0):
            image.new("RGB", (20 + n, 30), (value, n, 0)).save(tmp_path / name / f"{n}.png")
    found = read_pictures(str(tmp_path), 12)
    assert found.pixels.shape == (6, 3, 12, 12)
    assert found.pixels.dtype == torch.uint8
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.pixels[:3, 0].unique().tolist() == [50]


def test_parts_are_of_every_class_and_disjoint() -> None:
    labels = torch.randint(5, (200,))
    pictures = Pictures(torch.arange(200.0).view(-1, 1, 1, 1), labels, tuple("abcde"))
    train, test = pictures.held_out(0.25, 1)
    values = torch.cat([train.pixels, test.pixels]).flatten()
    assert sorted(values.tolist()) == list(range(200))
    for label in range(5):
        count = int((labels == label).sum())
        assert int((test.labels == label).sum()) == min(max(1, round(count / 4)), count - 1)
    assert torch.equal(labels[train.pixels.flatten().long()], train.labels)
    assert not torch.equal(pictures.held_out(0.25, 2)[1].pixels, test.pixels)
    with pytest.raises(ValueError, match=r"^data: expected two pictures or more of class 'b', got 1; "):
        Pictures(torch.zeros(3, 1, 1, 1), torch.tensor([0, 0, 1]), ("a", "b")).held_out(0.5, 0)


def test_inputs_have_mean_0_and_deviation_1() -> None:
    pictures = Pictures(torch.randint(256, (50, 2, 6, 6), dtype=torch.uint8), torch.zeros(50).long(), ("a",))
    x = Inputs.of(pictures, "cpu")(pictures.pixels)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(2), atol=1e-4)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(2), atol=1e-4)


def test_shifted_pictures_are_moved_whole() -> None:
    x = torch.randn(20, 2, 9, 9)
    moved = shifted(x, 2, flip=True)
    inner = moved[:, :, 2:-2, 2:-2]
    for before, after in zip(x, inner, strict=True):
        windows = [b[:, i : i + 5, j : j + 5] for b in (before, before.flip(-1)) for i in range(5) for j in range(5)]
        assert any(torch.equal(window, after) for window in windows)
    assert shifted(x, 0) is x


def test_each_network_of_several_learns_as_it_would_alone() -> None:
    """Without a bank in common nothing else couples them; and the caller's random state stays."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3)) for width in (5, 9)]
    states = [{name: value.clone() for name, value in net.state_dict().items()} for net in nets]
    x, y, recipe = torch.randn(40, 1, 4, 4), torch.randint(3, (40,)), Recipe(epochs=2, batch=8, seed=5)
    before = torch.get_rng_state()
    together = Trainer(nn.ModuleList(nets), recipe)
    losses = [together.epoch(x, y) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    alone = []
    for net, state in zip(nets, states, strict=True):
        after = {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(state)
        trainer = Trainer(net, recipe)
        alone.append([trainer.epoch(x, y) for _ in range(2)])
        assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())
    assert losses == pytest.approx([sum(pair) / 2 for pair in zip(*alone, strict=True)])


def test_only_weights_and_templates_decay() -> None:
    net = spin.search.apply(model := make_model(SMALL, 3, 1), spin.search.plan(model, 0.7, bins=2))
    decayed = {id(p) for p in Trainer(net, Recipe()).optimizer.param_groups[0]["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in decayed}
    assert names == {"bank.templates", "classifier.weight"}
