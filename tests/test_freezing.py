"""A frozen SharedMixer: what it computes, what unfreezes it, and its copies."""

import copy
import io
import pickle

import pytest
import torch
from test_nn import VARIANTS, every_variant, image, make, relative_error
from torch import nn

from spin_kernels import Sharing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@every_variant
def test_frozen_computes_the_same(variant, dtype):
    mixer = make(variant).to(dtype).eval()
    x = image(dtype)
    with torch.no_grad():
        expected = mixer(x)
        assert mixer.freeze() is mixer
        assert mixer.is_frozen
        actual = mixer(x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < tolerance
    assert not mixer(x).requires_grad
    layout = x.to(memory_format=torch.channels_last)
    assert mixer(layout).is_contiguous(memory_format=torch.channels_last)
    assert relative_error(mixer(layout), expected) < tolerance
    assert not mixer.unfreeze().is_frozen


def test_frozen_under_the_reference_backend(monkeypatch):
    mixer, x = make(VARIANTS["templates"]).eval(), image()
    expected = mixer(x)
    monkeypatch.setenv("SPIN_BACKEND", "reference")
    mixer.freeze()
    assert not isinstance(mixer._packed.value, torch.Tensor)
    assert relative_error(mixer(x), expected) < 1e-6


def test_gains_are_not_folded_into_16_bits(monkeypatch):
    monkeypatch.setenv("SPIN_BACKEND", "reference")
    mixer = make(transform="scalar").bfloat16().eval()
    assert mixer.freeze()._packed.value["pw_gain"] is not None


@pytest.mark.parametrize("templates", [None, 3])
@pytest.mark.parametrize("transform", ["scalar", "channel"])
@pytest.mark.parametrize("same", [True, False])
def test_freezing_folds_gains(monkeypatch, same, transform, templates):
    """Into matrices whose users agree; where those of one do not, the gains stay."""
    monkeypatch.setenv("SPIN_BACKEND", "reference")
    plan = Sharing(4, 2, distribution="middle", shared_depth=2)
    mixer, x = make({"sharing": plan}, transform=transform, templates=templates).eval(), image()
    with torch.no_grad():
        mixer.pw_gain[2] = mixer.pw_gain[1] if same else mixer.pw_gain[1] + 1
    expected = mixer(x)
    assert (mixer.freeze()._packed.value["pw_gain"] is None) == same
    assert relative_error(mixer(x), expected) < 1e-6


def test_freeze_wants_eval_mode():
    mixer = make()
    with pytest.raises(RuntimeError, match=r"^freeze: expected eval mode .* got training mode; call eval"):
        mixer.freeze()
    assert not mixer.is_frozen


UNFREEZE = {
    "train": lambda mixer: mixer.train(),
    "load_state_dict": lambda mixer: mixer.load_state_dict(mixer.state_dict()),
    "load_state_dict assign": lambda mixer: mixer.load_state_dict(mixer.state_dict(), assign=True),
    "loaded by its parent": lambda mixer: nn.Sequential(mixer).load_state_dict(nn.Sequential(mixer).state_dict()),
    "to dtype": lambda mixer: mixer.to(torch.bfloat16),
    "moved by its parent": lambda mixer: nn.Sequential(mixer).double(),
    "unfreeze": lambda mixer: mixer.unfreeze(),
}


@pytest.mark.parametrize("change", UNFREEZE.values(), ids=UNFREEZE.keys())
def test_what_unfreezes(change):
    mixer = make().eval().freeze()
    mixer.train(False).eval()
    assert mixer.is_frozen
    change(mixer)
    assert not mixer.is_frozen


def test_packed_weights_are_not_in_the_state_dict():
    mixer = make().eval()
    names = list(mixer.state_dict())
    assert list(mixer.freeze().state_dict()) == names


def test_frozen_input_that_requires_gradients():
    mixer, x = make().eval().freeze(), image().requires_grad_()
    with pytest.raises(RuntimeError, match=r"^x: a frozen module expected .* got requires_grad=True; call"):
        mixer(x)
    with torch.no_grad():
        mixer(x)
    mixer.unfreeze()(x).sum().backward()
    assert x.grad is not None


def _pickled(module):
    return pickle.loads(pickle.dumps(module))


def _saved(module):
    torch.save(module, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "unfrozen"])
def test_copies(duplicate, frozen):
    mixer, x = make(VARIANTS["templates"]).eval(), image()
    if frozen:
        mixer.freeze()
    expected = mixer(x).detach()
    twin = duplicate(mixer)
    assert twin.is_frozen is frozen
    assert torch.equal(twin(x).detach(), expected)
    assert len(pickle.dumps(mixer)) < 20 * sum(p.numel() for p in mixer.parameters()) + 20_000
    # The copy has a life of its own.
    twin.unfreeze()
    twin.pw_weight.data.add_(1)
    assert mixer.is_frozen is frozen
    assert torch.equal(mixer(x).detach(), expected)
    assert not torch.equal(twin(x).detach(), expected)
    if frozen:
        twin.freeze().load_state_dict(mixer.state_dict())
        assert not twin.is_frozen
        assert mixer.is_frozen
