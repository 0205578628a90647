# SPDX-License-Identifier: Apache-2.0
"""ContourletTextureLoss against a float64 NumPy computation, and its response to direction, shift and spacing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses import contourlet_texture
from scripts.losses._directional_filters import laplacian_pyramid
from scripts.losses.contourlet_texture import ContourletTextureLoss

STATISTICS = ["orientation", "subband_mse"]
SHAPES = [(2, 3, 9, 8), (2, 3, 8, 9, 6)]


def wave(grid: Sequence[int], cycles_per_voxel: Sequence[float], phase: float = 0.0) -> Tensor:
    turns = np.tensordot(cycles_per_voxel, np.indices(tuple(grid)), axes=1)
    return torch.from_numpy(np.cos(2 * np.pi * turns + phase)).float()[None, None]


def along(x: np.ndarray, axis: int, matrix: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)


def down_and_up_matrices(size: int) -> tuple[np.ndarray, np.ndarray]:
    blur = np.zeros((size, size))
    for i, (offset, weight) in itertools.product(range(size), zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True)):
        blur[i, min(abs(i + offset), 2 * (size - 1) - abs(i + offset))] += weight / 16
    return blur[::2], 2 * blur[:, ::2]


def band_filters(grid: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """D_k at each frequency of the full FFT. The energy of a Nyquist frequency is averaged over both signs."""
    golden = (1 + 5**0.5) / 2
    if len(grid) == 2:
        share, normals = 8 / 9, [[math.cos(a), math.sin(a)] for a in (0, math.pi / 3, 2 * math.pi / 3)]
    else:
        signed = [np.array([0, sign, golden]) / math.hypot(1, golden) for sign in (1, -1)]
        share, normals = 5 / 6, [np.roll(n, shift) for shift in range(3) for n in signed]
    filters = np.zeros((len(normals), *grid))
    for index in itertools.product(*(range(n) for n in grid)):
        cycles = [[i, -i] if 2 * i == n else [i if 2 * i < n else i - n] for i, n in zip(index, grid, strict=True)]
        waves = [np.array(c) / grid / spacing for c in itertools.product(*cycles)] if any(index) else []
        energies = [[share * (np.dot(n, w) ** 2 / np.dot(w, w)) ** 2 for n in normals] for w in waves]
        filters[(slice(None), *index)] = np.sqrt(np.mean(energies, axis=0)) if waves else 0
    return filters


def band_responses(x: np.ndarray, levels: int, spacing: Sequence[float]) -> list[list[np.ndarray]]:
    """The responses of each level and band."""
    result, spacing = [], list(spacing)[: x.ndim - 2]
    for _ in range(levels):
        halved = {axis: down_and_up_matrices(x.shape[axis]) for axis in range(2, x.ndim) if x.shape[axis] > 2}
        coarse = x
        for axis, (down, _) in halved.items():
            coarse = along(coarse, axis, down)
        smooth = coarse
        for axis, (_, up) in halved.items():
            smooth = along(smooth, axis, up)
        axes = tuple(range(2, x.ndim))
        spectrum = np.fft.fftn(x - smooth, axes=axes)
        responses = [np.fft.ifftn(spectrum * d, axes=axes) for d in band_filters(x.shape[2:], spacing)]
        assert max(np.abs(y.imag).max() for y in responses) < 1e-12
        result.append([y.real for y in responses])
        spacing = [s * (2 if axis + 2 in halved else 1) for axis, s in enumerate(spacing)]
        x = coarse
    return result


@pytest.fixture(scope="session")
def reference(pooled: Callable[..., np.ndarray]) -> Callable[..., float]:
    """The docstring's formula in float64."""

    def compute(loss: ContourletTextureLoss, student: Tensor, teacher: Tensor) -> float:
        maps = [x.double().numpy() for x in (student, teacher)]
        for i, x in enumerate(maps):
            if x.shape[1] > loss.max_channels:
                maps[i] = along(x, 1, loss.projection(x.shape[1]).double().numpy())
        common = np.minimum(maps[0].shape[2:], maps[1].shape[2:])
        maps = [pooled(x, common) for x in maps]
        s, t = (band_responses(x, loss.levels, loss.spacing) for x in maps)
        if loss.statistic == "subband_mse":
            return float(sum(np.mean((np.array(a) - np.array(b)) ** 2) for a, b in zip(s, t, strict=True)))
        offsets = [1e-4 * np.sqrt((x**2).reshape(len(x), -1).mean(axis=1)) + 1e-12 for x in maps]
        total = 0.0
        for level in zip(s, t, strict=True):
            p, r = [], []
            for responses, offset in zip(level, offsets, strict=True):
                cells = [min(loss.grid, n) for n in responses[0].shape[2:]]
                e = np.stack([pooled(np.abs(y).mean(axis=1, keepdims=True), cells)[:, 0] for y in responses], axis=1)
                e = e.reshape(*e.shape[:2], -1) + offset[:, None, None]
                p.append(e / e.sum(axis=1, keepdims=True))
                r.append(e.sum(axis=1) / e.sum(axis=1).mean(axis=1, keepdims=True))
            total += np.mean((p[1] * np.log(p[1] / p[0])).sum(axis=1) + np.abs(r[1] - r[0]))
        return float(total)

    return compute


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 2.0, 3.0)])
def test_random_features_agree_with_numpy(normal, reference, shape, statistic, spacing):
    loss = ContourletTextureLoss(2, 3, spacing, statistic)
    student, teacher = normal(shape, 0), normal(shape, 1)
    assert loss(student, teacher).item() == pytest.approx(reference(loss, student, teacher), rel=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 5, 9, 10), (2, 7, 7, 12)), ((1, 7, 8, 5, 6), (1, 2, 6, 7, 6)), ((1, 2, 2, 5, 6), (1, 2, 4, 5, 6))],
)
def test_other_channels_and_grids_agree_with_numpy(normal, reference, student, teacher):
    loss = ContourletTextureLoss(levels=2, grid=2, max_channels=3)
    a, b = normal(student, 0), normal(teacher, 1)
    assert loss(a, b).item() == pytest.approx(reference(loss, a, b), rel=1e-6)


