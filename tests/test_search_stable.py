"""Partitions of least conflict: exact for a few, never worse than the published ones, the same in any order."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_search_paper import by_layer, numbered, results
from test_search_rules import random_gradients, random_start, refines

import spin_kernels as spin
from spin_kernels.search import partition as partitions
from spin_kernels.search.clusters import build_clusters
from spin_kernels.search.coefficients import coefficient_vectors
from spin_kernels.search.priority import regroup
from spin_kernels.search.refining import weight_gradients
from spin_kernels.search.similarity import layer_similarity
from spin_kernels.search.splitting import cluster_numbers
from spin_kernels.search.stable import EXACT, conflict, layer_similarities, least_conflict, split_stably

Rows = dict[Any, dict[Any, float]]
ROWS = {"a": {"b": 0.5, "c": -0.25}, "b": {"a": 0.5, "c": 1.0}, "c": {"a": -0.25, "b": 1.0}}
NAN = float("nan")


def rows_of(values: np.ndarray, order: Sequence[int] | None = None) -> Rows:
    """Similarities of the items 0, 1, ..., given in some order."""
    order = range(len(values)) if order is None else order
    return {i: {j: float(values[i, j]) for j in order if j != i} for i in order}


def symmetric(values: np.ndarray) -> np.ndarray:
    return np.triu(values, 1) + np.triu(values, 1).T


def random_similarities(rng: np.random.Generator, n: int) -> np.ndarray:
    """Noise, cosines of a few directions with noise, or planted clusters with noise."""
    kind, noise = rng.integers(3), rng.choice([0.1, 0.3, 1, 2])
    if kind == 0:
        return symmetric(rng.uniform(-1, 1, (n, n)))
    of = rng.integers(rng.integers(1, 8), size=n)
    if kind == 1:
        found = rng.standard_normal((8, 40))[of] + noise * rng.standard_normal((n, 40))
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return symmetric(found @ found.T)
    return symmetric(np.clip(np.where(of[:, None] == of, 0.3, -0.1) + noise * rng.standard_normal((n, n)), -1, 1))


def tied_similarities(rng: np.random.Generator, n: int) -> np.ndarray:
    """Few different values, so that many partitions are equally good."""
    return symmetric(rng.choice(np.array([-2, 0, 1, 2]) / rng.choice([3, 4]), (n, n)))


def random_threshold(rng: np.random.Generator, values: np.ndarray) -> float:
    return float(np.quantile(values[np.triu_indices(len(values), 1)], rng.choice([0.3, 0.5, 0.7, 0.85])))


def all_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *rest = items
    for others in all_partitions(rest):
        yield [[first], *others]
        for n, part in enumerate(others):
            yield [[first, *part], *others[:n], *others[n + 1 :]]


def published(rows: Rows, threshold: float) -> list[list[Any]]:
    queue = [(rows[i][j], i, j) for i in rows for j in rows if i != j]
    parts: dict[int, list[Any]] = {}
    for item, number in regroup({item: n for n, item in enumerate(rows)}, queue, threshold).items():
        parts.setdefault(number, []).append(item)
    return list(parts.values())


def sets(parts: Sequence[Sequence[Any]]) -> set[frozenset[Any]]:
    return {frozenset(part) for part in parts}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(torch.initial_seed())


# --- the objective


def test_conflict_sums_over_pairs_that_are_together() -> None:
    assert conflict(["a", "b", "c"], ROWS, 0.5) == 0
    assert conflict([["a", "b"], ["c"]], ROWS, 0.75) == 0.25
    assert conflict([{"a", "b", "c"}], ROWS, 0.5) == 0.25
    assert conflict([], {}, 0.5) == 0
    assert least_conflict({}, 0.5) == []
    assert least_conflict({"a": {}}, 0.5) == [["a"]]


# --- the best partition


def test_best_of_all_partitions(rng: np.random.Generator) -> None:
    """By conflict, number of clusters, then the earliest others with the first item, with the first one left, ..."""
    for n in [1, 2, 3, 4, 5, 6, 7] * 8:
        values = rng.choice([tied_similarities, random_similarities])(rng, n) if n > 1 else np.zeros((1, 1))
        names = {item: str(name) for item, name in enumerate(rng.permutation(n))}
        threshold = float(rng.choice(values.flatten()))
        units, limit = np.rint(values * 2**40), np.rint(threshold * 2**40)  # whose sums are exact
        rows = rows_of(values)
        listed = sorted(range(n), key=names.__getitem__)
        costs = []
        for parts in all_partitions(listed):
            together = sum(units[i, j] - limit for part in parts for i, j in combinations(part, 2))
            costs.append((-together, len(parts), [[*map(listed.index, part), n] for part in parts], parts))
        least, *_, best = min(costs)
        found = least_conflict(rows, threshold, names)
        assert sets(found) == sets(best)
        assert conflict(found, rows, threshold) == least / 2**40
        assert found == sorted(sorted(part) for part in found)


def test_never_worse_than_published_and_mostly_better(rng: np.random.Generator) -> None:
    """In the given order of the items or another one."""
    better, sizes = 0, [*range(4, 13)] * 16 + [14, 16, 18, 20, 25, 30] * 10 + [40] * 4
    for n in sizes:
        values = random_similarities(rng, n)
        threshold = random_threshold(rng, values)
        rows = rows_of(values)
        found = conflict(least_conflict(rows, threshold), rows, threshold)
        theirs = [
            conflict(published(rows_of(values, order), threshold), rows, threshold)
            for order in (None, rng.permutation(n), rng.permutation(n))
        ]
        assert found <= min(theirs)
        better += found < theirs[0]
    assert better > 0.6 * len(sizes)


def test_searches_find_the_best_partition_nearly_always(rng: np.random.Generator) -> None:
    """Where all partitions can still be compared."""
    same = 0
    for _ in range(60):
        n = int(rng.integers(2, EXACT - 1))
        values = rng.choice([tied_similarities, random_similarities])(rng, n)
        gains = np.rint((values - random_threshold(rng, values)) * 2**40).astype(np.int64)
        np.fill_diagonal(gains, 0)
        best = partitions.exact_partition(gains)
        found = partitions.searched_partition(gains, np.arange(n))
        losses = [(-int(gains[labels[:, None] == labels].sum()), int(labels.max())) for labels in (best, found)]
        assert losses[0] <= losses[1]
        same += losses[0] == losses[1]
    assert same >= 54


def test_a_search_that_finds_worse_than_published_starts_from_that(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = symmetric(np.full((20, 20), 0.5) + rng.uniform(-0.4, 0.4, (20, 20)))
    rows, threshold = rows_of(values), 0.25
    theirs = conflict(published(rows, threshold), rows, threshold)
    assert theirs < 0
    improved = partitions._improved
    started: list[int] = []

    def idle(gains: np.ndarray, starts: np.ndarray) -> np.ndarray:
        started.append(len(starts))
        return np.arange(20) if len(starts) > 1 else improved(gains, starts)

    monkeypatch.setattr(partitions, "_improved", idle)
    assert conflict(least_conflict(rows, threshold), rows, threshold) <= theirs
    assert started == [partitions.STARTS, 1]


def test_thresholds_beyond_all_similarities(rng: np.random.Generator) -> None:
    for n in (2, 6, EXACT + 4):
        rows = rows_of(values := random_similarities(rng, n))
        pairs = values[np.triu_indices(n, 1)]
        for threshold in (pairs.max() + 1e-6, 1.5, 1e300):
            assert sets(least_conflict(rows, threshold)) == {frozenset([item]) for item in range(n)}
        for threshold in (pairs.min() - 1e-6, -1.5, -1e300):
            assert least_conflict(rows, threshold) == [list(range(n))]
        equal = rows_of(symmetric(np.full((n, n), 0.5)))
        assert least_conflict(equal, 0.5) == [list(range(n))]  # of equally good ones the fewest clusters


def test_a_higher_threshold_never_has_more_pairs_together(rng: np.random.Generator) -> None:
    """As the least sum of threshold - similarity over pairs is concave in the threshold, with their number as slope."""
    for _ in range(5):
        rows = rows_of(random_similarities(rng, 9))
        pairs = []
        for threshold in np.linspace(-1, 1, 21):
            pairs.append(sum(len(part) * (len(part) - 1) // 2 for part in least_conflict(rows, float(threshold))))
        assert pairs == sorted(pairs, reverse=True)


def test_what_no_similar_pair_connects_is_split_for_itself(rng: np.random.Generator) -> None:
    for sizes in ([3, 4], [1, 5, 2], [6, EXACT + 3]):
        n, threshold = sum(sizes), 0.1
        of = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        within = symmetric(rng.uniform(-1, 1, (n, n)))
        apart = symmetric(rng.uniform(-1, threshold - 1e-3, (n, n)))
        values = np.where(of[:, None] == of, within, apart)
        expected: list[list[int]] = []
        for part in range(len(sizes)):
            inside = np.flatnonzero(of == part).tolist()
            own = {i: {j: float(values[i, j]) for j in inside if j != i} for i in inside}
            expected += least_conflict(own, threshold)
        assert sets(least_conflict(rows_of(values), threshold)) == sets(expected)


# --- order


@pytest.mark.parametrize("n", [2, 5, 9, EXACT + 3, 30])
def test_any_order_gives_the_same_partition(n: int, rng: np.random.Generator) -> None:
    for _ in range(2):
        values = random_similarities(rng, n)
        threshold = random_threshold(rng, values)
        expected = sets(least_conflict(rows_of(values), threshold))
        for _ in range(3):
            found = least_conflict(rows_of(values, rng.permutation(n).tolist()), threshold)
            assert sets(found) == expected


@pytest.mark.parametrize("n", [2, 5, 9, EXACT + 3, 30])
def test_names_decide_ties(n: int, rng: np.random.Generator) -> None:
    for _ in range(2):
        values = tied_similarities(rng, n)
        threshold = random_threshold(rng, values)
        names = {item: f"layer{item}" for item in range(n)}
        expected = sets(least_conflict(rows_of(values), threshold, names))
        for _ in range(3):
            order = rng.permutation(n).tolist()
            found = least_conflict(rows_of(values, order), threshold, {item: names[item] for item in order})
            assert sets(found) == expected


def test_sums_of_floats_do_not_decide_ties() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1: a is as good with the b's as with the c's, in any order."""
    to_b, to_c = {"b1": 0.1, "b2": 0.2, "b3": 0.3}, {"c1": 0.3, "c2": 0.2, "c3": 0.1}
    items = ["a", *to_b, *to_c]
    close = {(i, j): 0.9 if i[0] == j[0] else -0.9 for i, j in combinations(items, 2)}
    close |= {("a", other): value for other, value in (to_b | to_c).items()}
    for seed in range(20):
        order = Random(seed).sample(items, len(items))
        rows = {i: {j: close.get((i, j), close.get((j, i), 0)) for j in order if j != i} for i in order}
        found = least_conflict(rows, 0, {item: item for item in items})
        assert sets(found) == {frozenset(["a", *to_b]), frozenset(to_c)}


