"""Rules that clusters, templates, splitting and unsharing keep for any input, and what their users can get wrong."""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_kernels.nn import Slab, SuperWeightBank
from spin_kernels.search.clusters import Cluster, build_clusters, number_layers
from spin_kernels.search.coefficients import coefficient_vectors
from spin_kernels.search.joining import Partner, assign_clusters
from spin_kernels.search.priority import by_similarity, regroup
from spin_kernels.search.similarity import cosine, layer_similarity
from spin_kernels.search.splitting import cluster_numbers, largest_layers, layer_queues, split_clusters
from spin_kernels.search.templates import MOST_TEMPLATES, place_windows, smallest_banks, spend
from spin_kernels.search.unsharing import unshare_vectors


def random_networks() -> Iterator[tuple[Random, list[list[tuple[int, ...]]]]]:
    rng = Random(torch.initial_seed())
    for _ in range(60):
        kernels = rng.sample([(), (1, 1), (3, 3), (3, 5), (11, 11)], rng.randint(1, 4))
        networks = [
            [(rng.randint(1, 9), rng.randint(1, 9), *rng.choice(kernels)) for _ in range(rng.randint(1, 14))]
            for _ in range(rng.randint(1, 4))
        ]
        yield rng, sorted(networks, key=len, reverse=True)


def random_clusters(rng: Random, networks: list[list[tuple[int, ...]]]) -> tuple[Cluster, ...]:
    bin_type = rng.choice(["all_nets_groupslim_depth", "all_nets_groupslim_lpb"])
    return build_clusters(networks, number_layers(networks, rng.randint(1, 5), bin_type))


def test_every_layer_is_in_one_cluster_of_its_kernel_size() -> None:
    for rng, networks in random_networks():
        clusters = random_clusters(rng, networks)
        for n, network in enumerate(networks):
            members = [member for cluster in clusters for member in cluster.members[n]]
            assert sorted(member.layer for member in members) == list(range(len(network)))
            assert all(member.shape == network[member.layer] for member in members)
        for cluster in clusters:
            kernels = {member.shape[2:] for members in cluster.members for member in members}
            assert kernels == {cluster.levels[0].shape[2:]}


def test_pieces_tile_every_layer_and_fit_their_templates() -> None:
    for rng, networks in random_networks():
        for cluster in random_clusters(rng, networks):
            for member in (member for members in cluster.members for member in members):
                out, into, *kernel = member.shape
                taps = torch.Size(kernel).numel()
                times = torch.zeros(out, into, dtype=torch.int64)
                for part in cluster.rectangles(member):
                    assert 0 <= part.level < member.levels
                    rows, columns = part.out_offset + part.out, part.in_offset + part.in_channels
                    times[part.out_offset : rows, part.in_offset : columns] += 1
                    last = part.skip + ((part.out - 1) * part.row + part.in_channels) * taps
                    assert last <= cluster.levels[part.level].values
                    assert rows <= out
                    assert columns <= into
                    assert part.in_channels <= part.row
                assert (times == 1).all()


def test_layers_of_one_size_but_several_shapes_are_one_reshaped_level() -> None:
    (cluster,) = build_clusters([[(2, 6, 1, 1), (3, 4, 1, 1), (6, 2, 1, 1)]], [[0, 0, 0]])
    assert [level.shape for level in cluster.levels] == [(2, 6, 1, 1)]
    (cluster,) = build_clusters([[(2, 6, 1, 1), (3, 4, 1, 1), (6, 3, 1, 1)]], [[0, 0, 0]])
    assert [level.shape for level in cluster.levels] == [(2, 6, 1, 1), (3, 4, 1, 1), (6, 3, 1, 1)]


def test_kernel_sizes_number_clusters_as_texts() -> None:
    """(11, 11) before (3, 3); and a network without the first kernel size keeps the numbers of the others."""
    networks = [[(4, 3, 11, 11), (4, 4, 3, 3), (4, 4, 1, 1)], [(2, 3, 11, 11), (2, 2, 3, 3)]]
    assert number_layers(networks, 3) == [[1, 2, 0], [1, 2]]


