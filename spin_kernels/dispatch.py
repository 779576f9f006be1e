"""Which backend serves a call: one table, one environment variable (SPIN_BACKEND), one explanation."""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library, checks

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Limits of the CPU kernels: accumulators and tables they keep on the stack.
CPU_MAX_CHANNELS = 8192
CPU_MAX_KERNEL_SIZE = 31

# Tensor arguments of the private mixer operators, in their order, and which of them autocast casts.
MIXER_TENSORS = (
    "x", "dw_weight", "dw_bias", "dw_affine", "pw_weight", "pw_bias", "pw_affine", "pw_coefficients", "pw_gain",
)  # fmt: skip
_AUTOCAST = tuple(name in ("x", "dw_weight", "dw_bias", "pw_weight", "pw_bias") for name in MIXER_TENSORS)

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Kernel(NamedTuple):
    """A kernel other than the reference: when it can serve a call (refusal returns None), and why it then does."""

    backend: str
    name: str
    refusal: Callable[[Sequence[Any]], str | None]
    reason: str


class Choice(NamedTuple):
    backend: str
    kernel: str
    reason: str


def _cpu_mixer_refusal(args: Sequence[Any]) -> str | None:
    x, dw_weight = args[:2]
    if x.device.type != "cpu":
        return "x is not on the CPU"
    if x.dtype not in _NARROW:
        return "x is float64"
    if x.shape[1] > CPU_MAX_CHANNELS:
        return f"x has more than {CPU_MAX_CHANNELS} channels"
    if dw_weight.shape[-1] > CPU_MAX_KERNEL_SIZE:
        return f"dw_weight is larger than {CPU_MAX_KERNEL_SIZE} x {CPU_MAX_KERNEL_SIZE}"
    return None


def _cpu_weights_refusal(args: Sequence[Any]) -> str | None:
    """Of the operators that make weights: their first tensor is what they make them of."""
    if args[0].device.type != "cpu":
        return "the weights are not on the CPU"
    return None if args[0].dtype in _NARROW else "the weights are float64"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_refusal(tensor: Tensor, name: str) -> str | None:
    """Of any operator, by its first tensor."""
    if not has_triton():
        return "triton is not installed"
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and _triton_interprets()):
        return f"{name} not on a GPU and Triton's interpreter is off (TRITON_INTERPRET=1)"
    return None if tensor.dtype in _NARROW else f"{name} float64"


def _triton_mixer_refusal(args: Sequence[Any]) -> str | None:
    x = args[0]
    if refusal := _triton_refusal(x, "x is"):
        return refusal
    if x.dtype == torch.bfloat16 and _triton_interprets():
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    if x.shape[1] * max(x.shape[1], x.shape[2] * x.shape[3]) >= 2**31:
        return "an image or a matrix has more than 2^31 values, offsets in which are 32-bit"
    return None


# Of the Hopper kernel (csrc/cuda/mixer_shape.h): what its tiles, of 128 channels, can hold.
HOPPER_CHANNELS = (8, 2048)
HOPPER_KERNEL_SIZES = (3, 5, 7, 9)
HOPPER_PLACES = 256  # for tokens, rows padded to groups of 8
HOPPER_TILES = 64  # below, half of the GPU is idle, and smaller tiles win


