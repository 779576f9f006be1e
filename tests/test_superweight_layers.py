"""Layers over a bank of templates: what they compute, and that they are modules like any other."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spin_kernels import Sharing, fusion
from spin_kernels.nn import SharedMixer, Slab, SuperConv2d, SuperLinear, SuperWeightBank
from spin_kernels.nn.bank import tile

BANKS: dict[str, dict[str, Any]] = {
    "plain": {}, "rotations": {"rotations": 4}, "embedding": {"embedding": 6}, "both": {"rotations": 2, "embedding": 5},
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bank = bank = SuperWeightBank({"conv": 3 * 12 * 10 * 9 + 7, "fc": 2 * 40}, **options)
        self.conv1 = SuperConv2d(10, 12, 3, padding=1, bank=bank, cluster="conv")
        self.conv2 = SuperConv2d(12, 7, 3, stride=2, padding=1, bias=False, bank=bank, cluster="conv", block=(5, 8))
        self.conv3 = SuperConv2d(7, 8, 1, bank=bank, cluster="conv", templates=2, start=5, coefficients="mine")
        self.fc = SuperLinear(8, 5, bank=bank, cluster="fc")
        bank.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return self.fc(x.mean((2, 3)))


def image(**options: Any) -> Tensor:
    return torch.randn(2, 10, 8, 8, **options)


every_bank = pytest.mark.parametrize("options", BANKS.values(), ids=BANKS)


def expected_weight(bank: SuperWeightBank, layer: int) -> Tensor:
    """From the definition, slab by slab and template by template."""
    shape, slabs = bank.layers[layer]
    weight, coefficients = bank.templates.new_zeros(shape), bank.coefficients()
    for slab in slabs:
        cluster = bank.templates[bank.place(slab.cluster)]
        size = ((slab.out - 1) * slab.row + slab.in_channels) * shape[2] * shape[3]
        count = slab.templates * (bank.rotations if shape[2] == shape[3] > 1 else 1)
        c = torch.full((count,), 1 / count, dtype=weight.dtype)
        if slab.coefficients is not None:
            start = bank.coefficients.start((slab.cluster, slab.coefficients))
            c = coefficients[start : start + count]
        total = 0
        for k in range(count):
            turn, number = divmod(k, slab.templates)
            first = slab.start + number * slab.stride
            flat = F.pad(cluster[first : first + size], (0, slab.out * slab.row * shape[2] * shape[3] - size))
            template = flat.view(slab.out, slab.row, *shape[2:])[:, : slab.in_channels]
            total = total + c[k] * template.rot90((0, -1, 1, 2)[turn], (2, 3))
        rows, columns = slice(slab.out_offset, slab.out_offset + slab.out), slab.in_offset
        weight[rows, columns : columns + slab.in_channels] = total
    return weight


@every_bank
def test_weights_and_gradients(options: dict[str, Any]) -> None:
    net = Net(**options, dtype=torch.float64)
    parameters = list(net.bank.parameters())
    for number, layer in enumerate((net.conv1, net.conv2, net.conv3, net.fc)):
        weight, expected = layer.weight, expected_weight(net.bank, number)
        torch.testing.assert_close(weight, expected.flatten(1) if layer is net.fc else expected)
        factor = torch.randn_like(weight)
        grads = torch.autograd.grad((weight * factor).sum(), parameters, allow_unused=True)
        wanted = torch.autograd.grad((expected.view_as(factor) * factor).sum(), parameters, allow_unused=True)
        for actual, right in zip(grads, wanted, strict=True):
            torch.testing.assert_close(actual, right)


@every_bank
def test_one_launch_per_forward_pass(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net(**options), image()
    calls = []
    compose = SuperWeightBank.compose
    monkeypatch.setattr(SuperWeightBank, "compose", lambda bank, layers: calls.append(layers) or compose(bank, layers))
    y = net(x)
    assert calls == [[0, 1, 2, 3]]
    assert net.bank._step is None  # nothing is kept from one pass to the next
    layers = net.fc(net.conv3(net.conv2(net.conv1(x).relu()).relu()).mean((2, 3)))
    assert len(calls) == 5
    torch.testing.assert_close(layers, y)


def test_weights_are_dropped_when_a_pass_fails() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="expected input"):
        net(torch.randn(2, 9, 8, 8))
    assert net.bank._step is None


def test_weights_of_an_interrupted_pass_are_not_used_again() -> None:
    net, x = Net(), image()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = net.fc.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(x)
    handle.remove()
    y = net(x)
    with torch.no_grad():
        net.bank.templates.mul_(2)
    assert not torch.allclose(net(x), y)


def test_weights_made_without_gradients_are_not_used_where_there_are_some() -> None:
    class Inner(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return super().forward(x)

    net = Inner()
    with torch.no_grad():
        y = net(image())
    y.square().sum().backward()
    assert net.bank.templates.grad.abs().sum() > 0


def test_other_threads_make_weights_of_their_own() -> None:
    net, x = Net(), image()
    expected, results = net(x), []

    def other(*_: Any) -> None:
        thread = threading.Thread(target=lambda: results.append(net.conv1.weight))
        thread.start()
        thread.join()
        assert results[-1] is not net.conv1.weight

    net.conv2.register_forward_pre_hook(other)
    torch.testing.assert_close(net(x), expected)
    assert len(results) == 1


@every_bank
def test_checkpointed_segments(options: dict[str, Any]) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(lambda x: self.conv2(self.conv1(x).relu()), x, use_reentrant=False)
            return self.fc(self.conv3(x.relu()).mean((2, 3)))

    net, x = Checkpointed(**options), image()
    net(x).square().sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    Net.forward(net, x).square().sum().backward()
    for p, grad in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


@every_bank
@pytest.mark.parametrize("change", ["data", "optimizer"])
def test_no_stale_weights(options: dict[str, Any], change: str) -> None:
    net, x = Net(**options), image()
    before = net(x)
    if change == "data":
        net.bank.templates.data.mul_(2)
    else:
        before.square().sum().backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert not torch.allclose(net(x), before)


COPIES: dict[str, Callable[[Net], Net]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
}


@every_bank
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_have_banks_of_their_own(options: dict[str, Any], copied: Callable[[Net], Net]) -> None:
    net, x = Net(**options), image()
    other = copied(net)
    y = net(x)
    torch.testing.assert_close(other(x), y)
    assert other.conv1.bank is other.bank is not net.bank
    with torch.no_grad():
        other.bank.templates.zero_()
    torch.testing.assert_close(net(x), y)


@every_bank
def test_state_dict_holds_everything_once(options: dict[str, Any]) -> None:
    net, other, x = Net(**options), Net(**options), image()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(x), net(x))
    values = [t.untyped_storage().data_ptr() for t in net.state_dict().values()]
    assert len(set(values)) == len(values)


@every_bank
def test_compile_export_and_functional_call(options: dict[str, Any]) -> None:
    net, x = Net(**options).eval(), image()
    y = net(x)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), y)
    doubled = {name: 2 * p for name, p in net.named_parameters()}
    changed = torch.func.functional_call(net, doubled, (x,))
    net_2 = copy.deepcopy(net)
    net_2.load_state_dict(doubled)
    torch.testing.assert_close(changed, net_2(x))
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    compiled(x).square().sum().backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for p, grad in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


@every_bank
def test_freezing_keeps_weights(options: dict[str, Any]) -> None:
    net, x = Net(**options).eval(), image()
    y = net(x)
    net.bank.freeze()
    with torch.no_grad():
        net.bank.templates.zero_()
    torch.testing.assert_close(net(x), y)
    net.train()
    assert not torch.allclose(net(x), y)
    assert not net.bank.is_frozen


def test_exported_copy_of_a_frozen_network() -> None:
    net, x = Net().eval(), image()
    net.bank.freeze()
    other = copy.deepcopy(net)
    torch.testing.assert_close(torch.export.export(other, (x,)).module()(x), net(x))
    torch.testing.assert_close(other(x), net(x))


def test_layers_that_join_later_leave_the_others_alone() -> None:
    net = Net()
    net.bank.requires_grad_(False)
    values = net.bank.coefficients.values.clone()
    SuperLinear(8, 5, bank=net.bank, cluster="fc")
    assert not any(p.requires_grad for p in net.bank.parameters())
    assert torch.equal(net.bank.coefficients.values[: len(values)], values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_keep_coefficients(dtype: torch.dtype) -> None:
    net, x = Net(rotations=2, embedding=4).to(dtype), image(dtype=dtype)
    assert net.bank.templates.dtype == dtype
    assert {p.dtype for p in net.bank.coefficients.parameters()} == {torch.float32}
    y = net(x)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert all(p.grad is not None for p in net.parameters())


@every_bank
def test_autocast_leaves_weights_alone(options: dict[str, Any]) -> None:
    net, x = Net(**options), image()
    with torch.autocast("cpu", torch.bfloat16):
        assert net.conv1.weight.dtype == torch.float32
        assert net(x).dtype == torch.bfloat16


def test_weights_start_as_kaiming_normal() -> None:
    bank = SuperWeightBank({"c": 8 * 64 * 64 * 9})
    layers = [SuperConv2d(64, 64, 3, bank=bank, cluster="c"), SuperConv2d(16, 64, 3, bank=bank, cluster="c")]
    layers.append(SuperConv2d(64, 64, 3, bank=bank, cluster="c", block=(32, 32), templates=4))
    for layer in layers:
        weight = layer.weight
        assert weight.std().item() == pytest.approx((2 / (layer.in_channels * 9)) ** 0.5, rel=0.1)
    layers.append(SuperConv2d(64, 64, 3, bank=bank, cluster="c"))
    first, second = layers[0].weight.flatten(), layers[-1].weight.flatten()
    assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1]) < 0.1


def test_vectors_start_orthogonal() -> None:
    bank = SuperWeightBank({"c": 4 * 16})
    for _ in range(6):
        SuperLinear(4, 4, bank=bank, cluster="c")
    vectors = F.normalize(bank.coefficients.values.detach().view(6, 4), dim=1)
    torch.testing.assert_close(vectors[:4] @ vectors[:4].T, torch.eye(4))
    torch.testing.assert_close(vectors[4:] @ vectors[4:].T, torch.eye(2))


def test_shared_coefficients_and_nested_widths() -> None:
    bank = SuperWeightBank({"c": 3 * 8 * 6 * 9}, dtype=torch.float64)
    wide = SuperConv2d(6, 8, 3, bank=bank, cluster="c", coefficients="same")
    narrow = SuperConv2d(4, 5, 3, bank=bank, cluster="c", block=(8, 6), coefficients="same")
    assert len(bank.coefficients.values) == 3
    torch.testing.assert_close(narrow.weight, wide.weight[:5, :4])


class Mixers(nn.Module):
    """Two mixers whose matrices come from one bank, and a layer beside them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bank = SuperWeightBank({"c": 3 * 64}, **options)
        plan = {"sharing": Sharing(4, 2), "bank": self.bank, "cluster": "c", **options}
        self.mixers = nn.Sequential(*(SharedMixer(8, 4, 3, **plan, transform=t) for t in (None, "channel")))
        self.last = SuperConv2d(8, 8, 1, bank=self.bank, cluster="c")
        self.bank.attach(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mixers(x))


