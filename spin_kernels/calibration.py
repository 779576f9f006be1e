"""Temperatures and weights of an average of classifiers, fitted on held-out data, and how good predictions are.

Member m predicts p_m(y) = softmax(z_m / T_m)[y] from its logits z_m, and the average is p(y) = sum_m w_m p_m(y). Both T
and w minimise the negative log-likelihood of held-out targets, -mean_i log p(y_i), in float64:

- T of one member alone (Guo et al., arXiv 1706.04599): convex in 1 / T, by Newton steps within a bracket.
- T and w together, by expectation maximisation: with r_mi = w_m p_m(y_i) / p(y_i), w_m is the mean of r_m, and T_m the
  temperature of member m alone on data that count r_mi.

They are fitted together because members that are calibrated one by one average to predictions that are not confident
enough (Rahaman and Thiery, arXiv 2007.08792).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "accuracy", "best_order", "expected_calibration_error", "fit_average", "fit_temperature", "negative_log_likelihood",
]  # fmt: skip

_TOLERANCE = 1e-6  # nats per target that are not worth another step


# --- metrics of log-probabilities (N, classes) and targets (N,)


def accuracy(log_probabilities: Tensor, targets: Tensor) -> float:
    """The fraction, from 0 to 1, of the N rows of ``log_probabilities`` (N, classes) whose largest entry is the target.

    Raises:
        ValueError: targets are not N integers from 0 to classes - 1, or N is 0.
    """
    check_targets(log_probabilities, targets)
    return float((log_probabilities.argmax(1) == targets).double().mean())


def negative_log_likelihood(log_probabilities: Tensor, targets: Tensor) -> float:
    """The mean over N of -log_probabilities[i, targets[i]], in nats, of log-probabilities (N, classes).

    Raises:
        ValueError: as in :func:`accuracy`.
    """
    check_targets(log_probabilities, targets)
    return -float(log_probabilities.detach().gather(1, targets[:, None].long()).double().mean())


def expected_calibration_error(log_probabilities: Tensor, targets: Tensor, bins: int = 15) -> float:
    """How far confidence and accuracy are apart, from 0 to 1 (ECE; Guo et al., arXiv 1706.04599).

    The confidence of a row of ``log_probabilities`` (N, classes) is its largest probability. Rows are put into bins
    (i / bins, (i + 1) / bins] by it; the ECE is the mean over rows of |accuracy - mean confidence| of their bin.

    Raises:
        ValueError: as in :func:`accuracy`, or ``bins`` is no positive integer.
    """
    check_targets(log_probabilities, targets)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins: expected a positive integer, got {bins!r}; 15 is usual")
    top, found = log_probabilities.detach().double().max(1)
    confidence = top.exp().clamp(max=1)
    edges = torch.arange(1, bins, dtype=torch.float64, device=top.device) / bins
    gaps = torch.bincount(torch.bucketize(confidence, edges), (found == targets).double() - confidence, bins)
    return float(gaps.abs().sum()) / len(targets)


def check_targets(outputs: Tensor, targets: Tensor) -> None:
    """Refuses what are no targets (N,) of outputs (N, classes)."""
    n, classes = outputs.shape
    if targets.shape != (n,) or n == 0 or targets.is_floating_point():
        raise ValueError(
            f"targets: expected {max(n, 1)} integers, one for each row of outputs {tuple(outputs.shape)}, got "
            f"{targets.dtype} of shape {tuple(targets.shape)}; give classes, not their probabilities"
        )
    low, high = (int(extreme) for extreme in torch.aminmax(targets))
    if low < 0 or high >= classes:
        raise ValueError(
            f"targets: expected classes from 0 to {classes - 1}, got {low if low < 0 else high}; take out what has no "
            "class"
        )


# --- temperatures and weights


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature T for which softmax(logits / T) has the smallest negative log-likelihood; it is always finite.

    Args:
        logits: (N, classes), finite.
        targets: (N,), integers.

    Raises:
        ValueError: as in :func:`accuracy`.
    """
    check_targets(logits, targets)
    return 1 / _fit_inverse(logits, targets, logits.new_ones(len(logits), dtype=torch.float64), 1.0)[0]


