"""The operators in torch: values, layouts, gradients, fakes, autocast, torch.compile, torch.export."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from arguments import cast, compose_arguments, mixer_arguments, private_composition, repeat_arguments, tensors_of
from torch import Tensor, nn
from torch.library import opcheck

from spin_kernels import functional, reference

spin = torch.ops.spin
BLOCK, TRAIN = spin.shared_mixer_block.default, spin.shared_mixer_block_train.default
COMPOSE, REPEAT = spin.compose_superweights.default, spin.repeat_weight.default
WEIGHTS = ("dw_weight", "dw_bias", "dw_affine", "pw_weight", "pw_bias", "pw_affine", "pw_coefficients", "pw_gain")

# Every public operator with the arguments it is tested with and the reference for them.
OPERATORS: dict[str, tuple[Any, Callable[..., dict[str, Any]], Callable[..., Any]]] = {
    "block": (BLOCK, mixer_arguments, lambda **a: reference.mixer(**a)[0]),
    "block_rich": (
        BLOCK,
        lambda **a: mixer_arguments(filters=2, templates=3, gain=True, pw_residual=True, activation="silu", **a),
        lambda **a: reference.mixer(**a)[0],
    ),
    "train": (TRAIN, mixer_arguments, lambda **a: reference.mixer(**a, eps=1e-5)),
    "train_rich": (
        TRAIN,
        lambda **a: mixer_arguments(filters=2, templates=3, gain=True, pw_residual=True, eps=1e-3, **a),
        lambda **a: reference.mixer(**a),
    ),
    "compose": (COMPOSE, compose_arguments, reference.compose_superweights),
    "repeat_swish": (REPEAT, lambda **a: repeat_arguments("swish", **a), reference.repeat_weight),
    "repeat_gate": (REPEAT, lambda **a: repeat_arguments("gate", **a), reference.repeat_weight),
    "repeat_plain": (REPEAT, lambda **a: repeat_arguments("none", **a), reference.repeat_weight),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)
every_mixer = pytest.mark.parametrize("op", [BLOCK, TRAIN], ids=["block", "train"])
both_layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def loss_of(result: Any) -> Tensor:
    y = first(result)
    return (y * y.cos()).sum()


def grads_of(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor]:
    tensors = tensors_of(arguments)
    grads = torch.autograd.grad(loss_of(function(**arguments)), list(tensors.values()))
    return dict(zip(tensors, grads, strict=True))


def assert_grads_close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    largest = max(float(g.norm()) for g in expected.values())
    for name, grad in expected.items():
        assert (got[name] - grad).norm() <= rtol * max(float(grad.norm()), 1e-2 * largest), name


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference(name: str, dtype: torch.dtype) -> None:
    op, draw, ref = OPERATORS[name]
    arguments = draw(dtype=dtype)
    results, plain, exact = op(**arguments), ref(**arguments), ref(**cast(arguments, torch.float64))
    if isinstance(results, Tensor):
        results, plain, exact = (results,), (plain,), (exact,)
    for result, p, e in zip(results, plain, exact, strict=True):
        assert result.dtype == p.dtype
        assert result.stride() == p.stride()
        error, largest = (result - e).abs().max(), e.abs().max()
        assert error <= 2 * (p - e).abs().max() + 4 * torch.finfo(dtype).eps * largest


@every_operator
def test_gradcheck(name: str) -> None:
    op, draw, _ = OPERATORS[name]
    arguments = draw(dtype=torch.float64, requires_grad=True)
    if "pw_affine" in arguments:
        arguments = dict(arguments, activation="gelu_tanh")
    tensors = tensors_of(arguments)

    def function(*values: Tensor) -> Tensor:
        return first(op(**(arguments | dict(zip(tensors, values, strict=True)))))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@every_operator
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "gradients"])
def test_opcheck(name: str, requires_grad: bool) -> None:
    op, draw, _ = OPERATORS[name]
    # float64: the sum that opcheck differentiates is constant after batch normalisation, its gradient only noise.
    opcheck(op, kwargs=draw(dtype=torch.float64, requires_grad=requires_grad), args=())


def private_arguments(arguments: dict[str, Any], eps: float | None) -> tuple[Any, ...]:
    settings = [arguments[name] for name in ("pw_index", "dw_index")] + ["gelu", False, eps]
    return arguments["x"], *(arguments[name] for name in WEIGHTS), *settings


@both_layouts
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_opcheck_private(channels_last: bool, eps: float | None) -> None:
    arguments = mixer_arguments(channels_last=channels_last)
    grad = torch.randn_like(arguments["x"])
    private = private_arguments(arguments, eps)
    wide = private_arguments(mixer_arguments(dtype=torch.float64, requires_grad=True), eps)
    # Where the forward pass saved nothing, the backward pass begins with one that does.
    expected = spin._mixer_backward.default(grad, *(torch.empty(0) for _ in range(3)), *private)
    opcheck(spin._mixer.default, (*private, 0))
    for save in (1, 2):
        opcheck(spin._mixer.default, (*wide, save))
        _, *stats_and_saved = spin._mixer.default(*private, save)
        opcheck(spin._mixer_backward.default, (grad, *stats_and_saved, *private))
        got = spin._mixer_backward.default(grad, *stats_and_saved, *private)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_opcheck_private_backwards() -> None:
    composed = compose_arguments()
    shapes = [composed["shapes"][i : i + 4] for i in range(0, len(composed["shapes"]), 4)]
    private = private_composition(composed)
    for grads in ([torch.randn(186)], [torch.randn(shape) for shape in shapes]):
        opcheck(spin._compose_superweights_backward.default, (grads, *private))
    for requires_grad in (False, True):
        opcheck(spin._compose_layers.default, private_composition(compose_arguments(requires_grad=requires_grad)))
    for modulation in ("swish", "gate", "none"):
        repeated = repeat_arguments(modulation)
        opcheck(spin._repeat_weight_backward.default, (torch.randn(5, 7, 3, 1), *repeated.values()))


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "aot_eager") for name in OPERATORS]
    + [(name, "inductor") for name in ("block_rich", "train_rich", "compose", "repeat_swish")],
)
def test_compile(name: str, backend: str) -> None:
    op, draw, _ = OPERATORS[name]
    torch._dynamo.reset()
    for layout in [{"channels_last": True}, {}] if "pw_affine" in draw() else [{}]:
        arguments = draw(requires_grad=True, **layout)

        def function(**values: Any) -> Tensor:
            return loss_of(op(**values))

        compiled = torch.compile(function, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(**arguments), function(**arguments), rtol=1e-4, atol=1e-4)
        assert_grads_close(
            grads_of(torch.compile(op, fullgraph=True, backend=backend), arguments), grads_of(op, arguments)
        )


class Mixer(nn.Module):
    def __init__(self, op: Any, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.settings = op, {k: v for k, v in arguments.items() if not isinstance(v, Tensor)}
        self.weights = nn.ParameterDict({k: v for k, v in tensors_of(arguments).items() if k != "x"})

    def forward(self, x: Tensor) -> Tensor:
        return first(self.op(x, **self.weights, **self.settings))


@every_mixer
def test_export(op: Any) -> None:
    arguments = mixer_arguments()
    mixer = Mixer(op, arguments)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(mixer, (arguments["x"],), dynamic_shapes=({0: batch},))
    x = torch.randn(5, *arguments["x"].shape[1:])
    torch.testing.assert_close(exported.module()(x), mixer(x))
    decomposed = exported.run_decompositions()
    torch.testing.assert_close(decomposed.module()(x), mixer(x))
    module = decomposed.module()
    loss_of(module(x)).backward()
    loss_of(mixer(x)).backward()
    got, expected = ({n.split(".")[-1]: p.grad for n, p in m.named_parameters()} for m in (module, mixer))
    assert_grads_close(got, expected)


def test_functional_call() -> None:
    mixer = Mixer(BLOCK, mixer_arguments())
    other = mixer_arguments()
    other["pw_index"] = mixer.settings["pw_index"]
    weights = {f"weights.{name}": tensor for name, tensor in tensors_of(other).items() if name != "x"}
    torch.testing.assert_close(torch.func.functional_call(mixer, weights, (other["x"],)), BLOCK(**other))


@every_mixer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_inputs_weights_and_biases(op: Any, dtype: torch.dtype) -> None:
    arguments = mixer_arguments(templates=2, gain=True, requires_grad=True)
    narrow = {
        name: value.to(dtype) if name in ("x", "dw_weight", "dw_bias", "pw_weight", "pw_bias") else value
        for name, value in arguments.items()
    }
    with torch.autocast("cpu", dtype=dtype):
        result = first(op(**arguments))
        loss_of(result).backward()  # inside: the backward is not autocast either
    assert result.dtype == dtype
    assert torch.equal(result, first(op(**narrow)))
    expected = grads_of(lambda **a: op(**narrow), arguments)
    for name, grad in expected.items():
        assert arguments[name].grad.dtype == arguments[name].dtype
        torch.testing.assert_close(arguments[name].grad, grad, rtol=0.1, atol=0.1)


@every_operator
def test_autocast_leaves_float64_alone(name: str) -> None:
    op, draw, _ = OPERATORS[name]
    arguments = draw(dtype=torch.float64)
    expected = first(op(**arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first(op(**arguments)), expected)


@pytest.mark.parametrize("name", ["compose", "repeat_swish", "repeat_gate"])
def test_autocast_leaves_weights_alone(name: str) -> None:
    op, draw, _ = OPERATORS[name]
    arguments = draw(requires_grad=True)
    expected = op(**arguments), grads_of(op, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close((op(**arguments), grads_of(op, arguments)), expected, rtol=0, atol=0)


@every_mixer
@pytest.mark.parametrize("requires_grad", [False, True])
def test_layouts(op: Any, requires_grad: bool) -> None:
    # float64 in training: normalisation by a small variance magnifies the rounding of another summation order.
    dtype = torch.float32 if op is BLOCK else torch.float64
    arguments = mixer_arguments(channels=4, height=6, width=8, dtype=dtype)
    x = arguments["x"]
    wide = torch.randn(3, 8, 12, 16, dtype=dtype)
    wide[1:, 2:6, ::2, ::2] = x
    layouts = {
        "contiguous": (x, torch.contiguous_format),
        "channels_last": (x.to(memory_format=torch.channels_last), torch.channels_last),
        "sliced": (wide[1:, 2:6, ::2, ::2], torch.contiguous_format),
        "transposed": (x.transpose(2, 3).contiguous().transpose(2, 3), torch.contiguous_format),
        "expanded": (x[:1].expand(2, -1, -1, -1), torch.contiguous_format),
    }
    for name, (laid_out, expected) in layouts.items():
        before = laid_out.clone()
        given = dict(arguments, x=laid_out.detach().requires_grad_(requires_grad))
        y = first(op(**given))
        assert y.is_contiguous(memory_format=expected), name
        torch.testing.assert_close(y, first(op(**dict(arguments, x=before.contiguous()))), rtol=1e-5, atol=1e-5)
        assert torch.equal(laid_out, before), name
        if requires_grad:
            nothing, private = [torch.empty(0)] * 3, private_arguments(given, None)
            grad_x = spin._mixer_backward.default(torch.ones_like(y), *nothing, *private)[0]
            assert grad_x.is_contiguous(memory_format=expected), name


def test_strided_weights() -> None:
    arguments = mixer_arguments()
    arguments["pw_weight"] = arguments["pw_weight"].transpose(1, 2)
    arguments["dw_affine"] = torch.randn(3, 6, 2).transpose(1, 2)
    arguments["dw_weight"] = torch.randn(6, 6, 3, 3)[::2]
    copies = {name: v.contiguous() if isinstance(v, Tensor) else v for name, v in arguments.items()}
    assert torch.equal(BLOCK(**arguments), BLOCK(**copies))


@every_mixer
def test_edges(op: Any) -> None:
    for shape in (
        {"channels": 1},
        {"height": 1, "width": 1},
        {"channels": 1, "height": 1, "width": 2, "batch": 1},
        {"kernel": 11, "height": 2, "width": 3},
        {"kernel": 33, "height": 2, "width": 3},
        {"kernel": 1},
        {"matrices": 5},
        {"bias": False},
    ):
        arguments = mixer_arguments(**shape, requires_grad=True)
        eps = 1e-5 if op is TRAIN else None
        exact = reference.mixer(**cast(arguments, torch.float64), eps=eps)[0]
        torch.testing.assert_close(first(op(**arguments)).double(), exact, rtol=1e-3, atol=1e-3)
        assert all(grad.isfinite().all() for grad in grads_of(op, arguments).values())


@every_mixer
@both_layouts
def test_no_blocks_clone(op: Any, channels_last: bool) -> None:
    arguments = mixer_arguments(depth=0, channels_last=channels_last, requires_grad=True)
    x = arguments["x"]
    y = first(op(**arguments))
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    assert y.stride() == x.stride()
    assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], torch.ones_like(x))
    opcheck(op, (), dict(arguments))


def test_empty_batch() -> None:
    arguments = mixer_arguments(batch=0, requires_grad=True)
    assert BLOCK(**arguments).shape == (0, 6, 5, 4)
    assert all(not grad.any() for grad in grads_of(BLOCK, arguments).values())
    with pytest.raises(ValueError, match=r"x: expected at least 2 values per channel"):
        TRAIN(**arguments)


def test_statistics_are_not_differentiable() -> None:
    y, dw_stats, pw_stats = TRAIN(**mixer_arguments(requires_grad=True))
    assert y.requires_grad
    assert not dw_stats.requires_grad
    assert not pw_stats.requires_grad


@every_operator
def test_derivatives_that_do_not_exist(name: str) -> None:
    op, draw, _ = OPERATORS[name]
    arguments = draw(requires_grad=True)
    tensor = next(iter(tensors_of(arguments).values()))
    (grad,) = torch.autograd.grad(loss_of(op(**arguments)), tensor, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only"):
        grad.sum().backward()
    key = "x" if "x" in arguments else next(iter(arguments))
    primal = arguments[key].detach()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"no forward-mode"):
        op(**dict(arguments, **{key: torch.autograd.forward_ad.make_dual(primal, primal)}))


@every_operator
def test_no_stale_weights(name: str) -> None:
    op, draw, ref = OPERATORS[name]
    arguments = draw()
    op(**arguments)
    for tensor in tensors_of(arguments).values():
        tensor.detach().numpy()[...] *= 0.5  # bumps no version counter
        # In float64: batch statistics magnify the rounding of a plain float32 reference beyond the bound, 1 draw in 20.
        expected = first(ref(**cast(arguments, torch.float64)))
        torch.testing.assert_close(first(op(**arguments)), expected.float(), rtol=1e-4, atol=1e-4)


@every_operator
def test_repeatable_and_in_inference_mode(name: str) -> None:
    op, draw, _ = OPERATORS[name]
    arguments = draw(requires_grad=True)
    once, again = op(**arguments), op(**arguments)
    with torch.inference_mode():
        inference = op(**arguments)
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    torch.testing.assert_close(first(once), first(inference), rtol=0, atol=0)
    torch.testing.assert_close(grads_of(op, arguments), grads_of(op, arguments), rtol=0, atol=0)


def test_meta_tensors() -> None:
    for op in (BLOCK, TRAIN):
        arguments = mixer_arguments(channels_last=True)
        y = first(op(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}))
        assert y.is_meta
        assert y.shape == arguments["x"].shape
        assert y.stride() == arguments["x"].stride()


def test_functional_front() -> None:
    arguments = mixer_arguments(templates=2, gain=True)
    assert torch.equal(functional.shared_mixer_block(**arguments), BLOCK(**arguments))
    for got, expected in zip(functional.shared_mixer_block_train(**arguments), TRAIN(**arguments), strict=True):
        assert torch.equal(got, expected)
    arguments = compose_arguments()
    weights, flat = functional.compose_superweights(**arguments), COMPOSE(**arguments)
    assert [tuple(w.shape) for w in weights] == [(5, 4, 3, 3), (2, 3, 1, 1)]
    assert torch.equal(torch.cat([w.flatten() for w in weights]), flat)
    assert functional.compose_superweights(torch.randn(3), torch.randn(2), [], []) == ()
    arguments = repeat_arguments()
    assert torch.equal(functional.repeat_weight(**arguments), REPEAT(**arguments))
