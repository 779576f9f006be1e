"""Every argument at the edges of its range and beyond: the reference's result, or an ordinary error that names it.

What test_checks.py covers is not repeated here. The private operators only must not crash.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import fuzz
import pytest
import torch
from arguments import compose_arguments, mixer_arguments, repeat_arguments, tensors_of
from torch import Tensor

from spin_kernels import reference

spin = torch.ops.spin
OPERATORS: dict[str, tuple[Any, Callable[..., dict[str, Any]], Callable[..., Tensor]]] = {
    "mixer": (
        spin.shared_mixer_block,
        lambda: mixer_arguments(gain=True, templates=2),
        lambda **a: reference.mixer(**a)[0],
    ),
    "compose": (spin.compose_superweights, compose_arguments, reference.compose_superweights),
    "repeat": (spin.repeat_weight, repeat_arguments, reference.repeat_weight),
    "repeat_gate": (spin.repeat_weight, lambda: repeat_arguments("gate"), reference.repeat_weight),
}

# --- values that are unusual and legal


def negated(t: Tensor) -> Tensor:
    """The same numbers in a tensor with the negative bit set."""
    view = torch.complex(t, -t).conj().imag
    assert view.is_neg()
    return view


def reversed_strides(t: Tensor) -> Tensor:
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def gapped(t: Tensor) -> Tensor:
    larger = torch.full([2 * n for n in t.shape], math.nan)
    view = larger[(slice(1, None, 2),) * t.dim()]
    return view.copy_(t)


LEGAL: dict[str, Callable[[Tensor], Tensor]] = {
    "negative bit": negated,
    "strides reversed": reversed_strides,
    "gaps": gapped,
    "one number": lambda t: torch.tensor(0.3).expand_as(t),
    "parameter": lambda t: torch.nn.Parameter(t),
    "subclass": lambda t: t.as_subclass(type("Subclass", (Tensor,), {})),
    "inference tensor": lambda t: torch.inference_mode()(t.clone)(),
    "zeros": torch.zeros_like,
    "huge": lambda t: t * 1e30,
    "tiny": lambda t: t * 1e-42,
    "NaN": lambda t: torch.full_like(t, math.nan),
    "infinite": lambda t: torch.full_like(t, math.inf),
}


@pytest.mark.parametrize("kind", LEGAL)
@pytest.mark.parametrize("name", OPERATORS)
def test_unusual_tensors(name: str, kind: str) -> None:
    op, draw, ref = OPERATORS[name]
    arguments = draw()
    for key, tensor in tensors_of(arguments).items():
        with torch.no_grad():
            changed = LEGAL[kind](tensor)
            if kind == "huge" and "pw_affine" in arguments and key != "x":
                continue  # the products overflow or not by the order of the sums
            if kind == "infinite" and key in ("dw_weight", "dw_affine"):
                continue  # infinity times the padding's zeros: libraries differ
            got = op(**arguments | {key: changed})
            expected = ref(**arguments | {key: changed.resolve_neg()})
        cancelled = 1e-5 * expected[expected.isfinite()].abs().max().item() if kind == "huge" else 0.0
        torch.testing.assert_close(
            got,
            expected,
            rtol=1e-4,
            atol=1e-4 + cancelled,
            equal_nan=True,
            msg=lambda m: f"{key}: {m}",  # noqa: B023
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("width", [1, 7, 16, 19, 40])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9, 11])
def test_what_is_not_finite_reaches_its_window_only(kernel: int, width: int, value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        shape = {"batch": 1, "channels": 20, "height": 5, "width": width, "kernel": kernel}
        a = mixer_arguments(**shape, depth=1, matrices=1, dtype=dtype)
        a["x"] = a["x"].clone()
        a["x"][..., 2, width // 2] = value
        window = torch.zeros(5, width, dtype=torch.bool)
        pad = kernel // 2
        rows, columns = slice(max(2 - pad, 0), 3 + pad), slice(max(width // 2 - pad, 0), width // 2 + pad + 1)
        window[rows, columns] = True
        y = torch.ops.spin.shared_mixer_block(**a)
        assert torch.isfinite(y).all((0, 1))[~window].all()
        assert not torch.isfinite(y[0, :, 2, width // 2]).any()


def test_no_matrix_is_read_that_no_block_uses() -> None:
    a = mixer_arguments(matrices=3, filters=3, depth=3)
    a |= {"pw_index": [0, 2, 0], "dw_index": [2, 2, 0]}
    expected = spin.shared_mixer_block(**a)
    for name in ("pw_weight", "pw_bias", "dw_weight", "dw_bias"):
        a[name][1] = math.nan
    assert torch.equal(spin.shared_mixer_block(**a), expected)


@pytest.mark.parametrize(
    "shape",
    [
        {"channels": 1, "height": 1, "width": 1, "batch": 1, "kernel": 31},
        {"height": 1, "width": 1, "kernel": 33},
        {"channels": 1, "height": 1, "width": 4000, "kernel": 9},
        {"channels": 1, "height": 4000, "width": 1, "kernel": 31, "depth": 1},
        {"batch": 300, "channels": 2, "height": 1, "width": 1},
        {"depth": 40, "matrices": 40, "channels": 3},
        {"depth": 3, "matrices": 1, "filters": 1},
        {"matrices": 1, "templates": 40},
    ],
    ids=str,
)
def test_edges_of_shapes(shape: dict[str, int]) -> None:
    arguments = mixer_arguments(**shape)
    y = spin.shared_mixer_block(**arguments)
    torch.testing.assert_close(y, reference.mixer(**arguments)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batch", "channels"), [(0, 3), (2, 1), (1, 9000)])
def test_no_blocks_and_no_weights(batch: int, channels: int) -> None:
    x, none = torch.randn(batch, channels, 2, 3), torch.empty(0, channels)
    a = (x, torch.empty(0, channels, 3, 3), none, torch.empty(0, 2, channels))
    for templates, coefficients in ((0, None), (1, torch.empty(0, 1))):
        pw_weight = torch.empty(templates, 1, 1).expand(-1, channels, channels)
        y = spin.shared_mixer_block(*a, pw_weight, none, torch.empty(0, 2, channels), [], pw_coefficients=coefficients)
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr() or not batch


def test_compose_reads_its_windows_only() -> None:
    bank, coefficients = torch.full((40,), math.nan), torch.tensor([math.nan, 2.0, -1.0, math.nan])
    bank[3:5], bank[9:11], bank[23:25], bank[29:31] = torch.randn(4, 2)
    pieces = [0, 3, 20, 2, 1, 0, 0, 2, 2, 6]  # rows of 6, windows of 2, templates 20 apart
    got = spin.compose_superweights(bank, coefficients, pieces, [2, 2, 1, 1])
    expected = torch.cat([2 * bank[i : i + 2] - bank[i + 20 : i + 22] for i in (3, 9)])
    torch.testing.assert_close(got, expected)
    same = spin.compose_superweights(bank, coefficients, [0, 3, 0, 2, 1, 0, 0, 1, 2, 2], [1, 2, 1, 1])
    torch.testing.assert_close(same, bank[3:5])  # stride 0: one template twice, 2 - 1


def test_repeat_weight_smaller_than_its_base_and_saturated() -> None:
    weight = torch.randn(4, 5, 3, 3)
    torch.testing.assert_close(spin.repeat_weight(weight, None, None, None, 3, 2), weight[:3, :2])
    alpha, beta = torch.tensor([[2.0]]), torch.tensor([[1e30]])
    got = spin.repeat_weight(weight, alpha, beta, None, 4, 5)
    torch.testing.assert_close(got, torch.where(weight < 0, 2 * weight, 0.0))


# --- values that are wrong

WRONG: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda t: t.to(torch.complex64),
    "integer": lambda t: t.to(torch.uint16),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t) if t.dim() > 1 else [t]),
    "jagged": lambda t: torch.nested.nested_tensor(list(t) if t.dim() > 1 else [t], layout=torch.jagged),
    "CSR": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "no dimension": lambda t: t.flatten()[0],
    "too many dimensions": lambda t: t.reshape(1, 1, 1, *t.shape),
    "empty": lambda t: t[..., :0],
    "one too many": lambda t: torch.cat([t, t[..., :1]], -1),
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy(),
    "number": lambda t: 1.5,
    "text": lambda t: "x",
    "object": lambda t: object(),
}


def assert_refused(op: Any, arguments: dict[str, Any], name: str, names: tuple[str, ...] = ()) -> None:
    """Any of `names` may be blamed, where it is a matter of opinion which argument is the wrong one."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        op(**arguments)
    assert not isinstance(caught.value, NotImplementedError), f"{name}: {str(caught.value)[:200]}"
    assert any(re.search(rf"\b{n}\b", str(caught.value)) for n in (name, *names)), (
        f"{name} is not in: {str(caught.value)[:200]}"
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", OPERATORS)
def test_wrong_tensors(name: str, kind: str) -> None:
    op, draw, _ = OPERATORS[name]
    arguments = draw()
    for key, tensor in tensors_of(arguments).items():
        if kind in ("empty", "one too many") and key in ("coefficients", "bank", "weight", "x"):
            continue  # legal, or the pieces are to blame
        siblings = ("dw_weight", "pw_weight") if kind == "one too many" else ()
        assert_refused(op, arguments | {key: WRONG[kind](tensor)}, key, siblings)


VALUES: dict[str, dict[str, list[Any]]] = {
    "mixer": {
        "pw_index": [None, 5, "ab", {}, object(), [0.5, 1, 0], torch.tensor([0.5, 1, 0]), [[0, 1, 0]], [None] * 3]
        + [[0, 1, big] for big in (2**63, 2**64, -(2**63))],
        "dw_index": [5, "ab", [0.5, 1, 0], [None] * 3, [0, 1, 2**64], [0, 1, -(2**63)], [], [0, 1, 2, 0]],
        "activation": [None, 3, "", "GELU", "gelu\0", "gelu ", "ge", "ü" * 1000, ["gelu"]],
        "pw_residual": ["yes", [True], object()],
    },
    "compose": {
        "pieces": [None, 5, "x", [0.5] * 10, [None] * 10, [2**64] * 10, [2**63 - 1] * 10, [-(2**63)] * 10, [0] * 10],
        "shapes": [None, 5, [0.5] * 8, [2**64] * 8, [-(2**63)] * 8, [2**63 - 1] * 8],
    },
    "repeat": {
        "out_channels": [None, 2.5, "3", [5], -(2**63), 2**64, 2**40, 2**62, 2**63 - 1],
        "in_channels": [None, 2.5, "3", [5], -(2**63), 2**64, 2**40, 2**62, 2**63 - 1],
    },
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, table in VALUES.items() for key in table])
def test_wrong_values(name: str, key: str) -> None:
    op, draw, _ = OPERATORS[name]
    for value in VALUES[name][key]:
        # alpha and beta have an entry per tile: with another size they are as wrong
        assert_refused(op, draw() | {key: value}, key, ("alpha",))