def test_budgets() -> None:
    for rng, networks in random_networks():
        clusters = random_clusters(rng, networks)
        least = smallest_banks(clusters)
        minimum = sum(bank.size for bank in least)
        for cluster in clusters:
            largest = max(torch.Size(member.shape).numel() for members in cluster.members for member in members)
            assert sum(bank.size for bank in least if bank.cluster == cluster.number) >= largest
        assert spend(clusters, rng.randint(1, minimum)) == least
        budget = rng.randint(minimum, 10 * minimum)
        banks, max_templates = spend(clusters, budget), rng.randint(1, 9)
        assert sum(bank.size for bank in banks) == minimum + sum((b.templates - 1) * b.values for b in banks) <= budget
        assert all(1 <= bank.templates <= MOST_TEMPLATES for bank in banks)
        left = budget - sum(bank.size for bank in banks)
        assert all(bank.templates == MOST_TEMPLATES or bank.values >= left for bank in banks)
        by_level = {(bank.cluster, bank.level): bank for bank in banks}
        windows = place_windows(clusters, banks, max_templates)
        assert [len(layers) for layers in windows] == [len(network) for network in networks]
        for window in (window for layers in windows for levels in layers.values() for window in levels):
            bank = by_level[window.cluster, window.level]
            assert window.templates == min(bank.templates, max_templates)
            assert window.end - window.start == window.templates * bank.values
            assert 0 <= window.start <= window.end <= bank.size
        used = [[(w.cluster, w.level) for w in levels] for layers in windows for levels in layers.values()]
        assert all([level for _, level in levels] == list(range(len(levels))) for levels in used)
        assert {at for levels in used for at in levels} == by_level.keys()


def test_a_bank_takes_the_layers_of_any_allocation() -> None:
    """A cluster of the bank for every level, a slab for every part of a weight."""
    for rng, networks in random_networks():
        clusters = random_clusters(rng, networks)
        least = sum(bank.size for bank in smallest_banks(clusters))
        banks = spend(clusters, rng.randint(least, 10 * least))
        windows, vectors = place_windows(clusters, banks, 8), coefficient_vectors(clusters)
        bank = SuperWeightBank({f"{b.cluster}.{b.level}": b.size for b in banks})
        for cluster in clusters:
            for n, members in enumerate(cluster.members):
                for member in members:
                    slabs = []
                    for part in cluster.rectangles(member):
                        window = windows[n][member.layer][part.level]
                        users = [user.layer for _, user in cluster.users(part.level, n)]
                        vector = vectors[n][cluster.number, part.level][users.index(member.layer)]
                        stride = cluster.levels[part.level].values
                        templates = window.templates, window.start + part.skip, stride
                        place = part.out, part.in_channels, part.row, part.out_offset, part.in_offset
                        slabs.append(Slab(f"{cluster.number}.{part.level}", *templates, *place, str(vector)))
                    bank.add((*member.shape, 1, 1)[:4], slabs)
        assert bank.templates.numel() == sum(b.size for b in banks)


def test_coefficients_are_shared_across_networks_only_and_at_one_position() -> None:
    for rng, networks in random_networks():
        clusters = random_clusters(rng, networks)
        users = {sharing: coefficient_vectors(clusters, sharing) for sharing in ("own", "position", "cluster")}
        for sharing, vectors in users.items():
            listed = [(bank, vector) for network in vectors for bank, found in network.items() for vector in found]
            banks = {bank for bank, _ in listed}
            assert len(set(listed)) == len({vector for _, vector in listed})  # no vector serves two banks
            assert sharing != "own" or len(set(listed)) == len(listed)
            assert sharing != "cluster" or len(set(listed)) == len(banks)
            if sharing == "position":
                assert all(len(set(found)) == len(found) for network in vectors for found in network.values())
        for n in range(len(networks)):
            sizes = {(c.number, level): len(c.users(level, n)) for c in clusters for level in range(len(c.levels))}
            expected = {bank: size for bank, size in sizes.items() if size}
            assert all({bank: len(found) for bank, found in v[n].items()} == expected for v in users.values())


