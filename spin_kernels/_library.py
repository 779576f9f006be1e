"""Loads the compiled operators into torch."""

from pathlib import Path

import torch

HERE = Path(__file__).parent


def _load(name: str) -> bool:
    path = HERE / name
    if not path.exists():
        return False
    torch.ops.load_library(str(path))
    return True


if not _load("libspin.so"):
    raise ImportError(f"spin_kernels: {HERE / 'libspin.so'} is not built; run `pip install -e .` in the repository")

# A CPU-only torch lacks the symbols that the CUDA library links to.
HAS_CUDA_LIBRARY: bool = torch.version.cuda is not None and _load("libspin_cuda.so")
