"""Our model with the weights of the plain one. Imports torch and spin_kernels."""

from __future__ import annotations

import torch
from torch import nn

import spin_kernels as spin
from spinbench.networks import Network
from spinbench.plain import Plain


@torch.no_grad()
def make_ours(network: Network, plain: Plain, checkpoint: bool = False) -> nn.Module:
    """The registered model of that name, or a SharedMixer for blocks alone, with the weights of `plain`."""
    if network.patch:
        model = spin.models.create(network.name)
        mixer = model.mixer
        copy(model.patch_embed.conv, plain.patch)
        copy(model.patch_embed.bn, plain.norm)
        copy(model.head.fc, plain.head)
    else:
        sharing = spin.Sharing(network.depth, network.rate)
        settings = {"activation": network.activation, "pw_residual": network.pw_residual}
        model = mixer = spin.nn.SharedMixer(network.dim, network.depth, network.kernel, sharing, **settings)
    mixer.checkpoint = checkpoint
    for d, block in enumerate(plain.blocks):
        mixer.dw_weight[d].copy_(block.depthwise.weight[:, 0])
        mixer.dw_bias[d].copy_(block.depthwise.bias)
        mixer.pw_weight[mixer.pw_index[d]].copy_(block.pointwise.weight[:, :, 0, 0])
        mixer.pw_bias[mixer.pw_index[d]].copy_(block.pointwise.bias)
        for half, norm in (("dw", block.norm1), ("pw", block.norm2)):
            getattr(mixer, f"{half}_affine")[d].copy_(torch.stack((norm.weight, norm.bias)))
            getattr(mixer, f"{half}_running")[d].copy_(torch.stack((norm.running_mean, norm.running_var)))
    return model.eval()


def copy(target: nn.Module, source: nn.Module) -> None:
    target.load_state_dict(source.state_dict())
