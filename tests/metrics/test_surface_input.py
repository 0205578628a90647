# SPDX-License-Identifier: Apache-2.0
"""Surface metrics: accepted and refused input, undefined values, Dice of two masks, image diagonal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from scripts.metrics import dice, image_diagonal_mm, surface_metrics

SPACING = (0.7, 1.3, 3.1)


@pytest.mark.parametrize(
    ("prediction", "reference", "dice", "status"),
    [(0, 1, 0.0, "missed"), (1, 0, 0.0, "false_positive"), (0, 0, None, "true_negative")],
)
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6)])
def test_empty_masks_get_a_status_and_no_distance(prediction, reference, dice, status, shape) -> None:
    masks = [np.zeros(shape, dtype=np.uint8) for _ in range(2)]
    masks[0][1, 2], masks[1][2, 2] = prediction, reference
    expected = {"dice": dice, "hd95_mm": None, "assd_mm": None, "status": status}
    assert surface_metrics(*masks, (1.0,) * len(shape)) == expected


@pytest.mark.parametrize("convert", [torch.from_numpy, lambda m: torch.from_numpy(m).float(), np.int16, np.float32])
def test_tensors_integers_and_zero_one_floats_equal_booleans(convert) -> None:
    a, b = np.random.default_rng(3).random((2, 9, 8, 7)) > 0.6
    assert surface_metrics(convert(a), convert(b), SPACING) == surface_metrics(a, b, SPACING)


def test_any_nonzero_label_is_foreground_without_overflow() -> None:
    a, b = np.zeros((2, 12, 12, 12), dtype=bool)
    a[:10, :10, :10] = b[1:11, 1:11, 1:11] = True
    labels = a.astype(np.uint8) * 255, b.astype(np.int8) * 3
    assert surface_metrics(*labels, (1, 1, 1)) == surface_metrics(a, b, (1, 1, 1))


def test_shape_mismatch_names_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3, 5\)"):
        surface_metrics(np.ones((2, 3, 4)), np.ones((2, 3, 5)), (1, 1, 1))


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, -1, 1), (1, 1, math.nan), (math.inf, 1, 1), 1.0])
def test_spacing_must_be_finite_positive_and_one_per_axis(spacing) -> None:
    with pytest.raises(ValueError, match="spacing must hold 3 finite positive values in mm"):
        surface_metrics(np.ones((2, 2, 2)), np.ones((2, 2, 2)), spacing)


@pytest.mark.parametrize("value", [0.5, 2.0, math.nan])
def test_probabilities_and_nan_are_refused_instead_of_thresholded_silently(value: float) -> None:
    mask = np.full((2, 2, 2), value)
    with pytest.raises(ValueError, match="prediction of type float64 holds values other than 0 and 1"):
        surface_metrics(mask, np.ones((2, 2, 2)), (1, 1, 1))


def test_a_channel_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without batch and channel axes, got shape \(1, 2, 2, 2\)"):
        surface_metrics(np.ones((1, 2, 2, 2)), np.ones((1, 2, 2, 2)), (1, 1, 1))


@pytest.mark.parametrize("convert", [np.array, torch.tensor])
def test_dice_of_arrays_and_tensors_is_undefined_for_two_empty_masks(convert: Any) -> None:
    a, b = convert([True, True, False, False]), convert([True, False, False, True])
    assert dice(a, b) == 0.5
    assert dice(a, ~a) == 0.0
    assert dice(a & ~a, b & ~b) is None


def test_image_diagonal_covers_whole_voxels() -> None:
    assert image_diagonal_mm((3, 4), (1, 1)) == pytest.approx(5)
    assert image_diagonal_mm((10, 10, 1), (0.6, 0.8, 2.0)) == pytest.approx(math.sqrt(36 + 64 + 4))


def test_image_diagonal_exceeds_every_distance_in_the_image() -> None:
    a, b = np.zeros((2, 5, 4, 3), dtype=bool)
    a[0, 0, 0] = b[-1, -1, -1] = True
    assert surface_metrics(a, b, SPACING)["hd95_mm"] < image_diagonal_mm(a.shape, SPACING)


@pytest.mark.parametrize("shape", [(0, 3, 3), (3, -1, 3)])
def test_image_diagonal_refuses_an_empty_image(shape) -> None:
    with pytest.raises(ValueError, match="shape must hold positive sizes"):
        image_diagonal_mm(shape, SPACING)
