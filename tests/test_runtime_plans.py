"""When matrices are summed ahead of the blocks that use them (packing_plan.h), through spin_runtime.

NumPy only, for the sanitizer build, like test_runtime.py.
"""

from typing import Any

import pytest
from numpy_reference import generator
from test_runtime import runtime


def simulate(plan: list[Any], pw_index: list[int]) -> int:
    """Checks that every block finds its matrix in its slot; returns the number of slots."""
    place: dict[int, int] = {}
    packed: list[int] = []
    block = 0
    for first, last, packings, slots in plan:
        assert first == block
        assert last > first or not pw_index
        assert len(slots) == last - first
        assert len({slot for _, slot in packings}) == len(packings), "two matrices of a segment in one slot"
        for matrix, slot in packings:
            place[slot] = matrix
            packed.append(matrix)
        for slot in slots:
            assert place[slot] == pw_index[block]
            block += 1
    assert block == len(pw_index)
    assert sorted(packed) == sorted(set(pw_index)), "every distinct matrix is packed exactly once"
    assert sorted(place) == list(range(len(place)))
    return len(place)


def most_alive(pw_index: list[int]) -> int:
    """Distinct matrices that are needed both up to and from some block on."""
    return max((len(set(pw_index[: d + 1]) & set(pw_index[d:])) for d in range(len(pw_index))), default=0)


def test_packing_plan() -> None:
    rng = generator("plans")
    plans: list[list[int]] = [[], [0], [3], [0] * 9, list(range(20)), [1, 0] * 8]
    plans += [rng.integers(rng.integers(1, 12), size=rng.integers(1, 40)).tolist() for _ in range(300)]
    for pw_index in plans:
        for slots in (1, 2, 3, 7, 100):
            used = simulate(runtime.packing_plan(pw_index, slots), pw_index)
            assert used <= max(slots, most_alive(pw_index) if pw_index else 0), (pw_index, slots)
    unshared, sequential = list(range(24)), [d // 3 for d in range(24)]
    for slots in (1, 2, 5):
        for pw_index, distinct in ((unshared, 24), (sequential, 8)):
            plan = runtime.packing_plan(pw_index, slots)
            assert simulate(plan, pw_index) == slots
            assert len(plan) == -(-distinct // slots), "a segment ends only when the slots are full"
    assert len(runtime.packing_plan([d % 4 for d in range(24)], 4)) == 1
    with pytest.raises(ValueError, match="pw_index"):
        runtime.packing_plan([0, -1], 2)
