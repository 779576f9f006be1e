"""The mixer: a stack of ConvMixer blocks whose pointwise weights are shared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from ..reference import ACTIVATIONS, compose_matrices, output_format
from ..sharing import Sharing, check_plan
from .bank import FromBank, SuperWeightBank
from .base import Float32State, Freezable, fold_batch_norm


class SharedMixer(FromBank, Float32State, Freezable):
    """``depth`` ConvMixer blocks over (B, C, H, W) feature maps, run by one operator.

    A block is a depthwise convolution with a residual around it and a pointwise convolution, each followed by
    the activation and BatchNorm (ConvMixer, arXiv 2201.09792); pointwise weights may be shared between blocks
    (SPIN, arXiv 2207.10237) or be linear combinations of templates (SuperWeights, arXiv 2312.01280).

    Args:
        dim: number of channels C.
        depth: number of blocks D.
        kernel_size: of the depthwise convolutions, odd.
        sharing: the :class:`~spin_kernels.Sharing` plan of the pointwise weights; None shares nothing. S is
            its number of distinct weights.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"``, ``"silu"`` or ``"identity"``.
        pw_residual: adds a residual around the pointwise half too, as SPIN's block does.
        templates: T; distinct matrix s is then ``sum_t pw_coefficients[s, t] * pw_weight[t]``.
        transform: ``"scalar"`` or ``"channel"`` gives every block gains of its own on the shared product.
        bias: whether the convolutions have biases; a pointwise bias is shared as its matrix is.
        eps: of BatchNorm.
        momentum: of the running statistics; None averages over all batches, as in ``nn.BatchNorm2d``.
        checkpoint: keeps one tensor per block for the backward pass instead of two, which convolves once more.
        dw_sharing: the plan of the depthwise filters and their biases; None shares none. S_dw is its number of
            distinct filters, D without one.
        bank: a :class:`SuperWeightBank` that the matrices come from instead of pw_weight, which is None then.
        cluster: the cluster of the bank that holds their templates, (C, C) each.

    Parameters: dw_weight (S_dw, C, k, k), dw_bias (S_dw, C), dw_affine (D, 2, C), pw_weight (S, C, C) or (T, C, C)
    as [out, in], pw_bias (S, C), pw_affine (D, 2, C), pw_coefficients (S, T), pw_gain (D, 1) or (D, C). An
    affine holds gamma at [:, 0] and beta at [:, 1]. Buffers: dw_running and pw_running (D, 2, C: mean,
    variance) and num_batches_tracked. Affines, coefficients, gains and running statistics stay float32 when
    the module is converted to bfloat16 or float16.

    Training mode normalises with the statistics of the batch and refuses to run in several processes, where
    they would be local; eval mode uses the running statistics, and :meth:`freeze` then keeps packed weights.

    Raises:
        ValueError, TypeError: an argument is out of its range.
    """

    dw_weight: Tensor
    dw_bias: Tensor | None
    dw_affine: Tensor
    pw_weight: Tensor
    pw_bias: Tensor | None
    pw_affine: Tensor
    pw_coefficients: Tensor | None
    pw_gain: Tensor | None
    dw_running: Tensor
    pw_running: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int,
        sharing: Sharing | None = None,
        activation: str = "gelu",
        pw_residual: bool = False,
        templates: int | None = None,
        transform: str | None = None,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        checkpoint: bool = False,
        dw_sharing: Sharing | None = None,
        bank: SuperWeightBank | None = None,
        cluster: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "depth": depth, "kernel_size": kernel_size}
        if templates is not None:
            sizes["templates"] = templates
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if transform not in (None, "scalar", "channel"):
            raise ValueError(f"transform: expected None, 'scalar' or 'channel', got {transform!r}")
        if (bank is None) != (cluster is None) or (bank is not None and templates is not None):
            raise ValueError("bank, cluster: expected both without templates, or none; a bank has templates of its own")
        self.sharing = check_plan("sharing", sharing, depth)
        self.dw_sharing = check_plan("dw_sharing", dw_sharing, depth)
        self.dim, self.depth, self.kernel_size = dim, depth, kernel_size
        self.activation, self.pw_residual = activation, pw_residual
        self.templates, self.transform = templates, transform
        self.eps, self.momentum, self.checkpoint = eps, momentum, checkpoint
        self.pw_index, self.dw_index = tuple(self.sharing.index), tuple(self.dw_sharing.index)

        shared, filters = self.sharing.num_shared, self.dw_sharing.num_shared
        weights: dict[str, Any] = {"device": device, "dtype": dtype if dtype is not None else torch.get_default_dtype()}
        state: dict[str, Any] = {"device": device, "dtype": torch.promote_types(weights["dtype"], torch.float32)}
        gains = {None: None, "scalar": (depth, 1), "channel": (depth, dim)}[transform]
        for name, shape, options in (
            ("dw_weight", (filters, dim, kernel_size, kernel_size), weights),
            ("dw_bias", (filters, dim) if bias else None, weights),
            ("dw_affine", (depth, 2, dim), state),
            ("pw_weight", (templates or shared, dim, dim) if bank is None else None, weights),
            ("pw_bias", (shared, dim) if bias else None, weights),
            ("pw_affine", (depth, 2, dim), state),
            ("pw_coefficients", (shared, templates) if templates else None, state),
            ("pw_gain", gains, state),
        ):
            tensor = None if shape is None else nn.Parameter(torch.empty(shape, **options))
            self.register_parameter(name, tensor)
        self.register_buffer("dw_running", torch.empty(depth, 2, dim, **state))
        self.register_buffer("pw_running", torch.empty(depth, 2, dim, **state))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        if bank is not None and cluster is not None:
            self._join(bank, *bank.add_matrices(shared, dim, cluster))
        self._drop_packed_on_load()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises each layer's weights and bias as ``nn.Conv2d`` does, BatchNorm and gains to identity.

        Rows of pw_coefficients are those of a random orthogonal matrix, scaled to length 1: a composed matrix
        has the variance of one template, and (where S <= T) the composed matrices start uncorrelated.
        """
        with torch.no_grad():
            # The bound of kaiming_uniform_(a=sqrt(5)) and that of the bias, for the fan-in of one layer.
            for name, fan_in in (("dw", self.kernel_size**2), ("pw", self.dim)):
                for tensor in (getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")):
                    if tensor is not None:
                        tensor.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
                getattr(self, f"{name}_affine").copy_(torch.tensor([[1.0], [0.0]]))
                getattr(self, f"{name}_running").copy_(torch.tensor([[0.0], [1.0]]))
            if self.pw_coefficients is not None:
                nn.init.orthogonal_(self.pw_coefficients)
                self.pw_coefficients.div_(self.pw_coefficients.norm(dim=1, keepdim=True))
            if self.pw_gain is not None:
                self.pw_gain.fill_(1)
            self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.bank is not None and self.is_frozen and self._bank_drops != self.bank._packed.drops:
            self.unfreeze()  # the bank's weights are others now
        if self.is_frozen:
            return self._call_packed(x)
        if self.training:
            return self._normalise_with_batch_statistics(x)
        if self.checkpoint:
            return torch.ops.spin._checkpointed_mixer_block(x, **self._op_arguments())[0]
        return torch.ops.spin.shared_mixer_block(x, **self._op_arguments())

    def block_outputs(self, x: Tensor) -> Iterator[Tensor]:
        """The features (B, C, H, W) after every block, one by one, in eval mode; the last are those of a call.

        Raises:
            RuntimeError: the module is in training mode.
        """
        if self.training:
            raise RuntimeError("block_outputs: expected eval mode, got training mode; call eval() first")
        arguments = self._op_arguments()
        for d in range(self.depth):
            one = {name: arguments[name][d : d + 1] for name in ("dw_affine", "pw_affine")}
            if self.pw_gain is not None:
                one["pw_gain"] = arguments["pw_gain"][d : d + 1]
            block = arguments | one | {"dw_index": self.dw_index[d : d + 1], "pw_index": self.pw_index[d : d + 1]}
            x = torch.ops.spin.shared_mixer_block(x, **block)
            yield x

    def distinct_weights(self) -> tuple[Tensor, Tensor | None]:
        """The pointwise weights (S, C, C), composed where there are templates, and biases (S, C), with gradients."""
        return compose_matrices(self._matrices(), self.pw_coefficients), self.pw_bias

    def _matrices(self) -> Tensor:
        """(S, C, C), or the templates (T, C, C) that they are composed from in the operator."""
        if self.bank is None:
            return self.pw_weight
        return self.bank.weight(self.bank_layers[0]).view(-1, self.dim, self.dim)

    def _op_arguments(self) -> dict[str, Any]:
        """The operator's arguments in the order of spin::_pack_mixer; in eval mode BatchNorm is folded in."""
        arguments: dict[str, Any] = {
            "dw_weight": self.dw_weight,
            "dw_bias": self.dw_bias,
            "dw_affine": self.dw_affine,
            "pw_weight": self._matrices(),
            "pw_bias": self.pw_bias,
            "pw_affine": self.pw_affine,
            "pw_coefficients": self.pw_coefficients,
            "pw_gain": None if self.pw_gain is None else self.pw_gain.expand(-1, self.dim),
            "pw_index": self.pw_index,
            "dw_index": self.dw_index,
            "activation": self.activation,
            "pw_residual": self.pw_residual,
        }
        if not self.training:
            for name, running in (("dw_affine", self.dw_running), ("pw_affine", self.pw_running)):
                (gamma, beta), (mean, var) = arguments[name].unbind(1), running.unbind(1)
                arguments[name] = fold_batch_norm(gamma, beta, mean, var, self.eps, dim=1)
        return arguments

    def _normalise_with_batch_statistics(self, x: Tensor) -> Tensor:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and (processes := torch.distributed.get_world_size()) > 1:
            raise RuntimeError(
                f"SharedMixer: expected a single process in training mode, got {processes}: batch statistics "
                "would be local to each; train in one process or put the mixer in eval mode"
            )
        op = torch.ops.spin.shared_mixer_block_train
        if self.checkpoint:
            op = torch.ops.spin._checkpointed_mixer_block
        y, dw_stats, pw_stats = op(x, **self._op_arguments(), eps=self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum: Any = self.momentum
            if momentum is None:
                momentum = self.num_batches_tracked.to(dw_stats.dtype).reciprocal()
            count = x.numel() // self.dim
            for running, stats in ((self.dw_running, dw_stats), (self.pw_running, pw_stats)):
                mean, biased = stats.unbind(1)
                running.lerp_(torch.stack((mean, biased * (count / (count - 1))), 1), momentum)
        return y

    def _has_packed_form(self, arguments: dict[str, Any]) -> bool:
        """Whether calls with these arguments would take the C++ kernels, which can read packed weights."""
        x = arguments["pw_weight"].new_empty((1, self.dim, 1, 1))
        return dispatch.choose("mixer", (x, *arguments.values(), None)).backend == "cpu"

    def _pack(self) -> Tensor | dict[str, Any]:
        arguments = self._op_arguments()
        self._bank_drops = 0 if self.bank is None else self.bank._packed.drops
        if self._has_packed_form(arguments):  # where every block has gains, 1 if nothing else
            return torch.ops.spin._pack_mixer(*arguments.values())
        return self._composed(arguments)

    def _composed(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Copies of the arguments with templates combined and gains folded in, for calls of the plain operator."""
        weight = compose_matrices(arguments["pw_weight"], arguments["pw_coefficients"])
        made = {"pw_weight": weight, "pw_coefficients": None} | self._folded_gains(weight, arguments["pw_gain"])
        return {name: a.detach().clone() if isinstance(a, Tensor) else a for name, a in (arguments | made).items()}

    def _folded_gains(self, weight: Tensor, gain: Tensor | None) -> dict[str, Tensor | None]:
        """Gains multiplied into the matrices, where all users of each have the same ones: a vector less per block.

        Not into 16-bit matrices, which would be rounded a second time.
        """
        if gain is None or weight.element_size() < 4:
            return {}
        index = list(self.pw_index)
        of_matrix = gain[[index.index(s) for s in range(len(weight))]]
        if not torch.equal(gain, of_matrix[index]):
            return {}
        return {"pw_weight": of_matrix[:, :, None] * weight, "pw_gain": None}

    def _run_packed(self, x: Tensor, packed: Tensor | dict[str, Any]) -> Tensor:
        if isinstance(packed, Tensor):
            return _frozen_mixer(x, packed)
        with torch.no_grad():
            return torch.ops.spin.shared_mixer_block(x, **packed)

    def _float32_state(self) -> Iterable[Tensor | None]:
        yield from (self.dw_affine, self.pw_affine, self.dw_running, self.pw_running)
        yield from (self.pw_coefficients, self.pw_gain)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: all but the layers' weights."""
        return {name for name, _ in self.named_parameters()} - {"dw_weight", "pw_weight"}

    def extra_repr(self) -> str:
        text = f"{self.dim}, depth={self.depth}, kernel_size={self.kernel_size}"
        text += f", shared={self.sharing.num_shared}, activation={self.activation}"
        text += f", pw_residual={self.pw_residual}"
        if self.dw_sharing.num_shared < self.depth:
            text += f", filters={self.dw_sharing.num_shared}"
        for name in ("templates", "transform", "checkpoint"):
            if getattr(self, name):
                text += f", {name}={getattr(self, name)}"
        return text + ("" if self.dw_bias is not None else ", bias=False")


_frozen_mixer = torch.ops.spin._frozen_mixer.default


@torch.library.register_fake("spin::_frozen_mixer")
def _(x: Tensor, packed: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=output_format(x))
