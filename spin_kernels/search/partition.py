"""The best partition of items where each pair gains, or loses, a number by being together.

Gains are a symmetric matrix of integers with zeros on its diagonal, partitions the number of each item's cluster, in
the order of the clusters' first items. Of equally good partitions that with the fewest clusters is taken, then by the
order of the items: where they come in an order of their own, how they were given plays no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

STARTS = 64  # of a search of up to 64 items, of more in proportion to their pairs fewer
NEVER = -(2**62)  # less than any gain


def components(linked: npt.NDArray[np.bool_]) -> Iterator[list[int]]:
    """Items that are linked, directly or through others.

    Where all pairs that are not linked lose by being together, no cluster of a best partition has items of several
    components: apart, they would lose none of its gains and all of the losses between them.
    """
    left = np.ones(len(linked), dtype=bool)
    while left.any():
        found = np.arange(len(linked)) == left.argmax()
        while ((grown := found | linked[found].any(0)) != found).any():
            found = grown
        left &= ~found
        yield np.flatnonzero(found).tolist()


def exact_partition(gains: Integers) -> Integers:
    """The best partition, by those of all sets of items: work 3^n, memory 3^(n-1).

    Of several it is the one in which the first item is with the earliest others, then the first of those left, etc.
    """
    # The bits of a set's number are its items, the first item the highest. A cost is what is lost, times n + 1, plus
    # the number of clusters.
    n = len(gains)
    alone = np.zeros(1, dtype=np.int64)  # of each set as one cluster, that one not counted
    best = np.zeros(1, dtype=np.int64)  # of each set's best partition
    for item in reversed(range(n)):
        gain = np.zeros(1, dtype=np.int64)
        for other in reversed(range(item + 1, n)):
            gain = np.concatenate((gain, gain + gains[item, other]))
        joined = alone - (n + 1) * gain
        best = np.concatenate((best, _least_sums(joined + 1, best)))
        alone = np.concatenate((alone, joined))
    labels, left = np.zeros(n, dtype=np.int64), 2**n - 1
    while left:
        first = 1 << (left.bit_length() - 1)
        sets = np.arange(first, 2 * first)
        sets = sets[sets & ~left == 0]
        chosen = int(sets[alone[sets] + 1 + best[left ^ sets] == best[left]][-1])  # with the earliest others
        labels[[item for item in range(n) if chosen >> (n - 1 - item) & 1]] = n - first.bit_length()
        left ^= chosen
    return numbered(labels.tolist())


def _least_sums(first: Integers, second: Integers) -> Integers:
    """For each set (along the last axis) the least first[part] + second[the rest of the set]."""
    if first.shape[-1] == 1:
        return first + second
    (a, with_a), (b, with_b) = (np.split(sets, 2, -1) for sets in (first, second))
    without, left, right = _least_sums(np.stack((a, with_a, a)), np.stack((b, b, with_b)))
    return np.concatenate((without, np.minimum(left, right)), -1)


def searched_partition(gains: Integers, known: Integers) -> Integers:
    """The best of what is found from single items and from random partitions, the same ones each time.

    Only if that is worse than a known partition, what is found from this one.
    """
    n, random = len(gains), Random(0)
    starts = [list(range(n))]
    for start in range(1, min(STARTS, STARTS**3 // n**2)):
        starts.append([random.randrange(1 + start % n) for _ in range(n)])
    found = _improved(gains, np.array([numbered(start) for start in starts]))
    if _gain(gains, known) > _gain(gains, found):
        found = _improved(gains, known[None])
    return found


def _improved(gains: Integers, starts: Integers) -> Integers:
    """Merges clusters and moves items of partitions (starts, items) until nothing improves, and takes the best."""
    done: list[Integers] = []
    while len(starts):
        moved = _moved(gains, np.stack([_merged(gains, labels) for labels in starts]))
        same = (moved == starts).all(1)
        done += [*moved[same]]
        starts = np.unique(moved[~same], axis=0)
    return min(done, key=lambda labels: (-_gain(gains, labels), labels.max(), labels.tolist()))


def _merged(gains: Integers, labels: Integers) -> Integers:
    """Merges the two clusters that gain the most until all would lose."""
    inside = (np.arange(labels.max() + 1)[:, None] == labels).astype(np.int64)
    between = inside @ gains @ inside.T
    np.fill_diagonal(between, NEVER)
    while len(between) > 1:
        first, second = sorted(divmod(int(between.argmax()), len(between)))
        if between[first, second] < 0:
            break
        between[first] += between[second]
        between[:, first] = between[first]
        between[first, first] = NEVER
        between = np.delete(np.delete(between, second, 0), second, 1)
        labels = np.where(labels == second, first, labels - (labels > second))
    return labels


def _moved(gains: Integers, labels: Integers) -> Integers:
    """Moves every item once, always the one that gains the most or loses the least, and takes the best on the way.

    So clusters also split or exchange items where each move by itself loses. All partitions (starts, items) at once.
    """
    starts, n = labels.shape
    every = np.arange(starts)
    inside = labels[:, :, None] == np.arange(n)  # of each item in each cluster; some are empty
    sums, sizes = gains @ inside.astype(np.int64), inside.sum(1)
    labels, best = labels.copy(), labels.copy()
    gain, most = np.zeros((2, starts), dtype=np.int64)
    fewest = (sizes > 0).sum(1)
    locked = np.zeros((starts, n), dtype=bool)
    for _ in range(n):
        own = np.take_along_axis(sums, labels[:, :, None], 2)
        own[locked] = 0  # so that locked ones stay at NEVER
        gained = sums - own
        np.put_along_axis(gained, labels[:, :, None], NEVER, 2)
        of, alone = np.nonzero(np.take_along_axis(sizes, labels, 1) == 1)  # these only move to others
        gained[of, alone] = np.where(sizes[of] == 0, NEVER, gained[of, alone])
        item, to = np.divmod(gained.reshape(starts, -1).argmax(1), n)
        gain += gained[every, item, to]
        before = labels[every, item]
        sums[every, :, to] += gains[item]
        sums[every, :, before] -= gains[item]
        sizes[every, to] += 1
        sizes[every, before] -= 1
        labels[every, item] = to
        locked[every, item] = True
        sums[every, item] = NEVER
        clusters = (sizes > 0).sum(1)
        better = (gain > most) | ((gain == most) & (clusters < fewest))
        best[better], most[better], fewest[better] = labels[better], gain[better], clusters[better]
    return np.stack([numbered(found.tolist()) for found in best])


def _gain(gains: Integers, labels: Integers) -> int:
    return int(gains[labels[:, None] == labels].sum()) // 2


def numbered(labels: Iterable[int]) -> Integers:
    """The same partition, its clusters numbered by their first items."""
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)
