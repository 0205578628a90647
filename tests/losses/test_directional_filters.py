# SPDX-License-Identifier: Apache-2.0
"""The Laplacian pyramid and the directional filter bank against their defining properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses._directional_filters import (
    GOLDEN_RATIO,
    PEAK_SHARE,
    band_axes,
    band_weights,
    directional_bands,
    downsample,
    laplacian_pyramid,
    upsample,
)

GRIDS = [(8, 6, 10), (9, 7, 5), (3, 4, 5), (2, 6, 1), (12, 10), (13, 8), (7, 5)]
CPU = torch.device("cpu")


def wave(grid: tuple[int, ...], cycles: tuple[int, ...]) -> Tensor:
    """Periodic plane wave with the given number of cycles along each axis."""
    turns = np.tensordot(np.divide(cycles, grid), np.indices(grid), axes=1)
    return torch.from_numpy(np.cos(2 * np.pi * turns + 0.3))[None, None]


def energy_shares(detail: Tensor, spacing: tuple[float, ...]) -> np.ndarray:
    """Share of each band in the energy of the map without its mean."""
    energies = [float(y.double().square().sum()) for y in directional_bands(detail, spacing)]
    return np.array(energies) / float((detail - detail.mean()).double().square().sum())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_details_and_residual_reconstruct_the_map(normal, grid, levels):
    x = normal((2, 3, *grid), 0)
    details, rebuilt = laplacian_pyramid(x, levels, (1.0,) * len(grid))
    for detail, _ in reversed(details):
        rebuilt = detail + upsample(rebuilt, detail.shape[2:])
    assert (rebuilt - x).abs().max() < 1e-5


def test_the_blur_is_the_binomial_kernel_of_size_5():
    impulse = torch.zeros(1, 1, 9, 9)
    impulse[..., 4, 4] = 1.0
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    expected = np.zeros((5, 5))
    expected[1:4, 1:4] = np.outer(kernel[::2], kernel[::2])  # the kernel at every second voxel
    np.testing.assert_array_equal(downsample(impulse)[0, 0].numpy(), expected)
    spread = upsample(impulse[..., 2:7, 2:7], (9, 9))[0, 0]
    np.testing.assert_array_equal(spread[2:7, 2:7].numpy(), 4 * np.outer(kernel, kernel))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [1 / 3, 1e3 / 7])
def test_a_constant_map_has_no_detail_even_at_the_border(grid, value):
    details, residual = laplacian_pyramid(torch.full((1, 1, *grid), value), 2, (1.0,) * len(grid))
    assert all((detail == 0).all() for detail, _ in details)
    assert (residual == torch.tensor(value)).all()


def test_a_ramp_has_no_detail_away_from_the_border():
    ramp = torch.arange(16.0).view(1, 1, 16, 1).expand(1, 1, 16, 16)
    [(detail, _)], _ = laplacian_pyramid(ramp, 1, (1.0, 1.0))
    assert detail[..., 4:-4, :].abs().max() < 1e-6
    assert detail.abs().max() > 0.1


def test_an_axis_is_halved_while_it_has_three_voxels_and_doubles_its_spacing(normal):
    details, residual = laplacian_pyramid(normal((1, 1, 9, 4, 2), 0), 5, (1.0, 2.0, 3.0))
    assert [tuple(detail.shape[2:]) for detail, _ in details] == [(9, 4, 2), (5, 2, 2), (3, 2, 2)]
    assert [spacing for _, spacing in details] == [(1.0, 2.0, 3.0), (2.0, 4.0, 3.0), (4.0, 4.0, 3.0)]
    assert residual.shape[2:] == (2, 2, 2)


@pytest.mark.parametrize(("dimension", "count"), [(2, 3), (3, 6)])
def test_the_band_axes_are_unit_vectors_at_equal_angles_with_a_constant_sum_of_fourth_powers(dimension, count):
    n = band_axes(dimension).numpy()
    cosines = np.abs(n @ n.T)
    assert n.shape == (count, dimension)
    np.testing.assert_allclose(np.diag(cosines), 1.0)
    np.testing.assert_allclose(cosines[~np.eye(count, dtype=bool)], 0.5 if dimension == 2 else 1 / math.sqrt(5))
    u = np.random.default_rng(0).normal(size=(dimension, 200))
    u /= np.linalg.norm(u, axis=0)
    np.testing.assert_allclose(((n @ u) ** 4).sum(axis=0), 1 / PEAK_SHARE[dimension])


@pytest.mark.parametrize("grid", GRIDS)
def test_the_squared_band_weights_sum_to_1_at_every_frequency_except_0(grid):
    spacing = (0.8, 1.7, 3.1)[: len(grid)]
    total = band_weights(grid, spacing, CPU, torch.float64).square().sum(dim=0).numpy()
    expected = np.ones_like(total)
    expected[(0,) * len(grid)] = 0
    np.testing.assert_allclose(total, expected, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 1.7, 3.1)])
def test_the_responses_contain_all_energy_except_that_of_the_mean(normal, grid, spacing):
    assert energy_shares(normal((1, 1, *grid), 0), spacing[: len(grid)]).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("band", [0, 1, 2])
def test_an_aligned_wave_in_2d_puts_eight_ninths_into_its_band(band):
    # With the spacing (sqrt(3), 1), equal cycles along both axes are a wave at 60 degrees.
    cycles, spacing = [((3, 0), (1.0, 1.0)), ((3, 3), (math.sqrt(3), 1.0)), ((3, -3), (math.sqrt(3), 1.0))][band]
    expected = np.full(3, 1 / 18)
    expected[band] = 8 / 9
    np.testing.assert_allclose(energy_shares(wave((12, 12), cycles), spacing), expected, atol=1e-12)


@pytest.mark.parametrize("band", range(6))
def test_an_aligned_wave_in_3d_puts_five_sixths_into_its_band(band):
    # The spacing GOLDEN_RATIO turns equal cycles along two axes into the icosahedron's direction (1, GOLDEN_RATIO).
    sign, shift = (1, -1)[band % 2], band // 2
    cycles, spacing = np.roll([0, sign * 2, 2], shift), np.roll([1.0, GOLDEN_RATIO, 1.0], shift)
    expected = np.full(6, 1 / 30)
    expected[band] = 5 / 6
    np.testing.assert_allclose(energy_shares(wave((9, 9, 9), tuple(cycles)), tuple(spacing)), expected, atol=1e-12)


def test_a_wave_along_a_band_axis_in_voxels_is_oblique_in_mm():
    detail = wave((32, 32, 32), (0, 5, 8))  # 8 / 5 is nearly GOLDEN_RATIO
    np.testing.assert_allclose(energy_shares(detail, (1.0, 1.0, 1.0))[0], 5 / 6, atol=1e-4)
    direction = np.array([0, 5 / 3, 8]) / math.hypot(5 / 3, 8)
    in_mm = 5 / 6 * (band_axes(3).numpy() @ direction) ** 4
    np.testing.assert_allclose(energy_shares(detail, (1.0, 3.0, 1.0)), in_mm, atol=1e-12)
    assert in_mm[0] < 0.7


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.5, 3.0)])
def test_only_ratios_of_the_spacing_matter(normal, spacing):
    twice = tuple(2 * s for s in spacing)
    same = zip(*(directional_bands(normal((1, 1, 6, 7, 8), 0), s) for s in (spacing, twice)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in same)


@pytest.mark.parametrize(("grid", "axis"), [((8, 6), 0), ((8, 6), 1), ((6, 4, 8), 0), ((6, 4, 8), 1), ((6, 4, 8), 2)])
def test_mirroring_the_map_mirrors_bands_and_responses_on_even_grids(normal, grid, axis):
    # This fails if the Nyquist frequency gets a single sign.
    n = band_axes(len(grid))
    signs = torch.ones(len(grid), dtype=torch.float64)
    signs[axis] = -1
    mirrored = ((n * signs) @ n.T).abs().argmax(dim=1).tolist()
    x, spacing = normal((1, 1, *grid), 0, dtype=torch.float64), (1.0, 1.3, 0.7)[: len(grid)]
    straight = list(directional_bands(x, spacing))
    for k, y in enumerate(directional_bands(x.flip(2 + axis), spacing)):
        torch.testing.assert_close(y, straight[mirrored[k]].flip(2 + axis))


def test_weights_computed_in_inference_mode_can_be_used_in_training(normal):
    band_weights.cache_clear()
    with torch.inference_mode():
        list(directional_bands(normal((1, 1, 4, 4), 0), (1.0, 1.0)))
    x = normal((1, 1, 4, 4), 0).requires_grad_()
    sum(y.square().sum() for y in directional_bands(x, (1.0, 1.0))).backward()
    np.testing.assert_allclose(x.grad.numpy(), 2 * (x - x.mean()).detach().numpy(), atol=1e-5)
