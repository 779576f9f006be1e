"""Private operators called with garbage, each call in a process of its own: ``python fuzz.py <part> <seed>`` prints
the calls that kill theirs, and at last their number. They trust their arguments more than the public ones do, but no
input may crash a process.
"""

import math
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from arguments import mixer_arguments
from torch import Tensor

import spin_kernels  # noqa: F401  (registers the operators)

spin = torch.ops.spin
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = ("dw_weight", "dw_bias", "dw_affine", "pw_weight", "pw_bias", "pw_affine", "pw_coefficients", "pw_gain")


def private(a: dict[str, Any]) -> list[Any]:
    return [*(a[name] for name in WEIGHTS), a["pw_index"], a["dw_index"], "gelu", False]


def mangled_tensor(t: Tensor, rng: random.Random) -> Any:
    axis = rng.randrange(t.dim())
    return rng.choice(
        [
            lambda: t.narrow(axis, 0, rng.randrange(t.shape[axis] + 1)),
            lambda: torch.cat([t, t], axis),
            lambda: t.unsqueeze(axis),
            lambda: t.flatten()[:5],
            lambda: t.flatten(),
            lambda: t.new_empty(0),
            lambda: t.new_empty(()),
            lambda: t.new_empty([0] * t.dim()),
            lambda: t.to(rng.choice([torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.bool])),
            lambda: t.to(rng.choice([torch.complex64, torch.float8_e5m2])),
            lambda: t.to("meta"),
            lambda: t.to_sparse(),
            lambda: t.transpose(0, -1),
            lambda: t.expand(2, *t.shape),
            lambda: t * math.nan,
            lambda: None,
        ]
    )()


def mangled(arguments: list[Any], rng: random.Random) -> list[Any]:
    arguments = list(arguments)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(arguments))
        value = arguments[place]
        if (
            isinstance(value, Tensor)
            and value.dim()
            and value.dtype in FLOATS
            and value.layout is torch.strided
            and value.is_cpu
        ):
            arguments[place] = mangled_tensor(value, rng)
        elif isinstance(value, list):
            arguments[place] = rng.choice([[], value[:-1], [*value, 0], [-1] * len(value), [2**62] * len(value), None])
        elif isinstance(value, str):
            arguments[place] = rng.choice(["", "relu6", "gelu\0", "x" * 10**6])
        elif isinstance(value, int):
            arguments[place] = rng.choice([0, -1, 2**31, 2**62, -(2**63), 1024, 1025])
        else:
            arguments[place] = rng.choice([None, torch.randn(3), torch.randn(2, 6), torch.randn(2, 2)])
    return arguments


def garbage_calls(rng: random.Random) -> Iterator[tuple[Any, list[Any], str]]:
    for number in range(200):
        a = mixer_arguments(templates=rng.choice([None, 2]), gain=True, filters=rng.choice([None, 2]))
        ends = [torch.randn(6, 3, 2, 2), torch.randn(6), torch.randn(2, 6), 2, 0, torch.randn(5, 6), torch.randn(5)]
        for op, arguments in (
            (spin._mixer_cpu, [a["x"], *private(a)]),
            (spin._pack_mixer, private(a)),
            (spin._pack_network, [*ends, *private(a)]),
        ):
            yield op, mangled(arguments, rng), f"garbage {number}"
    a = mixer_arguments(templates=2)  # no template at all
    a |= {"pw_weight": torch.empty(0, 6, 6), "pw_coefficients": torch.empty(2, 0)}
    yield spin._mixer_cpu, [a["x"], *private(a)], "no template"
    yield spin._pack_mixer, private(a), "no template"


def blobs() -> tuple[dict[str, Tensor], dict[str, Callable[[Tensor], tuple[Any, list[Any]]]]]:
    """Frozen networks, and how each is called."""
    a = mixer_arguments(filters=2)
    ends = [torch.randn(6, 3, 4, 4), torch.randn(6), torch.randn(2, 6), 4, 0, torch.randn(5, 6), torch.randn(5)]
    image = torch.randn(2, 3, 12, 12)
    packed = {"mixer": spin._pack_mixer(*private(a)), "network": spin._pack_network(*ends, *private(a))}
    return packed, {
        "mixer": lambda blob: (spin._frozen_mixer, [a["x"], blob]),
        "network": lambda blob: (spin._frozen_network, [image, blob, 5]),
    }


