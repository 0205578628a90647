# SPDX-License-Identifier: Apache-2.0
"""The cascade adapters against a float64 NumPy computation from their weights."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scripts.networks.cascade_fusion import CascadeFusion, ChannelUnit, SpaceChannelCascade, SpatialUnit

SIZES = {2: (5, 4), 3: (3, 4, 5)}


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module) -> nn.Module:
    """Replace every parameter by random numbers; the scales gamma stay positive."""
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            noise = normal(tuple(p.shape), 100 + i)
            p.copy_(0.2 + noise.abs() if name.endswith("norm.weight") else 0.5 * noise)
    return module


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def convolve(x: np.ndarray, conv: nn.Conv2d | nn.Conv3d) -> np.ndarray:
    """Convolution with zero padding that keeps the size, one kernel offset and one output channel at a time."""
    weight, dims = array(conv.weight), x.ndim - 2
    outputs, inputs, *kernel = weight.shape
    padded = np.pad(x, [(0, 0), (0, 0), *((k // 2, k // 2) for k in kernel)])
    out = np.zeros((len(x), outputs, *x.shape[2:]))
    for o, *offset in product(range(outputs), *(range(k) for k in kernel)):
        first = o // (outputs // conv.groups) * inputs
        window = tuple(slice(a, a + n) for a, n in zip(offset, x.shape[2:], strict=True))
        part = padded[(slice(None), slice(first, first + inputs), *window)]
        out[:, o] += np.tensordot(part, weight[(o, slice(None), *offset)], axes=(1, 0))
    return out if conv.bias is None else out + array(conv.bias).reshape(1, -1, *[1] * dims)


def spatial(unit: SpatialUnit, x: np.ndarray) -> np.ndarray:
    gamma, beta = array(unit.norm.weight), array(unit.norm.bias)
    channels, size = x.shape[1], x.shape[1] // unit.norm.num_groups
    kept, rest = np.zeros_like(x), np.zeros_like(x)
    for b, c in np.ndindex(*x.shape[:2]):
        group = x[b, c // size * size : (c // size + 1) * size]
        normed = (x[b, c] - group.mean()) / np.sqrt(group.var() + 1e-5) * gamma[c] + beta[c]
        gate = 1 / (1 + np.exp(-gamma[c] / gamma.sum() * normed))
        kept[b, c] = np.where(gate > 0.5, 1, gate) * x[b, c]
        rest[b, (c + channels // 2) % channels] = np.where(gate > 0.5, 0, gate) * x[b, c]
    return kept + rest


def channel(unit: ChannelUnit, x: np.ndarray) -> np.ndarray:
    half = x.shape[1] // 2
    upper, lower = convolve(x[:, :half], unit.squeeze_upper), convolve(x[:, half:], unit.squeeze_lower)
    rich = convolve(upper, unit.grouped) + convolve(upper, unit.pointwise)
    reused = np.concatenate([convolve(lower, unit.added), lower], axis=1)
    axes = tuple(range(2, x.ndim))
    first, second = (np.exp(branch.mean(axes, keepdims=True)) for branch in (rich, reused))
    return (first * rich + second * reused) / (first + second)


def upsample(x: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Linear interpolation between cell centres, constant beyond the outermost ones."""
    for axis, n in enumerate(grid, start=2):
        size = x.shape[axis]
        centres = (np.arange(n) + 0.5) * size / n - 0.5
        x = np.apply_along_axis(lambda line, at=centres: np.interp(at, np.arange(len(line)), line), axis, x)
    return x


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [2, 3, 5, 8, 12])
def test_the_units_agree_with_numpy(dims, channels):
    cascade, x = randomised(SpaceChannelCascade(channels, 6, dims)), normal((2, channels, *SIZES[dims]))
    refined = spatial(cascade.space, array(x))
    np.testing.assert_allclose(array(cascade.space(x)), refined, atol=1e-6)
    fused = channel(cascade.channel, refined)
    np.testing.assert_allclose(array(cascade.channel(cascade.space(x))), fused, atol=1e-5)
    np.testing.assert_allclose(array(cascade(x)), convolve(fused, cascade.project), atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [2, 7, 24])
