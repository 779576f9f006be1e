"""The Hopper mixer without a GPU: what its warps do (csrc/cuda/mixer_roles.h) on the emulated cluster of tests/hopper.

The emulator knows the instructions and nothing of the code that uses them. It runs the threads in an order drawn from a
seed, lets copies come late, and stops at races, deadlocks and whatever else the hardware would take amiss; damaged
operations show that it does. SPIN_TEST_SEED=<seed> repeats a run.
"""

import ctypes
import fcntl
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_reference import ACTIVATIONS, SEED, Array, decode, encode, erf, generator, rounded

from spin_kernels.dispatch import hopper_images

SOURCES = Path(__file__).parent / "hopper"
NAMES = list(ACTIVATIONS)  # in the order of mixer_shape.h
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half a unit in the last place
PLACES, ROWS, STEP, CLUSTER = 256, 128, 64, 2  # mixer_shape.h's

NUMBERS = [
    "bfloat16", "kernel", "compiled_width", "batch", "height", "width", "channels", "matrices", "matrix", "clusters",
    "product", "depthwise", "residual", "activation",
]  # fmt: skip
POINTERS = ["tokens", "weights", "pw_bias", "taps", "dw_bias", "more", "gain", "pw_affine", "dw_affine", "out"]


class HopperLaunch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in NUMBERS),
        ("seed", ctypes.c_uint32),
        ("damage", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in POINTERS),
    ]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Built once per session, also where several processes share it."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder
    library = folder / "emulator.so"
    with open(folder / "emulator.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-o", str(library)]
            done = subprocess.run([compiler, *flags, str(SOURCES / "emulator.cpp")], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    lib = ctypes.CDLL(str(library))
    lib.hopper_damage.restype = ctypes.c_char_p
    return lib


# --- launches

CASE = {
    "dtype": "bfloat16", "kernel": 3, "B": 3, "H": 16, "W": 16, "C": 200, "clusters": 1, "compiled": 0,
    "product": True, "depthwise": True, "residual": False, "activation": "gelu", "bias": True, "gain": True,
    "matrices": 2, "matrix": 1,
}  # fmt: skip


def drawn(**changes: Any) -> dict[str, Any]:
    """A launch's arguments: those of CASE but for the changes, and tensors."""
    assert changes.keys() <= CASE.keys()
    a = CASE | changes
    rng = generator("hopper", *(f"{name}={value}" for name, value in changes.items()))
    B, H, W, C, k = (a[name] for name in ("B", "H", "W", "C", "kernel"))

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0, dtype: str = a["dtype"]) -> Array:
        return encode(rng.standard_normal(shape, np.float32) * np.float32(scale) + np.float32(shift), dtype)

    vector = partial(normal, dtype="float32")
    return a | {
        "tokens": normal(B, H, W, C),
        "weights": normal(a["matrices"], C, C, scale=C**-0.5),
        "pw_bias": normal(C, scale=0.5) if a["bias"] else None,
        "taps": normal(k, k, C, scale=1 / k),
        "dw_bias": normal(C, scale=0.5) if a["bias"] else None,
        "more": normal(B, H, W, C) if a["residual"] else None,
        "gain": vector(C, scale=0.3, shift=1.0) if a["gain"] else None,
        "pw_affine": vector(2, C, scale=0.5, shift=0.3),
        "dw_affine": vector(2, C, scale=0.5, shift=0.3),
    }


