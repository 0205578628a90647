# SPDX-License-Identifier: Apache-2.0
"""Patch, strides and batch: within the median case, divisible, within the memory."""

from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceCELoss

from scripts.data.patch_plan import StudentSize, divisor, plan_patch, student_strides, training_bytes
from scripts.networks import Student

SIZE = StudentSize(2, 2, (24, 48, 96, 192), 8)
HALVED = [2, 2, 2]


@pytest.mark.parametrize(
    ("spacing", "patch", "expected"),
    [
        ((1, 1, 1), (64, 64, 64), [HALVED] * 4),
        ((1, 1, 1.9), (64, 64, 64), [HALVED] * 4),
        # In plane 0.5, 1, 2, 4 mm, until 5 mm are less than twice as long.
        ((0.5, 0.5, 5), (160, 160, 16), [[2, 2, 1], [2, 2, 1], [2, 2, 1], HALVED]),
        ((5, 0.5, 0.5), (16, 160, 160), [[1, 2, 2], [1, 2, 2], [1, 2, 2], HALVED]),
        ((1, 1, 2), (64, 64, 64), [[2, 2, 1], HALVED, HALVED, HALVED]),
        # Two cells are left along the last axis after two stages; it then no longer counts.
        ((1, 1, 1), (64, 64, 8), [HALVED, HALVED, [2, 2, 1], [2, 2, 1]]),
        ((1, 1, 1), (2, 3, 1), [[1, 1, 1]] * 4),
    ],
)
def test_axes_are_halved_while_their_voxels_are_short(
    spacing: tuple[float, ...], patch: tuple[int, ...], expected: list[list[int]]
) -> None:
    assert student_strides(spacing, patch, 4) == expected


def test_the_divisor_is_the_product_of_the_strides() -> None:
    assert divisor([[2, 2, 1], [2, 2, 1], HALVED, HALVED]) == [16, 16, 4]


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        ((64, 64, 32), [HALVED] * 4),
        ((48, 48, 48), [HALVED] * 4),
        ((96, 96, 10), [[2, 2, 1], [2, 2, 1], [2, 2, 1], HALVED]),
    ],
)
@pytest.mark.parametrize("size", [SIZE, StudentSize(4, 5, (16, 32, 64, 128), 8)])
def test_the_memory_is_twice_what_autograd_keeps(
    patch: tuple[int, int, int], strides: list[list[int]], size: StudentSize
) -> None:
    torch.manual_seed(0)
    network = Student(size.in_channels, size.out_channels, size.features, size.full_features, strides=strides)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    image = torch.rand(1, size.in_channels, *patch)
    label = torch.randint(0, size.out_channels, (1, 1, *patch)).float()
    loss = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(network(image), label)
    assert training_bytes(patch, 1, strides, size) == pytest.approx(2 * sum(kept.values()), rel=0.15)


@pytest.mark.parametrize("gib", [0.1, 0.5, 8])
@pytest.mark.parametrize(
    ("spacing", "shape"),
    [
        ((1, 1, 1), (512, 512, 300)),
        ((0.5, 0.5, 5), (512, 512, 24)),
        ((3, 3, 3), (100, 90, 60)),
        ((1, 1, 1), (40, 40, 15)),
        ((4, 0.7, 0.7), (19, 333, 401)),
    ],
)
def test_a_patch_fits(spacing: tuple[float, ...], shape: tuple[int, ...], gib: float) -> None:
    plan = plan_patch(spacing, [shape] * 20, SIZE, gib)
    assert all(n <= most for n, most in zip(plan.patch, shape, strict=True))
    assert not any(n % step for n, step in zip(plan.patch, divisor(plan.strides), strict=True))
    assert plan.gib <= gib
    assert Student(2, 2, SIZE.features, strides=plan.strides).divisor == divisor(plan.strides)
    assert 2 <= plan.batch <= 16
    assert plan.batch == 2 or plan.batch * math.prod(plan.patch) <= 0.0501 * 20 * math.prod(shape) + math.prod(
        plan.patch
    )


def test_more_memory_gives_no_smaller_patch() -> None:
    voxels = [math.prod(plan_patch((1, 1, 1), [(256, 256, 256)] * 9, SIZE, gib).patch) for gib in (0.2, 0.5, 1, 2, 4)]
    assert voxels == sorted(voxels)
    assert voxels[-1] == 128**3  # patches do not grow beyond; batches do


def test_the_patch_is_about_equally_long_along_all_axes() -> None:
    plan = plan_patch((0.5, 0.5, 2), [(400, 400, 400)] * 9, SIZE, 8)
    assert plan.patch == [192, 192, 48]  # 203 x 203 x 51 voxels of 101.6 mm have 128^3 voxels


def test_a_step_has_no_case_twice() -> None:
    assert plan_patch((1, 1, 1), [(64, 64, 64)], SIZE, 8).batch == 1
    assert plan_patch((1, 1, 1), [(64, 64, 64)] * 3, SIZE, 8).batch == 2


def test_fixed_settings_are_followed() -> None:
    shapes = [(128, 128, 128)] * 20
    patch = plan_patch((1, 1, 1), shapes, SIZE, 0.5, patch=[48, 40, 50])
    assert patch.patch == [48, 40, 50]
    assert divisor(patch.strides) == [16, 8, 2]
    strides = plan_patch((1, 1, 1), shapes, SIZE, 8, strides=[[2, 2, 1], HALVED, HALVED, HALVED])
    assert strides.strides == [[2, 2, 1], HALVED, HALVED, HALVED]
    batch = plan_patch((1, 1, 1), shapes, SIZE, 0.5, batch=8)
    assert batch.batch == 8
    assert batch.gib <= 0.5
    assert math.prod(batch.patch) < math.prod(plan_patch((1, 1, 1), shapes, SIZE, 0.5).patch)


def test_a_memory_that_is_too_small_gives_the_smallest_patch() -> None:
    plan = plan_patch((1, 1, 1), [(64, 64, 64)] * 5, SIZE, 1e-6)
    assert plan.gib > 1e-6
    assert max(plan.patch) <= 3