# --- layers


@pytest.mark.parametrize("with_weights", [False, True])
def test_splits_refine_clusters_and_do_not_depend_on_order(with_weights: bool) -> None:
    """Layers of several sizes, of several networks; each network's layers, and the networks, in another order."""
    rng = Random(torch.initial_seed())
    for _ in range(4):
        depths = [rng.randint(3, 7), rng.randint(2, 6), rng.randint(2, 5)]
        gradients = random_gradients(rng, depths)
        before = [
            {number: rng.sample(layers, len(layers)) for number, layers in random_start(rng, depth).items()}
            for depth in depths
        ]
        weights = [[torch.randn_like(g) for g in network] for network in gradients] if with_weights else None
        names = [[f"net{n}.layer{layer}" for layer in range(depth)] for n, depth in enumerate(depths)]
        similarities = layer_similarities(gradients, before, weights)

        networks = rng.sample(range(3), 3)
        orders = [rng.sample(range(depths[n]), depths[n]) for n in networks]
        moved, moved_names = (
            [[of[n][old] for old in order] for n, order in zip(networks, orders, strict=True)]
            for of in (gradients, names)
        )
        moved_weights = None
        if weights is not None:
            moved_weights = [[weights[n][old] for old in order] for n, order in zip(networks, orders, strict=True)]
        moved_before = [
            {number: [at for at, old in enumerate(order) if old in layers] for number, layers in before[n].items()}
            for n, order in zip(networks, orders, strict=True)
        ]
        moved_similarities = layer_similarities(moved, moved_before, moved_weights)
        for threshold in (-1.5, 0.0, 0.1, 0.3, 0.7, 1.5):
            split = split_stably(before, similarities, threshold, names)
            for n, old in enumerate(before):
                assert refines(list(split.clusters[n].values()), list(old.values()))
            used = {number for network in split.clusters for number in network}
            assert used == set(range(len(used)))
            assert len(used) == {-1.5: 2, 1.5: sum(depths)}.get(threshold, len(used))
            firsts = [min((n, f[c][0]) for n, f in enumerate(split.clusters) if c in f) for c in sorted(used)]
            olds = [next(c for c, layers in before[n].items() if layer in layers) for n, layer in firsts]
            assert (ordered := list(zip(olds, firsts, strict=True))) == sorted(ordered)

            again = split_stably(moved_before, moved_similarities, threshold, moved_names)
            assert named(again.clusters, moved_names) == named(split.clusters, names)
            assert named(split_stably(before, similarities, threshold).clusters, names) == named(split.clusters, names)