def test_the_shape_is_kept_unless_out_channels_is_set(dims, channels):
    x = normal((2, channels, *SIZES[dims]))
    assert SpaceChannelCascade(channels, spatial_dims=dims)(x).shape == x.shape
    assert SpaceChannelCascade(channels, 9, dims)(x).shape == (2, 9, *SIZES[dims])


def test_the_halves_exchange_the_voxels_that_are_not_kept():
    # The normalised values are +-1 and w = 1/4, so the gate is sigmoid(+-1/4): -1 is not kept, and its gate is
    # 1 / (1 + e^(1/4)).
    unit, x = SpatialUnit(4), torch.tensor([1.0, -1.0, -1.0, 1.0]).view(1, 4, 1, 1)
    gate = 1 / (1 + math.exp(0.25))
    expected = [1 - gate, -gate, -gate, 1 - gate]
    np.testing.assert_allclose(unit(x).flatten().tolist(), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [4, 6, 9])
def test_the_spatial_unit_is_the_identity_if_every_voxel_is_kept(channels):
    unit, x = SpatialUnit(channels), normal((2, channels, 3, 3))
    nn.init.constant_(unit.norm.bias, 100.0)
    assert torch.equal(unit(x), x)


def test_scales_that_sum_to_0_give_a_finite_output_and_gradient():
    unit = SpatialUnit(4)
    with torch.no_grad():
        unit.norm.weight.copy_(torch.tensor([1.0, -1.0, 2.0, -2.0]))
    out = unit(normal((2, 4, 3, 3)).requires_grad_())
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(unit.norm.weight.grad).all()


@pytest.mark.parametrize("channels", [2, 3, 7, 8, 24, 48, 320])
def test_each_normalisation_group_has_at_least_two_channels(channels):
    groups = SpatialUnit(channels).norm.num_groups
    assert channels % groups == 0
    assert channels // groups >= 2
    assert groups <= 16
    assert groups == {8: 4, 24: 12, 48: 16, 320: 16}.get(channels, 1)


@pytest.mark.parametrize(
    ("channels", "upper", "lower"), [(2, (1, 1), (1, 1)), (8, (4, 2), (4, 2)), (11, (5, 2), (6, 3))]
)
def test_the_channels_of_each_half_are_halved(channels, upper, lower):
    unit = ChannelUnit(channels)
    assert (unit.squeeze_upper.in_channels, unit.squeeze_upper.out_channels) == upper
    assert (unit.squeeze_lower.in_channels, unit.squeeze_lower.out_channels) == lower
    assert unit.grouped.groups == (2 if channels == 8 else 1)


def test_a_single_channel_is_refused():
    with pytest.raises(ValueError, match="at least 2 channels, got 1"):
        SpaceChannelCascade(1)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [[2], [5, 8], [8, 3, 12]])
def test_gradients_reach_every_parameter_and_every_stage(dims, channels):
    fusion = CascadeFusion(channels, 7, dims)
    stages = [normal((2, c, *[7 - 2 * i] * dims), i).requires_grad_() for i, c in enumerate(channels)]
    out = fusion(stages)
    (out * normal(tuple(out.shape), 9)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in stages)


@pytest.mark.parametrize("grids", [[(6, 4), (3, 2), (2, 1)], [(5, 4, 3), (3, 2, 2), (1, 1, 1)]])
def test_stages_are_fused_from_deep_to_shallow(grids):
    channels = [4, 5, 8]
    fusion = randomised(CascadeFusion(channels, 6, len(grids[0])))
    stages = [normal((2, c, *grid), i) for i, (c, grid) in enumerate(zip(channels, grids, strict=True))]
    maps = [array(cascade(x)) for cascade, x in zip(fusion.cascades, stages, strict=True)]
    expected = maps[0] + upsample(maps[1] + upsample(maps[2], grids[1]), grids[0])
    out = fusion(stages)
    assert out.shape == (2, 6, *grids[0])
    np.testing.assert_allclose(array(out), expected, atol=1e-5)


def test_another_number_of_stages_is_refused():
    with pytest.raises(ValueError, match="built for 2 stages, got 1 feature maps"):
        CascadeFusion([4, 8], 6)([torch.zeros(1, 4, 2, 2, 2)])
