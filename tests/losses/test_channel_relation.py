# SPDX-License-Identifier: Apache-2.0
"""ChannelRelationLoss against arithmetic and NumPy's correlation coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.channel_relation import ChannelRelationLoss

SHAPES = [(2, 3, 4, 5), (2, 3, 3, 4, 5)]


@pytest.fixture(scope="session")
def reference(on_one_grid: Callable[..., list[np.ndarray]]) -> Callable[..., float]:
    """The docstring's formula in float64 by ``np.corrcoef``."""

    def compute(student: Tensor, teacher: Tensor) -> float:
        s, t = (m.reshape(*m.shape[:2], -1) for m in on_one_grid(student, teacher))
        return float(np.mean([(np.corrcoef(a) - np.corrcoef(b)) ** 2 for a, b in zip(s, t, strict=True)]))

    return compute


def two_channels(second: list[float]) -> Tensor:
    """Channel 0 is (1, -1, 0, 0), channel 1 as given, on a 2 x 2 grid."""
    return torch.tensor([[1.0, -1.0, 0.0, 0.0], second]).view(1, 2, 2, 2)


@pytest.mark.parametrize(
    ("second", "correlation"),
    [([2.0, -2.0, 0.0, 0.0], 1.0), ([-3.0, 3.0, 0.0, 0.0], -1.0), ([1.0, 0.0, -1.0, 0.0], 0.5)],
)
def test_two_channels_give_the_closed_form(second, correlation):
    # The teacher's channels are uncorrelated: two of the four entries of G differ, by the student's correlation.
    loss = ChannelRelationLoss()(two_channels(second), two_channels([1.0, 1.0, -1.0, -1.0]))
    assert loss.item() == pytest.approx(correlation**2 / 2, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_features_agree_with_numpy(normal, reference, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    assert ChannelRelationLoss()(student, teacher).item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid"), [((4, 6), (2, 3)), ((2, 4, 3), (4, 2, 3)), ((4, 4, 4), (2, 2, 2))]
)
def test_differing_grids_meet_on_the_smaller_one_before_centring(normal, reference, student_grid, teacher_grid):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 3, *teacher_grid), 1)
    assert ChannelRelationLoss()(student, teacher).item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_where_both_agree(normal, shape):
    features = normal(shape, 0)
    assert ChannelRelationLoss()(features, features.clone()).item() == 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_gain_and_offset_of_a_channel_change_nothing(normal, reference, shape, changed):
    maps = {"student": normal(shape, 0), "teacher": normal(shape, 1)}
    expected = reference(**maps)
    view = (1, 3, *[1] * (len(shape) - 2))
    maps[changed] = maps[changed] * torch.tensor([0.2, 1.0, 30.0]).view(view) + torch.tensor([4.0, -2.0, 9.0]).view(
        view
    )
    assert ChannelRelationLoss()(**maps).item() == pytest.approx(expected, abs=1e-6)


def test_the_sign_of_a_channel_does_change_the_value(normal, reference):
    features = normal(SHAPES[1], 0)
    turned = features * torch.tensor([1.0, 1.0, -1.0]).view(1, 3, 1, 1, 1)
    loss = ChannelRelationLoss()(turned, features)
    assert loss.item() == pytest.approx(reference(turned, features), abs=1e-6)
    assert loss.item() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_voxels_changes_nothing_if_it_is_common(normal, reference, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    order = torch.randperm(math.prod(shape[2:]), generator=torch.Generator().manual_seed(2))
    moved = [x.flatten(2)[:, :, order].view(shape) for x in (student, teacher)]
    assert ChannelRelationLoss()(*moved).item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_tiling_the_same_voxels_changes_nothing(normal, reference, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    tiles = (1, 1, *[2] * (len(shape) - 2))
    loss = ChannelRelationLoss()(student.repeat(tiles), teacher.repeat(tiles))
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (2, 2, 3, 4, 5)])
def test_two_class_softmax_outputs_teach_nothing_and_raw_logits_do(normal, shape):
    logits, teacher = normal(shape, 0).requires_grad_(), normal(shape, 1)
    loss = ChannelRelationLoss()(logits.softmax(1), teacher.softmax(1))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-9)
    assert logits.grad.abs().max() < 1e-6
    logits.grad = None
    loss = ChannelRelationLoss()(logits, teacher)
    loss.backward()
    assert loss.item() > 1e-3
    assert logits.grad.abs().max() > 1e-3


def test_the_gradient_is_that_of_finite_differences(normal, reference, central_differences):
    student, teacher = normal((1, 3, 2, 3), 0).requires_grad_(), normal((1, 3, 2, 3), 1)
    ChannelRelationLoss()(student, teacher).backward()
    slopes = central_differences(lambda x: reference(x, teacher), student)
    assert student.grad.numpy() == pytest.approx(slopes, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_moves_no_offset_and_no_gain(normal, shape):
    student = normal(shape, 0).requires_grad_()
    ChannelRelationLoss()(student, normal(shape, 1)).backward()
    assert student.grad.flatten(2).sum(2).abs().max() < 1e-6
    assert (student.grad * student.detach()).flatten(2).sum(2).abs().max() < 1e-6


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e3 / 7])
@pytest.mark.parametrize("grid", [7, 3])
def test_a_constant_channel_correlates_with_nothing_and_gets_no_gradient(normal, constant, grid):
    # 0.1 is no float32 number: its mean is rounded, on a grid of 3 in each cell in another way.
    student, teacher = normal((1, 2, 7, 7, 7), 0), normal((1, 2, grid, grid, grid), 1)
    student[:, 1] = constant
    student.requires_grad_()
    loss = ChannelRelationLoss()(student, teacher)
    loss.backward()
    correlation = np.corrcoef(teacher.double().flatten(2)[0])[0, 1]
    assert loss.item() == pytest.approx((1 + 2 * correlation**2) / 4, abs=1e-6)
    assert student.grad[:, 1].abs().max() == 0
    assert torch.isfinite(student.grad).all()


def test_a_constant_channel_of_the_teacher_keeps_the_gradient_finite(normal):
    student, teacher = normal((2, 3, 4, 4, 4), 0).requires_grad_(), normal((2, 3, 4, 4, 4), 1)
    teacher[:, 1] = 0.1
    ChannelRelationLoss()(student, teacher).backward()
    assert torch.isfinite(student.grad).all()
    assert 0 < student.grad.abs().max() < 1


@pytest.mark.parametrize("size", [2, 5])
def test_the_value_lies_between_zero_and_four(normal, size):
    for seed in range(5):
        student, teacher = normal((1, 2, size, size, size), seed), normal((1, 2, size, size, size), seed + 100)
        assert 0.0 <= ChannelRelationLoss()(student, teacher).item() <= 4.0


def test_another_channel_count_is_refused_by_naming_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4, 4\).*\(2, 5, 2, 2, 2\) must have one C: put an adapter"):
        ChannelRelationLoss()(torch.zeros(2, 3, 4, 4, 4), torch.zeros(2, 5, 2, 2, 2))