def launch(emulator: ctypes.CDLL, a: dict[str, Any], seed: int, damage: str = "none") -> tuple[str, Array]:
    """What the emulator found wrong, and the output."""
    out = encode(np.full(a["tokens"].shape, np.nan), a["dtype"])
    numbers = {
        "bfloat16": a["dtype"] == "bfloat16", "kernel": a["kernel"], "compiled_width": a["compiled"], "batch": a["B"],
        "height": a["H"], "width": a["W"], "channels": a["C"], "activation": NAMES.index(a["activation"]),
    }  # fmt: skip
    # Taps come in panels of 64 channels, zeros past the last.
    panels = -(-a["C"] // STEP)
    taps = np.zeros((a["kernel"] ** 2, panels * STEP), a["taps"].dtype)
    taps[:, : a["C"]] = a["taps"].reshape(-1, a["C"])
    taps = np.ascontiguousarray(taps.reshape(-1, panels, STEP).swapaxes(0, 1))
    tensors = {name: {"out": out, "taps": taps}.get(name, a.get(name)) for name in POINTERS}
    call = HopperLaunch(
        *(int(numbers.get(name, a.get(name))) for name in NUMBERS),
        seed,
        damage.encode(),
        *(None if tensor is None else tensor.ctypes.data for tensor in tensors.values()),
    )
    message = ctypes.create_string_buffer(1200)
    code = emulator.hopper_launch(ctypes.byref(call), message, len(message))
    assert code != 2, message.value
    return message.value.decode(), out


def reference(a: dict[str, Any], round_to: Callable[[Array], Array] = lambda x: x) -> Array:
    """In float64; `round_to` rounds what the kernel keeps in two bytes: pre-activations, x, the output, and in rows of
    7 or more bfloat16 taps the sum after each."""
    w = {name: decode(value) for name, value in a.items() if isinstance(value, np.ndarray)}
    act, k = ACTIVATIONS[a["activation"]], a["kernel"]
    round_tap = round_to if a["dtype"] == "bfloat16" and k >= 7 else lambda x: x
    x = w["tokens"]
    if a["product"]:
        v = round_to(x @ w["weights"][a["matrix"]].T * w.get("gain", 1.0) + w.get("pw_bias", 0.0))
        x = act(v) * w["pw_affine"][0] + w["pw_affine"][1]
        x = round_to(x + w["more"] if a["residual"] else x)
    if a["depthwise"]:
        height, width = x.shape[1:3]
        padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
        u = np.zeros_like(x) + w.get("dw_bias", 0.0)
        for i in range(k):
            row = np.zeros_like(x)
            for j in range(k):
                row = round_tap(row + padded[:, i : i + height, j : j + width] * w["taps"][i, j])
            u += row
        x = round_to(x + act(u) * w["dw_affine"][0] + w["dw_affine"][1])
    return x


def wrong(a: dict[str, Any], out: Array) -> str:
    """Empty if the output is as near to the exact one as rounding only what must be rounded would have it: within 1.5
    times the norm of that error, and 2 times its largest and half a unit of the largest value at any place."""
    exact = reference(a)
    plain = np.abs(reference(a, partial(rounded, dtype=a["dtype"])) - exact)
    error = np.abs(decode(out) - exact)
    if not np.isfinite(error).all():
        return f"not finite: {np.argwhere(~np.isfinite(error))[:3].tolist()}"
    all_of_it, norm = np.linalg.norm(exact), np.linalg.norm(plain)
    if np.linalg.norm(error) > 1.5 * norm:
        return f"relative error {np.linalg.norm(error) / all_of_it}, of rounding {norm / all_of_it}"
    most = 2 * plain.max() + UNIT[a["dtype"]] * np.abs(exact).max()
    return f"error {error.max()} of at most {most} at {error.argmax()}" if error.max() > most else ""


def check(emulator: ctypes.CDLL, **changes: Any) -> None:
    a = drawn(**changes)
    message, out = launch(emulator, a, SEED)
    assert message == ""
    assert wrong(a, out) == ""


CASES: list[dict[str, Any]] = [
    # every kernel size for both types, with the width known and not
    *(
        {"dtype": dtype, "kernel": kernel, "compiled": compiled, "activation": activation, "C": C}
        for (dtype, kernel, compiled), activation, C in zip(
            itertools.product(UNIT, (3, 5, 7, 9), (0, 16)), itertools.cycle(NAMES), itertools.cycle((200, 136, 264)),
            strict=False,
        )
    ),
    # every activation with every optional argument there or not
    *(
        {"activation": name, "residual": residual, "bias": bias, "gain": gain, "H": 7, "W": 7, "B": 5, "dtype": dtype}
        for name, (residual, bias, gain, dtype) in zip(
            itertools.cycle(NAMES), itertools.product((True, False), (True, False), (True, False), UNIT), strict=False
        )
    ),
    # planes: padded rows, half an image per box, one row, many images per tile
    *(
        {"H": H, "W": W, "kernel": kernel, "B": B, "residual": True, "dtype": dtype}
        for (H, W, kernel, B), dtype in zip(
            (
                (14, 14, 3, 2), (14, 14, 9, 1), (7, 7, 5, 3), (15, 13, 7, 2), (13, 16, 9, 2), (1, 40, 9, 4),
                (32, 1, 7, 3), (20, 8, 5, 2), (32, 8, 9, 1), (2, 128, 3, 1), (4, 48, 5, 2), (3, 64, 9, 1),
                (2, 3, 9, 17), (1, 1, 3, 35), (1, 128, 9, 3), (10, 24, 7, 1), (16, 9, 3, 3), (31, 7, 3, 1),
            ),
            itertools.cycle(UNIT), strict=False,
        )
    ),
    # channels: a step, a block or a cluster more or less, and a width that is known
    *({"C": C, "B": 1, "compiled": 16} for C in (8, 56, 64, 72, 128, 136, 184, 192, 256, 320, 392)),
    # clusters with several tiles each, one and none
    *({"C": 264, "B": 4, "clusters": clusters, "compiled": 16} for clusters in (1, 2, 3, 8, 9)),
    # halves of a launch
    *({"product": False, "kernel": kernel, "compiled": compiled, "C": 264} for kernel, compiled in ((3, 16), (9, 0))),
    *({"product": False, "H": 7, "W": W, "B": 9, "C": 136, "dtype": "float16"} for W in (7, 13)),
    *({"depthwise": False, "residual": residual, "C": 264} for residual in (True, False)),
    *({"depthwise": False, "H": 7, "W": W, "B": 9, "C": 136, "dtype": "float16"} for W in (7, 13)),
]  # fmt: skip


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: "-".join(f"{k}{v}" for k, v in changes.items()))
def test_launch(emulator: ctypes.CDLL, changes: dict[str, Any]) -> None:
    check(emulator, **changes)


