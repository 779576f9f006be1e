"""compose_superweights on random compositions: results, gradients, every instruction set, any number of threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest
import torch
from arguments import private_composition
from random_weights import DTYPES, assert_same_bits, assert_sums, draws, every_isa, on_every_isa
from torch import Tensor

from spin_kernels import dispatch, reference
from spin_kernels.functional import compose_superweights
from spin_kernels.ops import layers_of

SHAPES = int(os.environ.get("SPIN_RANDOM_SHAPES", "1000")) // 2
COMPOSE = torch.ops.spin.compose_superweights.default


def rectangles(rng: Random, out: int, into: int) -> list[tuple[int, int, int, int]]:
    """(out_offset, in_offset, out, in) that tile a layer."""
    todo, done = [(0, 0, out, into)], []
    while todo:
        a, b, n, m = todo.pop()
        if n * m == 1 or rng.random() < 0.5:
            done.append((a, b, n, m))
        elif (rng.random() < 0.5 or m == 1) and n > 1:
            cut = rng.randint(1, n - 1)
            todo += [(a, b, cut, m), (a + cut, b, n - cut, m)]
        elif m > 1:
            cut = rng.randint(1, m - 1)
            todo += [(a, b, n, cut), (a, b + cut, n, m - cut)]
    return done


def any_composition(rng: Random, sizes: tuple[int, ...] = (3, 8, 20, 60)) -> dict[str, Any]:
    """Layers that repeat the tilings and the windows of others now and then, windows that overlap or leave gaps."""
    size, count = rng.choice(sizes), rng.choice([0, 1, 2, 5])
    kinds = [(rng.randint(1, size), rng.randint(1, size), rng.choice([1, 2, 3]), rng.choice([1, 3])) for _ in range(2)]
    kinds = [(*kind, rectangles(rng, *kind[:2])) for kind in kinds]
    windows: dict[tuple[int, ...], tuple[int, int, int, int]] = {}
    pieces, shapes, bank, coefficients = [], [], rng.choice([0, 100]), 0
    for layer in range(count):
        out, into, kh, kw, parts = rng.choice(kinds)
        shapes += [out, into, kh, kw]
        for a, b, n, m in parts:
            area = n * m * kh * kw
            if (n, m, kh, kw) not in windows or rng.random() < 0.3:
                base, templates = rng.randint(0, rng.choice([0, 10, 500])), rng.choice([1, 2, 3, 8, 11])
                stride, row = rng.choice([0, 1, area // 2, area, area, area, area + 5]), m + rng.choice([0, 0, 0, 2])
                windows[n, m, kh, kw] = base, stride, templates, row
            base, stride, templates, row = windows[n, m, kh, kw]
            for (_, _, *taps), window in windows.items():  # or a corner of another layer's
                if taps == [kh, kw] and window[3] >= m and rng.random() < 0.5:
                    base, stride, templates, row = window
            at = rng.randint(0, coefficients)  # new ones, or another piece's
            pieces += [layer, base, stride, templates, at, a, b, n, m, row]
            bank = max(bank, base + (templates - 1) * stride + ((n - 1) * row + m) * kh * kw)
            coefficients = max(coefficients, at + templates)
    return {
        "bank": torch.randn(bank, dtype=torch.float64).to(rng.choice(DTYPES)),
        "coefficients": torch.randn(coefficients),
        "pieces": pieces,
        "shapes": shapes,
    }


def exact(arguments: dict[str, Any], grad: Tensor, absolute: bool = False) -> list[Tensor]:
    """Result and gradients of bank and coefficients in float64; with `absolute` the sums of their terms' magnitudes."""
    tensors = [t.double() for t in (grad, arguments["bank"], arguments["coefficients"])]
    grad, *rest = [t.abs() for t in tensors] if absolute else tensors
    rest += [arguments["pieces"], arguments["shapes"]]
    return [reference.compose_superweights(*rest), *reference.compose_superweights_backward(grad, *rest)]


def computed(arguments: dict[str, Any], grad: Tensor) -> list[Tensor]:
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("bank", "coefficients")}
    flat = COMPOSE(**{**arguments, **leaves})
    flat.backward(grad)
    results = [flat.detach(), *(leaf.grad for leaf in leaves.values())]
    # A tensor per layer is the same, bit for bit.
    for leaf in leaves.values():
        leaf.grad = None
    apart = compose_superweights(**{**arguments, **leaves})
    if apart:
        torch.autograd.backward(apart, layers_of(grad, [w.shape for w in apart]))
        others = [torch.cat([weight.detach().flatten() for weight in apart]), *(leaf.grad for leaf in leaves.values())]
        assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))
    return results


def assert_right(arguments: dict[str, Any], grad: Tensor) -> None:
    dtypes = arguments["bank"].dtype, arguments["bank"].dtype, torch.float32
    terms = exact(arguments, grad, absolute=True)
    assert_sums(computed(arguments, grad), exact(arguments, grad), terms, dtypes, eps=2e-6)


