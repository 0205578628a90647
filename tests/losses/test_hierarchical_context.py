# SPDX-License-Identifier: Apache-2.0
"""HierarchicalContextLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.hierarchical_context import HierarchicalContextLoss


@pytest.fixture(scope="session")
def reference(
    pooled: Callable[..., np.ndarray], on_common_grid: Callable[..., list[np.ndarray]]
) -> Callable[..., float]:
    """The docstring's formula in float64."""

    def compute(student: Tensor, teacher: Tensor) -> float:
        s, t = on_common_grid(student, teacher)
        grid = s.shape[2:]
        total, weights = ((s - t) ** 2).mean(), 1.0
        for level, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
            if level < min(grid):
                cells = (level,) * len(grid)
                total += weight * ((pooled(s, cells) - pooled(t, cells)) ** 2).mean()
                weights += weight
        return float(total / weights)

    return compute


def checkerboard(grid: tuple[int, ...]) -> Tensor:
    parity = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).sum(0) % 2
    return (1.0 - 2.0 * parity)[None, None]


@pytest.mark.parametrize(
    ("grid", "weights"),
    [
        ((8, 8), 1.875),
        ((8, 8, 8), 1.875),
        ((4, 4, 4), 1.375),  # level 4 would be the map itself
        ((8, 8, 4), 1.375),
        ((8, 8, 2), 1.125),
        ((2, 2), 1.125),
        ((8, 8, 1), 1.0),
        ((1, 1), 1.0),
    ],
)
def test_a_difference_with_zero_mean_counts_at_full_resolution_only(grid, weights):
    student = checkerboard(grid)
    assert HierarchicalContextLoss()(student, torch.zeros_like(student)).item() == pytest.approx(1 / weights, abs=1e-6)


@pytest.mark.parametrize(("size", "expected"), [(2, 1 / 1.125), (4, 1.25 / 1.375), (8, 1.75 / 1.875)])
def test_opposite_halves_count_at_every_level_except_the_coarsest(size, expected):
    student = torch.ones(1, 1, size, size)
    student[..., size // 2 :] = -1.0
    assert HierarchicalContextLoss()(student, 0 * student).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (9, 9), (2, 3, 4), (9, 8, 8)])
def test_a_constant_difference_gives_its_square_at_any_patch_size(normal, grid):
    student = normal((2, 3, *grid), 0)
    assert HierarchicalContextLoss()(student, student + 0.5).item() == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid"),
    [((4, 6), (4, 6)), ((9, 7), (9, 7)), ((5, 6, 7), (5, 6, 7)), ((8, 3, 5), (4, 6, 5)), ((2, 2, 2), (6, 6, 6))],
)
def test_random_features_agree_with_numpy(normal, reference, student_grid, teacher_grid):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 3, *teacher_grid), 1)
    assert HierarchicalContextLoss()(student, teacher).item() == pytest.approx(reference(student, teacher), abs=1e-6)


def test_the_gradient_agrees_with_finite_differences(normal, reference, numerical_gradient):
    student, teacher = normal((1, 2, 3, 5), 0).requires_grad_(), normal((1, 2, 3, 5), 1)
    HierarchicalContextLoss()(student, teacher).backward()
    expected = numerical_gradient(lambda x: reference(x, teacher), student, step=1e-4)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 8, 8, 8)])
def test_repeating_every_voxel_does_not_change_the_value(normal, shape):
    student, teacher, loss = normal(shape, 0), normal(shape, 1), HierarchicalContextLoss()
    fine = [torch.kron(x, torch.ones([1, 1, *[2] * (len(shape) - 2)])) for x in (student, teacher)]
    assert loss(*fine).item() == pytest.approx(loss(student, teacher).item(), abs=1e-6)


def test_detail_finer_than_the_grid_of_a_coarse_teacher_does_not_count():
    assert HierarchicalContextLoss()(checkerboard((8, 8, 8)), torch.zeros(1, 1, 4, 4, 4)).item() == 0.0


def test_the_value_scales_with_the_square_of_the_difference(normal):
    student, teacher = normal((2, 3, 5, 5, 5), 0), normal((2, 3, 5, 5, 5), 1)
    far = teacher + 3 * (student - teacher)
    expected = 9 * HierarchicalContextLoss()(student, teacher).item()
    assert HierarchicalContextLoss()(far, teacher).item() == pytest.approx(expected, rel=1e-6)
