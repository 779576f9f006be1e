"""Clusters, templates, splitting and unsharing against the cases computed by the SuperWeights authors' own code."""

from typing import Any

import golden
import pytest
import torch
from test_golden_weights import rectangles
from torch import Tensor, nn

from spin_kernels import search
from spin_kernels.search.clusters import build_clusters, number_layers
from spin_kernels.search.coefficients import coefficient_vectors
from spin_kernels.search.joining import Partner, assign_clusters
from spin_kernels.search.priority import by_similarity, regroup
from spin_kernels.search.splitting import cluster_numbers, largest_layers, layer_queues, split_clusters
from spin_kernels.search.templates import Bank, place_windows, smallest_banks, spend
from spin_kernels.search.unsharing import unshare_vectors


def entries(family: str) -> pytest.MarkDecorator:
    """The entries of a family's JSON files."""
    found = [
        (f"{case['name']}-{n}", e)
        for case in golden.cases(family, suffix=".json")
        for n, e in enumerate(golden.load(case))
    ]
    return pytest.mark.parametrize("entry", [entry for _, entry in found], ids=[name for name, _ in found])


def results(family: str, has: str) -> pytest.MarkDecorator:
    """The results in a family's index entries, those with this key."""
    found = [(case, result) for case in golden.cases(family) for result in case["results"] if has in result]
    names = [f"{case['name']}-{r['threshold']}-{r.get('coeff_threshold', '')}" for case, r in found]
    return pytest.mark.parametrize(("case", "result"), found, ids=names)


def by_layer(case: dict[str, Any], kind: str) -> list[list[Tensor]] | None:
    """The tensors kind.net{n}.layer{l} of a case by network and layer."""
    found: dict[int, dict[int, Tensor]] = {}
    for name, tensor in golden.load(case).items():
        if name.startswith(f"{kind}.net"):
            network, layer = (int(part.lstrip("netlayr")) for part in name.split(".")[1:])
            found.setdefault(network, {})[layer] = tensor
    return [[found[n][layer] for layer in sorted(found[n])] for n in sorted(found)] or None


def numbered(networks: Any) -> list[dict[int, list[int]]]:
    """Clusters as the cases write them: {"net0": {"3": [0, 1]}} or [{"3": [0, 1]}]."""
    listed = networks if isinstance(networks, list) else [networks[f"net{n}"] for n in range(len(networks))]
    return [{int(number): layers for number, layers in network.items()} for network in listed]


def in_order_of_use(
    vectors: list[dict[Any, list[Any]]], like: list[dict[Any, list[Any]]]
) -> list[dict[Any, list[int]]]:
    """The same sharing with numbers by first use, banks in the order of `like`."""
    numbers: dict[Any, int] = {}
    return [
        {bank: [numbers.setdefault((bank, vector), len(numbers)) for vector in network[bank]] for bank in order}
        for network, order in zip(vectors, like, strict=True)
    ]


