# SPDX-License-Identifier: Apache-2.0
"""FeatureHintLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.feature_hint import FeatureHintLoss
from scripts.networks.channel_adapter import ChannelAdapter

SHAPES = [(2, 3, 4, 5), (2, 3, 3, 4, 5)]


@pytest.fixture(scope="session")
def reference(on_common_grid: Callable[..., list[np.ndarray]]) -> Callable[..., float]:
    """Mean squared error in float64."""

    def compute(student: Tensor, teacher: Tensor) -> float:
        s, t = on_common_grid(student, teacher)
        return float(sum((s[i] - t[i]) ** 2 for i in np.ndindex(*s.shape)) / s.size)

    return compute


@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_difference_gives_its_square(normal, shape):
    student = normal(shape, 0)
    assert FeatureHintLoss()(student, student + 1.5).item() == pytest.approx(2.25, abs=1e-6)


def test_a_single_different_number_counts_as_its_share_of_the_mean():
    student = torch.zeros(2, 3, 1, 2, 2)
    student[1, 2, 0, 1, 0] = 6.0
    assert FeatureHintLoss()(student, torch.zeros_like(student)).item() == pytest.approx(36 / 24, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_features_agree_with_numpy(normal, reference, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    assert FeatureHintLoss()(student, teacher).item() == pytest.approx(reference(student, teacher), abs=1e-6)


def test_a_coarse_teacher_is_not_up_sampled():
    # Detail of the student within a cell of the teacher does not count.
    student = torch.tensor([1.0, 3.0, -1.0, 7.0]).view(1, 1, 1, 4)
    teacher = torch.tensor([2.0, 3.0]).view(1, 1, 1, 2)
    assert FeatureHintLoss()(student, teacher).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeating_the_patch_does_not_change_the_value(normal, reference, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    tiles = (1, 1, *[2] * (len(shape) - 2))
    loss = FeatureHintLoss()(student.repeat(tiles), teacher.repeat(tiles))
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)


def test_the_value_scales_with_the_square_of_the_features(normal, reference):
    student, teacher = normal(SHAPES[1], 0), normal(SHAPES[1], 1)
    loss = FeatureHintLoss()(3 * student, 3 * teacher)
    assert loss.item() == pytest.approx(9 * reference(student, teacher), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_twice_the_difference_divided_by_the_number_of_elements(normal, shape):
    student, teacher = normal(shape, 0).requires_grad_(), normal(shape, 1)
    FeatureHintLoss()(student, teacher).backward()
    expected = 2 * (student.detach().double().numpy() - teacher.double().numpy()) / student.numel()
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_an_adapter_matches_the_channels_and_is_trained_with_the_student(normal, dimensions):
    size = [4, 3, 2][:dimensions]
    torch.manual_seed(0)
    adapter = ChannelAdapter(3, 5, dimensions)
    student, teacher = normal((2, 3, *size), 0).requires_grad_(), normal((2, 5, *size), 1)
    loss = FeatureHintLoss()(adapter(student), teacher)
    loss.backward()
    weight, bias = (p.detach().double().numpy() for p in (adapter.conv.conv.weight, adapter.conv.conv.bias))
    projected = np.tensordot(weight.reshape(5, 3), student.detach().double().numpy(), ([1], [1]))
    projected = np.moveaxis(projected, 0, 1) + bias.reshape(1, 5, *[1] * dimensions)
    assert loss.item() == pytest.approx(float(((projected - teacher.double().numpy()) ** 2).mean()), abs=1e-6)
    assert student.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())
