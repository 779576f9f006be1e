"""compose_superweights and repeat_weight through their Triton kernels: values and gradients, published cases."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import test_compose
import test_golden_weights
import test_repeat
import torch
from arguments import compose_arguments, private_composition, repeat_arguments, tensors_of
from random_weights import CHUNKS, DTYPES, draws
from test_compose import COMPOSE, any_composition, computed, nested_layers
from test_repeat import REPEAT, any_arguments, drawn, run
from torch import Tensor
from torch.library import opcheck

from spin_kernels import dispatch, reference

pytest.importorskip("triton", reason="triton is not installed")
from test_triton import ON_GPU, on_device

from triton_ops import compose, configs, repeat

SHAPES = int(os.environ.get("SPIN_RANDOM_SHAPES", "30"))
PLAN = torch.ops.spin._plan_composition.default
pytestmark = pytest.mark.usefixtures("on_triton")
only_cpu_cases = pytest.mark.skipif(ON_GPU, reason="the cases are CPU tensors")


@pytest.fixture
def own_tiles(on_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the interpreter, where the others take larger ones."""
    monkeypatch.setattr(compose, "COMPOSE_BLOCK", configs.COMPOSE_BLOCK)
    monkeypatch.setattr(repeat, "REPEAT_BLOCK", configs.REPEAT_BLOCK)


def random_like(op: Callable, arguments: dict[str, Any]) -> Tensor:
    result = op(**arguments)
    return torch.randn(result.shape, device=result.device).to(result.dtype)


def assert_composed(arguments: dict[str, Any]) -> None:
    """By the rule of test_compose.py: sums in float32 or wider, rounded once."""
    arguments = on_device(arguments)
    test_compose.assert_right(arguments, random_like(COMPOSE, arguments))


def assert_repeated(arguments: dict[str, Any]) -> None:
    arguments = on_device(arguments)
    test_repeat.assert_right(arguments, random_like(REPEAT, arguments))


