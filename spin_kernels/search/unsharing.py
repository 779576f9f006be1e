"""Layers that share coefficients get coefficients of their own where their gradients disagree."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from .coefficients import Bank
from .priority import regroup
from .similarity import cosine

User = tuple[int, int]  # network, position among its layers that have the level


@dataclass(frozen=True)
class Unsharing:
    """Which layers share coefficients after unsharing.

    Attributes:
        vectors: as before, for each network and bank the vector of each of its layers, numbered in the order of
            first use. Each of them starts as a copy of what the layer had.
        copied: for each bank the users of each new vector. As published only the first user's vector stays; all
            others of a bank in which any two users were compared are copied, also where the same layers share them.
    """

    vectors: tuple[dict[Bank, list[int]], ...]
    copied: dict[Bank, list[list[User]]]


def unshare_vectors(
    vectors: Sequence[Mapping[Bank, Sequence[Hashable]]],
    gradients: Sequence[Mapping[Bank, Sequence[Tensor]]],
    threshold: float,
) -> Unsharing:
    """Decides which layers keep sharing coefficients (published: compare_grads).

    Layers that use one vector of a bank are compared by the gradients that each alone gives it; they start apart, and
    the priority queue puts those together that are similar enough (:func:`~spin_kernels.search.priority.regroup`).

    Args:
        vectors: for each network and bank the vector of each layer that has the bank's level, in their order.
        gradients: of these vectors, in the same places: what each layer contributes.
        threshold: the similarity above which two layers keep sharing.

    Raises:
        ValueError: vectors and gradients do not fit, a value is not finite, or the threshold is NaN.
    """
    _check(vectors, gradients)
    copied: dict[Bank, list[list[User]]] = {}
    parts: dict[tuple[Bank, User], int] = {}
    for bank in dict.fromkeys(bank for network in vectors for bank in network):
        users = [(n, at) for n, network in enumerate(vectors) for at in range(len(network.get(bank, ())))]
        queue = []
        for i, j in combinations(users, 2):
            if vectors[i[0]][bank][i[1]] == vectors[j[0]][bank][j[1]]:
                pair = gradients[i[0]][bank][i[1]], gradients[j[0]][bank][j[1]]
                queue.append((cosine(*pair, f"layers {i} and {j} of bank {bank!r}"), i, j))
        groups = regroup({user: number for number, user in enumerate(users)}, queue, threshold)
        parts |= {(bank, user): group for user, group in groups.items()}
        if queue:
            together: dict[int, list[User]] = {}
            for user, group in groups.items():
                together.setdefault(group, []).append(user)
            copied[bank] = list(together.values())[1:]
    numbers: dict[tuple[Bank, int], int] = {}
    result: list[dict[Bank, list[int]]] = []
    for n, network in enumerate(vectors):
        result.append({})
        for bank, layers in network.items():
            keys = [(bank, parts[bank, (n, at)]) for at in range(len(layers))]
            result[n][bank] = [numbers.setdefault(key, len(numbers)) for key in keys]
    return Unsharing(tuple(result), copied)


def _check(
    vectors: Sequence[Mapping[Bank, Sequence[Hashable]]], gradients: Sequence[Mapping[Bank, Sequence[Tensor]]]
) -> None:
    expected, got = (
        [{bank: len(layers) for bank, layers in network.items()} for network in given] for given in (vectors, gradients)
    )
    if not any(expected) or not all(length for network in expected for length in network.values()):
        raise ValueError(f"vectors: expected banks with layers, got {expected}; leave out what has none")
    if expected != got:
        raise ValueError(
            f"gradients: expected one for each vector, {expected}, got {got}; take those of every layer of every bank"
        )