@pytest.mark.parametrize("i", range(12))
def test_random_launch(emulator: ctypes.CDLL, i: int) -> None:
    rng = generator("random hopper", i)
    kernel, H = int(rng.choice((3, 5, 7, 9))), int(rng.integers(1, 33))
    W = int(rng.integers(1, PLACES // (H + H % 2) // 8 * 8 + 1))
    check(
        emulator, kernel=kernel, H=H, W=W, B=int(rng.integers(1, 4)), C=8 * int(rng.integers(1, 42)),
        clusters=int(rng.integers(1, 4)), compiled=16 * (W == 16 and bool(rng.integers(2))),
        dtype=str(rng.choice(list(UNIT))), activation=str(rng.choice(NAMES)), residual=bool(rng.integers(2)),
        bias=bool(rng.integers(2)), gain=bool(rng.integers(2)), matrix=int(rng.integers(2)),
    )  # fmt: skip


# --- schedules and damage

MODES: dict[str, dict[str, Any]] = {
    "both": {},
    "product": {"depthwise": False},
    "depthwise": {"product": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_schedules(emulator: ctypes.CDLL, mode: str) -> None:
    """No order of the threads and copies changes a bit."""
    a = drawn(C=136, H=14, W=14, B=4, **MODES[mode])
    outputs = set()
    for seed in range(SEED, SEED + 12):
        message, out = launch(emulator, a, seed % 2**32)
        assert message == "", seed
        outputs.add(out.tobytes())
    assert len(outputs) == 1
    assert wrong(a, out) == ""


DAMAGE = {
    "both": [
        "skip_full", "skip_empty", "skip_planes_full", "skip_planes_empty", "skip_panel", "skip_warp",
        "skip_convergence", "skip_fence", "skip_commit", "skip_products", "skip_older_products", "early_release",
        "own_release", "own_empty", "skip_remote_arrival", "skip_arrival", "two_arrivals", "half_bytes", "no_bytes",
        "parity_full", "parity_empty", "parity_planes_full", "parity_planes_empty", "unicast", "shifted_copy",
        "shifted_column", "descriptor_stride", "descriptor_swizzle", "descriptor_address", "step_added",
        "not_transposed", "start_apart", "end_apart",
    ],
    "product": [
        "skip_full", "own_release", "skip_planes_full", "skip_planes_empty", "skip_warp", "skip_arrival",
        "two_arrivals", "parity_planes_full",
    ],
    "depthwise": [
        "skip_planes_full", "skip_planes_empty", "skip_warp", "skip_arrival", "half_bytes", "no_bytes",
        "parity_planes_full", "parity_planes_empty", "shifted_copy", "start_apart", "skip_copy_fence",
    ],
}  # fmt: skip


def test_every_damage_is_tried(emulator: ctypes.CDLL) -> None:
    names = itertools.takewhile(bool, map(emulator.hopper_damage, itertools.count()))
    assert {name.decode() for name in names} == {"none"}.union(*DAMAGE.values())


@pytest.mark.parametrize(("mode", "damage"), [(mode, damage) for mode in MODES for damage in DAMAGE[mode]])
def test_damage(emulator: ctypes.CDLL, mode: str, damage: str) -> None:
    """Every order of the threads shows it, not only an unlucky one."""
    a = drawn(**MODES[mode])
    for seed in range(SEED, SEED + 3):
        message, out = launch(emulator, a, seed % 2**32, damage)
        message = message or wrong(a, out)
        print(damage, message)
        assert message, seed


# --- maps


def integers(count: int, call: Callable[..., Any], *arguments: int) -> list[int]:
    got = np.full(count, -1, np.int32)
    call(*arguments, got.ctypes.data_as(ctypes.c_void_p))
    return got.tolist()


def test_geometry(emulator: ctypes.CDLL) -> None:
    supported = 0
    for H, W in itertools.product(range(259), range(259)):
        got = integers(13, emulator.hopper_geometry, H, W)
        padded = (W + 7) // 8 * 8
        images = 2 * (PLACES // (2 * H * padded)) if H and W else 0
        if H and W and not images and (H + 1) // 2 * 2 * padded <= PLACES:
            images = 1  # in halves
        assert got[2] == images, (H, W)
        if H and W:
            assert hopper_images(H, W) == images, (H, W)  # the dispatcher's
        if not images:
            continue
        supported += 1
        rows = H if images > 1 else (H + 1) // 2 * 2
        box_images, box_rows = (images // 2, H) if images > 1 else (1, rows // 2)
        places = images * rows * padded
        assert got[:9] == [H, W, images, rows, padded, box_images, box_rows, places, places * STEP]
        assert places <= PLACES
        assert places % 16 == 0  # of which an instruction stores as many
        assert max(padded, box_rows, box_images) <= 256  # the most of a box
        assert places // 2 * 2 * STEP % 1024 == 0  # the second box begins with a pattern of the swizzle
        # The lines of a box come image by image, row by row: those of both are the tile's places in order.
        lines = []
        for box in range(2):
            image, row, column = np.indices((box_images, box_rows, padded)).reshape(3, -1)
            lines.append(((image + got[11 + box]) * rows + row + got[9 + box]) * padded + column)
        assert (np.concatenate(lines) == np.arange(places)).all(), (H, W)
    assert supported == sum((H + 1) // 2 * 2 * ((W + 7) // 8 * 8) <= PLACES or 2 * H * ((W + 7) // 8 * 8) <= PLACES
                            for H, W in itertools.product(range(1, 257), range(1, 257)))  # fmt: skip


def test_tiles(emulator: ctypes.CDLL) -> None:
    """Blocks of a cluster have neighbouring rows of the same images; all images and rows come once."""
    for (H, W), batch, channels in itertools.product(
        ((16, 16), (7, 7), (14, 14), (1, 1)), (1, 2, 3, 7, 64), (128, 136, 256, 264, 512, 768, 1536, 2048)
    ):
        images = integers(13, emulator.hopper_geometry, H, W)[2]
        groups, pairs = -(-batch // images), -(-channels // (CLUSTER * ROWS))
        got = np.full(2 + 4 * groups * pairs, -1, np.int32)
        emulator.hopper_tiles(H, W, batch, channels, got.ctypes.data_as(ctypes.c_void_p), len(got))
        assert got[:2].tolist() == [-(-channels // STEP), groups * pairs]
        tiles = got[2:].reshape(groups * pairs, CLUSTER, 2)
        assert (tiles[:, 1] - tiles[:, 0] == [ROWS, 0]).all()
        expected = itertools.product(range(0, groups * images, images), range(0, pairs * CLUSTER * ROWS, ROWS))
        assert sorted((image, row) for row, image in tiles.reshape(-1, 2).tolist()) == list(expected)


def test_shared_memory(emulator: ctypes.CDLL) -> None:
    got = np.full(100, -1, np.int32)
    count = emulator.hopper_shared_memory(got.ctypes.data_as(ctypes.c_void_p))
    *places, total = got[:count].tolist()
    buffers = list(zip(places[::2], places[1::2], strict=True))
    sizes = [end - begin for begin, end in buffers]
    assert sizes == [ROWS * 2 * STEP, PLACES * 2 * STEP] * 3 + [PLACES * 2 * STEP] * 2 + [8 * 8]
    assert all(begin % 1024 == 0 for begin, _ in buffers[:-1])
    assert buffers[-1][0] % 8 == 0
    ordered = sorted(buffers)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ordered))
    assert ordered[0][0] == 0
    assert ordered[-1][1] + 1023 <= total <= 227 * 1024  # wherever it begins
    assert integers(8, emulator.hopper_barriers, 1) == [1, 1, 1, 16, 16, 16, 8, 8]
    assert integers(8, emulator.hopper_barriers, 0) == [1, 1, 1, 16, 16, 16, 1, 8]


def test_places(emulator: ctypes.CDLL) -> None:
    """The swizzle is of address bits, also before a line; a warpgroup's sums are each of one thread."""
    for line, chunk in itertools.product(range(-16, 300), range(8)):
        address = 128 * (line + 16) + 16 * chunk
        assert emulator.hopper_swizzled(line, chunk) == (address ^ (address >> 7 & 7) << 4) - 128 * 16
    seen = np.zeros((64, PLACES), int)
    for thread, i in itertools.product(range(128), range(128)):
        row, column = divmod(emulator.hopper_sum(thread, i), 1 << 16)
        # "Register Fragments" of wgmma: d0 and d1 beside each other, d2 and d3 eight rows below.
        assert row == 16 * (thread // 32) + thread % 32 // 4 + (8 if i % 4 >= 2 else 0)
        assert column == 8 * (i // 4) + 2 * (thread % 4) + i % 2
        seen[row, column] += 1
    assert (seen == 1).all()


def activated(emulator: ctypes.CDLL, name: str, x: Array) -> Array:
    values = np.array(x, np.float32)
    emulator.hopper_activate(NAMES.index(name), values.ctypes.data_as(ctypes.c_void_p), values.size)
    return values


@pytest.mark.parametrize(
    ("name", "most"), [("gelu", 6e-5), ("gelu_tanh", 2e-6), ("silu", 2e-6), ("relu", 0.0), ("identity", 0.0)]
)
def test_activation(emulator: ctypes.CDLL, name: str, most: float) -> None:
    x = np.concatenate([np.linspace(-30, 30, 60001), generator("activation", name).uniform(-6, 6, 20000)])
    x = x.astype(np.float32).astype(np.float64)
    got = activated(emulator, name, x)
    assert (np.abs(got - ACTIVATIONS[name](x)) <= most * np.maximum(1, np.abs(x) / 4)).all()
    assert np.isnan(activated(emulator, name, [np.nan])).all()
    far = np.float32([30.0, 1e4, 1e30])
    np.testing.assert_allclose(activated(emulator, name, far), far, rtol=2e-6)
    if name != "identity":
        left = activated(emulator, name, -np.geomspace(100, 1e30, 1000))
        assert (left == 0).all()


def test_gelu_left_of_its_polynomial(emulator: ctypes.CDLL) -> None:
    left = activated(emulator, "gelu", -np.concatenate([np.linspace(4.5, 40, 10001), np.geomspace(4.5, 3e38, 1001)]))
    assert (left == 0).all()
    x = -np.linspace(0, 4.5, 20001)
    assert (activated(emulator, "gelu", x) <= 0).all()  # never of the wrong sign
    assert abs(0.5 * 4.5 * (1 + erf(-4.5 / np.sqrt(2)))) < 2e-5  # what is lost there
