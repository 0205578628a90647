# SPDX-License-Identifier: Apache-2.0
"""IntraClassVariationLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.intra_class_variation import IntraClassVariationLoss

SHAPES = [(2, 3, 4, 5), (2, 3, 3, 4, 5)]


@pytest.fixture(scope="session")
def reference(by_class: Callable[..., list[Any]], cosine: Callable[..., float]) -> Callable[..., float]:
    """The docstring's formula in float64, sample by sample and cell by cell."""

    def variation(cells: np.ndarray, shares: list[np.ndarray]) -> np.ndarray:
        weighted = [(a, np.average(cells, axis=0, weights=a)) for a in shares]
        return np.array([sum(a[i] * cosine(f, prototype) for a, prototype in weighted) for i, f in enumerate(cells)])

    def compute(student: Tensor, teacher: Tensor, label: Tensor) -> float:
        squares = []
        for s, t, shares in by_class(student, teacher, label):
            squares.append(np.mean((variation(s, shares) - variation(t, shares)) ** 2))
        return float(np.mean(squares))

    return compute


def test_two_voxels_of_one_class_give_the_closed_form():
    # Two vectors of equal length at 90 degrees are each at 45 degrees to their mean. Equal vectors are at 0 degrees.
    student, teacher = torch.eye(2).view(1, 2, 1, 2), torch.ones(1, 2, 1, 2)
    loss = IntraClassVariationLoss()(student, teacher, torch.zeros(1, 1, 1, 2))
    assert loss.item() == pytest.approx((1 - math.sqrt(0.5)) ** 2, abs=1e-6)


def test_every_voxel_is_compared_with_the_prototype_of_its_own_class_only():
    # Each voxel is its own class, so it equals its prototype and the maps agree.
    student, teacher = torch.eye(2).view(1, 2, 1, 2), torch.ones(1, 2, 1, 2)
    assert IntraClassVariationLoss()(student, teacher, torch.tensor([0, 1]).view(1, 1, 1, 2)).item() == pytest.approx(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_random_features_agree_with_numpy(normal, random_label, reference, shape, classes):
    student, teacher, label = normal(shape, 0), normal(shape, 1), random_label(shape, classes)
    expected = reference(student, teacher, label)
    assert expected > 0.01
    assert IntraClassVariationLoss()(student, teacher, label).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid", "image"),
    [((4, 6), (2, 3), (8, 12)), ((2, 4, 3), (4, 2, 3), (8, 8, 6)), ((3, 2, 2), (3, 4, 5), (7, 6, 5))],
)
def test_different_grids_and_channels_and_a_finer_label_agree_with_numpy(
    normal, random_label, reference, student_grid, teacher_grid, image
):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 5, *teacher_grid), 1)
    label = random_label((2, 1, *image), 3)
    expected = reference(student, teacher, label)
    assert IntraClassVariationLoss()(student, teacher, label).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotating_the_channels_and_scaling_do_not_change_the_value(normal, random_label, reference, shape):
    student, teacher, label = normal(shape, 0), normal(shape, 1), random_label(shape, 3)
    rotation = torch.linalg.qr(normal((3, 3), 2))[0]
    moved = 100 * torch.einsum("ij,bj...->bi...", rotation, student)
    expected = reference(student, teacher, label)
    assert IntraClassVariationLoss()(moved, teacher / 100, label).item() == pytest.approx(expected, abs=1e-6)


def test_renumbering_the_classes_does_not_change_the_value(normal, random_label, reference):
    student, teacher, label = normal(SHAPES[1], 0), normal(SHAPES[1], 1), random_label(SHAPES[1], 3)
    renamed = torch.tensor([7, 0, 3])[label].float()
    expected = reference(student, teacher, label)
    assert IntraClassVariationLoss()(student, teacher, renamed).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeating_the_patch_does_not_change_the_value(normal, random_label, reference, shape):
    student, teacher, label = normal(shape, 0), normal(shape, 1), random_label(shape, 3)
    tiled = [x.repeat(1, 1, *[2] * (len(shape) - 2)) for x in (student, teacher, label)]
    expected = reference(student, teacher, label)
    assert IntraClassVariationLoss()(*tiled).item() == pytest.approx(expected, abs=1e-6)


def test_each_sample_has_its_own_classes_and_prototypes(normal, random_label):
    student, teacher = normal((2, 3, 3, 3, 3), 0), normal((2, 3, 3, 3, 3), 1)
    label = torch.cat([torch.zeros(1, 1, 3, 3, 3), 4.0 + random_label((1, 1, 3, 3, 3), 2)])
    alone = [IntraClassVariationLoss()(student[i : i + 1], teacher[i : i + 1], label[i : i + 1]) for i in range(2)]
    together = IntraClassVariationLoss()(student, teacher, label)
    assert together.item() == pytest.approx((alone[0].item() + alone[1].item()) / 2, abs=1e-6)


def test_a_lesion_smaller_than_a_cell_changes_the_value(normal, reference):
    student, teacher, label = normal((1, 3, 2, 2, 2), 0), normal((1, 3, 2, 2, 2), 1), torch.zeros(1, 1, 8, 8, 8)
    without = IntraClassVariationLoss()(student, teacher, label).item()
    label[0, 0, :2, :2, :2] = 1  # 8 of the 64 voxels of one cell: neither the majority nor its centre
    loss = IntraClassVariationLoss()(student, teacher, label).item()
    assert loss == pytest.approx(reference(student, teacher, label), abs=1e-6)
    assert abs(loss - without) > 1e-3


def test_the_gradient_agrees_with_finite_differences_through_map_and_prototype(
    normal, random_label, reference, numerical_gradient
):
    student, teacher = normal((1, 2, 2, 3), 0).requires_grad_(), normal((1, 2, 2, 3), 1)
    label = random_label((1, 1, 4, 6), 2)
    IntraClassVariationLoss()(student, teacher, label).backward()
    expected = numerical_gradient(lambda x: reference(x, teacher, label), student)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("zeroed", ["all", "one class", "one voxel"])
def test_zero_features_give_a_finite_value_and_a_small_gradient(normal, reference, zeroed):
    student, teacher, label = normal((1, 3, 2, 2, 2), 0), normal((1, 3, 2, 2, 2), 1), torch.zeros(1, 1, 2, 2, 2)
    label[..., 1] = 1
    is_zero = {"all": label >= 0, "one class": label == 1, "one voxel": torch.arange(8).view_as(label) == 0}[zeroed]
    student = (student * ~is_zero).requires_grad_()
    loss = IntraClassVariationLoss()(student, teacher, label)
    loss.backward()
    assert loss.item() == pytest.approx(reference(student, teacher, label), abs=1e-6)
    assert student.grad.abs().max() < 10


def test_constant_features_equal_their_prototype(normal, random_label, reference):
    student, teacher, label = torch.full((1, 3, 2, 4), 5.0), normal((1, 2, 2, 4), 1), random_label((1, 1, 2, 4), 2)
    expected = reference(torch.ones(1, 1, 2, 4), teacher, label)
    student.requires_grad_()
    loss = IntraClassVariationLoss()(student, teacher, label)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert torch.isfinite(student.grad).all()
