"""SharedMixer: against plain modules, its state, and how it lives with the rest of PyTorch."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spin_kernels import Sharing
from spin_kernels.nn import SharedMixer
from spin_kernels.reference import ACTIVATIONS

BLOCKS = {"dim": 12, "depth": 4, "kernel_size": 3}
VARIANTS = {
    "plain": {},
    "shared": {"sharing": Sharing(4, 2, "strided"), "pw_residual": True, "activation": "relu"},
    "templates": {"sharing": Sharing(4, 2), "templates": 3, "activation": "silu"},
    "scalar": {"sharing": Sharing(4, 4), "transform": "scalar", "bias": False},
    "channel": {"sharing": Sharing(4, 2), "transform": "channel", "templates": 1, "activation": "gelu_tanh"},
    "filters": {"sharing": Sharing(4, 2), "dw_sharing": Sharing(4, 2, distribution="back", shared_depth=3)},
    "gains": {"transform": "channel", "templates": 5},
}
STATE = {"dw_affine", "pw_affine", "pw_coefficients", "pw_gain", "dw_running", "pw_running"}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


class Plain(nn.Module):
    """The same blocks from PyTorch's own modules, with a mixer's parameters."""

    def __init__(self, mixer: SharedMixer) -> None:
        super().__init__()
        self.mixer, dim, k = mixer, mixer.dim, mixer.kernel_size
        options = {"bias": mixer.dw_bias is not None, "dtype": mixer.dw_weight.dtype}
        norm = {"eps": mixer.eps, "momentum": mixer.momentum, "dtype": mixer.dw_affine.dtype}
        self.depthwise = nn.ModuleList(
            nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, **options) for _ in range(mixer.depth)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim, **norm) for _ in range(2 * mixer.depth))
        with torch.no_grad():
            for d, conv in enumerate(self.depthwise):
                filters = mixer.dw_sharing.index[d]
                conv.weight.copy_(mixer.dw_weight[filters][:, None])
                if conv.bias is not None:
                    conv.bias.copy_(mixer.dw_bias[filters])
                for half, name in enumerate(("dw", "pw")):
                    bn, affine = self.norms[2 * d + half], getattr(mixer, f"{name}_affine")
                    bn.weight.copy_(affine[d, 0])
                    bn.bias.copy_(affine[d, 1])
                    bn.running_mean.copy_(getattr(mixer, f"{name}_running")[d, 0])
                    bn.running_var.copy_(getattr(mixer, f"{name}_running")[d, 1])
                    bn.num_batches_tracked.copy_(mixer.num_batches_tracked)
        self.train(mixer.training)

    def running(self, half: int) -> torch.Tensor:
        return torch.stack([torch.stack((bn.running_mean, bn.running_var)) for bn in self.norms[half::2]])

    def forward(self, x):
        mixer, act = self.mixer, ACTIVATIONS[self.mixer.activation]
        weights = mixer.pw_weight
        if mixer.pw_coefficients is not None:
            weights = torch.einsum("st,tij->sij", mixer.pw_coefficients, weights)
        for d, conv in enumerate(self.depthwise):
            y = x + self.norms[2 * d](act(conv(x)))
            s = mixer.sharing.index[d]
            v = F.conv2d(y, weights[s][:, :, None, None])
            if mixer.pw_gain is not None:
                v = v * mixer.pw_gain[d][:, None, None]
            if mixer.pw_bias is not None:
                v = v + mixer.pw_bias[s][:, None, None]
            x = self.norms[2 * d + 1](act(v)) + (y if mixer.pw_residual else 0)
        return x


def randomise(module: nn.Module) -> nn.Module:
    """Random affines, gains and statistics, some scales negative: fresh ones would hide mistakes."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            last = name.rsplit(".", 1)[-1]
            if last.endswith("affine") or last == "pw_gain":
                tensor.normal_(0.3)
            elif last.endswith("running"):
                tensor.copy_(torch.stack((torch.randn_like(tensor[:, 0]), torch.rand_like(tensor[:, 0]) + 0.5), 1))
            elif last == "running_var":
                tensor.uniform_(0.5, 1.5)
            elif last == "running_mean":
                tensor.normal_()
    return module