def hopper_images(height: int, width: int) -> int:
    """How many images a tile of the Hopper kernel holds, as geometry_of() there; 0: the plane is too large."""
    columns = -(-width // 8) * 8
    return 2 * (HOPPER_PLACES // (2 * height * columns)) or int((height + height % 2) * columns <= HOPPER_PLACES)


def _hopper_refusal(args: Sequence[Any]) -> str | None:
    x, dw_weight, pw_index = args[0], args[1], args[len(MIXER_TENSORS)]
    (batch, channels, height, width), kernel = x.shape, dw_weight.shape[-1]
    if x.device.type != "cuda":
        return "x is not on a GPU"
    forced = os.environ.get("SPIN_BACKEND") == "cuda"
    if not forced and os.environ.get("SPIN_HOPPER") != "1":
        return "it has not run on a GPU yet and is off (SPIN_HOPPER=1 turns it on)"
    if not _library.HAS_CUDA_LIBRARY:
        return "the CUDA library is not built"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(x.device) != (9, 0):
        return "the GPU is no Hopper (sm_90)"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return "x is neither bfloat16 nor float16"
    if channels % 8 or not HOPPER_CHANNELS[0] <= channels <= HOPPER_CHANNELS[1]:
        return f"channels are no multiple of 8 from {HOPPER_CHANNELS[0]} to {HOPPER_CHANNELS[1]}"
    if kernel not in HOPPER_KERNEL_SIZES:
        return f"the kernel size is none of {', '.join(map(str, HOPPER_KERNEL_SIZES))}"
    if x.numel() == 0 or len(pw_index) == 0:
        return "there is nothing to compute"
    images = hopper_images(height, width)
    if images == 0:
        return f"a plane of {height} x {width} does not fit a tile of {HOPPER_PLACES} places"
    tiles = -(-batch // images) * (channels // 128)
    if not forced and tiles < HOPPER_TILES:
        return f"{tiles} tiles of 128 channels leave most of the GPU idle"
    return None


def _triton_weights_refusal(args: Sequence[Any]) -> str | None:
    if refusal := _triton_refusal(args[0], "the weights are"):
        return refusal
    if args[0].shape[1:].numel() >= 2**30:  # of a bank, which is flat, 1
        return "a row of the weight has more than 2^30 values, columns in which are 32-bit"
    return None


# Operator -> its kernels in order of preference; the reference serves what none of them can.
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "mixer": (
        Kernel("cpu", "_mixer_cpu", _cpu_mixer_refusal, "the tensors are on the CPU"),
        Kernel("cuda", "_mixer_cuda", _hopper_refusal, "the tensors are on a Hopper GPU and its planes fit a tile"),
        Kernel("triton", "triton_ops.mixer", _triton_mixer_refusal, "the tensors are on a GPU"),
    ),
    # Forward that keeps what backward needs, or measures the batch's statistics.
    "mixer_train": (
        Kernel("cpu", "_mixer_train_cpu", _cpu_mixer_refusal, "the tensors are on the CPU"),
        Kernel("triton", "triton_ops.training", _triton_mixer_refusal, "the tensors are on a GPU"),
    ),
    "mixer_backward": (
        Kernel("cpu", "_mixer_backward_cpu", _cpu_mixer_refusal, "the tensors are on the CPU"),
        Kernel("triton", "triton_ops.training", _triton_mixer_refusal, "the tensors are on a GPU"),
    ),
} | {
    op: (
        Kernel("cpu", f"_{op}_cpu", _cpu_weights_refusal, "the tensors are on the CPU"),
        Kernel("triton", f"triton_ops.{module}", _triton_weights_refusal, "the tensors are on a GPU"),
    )
    for name, module in (("compose_superweights", "compose"), ("repeat_weight", "repeat"))
    for op in (name, f"{name}_backward")
}


def choose(op: str, args: Sequence[Any]) -> Choice:
    """Backend, kernel and reason for a call of a private operator with `args` in the order of its schema.

    Raises:
        RuntimeError: SPIN_BACKEND names no backend, or one that cannot run this call.
    """
    forced = os.environ.get("SPIN_BACKEND")
    if forced:
        return _choose_forced(op, args, forced)
    refusals = []
    for kernel in KERNELS[op]:
        refusal = kernel.refusal(args)
        if refusal is None:
            return Choice(kernel.backend, kernel.name, kernel.reason)
        refusals.append(f"{kernel.backend}: {refusal}")
    return Choice("reference", "plain PyTorch", "; ".join(refusals) or "no other kernel of this operator is built")


def _choose_forced(op: str, args: Sequence[Any], forced: str) -> Choice:
    if forced == "reference":
        return Choice("reference", "plain PyTorch", "SPIN_BACKEND=reference forces it")
    if forced not in BACKENDS:
        raise RuntimeError(f"SPIN_BACKEND: expected one of {', '.join(BACKENDS)}, got {forced!r}")
    why = f"no {forced} kernel of it is built"
    for kernel in KERNELS[op]:
        if kernel.backend == forced:
            refusal = kernel.refusal(args)
            if refusal is None:
                return Choice(forced, kernel.name, f"SPIN_BACKEND={forced} forces it")
            why = refusal
    raise RuntimeError(f"SPIN_BACKEND: expected a backend that can run {op}, got {forced!r}, but {why}")


class Explanation(NamedTuple):
    """What `explain` found; its text is one line."""

    op: str
    backend: str
    kernel: str
    reason: str
    backward: str | None

    def __str__(self) -> str:
        text = f"{self.op}: {self.backend} ({self.kernel}), because {self.reason}"
        return text if self.backward is None else f"{text}; backward: {self.backward}"


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend and kernel a call takes and why, without computing it.

    Args:
        op: a function of ``spin_kernels.functional``, an operator of ``torch.ops.spin``, or the name of one.
        *args, **kwargs: the arguments of the call.

    Returns:
        An Explanation (op, backend, kernel, reason, backward); ``str()`` of it reads as a sentence. `backward` is
        None where no gradient is recorded.

    Raises:
        ValueError: `op` is no public operator; and whatever the call itself would raise for its arguments.
    """
    name = (op if isinstance(op, str) else getattr(op, "__name__", str(op))).removeprefix("spin::").split(".")[0]
    if name in ("shared_mixer_block", "shared_mixer_block_train"):
        family = "mixer"
        values = _bind(name, args, kwargs)
        eps = values["eps"] if name.endswith("train") else None
        tensors = [values[key] for key in MIXER_TENSORS]
        tensors = autocast_mixer(tensors, tensors[0].device.type)
        settings = [values[key] for key in ("pw_index", "dw_index", "activation", "pw_residual")]
        arguments = [*tensors, *settings, eps]
        checks.mixer(*arguments)
    elif name in ("compose_superweights", "repeat_weight"):
        family = name
        arguments = list(_bind(name, args, kwargs).values())
        getattr(checks, name)(*arguments)
    else:
        raise ValueError(f"op: expected a public operator of spin_kernels, got {name!r}")

    backward = None
    if needs_gradient(*(a for a in arguments if isinstance(a, Tensor))):
        backward = choose(f"{family}_backward", arguments).backend
    trains = family == "mixer" and (backward is not None or arguments[-1] is not None)
    choice = choose("mixer_train" if trains else family, arguments)
    kernel = choice.kernel
    if choice.backend == "cpu":
        # What makes weights computes in float32, whatever their type.
        dtype = str(arguments[0].dtype).removeprefix("torch.") if family == "mixer" else "float32"
        kernel = f"{kernel}, {torch.ops.spin._cpu_isa(dtype, trains)}"
    return Explanation(name, choice.backend, kernel, choice.reason, backward)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_mixer(tensors: Sequence[Tensor | None], device_type: str) -> list[Tensor | None]:
    """The mixer's tensors as autocast hands them on: x, weights and biases cast unless x is float64."""
    x = tensors[0]
    if x is None or x.dtype not in _NARROW or not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [
        t.to(dtype) if cast and t is not None and t.dtype in _NARROW else t
        for t, cast in zip(tensors, _AUTOCAST, strict=True)
    ]


def _bind(op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, defaults filled in, in the order of the operator's schema."""
    schema = getattr(torch.ops.spin, op).default._schema
    names = [a.name for a in schema.arguments]
    if len(args) > sum(not a.kwarg_only for a in schema.arguments):
        raise TypeError(f"{op}: expected {names} with fewer positional arguments, got {len(args)}")
    values = dict(zip(names, args, strict=False)) | kwargs
    if unknown := set(values) - set(names):
        raise TypeError(f"{op}: expected no argument {sorted(unknown)[0]!r}, got one")
    for argument in schema.arguments:
        if argument.name not in values:
            if not argument.has_default_value():
                raise TypeError(f"{op}: expected an argument {argument.name!r}, got none")
            values[argument.name] = argument.default_value
    return {name: values[name] for name in names}
