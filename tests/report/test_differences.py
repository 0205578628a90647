# SPDX-License-Identifier: Apache-2.0
"""Why a prediction differs from its reference, on boxes whose differences can be counted."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.report.differences import mask_differences, region_sets, tolerance_mm

MM = (2.0, 1.0, 1.0)
VOXEL_ML = 2.0 / 1000


def box(*corners: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((30, 30, 30), dtype=np.uint8)
    mask[tuple(slice(*corner) for corner in corners)] = 1
    return mask


REFERENCE = box((5, 15), (5, 15), (5, 15))


def test_a_shift_is_border_on_both_sides() -> None:
    found = mask_differences(np.roll(REFERENCE, 2, 1), REFERENCE, MM)
    assert found.volumes_ml == {"border": pytest.approx(2 * 2 * 100 * VOXEL_ML)}
    assert found.reason == "border"
    assert found.tolerance_mm == 3


def test_what_lies_further_than_the_tolerance_is_missed_or_extra() -> None:
    half = REFERENCE.copy()
    half[:, 7:] = 0  # 8 of 10 rows of 1 mm are missed: 3 of them lie within 3 mm
    found = mask_differences(half, REFERENCE, MM)
    assert found.volumes_ml == {
        "missed part": pytest.approx(5 * 100 * VOXEL_ML),
        "border": pytest.approx(3 * 100 * VOXEL_ML),
    }
    assert found.text == "missed part 1.00 ml, border 0.60 ml"
    assert found.centre is not None
    assert found.centre[1] == 12  # the middle of rows 10 to 14
    with_island = REFERENCE | box((22, 26), (22, 25), (22, 25))
    found = mask_differences(with_island, REFERENCE, MM)
    assert found.volumes_ml == {"extra part": pytest.approx(4 * 9 * VOXEL_ML)}
    assert found.centre is not None
    assert all(22 <= index < 26 for index in found.centre)


@pytest.mark.parametrize(("prediction", "kind"), [(REFERENCE * 0, "missed part"), (REFERENCE, "extra part")])
def test_against_an_empty_mask_nothing_is_border(prediction: np.ndarray, kind: str) -> None:
    reference = REFERENCE if kind == "missed part" else REFERENCE * 0
    assert mask_differences(prediction, reference, MM).volumes_ml == {kind: pytest.approx(1000 * VOXEL_ML)}


def test_equal_and_empty_masks_have_no_reason() -> None:
    for mask in (REFERENCE, REFERENCE * 0):
        found = mask_differences(mask, mask, MM)
        assert (found.volumes_ml, found.reason, found.centre, found.text) == ({}, "", None, "no difference")


def test_other_values_are_a_wrong_region_only_where_values_matter() -> None:
    other = REFERENCE.copy()
    other[5, 5:15, 5:15] = 2
    assert mask_differences(other, REFERENCE, MM).volumes_ml == {}
    found = mask_differences(other, REFERENCE, MM, values_matter=True)
    assert found.volumes_ml == {"wrong region": pytest.approx(100 * VOXEL_ML)}


def test_the_tolerance_is_3_mm_or_the_longest_side_of_a_voxel() -> None:
    assert tolerance_mm((1, 1, 1)) == 3
    assert tolerance_mm((1, 5, 2)) == 5


def test_values_of_the_same_regions_are_no_difference() -> None:
    """Oedema as necrosis: both are the whole tumour only."""
    regions = {"WT": [1, 2, 4], "ET": [4]}
    reference, prediction = np.zeros((3, 3, 3)), np.zeros((3, 3, 3))
    reference[1], prediction[1] = 2, 1
    reference[1, 1, 1], prediction[1, 1, 1] = 4, 1
    sets = [region_sets(mask, regions) for mask in (prediction, reference)]
    found = mask_differences(*sets, MM, values_matter=True)
    assert found.volumes_ml == {"wrong region": pytest.approx(np.prod(MM) / 1000)}
    assert sets[0].max() == 1