def make(variant=None, **options) -> SharedMixer:
    return randomise(SharedMixer(**BLOCKS, **(variant or {}), **options))


def image(dtype=torch.float32, dim=BLOCKS["dim"]) -> torch.Tensor:
    return torch.randn(2, dim, 7, 9).to(dtype)


def relative_error(actual, expected) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# --- what it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@every_variant
def test_inference_is_that_of_plain_modules(variant, dtype):
    mixer = make(variant, dtype=dtype).eval()
    x = image(dtype)
    with torch.no_grad():
        expected = Plain(copy.deepcopy(mixer).double())(x.double())
        assert relative_error(mixer(x), expected) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("momentum", [0.3, None, 1.0])
@every_variant
def test_training_is_that_of_plain_modules(variant, momentum):
    mixer = make(variant, momentum=momentum, dtype=torch.float64)
    plain = Plain(copy.deepcopy(mixer))
    for step in range(3):
        x = image(torch.float64).requires_grad_()
        y = x.detach().clone().requires_grad_()
        out, expected = mixer(x), plain(y)
        assert relative_error(out, expected) < 1e-12
        weight = torch.randn_like(out)
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
        assert relative_error(x.grad, y.grad) < 1e-9
        assert mixer.num_batches_tracked.item() == step + 1
    for half, running in enumerate((mixer.dw_running, mixer.pw_running)):
        assert relative_error(running, plain.running(half)) < 1e-12
    for name in ("pw_weight", "pw_bias", "pw_coefficients", "pw_gain"):
        if getattr(mixer, name) is not None:
            assert relative_error(getattr(mixer, name).grad, getattr(plain.mixer, name).grad) < 1e-9
    index = torch.tensor(mixer.dw_sharing.index)
    for name in ("weight", "bias"):
        ours, blocks = getattr(mixer, f"dw_{name}"), [getattr(conv, name) for conv in plain.depthwise]
        if ours is not None:
            gradients = torch.stack([block.grad.view(ours[0].shape) for block in blocks])
            assert relative_error(ours.grad, torch.zeros_like(ours).index_add_(0, index, gradients)) < 1e-9
    scales = torch.stack([bn.weight.grad for bn in plain.norms[::2]])
    assert relative_error(mixer.dw_affine.grad[:, 0], scales) < 1e-9


@every_variant
def test_gradients_in_eval_mode(variant):
    mixer = make(variant, dtype=torch.float64).eval()
    plain = Plain(copy.deepcopy(mixer))
    x, weight = image(torch.float64), image(torch.float64)
    (mixer(x) * weight).sum().backward()
    (plain(x) * weight).sum().backward()
    assert mixer.num_batches_tracked.item() == 0
    gradients = {"dw_affine": [(bn.weight.grad, bn.bias.grad) for bn in plain.norms[::2]]}
    gradients["pw_affine"] = [(bn.weight.grad, bn.bias.grad) for bn in plain.norms[1::2]]
    for name, pairs in gradients.items():
        expected = torch.stack([torch.stack(pair) for pair in pairs])
        assert relative_error(getattr(mixer, name).grad, expected) < 1e-9
    assert relative_error(mixer.pw_weight.grad, plain.mixer.pw_weight.grad) < 1e-9


# --- parameters


def test_shared_filters_are_held_once():
    mixer = SharedMixer(8, 6, 5, dw_sharing=Sharing(6, 3, "strided"))
    assert mixer.dw_weight.shape == (2, 8, 5, 5)
    assert mixer.dw_bias.shape == (2, 8)
    assert mixer.dw_affine.shape == (6, 2, 8)
    assert mixer.dw_index == (0, 1, 0, 1, 0, 1)
    assert "filters=2" in repr(mixer)


