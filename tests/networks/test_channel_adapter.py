# SPDX-License-Identifier: Apache-2.0
"""ChannelAdapter against a float64 NumPy computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts.networks import ChannelAdapter


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 2)])
def test_it_is_the_same_affine_map_of_the_channels_for_every_voxel(shape):
    torch.manual_seed(0)
    adapter = ChannelAdapter(3, 7, spatial_dims=len(shape) - 2)
    x = torch.randn(shape)
    weight, bias = (p.detach().double().numpy() for p in adapter.parameters())
    expected = np.einsum("oc,bc...->bo...", weight.reshape(7, 3), x.double().numpy())
    expected += bias.reshape(1, 7, *[1] * (len(shape) - 2))
    np.testing.assert_allclose(adapter(x).detach().numpy(), expected, atol=1e-6)


def test_the_student_and_the_adapter_receive_a_gradient():
    adapter = ChannelAdapter(3, 2)
    x = torch.randn(1, 3, 2, 2, 2, requires_grad=True)
    adapter(x).square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