def named(clusters: Sequence[dict[int, list[int]]], names: list[list[str]]) -> set[frozenset[str]]:
    found: dict[int, list[str]] = {}
    for n, network in enumerate(clusters):
        for number, layers in network.items():
            found.setdefault(number, []).extend(names[n][layer] for layer in layers)
    return sets(list(found.values()))


def test_layers_share_coefficients_by_position_after_a_split() -> None:
    rng = Random(torch.initial_seed())
    gradients, before = random_gradients(rng, [6, 6]), [random_start(rng, 6)] * 2
    split = split_stably(before, layer_similarities(gradients, before), 0.2)
    assert split.partners == ({}, {})
    shapes = [[tuple(gradient.shape) for gradient in network] for network in gradients]
    clusters = build_clusters([shapes[0], shapes[1]], cluster_numbers(split.clusters))
    assert coefficient_vectors(clusters, partners=split.partners) == coefficient_vectors(clusters)


def test_weights_count_as_much_as_gradients() -> None:
    gradients, weights = ([[torch.randn(n, 3, 3, 3), torch.randn(4, n, 3, 3)]] for n in (2, 2))
    first, second = (0, 0), (0, 1)
    found = layer_similarities(gradients, [{0: [1, 0]}], [[weights[0][0], 100 * weights[0][1]]])[0]
    parts = [layer_similarity(first, second, tensors) for tensors in (gradients, weights)]
    assert found[first][second] == found[second][first] == pytest.approx(sum(parts) / 2)


