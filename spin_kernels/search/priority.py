"""The priority queue that puts layers together by the similarity of their gradients."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)


def by_similarity(pairs: Iterable[tuple[float, Item, Item]]) -> list[tuple[float, Item, Item]]:
    """Sorts pairs (similarity, i, j), the least similar first; equal ones stay in the order of their comparison.

    Raises:
        ValueError: a similarity is NaN.
    """
    queue = list(pairs)
    for similarity, i, j in queue:
        if math.isnan(similarity):
            raise ValueError(
                f"queue: expected numbers as similarities, got nan for {i} and {j}; look for gradients that are not "
                "finite"
            )
    return sorted(queue, key=lambda pair: pair[0])


def regroup(groups: Mapping[Item, int], queue: Iterable[tuple[float, Item, Item]], threshold: float) -> dict[Item, int]:
    """Moves items to the groups of similar ones (published: priority_queue_assignment).

    The most similar pair (similarity, i, j) is taken first, of equal ones the last: j moves to the group that i has
    then, as long as the similarity is above the threshold. As published only j moves, not what had joined it before,
    so two items of a chain of similar ones may end in different groups.

    Args:
        groups: the group of every item.
        queue: pairs of items, sorted here as :func:`by_similarity` does.
        threshold: pairs at or below it change nothing.

    Returns:
        The new group of every item, in the order of ``groups``.

    Raises:
        ValueError: a similarity or the threshold is NaN, or an item of the queue has no group.
    """
    if math.isnan(threshold):
        raise ValueError("threshold: expected a number, got nan; cosine similarities lie between -1 and 1")
    result = dict(groups)
    for similarity, i, j in reversed(by_similarity(queue)):
        if similarity <= threshold:
            break
        if i not in result or j not in result:
            raise ValueError(f"queue: expected items that have a group, got {i} and {j}; compare these items only")
        result[j] = result[i]
    return result