def test_partners_whose_network_has_no_layer_that_large_share_with_others_of_theirs() -> None:
    """Networks 1 and 2 have a level that network 0 lacks; where both have the same partner, they share there, too."""
    small, large = (2, 2, 1, 1), (4, 2, 1, 1)
    clusters = build_clusters([[small, small, small], [large, large], [large, large]], [[0, 0, 0], [0, 0], [0, 0]])
    partners = [{}, {0: Partner(0, 2), 1: Partner(0, None)}, {0: Partner(0, 1), 1: Partner(0, 2)}]
    vectors = coefficient_vectors(clusters, partners=partners)
    a, b, c = vectors[0][0, 0]
    assert vectors[1][0, 0][0] == c
    assert vectors[1][0, 0][1] not in (a, b, c)
    assert vectors[2][0, 0] == [b, c]
    assert vectors[2][0, 1][1] == vectors[1][0, 1][0]
    assert vectors[2][0, 1][0] not in vectors[1][0, 1]


def random_gradients(rng: Random, depths: list[int]) -> list[list[Tensor]]:
    directions = torch.randn(3, 6, 6, 3, 3)
    return [
        [
            (directions[rng.randrange(3)] + rng.choice([0.3, 1, 3]) * torch.randn(6, 6, 3, 3))[: rng.randint(2, 6)]
            for _ in range(depth)
        ]
        for depth in depths
    ]


def random_start(rng: Random, depth: int) -> dict[int, list[int]]:
    start: dict[int, list[int]] = {0: [0], 5: [1]}
    for layer in range(2, depth):
        start[rng.choice([0, 5])].append(layer)
    return start


def refines(parts: list[Any], before: list[Any]) -> bool:
    """Whether each of these parts lies within one of those before, and together they are the same."""
    within = all(any(set(part) <= set(whole) for whole in before) for part in parts)
    return within and sorted(x for part in parts for x in part) == sorted(x for whole in before for x in whole)


@pytest.mark.parametrize("with_weights", [False, True])
def test_splits_refine_clusters(with_weights: bool) -> None:
    rng = Random(torch.initial_seed())
    for _ in range(10):
        gradients = random_gradients(rng, [rng.randint(3, 7), rng.randint(2, 5)])
        clusters = [random_start(rng, len(network)) for network in gradients]
        weights = random_gradients(rng, [len(network) for network in gradients]) if with_weights else None
        if weights is not None:
            weights = [[torch.randn_like(gradient) for gradient in network] for network in gradients]
        queues = layer_queues(gradients, clusters, weights)
        for threshold in (-1.5, 0.0, 0.3, 0.7, 1.0):
            split = split_clusters(clusters, queues, threshold)
            for found, before in zip(split.clusters, clusters, strict=True):
                assert refines(list(found.values()), list(before.values()))
            numbers = {number for network in split.clusters for number in network}
            assert max(numbers) < split.next_cluster == sum(map(len, gradients))
            if threshold == 1:
                assert len(numbers) == split.next_cluster


def test_networks_that_join_find_partners_in_their_cluster() -> None:
    rng = Random(torch.initial_seed())
    for _ in range(10):
        depth, shallow = rng.randint(4, 7), rng.randint(2, 3)
        gradients = random_gradients(rng, [depth, shallow, depth, shallow])
        deep, less = random_start(rng, depth), random_start(rng, shallow)
        for coefficient_threshold in (None, -1.5, 0.3, 1.0):
            assigned = assign_clusters(gradients, [deep, less, deep, less], 0.3, coefficient_threshold)
            numbers = cluster_numbers(assigned.clusters)
            assert [len(network) for network in numbers] == [depth, shallow, depth, shallow]
            assert numbers[0] == numbers[2]
            assert numbers[1] == numbers[3]
            assert {n for network in numbers for n in network} == set(range(1 + max(map(max, numbers))))
            assert largest_layers(gradients, assigned.clusters).keys() == {n for network in numbers for n in network}
            assert assigned.partners[0] == {}
            for network, leader in ((1, 0), (2, 0), (3, 1)):
                assert sorted(assigned.partners[network]) == list(range(len(gradients[network])))
                for layer, partner in assigned.partners[network].items():
                    assert partner.network == leader
                    assert (partner.position is None) == (coefficient_threshold == 1) or coefficient_threshold == 0.3
                    if partner.position is not None:
                        assert partner.position < len(assigned.clusters[leader][numbers[network][layer]])


