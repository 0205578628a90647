# SPDX-License-Identifier: Apache-2.0
"""CrossImageRelationLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.cross_image_relation import CrossImageRelationLoss

SHAPES = [(3, 3, 4, 3), (2, 3, 3, 4, 2)]


def rows(x: np.ndarray, y: np.ndarray, temperature: float) -> np.ndarray:
    """Row-wise softmax of the cosines between the columns of two C x N matrices."""
    lengths = np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
    e = np.exp(np.divide(x.T @ y, lengths, out=np.zeros_like(lengths), where=lengths > 0) / temperature)
    return e / e.sum(axis=1, keepdims=True)


@pytest.fixture(scope="session")
def reference(on_common_grid: Callable[..., list[np.ndarray]]) -> Callable[..., float]:
    """The docstring's formula in float64, pair by pair."""

    def compute(student: Tensor, teacher: Tensor, temperature: float = 0.1, grid: int = 4) -> float:
        s, t = (m.reshape(*m.shape[:2], -1) for m in on_common_grid(student, teacher, grid))
        values = []
        for i, j in itertools.product(range(len(s)), repeat=2):
            p, q = rows(t[i], t[j], temperature), rows(s[i], s[j], temperature)
            values.append(np.mean(np.sum(p * np.log(p / q), axis=1)))
        return float(np.mean(values))

    return compute


def bernoulli_divergence(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_two_voxels_of_one_image_give_the_closed_form(temperature):
    # The cosine of the two voxels is 0 in the student and -1 in the teacher. Each voxel has cosine 1 with itself.
    student, teacher = torch.eye(2).view(1, 2, 1, 2), torch.tensor([1.0, -2.0]).view(1, 1, 1, 2)
    itself = [1 / (1 + math.exp((cosine - 1) / temperature)) for cosine in (0, -1)]
    loss = CrossImageRelationLoss(temperature)(student, teacher)
    assert loss.item() == pytest.approx(bernoulli_divergence(itself[1], itself[0]), abs=1e-6)


def test_a_difference_between_images_only_changes_the_value():
    # The student's second image has its voxels exchanged. The relations within each image stay the same; across images
    # the rows (1, 0) become (0, 1), in two of the four ordered pairs.
    teacher = torch.eye(2).view(1, 2, 1, 2).repeat(2, 1, 1, 1)
    student = torch.cat([teacher[:1], teacher[1:].flip(3)])
    p = 1 / (1 + math.exp(-1))
    loss = CrossImageRelationLoss(1.0)(student, teacher)
    assert loss.item() == pytest.approx(bernoulli_divergence(p, 1 - p) / 2, abs=1e-6)
    for i in range(2):
        assert CrossImageRelationLoss(1.0)(student[i : i + 1], teacher[i : i + 1]).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_random_features_agree_with_numpy(normal, reference, shape, temperature):
    student, teacher = normal(shape, 0), normal(shape, 1)
    expected = reference(student, teacher, temperature)
    assert expected > 0.01
    assert CrossImageRelationLoss(temperature)(student, teacher).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_defaults_are_temperature_0_1_and_4_cells_per_axis(normal, reference):
    student, teacher = normal((2, 3, 6, 5, 4), 0), normal((2, 3, 6, 5, 4), 1)
    expected = reference(student, teacher, temperature=0.1, grid=4)
    assert CrossImageRelationLoss()(student, teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid", "grid"),
    [((9, 6), (5, 8), 4), ((2, 7), (3, 5), 3), ((5, 6, 3), (4, 2, 9), 3), ((4, 4, 4), (2, 2, 2), 4)],
)
def test_different_grids_and_channels_agree_with_numpy(normal, reference, student_grid, teacher_grid, grid):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 5, *teacher_grid), 1)
    expected = reference(student, teacher, grid=grid)
    loss = CrossImageRelationLoss(grid=grid)(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_batch_of_one_image_is_compared_with_itself(normal, reference):
    student, teacher = normal((1, 3, 3, 3, 3), 0).requires_grad_(), normal((1, 3, 3, 3, 3), 1)
    loss = CrossImageRelationLoss()(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(reference(student, teacher), rel=1e-6)
    assert student.grad.abs().sum() > 0


def test_copies_of_an_image_give_the_value_of_that_image(normal, reference):
    student, teacher = normal((1, 3, 3, 3, 3), 0), normal((1, 3, 3, 3, 3), 1)
    loss = CrossImageRelationLoss()(student.repeat(3, 1, 1, 1, 1), teacher.repeat(3, 1, 1, 1, 1))
    assert loss.item() == pytest.approx(reference(student, teacher), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotating_the_channels_or_scaling_single_voxels_does_not_change_the_value(normal, reference, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    rotation = torch.linalg.qr(normal((3, 3), 2))[0]
    lengths = 0.5 + normal((shape[0], 1, *shape[2:]), 3).abs()
    moved = lengths * torch.einsum("ij,bj...->bi...", rotation, student)
    expected = reference(student, teacher)
    assert CrossImageRelationLoss()(moved, teacher / 50).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_larger_patch_with_the_same_content_does_not_change_the_value(normal, reference, factor):
    student, teacher = normal((2, 3, 4, 4, 4), 0), normal((2, 3, 4, 4, 4), 1)
    larger = [torch.nn.functional.interpolate(x, scale_factor=factor) for x in (student, teacher)]
    assert CrossImageRelationLoss()(*larger).item() == pytest.approx(reference(student, teacher), rel=1e-5)


def test_a_map_of_one_cell_gives_0(normal):
    loss = CrossImageRelationLoss(grid=1)(normal(SHAPES[1], 0), normal(SHAPES[1], 1))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_the_gradient_agrees_with_finite_differences(normal, reference, numerical_gradient):
    student, teacher = normal((2, 2, 2, 2), 0).requires_grad_(), normal((2, 2, 2, 2), 1)
    CrossImageRelationLoss(0.5)(student, teacher).backward()
    expected = numerical_gradient(lambda x: reference(x, teacher, 0.5), student)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("zeroed", [[0, 1], [1]])
def test_zero_features_have_cosine_0_and_a_small_gradient(normal, reference, zeroed):
    student, teacher = normal((2, 3, 2, 2, 2), 0), normal((2, 3, 2, 2, 2), 1)
    student[..., zeroed] = 0
    student.requires_grad_()
    loss = CrossImageRelationLoss()(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(reference(student, teacher), rel=1e-6)
    assert student.grad.abs().max() < 10


def test_a_grid_of_0_cells_is_refused():
    with pytest.raises(ValueError, match="grid must be at least 1, got 0"):
        CrossImageRelationLoss(grid=0)
