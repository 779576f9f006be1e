"""Ensembles: averages, training together, calibration, predictions within limits, fewer members, state."""

import copy
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import WIDTHS, Bank, Net, Table, ensemble, held_out, images, tables
from torch import Tensor, nn

from spin_kernels.calibration import fit_temperature
from spin_kernels.ensemble import Ensemble, anytime_curve, negative_log_likelihood

pytestmark = pytest.mark.usefixtures("one_thread")


def naive_average(networks: list[nn.Module], x: Tensor, weights: list[float], temperatures: list[float]) -> Tensor:
    parts = zip(networks, weights, temperatures, strict=True)
    total: Any = sum(w * torch.softmax(network(x).double() / t, 1) for network, w, t in parts)
    return total.log()


# --- averages


def test_the_average_is_that_of_probabilities() -> None:
    for order in ([0, 1, 2], [2, 0, 1]):
        e, x = ensemble(order=order), images()
        nets = [e.networks[m] for m in order]
        for k in (1, 2, 3):
            expected = naive_average(nets[:k], x, [1 / k] * k, [1.0] * k)
            torch.testing.assert_close(e(x, k).double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(e(x), e(x, 3), rtol=0, atol=0)
        expected = naive_average([e.networks[0], e.networks[2]], x, [0.5] * 2, [1.0] * 2)
        torch.testing.assert_close(e(x, [2, 0]).double(), expected, rtol=1e-5, atol=1e-6)
        F.nll_loss(e(x), torch.randint(5, (6,))).backward()
        assert all(p.grad.any() for p in e.parameters())


def test_the_average_has_weights_and_temperatures_of_its_row() -> None:
    e, x = ensemble(order=[1, 2, 0]), images()
    e.weights.copy_(torch.rand(3, 3).tril())
    e.temperatures.copy_(torch.rand(3, 3) + 0.5)
    e.alone.copy_(torch.rand(3) + 0.5)
    for members, places in ((1, [0]), (2, [0, 1]), ([2, 0], [1, 2]), ([2], [1]), (None, [0, 1, 2])):
        weights = e.weights[places[-1], places]
        first = places == list(range(len(places)))
        temperatures = (e.temperatures[places[-1], places] if first else e.alone[places]).tolist()
        nets = [e.networks[e.order[place]] for place in places]
        expected = naive_average(nets, x, (weights / weights.sum()).tolist(), temperatures)
        torch.testing.assert_close(e(x, members).double(), expected, rtol=1e-5, atol=1e-6)
    e.weights[2, :2] = 0
    e.alone[2] = e.temperatures[2, 2]
    torch.testing.assert_close(e(x, [0]), e(x), rtol=1e-5, atol=1e-6)
    e.weights[2] = torch.tensor([0.0, 0.0, 1.0])
    e.weights[1] = torch.tensor([1.0, 0.0, 0.0])
    assert torch.isfinite(e(x, [2])).all()  # all that is left has weight 0


def test_far_logits_do_not_underflow() -> None:
    e = Ensemble([Table(torch.tensor([[0.0, -500.0]])), Table(torch.tensor([[0.0, -400.0]]))])
    expected = torch.tensor([[0.0, -400 - math.log(2)]])
    torch.testing.assert_close(e(torch.tensor([0])), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    e, x = ensemble(), images()
    expected = e(x)
    e.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert e.weights.dtype == e.temperatures.dtype == wide
    assert e(x.to(dtype)).dtype == wide
    torch.testing.assert_close(e(x.to(dtype)).float(), expected, atol=0.05, rtol=0)


def test_torch_compile_takes_the_whole_graph() -> None:
    e, x = ensemble(order=[2, 0, 1]).calibrate(held_out()), images()
    compiled = torch.compile(e, fullgraph=True, backend="eager")
    for members in (None, 1, 2, [1, 2]):
        torch.testing.assert_close(compiled(x, members), e(x, members))


# --- training


def gradients(e: Ensemble) -> list[Tensor]:
    found = [p.grad.clone() for p in e.parameters() if p.grad is not None]
    assert len(found) == len(list(e.parameters()))
    e.zero_grad()
    return found


def test_losses_are_the_members_own_and_reach_the_bank() -> None:
    e = Ensemble(Bank())
    x, targets = images(), torch.randint(5, (6,))
    values = []
    for loss in e.losses(x, targets):
        loss.backward()
        values.append(loss.item())
    one_by_one = gradients(e)
    sum(e.losses(x, targets)).backward()
    bank = e.networks.bank
    together = bank.templates.grad.clone()
    for a, b in zip(one_by_one, gradients(e), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    parts = []
    for member in range(3):
        loss = F.cross_entropy(e.networks[member](x), targets)
        assert loss.item() == pytest.approx(values[member], rel=1e-5)
        loss.backward()
        parts.append(bank.templates.grad.clone())
        assert parts[-1].any()
        e.zero_grad()
    torch.testing.assert_close(sum(parts), together, rtol=1e-4, atol=1e-6)


def test_members_train_together() -> None:
    e = Ensemble(Bank())
    optimizer = torch.optim.Adam(e.parameters(), lr=0.02)
    x, targets = images(20), torch.randint(5, (20,))
    before = [loss.item() for loss in e.losses(x, targets)]
    for _ in range(60):
        optimizer.zero_grad()
        for loss in e.losses(x, targets):
            loss.backward()
        optimizer.step()
    after = [loss.item() for loss in e.losses(x, targets)]
    assert all(b < 0.8 * a for a, b in zip(before, after, strict=True))


def test_each_member_may_have_a_batch_and_a_loss_of_its_own() -> None:
    e = ensemble()
    batches, targets = [images(n) for n in (2, 3, 4)], [torch.randint(5, (n,)) for n in (2, 3, 4)]

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t, label_smoothing=0.1)

    found = list(e.losses(batches, targets, loss))
    expected = [loss(e.networks[m](batches[m]), targets[m]) for m in range(3)]
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"^x: expected a tensor for all members or a list of 3, .* a list of 2; "):
        e.losses(batches[:2], targets)
    with pytest.raises(ValueError, match=r"^targets: expected .* list of 3, one for each, got a list of 1; "):
        e.losses(batches, targets[:1])


def test_backward_in_turn_holds_one_members_activations() -> None:
    e = ensemble()
    held: weakref.WeakSet[Any] = weakref.WeakSet()

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            held.add(self)

    x, targets = images(), torch.randint(5, (6,))
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
        in_turn = []
        for loss in e.losses(x, targets):
            in_turn.append(len(held))
            loss.backward()
        assert len(held) == 0
        losses = list(e.losses(x, targets))
        assert in_turn == [len(held) // 3] * 3  # the members save equally many tensors
        assert len(losses) == 3


# --- calibration


def test_calibration_improves_every_number_of_members() -> None:
    networks, targets = tables()
    e, numbers = Ensemble(networks, order=[1, 0, 2]).eval(), torch.arange(600)
    batches = [(numbers[i : i + 250], targets[i : i + 250]) for i in (0, 250)]
    seen, unseen = slice(0, 500), slice(500, 600)

    def nll(part: slice) -> list[float]:
        return [negative_log_likelihood(e(numbers[part], k), targets[part]) for k in (1, 2, 3)]

    before, new_before = nll(seen), nll(unseen)
    assert e.calibrate(batches) is e
    assert all(b < a - 0.005 for a, b in zip(before, nll(seen), strict=True))
    assert nll(unseen)[0] < new_before[0]
    assert torch.equal(e.weights, e.weights.tril())
    torch.testing.assert_close(e.weights.sum(1), torch.ones(3))
    for k in (1, 2, 3):  # no common factor of the temperatures, and no other weights, would be better
        best = nll(seen)[k - 1]
        for other in [torch.rand(3) for _ in range(20)]:
            row, t = e.weights[k - 1].clone(), e.temperatures[k - 1].clone()
            e.weights[k - 1, :k] = (row + 0.2 * other)[:k]
            e.temperatures[k - 1] = t * (0.8 + 0.4 * float(torch.rand(())))
            assert nll(seen)[k - 1] > best - 3e-4
            e.weights[k - 1], e.temperatures[k - 1] = row, t


def test_calibration_is_never_worse_than_the_plain_average() -> None:
    for _ in range(8):
        count = int(torch.randint(2, 50, ()))
        networks, targets = tables(count, tuple((10 ** (3 * torch.rand(3) - 1)).tolist()))
        e, numbers = Ensemble(networks).eval(), torch.arange(count)
        before = [negative_log_likelihood(e(numbers, k), targets) for k in (1, 2, 3)]
        e.calibrate([(numbers, targets)])
        after = [negative_log_likelihood(e(numbers, k), targets) for k in (1, 2, 3)]
        assert all(b <= a + 1e-5 for a, b in zip(before, after, strict=True))


def test_members_are_put_in_the_order_of_gain_for_flops() -> None:
    (a, b, _), targets = tables()
    weak = Table(a.logits.detach() + 4 * torch.randn(600, 4))

    class Costly(nn.Module):
        def __init__(self, table: nn.Module) -> None:
            super().__init__()
            self.table = table

        def forward(self, numbers: Tensor) -> Tensor:
            z = self.table(numbers)
            return z @ torch.eye(4) @ torch.eye(4) @ torch.eye(4)

    class Cheap(Costly):
        def forward(self, numbers: Tensor) -> Tensor:
            return self.table(numbers) @ torch.eye(4)

    batches = [(torch.arange(600), targets)]
    assert Ensemble([Cheap(weak), Cheap(a)]).eval().calibrate(batches, reorder=True).order == (1, 0)
    assert Ensemble([Costly(a), Cheap(a)]).eval().calibrate(batches, reorder=True).order == (1, 0)
    e = Ensemble([Costly(a), Cheap(a), Cheap(b)]).eval()
    e.calibrate(batches, reorder=True)
    assert sorted(e.order) == [0, 1, 2]
    assert e.order[2] == 0  # what a dearer copy adds is nothing
    e.calibrate(batches)
    assert e.order[2] == 0  # stays until it is chosen again


# --- fewer members


class Selected(nn.ModuleList):
    def select(self, members: list[int]) -> "Selected":
        return Selected(self[member] for member in members)


@pytest.mark.parametrize("kind", [list, nn.ModuleList, Selected])
def test_fewer_members_share_modules_and_calibration(kind: type) -> None:
    e = Ensemble(kind([Net(width) for width in (*WIDTHS, 5)]), order=[3, 1, 0, 2]).eval().calibrate(held_out())
    x = images()
    e.predict(x, seconds=9)
    kept = e.keep([2, 3, 1])
    assert type(kept.networks) is (Selected if kind is Selected else nn.ModuleList)
    assert [kept.networks[n] for n in range(3)] == [e.networks[m] for m in (2, 3, 1)]
    assert kept.order == (1, 2, 0)
    for k, members in ((1, [3]), (2, [3, 1]), (3, [3, 1, 2])):
        torch.testing.assert_close(kept(x, k), e(x, members), rtol=1e-6, atol=1e-6)
    assert kept.flops(x) == [e.flops(x)[m] for m in (2, 3, 1)]
    assert kept.predict(x).members == (1, 2, 0)
    torch.testing.assert_close(e.drop(0)(x), e(x, [1, 2, 3]), rtol=0, atol=0)
    torch.testing.assert_close(e.drop(3, 0)(x), e(x, [1, 2]), rtol=0, atol=0)
    torch.testing.assert_close(e.drop(3).drop(0)(x, 1), e(x, [1]), rtol=0, atol=0)
    assert e.order == (3, 1, 0, 2)
    assert not kept.training


def test_a_member_without_weight_is_calibrated_when_it_is_left_alone() -> None:
    """Beside a better one it has no weight, and no temperature that would serve it."""
    targets = torch.randint(4, (800,))
    good = 4 * F.one_hot(targets, 4) + torch.randn(800, 4)
    worse = 8 * (F.one_hot(targets, 4) + 2 * torch.randn(800, 4))  # far too confident

    batches = [(torch.arange(800), targets)]
    e = Ensemble([Table(good), Table(worse), Table(worse.roll(1, 0))]).eval().calibrate(batches)
    for member, logits in ((1, worse), (2, worse.roll(1, 0))):
        best = F.cross_entropy(logits / fit_temperature(logits, targets), targets)
        for log_p in (e.drop(*{0, 1, 2} - {member})(torch.arange(800)), e(torch.arange(800), [member])):
            torch.testing.assert_close(F.nll_loss(log_p, targets), best, rtol=1e-4, atol=1e-4)
            assert F.nll_loss(log_p, targets) < F.cross_entropy(logits, targets) / 2
    of_both = F.nll_loss(e.drop(0)(torch.arange(800)), targets)
    assert of_both <= 1.05 * F.cross_entropy(worse / fit_temperature(worse, targets), targets)


def test_a_bank_beside_the_networks_is_no_member() -> None:
    networks = Bank()
    e, x = Ensemble(networks).eval(), images()
    assert e.networks is networks
    assert e.order == (0, 1, 2)
    torch.testing.assert_close(e.predict(x).log_probabilities, e(x).detach())
    kept = e.drop(1)
    torch.testing.assert_close(kept(x), e(x, [0, 2]))
    for loss in kept.losses(x, torch.randint(5, (6,))):
        loss.backward()
    assert networks.bank.templates.grad is not None


# --- state


def test_state_dicts_hold_calibration_and_order() -> None:
    e, x = ensemble().calibrate(held_out(), reorder=True), images()
    file = io.BytesIO()
    torch.save(e.state_dict(), file)
    file.seek(0)
    other = ensemble(order=[e.order[2], e.order[1], e.order[0]])
    other.load_state_dict(torch.load(file))
    assert other.order == e.order
    for k in (1, 2, 3):
        torch.testing.assert_close(other(x, k), e(x, k), rtol=0, atol=0)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies(through: Callable[[Ensemble], Ensemble]) -> None:
    e, x = Ensemble(Bank(), order=[2, 1, 0]).eval().calibrate(held_out()), images()
    e.predict(x, seconds=1)
    other = through(e)
    assert other.order == e.order
    torch.testing.assert_close(other(x), e(x), rtol=0, atol=0)
    with torch.no_grad():
        other.networks.bank.templates.zero_()
    assert not torch.allclose(other.networks[0](x), e.networks[0](x))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    e, x = Ensemble(Bank()).eval().cuda().calibrate(held_out(), reorder=True), images().cuda()
    assert min(e.seconds(x)) > 0
    found = e.predict(x, seconds=10)
    assert found.log_probabilities.is_cuda
    assert found.members == e.order
    assert len(anytime_curve(e, held_out())) == 3
    torch.testing.assert_close(e.cpu()(x.cpu()), found.log_probabilities.cpu(), rtol=1e-3, atol=1e-3)


# --- what a user can get wrong

E, X = ensemble(), images()
NAN = float("nan")


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return (x,)


def other_classes() -> Ensemble:
    return Ensemble([Net(4), Net(4, classes=6)]).eval()


def not_finite() -> Ensemble:
    e = ensemble()
    nn.init.constant_(e.networks[1][7].bias, NAN)
    return e


def labelled(*targets: int) -> list[tuple[Tensor, Tensor]]:
    return [(images(len(targets)), torch.tensor(targets))]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Ensemble([]), r"^networks: expected one or more classifiers, got none; "),
        (lambda: ensemble(order=[0, 1]), r"^order: expected each number from 0 to 2 once, got \[0, 1\]; "),
        (lambda: ensemble(order=[0, 1, 1]), r"^order: .* got \[0, 1, 1\]; "),
        (lambda: ensemble(order=[0, 1, 2.0]), r"^order: .* got \[0, 1, 2.0\]; "),
        (lambda: E(X, 0), r"^members: expected from 1 to 3 members, got 0; "),
        (lambda: E(X, 4), r"^members: expected from 1 to 3 members, got 4; "),
        (lambda: E(X, True), r"^members: expected from 1 to 3 members, got True; "),
        (lambda: E(X, [0, 3]), r"^members: expected different numbers from 0 to 2, one or more, got \[0, 3\]; "),
        (lambda: E(X, [0, -1]), r"^members: .* got \[0, -1\]; "),
        (lambda: E(X, [1, 1]), r"^members: .* got \[1, 1\]; "),
        (lambda: E(X, []), r"^members: .* got \[\]; "),
        (lambda: E.keep([5]), r"^members: .* got \[5\]; "),
        (lambda: E.drop(5), r"^members: .* got \[5\]; "),
        (lambda: E.drop(0, 1, 2), r"^members: .* one or more, got \[\]; "),
        (lambda: other_classes()(X), r"^networks: .* logits \(6, 5\) as of another, got \(6, 6\) from member 1; "),
        (lambda: other_classes().calibrate(held_out()), r"^networks: .* \(40, 5\) .* got \(40, 6\) from member 1; "),
        (lambda: Ensemble([nn.ReLU()])(X), r"^networks: .* \(B, classes\) for a batch of 6, got \(6, 3, 8, 8\) from "),
        (lambda: Ensemble([Net(4), Wrong()])(X), r"^networks: expected logits \(6, 5\) .* got tuple from member 1; "),
        (lambda: E.predict(X, seconds=0), r"^seconds: expected a positive limit for the batch, got 0; "),
        (lambda: E.predict(X, seconds=-1.5), r"^seconds: .* got -1.5; "),
        (lambda: E.predict(X, flops=NAN), r"^flops: .* got nan; "),
        (lambda: E.predict(X[:0]), r"^x: expected a batch of one or more, got shape \(0, 3, 8, 8\); "),
        (lambda: E.seconds(X, 0), r"^repeats: expected a positive integer, got 0; "),
        (lambda: E.calibrate([]), r"^batches: expected one or more, got none; "),
        (lambda: anytime_curve(E, []), r"^batches: expected one or more, got none; "),
        (lambda: E.calibrate(labelled(0, 5)), r"^targets: expected classes from 0 to 4, got 5; "),
        (lambda: E.calibrate(labelled(0, -1)), r"^targets: .* got -1; "),
        (lambda: E.calibrate([(X, torch.rand(6, 5))]), r"^targets: expected 6 integers, .* got torch.float32 of shape"),
        (lambda: not_finite().calibrate(held_out()), r"^networks: expected finite logits, got others from member 1; "),
        (lambda: anytime_curve(not_finite(), held_out()), r"^networks: .* from member 1; "),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_a_network_alone_is_no_list() -> None:
    with pytest.raises(TypeError, match=r"^networks: expected a list of classifiers, got Net; "):
        Ensemble(Net(4))


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.predict(X), lambda e: e.calibrate(held_out()), lambda e: e.flops(X), lambda e: e.seconds(X),
        lambda e: anytime_curve(e, held_out()),
    ],
)  # fmt: skip
def test_members_in_training_mode_are_refused(call: Callable[[Ensemble], Any]) -> None:
    e = ensemble()
    e.networks[2][1].train()
    with pytest.raises(
        RuntimeError, match=r"^networks: expected members in eval mode, got training mode in member 2; "
    ):
        call(e)