def fit_average(
    logits: Sequence[Tensor], targets: Tensor, temperatures: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Weights, which sum to 1, and temperatures of the average of some members.

    The negative log-likelihood of the average is a local minimum, and no larger than that of the plain average at
    temperature 1 or at those given.

    Args:
        logits: of each member (N, classes), finite.
        targets: (N,), integers.
        temperatures: to start from, such as those of :func:`fit_temperature`.

    Raises:
        ValueError: as in :func:`accuracy`.
    """
    for of_member in logits:
        check_targets(of_member, targets)
    starts = []
    for inverses in ([1.0] * len(logits), [1 / t for t in temperatures]):
        fits = [(b, _moments(z, targets, b)[0]) for z, b in zip(logits, inverses, strict=True)]
        likelihoods = torch.stack([log_p for _, log_p in fits])
        starts.append((float(_average(likelihoods, _uniform(likelihoods)).mean()), fits))
    best, fits = max(starts, key=lambda start: start[0])
    weights = _uniform(torch.stack([log_p for _, log_p in fits]))
    for _ in range(100):
        likelihoods = torch.stack([log_p for _, log_p in fits])
        new = _fit_weights(likelihoods, weights)
        counts = (likelihoods + new.log()[:, None] - _average(likelihoods, new)).exp()
        steps = [_fit_inverse(z, targets, count, b) for z, count, (b, _) in zip(logits, counts, fits, strict=True)]
        value = float(_average(torch.stack([log_p for _, log_p in steps]), new).mean())
        if value - best < 10 * _TOLERANCE:
            break
        best, weights, fits = value, new, steps
    return weights.tolist(), [1 / b for b, _ in fits]


def best_order(logits: Sequence[Tensor], targets: Tensor, costs: Sequence[float]) -> list[int]:
    """An order of members in which each next one lowers the negative log-likelihood most for what it costs.

    It is chosen step by step; every member has the temperature of :func:`fit_temperature`, each average fitted weights.

    Args:
        logits: of each member (N, classes), finite.
        targets: (N,), integers.
        costs: of each member, not negative, such as FLOPs.

    Raises:
        ValueError: as in :func:`accuracy`.
    """
    likelihoods = torch.stack([_moments(z, targets, 1 / fit_temperature(z, targets))[0] for z in logits])
    order: list[int] = []
    reached = -math.log(logits[0].shape[1])  # what is known without any member
    while len(order) < len(logits):
        found = {}
        for m in set(range(len(logits))) - set(order):
            some = likelihoods[[*order, m]]
            found[m] = float(_average(some, _fit_weights(some, _uniform(some))).mean())
        gains = {m: (max(0.0, value - reached) / max(costs[m], 1), -costs[m], -m) for m, value in found.items()}
        order.append(max(gains, key=lambda m: gains[m]))
        reached = found[order[-1]]
    return order


def _uniform(likelihoods: Tensor) -> Tensor:
    return likelihoods.new_full((len(likelihoods),), 1 / len(likelihoods))


def _average(likelihoods: Tensor, weights: Tensor) -> Tensor:
    """log p(y_i) (N,) of the average, from those of its members (members, N)."""
    return torch.logsumexp(likelihoods + weights.log()[:, None], 0)


def _fit_weights(likelihoods: Tensor, weights: Tensor) -> Tensor:
    """Expectation maximisation of the weights alone, which touches no logits: likelihoods are (members, N)."""
    total = _average(likelihoods, weights)
    for _ in range(1000):
        weights = (likelihoods + weights.log()[:, None] - total).exp().mean(1)
        weights = weights / weights.sum()
        before, total = total, _average(likelihoods, weights)
        if float((total - before).mean()) < _TOLERANCE:
            break
    return weights


def _fit_inverse(logits: Tensor, targets: Tensor, counts: Tensor, start: float) -> tuple[float, Tensor]:
    """The b = 1 / T that maximises sum_i counts_i log p(y_i), which is concave in b, and log p(y_i) (N,) there."""
    low, high, b = 0.0, math.inf, start
    for _ in range(100):
        log_p, slopes, curvatures = _moments(logits, targets, b)
        value, slope, curvature = (float(counts @ t) for t in (log_p, slopes, curvatures))
        low, high = (b, high) if slope > 0 else (low, b)
        # What a step can still gain: about slope² / 2 curvature, and no more than slope times the way to a known end.
        room = slope * ((high if slope > 0 else low) - b)
        gain = min(slope * slope / (2 * curvature) if curvature > 0 else math.inf, room)
        # A member that is always right gains as long as b grows, but N targets cannot tell less than 1 / N nats.
        if slope == 0 or gain < _TOLERANCE * len(targets) or (high == math.inf and value > -1):
            break
        newton = b + slope / curvature if curvature > 0 else math.inf * slope
        b = min(max(newton, b / 8), b * 8)  # far from the best b all predictions are sure, and the curvature is 0
        if not low < b < high:
            b = (low + high) / 2
    return b, log_p


def _moments(logits: Tensor, targets: Tensor, b: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p(y_i), and its first and negated second derivative by b, for p = softmax(b logits): (N,) each."""
    parts = []
    rows = max(1, (1 << 22) // logits.shape[1])  # a float64 copy of all would be several times the logits
    for some, classes in zip(logits.split(rows), targets.split(rows), strict=True):
        z = some.double()
        z = z - z.amax(1, keepdim=True)
        log_p = torch.log_softmax(b * z, 1)
        p, at = log_p.exp(), classes[:, None].long()
        mean = (p * z).sum(1, keepdim=True)
        variance = (p * (z - mean) ** 2).sum(1)
        parts.append((log_p.gather(1, at)[:, 0], (z.gather(1, at) - mean)[:, 0], variance))
    log_p, slope, curvature = (torch.cat(part) for part in zip(*parts, strict=True))
    return log_p, slope, curvature
