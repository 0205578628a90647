# SPDX-License-Identifier: Apache-2.0
"""RegionAffinityLoss against arithmetic and a float64 NumPy computation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.region_affinity import RegionAffinityLoss

SHAPES = [(2, 3, 4, 5), (2, 3, 3, 4, 5)]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_label(shape: tuple[int, ...], classes: int = 4, seed: int = 9) -> Tensor:
    return torch.randint(classes, (shape[0], 1, *shape[2:]), generator=torch.Generator().manual_seed(seed))


def pooled(x: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Adaptive average pooling of C H W [D]: cell i is the mean of floor(i n / m) up to ceil((i + 1) n / m)."""
    for axis, cells in enumerate(grid, start=1):
        size = x.shape[axis]
        edges = [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
        x = np.stack([x.take(range(a, b), axis).mean(axis) for a, b in edges], axis)
    return x


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths else 0.0


def reference(student: Tensor, teacher: Tensor, label: Tensor) -> float:
    """The docstring's formula in float64, pair by pair, on the element-wise smaller grid."""
    grid = tuple(min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    values = []
    for s, t, y in zip(*(x.detach().double().numpy() for x in (student, teacher, label)), strict=True):
        shares = [pooled((y == k).astype(float), grid).reshape(-1) for k in np.unique(y)]
        cells = [pooled(x, grid).reshape(len(x), -1).T for x in (s, t)]
        vectors = [[np.average(x, axis=0, weights=a) for a in shares] for x in cells]
        pairs = itertools.combinations(range(len(shares)), 2)
        squares = [(cosine(*(vectors[0][k] for k in p)) - cosine(*(vectors[1][k] for k in p))) ** 2 for p in pairs]
        values.append(np.mean(squares) if squares else 0.0)
    return float(np.mean(values))


@pytest.mark.parametrize("degrees", [30, 90, 180])
def test_two_regions_give_the_squared_difference_of_their_cosines(degrees):
    # The student's regions enclose the angle, the teacher's have one direction at different lengths.
    angle = math.radians(degrees)
    student = torch.tensor([[1.0, 2 * math.cos(angle)], [0.0, 2 * math.sin(angle)]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 3.0]]).view(1, 1, 1, 2)
    loss = RegionAffinityLoss()(student, teacher, torch.tensor([0, 1]).view(1, 1, 1, 2))
    assert loss.item() == pytest.approx((math.cos(angle) - 1) ** 2, abs=1e-6)


def test_three_regions_average_over_their_three_pairs():
    # Cosines of the student: 1 of the first two, 0 with the third; the teacher's are all 1: (0 + 1 + 1) / 3.
    student = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]).view(1, 2, 1, 3)
    loss = RegionAffinityLoss()(student, torch.ones(1, 2, 1, 3), torch.arange(3).view(1, 1, 1, 3))
    assert loss.item() == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("classes", [2, 4])
def test_random_features_agree_with_numpy(shape, classes):
    student, teacher, label = normal(shape, 0), normal(shape, 1), random_label(shape, classes)
    expected = reference(student, teacher, label)
    assert expected > 0.01
    assert RegionAffinityLoss()(student, teacher, label).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid", "image"),
    [((4, 6), (2, 3), (8, 12)), ((2, 4, 3), (4, 2, 3), (8, 8, 6)), ((3, 2, 2), (3, 4, 5), (7, 6, 5))],
)
def test_differing_grids_channels_and_a_finer_label_agree_with_numpy(student_grid, teacher_grid, image):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 5, *teacher_grid), 1)
    label = random_label((2, 1, *image))
    expected = reference(student, teacher, label)
    assert RegionAffinityLoss()(student, teacher, label).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_zero_where_student_and_teacher_agree(shape):
    features = normal(shape, 0)
    assert RegionAffinityLoss()(features, features.clone(), random_label(shape)).item() == 0.0


