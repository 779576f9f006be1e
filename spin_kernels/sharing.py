"""Sharing plans: which block of a network uses which distinct weight."""

from __future__ import annotations

import random
from dataclasses import dataclass

MAPPINGS = ("sequential", "strided", "random")
DISTRIBUTIONS = ("uniform", "front", "middle", "back")


@dataclass(frozen=True)
class Sharing:
    """Assigns each of ``depth`` blocks one of ``num_shared`` distinct weights (SPIN, arXiv 2207.10237).

    Args:
        depth: number of blocks.
        rate: how many blocks share one weight; 1 shares nothing. Where it does not divide the number of
            sharing blocks, one weight or several have fewer users.
        mapping: ``"sequential"`` gives runs of ``rate`` neighbours one weight, ``"strided"`` every S-th block
            (S distinct weights), ``"random"`` is a shuffle of sequential, relabelled in order of first use.
        distribution: ``"uniform"`` shares across all blocks; ``"front"``, ``"middle"`` and ``"back"`` share
            across ``shared_depth`` consecutive blocks there, and every other block has a weight of its own.
        shared_depth: number of sharing blocks; required unless the distribution is uniform.
        seed: of the random mapping.

    Raises:
        ValueError: an argument is out of its range.

    >>> Sharing(6, 2).index
    [0, 0, 1, 1, 2, 2]
    >>> Sharing(6, 2, mapping="strided").index
    [0, 1, 2, 0, 1, 2]
    >>> Sharing(6, 2, distribution="middle", shared_depth=4).index
    [0, 1, 1, 2, 2, 3]
    """

    depth: int
    rate: int = 2
    mapping: str = "sequential"
    distribution: str = "uniform"
    shared_depth: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int):  # None would draw anew at every look at `index`
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")
        for name in ("depth", "rate"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.mapping not in MAPPINGS:
            raise ValueError(f"mapping: expected one of {', '.join(MAPPINGS)}, got {self.mapping!r}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, got {self.distribution!r}")
        if self.distribution == "uniform":
            if self.shared_depth is not None:
                raise ValueError(
                    f"shared_depth: expected None for a uniform distribution, got {self.shared_depth!r}; "
                    "choose front, middle or back to share across a part of the blocks"
                )
        elif (
            not isinstance(self.shared_depth, int)
            or self.shared_depth is True
            or not 1 <= self.shared_depth <= self.depth
        ):
            raise ValueError(
                f"shared_depth: expected an integer from 1 to depth={self.depth} when the distribution is "
                f"{self.distribution}, got {self.shared_depth!r}"
            )

    @property
    def index(self) -> list[int]:
        """The distinct weight that each block uses: ``depth`` integers below :attr:`num_shared`."""
        n = self.depth if self.shared_depth is None else self.shared_depth
        if self.mapping == "strided":
            stride = -(-n // self.rate)
            shared = [d % stride for d in range(n)]
        else:
            shared = [d // self.rate for d in range(n)]
        if self.mapping == "random":
            # Sorting by random() keys: of Python's generators only random() is promised to stay reproducible.
            keys = random.Random(self.seed)
            shared = sorted(shared, key=lambda _: keys.random())
        start = {"middle": (self.depth - n) // 2, "back": self.depth - n}.get(self.distribution, 0)
        before = [("own", d) for d in range(start)]
        after = [("own", d) for d in range(start + n, self.depth)]
        labels: dict[object, int] = {}
        return [labels.setdefault(weight, len(labels)) for weight in (*before, *shared, *after)]

    @property
    def num_shared(self) -> int:
        """The number of distinct weights."""
        return max(self.index) + 1


def check_plan(name: str, plan: Sharing | None, depth: int) -> Sharing:
    """The plan, or for None the one that shares nothing.

    Raises:
        TypeError, ValueError: argument ``name`` is no plan for ``depth`` blocks.
    """
    if plan is None:
        return Sharing(depth, 1)
    if not isinstance(plan, Sharing):
        raise TypeError(f"{name}: expected a Sharing, got {type(plan).__name__}")
    if plan.depth != depth:
        raise ValueError(f"{name}: expected a plan for {depth} blocks, got one for {plan.depth}")
    return plan