@pytest.mark.parametrize("training", [True, False])
def test_mixers_from_a_bank(training: bool) -> None:
    net, x = Mixers(dtype=torch.float64).train(training), torch.randn(2, 8, 6, 5, dtype=torch.float64)
    plain = nn.Sequential(*(SharedMixer(8, 4, 3, Sharing(4, 2), transform=t) for t in (None, "channel"))).double()
    plain.train(training)
    for mixer, source in zip(plain, net.mixers, strict=True):
        mixer.load_state_dict(source.state_dict(), strict=False)
        assert source.pw_weight is None
    matrices = [expected_weight(net.bank, number).view(2, 8, 8) for number in (0, 1)]
    expected = torch.func.functional_call(plain, {f"{n}.pw_weight": m for n, m in enumerate(matrices)}, (x,))
    expected = F.conv2d(expected, expected_weight(net.bank, 2), net.last.bias)
    y = net(x)
    torch.testing.assert_close(y, expected)
    parameters, factor = list(net.bank.parameters()), torch.randn_like(y)
    grads, wanted = (torch.autograd.grad((result * factor).sum(), parameters) for result in (y, expected))
    for actual, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(actual, right)


def test_frozen_mixers_from_a_bank() -> None:
    net, x = Mixers().eval(), torch.randn(2, 8, 6, 5)
    y = net(x)
    for module in (*net.mixers, net.bank):
        module.freeze()
    with torch.no_grad():
        net.bank.templates.zero_()
        torch.testing.assert_close(net(x), y)
    net.train().eval()
    assert not torch.allclose(net(x), y)