def test_only_the_angles_between_the_regions_count():
    # Other lengths, another basis and other voxels around the same region means.
    student, label = normal((1, 3, 2, 4), 0), torch.tensor([0, 0, 1, 1]).repeat(2, 1).view(1, 1, 2, 4)
    rotation = torch.linalg.qr(normal((3, 3), 2))[0]
    means = student.view(1, 3, 2, 2, 2).mean(dim=(2, 4), keepdim=True).expand(1, 3, 2, 2, 2).reshape(1, 3, 2, 4)
    teacher = 50 * torch.einsum("ij,bj...->bi...", rotation, means)
    assert RegionAffinityLoss()(student, teacher, label).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_tiling_the_same_voxels_changes_nothing(shape):
    student, teacher, label = normal(shape, 0), normal(shape, 1), random_label(shape)
    tiled = [x.repeat(1, 1, *[2] * (len(shape) - 2)) for x in (student, teacher, label)]
    assert RegionAffinityLoss()(*tiled).item() == pytest.approx(reference(student, teacher, label), abs=1e-6)


def test_fewer_than_two_classes_give_zero_that_can_still_be_differentiated():
    student, teacher = normal((2, 3, 3, 3, 3), 0).requires_grad_(), normal((2, 3, 3, 3, 3), 1)
    loss = RegionAffinityLoss()(student, teacher, torch.full((2, 1, 3, 3, 3), 1.0))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().sum() == 0


def test_a_sample_of_one_class_counts_as_zero_in_the_mean_and_gets_no_gradient():
    student, teacher = normal((2, 3, 3, 3, 3), 0).requires_grad_(), normal((2, 3, 3, 3, 3), 1)
    label = torch.cat([torch.zeros(1, 1, 3, 3, 3, dtype=torch.long), random_label((1, 1, 3, 3, 3))])
    loss = RegionAffinityLoss()(student, teacher, label)
    loss.backward()
    alone = RegionAffinityLoss()(student[1:], teacher[1:], label[1:])
    assert loss.item() == pytest.approx(alone.item() / 2, abs=1e-6)
    assert student.grad[0].abs().sum() == 0
    assert student.grad[1].abs().sum() > 0


def test_samples_may_hold_different_classes():
    student, teacher = normal((2, 3, 3, 3, 3), 0), normal((2, 3, 3, 3, 3), 1)
    label = torch.cat([random_label((1, 1, 3, 3, 3), 2), 1 + random_label((1, 1, 3, 3, 3), 3)])
    expected = reference(student, teacher, label)
    assert RegionAffinityLoss()(student, teacher, label).item() == pytest.approx(expected, abs=1e-6)


def test_a_lesion_smaller_than_a_cell_still_has_an_affinity():
    student, teacher, label = normal((1, 3, 2, 2, 2), 0), normal((1, 3, 2, 2, 2), 1), torch.zeros(1, 1, 8, 8, 8)
    label[0, 0, 6, 1, 6] = 1
    student.requires_grad_()
    loss = RegionAffinityLoss()(student, teacher, label)
    loss.backward()
    assert loss.item() == pytest.approx(reference(student, teacher, label), abs=1e-6)
    assert loss.item() > 1e-3
    assert student.grad[0, :, 1, 0, 1].abs().sum() > 1e-3


def test_the_gradient_is_that_of_finite_differences():
    student, teacher = normal((1, 2, 2, 3), 0).requires_grad_(), normal((1, 2, 2, 3), 1)
    label = random_label((1, 1, 4, 6), 3)
    RegionAffinityLoss()(student, teacher, label).backward()
    step = 1e-5
    for index in np.ndindex(*student.shape):
        moved = [student.detach().double().clone() for _ in range(2)]
        moved[0][index] += step
        moved[1][index] -= step
        slope = (reference(moved[0], teacher, label) - reference(moved[1], teacher, label)) / (2 * step)
        assert student.grad[index].item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("silent", [[0, 1], [1]])
def test_a_silent_region_has_cosine_zero_and_a_small_gradient(silent):
    student, teacher, label = normal((1, 3, 2, 2, 2), 0), torch.ones(1, 3, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)
    label[..., 1] = 1
    student[..., silent] = 0
    student.requires_grad_()
    loss = RegionAffinityLoss()(student, teacher, label)
    loss.backward()
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    assert student.grad.abs().max() < 10
