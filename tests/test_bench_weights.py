"""The benchmark of making weights: its peers make the same, and what is counted is there."""

import sys
from pathlib import Path

import pytest
import torch

import spin_kernels as spin

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from spinbench import catalog, composing, compositions, networks


@pytest.mark.parametrize(
    ("provider", "weights"),
    [
        ("product", spin.SuperWeights(0.4)),
        ("broadcast sum", spin.SuperWeights(0.4)),
        ("eager", spin.Repeated((2, 3), "swish")),
    ],
)
def test_peers_make_the_same_weights_and_gradients(provider, weights):
    source = composing.source_of(spin.models.WideResNet(10, 2, weights=weights))
    leaves = list(source.parameters())
    ours, theirs = source.compose(), composing.PEERS[provider](source)()
    grads = composing.gradients(ours, torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    results = (torch.autograd.grad(weights, leaves, grads) for weights in (ours, theirs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_bytes_of_compositions():
    with torch.device("meta"):
        network = spin.models.create(compositions.NETWORK)
    weights = sum(p.numel() for p in network.parameters() if p.dim() == 4)
    assert weights == compositions.WEIGHTS
    assert sum(p.numel() for p in network.parameters()) - weights == compositions.KEPT
    case = compositions.Composition(25, "backward")
    assert case.bytes(1, "float32") == 4 * (
        weights + 2 * (round(0.25 * (weights + compositions.KEPT)) - compositions.KEPT)
    )


def test_bytes_of_repetitions():
    with torch.device("meta"):
        network = spin.models.create(compositions.NETWORK, weights=spin.Repeated(compositions.TILES, "swish"))
    layers = composing.source_of(network)
    source, weights = sum(layer.weight.numel() for layer in layers), sum(w.numel() for w in layers.compose())
    assert compositions.Repetition("forward").bytes(1, "float32") == 4 * (source + weights)
    assert compositions.Repetition("backward").bytes(1, "float32") == 4 * (2 * source + weights)


def test_who_makes_weights():
    names = catalog.select("compose", "cpu", None)
    ceilings = {"forward": ["copy", "write"], "backward": ["copy", "read"], "step": []}
    for made in compositions.COMPOSITIONS:
        part = [name for name in names if catalog.takes_part(name, made)]
        assert part == ["spin", *made.peers, *ceilings[made.what]]
    assert catalog.select("compose", "cpu", []) == ["spin", "copy", "write", "read"]


def test_ceilings_move_what_the_passes_do():
    class Made(compositions.Composition):
        source, weights = 300, 7000

    for provider, what, result in (("write", "forward", None), ("read", "backward", 7300)):
        case = networks.Case(Made(10, what), 1, "float32")
        run, expected, _ = composing.prepare(provider, case, seed=0)
        assert expected is None
        got = run()
        assert got.item() == result if result else (len(got) == 7000 and got.eq(2).all())


def test_a_step_is_the_same_with_weights_of_its_own():
    torch.manual_seed(0)
    network = spin.models.create(compositions.NETWORK, depth=10, width=1, weights=spin.SuperWeights(0.5))
    plain = spin.models.create(compositions.NETWORK, depth=10, width=1)
    composing.copy_weights(network, plain)
    x, classes = composing.images(4, torch.float32)
    ours, theirs = (composing.gradient_of_step(net, x, classes).clone() for net in (network, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    held = composing.held_weights(network, x) - composing.held_weights(plain, x)
    composed = 4 * sum(w.numel() for w in network.bank.compose())
    assert held == pytest.approx(composed, rel=0.2)  # what is composed is kept for the convolutions' backward passes
