# SPDX-License-Identifier: Apache-2.0
"""AttentionMapLoss against arithmetic and a float64 NumPy computation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from scripts.losses import AttentionMapLoss

SHAPES = [(2, 3, 4, 5), (2, 3, 3, 4, 5)]
OPTIONS = [(1, "l1"), (1, "l2"), (2, "l1"), (2, "l2"), (3, "l2")]


@pytest.fixture(scope="session")
def reference(pooled: Callable[..., np.ndarray]) -> Callable[..., float]:
    """The docstring's formula in float64, on the element-wise smaller grid."""

    def compute(student: Tensor, teacher: Tensor, p: float = 2, norm: str = "l2") -> float:
        maps = [(np.abs(x.detach().double().numpy()) ** p).mean(axis=1) for x in (student, teacher)]
        grid = np.minimum(maps[0].shape, maps[1].shape)[1:]
        flat = [pooled(m, grid).reshape(len(m), -1) for m in maps]
        r = 1 if norm == "l1" else 2
        q_student, q_teacher = (m / np.linalg.norm(m, ord=r, axis=1, keepdims=True) for m in flat)
        return float((np.abs(q_student - q_teacher) ** r).sum(axis=1).mean())

    return compute


@pytest.mark.parametrize(
    ("p", "norm", "expected"),
    [(1, "l2", 2 / 25), (1, "l1", 2 / 7), (2, "l2", 2 * 49 / 337), (2, "l1", 14 / 25)],
)
def test_two_voxels_give_the_closed_form(p, norm, expected):
    # Activations 3, -4 against 4, 3: maps (3, 4) / 5 at p = 1, l2, and (9, 16) / sqrt(337) at p = 2, l2.
    student, teacher = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2), torch.tensor([4.0, 3.0]).view(1, 1, 1, 2)
    assert AttentionMapLoss(p, norm)(student, teacher).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("p", "norm"), OPTIONS)
def test_random_features_agree_with_numpy(normal, reference, shape, p, norm):
    student, teacher = normal(shape, 0), normal(shape, 1)
    loss = AttentionMapLoss(p, norm)(student, teacher)
    assert loss.item() == pytest.approx(reference(student, teacher, p, norm), abs=1e-6)