def test_parameters_and_buffers():
    mixer = SharedMixer(8, 6, 5, Sharing(6, 2), templates=4, transform="channel")
    shapes = {name: tuple(t.shape) for name, t in mixer.state_dict().items()}
    assert shapes == {
        "dw_weight": (6, 8, 5, 5),
        "dw_bias": (6, 8),
        "dw_affine": (6, 2, 8),
        "pw_weight": (4, 8, 8),
        "pw_bias": (3, 8),
        "pw_affine": (6, 2, 8),
        "pw_coefficients": (3, 4),
        "pw_gain": (6, 8),
        "dw_running": (6, 2, 8),
        "pw_running": (6, 2, 8),
        "num_batches_tracked": (),
    }
    assert SharedMixer(8, 6, 5, transform="scalar").pw_gain.shape == (6, 1)
    assert "shared=3" in repr(mixer)
    assert "templates=4" in repr(mixer)
    assert "transform=channel" in repr(mixer)
    decayed = {name for name, _ in mixer.named_parameters()} - mixer.no_weight_decay()
    assert decayed == {"dw_weight", "pw_weight"}


def test_initialisation_is_that_of_one_convolution():
    mixer = SharedMixer(64, 8, 7, templates=4, sharing=Sharing(8, 2))
    for name, bound in (("dw", 1 / 7), ("pw", 1 / 8)):
        for tensor in (getattr(mixer, f"{name}_weight"), getattr(mixer, f"{name}_bias")):
            assert 0.9 * bound < tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        assert torch.equal(getattr(mixer, f"{name}_affine"), torch.tensor([[1.0], [0.0]]).expand(8, 2, 64))
        assert torch.equal(getattr(mixer, f"{name}_running"), torch.tensor([[0.0], [1.0]]).expand(8, 2, 64))
    composed = torch.einsum("st,tij->sij", mixer.pw_coefficients, mixer.pw_weight)
    assert composed.std().item() == pytest.approx((1 / 8) / 3**0.5, rel=0.1)


def test_matrices_are_initialised_apart():
    mixer = SharedMixer(16, 4, 3)
    assert not torch.equal(mixer.pw_weight[0], mixer.pw_weight[1])


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"dim": 0}, ValueError, "dim"),
        ({"depth": 0}, ValueError, "depth"),
        ({"kernel_size": 4}, ValueError, "kernel_size"),
        ({"kernel_size": (3, 3)}, ValueError, "kernel_size"),
        ({"activation": "tanh"}, ValueError, "activation"),
        ({"transform": "matrix"}, ValueError, "transform"),
        ({"templates": 0}, ValueError, "templates"),
        ({"sharing": Sharing(5, 2)}, ValueError, "sharing"),
        ({"sharing": 2}, TypeError, "sharing"),
        ({"dw_sharing": Sharing(5, 2)}, ValueError, "dw_sharing"),
        ({"dw_sharing": [0, 0, 1, 1]}, TypeError, "dw_sharing"),
    ],
)
def test_errors_name_the_argument(arguments, error, name):
    with pytest.raises(error, match=f"^{name}: expected .* got"):
        SharedMixer(**{**BLOCKS, **arguments})


# --- dtypes and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_variant
def test_state_stays_float32(variant, dtype):
    mixer = make(variant)
    mixer(image()).sum().backward()
    state = {name: t.clone() for name, t in mixer.state_dict().items()}
    mixer.to(dtype)
    for name, tensor in mixer.state_dict().items():
        expected = torch.long if name == "num_batches_tracked" else torch.float32 if name in STATE else dtype
        assert tensor.dtype == expected, name
        if name in STATE:
            assert torch.equal(tensor, state[name])
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name
    assert mixer(image(dtype)).dtype == dtype
    mixer.eval()
    expected = copy.deepcopy(mixer).double()(image(torch.float64))
    assert expected.dtype == torch.float64
    assert mixer(image(dtype)).dtype == dtype
    mixer.float()
    assert {p.dtype for p in mixer.parameters()} == {torch.float32}


def test_double_makes_everything_float64_and_back():
    mixer = make(VARIANTS["channel"])
    before = copy.deepcopy(mixer.state_dict())
    mixer.double()
    assert {t.dtype for t in mixer.state_dict().values()} == {torch.float64, torch.long}
    mixer.to(torch.bfloat16)
    assert mixer.dw_affine.dtype == mixer.pw_gain.dtype == mixer.pw_running.dtype == torch.float32
    assert torch.equal(mixer.dw_affine, before["dw_affine"])
    assert mixer.dw_weight.dtype == torch.bfloat16


