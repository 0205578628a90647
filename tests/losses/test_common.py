# SPDX-License-Identifier: Apache-2.0
"""The helpers that the losses share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts.losses._common import kl_divergence, to_common_grid, two_class_logits, unit_vectors


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid", "max_cells"),
    [((4, 6), (2, 3), None), ((2, 4, 3), (4, 2, 3), None), ((7, 3), (5, 4), 2), ((5, 5, 2), (3, 7, 1), 4)],
)
def test_different_grids_are_pooled_to_the_smaller_size_of_each_axis(
    normal, on_common_grid, student_grid, teacher_grid, max_cells
):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 5, *teacher_grid), 1)
    limit = {} if max_cells is None else {"max_cells": max_cells}
    for pooled, expected in zip(
        to_common_grid(student, teacher, max_cells), on_common_grid(student, teacher, **limit), strict=True
    ):
        np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-6)


def test_unit_vectors_keep_their_direction():
    vectors = unit_vectors(torch.tensor([[3.0, -4.0], [0.0, 2e-9]]), dim=1)
    assert vectors.tolist() == [pytest.approx([0.6, -0.8]), [0.0, 1.0]]


def test_a_zero_vector_stays_zero_and_gets_no_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    unit_vectors(x, dim=1).sum().backward()
    assert unit_vectors(x, dim=1).abs().sum() == 0
    assert x.grad.abs().sum() == 0


def test_the_divergence_of_two_distributions():
    teacher, student = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert kl_divergence(teacher.log(), student.log(), dim=0).item() == pytest.approx(expected, rel=1e-6)


def test_a_single_channel_becomes_two_classes_with_the_probabilities_of_the_sigmoid(normal):
    logits = normal((2, 1, 3, 4), 0)
    torch.testing.assert_close(two_class_logits(logits).softmax(dim=1)[:, 1:], logits.sigmoid())
    assert two_class_logits(logits.repeat(1, 3, 1, 1)).shape == (2, 3, 3, 4)
