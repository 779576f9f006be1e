"""Predictions within limits of FLOPs and of time, what they count, and the curve of every number of members."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_networks import WIDTHS, Bank, Net, ensemble, held_out, images
from torch import Tensor, nn

import spin_kernels as spin
from spin_kernels.anytime import Clock
from spin_kernels.ensemble import Ensemble, accuracy, anytime_curve, expected_calibration_error, negative_log_likelihood
from spin_kernels.flops import count_flops
from spin_kernels.summary import summarise

pytestmark = pytest.mark.usefixtures("one_thread")


def fake_clock(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> tuple[Ensemble, list[float]]:
    """An ensemble whose members take these seconds of a time that only they let pass; they may be changed."""
    taken, clock = list(seconds), [100.0]

    class Slow(nn.Module):
        def __init__(self, member: int) -> None:
            super().__init__()
            self.member = member

        def forward(self, x: Tensor) -> Tensor:
            clock[0] += taken[self.member]
            return x

    e = Ensemble([Slow(member) for member in range(len(taken))]).eval()
    e.flops(torch.ones(4, 3))
    monkeypatch.setattr("spin_kernels.anytime.time.perf_counter", lambda: clock[0])
    return e, taken


def test_flops_are_those_of_the_layers() -> None:
    e, x = ensemble(), images()
    expected = [2 * (w * 3 * 9 * 64 + w * w * 9 * 16 + w * 5) for w in WIDTHS]
    assert e.flops(x) == expected
    assert e.flops(images(1)) == expected
    assert e.flops(torch.randn(2, 3, 16, 16))[0] == 2 * (4 * 3 * 9 * 256 + 4 * 4 * 9 * 64 + 4 * 5)
    assert Ensemble(Bank()).eval().flops(x) == expected  # what the bank does is no matter of images


@pytest.mark.parametrize("freeze", [False, True])
def test_flops_within_operators_count(freeze: bool) -> None:
    model = spin.models.convmixer(16, 3, kernel_size=5, patch_size=4, num_classes=7, sharing=spin.Sharing(3, 3)).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x).detach()
    if freeze:
        model.freeze()
    assert count_flops(model, x) == 2 * summarise(model, (32, 32)).flops
    assert model.is_frozen == freeze
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_limit_of_flops_is_kept() -> None:
    e, x = ensemble(order=[2, 0, 1]), images(4)
    a, b, c = (4 * e.flops(x)[m] for m in (2, 0, 1))
    for limit, count in (
        (1, 1),
        (a, 1),
        (a + b - 1, 1),
        (a + b, 2),
        (a + b + c - 0.5, 2),
        (a + b + c, 3),
        (math.inf, 3),
    ):
        found = e.predict(x, flops=limit)
        assert found.members == (2, 0, 1)[:count]
        assert found.flops == (a, a + b, a + b + c)[count - 1]
        torch.testing.assert_close(found.log_probabilities, e(x, count).detach(), rtol=0, atol=0)
        assert not found.log_probabilities.requires_grad
    assert e.predict(x).members == (2, 0, 1)


def test_a_limit_of_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    e, _ = fake_clock(monkeypatch, 0.1, 0.3, 0.5)
    x = torch.ones(4, 3)
    assert e.seconds(x) == pytest.approx([0.1, 0.3, 0.5])
    for limit, count in ((0.01, 1), (0.39, 1), (0.41, 2), (0.89, 2), (0.91, 3)):
        found = e.predict(x, seconds=limit)
        assert found.members == (0, 1, 2)[:count]
        assert found.seconds == pytest.approx((0.1, 0.4, 0.9)[count - 1])
    assert e.predict(x, seconds=10, flops=1).members == (0, 1, 2)  # of members that have none


def test_times_are_learned_from_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    e, taken = fake_clock(monkeypatch, 0.1, 2.0)
    x = torch.ones(4, 3)
    assert e.predict(x, seconds=0.05).members == (0,)  # no time is left
    assert e.predict(x, seconds=0.5).members == (0, 1)  # its time is not known
    assert e.predict(x, seconds=0.5).members == (0,)
    assert e.predict(torch.ones(5, 3), seconds=0.5).members == (0, 1)  # another shape, another clock
    assert e.predict(x.double(), seconds=0.5).members == (0, 1)
    taken[1] = 0.2  # the first call warmed up: it is tried again some time, and then known to fit
    tried = [e.predict(x, seconds=0.5).members for _ in range(30)]
    assert tried[0] == (0,)
    assert tried[-1] == (0, 1)
    assert all(members == (0, 1) for members in tried[tried.index((0, 1)) :])


def test_a_clock_smooths_and_forgets_a_slow_call() -> None:
    clock = Clock(1.0)
    clock.took(2.0)
    assert clock.estimate == pytest.approx(1.3)
    assert clock.fits(1.31)
    assert [clock.fits(1.1) for _ in range(30)].index(True) == 11  # 1.1 > 1 + 0.3 * 0.9 ** n from n = 11 on
    first = Clock()
    for seconds in (9.0, 1.0):  # the first call warms up
        first.took(seconds)
    assert first.estimate == 1
    slow = Clock(2.0)
    assert not any(slow.fits(1.9) for _ in range(1000))  # it never took less


def test_members_that_sleep_are_not_started_without_the_time() -> None:
    class Sleeper(Net):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.15)
            return super().forward(x)

    e, x = Ensemble([Net(4), Sleeper(4)]).eval(), images()
    assert e.seconds(x, repeats=1)[1] >= 0.15
    start = time.perf_counter()
    found = e.predict(x, seconds=0.1)
    assert found.members == (0,)
    assert found.seconds <= time.perf_counter() - start
    assert e.predict(x, seconds=20).members == (0, 1)


def test_the_curve_is_that_of_every_number_of_members() -> None:
    e = ensemble(order=[1, 2, 0]).calibrate(held_out())
    batches = [*held_out(), (images(7), torch.randint(5, (7,)))]
    flops, calls = e.flops(batches[0][0]), [0, 0, 0]

    def count(member: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[member] += 1

        return hook

    for member, network in enumerate(e.networks):
        network.register_forward_hook(count(member))
    points = anytime_curve(e, iter(batches))
    assert calls == [4, 4, 4]
    x, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    for k, point in enumerate(points, 1):
        log_p = e(x, k).detach()
        assert point.members == (1, 2, 0)[:k]
        assert point.flops == sum(flops[m] for m in point.members)
        assert point.accuracy == pytest.approx(accuracy(log_p, targets), abs=1e-9)
        assert point.nll == pytest.approx(negative_log_likelihood(log_p, targets), rel=1e-5)
        assert point.ece == pytest.approx(expected_calibration_error(log_p, targets), abs=1e-4)


def test_the_curve_has_the_median_of_seconds_for_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    e, taken = fake_clock(monkeypatch, 0.1, 0.3)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for slow, count in ((9.0, 4), (1.0, 2), (2.0, 4)):
            taken[:] = [0.1 * slow, 0.3 * slow]
            yield torch.ones(count, 3), torch.zeros(count, dtype=torch.int64)

    assert [point.seconds for point in anytime_curve(e, batches())] == pytest.approx([0.05, 0.2])