def test_the_defaults_are_2_levels_6_cells_and_orientation(normal):
    maps = normal((1, 9, 14, 14), 0), normal((1, 9, 14, 14), 1)
    assert ContourletTextureLoss()(*maps) == ContourletTextureLoss(2, 6, (1, 1, 1), "orientation", 8, 0)(*maps)


def test_the_gradient_agrees_with_finite_differences(normal, reference):
    loss, student, teacher = (
        ContourletTextureLoss(2, 2),
        normal((1, 2, 6, 5), 0).requires_grad_(),
        normal((1, 2, 6, 5), 1),
    )
    loss(student, teacher).backward()
    step = 1e-6
    for index in [(0, 0, 0, 0), (0, 1, 3, 2), (0, 0, 5, 4), (0, 1, 2, 4)]:
        moved = [student.detach().double() for _ in range(2)]
        moved[0][index] += step
        moved[1][index] -= step
        slope = (reference(loss, moved[0], teacher) - reference(loss, moved[1], teacher)) / (2 * step)
        assert student.grad[index].item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize(
    ("grid", "direction", "other"),
    [((48, 48), (0.2, 0.1), (-0.1, 0.2)), ((24, 24, 24), (0.3, 0.1, 0.05), (0.05, 0.3, 0.1))],
)
def test_another_orientation_gives_more_than_ten_times_the_value_of_any_shift(grid, direction, other):
    teacher = wave(grid, direction)
    loss = ContourletTextureLoss(grid=grid[0] // 8)
    shifted = max(loss(wave(grid, direction, phase), teacher).item() for phase in (0.8, 1.6, 2.4, 3.1, 4.7))
    assert loss(wave(grid, other), teacher).item() > 10 * shifted
    ablation = ContourletTextureLoss(statistic="subband_mse")  # for which both are equally different
    assert ablation(wave(grid, other), teacher).item() < 1.2 * ablation(wave(grid, direction, 1.6), teacher).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_subband_mse_is_independent_of_direction(normal, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    details, _ = laplacian_pyramid((student - teacher).double(), 2, (1.0,) * (len(shape) - 2))
    bands = 3 if len(shape) == 4 else 6
    axes = tuple(range(2, len(shape)))
    expected = sum((d - d.mean(axes, keepdim=True)).square().mean().item() / bands for d, _ in details)
    assert ContourletTextureLoss(statistic="subband_mse")(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_the_spacing_makes_waves_that_are_nearly_parallel_in_mm_similar():
    # The waves are at 27 and 56 degrees in voxels, but at 4 and 11 degrees in mm if the second axis has voxels of 8 mm.
    student, teacher = wave((48, 48), (0.2, 0.3)), wave((48, 48), (0.2, 0.1))
    in_mm, in_voxels = (ContourletTextureLoss(1, 1, (1.0, s))(student, teacher).item() for s in (8.0, 1.0))
    assert in_mm < 0.1 * in_voxels


def test_at_most_max_channels_are_filtered(normal, monkeypatch):
    channels = []
    filter_bank = contourlet_texture.directional_bands
    monkeypatch.setattr(
        contourlet_texture, "directional_bands", lambda d, s: channels.append(d.shape[1]) or filter_bank(d, s)
    )
    ContourletTextureLoss()(normal((1, 20, 6, 6), 0), normal((1, 5, 6, 6), 1))
    assert channels == [8, 8, 5, 5]


@pytest.mark.parametrize("channels", [9, 32])
def test_the_projection_is_orthonormal_and_depends_on_the_seed_only(channels):
    rows = ContourletTextureLoss().projection(channels)
    torch.manual_seed(5)
    np.testing.assert_allclose((rows @ rows.T).numpy(), np.eye(8), atol=1e-6)
    assert torch.equal(rows, ContourletTextureLoss().projection(channels))
    assert not torch.allclose(rows, ContourletTextureLoss(seed=1).projection(channels))


@pytest.mark.parametrize("shape", SHAPES)
def test_gain_and_sign_of_the_maps_do_not_change_the_value(normal, shape):
    loss, student, teacher = ContourletTextureLoss(), normal(shape, 0), normal(shape, 1)
    assert loss(-1e3 * student, 1e-3 * teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 10, 9, 8), (1, 10, 7, 6, 9)])
@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, 1 / 3), (1e3 / 7, 0.1)])
def test_maps_without_texture_agree_and_have_a_finite_gradient(shape, values):
    student, teacher = (torch.full(shape, value) for value in values)
    loss = ContourletTextureLoss()(student.requires_grad_(), teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-3)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("value", [0.0, 1 / 3])
