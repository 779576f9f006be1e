"""What the modules of this package have in common: packed weights and state that stays in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class Packed:
    """What a frozen module keeps: weights in the form the kernels read.

    A deep copy or a pickle of the module leaves them out, because they repeat the parameters in a layout of
    one processor: the copy stays frozen and packs its own parameters at its first call.
    """

    def __init__(self) -> None:
        self.frozen = False
        self.value: Any = None
        self.drops = 0  # what else was packed from the same weights compares this

    def keep(self, value: Any) -> None:
        self.frozen, self.value = True, value

    def drop(self, *_: Any) -> None:
        self.frozen, self.value = False, None
        self.drops += 1

    def __getstate__(self) -> dict[str, Any]:
        return {"frozen": self.frozen, "value": None, "drops": self.drops}


class Freezable(nn.Module):
    """A module whose :meth:`freeze` packs its weights once instead of at every call.

    Subclasses define ``_pack()`` and ``_run_packed(x, packed)``. What stands between a call and its operator is kept
    short: a network of 1 ms leaves nothing of the interpreter in L2, and there a microsecond of Python takes three.
    """

    _pack: Callable[[], Any]
    _run_packed: Callable[[Tensor, Any], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self._packed = Packed()

    def _drop_packed_on_load(self) -> None:
        """Makes loading a state dict into this module, or into any part of it, unfreeze it."""
        for module in self.modules():
            module.register_load_state_dict_pre_hook(self._packed.drop)

    @property
    def is_frozen(self) -> bool:
        """Whether calls use packed weights and ignore later changes of the parameters."""
        return self._packed.frozen

    def freeze(self) -> Self:
        """Packs the weights, BatchNorm folded in, for inference, and returns the module.

        Until :meth:`unfreeze`, calls ignore changes of the parameters. ``train()``, ``load_state_dict()``
        and ``to()`` unfreeze. The backend is chosen here: the C++ kernels where they can run (CPU; float32,
        bfloat16, float16), else the plain operator with composed matrices and folded affines.

        Raises:
            RuntimeError: the module, or a part of it, is in training mode.
        """
        if any(module.training for module in self.modules()):
            raise RuntimeError(
                "freeze: expected eval mode in the module and its parts, got training mode; call eval() first"
            )
        with torch.no_grad():
            self._packed.keep(self._pack())
        return self

    def unfreeze(self) -> Self:
        """Drops the packed weights, so that every call reads the parameters, and returns the module."""
        self._packed.drop()
        return self

    def _call_packed(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "x: a frozen module expected an input that needs no gradient, got requires_grad=True; "
                "call it under torch.no_grad() or call unfreeze() first"
            )
        if self._packed.value is None:  # a copy of a frozen module
            self.freeze()
        return self._run_packed(x, self._packed.value)

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._packed.drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._packed.drop()
        return super()._apply(fn, recurse)


class Float32State(nn.Module):
    """A module whose ``_float32_state()`` stays float32 when it is converted to a shorter type."""

    _float32_state: Callable[[], Iterable[Tensor | None]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # nn.Module hands the gradients to fn too; the list keeps them alive, so that their ids stay theirs.
        state = [t for t in self._float32_state() if t is not None]
        state += [t.grad for t in state if isinstance(t, nn.Parameter) and t.grad is not None]
        ids = {id(t) for t in state}

        def convert(t: Tensor) -> Tensor:
            out = fn(t)
            if id(t) in ids and out.is_floating_point() and out.element_size() < 4:
                return t.to(out.device, torch.float32)
            return out

        return super()._apply(convert, recurse)


class BatchNorm2d(Float32State, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose parameters and statistics stay float32 beside bfloat16 or float16 weights."""

    def _float32_state(self) -> Iterable[Tensor | None]:
        return self.weight, self.bias, self.running_mean, self.running_var


def fold_batch_norm(gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, dim: int) -> Tensor:
    """BatchNorm with running statistics as an affine: scale and shift, stacked along ``dim``."""
    scale = gamma * torch.rsqrt(var + eps)
    return torch.stack((scale, torch.addcmul(beta, mean, scale, value=-1)), dim)
