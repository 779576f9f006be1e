"""Wide ResNets of the SuperWeights authors' code against ours: with the weights that it made, and from its banks."""

from typing import Any

import golden
import pytest
import torch
from golden import assert_close
from test_golden_layers import Networks
from torch import nn

from spin_kernels import models

CASES = golden.cases("superweight")
OURS = {"stage_1.": "stages.0.", "stage_2.": "stages.1.", "stage_3.": "stages.2.", "lastact.0.": "bn."}


def ours(name: str) -> str:
    """Our name of a BatchNorm's or the classifier's tensor."""
    for theirs, new in OURS.items():
        name = name.replace(theirs, new)
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
@pytest.mark.parametrize("source", ["weights", "banks"])
def test_wide_resnets(case: dict[str, Any], dtype: torch.dtype, source: str) -> None:
    tensors = golden.load(case)
    banked = Networks(case, tensors, dtype)
    layers = iter(banked.layers)
    for number, config in enumerate(case["config"]["networks"]):
        classes = case["config"]["num_classes"]
        options = {"num_classes": classes, "base_channels": config["channels"][0]}
        network = models.wide_resnet(config["depth"], config["width"], **options)
        convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
        prefix, kinds = f"net{number}.", ("stage_", "lastact", "classifier")
        state = {f"{name}.weight": tensors[f"weight.{prefix}layer{n}"] for n, name in enumerate(convolutions)}
        assert f"weight.{prefix}layer{len(convolutions)}" not in tensors
        given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        state |= {ours(name): tensor for name, tensor in given.items() if name.startswith(kinds)}
        counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
        assert state.keys() == network.state_dict().keys() - counters
        network.to(dtype).load_state_dict(state, strict=False)
        if source == "banks":
            for name in convolutions:
                network.set_submodule(name, next(layers))
            banked.bank.attach(network)
        with torch.no_grad():
            output = network.eval()(tensors["input"].to(dtype))
        assert_close(output, given["eval.output"], case, "outputs", f"{prefix}eval.output")