def test_unsharing_refines_what_was_shared() -> None:
    rng = Random(torch.initial_seed())
    for _ in range(20):
        vectors: list[dict[str, list[int]]] = [
            {
                bank: [rng.randrange(3) for _ in range(rng.randint(1, 4))]
                for bank in ("a", "b")
                if n == 0 or rng.random() < 0.7
            }
            for n in range(rng.randint(1, 4))
        ]
        gradients = [{bank: [torch.randn(4) for _ in found] for bank, found in network.items()} for network in vectors]

        def parts(found: list[dict[str, list[int]]]) -> list[list[Any]]:
            users: dict[Any, list[Any]] = {}
            for n, network in enumerate(found):
                for bank, layers in network.items():
                    for at, vector in enumerate(layers):
                        users.setdefault((bank, vector), []).append((n, bank, at))
            return list(users.values())

        for threshold in (-1.5, 0.0, 0.5, 1.0):
            after = unshare_vectors(vectors, gradients, threshold).vectors
            assert refines(parts(list(after)), parts(vectors))
            assert threshold != 1 or all(len(part) == 1 for part in parts(list(after)))
        same = [{bank: [torch.ones(4) for _ in found] for bank, found in network.items()} for network in vectors]
        assert sorted(parts(list(unshare_vectors(vectors, same, 0.9).vectors))) == sorted(parts(vectors))


def test_what_joined_an_item_does_not_move_on_with_it() -> None:
    queue = [(0.5, "a", "b"), (0.9, "b", "c")]
    assert regroup({"a": 0, "b": 1, "c": 2}, queue, 0.1) == {"a": 0, "b": 0, "c": 1}
    assert regroup({"a": 0, "b": 1, "c": 2}, queue, 0.5) == {"a": 0, "b": 1, "c": 1}


def test_similarity_compares_common_channels() -> None:
    a, b = torch.randn(4, 6, 3, 3), torch.randn(5, 2, 3, 3)
    expected = cosine(a[:4, :2], b[:4, :2], "both")
    assert layer_similarity((0, 0), (0, 1), [[a, b]]) == layer_similarity((0, 1), (0, 0), [[a, b]]) == expected
    weights = [[2 * a, 3 * b]]
    both = layer_similarity((0, 0), (0, 1), [[a, b]], weights), layer_similarity((0, 1), (0, 0), [[a, b]], weights)
    assert both[0] != both[1]
    assert cosine(torch.zeros(3), torch.ones(3), "both") == 0


# --- what a user can get wrong

