"""Every configuration of the Triton kernels compiled for GPUs that are not here: a process without the interpreter."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")
import triton_ops
from triton_ops import configs


def every_kernel_name() -> set[str]:
    modules = [
        importlib.import_module(f"triton_ops.{module.name}") for module in pkgutil.iter_modules(triton_ops.__path__)
    ]
    return {
        name
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and hasattr(kernel, "arg_names")
    }


@pytest.mark.parametrize("arch", list(configs.DEVICES))
def test_compiles_within_shared_memory(arch: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "triton_ops.ahead", arch]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} == every_kernel_name()
    most = configs.DEVICES[arch].shared_bytes
    assert not [k for k in kernels if k["shared"] > most]
