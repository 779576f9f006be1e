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
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(Malicious(trap), protocol))
        with pytest.raises(
            ValueError, match=r"^load: expected tensors only in .*m.pkl', got other Python objects \(.*\)"
        ):
            convert.load(tmp_path / "m.pkl")
        torch.save({"hook": Malicious(trap)}, tmp_path / "m.pth", pickle_protocol=protocol) if protocol > 1 else None
        with pytest.raises(ValueError, match=r"^load: expected tensors only in .*m.pth'"):
            convert.load(tmp_path / "m.pth")
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


def test_every_truncation_of_the_old_format(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"weight": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^load: expected a whole checkpoint in .*, got a damaged one"):
            convert.load(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_another_pickle_protocol_is_named_or_read(tmp_path, new_format):
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"{protocol}.pth"
        torch.save(STATE, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new_format)
        try:
            assert_same(convert.load(path))
        except ValueError as error:
            refusal, refused = str(error), protocol
            break
    else:
        return
    assert refused > 3
    assert refusal.startswith("load: expected a file of torch.save's own pickle protocol 2")
    assert f"got protocol {refused}; save it again" in refusal


def test_a_pickled_module_is_other_objects(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"got other Python objects \(torch.nn.modules.linear.Linear\)"):
        convert.load(tmp_path / "m.pth")


def test_keys_that_are_no_names(tmp_path):
    torch.save({0: torch.zeros(3)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"^load: expected names as keys in .*, got a dictionary with keys 0"):
        convert.load(tmp_path / "m.pth")


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