def wide_resnet(depth: int, width: int, base: int) -> list[tuple[int, ...]]:
    shapes, into = [(base, 3, 3, 3)], base
    for out in (base * width, 2 * base * width, 4 * base * width):
        for _ in range((depth - 4) // 6):
            shapes += [(out, into, 3, 3), (out, out, 3, 3)]
            shapes += [(out, into, 1, 1)] if out != into else []
            into = out
    return shapes


# --- the published cases: allocation


@entries("superweight_allocation")
def test_allocation(entry: dict[str, Any]) -> None:
    networks = entry["layer_shapes"]
    clusters = build_clusters(networks, number_layers(networks, entry["param_group_bins"], entry["bin_type"]))
    for n in range(len(networks)):
        groups: dict[str, dict[str, list[int]]] = {}
        sizing: dict[str, dict[str, list[Any]]] = {}
        for cluster in clusters:
            for number, level in enumerate(cluster.levels):
                if users := dict(cluster.users(number, n)):
                    width, group = f"width_{number}", str(cluster.number)
                    listed = cluster.members[n][: max(users) + 1]  # smaller layers before a user have placeholders
                    piece = {"num_params": level.values, "pieces": [list(shape) for shape in level.pieces]}
                    groups.setdefault(width, {})[group] = [member.layer for member in listed]
                    pieces = [piece if at in users else {"placeholder": [0, 0]} for at in range(len(listed))]
                    sizing.setdefault(width, {})[group] = pieces
        assert groups == entry["layer_groups"][f"net_{n}"]
        assert sizing == entry["group_sizing"][f"net_{n}"]

    depth, width = max(c.number for c in clusters) + 1, max(len(c.levels) for c in clusters)
    assert (width, depth) == (entry["max_width"], entry["max_group_depth"])

    def flat(banks: list[Bank]) -> list[int]:
        sizes = [0] * (width * depth)
        for bank in banks:
            sizes[bank.level * depth + bank.cluster] = bank.size
        return sizes

    assert flat(smallest_banks(clusters)) == entry["sizes_before"]
    assert sum(flat(smallest_banks(clusters))) == entry["minimum_total"]
    for expected in entry["budgets"]:
        banks = spend(clusters, expected["budget"])
        assert flat(banks) == expected["sizes_after"]
        assert sum(bank.size for bank in banks) == expected["sum_after"]
        if expected["windows"] is not None:
            placed = place_windows(clusters, banks, entry["max_candidates"])
            found = [
                [[[w.cluster, w.level, w.templates, w.start, w.end] for w in ws] for ws in ls.values()] for ls in placed
            ]
            assert found == expected["windows"]


@pytest.mark.parametrize("case", golden.cases("superweight"), ids=lambda case: case["name"])
def test_networks_of_a_bank(case: dict[str, Any]) -> None:
    """Clusters, windows, pieces and coefficients of the networks whose weights the cases hold."""
    config, networks = case["config"], case["networks"]
    shapes = [[layer["shape"] for layer in network["layers"]] for network in networks]
    given = config.get("given_groups_per_network")
    numbers = given or number_layers(shapes, config["param_group_bins"], config["bin_type"])
    assert numbers == [[layer["group"] for layer in network["layers"]] for network in networks]
    clusters = build_clusters(shapes, numbers)
    windows = place_windows(clusters, spend(clusters, config["max_params"]), config["max_candidates"])

    sharing = "cluster" if config["one_coefficient_vector_per_group"] else "position"
    partners: list[dict[int, Partner]] = []
    if "given_coefficient_partners" in config:
        partners = [{}, partners_of(config["given_coefficient_partners"]["net1"])]
    vectors = coefficient_vectors(clusters, sharing if config["coefficients_shared"] else "own", partners)
    named: list[dict[tuple[int, int], list[str]]] = [{} for _ in networks]
    for n, network in enumerate(networks):
        for cluster in clusters:
            for member in cluster.members[n]:
                parts = network["layers"][member.layer]["parts"]
                at = [(w.cluster, w.level, w.templates, w.start, w.end) for w in windows[n][member.layer]]
                assert at == [(cluster.number, p["width"], p["candidates"], p["start"], p["end"]) for p in parts]
                assert [level.values for level in cluster.levels[: member.levels]] == [p["num_params"] for p in parts]
                keys = ("part", "out_offset", "in_offset", "out", "in", "row", "skip")
                expected = [tuple(place[key] for key in keys) for place in rectangles(parts)[0]]
                found = [
                    (r.level, r.out_offset, r.in_offset, r.out, r.in_channels, r.row, r.skip)
                    for r in cluster.rectangles(member)
                ]
                assert sorted(found) == sorted(expected)
                for level, part in enumerate(parts):
                    named[n].setdefault((cluster.number, level), []).append(part.get("coefficients", ""))
    if config["share_type"] == "wavg_slide":  # others have no coefficients
        assert in_order_of_use(vectors, vectors) == in_order_of_use(named, vectors)


def place_of_bank(name: str) -> tuple[int, int]:
    """bank.group{cluster}.width{level}"""
    _, group, width = name.split(".")
    return int(group.removeprefix("group")), int(width.removeprefix("width"))


@pytest.mark.parametrize("case", golden.cases("superweight"), ids=lambda case: case["name"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_plan_makes_the_published_weights(case: dict[str, Any], dtype: torch.dtype) -> None:
    """Models of plain convolutions, planned and applied, with the case's templates and coefficients in their bank."""
    config, tensors = case["config"], golden.load(case)
    shapes = [[layer["shape"] for layer in network["layers"]] for network in case["networks"]]
    models = [
        nn.Sequential(*(nn.Conv2d(into, out, kernel, bias=False, dtype=dtype) for out, into, *kernel in found))
        for found in shapes
    ]
    sharing = "cluster" if config["one_coefficient_vector_per_group"] else "position"
    plan = search.plan(
        models,
        config["max_params"],
        clusters=[{f"{n}": layer["group"] for n, layer in enumerate(net["layers"])} for net in case["networks"]],
        max_templates=config["max_candidates"],
        count="bank",
        strict=False,
        coefficients=sharing if config["coefficients_shared"] else "own",
    )
    if "given_coefficient_partners" in config:
        partners = [{}, partners_of(config["given_coefficient_partners"]["net1"])]
        plan = plan.with_vectors(coefficient_vectors(plan.clusters, partners=partners), 0.0)
    banks = {place_of_bank(name): tensors[name] for name in case["parameters"] if name.startswith("bank.")}
    assert plan.bank_sizes == {plan.bank_name(*at): bank.numel() for at, bank in sorted(banks.items())}

    net, names = search.apply(models, plan), set()
    with torch.no_grad():
        for at, bank in banks.items():
            net.bank.templates[net.bank.place(plan.bank_name(*at))] = bank.flatten().to(dtype)
        for network, planned in zip(case["networks"], plan.models, strict=True):
            for layer, found in zip(network["layers"], planned, strict=True):
                for level, part in enumerate(layer["parts"]):
                    key = plan.bank_name(found.cluster, level), str(found.vectors[level])
                    count = part["candidates"]
                    average = torch.full((count,), 1 / count, dtype=dtype)
                    given = tensors[part["coefficients"]] if "coefficients" in part else average
                    if key in net.bank.coefficients.lengths:  # of a level that the layer does not cut away
                        start = net.bank.coefficients.start(key)
                        net.bank.coefficients.values[start : start + count] = given.flatten().to(dtype)
                        names.add((key, part.get("coefficients", key)))
    if config["share_type"] == "wavg_slide":  # others have no coefficients
        assert len(names) == len({key for key, _ in names}) == len({name for _, name in names})
        assert plan.coefficients == sum(tensors[name].numel() for _, name in names)
    for n, model in enumerate(net):
        for number, layer in enumerate(model):
            name = f"net{n}.layer{number}"
            golden.assert_close(layer.weight, tensors[f"weight.{name}"], case, "outputs", name)


# --- the published cases: similarity


@entries("superweight_priority_queue")
def test_priority_queue(entry: dict[str, Any]) -> None:
    queue = [tuple(pair) for pair in entry["queue_sorted_ascending_popped_from_the_end"]]
    items, similarity = entry["items"], {(i, j): value for value, i, j in queue}
    pairs = [
        (i, j)
        for a, i in enumerate(items)
        for b, j in enumerate(items)
        if a < b or (entry["both_orders_queued"] and a != b)
    ]
    assert by_similarity((similarity[pair], *pair) for pair in pairs) == queue
    found = regroup(entry["groups_in"], queue, entry["threshold"])
    assert found == entry["groups_out"]
    assert list(found) == list(entry["groups_in"])


@results("superweight_split", "groups_out")
def test_split(case: dict[str, Any], result: dict[str, Any]) -> None:
    gradients = by_layer(case, "grad")
    weights = by_layer(case, "weight") if case["config"]["weights_concatenated"] else None
    clusters = numbered(case["config"]["starting_groups"])
    queues = layer_queues(gradients, clusters, weights)
    split = split_clusters(clusters, queues, result["threshold"])
    assert list(split.clusters) == numbered(result["groups_out"])
    assert split.next_cluster == result["next_group"]
    assert cluster_numbers(split.clusters) == result["layer_group_ids"]
    for queue, expected in zip(queues.values(), result["sorted_queues_per_starting_group"] or (), strict=False):
        named = [(f"net_{i[0]}-layer_{i[1]}", f"net_{j[0]}-layer_{j[1]}") for _, i, j in queue]
        assert named == [(i, j) for _, i, j in expected]
        assert [pair[0] for pair in queue] == pytest.approx([pair[0] for pair in expected], rel=1e-9, abs=1e-11)


def partners_of(network: dict[str, Any]) -> dict[int, Partner]:
    return {
        int(name.removeprefix("layer")): Partner(found["net"], None if found["layer"] == -1 else found["layer"])
        for name, found in network.items()
    }


@results("superweight_split", "group_to_layers")
def test_assign(case: dict[str, Any], result: dict[str, Any]) -> None:
    gradients, clusters = by_layer(case, "grad"), numbered(case["config"]["starting_groups"])
    assigned = assign_clusters(gradients, clusters, result["threshold"], result.get("coeff_threshold"))
    assert list(assigned.clusters) == numbered(result["group_to_layers"])
    assert cluster_numbers(assigned.clusters) == result["layer_to_group"]
    largest = largest_layers(gradients, assigned.clusters)
    assert list(largest) == result["group_ids"] == list(range(result["num_groups"]))
    assert largest == {int(number): size for number, size in result["largest_layer_per_group"].items()}
    expected = result["coefficient_partner"]
    assert list(assigned.partners) == [partners_of(expected.get(f"net{n}", {})) for n in range(len(gradients))]


@results("superweight_unshare", "vector_ids_after")
def test_unshare(case: dict[str, Any], result: dict[str, Any]) -> None:
    tensors, before = golden.load(case), result["vector_ids_before"]
    gradients = [
        {
            bank: [
                tensors[f"coefficient_grad.net{n}.group{bank.replace('_width_', '.width')}.{at}"]
                for at in range(len(layers))
            ]
            for bank, layers in network.items()
        }
        for n, network in enumerate(before)
    ]
    unshared = unshare_vectors(before, gradients, result["threshold"])
    assert list(unshared.vectors) == result["vector_ids_after"]
    assert sum(map(len, unshared.copied.values())) == result["number_of_new_vectors"]
    # The original makes a parameter of its own for each user of a copy, although they share memory.
    objects: list[dict[str, list[Any]]] = [{bank: list(found) for bank, found in network.items()} for network in before]
    for bank, copies in unshared.copied.items():
        for network, at in (user for users in copies for user in users):
            objects[network][bank][at] = (network, at)
    assert in_order_of_use(objects, before) == result["parameter_object_ids_after"]


@results("superweight_unshare", "vector_ids_before")
def test_coefficients_before_unsharing(case: dict[str, Any], result: dict[str, Any]) -> None:
    """Those of Wide ResNets that share coefficients by position."""
    config = case["config"]
    networks = [wide_resnet(**network, base=config["base_channels"]) for network in config["networks"]]
    clusters = build_clusters(networks, number_layers(networks, config["param_group_bins"]))
    vectors = coefficient_vectors(clusters)
    named = [{f"{cluster}_width_{level}": found for (cluster, level), found in n.items()} for n in vectors]
    assert in_order_of_use(named, result["vector_ids_before"]) == result["vector_ids_before"]