@results("superweight_split", "groups_out")
def test_published_splits_have_no_less_conflict(case: dict[str, Any], result: dict[str, Any]) -> None:
    compare_with_published(case, result, "groups_out")


@results("superweight_split", "group_to_layers")
def test_published_networks_that_join_have_no_less_conflict(case: dict[str, Any], result: dict[str, Any]) -> None:
    compare_with_published(case, result, "group_to_layers")


def compare_with_published(case: dict[str, Any], result: dict[str, Any], key: str) -> None:
    gradients = by_layer(case, "grad")
    weights = by_layer(case, "weight") if case["config"].get("weights_concatenated") else None
    before, threshold = numbered(case["config"]["starting_groups"]), result["threshold"]
    assert gradients is not None
    similarities = layer_similarities(gradients, before, weights)
    theirs = total_conflict(numbered(result[key]), similarities, threshold)
    assert total_conflict(split_stably(before, similarities, threshold).clusters, similarities, threshold) <= theirs


def total_conflict(clusters: Sequence[dict[int, list[int]]], similarities: dict[int, Rows], threshold: float) -> float:
    parts: dict[int, list[tuple[int, int]]] = {}
    for n, network in enumerate(clusters):
        for number, layers in network.items():
            parts.setdefault(number, []).extend((n, layer) for layer in layers)
    return sum(
        conflict([part for part in parts.values() if part[0] in rows], rows, threshold)
        for rows in similarities.values()
    )


