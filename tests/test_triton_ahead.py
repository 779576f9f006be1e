"""Every configuration of the Triton kernels compiled for GPUs that are not here: a process without the interpreter."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator

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


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[str, subprocess.Popen]]:
    """One for every architecture, all at once: each keeps a processor busy for a minute."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "triton_ops.ahead"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {arch: subprocess.Popen([*command, arch], env=environment, **pipes) for arch in configs.DEVICES}
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.parametrize("arch", list(configs.DEVICES))
def test_compiles_within_shared_memory(arch: str, compilers: dict[str, subprocess.Popen]) -> None:
    output, errors = compilers[arch].communicate(timeout=900)
    assert compilers[arch].returncode == 0, errors[-3000:]
    kernels = [json.loads(line) for line in output.splitlines()]
    assert {k["kernel"] for k in kernels} == every_kernel_name()
    most = configs.DEVICES[arch].shared_bytes
    assert not [k for k in kernels if k["shared"] > most]
