"""Plans as files, tables and pictures: saved, loaded, edited and damaged."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from planned_models import draws, random_plan, trained
from torch import nn

from spin_kernels import search
from spin_kernels.search import Plan

Content = dict[str, Any]


def edited(plan: Plan, path: Path) -> Content:
    plan.save(path)
    return json.loads(path.read_text())


def reload(content: Content, path: Path) -> Plan:
    path.write_text(json.dumps(content))
    return Plan.load(path)


def two_layers(**settings: Any) -> tuple[nn.Module, Plan]:
    """Level (0, 0) makes both weights, (0, 1) what the second has beyond the first; 108 and 36 values."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 5, 1))
    return model, search.plan(model, 10_000, clusters={"0": 0, "1": 0}, **settings)


# --- saved and loaded


def test_a_saved_plan_is_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for rng in draws(20):
        models, plan = random_plan(rng)
        plan.save(path)
        loaded = Plan.load(path)
        assert loaded == plan
        assert loaded.table() == plan.table()
        assert [path] == list(tmp_path.iterdir())
        lines = path.read_text().splitlines()
        for layer in (layer for layers in plan.models for layer in layers):
            assert sum(json.dumps(layer.name) in line and str(layer.cluster) in line for line in lines)
        content = json.loads(path.read_text())
        assert [len(layers) for layers in content["models"]] == [len(layers) for layers in plan.models]
        assert len(lines) < 20 + sum(len(layers) + 2 for layers in plan.models) + len(plan.templates) + len(plan.blocks)
        nets = [search.apply(models, found) for found in (plan, loaded)]
        nets[1].load_state_dict(nets[0].state_dict())
        for first, second in zip(nets[0].modules(), nets[1].modules(), strict=True):
            if hasattr(first, "bank_layers"):
                assert torch.equal(first.weight, second.weight)


def test_names_of_any_letters(tmp_path: Path) -> None:
    model = nn.ModuleDict({'größe "1"\\': nn.Conv2d(3, 4, 1), "層": nn.Conv2d(3, 4, 1), "last": nn.Linear(3, 2)})
    plan = search.plan(model, 1000)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(str(tmp_path / "plan.json")) == plan


def test_a_plan_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    _, plan = two_layers()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "plan.json"):
        with pytest.raises(OSError, match=r"\[Errno"):
            plan.save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "plan.json")


# --- edited by hand


