# SPDX-License-Identifier: Apache-2.0
"""MultiScalePriorLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.multi_scale_prior import MultiScalePriorLoss


@pytest.fixture(scope="session")
def reference(pooled: Callable[..., np.ndarray]) -> Callable[..., float]:
    """The docstring's formula in float64."""

    def compute(student: Tensor, teacher: Tensor, scales: Sequence[int] = (8, 4, 2, 1)) -> float:
        total = weights = 0.0
        for i, scale in enumerate(scales):
            if scale > min(*student.shape[2:], *teacher.shape[2:]):
                continue
            s, t = (pooled(x.detach().double().numpy(), [scale] * (x.ndim - 2)) for x in (student, teacher))
            dot = np.einsum("bc...,bc...->b...", s, t)
            cosine = dot / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
            total += (1 - cosine).mean() / 2**i
            weights += 1 / 2**i
        return float(total / weights)

    return compute


def halves(size: int) -> tuple[Tensor, Tensor]:
    """A student along the first channel; a teacher whose second half is along the second channel."""
    student, teacher = torch.zeros(1, 2, size, size, size), torch.zeros(1, 2, size, size, size)
    student[:, 0] = 3.0
    teacher[:, 0, : size // 2] = 1.0
    teacher[:, 1, size // 2 :] = 1.0
    return student, teacher


@pytest.mark.parametrize(("size", "fine"), [(16, 1.75), (8, 1.75), (4, 0.75), (2, 0.25)])
def test_orthogonal_halves_give_the_closed_form(size, fine):
    # 1/2 at each scale that separates the halves; 1 - cos 45 degrees at scale 1, which has the weight 1/8.
    expected = (0.5 * fine + 0.125 * (1 - math.sqrt(0.5))) / (fine + 0.125)
    assert MultiScalePriorLoss()(*halves(size)).item() == pytest.approx(expected, abs=1e-6)


def test_the_first_scale_has_the_largest_weight():
    one, two = 1 - math.sqrt(0.5), 0.5
    for scales, expected in [((1, 2), (one + two / 2) / 1.5), ((2, 1), (two + one / 2) / 1.5), ((2, 2, 1), None)]:
        value = MultiScalePriorLoss(scales)(*halves(4)).item()
        assert value == pytest.approx(expected or (1.5 * two + one / 4) / 1.75, abs=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (9, 8), (3, 2, 2), (8, 9, 8)])
@pytest.mark.parametrize(("factor", "expected"), [(-2.0, 2.0), (0.5, 0.0)])
def test_opposite_directions_give_2_and_equal_directions_give_0_at_any_size(normal, grid, factor, expected):
    student = normal((2, 3, *grid), 0)
    assert MultiScalePriorLoss()(student, factor * student).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid"),
    [((8, 9), (8, 9)), ((4, 4, 4), (4, 4, 4)), ((9, 10, 8), (5, 12, 8)), ((7, 5), (16, 3)), ((2, 3, 4), (6, 6, 6))],
)
@pytest.mark.parametrize("scales", [(8, 4, 2, 1), (2, 1), (1, 16, 3)])
def test_random_features_agree_with_numpy(normal, reference, student_grid, teacher_grid, scales):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 3, *teacher_grid), 1)
    loss = MultiScalePriorLoss(scales)(student, teacher)
    assert loss.item() == pytest.approx(reference(student, teacher, scales), abs=1e-6)


def test_the_default_scales_are_8_4_2_1(normal, reference):
    student, teacher = normal((2, 3, 9, 8), 0), normal((2, 3, 8, 9), 1)
    assert MultiScalePriorLoss()(student, teacher).item() == pytest.approx(reference(student, teacher), abs=1e-6)


def test_the_gradient_agrees_with_finite_differences(normal, reference, numerical_gradient):
    student, teacher = normal((1, 3, 2, 3), 0).requires_grad_(), normal((1, 3, 2, 3), 1)
    MultiScalePriorLoss()(student, teacher).backward()
    expected = numerical_gradient(lambda x: reference(x, teacher), student)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-5)


def test_the_gradient_is_orthogonal_to_the_feature_of_a_cell(normal):
    student, teacher = normal((1, 4, 3, 3), 0).requires_grad_(), normal((1, 4, 3, 3), 1)
    MultiScalePriorLoss((3,))(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert (student * student.grad).sum(1).abs().max().item() < 1e-6


@pytest.mark.parametrize(("student_scale", "teacher_scale"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_zero_map_gives_one_half_and_two_zero_maps_give_0_without_a_gradient(student_scale, teacher_scale):
    student = (student_scale * torch.ones(2, 3, 4, 4, 4)).requires_grad_()
    loss = MultiScalePriorLoss()(student, teacher_scale * torch.ones(2, 3, 4, 4, 4))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (student_scale != teacher_scale), abs=1e-6)
    assert student.grad.abs().max().item() < 1e-6


def test_the_length_of_the_features_does_not_change_the_value(normal, reference):
    student, teacher = normal((2, 3, 4, 4), 0), normal((2, 3, 4, 4), 1)
    loss = MultiScalePriorLoss()(1e-3 * student, 1e3 * teacher)
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 8, 8, 8)])
def test_repeating_every_voxel_does_not_change_the_value(normal, shape):
    student, teacher, loss = normal(shape, 0), normal(shape, 1), MultiScalePriorLoss()
    fine = [torch.kron(x, torch.ones([1, 1, *[2] * (len(shape) - 2)])) for x in (student, teacher)]
    assert loss(*fine).item() == pytest.approx(loss(student, teacher).item(), abs=1e-6)


def test_maps_smaller_than_all_scales_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"smaller than all scales \(8, 4\)") as error:
        MultiScalePriorLoss((8, 4))(torch.zeros(2, 3, 8, 8, 8), torch.zeros(2, 3, 8, 8, 3))
    assert "(2, 3, 8, 8, 8)" in str(error.value)
    assert "(2, 3, 8, 8, 3)" in str(error.value)


@pytest.mark.parametrize("scales", [(), (4, 0)])
def test_empty_scales_and_a_scale_of_0_are_refused(scales):
    with pytest.raises(ValueError, match="scales must be one or more numbers of cells of at least 1"):
        MultiScalePriorLoss(scales)
