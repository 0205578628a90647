# SPDX-License-Identifier: Apache-2.0
"""DISTLoss against closed-form values and a float64 NumPy computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses.prediction_correlation import DISTLoss

SHAPES = [(2, 4, 4, 5), (2, 3, 3, 4, 5)]
PARTS = [(1.0, 0.0), (0.0, 1.0), (2.0, 0.5)]


def logits_of(probabilities: list[list[float]]) -> Tensor:
    """Logits of one sample of 1 x N voxels; ``probabilities`` has one row per class."""
    p = torch.tensor(probabilities)
    return p.log().view(1, len(p), 1, -1)


def probabilities(logits: Tensor, temperature: float) -> np.ndarray:
    """B C N, in float64."""
    z = logits.detach().double().numpy().reshape(*logits.shape[:2], -1) / temperature
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def reference(
    s: Tensor, t: Tensor, inter: float = 1.0, intra: float = 1.0, temperature: float = 1.0, per_sample: bool = False
) -> float:
    """The docstring's formula in float64 by numpy.corrcoef, row by row, for predictions without constant rows."""
    groups = [probabilities(s, temperature), probabilities(t, temperature)]
    if not per_sample:  # one group: the voxels of all samples side by side
        groups = [np.concatenate(list(each), axis=1)[None] for each in groups]
    values = []
    for p, q in zip(*groups, strict=True):
        over_classes = [1 - np.corrcoef(p[:, i], q[:, i])[0, 1] for i in range(p.shape[1])]
        over_voxels = [1 - np.corrcoef(p[c], q[c])[0, 1] for c in range(len(p))]
        values.append(inter * np.mean(over_classes) + intra * np.mean(over_voxels))
    return float(np.mean(values))


def test_the_intra_class_part_is_the_correlation_over_voxels():
    # The deviations of both classes are (-1, 0, 1) and (-1, 1, 0): Pearson 1/2.
    student, teacher = ([[a, b, c], [1 - a, 1 - b, 1 - c]] for a, b, c in [(0.2, 0.3, 0.4), (0.5, 0.7, 0.6)])
    loss = DISTLoss(inter=0.0)(logits_of(student), logits_of(teacher))
    assert loss.item() == pytest.approx(0.5, abs=1e-6)