def test_more_templates(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for method in ("paper", "stable"):
        model, plan = two_layers(method=method)
        content = edited(plan, path)
        before = {(e["cluster"], e["level"]): e["templates"] for e in content["templates"]}
        content["templates"][1]["templates"] += 2
        more = reload(content, path)
        assert more.templates == before | {(0, 1): before[0, 1] + 2}
        net = search.apply(model, more)
        assert trained(net) == more.parameters == plan.parameters + 2 * 36 + 2 * (before[0, 1] + 2 <= 8)
        content["budget"] = more.parameters - 1
        with pytest.raises(ValueError, match=rf"^budget: expected at least {more.parameters} parameters .* raise it, "):
            reload(content, path)
        content["strict"] = False
        assert reload(content, path).parameters == more.parameters
        for huge in (10**30, 10**400):
            content["templates"][1]["templates"] = huge
            with pytest.raises(
                ValueError, match=r"^templates: expected fewer than 2\*\*63 parameters, got \d+; lower temp"
            ):
                reload(content, path)


def test_other_clusters_and_vectors(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    model, plan = two_layers()
    content = edited(plan, path)
    content["models"][0][1] |= {"cluster": 4, "vectors": [9]}
    with pytest.raises(ValueError, match=r"^templates: expected those of the levels \[\(0, 0\), \(4, 0\)\] .* got "):
        reload(content, path)
    content["templates"] = [{"cluster": n, "level": 0, "templates": 2} for n in (4, 0)]
    apart = reload(content, path)
    assert [cluster.number for cluster in apart.clusters] == [0, 4]
    assert search.apply(model, apart).bank.sizes == {"0.0": 2 * 108, "4.0": 2 * 144}

    content = edited(plan, path)
    content["models"][0][1]["vectors"][0] = content["models"][0][0]["vectors"][0]
    shared = reload(content, path)
    assert shared.coefficients == plan.coefficients - plan.windows[0][0][0].templates
    net = search.apply(model, shared)
    assert trained(net) == shared.parameters
    assert torch.equal(net[0].weight[:, :3], net[1].weight[:, :3])

    content["models"][0][1]["vectors"].pop()
    with pytest.raises(ValueError, match=r"^vectors: expected 2 of layer '1' of model 0, .*, got \[\d\]; give each a "):
        reload(content, path)
    content = edited(plan, path)
    content["models"][0].append({"name": "2", "shape": [5, 4, 1, 1], "cluster": 0, "vectors": [7]})
    with pytest.raises(ValueError, match=r"^numbers: expected layers of one kernel size in cluster 0, got .*; keep "):
        reload(content, path)
    content["models"][0][-1]["name"] = "1"
    with pytest.raises(ValueError, match=r"^models: expected each layer of model 0 once, got \['0', '1', '1'\]; "):
        reload(content, path)


def test_a_block_instead_of_levels(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    model, plan = two_layers()
    content = edited(plan, path)
    content["blocks"] = [{"cluster": 0, "block": [2, 3]}]
    with pytest.raises(ValueError, match=r"^templates: expected those of the levels \[\] .*, got \["):
        reload(content, path)
    content["templates"] = []
    block = reload(content, path)
    net = search.apply(model, block)
    assert trained(net) == block.parameters == 2 * 3 * 9 + 2 + 2 * 2 + 2 * 4 + 25
    assert net[1].alpha.shape == (2, 2)
    content["blocks"].append({"cluster": 3, "block": [2, 3]})
    with pytest.raises(ValueError, match=r"^blocks: expected positive \(o, i\) of one of the clusters \[0\], got "):
        reload(content, path)
    content["blocks"] = [{"cluster": 0, "block": [2, 3]}] * 2
    with pytest.raises(ValueError, match=r"^path: expected each level and each block once in '.*', got "):
        reload(content, path)


# --- damaged

VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 10**30, 10**400, 1e30, -0.5, 0.5, float("nan"), float("inf")),
    *("1", "abc", "", [], [1], ["a"], [None], [[1]], {}, {"a": 1}),
]


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    listed = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in listed:
        yield (*path, key)
        yield from places(value, (*path, key))


def damaged(rng: Random, content: Content) -> tuple[Content, list[tuple[Any, ...]]]:
    content, done = copy.deepcopy(content), []
    for _ in range(rng.choice([1, 1, 1, 2])):
        path = rng.choice(list(places(content)))
        parent, value = content, rng.choice(VALUES)
        for key in path[:-1]:
            parent = parent[key]
        kind = rng.choice(["set", "set", "delete", "twice"])
        done.append((kind, path, value))
        if kind == "delete":
            del parent[path[-1]]
        elif kind == "twice" and isinstance(parent, list):
            parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = copy.deepcopy(value)
    return content, done


def result(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, or None and the message of its ValueError."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


def test_damage_is_a_value_error_or_a_plan_that_works(tmp_path: Path) -> None:
    path, refused, loaded = tmp_path / "plan.json", 0, 0
    for rng in draws(12):
        models, plan = random_plan(rng)
        content = edited(plan, path)
        for _ in range(50):
            changed, done = damaged(rng, content)
            print(done)
            found, message = result(lambda c=changed: reload(c, path))
            if found is None:
                assert re.match(r"^\w+: expected ", message)  # a sentence that names what is wrong
                refused += 1
                continue
            loaded += 1
            assert f"{found.parameters:,} parameters" in found.table()
            found.save(path)
            assert Plan.load(path) == found
            if found.bank_parameters < 10**6:
                net, message = result(lambda m=models, f=found: search.apply(m, f))
                if net is None:
                    assert re.match(r"^(models|plan): expected ", message)
                    continue
                assert net.bank.templates.numel() == found.bank_parameters
                assert net.bank.coefficients.values.numel() == found.coefficients
    assert refused > loaded > 0


def test_text_that_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    _, plan = two_layers()
    plan.save(path)
    whole = path.read_bytes()
    for rng in draws(100):
        at = rng.randrange(len(whole) - 3)  # before the last brace
        broken = rng.choice([whole[:at], whole[:at] + bytes([rng.choice([0, 128, 255])]) + whole[at + 1 :]])
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"^path: expected "):
            Plan.load(path)
    for text in ("", "[]", "5", "null", '"plan"', "{}", '{"format": "spin-kernels plan 0"}', "[" * 5000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^path: expected a (plan in JSON|file with format 'spin-kernels plan)"):
            Plan.load(path)
    for key in json.loads(whole):
        content = json.loads(whole)
        del content[key]
        with pytest.raises(ValueError, match=r"^path: expected (the keys|a file with format) .* got "):
            reload(content, path)
    with pytest.raises(ValueError, match=r"^path: expected the keys .* got .*'other'"):
        reload(json.loads(whole) | {"other": 1}, path)


# --- for people


def test_tables() -> None:
    for rng in draws(10):
        models, plan = random_plan(rng)
        net, lines = search.apply(models, plan), plan.table().splitlines()
        rows = [re.split(r" {2,}", line.strip()) for line in lines[1 : lines.index("")]]
        levels = [(str(b.cluster), str(b.level), str(b.templates), f"{b.size:,}", str(b.users)) for b in plan.banks]
        assert [(*row[:2], *row[3:]) for row in rows if row[1] != "repeated"] == levels
        users = {number: sum(layer.cluster == number for of in plan.models for layer in of) for number in plan.blocks}
        blocks = {row[0]: (row[2].split(" x ")[:2], row[5]) for row in rows if row[1] == "repeated"}
        assert blocks == {str(c): ([str(n) for n in block], str(users[c])) for c, block in plan.blocks.items()}
        assert sum(int(row[4].replace(",", "")) for row in rows) == net.bank.templates.numel()
        for number in {layer.cluster for layers in plan.models for layer in layers}:
            for model, layers in enumerate(plan.models):
                if names := [layer.name for layer in layers if layer.cluster == number]:
                    assert f"cluster {number}, model {model}: {', '.join(names)}" in lines
        assert lines[-2].endswith(f": {trained(net):,} parameters")
        assert sum(int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", lines[-2])[:-1]) == trained(net)
        assert lines[-1] == f"budget {plan.budget:,} ({plan.count}): {plan.spent / plan.budget:.1%} spent"


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    starts = {"png": b"\x89PNG\r\n", "pdf": b"%PDF-", "svg": b"<?xml"}
    for rng, (ending, start) in zip(draws(3), starts.items(), strict=True):
        _, plan = random_plan(rng)
        plan.plot(tmp_path / f"plan.{ending}")
        assert (tmp_path / f"plan.{ending}").read_bytes().startswith(start)
    plan.plot(str(tmp_path / "other.png"))
    with pytest.raises(ValueError, match="format"):
        plan.plot(tmp_path / "plan.xyz")
    with pytest.raises(OSError, match="No such file"):
        plan.plot(tmp_path / "none" / "plan.png")
