# SPDX-License-Identifier: Apache-2.0
"""Measures of the predicted masks of an evaluation, each on its own grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scripts.evaluation.masks import MaskCoding
from scripts.evaluation.records import Case
from scripts.image_io.checks import Rules
from scripts.image_io.mask_measures import measure_files
from scripts.metrics.lesion_measures import Row, measure_rows


def measure_prediction(
    case: Case, paths: Mapping[str, Path], coding: MaskCoding, rules: Rules, pet: str | None
) -> tuple[list[Row], str]:
    """The rows of a case in the table of measures.

    Args:
        case: an item of the data list.
        paths: the masks by case.
        coding: what the values of the masks mean.
        rules: which files are accepted.
        pet: the modality that is a PET, if the task has one.

    Returns:
        The rows, none where the mask is missing or cannot be read; and why they have no uptake although the case has a
        PET, else empty.
    """
    case_id, image = str(case["case_id"]), case.get(pet or "")
    path, problem, measured = paths.get(case_id), "", []
    if path is None:
        return [], ""
    try:
        measured = measure_files(path, coding.predicted_regions, image, rules.of_case(case))
    except (ValueError, OSError) as error:
        problem = str(error)
    if problem and image:
        try:
            measured = measure_files(path, coding.predicted_regions)
        except (ValueError, OSError):
            problem = ""  # the mask itself, of which its score tells
    return measure_rows(case_id, measured), problem if image else ""