# --- what a user can get wrong


def pair(there: float, back: float) -> Rows:
    return {"a": {"b": there}, "b": {"a": back}}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: least_conflict(ROWS, NAN), r"^threshold: expected a finite number, got nan; "),
        (lambda: conflict(["abc"], ROWS, float("inf")), r"^threshold: expected a finite number, got inf; "),
        (lambda: least_conflict(pair(NAN, NAN), 0.1), r"^similarities: .* between -1 and 1, got nan for a and b; "),
        (lambda: conflict(["ab"], pair(NAN, NAN), 0.1), r"^similarities: .* between -1 and 1, got nan for a and b; "),
        (lambda: least_conflict(pair(1.5, 1.5), 0.1), r"^similarities: .* between -1 and 1, got 1.5 for a and b; "),
        (lambda: least_conflict(pair(0.25, 0.5), 0.1), r"^similarities: expected one of a and b, got 0.25 and 0.5; "),
        (lambda: least_conflict({"a": {"b": 0.5}, "b": {}}, 0.1), r"^similarities: expected those of b .*, got \[\]; "),
        (lambda: least_conflict({"a": {"a": 1.0}}, 0.1), r"^similarities: expected those of a .*, got \['a'\]; "),
        (lambda: conflict(["ab"], ROWS, 0.1), r"^partition: expected each of \['a', 'b', 'c'\] once, got .*; "),
        (lambda: conflict(["ab", "bc"], ROWS, 0.1), r"^partition: expected each of .* once, got .*; put every item"),
        (lambda: least_conflict(ROWS, 0.1, {"a": "x", "b": "y"}), r"^names: expected different ones for all of .*; "),
        (lambda: least_conflict(ROWS, 0.1, dict.fromkeys("abc", "x")), r"^names: expected different ones .*; name"),
        (lambda: split_stably([{0: [0]}], {}, 0.1), r"^similarities: expected .* {0: \[\(0, 0\)\]}, got {}; compare"),
        (lambda: split_stably([{0: [0]}], {0: {(0, 1): {}}}, 0.1), r"^similarities: .* got {0: \[\(0, 1\)\]}; "),
        (
            lambda: split_stably([{0: [0]}], {0: {(0, 0): {}}}, 0.1, [["a", "b"]]),
            r"^names: expected one for each layer of \[\(0, 0\)\], got \[\(0, 0\), \(0, 1\)\]; ",
        ),
        (lambda: layer_similarities([[torch.ones(2, 2)]], [{}]), r"^clusters: .* layers of network 0 once, got \[\]; "),
        (
            lambda: layer_similarities([[NAN * torch.ones(2, 2), torch.ones(2, 2)]], [{0: [0, 1]}]),
            r"^gradients: .* layers \(0, 0\) and \(0, 1\), got nan; ",
        ),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


# --- through the public functions


def test_a_stable_plan_splits_with_less_conflict_than_a_published_one() -> None:
    """At one threshold, with a budget that lets both split there."""
    models = [spin.models.wide_resnet(16, width, in_channels=1, base_channels=2) for width in (2, 1)]
    batch = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    found = {}
    for method in ("paper", "stable"):
        plan = spin.search.plan(models, 6.0, method=method, bins=2, strict=False)
        torch.manual_seed(1)
        net = spin.search.apply(models, plan)
        split = spin.search.split(net, [batch], F.cross_entropy, threshold=0.05)
        assert split.method == method
        assert split.threshold == 0.05
        gradients, _ = weight_gradients(net, [batch], F.cross_entropy)
        before = [{c.number: [m.layer for m in c.members[n]] for c in plan.clusters if c.members[n]} for n in range(2)]
        total = 0.0
        for number, rows in layer_similarities(gradients, before).items():
            parts: dict[int, list[tuple[int, int]]] = {}
            for n, layer in rows:
                parts.setdefault(split.models[n][layer].cluster, []).append((n, layer))
            assert {plan.models[n][layer].cluster for part in parts.values() for n, layer in part} == {number}
            total += conflict(list(parts.values()), rows, 0.05)
        found[method] = total
    assert found["stable"] <= found["paper"]
