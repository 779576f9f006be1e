"""The networks as plain PyTorch modules (what the peers run), and inputs. Imports torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spinbench.networks import Network

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}
EPS = 1e-5


class Block(nn.Module):
    """x + BN(act(depthwise(x))), then BN(act(pointwise(.))), the second half residual too where asked."""

    def __init__(self, network: Network, pointwise: nn.Conv2d):
        super().__init__()
        dim, kernel = network.dim, network.kernel
        self.depthwise = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.act = ACTIVATIONS[network.activation]()
        self.norm1 = nn.BatchNorm2d(dim, EPS)
        self.pointwise = pointwise
        self.norm2 = nn.BatchNorm2d(dim, EPS)
        self.residual = network.pw_residual

    def forward(self, x):
        y = x + self.norm1(self.act(self.depthwise(x)))
        z = self.norm2(self.act(self.pointwise(y)))
        return z + y if self.residual else z


class Plain(nn.Module):
    """The network of ordinary modules; blocks that share a matrix hold the same `nn.Conv2d`."""

    def __init__(self, network: Network):
        super().__init__()
        dim = network.dim
        self.network, self.recompute = network, False
        if network.patch:
            self.patch = nn.Conv2d(3, dim, network.patch, network.patch)
            self.act = ACTIVATIONS[network.activation]()
            self.norm = nn.BatchNorm2d(dim, EPS)
            self.head = nn.Linear(dim, network.classes)
        matrices = [nn.Conv2d(dim, dim, 1) for _ in range(0, network.depth, network.rate)]
        self.blocks = nn.ModuleList(Block(network, matrices[d // network.rate]) for d in range(network.depth))

    def forward(self, x):
        if self.network.patch:
            x = self.norm(self.act(self.patch(x)))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x.mean((2, 3))) if self.network.patch else x


@torch.no_grad()
def make_plain(network: Network, sample: torch.Tensor, seed: int) -> Plain:
    """Random weights; BatchNorm statistics of `sample`, jittered, keep activations sane through any depth."""
    torch.manual_seed(seed)
    model = Plain(network)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        sign = torch.where(torch.rand(norm.num_features) < 0.25, -1.0, 1.0)
        norm.weight.copy_(sign * torch.empty_like(sign).uniform_(0.5, 1.5))
        norm.bias.normal_(0, 0.1)
        norm.momentum = 1.0
    model.train()(sample)
    for norm in norms:
        norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn(norm.num_features))
        norm.running_var.mul_(torch.empty(norm.num_features).uniform_(0.8, 1.25))
    return model.eval()


def load_plain(network: Network, state: dict[str, torch.Tensor]) -> Plain:
    model = Plain(network)
    model.load_state_dict(state)
    return model.eval()


def make_input(network: Network, batch: int, seed: int) -> torch.Tensor:
    """Contiguous float32 NCHW: photographs for a network with a stem, random numbers for blocks alone."""
    if not network.patch:
        return torch.randn(network.input_shape(batch), generator=torch.Generator().manual_seed(seed))
    return photographs(batch, network.side, seed)


def photographs(batch: int, side: int, seed: int) -> torch.Tensor:
    """Random crops of scikit-learn's two photographs, resized, every other pair flipped, normalised."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    images = []
    for i in range(batch):
        photo = load_sample_images().images[i % 2]
        height, width, _ = photo.shape
        crop = int(rng.integers(min(height, width) // 2, min(height, width)))
        top, left = rng.integers(0, height - crop), rng.integers(0, width - crop)
        image = torch.from_numpy(photo[top : top + crop, left : left + crop].copy()).permute(2, 0, 1).float() / 255
        image = nn.functional.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
        images.append(image.flip(-1) if i % 4 >= 2 else image)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.stack(images) - mean[:, None, None]) / std[:, None, None]).contiguous()
