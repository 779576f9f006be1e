"""Every argument of every operator made wrong in turn: an ordinary exception whose message begins with its name."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from arguments import PIECES, SHAPES, compose_arguments, mixer_arguments, private_composition, repeat_arguments

from spin_kernels import checks

spin = torch.ops.spin
Change = Callable[[Any], Any]

# argument, how it is made wrong, exception, part of the message (all of the mixer, depth 3, C 6, k 3, 2 matrices)
MIXER: list[tuple[str, Change, type[Exception], str]] = [
    ("x", lambda x: x.int(), TypeError, "torch.int32"),
    ("x", lambda x: x.bool(), TypeError, "torch.bool"),
    ("x", lambda x: x.to(torch.complex64), TypeError, "torch.complex64"),
    ("x", lambda x: x.to(torch.float8_e5m2), TypeError, "torch.float8_e5m2"),
    ("x", lambda x: x.to_sparse(), TypeError, "torch.sparse_coo"),
    ("x", lambda x: x.to_mkldnn(), TypeError, "torch._mkldnn"),
    ("x", lambda x: None, TypeError, "got None"),
    ("x", lambda x: x[0], ValueError, r"\(B, C, H, W\), got \(6, 5, 4\)"),
    ("x", lambda x: x[None], ValueError, r"\(B, C, H, W\)"),
    ("x", lambda x: x[:, :0], ValueError, "at least 1"),
    ("x", lambda x: x[:, :, :0], ValueError, "at least 1"),
    ("x", lambda x: x[..., :0], ValueError, "at least 1"),
    ("dw_weight", lambda w: w[:, :5], ValueError, r"\(3, 6, 3, 3\), got \(3, 5, 3, 3\)"),
    ("dw_weight", lambda w: w[0], ValueError, r"\(S_dw, C, k, k\)"),
    ("dw_weight", lambda w: w[..., :2, :2], ValueError, "odd kernel size"),
    ("dw_weight", lambda w: w[..., :1], ValueError, r"\(3, 6, 1, 1\), got \(3, 6, 3, 1\)"),
    ("dw_weight", lambda w: w[..., :0, :0], ValueError, "odd kernel size"),
    ("dw_weight", lambda w: w.bfloat16(), TypeError, "torch.float32, got torch.bfloat16"),
    ("dw_weight", lambda w: w.to("meta"), ValueError, "got one on meta"),
    ("dw_weight", lambda w: w.to_sparse(), TypeError, "torch.sparse_coo"),
    ("dw_weight", lambda w: None, TypeError, "got None"),
    ("dw_bias", lambda b: b[:2], ValueError, r"\(3, 6\), got \(2, 6\)"),
    ("dw_bias", lambda b: b.half(), TypeError, "torch.float32, got torch.float16"),
    ("dw_bias", lambda b: b.to("meta"), ValueError, "got one on meta"),
    ("dw_affine", lambda a: a[:2], ValueError, r"\(3, 2, 6\), got \(2, 2, 6\)"),
    ("dw_affine", lambda a: a[:, 0], ValueError, r"\(3, 2, 6\)"),
    ("dw_affine", lambda a: a.bfloat16(), TypeError, "torch.float32, got torch.bfloat16"),
    ("dw_affine", lambda a: None, TypeError, "got None"),
    ("pw_weight", lambda w: w[:, :5], ValueError, r"\(2, 6, 6\), got \(2, 5, 6\)"),
    ("pw_weight", lambda w: w[..., None, None], ValueError, r"\(S_pw, C, C\)"),
    ("pw_weight", lambda w: w.double(), TypeError, "torch.float32, got torch.float64"),
    ("pw_weight", lambda w: w.to("meta"), ValueError, "got one on meta"),
    ("pw_weight", lambda w: None, TypeError, "got None"),
    ("pw_bias", lambda b: b[0], ValueError, r"\(2, 6\), got \(6,\)"),
    ("pw_bias", lambda b: b.double(), TypeError, "torch.float64"),
    ("pw_affine", lambda a: a[..., :5], ValueError, r"\(3, 2, 6\), got \(3, 2, 5\)"),
    ("pw_affine", lambda a: a.half(), TypeError, "torch.float32, got torch.float16"),
    ("pw_affine", lambda a: None, TypeError, "got None"),
    ("pw_coefficients", lambda c: torch.randn(2, 3), ValueError, r"\(2, 2\), got \(2, 3\)"),
    ("pw_coefficients", lambda c: torch.randn(2), ValueError, r"\(S_pw, T\)"),
    ("pw_coefficients", lambda c: torch.randn(2, 2).bfloat16(), TypeError, "torch.bfloat16"),
    ("pw_gain", lambda g: torch.randn(3, 1), ValueError, r"\(3, 6\), got \(3, 1\)"),
    ("pw_gain", lambda g: torch.randn(3, 6).bfloat16(), TypeError, "torch.bfloat16"),
    ("pw_gain", lambda g: torch.randn(3, 6, device="meta"), ValueError, "got one on meta"),
    ("pw_index", lambda i: [0, 2, 1], ValueError, "from 0 to 1.* got 2 for block 1"),
    ("pw_index", lambda i: [0, 1, -1], ValueError, "got -1 for block 2"),
    ("pw_index", lambda i: [0, 1, 2**63 - 1], ValueError, "for block 2"),
    ("dw_index", lambda i: [0, 3, 1], ValueError, "from 0 to 2.* got 3 for block 1"),
    ("dw_index", lambda i: [-1, 0, 1], ValueError, "got -1 for block 0"),
    ("dw_index", lambda i: [0, 1], ValueError, "3 ints.*got 2"),
    ("activation", lambda a: "swish", ValueError, "gelu, gelu_tanh, relu, silu, identity, got 'swish'"),
]
IDS = [f"{name}-{text}" for name, _, _, text in MIXER]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("op", ["shared_mixer_block", "shared_mixer_block_train"])
@pytest.mark.parametrize(("name", "change", "error", "text"), MIXER, ids=IDS)
def test_mixer(name: str, change: Change, error: type[Exception], text: str, op: str, requires_grad: bool) -> None:
    arguments = mixer_arguments(requires_grad=requires_grad, activation="gelu")
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=rf"^{name}: expected .*{text}") as caught:
        getattr(spin, op)(**arguments)
    assert len(str(caught.value).splitlines()) == 1
    if error is ValueError:  # autocast mends dtypes
        with torch.autocast("cpu"), pytest.raises(error, match=rf"^{name}: expected .*{text}"):
            getattr(spin, op)(**arguments)


def test_mixer_settings() -> None:
    with pytest.raises(ValueError, match=r"^dw_index: expected 3 ints because dw_weight has 2 filters .* got None"):
        spin.shared_mixer_block(**dict(mixer_arguments(filters=2), dw_index=None))
    with pytest.raises(ValueError, match=r"^dw_index: expected 0 ints because dw_weight has 1 filters"):
        spin.shared_mixer_block(**dict(mixer_arguments(depth=0, filters=1), dw_index=None))
    arguments = mixer_arguments(templates=1)
    arguments["pw_weight"], arguments["pw_coefficients"] = torch.empty(0, 6, 6), torch.empty(2, 0)
    with pytest.raises(ValueError, match=r"^pw_weight: expected at least 1 template"):
        spin.shared_mixer_block(**arguments)
    for eps in (-1e-5, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^eps: expected a finite number"):
            spin.shared_mixer_block_train(**mixer_arguments(), eps=eps)
    for shape in ({"batch": 0}, {"batch": 1, "height": 1, "width": 1}):
        with pytest.raises(ValueError, match=r"^x: expected at least 2 values per channel"):
            spin.shared_mixer_block_train(**mixer_arguments(**shape))


def test_mixed_devices_under_meta() -> None:
    arguments = mixer_arguments()
    with pytest.raises(ValueError, match=r"^dw_weight: expected a tensor on meta, got one on cpu"):
        spin.shared_mixer_block(**dict(arguments, x=arguments["x"].to("meta")))


def test_fakes_check_as_well() -> None:
    arguments = mixer_arguments()
    arguments["pw_index"] = [0, 0, 7]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=r"^pw_index"):
        spin.shared_mixer_block(**arguments)


def piece(number: int, **changes: int) -> list[int]:
    """PIECES with fields of one piece changed."""
    pieces = list(PIECES)
    for field, value in changes.items():
        pieces[10 * number + checks.Piece._fields.index(field)] = value
    return pieces


COMPOSE: list[tuple[str, Any, type[Exception], str]] = [
    ("bank", torch.randn(10, 22), ValueError, r"\(P,\), got \(10, 22\)"),
    ("bank", torch.arange(220), TypeError, "torch.int64"),
    ("bank", torch.randn(220).to_sparse(), TypeError, "torch.sparse_coo"),
    ("bank", None, TypeError, "got None"),
    ("coefficients", torch.randn(6, 1), ValueError, r"\(Q,\)"),
    ("coefficients", torch.randn(6).bfloat16(), TypeError, "torch.bfloat16"),
    ("coefficients", torch.randn(6, device="meta"), ValueError, "expected a tensor on"),
    ("coefficients", None, TypeError, "got None"),
    ("shapes", [*SHAPES, 1], ValueError, "four ints"),
    ("shapes", [5, 4, 3, 0, 2, 3, 1, 1], ValueError, "layer 0"),
    ("shapes", [5, 4, 3, 3, 2, 3, -1, -1], ValueError, "layer 1"),
    ("shapes", [2**31, 2**31, 2, 1, 2, 3, 1, 1], ValueError, r"2\*\*63"),
]
BAD_PIECES: list[tuple[list[int], str]] = [
    (PIECES[:-1], "ten ints"),
    (PIECES[:-10], "layer 1 .*no piece"),
    (piece(2, out=2), r"layer 0 .*gap.*pieces 0, 1, 2 covering 16 of 20"),
    (piece(1, out_offset=1), "piece 2 .*overlaps piece 1"),
    (piece(1, in_offset=2), "piece 1 .*overlaps piece 0"),
    (PIECES + PIECES[-10:], "piece 4 .*overlaps piece 3"),
    (piece(2, out=4), r"piece 2 .*inside layer 0 of 5 x 4 channels"),
    (piece(0, into=5, row=5), r"piece 0 .*inside layer 0"),
    (piece(0, row=2), "piece 0 .*row"),
    (piece(3, layer=2), "piece 3 .*layer below 2, got 2"),
    (piece(3, layer=-1), "piece 3 .*layer"),
    (piece(0, base=-1), "piece 0 .*base of at least 0, got -1"),
    (piece(0, stride=-1), "piece 0 .*stride"),
    (piece(0, templates=0), "piece 0 .*templates of at least 1"),
    (piece(0, coefficient=-1), "piece 0 .*coefficient"),
    (piece(0, out_offset=-1), "piece 0 .*out_offset"),
    (piece(0, in_offset=-1), "piece 0 .*in_offset"),
    (piece(0, out=0), "piece 0 .*out of at least 1"),
    (piece(0, into=-3), "piece 0 .*in of at least 1"),
    (piece(2, base=100), "piece 2 .*bank of at least 2.. elements, got 220"),
    (piece(0, base=2**62, stride=2**62), "piece 0 .*bank of at least"),
    (piece(0, out=2**62), "piece 0 .*inside layer 0"),
    (piece(0, row=2**62), "piece 0 .*bank of at least"),
    (piece(1, templates=4), "piece 1 .*at least 7 coefficients, got 6"),
    (piece(1, coefficient=2**62), "piece 1 .*coefficients, got 6"),
]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "gradients"])
def test_compose_superweights(requires_grad: bool) -> None:
    cases = COMPOSE + [("pieces", pieces, ValueError, text) for pieces, text in BAD_PIECES]
    for name, value, error, text in cases:
        arguments = dict(compose_arguments(requires_grad=requires_grad), **{name: value})
        with pytest.raises(error, match=rf"^{name}: .*{text}"):
            spin.compose_superweights(**arguments)
    with pytest.raises(ValueError, match=r"^pieces: piece 0 expected a bank of at least .* got 0"):
        spin.compose_superweights(**dict(compose_arguments(), bank=torch.empty(0)))
    assert spin.compose_superweights(torch.empty(0), torch.empty(0), [], []).shape == (0,)


def test_piece_ends_where_the_bank_does() -> None:
    arguments = compose_arguments()
    plan = checks.superweight_plan(tuple(PIECES), tuple(SHAPES))
    spin.compose_superweights(**dict(arguments, bank=torch.randn(plan.bank_end)))
    with pytest.raises(ValueError, match=rf"bank of at least {plan.bank_end} elements, got {plan.bank_end - 1}"):
        spin.compose_superweights(**dict(arguments, bank=torch.randn(plan.bank_end - 1)))


def test_hundreds_of_pieces_are_checked_quickly() -> None:
    # 400 layers of two pieces each, and one layer of 400 pieces side by side
    pieces = [n for layer in range(400) for half in (0, 1) for n in (layer, 8 * half, 1, 2, 0, 2 * half, 0, 2, 4, 4)]
    pieces += [n for i in range(400) for n in (400, 0, 1, 2, 0, 0, i, 1, 1, 1)]
    arguments = (torch.randn(32), torch.randn(2), pieces, [4, 4, 1, 1] * 400 + [1, 400, 1, 1])
    assert checks.compose_superweights(*arguments) == 6800
    start = time.perf_counter()
    checks.compose_superweights(*arguments)
    assert time.perf_counter() - start < 0.05


REPEAT: list[tuple[str, Any, type[Exception], str]] = [
    ("weight", torch.randn(2, 3, 3), ValueError, r"\(o, i, kh, kw\), got \(2, 3, 3\)"),
    ("weight", torch.randn(2, 0, 3, 1), ValueError, "at least 1"),
    ("weight", torch.ones(2, 3, 3, 1).int(), TypeError, "torch.int32"),
    ("weight", torch.randn(2, 3, 3, 1).to_sparse(), TypeError, "torch.sparse_coo"),
    ("weight", None, TypeError, "got None"),
    ("alpha", torch.randn(2, 3), ValueError, r"\(3, 3\), got \(2, 3\)"),
    ("alpha", torch.randn(3, 3).half(), TypeError, "torch.float16"),
    ("alpha", None, ValueError, "beside beta, got None"),
    ("beta", torch.randn(3, 3, 1), ValueError, r"\(3, 3\)"),
    ("beta", torch.randn(3, 3, device="meta"), ValueError, "expected a tensor on"),
    ("beta", None, ValueError, "beside alpha, got None"),
    ("gate", torch.randn(5, 7, 3, 1), ValueError, "expected None beside alpha and beta"),
    ("out_channels", 0, ValueError, "at least 1, got 0"),
    ("in_channels", -7, ValueError, "at least 1, got -7"),
]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "gradients"])
def test_repeat_weight(requires_grad: bool) -> None:
    for name, value, error, text in REPEAT:
        arguments = dict(repeat_arguments(requires_grad=requires_grad), **{name: value})
        with pytest.raises(error, match=rf"^{name}: .*{text}"):
            spin.repeat_weight(**arguments)
    for gate, error in ((torch.randn(5, 6, 3, 1), ValueError), (torch.ones(5, 7, 3, 1).bool(), TypeError)):
        with pytest.raises(error, match=r"^gate: expected"):
            spin.repeat_weight(**dict(repeat_arguments("gate"), gate=gate))


def test_backward_operators_check_the_gradient() -> None:
    x = torch.randn(2, 6, 5, 4)
    arguments = mixer_arguments()
    names = ("dw_weight", "dw_bias", "dw_affine", "pw_weight", "pw_bias", "pw_affine", "pw_coefficients", "pw_gain")
    private = (x, *(arguments[n] for n in names), arguments["pw_index"], None, "gelu", False, None)
    for grad in (x[:1], x.double(), x.to("meta")):
        with pytest.raises((ValueError, TypeError), match=r"^grad: expected"):
            checks.mixer_backward(grad, *private)
        for grads in ([grad], [grad.flatten()], [grad, grad]):
            with pytest.raises((ValueError, TypeError), match=r"^grads: expected"):
                checks.composition_backward(grads, *private_composition(compose_arguments()))
        with pytest.raises((ValueError, TypeError), match=r"^grad: expected"):
            checks.repeat_weight_backward(grad, *repeat_arguments().values())
