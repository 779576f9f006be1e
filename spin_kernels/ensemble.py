"""Ensembles of networks that may share weights, and predictions within a limit (SuperWeights, arXiv 2312.01280).

The members may differ in depth and width and take their weights from one bank of templates. They are trained together,
each on its own loss, and their calibrated predictions are averaged. At inference they are evaluated one after another
until a limit of time or of FLOPs, so that there is an answer at any limit::

    ensemble = spin.Ensemble(networks)
    for loss in ensemble.losses(images, targets):  # a training step
        loss.backward()
    ensemble.eval().calibrate(held_out_batches, reorder=True)
    ensemble.predict(images, seconds=0.02).log_probabilities
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anytime import Batches, Costs, Point, anytime_curve, evaluate, now
from .calibration import (
    accuracy,
    best_order,
    expected_calibration_error,
    fit_average,
    fit_temperature,
    negative_log_likelihood,
)
from .nn.base import Float32State

__all__ = [
    "Ensemble", "Point", "Prediction", "accuracy", "anytime_curve", "expected_calibration_error",
    "negative_log_likelihood",
]  # fmt: skip


class Prediction(NamedTuple):
    """Of a batch: log-probabilities (B, classes), the members whose average it is, and what all B inputs took."""

    log_probabilities: Tensor
    members: tuple[int, ...]
    seconds: float
    flops: int


class Ensemble(Float32State):
    """The average of classifiers that each map a batch (B, ...) to logits (B, classes).

    Members are numbered as in ``networks`` and evaluated in ``order``. Averages are calibrated for each number of
    members: row k - 1 of the buffers ``weights`` and ``temperatures``, (members, members), belongs to the first k in
    that order, and column j to the one at place j. Others than the first have the weights of the shortest such row that
    holds them, divided by their sum, and the temperatures that calibrate each by itself, the buffer ``alone``,
    (members,). Until :meth:`calibrate` weights are equal and temperatures 1. These buffers stay float32 (or float64);
    they and the order are in the state dict.

    Args:
        networks: the members; an ``nn.ModuleList``, which may be of a class of its own that owns a shared bank, becomes
            the submodule ``networks`` itself.
        order: the members' numbers in the order of their evaluation; None is as given.

    Raises:
        ValueError, TypeError: there are no networks, or the order is not one of them all.
    """

    # A row for each number of members, because one set of temperatures cannot serve all: with those that calibrate
    # every member by itself the average lacks confidence, and can be worse than without calibration. A row's own serve
    # no other members: one with hardly any weight may have any temperature.

    weights: Tensor
    temperatures: Tensor
    alone: Tensor

    def __init__(self, networks: Iterable[nn.Module], order: Sequence[int] | None = None) -> None:
        super().__init__()
        if isinstance(networks, nn.Module) and not isinstance(networks, nn.ModuleList):
            raise TypeError(
                f"networks: expected a list of classifiers, got {type(networks).__name__}; put it in a list"
            )
        self.networks = networks if isinstance(networks, nn.ModuleList) else nn.ModuleList(networks)
        count = len(self._members())
        if count == 0:
            raise ValueError("networks: expected one or more classifiers, got none; give a list of them")
        self.order = self._check_order(range(count) if order is None else order)
        self.register_buffer("weights", torch.ones(count, count).tril() / torch.arange(1, count + 1)[:, None])
        self.register_buffer("temperatures", torch.ones(count, count))
        self.register_buffer("alone", torch.ones(count))
        self._costs = [Costs() for _ in range(count)]

    def _members(self) -> list[nn.Module]:
        # A subclass of nn.ModuleList may have other submodules, such as a bank, which count as entries of the list.
        return [module for name, module in self.networks._modules.items() if name.isdigit() and module is not None]

    # --- averages

    def forward(self, x: Tensor, members: int | Sequence[int] | None = None) -> Tensor:
        """Log-probabilities (B, classes) of the calibrated average, in float32 or wider, with gradients.

        Args:
            x: a batch (B, ...).
            members: how many, the first in the order; or a list of their numbers. None is all.

        Raises:
            ValueError: there are no such members, or their outputs are no logits (B, classes) of one shape.
        """
        places = self._places(members)
        found: list[Tensor] = []
        for place in places:
            found.append(self._logits(self.order[place], x, found[0] if found else None))
        return self._average(found, places)

    def _logits(self, member: int, x: Tensor, other: Tensor | None) -> Tensor:
        """A member's logits (B, classes), in float32 or wider, if they match those of another."""
        z = self._members()[member](x)
        is_logits = isinstance(z, Tensor) and z.dim() == 2 and len(z) == len(x)
        if not is_logits or (other is not None and z.shape != other.shape):
            wanted = f"(B, classes) for a batch of {len(x)}" if other is None else f"{tuple(other.shape)} as of another"
            got = f"{tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__} from member {member}"
            raise ValueError(f"networks: expected logits {wanted}, got {got}; give it such a head")
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def _average(self, logits: Sequence[Tensor], places: list[int]) -> Tensor:
        """Log-probabilities (B, classes) of members, by their places in the order, from logits (B, classes) of each."""
        z = torch.stack(list(logits))
        weights, temperatures = self.weights[places[-1], places].to(z.dtype), self._temperatures(places).to(z.dtype)
        # Without the others all that are left may have weight 0.
        weights = torch.where(weights.sum() > 0, weights / weights.sum(), 1 / len(places))
        return torch.logsumexp(F.log_softmax(z / temperatures[:, None, None], -1) + weights.log()[:, None, None], 0)

    def _temperatures(self, places: list[int]) -> Tensor:
        """Of members by their places in the order: fitted together where they are the first ones."""
        count = len(places)
        return self.temperatures[count - 1, :count] if places == list(range(count)) else self.alone[places]

    def _places(self, members: int | Sequence[int] | None) -> list[int]:
        count = len(self.order)
        if members is None:
            return list(range(count))
        if isinstance(members, int):
            if isinstance(members, bool) or not 1 <= members <= count:
                raise ValueError(f"members: expected from 1 to {count} members, got {members!r}; or list their numbers")
            return list(range(members))
        return sorted(self.order.index(member) for member in self._check_members(members))

    def _check_members(self, members: Sequence[int]) -> list[int]:
        found, count = list(members), len(self.order)
        if not found or len(set(found)) < len(found) or not all(type(m) is int and 0 <= m < count for m in found):
            raise ValueError(
                f"members: expected different numbers from 0 to {count - 1}, one or more, got {found}; members are "
                "numbered as in networks"
            )
        return found

    def _check_order(self, order: Sequence[int]) -> tuple[int, ...]:
        found, count = list(order), len(self._members())
        if not all(type(m) is int for m in found) or sorted(found) != list(range(count)):
            raise ValueError(
                f"order: expected each number from 0 to {count - 1} once, got {found}; members are numbered as in "
                "networks"
            )
        return tuple(found)

    # --- training

    def losses(
        self,
        x: Tensor | Sequence[Tensor],
        targets: Tensor | Sequence[Tensor],
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> Iterator[Tensor]:
        """Each member's own loss, a scalar, one after another in the order of ``networks``.

        The published code trains their sum, with one batch for all: each learns as it would alone, which the loss of
        the average would not make it do. A member runs when its loss is asked for: ``for loss in ensemble.losses(x,
        targets): loss.backward()`` holds one member's activations at a time, ``sum(ensemble.losses(x,
        targets)).backward()`` those of all, for the same gradients.

        Args:
            x: a batch (B, ...), or a list of one for each member.
            targets: of the batch, or a list of those of each member's.
            loss: maps logits (B, classes) and targets to a scalar.

        Raises:
            ValueError: a list has not one entry for each member.
        """
        # One iterator serves both. A method that ran backward itself would have to know about scalers of gradients,
        # accumulation and weights of losses, and would wait for the device to return numbers.
        batches, goals = (self._for_each("x", x), self._for_each("targets", targets))
        return (loss(network(a), b) for network, a, b in zip(self._members(), batches, goals, strict=True))

    def _for_each(self, name: str, value: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        count = len(self.order)
        if isinstance(value, Tensor):
            return [value] * count
        if len(value) != count:
            raise ValueError(
                f"{name}: expected a tensor for all members or a list of {count}, one for each, got a list of "
                f"{len(value)}; members are numbered as in networks"
            )
        return value

    # --- calibration

    def calibrate(self, batches: Batches, reorder: bool = False) -> Ensemble:
        """Fits weights and temperatures on held-out data, for every number of members, and returns the ensemble.

        What is minimised is the negative log-likelihood of the average (:func:`.calibration.fit_average`); on these
        data no number of members does worse than their plain average. Calibrate after training, in eval mode, on data
        that were not trained on. Held in memory: all logits.

        Args:
            batches: (inputs (B, ...), targets (B,)), which are moved to the device of the ensemble.
            reorder: whether to choose the order first: step by step the member that lowers the negative log-likelihood
                most for its FLOPs (:func:`.calibration.best_order`).

        Raises:
            ValueError: no batches, targets that are no classes, or logits that are not finite.
            RuntimeError: a member is in training mode.
        """
        found = evaluate(self, batches)
        if reorder:
            self.order = self._check_order(best_order(found.logits, found.targets, self.flops(found.example)))
        logits = [found.logits[member] for member in self.order]
        alone = [fit_temperature(z, found.targets) for z in logits]
        self.alone.copy_(self.alone.new_tensor(alone))
        for k in range(1, len(logits) + 1):
            weights, temperatures = fit_average(logits[:k], found.targets, alone[:k])
            self.weights[k - 1, :k] = self.weights.new_tensor(weights)
            self.temperatures[k - 1, :k] = self.temperatures.new_tensor(temperatures)
        return self

    # --- predictions within limits

    @torch.no_grad()
    def predict(self, x: Tensor, *, seconds: float | None = None, flops: float | None = None) -> Prediction:
        """The average of as many members, in their order, as fit within the limits, and of the first in any case.

        A member is started if its FLOPs fit, and if the time that it takes fits in the time left. That is known from
        :meth:`seconds` or, smoothed, from earlier calls for the same shape, dtype and device; where it is not, the
        member is started while any time is left. The device is waited for after each member. The first call for a
        shape of inputs also counts FLOPs, for which every member runs once on one input.

        Args:
            x: a batch (B, ...).
            seconds: limit for the whole batch; None is none.
            flops: limit for the whole batch; None is none.

        Raises:
            ValueError: a limit is not positive, or as in :meth:`forward`.
            RuntimeError: a member is in training mode, where predictions would depend on the batch.
        """
        for name, limit in (("seconds", seconds), ("flops", flops)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name}: expected a positive limit for the batch, got {limit!r}; None is no limit")
        begin = now(x)
        costs, end = [len(x) * cost for cost in self.flops(x)], now(x)
        found: list[Tensor] = []
        for member in self.order:
            clock = self._costs[member].clock(x)
            if found:
                spent = sum(costs[m] for m in self.order[: len(found) + 1])
                if flops is not None and spent > flops:
                    break
                if seconds is not None and not clock.fits(seconds - (end - begin)):
                    break
            found.append(self._logits(member, x, found[0] if found else None))
            # Averaged at once: a member's time is then all that it adds to that of the answer.
            log_probabilities = self._average(found, list(range(len(found))))
            start, end = end, now(x)
            clock.took(end - start)
        members = self.order[: len(found)]
        return Prediction(log_probabilities, members, end - begin, sum(costs[member] for member in members))

    def flops(self, x: Tensor) -> list[int]:
        """The FLOPs of each member for one input, counted on the first of a batch (B, ...): :func:`.flops.count_flops`.

        Raises:
            ValueError: the batch is empty.
            RuntimeError: a member is in training mode.
        """
        self._check_eval()
        if len(x) == 0:
            raise ValueError(f"x: expected a batch of one or more, got shape {tuple(x.shape)}; skip empty ones")
        return [costs.flops(network, x[:1]) for costs, network in zip(self._costs, self._members(), strict=True)]

    @torch.no_grad()
    def seconds(self, x: Tensor, repeats: int = 5) -> list[float]:
        """The seconds that each member takes for a batch (B, ...): the median of some calls after one to warm up.

        :meth:`predict` then knows them for this shape, dtype and device.

        Raises:
            ValueError: ``repeats`` is no positive integer.
            RuntimeError: a member is in training mode.
        """
        self._check_eval()
        if type(repeats) is not int or repeats < 1:
            raise ValueError(f"repeats: expected a positive integer, got {repeats!r}; 5 is usual")
        members = zip(self._costs, self._members(), strict=True)
        return [costs.seconds(network, x, repeats) for costs, network in members]

    def _check_eval(self) -> None:
        for member, network in enumerate(self._members()):
            if any(module.training for module in network.modules()):
                raise RuntimeError(
                    f"networks: expected members in eval mode, got training mode in member {member}; call eval() first"
                )

    # --- fewer members

    def keep(self, members: Sequence[int]) -> Ensemble:
        """An ensemble of some members, numbered as in this list, with their modules themselves and in their order.

        It is calibrated as :meth:`forward` with a list of members, for every number of them. Where ``networks`` has a
        ``select(members)``, that makes the new ``networks``, else they are a plain ``nn.ModuleList``.

        Raises:
            ValueError: there are no such members.
        """
        places, chosen, all_members = self._places(list(members)), list(members), self._members()
        select = getattr(self.networks, "select", None)
        networks = [all_members[member] for member in chosen] if select is None else select(chosen)
        kept = Ensemble(networks, [chosen.index(self.order[place]) for place in places])
        kept.training = self.training  # of this module alone: the members keep their modes
        kept.weights, kept.alone = self.weights[places][:, places], self.alone[places]
        kept.temperatures = torch.ones_like(kept.weights)
        for count in range(1, len(places) + 1):
            kept.temperatures[count - 1, :count] = self._temperatures(places[:count])
        kept._costs = [self._costs[member] for member in chosen]
        return kept

    def drop(self, *members: int) -> Ensemble:
        """:meth:`keep` of all members but these.

        Raises:
            ValueError: there are no such members, or no others.
        """
        gone = self._check_members(members)
        return self.keep([member for member in range(len(self.order)) if member not in gone])

    # --- state

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.order)

    def set_extra_state(self, state: Tensor) -> None:
        self.order = self._check_order(state.tolist())

    def _float32_state(self) -> Iterable[Tensor | None]:
        return self.weights, self.temperatures, self.alone

    def extra_repr(self) -> str:
        return f"order={list(self.order)}"