def test_the_inter_class_part_is_the_correlation_over_classes():
    # The same deviations over three classes at the first voxel; the second voxel is reversed: (1/2 + 2) / 2.
    student, teacher = [[7, 7], [10, 10], [13, 13]], [[7, 13], [13, 10], [10, 7]]
    student, teacher = (logits_of([[v / 30 for v in row] for row in rows]) for rows in (student, teacher))
    assert DISTLoss(intra=0.0)(student, teacher).item() == pytest.approx(1.25, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("inter", "intra"), PARTS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_random_logits_agree_with_numpy(normal, shape, inter, intra, temperature, per_sample):
    student, teacher = 3 * normal(shape, 0), 3 * normal(shape, 1)
    expected = reference(student, teacher, inter, intra, temperature, per_sample)
    loss = DISTLoss(inter, intra, temperature, per_sample)
    assert loss(student, teacher).item() == pytest.approx(expected, abs=1e-6)


def test_a_class_is_correlated_over_the_voxels_of_all_samples():
    # The tumour's probabilities of two samples of two voxels. Over all four voxels the deviations of the student are
    # (-3, -1, 1, 3), those of the teacher (-1, -3, 3, 1): Pearson 12 / 20. Within each sample it is -1.
    student, teacher = ([[[a, b], [1 - a, 1 - b]] for a, b in pairs] for pairs in [
        [(0.2, 0.4), (0.6, 0.8)], [(0.4, 0.2), (0.8, 0.6)]
    ])  # fmt: skip
    student, teacher = (torch.cat([logits_of(rows) for rows in samples]) for samples in (student, teacher))
    assert DISTLoss(inter=0.0)(student, teacher).item() == pytest.approx(1 - 12 / 20, abs=1e-6)
    assert DISTLoss(inter=0.0, per_sample=True)(student, teacher).item() == pytest.approx(2.0, abs=1e-6)


def test_an_empty_patch_has_a_small_part_of_the_gradient_unless_each_sample_is_correlated(normal):
    # Two classes; the first patch holds no tumour, the second has tumour in one eighth of its voxels.
    student, teacher = (normal((2, 2, 8, 8, 8), seed) for seed in (0, 1))
    for logits in (student, teacher):
        logits[:, 0] += 6.0
        logits[1, 1, :4, :4, :4] += 9.0
    ratios = {}
    for per_sample in (False, True):
        x = student.clone().requires_grad_()
        DISTLoss(per_sample=per_sample)(x, teacher).backward()
        empty, tumour = x.grad.flatten(1).norm(dim=1)
        ratios[per_sample] = float(empty / tumour)
    assert ratios[False] < 0.1
    assert ratios[True] > 1


def test_the_defaults_are_both_parts_with_factor_1_and_temperature_1(normal):
    student, teacher = normal(SHAPES[1], 0), normal(SHAPES[1], 1)
    assert DISTLoss()(student, teacher).item() == pytest.approx(reference(student, teacher, 1, 1, 1), abs=1e-6)


def test_scaled_and_shifted_probabilities_give_0(normal):
    # p_student = 1/3 + (p_teacher - 1/3) / 2: the confidence differs, the correlations do not.
    teacher = normal((2, 3, 4, 4, 4), 0)
    student = (1 / 6 + teacher.softmax(1) / 2).log()
    assert DISTLoss()(student, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_with_two_classes_the_inter_class_part_counts_the_voxels_whose_most_likely_class_differs(normal):
    student, teacher = normal((2, 2, 4, 4, 4), 0), normal((2, 2, 4, 4, 4), 1)
    differ = (student.argmax(1) != teacher.argmax(1)).double().mean().item()
    assert 0 < differ < 1
    assert DISTLoss(intra=0.0)(student, teacher).item() == pytest.approx(2 * differ, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-5, 1.0])
def test_with_two_classes_only_the_intra_class_part_has_a_gradient(normal, scale):
    # Near the probability 1/2 (scale 1e-5) even rounding errors would give a large gradient.
    teacher = normal((2, 2, 4, 4, 4), 1)
    gradients = {}
    for parts in [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]:
        student = (scale * normal((2, 2, 4, 4, 4), 0)).requires_grad_()
        DISTLoss(*parts)(student, teacher).backward()
        gradients[parts] = student.grad
    assert gradients[1.0, 0.0].abs().max() == 0
    assert gradients[0.0, 1.0].abs().max() > 1e-3
    assert torch.equal(gradients[1.0, 1.0], gradients[0.0, 1.0])


def test_with_three_classes_the_inter_class_part_has_a_gradient(normal):
    student = normal((1, 3, 4, 4, 4), 0).requires_grad_()
    DISTLoss(intra=0.0)(student, normal((1, 3, 4, 4, 4), 1)).backward()
    assert student.grad.abs().max() > 1e-3


def test_a_single_channel_equals_the_two_class_logits(normal):
    student, teacher = normal((2, 1, 3, 4, 5), 0), normal((2, 1, 3, 4, 5), 1)
    as_two = [torch.cat([torch.zeros_like(z), z], dim=1) for z in (student, teacher)]
    assert DISTLoss()(student, teacher).item() == pytest.approx(reference(*as_two), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_repeating_the_patch_does_not_change_the_value(normal, shape):
    student, teacher = normal(shape, 0), normal(shape, 1)
    tiles = (1, 1, *[2] * (len(shape) - 2))
    loss = DISTLoss()(student.repeat(tiles), teacher.repeat(tiles))
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize(("inter", "intra"), PARTS)
def test_the_gradient_agrees_with_finite_differences(normal, numerical_gradient, inter, intra):
    student, teacher = normal((1, 3, 2, 3), 0).requires_grad_(), normal((1, 3, 2, 3), 1)
    DISTLoss(inter, intra, 2.0)(student, teacher).backward()
    expected = numerical_gradient(lambda x: reference(x, teacher, inter, intra, 2.0), student)
    assert student.grad.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("size", [4, 13])
@pytest.mark.parametrize("level", [0.0, 0.37, 40.0])
def test_a_constant_student_has_correlation_0_and_no_gradient_over_voxels(normal, classes, size, level):
    # The float32 mean of a constant map may differ from that constant: the rounding error must not count as variation.
    student = torch.zeros(2, classes, size, size, size)
    student[:, 0] = level
    student.requires_grad_()
    loss = DISTLoss(inter=0.0)(student, normal((2, classes, size, size, size), 1))
    loss.backward()
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("level", [0.0, 0.37, 40.0, 1000.0])
def test_a_constant_teacher_gives_0_and_no_gradient_over_voxels(normal, classes, level):
    teacher = torch.zeros(2, classes, 3, 4, 5)
    teacher[:, 0] = level
    student = normal(tuple(teacher.shape), 0).requires_grad_()
    loss = DISTLoss(inter=0.0)(student, teacher)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max() == 0


def test_a_class_that_is_constant_in_the_teacher_is_left_out_of_the_mean(normal):
    # The third class has probability 0 everywhere, so the mean is over the other two classes.
    student, teacher = normal((2, 3, 3, 3, 3), 0), normal((2, 3, 3, 3, 3), 1)
    student[:, 2] = teacher[:, 2] = -200.0
    expected = reference(student[:, :2], teacher[:, :2], inter=0.0)
    assert DISTLoss(inter=0.0)(student, teacher).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-5, 30.0, 1e4])
def test_faint_and_saturated_predictions_give_a_finite_value_and_gradient(normal, scale):
    student = (scale * normal((2, 3, 4, 4, 4), 0)).requires_grad_()
    loss = DISTLoss()(student, scale * normal((2, 3, 4, 4, 4), 1))
    loss.backward()
    assert 0.0 <= loss.item() <= 4.0
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inter": -1.0}, "must not be negative, got -1.0 and 1.0"),
        ({"intra": -0.5}, "must not be negative, got 1.0 and -0.5"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_a_negative_factor_or_temperature_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DISTLoss(**options)
