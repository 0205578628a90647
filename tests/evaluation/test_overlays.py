# SPDX-License-Identifier: Apache-2.0
"""The order in which the report of an evaluation lists its cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scripts.evaluation.overlays import worst_first
from scripts.evaluation.records import modality_images
from scripts.image_io.checks import Rules


def case(name: str, dice: float | None, status: str = "ok") -> dict[str, Any]:
    return {"case_id": name, "dice": dice, "status": status}


def test_the_worst_case_is_first_with_ties_ordered_by_case_id() -> None:
    rows = [case("d", 0.9), case("b", 0.9), case("m", 0.0, "missed"), case("f", 0.0, "false_positive"), case("c", 0.1)]
    assert worst_first(rows) == ["f", "m", "c", "b", "d"]


def test_cases_without_a_dice_come_last_and_cases_without_a_mask_are_left_out() -> None:
    rows = [case("x", None, "true_negative"), case("e", None, "error"), case("a", 1.0)]
    assert worst_first(rows) == ["a", "x"]
    assert worst_first([]) == []


def test_the_images_of_a_case_are_files_of_their_own_or_channels_of_one(write_nifti: Any, tmp_path: Path) -> None:
    four = str(write_nifti(tmp_path / "four.nii.gz", np.zeros((2, 3, 4, 2), np.float32), np.eye(4)))
    three = str(write_nifti(tmp_path / "three.nii.gz", np.zeros((2, 3, 4), np.float32), np.eye(4)))

    def images(**case: str) -> dict[str, tuple[str, int]]:
        return modality_images(case, ["ct", "pet"], Rules())

    assert images(image=three, ct=three, pet=three) == {"ct": (three, 0), "pet": (three, 0)}
    assert images(image=three, ct=three) == {"ct": (three, 0)}
    assert images(image=four) == {"ct": (four, 0), "pet": (four, 1)}
    assert images(image=three) == {}
    assert images(image=str(tmp_path / "none.nii.gz")) == {}
