import copy
import pickle

import golden
import pytest

from spin_kernels import Sharing


@pytest.mark.parametrize("case", golden.cases("spin", suffix=".json"), ids=lambda case: case["name"])
def test_published_mappings(case):
    entries = golden.load(case)
    assert entries
    for entry in entries:
        sharing = Sharing(entry["depth"], entry["share_rate"], entry["kind"])
        assert sharing.index == entry["layer_to_pointwise"]
        assert sharing.num_shared == len(set(sharing.index))


def test_rate_that_does_not_divide_the_depth():
    assert Sharing(7, 3).index == [0, 0, 0, 1, 1, 1, 2]
    assert Sharing(7, 3, "strided").index == [0, 1, 2, 0, 1, 2, 0]
    assert Sharing(3, 8).index == [0, 0, 0]


def test_random_is_a_seeded_relabelled_shuffle():
    plan = Sharing(32, 4, "random", seed=5)
    assert plan.index == Sharing(32, 4, "random", seed=5).index
    assert plan.index != Sharing(32, 4, "random", seed=6).index
    assert sorted(plan.index) == Sharing(32, 4).index
    assert list(dict.fromkeys(plan.index)) == list(range(8))
    # The shuffle is part of what a checkpoint means, so it must never change.
    assert Sharing(10, 2, "random", seed=1).index == [0, 0, 1, 2, 3, 3, 4, 2, 4, 1]


@pytest.mark.parametrize(
    ("distribution", "mapping", "index"),
    [
        ("front", "sequential", [0, 0, 1, 1, 2, 3, 4, 5]),
        ("middle", "sequential", [0, 1, 2, 2, 3, 3, 4, 5]),
        ("back", "sequential", [0, 1, 2, 3, 4, 4, 5, 5]),
        ("front", "strided", [0, 1, 0, 1, 2, 3, 4, 5]),
        ("middle", "strided", [0, 1, 2, 3, 2, 3, 4, 5]),
        ("back", "strided", [0, 1, 2, 3, 4, 5, 4, 5]),
    ],
)
def test_distributions(distribution, mapping, index):
    plan = Sharing(8, 2, mapping, distribution, shared_depth=4)
    assert plan.index == index
    assert plan.num_shared == 6


def test_middle_rounds_down():
    assert Sharing(7, 4, distribution="middle", shared_depth=4).index == [0, 1, 1, 1, 1, 2, 3]


def test_is_a_value():
    plan = Sharing(depth=32, rate=2, mapping="sequential", distribution="uniform", shared_depth=None, seed=0)
    assert plan == Sharing(32, 2)
    assert plan != Sharing(32, 4)
    assert hash(plan) == hash(Sharing(32, 2))
    assert eval(repr(plan)) == plan == copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan))
    plan.index.append(7)
    assert len(plan.index) == 32
    with pytest.raises(AttributeError):
        plan.rate = 4


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"depth": 0}, "depth"),
        ({"depth": 2.0}, "depth"),
        ({"depth": True}, "depth"),
        ({"depth": 4, "rate": 0}, "rate"),
        ({"depth": 4, "mapping": "cyclic"}, "mapping"),
        ({"depth": 4, "distribution": "end"}, "distribution"),
        ({"depth": 4, "shared_depth": 2}, "shared_depth"),
        ({"depth": 4, "distribution": "front"}, "shared_depth"),
        ({"depth": 4, "distribution": "back", "shared_depth": 5}, "shared_depth"),
        ({"depth": 4, "distribution": "back", "shared_depth": 0}, "shared_depth"),
        ({"depth": 4, "distribution": "back", "shared_depth": True}, "shared_depth"),
        ({"depth": 4, "mapping": "random", "seed": None}, "seed"),
    ],
)
def test_errors_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got"):
        Sharing(**arguments)
