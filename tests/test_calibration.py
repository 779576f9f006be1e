"""Metrics against naive loops; temperatures and weights against brute force."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_kernels.calibration import (
    accuracy,
    best_order,
    expected_calibration_error,
    fit_average,
    fit_temperature,
    negative_log_likelihood,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def members(n: int, classes: int, scales: list[float], noise: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """Logits of classifiers that see the true ones through noise and are wrong about their confidence by a factor."""
    true = 2 * torch.randn(n, classes)
    targets = torch.distributions.Categorical(logits=true).sample()
    return [scale * (true + noise * torch.randn(n, classes)) for scale in scales], targets


def average_nll(logits: list[Tensor], targets: Tensor, weights: list[float], temperatures: list[float]) -> float:
    """From the definition, with probabilities."""
    parts = zip(weights, logits, temperatures, strict=True)
    p: Any = sum(w * torch.softmax(z.double() / t, 1) for w, z, t in parts)
    return -float(p[range(len(targets)), targets].log().mean())


# --- metrics


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_metrics_are_those_of_naive_loops(bins: int) -> None:
    log_p = torch.log_softmax(3 * torch.randn(301, 7), 1)
    targets = torch.where(torch.rand(301) < 0.5, log_p.argmax(1), torch.randint(7, (301,)))
    right = [
        int(max(range(7), key=lambda c: row[c])) == t for row, t in zip(log_p.tolist(), targets.tolist(), strict=True)
    ]
    assert accuracy(log_p, targets) == pytest.approx(sum(right) / 301, abs=1e-12)
    expected = -sum(log_p[i, targets[i]].item() for i in range(301)) / 301
    assert negative_log_likelihood(log_p, targets) == pytest.approx(expected, rel=1e-9)
    confidence = [math.exp(max(row)) for row in log_p.tolist()]
    assert expected_calibration_error(log_p, targets, bins) == pytest.approx(
        naive_ece(confidence, right, bins), rel=1e-9
    )


def naive_ece(confidence: list[float], right: list[bool], bins: int) -> float:
    total = 0.0
    for i in range(bins):
        inside = [n for n, c in enumerate(confidence) if i / bins < c <= (i + 1) / bins]
        if inside:
            hits, sure = sum(right[n] for n in inside), sum(confidence[n] for n in inside)
            total += len(inside) / len(right) * abs(hits / len(inside) - sure / len(inside))
    return total


def test_a_bin_of_the_calibration_error_has_its_upper_edge() -> None:
    confidence = torch.tensor([0.5, 0.75, 0.75, 1.0, 1.0], dtype=torch.float64)
    log_p = torch.stack((confidence, 1 - confidence), 1).log()
    targets = torch.tensor([0, 0, 1, 0, 1])
    assert torch.equal(log_p.amax(1).exp(), confidence)
    right = [True, True, False, True, False]
    for bins, expected in ((1, 0.2), (2, 0.4), (4, 0.4)):  # with 0.5 in the upper bin of two it were 0.2, too
        assert expected_calibration_error(log_p, targets, bins) == pytest.approx(expected)
        assert naive_ece(confidence.tolist(), right, bins) == pytest.approx(expected)


# --- temperatures


@pytest.mark.parametrize("scale", [1e-3, 0.2, 1.0, 6.0, 1e4])
def test_a_temperature_is_the_best_of_a_grid(scale: float) -> None:
    (z,), targets = members(500, 5, [scale])
    best = min(average_nll([z], targets, [1.0], [scale * 1.02**k]) for k in range(-100, 150))
    found = fit_temperature(z, targets)
    assert average_nll([z], targets, [1.0], [found]) <= best + 1e-5
    assert found / scale == pytest.approx(fit_temperature(z / scale, targets), rel=0.02)


def test_a_temperature_finds_how_confident_members_were_made() -> None:
    (z,), targets = members(20_000, 4, [3.0], noise=0)
    assert fit_temperature(z, targets) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["right", "wrong", "random", "equal", "one"])
def test_no_logits_make_a_temperature_diverge(kind: str, scale: float) -> None:
    z = torch.randn(40, 6)
    targets = {"right": z.argmax(1), "wrong": z.argmin(1)}.get(kind, torch.randint(6, (40,)))
    z = scale * (torch.zeros_like(z) if kind == "equal" else z)
    if kind == "one":
        z, targets = z[:1], targets[:1]
    t = fit_temperature(z, targets)
    assert 0 < t < math.inf
    after = average_nll([z], targets, [1.0], [t])
    before = -float(torch.log_softmax(z.double(), 1)[range(len(z)), targets].mean())
    assert after <= before + 1e-9
    assert after <= math.log(6) + 1e-4


def test_a_member_that_is_always_right_is_not_made_ever_more_confident() -> None:
    targets = torch.randint(4, (50,))
    z = 2 * torch.nn.functional.one_hot(targets, 4).float()
    t = fit_temperature(z, targets)
    assert 0.1 < t < 1
    assert average_nll([z], targets, [1.0], [t]) < 1 / 50
    assert fit_temperature(10 * z, targets) == 1
    # Those of random margins, the smallest of which could ask for any confidence.
    z = 5 * torch.randn(50, 4)
    t = fit_temperature(z, z.argmax(1))
    assert 50 * average_nll([z], z.argmax(1), [1.0], [t]) > 0.01


# --- averages


def test_an_average_is_the_best_of_a_grid() -> None:
    logits, targets = members(300, 3, [5.0, 0.4])
    own = [fit_temperature(z, targets) for z in logits]
    weights, temperatures = fit_average(logits, targets, own)
    found = average_nll(logits, targets, weights, temperatures)
    factors = torch.linspace(0.5, 1.6, 23, dtype=torch.float64)
    p = [
        torch.stack([torch.softmax(z.double() / (t * f), 1)[range(300), targets] for f in factors])
        for z, t in zip(logits, own, strict=True)
    ]
    averages = [w * p[0][:, None] + (1 - w) * p[1] for w in torch.linspace(0, 1, 41).tolist()]  # (factor, factor, N)
    grid = min(float(-average.log().mean(-1).max()) for average in averages)
    assert found <= grid + 1e-3
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_fitted_average_is_no_worse_than_the_plain_one(count: int) -> None:
    for _ in range(15):
        n, classes = int(torch.randint(1, 60, ())), int(torch.randint(2, 6, ()))
        scales = (10 ** (3 * torch.rand(count) - 1)).tolist()
        logits, targets = members(n, classes, scales, noise=float(2 * torch.rand(())))
        given = (10 ** (2 * torch.rand(count) - 1)).tolist()
        weights, temperatures = fit_average(logits, targets, given)
        plain = [1 / count] * count
        found = average_nll(logits, targets, weights, temperatures)
        assert found <= average_nll(logits, targets, plain, [1.0] * count) + 1e-9
        assert found <= average_nll(logits, targets, plain, given) + 1e-9


def test_equal_members_keep_equal_weights_and_get_other_temperatures() -> None:
    (one, other), targets = members(300, 4, [3.0, 3.0])
    logits, targets = [torch.cat((one, other)), torch.cat((other, one))], targets.repeat(2)
    own = [fit_temperature(z, targets) for z in logits]
    weights, temperatures = fit_average(logits, targets, own)
    assert weights == pytest.approx([0.5, 0.5], abs=1e-3)
    assert all(t < 0.97 * alone for t, alone in zip(temperatures, own, strict=True))


def test_members_calibrated_one_by_one_would_make_some_averages_worse() -> None:
    """Why temperatures are fitted for each average: these members are too confident, their plain average is not."""
    logits, targets = members(2000, 4, [1.0] * 6, noise=2.0)
    own, plain = [fit_temperature(z, targets) for z in logits], [1 / 6] * 6
    assert min(own) > 1.2
    uncalibrated = average_nll(logits, targets, plain, [1.0] * 6)
    assert average_nll(logits, targets, plain, own) > uncalibrated + 0.01
    assert average_nll(logits, targets, *fit_average(logits, targets, own)) <= uncalibrated


def test_a_useless_member_gets_no_weight() -> None:
    (good,), targets = members(400, 4, [1.0], noise=0.1)
    weights, _ = fit_average([good, 5 * torch.randn(400, 4)], targets, [1.0, 1.0])
    assert weights[1] < 0.05


def test_the_order_is_by_gain_for_cost() -> None:
    (good, weak), targets = members(1000, 5, [3.0, 0.3])
    weak = weak + 0.6 * torch.randn_like(weak)
    assert best_order([good, weak], targets, [1.0, 1.0]) == [0, 1]
    assert best_order([good, weak], targets, [100.0, 1.0]) == [1, 0]
    assert best_order([good, good, good], targets, [3.0, 1.0, 2.0]) == [1, 2, 0]
    # What a copy of a member adds is nothing, so another member comes first although it is worse.
    assert best_order([good, good, weak], targets, [1.0, 1.0, 1.0]) == [0, 2, 1]


def test_the_order_is_that_of_the_definition() -> None:
    logits, targets = members(300, 4, [1.0, 1.0, 1.0, 1.0])
    logits = [z + s * torch.randn_like(z) for z, s in zip(logits, (0.0, 1.0, 2.0, 0.5), strict=True)]
    costs = [4.0, 1.0, 2.0, 3.0]
    own = [fit_temperature(z, targets) for z in logits]
    p = [torch.softmax(z.double() / t, 1)[range(300), targets] for z, t in zip(logits, own, strict=True)]

    def best_nll(chosen: list[int]) -> float:
        """With the best weights of a grid."""
        value, weights = math.inf, torch.rand(4000, len(chosen), dtype=torch.float64) ** 2
        for rows in (weights / weights.sum(1, keepdim=True)).split(1000):
            value = min(value, float(-(rows @ torch.stack([p[m] for m in chosen])).log().mean(1).max()))
        return value

    order = best_order(logits, targets, costs)
    reached = math.log(4)
    for k in range(3):
        gains = {m: (reached - best_nll([*order[:k], m])) / costs[m] for m in range(4) if m not in order[:k]}
        assert gains[order[k]] >= max(gains.values()) - 0.002
        reached = best_nll(order[: k + 1])


# --- what a user can get wrong

LOG_P, RIGHT = torch.log_softmax(torch.ones(3, 4), 1), torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: accuracy(LOG_P, RIGHT[:2]),
            r"^targets: expected 3 integers, .* \(3, 4\), got torch.int64 .* \(2,\); ",
        ),
        (lambda: accuracy(LOG_P, LOG_P), r"^targets: .* got torch.float32 of shape \(3, 4\); give classes, not their "),
        (
            lambda: accuracy(LOG_P[:0], RIGHT[:0]),
            r"^targets: expected 1 integers, .* got torch.int64 of shape \(0,\); ",
        ),
        (lambda: negative_log_likelihood(LOG_P, RIGHT + 1), r"^targets: expected classes from 0 to 3, got 4; "),
        (lambda: expected_calibration_error(LOG_P, RIGHT - 1), r"^targets: expected classes from 0 to 3, got -1; "),
        (lambda: expected_calibration_error(LOG_P, RIGHT, 0), r"^bins: expected a positive integer, got 0; "),
        (lambda: fit_temperature(LOG_P, RIGHT + 1), r"^targets: expected classes from 0 to 3, got 4; "),
        (lambda: fit_average([LOG_P], RIGHT - 1, [1.0]), r"^targets: expected classes from 0 to 3, got -1; "),
        (lambda: best_order([LOG_P], RIGHT[:1], [1.0]), r"^targets: expected 3 integers, "),
    ],
)
def test_errors_are_one_sentence(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
