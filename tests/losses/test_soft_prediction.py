# SPDX-License-Identifier: Apache-2.0
"""SoftPredictionLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses import SoftPredictionLoss

SHAPES = [(2, 3, 4, 5), (2, 3, 3, 4, 5)]


def pair(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def reference(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """T^2 * KL(teacher || student), in float64; a single channel is a Bernoulli variable."""
    s, t = (x.detach().double().numpy() / temperature for x in (student, teacher))
    if s.shape[1] == 1:
        p, q = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(-s))
        divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    else:
        p, q = softmax(t), softmax(s)
        divergence = p * np.log(p / q)
    return temperature**2 * float(divergence.sum(axis=1).mean())


def half_against_three_quarters(temperature: float) -> float:
    """T^2 * KL((3/4, 1/4) || (1/2, 1/2))."""
    return temperature**2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_two_classes_give_the_closed_form(temperature):
    student = torch.zeros(1, 2, 2, 2)
    teacher = torch.zeros(1, 2, 2, 2)
    teacher[:, 0] = temperature * math.log(3)  # softened: 3/4 and 1/4
    loss = SoftPredictionLoss(temperature)(student, teacher)
    assert loss.item() == pytest.approx(half_against_three_quarters(temperature), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_single_channel_gives_the_bernoulli_divergence(temperature):
    teacher = torch.full((2, 1, 2, 2, 2), temperature * math.log(3))  # sigmoid of log 3 is 3/4
    loss = SoftPredictionLoss(temperature)(torch.zeros_like(teacher), teacher)
    assert loss.item() == pytest.approx(half_against_three_quarters(temperature), rel=1e-6)


@pytest.mark.parametrize(("channels", "temperature"), [(1, 1.0), (2, 1.0), (3, 4.0), (5, 4.0)])
def test_the_default_temperature_is_1_for_two_classes_and_4_for_more(channels, temperature):
    student, teacher = pair((2, channels, 3, 4, 5))
    expected = reference(student, teacher, temperature)
    assert SoftPredictionLoss()(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_a_given_temperature_is_used_for_two_classes_too():
    student, teacher = pair((2, 2, 3, 4, 5))
    assert SoftPredictionLoss(4.0)(student, teacher).item() == pytest.approx(reference(student, teacher, 4.0), rel=1e-5)


def test_by_default_an_empty_patch_has_a_small_part_of_the_gradient():
    # Two classes: the background is sure in both networks, the tumour fills one eighth of the second patch. The
    # gradient of the KL is T * (p_student - p_teacher): its norm over a patch is what the student feels.
    student, teacher = (logits / 3 for logits in pair((2, 2, 8, 8, 8)))
    for logits in (student, teacher):
        logits[:, 0] += 9.0
        logits[1, 1, :4, :4, :4] += 9.0
    ratios = {}
    for temperature in (None, 4.0):
        x = student.clone().requires_grad_()
        SoftPredictionLoss(temperature)(x, teacher).backward()
        empty, tumour = x.grad.flatten(1).norm(dim=1)
        ratios[temperature] = float(empty / tumour)
    assert ratios[None] < 0.4
    assert ratios[4.0] > 0.75


@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 3, 4), (2, 1, 3, 4, 2)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_random_logits_agree_with_numpy(shape, temperature):
    student, teacher = pair(shape)
    expected = reference(student, teacher, temperature)
    assert SoftPredictionLoss(temperature)(student, teacher).item() == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_temperature_times_the_difference_of_probabilities(shape):
    temperature = 4.0
    student, teacher = (x.requires_grad_() for x in pair(shape))
    SoftPredictionLoss(temperature)(student, teacher).backward()
    s, t = (softmax(x.detach().double().numpy() / temperature) for x in (student, teacher))
    voxels = student.numel() / student.shape[1]
    np.testing.assert_allclose(student.grad.numpy(), temperature * (s - t) / voxels, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_largest_half_precision_logits_give_a_finite_value_and_gradient(channels):
    student = torch.full((1, channels, 2, 2, 2), -65504.0, dtype=torch.float16)
    student[:, 0] = 65504.0
    teacher = -student
    student.requires_grad_()
    loss = SoftPredictionLoss(1.0)(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_adding_a_constant_to_all_logits_of_a_voxel_does_not_change_the_value(shape):
    student, teacher = pair(shape)
    generator = torch.Generator().manual_seed(1)
    shifts = [5 * torch.randn(shape[0], 1, *shape[2:], generator=generator) for _ in range(2)]
    loss = SoftPredictionLoss()(student + shifts[0], teacher + shifts[1])
    assert loss.item() == pytest.approx(reference(student, teacher, 4.0), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeating_the_patch_does_not_change_the_value(shape):
    student, teacher = pair(shape)
    tiles = (1, 1, *[2] * (len(shape) - 2))
    loss = SoftPredictionLoss()(student.repeat(tiles), teacher.repeat(tiles))
    assert loss.item() == pytest.approx(reference(student, teacher, 4.0), rel=1e-5)


def test_different_grids_are_refused_with_both_shapes():
    shape = (2, 2, 4, 4, 4)
    with pytest.raises(ValueError, match="must have the same shape") as error:
        SoftPredictionLoss()(torch.zeros(2, 2, 4, 5, 6), torch.zeros(shape))
    assert "(2, 2, 4, 5, 6)" in str(error.value)
    assert str(shape) in str(error.value)
