"""What the compiler made of the CUDA kernels, read from the built library: no GPU, only its machine code."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import cuda_report


@pytest.fixture(scope="module")
def kernels() -> dict[str, cuda_report.Kernel]:
    if not cuda_report.LIBRARY.exists():
        pytest.skip("libspin_cuda.so is not built: no nvcc here")
    if cuda_report.disassembler() is None:
        pytest.skip("no cuobjdump: neither triton nor the CUDA toolkit has one")
    return {kernel.name: kernel for kernel in cuda_report.kernels_of(cuda_report.LIBRARY)}


def mixers(kernels: dict[str, cuda_report.Kernel]) -> dict[str, cuda_report.Kernel]:
    return {name: kernel for name, kernel in kernels.items() if name.startswith("mixer_kernel")}


def test_every_size_is_compiled(kernels: dict[str, cuda_report.Kernel]) -> None:
    expected = {f"mixer_kernel<{t}, {k}, {w}>" for t in ("BFloat16", "Float16") for k in (3, 5, 7, 9) for w in (0, 16)}
    assert set(mixers(kernels)) == expected


def test_nothing_spills(kernels: dict[str, cuda_report.Kernel]) -> None:
    assert {name: kernel.spills for name, kernel in kernels.items() if kernel.spills} == {}


def test_products_run_on_the_tensor_cores_without_waiting_for_each_other(
    kernels: dict[str, cuda_report.Kernel],
) -> None:
    """A stage is 4 x 2 products of which only the last ends a batch; where registers are short, each would."""
    for name, kernel in mixers(kernels).items():
        assert (kernel.products, kernel.waits) == (8, 1), name
        assert kernel.instructions["UTMALDG"] >= 4, name
        assert kernel.instructions["HMMA"] == 0, name


def test_registers_fit_a_multiprocessor(kernels: dict[str, cuda_report.Kernel]) -> None:
    """512 threads of 65,536 registers; the roles then trade (csrc/cuda/mixer_shape.h)."""
    for name, kernel in mixers(kernels).items():
        assert kernel.registers == 128, name
        assert kernel.instructions["USETMAXREG"] == 2, name


def test_rows_of_seven_and_nine_taps_are_packed(kernels: dict[str, cuda_report.Kernel]) -> None:
    for name, kernel in mixers(kernels).items():
        packed = name.startswith("mixer_kernel<BFloat16, 7") or name.startswith("mixer_kernel<BFloat16, 9")
        assert (kernel.instructions["HFMA2"] > 50) == packed, name


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_it_loads_and_serves_cuda_tensors() -> None:
    from spin_kernels import _library

    if not cuda_report.LIBRARY.exists():
        pytest.skip("libspin_cuda.so is not built: no nvcc here")
    assert _library.HAS_CUDA_LIBRARY
    assert torch._C._dispatch_has_kernel_for_dispatch_key("spin::_mixer_cuda", "CUDA")