def test_a_student_without_texture_gets_a_finite_value_and_gradient(normal, reference, value):
    loss, teacher = ContourletTextureLoss(grid=2), normal((1, 2, 6, 8, 7), 0)
    student = torch.full_like(teacher, value)
    assert loss(student, teacher).item() == pytest.approx(reference(loss, student, teacher), rel=1e-5)
    student[0, 0, 3, 4, 3] += 1e-6
    student.requires_grad_()
    loss(student, teacher).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "student", "teacher", "message"),
    [
        ({}, (1, 2, 2, 8), (1, 2, 8, 1), "need an axis of at least 3 voxels"),
        ({"statistic": "subband_mse"}, (1, 2, 4, 4), (1, 3, 4, 4), "the same number of channels for subband_mse"),
        ({"spacing": (1.0, 1.0)}, (1, 2, 4, 4, 4), (1, 3, 4, 4, 4), "need a spacing of three"),
    ],
)
def test_unsuitable_maps_are_refused_with_both_shapes(options, student, teacher, message):
    with pytest.raises(ValueError, match=message) as error:
        ContourletTextureLoss(**options)(torch.zeros(student), torch.zeros(teacher))
    assert f"Student {student} and teacher {teacher}" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "mse"}, "Unknown statistic 'mse': choose one of orientation, subband_mse"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"grid": 0}, "grid must be at least 1, got 0"),
        ({"max_channels": 0}, "max_channels must be at least 1, got 0"),
        ({"spacing": (1.0, 0.0, 1.0)}, "two or three positive numbers"),
        ({"spacing": (1.0,)}, "two or three positive numbers"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContourletTextureLoss(**options)
