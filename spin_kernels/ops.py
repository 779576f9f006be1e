"""The operators of ``torch.ops.spin``: bodies, backends, fakes, gradients, autocast.

The public mixers are composites over the private ``_mixer``, whose tensors are all positional: ``register_autograd``
refuses keyword-only tensors, and autocast must cast some tensors and leave the affines alone. Schemas are in C++.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from . import _library, checks, dispatch, reference  # noqa: F401  (_library defines the schemas)
from .dispatch import MIXER_TENSORS, needs_gradient

_TENSORS = len(MIXER_TENSORS)
_SAVED = 2  # tensors per block, where nothing else is asked for


def _shared_mixer_block(*args: Any, **options: Any) -> Tensor:
    return _call_mixer(None, _SAVED, *args, **options)[0]


def _shared_mixer_block_train(*args: Any, eps: float = 1e-5, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _call_mixer(eps, _SAVED, *args, **options)[:3]


def _checkpointed_mixer_block(*args: Any, eps: float | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _call_mixer(eps, 1, *args, **options)[:3]


# The schema's arguments by name, as in functional.py (for help) and reference.py (the specification).
def _call_mixer(
    eps: float | None,
    save: int,
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    dw_affine: Tensor,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    pw_affine: Tensor,
    pw_index: Sequence[int],
    *,
    dw_index: Sequence[int] | None = None,
    pw_coefficients: Tensor | None = None,
    pw_gain: Tensor | None = None,
    activation: str = "gelu",
    pw_residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_coefficients, pw_gain)
    settings = (pw_index, dw_index, activation, pw_residual, eps)
    recorded = needs_gradient(*tensors)
    with _dispatching(recorded):
        return _mixer(*tensors, *settings, save if recorded else 0)


def _dispatching(recorded: bool) -> AbstractContextManager:
    """For calls of private operators: with nothing to record, autograd's Python kernel is passed over, a quarter of the
    overhead of a mixer and 2 % of the time of WRN-28-10's weights."""
    return nullcontext() if recorded else torch._C._AutoDispatchBelowAutograd()


def _refuse_forward_mode() -> None:
    # The dispatcher would drop the tangents of an operator without a formula for them.
    if forward_ad._current_level >= 0:
        raise RuntimeError("The operators of spin_kernels have no forward-mode derivatives, but one was asked for.")


def _empty(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=x.device)


# --- the mixer: args are the nine MIXER_TENSORS, pw_index, dw_index, activation, pw_residual, eps(, save)


def _run_mixer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args, save = args[:-1], args[-1]
    _refuse_forward_mode()
    checks.mixer(*args)
    x = args[0]
    *arguments, eps = args
    trains = eps is not None or bool(save)
    backend = dispatch.choose("mixer_train" if trains else "mixer", args).backend
    if backend == "triton":
        from triton_ops import mixer, training  # only where triton is installed

        if trains:
            return training.forward(*arguments, eps=eps, save=save)
        return mixer.mixer(*arguments), _empty(x), _empty(x), _empty(x)
    if backend == "cpu" and trains:
        return _mixer_train_cpu(*args, save)
    if backend in ("cpu", "cuda"):
        kernel = _mixer_cpu if backend == "cpu" else _mixer_cuda
        return kernel(*arguments), _empty(x), _empty(x), _empty(x)
    y, dw_stats, pw_stats = _reference_mixer(*args)
    if dw_stats is None or pw_stats is None:
        return y, _empty(x), _empty(x), _empty(x)
    return y, dw_stats, pw_stats, _empty(x)


