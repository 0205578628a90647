# SPDX-License-Identifier: Apache-2.0
"""SemanticAutoEncoder: shapes, dependence of the logits on the code only, and training on two masks."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from scripts.networks.alignment_header import AlignmentHeader
from scripts.networks.semantic_autoencoder import SemanticAutoEncoder


def autoencoder(classes: int = 3, **options: object) -> SemanticAutoEncoder:
    torch.manual_seed(0)
    return SemanticAutoEncoder(classes, **({"features": (8, 16), "code_channels": 32} | options))


def masks(size: tuple[int, ...]) -> Tensor:
    """Two samples, each with a box of class 1 and a box of class 2 at different places."""
    mask = torch.zeros(2, 1, *size)
    dims = len(size)
    mask[(0, 0, *[slice(2, 8)] * dims)] = 1
    mask[(0, 0, *[slice(9, 14)] * dims)] = 2
    mask[(1, 0, *[slice(7, 14)] * dims)] = 1
    mask[(1, 0, *[slice(1, 6)] * dims)] = 2
    return mask


def dice(prediction: Tensor, mask: Tensor, index: int) -> float:
    p, r = prediction == index, mask == index
    return float(2 * (p & r).sum() / (p.sum() + r.sum()))


def test_it_learns_two_masks_in_100_steps():
    net, mask = autoencoder(code_channels=64), masks((16, 16, 16))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    for _ in range(100):
        optimizer.zero_grad()
        loss(net(mask), mask).backward()
        optimizer.step()
    with torch.no_grad():
        prediction = net.eval()(mask).argmax(dim=1, keepdim=True)
    assert min(dice(prediction[i], mask[i], k) for i in (0, 1) for k in (1, 2)) > 0.8


@pytest.mark.parametrize("size", [(16, 16), (16, 16, 16), (17, 14, 15), (4, 9, 1)])
def test_the_logits_have_the_size_of_the_mask(size):
    net = autoencoder(spatial_dims=len(size))
    mask = torch.zeros(2, 1, *size)
    assert net(mask).shape == (2, 3, *size)
    assert net.decode(net.encode(mask), size).shape == (2, 3, *size)


def test_the_decoder_uses_the_grids_of_the_encoder():
    net, grids = autoencoder(), []
    for stage in [*net.encoder, *net.decoder]:
        stage.register_forward_hook(lambda _module, _inputs, output: grids.append(tuple(output.shape[2:])))
    net(torch.zeros(1, 1, 17, 14, 15))
    assert grids == [(9, 7, 8), (5, 4, 4), (9, 7, 8), (17, 14, 15)]


@pytest.mark.parametrize("code", [1, 4])
def test_its_code_has_the_same_shape_as_the_code_of_a_header(code):
    mask, features = torch.zeros(2, 1, 16, 16, 16), torch.zeros(2, 7, 4, 4, 2)
    z = autoencoder(code=code).encode(mask)
    assert z.shape == AlignmentHeader(7, code_channels=32, code=code).encode(features).shape == (2, 32, code)


def test_the_default_code_has_the_same_shape_as_that_of_the_default_header():
    net = SemanticAutoEncoder(2)
    assert net.encode(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 256, 4)
    assert net.header.encoder[0].in_features == 64


def test_the_logits_depend_on_the_code_only():
    net, mask = autoencoder(), masks((16, 16, 16))
    code = net.encode(mask)
    torch.testing.assert_close(net(mask), net.decode(code, (16, 16, 16)))
    # Exchanging the codes of the two samples exchanges their logits: there is no skip connection.
    torch.testing.assert_close(net.decode(code.flip(0), (16, 16, 16)), net(mask).flip(0))
    assert not torch.allclose(code[0], code[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64])
def test_integer_and_float_masks_have_the_same_code(dtype):
    net, mask = autoencoder(), masks((16, 16, 16))
    torch.testing.assert_close(net.encode(mask.to(dtype)), net.encode(mask))


def test_exchanging_two_classes_changes_the_code():
    net, mask = autoencoder(), masks((16, 16, 16))
    assert not torch.allclose(net.encode(mask), net.encode(torch.where(mask == 0, mask, 3 - mask)), atol=1e-3)


@pytest.mark.parametrize("size", [(16, 16), (16, 16, 16)])
def test_every_parameter_receives_a_gradient(size):
    net = autoencoder(spatial_dims=len(size))
    net(masks(size)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in net.parameters())


def test_an_empty_mask_and_a_deepest_grid_of_one_voxel_give_finite_gradients():
    net = autoencoder(features=(8, 8, 8, 8))
    logits = net.train()(torch.zeros(1, 1, 16, 16, 16))
    logits.square().sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("shape", [(2, 3, 16, 16, 16), (2, 1, 16, 16), (16, 16, 16)])
def test_a_mask_of_another_shape_is_refused(shape):
    expected = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"class indices B 1 H W D, got \({expected}\)"):
        autoencoder()(torch.zeros(shape))


@pytest.mark.parametrize("value", [-1, 3])
def test_a_class_index_out_of_range_is_refused(value):
    mask = masks((16, 16, 16))
    mask[0, 0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=rf"{min(value, 0)} to {max(value, 2)}: they must be 0 to 2"):
        autoencoder()(mask)


def test_invalid_options_are_refused():
    with pytest.raises(ValueError, match="at least 2 classes"):
        SemanticAutoEncoder(1)
    for features in ((), (8, 12), (0,)):
        with pytest.raises(ValueError, match="numbers divisible by 8"):
            SemanticAutoEncoder(2, features)
