# SPDX-License-Identifier: Apache-2.0
"""ChannelWiseDivergence against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.channel_wise_divergence import ChannelWiseDivergence

SHAPES = [(2, 3, 4, 5), (2, 3, 3, 4, 5)]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def reference(on_common_grid: Callable[..., list[np.ndarray]]) -> Callable[..., float]:
    """The docstring's formula in float64, channel by channel."""

    def compute(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> float:
        s, t = (np.exp(m / temperature) for m in on_common_grid(student, teacher))
        divergences = []
        for index in np.ndindex(*s.shape[:2]):
            p, q = t[index] / t[index].sum(), s[index] / s[index].sum()
            divergences.append((p * np.log(p / q)).sum())
        return temperature**2 * float(np.mean(divergences))

    return compute


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_two_voxels_give_the_closed_form(temperature):
    # Over the two voxels the teacher is (3/4, 1/4) and the student is (1/2, 1/2).
    teacher = torch.tensor([temperature * math.log(3), 0.0]).view(1, 1, 1, 2)
    loss = ChannelWiseDivergence(temperature)(torch.zeros(1, 1, 1, 2), teacher)
    expected = temperature**2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_teacher_is_the_first_argument_of_the_divergence():
    # KL((3/4, 1/4) || (1/2, 1/2)) differs from KL((1/2, 1/2) || (3/4, 1/4)).
    student = torch.tensor([math.log(3), 0.0]).view(1, 1, 1, 2)
    loss = ChannelWiseDivergence(1.0)(student, torch.zeros(1, 1, 1, 2))
    assert loss.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6)


def test_it_is_the_mean_over_batch_and_channels():
    # One of 2 x 3 channels differs. A sum over channels would be three times as large.
    teacher = torch.zeros(2, 3, 1, 2)
    teacher[1, 2, 0, 0] = math.log(3)
    loss = ChannelWiseDivergence(1.0)(torch.zeros(2, 3, 1, 2), teacher)
    assert loss.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 6, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_random_logits_agree_with_numpy(reference, shape, temperature):
    student, teacher = normal(shape, 0), normal(shape, 1)
    loss = ChannelWiseDivergence(temperature)(student, teacher)
    assert loss.item() == pytest.approx(reference(student, teacher, temperature), rel=1e-6)


def test_the_default_temperature_is_four(reference):
    student, teacher = normal(SHAPES[1], 0), normal(SHAPES[1], 1)
    assert ChannelWiseDivergence()(student, teacher).item() == pytest.approx(reference(student, teacher, 4.0), rel=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid"),
    [((4, 6), (2, 3)), ((2, 2), (4, 6)), ((2, 4, 3), (4, 2, 3)), ((4, 4, 4), (2, 2, 2))],
)
def test_different_grids_are_pooled_before_the_softmax(reference, student_grid, teacher_grid):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 3, *teacher_grid), 1)
    assert ChannelWiseDivergence()(student, teacher).item() == pytest.approx(reference(student, teacher), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeating_the_patch_does_not_change_the_value(reference, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    tiles = (1, 1, *[2] * (len(shape) - 2))
    loss = ChannelWiseDivergence()(student.repeat(tiles), teacher.repeat(tiles))
    assert loss.item() == pytest.approx(reference(student, teacher), rel=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_the_gain_of_a_channel_changes_the_value_but_its_offset_does_not(reference, shape, changed):
    maps = {"student": normal(shape, 0), "teacher": normal(shape, 1)}
    expected = reference(**maps)
    offset = torch.tensor([5.0, -7.0, 2.0]).view(1, 3, *[1] * (len(shape) - 2))
    moved = {**maps, changed: maps[changed] + offset}
    stretched = {**maps, changed: 2 * maps[changed]}
    assert ChannelWiseDivergence()(**moved).item() == pytest.approx(expected, rel=2e-6)
    assert abs(ChannelWiseDivergence()(**stretched).item() - expected) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_the_difference_of_the_distributions(shape):
    # T^2 / (B C) * (p_student - p_teacher) / T.
    student, teacher = normal(shape, 0).requires_grad_(), normal(shape, 1)
    ChannelWiseDivergence(2.0)(student, teacher).backward()
    q, p = (np.exp(x.detach().double().numpy() / 2.0).reshape(6, -1) for x in (student, teacher))
    expected = 2.0 / 6 * (q / q.sum(1, keepdims=True) - p / p.sum(1, keepdims=True))
    np.testing.assert_allclose(student.grad.numpy().reshape(6, -1), expected, atol=1e-6)


def test_a_large_temperature_compares_the_centred_maps():
    # To second order L is half the variance of the difference over voxels, independent of T.
    student, teacher = normal((1, 1, 4, 4, 4), 0), normal((1, 1, 4, 4, 4), 1)
    expected = np.var((student - teacher).double().numpy()) / 2
    assert ChannelWiseDivergence(300.0)(student, teacher).item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_a_constant_channel_is_a_uniform_distribution(reference, value):
    student = torch.full((1, 2, 3, 3, 3), value).requires_grad_()
    teacher = normal((1, 2, 3, 3, 3), 1)
    loss = ChannelWiseDivergence()(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(reference(torch.zeros_like(teacher), teacher), rel=1e-5)
    assert torch.isfinite(student.grad).all()
    assert ChannelWiseDivergence()(student, torch.zeros_like(student)).item() == pytest.approx(0.0, abs=1e-5)


def test_extreme_logits_give_a_finite_value_and_gradient():
    student = (1e5 * normal((1, 2, 3, 3, 3), 0)).requires_grad_()
    loss = ChannelWiseDivergence()(student, 1e5 * normal((1, 2, 3, 3, 3), 1))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