HEADER = 256  # bytes: more than a header and the indices have
WORDS = (0, 1, 2, 3, 31, 32, 8192, 2**20, 2**31, 2**62, 2**63 - 1, -1, -(2**63))


def blob_calls(rng: random.Random) -> Iterator[tuple[Any, list[Any], str]]:
    packed, calls = blobs()
    for name, blob in packed.items():
        call = calls[name]
        assert not call(blob)[0](*call(blob)[1]).isnan().any()
        for size in [*range(0, HEADER, 5), blob.numel() // 2, blob.numel() - 64, blob.numel() - 1]:
            yield *call(blob[:size].clone()), f"{name} truncated to {size}"
        yield *call(torch.cat([blob, blob])), f"{name} twice"
        yield *call(torch.randint(256, blob.shape, dtype=torch.uint8)), f"{name} random"
        for number in range(10):
            noise = blob.clone()
            noise[8 + number :] = torch.randint(256, blob[8 + number :].shape, dtype=torch.uint8)
            yield *call(noise), f"{name} random after {8 + number} bytes"
        for _ in range(300):
            flipped, place, mask = blob.clone(), rng.randrange(HEADER), rng.randrange(1, 256)
            flipped[place] ^= mask
            yield *call(flipped), f"{name} byte {place} ^ {mask}"
        for place in range(0, HEADER, 8):
            for word in WORDS:
                changed = blob.clone()
                changed[place : place + 8] = torch.tensor([word]).view(torch.uint8)
                yield *call(changed), f"{name} word {place // 8} = {word}"
        yield *call(blob.view(torch.int8)), f"{name} int8"
        yield *call(blob.float()), f"{name} float"
        yield *call(blob.reshape(-1, 64)), f"{name} in two dimensions"
        yield *call(blob.to("meta")), f"{name} meta"
        yield *call(torch.stack([blob, blob], 1)[:, 0]), f"{name} with gaps"
    network, mixer = packed["network"], packed["mixer"]
    yield spin._frozen_mixer, [torch.randn(2, 6, 5, 4), network], "network as a mixer"
    yield spin._frozen_network, [torch.randn(2, 3, 12, 12), mixer, 5], "mixer as a network"
    for classes in (0, -1, 4, 6, 2**31, 2**62):
        yield spin._frozen_network, [torch.randn(2, 3, 12, 12), network, classes], f"{classes} classes"
    for shape in (
        (2, 3, 0, 0),
        (2, 3, 1, 1),
        (2, 3, 3, 12),
        (2, 3, 12, 3),
        (0, 3, 12, 12),
        (0, 3, 0, 0),
        (2, 2, 12, 12),
    ):
        yield spin._frozen_network, [torch.randn(shape), network, 5], f"image {shape}"
    for x in (torch.randn(2, 7, 5, 4), torch.randn(2, 6, 0, 4), torch.randn(6, 5, 4), torch.randn(2, 6, 5, 4).double()):
        yield spin._frozen_mixer, [x, mixer], f"x {tuple(x.shape)} {x.dtype}"
    for shape in ((2**40, 6, 1, 1), (1, 6, 2**30, 2**30)):
        yield spin._frozen_mixer, [torch.zeros(1).expand(shape), mixer], f"x {shape}"


PARTS = {"garbage": garbage_calls, "blobs": blob_calls}


def dies(op: Any, arguments: list[Any]) -> str:
    """How a process that makes this call ends, if not by returning or by an ordinary exception."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            op(*arguments)
        except (ValueError, TypeError, RuntimeError, MemoryError):
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, str(error)[:100], flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return "" if os.WEXITSTATUS(status) == 0 else f"exit code {os.WEXITSTATUS(status)}"


def fuzz(part: str, seed: int) -> None:
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    torch.manual_seed(seed)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)  # a wrong size fails soon
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    calls = 0
    for op, arguments, what in PARTS[part](random.Random(seed)):
        calls += 1
        if end := dies(op, arguments):
            described = [tuple(v.shape) if isinstance(v, Tensor) else str(v)[:40] for v in arguments]
            print(f"{end}: {op} {what} {described}", flush=True)
    print(f"{calls} calls")


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]))
