# SPDX-License-Identifier: Apache-2.0
"""AttentionMapLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses import AttentionMapLoss

SHAPES = [(2, 3, 4, 5), (2, 3, 3, 4, 5)]
OPTIONS = [(1, "l1"), (1, "l2"), (2, "l1"), (2, "l2"), (3, "l2")]


@pytest.fixture(scope="session")
def reference(pooled: Callable[..., np.ndarray]) -> Callable[..., float]:
    """The docstring's formula in float64, on the common grid."""

    def compute(student: Tensor, teacher: Tensor, p: float = 2, norm: str = "l2") -> float:
        maps = [(np.abs(x.detach().double().numpy()) ** p).mean(axis=1) for x in (student, teacher)]
        grid = np.minimum(maps[0].shape, maps[1].shape)[1:]
        flat = [pooled(m, grid).reshape(len(m), -1) for m in maps]
        r = 1 if norm == "l1" else 2
        q_student, q_teacher = (m / np.linalg.norm(m, ord=r, axis=1, keepdims=True) for m in flat)
        return float((np.abs(q_student - q_teacher) ** r).sum(axis=1).mean())

    return compute


@pytest.mark.parametrize(
    ("p", "norm", "expected"), [(1, "l2", 2 / 25), (1, "l1", 2 / 7), (2, "l2", 2 * 49 / 337), (2, "l1", 14 / 25)]
)
def test_two_voxels_give_the_closed_form(p, norm, expected):
    # The activations are (3, -4) and (4, 3). Student maps: (3, 4) / 5 for p = 1, l2; (9, 16) / sqrt(337) for p = 2, l2.
    student, teacher = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2), torch.tensor([4.0, 3.0]).view(1, 1, 1, 2)
    assert AttentionMapLoss(p, norm)(student, teacher).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("p", "norm"), OPTIONS)
def test_random_features_agree_with_numpy(normal, reference, shape, p, norm):
    student, teacher = normal(shape, 0), normal(shape, 1)
    loss = AttentionMapLoss(p, norm)(student, teacher)
    assert loss.item() == pytest.approx(reference(student, teacher, p, norm), abs=1e-6)


def test_the_defaults_are_power_2_and_norm_l2(normal, reference):
    student, teacher = normal(SHAPES[1], 0), normal(SHAPES[1], 1)
    assert AttentionMapLoss()(student, teacher).item() == pytest.approx(reference(student, teacher, 2, "l2"), abs=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradient_agrees_with_finite_differences(normal, reference, numerical_gradient, norm):
    student, teacher = normal((1, 2, 2, 3), 0).requires_grad_(), normal((1, 2, 2, 3), 1)
    AttentionMapLoss(norm=norm)(student, teacher).backward()
    expected = numerical_gradient(lambda x: reference(x, teacher, 2, norm), student)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_zero_features_give_a_finite_value_and_gradient(normal, p, norm):
    student = torch.zeros(2, 3, 2, 2, 2)
    student[0, 0] = 1.0
    student.requires_grad_()
    loss = AttentionMapLoss(p, norm)(student, normal((2, 3, 2, 2, 2), 1))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_the_order_and_sign_of_channels_do_not_change_the_value(normal, reference):
    student, teacher = normal((2, 4, 3, 3, 3), 0), normal((2, 4, 3, 3, 3), 1)
    loss = AttentionMapLoss()(-student[:, [2, 0, 3, 1]], teacher[:, [1, 3, 2, 0]])
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize(("p", "norm"), OPTIONS)
@pytest.mark.parametrize("factor", [1e-2, 1e3])
def test_scaling_the_features_does_not_change_the_value(normal, reference, p, norm, factor):
    student, teacher = normal(SHAPES[1], 0), normal(SHAPES[1], 1)
    loss = AttentionMapLoss(p, norm)(factor * student, teacher / factor)
    assert loss.item() == pytest.approx(reference(student, teacher, p, norm), abs=1e-6)


def test_the_numbers_of_channels_may_differ(normal, reference):
    student, teacher = normal((2, 3, 3, 3, 3), 0), normal((2, 7, 3, 3, 3), 1)
    assert AttentionMapLoss()(student, teacher).item() == pytest.approx(reference(student, teacher), abs=1e-6)
    assert AttentionMapLoss()(student, student.repeat(1, 2, 1, 1, 1)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_maps_without_common_voxels_give_the_upper_bound_2_at_any_size(size, norm):
    student = torch.zeros(1, 1, size, size, size)
    student[..., : size // 2] = 1.0
    assert AttentionMapLoss(norm=norm)(student, 1 - student).item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("size", [2, 5, 9])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_value_is_between_0_and_2_at_any_size(normal, size, norm):
    for seed in range(5):
        student, teacher = normal((2, 2, size, size, size), seed), normal((2, 2, size, size, size), seed + 100)
        assert 0.0 <= AttentionMapLoss(4, norm)(student, teacher).item() <= 2.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_repeating_the_patch_does_not_change_the_value(normal, reference, shape, norm):
    # With n tiles every entry of q shrinks by n^(1/r), and n times as many entries are summed at power r.
    student, teacher = normal(shape, 0), normal(shape, 1)
    tiles = (1, 1, *[2] * (len(shape) - 2))
    loss = AttentionMapLoss(norm=norm)(student.repeat(tiles), teacher.repeat(tiles))
    assert loss.item() == pytest.approx(reference(student, teacher, 2, norm), abs=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid"), [((4, 6), (2, 3)), ((2, 4, 3), (4, 2, 3)), ((3, 5, 4), (2, 4, 6))]
)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_different_grids_are_pooled_to_the_common_grid(normal, reference, student_grid, teacher_grid, norm):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 5, *teacher_grid), 1)
    loss = AttentionMapLoss(norm=norm)(student, teacher)
    assert loss.item() == pytest.approx(reference(student, teacher, 2, norm), abs=1e-6)


def test_a_coarse_teacher_is_not_up_sampled():
    # Both cells of the teacher equal the student's mean there. Detail within a cell does not count.
    student = torch.tensor([math.sqrt(2), 0.0, 0.0, math.sqrt(6)]).view(1, 1, 1, 4)
    teacher = torch.tensor([1.0, math.sqrt(3)]).view(1, 1, 1, 2)
    assert AttentionMapLoss()(student, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_maps_are_pooled_before_they_are_normalised():
    # The powers (1, 0, 4, 4) are pooled to (1/2, 4). Pooling after normalisation would pool (1, 0, 4, 4) / sqrt(33).
    student = torch.tensor([1.0, 0.0, 2.0, 2.0]).view(1, 1, 1, 4)
    teacher = torch.tensor([1.0, 1.0]).view(1, 1, 1, 2)
    expected = 2 - 2 * (0.5 + 4) / math.sqrt(0.5**2 + 4**2) / math.sqrt(2)
    assert AttentionMapLoss()(student, teacher).item() == pytest.approx(expected, abs=1e-6)


def test_an_unknown_norm_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="Unknown norm 'l3': choose one of l1, l2"):
        AttentionMapLoss(norm="l3")


@pytest.mark.parametrize("p", [0, -1, 0.5])
def test_a_power_less_than_1_is_refused(p):
    with pytest.raises(ValueError, match=f"p must be at least 1, got {p}"):
        AttentionMapLoss(p=p)
