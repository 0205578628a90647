# SPDX-License-Identifier: Apache-2.0
"""RegionAffinityLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.region_affinity import RegionAffinityLoss

SHAPES = [(2, 3, 4, 5), (2, 3, 3, 4, 5)]


@pytest.fixture(scope="session")
def reference(by_class: Callable[..., list[Any]], cosine: Callable[..., float]) -> Callable[..., float]:
    """The docstring's formula in float64, pair by pair, on the common grid."""

    def compute(student: Tensor, teacher: Tensor, label: Tensor) -> float:
        values = []
        for s, t, shares in by_class(student, teacher, label):
            vectors = [[np.average(x, axis=0, weights=a) for a in shares] for x in (s, t)]
            pairs = itertools.combinations(range(len(shares)), 2)
            squares = [(cosine(*(vectors[0][k] for k in p)) - cosine(*(vectors[1][k] for k in p))) ** 2 for p in pairs]
            values.append(np.mean(squares) if squares else 0.0)
        return float(np.mean(values))

    return compute


@pytest.mark.parametrize("degrees", [30, 90, 180])
def test_two_regions_give_the_squared_difference_of_the_cosines(degrees):
    # The student's regions are at the given angle; the teacher's have equal directions and different lengths.
    angle = math.radians(degrees)
    student = torch.tensor([[1.0, 2 * math.cos(angle)], [0.0, 2 * math.sin(angle)]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 3.0]]).view(1, 1, 1, 2)
    loss = RegionAffinityLoss()(student, teacher, torch.tensor([0, 1]).view(1, 1, 1, 2))
    assert loss.item() == pytest.approx((math.cos(angle) - 1) ** 2, abs=1e-6)


def test_three_regions_give_the_mean_over_their_three_pairs():
    # The student's first two regions have cosine 1, and cosine 0 with the third. All cosines of the teacher are 1.
    student = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]).view(1, 2, 1, 3)
    loss = RegionAffinityLoss()(student, torch.ones(1, 2, 1, 3), torch.arange(3).view(1, 1, 1, 3))
    assert loss.item() == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [2, 4])
def test_random_features_agree_with_numpy(normal, random_label, reference, shape, classes):
    student, teacher, label = normal(shape, 0), normal(shape, 1), random_label(shape, classes)
    expected = reference(student, teacher, label)
    assert expected > 0.01
    assert RegionAffinityLoss()(student, teacher, label).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid", "image"),
    [((4, 6), (2, 3), (8, 12)), ((2, 4, 3), (4, 2, 3), (8, 8, 6)), ((3, 2, 2), (3, 4, 5), (7, 6, 5))],
)
def test_different_grids_and_channels_and_a_finer_label_agree_with_numpy(
    normal, random_label, reference, student_grid, teacher_grid, image
):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 5, *teacher_grid), 1)
    label = random_label((2, 1, *image), 4)
    expected = reference(student, teacher, label)
    assert RegionAffinityLoss()(student, teacher, label).item() == pytest.approx(expected, abs=1e-6)


def test_only_the_angles_between_the_region_means_count(normal):
    # The teacher has other lengths, another basis and other voxels, but the same angles between the region means.
    student, label = normal((1, 3, 2, 4), 0), torch.tensor([0, 0, 1, 1]).repeat(2, 1).view(1, 1, 2, 4)
    rotation = torch.linalg.qr(normal((3, 3), 2))[0]
    means = student.view(1, 3, 2, 2, 2).mean(dim=(2, 4), keepdim=True).expand(1, 3, 2, 2, 2).reshape(1, 3, 2, 4)
    teacher = 50 * torch.einsum("ij,bj...->bi...", rotation, means)
    assert RegionAffinityLoss()(student, teacher, label).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeating_the_patch_does_not_change_the_value(normal, random_label, reference, shape):
    student, teacher, label = normal(shape, 0), normal(shape, 1), random_label(shape, 4)
    tiled = [x.repeat(1, 1, *[2] * (len(shape) - 2)) for x in (student, teacher, label)]
    assert RegionAffinityLoss()(*tiled).item() == pytest.approx(reference(student, teacher, label), abs=1e-6)


def test_fewer_than_two_classes_give_0_and_a_zero_gradient(normal):
    student, teacher = normal((2, 3, 3, 3, 3), 0).requires_grad_(), normal((2, 3, 3, 3, 3), 1)
    loss = RegionAffinityLoss()(student, teacher, torch.full((2, 1, 3, 3, 3), 1.0))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().sum() == 0


def test_a_sample_with_one_class_counts_as_0_in_the_mean_and_gets_no_gradient(normal, random_label):
    student, teacher = normal((2, 3, 3, 3, 3), 0).requires_grad_(), normal((2, 3, 3, 3, 3), 1)
    label = torch.cat([torch.zeros(1, 1, 3, 3, 3, dtype=torch.long), random_label((1, 1, 3, 3, 3), 4)])
    loss = RegionAffinityLoss()(student, teacher, label)
    loss.backward()
    alone = RegionAffinityLoss()(student[1:], teacher[1:], label[1:])
    assert loss.item() == pytest.approx(alone.item() / 2, abs=1e-6)
    assert student.grad[0].abs().sum() == 0
    assert student.grad[1].abs().sum() > 0


def test_samples_may_contain_different_classes(normal, random_label, reference):
    student, teacher = normal((2, 3, 3, 3, 3), 0), normal((2, 3, 3, 3, 3), 1)
    label = torch.cat([random_label((1, 1, 3, 3, 3), 2), 1 + random_label((1, 1, 3, 3, 3), 3)])
    expected = reference(student, teacher, label)
    assert RegionAffinityLoss()(student, teacher, label).item() == pytest.approx(expected, abs=1e-6)


def test_a_lesion_smaller_than_a_cell_has_an_affinity(normal, reference):
    student, teacher, label = normal((1, 3, 2, 2, 2), 0), normal((1, 3, 2, 2, 2), 1), torch.zeros(1, 1, 8, 8, 8)
    label[0, 0, 6, 1, 6] = 1
    student.requires_grad_()
    loss = RegionAffinityLoss()(student, teacher, label)
    loss.backward()
    assert loss.item() == pytest.approx(reference(student, teacher, label), abs=1e-6)
    assert loss.item() > 1e-3
    assert student.grad[0, :, 1, 0, 1].abs().sum() > 1e-3


def test_the_gradient_agrees_with_finite_differences(normal, random_label, reference, numerical_gradient):
    student, teacher = normal((1, 2, 2, 3), 0).requires_grad_(), normal((1, 2, 2, 3), 1)
    label = random_label((1, 1, 4, 6), 3)
    RegionAffinityLoss()(student, teacher, label).backward()
    expected = numerical_gradient(lambda x: reference(x, teacher, label), student)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("zeroed", [[0, 1], [1]])
def test_a_zero_region_has_cosine_0_and_a_small_gradient(normal, zeroed):
    student, teacher, label = normal((1, 3, 2, 2, 2), 0), torch.ones(1, 3, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)
    label[..., 1] = 1
    student[..., zeroed] = 0
    student.requires_grad_()
    loss = RegionAffinityLoss()(student, teacher, label)
    loss.backward()
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    assert student.grad.abs().max() < 10