def test_frozen_mixers_see_a_new_state_of_their_bank() -> None:
    net, other, x = Mixers().eval(), Mixers(), torch.randn(2, 8, 6, 5)
    net.mixers[0].freeze()
    y = net.mixers[0](x)
    net.bank.load_state_dict(other.bank.state_dict())
    assert not torch.allclose(net.mixers[0](x), y)
    with pytest.raises(ValueError, match="bank"):
        fusion.prepare(net.mixers[0], Sharing(4, 2))


@pytest.mark.parametrize("options", [{"cluster": "c"}, {"bank": True}, {"bank": True, "cluster": "c", "templates": 2}])
def test_mixers_need_bank_and_cluster(options: dict[str, Any]) -> None:
    if "bank" in options:
        options = options | {"bank": SuperWeightBank({"c": 100})}
    with pytest.raises(ValueError, match=r"^bank, cluster"):
        SharedMixer(8, 2, 3, **options)


BAD: dict[str, tuple[Callable[[SuperWeightBank], Any], type[Exception], str]] = {
    "unknown cluster": (lambda b: SuperLinear(4, 4, bank=b, cluster="d"), ValueError, "cluster"),
    "too large": (lambda b: SuperLinear(40, 40, bank=b, cluster="c"), ValueError, r"block=\(o, i\)"),
    "too many templates": (lambda b: SuperLinear(4, 4, bank=b, cluster="c", templates=7), ValueError, "7 templates"),
    "past the end": (lambda b: SuperLinear(4, 4, bank=b, cluster="c", start=90), ValueError, "got 10 values"),
    "negative start": (lambda b: SuperLinear(4, 4, bank=b, cluster="c", start=-1), ValueError, "start"),
    "no bank": (lambda b: SuperLinear(4, 4, bank=None, cluster="c"), TypeError, "bank"),
    "no cluster": (lambda b: SuperLinear(4, 4, bank=b), ValueError, "cluster, slabs"),
    "both": (lambda b: SuperLinear(4, 4, bank=b, cluster="c", slabs=[]), ValueError, "cluster, slabs"),
    "options of slabs": (lambda b: SuperLinear(4, 4, bank=b, slabs=[], start=2), ValueError, "start"),
    "groups": (lambda b: SuperConv2d(4, 4, 1, groups=3, bank=b, cluster="c"), ValueError, "groups"),
    "no channels": (lambda b: SuperConv2d(0, 4, 1, bank=b, cluster="c"), ValueError, "channels"),
    "other length": (
        lambda b: [SuperLinear(4, 4, bank=b, cluster="c", templates=t, coefficients="x") for t in (2, 3)],
        ValueError, "coefficients: expected 2",
    ),
    "gap": (lambda b: b.add((4, 4, 1, 1), tile((3, 4, 1, 1), b, "c")), ValueError, "layer 0"),
    "overlap": (lambda b: b.add((4, 4, 1, 1), 2 * tile((4, 4, 1, 1), b, "c")), ValueError, "overlaps"),
    "slab past the end": (lambda b: b.add((4, 4, 1, 1), [Slab("c", 2, 80, 16, 4, 4, 4)]), ValueError, "slab 0"),
    "negative stride": (lambda b: b.add((4, 4, 1, 1), [Slab("c", 2, 80, -16, 4, 4, 4)]), ValueError, "slab 0"),
    "turned templates that overlap": (
        lambda b: b.add((2, 2, 3, 3), [Slab("c", 2, 0, 9, 2, 2, 2)]), ValueError, "slab 0: expected whole filters",
    ),
    "two lengths": (
        lambda b: b.add((2, 4, 1, 1), [Slab("c", t, 0, 8, 2, 2, 2, 0, 2 * t - 2, "x") for t in (1, 2)]),
        ValueError, "coefficients: expected one length",
    ),
    "not whole filters": (lambda b: b.add((1, 1, 3, 3), [Slab("c", 2, 0, 10, 1, 1, 1)]), ValueError, "whole filters"),
    "no sizes": (lambda b: SuperWeightBank({}), TypeError, "sizes"),
    "empty cluster": (lambda b: SuperWeightBank({"c": 0}), ValueError, "sizes"),
    "rotations": (lambda b: SuperWeightBank({"c": 9}, rotations=3), ValueError, "rotations"),
    "embedding": (lambda b: SuperWeightBank({"c": 9}, embedding=0), ValueError, "embedding"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "text"), BAD.values(), ids=BAD)
def test_bad_arguments(make: Callable[[SuperWeightBank], Any], error: type[Exception], text: str) -> None:
    bank = SuperWeightBank({"c": 100}, rotations=2)
    with pytest.raises(error, match=text) as caught:
        make(bank)
    assert "\n" not in str(caught.value)