@on_every_isa
def test_random_compositions(chunk: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIN_CPU_ISA", isa)
    for arguments in draws(SHAPES, any_composition):
        assert_right(arguments, torch.randn_like(COMPOSE(**arguments)))


def nested_layers(templates: int, layers: int, rows: int = 96, into: int = 64) -> dict[str, Any]:
    """A few megabytes: layers of two sizes that share one window, and one with a window that begins inside it."""
    small, large = (rows, into, 3, 3), (rows, 2 * into, 3, 3)
    n = rows * into * 9
    pieces, shapes = [], []
    for layer in range(layers):
        wide = layer % 2
        shapes += large if wide else small
        for half in range(1 + wide):
            base = n // 2 if layer == layers - 1 else 0
            pieces += [layer, base, n, templates, len(pieces) // 10 * templates, 0, into * half, rows, into, into]
    return {
        "bank": torch.randn(n * templates + n // 2),
        "coefficients": torch.randn(len(pieces) // 10 * templates),
        "pieces": pieces,
        "shapes": shapes,
    }


@every_isa
@pytest.mark.parametrize("into", [64, 61])
def test_long_streams(into: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of more than the 8 MB beyond which they bypass the caches; rows may begin anywhere in a line."""
    monkeypatch.setenv("SPIN_CPU_ISA", isa)
    arguments = nested_layers(5, 40, into=into)
    flat = COMPOSE(**arguments)
    assert flat.numel() * 4 > 8 << 20
    assert_right(arguments, torch.randn_like(flat))


@every_isa
@pytest.mark.parametrize(("layers", "rows", "into"), [(3, 640, 128), (12, 641, 121)])
def test_long_streams_of_the_banks_gradient(
    layers: int, rows: int, into: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank of more than those 8 MB; gradients of all templates begin at the same place of a line, or anywhere."""
    monkeypatch.setenv("SPIN_CPU_ISA", isa)
    arguments = nested_layers(3, layers, rows, into)
    assert arguments["bank"].numel() * 4 > 8 << 20
    assert_right(arguments, torch.randn_like(COMPOSE(**arguments)))


@every_isa
def test_any_number_of_users_and_templates(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take both in groups."""
    monkeypatch.setenv("SPIN_CPU_ISA", isa)
    for users in range(1, 15):
        for templates in range(1, 8):
            arguments = nested_layers(templates, users, rows=1, into=5)
            assert_right(arguments, torch.randn_like(COMPOSE(**arguments)))


@pytest.mark.usefixtures("one_thread")
def test_same_bits_with_any_number_of_threads() -> None:
    arguments = nested_layers(3, 9)
    grad = torch.randn_like(COMPOSE(**arguments))
    assert_same_bits(lambda: computed(arguments, grad))


def test_bank_elements_that_nothing_reads_have_no_gradient() -> None:
    arguments = nested_layers(2, 3)
    arguments["bank"] = torch.cat([arguments["bank"], torch.randn(1000)])
    gradient = computed(arguments, torch.randn_like(COMPOSE(**arguments)))[1]
    assert gradient[:-1000].all()
    assert not gradient[-1000:].any()


def test_not_contiguous() -> None:
    arguments = nested_layers(2, 2)
    expected = COMPOSE(**arguments)
    for name in ("bank", "coefficients"):
        wide = torch.full((2 * len(arguments[name]),), float("nan"))
        wide[::2] = arguments[name]
        arguments[name] = wide[::2]
    assert torch.equal(COMPOSE(**arguments), expected)
    grad = torch.randn(2 * expected.numel())[::2]
    assert_right({**arguments, "bank": arguments["bank"].contiguous()}, grad)


def test_more_compositions_than_are_kept() -> None:
    """In turns, by two threads at once: each call gets what belongs to its own integers."""
    rng = Random(int(torch.randint(2**31, ())))
    calls = [any_composition(rng, sizes=(3, 8)) for _ in range(13)]
    grads = [torch.randn_like(COMPOSE(**arguments)) for arguments in calls]
    expected = [computed(arguments, grad) for arguments, grad in zip(calls, grads, strict=True)]

    def again(first: int) -> bool:
        order = [(first + 5 * i) % len(calls) for i in range(3 * len(calls))]
        return all(all(map(torch.equal, computed(calls[i], grads[i]), expected[i])) for i in order)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(again, (0, 1)))


def test_kept_composition_meets_a_smaller_bank() -> None:
    arguments = nested_layers(2, 2)
    COMPOSE(**arguments)
    run = torch.ops.spin._compose_superweights_cpu
    for name in ("bank", "coefficients"):
        end = {"bank": 2 * 96 * 64 * 9 + 96 * 64 * 9 // 2, "coefficients": len(arguments["coefficients"])}[name]
        with pytest.raises(RuntimeError, match=rf"expected .*at least {end} .*got {end - 1}"):
            run(*private_composition({**arguments, name: arguments[name][: end - 1]}), apart=False)


@pytest.mark.parametrize("value", [None, [1.0]])
@pytest.mark.parametrize("name", ["bank", "coefficients"])
def test_no_tensors(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected a tensor, got {type(value).__name__}$"):
        compose_superweights(**{**nested_layers(1, 1), name: value})


@pytest.mark.parametrize("value", [None, 3, [0, 0.0, 1, 1, 0, 0, 0, 1, 1, 1], ["a"]])
@pytest.mark.parametrize("name", ["pieces", "shapes"])
def test_no_integers(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: expected integers, got "):
        compose_superweights(**{**nested_layers(1, 1), name: value})


@pytest.mark.parametrize("text", ["", "1 2", "1;2;3", "x;1", "1,2;3", f"{2**63};1"])
def test_private_kernel_refuses_other_texts(text: str) -> None:
    run = torch.ops.spin._compose_superweights_cpu
    with pytest.raises(RuntimeError, match="composition: expected pieces;shapes in decimal numbers"):
        run(torch.randn(8), torch.randn(2), text, apart=False)


def test_backend() -> None:
    arguments = nested_layers(1, 1)
    explained = dispatch.explain("compose_superweights", **arguments)
    assert explained.backend == "cpu"
    assert "_compose_superweights_cpu" in explained.kernel
    double = {**arguments, "bank": arguments["bank"].double(), "coefficients": arguments["coefficients"].double()}
    assert dispatch.explain("compose_superweights", **double).backend == "reference"
