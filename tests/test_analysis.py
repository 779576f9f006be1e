"""Similarity of features and blocks: against the definition, and what must not change it."""

import math

import pytest
import torch

from spin_kernels import Sharing, models, reference
from spin_kernels.analysis import block_similarity, linear_cka

NETWORK = {"dim": 12, "depth": 4, "kernel_size": 3, "patch_size": 4, "num_classes": 5}


def defined(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = (t.detach().double().flatten(1) for t in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def network(**options) -> models.ConvMixer:
    model = models.convmixer(**{**NETWORK, **options})
    model(torch.randn(16, 3, 16, 16))  # running statistics
    return model.eval()


def test_is_the_definition():
    x, y = torch.randn(20, 7, 3) + 2, torch.randn(20, 9)
    y[:, :3] += x[:, 0]
    assert linear_cka(x, y) == pytest.approx(defined(x, y), rel=1e-6)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x), rel=1e-12)


def test_more_features_than_one_chunk():
    """By the kernel form: H K H with K = X Xᵀ and H = 1 - 1/N."""
    x = torch.randn(6, 40_000)
    y = x[:, 10_000:] + 0.1
    center = torch.eye(6, dtype=torch.float64) - 1 / 6
    k, m = (center @ (t.double() @ t.double().T) @ center for t in (x, y))
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())), rel=1e-9)


def test_rotation_scale_and_shift_change_nothing():
    x, y = torch.randn(30, 8), torch.randn(30, 5)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-5)
    assert linear_cka(3 * x @ rotation + 1, y) == pytest.approx(linear_cka(x, y), rel=1e-4)
    assert math.isnan(linear_cka(torch.ones(4, 2), torch.randn(4, 2)))  # nothing varies


@pytest.mark.parametrize(
    "options",
    [
        {"sharing": Sharing(4, 2, "strided"), "dw_sharing": Sharing(4, 4)},
        {"templates": 2, "transform": "channel", "pw_residual": True},
    ],
)
def test_blocks_are_those_of_the_network(options):
    model, images = network(**options), torch.randn(3, 3, 16, 16)
    outputs = list(model.block_outputs(images))
    assert len(outputs) == 4
    torch.testing.assert_close(outputs[-1], model.forward_features(images))
    x = model.patch_embed(images)
    for d, output in enumerate(outputs):  # each is one block of the operator on the features before it
        one = {
            **model.mixer._op_arguments(),
            "dw_index": [model.mixer.dw_index[d]],
            "pw_index": [model.mixer.pw_index[d]],
        }
        one |= {name: one[name][[d]] for name in ("dw_affine", "pw_affine", "pw_gain") if one[name] is not None}
        x = reference.mixer(x, **one)[0]
        torch.testing.assert_close(output, x)


def test_similarity_of_blocks():
    one, other, images = network(), network(depth=3, dim=10), torch.randn(10, 3, 16, 16)
    got = block_similarity(one, other, images, batch=4)
    rows, columns = (list(model.block_outputs(images)) for model in (one, other))
    expected = [[defined(x, y) for y in columns] for x in rows]
    assert got.shape == (4, 3)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(block_similarity(one, one, images).diagonal(), torch.ones(4, dtype=torch.float64))


def test_refusals():
    model, images = network(), torch.randn(4, 3, 16, 16)
    with pytest.raises(ValueError, match="x, y: expected features of the same images"):
        linear_cka(torch.randn(4, 3), torch.randn(5, 3))
    with pytest.raises(ValueError, match="x, y: expected features of the same images"):
        linear_cka(torch.randn(4), torch.randn(4))
    with pytest.raises(ValueError, match=r"images: expected two or more, got shape \(1, 3, 16, 16\)"):
        block_similarity(model, model, images[:1])
    with pytest.raises(ValueError, match="batch: expected a positive number of images, got 0"):
        block_similarity(model, model, images, 0)
    for train in (model.train, lambda: model.eval().mixer.train()):
        train()
        with pytest.raises(RuntimeError, match=r"expected (networks in )?eval mode"):
            block_similarity(model, network(), images)