@pytest.mark.parametrize("key", ["out_channels", "in_channels"])
@pytest.mark.parametrize("size", [2**40, 2**62, 2**63 - 1])
def test_weights_too_large_for_any_memory(key: str, size: int) -> None:
    assert_refused(spin.repeat_weight, repeat_arguments("none") | {key: size}, key, ("memory",))


@pytest.mark.parametrize("shape", [(2**40, 1, 1, 1), (1, 1, 2**40, 1), (2**62, 1, 1, 1)])
def test_inputs_too_large_for_any_memory(shape: tuple[int, ...]) -> None:
    a = mixer_arguments(channels=1, kernel=1)
    assert_refused(spin.shared_mixer_block, a | {"x": torch.zeros(1, 1, 1, 1).expand(shape)}, "x", ("memory",))


# --- private operators: see fuzz.py


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork and limits of Linux")
@pytest.mark.parametrize("part", fuzz.PARTS)
def test_private_operators_survive(part: str) -> None:
    seed = int(torch.randint(2**31, ()))
    command = [sys.executable, "-W", "ignore", fuzz.__file__, part, str(seed)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"seed {seed}: {done.stdout[-500:]} {done.stderr[-2000:]}"
    assert lines[-1].endswith("calls"), lines
    assert len(lines) == 1, f"seed {seed}, {len(lines) - 1} of {lines[-1]}:\n" + "\n".join(lines[:20])


def test_a_blob_at_an_odd_address_gives_the_same_bits() -> None:
    packed, calls = fuzz.blobs()
    for name, blob in packed.items():
        op, arguments = calls[name](blob)
        expected = op(*arguments)
        for offset in (1, 2, 8):
            moved = torch.cat([blob.new_empty(offset), blob])[offset:]
            op, arguments = calls[name](moved)
            assert torch.equal(op(*arguments), expected), (name, offset)
