"""The numbers that templates are combined with: named vectors in one flat tensor, trained or made from embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .base import Float32State

Key = tuple[str, str]  # of a vector: the cluster and the name


def direction(before: Tensor) -> Tensor:
    """A unit vector (T,) orthogonal to the rows of ``before`` (n, T), fewer than T orthogonal unit vectors."""
    size, before = before.shape[1], before.double()
    vector = torch.randn(size, device=before.device, dtype=torch.float64)
    for _ in range(2):  # a second time for what rounding left
        vector = vector - before.T @ (before @ vector)
        vector = vector / vector.norm()
    return vector


class Coefficients(Float32State, ABC):
    """Vectors by (cluster, name); ``forward()`` is all of them, flat, and ``start(key)`` says where one begins."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: dict[Key, int] = {}

    @abstractmethod
    def start(self, key: Key) -> int:
        """Of a vector in the flat tensor."""

    @abstractmethod
    def _add(self, key: Key, length: int, scale: float) -> None: ...

    def add(self, key: Key, length: int, scale: float) -> None:
        """Adds a vector of this length and Euclidean norm; it stays what it is if the key is known.

        Raises:
            ValueError: the key is known with another length.
        """
        self.check(key, length)
        if key not in self.lengths:
            with torch.no_grad():
                self._add(key, length, scale)
            self.lengths[key] = length

    def check(self, key: Key, length: int) -> None:
        """Raises ValueError where the key is known with another length."""
        if self.lengths.get(key, length) != length:
            raise ValueError(
                f"coefficients: expected {self.lengths[key]} as other users of {key[1]!r} in cluster {key[0]!r} "
                f"have, got {length}; give them another name"
            )

    def _float32_state(self) -> Iterable[Tensor | None]:
        return self.parameters()


class TrainedCoefficients(Coefficients):
    """Parameter: values (Q,). Vectors of one cluster and length start orthogonal to each other where they can."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(0, **options))
        self._starts: dict[Key, int] = {}
        self._alike: dict[tuple[str, int], list[Key]] = {}  # vectors of one cluster and length

    def start(self, key: Key) -> int:
        return self._starts[key]

    def _add(self, key: Key, length: int, scale: float) -> None:
        values = self.values.detach()
        alike = self._alike.setdefault((key[0], length), [])
        last = alike[len(alike) // length * length :]  # since the last full basis
        before = [values[self._starts[k] : self._starts[k] + length] for k in last]
        alike.append(key)
        rows = torch.stack(before) if before else values.new_empty(0, length)
        vector = direction(nn.functional.normalize(rows, dim=1)) * scale
        self._starts[key] = len(values)
        self.values = nn.Parameter(torch.cat((values, vector.to(values.dtype))), self.values.requires_grad)

    def forward(self) -> Tensor:
        return self.values

    def extra_repr(self) -> str:
        return f"{len(self.values)}, vectors={len(self.lengths)}"


class EmbeddedCoefficients(Coefficients):
    """A vector of T coefficients is a linear map, one for each cluster and T, of E trained values.

    Parameters: embeddings (V, E), and a linear layer in ``projections`` for each cluster and T.
    """

    def __init__(self, embedding: int, **options: Any) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(0, embedding, **options))
        self.projections = nn.ModuleDict()
        self._kinds: dict[tuple[str, int], list[int]] = {}  # rows of their embeddings, in order of first use

    def start(self, key: Key) -> int:
        rows = list(self.lengths)
        first = 0
        for (cluster, length), members in self._kinds.items():
            if (cluster, length) == (key[0], self.lengths[key]):
                return first + members.index(rows.index(key)) * length
            first += len(members) * length
        raise KeyError(key)

    def _add(self, key: Key, length: int, scale: float) -> None:
        embeddings = self.embeddings.detach()
        name, size = f"{len(self._kinds)}", embeddings.shape[1]
        kind = (key[0], length)
        if kind not in self._kinds:
            linear = nn.Linear(size, length, device=embeddings.device, dtype=embeddings.dtype)
            nn.init.orthogonal_(linear.weight)  # rows or columns are unit vectors
            linear.weight.mul_(max(1.0, (size / length)) ** 0.5)  # keeps the norm of a random vector
            nn.init.zeros_(linear.bias)
            self.projections[name] = linear
            self._kinds[kind] = []
        self._kinds[kind].append(len(embeddings))
        new = torch.randn_like(embeddings.new_empty(1, size))
        self.embeddings = nn.Parameter(
            torch.cat((embeddings, new * (scale / new.norm()))), self.embeddings.requires_grad
        )

    def forward(self) -> Tensor:
        with torch.autocast(self.embeddings.device.type, enabled=False):  # coefficients are float32
            vectors = [
                linear(self.embeddings[rows]).flatten()
                for linear, rows in zip(self.projections.values(), self._kinds.values(), strict=True)
            ]
        return torch.cat(vectors) if vectors else self.embeddings.flatten()

    def extra_repr(self) -> str:
        return f"{self.embeddings.shape[1]}, vectors={len(self.lengths)}"