def test_constructor_dtype_and_device():
    mixer = SharedMixer(**BLOCKS, templates=2, device="meta", dtype=torch.bfloat16)
    assert mixer.dw_weight.dtype == torch.bfloat16
    assert mixer.dw_affine.dtype == torch.float32
    assert {t.device.type for t in mixer.state_dict().values()} == {"meta"}
    mixer.to_empty(device="cpu").reset_parameters()
    assert mixer(image(torch.bfloat16)).isfinite().all()
    assert {t.dtype for t in SharedMixer(**BLOCKS, dtype=torch.float64).parameters()} == {torch.float64}
    with torch.device("meta"):
        assert SharedMixer(**BLOCKS).half().to("meta").dw_running.dtype == torch.float32


def test_conversion_by_swapping_tensors():
    mixer = make(VARIANTS["channel"])
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        mixer.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert mixer.pw_weight.dtype == torch.bfloat16
    assert mixer.pw_affine.dtype == torch.float32


# --- no call uses stale weights


def _numpy_write(mixer):
    mixer.pw_weight.detach().numpy()[:] += 0.25


def _data_swap(mixer):
    mixer.pw_weight.data = mixer.pw_weight.data + 0.25


def _step(optimizer, **options):
    def change(mixer):
        mixer(image()).square().mean().backward()
        optimizer(mixer.parameters(), lr=0.1, **options).step()

    return change


CHANGES = {
    "fused AdamW": _step(torch.optim.AdamW, fused=True),
    "fused SGD": _step(torch.optim.SGD, fused=True),
    "data.add_": lambda mixer: mixer.pw_weight.data.add_(0.25),
    "data =": _data_swap,
    "NumPy view": _numpy_write,
    "copy_": lambda mixer: mixer.pw_weight.detach().copy_(torch.randn_like(mixer.pw_weight)),
    "dw_weight": lambda mixer: mixer.dw_weight.data.mul_(2),
    "bias": lambda mixer: mixer.pw_bias.data.add_(1),
    "affine": lambda mixer: mixer.pw_affine.data.mul_(2),
    "running statistics": lambda mixer: mixer.dw_running.add_(0.5),
    "load_state_dict": lambda mixer: mixer.load_state_dict(make().state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_call_sees_every_change(change):
    mixer, x = make().eval(), image()
    old = mixer(x).detach()
    change(mixer)
    new = mixer(x).detach()
    fresh = SharedMixer(**BLOCKS).eval()
    fresh.load_state_dict({name: t.detach().clone() for name, t in mixer.state_dict().items()})
    assert torch.equal(new, fresh(x).detach())
    assert relative_error(new, old) > 1e-4


# --- beside the rest of PyTorch


def test_state_dict_round_trip():
    mixer, x = make(VARIANTS["channel"]), image()
    mixer(x)
    torch.save(mixer.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    twin = SharedMixer(**BLOCKS, **VARIANTS["channel"])
    twin.load_state_dict(torch.load(buffer))
    assert torch.equal(mixer.eval()(x), twin.eval()(x))
    assert twin.num_batches_tracked.item() == 1


def test_functional_call():
    mixer, other, x = make().eval(), make().eval(), image()
    assert torch.equal(torch.func.functional_call(mixer, other.state_dict(), (x,)), other(x))


def test_autocast_casts_the_weights_only():
    mixer, x = make(VARIANTS["channel"]), image()
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer(x).dtype == torch.bfloat16
        assert mixer.eval()(x).dtype == torch.bfloat16
    assert mixer.dw_running.dtype == torch.float32


def test_statistics_across_processes(tmp_path, monkeypatch):
    mixer, x = make(), image()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mixer(x)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 4)
        with pytest.raises(RuntimeError, match=r"expected a single process in training mode, got 4: .* local"):
            mixer(x)
        mixer.eval()(x)
    finally:
        torch.distributed.destroy_process_group()
