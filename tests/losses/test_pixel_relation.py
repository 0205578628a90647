# SPDX-License-Identifier: Apache-2.0
"""PixelRelationLoss against closed-form values and a float64 loop over pairs of cells."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.pixel_relation import PixelRelationLoss

SHAPES = [(2, 3, 4, 5), (2, 3, 3, 2, 4)]


def cosines(x: np.ndarray) -> np.ndarray:
    """Cosines of one sample, C x grid, between all pairs of cells, one by one."""
    vectors = [x[(slice(None), *i)] for i in np.ndindex(*x.shape[1:])]
    return np.array([[a @ b / math.sqrt((a @ a) * (b @ b)) for a in vectors] for b in vectors])


@pytest.fixture(scope="session")
def reference(on_common_grid: Callable[..., list[np.ndarray]]) -> Callable[..., float]:
    """The docstring's formula in float64."""

    def compute(student: Tensor, teacher: Tensor, grid: int = 12) -> float:
        maps = on_common_grid(student, teacher, grid)
        return float(np.mean([(cosines(a) - cosines(b)) ** 2 for a, b in zip(*maps, strict=True)]))

    return compute


@pytest.mark.parametrize("degrees", [0, 60, 90, 180])
def test_two_voxels_give_the_closed_form(degrees):
    # The student's two features are at the given angle, the teacher's are orthogonal: two of four entries of G differ.
    angle = math.radians(degrees)
    student = torch.tensor([[2.0, 3 * math.cos(angle)], [0.0, 3 * math.sin(angle)]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[5.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    assert PixelRelationLoss()(student, teacher).item() == pytest.approx(math.cos(angle) ** 2 / 2, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", [2, 3, 12])
def test_random_features_agree_with_numpy(normal, reference, shape, grid):
    student, teacher = normal(shape, 0), normal(shape, 1)
    assert PixelRelationLoss(grid)(student, teacher).item() == pytest.approx(
        reference(student, teacher, grid), abs=1e-6
    )


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_default_has_twelve_cells_per_axis(normal, reference, dimensions):
    shape = (1, 2, 26, *[1] * (dimensions - 1))
    student, teacher = normal(shape, 0), normal(shape, 1)
    assert PixelRelationLoss()(student, teacher).item() == pytest.approx(reference(student, teacher, 12), abs=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid"),
    [((4, 6), (2, 3)), ((7, 3), (5, 4)), ((2, 4, 3), (4, 2, 3)), ((5, 5, 2), (3, 7, 1))],
)
@pytest.mark.parametrize("grid", [3, 12])
def test_different_grids_are_pooled_and_never_up_sampled(normal, reference, student_grid, teacher_grid, grid):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 4, *teacher_grid), 1)
    assert PixelRelationLoss(grid)(student, teacher).item() == pytest.approx(
        reference(student, teacher, grid), abs=1e-6
    )


@pytest.mark.parametrize("grid", [2, 12])
def test_the_grid_limits_the_size_of_the_matrices(normal, grid, monkeypatch):
    matrices = []
    relations = PixelRelationLoss.relations
    monkeypatch.setattr(PixelRelationLoss, "relations", lambda *a: matrices.append(relations(*a)) or matrices[-1])
    PixelRelationLoss(grid)(normal((1, 2, 20, 3, 4), 0), normal((1, 5, 9, 3, 6), 1))
    cells = min(grid, 9) * min(grid, 3) * min(grid, 4)
    assert [tuple(g.shape) for g in matrices] == [(1, cells, cells)] * 2


@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_rotating_the_channels_does_not_change_the_value(normal, reference, changed):
    maps = {"student": normal((2, 4, 3, 3, 2), 0), "teacher": normal((2, 4, 3, 3, 2), 1)}
    expected = {grid: reference(**maps, grid=grid) for grid in (2, 12)}
    rotation, _ = np.linalg.qr(normal((4, 4), 2).double().numpy())
    maps[changed] = torch.tensordot(torch.from_numpy(rotation).float(), maps[changed], ([1], [1])).movedim(0, 1)
    for grid, value in expected.items():
        assert PixelRelationLoss(grid)(**maps).item() == pytest.approx(value, abs=1e-6)


def test_the_length_of_a_feature_does_not_change_the_value(normal, reference):
    student, teacher = normal((2, 3, 2, 3, 2), 0), normal((2, 3, 2, 3, 2), 1)
    lengths = 10 ** normal((2, 1, 2, 3, 2), 2)
    loss = PixelRelationLoss()(student * lengths, teacher / lengths)
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)


def test_repeated_channels_have_the_same_relations(normal):
    student = normal((2, 3, 3, 3, 2), 0)
    assert PixelRelationLoss()(student, student.repeat(1, 2, 1, 1, 1)).item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeating_the_patch_does_not_change_the_value(normal, reference, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    tiles = (1, 1, *[2] * (len(shape) - 2))
    loss = PixelRelationLoss()(student.repeat(tiles), teacher.repeat(tiles))
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)


def test_repeating_every_voxel_of_a_cell_does_not_change_the_value(normal, reference):
    student, teacher = normal((2, 3, 2, 2, 2), 0), normal((2, 3, 2, 2, 2), 1)
    fine = [x.repeat_interleave(3, 2).repeat_interleave(3, 3).repeat_interleave(3, 4) for x in (student, teacher)]
    assert PixelRelationLoss(2)(*fine).item() == pytest.approx(reference(student, teacher), abs=1e-6)


def test_the_gradient_agrees_with_finite_differences(normal, reference, numerical_gradient):
    student, teacher = normal((1, 2, 3, 4), 0).requires_grad_(), normal((1, 3, 3, 4), 1)
    PixelRelationLoss(2)(student, teacher).backward()
    expected = numerical_gradient(lambda x: reference(x, teacher, 2), student)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-5)


def test_the_gradient_is_orthogonal_to_the_features(normal):
    student = normal((2, 3, 2, 3, 2), 0).requires_grad_()
    PixelRelationLoss()(student, normal((2, 3, 2, 3, 2), 1)).backward()
    assert student.grad.abs().max() > 1e-3
    assert (student.grad * student.detach()).sum(1).abs().max() < 1e-6


def test_a_zero_voxel_has_no_relations_and_gets_no_gradient():
    # The student's G is diag(1, 0), the teacher's is all ones: three of four entries differ by 1.
    student = torch.tensor([[1.0, 0.0], [2.0, 0.0]]).view(1, 2, 1, 2).requires_grad_()
    loss = PixelRelationLoss()(student, torch.ones(1, 2, 1, 2))
    loss.backward()
    assert loss.item() == pytest.approx(3 / 4, abs=1e-6)
    assert student.grad[..., 1].abs().max() == 0
    assert torch.isfinite(student.grad).all()


def test_zero_maps_give_a_value_and_gradient_of_0():
    student = torch.zeros(2, 3, 2, 2, 2).requires_grad_()
    loss = PixelRelationLoss()(student, torch.zeros(2, 3, 2, 2, 2))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("grid", [1, 0, -3])
def test_a_grid_less_than_2_is_refused(grid):
    with pytest.raises(ValueError, match=f"grid must be at least 2, got {grid}"):
        PixelRelationLoss(grid)