ONE = [[(4, 3, 3, 3), (4, 4, 3, 3), (4, 4, 1, 1)]]
CLUSTERS = build_clusters(ONE, [[0, 0, 1]])
GRADIENTS = [[torch.ones(2, 2, 3, 3), torch.ones(2, 2, 3, 3), torch.ones(2, 2, 1, 1)]]
TWICE = [*GRADIENTS, GRADIENTS[0][:2]]
NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: number_layers([], 3), r"^networks: expected one or more networks with layers, got 0 "),
        (lambda: number_layers([ONE[0], []], 3), r"^networks: .* got 2 with \[3, 0\] layers; "),
        (lambda: number_layers([[(4,)]], 3), r"^networks: expected shapes .* got \(4,\) for layer 0 of network 0; "),
        (lambda: number_layers([[(4, 0)]], 3), r"^networks: expected shapes .* positive integers, got \(4, 0\)"),
        (lambda: number_layers([[(1, 2)], [(1, 2)] * 2], 3), r"^networks: .* deepest .* got depths \[1, 2\]; sort"),
        (lambda: number_layers(ONE, 0), r"^bins: expected a positive integer, got 0; "),
        (lambda: number_layers(ONE, True), r"^bins: expected a positive integer, got True; "),
        (lambda: number_layers(ONE, 3, "depth"), r"^bin_type: expected one of all_nets.*, got 'depth'; "),
        (lambda: build_clusters(ONE, [[0, 0]]), r"^numbers: .* each of \[3\] layers, got \[2\]; "),
        (lambda: build_clusters(ONE, [[0, -1, 1]]), r"^numbers: .* got -1 for layer 1 of network 0; "),
        (lambda: build_clusters(ONE, [[0, 1, 1]]), r"^numbers: .* one kernel size in cluster 1, got .*; keep them"),
        (lambda: smallest_banks([]), r"^clusters: expected one or more, got none; "),
        (lambda: spend(CLUSTERS, 0), r"^budget: expected a positive number of values, got 0; "),
        (lambda: spend(CLUSTERS, 0.5), r"^budget: .* got 0.5; "),
        (lambda: place_windows(CLUSTERS, spend(CLUSTERS, 1), 0), r"^max_templates: .* got 0; "),
        (lambda: place_windows(CLUSTERS, [], 8), r"^banks: .* got none for \[\(0, 0\), \(0, 1\), \(1, 0\)\]; "),
        (lambda: coefficient_vectors([]), r"^clusters: expected one or more, got none; "),
        (lambda: coefficient_vectors(CLUSTERS, "none"), r"^sharing: expected one of own, .*, got 'none'; "),
        (lambda: coefficient_vectors(CLUSTERS, partners=[{}, {}]), r"^partners: .* of 1 networks .* got 2 with .*; "),
        (lambda: coefficient_vectors(CLUSTERS, "own", [{}]), r"^partners: .* by position, .* with sharing 'own'; "),
        (
            lambda: coefficient_vectors(CLUSTERS, partners=[{0: Partner(0, 0)}]),
            r"^partners: .* layer 0 of network 0, got Partner",
        ),
        (lambda: by_similarity([(NAN, "a", "b")]), r"^queue: expected numbers .* got nan for a and b; "),
        (lambda: regroup({"a": 0}, [(0.5, "a", "b")], 0.1), r"^queue: .* have a group, got a and b; "),
        (lambda: regroup({"a": 0}, [], NAN), r"^threshold: expected a number, got nan; "),
        (lambda: layer_queues(GRADIENTS, []), r"^clusters: .* each of 1 networks .* got 0; "),
        (lambda: layer_queues(GRADIENTS, [{0: [0, 1]}]), r"^clusters: .* the 3 layers of network 0 once, got \[0, 1\]"),
        (lambda: layer_queues(GRADIENTS, [{0: [0, 1, 1, 2]}]), r"^clusters: .* once, got \[0, 1, 1, 2\]; "),
        (lambda: layer_queues(GRADIENTS, [{0: [0, 1, 2], 1: []}]), r"^clusters: .* cluster 1 of network 0, got none; "),
        (lambda: layer_queues(GRADIENTS, [{0: [0, 1, 2]}]), r"^gradients: .* one kernel size, got .* layer \(0, 2\); "),
        (
            lambda: layer_queues([[NAN * torch.ones(2, 2), torch.ones(2, 2)]], [{0: [0, 1]}]),
            r"^gradients: .* layers \(0, 0\) and \(0, 1\), got nan; ",
        ),
        (
            lambda: layer_queues(GRADIENTS, [{0: [0, 1], 1: [2]}], [GRADIENTS[0][:2]]),
            r"^weights: expected one for each gradient, .*; ",
        ),
        (lambda: split_clusters([{0: [0, 1]}], {}, 0.1), r"^queues: expected those of clusters \[0\], got \[\]; "),
        (
            lambda: assign_clusters([GRADIENTS[0], GRADIENTS[0] * 2], [{0: [0, 1], 1: [2]}, {0: [*range(6)]}], 0.1),
            r"^gradients: .* deepest network first, got depths \[3, 6\]; ",
        ),
        (
            lambda: assign_clusters(TWICE, [{0: [0, 1], 1: [2]}, {2: [0, 1]}], 0.1),
            r"^clusters: .* network 1 in cluster 2 .* in network 0, got 2 and 0; ",
        ),
        (
            lambda: assign_clusters(GRADIENTS * 2, [{0: [0, 1], 1: [2]}, {0: [0, 1, 2]}], 0.1),
            r"^clusters: .* network 1 in cluster 0 .* in network 0, got 3 and 2; ",
        ),
        (lambda: unshare_vectors([], [], 0.1), r"^vectors: expected banks with layers, got \[\]; "),
        (lambda: unshare_vectors([{"a": []}], [{"a": []}], 0.1), r"^vectors: expected banks with layers, got .*; "),
        (lambda: unshare_vectors([{"a": [0]}], [{"a": []}], 0.1), r"^gradients: expected one for each vector, .*; "),
        (
            lambda: unshare_vectors([{"a": [0, 0]}], [{"a": [torch.ones(2), torch.ones(3)]}], 0.1),
            r"^gradients: .* layers \(0, 0\) and \(0, 1\) of bank 'a', got \(2,\) and \(3,\); ",
        ),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
