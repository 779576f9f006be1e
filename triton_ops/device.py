"""Where kernels run."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager:
    """Kernels go to the current device: the tensors' one, for as long as this lasts."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
