"""Checkpoint files as programs write them, damaged ones, and ones with code in them."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spin_kernels import convert, models

STATE = {"stem.0.weight": torch.randn(4, 3, 2, 2), "head.bias": torch.randn(5)}


class Malicious:
    """Writes a file where unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_same(got: dict) -> None:
    assert got.keys() == STATE.keys()
    assert all(torch.equal(got[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.pth", STATE),
        ("authors.pth.tar", {"epoch": 3, "arch": "convmixer", "state_dict": STATE, "metric": 80.1}),
        ("slowfast.pyth", {"model_state": STATE, "optimizer_state": {"state": {}}, "cfg": "MODEL: ..."}),
        ("parallel.pt", {"model": {f"module.{name}": tensor for name, tensor in STATE.items()}}),
    ],
)
def test_files_of_torch(tmp_path, name, content):
    torch.save(content, tmp_path / name)
    assert_same(convert.load(tmp_path / name))
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=False)
    assert_same(convert.load(str(tmp_path / name)))


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert_same(convert.load(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, new_format):
    trap = tmp_path / "ran"
    torch.save(
        {"state_dict": STATE, "hook": Malicious(trap)}, tmp_path / "m.pth", _use_new_zipfile_serialization=new_format
    )
    with pytest.raises(ValueError, match=r"^load: expected tensors only in .*m.pth', got other Python objects"):
        convert.load(tmp_path / "m.pth")
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(Malicious(trap)))
    with pytest.raises(ValueError, match=r"^load: expected "):
        convert.load(tmp_path / "m.pkl")
    assert not trap.exists()


@pytest.mark.parametrize("name", ["whole.pth", "whole.safetensors"])
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    whole = path.read_bytes()
    for size in (0, 1, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^load: expected a whole checkpoint in .*, got a damaged one"):
            convert.load(path)
    path.write_bytes(b"\x00garbage\xff" * 100)
    with pytest.raises(ValueError, match=r"^load: expected "):
        convert.load(path)


def test_files_without_a_state_dict(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^load: expected a checkpoint file, got .*nowhere.pth"):
        convert.load(tmp_path / "nowhere.pth")
    for content, got in (({"epoch": 3}, "a dictionary with keys epoch"), ([1, 2], "list"), ({}, "keys none")):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=rf"^load: expected a state dict in .*, got .*{got}"):
            convert.load(tmp_path / "other.pth")


def test_a_loaded_file_becomes_a_model(tmp_path):
    model = models.convmixer(8, 2, 3, 4, num_classes=3).eval()
    torch.save({"state_dict": convert._timm_state(model)}, tmp_path / "m.pth.tar")
    again = convert.from_timm(convert.load(tmp_path / "m.pth.tar"), activation="gelu").eval()
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(image), model(image))
