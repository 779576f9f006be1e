"""Which backend takes a call, what SPIN_BACKEND forces, what explain says."""

import re
from typing import Any

import pytest
import torch
from arguments import compose_arguments, mixer_arguments, repeat_arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spin_kernels import dispatch, functional, spin_runtime

spin = torch.ops.spin


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIN_BACKEND", raising=False)
    monkeypatch.delenv("SPIN_HOPPER", raising=False)


def backend(op: str = "shared_mixer_block", eps: float | None = None, **changes: Any) -> str:
    arguments = mixer_arguments(**changes)
    return dispatch.explain(op, **arguments).backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_inference_is_never_the_reference(dtype: torch.dtype) -> None:
    for changes in (
        {},
        {"channels_last": True},
        {"templates": 2, "gain": True},
        {"kernel": 31},
        {"channels": 1},
        {"depth": 0},
        {"batch": 0},
    ):
        assert backend(dtype=dtype, **changes) == "cpu"
    assert backend(channels=2048, depth=1, matrices=1, batch=1, height=1, width=1, dtype=dtype) == "cpu"


def test_what_the_cpu_kernels_leave_to_the_reference() -> None:
    assert backend(dtype=torch.float64) == "reference"
    assert backend(kernel=33) == "reference"
    assert backend("shared_mixer_block_train", dtype=torch.float64) == "reference"
    assert backend("shared_mixer_block_train", kernel=33) == "reference"


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_kernel_that_is_named_runs(requires_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = mixer_arguments(requires_grad=requires_grad)
    calls = []
    name = dispatch.explain("shared_mixer_block", **arguments).kernel.split(",")[0]
    assert name == ("_mixer_train_cpu" if requires_grad else "_mixer_cpu")
    kernel = getattr(spin, name).default
    monkeypatch.setattr(f"spin_kernels.ops.{name}", lambda *args: calls.append(args) or kernel(*args))
    y = spin.shared_mixer_block(**arguments)
    assert len(calls) == 1
    assert y.requires_grad == requires_grad
    monkeypatch.setenv("SPIN_BACKEND", "reference")
    torch.testing.assert_close(spin.shared_mixer_block(**arguments), y, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def test_a_call_reaches_modes_as_the_private_operator() -> None:
    arguments = mixer_arguments()
    with Recorder() as recorder:
        spin.shared_mixer_block(**arguments)
    assert recorder.names == ["spin::_mixer"]


def test_forced_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, training = mixer_arguments(), mixer_arguments(requires_grad=True)
    monkeypatch.setenv("SPIN_BACKEND", "cpu")
    spin.shared_mixer_block(**arguments)
    with pytest.raises(RuntimeError, match=r"^SPIN_BACKEND: .*mixer, got 'cpu', but x is float64"):
        spin.shared_mixer_block(**mixer_arguments(dtype=torch.float64))
    spin.shared_mixer_block_train(**arguments)
    spin.shared_mixer_block(**training).sum().backward()
    for name in ("triton", "cuda"):
        monkeypatch.setenv("SPIN_BACKEND", name)
        for op, given in (
            (spin.shared_mixer_block, arguments),
            (spin.shared_mixer_block_train, arguments),
            (spin.compose_superweights, compose_arguments()),
            (spin.repeat_weight, repeat_arguments()),
        ):
            why = f"no {name} kernel of it is built|(x is|the weights are) not on a GPU|triton is not installed"
            with pytest.raises(RuntimeError, match=rf"^SPIN_BACKEND: .*got '{name}', but ({why})"):
                op(**given)
    monkeypatch.setenv("SPIN_BACKEND", "gpu")
    with pytest.raises(RuntimeError, match=r"^SPIN_BACKEND: expected one of reference, cpu, triton, cuda, got 'gpu'"):
        spin.shared_mixer_block(**arguments)
    monkeypatch.setenv("SPIN_BACKEND", "")
    spin.shared_mixer_block(**arguments)


def test_explain() -> None:
    arguments = mixer_arguments()
    isa = spin._cpu_isa("float32")
    names = ("shared_mixer_block", "spin::shared_mixer_block", spin.shared_mixer_block)
    for op in (*names, spin.shared_mixer_block.default, functional.shared_mixer_block):
        explanation = dispatch.explain(op, **arguments)
        assert explanation.op == "shared_mixer_block"
        assert explanation.backend == "cpu"
        assert explanation.kernel == f"_mixer_cpu, {isa}"
        assert explanation.backward is None
        assert str(explanation).startswith(f"shared_mixer_block: cpu (_mixer_cpu, {isa}), because ")
    positional = [arguments[name] for name in list(arguments)[:8]]
    assert dispatch.explain("shared_mixer_block", *positional).backend == "cpu"
    assert "float64" in dispatch.explain("shared_mixer_block", **mixer_arguments(dtype=torch.float64)).reason

    training = mixer_arguments(requires_grad=True)
    explanation = dispatch.explain("shared_mixer_block", **training)
    assert explanation.backward == "cpu"
    assert str(explanation).endswith("backward: cpu")
    assert dispatch.explain("shared_mixer_block_train", **arguments).kernel.startswith("_mixer_train_cpu")
    with torch.no_grad():
        assert dispatch.explain("shared_mixer_block", **training).backward is None
    composed = dispatch.explain("compose_superweights", **compose_arguments(requires_grad=True))
    assert (composed.backend, composed.backward) == ("cpu", "cpu")
    assert dispatch.explain("compose_superweights", **compose_arguments(torch.float64)).backend == "reference"
    assert dispatch.explain(functional.repeat_weight, **repeat_arguments(requires_grad=True)).backward == "cpu"


def test_explain_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernel = dispatch.explain("shared_mixer_block", **mixer_arguments()).kernel
    assert kernel == f"_mixer_cpu, {spin._cpu_isa('bfloat16')}"


@pytest.mark.parametrize("isa", spin_runtime.cpu_features()["isas"])
def test_explain_names_the_kernels_of_training(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIN_CPU_ISA", isa)
    arguments = mixer_arguments(dtype=torch.bfloat16)
    assert dispatch.explain("shared_mixer_block", **arguments).kernel == f"_mixer_cpu, {isa}"
    kernel = dispatch.explain("shared_mixer_block_train", **arguments).kernel
    assert kernel == f"_mixer_train_cpu, {'avx512' if isa == 'amx' else isa}"  # training knows no tiles


def test_explain_refuses_what_the_call_would() -> None:
    with pytest.raises(ValueError, match=r"^op: expected a public operator"):
        dispatch.explain("_mixer", torch.randn(2))
    with pytest.raises(ValueError, match=r"^pw_index: expected"):
        dispatch.explain("shared_mixer_block", **dict(mixer_arguments(), pw_index=[0, 0, 9]))
    with pytest.raises(TypeError, match=r"expected an argument 'dw_weight'"):
        dispatch.explain("shared_mixer_block", torch.randn(1, 2, 3, 4))
    with pytest.raises(TypeError, match=r"no argument 'gain'"):
        dispatch.explain("shared_mixer_block", **mixer_arguments(), gain=None)


# What turns the Hopper kernel down, and changes of a call that it would take.
HOPPER_CASES = {
    None: {},
    "it has not run on a GPU yet and is off (SPIN_HOPPER=1 turns it on)": {"hopper": None},
    "the CUDA library is not built": {"library": False},
    "the GPU is no Hopper (sm_90)": {"capability": (10, 0)},
    "x is neither bfloat16 nor float16": {"dtype": torch.float32},
    "0 tiles of 128 channels leave most of the GPU idle": {"channels": 120},
    "63 tiles of 128 channels leave most of the GPU idle": {"batch": 63},
    "48 tiles of 128 channels leave most of the GPU idle": {"batch": 64, "channels": 384, "height": 8, "width": 8},
    "channels are no multiple of 8 from 8 to 2048": {"channels": 132},
    "the kernel size is none of 3, 5, 7, 9": {"kernel": 11},
    "a plane of 17 x 9 does not fit a tile of 256 places": {"height": 17, "width": 9},
    "there is nothing to compute": {"depth": 0},
}


@pytest.mark.parametrize("refusal", list(HOPPER_CASES))
def test_where_the_hopper_kernel_serves(refusal: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the tensors are fake, and so is what the machine says of itself."""
    changes = {"hopper": "1", "library": True, "capability": (9, 0)} | HOPPER_CASES[refusal]
    if changes["hopper"]:
        monkeypatch.setenv("SPIN_HOPPER", changes.pop("hopper"))
    monkeypatch.setattr("spin_kernels._library.HAS_CUDA_LIBRARY", changes.pop("library"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capability = changes.pop("capability")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    changes.pop("hopper", None)
    shape = {"batch": 64, "channels": 128, "height": 15, "width": 16, "kernel": 3, "dtype": torch.bfloat16} | changes
    arguments = mixer_arguments(**shape)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = {n: torch.empty_like(a, device="cuda") if isinstance(a, Tensor) else a for n, a in arguments.items()}
        if refusal is None:
            explanation = dispatch.explain("shared_mixer_block", **on_gpu)
            assert (explanation.backend, explanation.kernel) == ("cuda", "_mixer_cuda")
            assert dispatch.explain("shared_mixer_block_train", **on_gpu).backend in ("triton", "reference")
        else:
            assert dispatch.explain("shared_mixer_block", **on_gpu).backend in ("triton", "reference")
            monkeypatch.setenv("SPIN_BACKEND", "cuda")
            if "is off" in refusal or "idle" in refusal:
                assert dispatch.explain("shared_mixer_block", **on_gpu).backend == "cuda"
            else:
                with pytest.raises(RuntimeError, match=re.escape(refusal)):
                    dispatch.explain("shared_mixer_block", **on_gpu)