# --- compositions


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_compositions(chunk: int) -> None:
    for arguments in draws(SHAPES, partial(any_composition, sizes=(3, 8, 20, 60) if ON_GPU else (3, 8, 20))):
        assert_composed(arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_corners_in_several_steps(dtype: torch.dtype, own_tiles: None) -> None:
    arguments = nested_layers(3, 3, rows=3)
    arguments["bank"] = arguments["bank"].to(dtype)
    *_, steps = PLAN(arguments["pieces"], arguments["shapes"], configs.COMPOSE_BLOCK)
    assert len(steps) - 1 == 2  # the last layer's window begins inside the others'
    assert_composed(arguments)


@pytest.mark.parametrize("templates", [1, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("stride", [0, 7, 64])
def test_templates(templates: int, stride: int) -> None:
    """As many as registers hold or more; windows that overlap themselves or not, 7 of 10 columns of which are used."""
    pieces = [n for l in range(2) for n in (l, 2, stride, templates, l, 0, 0, 6, 7, 10)]  # noqa: E741
    for dtype in (torch.float32, torch.float16):
        bank = torch.randn(2 + (templates - 1) * stride + 60).to(dtype)
        coefficients = torch.randn(templates + 1)
        assert_composed({"bank": bank, "coefficients": coefficients, "pieces": pieces, "shapes": [6, 7, 1, 1] * 2})


def test_same_bits_again_and_with_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = on_device(nested_layers(3, 3, rows=5))
    grad = random_like(COMPOSE, arguments)
    results = []
    for block in (512, 512, 2048):
        monkeypatch.setattr(compose, "COMPOSE_BLOCK", block)
        results.append(computed(arguments, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[2][:2], strict=True))


def test_bank_elements_and_coefficients_that_nothing_reads_have_no_gradient() -> None:
    arguments = nested_layers(2, 1, rows=3)
    used = len(arguments["bank"]), len(arguments["coefficients"])
    arguments["bank"] = torch.cat([arguments["bank"], torch.randn(1000)])
    arguments["coefficients"] = torch.cat([arguments["coefficients"], torch.randn(5)])
    arguments = on_device(arguments)
    _, *gradients = computed(arguments, random_like(COMPOSE, arguments))
    for gradient, size in zip(gradients, used, strict=True):
        assert not gradient[size:].any()
    assert gradients[0][used[0] // 2 : used[0]].all()


def test_compositions_of_views() -> None:
    arguments = on_device(nested_layers(2, 2, rows=3))
    expected = COMPOSE(**arguments)
    for name in ("bank", "coefficients"):
        wide = torch.full((2 * len(arguments[name]) + 1,), float("nan"), device=expected.device)
        wide[1::2] = arguments[name]
        arguments[name] = wide[1::2]
    assert torch.equal(COMPOSE(**arguments), expected)
    grad = torch.randn(len(expected) + 1, device=expected.device)
    shifted = arguments | {"bank": torch.cat([expected.new_zeros(1), arguments["bank"]])[1:]}
    for given in (grad[1:], torch.stack([grad, grad], 1)[1:, 1]):
        test_compose.assert_right(shifted, given)


def test_nothing_to_compose() -> None:
    arguments = on_device({"bank": torch.empty(0), "coefficients": torch.randn(2), "pieces": [], "shapes": []})
    result, to_bank, to_coefficients = computed(arguments, arguments["bank"])
    assert result.numel() == to_bank.numel() == 0
    assert not to_coefficients.any()


def test_plan() -> None:
    block = 128
    for pieces, shapes in (
        ([0, 3, 120, 2, 0, 0, 0, 5, 6, 8], [5, 6, 3, 1]),  # rows of 18 of 24
        ([0, 0, 0, 1, 0, 0, 0, 2, 2**31 + 5, 2**31 + 6], [2, 2**31 + 5, 1, 1]),  # columns need 32 bits
        ([0, 0, 0, 1, 0, 0, 0, 2**20, 2**12, 2**12], [2**20, 2**12, 1, 1]),  # one row of 2^32
    ):
        firsts, cells, users, sums, terms, steps = PLAN(pieces, shapes, block)
        _, _, templates, begin, last, _, rows, run, user, count, programs, product = cells.unbind(1)
        assert int((rows * run).sum()) == torch.Size(shapes).numel()
        assert (run <= 2**30).all()
        assert torch.equal(programs, -(-rows * run // block))
        assert torch.equal(firsts, programs.cumsum(0) - programs)
        assert steps.tolist() == [0, int(programs.sum())]
        assert torch.equal(user, count.cumsum(0) - count)
        assert len(users) == int(count.sum())
        assert (begin == 0).all()
        assert torch.equal(last, templates)
        assert torch.equal(product, (count * templates * programs).cumsum(0) - count * templates * programs)
        assert sums.tolist() == [len(cells) * k for k in range(pieces[3] + 1)]
        assert int(terms[:, 1].sum()) == int((count * templates * programs).sum())
    *_, steps = PLAN([0, 0, 1, 4, 0, 0, 0, 5, 6, 6], [5, 6, 1, 1], block)
    assert steps.tolist() == [0, 1, 2, 3, 4]  # overlaps itself: a step per template
    for arguments in (([1] * 9, [1], 1), ([2**62] * 10, [2**40] * 4, 1), ([], [], 0), ([], [], 2**40)):
        with pytest.raises(RuntimeError, match=r"pieces|block"):
            PLAN(*arguments)


# --- repetitions


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_tilings(chunk: int) -> None:
    for arguments in draws(2 * SHAPES, any_arguments):
        assert_repeated(arguments)


@pytest.mark.parametrize("modulation", ["plain", "swish", "gate"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_tiles(dtype: torch.dtype, modulation: str, own_tiles: None) -> None:
    arguments = drawn(9, 11, 41, 40, 3, 1, modulation, dtype)  # 5 x 4 tiles, the last ones partial, of 2 pieces
    assert configs.repeat_groups(2, 20, configs.DEVICES["sm_90"]) == 2
    assert_repeated(arguments)


@pytest.mark.parametrize("modulation", ["plain", "swish", "gate"])
def test_repetitions_have_the_same_bits_again(modulation: str) -> None:
    arguments = on_device(drawn(10, 8, 50, 45, 3, 3, modulation, torch.float32))
    grad = random_like(REPEAT, arguments)
    first, second = (run(REPEAT, arguments, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_repetitions_of_views() -> None:
    arguments = drawn(4, 6, 10, 11, 3, 3, "swish", torch.float32)
    expected = REPEAT(**on_device(arguments))
    arguments["weight"] = arguments["weight"].to(memory_format=torch.channels_last)
    arguments["alpha"] = arguments["alpha"].t().contiguous().t()
    arguments["beta"] = torch.cat([torch.randn(1), arguments["beta"].flatten()])[1:].view(3, 2)
    arguments = on_device(arguments)
    result = REPEAT(**arguments)
    assert torch.equal(result, expected)
    assert result.is_contiguous()
    test_repeat.assert_right(arguments, torch.randn(3, 3, 10, 11, device=result.device).permute(2, 3, 0, 1))


def test_infinite_weights_are_what_they_are_in_plain_pytorch() -> None:
    arguments = drawn(2, 3, 5, 8, 1, 1, "swish", torch.float32)
    arguments["weight"][0, 0], arguments["weight"][1, 2] = torch.inf, -torch.inf
    arguments["weight"][1, 1], arguments["beta"][1, 1] = 1e30, 1e30
    arguments = on_device(arguments)
    grad = random_like(REPEAT, arguments)
    for got, expected in zip(run(REPEAT, arguments, grad), run(reference.repeat_weight, arguments, grad), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


# --- both


@only_cpu_cases
@test_golden_weights.every_case("superweight")
def test_published_superweights(case: dict[str, Any]) -> None:
    test_golden_weights.test_superweights(case, torch.float32)  # the assertions are in these


@only_cpu_cases
@test_golden_weights.every_case("repeatnet")
def test_published_repetition(case: dict[str, Any]) -> None:
    test_golden_weights.test_repetition(case, torch.float32)


def test_opcheck() -> None:
    composed = on_device(compose_arguments(requires_grad=True))
    opcheck(COMPOSE, tuple(composed.values()))
    private = private_composition(composed)
    detached = [t.detach() if isinstance(t, Tensor) else t for t in private]
    backward = torch.ops.spin._compose_superweights_backward.default
    opcheck(backward, ([random_like(COMPOSE, composed).detach()], *detached))
    opcheck(torch.ops.spin._compose_layers.default, private)
    for modulation in ("none", "swish", "gate"):
        repeated = on_device(repeat_arguments(modulation))
        opcheck(torch.ops.spin._repeat_weight_backward.default, (random_like(REPEAT, repeated), *repeated.values()))
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors_of(repeated).items()}
        opcheck(REPEAT, tuple((repeated | leaves).values()))


def test_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    composed, repeated = on_device(compose_arguments()), on_device(repeat_arguments())
    assert dispatch.explain("compose_superweights", **composed).kernel == "triton_ops.compose"
    repeated["weight"].requires_grad_()
    explained = dispatch.explain("repeat_weight", **repeated)
    assert (explained.kernel, explained.backward) == ("triton_ops.repeat", "triton")
    wide = torch.zeros(1).expand(1, 1, 1 << 15, 1 << 15)
    assert "2^30" in dispatch._triton_weights_refusal([wide])
    with pytest.raises(RuntimeError, match="the weights are float64"):
        REPEAT(**on_device(repeat_arguments(dtype=torch.float64)))
    if not ON_GPU:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(RuntimeError, match="the weights are not on a GPU and Triton's interpreter is off"):
            COMPOSE(**composed)