def _fake_mixer(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.mixer(*args[:-1])
    x, pw_index, pw_residual, eps, save = args[0], args[_TENSORS], *args[-3:]
    y = torch.empty_like(x, memory_format=reference.output_format(x))
    saved = _empty(x)
    backend = dispatch.choose("mixer_train", args[:-1]).backend if eps is not None or save else None
    if backend == "cpu":
        saved = x.new_empty(_saved_elements(x, len(pw_index), pw_residual, save))
    elif backend == "triton":
        from triton_ops import training

        saved = x.new_empty(training.saved_elements(x, len(pw_index), pw_residual, save))
    if eps is None:
        return y, _empty(x), _empty(x), saved
    size, dtype = (len(pw_index), 2, x.shape[1]), checks.WIDE[x.dtype]
    return y, x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=dtype), saved


def _saved_elements(x: Tensor, depth: int, pw_residual: bool, save: int) -> int:
    """As saved_elements() of csrc/core/train.h: channels in whole groups of 16."""
    batch, channels, height, width = x.shape
    anchors = (depth - 1) // 8 if pw_residual and depth else 0
    return (save * depth + anchors) * ((channels + 15) // 16 * 16) * batch * height * width if save else 0


def _reference_mixer(*args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    tensors = dict(zip(MIXER_TENSORS, args[:_TENSORS], strict=True))
    pw_index, dw_index, activation, pw_residual, eps = args[_TENSORS:]
    return reference.mixer(
        **tensors, pw_index=pw_index, dw_index=dw_index, activation=activation, pw_residual=pw_residual, eps=eps
    )


def _run_mixer_backward(
    grad: Tensor, dw_stats: Tensor, pw_stats: Tensor, saved: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    checks.mixer_backward(grad, *args)
    backend = dispatch.choose("mixer_backward", args).backend
    if backend == "triton":
        from triton_ops import training

        *arguments, eps = args
        if saved.numel() == 0:
            _, dw_stats, pw_stats, saved = training.forward(*arguments, eps=eps, save=_SAVED)
        grads = training.backward(grad, dw_stats, pw_stats, saved, *arguments, eps=eps)
        return tuple(_empty(grad) if g is None else g for g in grads)
    if backend == "cpu":
        if saved.numel() == 0:  # the forward pass saved nothing, or ran elsewhere
            _, dw_stats, pw_stats, saved = _mixer_train_cpu(*args, _SAVED)
        return _mixer_backward_cpu(grad, dw_stats, pw_stats, saved, *args)
    tensors, settings = args[:_TENSORS], args[_TENSORS:]
    grad_x, *others = _gradients(lambda *leaves: _reference_mixer(*leaves, *settings)[0], tensors, grad)
    # D = 0 hands the gradient itself on; a result never aliases an argument.
    into = grad_x.clone if len(settings[0]) == 0 else grad_x.contiguous
    return into(memory_format=reference.output_format(tensors[0])), *others


def _fake_mixer_backward(
    grad: Tensor, dw_stats: Tensor, pw_stats: Tensor, saved: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    checks.mixer_backward(grad, *args)
    x, *parameters = args[:_TENSORS]
    grad_x = torch.empty_like(x, memory_format=reference.output_format(x))
    return grad_x, *(_fake_gradient(t, x) for t in parameters)


def _save_mixer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:_TENSORS])
    ctx.settings = inputs[_TENSORS:-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_mixer(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    dw_stats, pw_stats, saved, *tensors = ctx.saved_tensors
    others = (None,) * (len(ctx.settings) + 1)
    if grad is None:
        return (None,) * _TENSORS + others
    grads = _mixer_backward(grad, dw_stats, pw_stats, saved, *tensors, *ctx.settings)
    return tuple(None if t is None else g for t, g in zip(tensors, grads, strict=True)) + others


# --- the operators that make weights


def _weights_kernel(op: str, args: tuple[Any, ...]) -> Callable | None:
    """What makes weights, or their gradients, in a call with `args`; None is the reference."""
    choice = dispatch.choose(op, args)
    if choice.backend == "cpu":
        return getattr(torch.ops.spin, choice.kernel)
    if choice.backend == "triton":
        module = importlib.import_module(choice.kernel)  # only where triton is installed
        return module.backward if op.endswith("backward") else module.forward
    return None


# --- compose_superweights is a composite over _compose_flat: bank, coefficients, pieces and shapes as one text
#
# _compose_layers makes a tensor per layer: autograd joins the gradients of views of a flat one, with layers of 146 MB a
# pass of several times their own. The text is there because every pass through the dispatcher or autograd takes lists
# apart: WRN-28-10 has 1,870 integers, and its weights took 0.1 to 0.3 ms of 4 to 7 longer.


def _compose_superweights(bank: Tensor, coefficients: Tensor, pieces: Sequence[int], shapes: Sequence[int]) -> Tensor:
    with _dispatching(needs_gradient(bank, coefficients)):
        return _compose_flat(bank, coefficients, checks.composition_text(pieces, shapes))


def compose_layers(bank: Tensor, coefficients: Tensor, composition: str) -> tuple[Tensor, ...]:
    """The weight (out, in, kh, kw) of every layer, from a text of ``checks.composition_text``."""
    for name, tensor in (("bank", bank), ("coefficients", coefficients)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    with _dispatching(torch.compiler.is_compiling() or needs_gradient(bank, coefficients)):
        if bank.device.type == "cpu":
            return tuple(_compose_layers(bank, coefficients, composition))
        return layers_of(_compose_flat(bank, coefficients, composition), checks.composition_layers(composition))


def layers_of(flat: Tensor, layers: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """The layers' weights (out, in, kh, kw) in the result of compose_superweights, as views."""
    weights = flat.split([math.prod(layer) for layer in layers]) if layers else ()
    return tuple(weight.view(*layer) for weight, layer in zip(weights, layers, strict=True))


def _run_compose_flat(bank: Tensor, coefficients: Tensor, composition: str) -> Tensor:
    return _compose_weights(bank, coefficients, composition, apart=False)[0]


def _run_compose_layers(bank: Tensor, coefficients: Tensor, composition: str) -> list[Tensor]:
    return _compose_weights(bank, coefficients, composition, apart=True)


def _compose_weights(bank: Tensor, coefficients: Tensor, composition: str, apart: bool) -> list[Tensor]:
    _refuse_forward_mode()
    plan = checks.composition(bank, coefficients, composition)
    run = _weights_kernel("compose_superweights", (bank,)) or reference.compose_superweights
    if run is torch.ops.spin._compose_superweights_cpu:
        return run(bank, coefficients, composition, apart)
    flat = run(bank, coefficients, *plan.integers)
    return [weight.clone() for weight in layers_of(flat, plan.layers)] if apart else [flat]


def _fake_compose_flat(bank: Tensor, coefficients: Tensor, composition: str) -> Tensor:
    return bank.new_empty(checks.composition(bank, coefficients, composition).numel)


def _fake_compose_layers(bank: Tensor, coefficients: Tensor, composition: str) -> list[Tensor]:
    return [bank.new_empty(shape) for shape in checks.composition(bank, coefficients, composition).layers]


def _run_compose_backward(
    grads: Sequence[Tensor], bank: Tensor, coefficients: Tensor, composition: str
) -> tuple[Tensor, Tensor]:
    plan = checks.composition_backward(grads, bank, coefficients, composition)
    run = _weights_kernel("compose_superweights_backward", (bank,)) or reference.compose_superweights_backward
    if run is torch.ops.spin._compose_superweights_backward_cpu:
        return run(grads, bank, coefficients, composition)
    flat = grads[0].flatten() if len(grads) == 1 else torch.cat([bank.new_empty(0), *(g.flatten() for g in grads)])
    return run(flat, bank, coefficients, *plan.integers)


def _fake_compose_backward(
    grads: Sequence[Tensor], bank: Tensor, coefficients: Tensor, composition: str
) -> tuple[Tensor, Tensor]:
    checks.composition_backward(grads, bank, coefficients, composition)
    return _fake_gradient(bank, bank), _fake_gradient(coefficients, bank)


def _save_compose_flat(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    bank, coefficients, ctx.composition = inputs
    ctx.save_for_backward(bank, coefficients)


def _differentiate_compose_flat(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bank, coefficients = ctx.saved_tensors
    return *_compose_gradients([grad.contiguous()], bank, coefficients, ctx.composition), None


class _ComposeLayers(torch.autograd.Function):
    """Autograd of _compose_layers: what register_autograd makes flattens lists of tensors in Python, for WRN-28-10 0.05
    ms forward and 0.02 backward, and some times that where its numbers have emptied the caches."""

    @staticmethod
    def forward(ctx: Any, bank: Tensor, coefficients: Tensor, composition: str) -> tuple[Tensor, ...]:
        ctx.save_for_backward(bank, coefficients)
        ctx.composition = composition
        ctx.set_materialize_grads(False)
        with _dispatching(recorded=False):
            return tuple(_compose_layers(bank, coefficients, composition))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        bank, coefficients = ctx.saved_tensors
        layers = checks.composition_plan(ctx.composition).layers
        whole = [bank.new_zeros(shape) if g is None else g.contiguous() for g, shape in zip(grads, layers, strict=True)]
        return *_compose_gradients(whole, bank, coefficients, ctx.composition), None


def _record_compose_layers(*args: Any) -> list[Tensor]:
    return list(_ComposeLayers.apply(*args))


def _compose_gradients(
    grads: list[Tensor], bank: Tensor, coefficients: Tensor, composition: str
) -> tuple[Tensor, Tensor]:
    with _dispatching(recorded=needs_gradient(bank, coefficients, *grads)):
        return _compose_backward(grads, bank, coefficients, composition)


# --- repeat_weight: weight, alpha, beta, gate, out_channels, in_channels


def _run_repeat(*args: Any) -> Tensor:
    _refuse_forward_mode()
    checks.repeat_weight(*args)
    return (_weights_kernel("repeat_weight", args) or reference.repeat_weight)(*args)


def _fake_repeat(weight: Tensor, *args: Any) -> Tensor:
    checks.repeat_weight(weight, *args)
    return weight.new_empty((*args[-2:], *weight.shape[2:]))


def _run_repeat_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    checks.repeat_weight_backward(grad, *args)
    run = _weights_kernel("repeat_weight_backward", args)
    if run is None:
        return tuple(_gradients(lambda *leaves: reference.repeat_weight(*leaves, *args[4:]), args[:4], grad))
    return tuple(_empty(grad) if g is None else g for g in run(grad, *args))


def _fake_repeat_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    checks.repeat_weight_backward(grad, *args)
    return tuple(_fake_gradient(t, grad) for t in args[:4])


def _save_repeat(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _differentiate_repeat(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = _repeat_backward(grad, *tensors, *ctx.settings)
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), None, None


# --- gradients through the reference


def _gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], grad: Tensor) -> list[Tensor]:
    """Gradients of function(*tensors), which is computed again; zeros where unused, empty where there is no tensor."""
    # A kernel runs with autograd's dispatch keys excluded; here they are let in again.
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude - _AUTOGRAD_KEYS), torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        present = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(function(*leaves), present, grad, allow_unused=True, materialize_grads=True))
    return [_empty(grad) if t is None else next(grads).contiguous() for t in tensors]


def _fake_gradient(tensor: Tensor | None, grad: Tensor) -> Tensor:
    return _empty(grad) if tensor is None else tensor.new_empty(tensor.shape)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError("The operators of spin_kernels have first derivatives only, but a second one was asked for.")


# --- registration

_AUTOGRAD_KEYS = DispatchKeySet(DispatchKey.AutogradFunctionality) | DispatchKeySet(DispatchKey.AutogradOther)
_AUTOCAST_KEYS = {"cpu": DispatchKey.AutocastCPU, "cuda": DispatchKey.AutocastCUDA}


def _register(
    name: str,
    run: Callable,
    fake: Callable,
    save: Callable | None = None,
    backward: Callable | None = None,
    cast: Callable | None = None,
) -> Any:
    """Registers all that an operator needs; autocast applies `cast` to the arguments, else leaves them alone."""
    # CompositeExplicitAutograd is every device: the reference serves those that have no kernels.
    _implementations.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spin::{name}", fake, lib=_implementations)
    if backward is not None:
        torch.library.register_autograd(f"spin::{name}", backward, setup_context=save, lib=_implementations)
    op = getattr(torch.ops.spin, name).default
    for device_type, key in _AUTOCAST_KEYS.items():
        _implementations.impl(name, _autocast_kernel(op, device_type, key, cast), key.name)
    return op


def _refuse_nested(public: str) -> None:
    names = [argument.name for argument in getattr(torch.ops.spin, public).default._schema.arguments]

    def kernel(*args: Any, **options: Any) -> NoReturn:  # torch's own refusal would not name the argument
        given = dict(zip(names, args, strict=False)) | options
        name = next(n for n, a in given.items() if isinstance(a, Tensor) and a.is_nested)
        raise TypeError(f"{name}: expected a dense tensor, got a nested one; pad it")

    _implementations.impl(public, kernel, "AutogradNestedTensor")


def _autocast_kernel(op: Any, device_type: str, key: DispatchKey, cast: Callable | None) -> Callable:
    def kernel(*args: Any) -> Any:
        if cast is not None:
            args = cast(args, device_type)
        # Excluded, so that autocast does not cast what the reference calls either.
        with torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(key)):
            return op(*args)

    return kernel


def _autocast_mixer(args: tuple[Any, ...], device_type: str) -> tuple[Any, ...]:
    return *dispatch.autocast_mixer(args[:_TENSORS], device_type), *args[_TENSORS:]


_implementations = torch.library.Library("spin", "IMPL")
_implementations.impl("shared_mixer_block", _shared_mixer_block, "CompositeImplicitAutograd")
_implementations.impl("shared_mixer_block_train", _shared_mixer_block_train, "CompositeImplicitAutograd")
_implementations.impl("_checkpointed_mixer_block", _checkpointed_mixer_block, "CompositeImplicitAutograd")
_mixer = _register("_mixer", _run_mixer, _fake_mixer, _save_mixer, _differentiate_mixer, _autocast_mixer)
_mixer_backward = _register(
    "_mixer_backward", _run_mixer_backward, _fake_mixer_backward, None, _refuse_second_derivative
)
_implementations.impl("compose_superweights", _compose_superweights, "CompositeImplicitAutograd")
_compose_flat = _register(
    "_compose_flat", _run_compose_flat, _fake_compose_flat, _save_compose_flat, _differentiate_compose_flat
)
_compose_layers = _register("_compose_layers", _run_compose_layers, _fake_compose_layers)
_implementations.impl("_compose_layers", _record_compose_layers, "Autograd")
_compose_backward = _register(
    "_compose_superweights_backward", _run_compose_backward, _fake_compose_backward, None, _refuse_second_derivative
)
_repeat = _register("repeat_weight", _run_repeat, _fake_repeat, _save_repeat, _differentiate_repeat)
_repeat_backward = _register(
    "_repeat_weight_backward", _run_repeat_backward, _fake_repeat_backward, None, _refuse_second_derivative
)
_mixer_cpu = torch.ops.spin._mixer_cpu.default
_mixer_cuda = torch.ops.spin._mixer_cuda.default
_mixer_train_cpu = torch.ops.spin._mixer_train_cpu.default
_mixer_backward_cpu = torch.ops.spin._mixer_backward_cpu.default
for _public in ("shared_mixer_block", "shared_mixer_block_train", "compose_superweights", "repeat_weight"):
    _refuse_nested(_public)