def test_the_defaults_are_squares_and_l2(normal, reference):
    student, teacher = normal(SHAPES[1], 0), normal(SHAPES[1], 1)
    assert AttentionMapLoss()(student, teacher).item() == pytest.approx(reference(student, teacher, 2, "l2"), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_it_is_zero_where_student_and_teacher_agree(normal, shape, norm):
    features = normal(shape, 0)
    assert AttentionMapLoss(norm=norm)(features, features.clone()).item() == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_student_receives_a_gradient(normal, shape):
    student, teacher = normal(shape, 0).requires_grad_(), normal(shape, 1).requires_grad_()
    AttentionMapLoss()(student, teacher).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradient_is_that_of_finite_differences(normal, reference, norm):
    student, teacher = normal((1, 2, 2, 3), 0).requires_grad_(), normal((1, 2, 2, 3), 1)
    AttentionMapLoss(norm=norm)(student, teacher).backward()
    step = 1e-5
    for index in np.ndindex(*student.shape):
        moved = [student.detach().double().clone() for _ in range(2)]
        moved[0][index] += step
        moved[1][index] -= step
        slope = (reference(moved[0], teacher, 2, norm) - reference(moved[1], teacher, 2, norm)) / (2 * step)
        assert student.grad[index].item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_silent_features_keep_value_and_gradient_finite(normal, p, norm):
    student = torch.zeros(2, 3, 2, 2, 2)
    student[0, 0] = 1.0
    student.requires_grad_()
    loss = AttentionMapLoss(p, norm)(student, normal((2, 3, 2, 2, 2), 1))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(normal, reference, shape, dtype):
    # 1000 squared is beyond the range of float16.
    student, teacher = (1000 * normal(shape, 0)).to(dtype), (1000 * normal(shape, 1)).to(dtype)
    loss = AttentionMapLoss()(student.requires_grad_(), teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_lower_the_precision(normal, reference, dtype):
    student, teacher = normal((2, 3, 4, 4, 4), 0, dtype), normal((2, 5, 2, 2, 2), 1, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = AttentionMapLoss()(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)


def test_the_order_and_sign_of_channels_change_nothing(normal, reference):
    student, teacher = normal((2, 4, 3, 3, 3), 0), normal((2, 4, 3, 3, 3), 1)
    loss = AttentionMapLoss()(-student[:, [2, 0, 3, 1]], teacher[:, [1, 3, 2, 0]])
    assert loss.item() == pytest.approx(reference(student, teacher), abs=1e-6)


@pytest.mark.parametrize(("p", "norm"), OPTIONS)
@pytest.mark.parametrize("factor", [1e-2, 1e3])
def test_a_common_scale_of_the_features_changes_nothing(normal, reference, p, norm, factor):
    student, teacher = normal(SHAPES[1], 0), normal(SHAPES[1], 1)
    loss = AttentionMapLoss(p, norm)(factor * student, teacher / factor)
    assert loss.item() == pytest.approx(reference(student, teacher, p, norm), abs=1e-6)


def test_the_channel_counts_may_differ(normal, reference):
    student, teacher = normal((2, 3, 3, 3, 3), 0), normal((2, 7, 3, 3, 3), 1)
    assert AttentionMapLoss()(student, teacher).item() == pytest.approx(reference(student, teacher), abs=1e-6)
    assert AttentionMapLoss()(student, student.repeat(1, 2, 1, 1, 1)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_maps_that_share_no_voxel_give_the_upper_bound_two_at_any_size(size, norm):
    student = torch.zeros(1, 1, size, size, size)
    student[..., : size // 2] = 1.0
    assert AttentionMapLoss(norm=norm)(student, 1 - student).item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("size", [2, 5, 9])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_value_lies_between_zero_and_two_at_any_size(normal, size, norm):
    for seed in range(5):
        student, teacher = normal((2, 2, size, size, size), seed), normal((2, 2, size, size, size), seed + 100)
        assert 0.0 <= AttentionMapLoss(4, norm)(student, teacher).item() <= 2.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_tiling_the_same_voxels_changes_nothing(normal, reference, shape, norm):
    # n tiles: every entry falls by n^(1/r), and n of them are summed at the power r.
    student, teacher = normal(shape, 0), normal(shape, 1)
    tiles = (1, 1, *[2] * (len(shape) - 2))
    loss = AttentionMapLoss(norm=norm)(student.repeat(tiles), teacher.repeat(tiles))
    assert loss.item() == pytest.approx(reference(student, teacher, 2, norm), abs=1e-6)


@pytest.mark.parametrize(
    ("student_grid", "teacher_grid"),
    [((4, 6), (2, 3)), ((2, 2), (4, 6)), ((4, 4, 4), (2, 2, 2)), ((2, 4, 3), (4, 2, 3)), ((3, 5, 4), (2, 4, 6))],
)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_differing_grids_meet_on_the_element_wise_smaller_one(normal, reference, student_grid, teacher_grid, norm):
    student, teacher = normal((2, 3, *student_grid), 0), normal((2, 5, *teacher_grid), 1)
    loss = AttentionMapLoss(norm=norm)(student, teacher)
    assert loss.item() == pytest.approx(reference(student, teacher, 2, norm), abs=1e-6)


def test_a_coarse_teacher_is_not_up_sampled():
    # Both cells of the teacher hold what the student has on average there; detail within a cell costs nothing.
    student = torch.tensor([math.sqrt(2), 0.0, 0.0, math.sqrt(6)]).view(1, 1, 1, 4)
    teacher = torch.tensor([1.0, math.sqrt(3)]).view(1, 1, 1, 2)
    assert AttentionMapLoss()(student, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_maps_are_pooled_before_they_are_normalised():
    # Powers (1, 0, 4, 4) pool to (1/2, 4); pooling after normalisation would pool (1, 0, 4, 4) / sqrt(33).
    student = torch.tensor([1.0, 0.0, 2.0, 2.0]).view(1, 1, 1, 4)
    teacher = torch.tensor([1.0, 1.0]).view(1, 1, 1, 2)
    expected = 2 - 2 * (0.5 + 4) / math.sqrt(0.5**2 + 4**2) / math.sqrt(2)
    assert AttentionMapLoss()(student, teacher).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4, 4), (2, 3, 4, 4), (2, 3, 4)])
def test_another_batch_or_dimension_is_refused_by_naming_both_shapes(shape):
    with pytest.raises(ValueError, match="with one B") as error:
        AttentionMapLoss()(torch.zeros(2, 3, 4, 4, 4), torch.zeros(shape))
    assert "(2, 3, 4, 4, 4)" in str(error.value)
    assert str(shape) in str(error.value)


def test_an_unknown_norm_lists_the_valid_ones():
    with pytest.raises(ValueError, match="Unknown norm 'l3': choose one of l1, l2"):
        AttentionMapLoss(norm="l3")


@pytest.mark.parametrize("p", [0, -1, 0.5])
def test_a_power_below_one_is_refused(p):
    with pytest.raises(ValueError, match=f"p must be at least 1, got {p}"):
        AttentionMapLoss(p=p)


def test_it_holds_no_parameters():
    assert not list(AttentionMapLoss().parameters())
