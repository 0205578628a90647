# SPDX-License-Identifier: Apache-2.0
"""ChannelRelationLoss against closed-form values and NumPy's correlation coefficients."""

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
def reference(on_common_grid: Callable[..., list[np.ndarray]]) -> Callable[..., float]:
    """The docstring's formula in float64 by ``np.corrcoef``."""

    def compute(student: Tensor, teacher: Tensor) -> float:
        s, t = (m.reshape(*m.shape[:2], -1) for m in on_common_grid(student, teacher))
        return float(np.mean([(np.corrcoef(a) - np.corrcoef(b)) ** 2 for a, b in zip(s, t, strict=True)]))

    return compute


def two_channels(second: list[float]) -> Tensor:
    """A 2 x 2 map whose channel 0 is (1, -1, 0, 0) and whose channel 1 is ``second``."""
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
def test_different_grids_are_pooled_before_centring(normal, reference, student_grid, teacher_grid):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 3, *teacher_grid), 1)
    assert ChannelRelationLoss()(student, teacher).item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_gain_and_offset_of_a_channel_do_not_change_the_value(normal, reference, shape, changed):
    maps = {"student": normal(shape, 0), "teacher": normal(shape, 1)}
    expected = reference(**maps)
    view = (1, 3, *[1] * (len(shape) - 2))
    maps[changed] = maps[changed] * torch.tensor([0.2, 1.0, 30.0]).view(view) + torch.tensor([4.0, -2.0, 9.0]).view(
        view
    )
    assert ChannelRelationLoss()(**maps).item() == pytest.approx(expected, abs=1e-6)


def test_the_sign_of_a_channel_changes_the_value(normal, reference):
    features = normal(SHAPES[1], 0)
    turned = features * torch.tensor([1.0, 1.0, -1.0]).view(1, 3, 1, 1, 1)
    loss = ChannelRelationLoss()(turned, features)
    assert loss.item() == pytest.approx(reference(turned, features), abs=1e-6)
    assert loss.item() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_voxels_does_not_change_the_value_if_it_is_the_same_in_both(normal, reference, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    order = torch.randperm(math.prod(shape[2:]), generator=torch.Generator().manual_seed(2))
    moved = [x.flatten(2)[:, :, order].view(shape) for x in (student, teacher)]
    assert ChannelRelationLoss()(*moved).item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeating_the_patch_does_not_change_the_value(normal, reference, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    tiles = (1, 1, *[2] * (len(shape) - 2))
    loss = ChannelRelationLoss()(student.repeat(tiles), teacher.repeat(tiles))
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (2, 2, 3, 4, 5)])
def test_two_class_softmax_outputs_give_no_gradient_but_raw_logits_do(normal, shape):
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


def test_the_gradient_agrees_with_finite_differences(normal, reference, numerical_gradient):
    student, teacher = normal((1, 3, 2, 3), 0).requires_grad_(), normal((1, 3, 2, 3), 1)
    ChannelRelationLoss()(student, teacher).backward()
    expected = numerical_gradient(lambda x: reference(x, teacher), student)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_orthogonal_to_offset_and_gain(normal, shape):
    student = normal(shape, 0).requires_grad_()
    ChannelRelationLoss()(student, normal(shape, 1)).backward()
    assert student.grad.flatten(2).sum(2).abs().max() < 1e-6
    assert (student.grad * student.detach()).flatten(2).sum(2).abs().max() < 1e-6


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e3 / 7])
@pytest.mark.parametrize("grid", [7, 3])
def test_a_constant_channel_has_correlation_0_and_no_gradient(normal, constant, grid):
    # 0.1 has no exact float32 representation, so its mean is rounded; on a grid of 3 differently in each cell.
    student, teacher = normal((1, 2, 7, 7, 7), 0), normal((1, 2, grid, grid, grid), 1)
    student[:, 1] = constant
    student.requires_grad_()
    loss = ChannelRelationLoss()(student, teacher)
    loss.backward()
    correlation = np.corrcoef(teacher.double().flatten(2)[0])[0, 1]
    assert loss.item() == pytest.approx((1 + 2 * correlation**2) / 4, abs=1e-6)
    assert student.grad[:, 1].abs().max() == 0
    assert torch.isfinite(student.grad).all()


def test_a_constant_teacher_channel_gives_a_finite_gradient(normal):
    student, teacher = normal((2, 3, 4, 4, 4), 0).requires_grad_(), normal((2, 3, 4, 4, 4), 1)
    teacher[:, 1] = 0.1
    ChannelRelationLoss()(student, teacher).backward()
    assert torch.isfinite(student.grad).all()
    assert 0 < student.grad.abs().max() < 1


@pytest.mark.parametrize("size", [2, 5])
def test_the_value_is_between_0_and_4(normal, size):
    for seed in range(5):
        student, teacher = normal((1, 2, size, size, size), seed), normal((1, 2, size, size, size), seed + 100)
        assert 0.0 <= ChannelRelationLoss()(student, teacher).item() <= 4.0
